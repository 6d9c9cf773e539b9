"""The step that is tried before a run: it leaves no trace, it fits the longest rows, and its memory is the run's."""

import random

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from plain import make_rows, make_trainer, weights
from zofo import ZofoError
from zofo.methods import METHODS
from zofo.scoring.scorer import Scorer
from zofo.training import memory
from zofo.training.peak import peak_memory, reset_peak_memory

TRAINED = [(name, "none") for name in ("fo", "zo")] + [(name, "lora") for name, m in METHODS.items() if m.trains()]


def state(trainer):
    """All that a step could change, as bytes."""
    parts = [weights(trainer.adapted, part) for part in ("backbone", *trainer.adapted.adapters)]
    randomness = [torch.get_rng_state(), *np.random.get_state(), random.getstate()]
    leaves = tree_leaves([parts, trainer.method.optimizer.state_dict(), vars(trainer.cost), randomness])
    gradients = [p.grad for p in trainer.adapted.model.parameters()]
    return [leaf.numpy().tobytes() if torch.is_tensor(leaf) else str(leaf) for leaf in [*leaves, *gradients]]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_it_changes_no_bit(tmp_path, name, adapter, dropout):
    keys = {"zo_optimizer": "momentum", "zo_learning_rate": "auto"} if METHODS[name].zeroth_order else {}
    trainer = make_trainer(tmp_path, method=name, adapter=adapter, **keys)
    for module in trainer.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    before = state(trainer)
    found = trainer.try_step()
    assert found.seconds > 0
    assert state(trainer) == before
    assert trainer.method.keys is trainer.args


@pytest.mark.parametrize("name", ["fo", "zo", "bilevel"])
def test_a_run_after_it_ends_with_the_same_bits(tmp_path, name):
    def ended(tries):
        trainer = make_trainer(tmp_path, method=name, save_strategy="no")
        for _ in range(tries):
            trainer.try_step()
        trainer.train()
        trainer.cost.wall_seconds = trainer.cost.peak_memory_bytes = 0
        return state(trainer)

    assert ended(2) == ended(0)


def test_its_memory_is_that_of_the_run(tmp_path, monkeypatch):
    """A step that holds 200 MB on the longest rows only: the shorter ones are not what is measured."""
    loss, widths = Scorer.loss, []

    def hold(self, batch):
        widths.append(batch["input_ids"].shape[1])
        kept = torch.ones(200 * 2**20 // 4) if widths[-1] == max(widths) and len(widths) == 1 else None
        value = loss(self, batch)
        del kept
        return value

    monkeypatch.setattr(Scorer, "loss", hold)
    rows = make_rows(12)
    rows[7] = {**rows[7], "prompt": rows[7]["prompt"] * 5}
    trainer = make_trainer(tmp_path, method="fo", train=rows)
    reset_peak_memory(trainer.args.device)
    before = peak_memory(trainer.args.device)
    found = trainer.try_step()
    assert widths[0] == max(widths) > min(widths)
    assert found.peak - before > 190 * 2**20


@pytest.mark.parametrize(("optim", "each"), [("adamw_torch", 8), ("sgd", 0)])
def test_the_states_of_an_optimizer_of_all_weights_are_counted(tmp_path, optim, each):
    trainer = make_trainer(tmp_path, method="fo", adapter="none", optim=optim, save_strategy="no")
    counted = memory.optimizer_states(trainer.method, trainer.args)
    assert counted == each * sum(p.numel() for p in trainer.adapted.backbone.values())
    trainer.train()
    tensors = [v for own in trainer.optimizer.optimizer.state.values() for v in own.values() if torch.is_tensor(v)]
    assert counted == sum(v.nbytes for v in tensors if v.ndim)


def test_a_step_that_does_not_fit_is_said_before_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, method="fo")

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.method, "step", fail)
    with pytest.raises(ZofoError, match=r"a step on the longest rows .* does not fit into the memory: lower"):
        trainer.try_step()


def test_other_errors_are_not_called_a_lack_of_memory(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, method="fo")

    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(trainer.method, "step", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.try_step()


def test_a_loss_that_is_not_finite_is_left_to_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, method="bilevel")
    before = state(trainer)
    loss = Scorer.loss
    monkeypatch.setattr(Scorer, "loss", lambda self, batch: loss(self, batch) * float("nan"))
    assert trainer.try_step() is None
    assert state(trainer) == before
