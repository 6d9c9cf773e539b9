"""The noise z: a pure function of a 64-bit key and an element index.

There is no generator and no state: element `i` of the stream `key` is computed from the two numbers
alone, by integer arithmetic, so the bits do not depend on chunking, order, threads, device or
compilation, and the global random state of torch is never touched.

    k0, k1 = the halves of BLAKE2b(key, i // 2**32)
    h = mix(mix((i mod 2**32) XOR k0) + k1)      two rounds of a 32-bit integer mixer
    n = byte0(h) + byte1(h) + byte2(h) + byte3(h) - 510          an integer in [-510, 510]
    z = n / sqrt(21845)                          mean 0, variance 1, kurtosis 2.7, |z| <= 3.451

The high half of the 64-bit index `i` goes into `k0` and `k1`, so the stream does not repeat after 2**32
elements. The multiplier of `n` is rounded to 15 significant bits and
`n` has 9, so their product is exact in float32 and `w + scale * z` is rounded once, with or without
fused multiply-add. The mixer's constants are those of C. Wellons, "Prospecting for Hash Functions"
(2018), `lowbias32`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from zofo.errors import ZofoError

Distribution = Literal["normal", "rademacher"]
Kernel = Callable[..., None]

logger = logging.getLogger(__name__)

_EAGER_CHUNK = 1 << 17  # elements: the temporaries of the eager form stay in a core's cache
_QUERY_CHUNK = 1 << 19  # elements: one block of θ stays in cache while all q queries are added to it
_BLOCK = 1 << 32  # elements that share one pair of 32-bit keys
_BYTES = 0x00FF00FF
_VARIANCE = 21845  # of the sum of four independent bytes: 4 (256**2 - 1) / 12


class Term(NamedTuple):
    """One addend `scale * z(key)`."""

    key: int
    scale: float


def stream_key(seed: int, step: int = 0, query: int = 0, name: str = "") -> int:
    """The 64-bit key of the stream of one parameter in one direction.

    Args:
        seed: the run's seed, any integer.
        step: the optimizer step.
        query: which of the q directions of that step.
        name: the parameter's name in the original model.

    Examples:
        >>> stream_key(0, step=1) == stream_key(0, step=1), stream_key(0) == stream_key(1)
        (True, False)
    """
    text = f"{seed}/{step}/{query}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def representable(scale: float, distribution: Distribution = "normal") -> float:
    """The scale that is really applied when `scale` is asked for.

    The multiplier of the integer n is rounded to 15 significant bits; the relative difference to
    `scale` is at most 2**-15. Estimators divide by this value and not by the one that was asked for.

    Examples:
        >>> abs(representable(1e-3) / 1e-3 - 1) <= 2**-15
        True
    """
    return _multiplier(scale, distribution) / _unit(distribution)


def normal(seed: int, start: int, count: int) -> Tensor:
    """Elements `start .. start + count` of the Gaussian-like stream `seed`, float32 of shape (count,).

    Args:
        seed: the stream's key, any integer (taken modulo 2**64): for a model's weight, what `stream_key` gives.
        start: index of the first element, from 0 to 2**64 - count.
        count: how many elements.

    Examples:
        >>> bool((normal(7, 0, 10)[4:] == normal(7, 4, 6)).all())
        True
    """
    return _materialise(seed, start, count, "normal")


def rademacher(seed: int, start: int, count: int) -> Tensor:
    """Elements `start .. start + count` of the stream of signs `seed`: -1.0 or 1.0, float32.

    Examples:
        >>> sorted(set(rademacher(7, 0, 100).tolist()))
        [-1.0, 1.0]
    """
    return _materialise(seed, start, count, "rademacher")


def add_(tensor: Tensor, seed: int, scale: float, start: int = 0, distribution: Distribution = "normal") -> Tensor:
    """Adds `scale * z` to a tensor in place: w <- w + scale z, rounded once to the tensor's dtype.

    Args:
        tensor: any shape; float32, bfloat16 or float16. Its elements count in row-major order.
        seed: the stream's key.
        scale: the factor of z (see `representable`).
        start: the stream's index for the tensor's first element.
        distribution: "normal" or "rademacher".

    Returns:
        The same tensor.

    Raises:
        ZofoError: if the tensor does not hold floating-point numbers that can be moved.

    Examples:
        >>> bool((add_(torch.zeros(5), 7, 1.0) == normal(7, 0, 5)).all())
        True
    """
    write_sum(tensor, [Term(seed, scale)], tensor, start, distribution)
    return tensor


@torch.no_grad()
def write_sum(
    tensor: Tensor, terms: Sequence[Term], out: Tensor, start: int = 0, distribution: Distribution = "normal"
) -> None:
    """Out <- tensor + sum of the terms, summed in float32 and rounded once to `out`'s dtype.

    `out` may be `tensor` itself. Costs one pass over memory for any number of terms.
    """
    _require_float(tensor)
    source, target = tensor.contiguous().view(-1), _flat(out)
    exact = target.dtype == torch.float32 and source.dtype == torch.float32 and len(terms) > 0
    size = source.numel() if len(terms) == 1 else _QUERY_CHUNK
    for low, high in _pieces(start, source.numel(), size):
        read, write = source[low:high], target[low:high]
        if exact or len(terms) == 1:
            for term in terms:
                _add(read, write, term, start + low, distribution)
                read = write
        else:
            total = read.to(torch.float32, copy=True)
            for term in terms:
                _add(total, total, term, start + low, distribution)
            write.copy_(total)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))


@torch.no_grad()
def update_(
    tensor: Tensor, terms: Sequence[Term], rounding_key: int, distribution: Distribution = "normal", keep: float = 1.0
) -> None:
    """W <- keep * W + sum of the terms; bfloat16 and float16 are rounded stochastically.

    Stochastic rounding goes up or down with the probability that makes the result right on average, so
    that steps far below the distance of two neighbours still move the weights by their sum. Its random
    bits are a counter-based stream too, of the key `rounding_key`.
    """
    if tensor.dtype == torch.float32:
        if keep != 1.0:
            tensor.mul_(keep)
        return write_sum(tensor, terms, tensor, 0, distribution)
    _require_float(tensor)
    target = _flat(tensor)
    for low, high in _pieces(0, target.numel(), _QUERY_CHUNK):
        total = target[low:high].float() * keep
        for term in terms:
            _add(total, total, term, low, distribution)
        k0, k1 = _halves(rounding_key, 0)
        random = _mix(_mix(_indices(total, low) ^ k0) + k1)
        target[low:high].copy_(_round_stochastically(total, random, tensor.dtype))
    if target.data_ptr() != tensor.data_ptr():
        tensor.copy_(target.view(tensor.shape))


def warm_up(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Compiles the noise kernels for one dtype and device, or loads them from torch's disk cache.

    The first call on a machine takes about 20 s, later processes about 3 s. The compiled kernels write the same
    bits as the eager ones, about ten times faster. Without this call, or where there is no compiler, the eager
    form is used.

    Returns:
        Whether the compiled kernels are in use.
    """
    probe = torch.zeros(1031, dtype=dtype, device=device)
    moved = torch.empty_like(probe)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about itself
            if not _COMPILED:
                _COMPILED["in_place"] = cast(Kernel, torch.compile(_normal_in_place, dynamic=True, fullgraph=True))
                _COMPILED["apart"] = cast(Kernel, torch.compile(_normal, dynamic=True, fullgraph=True))
            write_sum(probe, [Term(1, 1e-3)], moved)
            add_(probe, 1, 1e-3)
            add_(torch.zeros(1031, dtype=torch.float32, device=device), 1, 1e-3)  # what 16-bit updates are summed in
    except Exception as error:  # no compiler, or one that fails: torch raises several unrelated types here
        _COMPILED.clear()
        logger.info("the noise kernels could not be compiled: %s", error)
        return False
    assert torch.equal(probe, moved), "compiled in place and apart, the noise has different bits"
    assert _same_as_eager(probe), "the compiled noise differs from the eager noise"
    return True


def _same_as_eager(probe: Tensor) -> bool:
    expected = torch.zeros_like(probe)
    k0, k1 = _halves(1, 0)
    _normal(expected, expected, _scalar(0, torch.int32), k0, k1, _scalar(_multiplier(1e-3, "normal"), torch.float32))
    return torch.equal(probe, expected)


def _materialise(seed: int, start: int, count: int, distribution: Distribution) -> Tensor:
    if start < 0 or count < 0 or start + count > 1 << 64:
        raise ZofoError(
            f"elements {start} .. {start + count} lie outside of the stream: its indices go from 0 to 2**64 - 1"
        )
    out = torch.zeros(count, dtype=torch.float32)
    write_sum(out, [Term(seed, 1.0)], out, start, distribution)
    return out


def _require_float(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ZofoError(
            f"cannot add noise to a tensor of {tensor.dtype}: only float32, bfloat16 and float16 weights can move; "
            "load the model dequantised, in one of these"
        )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)


def _pieces(start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts [0, count) into pieces of at most `size` that never cross a multiple of 2**32 of the stream."""
    low = 0
    while low < count:
        high = min(count, low + size, low + _BLOCK - (start + low) % _BLOCK, low + (1 << 30))
        yield low, high
        low = high


def _add(read: Tensor, write: Tensor, term: Term, start: int, distribution: Distribution) -> None:
    """Adds a term: write <- read + term, for pieces that are the same memory or do not overlap at all."""
    k0, k1 = _halves(term.key, start // _BLOCK)
    factor = _scalar(_multiplier(term.scale, distribution), torch.float32)
    if _COMPILED and distribution == "normal" and read.numel() > 1:
        offset = _scalar(_signed(start % _BLOCK), torch.int32)
        if read.data_ptr() == write.data_ptr():
            _COMPILED["in_place"](_unrelated(write), offset, k0, k1, factor)
        else:
            _COMPILED["apart"](_unrelated(read), _unrelated(write), offset, k0, k1, factor)
        return
    kernel = _normal if distribution == "normal" else _rademacher
    for low in range(0, read.numel(), _EAGER_CHUNK):
        offset = _scalar(_signed((start + low) % _BLOCK), torch.int32)
        kernel(read[low : low + _EAGER_CHUNK], write[low : low + _EAGER_CHUNK], offset, k0, k1, factor)


def _unrelated(piece: Tensor) -> Tensor:
    """The same memory as a tensor that is nobody's view: for views, the compiler specialises on their bases."""
    return piece.new_empty(0).set_(piece.untyped_storage(), piece.storage_offset(), piece.shape, (1,))


def _normal(read: Tensor, write: Tensor, offset: Tensor, k0: Tensor, k1: Tensor, factor: Tensor) -> None:
    index = torch.arange(read.numel(), dtype=torch.int32, device=read.device) + offset
    h = _mix(_mix(index ^ k0) + k1)
    pairs = (h & _BYTES) + ((h >> 8) & _BYTES)
    n = ((pairs + (pairs >> 16)) & 0x7FF) - 510
    write.copy_(read.float() + n.float() * factor)


def _normal_in_place(tensor: Tensor, offset: Tensor, k0: Tensor, k1: Tensor, factor: Tensor) -> None:
    _normal(tensor, tensor, offset, k0, k1, factor)


def _rademacher(read: Tensor, write: Tensor, offset: Tensor, k0: Tensor, k1: Tensor, factor: Tensor) -> None:
    index = torch.arange(read.numel(), dtype=torch.int32, device=read.device) + offset
    sign = ((_mix(_mix(index ^ k0) + k1) >> 31) & 1) * 2 - 1
    write.copy_(read.float() + sign.float() * factor)


# Two functions and not one: compiled for two views of one memory, a graph may be used again for views of two memories,
# and then writes to the wrong one (seen with torch 2.13).
_COMPILED: dict[Literal["in_place", "apart"], Kernel] = {}


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


def _indices(like: Tensor, start: int) -> Tensor:
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device) + _scalar(_signed(start), torch.int32)


def _halves(key: int, block: int) -> tuple[Tensor, Tensor]:
    key = stream_key(key % (1 << 64), name=f"block {block}")
    return _scalar(_signed(key), torch.int32), _scalar(_signed(key >> 32), torch.int32)


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def _signed(value: int) -> int:
    value &= _BLOCK - 1
    return value - _BLOCK if value >> 31 else value


def _unit(distribution: Distribution) -> float:
    return 1.0 if distribution == "rademacher" else 1.0 / math.sqrt(_VARIANCE)


def _multiplier(scale: float, distribution: Distribution) -> float:
    mantissa, exponent = math.frexp(scale * _unit(distribution))
    return math.ldexp(round(mantissa * (1 << 15)), exponent - 15)
