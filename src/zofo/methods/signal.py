"""How much of a projected gradient is signal: the differences of each row's losses between two points near θ."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zofo.scoring.batch import Batch
from zofo.scoring.scorer import count

Rows = Mapping[str, Tensor]
"""Stream -> (B,) float64, what its rows contribute to an objective, which is the sum of the means of the streams."""


def contributions(shares: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """(B,) float64, whose mean is the mean loss over the batches, of the rows' shares in their summed losses."""
    every = torch.cat(list(shares))
    return every * (len(every) / sum(map(count, batches)))


class Points:
    """The losses of the rows at points near θ."""

    def __init__(self) -> None:
        self._rows: dict[tuple[float, int], Rows] = {}

    def note(self, scale: float, query: int, rows: Rows) -> None:
        """The losses at θ + scale·z_query."""
        self._rows[scale, query] = rows

    def projections(self) -> list[tuple[float, float]]:
        """(g, e²) of each direction: its projected gradient, and the squared standard error of that over the rows.

            g = sum mean(d),   e² = sum var(d) / B,   d = [l(θ + ε z) - l(θ - ε z)] / 2ε of the B rows of a stream

        One-sided differences where θ - ε z was not measured. e² is nan if a stream has only one row.

        Examples:
            >>> points = Points()
            >>> points.note(0.5, 0, {"zo": Tensor([1.0, 4.0])})
            >>> points.note(-0.5, 0, {"zo": Tensor([0.0, 1.0])})
            >>> points.projections()
            [(2.0, 1.0)]
        """
        found: list[tuple[float, float]] = []
        for (scale, query), there in self._rows.items():
            if scale <= 0:
                continue
            places = ((-scale, query), (0.0, query), (0.0, 0))  # with rows of its own, a direction has them at θ too
            behind = next(place for place in places if place in self._rows)
            back, span = self._rows[behind], scale - behind[0]
            differences = [(there[stream] - back[stream]) / span for stream in there]
            mean = sum(float(d.mean()) for d in differences)
            found.append((mean, sum(float(d.var()) / len(d) if len(d) > 1 else math.nan for d in differences)))
        return found


def mean_error(points: Points) -> float | None:
    """The mean of e² over the directions; None where it is not known of all."""
    errors = [error for _, error in points.projections()]
    return sum(errors) / len(errors) if errors and all(map(math.isfinite, errors)) else None


class Signal:
    """The signal-to-noise ratio of projected gradients: sqrt(sum of g² / sum of e²), over directions and steps.

    Noise of the rows alone gives 1, as g² is then e² on average; the true projected gradient adds its own square.
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, points: Points) -> None:
        """Counts the directions of a step."""
        for mean, error in points.projections():
            self._signal += mean * mean
            self._noise += error

    def taken(self) -> dict[str, float]:
        """The ratio since the last call; nothing without a step, or where rows have no standard error."""
        signal, noise = self._signal, self._noise
        self._signal = self._noise = 0.0
        return {"signal_to_noise": math.sqrt(signal / noise)} if noise > 0 else {}
