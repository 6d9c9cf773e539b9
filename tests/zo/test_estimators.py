"""Estimates against the theory on quadratics; the rules that apply them; the optimizers that carry the rules."""

import io
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR

from zofo import noise
from zofo.zo.estimators import ESTIMATORS, Estimate, curvature, one_sided, two_sided
from zofo.zo.optimizers import ZOSGD, AutomaticZOSGD, JointOptimizer, ZerothOrderOptimizer
from zofo.zo.perturb import direction

D, SIGMAS = 12, 5  # statistical bounds: five standard errors, at fixed seeds
KURTOSIS = {"normal": 3 - 1.2 * (256**2 + 1) / (256**2 - 1) / 4, "rademacher": 1.0}  # of four uniform bytes; of signs


class Quadratic:
    """f(x) = x'Ax/2 + b'x in float64, with evaluations at θ + scale z."""

    def __init__(self, distribution="normal"):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(D, D, dtype=torch.float64, generator=generator)
        self.A, self.b = root @ root.t() / D, torch.randn(D, dtype=torch.float64, generator=generator)
        self.theta = torch.randn(D, dtype=torch.float64, generator=generator)
        self.distribution = distribution

    def __call__(self, x):
        return (x @ self.A @ x / 2 + self.b @ x).item()

    def gradient(self):
        return self.A @ self.theta + self.b

    def z(self, step, query=0):
        return direction({"x": self.theta}, 0, step, query, self.distribution)["x"].double()

    def projected(self, estimator, step, eps=1e-3, q=1):
        return estimator(lambda s, j: self(self.theta + s * self.z(step, j)), eps, q, self.distribution)

    def estimates(self, q, count):
        """`count` gradient estimates of q directions each, as rows."""
        rows = []
        for step in range(count):
            values = self.projected(two_sided, step, q=q)
            rows.append(sum(value * self.z(step, j) for j, value in enumerate(values)) / q)
        return torch.stack(rows)


@pytest.fixture(params=["normal", "rademacher"])
def problem(request):
    return Quadratic(request.param)


@pytest.mark.parametrize("eps", [1e-4, 0.3, 10.0])
def test_two_sided_is_exact_on_a_quadratic_for_any_eps(problem, eps):
    expected = [(problem.gradient() @ problem.z(5, j)).item() for j in range(3)]
    assert problem.projected(two_sided, 5, eps, q=3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eps", [1e-4, 0.3, 10.0])
def test_one_sided_is_off_by_half_eps_times_the_curvature_along_z(problem, eps):
    exact = noise.representable(eps, problem.distribution)
    directions = [problem.z(5, j) for j in range(3)]
    expected = [(problem.gradient() @ z + exact / 2 * z @ problem.A @ z).item() for z in directions]
    assert problem.projected(one_sided, 5, eps, q=3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("estimator", "forwards"), [("two_sided", 6), ("one_sided", 4)])
def test_the_number_of_forwards(estimator, forwards):
    asked = []
    ESTIMATORS[estimator](lambda scale, query: float(len(asked.append((scale, query)) or asked)), 0.1, 3, "normal")
    assert len(asked) == len(set(asked)) == forwards
    assert {query for _, query in asked} == {0, 1, 2}


@pytest.mark.parametrize("q", [1, 4])
def test_mean_and_variance_of_the_estimate_are_those_of_theory(problem, q):
    count, g = 2000 // q, problem.gradient()
    rows = problem.estimates(q, count)
    # E[(g'z)^2 z_i^2] = κ g_i^2 + sum_{k != i} g_k^2, so Var_i = |g|^2 + (κ - 2) g_i^2 for one direction; 1/q of it
    variance = (g @ g + (KURTOSIS[problem.distribution] - 2) * g**2) / q
    assert ((rows.mean(0) - g).abs() < SIGMAS * (variance / count).sqrt()).all()
    # the standard error of a sample variance is sqrt((k - 1) / n) of it, with the sample's own kurtosis k
    centred = rows - rows.mean(0)
    kurtosis = (centred**4).mean(0) / (centred**2).mean(0) ** 2
    assert ((centred.var(0) / variance - 1).abs() < SIGMAS * ((kurtosis - 1) / count).sqrt()).all()
    assert (SIGMAS * ((kurtosis - 1) / count).sqrt() < 0.9).all()  # the bound would see a factor of two


def estimate(*projected, step=3, distribution="normal"):
    return Estimate(seed=1, step=step, projected=projected, distribution=distribution)


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(8, 5, generator=generator).to(dtype), "b": torch.randn(7, generator=generator).to(dtype)}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_an_update_lies_in_the_span_of_the_regenerated_directions(distribution):
    before, after, found = weights(), weights(), estimate(2.0, -0.7, 0.3, distribution=distribution)
    ZOSGD().update(after, found, 0.01, {})
    for name in before:
        z = torch.stack([direction(before, 1, 3, j, distribution)[name].flatten() for j in range(3)], dim=1).double()
        moved = (after[name].double() - before[name].double()).flatten()
        factors = torch.linalg.lstsq(z, moved[:, None]).solution[:, 0]
        assert factors.tolist() == pytest.approx([-0.01 / 3 * g for g in found.projected], rel=1e-3)
        assert (z @ factors - moved).abs().max() < 1e-6  # float32 rounding of weights of size 1, nothing else


def test_a_small_step_goes_down():
    problem = Quadratic()
    for step in range(20):
        x = {"x": problem.theta.float()}
        found = Estimate(0, step, problem.projected(two_sided, step, q=2))
        ZOSGD().update(x, found, 1e-4, {})
        assert problem(x["x"].double()) < problem(problem.theta)


def test_q_directions_in_one_pass_are_q_passes():
    found, together, apart = estimate(2.0, -0.7, 0.3), weights(), weights()
    ZOSGD().update(together, found, 0.01, {})
    for name, w in apart.items():
        for term in found.terms(name, -0.01):
            noise.add_(w, term.key, term.scale)
        assert torch.equal(together[name], w)


def test_weight_decay_skips_vectors_and_has_its_closed_form():
    plain, decayed, both, found = weights(), weights(), weights(), estimate(2.0)
    for step in range(3):
        ZOSGD(weight_decay=0.5).update(decayed, estimate(0.0, step=step), 0.1, {})
    torch.testing.assert_close(decayed["w"], plain["w"] * 0.95**3)
    assert torch.equal(decayed["b"], plain["b"])
    ZOSGD(weight_decay=0.5).update(both, found, 0.1, {})
    for name, shrink in (("w", 0.95), ("b", 1.0)):
        expected = weights()[name] * shrink
        noise.add_(expected, *found.terms(name, -0.1)[0])
        assert torch.equal(both[name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_decay_below_the_resolution_of_the_dtype_still_acts_on_average(dtype):
    w = {"w": torch.ones(64, 64, dtype=dtype)}
    for step in range(500):
        ZOSGD(weight_decay=0.1).update(w, estimate(0.0, step=step), 1e-3, {})  # a tenth of float16's half distance
    # (1 - 1e-4)^500 = 0.951; each step is a Bernoulli of at most one ulp = 2^-8, so the mean over 4096 elements has a
    # standard error of at most 2^-8 sqrt(500) / 2 / 64 = 7e-4
    assert w["w"].double().mean().item() == pytest.approx((1 - 1e-4) ** 500, abs=SIGMAS * 7e-4)


# One suite for every rule: a new rule is a new row.
RULES = {"sgd": ZOSGD(), "sgd with weight decay": ZOSGD(weight_decay=1e-4), "automatic": AutomaticZOSGD(eps=0.02)}
LEARNING_RATE = {"sgd": 0.05, "sgd with weight decay": 0.05, "automatic": 1.0}


def is_plain(state):
    if isinstance(state, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in state.items())
    if isinstance(state, list | tuple):
        return all(map(is_plain, state))
    return state is None or isinstance(state, bool | int | float | str | torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_converges_on_a_quadratic_and_keeps_dtype_and_plain_state(rule, dtype):
    x, goal = {"x": torch.zeros(4, 3, dtype=dtype)}, torch.linspace(0.5, 2.0, 12).view(4, 3)
    state, start = RULES[rule].init(x), goal.square().sum().item()
    for step in range(400):
        z = direction(x, 0, step)["x"]
        projected = ((x["x"].float() - goal) * z).sum().item()
        state = RULES[rule].update(x, Estimate(0, step, (projected,)), LEARNING_RATE[rule], state)
        assert is_plain(state)
    assert x["x"].dtype == dtype
    assert (x["x"].float() - goal).square().sum().item() < 1e-2 * start


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_the_curvature_of_a_quadratic_is_that_of_its_matrix_along_z(problem, eps):
    z = problem.z(5)
    found = curvature(lambda s, j: problem(problem.theta + s * problem.z(5, j)), eps, problem.distribution)
    assert found == pytest.approx((z @ problem.A @ z).item(), rel=1e-6)


def automatic_rates(projected, curvatures, q=1, learning_rate=1.0):
    """The rates of `AutomaticZOSGD` after each estimate of a sequence, and by hand from its docstring."""
    rule, w = AutomaticZOSGD(eps=0.01), {"w": torch.zeros(3)}
    state, found, expected = rule.init(w), [], []
    for step, h in enumerate(curvatures):
        values = tuple(projected[step * q : step * q + q])
        state = rule.update(w, Estimate(0, step, values, "normal", h), learning_rate, state)
        found.append(state["rate"])
        weights_ = [0.9**age for age in range(step, -1, -1)]
        squares = [sum(g * g for g in projected[s * q : s * q + q]) / q for s in range(step + 1)]
        bounds = [0.015 / math.sqrt(sum(a * b for a, b in zip(weights_, squares, strict=True)) / sum(weights_))]
        known = sorted(abs(c) for c in curvatures[: step + 1] if c is not None)
        if known:
            bounds.append(0.15 / ((known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2))
        expected.append(learning_rate * q * min(bounds))
    return found, expected


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize(
    "curvatures", [[None] * 6, [2.0, None, -3.0, None, None, 1.0], [900.0, 2.0, 800.0, None, 1.0, 1.0]]
)
def test_the_automatic_rate_is_that_of_its_formula(q, curvatures):
    generator = torch.Generator().manual_seed(q)
    projected = (10 * torch.randn(6 * q, generator=generator)).tolist()
    found, expected = automatic_rates(projected, curvatures, q, learning_rate=0.5)
    assert found == pytest.approx(expected, rel=1e-9)
    assert len({round(math.log(rate), 6) for rate in found}) > 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_automatic_rate_does_not_depend_on_the_scale_of_the_loss(scale):
    """Neither bound does: g and h both grow with the loss, and η g is what moves the weights."""
    projected, curvatures = [3.0, -1.0, 0.2, 8.0], [50.0, 900.0, None, 10.0]
    plain, _ = automatic_rates(projected, curvatures)
    scaled, _ = automatic_rates([g * scale for g in projected], [h and h * scale for h in curvatures])
    assert [rate * scale for rate in scaled] == pytest.approx(plain, rel=1e-9)


def test_one_outlier_moves_the_weights_by_a_few_eps_only():
    rates, _ = automatic_rates([1.0] * 50 + [1e6], [None] * 51)
    assert rates[-2] * 1.0 == pytest.approx(0.015)
    assert 0.045 < rates[-1] * 1e6 < 0.048


def test_curvatures_are_forgotten_after_nine_more():
    rates, _ = automatic_rates([1e-9] * 14, [1e6] * 5 + [1.0] * 9)
    assert rates[0] == pytest.approx(0.15e-6)
    assert rates[-1] == pytest.approx(0.15)


def test_a_flat_loss_moves_nothing_and_raises_nothing():
    rates, _ = (
        AutomaticZOSGD().update({"w": torch.zeros(3)}, Estimate(0, 0, (0.0,)), 1.0, AutomaticZOSGD().init({})),
        0,
    )
    assert rates["rate"] == 0.0


def test_curvature_is_wanted_at_first_and_then_now_and_again():
    rule, w = AutomaticZOSGD(), {"w": torch.zeros(3)}
    state, asked = rule.init(w), []
    for step in range(3, 40):  # as if the first steps had been of another kind
        wanted = rule.wants_curvature(step, state)
        asked += [step] * wanted
        state = rule.update(w, Estimate(0, step, (1.0,), "normal", 1.0 if wanted else None), 1.0, state)
    assert asked == [3, 4, 5, 6, 7, 10, 20, 30]


def zeroth_order(lr=0.1, **parts):
    return ZerothOrderOptimizer(weights(**parts), ZOSGD(), lr=lr)


def tensors(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_step_without_an_estimate_does_nothing_and_each_estimate_is_used_once():
    optimizer, before = zeroth_order(), weights()
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    optimizer.estimate = estimate(1.0)
    optimizer.step()
    ZOSGD().update(before, estimate(1.0), 0.1, {})
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before.values()))
    assert all(p.grad is None for p in tensors(optimizer))


def test_a_scheduler_changes_the_step_size():
    optimizer, expected = zeroth_order(), weights()
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        optimizer.estimate = estimate(1.0, step=step)
        optimizer.step()
        scheduler.step()
        ZOSGD().update(expected, estimate(1.0, step=step), 0.1 * 0.5**step, {})
    assert all(map(torch.equal, tensors(optimizer), expected.values()))


class Counting(ZOSGD):
    """A rule with a state: how often, and where it was."""

    def init(self, parameters):
        return {"count": 0, "seen": [torch.zeros(2)]}

    def update(self, parameters, estimate, learning_rate, state):
        super().update(parameters, estimate, learning_rate, {})
        return {"count": state["count"] + 1, "seen": [*state["seen"], torch.ones(1) * learning_rate]}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_state_survives_a_file_that_holds_weights_only():
    first = ZerothOrderOptimizer(weights(), Counting(), lr=0.1)
    for step in range(3):
        first.estimate = estimate(1.0, step=step)
        first.step()
    first.param_groups[0]["lr"] = 0.025
    second = ZerothOrderOptimizer(weights(), Counting(), lr=0.1)
    second.load_state_dict(through_a_file(first.state_dict()))
    group = second.param_groups[0]
    assert (group["lr"], group["rule_state"]["count"], group["param_names"]) == (0.025, 3, ["w", "b"])
    assert torch.equal(torch.cat(group["rule_state"]["seen"]), torch.tensor([0.0, 0.0, 0.1, 0.1, 0.1]))
    second.estimate = estimate(1.0)
    second.step()
    assert second.param_groups[0]["rule_state"]["count"] == 4


def joint(stepped=("fo", "zo")):
    adapter = torch.nn.Parameter(torch.ones(3))
    members = {"fo": torch.optim.AdamW([adapter], lr=0.1), "zo": zeroth_order(lr=0.01)}
    return JointOptimizer(members, stepped)


def take_step(optimizer, members, step=0):
    members["fo"].param_groups[0]["params"][0].grad = torch.tensor([1.0, -1.0, 2.0])
    members["zo"].estimate = estimate(1.0, step=step)
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
