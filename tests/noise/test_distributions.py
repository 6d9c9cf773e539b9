"""A further distribution is a row of `eager.SHAPES`: a form that does not know it leaves it to the eager form."""

import math

import pytest
import torch
from test_streams import DTYPES, SIGMAS, N, bits
from torch import nn

from zofo import noise
from zofo.noise import Sum, Term, cpu, eager, streams
from zofo.zo.perturb import perturbed

VARIANCE = 5461  # of the odd integers from -127 to 127: (128**2 - 1) / 3


@pytest.fixture(autouse=True)
def table(monkeypatch):
    shape = eager.Shape(lambda h: (h & 0x7F) * 2 - 127, 1 / math.sqrt(VARIANCE))
    monkeypatch.setitem(eager.SHAPES, "seven_bits", shape)


def seven_bits(key, start=0, count=N):
    return noise.sample(key, start, count, "seven_bits")


def integers(key, count):
    return (seven_bits(key, 0, count).double() * math.sqrt(VARIANCE)).round()


def addend(shape, key, scale):
    """Scale z, which is exact in float32."""
    factor = torch.tensor(noise.representable(scale, "seven_bits") / math.sqrt(VARIANCE)).float().item()
    return (factor * integers(key, math.prod(shape))).view(shape)


def moved(w, key, scale):
    return w.detach().double() + addend(w.shape, key, scale)


@pytest.mark.parametrize("name", eager.SHAPES)
def test_every_distribution_has_small_integers_of_mean_zero_and_variance_one(name):
    n = eager.SHAPES[name].integers(
        torch.randint(-(2**31), 2**31, (N,), generator=torch.Generator().manual_seed(0)).int()
    )
    assert n.abs().max() < 2**9
    z = n.double() * eager.SHAPES[name].unit
    assert abs(z.mean().item()) < SIGMAS / math.sqrt(N)
    assert abs((z**2).mean().item() - 1) <= SIGMAS * (z**2).std().item() / math.sqrt(N)


def test_the_fast_forms_do_not_know_it():
    assert cpu.c_kernel("seven_bits") is None
    assert streams.gpu_kernel("seven_bits") is None


@pytest.mark.parametrize("key", [0, 7, noise.stream_key(1)])
def test_its_samples_are_uniform_with_mean_zero_and_variance_one(key):
    z, n = seven_bits(key).double(), integers(key, N)
    kurtosis = sum(i**4 for i in range(-127, 128, 2)) / 128 / VARIANCE**2
    assert abs(z.mean().item()) < SIGMAS / math.sqrt(N)
    assert abs((z**2).mean().item() - 1) < SIGMAS * math.sqrt((kurtosis - 1) / N)
    counts = torch.bincount(((n + 127) / 2).long(), minlength=128).double()
    chi_square = ((counts - N / 128) ** 2 / (N / 128)).sum().item()
    assert len(counts) == 128
    assert abs(chi_square - 127) < SIGMAS * math.sqrt(2 * 127)


def test_its_bits_do_not_depend_on_chunks(monkeypatch):
    start = 2**32 - 500
    whole = seven_bits(3, start, 1000)
    assert torch.equal(whole, torch.cat([seven_bits(3, start, 400), seven_bits(3, start + 400, 600)]))
    monkeypatch.setattr(eager, "_CHUNK", 7)
    assert torch.equal(whole, seven_bits(3, start, 1000))


@pytest.mark.parametrize("scale", [1.0, 1e-3, -3.3e-7, 12.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_sums_are_rounded_once(dtype, scale):
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = moved(w, 11, scale).float().to(dtype)
    assert torch.equal(bits(noise.add_(w.clone(), 11, scale, distribution="seven_bits")), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_keeps_to_limits_and_decay_and_rounds_stochastically(dtype):
    w = torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, nearest = torch.empty_like(w), torch.empty_like(w)
    for write, rounding_key in ((out, 5), (nearest, None)):
        item = Sum(w, write, [Term(1, 1e-3), Term(2, -3e-3)], keep=0.9, limit=0.5, rounding_key=rounding_key)
        noise.write_sums([item], "seven_bits")
    small = w.abs() <= 0.5
    total = w.float() * 0.9 + addend(w.shape, 1, 1e-3).float() + addend(w.shape, 2, -3e-3).float()
    assert torch.equal(bits(nearest), bits(torch.where(small, total.to(dtype), w)))
    assert torch.equal(bits(out)[~small], bits(w)[~small])
    assert torch.equal(out, nearest) == (dtype == torch.float32)
    assert ((bits(out).int() - bits(nearest).int()).abs() <= 1).all()
    error = (out.double() - total.double())[small]
    assert abs(error.mean().item()) <= SIGMAS * error.std().item() / math.sqrt(len(error))


def test_rows_alone_are_left_to_the_caller():
    out = torch.zeros(1, 3)
    assert not noise.write_rows(torch.ones(5, 3), torch.tensor([2]), [Term(1, 1.0)], out, "seven_bits")
    assert not out.any()


class Tiny(nn.Module):
    """Reads a weight in each of the ways that `reads` knows."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(30, 8), nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(2, 4))

    def forward(self, ids):
        return self.linear(self.embedding(ids)) * self.experts[1]


def test_a_perturbed_forward_is_that_of_a_moved_copy(monkeypatch):
    monkeypatch.setattr("zofo.zo.reads.PART", 16)
    torch.manual_seed(0)
    model, other, ids = Tiny(), Tiny(), torch.arange(7)
    theta, before = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(moved(theta[name], noise.stream_key(3, 0, 0, name), 0.05))
        with perturbed(model, theta, 3, 0.05, distribution="seven_bits"):
            torch.testing.assert_close(model(ids), other(ids))
        assert not torch.allclose(model(ids), other(ids))
    assert all(torch.equal(p, before[name]) for name, p in theta.items())
