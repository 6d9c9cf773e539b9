"""Zeroth-order rules: what every one of them must do, and what each promises by itself."""

import copy
import io
import math

import pytest
import torch
from test_estimators import Quadratic
from test_optimizers import estimate, weights

from plain import applied, make_trainer, trained
from zofo import direction, noise
from zofo.noise.eager import SHAPES
from zofo.zo.estimators import Estimate, Probes
from zofo.zo.optimizers import ZerothOrderOptimizer
from zofo.zo.rules import RULES, SGD, Automatic, Momentum, Rule, Sign

# A row for every rule: the learning rate, given or found, with which it comes close to the minimum of a quadratic.
RATES = {"sgd": (0.05, 0.02), "sign": (0.02, 0.02), "momentum": (0.05, 0.02)}
CASES = [(name, automatic) for name in RULES for automatic in (False, True)]


def no_more(scale, query):
    raise AssertionError("this rule needs no further loss")


def optimizer_of(name, automatic, parameters, **more):
    given, eps = RATES[name]
    rule = Automatic(RULES[name](), eps) if automatic else RULES[name]()
    return ZerothOrderOptimizer(parameters, rule, 1.0 if automatic else given, **more)


def walk(optimizer, x, goal, steps, first=0):
    """Steps on |x - goal|^2 / 2, with exact projected gradients."""
    for step in range(first, first + steps):
        z = direction(x, 0, step)["x"]
        projected = ((x["x"].float() - goal) * z).sum().item()
        optimizer.propose(Estimate(0, step, (projected,)))
        optimizer.step()


def is_plain(state):
    if isinstance(state, dict):
        return all(isinstance(key, str) and is_plain(value) for key, value in state.items())
    if isinstance(state, list | tuple):
        return all(map(is_plain, state))
    return state is None or isinstance(state, bool | int | float | str | torch.Tensor)


def test_every_rule_has_its_row():
    assert RATES.keys() == RULES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "automatic"), CASES)
def test_every_rule_converges_on_a_quadratic_and_keeps_dtype_and_plain_state(name, automatic, dtype):
    x, goal = {"x": torch.zeros(4, 3, dtype=dtype)}, torch.linspace(0.5, 2.0, 12).view(4, 3)
    optimizer, start = optimizer_of(name, automatic, x), goal.square().sum().item()
    walk(optimizer, x, goal, 400)
    assert is_plain(optimizer.param_groups[0]["rule_state"])
    assert x["x"].dtype == dtype
    assert (x["x"].float() - goal).square().sum().item() < 1e-2 * start


@pytest.mark.parametrize(("name", "automatic"), CASES)
def test_every_rule_goes_on_from_its_stored_state_bit_for_bit(name, automatic):
    goal = torch.linspace(0.5, 2.0, 12).view(4, 3)
    whole, parts = {"x": torch.zeros(4, 3)}, {"x": torch.zeros(4, 3)}
    walk(optimizer_of(name, automatic, whole), whole, goal, 12)
    first, second = (optimizer_of(name, automatic, parts) for _ in range(2))
    walk(first, parts, goal, 7)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    walk(second, parts, goal, 5, first=7)
    assert torch.equal(whole["x"], parts["x"])


@pytest.mark.parametrize(("name", "automatic"), CASES)
def test_a_proposal_of_any_rule_changes_nothing_until_the_step(name, automatic):
    w = weights()
    optimizer = optimizer_of(name, automatic, w)
    optimizer.propose(estimate(1.0, -0.5))
    optimizer.step()
    before, state = copy.deepcopy(w), copy.deepcopy(optimizer.param_groups[0]["rule_state"])
    optimizer.propose(estimate(2.0, 0.3, step=4))
    assert optimizer.param_groups[0]["rule_state"] == state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["rule_state"] == state
    assert all(torch.equal(before[key], w[key]) for key in w)


@pytest.mark.parametrize("distribution", SHAPES)
@pytest.mark.parametrize(("name", "automatic"), CASES)
def test_every_rule_keeps_large_weights_where_limits_say_so_and_adds_its_directions(name, automatic, distribution):
    before, w, limit = weights(), weights(), 0.5
    optimizer = optimizer_of(name, automatic, w, limits={"w": limit}, distribution=distribution)
    scales = optimizer.propose(estimate(2.0, -0.7)).scales
    optimizer.step()
    added = {
        key: sum(scale * direction(before, 1, *point, distribution)[key] for point, scale in scales.items())
        for key in w
    }
    small = before["w"].abs() <= limit
    assert torch.equal(w["w"][~small], before["w"][~small])
    torch.testing.assert_close(w["w"][small], (before["w"] + added["w"])[small], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w["b"], before["b"] + added["b"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "automatic"), CASES)
def test_no_rule_moves_anything_where_the_loss_is_flat(name, automatic):
    optimizer = optimizer_of(name, automatic, weights())
    assert optimizer.propose(estimate(0.0, 0.0)).size == 0.0


@pytest.mark.parametrize("name", RULES)
def test_the_key_chooses_the_rule_of_a_run(tmp_path, name):
    found, trainer = trained(tmp_path, method="zo", adapter="none", zo_optimizer=name, zo_learning_rate=1e-3)
    assert type(trainer.method.optimizer.rule) is RULES[name]
    plain, _ = trained(tmp_path, method="zo", adapter="none", zo_learning_rate=1e-3)
    assert all(torch.equal(found["backbone"][key], plain["backbone"][key]) for key in plain["backbone"]) == (
        name == "sgd"
    )


# ---- what each promises


def test_signs_are_descent_along_the_signs():
    found, signs = weights(), weights()
    applied(found, estimate(2.0, -0.7, 0.0), 0.01, rule=Sign())
    applied(signs, estimate(1.0, -1.0, 0.0), 0.01)
    assert all(torch.equal(found[key], signs[key]) for key in found)


def test_momentum_is_that_of_torch_on_the_materialised_estimates():
    """SGD of torch, fed with the gradients that the estimates stand for; the window holds all of them."""
    rule, w = Momentum(decay=0.8, window=9), {"x": torch.zeros(5)}
    mine = ZerothOrderOptimizer(w, rule, 0.1)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.SGD([x], lr=0.1, momentum=0.8, dampening=0.8)
    for step, projected in enumerate([(1.0, -2.0), (0.5, 0.1), (-3.0, 0.7), (0.2, 0.2)]):
        mine.propose(Estimate(0, step, projected))
        mine.step()
        z = [direction(w, 0, step, query)["x"].double() for query in range(2)]
        x.grad = sum(g * own for g, own in zip(projected, z, strict=True)) / 2
        if step == 0:
            x.grad *= 0.2  # torch starts its buffer with the whole first gradient
        theirs.step()
    torch.testing.assert_close(w["x"].double(), x.detach(), rtol=1e-4, atol=1e-6)


def test_momentum_forgets_what_is_older_than_its_window():
    rule = Momentum(decay=0.5, window=2)
    state = rule.init()
    for step in range(4):
        update, state = rule.update(Estimate(0, step, (1.0,)), 1.0, state, no_more)
    assert update.scales == {(3, 0): -0.5, (2, 0): -0.25}


def test_an_automatic_learning_rate_moves_by_the_same_distance_under_every_rule():
    """About 1.5 ε along each direction, summed over the steps in which the direction is added."""
    eps, sums = 0.01, {}
    for name, make in RULES.items():
        rule, moved = Automatic(make(), eps), {}
        state = rule.init()
        for step in range(60):
            update, state = rule.update(Estimate(0, step, (math.copysign(3.0, step % 2 - 0.5),)), 1.0, state, no_more)
            for point, scale in update.scales.items():
                moved[point] = moved.get(point, 0.0) + scale
        sums[name] = abs(moved[30, 0])
    assert sums == pytest.approx(dict.fromkeys(RULES, 1.5 * eps), rel=0.2)  # 0.9^16 is left out of momentum's


class OnlyIfLower(SGD):
    """Evaluates once more: takes the step only if it lowers the loss of this batch."""

    def update(self, estimate, learning_rate, state, evaluate):
        update, state = super().update(estimate, learning_rate, state, evaluate)
        ((_, query),) = update.scales
        lower = evaluate(update.scales[estimate.step, query], query) < evaluate(0.0, query)
        return (update if lower else type(update)({})), state


@pytest.mark.parametrize("rate", [0.01, 100.0])
def test_a_rule_may_evaluate_once_more_before_it_decides(rate):
    problem = Quadratic()
    x = {"x": problem.theta.float()}
    optimizer, before = ZerothOrderOptimizer(x, OnlyIfLower(), rate), x["x"].clone()

    def evaluate(scale, query):
        return problem(problem.theta + scale * problem.z(0, query))

    optimizer.propose(Estimate(0, 0, Probes().project(evaluate)), evaluate)
    optimizer.step()
    assert torch.equal(x["x"], before) == (rate == 100.0)


class ManySigns(Rule):
    """Sets the estimator and the distribution: many one-sided differences along signs."""

    def probes(self, asked):
        return Probes("one_sided", asked.eps, 4, "rademacher")


def test_a_rule_may_choose_which_losses_are_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "sgd", ManySigns)
    trainer = make_trainer(tmp_path, method="zo", adapter="none", max_steps=1)
    before = {name: p.clone() for name, p in trainer.adapted.backbone.items()}
    points, level = [], trainer.method._level
    perturbed = level.perturbed
    level.perturbed = lambda step, scale, query: points.append((scale > 0, query)) or perturbed(step, scale, query)
    trainer.train()
    assert points == [(False, 0), *((True, query) for query in range(4))]
    name = next(iter(before))
    z = torch.stack([direction(before, 42, 0, j, "rademacher")[name].flatten() for j in range(4)], dim=1)
    moved = (trainer.adapted.backbone[name] - before[name]).flatten()
    factors = torch.linalg.lstsq(z, moved[:, None]).solution[:, 0]
    assert (z @ factors - moved).abs().max() < 1e-6


# ---- the automatic learning rate


def automatic_rates(projected, curvatures, q=1, learning_rate=1.0):
    """The rates of `Automatic` after each estimate of a sequence, and by hand from its docstring."""
    rule = Automatic(SGD(), eps=0.01)
    state, found, expected = rule.init(), [], []
    for step, h in enumerate(curvatures):
        values = tuple(projected[step * q : step * q + q])
        _, state = rule.update(Estimate(0, step, values, h), learning_rate, state, no_more)
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
    rule = Automatic(SGD())
    update, rates = rule.update(Estimate(0, 0, (0.0,)), 1.0, rule.init(), no_more)
    assert update.size == 0.0
    assert rates["rate"] == 0.0


def test_curvature_is_wanted_at_first_and_then_now_and_again():
    rule, asked = Automatic(SGD()), []
    state = rule.init()
    for step in range(3, 40):  # as if the first steps had been of another kind
        wanted = rule.wants_curvature(step, state)
        asked += [step] * wanted
        _, state = rule.update(Estimate(0, step, (1.0,), 1.0 if wanted else None), 1.0, state, no_more)
    assert asked == [3, 4, 5, 6, 7, 10, 20, 30]


def test_a_population_moves_the_weights_by_one_and_a_half_eps_however_large_it_is():
    for q in (1, 4, 16):
        rule = Automatic(SGD(), 1e-3, population=True)
        update, state = rule.update(Estimate(0, 0, (2.0, -2.0) * (q // 2) or (2.0,)), 1.0, rule.init(), no_more)
        assert update.size == pytest.approx(1.5e-3)
        assert state["rate"] == pytest.approx(1.5e-3 * math.sqrt(q) / 2)
        other = Automatic(SGD(), 1e-3).update(Estimate(0, 0, (2.0,) * q), 1.0, rule.init(), no_more)[1]["rate"]
        assert state["rate"] == pytest.approx(other / math.sqrt(q))
        curved = Automatic(SGD(), 1e-3, population=True).update(
            Estimate(0, 0, (2.0,) * q, 1e4), 1.0, rule.init(), no_more
        )[1]["rate"]
        assert curved == pytest.approx(0.15 / 1e4 * math.sqrt(q))


@pytest.mark.parametrize("q", [8, 32])
def test_with_noise_of_the_rows_a_population_comes_close_to_the_best_constant_rate(q):
    """Descent on x'Hx / 2 with 300 weights: q directions divide 32 rows, whose gradients have noise."""
    eigenvalues = 50 / torch.arange(1, 301) / (1 / torch.arange(1, 301)).sum()

    def final(rule, rate):
        generator, state = torch.Generator().manual_seed(0), rule.init()
        x = torch.randn(300, generator=generator)
        for step in range(150):
            z = torch.randn(q, 300, generator=generator)
            noisy = 3 * (eigenvalues * q / 32).sqrt() * torch.randn(q, 300, generator=generator)
            projected = (z * (eigenvalues * x + noisy)).sum(1)
            bend = (z.square() * eigenvalues).sum(1).mean().item() if rule.wants_curvature(step, state) else None
            update, state = rule.update(Estimate(0, step, tuple(projected.tolist()), bend), rate, state, no_more)
            x = x + torch.tensor(list(update.scales.values())) @ z
        return (eigenvalues * x * x).sum().item() / 2

    best = min(final(SGD(), 10**-exponent) for exponent in torch.arange(0.5, 3.1, 0.25).tolist())
    assert final(Automatic(SGD(), 0.02, population=True), 1.0) < 1.4 * best
    assert final(Automatic(SGD(), 0.02), 1.0) > 1.4 * best  # with q in place of its root


def test_the_curvature_of_a_population_is_the_mean_over_its_directions():
    problem = Quadratic()
    own = Probes(queries=3, rank=1, own=True, eps=0.5)
    bends = [(problem.z(0, j) @ problem.A @ problem.z(0, j)).item() for j in range(3)]

    def evaluate(scale, query):
        asked.append((scale, query))
        return problem(problem.theta + scale * problem.z(0, query))

    for probes, at_theta in ((own, 3), (Probes(queries=3, rank=1, eps=0.5), 1)):
        asked = []
        assert probes.curvature(evaluate) == pytest.approx(sum(bends) / 3, rel=1e-6)
        assert len(probes.points(curved=True)) == 6 + at_theta
        assert set(asked) <= set(probes.points(curved=True))
    asked = []
    assert Probes(queries=3, eps=0.5).curvature(evaluate) == pytest.approx(bends[0], rel=1e-6)
    eps = noise.representable(1e-3)
    assert Probes("one_sided", queries=2, rank=1, own=True).points() == [(0.0, 0), (eps, 0), (0.0, 1), (eps, 1)]
    assert Probes("one_sided", queries=2, rank=1).points() == [(0.0, 0), (eps, 0), (eps, 1)]


# ---- how much of a projected gradient is signal


@pytest.mark.parametrize(("q", "population", "assumed"), [(1, False, 0.15), (4, False, 0.15), (4, True, 0.075)])
def test_the_rate_is_multiplied_by_the_part_of_signal_where_it_is_small(q, population, assumed):
    """s by hand from all estimates so far; it starts at what is assumed, and never raises the rate."""
    generator = torch.Generator().manual_seed(q)
    for errors_of in (0.1, 3.0):
        rule = Automatic(SGD(), population=population)
        state, bare, seen, found = rule.init(), rule.init(), [], []
        for step in range(30):
            projected = tuple(torch.randn(q, generator=generator).tolist())
            error = errors_of * float(torch.rand(1, generator=generator))
            seen.append((sum(g * g for g in projected), q * error))
            _, state = rule.update(Estimate(0, step, projected, 4.0, error), 1.0, state, no_more)
            _, bare = rule.update(Estimate(0, step, projected, 4.0), 1.0, bare, no_more)
            old = [0.995 ** (step - at) for at in range(step + 1)]
            squares, errors = (sum(a * b for a, b in zip(old, part, strict=True)) for part in zip(*seen, strict=True))
            start = 10 * (squares + errors) / sum(old)
            part = (assumed * start + squares - errors) / (start + squares)
            found.append(state["trust"])
            assert found[-1] == pytest.approx(min(1.0, max(0.0, part / assumed)), abs=1e-12)
            assert state["rate"] == pytest.approx(found[-1] * bare["rate"])
            assert bare["trust"] == 1.0
        assert found[-1] == 1.0 if errors_of < 1 else found[-1] < 0.1


def test_a_rule_rests_nine_steps_of_ten_without_signal():
    rule = Automatic(SGD())
    state = rule.init()
    assert not rule.rests(3, state)
    for step in range(40):
        _, state = rule.update(Estimate(0, step, (1.0,), 1.0, 40.0), 1.0, state, no_more)
        assert (state["trust"] == 0) == (step >= 1)
        assert rule.rests(41, state) == rule.without_signal(state) == (step >= 9)
    assert [rule.rests(step, state) for step in range(40, 60)] == [bool(step % 10) for step in range(40, 60)]


@pytest.mark.parametrize("rows", [4, 16])
def test_without_signal_the_rule_diffuses_less_and_with_it_it_learns_as_fast(rows):
    """x'Hx / 2 with noise of the rows, from its minimum and from far away; means of six seeds."""
    eigenvalues = 50 / torch.arange(1, 301) / (1 / torch.arange(1, 301)).sum()

    def final(start, spread, known, steps=300):
        losses = []
        for seed in range(6):
            generator, rule = torch.Generator().manual_seed(seed), Automatic(SGD(), 0.02)
            state, x = rule.init(), start * torch.randn(300, generator=generator)
            for step in range(steps):
                z = torch.randn(300, generator=generator)
                of_rows = (z * eigenvalues * x).sum() + spread * (
                    torch.randn(rows, 300, generator=generator) @ (z * eigenvalues.sqrt())
                )
                bend = float((z * z * eigenvalues).sum()) if rule.wants_curvature(step, state) else None
                error = float(of_rows.var() / rows) if known else None
                estimate = Estimate(0, step, (float(of_rows.mean()),), bend, error)
                update, state = rule.update(estimate, 1.0, state, no_more)
                x = x + update.scales[step, 0] * z
            losses.append(float((eigenvalues * x * x).sum() / 2))
        return sum(losses) / len(losses)

    assert final(0.0, 6.0, known=True) < 0.7 * final(0.0, 6.0, known=False)
    assert final(0.5, 0.3, known=True) < 1.05 * final(0.5, 0.3, known=False)
