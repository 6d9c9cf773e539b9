"""The kernel for GPUs, run by Triton's interpreter on a CPU: the same arithmetic. See `test_noise_triton.py`."""

import pytest
import torch

from test_noise import DTYPES, FORMS, assert_equal_to_eager, bits
from zofo import noise_torch
from zofo.noise_c import Piece
from zofo.noise_triton import write_all


def supported(dtype, form):
    """The interpreter cuts bfloat16 off where a GPU rounds to the nearest: that is left to the tests on GPUs."""
    return dtype != torch.bfloat16 or form[-1] is not None or not form[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_writes_the_same_bits_and_nothing_else(dtype, form):
    if not supported(dtype, form):
        form = (*form[:-1], (7, 8, 0.0))
    for size in (17, 2049):  # a part of a block; a block and a rest
        assert_equal_to_eager(lambda *fields: write_all([Piece(*fields)]), dtype, size, form)


def test_many_tensors_at_once_get_what_each_gets_alone():
    found, expected, pieces = [], [], []
    for number in range(24):
        dtype, form = DTYPES[number % 3], FORMS[number % len(FORMS)]
        if not supported(dtype, form):
            continue
        whole = torch.randn(16 * (number + 150), generator=torch.Generator().manual_seed(number)).to(dtype)
        w = whole[1:] if number % 5 == 0 else whole  # some begin at an odd address
        found.append(w.clone())
        expected.append(w.clone())
        start = 100 * number
        pieces.append(Piece(found[-1], found[-1], start, *form))
        noise_torch.eager(expected[-1], expected[-1], start, *form)
    write_all(pieces)
    assert len(found) > 15
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def test_empty_and_no_tensors_are_nothing():
    write_all([])
    empty = torch.empty(0)
    write_all([Piece(empty, empty, 0, [(1, 2, 1.0)], False, 1.0, 1.0, None)])
