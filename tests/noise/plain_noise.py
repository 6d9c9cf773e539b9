"""A second implementation of the noise, from the docstring of its module, in NumPy's unsigned integers."""

import hashlib
import math

import numpy as np


def mix(x):
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def hashes(key, start, count):
    out = []
    for i in range(start, start + count) if count < 2000 else [start]:
        size = 1 if count < 2000 else count
        low, block = i % 2**32, i // 2**32
        assert low + size <= 2**32
        digest = hashlib.blake2b(f"{key % 2**64}/0/0/block {block}".encode(), digest_size=8).digest()
        word = int.from_bytes(digest, "little")
        k0, k1 = np.uint32(word % 2**32), np.uint32((word >> 32) % 2**32)
        out.append(mix(mix((low + np.arange(size)).astype(np.uint32) ^ k0) + k1))
    return np.concatenate(out)


def integers(key, start, count):
    return hashes(key, start, count).view(np.uint8).reshape(-1, 4).astype(np.int64).sum(axis=1) - 510


def multiplier(scale):
    mantissa, exponent = math.frexp(scale / math.sqrt(21845))
    return math.ldexp(round(mantissa * 2**15), exponent - 15)
