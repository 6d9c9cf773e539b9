"""The noise on a GPU: a Triton kernel with the arithmetic and the bits of `eager`.

A launch costs more than the noise of a small weight, so one launch takes a table, in which each tensor is a row.
"""

# pyright: reportMissingImports=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from zofo.noise.eager import NUMBERS, Piece

_BLOCK = 2048  # elements of a tensor that a program writes at a time
_PROGRAMS = 1 << 13  # of a launch: several for each of a GPU's processors
_VECTOR = 16  # bytes that are read at once, and adjacent elements, where that divides every address and size
_HEAD = [("read", "i8"), ("write", "i8"), ("size", "i8"), ("start", "u4"), ("keep", "f4"), ("limit", "f4")]
_TERM = [("k0", "u4"), ("k1", "u4"), ("factor", "f4")]
_NONE = (0, 0, 0.0)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def write_all(pieces: Sequence[Piece]) -> None:
    """All the pieces, in one launch for those of the same device, dtypes, distribution and number of terms."""
    alike = defaultdict[Any, list[Piece]](list)
    for p in pieces:
        key = p.read.get_device(), p.read.dtype, p.write.dtype, p.distribution, len(p.terms), p.rounding is None
        alike[key].append(p)
    for group in alike.values():
        _launch(group)


def _launch(pieces: list[Piece]) -> None:
    first = pieces[0]
    fields = [
        (p.read.data_ptr(), p.write.data_ptr(), p.read.numel(), p.start, p.keep, p.limit, p.rounding or _NONE, p.terms)
        for p in pieces
    ]
    rows = np.array(fields, _row(len(first.terms)))
    table = torch.from_numpy(rows.view(np.int32))
    if first.read.is_cuda:
        table = table.pin_memory().to(first.read.device, non_blocking=True)  # the launch does not wait for the GPU
    unaligned = np.bitwise_or.reduce(rows["read"] | rows["write"] | rows["size"]) % _VECTOR
    programs = min(triton.cdiv(int(rows["size"].max()), _BLOCK), triton.cdiv(_PROGRAMS, len(pieces)))
    with torch.cuda.device(first.read.get_device()):
        _write[len(pieces), programs](  # pyright: ignore[reportIndexIssue] what `jit` makes of it
            table, rows.itemsize // 4, len(first.terms), _TYPES[first.read.dtype], _TYPES[first.write.dtype],
            distribution=NUMBERS[first.distribution], vector=1 if unaligned else _VECTOR, block=_BLOCK,
            stochastic=first.rounding is not None and first.write.dtype != torch.float32,
            enable_fp_fusion=False,  # else keep * W + n * factor is rounded once and not twice
        )  # fmt: skip


@lru_cache
def _row(terms: int) -> np.dtype[Any]:
    return np.dtype([*_HEAD, ("rounding", _TERM), ("terms", _TERM, (terms,))], align=True)


@triton.jit(do_not_specialize=["words", "count"])
def _write(
    table, words, count, read_type: tl.constexpr, write_type: tl.constexpr, distribution: tl.constexpr,
    stochastic: tl.constexpr, vector: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program (t, i) writes the tensor of row t of the table: of n programs, each n-th block from the i-th on."""
    row = table + tl.program_id(0) * words
    wide = row.to(tl.pointer_type(tl.int64))
    read = tl.multiple_of(tl.load(wide).to(tl.pointer_type(read_type)), vector)
    write = tl.multiple_of(tl.load(wide + 1).to(tl.pointer_type(write_type)), vector)
    size = tl.multiple_of(tl.load(wide + 2).to(tl.int32), vector)
    start = tl.load(row + 6).to(tl.uint32, bitcast=True)
    keep = tl.load(row + 7).to(tl.float32, bitcast=True)
    limit = tl.load(row + 8).to(tl.float32, bitcast=True)
    r0 = tl.load(row + 9).to(tl.uint32, bitcast=True)
    r1 = tl.load(row + 10).to(tl.uint32, bitcast=True)
    for low in range(tl.program_id(1) * block, size, tl.num_programs(1) * block):
        place = low + tl.arange(0, block)
        inside = place < size
        w = tl.load(read + place, mask=inside).to(tl.float32)
        index = place.to(tl.uint32) + start
        total = w * keep
        for j in range(count):
            term = row + 12 + 3 * j
            k0 = tl.load(term).to(tl.uint32, bitcast=True)
            k1 = tl.load(term + 1).to(tl.uint32, bitcast=True)
            n = _integers(_mix(_mix(index ^ k0) + k1), distribution)
            total += n.to(tl.float32) * tl.load(term + 2).to(tl.float32, bitcast=True)
        total = tl.where(tl.abs(w) <= limit, total, w)
        if stochastic:
            total = _rounded(total, _mix(_mix(index ^ r0) + r1), write_type)
        tl.store(write + place, total.to(write_type), mask=inside)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _integers(h, distribution: tl.constexpr):
    if distribution == 1:
        return (h >> 31).to(tl.int32) * 2 - 1
    pairs = (h & 0x00FF00FF) + ((h >> 8) & 0x00FF00FF)
    return ((pairs + (pairs >> 16)) & 0x7FF).to(tl.int32) - 510


@triton.jit
def _rounded(total, random, write_type: tl.constexpr):
    """Stochastically, as `eager` does it."""
    if write_type == tl.bfloat16:
        return ((total.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    bits = (total * 2.0**-112).to(tl.uint32, bitcast=True) + (random & 0x1FFF)
    return (bits & 0xFFFFE000).to(tl.float32, bitcast=True) * 2.0**112
