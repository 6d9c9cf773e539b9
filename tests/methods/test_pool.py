"""Lower steps that pass over the same batches again, and share the forwards of the blocks below the adapters."""

import pytest
import torch

from plain import (
    MORE_TOKENS,
    assert_close,
    make_rows,
    make_trainer,
    micro_steps,
    moved,
    same,
    same_run,
    trained,
    weights,
    whole_and_resumed,
)
from tiny import ALL_FAMILIES, FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer
from zofo import ZOFOConfig
from zofo.commands.estimate import estimate
from zofo.compare.budget import iteration_cost
from zofo.errors import ZofoError
from zofo.methods import METHODS, first_order_level
from zofo.models import below

OF_OTHER_BLOCKS = ("gemma3_text", "deepseek_v3", "mamba", "lfm2")
LAST = {"adapter_layers": "last 1", "lower_steps": 4, "lower_pool": 2, "per_device_train_batch_size": 2}


def as_if_nothing_were_below(monkeypatch):
    monkeypatch.setattr(first_order_level, "blocks_below", lambda adapted: [])


@pytest.mark.parametrize("keys", [{}, {"gradient_accumulation_steps": 2}, {"loss": "lm", "family": "gpt2"}])
def test_shared_forwards_give_what_plain_ones_give_on_the_same_rows(tmp_path, monkeypatch, keys):
    keys = {**LAST, "optim": "sgd", **keys}
    shared, _ = trained(tmp_path / "shared", make_rows(12, options=MORE_TOKENS), **keys)
    as_if_nothing_were_below(monkeypatch)
    plain, trainer = trained(tmp_path / "plain", make_rows(12, options=MORE_TOKENS), **keys)
    start = make_trainer(tmp_path / "start", make_rows(12, options=MORE_TOKENS), **keys).adapted
    for part, values in shared.items():
        largest = max(float((values[name] - before).abs().max()) for name, before in weights(start, part).items())
        assert largest > 0
        assert_close(values, plain[part], atol=1e-4 * largest)
    assert trainer.state.global_step == 3


def test_blocks_below_run_once_for_each_batch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, zo_learning_rate=0.0, **LAST)
    blocks, calls = trainer.adapted.base.model.layers, [0, 0]
    for number, block in enumerate(blocks):
        usual = type(block).forward

        def counted(*args, number=number, usual=usual, block=block, **kwargs):
            calls[number] += torch.is_grad_enabled()
            return usual(block, *args, **kwargs)

        block.forward = counted
    trainer.train()
    assert calls == [2 + 2, 4 + 2]  # of s, and F(θ, p) and G(θ, p)
    assert all("forward" in vars(block) for block in blocks)  # what was put there before is there again


def test_a_batch_that_takes_a_forward_for_each_row_keeps_what_each_has_returned(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), zo_learning_rate=0.0, **LAST)
    level, scorer = trainer.method.s, trainer.method.scorer
    scorer._max_shared = 1  # as for rows wider than the original length of LongRoPE
    (batch, _) = next(micro_steps(trainer))["lower"]
    kept, found = below.Below(), []
    for _ in range(3):
        found.append(level.gradient([batch], "the loss", below=[kept]))
        found.append([p.grad.clone() for p in level.parameters])
        level.optimizer.zero_grad()
    assert len(kept._outputs) == len(batch["input_ids"]) > 1
    assert found[0] == found[2] == found[4]
    assert all(map(torch.equal, found[1], found[3]))


def test_a_pool_of_all_batches_has_the_bits_of_none(tmp_path):
    keys = {**LAST, "max_steps": 2}
    whole, _ = trained(tmp_path / "pool", **{**keys, "lower_pool": 4})
    assert all(same(values, trained(tmp_path / "none", **{**keys, "lower_pool": None})[0][part])
               for part, values in whole.items())  # fmt: skip


@pytest.mark.parametrize("penalty", [1.0, "infinite"])
def test_a_run_with_a_pool_goes_on_with_the_bits_of_one_that_was_not_stopped(tmp_path, penalty):
    keys = {**LAST, "max_steps": 4, "penalty": penalty}
    whole, again = whole_and_resumed(tmp_path, **keys)
    assert same_run(whole, again)
    start = make_trainer(tmp_path / "start", **keys).adapted
    assert all(moved(weights(start, part), weights(again.adapted, part)) for part in ("backbone", *start.adapters))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in FAMILIES or name in OF_OTHER_BLOCKS else pytest.mark.full)
        for name in ALL_FAMILIES
    ],
)
def test_a_forward_that_begins_above_the_blocks_below_is_right_or_refused(tmp_path, family):
    """Right on all families of the tests, as their blocks hand on nothing but what they return."""
    trainer = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), family=family, zo_learning_rate=0.0, **LAST)
    assert [*below.blocks_below(trainer.adapted)]
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_model_whose_blocks_hand_on_more_than_they_return_is_refused(tmp_path):
    model = tiny_model(vocab_size=len(tiny_tokenizer()))
    first, second = model.model.layers
    usual, aside = first.forward, []
    first.forward = lambda hidden, *args, **kwargs: aside.append(hidden) or usual(hidden, *args, **kwargs)
    second.register_forward_hook(lambda block, args, output: output + 5 * aside.pop() if aside else output)
    with pytest.raises(ZofoError, match=r"this llama model that begins above .* gives another loss: leave lower_pool"):
        make_trainer(tmp_path, model=model, zo_learning_rate=0.0, **LAST)


def test_a_pool_costs_what_it_runs(tmp_path):
    model = str(save_tiny_model(tmp_path / "deep", num_hidden_layers=8))
    keys = {"model": model, "lower_steps": 10, "penalty": 0.0, "zo_learning_rate": 0.0}

    def config(**more):
        return ZOFOConfig(output_dir="run", use_cpu=True, per_device_train_batch_size=1, **keys, **more)

    pooled = config(adapter_layers="last 2", lower_pool=2)
    assert METHODS["bilevel"].streams(pooled)["lower"].batches == 2
    assert iteration_cost(pooled) == pytest.approx(11 * (1 + 1 / 4) - 8 * 3 / 4)
    assert iteration_cost(config(lower_pool=2)) == 11 * 2  # adapters everywhere: nothing is shared
    rows = estimate(config(adapter_layers="last 2", lower_pool=2, max_length=64, loss="lm"))
    assert next(row for row in rows if row.chosen).seconds > 0


@pytest.mark.parametrize(
    ("pool", "message"),
    [(0, "lower_pool is 0, but must be greater than 0"), (11, "lower_pool is 11, but lower_steps is 10, so some of")],
)
def test_a_pool_that_cannot_be(pool, message):
    with pytest.raises(ZofoError, match=message):
        ZOFOConfig(output_dir="run", use_cpu=True, lower_pool=pool)
    with pytest.raises(ZofoError, match="never be used: leave it out"):
        ZOFOConfig(output_dir="run", use_cpu=True, lower_pool=1, lower_steps=0)
    assert "lower_pool" in ZOFOConfig(output_dir="run", use_cpu=True, method="fo", lower_pool=11).notices()[0]
