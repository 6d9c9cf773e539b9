"""The losses of a population: every point of a step on its rows, many points in one forward."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zofo.errors import FORWARD_ERRORS, NonFiniteLossError, ZofoError, in_one_line, is_lack_of_memory
from zofo.methods.signal import contributions
from zofo.scoring.batch import Batch, share
from zofo.scoring.scorer import Scorer, Tokens, count
from zofo.zo.estimators import Point
from zofo.zo.population import INSTEAD, Rows

Asked = Mapping[str, tuple[str, Sequence[Batch]]]
"""The name of a loss -> the adapter and the batches over which it is the mean."""

_DIRECTIONS = 3  # that `require_groups` compares: more than one sign, and more than two neighbours
_TRIES, _FACTOR = 8, 4.0  # how often it takes a larger scale, until directions change a loss by a fifth
_CLEAR = 0.2


class Near(Protocol):
    """A model near θ; `ZerothOrderLevel` is one."""

    def perturbed(self, step: int, scale: float, query: int) -> AbstractContextManager[None]:
        """All rows at one point."""
        ...

    def together(self, step: int, rows: Sequence[Rows]) -> AbstractContextManager[None]:
        """Each row at its own point."""
        ...


@dataclass
class _Part:
    """The rows of a batch that are evaluated at one point, for one loss."""

    point: Point
    label: str
    adapter: str
    batch: Batch


@torch.no_grad()
def member_losses(
    near: Near,
    scorer: Scorer,
    step: int,
    points: Sequence[Point],
    asked: Asked,
    parts: int = 1,
    most: int | None = None,
    rows: dict[Point, list[Tensor]] | None = None,
) -> list[list[float]]:
    """For each point (scale, query) the mean losses of `asked` in eval mode, on the rows of its direction.

    Args:
        near: gives the model near θ.
        scorer: runs the batches.
        step: whose directions they are.
        points: of which no two are the same.
        asked: the losses.
        parts: into so many parts the examples of each batch are divided; direction j sees the j-th. 1: all see all.
        most: points that share a forward; all by default.
        rows: gets for each point what its rows contribute to each loss, as `contributions` says.

    Raises:
        NonFiniteLossError: if a loss is not finite.
    """
    scorer.adapted.model.eval()
    sums = {(point, label): 0.0 for point in points for label in asked}
    counts = dict.fromkeys(sums, 0)
    seen = {key: (list[Tensor](), list[Batch]()) for key in sums}
    most = most or len(points)
    for some in (points[low : low + most] for low in range(0, len(points), most)):
        for together in _forwards(scorer, some, asked, parts):
            with scorer.noting_rows(rows is not None) as noted:
                losses = _losses(near, scorer, step, together)
            for part, loss in zip(together, losses, strict=True):
                sums[part.point, part.label] += loss
                counts[part.point, part.label] += count(part.batch)
            for part, shares in zip(together, noted, strict=False):
                seen[part.point, part.label][0].append(shares)
                seen[part.point, part.label][1].append(part.batch)
    for (_, label), value in sums.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{label} is {value}: lower zo_learning_rate or zo_eps, or set on_nonfinite: skip")
    if rows is not None:
        rows |= {point: [contributions(*seen[point, label]) for label in asked] for point in points}
    return [[sums[point, label] / counts[point, label] for label in asked] for point in points]


def _forwards(scorer: Scorer, points: Sequence[Point], asked: Asked, parts: int) -> Iterator[list[_Part]]:
    """What goes through the model together: the n-th batches, through one adapter where rows cannot be mixed."""
    adapters = list(dict.fromkeys(adapter for adapter, _ in asked.values()))
    for together in [adapters] if scorer.adapted.mixes else [[adapter] for adapter in adapters]:
        group = {label: pair for label, pair in asked.items() if pair[0] in together}
        for number in range(max((len(batches) for _, batches in group.values()), default=0)):
            yield [
                _Part(point, label, adapter, share(batches[number], point[1] if parts > 1 else 0, parts))
                for point in points
                for label, (adapter, batches) in group.items()
            ]


def _losses(near: Near, scorer: Scorer, step: int, parts: Sequence[_Part]) -> list[float]:
    """The summed loss of each part."""
    batches, adapters = [part.batch for part in parts], [part.adapter for part in parts]
    points = dict.fromkeys(part.point for part in parts)
    if len(points) == 1:
        with near.perturbed(step, *parts[0].point):
            return [float(loss) for loss in scorer.losses(batches, adapters)]
    if not scorer.fit_together(batches):
        return [loss for part in parts for loss in _losses(near, scorer, step, [part])]
    with near.together(step, [(part.point, len(part.batch["input_ids"])) for part in parts]):
        return [float(loss) for loss in scorer.losses(batches, adapters)]


@torch.no_grad()
def require_groups(near: Near, scorer: Scorer, adapters: Sequence[str], batch: Batch, scale: float) -> None:
    """Refuses a model whose losses at several points in one forward are not those of a forward for each point.

    The directions are those of the first step, at `scale` or a larger one at which they matter.

    Raises:
        ZofoError: if a weight is read in a way that mixes rows, or the losses differ by more than rounding.
    """
    scorer = Scorer(scorer.adapted, Tokens(), scorer.layout)  # these tokens are no part of the run's cost
    asked = {f"the loss of {adapter} near θ": (adapter, [batch]) for adapter in adapters}
    single = grouped = spread = torch.zeros(1)
    for _ in range(_TRIES):
        points = [(sign * scale, query) for query in range(_DIRECTIONS) for sign in (1.0, -1.0)]
        try:
            single, grouped = (
                torch.tensor(member_losses(near, scorer, 0, points, asked, most=most)) for most in (1, len(points))
            )
        except NonFiniteLossError:
            return  # it shows nothing, and the run itself will say it
        except FORWARD_ERRORS as error:
            if isinstance(error, ZofoError) or is_lack_of_memory(error):
                raise
            raise ZofoError(
                f"a forward of this {scorer.adapted.base.config.model_type} model at several points fails "
                f"({in_one_line(error, 200)}): {INSTEAD}"
            ) from error
        spread = (single - single.mean(0)).square().mean().sqrt()
        if spread > _CLEAR * single.abs().mean():
            break
        scale *= _FACTOR
    error = (grouped - single).square().mean().sqrt()
    if error > 4 * torch.finfo(scorer.adapted.base.dtype).eps ** 0.5 * spread:
        raise ZofoError(
            f"losses of this {scorer.adapted.base.config.model_type} model at several points in one forward are not "
            f"those of single forwards: {INSTEAD}"
        )
