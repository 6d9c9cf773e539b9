"""Which weights a method moves, and with which randomness: nothing else moves, and nothing else is drawn."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig

from plain import Watch, make_rows, make_trainer, micro_steps, moved, same, trained, weights
from zofo import ZOFOConfig, ZofoError
from zofo.methods import bilevel
from zofo.scoring.scorer import Scorer

DROPOUT = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, target_modules=["q_proj", "v_proj"])


def start_and_end(folder, **keys):
    """(weights by part before, after, trainer)."""
    trainer = make_trainer(folder, **keys)
    parts = ("backbone", *trainer.adapted.adapters)
    before = {part: weights(trainer.adapted, part) for part in parts}
    trainer.train()
    return before, {part: weights(trainer.adapted, part) for part in parts}, trainer


@pytest.mark.parametrize(
    ("method", "adapter", "moves"),
    [
        ("bilevel", "lora", {"backbone", "upper", "lower"}),
        ("zo", "none", {"backbone"}),
        ("zo", "lora", {"upper"}),
        ("zo", "prompt", {"upper"}),
        ("zo", "prefix", {"upper"}),
        ("fo", "lora", {"upper"}),
        ("fo", "none", {"backbone"}),
        ("two_stage", "lora", {"backbone", "upper"}),
    ],
)
def test_every_weight_of_the_method_moves_and_no_other(tmp_path, method, adapter, moves):
    before, after, _ = start_and_end(tmp_path, method=method, adapter=adapter, max_steps=4)
    for part, names in before.items():
        if part not in moves:
            assert same(names, after[part])
        elif (method, adapter) == ("fo", "none"):  # backpropagation leaves the rows of unseen tokens alone
            assert moved(names, after[part]) == names.keys()
        else:
            still = {name for name in names if not (names[name] != after[part][name]).float().mean() > 0.9}
            assert not still
    assert set(before) >= moves


@pytest.mark.parametrize(
    ("order", "fraction", "of_adapter"),
    [("adapter_first", 0.4, {0, 1}), ("backbone_first", 0.4, {3, 4}), ("backbone_first", 0.8, {1, 2, 3, 4})],
)
def test_two_stage_moves_one_part_alone_and_then_the_other(tmp_path, order, fraction, of_adapter):
    keys = {"two_stage_fraction": fraction, "two_stage_order": order, "max_steps": 5}
    trainer = make_trainer(tmp_path, method="two_stage", **keys)
    history = [{part: weights(trainer.adapted, part) for part in ("backbone", "upper")}]
    trainer.add_callback(
        Watch(after=lambda: history.append({p: weights(trainer.adapted, p) for p in ("backbone", "upper")}))
    )
    trainer.train()
    for step, (before, after) in enumerate(itertools.pairwise(history)):
        assert same(before["backbone"], after["backbone"]) == (step in of_adapter)
        assert same(before["upper"], after["upper"]) == (step not in of_adapter)
    assert len(history) == 6


def test_the_stages_in_the_other_order_are_the_plain_methods_bitwise(tmp_path):
    keys = {"max_steps": 4, "zo_learning_rate": 1e-2}
    found, trainer = trained(tmp_path, method="two_stage", two_stage_order="backbone_first", **keys)
    assert not trainer.method._backbone._level._scratch._free  # a step of the adapter has all of the memory
    mezo = make_trainer(tmp_path, method="zo", adapter="none", **{**keys, "max_steps": 2})
    mezo.train()
    assert same(found["backbone"], weights(mezo.adapted, "backbone"))  # LoRA adds 0 as long as it is not trained


@pytest.mark.parametrize(
    ("method", "adapter"),
    [("bilevel", "lora"), ("bilevel", "prefix"), ("zo", "none"), ("zo", "lora"), ("two_stage", "lora")],
)
def test_the_backbone_never_has_a_gradient(tmp_path, method, adapter):
    trainer = make_trainer(tmp_path, method=method, adapter=adapter)
    adapted, watched = trainer.adapted, []

    def look():
        assert not any(p.requires_grad or p.grad is not None for p in adapted.backbone.values())
        if method == "bilevel":
            watched.append(all(p.grad is not None for p in adapted.adapter_parameters("upper").values()))

    trainer.add_callback(Watch(look, look))
    trainer.train()
    assert watched == ([True, False] * 3 if method == "bilevel" else [])


class Forwards:
    """What the trainer's model did: (adapter, gradient wanted, train mode) of each forward."""

    def __init__(self, trainer):
        self.seen = []
        adapted = trainer.adapted
        assert adapted.mixes or len(adapted.adapters) < 2  # found by a forward of its own, which is not counted
        adapted.base.register_forward_pre_hook(
            lambda module, args: self.seen.append(
                (
                    adapted.model.active_adapter if adapted.adapters else None,
                    torch.is_grad_enabled(),
                    module.training and any(m.training for m in module.modules() if "Dropout" in type(m).__name__),
                )
            )
        )


def test_dropout_is_on_in_backpropagation_and_off_in_zeroth_order_forwards(tmp_path):
    trainer = make_trainer(tmp_path, peft=DROPOUT, lower_steps=2, max_steps=2)
    forwards = Forwards(trainer)
    trainer.train()
    of_gradients = [("lower", True, True)] * 2 + [("upper", True, True)] * 2
    of_theta = [("upper", False, False)] * 2  # F and G of p and G of s in one forward
    assert forwards.seen == (of_gradients + of_theta) * 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # GPT-2's own layers have dropout too
def test_dropout_changes_first_order_runs_and_not_zeroth_order_ones(tmp_path, family):
    modules = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    with_dropout, without = (
        LoraConfig(task_type="CAUSAL_LM", lora_dropout=p, target_modules=modules, fan_in_fan_out=family == "gpt2")
        for p in (0.5, 0.0)
    )
    dropped, _ = trained(tmp_path, method="zo", peft=with_dropout, family=family)
    kept, _ = trained(tmp_path, method="zo", peft=without, family=family)
    assert same(dropped["upper"], kept["upper"])
    dropped, _ = trained(tmp_path, method="fo", peft=with_dropout, family=family)
    kept, _ = trained(tmp_path, method="fo", peft=without, family=family)
    assert moved(dropped["upper"], kept["upper"])


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("dropout", [False, True])
def test_one_sided_uses_the_known_losses_again_only_where_nothing_was_drawn(tmp_path, dropout, queries):
    trainer = make_trainer(
        tmp_path,
        peft=DROPOUT if dropout else None,
        zo_estimator="one_sided",
        num_perturbations=queries,
        lower_steps=0,
        max_steps=2,
    )
    forwards = Forwards(trainer)
    trainer.train()
    active = "upper" if dropout else "lower"  # a forward for both leaves active what was; one of s alone comes first
    expected = ["upper", "upper", active, *[active] * queries]
    assert [adapter for adapter, _, _ in forwards.seen] == expected * 2


def test_the_losses_that_one_sided_uses_again_are_those_it_would_measure(tmp_path, monkeypatch):
    found = []
    for draws in (False, True):
        if draws:
            monkeypatch.setattr(bilevel, "_random_state", lambda: [torch.rand(1)])  # as if something had been drawn
        trainer = make_trainer(tmp_path, zo_estimator="one_sided", max_steps=1)
        propose = trainer.method.theta.propose
        trainer.method.theta.propose = lambda *args, propose=propose, **more: (
            found.append(propose(*args, **more)) or found[-1]
        )
        trainer.train()
    # the three losses are below 2 and may differ by 8 units in the last place in another batch
    assert abs(found[0][0] - found[1][0]) <= 3 * 8 * 2.0**-23 / trainer.args.zo_eps


@pytest.mark.parametrize("where", ["lower", "upper", "theta"])
@pytest.mark.parametrize("kind", ["skip", "raise"])
def test_a_step_whose_loss_is_not_finite_is_skipped_whole_or_raises(tmp_path, monkeypatch, where, kind):
    """In step 1 of 3, the loss of a lower step, of F(θ, p), or of a zeroth-order forward is not finite."""
    trainer = make_trainer(tmp_path, on_nonfinite=kind, max_steps=3, learning_rate=1e-2)
    adapted, parts = trainer.adapted, ("backbone", "upper", "lower")
    history = []
    trainer.add_callback(Watch(after=lambda: history.append(snapshot())))

    def snapshot():
        states = [m.state_dict()["state"] for m in trainer.method.optimizer.members.values()]
        numbers = {f"{i}/{k}/{n}": v.clone() for i, s in enumerate(states) for k, e in s.items() for n, v in e.items()}
        return {part: weights(adapted, part) for part in parts} | {"optimizers": numbers}

    whole_loss, calls = Scorer.loss, {"lower": 0, "upper": 0, "theta": 0}

    def loss(self, batch):
        return whole_loss(self, batch) * spoiled(self.adapted.model.active_adapter)

    def losses(self, batches, adapters):
        bad = spoiled("theta")
        return [bad * whole_loss(self, batch) for batch in batches]

    def spoiled(called):
        calls[called] += 1
        per_step = {"lower": 2, "upper": 2, "theta": 2}[called]
        return math.nan if called == where and calls[called] == 2 * per_step else 1.0  # the last one of step 1

    monkeypatch.setattr(Scorer, "loss", loss)
    monkeypatch.setattr(Scorer, "losses", losses)
    if kind == "raise":
        with pytest.raises(ZofoError, match=r"step 1: .* is nan"):
            trainer.train()
        assert len(history) == 1
        history.append(snapshot())
        assert all(p.grad is None for p in adapted.model.parameters())
    else:
        trainer.train()
        assert len(history) == 3
        for part in parts:
            assert moved(history[1][part], history[2][part]) == history[1][part].keys()
    for part in (*parts, "optimizers") if kind == "skip" else ("backbone", "upper"):
        assert same(history[0][part], history[1][part]), part


def test_levels_that_share_their_rows_read_all_of_them_in_orders_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(12), lower_fraction="shared", lower_steps=1, max_steps=6)
    assert trainer._sizes == [{"train": 12}]
    assert len(trainer.train_dataset) == 12
    assert len(trainer.identity["rows"]) == 1
    seen = {"lower": [], "penalty": [], "upper": []}
    for bundle in micro_steps(trainer):
        for name, (batch,) in bundle.items():
            seen[name] += [tuple(row[row != 2].tolist()) for row in batch["input_ids"]]
    assert len(seen["lower"]) == 12
    assert set(seen["lower"]) == set(seen["penalty"]) == set(seen["upper"])
    assert len({tuple(order) for order in seen.values()}) == 3
    both = make_trainer(tmp_path, make_rows(6), make_rows(6, first=6), lower_fraction="shared")
    assert both.identity["rows"] == trainer.identity["rows"]
    plain = make_trainer(tmp_path, make_rows(12), method="fo")
    assert plain.identity["rows"] == trainer.identity["rows"]
    before = {part: weights(trainer.adapted, part) for part in ("backbone", "upper", "lower")}
    trainer.train()
    assert all(moved(values, weights(trainer.adapted, part)) for part, values in before.items())


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_a_frozen_backbone_costs_no_forward_and_leaves_the_adapters_what_they_are(tmp_path, estimator):
    """Against a run whose optimizer of θ is taken away: the same bits of p and s, without the losses near θ."""
    keys = {"zo_estimator": estimator, "max_steps": 4}
    frozen = make_trainer(tmp_path, zo_learning_rate=0, **keys)
    start = weights(frozen.adapted, "backbone")
    frozen.train()
    hand = make_trainer(tmp_path, **keys)
    hand.method.theta.optimizer.step = lambda: None
    hand.train()
    assert same(start, weights(frozen.adapted, "backbone"))
    for part in ("upper", "lower"):
        assert same(weights(frozen.adapted, part), weights(hand.adapted, part))
    assert frozen.cost.backward_tokens == hand.cost.backward_tokens
    assert frozen.cost.forward_tokens == frozen.cost.backward_tokens < hand.cost.forward_tokens
    log = next(log for log in frozen.state.log_history if "loss" in log)
    assert log["zo_learning_rate"] == 0
    assert not log.keys() & {"projected_grad", "penalty_gap"}


def test_only_a_method_that_goes_on_without_theta_may_freeze_it():
    keys = {"output_dir": "run", "use_cpu": True, "zo_learning_rate": 0}
    for method in ("zo", "two_stage", "fo"):
        with pytest.raises(ZofoError, match=r"zo_learning_rate is 0\.0, but must be greater than 0"):
            ZOFOConfig(method=method, **keys)
    assert ZOFOConfig(**keys).variant("zo", "none").zo_learning_rate == "auto"


def test_a_run_without_training_rows_of_its_own_upper_level_divides_them(tmp_path):
    rows = make_rows(12)
    trainer = make_trainer(tmp_path, rows, lower_fraction=0.75)
    texts = [example.prompt for example in trainer.train_dataset]
    assert len(texts) == len(set(texts)) == 12
    assert trainer._sizes == [{"lower": 9, "upper": 3}]


@pytest.mark.parametrize("kind", ["skip", "raise"])
@pytest.mark.parametrize("keys", [{}, {"adapter": "none"}, {"method": "two_stage"}], ids=str)
def test_no_gradient_is_left_of_a_step_whose_second_batch_is_not_finite(tmp_path, monkeypatch, keys, kind):
    keys = {"method": "fo", **keys, "gradient_accumulation_steps": 2, "max_steps": 2, "on_nonfinite": kind}
    trainer = make_trainer(tmp_path, **keys)
    whole_loss, calls = Scorer.loss, []

    def loss(self, batch):
        calls.append([p.grad is not None for p in self.adapted.model.parameters()])
        return whole_loss(self, batch) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(Scorer, "loss", loss)
    if kind == "raise":
        with pytest.raises(ZofoError, match=r"step 0: the training loss is nan"):
            trainer.train()
    else:
        trainer.train()
    assert any(calls[1]), "the first batch has left a gradient"
    assert all(p.grad is None for p in trainer.model.parameters())
