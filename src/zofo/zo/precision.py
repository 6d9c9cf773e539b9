"""What 16-bit weights keep of a perturbation and of an update."""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

_NOTED, _WANTED = 0.2, 0.1  # fraction of a projected gradient that is rounding: a warning above, and the suggestion


def signal_kept(eps: float, gap: float) -> float:
    """The fraction D of a weight's gradient that projected gradients see when W ± εz is rounded to the nearest.

    W is a number of the dtype, so both signs are rounded alike: z becomes z' = round(εz / d) d / ε, d = `gap`, and the
    estimate g(z') z is D ∇L on average. For a normal z (the stream's is close to one, but ends at 3.45),

        D = E[z z'] = (d / ε) sqrt(2 / π) sum_k exp(-((k + 1/2) d / ε)² / 2),  k = 0, 1, ...

    which is 1.00, 0.99, 0.43 and 0.00 at d / ε = 1, 2, 4 and 8: never negative, so the sign stays right.
    """
    ratio = gap / eps
    if ratio < 0.1:  # the sum is then 1 in double precision
        return 1.0
    terms = (math.exp(-(((k + 0.5) * ratio) ** 2) / 2) for k in range(math.ceil(10 / ratio)))
    return ratio * math.sqrt(2 / math.pi) * sum(terms)


def rounding_error(eps: float, gap: float) -> float:
    """How far z' of `signal_kept` is from z: sqrt(E (z' - z)²), 0.03, 0.29, 0.93 and 1.00 at d / ε = 0.1, 1, 4, 16."""
    ratio = gap / eps
    if ratio < 0.1:  # z' - z is then uniform over a spacing
        return ratio / math.sqrt(12)
    steps = range(math.ceil(10 / ratio))
    squares = ((2 * k + 1) * ratio**2 * math.erfc((k + 0.5) * ratio / math.sqrt(2)) for k in steps)
    return math.sqrt(max(sum(squares) - 2 * signal_kept(eps, gap) + 1, 0.0))


def gap(parameter: Tensor) -> float:
    """The spacing (ulp) of the dtype at a typical weight of a parameter: at the root mean square."""
    size = float(torch.linalg.vector_norm(parameter, dtype=torch.float32)) / math.sqrt(parameter.numel())
    return 2.0 ** math.floor(math.log2(size)) * torch.finfo(parameter.dtype).eps if size else 0.0


def warnings(parameters: Mapping[str, Tensor], eps: float, update: float, rank: int = 0) -> list[str]:
    """What a run with 16-bit weights loses of ε and of an update (the size of what a step adds), and what mends it.

    With a `rank`, W + εz is never made of the matrices, and so not rounded.
    """
    coarse = [p for p in parameters.values() if p.dtype in (torch.bfloat16, torch.float16) and p.numel()]
    if not coarse:
        return []
    counts = Counter[float]()  # spacing -> how many weights
    for parameter in coarse:
        counts[gap(parameter)] += parameter.numel()
    usual = max(counts, key=counts.__getitem__)
    dtype = str(coarse[0].dtype).removeprefix("torch.")
    messages: list[str] = []
    if not rank and _rounded(eps, counts) > _NOTED:
        better = eps
        while _rounded(better, counts) > _WANTED:
            better *= 1.1
        messages.append(
            f"zo_eps {eps:.1e} is small for {dtype}: about {_rounded(eps, counts):.0%} of a projected gradient is "
            f"rounding of W + εz; {better:.1e} makes it {_rounded(better, counts):.0%}, dtype: float32 nothing"
        )
    if update < usual / 2:
        messages.append(
            f"a zeroth-order update of {update:.1e} is less than half the gap of {dtype} at a typical weight "
            f"({usual:.1e}): stochastic rounding keeps it on average only; dtype: float32 keeps it exactly"
        )
    return messages


def _rounded(eps: float, counts: Mapping[float, int]) -> float:
    """The fraction of a projected gradient that is rounding, if all weights count alike."""
    squares = sum(count * rounding_error(eps, spacing) ** 2 for spacing, count in counts.items())
    return math.sqrt(squares / sum(counts.values()))
