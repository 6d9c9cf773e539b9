"""The evaluation of a set of examples: metrics and loss, by scored options or by generated text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import answer_tokens, collate, collate_prompts, width
from zofo.scoring.scorer import OptionTotals, Scorer, count
from zofo.scoring.tokens import Example, LossKind
from zofo.tasks.metrics import OPTION_METRICS, TEXT_METRICS, score

Scoring = Literal["mean", "sum", "pmi", "channel"]
Place = Callable[[Any], Any]

_NEW_TOKENS = 50
_ANSWER_TOKENS = 512  # in one forward, about: each has logits over the whole vocabulary


def require_scorable(adapted: AdaptedModel, metrics: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuses what cannot be scored right.

    Raises:
        ZofoError: for generated text behind virtual tokens, where peft's `generate` differs from its own forward; and
            for a row without a choice between options, if the metric that decides is of the choice.
    """
    metric = metrics[0]
    alone = next((e for e in examples if len(e.answers) < 2), None) if metric in OPTION_METRICS else None
    if alone is not None:
        raise ZofoError(
            f"{metric} needs options to choose from, but the row with the answer {alone.texts[0]!r} has fewer than "
            f"two: give options, or for generated answers set loss to lm and the metric to {' or '.join(TEXT_METRICS)}"
        )
    metric = next((metric for metric in metrics if metric in TEXT_METRICS), metric)
    if metric in TEXT_METRICS and adapted.prompt_learning:
        raise ZofoError(
            f"{metric} needs generated text, which peft gets wrong behind virtual tokens on several models: choose "
            "lora, or give options"
        )


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str],
    kind: LossKind,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    place: Place = lambda batch: batch,
    scoring: Scoring = "mean",
    premises: Sequence[Example] = (),
) -> dict[str, float]:
    """The metrics and the mean loss of a set of examples, in eval mode.

    Args:
        scorer: the model, with the adapter to evaluate in use.
        examples: the set.
        metrics: some of `METRICS`; the first one decides.
        kind: of the loss.
        tokenizer: for padding and generated text.
        batch_size: examples per forward at most; they are sorted by length first.
        place: moves a batch to the model's device.
        scoring: of an option y behind a prompt x, in its n tokens: "mean" is log P(y|x) / n, "sum" is log P(y|x), and
            "pmi" is log P(y|x) - log P(y|premise), the calibrated score; "channel" is log P(x|y), for examples that
            `prompting.as_channel` turned around.
        premises: for "pmi", the same options behind premises, in the same order.

    Returns:
        {metric: value, "loss": value, "rows": number of examples}; the loss over options is the cross-entropy of the
        scores.

    References:
        A. Holtzman et al., "Surface Form Competition" (2021) for "pmi"; S. Min et al., "Noisy Channel Language Model
        Prompting" (2022) for "channel".
    """
    require_scorable(scorer.adapted, metrics, examples)
    scorer.adapted.model.eval()
    if kind == "options" or metrics[0] in OPTION_METRICS:
        scores = _all_scores(scorer, examples, scoring, premises, tokenizer, batch_size, place)
    else:
        scores = []
    loss = (
        _lm_loss(scorer, examples, tokenizer, batch_size, place) if kind == "lm" else _options_loss(examples, scores)
    )
    if metrics[0] in OPTION_METRICS:
        chosen = [e.texts[int(own.argmax())] for e, own in zip(examples, scores, strict=True)]
    else:
        chosen = _generated(scorer, examples, tokenizer, batch_size, place)
    found = {
        metric: score(
            metric,
            chosen,
            [(e.texts[e.gold], *e.right) for e in examples],
            options=[e.texts for e in examples],
            groups=[e.group for e in examples],
        )
        for metric in metrics
    }
    return {**found, "loss": loss, "rows": len(examples)}


def by_length(examples: Sequence[Example], batch_size: int, kind: LossKind) -> list[list[int]]:
    """The numbers of the examples in groups of similar length."""
    order = sorted(range(len(examples)), key=lambda i: width(examples[i], kind))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def option_totals(
    scorer: Scorer,
    group: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    place: Place = lambda batch: batch,
) -> OptionTotals:
    """The log-probabilities of all options."""
    return scorer.option_totals(place(collate(group, "options", _pad_id(tokenizer), scorer.layout)))


def _all_scores(
    scorer: Scorer,
    examples: Sequence[Example],
    scoring: Scoring,
    premises: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    place: Place,
) -> list[Tensor]:
    """The scores of each example's options."""
    found: dict[int, Tensor] = {}
    for numbers in _of_few_answers(examples, by_length(examples, batch_size, "options")):
        totals = option_totals(scorer, [examples[i] for i in numbers], tokenizer, place)
        scores = totals.means if scoring == "mean" else totals.sums
        found.update({i: own[: len(examples[i].answers)] for i, own in zip(numbers, scores.cpu(), strict=True)})
    scores = [found[i] for i in range(len(examples))]
    if scoring != "pmi":
        return scores
    known: dict[tuple[Any, ...], Tensor] = {}  # most rows share one premise and its options
    for example in premises:
        key = (example.prompt, example.answers)
        if key not in known:
            known[key] = option_totals(scorer, [example], tokenizer, place).sums[0].cpu()
    behind = [known[example.prompt, example.answers] for example in premises]
    return [own - without for own, without in zip(scores, behind, strict=True)]


def _of_few_answers(examples: Sequence[Example], groups: Sequence[list[int]]) -> Generator[list[int]]:
    """The groups, in equal parts where their answers have more than `_ANSWER_TOKENS`."""
    for group in groups:
        tokens = len(group) * max(answer_tokens(examples[i]) for i in group)  # padded
        parts = max(1, -(-tokens // _ANSWER_TOKENS))
        size = -(-len(group) // parts)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _options_loss(examples: Sequence[Example], scores: Sequence[Tensor]) -> float:
    losses = [
        functional.cross_entropy(own, torch.tensor(example.gold))
        for example, own in zip(examples, scores, strict=True)
    ]
    return float(torch.stack(losses).double().mean())


def _lm_loss(
    scorer: Scorer, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int, place: Place
) -> float:
    total, parts = 0.0, 0
    for numbers in by_length(examples, batch_size, "lm"):
        batch = place(collate([examples[i] for i in numbers], "lm", _pad_id(tokenizer), scorer.layout))
        total += float(scorer.loss(batch))
        parts += count(batch)
    return total / parts


def _generated(
    scorer: Scorer, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int, place: Place
) -> list[str]:
    """The greedy text of each example, up to a line break or the end."""
    model: Any = scorer.adapted.model
    texts: dict[int, str] = {}
    ends = [tokenizer.eos_token_id, *_line_breaks(tokenizer)]
    for numbers in by_length(examples, batch_size, "lm"):
        batch = place(collate_prompts([examples[i] for i in numbers], _pad_id(tokenizer)))
        ids = batch["input_ids"]
        room = max(1, min(_NEW_TOKENS, scorer.adapted.positions - ids.shape[1]))
        config = GenerationConfig(max_new_tokens=room, do_sample=False, pad_token_id=_pad_id(tokenizer))
        config.eos_token_id = ends
        with _plain_generation(scorer.adapted):
            output = model.generate(input_ids=ids, attention_mask=batch["attention_mask"], generation_config=config)
        answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        texts.update({i: text.split("\n")[0].strip() for i, text in zip(numbers, answers, strict=True)})
    return [texts[i] for i in range(len(examples))]


@contextmanager
def _plain_generation(adapted: AdaptedModel) -> Generator[None]:
    """Within the block, what a model's own file wants of generation (penalties, beams) is not filled in."""
    own, adapted.base.generation_config = adapted.base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        adapted.base.generation_config = own


@lru_cache(maxsize=2)
def _line_breaks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that hold a line break, at which an answer ends."""
    return [number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
