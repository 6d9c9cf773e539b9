"""Which rows go into which step: a pure function of the seed and the step, so that a run can resume anywhere."""

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
from zofo.training.draws import Draws


class IterationSampler(Sampler[list[int]]):
    """Yields, for each micro-step, the indices of all its rows in the dataset: task after task, split after split.

    Every stream of a task runs through its rows in seeded permutations, one after the other. Batch n of a stream is the
    same whatever the epoch, so micro-steps of one iteration never share rows before the stream has gone round.

    Args:
        tasks: for each task, split -> how many rows it has, in the order of the dataset.
        accumulation: micro-steps per iteration.
        draws: which tasks an iteration reads.
    """

    def __init__(
        self,
        tasks: Sequence[Mapping[str, int]],
        streams: Mapping[str, Stream],
        batch_size: int,
        accumulation: int,
        seed: int,
        draws: Draws,
    ) -> None:
        self.batch_size = batch_size
        self.drop_last = False
        firsts = iter(list(accumulate([0, *(count for rows in tasks for count in rows.values())])))
        self._tasks = [{split: (next(firsts), count) for split, count in rows.items()} for rows in tasks]
        self._streams = [stream for stream in streams.values() if stream.batches]
        self._accumulation = accumulation
        self._seed = seed
        self._draws = draws
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Starts at the first micro-step of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Micro-steps of an epoch: so many draws of each task as its slowest stream that counts needs for a pass."""
        rounds = sum(max(self._rounds(splits)) for splits in self._tasks)
        return -(-rounds // self._draws.per_step) * self._accumulation

    def _rounds(self, splits: Mapping[str, tuple[int, int]]) -> list[int]:
        """Iterations in which each stream passes over a task's rows."""
        size = self.batch_size * self._accumulation
        return [-(-splits[s.split][1] // (size * s.batches)) for s in self._streams if s.counts]

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * len(self)
        for micro in range(first, first + len(self)):
            iteration, part = divmod(micro, self._accumulation)
            before = self._draws.before(iteration)
            indices: list[int] = []
            for task in self._draws.of(iteration):
                for stream in self._streams:
                    for step in range(stream.batches):
                        number = (before[task] * stream.batches + step) * self._accumulation + part
                        indices += self._batch(self._tasks[task][stream.split], stream.order, number)
            yield indices

    def _batch(self, split: tuple[int, int], order: int, number: int) -> list[int]:
        first, rows = split
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return [first + int(_permutation(self._seed, order, place // rows, rows)[place % rows]) for place in places]


def sizes_of(tasks: Sequence[Mapping[str, int]]) -> list[int]:
    """The training rows of each task, of all its splits."""
    return [sum(rows.values()) for rows in tasks]


def planned_steps(keys: Keys, tasks: Sequence[Mapping[str, int]], streams: Mapping[str, Stream]) -> int:
    """Iterations of a run: `max_steps`, or `num_train_epochs` passes of the slowest stream that counts."""
    if keys.max_steps > 0:
        return keys.max_steps
    accumulation = keys.gradient_accumulation_steps
    draws = Draws(sizes_of(tasks), keys.tasks_per_step)
    sampler = IterationSampler(tasks, streams, keys.per_device_train_batch_size, accumulation, 0, draws)
    return math.ceil(keys.num_train_epochs * (len(sampler) // accumulation))


@dataclass(frozen=True)
class BundleCollator:
    """Turns the rows of one micro-step into the batches of each of its tasks."""

    streams: Mapping[str, Stream]
    batch_size: int
    collate: Callable[[Sequence[Example]], Batch]
    tasks: int = 1

    def __call__(self, rows: Sequence[Example]) -> list[Bundle]:
        groups = iter([rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)])
        return [
            {
                name: [self.collate(group) for group in islice(groups, stream.batches)]
                for name, stream in self.streams.items()
            }
            for _ in range(self.tasks)
        ]


@lru_cache(maxsize=16)
def _permutation(seed: int, order: int, number: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, order, number]).permutation(rows)
