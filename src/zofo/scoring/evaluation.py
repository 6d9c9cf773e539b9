"""The evaluation of a set of examples: metrics and loss, by scored options or by generated text."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from zofo.errors import NonFiniteLossError, ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import answer_tokens, by_length, collate, padding_id
from zofo.scoring.generation import ONE_LINE, AnswerSpan, Near, Place, generate, room_wanted
from zofo.scoring.scorer import OptionTotals, Scorer, count
from zofo.scoring.tokens import Example, LossKind
from zofo.tasks.metrics import TEXT_METRICS, Metric, compares_options, metric_name, score, score_by
from zofo.tasks.records import Record
from zofo.tasks.rewards import REWARD, Rewards

Scoring = Literal["mean", "sum", "pmi", "channel"]
_ANSWER_TOKENS = 512  # in one forward pass, about: each has logits over the whole vocabulary


def require_scorable(adapted: AdaptedModel, metrics: Sequence[Metric], examples: Sequence[Example]) -> None:
    """Refuses to compare options where an example has fewer than two, and to generate what cannot be generated.

    That is text after virtual tokens, and an answer for which the model has no positions after its prompt.
    """
    compares = compares_options(metrics, _have_options(examples))
    metric = REWARD if metrics[0] == REWARD else metric_name(metrics[0])
    alone = next((e for e in examples if len(e.answers) < 2), None) if compares else None
    if alone is not None:
        raise ZofoError(
            f"{metric} needs options to choose from, but the row with the answer {alone.texts[0]!r} has fewer than "
            f"two: give options, or for generated answers set loss to lm and the metric to {' or '.join(TEXT_METRICS)}"
        )
    text_metric = next((metric for metric in metrics if metric in TEXT_METRICS), None if compares else metric)
    if text_metric and adapted.prompt_learning:
        raise ZofoError(
            f"{text_metric} needs generated text, which peft gets wrong after virtual tokens on several models: "
            "choose lora, or give options"
        )
    wide = next((e for e in examples if room_wanted(e) > adapted.positions - len(e.prompt)), None)
    if text_metric and wide is not None:
        raise ZofoError(
            f"{text_metric} needs generated text, but a prompt of {len(wide.prompt)} tokens and its answer of "
            f"{room_wanted(wide)} do not fit into the {adapted.positions} positions of the model: lower max_length, "
            "or shorten the answers"
        )


@dataclass(frozen=True)
class Answer:
    """What a model answers: a text, and the scores of the options that it was chosen from, (J,) float32, or None.

    Where there are reward functions, also the reward, or None if none of them applies.
    """

    text: str
    scores: Tensor | None = None
    reward: float | None = None

    @property
    def probabilities(self) -> list[float]:
        """Of the options, as far as their scores are log-probabilities: a softmax over them."""
        return [] if self.scores is None else self.scores.double().softmax(-1).tolist()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the adapter in use on sets of examples.

    Args:
        scorer: the model.
        tokenizer: for padding and generated text.
        metrics: some of `METRICS`, or functions; the first one with a name decides whether options are compared or
            text is generated.
        kind: of the loss.
        batch_size: the most examples per forward pass; they are sorted by length first.
        place: moves a batch to the model's device.
        scoring: of an option y after a prompt x, in its n tokens: "mean" is log P(y|x) / n, "sum" is log P(y|x), and
            "pmi" is log P(y|x) - log P(y|premise), the calibrated score; "channel" is log P(x|y), for examples of
            records that `as_channel` turned around.
        span: how long a generated answer may be at least; right answers of the set that are longer fit as well.
        progress: what a progress bar says on a terminal; no bar if it is empty.
        rewards: of whole generated texts; `metrics` is then the word reward alone.

    References:
        A. Holtzman et al., "Surface Form Competition" (2021) for "pmi"; S. Min et al., "Noisy Channel Language Model
        Prompting" (2022) for "channel".
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    metrics: Sequence[Metric]
    kind: LossKind
    batch_size: int
    place: Place = lambda batch: batch
    scoring: Scoring = "mean"
    span: AnswerSpan = ONE_LINE
    progress: str = ""
    rewards: Rewards | None = None

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], premises: Sequence[Example] = ()) -> dict[str, float]:
        """{metric: value, "loss": mean, "rows": number} of a set of examples, in eval mode.

        The loss over options is the cross-entropy of their scores. `premises` are for "pmi": the same options after the
        premises, in the same order.
        """
        return self.measure(examples, self.answers(examples, premises), premises)

    @torch.no_grad()
    def answers(self, examples: Sequence[Example], premises: Sequence[Example] = ()) -> list[Answer]:
        """What the model answers to each example, in eval mode, and the rewards of that, if there are any."""
        return self.rewarded(examples, self.unrewarded(examples, premises))

    def rewarded(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Answer]:
        """The same answers with their rewards, from a call for each batch."""
        if self.rewards is None:
            return [*answers]
        records, texts = records_of(examples), [answer.text for answer in answers]
        parts = [slice(low, low + self.batch_size) for low in range(0, len(texts), self.batch_size)]
        values = [value for part in parts for value in self.rewards.of(records[part], texts[part])]
        return [Answer(answer.text, reward=value) for answer, value in zip(answers, values, strict=True)]

    @torch.no_grad()
    def unrewarded(self, examples: Sequence[Example], premises: Sequence[Example] = ()) -> list[Answer]:
        """The answers alone: no reward function is called."""
        require_scorable(self.scorer.adapted, self.metrics, examples)
        self.scorer.adapted.model.eval()
        if compares_options(self.metrics, _have_options(examples)):
            scores = self._option_scores(examples, premises)
            return [Answer(e.texts[int(row.argmax())], row) for e, row in zip(examples, scores, strict=True)]
        return self.generated(examples)

    @torch.no_grad()
    def generated(self, examples: Sequence[Example], copies: int = 1, near: Near = nullcontext) -> list[Answer]:
        """Generated answers, in eval mode; with `copies`, those of each copy in turn, as `generate` says."""
        self.scorer.adapted.model.eval()
        span = self.span | AnswerSpan.of(examples, self.tokenizer)
        manner = (span, self.batch_size, self.place, self._bar, copies, near)
        return [Answer(text) for text in generate(self.scorer, self.tokenizer, examples, *manner)]

    @torch.no_grad()
    def measure(
        self, examples: Sequence[Example], answers: Sequence[Answer], premises: Sequence[Example] = ()
    ) -> dict[str, float]:
        """The metrics and the mean loss of these answers, as `evaluate` returns them.

        Rows that have no right answers have no loss.
        """
        if self.rewards is not None and not all(record.answered for record in records_of(examples)):
            return {REWARD: mean_reward(answers), "rows": len(examples)}
        if self.kind == "lm":
            loss = self._lm_loss(examples)
        else:
            known = [answer.scores for answer in answers if answer.scores is not None]
            loss = _options_loss(examples, known or self._option_scores(examples, premises))
        texts = [answer.text for answer in answers]
        references = [(e.texts[e.gold], *e.right) for e in examples]
        options, groups = [e.texts for e in examples], [e.group for e in examples]
        values: dict[str, float] = {}
        for metric in self.metrics:
            if metric == REWARD:
                values[REWARD] = mean_reward(answers)
            elif isinstance(metric, str):
                values[metric] = score(metric, texts, references, options=options, groups=groups)
            else:
                values |= score_by(metric, texts, references)
        return {**values, "loss": loss, "rows": len(examples)}

    def _option_scores(self, examples: Sequence[Example], premises: Sequence[Example]) -> list[Tensor]:
        by_index: dict[int, Tensor] = {}
        for indices in self._bar([*_of_few_answers(examples, by_length(examples, self.batch_size, "options"))]):
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
        """The log-probabilities of all options, from one batch."""
        return self.scorer.option_totals(
            self.place(collate(examples, "options", padding_id(self.tokenizer), self.scorer.layout))
        )

    def _lm_loss(self, examples: Sequence[Example]) -> float:
        total, parts = 0.0, 0
        for indices in self._bar(by_length(examples, self.batch_size, "lm")):
            rows = [examples[i] for i in indices]
            batch = self.place(collate(rows, "lm", padding_id(self.tokenizer), self.scorer.layout))
            total += float(self.scorer.loss(batch))
            parts += count(batch)
        return total / parts

    def _bar(self, batches: list[list[int]]) -> Iterable[list[int]]:
        """The batches, with a progress bar if somebody looks at it."""
        return tqdm(batches, self.progress, leave=False, disable=None if self.progress else True)


def require_numbers(answers: Sequence[Answer]) -> None:
    """Refuses scores that are nan, of which the best option is the first, so that a broken model would seem to answer.

    A run that meets them says more of the cause.
    """
    broken = [answer for answer in answers if answer.scores is not None and bool(answer.scores.isnan().any())]
    if broken:
        raise NonFiniteLossError(
            f"the scores of {len(broken)} of {len(answers)} rows are nan: the weights are not finite, or dtype "
            "overflows: try dtype: float32"
        )


def records_of(examples: Sequence[Example]) -> list[Record]:
    """The rows that the examples were made from."""
    return [example.record for example in examples if example.record is not None]


def mean_reward(answers: Sequence[Answer]) -> float:
    """Over the answers to which a reward applies.

    Raises:
        ZofoError: if there is none.
    """
    values = [answer.reward for answer in answers if answer.reward is not None]
    if not values:
        raise ZofoError(
            f"no reward applies to any of {len(answers)} completions: let a reward function return a number for them, "
            "or leave such rows out"
        )
    return sum(values) / len(values)


def _of_few_answers(examples: Sequence[Example], batches: Sequence[list[int]]) -> Generator[list[int]]:
    """The batches, in equal parts where their answers have more than `_ANSWER_TOKENS`."""
    for batch in batches:
        tokens = len(batch) * max(answer_tokens(examples[i]) for i in batch)  # padded
        parts = max(1, -(-tokens // _ANSWER_TOKENS))
        size = -(-len(batch) // parts)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def _have_options(examples: Sequence[Example]) -> bool:
    return all(len(example.answers) > 1 for example in examples)


def _options_loss(examples: Sequence[Example], scores: Sequence[Tensor]) -> float:
    pairs = zip(examples, scores, strict=True)
    losses = [functional.cross_entropy(row, torch.tensor(example.gold)) for example, row in pairs]
    return float(torch.stack(losses).double().mean())
