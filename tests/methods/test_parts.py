"""Backpropagation above the blocks below the adapters: long batches go forward and backward in parts."""

import pytest
import torch

from plain import MORE_TOKENS, assert_close, make_rows, make_trainer, micro_steps, same, trained, weights
from zofo.methods import first_order_level

LAST = {"method": "fo", "adapter_layers": "last 1", "per_device_train_batch_size": 4, "optim": "sgd"}


def gradient(trainer, batch):
    """(loss, gradients) of one batch."""
    (level,) = trainer.method.adapter_levels
    loss = level.gradient([batch], "the loss")
    found = {str(number): parameter.grad.clone() for number, parameter in enumerate(level.parameters)}
    level.optimizer.zero_grad()
    return loss, found


@pytest.mark.parametrize("keys", [{}, {"loss": "lm"}, {"family": "gpt2"}])
def test_parts_add_up_to_the_gradient_of_the_batch(tmp_path, monkeypatch, keys):
    whole = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), **{**LAST, **keys})
    (batch,) = next(micro_steps(whole))["adapter"]
    loss, expected = gradient(whole, batch)
    monkeypatch.setattr(first_order_level, "_TOKENS_AT_ONCE", batch["input_ids"].shape[1])
    parts = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), **{**LAST, **keys})
    widths = []
    parts.adapted.base.register_forward_pre_hook(
        lambda model, args, inputs: widths.append(len(inputs["input_ids"])), with_kwargs=True
    )
    loss_of_parts, found = gradient(parts, batch)
    assert len(widths) > 1
    assert sum(widths) == len(batch["input_ids"])
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert_close(found, expected, atol=1e-6 * largest)


def saved_elements(trainer, batch):
    """The most elements that autograd keeps for one backward pass."""
    counts = [0]

    def pack(tensor):
        counts[-1] += tensor.numel()
        return tensor

    (level,) = trainer.method.adapter_levels
    usual = level._backward
    level._backward = lambda loss: (counts.append(0), usual(loss))[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient(trainer, batch)
    return max(counts)


def test_a_part_keeps_its_share_of_the_activations(tmp_path, monkeypatch):
    rows = make_rows(12, options=["a", "b"])
    whole = make_trainer(tmp_path, rows, **LAST)
    (batch,) = next(micro_steps(whole))["adapter"]
    of_whole = saved_elements(whole, batch)
    monkeypatch.setattr(first_order_level, "_TOKENS_AT_ONCE", batch["input_ids"].shape[1])
    assert (
        saved_elements(make_trainer(tmp_path, rows, **LAST), batch) < of_whole / 2
    )  # of four rows; weights are kept too


def test_adapters_everywhere_and_short_batches_take_one_pass(tmp_path, monkeypatch):
    few, _ = trained(tmp_path / "few", **LAST)
    everywhere, _ = trained(tmp_path / "everywhere", **{**LAST, "adapter_layers": None})
    monkeypatch.setattr(first_order_level, "_TOKENS_AT_ONCE", 10**6)
    assert same(trained(tmp_path / "again", **LAST)[0]["upper"], few["upper"])
    monkeypatch.setattr(first_order_level, "_TOKENS_AT_ONCE", 1)
    again, _ = trained(tmp_path / "all", **{**LAST, "adapter_layers": None})
    assert same(again["upper"], everywhere["upper"])
    assert not same(trained(tmp_path / "parts", **LAST)[0]["upper"], few["upper"])


def test_a_pool_shares_the_forwards_of_the_parts(tmp_path, monkeypatch):
    keys = {**LAST, "method": "bilevel", "lower_steps": 4, "lower_pool": 2, "zo_learning_rate": 0.0}
    rows = make_rows(12, options=MORE_TOKENS)
    monkeypatch.setattr(first_order_level, "_TOKENS_AT_ONCE", 1)
    pooled, trainer = trained(tmp_path / "pool", rows, **keys)
    assert trainer.method.s._tokens_at_once == 1
    monkeypatch.setattr(first_order_level, "blocks_below", lambda adapted: [])
    plain, _ = trained(tmp_path / "plain", rows, **keys)
    start = make_trainer(tmp_path / "start", rows, **keys).adapted
    for part in ("upper", "lower"):
        largest = max(float((pooled[part][name] - before).abs().max()) for name, before in weights(start, part).items())
        assert largest > 0
        assert_close(pooled[part], plain[part], atol=1e-4 * largest)
