"""16-bit weights learn what float32 ones learn, and a run says what its dtype cannot hold."""

import logging
import statistics

import pytest
import torch

from plain import applied, make_trainer
from tiny import tiny_model
from zofo import noise
from zofo.noise import Sum, Term, stream_key
from zofo.zo import precision
from zofo.zo.estimators import Estimate, two_sided

SIZE, STEPS, SEEDS = 32, 1500, range(6)


@pytest.mark.parametrize("ratio", [0.5, 2.0, 3.0, 3.8, 5.0, 8.0])
def test_what_rounding_leaves_of_a_gradient_is_what_the_formulas_say(ratio):
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = torch.round(z / ratio) * ratio
    for products, expected in (
        (rounded * z, precision.signal_kept(1.0, ratio)),
        ((rounded - z).square(), precision.rounding_error(1.0, ratio) ** 2),
    ):
        assert abs(float(products.mean()) - expected) < 4 * float(products.std()) / len(z) ** 0.5 + 1e-4


@pytest.mark.parametrize("weight", [0.05, 0.4, 0.9, 1.5])
def test_so_it_is_for_bfloat16_weights_and_the_noise(weight):
    w, z = torch.full((200_000,), weight, dtype=torch.bfloat16), noise.normal(3, 0, 200_000).double()
    seen, eps = torch.empty_like(w), noise.representable(1e-3)
    noise.write_sums([Sum(w, seen, [Term(3, eps)])])
    gap = precision.gap(w)
    assert gap == float(torch.nextafter(w[0], w[0] + 1) - w[0])
    kept = float(((seen.double() - w.double()) / eps * z).mean())
    assert kept == pytest.approx(precision.signal_kept(eps, gap), abs=0.05)  # the bell is not quite a normal one


@pytest.mark.parametrize("ratio", [0.05, 0.099, 0.101, 1.0])
def test_small_gaps_lose_nothing(ratio):
    assert precision.signal_kept(1.0, ratio) == pytest.approx(1, abs=1e-7)
    assert precision.rounding_error(1.0, ratio) == pytest.approx(ratio / 12**0.5, abs=1e-6)


def final_loss(dtype, seed, rounded_to_nearest=False, monkeypatch=None):
    """ZO-SGD on 0.5 |w - 1|² from w = 1.5, by steps that are mostly below half the gap of two neighbours there."""
    w = {"w": torch.full((SIZE,), 1.5, dtype=dtype)}
    if rounded_to_nearest:
        write = noise.write_sums
        nearest = lambda sums, *rest: write([one._replace(rounding_key=None) for one in sums], *rest)  # noqa: E731
        monkeypatch.setattr(noise, "write_sums", nearest)

    def at(step):
        def loss(scale, query):
            moved = torch.empty_like(w["w"])
            noise.write_sums([Sum(w["w"], moved, [Term(stream_key(seed, step, query, "w"), scale)])])
            return float(0.5 * (moved.double() - 1).square().sum())

        return loss

    for step in range(STEPS):
        applied(w, Estimate(seed, step, two_sided(at(step), 2.0**-6, 1, "normal")), 5e-4)
    return float(0.5 * (w["w"].double() - 1).square().sum())


def test_bfloat16_learns_a_quadratic_as_float32_does_and_only_by_stochastic_rounding(monkeypatch):
    whole = [final_loss(torch.float32, seed) for seed in SEEDS]
    half = [final_loss(torch.bfloat16, seed) for seed in SEEDS]
    nearest = [final_loss(torch.bfloat16, seed, True, monkeypatch) for seed in SEEDS]
    mean, spread = statistics.mean(whole), statistics.stdev(whole)
    start = 0.5 * SIZE * 0.25
    assert mean < 0.4 * start
    assert abs(statistics.mean(half) - mean) < 3 * spread
    assert statistics.mean(nearest) > mean + 10 * spread


@pytest.fixture
def warned(caplog, tmp_path):
    """What a run of one step warns of."""

    def run(dtype, **keys):
        caplog.clear()
        model = tiny_model(vocab_size=320, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        trainer = make_trainer(tmp_path, model=model, method="zo", adapter="none", dtype=name, max_steps=1, **keys)
        with caplog.at_level(logging.WARNING, logger="zofo"):
            trainer.train()
        return [record.getMessage() for record in caplog.records if "noise kernels" not in record.getMessage()]

    return run


def test_an_eps_that_the_dtype_cannot_hold_is_told_with_one_that_it_can(warned):
    (message,) = [m for m in warned(torch.bfloat16, zo_eps=1e-6) if m.startswith("zo_eps")]
    assert "zo_eps 1.0e-06 is small for bfloat16: about 100% of a projected gradient is rounding" in message
    enough = float(message.split("W + εz; ")[1].split(" makes it")[0])
    assert not [m for m in warned(torch.bfloat16, zo_eps=enough) if m.startswith("zo_eps")]
    assert [m for m in warned(torch.bfloat16, zo_eps=enough / 10) if m.startswith("zo_eps")]


def test_an_update_that_the_dtype_cannot_hold_is_told(warned):
    messages = warned(torch.bfloat16, zo_eps=0.01, zo_learning_rate=1e-9)
    assert any("update of" in m and "stochastic rounding keeps it on average only" in m for m in messages)
    assert warned(torch.bfloat16, zo_eps=0.01, zo_learning_rate=1.0) == []
    assert warned(torch.float32, zo_eps=1e-6, zo_learning_rate=1e-9) == []
