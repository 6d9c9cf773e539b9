"""Mean losses over batches, of one or several adapters, in few forwards."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zofo.errors import NonFiniteLossError
from zofo.methods.populations import Asked
from zofo.methods.signal import contributions
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer, count

_TOGETHER = 2048  # tokens of a forward, beyond which one of more batches saves no time and takes their memory


@torch.no_grad()
def mean_losses(scorer: Scorer, asked: Asked, rows: list[Tensor] | None = None) -> list[float]:
    """The mean loss over the batches of each entry in eval mode, summed in double precision.

    The n-th batches of all entries go through the model together, in one forward; in one for each adapter, where rows
    of one forward cannot go through different ones; one by one if they are large. `asked` is the loss's name -> the
    adapter and the batches. What the rows of each entry contribute to its mean is added to `rows`, where there are any:
    (B,) float64.
    """
    scorer.adapted.model.eval()
    adapters = list(dict.fromkeys(adapter for adapter, _ in asked.values()))
    sums, shares = dict.fromkeys(asked, 0.0), {label: list[Tensor]() for label in asked}
    for together in [adapters] if scorer.adapted.mixes else [[adapter] for adapter in adapters]:
        group = {label: pair for label, pair in asked.items() if pair[0] in together}
        names = [adapter for adapter, _ in group.values()]
        for batches in zip(*(batches for _, batches in group.values()), strict=True):
            with scorer.noting_rows(rows is not None) as noted:
                found = _losses(scorer, batches, names)
            for label, loss in zip(group, found, strict=True):
                sums[label] += float(loss)
            for label, part in zip(group, noted, strict=False):
                shares[label].append(part)
    means = {label: sums[label] / sum(map(count, batches)) for label, (_, batches) in asked.items()}
    for label, mean in means.items():
        if not math.isfinite(mean):
            raise NonFiniteLossError(f"{label} is {mean}: lower zo_learning_rate or zo_eps, or set on_nonfinite: skip")
    if rows is not None:
        rows += [contributions(shares[label], batches) for label, (_, batches) in asked.items()]
    return list(means.values())


def _losses(scorer: Scorer, batches: Sequence[Batch], names: Sequence[str]) -> list[Tensor]:
    if sum(batch["input_ids"].numel() for batch in batches) <= _TOGETHER:
        return scorer.losses(batches, names)
    return [scorer.losses([batch], [name])[0] for batch, name in zip(batches, names, strict=True)]
