"""The bilevel step on a problem whose solution is known: a quadratic in NumPy beside closures in torch."""

import functools
import math

import numpy as np
import pytest
import torch

from plain import applied
from zofo.zo.bilevel import BilevelStep, Losses, Penalty, bilevel_step, scheduled_penalty
from zofo.zo.estimators import Estimate, one_sided, two_sided
from zofo.zo.perturb import direction

N, M = 3, 4  # sizes of θ and of the adapters
RANDOM = np.random.default_rng(0)
MIX = 0.4 * RANDOM.standard_normal((M, N))
H = np.diag([0.6, 0.9, 1.1, 1.4])
A, B, C, E = (RANDOM.standard_normal(size) for size in (N, M, M, N))


# F(θ,p) = |θ-a|²/2 + |p-b|²/2 and G(θ,s) = |s-Mθ-c|²_H/2 + |θ-e|²/2. The argmin of G is s = Mθ + c. Its last term is
# not 0 there: without the part -λ G(θ,s) of the minimax form, θ would be pulled to e.


def upper_loss(theta, p):
    return ((theta - A) ** 2).sum() / 2 + ((p - B) ** 2).sum() / 2


def lower_loss(theta, s, shift=0.0):
    """G on the batch that moves c by `shift`."""
    r = s - MIX @ theta - (C + shift)
    return r @ H @ r / 2 + ((theta - E) ** 2).sum() / 2


def bilevel_solution():
    """θ* = argmin |θ-a|²/2 + |Mθ+c-b|²/2."""
    return np.linalg.solve(np.eye(N) + MIX.T @ MIX, A + MIX.T @ (B - C))


def penalised_solution(penalty):
    """(θ_λ, p_λ): where the gradient of F + λ |p-Mθ-c|²_H/2 is 0, which is L with s maximised out."""
    system = np.block([
        [np.eye(N) + penalty * MIX.T @ H @ MIX, -penalty * MIX.T @ H],
        [-penalty * H @ MIX, np.eye(M) + penalty * H],
    ])  # fmt: skip
    solution = np.linalg.solve(system, np.concatenate([A - penalty * MIX.T @ H @ C, B + penalty * H @ C]))
    return solution[:N], solution[N:]


class Torch:
    """The constants as float64 tensors, in place of NumPy's, for autograd."""

    def __init__(self):
        self.mix, self.h = torch.from_numpy(MIX), torch.from_numpy(H)
        self.a, self.b, self.c, self.e = map(torch.from_numpy, (A, B, C, E))

    def upper_loss(self, theta, p):
        return ((theta - self.a) ** 2).sum() / 2 + ((p - self.b) ** 2).sum() / 2

    def lower_loss(self, theta, s, shift=0.0):
        r = s - self.mix @ theta - (self.c + shift)
        return r @ self.h @ r / 2 + ((theta - self.e) ** 2).sum() / 2


class Run:
    """Bilevel ZOFO by `bilevel_step`: θ by SGD in float32, p and s by torch's SGD in float64."""

    def __init__(self, penalty, lower_steps=1, theta_rate=0.15, estimator=two_sided, batches=False):
        self.problem, self.penalty, self.lower_steps, self.batches = Torch(), penalty, lower_steps, batches
        self.theta, self.theta_rate, self.estimator = {"theta": torch.zeros(N)}, theta_rate, estimator
        self.p, self.s = (torch.zeros(M, dtype=torch.float64, requires_grad=True) for _ in range(2))
        self.upper = torch.optim.SGD([self.p], lr=0.5)
        self.lower = torch.optim.SGD([self.s], lr=0.5, momentum=0.2)
        self.step, self.calls, self.trajectory = 0, [], []

    def shift(self, t):
        """Which batch: another c for each lower step."""
        return 0.1 * math.sin(7 * self.step + 3 * t) if self.batches else 0.0

    def point(self):
        return [x.detach().clone() for x in (self.theta["theta"], self.p, self.s)]

    def lower_step(self, t):
        self.calls.append(("lower", self.point()))
        self.lower.zero_grad()
        loss = self.problem.lower_loss(self.theta["theta"].double(), self.s, self.shift(t))
        loss.backward()
        self.lower.step()
        self.trajectory.append(self.s.detach().clone())
        return loss.item()

    def upper_gradient(self):
        self.calls.append(("upper", self.point()))
        self.upper.zero_grad()
        theta, (of_upper, of_both) = self.theta["theta"].double(), self.penalty.factors
        f, g = self.problem.upper_loss(theta, self.p), self.problem.lower_loss(theta, self.p)
        (of_upper * f + of_both * g).backward()
        return Losses(f.item(), g.item())

    @torch.no_grad()
    def evaluate(self, scale, query):
        self.calls.append(("evaluate", self.point()))
        z = direction(self.theta, 0, self.step, query)["theta"]
        theta = self.theta["theta"].double() + scale * z.double()
        return Losses(
            self.problem.upper_loss(theta, self.p).item(),
            self.problem.lower_loss(theta, self.p).item(),
            self.problem.lower_loss(theta, self.s).item(),
        )

    def find(self, q=1):
        def near(points):
            return [self.evaluate(*point) for point in points]

        def estimator(measure):
            return self.estimator(lambda *point: measure([point])[0], 1e-2, q, "normal")

        return bilevel_step(self.lower_steps, self.lower_step, self.upper_gradient, near, self.penalty, estimator)

    def outer_step(self):
        found = self.find()
        self.upper.step()
        applied(self.theta, Estimate(0, self.step, found.projected), self.theta_rate)
        self.step += 1

    def run(self, steps):
        for _ in range(steps):
            self.outer_step()
        return self


def test_the_penalised_solution_tends_to_the_bilevel_solution_like_one_over_lambda():
    penalties = np.array([1e2, 1e3, 1e4, 1e5])
    bias = [np.linalg.norm(penalised_solution(value)[0] - bilevel_solution()) for value in penalties]
    assert np.polyfit(np.log(penalties), np.log(bias), 1)[0] == pytest.approx(-1, abs=0.02)


@functools.cache
def ended(penalty, steps):
    """A run after so many steps, which must not be changed."""
    return Run(Penalty(penalty)).run(steps)


# the slowest mode contracts by about 1 - 0.15 / (1 + λ) per step; the steps are for a factor of e**-12 and more
@pytest.mark.parametrize(("penalty", "steps"), [(1.0, 200), (4.0, 500), (16.0, 1500)])
def test_the_algorithm_ends_at_the_solution_of_the_penalised_problem(penalty, steps):
    run = ended(penalty, steps)
    theta, p = penalised_solution(penalty)
    # central differences are exact here, so what is left is θ's float32 rounding, spread by a condition number ~ 1 + λ
    assert np.abs(run.theta["theta"].numpy() - theta).max() < 1e-5 * (1 + penalty)
    assert np.abs(run.p.detach().numpy() - p).max() < 1e-5 * (1 + penalty)
    assert np.abs(run.s.detach().numpy() - (MIX @ theta + C)).max() < 1e-5 * (1 + penalty)


def test_the_end_points_show_the_bias_of_the_penalty():
    penalties, steps = np.array([4.0, 8.0, 16.0]), (500, 800, 1500)
    ends = [ended(float(v), n).theta["theta"].numpy() for v, n in zip(penalties, steps, strict=True)]
    bias = [np.linalg.norm(end - bilevel_solution()) for end in ends]
    closed = [np.linalg.norm(penalised_solution(v)[0] - bilevel_solution()) for v in penalties]
    assert bias == pytest.approx(closed, rel=1e-2)
    # 1 / λ is the limit; at λ = 4 .. 16 the bias is near c / (λ + k) with k of the order of 1
    assert np.polyfit(np.log(penalties), np.log(bias), 1)[0] == pytest.approx(-1, abs=0.25)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("estimator", [two_sided, one_sided])
def test_without_penalty_and_lower_steps_it_is_zeroth_and_first_order_side_by_side(normalize, estimator):
    run = Run(Penalty(0.0, normalize), lower_steps=0, estimator=estimator).run(25)
    problem, theta = Torch(), {"theta": torch.zeros(N)}
    p = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([p], lr=0.5)
    for step in range(25):
        z = direction(theta, 0, step)["theta"].double()

        def loss(scale, query, z=z):
            with torch.no_grad():
                return problem.upper_loss(theta["theta"].double() + scale * z, p).item()

        projected = estimator(loss, 1e-2, 1, "normal")
        sgd.zero_grad()
        problem.upper_loss(theta["theta"].double(), p).backward()
        sgd.step()
        applied(theta, Estimate(0, step, projected), 0.15)
    assert torch.equal(run.theta["theta"], theta["theta"])
    assert torch.equal(run.p, p)
    assert torch.equal(run.s, torch.zeros(M, dtype=torch.float64))
    assert not torch.equal(p, run.s)


def test_with_theta_frozen_the_lower_level_is_plain_first_order_training():
    run = Run(Penalty(10.0), lower_steps=3, theta_rate=0.0, batches=True).run(8)
    problem, theta = Torch(), torch.zeros(N, dtype=torch.float64)
    s = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    sgd, trajectory = torch.optim.SGD([s], lr=0.5, momentum=0.2), []
    for step in range(8):
        for t in range(3):
            sgd.zero_grad()
            problem.lower_loss(theta, s, 0.1 * math.sin(7 * step + 3 * t)).backward()
            sgd.step()
            trajectory.append(s.detach().clone())
    assert len(run.trajectory) == 24
    assert all(map(torch.equal, run.trajectory, trajectory))
    assert torch.equal(run.theta["theta"], torch.zeros(N))


def test_both_gradients_are_taken_at_one_point_and_only_s_moves():
    run = Run(Penalty(2.0), lower_steps=3).run(2)  # somewhere on the way, with momentum in s
    run.calls.clear()
    start, found, end = run.point(), run.find(q=2), run.point()
    assert [kind for kind, _ in run.calls] == ["lower"] * 3 + ["upper"] + ["evaluate"] * 4
    assert torch.equal(start[0], end[0])
    assert torch.equal(start[1], end[1])
    assert not torch.equal(start[2], end[2])
    for kind, point in run.calls:
        assert torch.equal(point[0], start[0])
        assert torch.equal(point[1], start[1])
        assert kind == "lower" or torch.equal(point[2], end[2])
    assert len(found.lower) == 3
    assert len(found.projected) == 2
    assert found.lower[0] == pytest.approx(lower_loss(start[0].double().numpy(), start[2].numpy()))


def test_what_is_reported_and_what_p_descends():
    run = Run(Penalty(3.0), lower_steps=2).run(2)
    found = run.find()
    theta, p = run.theta["theta"].double().numpy(), run.p.detach().numpy()
    assert isinstance(found, BilevelStep)
    assert found.upper.upper == pytest.approx(upper_loss(theta, p))
    assert found.upper.upper_penalty == pytest.approx(lower_loss(theta, p))
    expected = ((p - B) + 3.0 * H @ (p - MIX @ theta - C)) / 4.0
    assert run.p.grad.numpy() == pytest.approx(expected)


def test_the_estimate_of_theta_is_on_average_the_gradient_of_the_minimax_objective():
    run, count = Run(Penalty(3.0), lower_steps=0), 2000
    with torch.no_grad():
        run.theta["theta"] += torch.tensor([1.0, -0.5, 0.3])
        run.p += torch.linspace(-1, 1, M)
        run.s += 0.7
    theta, p, s = (x.double().numpy() for x in run.point())
    pulls = -MIX.T @ H @ (p - s)  # grad of G(θ,p) - G(θ,s): the parts Mθ, c and e cancel
    g = (theta - A + 3.0 * pulls) / 4.0
    rows = []
    for run.step in range(count):
        projected = run.find().projected[0]
        rows.append(projected * direction(run.theta, 0, run.step)["theta"].double().numpy())
    # Var_i = |g|² + (κ - 2) g_i² with κ = 2.7, see test_estimators; the bound is five standard errors
    assert (np.abs(np.mean(rows, axis=0) - g) < 5 * np.sqrt((g @ g + 0.7 * g**2) / count)).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1e6])
def test_penalty_factors(value):
    terms = Losses(2.0, 5.0, 3.0)
    plain, normalized = Penalty(value, normalize=False), Penalty(value)
    assert plain.factors == (1.0, value)
    assert sum(normalized.factors) == pytest.approx(1.0)
    assert plain.objective(terms) == 2.0 + value * 2.0
    assert normalized.objective(terms) * (1 + value) == pytest.approx(plain.objective(terms))


def test_a_missing_lower_term_counts_as_zero():
    assert Penalty(0.0).objective(Losses(0.1)) == 0.1


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("constant", 0.0, 8.0), ("constant", 0.5, 8.0), ("constant", 1.0, 8.0),
        ("linear", 0.0, 0.0), ("linear", 0.25, 2.0), ("linear", 1.0, 8.0), ("linear", 1.5, 8.0),
    ],
)  # fmt: skip
def test_scheduled_penalty(schedule, progress, expected):
    assert scheduled_penalty(8.0, schedule, progress) == expected
