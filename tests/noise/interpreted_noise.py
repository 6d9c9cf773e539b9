"""The kernel for GPUs, run by Triton's interpreter on a CPU: the same arithmetic. See `test_gpu_kernel.py`."""

import math

import pytest
import torch
from test_streams import DTYPES, FORMS, bits

from zofo.noise.eager import Piece, eager
from zofo.noise.gpu import write_all

START = 2**32 - 100


def forms(dtype):
    """The interpreter cuts bfloat16 off where a GPU rounds to the nearest: that is left to the tests on GPUs."""
    for form in FORMS:
        exact = dtype != torch.bfloat16 or form[-1] is not None or not form[0]
        yield form if exact else (*form[:-1], (7, 8, 0.0))


def numbers(size, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


def expected(w, start, form):
    found = w.clone()
    eager(Piece(found, found, start, *form))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_and_apart(dtype):
    for form in forms(dtype):
        w = numbers(2049, dtype)  # a block and a rest
        found, before = torch.full((2050,), math.nan, dtype=dtype), w.clone()
        write_all([Piece(w, found[:-1], START, *form)])
        assert torch.equal(bits(found[:-1]), bits(expected(w, START, form)))
        assert found[-1].isnan()
        assert torch.equal(w, before)


def test_many_tensors_at_once_and_in_place():
    pieces, wanted = [], []
    for dtype in DTYPES:
        for number, form in enumerate(forms(dtype)):
            for size in (1, 17, 512 + 16 * number):
                whole = numbers(size + 1, dtype)
                w = whole[1:] if number % 3 == 0 else whole[:-1]  # some begin at an odd address
                wanted.append(expected(w, 100 * number, form))
                pieces.append(Piece(w, w, 100 * number, *form))
    write_all(pieces)
    assert all(torch.equal(bits(p.write), bits(w)) for p, w in zip(pieces, wanted, strict=True))


def test_no_tensors_are_nothing():
    write_all([])
