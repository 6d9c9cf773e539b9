"""Losses and scores of batches, and the evaluation of a set of examples."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from zofo import metrics
from zofo.adapters import AdaptedModel
from zofo.data import (
    IGNORED,
    NO_CANDIDATE,
    Batch,
    Example,
    LossKind,
    SharedPrompts,
    collate,
    collate_shared,
    pad,
    stack,
)
from zofo.errors import ZofoError

_NEW_TOKENS = 32
_ROWS_PER_PROMPT = 4  # of options behind shared prompts, in one forward


@dataclass
class Tokens:
    """How many tokens went through the model."""

    forward: int = 0
    backward: int = 0


class Scorer:
    """Runs batches through a model, in whatever adapter is in use.

    Args:
        adapted: the model.
        tokens: is counted up with every forward.
    """

    def __init__(self, adapted: AdaptedModel, tokens: Tokens) -> None:
        self.adapted = adapted
        self.tokens = tokens
        accepted = inspect.signature(adapted.base.forward).parameters
        self._windowed = "logits_to_keep" in accepted
        # peft shifts positions by its virtual tokens itself; with right padding the model's own count is right
        self.padding_side = "right" if adapted.prompt_learning else "left"
        self._positions = "position_ids" in accepted and not adapted.prompt_learning
        # virtual tokens are a cache of peft's own, and what a state-space model remembers is no cache of tokens
        stateful = adapted.base._is_stateful  # pyright: ignore[reportPrivateUsage]
        self._cache = next((name for name in ("cache", "past_key_values") if name in accepted), "")  # new and old name
        self.shares_prompts = bool(self._cache) and not adapted.prompt_learning and not stateful

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(float32 logits, targets) at the positions from the first target of any row to the end."""
        ids, mask, targets = batch["input_ids"], batch["attention_mask"], batch["targets"]
        start = int((targets != IGNORED).any(0).nonzero()[0])
        keep = targets.shape[1] - start
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._windowed else {}
        if self._positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        self.tokens.forward += int(mask.sum())
        output = self.adapted.model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
        return output[:, -keep:].float(), targets[:, -keep:]

    def loss(self, batch: Batch) -> Tensor:
        """The summed float32 loss of a batch: divide by `count`.

        For options, cross-entropy over the candidates' mean log-probabilities; else that of the answers' tokens.
        """
        return _loss(batch, *self.logits(batch))

    def losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The `loss` of each batch, from one forward of all their rows: cheaper than one forward each."""
        if len(batches) == 1:
            return [self.loss(batches[0])]
        rows = [len(batch["input_ids"]) for batch in batches]
        logits, targets = self.logits(stack(batches, self.padding_side))
        parts = zip(batches, logits.split(rows), targets.split(rows), strict=True)
        return [_loss(batch, own_logits, own_targets) for batch, own_logits, own_targets in parts]

    def option_scores(self, batch: Batch) -> Tensor:
        """(B, J) mean log-probability per token of each option; -inf where there is none."""
        return _option_scores(batch, *self.logits(batch))

    @torch.no_grad()
    def shared_scores(self, batch: SharedPrompts) -> Tensor:
        """The `option_scores` of the same examples; every prompt is read once, and its cache serves all options."""
        prompts, answers, targets = batch["prompts"], batch["answers"], batch["answers"]["targets"]
        cache = DynamicCache(config=self.adapted.base.config)
        last = self._read(prompts, cache, {"logits_to_keep": 1} if self._windowed else {})
        sums = functional.log_softmax(last[:, -1], dim=-1)[batch["owner"], batch["first"]]
        rows = _ROWS_PER_PROMPT * len(last)  # all at once would hold a cache for every option
        for chunk in torch.arange(len(sums)).split(rows):
            owner = batch["owner"][chunk]
            mask = torch.cat([prompts["attention_mask"][owner], answers["attention_mask"][chunk]], dim=1)
            part: Batch = {"input_ids": answers["input_ids"][chunk], "attention_mask": mask, "targets": targets[chunk]}
            logits = self._read(part, _selected(cache, owner), {})
            losses = functional.cross_entropy(
                logits.flatten(0, 1), targets[chunk].flatten(), ignore_index=IGNORED, reduction="none"
            )
            sums[chunk] -= losses.view(len(chunk), -1).sum(1)
        missing = batch["rows"] == NO_CANDIDATE
        return (sums / (1 + (targets != IGNORED).sum(1)))[batch["rows"].clamp(min=0)].masked_fill(missing, -torch.inf)

    def _read(self, batch: Batch, cache: DynamicCache, extra: dict[str, Any]) -> Tensor:
        """The float32 logits behind a cache, which grows; the mask also covers what it holds already."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        extra = {**extra, self._cache: cache}
        if self._positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.tokens.forward += int(mask[:, -ids.shape[1] :].sum())
        return self.adapted.model(input_ids=ids, attention_mask=mask, use_cache=True, **extra).logits.float()


def _loss(batch: Batch, logits: Tensor, targets: Tensor) -> Tensor:
    if "gold" in batch:
        return functional.cross_entropy(_option_scores(batch, logits, targets), batch["gold"], reduction="sum")
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _option_scores(batch: Batch, logits: Tensor, targets: Tensor) -> Tensor:
    if "candidates" in batch:
        where = (targets != IGNORED).int().argmax(1)
        at_answer = functional.log_softmax(logits[torch.arange(len(where)), where], dim=-1)
        missing = batch["candidates"] == NO_CANDIDATE
        return at_answer.gather(1, batch["candidates"].clamp(min=0)).masked_fill(missing, -torch.inf)
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    means = -losses.sum(1) / (targets != IGNORED).sum(1)
    assert "rows" in batch
    missing = batch["rows"] == NO_CANDIDATE
    return means[batch["rows"].clamp(min=0)].masked_fill(missing, -torch.inf)


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """The cache of some rows, in any order and number; the given one stays."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.reorder_cache(cast(Any, rows))
    return chosen


def count(batch: Batch) -> int:
    """What a batch's summed loss is divided by: its examples, or its answer tokens."""
    return len(batch["gold"]) if "gold" in batch else int((batch["targets"] != IGNORED).sum())


def require_scorable(adapted: AdaptedModel, metric: str) -> None:
    """Refuses what cannot be scored right.

    Raises:
        ZofoError: for generated text behind virtual tokens, where peft's `generate` differs from its own forward.
    """
    if metric in metrics.TEXT_METRICS and adapted.prompt_learning:
        raise ZofoError(
            f"{metric} needs generated text, which peft gets wrong behind virtual tokens on several models: choose "
            "lora, or give options"
        )


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    metric: str,
    kind: LossKind,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> dict[str, float]:
    """The metric and the mean loss of a set of examples, in eval mode.

    Args:
        scorer: the model, with the adapter to evaluate in use.
        examples: the set.
        metric: one of `metrics.METRICS`.
        kind: of the loss.
        tokenizer: for padding and generated text.
        batch_size: examples per forward; they are sorted by length first.
        place: moves a batch to the model's device.

    Returns:
        {metric: value, "loss": value, "rows": number of examples}.
    """
    require_scorable(scorer.adapted, metric)
    scorer.adapted.model.eval()
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    total, parts, chosen = 0.0, 0, dict[int, str]()
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        group = [examples[i] for i in numbers]
        if kind == "options":
            scores = _scores(scorer, group, tokenizer, place)
            gold = torch.tensor([e.gold for e in group], device=scores.device)
            total += float(functional.cross_entropy(scores, gold, reduction="sum"))
            texts = [e.texts[int(j)] for e, j in zip(group, scores.argmax(1), strict=True)]
            parts += len(group)
        else:
            batch = place(collate(group, kind, _pad_id(tokenizer), scorer.padding_side))
            total += float(scorer.loss(batch))
            texts = _answers(scorer, group, metric, tokenizer, place)
            parts += count(batch)
        chosen.update(zip(numbers, texts, strict=True))
    answers = [e.texts[e.gold] for e in examples]
    value = metrics.score(metric, [chosen[i] for i in range(len(examples))], answers)
    return {metric: value, "loss": total / parts, "rows": len(examples)}


def _scores(
    scorer: Scorer,
    group: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    place: Callable[[Any], Any],
) -> Tensor:
    """The scores of all options, by the cheapest way that the options and the model allow."""
    several = any(len(answer) > 1 for example in group for answer in example.answers)
    if several and scorer.shares_prompts:
        return scorer.shared_scores(place(collate_shared(group, _pad_id(tokenizer))))
    return scorer.option_scores(place(collate(group, "options", _pad_id(tokenizer), scorer.padding_side)))


def _answers(
    scorer: Scorer,
    group: list[Example],
    metric: str,
    tokenizer: PreTrainedTokenizerBase,
    place: Callable[[Any], Any],
) -> list[str]:
    """What the model says: the best option, or for generation the greedy text up to a line break."""
    if metric in metrics.OPTION_METRICS:
        scores = _scores(scorer, group, tokenizer, place)
        return [e.texts[int(j)] for e, j in zip(group, scores.argmax(1), strict=True)]
    # a dummy answer of one token: what is left to read is the prompt
    batch = place(pad([(e.prompt, (0,)) for e in group], _pad_id(tokenizer), "left"))
    ids = batch["input_ids"]
    room = max(1, min(_NEW_TOKENS, scorer.adapted.positions - ids.shape[1]))
    config = GenerationConfig(max_new_tokens=room, do_sample=False, pad_token_id=_pad_id(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    model: Any = scorer.adapted.model
    output = model.generate(input_ids=ids, attention_mask=batch["attention_mask"], generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
