"""What 16-bit weights keep of a perturbation and of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_HALF_KEPT = 3.8  # the gap, in units of ε, where signal_kept falls below a half
_SHOWN = 3


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
        [1.0, 0.98, 0.43, 0.0]
    """
    ratio = gap / eps
    if ratio < 0.1:  # the sum is an integral then, and equal to 1 in double precision
        return 1.0
    terms = (math.exp(-(((k + 0.5) * ratio) ** 2) / 2) for k in range(math.ceil(10 / ratio)))
    return ratio * math.sqrt(2 / math.pi) * sum(terms)


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
    gaps = {name: gap(parameter) for name, parameter in parameters.items() if parameter.dtype != torch.float32}
    if not gaps:
        return []
    largest = max(gaps, key=lambda name: parameters[name].numel())
    dtype = str(parameters[largest].dtype).removeprefix("torch.")
    lost = [name for name in gaps if gaps[name] > _HALF_KEPT * eps]
    found: list[str] = []
    if lost:
        needed = max(gaps.values()) / _HALF_KEPT
        shown = ", ".join(lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
        found.append(
            f"zo_eps {eps:.1e} is too small for {len(lost)} of {len(parameters)} parameters in {dtype} ({shown}): "
            f"less than half of their gradient is seen; use {_rounded_up(needed)}, dtype: float32, or zo_exclude for "
            "what cannot be seen"
        )
    if update < gaps[largest] / 2:
        found.append(
            f"a zeroth-order update of {update:.1e} is less than half the gap of {dtype} at a typical weight of "
            f"{largest} ({gaps[largest]:.1e}): stochastic rounding keeps it on average only; dtype: float32 keeps it "
            "exactly"
        )
    return found


def _rounded_up(value: float) -> str:
    """To two digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.1e}"
