"""What 16-bit weights keep of a perturbation and of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_NOTED, _WANTED = 0.2, 0.1  # shares of a projected gradient that are rounding: what a run is told of, and what is fine


def signal_kept(eps: float, gap: float) -> float:
    """The share of a weight's gradient that projected gradients see when W ± εz is rounded to the nearest.

    W is one of the numbers of the dtype, so that both signs are rounded alike: z becomes z' = round(εz / d) d / ε for
    a gap d between neighbours. The estimate g(z') z is (D ∇L) on average, with

        D = E[z z'] = (d / ε) sqrt(2 / π) sum_k exp(-((k + 1/2) d / ε)² / 2),  k = 0, 1, ...

    for a normal z (the stream's bell is close to one, but ends at 3.45). D is never negative: a coarse weight is seen
    less or not at all, never with the wrong sign.

    Args:
        eps: ε, greater than 0.
        gap: d, the distance of two neighbours at the weight.

    Examples:
        >>> [round(signal_kept(1e-3, gap), 2) for gap in (1e-3, 2e-3, 4e-3, 8e-3)]
        [1.0, 0.99, 0.43, 0.0]
    """
    ratio = gap / eps
    if ratio < 0.1:  # the sum is an integral then, and equal to 1 in double precision
        return 1.0
    terms = (math.exp(-(((k + 0.5) * ratio) ** 2) / 2) for k in range(math.ceil(10 / ratio)))
    return ratio * math.sqrt(2 / math.pi) * sum(terms)


def rounding_error(eps: float, gap: float) -> float:
    """How far z' of `signal_kept` is from z: sqrt(E (z' - z)²), 0 without rounding and 1 if nothing is seen.

    Examples:
        >>> [round(rounding_error(1e-3, gap), 2) for gap in (1e-4, 1e-3, 4e-3, 16e-3)]
        [0.03, 0.29, 0.93, 1.0]
    """
    ratio = gap / eps
    if ratio < 0.1:  # z' - z is evenly spread over a gap
        return ratio / math.sqrt(12)
    squares = (
        (2 * k + 1) * ratio**2 * math.erfc((k + 0.5) * ratio / math.sqrt(2)) for k in range(math.ceil(10 / ratio))
    )
    return math.sqrt(max(sum(squares) - 2 * signal_kept(eps, gap) + 1, 0.0))


def gap(parameter: Tensor) -> float:
    """The distance of two neighbouring numbers at a typical (root mean square) weight of a parameter.

    Examples:
        >>> gap(torch.full((3,), 1.5, dtype=torch.bfloat16)) == 2.0**-7
        True
    """
    size = float(torch.linalg.vector_norm(parameter, dtype=torch.float32)) / math.sqrt(parameter.numel())
    return 2.0 ** math.floor(math.log2(size)) * torch.finfo(parameter.dtype).eps if size else 0.0


def warnings(parameters: Mapping[str, Tensor], eps: float, update: float) -> list[str]:
    """What to tell of a run whose weights have 16 bits: nothing, or what is lost and which number mends it.

    Args:
        parameters: those that move.
        eps: ε.
        update: how far a step moves a weight along one direction.
    """
    sizes: dict[float, int] = {}  # gap -> how many weights
    coarse = [p for p in parameters.values() if p.dtype in (torch.bfloat16, torch.float16) and p.numel()]
    if not coarse:
        return []
    for parameter in coarse:
        spacing = gap(parameter)
        sizes[spacing] = sizes.get(spacing, 0) + parameter.numel()
    usual = max(sizes, key=lambda size: sizes[size])
    dtype = str(coarse[0].dtype).removeprefix("torch.")
    found: list[str] = []
    if _share(eps, sizes) > _NOTED:
        better = eps
        while _share(better, sizes) > _WANTED:
            better *= 1.1
        found.append(
            f"zo_eps {eps:.1e} is small for {dtype}: about {_share(eps, sizes):.0%} of a projected gradient is "
            f"rounding of W + εz; {better:.1e} makes it {_share(better, sizes):.0%}, dtype: float32 nothing"
        )
    if update < usual / 2:
        found.append(
            f"a zeroth-order update of {update:.1e} is less than half the gap of {dtype} at a typical weight "
            f"({usual:.1e}): stochastic rounding keeps it on average only; dtype: float32 keeps it exactly"
        )
    return found


def _share(eps: float, sizes: Mapping[float, int]) -> float:
    """The rounding error of a projected gradient over its size, if all weights count alike."""
    squares = sum(count * rounding_error(eps, size) ** 2 for size, count in sizes.items())
    return math.sqrt(squares / sum(sizes.values()))
