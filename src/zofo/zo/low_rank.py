"""Directions of low rank: z = A Bᵀ / sqrt(r) for a matrix, which is not made where A and B suffice.

    x (W + εz)ᵀ = x Wᵀ + (ε / sqrt(r)) (x B) Aᵀ        W (n, m), A (n, r), B (m, r)

The entries of z have the mean 0 and the variance 1, and are uncorrelated, as E[A_ik A_jl] = 0 unless i = j and k = l.
So the mean of many estimates g z is the gradient, as with full rank. Whatever is no matrix gets full-rank noise.

B. Sarkar et al., "Evolution Strategies at the Hyperscale" (EGGROLL, arXiv 2511.16652), for populations of these.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Distribution, Sum, stream_key

DirectionName = Literal["normal", "rademacher", "low_rank"]

_PART = 1 << 20  # elements of a matrix that are computed at a time where the whole would be a copy of it


class Factors(NamedTuple):
    """What is added to a matrix W (n, m): the sum over k of a[k]ᵀ b[k], in float32, with all scales in b."""

    a: Tensor  # (k, n)
    b: Tensor  # (k, m)


class Matrix(NamedTuple):
    """A matrix W (n, m) with the name, the rank and the distribution by which its directions are drawn."""

    tensor: Tensor
    name: str
    rank: int
    distribution: Distribution = "normal"

    def drawn(self, seed: int, step: int, queries: range) -> tuple[Tensor, Tensor]:
        """A (q, r, n) and B (q, r, m) of several directions of a step, transposed, in float32 and without a scale.

        All directions of a step have one stream: direction j its elements from j r (n + m) on, first the r columns of
        A, one after the other, then those of B.
        """
        n, m = self.tensor.shape
        size = self.rank * (n + m)
        numbers = self.tensor.detach().new_zeros(len(queries) * size, dtype=torch.float32)
        key = stream_key(seed, step, 0, self.name, part="low rank ")
        noise.add_(numbers, key, 1.0, queries.start * size, self.distribution)
        a, b = numbers.view(len(queries), size).split([self.rank * n, self.rank * m], dim=1)
        return a.view(-1, self.rank, n), b.view(-1, self.rank, m)

    def factors(self, seed: int, scales: Mapping[tuple[int, int], float]) -> Factors:
        """The sum of scale z over (step, query) -> scale."""
        steps = dict.fromkeys(step for step, _ in scales)
        made = [
            self._of_step(seed, step, {query: s for (at, query), s in scales.items() if at == step}) for step in steps
        ]
        return joined(made)

    def _of_step(self, seed: int, step: int, scales: Mapping[int, float]) -> Factors:
        queries = range(min(scales), max(scales) + 1)
        a, b = self.drawn(seed, step, queries)
        weights = b.new_tensor([scales.get(query, 0.0) / math.sqrt(self.rank) for query in queries])
        return Factors(a.flatten(0, 1), (b * weights[:, None, None]).flatten(0, 1))


def is_matrix(tensor: Tensor) -> bool:
    """Whether its directions can have a low rank."""
    return tensor.ndim == 2


def require_rank(parameters: Mapping[str, Tensor], rank: int) -> None:
    """Refuses a rank above that of one of the matrices."""
    for name, parameter in parameters.items():
        if rank and is_matrix(parameter) and rank > min(parameter.shape):
            raise ZofoError(
                f"zo_rank is {rank}, but {name} is a matrix of {' x '.join(map(str, parameter.shape))}: set zo_rank to "
                f"{min(parameter.shape)} at most, or leave it out with zo_exclude"
            )


def joined(several: Sequence[Factors]) -> Factors:
    """Their sum."""
    if len(several) == 1:
        return several[0]
    return Factors(torch.cat([f.a for f in several]), torch.cat([f.b for f in several]))


class Read(NamedTuple):
    """A matrix W as a torch function reads it: x Wᵀ + bias, bias + x W, or the rows x of W."""

    func: Any
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def plain(self, bias: Tensor | None) -> Tensor:
        """What the function returns for W itself."""
        weight = self.weight.detach()
        if self.func is functional.embedding:
            return functional.embedding(self.x, weight)
        if self.func is functional.linear:
            return functional.linear(self.x, weight, bias)
        return self.x @ weight if bias is None else torch.addmm(bias, self.x, weight)

    def plus(self, result: Tensor, factors: Factors) -> Tensor:
        """What it returns for the sum of W and factors, in the memory of the `plain` result."""
        a, b = (factor.to(result.dtype) for factor in factors)
        rows = result.view(-1, result.shape[-1])
        if self.func is functional.embedding:
            rows.addmm_(a.t()[self.x.reshape(-1)], b)
        elif rows.numel():
            right, left = (b, a) if self.func is functional.linear else (a, b)
            rows.addmm_(self.x.reshape(-1, self.x.shape[-1]) @ right.t(), left)
        return result


def read_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Read | None:
    """A call that needs no copy of its matrix; None for any other."""
    if func is functional.embedding:
        ids, weight = (*args[:2], *(kwargs[name] for name in ("input", "weight")[len(args) :]))
        normed = kwargs.get("max_norm") is not None or any(args[3:4])
        return None if normed else Read(func, ids, weight)
    if func is functional.linear:
        names = [name for name in ("input", "weight", "bias")[len(args) :] if name in kwargs]
        return Read(func, *args, *(kwargs[name] for name in names))
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return Read(func, args[1], args[2], args[0])
    return None


def write(weight: Tensor, out: Tensor, factors: Factors) -> None:
    """The sum of a weight and factors to `out`, in float32, rounded once."""
    for rows in _parts(weight):
        out[rows].copy_(torch.addmm(weight[rows].float(), factors.a[:, rows].t(), factors.b))


def update_(weight: Tensor, factors: Factors, keep: float, rounding_key: int | None) -> None:
    """W <- keep W + aᵀ b, in float32; 16 bits are rounded stochastically, by the stream of `rounding_key`."""
    if rounding_key is None:
        weight.addmm_(factors.a.t(), factors.b, beta=keep)
        return
    for rows in _parts(weight):
        total = torch.addmm(weight[rows].float(), factors.a[:, rows].t(), factors.b, beta=keep)
        start = rows.start * weight.shape[1]
        noise.write_sums([Sum(total, weight[rows], [], start, rounding_key=rounding_key)])


def _parts(matrix: Tensor) -> list[slice]:
    rows = max(1, _PART // max(1, matrix.shape[1]))
    return [slice(low, min(len(matrix), low + rows)) for low in range(0, len(matrix), rows)]
