"""Weights that are drawn back to where they started: against the formula, and in runs."""

import pytest
import torch

from plain import make_rows, make_trainer, same, weights
from tiny import save_tiny_model
from zofo import ZofoError, direction
from zofo.models.load import load_model
from zofo.models.starting import StartingWeights
from zofo.zo.estimators import Estimate
from zofo.zo.optimizers import Anchor, ZerothOrderOptimizer
from zofo.zo.rules import SGD, Automatic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("anchor") / "model")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_draws_back_and_then_adds(rank):
    w, start = {"w": torch.randn(6, 4), "b": torch.randn(4)}, {"w": torch.randn(6, 4), "b": torch.randn(4)}
    before = {name: value.clone() for name, value in w.items()}
    anchor = Anchor(0.25, start.__getitem__)
    optimizer = ZerothOrderOptimizer(w, SGD(), lr=0.1, rank=rank, anchor=anchor)
    optimizer.propose(Estimate(3, 7, (2.0,)))
    optimizer.step()
    added = {name: torch.zeros_like(value) for name, value in w.items()}
    other = ZerothOrderOptimizer(added, SGD(), lr=0.1, rank=rank)
    other.propose(Estimate(3, 7, (2.0,)))
    other.step()
    for name in w:
        expected = before[name] + 0.25 * (start[name] - before[name]) + added[name]
        torch.testing.assert_close(w[name], expected, rtol=1e-5, atol=1e-6)
    if not rank:
        torch.testing.assert_close(added["b"], -0.2 * direction(w, 3, 7)["b"], rtol=1e-4, atol=1e-6)


def test_weights_without_a_signal_rest_and_are_not_drawn_back():
    w = {"w": torch.ones(4)}
    optimizer = ZerothOrderOptimizer(w, Automatic(SGD()), lr=1.0, anchor=Anchor(0.25, lambda name: torch.zeros(4)))
    for step in range(20):
        optimizer.propose(Estimate(0, step, (1.0,), 1.0, 40.0))
        rests, before = optimizer.without_signal, w["w"].clone()
        optimizer.step()
        assert torch.equal(w["w"], before) == rests == (step >= 9)


def test_16_bit_weights_are_drawn_back_on_average_by_less_than_their_spacing():
    w = {"w": torch.ones(200_000, dtype=torch.bfloat16)}
    optimizer = ZerothOrderOptimizer(w, SGD(), lr=1.0, anchor=Anchor(1e-4, lambda name: torch.full((200_000,), 3.0)))
    optimizer.propose(Estimate(0, 0, (0.0,)))
    optimizer.step()
    assert float(w["w"].double().mean()) == pytest.approx(1 + 2e-4, rel=1e-4)


@pytest.mark.parametrize("keys", [{"method": "zo", "adapter": "none"}, {"method": "bilevel"}, {"method": "two_stage"}])
def test_an_anchored_run_stays_nearer_and_goes_on_bit_for_bit(tmp_path, folder, keys):
    def run(name, **more):
        model, tokenizer = load_model(str(folder))
        start = {key: value.detach().clone() for key, value in model.named_parameters()}
        asked = {"zo_learning_rate": 1e-2, "max_steps": 4, **keys, **more}
        trainer = make_trainer(tmp_path / name, model=model, tokenizer=tokenizer, **asked)
        trainer.train()
        now = weights(trainer.adapted, "backbone")
        return now, sum(float((now[key] - start[key]).square().sum()) for key in now) ** 0.5

    free, far = run("free")
    held, near = run("held", zo_anchor=0.5)
    assert not same(free, held)
    assert near < 0.9 * far


def test_a_resumed_anchored_run_is_one_that_never_stopped(tmp_path, folder):
    found = []
    for name in ("whole", "again"):
        model, tokenizer = load_model(str(folder))
        keys = {"method": "zo", "adapter": "none", "zo_anchor": 0.1, "max_steps": 4, "zo_learning_rate": 1e-2}
        trainer = make_trainer(
            tmp_path / name, model=model, tokenizer=tokenizer, save_strategy="steps", save_steps=2, **keys
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if found else None)
        found.append(weights(trainer.adapted, "backbone"))
    assert same(*found)


def test_the_weights_are_read_as_they_are_in_the_files(folder):
    model, _ = load_model(str(folder))
    named = dict(model.named_parameters())
    start = StartingWeights(model, named)
    for name, parameter in named.items():
        assert torch.equal(start.read(name), parameter)


def test_a_model_that_is_not_what_its_files_hold_is_refused(tmp_path, folder):
    model, tokenizer = load_model(str(folder))
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    keys = {"method": "zo", "adapter": "none", "zo_anchor": 0.1}
    with pytest.raises(ZofoError, match=r"is not what .* holds: give the model as it was loaded"):
        make_trainer(tmp_path, model=model, tokenizer=tokenizer, **keys)
    with pytest.raises(ZofoError, match="zo_anchor reads the starting weights from the files of the model"):
        make_trainer(tmp_path, train=make_rows(12), **keys)


def test_an_anchor_of_weights_that_do_not_move_is_refused(tmp_path):
    with pytest.raises(
        ZofoError, match="zo_anchor draws back weights of the backbone, but method zo with adapter lora"
    ):
        make_trainer(tmp_path, method="zo", adapter="lora", zo_anchor=0.1)
