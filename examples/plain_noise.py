"""The noise in NumPy, from its equations alone: what a program in another language has to write.

    k0, k1 = the halves of BLAKE2b(key, i // 2**32)
    h = mix(mix((i mod 2**32) XOR k0) + k1)
    n = byte0(h) + byte1(h) + byte2(h) + byte3(h) - 510;  z = n / sqrt(21845)

`docs/workers.md` says what is made of it; `tests/noise/conformance.json` has bits to compare with.
"""

import hashlib
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNIT = 1 / math.sqrt(21845)  # of the integers n


def stream_key(text: str) -> int:
    """The 64-bit key of a stream, as of "SEED/STEP/QUERY/NAME"."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normal(key: int, start: int, count: int) -> Array:
    """(count,) float32: elements of a stream at the scale 1."""
    return (integers(key, start, count) * multiplier(1.0)).astype(np.float32)


def integers(key: int, start: int, count: int) -> Array:
    """(count,) int64: n of each element."""
    return hashes(key, start, count).view(np.uint8).reshape(-1, 4).astype(np.int64).sum(axis=1) - 510


def hashes(key: int, start: int, count: int) -> Array:
    """(count,) uint32: h of each element."""
    made: list[Array] = []
    end = start + count
    while start < end:
        block, low = divmod(start, 2**32)
        size = min(end - start, 2**32 - low)
        word = stream_key(f"{key % 2**64}/0/0/block {block}")
        k0, k1 = np.uint32(word % 2**32), np.uint32(word >> 32)
        made.append(_mix(_mix(np.arange(low, low + size).astype(np.uint32) ^ k0) + k1))
        start += size
    return np.concatenate(made)


def multiplier(scale: float) -> float:
    """What n is multiplied by for scale·z: scale / sqrt(21845), rounded to 15 significant bits."""
    mantissa, exponent = math.frexp(scale * UNIT)
    return math.ldexp(round(mantissa * 2**15), exponent - 15)


def representable(scale: float) -> float:
    """The scale that is applied when this one is asked for; estimates divide by it."""
    return multiplier(scale) / UNIT


def _mix(x: Array) -> Array:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
