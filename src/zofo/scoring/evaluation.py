"""The evaluation of a set of examples: metrics and loss, by scored options or by generated text."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import answer_tokens, collate, collate_prompts, width
from zofo.scoring.scorer import OptionTotals, Scorer, count
from zofo.scoring.tokens import Example, LossKind
from zofo.tasks.metrics import OPTION_METRICS, TEXT_METRICS, score

Scoring = Literal["mean", "sum", "pmi", "channel"]
Place = Callable[[Any], Any]

_NEW_TOKENS = 50
_ANSWER_TOKENS = 512  # in one forward pass, about: each has logits over the whole vocabulary


def require_scorable(adapted: AdaptedModel, metrics: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuses to compare options where an example has fewer than two, and to generate text after virtual tokens."""
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
        """The greedy text of each example, up to a line break or the end."""
        adapted, tokenizer = self.scorer.adapted, self.tokenizer
        model: Any = adapted.model
        texts: dict[int, str] = {}
        line_break = _line_break(tokenizer)
        for indices in by_length(examples, self.batch_size, "lm"):
            batch = self.place(collate_prompts([examples[i] for i in indices], _pad_id(tokenizer)))
            ids = batch["input_ids"]
            config = GenerationConfig(
                max_new_tokens=max(1, min(_NEW_TOKENS, adapted.positions - ids.shape[1])),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            with _plain_generation(adapted):
                output = model.generate(
                    input_ids=ids, attention_mask=batch["attention_mask"], generation_config=config,
                    stopping_criteria=line_break,
                )  # fmt: skip
            answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            texts.update({i: text.split("\n")[0].strip() for i, text in zip(indices, answers, strict=True)})
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


def _line_break(tokenizer: PreTrainedTokenizerBase) -> StoppingCriteriaList:
    """Ends the generation of a text at its first line break, where the tokenizer has a token for one."""
    try:
        return StoppingCriteriaList([StopStringCriteria(tokenizer, ["\n"])])
    except ValueError:  # such as BERT's: its texts have no line breaks
        return StoppingCriteriaList()


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
