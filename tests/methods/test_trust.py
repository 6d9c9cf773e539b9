"""What an automatic rate learns of single rows: the errors of estimates, and when zeroth-order steps rest."""

import math

import pytest
import torch

from plain import (
    MORE_TOKENS,
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
from zofo.methods.signal import Points
from zofo.zo.rules import Automatic

AUTO = {"zo_learning_rate": "auto", "per_device_train_batch_size": 4, "max_steps": 1}
LOW = {"zo_distribution": "low_rank", "num_perturbations": 2}
SHARED = {"zo_rows": "shared"}


def level_of(trainer):
    return trainer.method.zeroth_order_level


def estimated(trainer):
    """The estimate of a first step, and its bundle."""
    bundle = next(micro_steps(trainer))
    trainer.method.step(0, 0.0, [bundle])
    return level_of(trainer).optimizer.estimate, bundle


def slopes(trainer, batch, query, adapter="upper"):
    """(B,) projected gradients of the rows, from a forward for each point."""
    level, found = level_of(trainer), []
    trainer.adapted.use(adapter)
    trainer.adapted.model.eval()
    for sign in (1, -1):
        near = level.perturbed(0, sign * level.probes.eps, query)
        with torch.no_grad(), near, trainer.method.scorer.noting_rows() as noted:
            trainer.method.scorer.loss(batch)
        found.append(noted[0])
    return (found[0] - found[1]) / (2 * level.probes.eps)


@pytest.mark.parametrize("keys", [{}, {**LOW, **SHARED}, {**LOW, **SHARED, "zo_members_per_forward": 1}])
def test_the_error_of_an_estimate_is_that_of_its_mean_over_the_rows(tmp_path, keys):
    rows = make_rows(12, options=MORE_TOKENS)
    trainer = make_trainer(tmp_path, rows, method="zo", adapter="none", zo_eps=0.02, **{**AUTO, **keys})
    estimate, bundle = estimated(trainer)
    rows_of = [slopes(trainer, bundle["zo"][0], query) for query in range(len(estimate.projected))]
    assert estimate.projected == pytest.approx([float(d.mean()) for d in rows_of], rel=1e-3)
    assert estimate.error == pytest.approx(sum(float(d.var()) / 4 for d in rows_of) / len(rows_of), rel=1e-3)


def test_directions_with_rows_of_their_own_have_errors_of_these(tmp_path):
    rows = make_rows(12, options=MORE_TOKENS)
    trainer = make_trainer(tmp_path, rows, method="zo", adapter="none", zo_eps=0.02, **{**AUTO, **LOW})
    estimate, bundle = estimated(trainer)
    halves = [slopes(trainer, bundle["zo"][0], q)[2 * q : 2 * q + 2] for q in range(2)]
    assert estimate.projected == pytest.approx([float(d.mean()) for d in halves], rel=1e-3)
    assert estimate.error == pytest.approx(sum(float(d.var()) / 2 for d in halves) / 2, rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"zo_learning_rate": 1e-3, "num_perturbations": 2}])
def test_one_row_for_each_direction_or_a_given_rate_has_no_error(tmp_path, keys):
    keys = {**AUTO, **LOW, "num_perturbations": 4, **keys}
    assert estimated(make_trainer(tmp_path, method="zo", adapter="none", **keys))[0].error is None


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_the_error_of_bilevel_is_that_of_all_terms_on_the_rows_of_each_level(tmp_path, estimator):
    keys = {**AUTO, "lower_steps": 1, "zo_eps": 0.02, "zo_estimator": estimator, "penalty": 3.0}
    trainer = make_trainer(tmp_path, make_rows(24, options=MORE_TOKENS), **keys)
    estimate, bundle = estimated(trainer)
    f, p, s = (
        slopes(trainer, bundle[stream][0], 0, adapter)
        for stream, adapter in (("upper", "upper"), ("penalty", "upper"), ("penalty", "lower"))
    )
    by_hand = float((f / 4).var() / 4 + ((p - s) * 3 / 4).var() / 4)
    assert estimate.error == pytest.approx(by_hand, rel=1e-3 if estimator == "two_sided" else 0.5)


def test_bilevel_rests_without_signal_and_says_so_once(tmp_path, caplog):
    """No loss near θ is measured in nine iterations of ten; p and s go on."""
    keys = {**AUTO, "lower_steps": 1, "max_steps": 22}
    trainer, seen = make_trainer(tmp_path, **keys), []
    level = level_of(trainer)
    propose, level.propose = (
        level.propose,
        lambda step, *args, **more: seen.append(step) or propose(step, *args, **more),
    )
    state = level.optimizer.param_groups[0]["rule_state"]
    state.update(signal=-1e9, power=1.0, size=1e9, count=10.0)
    theta, p = weights(trainer.adapted, "backbone"), weights(trainer.adapted, "upper")
    trainer.train()
    assert seen == [0, 10, 20]
    assert same(theta, weights(trainer.adapted, "backbone"))
    assert moved(p, weights(trainer.adapted, "upper")) == p.keys()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {log["zo_trust"] for log in logs} == {0.0}
    assert [log["step"] for log in logs if "projected_grad" in log] == [1, 11, 21]
    assert len([record for record in caplog.records if "rest until there is one" in record.message]) == 1


@pytest.mark.parametrize("keys", [{"penalty": "infinite"}, {"penalty": 0.0, "upper_learning_rate": 0.0}])
def test_without_steps_on_the_adapters_there_is_no_rest(tmp_path, monkeypatch, keys):
    """So that the limits of bilevel are MeZO at the automatic rate as well."""
    monkeypatch.setattr(Automatic, "rests", lambda self, step, state: True)
    keys = {**AUTO, "lower_steps": 0, "max_steps": 6, **keys}
    rows = make_rows(12), make_rows(10, first=100)
    found, _ = trained(tmp_path, *rows, **keys)
    mezo, _ = trained(tmp_path, rows[1], method="zo", adapter="none", **{**AUTO, "max_steps": 6})
    assert same(found["backbone"], mezo["backbone"])


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_one_sided_directions_with_rows_of_their_own_are_compared_with_theta_on_these(tmp_path, batch):
    keys = {**AUTO, **LOW, "zo_estimator": "one_sided", "per_device_train_batch_size": batch, "zo_eps": 0.02}
    trainer = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), method="zo", adapter="none", **keys)
    level, found, points = level_of(trainer), [], []
    project = Points.projections
    level.optimizer.wants_curvature = lambda step: False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Points, "projections", lambda self: points.append(self) or found.append(project(self)) or found[-1]
        )
        estimate, _ = estimated(trainer)
    assert [g for g, _ in found[-1]] == pytest.approx(list(estimate.projected), rel=1e-4)
    sizes = [len(rows["zo"]) for (scale, _), rows in points[0]._rows.items() if scale > 0]
    assert sum(sizes) == batch


def test_a_run_that_rests_goes_on_with_the_bits_of_one_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Automatic, "rests", lambda self, step, state: step % 3 > 0)
    whole, again = whole_and_resumed(tmp_path, **{**AUTO, "max_steps": 8, "lower_steps": 1})
    assert same_run(whole, again)
    states = [level_of(each).optimizer.param_groups[0]["rule_state"] for each in (whole, again)]
    assert states[0] == states[1]
    assert states[0]["count"] > 2


@pytest.mark.parametrize("method", ["zo", "two_stage"])
def test_methods_with_nothing_else_to_do_go_on_measuring(tmp_path, monkeypatch, method):
    monkeypatch.setattr(Automatic, "rests", lambda self, step, state: True)
    keys = {**AUTO, "method": method, "adapter": "none" if method == "zo" else "lora", "max_steps": 4}
    trainer = make_trainer(tmp_path, **keys)
    before = weights(trainer.adapted, "backbone")
    trainer.train()
    assert moved(before, weights(trainer.adapted, "backbone")) == before.keys()
    logged = [log for log in trainer.state.log_history if "zo_trust" in log]
    assert len(logged) == 4
    assert all(math.isfinite(log["zo_trust"]) for log in logged)
