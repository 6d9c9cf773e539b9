"""The limits of Bilevel ZOFO are the plain methods, bit for bit; each step is the one that the paper writes."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig

from plain import (
    MORE_TOKENS,
    Watch,
    assert_close,
    make_rows,
    make_trainer,
    micro_steps,
    moved,
    plain_bilevel,
    plain_loss,
    same,
    trained,
    weights,
)
from zofo import ZofoError, direction, noise
from zofo.zo.rules import Automatic

LOWER_ROWS = make_rows(12)
UPPER_ROWS = make_rows(10, first=100)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bilevel_with_frozen_backbone_is_first_order_peft_on_s_bitwise(tmp_path, accumulation):
    keys = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    bilevel = make_trainer(tmp_path, LOWER_ROWS, UPPER_ROWS, lower_steps=3, max_steps=4, **keys)
    bilevel.method.theta.optimizer.step = lambda: None
    bilevel.train()
    found, first_order = trained(tmp_path, LOWER_ROWS, method="fo", max_steps=12, **keys)
    start = make_trainer(tmp_path, LOWER_ROWS, UPPER_ROWS)
    assert same(weights(bilevel.adapted, "backbone"), weights(start.adapted, "backbone"))
    s = {name.replace("lower", "upper"): value for name, value in weights(bilevel.adapted, "lower").items()}
    assert same(s, found["upper"])
    assert moved(weights(start.adapted, "upper"), found["upper"]) == found["upper"].keys()
    of_bilevel = [log["lower_loss"] for log in bilevel.state.log_history if "lower_loss" in log]
    of_first_order = [log["loss"] for log in first_order.state.log_history if "loss" in log]
    for iteration, loss in enumerate(of_bilevel):
        assert loss == pytest.approx(sum(of_first_order[3 * iteration : 3 * iteration + 3]) / 3, rel=1e-6)


@pytest.mark.parametrize(("estimator", "queries"), [("two_sided", 3), ("one_sided", 1)])
def test_bilevel_without_adapter_terms_is_mezo_bitwise(tmp_path, estimator, queries):
    keys = {"num_perturbations": queries, "zo_estimator": estimator, "max_steps": 7}
    bilevel, _ = trained(tmp_path, LOWER_ROWS, UPPER_ROWS, lower_steps=0, penalty=0.0, upper_learning_rate=0.0, **keys)
    mezo, _ = trained(tmp_path, UPPER_ROWS, method="zo", adapter="none", **keys)
    assert same(bilevel["backbone"], mezo["backbone"])
    start = weights(make_trainer(tmp_path).adapted, "backbone")
    assert moved(start, mezo["backbone"]) == start.keys()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_infinite_penalty_with_frozen_backbone_is_first_order_peft_bitwise(tmp_path, accumulation):
    keys = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    infinite = {"penalty": "infinite", "zo_learning_rate": 0.0, "lower_steps": 3, "max_steps": 4}
    found, _ = trained(tmp_path, LOWER_ROWS, UPPER_ROWS, **infinite, **keys)
    first_order, _ = trained(tmp_path, LOWER_ROWS, method="fo", max_steps=12, **keys)
    assert found.keys() == {"backbone", "upper"}
    assert same(found["upper"], first_order["upper"])
    assert same(found["backbone"], weights(make_trainer(tmp_path).adapted, "backbone"))


@pytest.mark.parametrize("keys", [{}, {"num_perturbations": 3}, {"zo_distribution": "low_rank"}])
def test_an_infinite_penalty_without_lower_steps_is_mezo_bitwise(tmp_path, keys):
    keys = {"max_steps": 5, "num_perturbations": 2, **keys}
    found, _ = trained(tmp_path, LOWER_ROWS, UPPER_ROWS, penalty="infinite", lower_steps=0, **keys)
    mezo, _ = trained(tmp_path, UPPER_ROWS, method="zo", adapter="none", **keys)
    assert same(found["backbone"], mezo["backbone"])
    start = make_trainer(tmp_path).adapted
    assert moved(weights(start, "backbone"), mezo["backbone"]) == mezo["backbone"].keys()
    assert same(found["upper"], weights(start, "upper"))


def test_an_infinite_penalty_moves_theta_by_the_loss_with_the_adapter_just_trained(tmp_path):
    """An iteration is T steps of `fo`, and then a step of MeZO with that adapter, by hand."""
    wide = {"zo_eps": 0.03, "zo_learning_rate": 3e-3, "optim": "sgd", "learning_rate": 0.3}
    keys = {"penalty": "infinite", "lower_steps": 2, "max_steps": 3, **wide}
    rows = (make_rows(12, options=MORE_TOKENS), make_rows(10, first=100, options=MORE_TOKENS))
    found, trainer = trained(tmp_path, *rows, **keys)
    hand = make_trainer(tmp_path, *rows, **keys)
    adapted, eps = hand.adapted, noise.representable(0.03)
    p = list(adapted.adapter_parameters("upper").values())
    sgd = torch.optim.SGD(p, lr=0.3)
    for number, bundle in zip(range(3), micro_steps(hand), strict=False):
        for batch in bundle["lower"]:
            adapted.model.train()
            (hand.method.scorer.loss(batch) / len(batch["gold"])).backward()
            torch.nn.utils.clip_grad_norm_(p, 1.0)
            sgd.step()
            sgd.zero_grad()
        (batch,) = bundle["upper"]
        z = direction(adapted.backbone, hand.args.seed, number)
        losses = []
        adapted.model.eval()
        with torch.no_grad():
            for sign in (1, -1):
                for name, w in adapted.backbone.items():
                    w.add_(sign * eps * z[name])
                losses.append(float(hand.method.scorer.loss(batch)) / len(batch["gold"]))
                for name, w in adapted.backbone.items():
                    w.sub_(sign * eps * z[name])
            for name, w in adapted.backbone.items():
                w.sub_(3e-3 * (losses[0] - losses[1]) / (2 * eps) * z[name])
    start = make_trainer(tmp_path, *rows, **keys)
    for part in ("backbone", "upper"):
        assert moved(weights(start.adapted, part), found[part]) == found[part].keys()
        assert_close(found[part], weights(adapted, part), atol=1e-5)
    logged = [log for log in trainer.state.log_history if "upper_loss" in log]
    assert len(logged) == 3
    assert all(log["loss"] != log["upper_loss"] for log in logged)


def test_an_infinite_penalty_that_trains_nothing_is_refused(tmp_path):
    with pytest.raises(ZofoError, match="so nothing would be trained"):
        make_trainer(tmp_path, penalty="infinite", lower_steps=0, zo_learning_rate=0.0)
    with pytest.raises(ZofoError, match="penalty is 'endless', but must be a number or infinite"):
        make_trainer(tmp_path, penalty="endless")
    assert make_trainer(tmp_path, penalty=float("inf")).args.penalty == "infinite"


def test_without_penalty_and_lower_steps_fo_and_zo_stand_side_by_side_bitwise(tmp_path):
    keys = {"lower_steps": 0, "penalty": 0.0, "upper_learning_rate": 3e-2, "max_steps": 5, "num_perturbations": 2}
    found, _ = trained(tmp_path, LOWER_ROWS, UPPER_ROWS, **keys)
    hand = make_trainer(tmp_path, LOWER_ROWS, UPPER_ROWS, **keys)
    adapted, scorer = hand.adapted, hand.method.scorer
    theta, p = adapted.backbone, list(adapted.adapter_parameters("upper").values())
    adam = torch.optim.AdamW(p, lr=3e-2, weight_decay=0.0, fused=True)
    eps = noise.representable(hand.args.zo_eps)

    def loss(batch):
        return scorer.loss(batch) / len(batch["gold"])

    def shifted(number, query, scale, batch):
        kept = {name: w.clone() for name, w in theta.items()}
        for name, w in theta.items():
            noise.add_(w.data, noise.stream_key(hand.args.seed, number, query, name), scale)
        value = float(loss(batch).detach())
        for name, w in theta.items():
            w.data.copy_(kept[name])
        return value

    for number, bundle in zip(range(5), micro_steps(hand), strict=False):
        (batch,) = bundle["upper"]
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(p, 1.0)
        slopes = [(shifted(number, q, eps, batch) - shifted(number, q, -eps, batch)) / (2 * eps) for q in range(2)]
        adam.step()
        adam.zero_grad()
        for name, w in theta.items():
            for query, slope in enumerate(slopes):
                noise.add_(w.data, noise.stream_key(hand.args.seed, number, query, name), -1e-2 / 2 * slope)
    assert same(found["upper"], weights(adapted, "upper"))
    assert same(found["backbone"], weights(adapted, "backbone"))
    assert moved(found["upper"], weights(make_trainer(tmp_path).adapted, "upper")) == found["upper"].keys()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"penalty": 3.0, "normalize_penalty": False},
        {"penalty": 8.0, "penalty_schedule": "linear"},
        {"zo_estimator": "one_sided", "num_perturbations": 2},
        {"num_perturbations": 3},
        {"loss": "lm"},
    ],
    ids=lambda keys: ", ".join(f"{k}={v}" for k, v in keys.items()) or "defaults",
)
def test_bilevel_steps_are_those_of_the_paper(tmp_path, keys):
    # a wide ε, for rounding is divided by it; SGD, for Adam turns rounding near 0 into whole steps
    wide = {"zo_eps": 0.03, "zo_learning_rate": 3e-3, "optim": "sgd", "learning_rate": 0.3}
    keys = {"max_steps": 4, "penalty": 1.0, **wide, **keys}
    rows = (make_rows(12, options=MORE_TOKENS), make_rows(10, first=100, options=MORE_TOKENS))
    found, _ = trained(tmp_path, *rows, **keys)
    hand = make_trainer(tmp_path, *rows, **keys)
    linear = keys.get("penalty_schedule") == "linear"
    plain_bilevel(hand, 4, lambda number: keys["penalty"] * (number / 4 if linear else 1))
    start = make_trainer(tmp_path, *rows, **keys)
    for part in ("backbone", "upper", "lower"):
        assert moved(weights(start.adapted, part), found[part]) == found[part].keys()
        assert_close(found[part], weights(hand.adapted, part), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("keys", [{}, {"loss": "lm"}, {"zo_estimator": "one_sided", "num_perturbations": 2}])
def test_mezo_steps_are_those_of_a_plainly_perturbed_copy(tmp_path, family, keys):
    keys = {"method": "zo", "adapter": "none", "zo_eps": 0.03, "max_steps": 3, "family": family, **keys}
    found, _ = trained(tmp_path, **keys)
    hand = make_trainer(tmp_path, **keys)
    theta, args = hand.adapted.backbone, hand.args
    for number, bundle in zip(range(3), micro_steps(hand), strict=False):
        update = {name: torch.zeros_like(w) for name, w in theta.items()}
        for query in range(args.num_perturbations):
            z = direction(theta, args.seed, number, query)
            losses = []
            for scale in (0.03, 0.0 if args.zo_estimator == "one_sided" else -0.03):
                other = copy.deepcopy(hand.adapted.base)
                with torch.no_grad():
                    for name, w in other.named_parameters():
                        w += scale * z[name]
                    losses.append(float(plain_loss(other, bundle["zo"][0])))
            slope = (losses[0] - losses[1]) / (0.03 if args.zo_estimator == "one_sided" else 0.06)
            for name, change in update.items():
                change -= args.zo_learning_rate * slope * z[name] / args.num_perturbations
        with torch.no_grad():
            for name, w in theta.items():
                w += update[name]
    assert_close(found["backbone"], weights(hand.adapted, "backbone"), atol=1e-5)
    start = weights(make_trainer(tmp_path, **keys).adapted, "backbone")
    assert moved(start, found["backbone"]) == start.keys()


def test_queries_applied_in_one_pass_equal_one_pass_for_each(tmp_path):
    keys = {"method": "zo", "adapter": "none", "max_steps": 1, "num_perturbations": 4}
    trainer = make_trainer(tmp_path, **keys)
    estimates = []
    trainer.add_callback(Watch(lambda: estimates.append(trainer.method.optimizer.estimate)))
    trainer.train()
    hand = make_trainer(tmp_path, **keys).adapted.backbone
    (estimate,) = estimates
    assert len(set(estimate.projected)) == 4
    for query, slope in enumerate(estimate.projected):
        for name, w in hand.items():
            noise.add_(w.data, noise.stream_key(trainer.args.seed, 0, query, name), -1e-2 / 4 * slope)
    for name, w in trainer.adapted.backbone.items():
        torch.testing.assert_close(w, hand[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("method", ["zo", "bilevel"])
def test_an_automatic_step_is_the_formulas_from_the_measured_losses(tmp_path, monkeypatch, method, estimator):
    """g, h and the rate by hand, from every loss that the run evaluated, and the forwards it took."""
    monkeypatch.setattr(Automatic, "rests", lambda self, step, state: False)
    keys = {"method": method, "zo_learning_rate": "auto", "zo_estimator": estimator, "max_steps": 12, "zo_eps": 0.03}
    trainer = make_trainer(tmp_path, adapter="none" if method == "zo" else "lora", **keys)
    level = trainer.method._level if method == "zo" else trainer.method.theta
    propose, steps, used = level.propose, [], []
    eps = noise.representable(0.03)

    def watched(number, measure, **more):
        losses = {}

        def noted(points):
            found = measure(points)
            losses.update({round(scale / eps): loss for (scale, _), loss in zip(points, found, strict=True)})
            return found

        found = propose(number, noted, **more)
        steps.append(losses)
        return found

    level.propose = watched
    trusted = []
    trainer.add_callback(Watch(after=lambda: used.append(level.optimizer.rate)))
    trainer.add_callback(Watch(after=lambda: trusted.append(level.optimizer.param_groups[0]["rule_state"]["trust"])))
    before = weights(trainer.adapted, "backbone")
    trainer.train()
    assert 0 < sum(trusted) < len(trusted)
    squares, curvatures = [], []
    for number, losses in enumerate(steps):
        measured = number < 5 or number == 10
        assert losses.keys() == ({-1, 0, 1} if measured else {1, 0 if estimator == "one_sided" else -1})
        there, back = losses[1], losses[0 if estimator == "one_sided" else -1]
        squares.append(((there - back) / (eps * (1 if estimator == "one_sided" else 2))) ** 2)
        if measured:
            curvatures.append(abs(losses[1] + losses[-1] - 2 * losses[0]) / eps**2)
        mean = sum(0.9**i * x for i, x in enumerate(reversed(squares))) / sum(0.9**i for i in range(len(squares)))
        rate = trusted[number] * min(0.045 / mean**0.5, 0.15 / float(np.median(curvatures)))
        assert used[number] == pytest.approx(rate, rel=1e-9)
    assert moved(before, weights(trainer.adapted, "backbone")) == before.keys()
    assert [log["zo_learning_rate"] for log in trainer.state.log_history if "loss" in log] == used


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "fo", "loss": "options"},
        {"method": "fo", "adapter": "none", "loss": "lm"},
        {"method": "zo", "adapter": "none", "loss": "options"},
        {"method": "bilevel", "loss": "options"},
        {"method": "bilevel", "loss": "lm"},
    ],
    ids=lambda keys: " ".join(keys.values()),
)
def test_accumulating_small_batches_equals_one_large_batch(tmp_path, keys):
    keys = {**keys, "zo_eps": 0.03, "zo_learning_rate": 3e-3, "optim": "sgd", "learning_rate": 0.1, "max_steps": 5}
    small, of_small = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3, **keys)
    large, of_large = trained(tmp_path, per_device_train_batch_size=3, **keys)
    start = make_trainer(tmp_path, **keys).adapted
    for part in large:
        assert_close(small[part], large[part], atol=1e-5)
    assert any(moved(weights(start, part), large[part]) for part in large)
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (of_small, of_large)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert len(logs[0]) == 5
    assert of_small.cost.forward_tokens == of_large.cost.forward_tokens > 0


@pytest.mark.parametrize("method", ["bilevel", "zo", "fo", "two_stage"])
def test_a_seed_gives_one_run_and_another_seed_another(tmp_path, method):
    dropout = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    keys = {"method": method, "peft": dropout, "max_steps": 4}
    first, second = (trained(tmp_path, **keys)[0] for _ in range(2))
    other, _ = trained(tmp_path, seed=43, **keys)
    for part in first:
        assert same(first[part], second[part])
    assert any(moved(first[part], other[part]) for part in first)


@pytest.mark.parametrize("method", ["bilevel", "fo"])
def test_seeds_draw_other_batches_of_the_same_rows(tmp_path, method):
    """Where rows are divided by `data_seed`: else all seeds of a method without random values would be one run."""
    adapter = "none" if method == "fo" else "lora"
    keys = {"method": method, "adapter": adapter, "data_seed": 7, "max_steps": 2, "per_device_train_batch_size": 4}
    orders, rows = [], []
    for seed in (0, 1):
        trainer = make_trainer(tmp_path / str(seed), make_rows(24), seed=seed, **keys)
        rows.append(trainer.identity["rows"])
        orders.append([*trainer._order()[0]])
    assert rows[0] == rows[1]
    assert orders[0] != orders[1]
    whole = [trained(tmp_path, make_rows(24), seed=seed, **keys)[0]["backbone"] for seed in (0, 1)]
    assert moved(*whole)
