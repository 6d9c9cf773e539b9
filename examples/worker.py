"""A worker of a zeroth-order run in plain transformers: it needs no zofo, and gets nothing but numbers.

It evaluates a model near θ, and follows θ by the scales of each step, as `docs/workers.md` says. It is written to be
read: each evaluation makes a whole copy of the model.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plain_noise import Array, integers, multiplier, normal, stream_key

Point = tuple[float, int]
"""(scale, query): θ + scale·z of this direction."""


class Worker:
    """A model in float32 that takes part in a run.

    Args:
        model: as the run begins with it; it is written by `update`.
        seed: of the run.
        rank: r > 0: directions of matrices are A Bᵀ / sqrt(r), `zo_rank`; 0: of full rank.
    """

    def __init__(self, model: PreTrainedModel, seed: int, rank: int = 0) -> None:
        self.model = model.eval()
        self._seed, self._rank = seed, rank

    @torch.no_grad()
    def losses(self, step: int, points: Sequence[Point], rows: Mapping[str, Tensor]) -> list[float]:
        """The loss at each point of a step on the same rows (what the model's forward takes, `labels` among it)."""
        found: list[float] = []
        for scale, query in points:
            near: Any = copy.deepcopy(self.model)
            self._add(near, {(step, query): scale})
            found.append(float(near(**rows).loss))
        return found

    @torch.no_grad()
    def update(self, scales: Mapping[tuple[int, int], float]) -> None:
        """θ <- θ + the sum of scale z over (step, query) -> scale."""
        self._add(self.model, scales)

    def _add(self, model: PreTrainedModel, scales: Mapping[tuple[int, int], float]) -> None:
        for name, parameter in model.named_parameters():
            total = parameter.numpy().astype(np.float64)
            for addend in self._addends(name, total.shape, scales):
                total += addend
            parameter.copy_(torch.from_numpy(total.astype(np.float32)))

    def _addends(self, name: str, shape: tuple[int, ...], scales: Mapping[tuple[int, int], float]) -> Iterator[Array]:
        for (step, query), scale in scales.items():
            if self._rank and len(shape) == 2:
                a, b = self.factors(name, (shape[0], shape[1]), step, query)
                yield scale / math.sqrt(self._rank) * (a.T.astype(np.float64) @ b)
            else:
                key = stream_key(f"{self._seed}/{step}/{query}/{name}")
                yield (multiplier(scale) * integers(key, 0, math.prod(shape))).reshape(shape)

    def factors(self, name: str, shape: tuple[int, int], step: int, query: int) -> tuple[Array, Array]:
        """Aᵀ (r, n) and Bᵀ (r, m) of the direction of a matrix (n, m): all directions of a step have one stream."""
        n, m = shape
        size = self._rank * (n + m)
        numbers = normal(stream_key(f"low rank {self._seed}/{step}/0/{name}"), query * size, size)
        return numbers[: self._rank * n].reshape(-1, n), numbers[self._rank * n :].reshape(-1, m)
