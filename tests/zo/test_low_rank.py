"""Directions of low rank: their statistics, and that forward and update are those of materialised weights."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_estimators import SIGMAS

from plain import applied
from tiny import ALL_FAMILIES, logits, same_bits, snapshot, theta_of, tiny_model
from zofo import noise
from zofo.errors import ZofoError
from zofo.zo.estimators import Estimate
from zofo.zo.low_rank import Matrix
from zofo.zo.perturb import direction, perturbed

SEED, EPS = 3, 0.02


def drawn(matrix, name="w", seed=1, step=0, queries=1, rank=1):
    return Matrix(matrix, name, rank).drawn(seed, step, range(queries))


@torch.no_grad()
def moved(model, scale, rank, query=0):
    """The model with scale z added in NumPy's double precision."""
    z = direction(theta_of(model), SEED, 0, query, rank=rank)
    before = snapshot(model)
    for name, parameter in model.named_parameters():
        total = before[name].double().numpy() + noise.representable(scale) * z[name].double().numpy()
        parameter.copy_(torch.from_numpy(total).to(parameter.dtype))
    return before


@torch.no_grad()
def put_back(model, before):
    for name, parameter in model.named_parameters():
        parameter.copy_(before[name])


@pytest.mark.parametrize("rank", [1, 4])
def test_the_entries_have_mean_zero_variance_one_and_no_correlation(rank):
    w, count = {"w": torch.empty(6, 5)}, 4000
    z = torch.stack([direction(w, 1, step, rank=rank)["w"].flatten() for step in range(count)]).double()
    assert (z.mean(0).abs() < SIGMAS / math.sqrt(count)).all()
    covariance = z.t() @ z / count
    spread = (z[:, :, None] * z[:, None]).std(0)  # of the products, whose mean is a covariance
    assert ((covariance - torch.eye(30)).abs() < SIGMAS * spread / math.sqrt(count)).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_has_that_rank_and_a_vector_is_full_noise(rank):
    parameters = {"w": torch.empty(7, 5), "b": torch.empty(9), "experts": torch.empty(2, 3, 4)}
    z, full = direction(parameters, 1, 2, 3, rank=rank), direction(parameters, 1, 2, 3)
    assert torch.linalg.matrix_rank(z["w"]) == rank
    assert torch.equal(z["b"], full["b"])
    assert torch.equal(z["experts"], full["experts"])


def test_the_factors_are_the_documented_elements_of_their_stream():
    a, b = drawn(torch.empty(4, 3), queries=3, rank=2)
    numbers = noise.normal(noise.stream_key(1, 0, 0, "w", part="low rank "), 0, 3 * 2 * 7).view(3, 14)
    for query, (left, right) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(left, numbers[query, :8].view(2, 4))
        assert torch.equal(right, numbers[query, 8:].view(2, 3))
    later = Matrix(torch.empty(4, 3), "w", 2).drawn(1, 0, range(2, 3))
    assert torch.equal(later[0][0], a[2])


def test_streams_of_neighbours_share_no_numbers_and_do_not_correlate():
    size, matrix = 3000, torch.empty(3000, 3000)
    streams = {
        (seed, step, name, part): numbers
        for seed, step, name in itertools.product((0, 1), (0, 1), ("layers.1.w", "layers.2.w"))
        for part, numbers in zip("AB", (f[:, 0] for f in drawn(matrix, name, seed, step, queries=2)), strict=True)
    }
    full = [noise.normal(noise.stream_key(seed, step, q, "layers.1.w"), 0, size) for seed, step, q in
            itertools.product((0, 1), (0, 1), (0, 1, -1))]  # fmt: skip
    rows = np.stack([*(row.numpy() for pair in streams.values() for row in pair), *(row.numpy() for row in full)])
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert len(rows) == 44
    assert np.abs(correlations).max() < SIGMAS / math.sqrt(size)


def test_the_mean_of_many_estimates_is_the_gradient_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    target, w = torch.randn(4, 3, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
    gradient, rows = 2 * (w - target), []
    for step in range(4000):
        z = direction({"w": w.float()}, 0, step, rank=1)["w"].double()
        plus, minus = (((w + sign * 1e-3 * z - target) ** 2).sum() for sign in (1, -1))
        rows.append((plus - minus) / 2e-3 * z)
    found = torch.stack(rows)
    error = found.mean(0) - gradient
    assert (error.abs() < SIGMAS * found.std(0) / math.sqrt(len(found))).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_forward_is_that_of_materialised_weights(family):
    model = tiny_model(family)
    before, base = snapshot(model), logits(model)
    moved(model, EPS, rank=2)
    expected = logits(model)
    put_back(model, before)
    with perturbed(model, theta_of(model), SEED, EPS, rank=2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert same_bits(model, before)
    assert not torch.allclose(base, expected, atol=1e-2 * float(expected.std()))


def test_nothing_is_written_for_products_and_embeddings(monkeypatch):
    def refuse(*_):
        raise AssertionError("a copy of a matrix was made")

    monkeypatch.setattr("zofo.zo.low_rank.write", refuse)
    for family in ("llama", "gpt2", "opt"):
        model = tiny_model(family)
        with perturbed(model, theta_of(model), SEED, EPS, rank=1):
            logits(model)


@torch.no_grad()
def test_other_reads_of_a_matrix_get_a_copy():
    w, theta = torch.nn.Linear(5, 4, bias=False), None
    theta = theta_of(w)
    z = direction(theta, SEED, rank=2)["weight"]
    with perturbed(w, theta, SEED, EPS, rank=2):
        torch.testing.assert_close(w.weight.t() * 1, (w.weight.detach().t() * 1))
        found, row = w.weight.clone(), w.weight[1].clone()
    torch.testing.assert_close(found, theta["weight"] + noise.representable(EPS) * z)
    assert torch.equal(row, found[1])


@torch.no_grad()
def test_nested_blocks_add_up():
    model = tiny_model()
    theta = theta_of(model)
    z, y = (direction(theta, seed, rank=1) for seed in (1, 2))
    before = snapshot(model)
    for name, parameter in model.named_parameters():
        parameter.add_(noise.representable(0.02) * z[name] + noise.representable(-0.03) * y[name])
    expected = logits(model)
    put_back(model, before)
    with perturbed(model, theta, 1, 0.02, rank=1), perturbed(model, theta, 2, -0.03, rank=1):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    with (
        pytest.raises(ZofoError, match="share one distribution and rank"),
        perturbed(model, theta, 1, 0.02, rank=1),
        perturbed(model, theta, 1, 0.02),
    ):
        pass


def test_gradients_go_through_a_product():
    layer, x = torch.nn.Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    theta = theta_of(layer)
    z = direction(theta, SEED, rank=1)
    with perturbed(layer, theta, SEED, EPS, rank=1):
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    w, b = (theta[name] + noise.representable(EPS) * z[name] for name in ("weight", "bias"))
    (expected,) = torch.autograd.grad(torch.nn.functional.linear(x, w, b).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert layer.weight.grad is None


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(8, 5, generator=generator).to(dtype), "b": torch.randn(7, generator=generator).to(dtype)}


def estimate(*projected, step=3):
    return Estimate(seed=1, step=step, projected=projected)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_update_is_that_of_materialised_directions(rank):
    found, after = estimate(2.0, -0.7, 0.3), weights()
    applied(after, found, 0.01, rank=rank, weight_decay=0.5)
    for name, w in weights().items():
        expected = w.double() * ((1 - 0.01 * 0.5) if name == "w" else 1.0)
        for query, g in enumerate(found.projected):
            expected -= 0.01 / 3 * g * direction(weights(), 1, 3, query, rank=rank)[name].double()
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_stochastically_and_right_on_average(dtype):
    size, steps = 64, 300
    start = torch.ones(size, size, dtype=dtype)
    total, w = torch.zeros(size, size, dtype=torch.float64), {"w": start.clone()}
    for step in range(steps):  # each far below half the distance of two numbers
        applied(w, estimate(1.0, step=step), 1e-4, rank=1)
        total -= 1e-4 * direction(w, 1, step, rank=1)["w"].double()
    ulp = torch.finfo(dtype).eps
    error = w["w"].double() - 1.0 - total
    assert set(w["w"].flatten().tolist()) != {1.0}
    assert abs(error.mean().item()) < SIGMAS * ulp * math.sqrt(steps) / 2 / size
    assert not torch.equal(w["w"], (start.double() + total).to(dtype))  # as it is rounded step by step
    again = {"w": start.clone()}
    for step in range(steps):
        applied(again, estimate(1.0, step=step), 1e-4, rank=1)
    assert torch.equal(again["w"], w["w"])


def test_parts_of_any_size_give_the_same_sum(monkeypatch):
    found = []
    for part in (1 << 20, 12):
        monkeypatch.setattr("zofo.zo.low_rank._PART", part)
        w = weights(torch.bfloat16)
        applied(w, estimate(2.0), 0.1, rank=2)
        found.append(w["w"])
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    theta = theta_of(model)
    with pytest.raises(ZofoError, match=r"zo_rank is 33, but model\.embed_tokens\.weight is a matrix of 64 x 32"):
        direction(theta, 1, rank=33)
    with pytest.raises(ZofoError, match="zo_rank is 33"), perturbed(model, theta, 1, EPS, rank=33):
        pass
    with (
        pytest.raises(ZofoError, match="leave out the limits, or the rank"),
        perturbed(model, theta, 1, EPS, rank=1, limits={"w": 1.0}),
    ):
        pass
