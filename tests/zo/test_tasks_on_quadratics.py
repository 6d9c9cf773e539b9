"""Bilevel steps over K tasks with one θ, on strongly convex quadratics whose solution is known."""

import numpy as np
import torch

from zofo import direction
from zofo.zo.bilevel import Losses, Penalty, bilevel_step
from zofo.zo.estimators import Estimate, mean_estimate, two_sided
from zofo.zo.optimizers import ZerothOrderOptimizer
from zofo.zo.rules import SGD

D, K, MU, NU, WEIGHT = 4, 3, 0.5, 0.3, 2.0


def solution(a, b):
    """(θ, p_1..p_K) at which the gradients of sum of F + λ (G(p) - min over s of G(s)) vanish, by a linear system.

    F = |θ + p - a|²/2 + ν|θ|²/2 and G = |θ + s - b|²/2 + μ|s|²/2 of each task, coordinate by coordinate.
    """
    found = []
    for i in range(D):
        matrix, right = np.zeros((K + 1, K + 1)), np.zeros(K + 1)
        for k in range(K):
            # p_k: (θ + p - a) + λ ((θ + p - b) + μ p) = 0
            matrix[k, 0], matrix[k, k + 1] = 1 + WEIGHT, 1 + WEIGHT * (1 + MU)
            right[k] = a[k, i] + WEIGHT * b[k, i]
            # θ: (θ + p - a) + ν θ + λ (p - s) = 0 in the mean, with s = (b - θ) / (1 + μ)
            matrix[K, 0] += (1 + NU + WEIGHT / (1 + MU)) / K
            matrix[K, k + 1] += (1 + WEIGHT) / K
            right[K] += (a[k, i] + WEIGHT * b[k, i] / (1 + MU)) / K
        found.append(np.linalg.solve(matrix, right))
    return np.array(found).T


def test_meta_training_reaches_the_known_solution():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(K, D)), generator.normal(size=(K, D))
    targets = [(torch.tensor(a[k], dtype=torch.float32), torch.tensor(b[k], dtype=torch.float32)) for k in range(K)]
    theta = {"w": torch.zeros(D)}
    p, s = ([torch.zeros(D) for _ in range(K)] for _ in range(2))
    optimizer, penalty = ZerothOrderOptimizer(theta, SGD(), lr=0.03), Penalty(WEIGHT, normalize=False)

    for step in range(3000):
        z = direction(theta, 0, step)["w"]
        estimates, gradients = [], []
        for k, (of_upper, of_lower) in enumerate(targets):

            def losses(scale, k=k, of_upper=of_upper, of_lower=of_lower, z=z):
                w = theta["w"].double() + scale * z.double()
                upper = (w + p[k] - of_upper).square().sum() / 2 + NU * w.square().sum() / 2
                both = [(w + x - of_lower).square().sum() / 2 + MU * x.square().sum() / 2 for x in (p[k], s[k])]
                return Losses(float(upper), *map(float, both))

            def lower(t, k=k, of_lower=of_lower):
                s[k] -= 0.3 * (theta["w"] + s[k] - of_lower + MU * s[k])
                return 0.0

            found = bilevel_step(
                5,
                lower,
                lambda losses=losses: losses(0.0),
                lambda points, losses=losses: [losses(scale) for scale, _ in points],
                penalty,
                lambda measure: two_sided(lambda scale, query: measure([(scale, query)])[0], 1e-2, 1, "normal"),
            )
            estimates.append(Estimate(0, step, found.projected))
            of_coupling = theta["w"] + p[k] - of_lower + MU * p[k]
            gradients.append(theta["w"] + p[k] - of_upper + WEIGHT * of_coupling)
        for k, gradient in enumerate(gradients):
            p[k] -= 0.1 * gradient
        optimizer.propose(mean_estimate(estimates))
        optimizer.step()

    expected = solution(a, b)
    np.testing.assert_allclose(theta["w"].numpy(), expected[0], atol=2e-3)
    for k in range(K):
        np.testing.assert_allclose(p[k].numpy(), expected[k + 1], atol=2e-3)
    assert float(np.abs(expected[0]).min()) > 0.01
