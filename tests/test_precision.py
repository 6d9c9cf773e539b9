"""16-bit weights learn what float32 ones learn, and a run says what its dtype cannot hold."""

import logging
import math
import statistics

import pytest
import torch

from plain import make_trainer
from tiny import tiny_model
from zofo import noise
from zofo.estimators import Estimate, two_sided
from zofo.noise import Term, stream_key
from zofo.optimizers import ZOSGD

SIZE, STEPS, SEEDS = 32, 1500, range(6)


def final_loss(dtype, seed, rounded_to_nearest=False, monkeypatch=None):
    """ZO-SGD on 0.5 |w - 1|² from w = 1.5, by steps that are mostly below half the gap of two neighbours there."""
    w = {"w": torch.full((SIZE,), 1.5, dtype=dtype)}
    if rounded_to_nearest:
        monkeypatch.setattr(noise, "update_", lambda w, terms, *_: noise.write_sum(w, terms, w))

    def at(step):
        def loss(scale, query):
            moved = torch.empty_like(w["w"])
            noise.write_sum(w["w"], [Term(stream_key(seed, step, query, "w"), scale)], moved)
            return float(0.5 * (moved.double() - 1).square().sum())

        return loss

    for step in range(STEPS):
        ZOSGD().update(w, Estimate(seed, step, two_sided(at(step), 2.0**-6, 1, "normal")), 5e-4, {})
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
    assert "zo_eps 1.0e-06 is less than half the gap of bfloat16 at a typical weight" in message
    enough = float(message.split("use at least ")[1].split(",")[0])
    assert not [m for m in warned(torch.bfloat16, zo_eps=enough) if m.startswith("zo_eps")]
    assert math.isfinite(enough)


def test_an_update_that_the_dtype_cannot_hold_is_told(warned):
    messages = warned(torch.bfloat16, zo_eps=0.01, zo_learning_rate=1e-9)
    assert any("update of" in m and "stochastic rounding keeps it on average only" in m for m in messages)
    assert warned(torch.bfloat16, zo_eps=0.01, zo_learning_rate=1.0) == []
    assert warned(torch.float32, zo_eps=1e-6, zo_learning_rate=1e-9) == []
