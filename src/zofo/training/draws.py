"""Which tasks an iteration trains on: a pure function of the seed and the iteration, so that a run can resume."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_KIND = 3  # apart from the seeds of the rows' orders


@dataclass
class Draws:
    """Draws k different tasks for each iteration, with probabilities in proportion to size^exponent.

    Args:
        sizes: the training rows of each task.
        per_step: k, at most the number of tasks; if it is that, every iteration has all of them.
        exponent: 0 draws all tasks alike, 1 by their size.
        seed: of the draws.

    Examples:
        >>> draws = Draws(sizes=(10, 20, 30), per_step=3)
        >>> draws.of(5), draws.before(5)
        ((0, 1, 2), (5, 5, 5))
    """

    sizes: Sequence[int]
    per_step: int = 1
    exponent: float = 0.0
    seed: int = 0
    _counted: tuple[int, NDArray[np.int64]] = field(init=False, repr=False)  # an iteration, and the counts before it

    def __post_init__(self) -> None:
        weights = np.asarray(self.sizes, np.float64) ** self.exponent
        self._probabilities = weights / weights.sum()
        self._counted = 0, np.zeros(len(self.sizes), np.int64)

    def of(self, iteration: int) -> tuple[int, ...]:
        """The indices of an iteration's tasks, in their order."""
        if self.per_step == len(self.sizes):
            return tuple(range(self.per_step))
        random = np.random.default_rng([self.seed, _KIND, iteration])
        drawn = random.choice(len(self.sizes), self.per_step, replace=False, p=self._probabilities)
        return tuple(sorted(drawn.tolist()))

    def before(self, iteration: int) -> tuple[int, ...]:
        """How often each task was drawn in the iterations before this one."""
        if self.per_step == len(self.sizes):
            return (iteration,) * self.per_step
        first, counts = self._counted
        if iteration < first:
            first, counts = 0, np.zeros_like(counts)
        counts = counts.copy()
        for earlier in range(first, iteration):
            counts[list(self.of(earlier))] += 1
        self._counted = iteration, counts
        return tuple(counts.tolist())
