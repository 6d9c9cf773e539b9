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
fused multiply-add. `noise_torch.py` has the arithmetic, `noise.c` the same in C, `noise_triton.py` for GPUs.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zofo.errors import ZofoError
from zofo.noise.cpu import Hashed, Piece, c_kernel
from zofo.noise.eager import eager

logger = logging.getLogger(__name__)

Distribution = Literal["normal", "rademacher"]

_BLOCK = 1 << 32  # elements that share one pair of 32-bit keys
_REMEMBERED = 1 << 14  # small results that the passes at +ε and -ε and the update of a step all ask for
_VARIANCE = 21845  # of the sum of four independent bytes: 4 (256**2 - 1) / 12


class Term(NamedTuple):
    """One addend `scale * z(key)`."""

    key: int
    scale: float


class Sum(NamedTuple):
    """Write <- keep * read + sum of the terms, summed in float32 and rounded once to the dtype of `write`.

    `write` may be `read` itself. What is larger in magnitude than `limit` keeps its value.

    With a `rounding_key`, bfloat16 and float16 are rounded stochastically: up or down with the probability that makes
    the result right on average, so that steps far below the distance of two neighbours still move the weights by
    their sum. The random bits are a counter-based stream too, of that key.
    """

    read: Tensor
    write: Tensor
    terms: Sequence[Term]
    start: int = 0
    keep: float = 1.0
    limit: float = math.inf
    rounding_key: int | None = None


@lru_cache(_REMEMBERED, typed=True)
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
    """Out <- tensor + sum of the terms: one `Sum`."""
    write_sums([Sum(tensor, out, terms, start, limit=limit)], distribution)


def write_sums(sums: Sequence[Sum], distribution: Distribution = "normal") -> None:
    """All the sums, each in one pass over memory for any number of terms; on a GPU by one launch for all of them.

    None may read what another one writes.
    """
    launch = gpu_kernel() if any(one.read.is_cuda for one in sums) else None
    launched: list[Piece] = []
    for one in sums:
        _require_float(one.read)
        if not one.write.is_contiguous():
            target = one.write.detach().contiguous()
            write_sums([one._replace(read=target if one.read is one.write else one.read, write=target)], distribution)
            one.write.detach().copy_(target)
        elif launch and one.read.is_cuda:
            launched += _pieces(one, distribution)
        else:
            kernel = (c_kernel() if one.read.is_cpu else None) or eager
            for piece in _pieces(one, distribution):
                kernel(*piece)
    if launch:
        launch(launched)


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
    """W <- keep * W + sum of the terms, rounded stochastically: one `Sum`."""
    write_sums([Sum(tensor, tensor, terms, 0, keep, limit, rounding_key)], distribution)


def warm_up(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Gets the fast form of the noise ready: C on a CPU, Triton on a GPU.

    They are also taken without this call, and compiled at the first one, which takes a second or two, and on a CPU
    only once per machine. Where that fails, the torch form is used. All forms write the same bits.

    Returns:
        Whether the fast form is in use.
    """
    probe = torch.zeros(1031, dtype=dtype, device=device)
    moved = torch.empty_like(probe)
    write_sum(probe, [Term(1, 1e-3)], moved)
    add_(probe, 1, 1e-3)
    expected = torch.zeros_like(probe)
    eager(*next(_pieces(Sum(expected, expected, [Term(1, 1e-3)]), "normal")))
    assert torch.equal(probe, moved), "in place and apart, the noise has different bits"
    assert torch.equal(probe, expected), "the fast form of the noise differs from the eager form"
    update_(probe, [Term(1, 1e-3)], 2)
    return (c_kernel() if probe.is_cpu else gpu_kernel() if probe.is_cuda else None) is not None


@lru_cache(maxsize=1)
def gpu_kernel() -> Callable[[Sequence[Piece]], None] | None:
    """The kernel for tensors on a GPU, if it works here, or None."""
    try:
        from zofo.noise.gpu import write_all

        probe = torch.zeros(2, device="cuda")
        write_all([Piece(probe, probe, 0, [(1, 2, 1.0)], False, 1.0, math.inf, None)])
    except Exception as error:  # no Triton, no compiler for it, or one that fails: it raises many unrelated types
        logger.info("the noise could not be compiled: %s", error)
        return None
    return write_all


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


def _pieces(one: Sum, distribution: Distribution) -> Iterator[Piece]:
    """The sum of contiguous tensors in pieces that never cross a multiple of 2**32 of the stream."""
    read, write, low = one.read.contiguous(), one.write, 0
    while low < read.numel():
        block, offset = divmod(one.start + low, _BLOCK)
        high = min(read.numel(), low + _BLOCK - offset, low + (1 << 30))
        whole = high - low == read.numel()
        yield Piece(
            read if whole else read.detach().view(-1)[low:high],
            write if whole else write.detach().view(-1)[low:high],
            offset,
            _hashed(one.terms, block, distribution),
            distribution == "rademacher",
            one.keep,
            one.limit,
            None if one.rounding_key is None else (*_halves(one.rounding_key, block), 0.0),
        )
        low = high


def _hashed(terms: Sequence[Term], block: int, distribution: Distribution) -> list[Hashed]:
    return [(*_halves(term.key, block), _multiplier(float(term.scale), distribution)) for term in terms]


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
