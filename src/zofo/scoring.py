"""Losses and scores of batches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from zofo.adapters import AdaptedModel
from zofo.data import (
    IGNORED,
    NO_CANDIDATE,
    Batch,
    SharedPrompts,
    stack,
)

_CACHED_TOKENS = 4096  # of shared prompts, copied at once for the options behind them
_PADDING = 32  # tokens, in a forward of options: about what one more forward costs on a CPU


@dataclass(frozen=True)
class OptionTotals:
    """What every option amounts to, of B examples with at most J options.

    Args:
        sums: (B, J) log-probability of its scored tokens; -inf where there is no option.
        counts: (B, J) how many they are.
    """

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """(B, J) mean log-probability per token; -inf where there is no option."""
        return self.sums / self.counts

    @staticmethod
    def of_rows(sums: Tensor, counts: Tensor, rows: Tensor) -> OptionTotals:
        """From those of each row, and the row of each option (-1: none)."""
        numbers, missing = rows.clamp(min=0), rows == NO_CANDIDATE
        return OptionTotals(sums[numbers].masked_fill(missing, -torch.inf), counts[numbers])


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
        self._cache = next((name for name in ("cache", "past_key_values") if name in accepted), "")  # new and old name
        # virtual tokens are a cache of peft's own
        self.shares_prompts = bool(self._cache) and not adapted.prompt_learning and _caches_tokens(adapted.base)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(float32 logits, targets) at the positions from the first target of any row to the end."""
        ids, mask, targets = batch["input_ids"], batch["attention_mask"], batch["targets"]
        start = int((targets != IGNORED).any(0).nonzero()[0])
        keep = targets.shape[1] - start
        extra = self._window(keep, ids)
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

    def losses(self, batches: Sequence[Batch], adapters: Sequence[str]) -> list[Tensor]:
        """The `loss` of each batch through its adapter, from one forward of all their rows: cheaper than one each.

        Several adapters only if the model `mixes` them.
        """
        rows = [len(batch["input_ids"]) for batch in batches]
        with self.adapted.through([name for name, count in zip(adapters, rows, strict=True) for _ in range(count)]):
            if len(batches) == 1:
                return [self.loss(batches[0])]
            logits, targets = self.logits(stack(batches, self.padding_side))
        parts = zip(batches, logits.split(rows), targets.split(rows), strict=True)
        return [_loss(batch, own_logits, own_targets) for batch, own_logits, own_targets in parts]

    def option_totals(self, batch: Batch) -> OptionTotals:
        """The log-probabilities of every option."""
        return _option_totals(batch, *self.logits(batch))

    @torch.no_grad()
    def shared_totals(self, batch: SharedPrompts) -> OptionTotals:
        """The `option_totals` of the same examples; every prompt is read once, and its cache serves all options."""
        prompts, answers, targets = batch["prompts"], batch["answers"], batch["answers"]["targets"]
        cache = DynamicCache(config=self.adapted.base.config)
        last = self._read(prompts, cache, self._window(1, prompts["input_ids"]))
        sums = functional.log_softmax(last[:, -1], dim=-1)[batch["owner"], batch["first"]] * batch["scored"]
        rows = max(len(last), _CACHED_TOKENS // prompts["input_ids"].shape[1])
        widths = answers["attention_mask"].sum(1).tolist()
        for chunk in _of_similar_width(widths, rows):
            owner, width = batch["owner"][chunk], widths[chunk[0]]
            mask = torch.cat([prompts["attention_mask"][owner], answers["attention_mask"][chunk, :width]], dim=1)
            ids, own = answers["input_ids"][chunk, :width], targets[chunk, :width]
            logits = self._read(
                {"input_ids": ids, "attention_mask": mask, "targets": own}, _selected(cache, owner), {}
            )
            sums[chunk] -= _losses(logits, own).sum(1)
        return OptionTotals.of_rows(sums, batch["scored"] + (targets != IGNORED).sum(1), batch["rows"])

    def _window(self, keep: int, ids: Tensor) -> dict[str, Any]:
        """What makes the model give logits of the last `keep` positions alone."""
        # as indices, which copy: a slice is a view, which torch multiplies with the whole head once for each row
        return {"logits_to_keep": torch.arange(-keep, 0, device=ids.device)} if self._windowed else {}

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
        return functional.cross_entropy(_option_totals(batch, logits, targets).means, batch["gold"], reduction="sum")
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(R, S) cross-entropy at each position, 0 where nothing is asked."""
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)


def _option_totals(batch: Batch, logits: Tensor, targets: Tensor) -> OptionTotals:
    if "candidates" in batch:
        where = (targets != IGNORED).int().argmax(1)
        at_answer = functional.log_softmax(logits[torch.arange(len(where)), where], dim=-1)
        missing = batch["candidates"] == NO_CANDIDATE
        sums = at_answer.gather(1, batch["candidates"].clamp(min=0)).masked_fill(missing, -torch.inf)
        return OptionTotals(sums, torch.ones_like(batch["candidates"]))
    assert "rows" in batch
    return OptionTotals.of_rows(-_losses(logits, targets).sum(1), (targets != IGNORED).sum(1), batch["rows"])


def _caches_tokens(model: PreTrainedModel) -> bool:
    """Whether a forward leaves keys and values of tokens behind, and no state of a recurrence or a convolution."""
    if model._is_stateful:  # pyright: ignore[reportPrivateUsage]
        return False
    layers = DynamicCache(config=model.config).layers
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _of_similar_width(widths: Sequence[int], most: int) -> list[list[int]]:
    """The rows that are not empty in groups of at most `most`, the widest first, so that little is padded."""
    groups: list[list[int]] = []
    padding = 0
    filled = [row for row, width in enumerate(widths) if width]
    for row in sorted(filled, key=lambda row: -widths[row]):
        padding += widths[groups[-1][0]] - widths[row] if groups else 0
        if not groups or len(groups[-1]) == most or padding > _PADDING:
            groups.append([])
            padding = 0
        groups[-1].append(row)
    return groups


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """The cache of some rows, in any order and number; the given one stays."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.reorder_cache(cast(Any, rows))
    return chosen


def count(batch: Batch) -> int:
    """What a batch's summed loss is divided by: its examples, or its answer tokens."""
    return len(batch["gold"]) if "gold" in batch else int((batch["targets"] != IGNORED).sum())
