"""The noise in torch operations: the form that defines the bits, and the one that knows every distribution.

`streams` has the equations. The mixer is `lowbias32` of C. Wellons, "Prospecting for Hash Functions" (2018).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 17  # elements: the temporaries stay in a core's cache

Distribution = Literal["normal", "rademacher"]

Hashed = tuple[int, int, float]
"""(k0, k1, factor) of one term in one block of its stream; factor = scale * unit, of 15 significant bits."""


class Piece(NamedTuple):
    """write <- keep * read + terms: contiguous tensors, within one block of 2**32 elements of the stream."""

    read: Tensor
    write: Tensor
    start: int  # modulo 2**32
    terms: Sequence[Hashed]
    distribution: Distribution = "normal"
    keep: float = 1.0
    limit: float = math.inf  # what is larger in magnitude keeps its value
    rounding: Hashed | None = None  # rounds 16 bits stochastically


class Shape(NamedTuple):
    """z = unit * n, of mean 0 and variance 1; n = integers(int32 hash), |n| < 2**9, so that n * factor is exact."""

    integers: Callable[[Tensor], Tensor]
    unit: float


def eager(piece: Piece) -> None:
    """Writes a piece, in torch operations."""
    read, write = piece.read.detach().view(-1), piece.write.detach().view(-1)
    for low in range(0, read.numel(), _CHUNK):
        write[low : low + _CHUNK].copy_(_sum(piece, read[low : low + _CHUNK], piece.start + low))


def _sum(piece: Piece, read: Tensor, start: int) -> Tensor:
    integers = SHAPES[piece.distribution].integers
    index = torch.arange(read.numel(), dtype=torch.int32, device=read.device) + _signed(start)
    total = read.float() * piece.keep
    for k0, k1, factor in piece.terms:
        total = total + integers(_hash(index, k0, k1)).float() * factor
    if piece.limit < math.inf:
        total = torch.where(read.float().abs() <= piece.limit, total, read.float())
    if piece.rounding is not None and piece.write.dtype != torch.float32:
        total = _round_stochastically(total, _hash(index, *piece.rounding[:2]), piece.write.dtype)
    return total


def _hash(index: Tensor, k0: int, k1: int) -> Tensor:
    return _mix(_mix(index ^ _signed(k0)) + _signed(k1))


def _mix(x: Tensor) -> Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    """The int32 with the low 32 bits of an integer."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _bell(h: Tensor) -> Tensor:
    pairs = (h & 0x00FF00FF) + ((h >> 8) & 0x00FF00FF)
    return ((pairs + (pairs >> 16)) & 0x7FF) - 510


def _sign(h: Tensor) -> Tensor:
    return ((h >> 31) & 1) * 2 - 1


def _round_stochastically(total: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to a 16-bit dtype: adds random bits below the last kept one, then cuts them off."""
    # float16 has fewer exponent bits: shifted so, its subnormal numbers are float32's subnormal numbers
    mask, shift = (0xFFFF, 1.0) if dtype == torch.bfloat16 else (0x1FFF, 2.0**-112)
    bits = (total * shift).view(torch.int32) + (random & mask)
    return ((bits & ~mask).view(torch.float32) / shift).to(dtype)


SHAPES: dict[Distribution, Shape] = {
    "normal": Shape(_bell, 1 / math.sqrt(21845)),  # four independent bytes have the variance 4 (256**2 - 1) / 12
    "rademacher": Shape(_sign, 1.0),
}
NUMBERS: dict[Distribution, int] = {"normal": 0, "rademacher": 1}  # of those that `cpu.c` and `gpu.py` know
