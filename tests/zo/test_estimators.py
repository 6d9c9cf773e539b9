"""Estimates against the theory on quadratics."""

import pytest
import torch

from zofo import noise
from zofo.noise.eager import SHAPES
from zofo.zo.estimators import ESTIMATORS, curvature, one_sided, two_sided
from zofo.zo.perturb import direction

D, SIGMAS = 12, 5  # statistical bounds: five standard errors, at fixed seeds


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


@pytest.fixture(params=SHAPES)
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
    n = SHAPES[problem.distribution].integers(torch.arange(-(2**31), 2**31, 4099).int()).double()  # of many hashes
    kappa = (n**4).mean() / (n**2).mean() ** 2
    # E[(g'z)^2 z_i^2] = κ g_i^2 + sum_{k != i} g_k^2, so Var_i = |g|^2 + (κ - 2) g_i^2 for one direction; 1/q of it
    variance = (g @ g + (kappa - 2) * g**2) / q
    assert ((rows.mean(0) - g).abs() < SIGMAS * (variance / count).sqrt()).all()
    # the standard error of a sample variance is sqrt((k - 1) / n) of it, with the sample's own kurtosis k
    centred = rows - rows.mean(0)
    kurtosis = (centred**4).mean(0) / (centred**2).mean(0) ** 2
    assert ((centred.var(0) / variance - 1).abs() < SIGMAS * ((kurtosis - 1) / count).sqrt()).all()
    assert (SIGMAS * ((kurtosis - 1) / count).sqrt() < 0.9).all()  # the bound would see a factor of two


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_the_curvature_of_a_quadratic_is_that_of_its_matrix_along_z(problem, eps):
    z = problem.z(5)
    found = curvature(lambda s, j: problem(problem.theta + s * problem.z(5, j)), eps, problem.distribution)
    assert found == pytest.approx((z @ problem.A @ z).item(), rel=1e-6)
