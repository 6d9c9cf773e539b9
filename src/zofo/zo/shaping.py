"""Shaping of a population: what is descended in place of the values of its members.

The members of a step are the points near θ at which an objective is measured on the same rows. Shaping puts their
values on one scale, so that neither the scale of a reward nor an outlier decides how far θ moves. T. Salimans et al.,
"Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (arXiv 1703.03864) for ranks; X. Qiu et al.,
"Evolution Strategies at Scale" (arXiv 2509.24372) for z-scores.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ShapingName = Literal["none", "zscore", "centered_rank"]


@dataclass(frozen=True)
class Shaped:
    """What the M members of a population are worth, and the fraction of the columns that tell nothing of them."""

    members: tuple[float, ...]
    no_spread: float


def zscore(values: Tensor) -> Tensor:
    """(v - mean) / std over the members, (M, C) -> (M, C), with std = sqrt(mean of squares); 0 without spread.

    nan counts for nothing, and stays.

    Examples:
        >>> zscore(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
    """
    centred = values - values.nanmean(0)
    deviation = centred.square().nanmean(0).sqrt()
    return torch.where(spreads(values), centred / deviation, centred.mul(0))


def centered_rank(values: Tensor) -> Tensor:
    """The ranks over the members, rank / (n - 1) - 1/2, (M, C) -> (M, C), from 0; equal values share their mean.

    nan counts for nothing, and stays.

    Examples:
        >>> centered_rank(torch.tensor([[7.0], [-2.0], [0.5]])).flatten().tolist()
        [0.5, -0.5, 0.0]
    """
    here, there = values[:, None], values[None, :]
    rank = (here > there).sum(1) + ((here == there).sum(1).to(values) - 1) / 2
    others = (~values.isnan()).sum(0) - 1
    return torch.where(values.isnan(), values, rank / others.clamp(min=1) - 0.5 * (others > 0))


_SHAPES: dict[ShapingName, Callable[[Tensor], Tensor]] = {"zscore": zscore, "centered_rank": centered_rank}


def spreads(values: Tensor) -> Tensor:
    """(C,) whether the members differ in a column of (M, C) values."""
    known = ~values.isnan()
    high, low = (torch.where(known, values, limit) for limit in (-torch.inf, torch.inf))
    return high.amax(0) > low.amin(0)


def shaped(values: Tensor, shaping: ShapingName, by_column: bool = False) -> Shaped:
    """What each member is worth: the mean over the columns, shaped over the members before or after it is taken.

    Args:
        values: (M, C) float64 of M members, one column for each row that was measured, or one for all of them; nan
            where a row has no value. Shaped, a member without any is worth 0, the mean.
        shaping: none, zscore or centered_rank.
        by_column: shape the values of each column, and take their mean; else the mean is shaped.

    Examples:
        >>> shaped(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), "zscore")
        Shaped(members=(-1.0, 1.0), no_spread=0.0)
        >>> shaped(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), "zscore", by_column=True)
        Shaped(members=(-0.5, 0.5), no_spread=0.5)
    """
    columns = values if by_column else _means(values)
    columns = columns[:, ~columns.isnan().all(0)]
    found = columns if shaping == "none" else _SHAPES[shaping](columns)
    worth = found.nanmean(1) if shaping == "none" else found.nanmean(1).nan_to_num(0.0)
    return Shaped(tuple(worth.tolist()), float((~spreads(columns)).double().mean()))


def _means(values: Tensor) -> Tensor:
    """(M, 1) over the columns, of sums without rounding: the same values in another order have the same mean."""
    known = [[value for value in row if not math.isnan(value)] for row in values.tolist()]
    return values.new_tensor([[math.fsum(row) / len(row) if row else math.nan] for row in known])
