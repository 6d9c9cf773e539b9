"""The noise in torch operations: the form that defines the bits.

`noise.py` tells the arithmetic. The mixer's constants are those of C. Wellons, "Prospecting for Hash Functions"
(2018), `lowbias32`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zofo.noise.cpu import Hashed

_CHUNK = 1 << 17  # elements: the temporaries of the eager form stay in a core's cache
_BYTES = 0x00FF00FF


def eager(
    read: Tensor,
    write: Tensor,
    start: int,
    terms: Sequence[Hashed],
    rademacher: bool,
    keep: float,
    limit: float,
    rounding: Hashed | None,
) -> None:
    """The form that defines the bits: torch operations, one after the other."""
    scalars = _scalars(terms, rounding, limit, read.device)
    read, write = read.detach().view(-1), write.detach().view(-1)
    for low in range(0, read.numel(), _CHUNK):
        high, offset = low + _CHUNK, _signed(start + low)
        _sum(read[low:high], write[low:high], torch.tensor(offset, dtype=torch.int32), *scalars, rademacher, keep)


def _sum(
    read: Tensor,
    write: Tensor,
    start: Tensor,
    k0: Tensor,
    k1: Tensor,
    factors: Tensor,
    rounding: Tensor | None,
    limit: Tensor | None,
    rademacher: bool,
    keep: float = 1.0,
) -> None:
    """The arithmetic; `k0`, `k1` and `factors` have one element for each term."""
    index = torch.arange(read.numel(), dtype=torch.int32, device=read.device) + start
    total = read.float() * keep
    for j in range(len(factors)):
        h = _mix(_mix(index ^ k0[j]) + k1[j])
        total = total + (_sign(h) if rademacher else _bell(h)).float() * factors[j]
    if limit is not None:
        total = torch.where(read.float().abs() <= limit, total, read.float())
    if rounding is not None and write.dtype != torch.float32:
        total = _round_stochastically(total, _mix(_mix(index ^ rounding[0]) + rounding[1]), write.dtype)
    write.copy_(total)


def _bell(h: Tensor) -> Tensor:
    pairs = (h & _BYTES) + ((h >> 8) & _BYTES)
    return ((pairs + (pairs >> 16)) & 0x7FF) - 510


def _sign(h: Tensor) -> Tensor:
    return ((h >> 31) & 1) * 2 - 1


def _mix(x: Tensor) -> Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _round_stochastically(total: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to a 16-bit dtype; adds random bits below the last kept one, then cuts them off."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    # float16 has fewer exponent bits: shifted so, its subnormal numbers are float32's subnormal numbers
    shift = 1.0 if dtype == torch.bfloat16 else 2.0**-112
    mask = (1 << dropped) - 1
    bits = (total * shift).view(torch.int32) + (random & mask)
    return ((bits & ~mask).view(torch.float32) / shift).to(dtype)


def _scalars(
    terms: Sequence[Hashed], rounding: Hashed | None, limit: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """k0, k1 and the factors of the terms, k0 and k1 of the rounding, and the limit."""
    k0 = _integers([k0 for k0, _, _ in terms], device)
    k1 = _integers([k1 for _, k1, _ in terms], device)
    factors = torch.tensor([factor for _, _, factor in terms], dtype=torch.float32, device=device)
    most = None if limit == math.inf else torch.tensor(limit, dtype=torch.float32, device=device)
    return k0, k1, factors, None if rounding is None else _integers(rounding[:2], device), most


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([_signed(value) for value in values], dtype=torch.int32, device=device)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
