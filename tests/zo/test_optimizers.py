"""The optimizer that writes what a rule proposes, whatever the rule; and several optimizers as one."""

import io
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from test_estimators import SIGMAS, Quadratic
from torch.optim.lr_scheduler import LambdaLR

from plain import applied
from zofo import noise
from zofo.noise.eager import SHAPES
from zofo.zo.estimators import Estimate, two_sided
from zofo.zo.optimizers import JointOptimizer, ZerothOrderOptimizer
from zofo.zo.perturb import direction
from zofo.zo.rules import SGD, Rule


def estimate(*projected, step=3):
    return Estimate(seed=1, step=step, projected=projected)


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(8, 5, generator=generator).to(dtype), "b": torch.randn(7, generator=generator).to(dtype)}


@pytest.mark.parametrize("distribution", SHAPES)
def test_an_update_lies_in_the_span_of_the_regenerated_directions(distribution):
    before, after, found = weights(), weights(), estimate(2.0, -0.7, 0.3)
    applied(after, found, 0.01, distribution=distribution)
    for name in before:
        z = torch.stack([direction(before, 1, 3, j, distribution)[name].flatten() for j in range(3)], dim=1).double()
        moved = (after[name].double() - before[name].double()).flatten()
        factors = torch.linalg.lstsq(z, moved[:, None]).solution[:, 0]
        assert factors.tolist() == pytest.approx([-0.01 / 3 * g for g in found.projected], rel=1e-3)
        assert (z @ factors - moved).abs().max() < 1e-6  # float32 rounding of weights of size 1, nothing else


def test_q_directions_in_one_pass_are_q_passes():
    found, together, apart = estimate(2.0, -0.7, 0.3), weights(), weights()
    applied(together, found, 0.01)
    for name, w in apart.items():
        for query, g in enumerate(found.projected):
            noise.add_(w, noise.stream_key(1, 3, query, name), -0.01 / 3 * g)
        assert torch.equal(together[name], w)


def test_weight_decay_skips_vectors_and_has_its_closed_form():
    plain, decayed, both, found = weights(), weights(), weights(), estimate(2.0)
    for step in range(3):
        applied(decayed, estimate(0.0, step=step), 0.1, weight_decay=0.5)
    torch.testing.assert_close(decayed["w"], plain["w"] * 0.95**3)
    assert torch.equal(decayed["b"], plain["b"])
    applied(both, found, 0.1, weight_decay=0.5)
    for name, shrink in (("w", 0.95), ("b", 1.0)):
        expected = weights()[name] * shrink
        noise.add_(expected, noise.stream_key(1, 3, 0, name), -0.1 * 2.0)
        assert torch.equal(both[name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_decay_below_the_resolution_of_the_dtype_still_acts_on_average(dtype):
    w = {"w": torch.ones(64, 64, dtype=dtype)}
    for step in range(500):
        applied(w, estimate(0.0, step=step), 1e-3, weight_decay=0.1)  # a tenth of float16's half distance
    # (1 - 1e-4)^500 = 0.951; each step is a Bernoulli of at most one ulp = 2^-8, so the mean over 4096 elements has a
    # standard error of at most 2^-8 sqrt(500) / 2 / 64 = 7e-4
    assert w["w"].double().mean().item() == pytest.approx((1 - 1e-4) ** 500, abs=SIGMAS * 7e-4)


def test_a_small_step_goes_down():
    problem = Quadratic()
    for step in range(20):
        x = {"x": problem.theta.float()}
        found = Estimate(0, step, problem.projected(two_sided, step, q=2))
        applied(x, found, 1e-4)
        assert problem(x["x"].double()) < problem(problem.theta)


def zeroth_order(lr=0.1, **parts):
    return ZerothOrderOptimizer(weights(**parts), SGD(), lr=lr)


def tensors(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_step_without_an_estimate_does_nothing_and_each_estimate_is_used_once():
    optimizer, before = zeroth_order(), weights()
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    optimizer.propose(estimate(1.0))
    optimizer.step()
    applied(before, estimate(1.0), 0.1)
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    assert all(p.grad is None for p in tensors(optimizer))


def test_a_scheduler_changes_the_step_size():
    optimizer, expected = zeroth_order(), weights()
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        optimizer.propose(estimate(1.0, step=step))
        optimizer.step()
        scheduler.step()
        applied(expected, estimate(1.0, step=step), 0.1 * 0.5**step)
    assert all(map(torch.equal, tensors(optimizer), expected.values()))


class Counting(Rule):
    """A rule with a state: how often, and where it was."""

    def init(self):
        return {"count": 0, "seen": [torch.zeros(2)]}

    def update(self, estimate, learning_rate, state, evaluate):
        seen = [*state["seen"], torch.ones(1) * learning_rate]
        return super().update(estimate, learning_rate, {}, evaluate)[0], {"count": state["count"] + 1, "seen": seen}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_state_survives_a_file_that_holds_weights_only():
    first = ZerothOrderOptimizer(weights(), Counting(), lr=0.1)
    for step in range(3):
        first.propose(estimate(1.0, step=step))
        first.step()
    first.param_groups[0]["lr"] = 0.025
    second = ZerothOrderOptimizer(weights(), Counting(), lr=0.1)
    second.load_state_dict(through_a_file(first.state_dict()))
    group = second.param_groups[0]
    assert (group["lr"], group["rule_state"]["count"], group["param_names"]) == (0.025, 3, ["w", "b"])
    assert torch.equal(torch.cat(group["rule_state"]["seen"]), torch.tensor([0.0, 0.0, 0.1, 0.1, 0.1]))
    second.propose(estimate(1.0))
    second.step()
    assert second.param_groups[0]["rule_state"]["count"] == 4


def joint(stepped=("fo", "zo")):
    adapter = torch.nn.Parameter(torch.ones(3))
    members = {"fo": torch.optim.AdamW([adapter], lr=0.1), "zo": zeroth_order(lr=0.01)}
    return JointOptimizer(members, stepped)


def take_step(optimizer, members, step=0):
    members["fo"].param_groups[0]["params"][0].grad = torch.tensor([1.0, -1.0, 2.0])
    members["zo"].propose(estimate(1.0, step=step))
    optimizer.step()


def values(optimizer):
    return [p.detach().clone() for p in tensors(optimizer)]


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("stepped", [("fo",), ("zo",), ("fo", "zo"), ()])
def test_only_the_stepped_members_move(stepped):
    optimizer = joint(stepped)
    before = values(optimizer)
    take_step(optimizer, optimizer.members)
    assert same(values(optimizer), before) == ["fo" not in stepped, "zo" not in stepped, "zo" not in stepped]
    optimizer.zero_grad()
    assert all(p.grad is None for p in tensors(optimizer))


def test_a_joint_optimizer_survives_accelerate_and_a_file():
    Accelerator(cpu=True)
    ours, plain = joint(), joint()
    wrapped = AcceleratedOptimizer(ours)
    for step in range(3):
        take_step(wrapped, ours.members, step)
        take_step(plain, plain.members, step)
    assert all(same(values(ours), values(plain)))
    resumed = joint()
    for p, q in zip(tensors(resumed), tensors(ours), strict=True):
        p.data.copy_(q)
    AcceleratedOptimizer(resumed).load_state_dict(through_a_file(wrapped.state_dict()))
    take_step(resumed, resumed.members, 3)
    take_step(plain, plain.members, 3)
    assert all(same(values(resumed), values(plain)))  # AdamW's moments came along, else its fourth step would differ


def test_a_scheduler_scales_all_groups_also_after_loading():
    optimizer = joint()
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for expected in (1 / 2, 1 / 3):
        take_step(optimizer, optimizer.members)
        scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * expected, 0.01 * expected])
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    take_step(optimizer, optimizer.members)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 / 4, 0.01 / 4])
    before = values(optimizer)
    take_step(optimizer, optimizer.members)
    assert not any(same(values(optimizer), before))
    assert math.isclose(optimizer.members["zo"].param_groups[0]["lr"], 0.01 / 4)
