"""The noise z: a pure function of a 64-bit key and an element index.

There is no generator and no state. Element `i` of the stream `key` is computed from these two integers by integer
arithmetic, so its bits do not depend on chunking, order, threads, device or compilation, and torch's global random
state is never touched.

    k0, k1 = the halves of BLAKE2b(key, i // 2**32)
    h = mix(mix((i mod 2**32) XOR k0) + k1)      two rounds of a 32-bit integer mixer
    n = byte0(h) + byte1(h) + byte2(h) + byte3(h) - 510          an integer in [-510, 510]
    z = n / sqrt(21845)                          mean 0, variance 1, kurtosis 2.7, |z| <= 3.451

The high half of the 64-bit index `i` goes into `k0` and `k1`, so the stream does not repeat after 2**32 elements. The
multiplier of `n` is rounded to 15 significant bits and `n` has 9, so their product is exact in float32 and
`w + scale * z` is rounded once, with or without fused multiply-add. That is "normal"; `eager.SHAPES` has the others.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zofo.errors import ZofoError
from zofo.noise.cpu import c_kernel
from zofo.noise.eager import SHAPES, Distribution, Hashed, Piece, eager

logger = logging.getLogger(__name__)

_BLOCK = 1 << 32  # elements that share one pair of 32-bit keys
_REMEMBERED = 1 << 14  # small results that the forward passes at +ε and -ε and the update of a step all ask for


class Term(NamedTuple):
    """One addend `scale * z(key)`."""

    key: int
    scale: float


class Sum(NamedTuple):
    """write <- keep * read + Σ scale z(key), in float32, rounded once to the dtype of `write`.

    `write` may be `read` itself. What is larger in magnitude than `limit` keeps its value. With a `rounding_key`,
    bfloat16 and float16 are rounded stochastically, by the stream of that key: up or down with the probability that
    makes the result right on average, so that updates far below the spacing of the dtype add up.
    """

    read: Tensor
    write: Tensor
    terms: Sequence[Term]
    start: int = 0  # the stream's index of the first element
    keep: float = 1.0
    limit: float = math.inf
    rounding_key: int | None = None


@lru_cache(_REMEMBERED, typed=True)
def stream_key(seed: int, step: int = 0, query: int = 0, name: str = "", part: str = "") -> int:
    """The 64-bit key of parameter `name` of the original model in direction `query` of a step; `seed` is the run's.

    `part` names another stream of the same parameter; it must not begin with a digit or a sign, so that no two keys are
    made of the same text.

    Examples:
        >>> stream_key(0, step=1) == stream_key(0, step=1), stream_key(0) == stream_key(1)
        (True, False)
    """
    text = f"{part}{seed}/{step}/{query}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def representable(scale: float, distribution: Distribution = "normal") -> float:
    """The scale that is applied when `scale` is asked for, within a relative 2**-15; estimators divide by it.

    Examples:
        >>> abs(representable(1e-3) / 1e-3 - 1) <= 2**-15
        True
    """
    unit = SHAPES[distribution].unit
    return _multiplier(float(scale), unit) / unit


def sample(seed: int, start: int, count: int, distribution: Distribution = "normal") -> Tensor:
    """Elements `start .. start + count` of a stream: float32 of shape (count,), on the CPU, mean 0 and variance 1.

    `seed` is the stream's key, any integer, taken modulo 2**64: for a parameter, `stream_key` makes it.

    Raises:
        ZofoError: if the elements do not lie within 0 .. 2**64.

    Examples:
        >>> bool((sample(7, 0, 10)[4:] == sample(7, 4, 6)).all())
        True
    """
    end = start + count
    if not 0 <= start <= end <= 1 << 64:
        raise ZofoError(f"elements {start} .. {end} lie outside of the stream: its indices go from 0 to 2**64 - 1")
    return add_(torch.zeros(count, dtype=torch.float32), seed, 1.0, start, distribution)


def normal(seed: int, start: int, count: int) -> Tensor:
    """`sample` of the Gaussian-like stream whose key is `seed`.

    Examples:
        >>> bool(normal(7, 0, 1000).abs().max() <= 3.451)
        True
    """
    return sample(seed, start, count, "normal")


def rademacher(seed: int, start: int, count: int) -> Tensor:
    """`sample` of the stream of signs, -1.0 or 1.0, whose key is `seed`.

    Examples:
        >>> sorted(set(rademacher(7, 0, 100).tolist()))
        [-1.0, 1.0]
    """
    return sample(seed, start, count, "rademacher")


def add_(tensor: Tensor, seed: int, scale: float, start: int = 0, distribution: Distribution = "normal") -> Tensor:
    """Adds `scale * z` to a tensor in place and returns it: w <- w + scale z, rounded once to the tensor's dtype.

    The tensor is float32, bfloat16 or float16, of any shape. In row-major order, its elements get those of the stream
    `seed` from index `start` on. The scale is rounded to `representable(scale)`.

    Raises:
        ZofoError: if the tensor has another dtype.

    Examples:
        >>> bool((add_(torch.zeros(5), 7, 1.0) == normal(7, 0, 5)).all())
        True
    """
    write_sums([Sum(tensor, tensor, [Term(seed, scale)], start)], distribution)
    return tensor


def write_sums(sums: Sequence[Sum], distribution: Distribution = "normal") -> None:
    """Writes each sum in one pass over memory for any number of terms; on a GPU, all of them by one launch.

    The tensors are float32, bfloat16 or float16. No sum may read what another one writes.

    Raises:
        ZofoError: if a tensor has another dtype.

    Examples:
        >>> w, perturbed = torch.zeros(5), torch.empty(5)
        >>> write_sums([Sum(w, perturbed, [Term(7, 1.0)])])
        >>> bool((perturbed == normal(7, 0, 5)).all())
        True
    """
    launch, launched = None, list[Piece]()
    for item in sums:
        if isinstance(item.read, FakeTensor):  # it has no values: `zofo estimate` runs a step to count its memory
            continue
        _require_float(item.read)
        if not item.write.is_contiguous():
            write = item.write.detach().contiguous()
            read = write if item.read is item.write else item.read
            write_sums([item._replace(read=read, write=write)], distribution)
            item.write.detach().copy_(write)
        elif item.read.is_cuda and (launch := gpu_kernel(distribution)):
            launched += _pieces(item, distribution)
        else:
            kernel = (c_kernel(distribution) if item.read.is_cpu else None) or eager
            for piece in _pieces(item, distribution):
                kernel(piece)
    if launch:
        launch(launched)


def write_rows(
    matrix: Tensor,
    rows: Tensor,
    terms: Sequence[Term],
    out: Tensor,
    distribution: Distribution = "normal",
    limit: float = math.inf,
) -> bool:
    """Rows of what `write_sums` would write for the whole matrix: out[i] <- matrix[rows[i]] + its terms.

    `matrix` (V, D); `rows` (R,) int64, each in [0, V); `out` (R, D), contiguous, of the matrix's dtype. Only the C form
    can do it: where that is not in use, returns False and leaves `out` as it was.

    Raises:
        ZofoError: if the matrix has no floating-point dtype.

    Examples:
        >>> matrix, out = torch.zeros(5, 3), torch.zeros(1, 3)
        >>> written = write_rows(matrix, torch.tensor([4]), [Term(7, 1.0)], out)
        >>> torch.equal(out[0], add_(matrix, 7, 1.0)[4]) or not written
        True
    """
    if isinstance(matrix, FakeTensor):
        return True
    kernel = c_kernel(distribution) if matrix.is_cpu else None
    if kernel is None or not matrix.is_contiguous() or matrix.numel() > _BLOCK:
        return False
    _require_float(matrix)
    kernel.rows(Piece(matrix, out, 0, _hashed(terms, 0, distribution), distribution, limit=limit), rows)
    return True


def warm_up(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Compiles the fast form of the noise, C on a CPU or Triton on a GPU, and returns whether it is in use.

    Without this call, it is compiled at its first use. It takes a second or two, on a CPU once per machine. Where it
    fails, the torch form is used. All forms write the same bits.

    Examples:
        >>> fast = warm_up()  # True where there is a C compiler
    """
    probe, term = torch.zeros(1031, dtype=dtype, device=device), Term(1, 1e-3)
    expected, apart = probe.clone(), torch.empty_like(probe)
    eager(*_pieces(Sum(expected, expected, [term]), "normal"))
    write_sums([Sum(probe, apart, [term])])
    add_(probe, *term)
    assert torch.equal(probe, apart), "in place and apart, the noise has different bits"
    assert torch.equal(probe, expected), "the fast form of the noise differs from the eager form"
    write_sums([Sum(probe, probe, [term], rounding_key=2)])
    return (c_kernel("normal") if probe.is_cpu else gpu_kernel("normal") if probe.is_cuda else None) is not None


@lru_cache
def gpu_kernel(distribution: Distribution = "normal") -> Callable[[Sequence[Piece]], None] | None:
    """The kernel for tensors on a GPU, or None where it does not work or does not know the distribution."""
    try:
        from zofo.noise.gpu import write_all

        probe = torch.zeros(2, device="cuda")
        write_all([Piece(probe, probe, 0, [(1, 2, 1.0)], distribution)])
    except Exception as error:  # no Triton, no compiler for it, or one that fails: it raises many unrelated types
        logger.info("the noise could not be compiled: %s", error)
        return None
    return write_all


def _require_float(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ZofoError(
            f"cannot add noise to a tensor of {tensor.dtype}: only float32, bfloat16 and float16 weights can move; "
            "load the model dequantised, in one of these"
        )


def _pieces(item: Sum, distribution: Distribution) -> Iterator[Piece]:
    """The sum of contiguous tensors in pieces that never cross a multiple of 2**32 of the stream."""
    read, write, low = item.read.contiguous(), item.write, 0
    while low < read.numel():
        block, offset = divmod(item.start + low, _BLOCK)
        high = min(read.numel(), low + _BLOCK - offset, low + (1 << 30))
        whole = high - low == read.numel()
        source, target = (read, write) if whole else (t.detach().view(-1)[low:high] for t in (read, write))
        terms = _hashed(item.terms, block, distribution)
        rounding = None if item.rounding_key is None else (*_halves(item.rounding_key, block), 0.0)
        yield Piece(source, target, offset, terms, distribution, item.keep, item.limit, rounding)
        low = high


def _hashed(terms: Sequence[Term], block: int, distribution: Distribution) -> list[Hashed]:
    unit = SHAPES[distribution].unit
    return [(*_halves(term.key, block), _multiplier(float(term.scale), unit)) for term in terms]


@lru_cache(_REMEMBERED, typed=True)
def _halves(key: int, block: int) -> tuple[int, int]:
    key = stream_key(key % (1 << 64), name=f"block {block}")
    return key & (_BLOCK - 1), key >> 32


@lru_cache(_REMEMBERED, typed=True)
def _multiplier(scale: float, unit: float) -> float:
    mantissa, exponent = math.frexp(scale * unit)
    return math.ldexp(round(mantissa * (1 << 15)), exponent - 15)
