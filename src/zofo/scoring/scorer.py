"""Losses and scores of batches."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import PROMPT, UNLIMITED, Batch, Layout, apart, stack


@dataclass(frozen=True)
class OptionTotals:
    """The log-probabilities of all options, of B examples with at most J options."""

    sums: Tensor  # (B, J) log-probability of an option's scored tokens; -inf where there is no option
    counts: Tensor  # (B, J) number of these tokens

    @property
    def means(self) -> Tensor:
        """(B, J) mean log-probability per token; -inf where there is no option."""
        return self.sums / self.counts.clamp(min=1)


@dataclass
class Tokens:
    """The number of tokens that the model has read."""

    forward_tokens: int = 0
    backward_tokens: int = 0


class Scorer:
    """Runs batches through a model with the adapter in use, and counts `tokens` up with every forward pass.

    `layout` is that of rows without virtual tokens, as `padding.probe` finds it; by default the one with the fewest
    tokens, which is not exact for every model.
    """

    def __init__(self, adapted: AdaptedModel, tokens: Tokens, layout: Layout | None = None) -> None:
        self.adapted = adapted
        self.tokens = tokens
        self.layout = Layout("right") if adapted.prompt_learning else layout or widest_layout(adapted)
        self._selects_logits = "logits_to_keep" in signature(adapted.base.forward).parameters
        # with right padding the model's own positions are right, and peft shifts them by its virtual tokens itself
        self._passes_positions = self.layout.side == "left" and _takes_positions(adapted)
        self._max_shared = max_shared_width(adapted)
        self._noted: list[Tensor] | None = None

    @property
    def generates_alone(self) -> bool:
        """Whether text is generated row by row: `generate` pads on the left, and may cross `max_shared_width`."""
        return self.layout.side == "right" or self._max_shared < UNLIMITED

    def log_probabilities(self, batch: Batch) -> Tensor:
        """(N,) float32 log-probability of each scored token."""
        if batch["input_ids"].shape[1] > self._max_shared:
            return torch.cat([self._log_probabilities(row) for row in apart(batch)])
        return self._log_probabilities(batch)

    def _log_probabilities(self, batch: Batch) -> Tensor:
        rows, positions, tokens = batch["scored"]
        start = int(positions.min())
        keep = batch["input_ids"].shape[1] - start
        self.tokens.forward_tokens += int(batch["attention_mask"].sum())
        logits = self.adapted.model(**self._inputs(batch, keep), use_cache=False).logits[:, -keep:]
        if len(rows) < logits.shape[0] * keep:  # not all of these logits are needed
            return logits[rows, positions - start].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return logits.float().log_softmax(-1)[rows, positions - start, tokens]

    def loss(self, batch: Batch) -> Tensor:
        """The summed float32 loss of a batch: divide by `count`.

        For options, cross-entropy over their mean log-probabilities; else that of the answers' tokens.
        """
        return self._loss(batch, self.log_probabilities(batch))

    def fit_together(self, batches: Sequence[Batch]) -> bool:
        """Whether the rows of several batches can be in one forward pass."""
        width = max(batch["input_ids"].shape[1] for batch in batches)
        # one mask serves all rows, and the wider ones need that of a sliding window
        mask_fits = width <= self.layout.max_width or all("segments" not in batch for batch in batches)
        return mask_fits and width <= self._max_shared

    def losses(self, batches: Sequence[Batch], adapters: Sequence[str]) -> list[Tensor]:
        """The `loss` of each batch with its adapter. One forward pass of all rows costs less than one for each batch.

        The adapters may differ only if the model `mixes`.
        """
        if len(batches) > 1 and not self.fit_together(batches):
            return [self.losses([batch], [name])[0] for batch, name in zip(batches, adapters, strict=True)]
        rows = [len(batch["input_ids"]) for batch in batches]
        with self.adapted.through([name for name, count in zip(adapters, rows, strict=True) for _ in range(count)]):
            if len(batches) == 1:
                return [self.loss(batches[0])]
            stacked = self.log_probabilities(stack(batches, self.layout.side))
        parts = stacked.split([batch["scored"].shape[1] for batch in batches])
        return [self._loss(batch, part) for batch, part in zip(batches, parts, strict=True)]

    @contextmanager
    def noting_rows(self, wanted: bool = True) -> Generator[list[Tensor]]:
        """Within the block, each batch adds its `row_losses` to the list, if they are wanted."""
        noted: list[Tensor] = []
        self._noted = noted if wanted else None
        try:
            yield noted
        finally:
            self._noted = None

    def _loss(self, batch: Batch, log_probabilities: Tensor) -> Tensor:
        if self._noted is not None:
            self._noted.append(row_losses(batch, log_probabilities.detach()))
        return _loss(batch, log_probabilities)

    def option_totals(self, batch: Batch) -> OptionTotals:
        return _option_totals(batch, self.log_probabilities(batch))

    def _inputs(self, batch: Batch, keep: int) -> dict[str, Any]:
        """The arguments of a forward pass of which only the last `keep` positions' logits are needed."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._selects_logits:
            # as indices, which copy: a slice is a view, which torch multiplies with the whole head once for each row
            inputs["logits_to_keep"] = torch.arange(-keep, 0, device=ids.device)
        if "segments" in batch:
            readable = _readable(batch["segments"])
            inputs |= {"attention_mask": self._mask(readable), "position_ids": readable.sum(-1) - 1}
        elif self._passes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return inputs

    def _mask(self, readable: Tensor) -> Tensor:
        """(R, 1, S, S) as the model's attention takes it."""
        if _attention(self.adapted.base) == "sdpa":
            return readable[:, None]
        zeros = torch.zeros(readable.shape, dtype=self.adapted.base.dtype, device=readable.device)
        return zeros.masked_fill(~readable, torch.finfo(zeros.dtype).min)[:, None]


def _loss(batch: Batch, log_probabilities: Tensor) -> Tensor:
    if "gold" in batch:
        means = _option_totals(batch, log_probabilities).means
        return functional.cross_entropy(means, batch["gold"], reduction="sum")
    return -log_probabilities.sum()


def row_losses(batch: Batch, log_probabilities: Tensor) -> Tensor:
    """(B,) float64 shares of the examples in the summed loss of a batch: of (N,) log-probabilities of its tokens."""
    if "gold" in batch:
        means = _option_totals(batch, log_probabilities).means
        return functional.cross_entropy(means, batch["gold"], reduction="none").double()
    rows = batch["scored"][0]
    shares = torch.zeros(len(batch["input_ids"]), dtype=torch.float64, device=rows.device)
    return shares.index_add(0, rows, -log_probabilities.double())


def _option_totals(batch: Batch, log_probabilities: Tensor) -> OptionTotals:
    assert "slots" in batch
    slots = batch["slots"]
    filled = slots >= 0
    sums = log_probabilities[slots.clamp(min=0)].masked_fill(~filled, 0.0).sum(-1)
    counts = filled.sum(-1)
    return OptionTotals(sums.masked_fill(counts == 0, -torch.inf), counts)


def _readable(segments: Tensor) -> Tensor:
    """(R, S, S) whether a position reads another: itself, and earlier ones of the prompt and of its own option."""
    here, there = segments[:, :, None], segments[:, None, :]
    positions = torch.arange(segments.shape[1], device=segments.device)
    earlier = positions[:, None] > positions
    itself = positions[:, None] == positions  # so that padding reads something: otherwise it would be nan
    return earlier & ((there == PROMPT) | (there == here) & (here > 0)) | itself


def widest_layout(adapted: AdaptedModel) -> Layout:
    """Padding on the left, and options side by side where a mask of any form keeps them apart."""
    if not _takes_positions(adapted):
        return Layout("left")
    return Layout("left", min(adapted.positions, max_shared_width(adapted), _max_masked_width(adapted.base)))


def max_shared_width(adapted: AdaptedModel) -> int:
    """The most tokens of rows that may be in one forward pass: LongRoPE rotates all rows by the longest of them."""
    config = adapted.base.config.to_dict()
    own = config.get("rope_parameters") or {}
    kinds = [own, *(value for value in own.values() if isinstance(value, dict))]  # one, or one for each kind of layer
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    if limits and adapted.prompt_learning:
        return 0  # virtual tokens count as well
    return min(limits, default=UNLIMITED)


def _takes_positions(adapted: AdaptedModel) -> bool:
    return "position_ids" in signature(adapted.base.forward).parameters and not _counts_from_padding(adapted.base)


def _max_masked_width(model: PreTrainedModel) -> int:
    """The most tokens of a row that the model reads correctly with a mask of any form and positions in any order."""
    # the flag says that transformers makes the mask itself: it leaves a mask of four dimensions unchanged
    if not model._supports_attention_backend or _attention(model) not in ("sdpa", "eager"):  # pyright: ignore[reportPrivateUsage]
        return 0
    if model.config.to_dict().get("output_router_logits"):
        return 0  # the balance of experts is computed with a mask of two dimensions
    layers = DynamicCache(config=model.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0  # recurrent or convolutional states, which masks do not affect
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min(windows, default=UNLIMITED)


def _counts_from_padding(model: PreTrainedModel) -> bool:
    """Whether positions start after the index of the padding, as in RoBERTa, which then computes them itself."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return any(isinstance(table, nn.Embedding) and table.padding_idx is not None for table in tables)


def _attention(model: PreTrainedModel) -> str | None:
    return model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]


def count(batch: Batch) -> int:
    """The divisor of a batch's summed loss: the number of its examples, or of its answer tokens."""
    return len(batch["gold"]) if "gold" in batch else batch["scored"].shape[1]
