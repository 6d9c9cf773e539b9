"""The evaluation of a set of examples: metrics and loss, by scored options or by generated text."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import answer_tokens, collate, collate_prompts, width
from zofo.scoring.scorer import OptionTotals, Scorer, count
from zofo.scoring.tokens import Example, LossKind
from zofo.tasks.metrics import OPTION_METRICS, TEXT_METRICS, score

Scoring = Literal["mean", "sum", "pmi", "channel"]
Place = Callable[[Any], Any]

_NEW_TOKENS = 50  # of a generated text, unless a right answer is longer
_MARGIN = 10  # tokens more than the longest right answer: a model may divide the same text into more of them
_ANSWER_TOKENS = 512  # in one forward pass, about: each has logits over the whole vocabulary


def require_scorable(adapted: AdaptedModel, metrics: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuses to compare options where an example has fewer than two, and to generate what cannot be generated.

    That is text after virtual tokens, and an answer for which the model has no positions after its prompt.
    """
    metric = metrics[0]
    alone = next((e for e in examples if len(e.answers) < 2), None) if metric in OPTION_METRICS else None
    if alone is not None:
        raise ZofoError(
            f"{metric} needs options to choose from, but the row with the answer {alone.texts[0]!r} has fewer than "
            f"two: give options, or for generated answers set loss to lm and the metric to {' or '.join(TEXT_METRICS)}"
        )
    text_metric = next((metric for metric in metrics if metric in TEXT_METRICS), None)
    if text_metric and adapted.prompt_learning:
        raise ZofoError(
            f"{text_metric} needs generated text, which peft gets wrong after virtual tokens on several models: "
            "choose lora, or give options"
        )
    wide = next((e for e in examples if _room_wanted(e) > adapted.positions - len(e.prompt)), None)
    if text_metric and wide is not None:
        raise ZofoError(
            f"{text_metric} needs generated text, but a prompt of {len(wide.prompt)} tokens and its answer of "
            f"{_room_wanted(wide)} do not fit into the {adapted.positions} positions of the model: lower max_length, "
            "or shorten the answers"
        )


@dataclass(frozen=True)
class AnswerSpan:
    """How much generated text is an answer, which follows from the right answers.

    Args:
        leading: line breaks before the first word that are skipped: as many as a right answer begins with.
        breaks: line breaks inside an answer.
        tokens: the most that are generated.
    """

    leading: int = 0
    breaks: int = 0
    tokens: int = _NEW_TOKENS

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The span that holds each right answer of these examples."""
        texts = {text for e in examples for text in (e.texts[e.gold], *e.right)}
        lengths = [len(e.answers[e.gold]) - 1 for e in examples]  # without the end
        long = [text for text in texts if len(text.encode()) >= _NEW_TOKENS]  # no token is shorter than a byte
        if long:
            behind_a_prompt = [f" {text.strip()}" for text in long]
            lengths += [len(ids) for ids in tokenizer(behind_a_prompt, add_special_tokens=False)["input_ids"]]
        longest = max(lengths)
        return cls(
            leading=max(text[: len(text) - len(text.lstrip())].count("\n") for text in texts),
            breaks=max(text.strip().count("\n") for text in texts),
            tokens=longest + _MARGIN if longest > _NEW_TOKENS else _NEW_TOKENS,
        )

    def cut(self, text: str) -> str:
        """The answer at the start of a generated text."""
        return "\n".join(self._lines(text)[: self.breaks + 1]).strip()

    def is_full(self, text: str) -> bool:
        """Whether no more text can become a part of the answer."""
        return len(self._lines(text)) > self.breaks + 1

    def _lines(self, text: str) -> list[str]:
        lines = text.split("\n")
        skipped = 0
        while skipped < min(self.leading, len(lines) - 1) and not lines[skipped].strip():
            skipped += 1
        return lines[skipped:]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the adapter in use on sets of examples.

    Args:
        scorer: the model.
        tokenizer: for padding and generated text.
        metrics: some of `METRICS`; the first one decides whether options are compared or text is generated.
        kind: of the loss.
        batch_size: the most examples per forward pass; they are sorted by length first.
        place: moves a batch to the model's device.
        scoring: of an option y after a prompt x, in its n tokens: "mean" is log P(y|x) / n, "sum" is log P(y|x), and
            "pmi" is log P(y|x) - log P(y|premise), the calibrated score; "channel" is log P(x|y), for examples of
            records that `as_channel` turned around.
        trained: the examples of training, whose answers a generated text must have room for as well.

    References:
        A. Holtzman et al., "Surface Form Competition" (2021) for "pmi"; S. Min et al., "Noisy Channel Language Model
        Prompting" (2022) for "channel".
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    metrics: Sequence[str]
    kind: LossKind
    batch_size: int
    place: Place = lambda batch: batch
    scoring: Scoring = "mean"
    trained: Sequence[Example] = ()

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], premises: Sequence[Example] = ()) -> dict[str, float]:
        """The metrics and the mean loss of a set of examples, in eval mode.

        Args:
            examples: the set.
            premises: for "pmi", the same options after the premises, in the same order.

        Returns:
            {metric: value, "loss": value, "rows": number of examples}; the loss over options is the cross-entropy of
            their scores.
        """
        require_scorable(self.scorer.adapted, self.metrics, examples)
        self.scorer.adapted.model.eval()
        compares = self.metrics[0] in OPTION_METRICS
        scores = self._option_scores(examples, premises) if compares or self.kind == "options" else []
        loss = self._lm_loss(examples) if self.kind == "lm" else _options_loss(examples, scores)
        if compares:
            answers = [e.texts[int(row.argmax())] for e, row in zip(examples, scores, strict=True)]
        else:
            answers = self._generated(examples)
        references = [(e.texts[e.gold], *e.right) for e in examples]
        options, groups = [e.texts for e in examples], [e.group for e in examples]
        values = {m: score(m, answers, references, options=options, groups=groups) for m in self.metrics}
        return {**values, "loss": loss, "rows": len(examples)}

    def _option_scores(self, examples: Sequence[Example], premises: Sequence[Example]) -> list[Tensor]:
        """The scores of each example's options."""
        by_index: dict[int, Tensor] = {}
        for indices in _of_few_answers(examples, by_length(examples, self.batch_size, "options")):
            totals = self._totals([examples[i] for i in indices])
            values = (totals.means if self.scoring == "mean" else totals.sums).cpu()
            by_index.update({i: row[: len(examples[i].answers)] for i, row in zip(indices, values, strict=True)})
        scores = [by_index[i] for i in range(len(examples))]
        if self.scoring != "pmi":
            return scores
        unconditional: dict[tuple[Any, ...], Tensor] = {}  # most examples share one premise and its options
        for example in premises:
            key = (example.prompt, example.answers)
            if key not in unconditional:
                unconditional[key] = self._totals([example]).sums[0].cpu()
        return [row - unconditional[e.prompt, e.answers] for row, e in zip(scores, premises, strict=True)]

    def _totals(self, examples: Sequence[Example]) -> OptionTotals:
        return option_totals(self.scorer, examples, self.tokenizer, self.place)

    def _lm_loss(self, examples: Sequence[Example]) -> float:
        total, parts = 0.0, 0
        for indices in by_length(examples, self.batch_size, "lm"):
            rows = [examples[i] for i in indices]
            batch = self.place(collate(rows, "lm", _pad_id(self.tokenizer), self.scorer.layout))
            total += float(self.scorer.loss(batch))
            parts += count(batch)
        return total / parts

    def _generated(self, examples: Sequence[Example]) -> list[str]:
        """The greedy text of each example, as far as it can be an answer."""
        adapted, tokenizer = self.scorer.adapted, self.tokenizer
        model: Any = adapted.model
        texts: dict[int, str] = {}
        span = AnswerSpan.of([*examples, *self.trained], tokenizer)
        size = 1 if self.scorer.generates_alone else self.batch_size
        for indices in _with_room(examples, by_length(examples, size, "lm"), adapted.positions):
            batch = self.place(collate_prompts([examples[i] for i in indices], _pad_id(tokenizer)))
            ids = batch["input_ids"]
            config = GenerationConfig(
                max_new_tokens=max(1, min(span.tokens, adapted.positions - ids.shape[1])),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            with _plain_generation(adapted):
                output = model.generate(
                    input_ids=ids, attention_mask=batch["attention_mask"], generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_AnswerEnds(tokenizer, span, ids.shape[1])]),
                )  # fmt: skip
            answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            texts.update({i: span.cut(text) for i, text in zip(indices, answers, strict=True)})
        return [texts[i] for i in range(len(examples))]


@torch.no_grad()
def option_totals(
    scorer: Scorer,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    place: Place = lambda batch: batch,
) -> OptionTotals:
    """The log-probabilities of all options, from one batch."""
    return scorer.option_totals(place(collate(examples, "options", _pad_id(tokenizer), scorer.layout)))


def by_length(examples: Sequence[Example], batch_size: int, kind: LossKind) -> list[list[int]]:
    """The indices of the examples in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: width(examples[i], kind))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _of_few_answers(examples: Sequence[Example], batches: Sequence[list[int]]) -> Generator[list[int]]:
    """The batches, in equal parts where their answers have more than `_ANSWER_TOKENS`."""
    for batch in batches:
        tokens = len(batch) * max(answer_tokens(examples[i]) for i in batch)  # padded
        parts = max(1, -(-tokens // _ANSWER_TOKENS))
        size = -(-len(batch) // parts)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def _options_loss(examples: Sequence[Example], scores: Sequence[Tensor]) -> float:
    pairs = zip(examples, scores, strict=True)
    losses = [functional.cross_entropy(row, torch.tensor(example.gold)) for example, row in pairs]
    return float(torch.stack(losses).double().mean())


def _room_wanted(example: Example) -> int:
    """The positions that an answer takes after its prompt: its last token is generated, but not read."""
    return len(example.answers[example.gold]) - 1


def _with_room(examples: Sequence[Example], batches: Sequence[list[int]], positions: int) -> Generator[list[int]]:
    """The batches; an example for whose answer the padding of its batch leaves no room goes alone."""
    for batch in batches:
        room = positions - max(len(examples[i].prompt) for i in batch)
        alone = [i for i in batch if _room_wanted(examples[i]) > room]
        together = [i for i in batch if i not in alone]
        yield from [together] if together else []
        yield from ([i] for i in alone)


class _AnswerEnds(StoppingCriteria):
    """Ends the generation of each text of which no more can become a part of an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, span: AnswerSpan, start: int) -> None:
        self._tokenizer, self._span, self._start = tokenizer, span, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts: list[str] = self._tokenizer.batch_decode(input_ids[:, -1:])
        if any("\n" in text for text in texts):  # only a line break can end a text
            texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([self._span.is_full(text) for text in texts], device=input_ids.device)


@contextmanager
def _plain_generation(adapted: AdaptedModel) -> Generator[None]:
    """Within the block, the model's own generation settings (penalties, beams) are not used."""
    stored, adapted.base.generation_config = adapted.base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        adapted.base.generation_config = stored


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
