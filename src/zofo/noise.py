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
fused multiply-add. `noise_torch.py` has the arithmetic, `noise.c` the same in C.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zofo.errors import ZofoError
from zofo.noise_c import Hashed, Kernel, c_kernel
from zofo.noise_torch import compile_for, compiled, compiled_forms, eager

Distribution = Literal["normal", "rademacher"]

_BLOCK = 1 << 32  # elements that share one pair of 32-bit keys
_REMEMBERED = 1 << 14  # small results that the passes at +ε and -ε and the update of a step all ask for
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
    return _multiplier(float(scale), distribution) / _unit(distribution)


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


def write_sum(
    tensor: Tensor,
    terms: Sequence[Term],
    out: Tensor,
    start: int = 0,
    distribution: Distribution = "normal",
    limit: float = math.inf,
) -> None:
    """Out <- tensor + sum of the terms, summed in float32 and rounded once to `out`'s dtype.

    `out` may be `tensor` itself. What is larger in magnitude than `limit` keeps its value. Costs one pass over memory
    for any number of terms.
    """
    _require_float(tensor)
    target = _contiguous(out)
    source = target if out is tensor else _contiguous(tensor)
    _sum_into(source, target, start, terms, distribution, limit=limit)
    if target is not out:
        out.detach().copy_(target)


def write_rows(
    tensor: Tensor,
    numbers: Tensor,
    terms: Sequence[Term],
    out: Tensor,
    distribution: Distribution = "normal",
    limit: float = math.inf,
) -> bool:
    """Rows of what `write_sum` would write for the whole matrix: out[i] <- tensor[numbers[i]] + sum of its terms.

    Args:
        tensor: (V, D), as an embedding's weight.
        numbers: (R,) int64, each in [0, V).
        terms: as for the whole matrix.
        out: (R, D), contiguous, of the matrix's dtype.
        distribution: "normal" or "rademacher".
        limit: what is larger in magnitude keeps its value.

    Returns:
        False, with `out` as it was, where only the C form could do it and is not in use.
    """
    kernel = c_kernel() if tensor.is_cpu else None
    if kernel is None or not tensor.is_contiguous() or tensor.numel() > _BLOCK:
        return False
    _require_float(tensor)
    kernel.rows(tensor, out, numbers, _hashed(terms, 0, distribution), distribution == "rademacher", limit)
    return True


def update_(
    tensor: Tensor,
    terms: Sequence[Term],
    rounding_key: int,
    distribution: Distribution = "normal",
    keep: float = 1.0,
    limit: float = math.inf,
) -> None:
    """W <- keep * W + sum of the terms, where |W| <= limit; bfloat16 and float16 are rounded stochastically.

    Stochastic rounding goes up or down with the probability that makes the result right on average, so
    that steps far below the distance of two neighbours still move the weights by their sum. Its random
    bits are a counter-based stream too, of the key `rounding_key`.
    """
    _require_float(tensor)
    target = _contiguous(tensor)
    _sum_into(target, target, 0, terms, distribution, keep, limit, rounding_key)
    if target is not tensor:
        tensor.detach().copy_(target)


def warm_up(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Gets the fast form of the noise ready: C on a CPU, `torch.compile` elsewhere.

    In main memory the C form is also taken without this call; a first call on a machine compiles it, in about a
    second. Elsewhere the eager torch form is used until this call, whose first run on a machine takes
    about 20 s. All forms write the same bits.

    Returns:
        Whether the fast form is in use.
    """
    probe = torch.zeros(1031, dtype=dtype, device=device)
    if probe.device.type != "cpu" and not compiled_forms and not compile_for(dtype, probe.device):
        return False
    moved = torch.empty_like(probe)
    write_sum(probe, [Term(1, 1e-3)], moved)
    add_(probe, 1, 1e-3)
    expected = torch.zeros_like(probe)
    eager(expected, expected, 0, _hashed([Term(1, 1e-3)], 0, "normal"), False, 1.0, math.inf, None)
    assert torch.equal(probe, moved), "in place and apart, the noise has different bits"
    assert torch.equal(probe, expected), "the fast form of the noise differs from the eager form"
    return _kernel(probe) is not eager


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


def _contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a detached copy where its numbers do not lie in a row."""
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def _sum_into(
    read: Tensor,
    write: Tensor,
    start: int,
    terms: Sequence[Term],
    distribution: Distribution,
    keep: float = 1.0,
    limit: float = math.inf,
    rounding_key: int | None = None,
) -> None:
    """Write <- keep * read + the terms, for contiguous tensors that are the same memory or do not overlap at all."""
    kernel, rademacher = _kernel(read), distribution == "rademacher"
    for low, high in _pieces(start, read.numel()):
        block, offset = divmod(start + low, _BLOCK)
        rounding = None if rounding_key is None else (*_halves(rounding_key, block), 0.0)
        hashed = _hashed(terms, block, distribution)
        if high - low < read.numel():
            parts = (read.detach().view(-1)[low:high], write.detach().view(-1)[low:high])
        else:
            parts = (read, write)
        kernel(*parts, offset, hashed, rademacher, keep, limit, rounding)


def _pieces(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Cuts [0, count) into pieces that never cross a multiple of 2**32 of the stream."""
    low = 0
    while low < count:
        high = min(count, low + _BLOCK - (start + low) % _BLOCK, low + (1 << 30))
        yield low, high
        low = high


def _hashed(terms: Sequence[Term], block: int, distribution: Distribution) -> list[Hashed]:
    return [(*_halves(term.key, block), _multiplier(float(term.scale), distribution)) for term in terms]


def _kernel(read: Tensor) -> Kernel:
    if read.is_cpu:
        return c_kernel() or eager
    return compiled if compiled_forms else eager


@lru_cache(_REMEMBERED, typed=True)
def _halves(key: int, block: int) -> tuple[int, int]:
    key = stream_key(key % (1 << 64), name=f"block {block}")
    return key & (_BLOCK - 1), key >> 32


def _unit(distribution: Distribution) -> float:
    return 1.0 if distribution == "rademacher" else 1.0 / math.sqrt(_VARIANCE)


@lru_cache(_REMEMBERED, typed=True)
def _multiplier(scale: float, distribution: Distribution) -> float:
    mantissa, exponent = math.frexp(scale * _unit(distribution))
    return math.ldexp(round(mantissa * (1 << 15)), exponent - 15)
