"""Which rows go into which step: a pure function of the data seed and the step, so that a run can resume anywhere."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from zofo.keys import Keys
from zofo.methods.method import Bundle, Stream
from zofo.scoring.batch import Batch
from zofo.scoring.tokens import Example


class IterationSampler(Sampler[list[int]]):
    """Yields, for each micro-step, the indices of all its rows in the dataset, where one split follows the other.

    Every stream runs through its rows in seeded permutations, one after the other. Batch n of a stream is the same
    whatever the epoch, so micro-steps of one iteration never share rows before the stream has gone round.

    Args:
        rows: split -> how many rows it has, in the order of the dataset.
        accumulation: micro-steps per iteration.
    """

    def __init__(
        self, rows: Mapping[str, int], streams: Mapping[str, Stream], batch_size: int, accumulation: int, seed: int
    ) -> None:
        self.batch_size = batch_size
        self.drop_last = False
        firsts = accumulate([0, *rows.values()])
        self._splits = {split: (first, count) for (split, count), first in zip(rows.items(), firsts, strict=False)}
        self._streams = [stream for stream in streams.values() if stream.batches]
        self._accumulation = accumulation
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Starts at the first micro-step of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch: one pass over the rows of the stream that needs most iterations for it."""
        rounds = [
            -(-self._splits[stream.split][1] // (self.batch_size * self._accumulation * stream.batches))
            for stream in self._streams
            if stream.counts
        ]
        return max(rounds) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * len(self)
        for micro in range(first, first + len(self)):
            iteration, part = divmod(micro, self._accumulation)
            indices: list[int] = []
            for stream in self._streams:
                for step in range(stream.batches):
                    indices += self._batch(stream, (iteration * stream.batches + step) * self._accumulation + part)
            yield indices

    def _batch(self, stream: Stream, number: int) -> list[int]:
        first, rows = self._splits[stream.split]
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        order = stream.order
        return [first + int(_permutation(self._seed, order, place // rows, rows)[place % rows]) for place in places]


def planned_steps(keys: Keys, rows: Mapping[str, int], streams: Mapping[str, Stream]) -> int:
    """Iterations of a run: `max_steps`, or those of `num_train_epochs` passes over the rows of each split."""
    if keys.max_steps > 0:
        return keys.max_steps
    accumulation = keys.gradient_accumulation_steps
    sampler = IterationSampler(rows, streams, keys.per_device_train_batch_size, accumulation, seed=0)
    return math.ceil(keys.num_train_epochs * (len(sampler) // accumulation))


@dataclass(frozen=True)
class BundleCollator:
    """Turns the rows of one micro-step into its batches."""

    streams: Mapping[str, Stream]
    batch_size: int
    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, rows: Sequence[Example]) -> Bundle:
        groups = iter([rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)])
        return {
            name: [self.collate(group) for group in islice(groups, stream.batches)]
            for name, stream in self.streams.items()
        }


@lru_cache(maxsize=16)
def _permutation(seed: int, order: int, number: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, order, number]).permutation(rows)
