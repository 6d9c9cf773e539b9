"""Which rows go into which step: a pure function of the data seed and the step, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from zofo.scoring.batch import Batch
from zofo.scoring.tokens import Example

Stream = Literal["lower", "penalty", "upper"]
Bundle = dict[Stream, list[Batch]]
"""The batches of one iteration, or of one micro-step of it: T for the lower level, B_p, and B_f."""

_STREAMS: tuple[Stream, ...] = ("lower", "penalty", "upper")


@dataclass(frozen=True)
class Plan:
    """How many batches each stream gives to one iteration.

    Args:
        lower: first-order steps, from the lower rows.
        penalty: 1 if the penalty needs a batch of the lower rows.
        upper: 1 if there is an upper level (or a zeroth-order method), from the upper rows.
    """

    lower: int = 0
    penalty: int = 0
    upper: int = 0

    def batches(self, stream: Stream) -> int:
        """How many batches `stream` gives."""
        return {"lower": self.lower, "penalty": self.penalty, "upper": self.upper}[stream]


class IterationSampler(Sampler[list[int]]):
    """Yields, for each micro-step, the indices of all its rows in `[*lower rows, *upper rows]`.

    Every stream runs through its rows in seeded permutations, one after the other. Batch n of a stream is the same
    whatever the epoch, so micro-steps of one iteration never share rows before the stream has gone round.

    Args:
        lower_rows: how many rows the lower level has.
        upper_rows: how many rows the upper level has.
        plan: what an iteration needs.
        batch_size: rows in a batch.
        accumulation: micro-steps per iteration.
        seed: of the order.
    """

    def __init__(
        self, lower_rows: int, upper_rows: int, plan: Plan, batch_size: int, accumulation: int, seed: int
    ) -> None:
        self.batch_size = batch_size
        self.drop_last = False
        self._rows: dict[Stream, tuple[int, int]] = {  # first index and number
            "lower": (0, lower_rows),
            "penalty": (0, lower_rows),
            "upper": (lower_rows, upper_rows),
        }
        self._plan = plan
        self._accumulation = accumulation
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Starts at the first micro-step of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch: one pass over the rows of the level that needs most iterations for it."""
        rounds = [
            -(-self._rows[stream][1] // (self.batch_size * self._accumulation * self._plan.batches(stream)))
            for stream in ("lower", "upper")
            if self._plan.batches(stream)
        ]
        return max(rounds) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * len(self)
        for micro in range(first, first + len(self)):
            iteration, part = divmod(micro, self._accumulation)
            indices: list[int] = []
            for stream in _STREAMS:
                steps = self._plan.batches(stream)
                for step in range(steps):
                    indices += self._batch(stream, (iteration * steps + step) * self._accumulation + part)
            yield indices

    def _batch(self, stream: Stream, number: int) -> list[int]:
        first, rows = self._rows[stream]
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        key = _STREAMS.index(stream)
        return [first + int(_permutation(self._seed, key, place // rows, rows)[place % rows]) for place in places]


@dataclass(frozen=True)
class BundleCollator:
    """Turns the rows of one micro-step into its batches.

    Args:
        plan: the plan of the sampler.
        batch_size: rows in a batch.
        collate: examples -> batch.
    """

    plan: Plan
    batch_size: int
    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, rows: Sequence[Example]) -> Bundle:
        groups = iter(range(0, len(rows), self.batch_size))
        return {
            stream: [
                self.collate(rows[start : start + self.batch_size])
                for _, start in zip(range(self.plan.batches(stream)), groups, strict=False)
            ]
            for stream in _STREAMS
        }


@lru_cache(maxsize=16)
def _permutation(seed: int, stream: int, number: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, stream, number]).permutation(rows)
