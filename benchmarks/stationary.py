"""Bilevel ZOFO on quadratics with a known solution: the bias of the penalty, and the cost of many dimensions.

    python benchmarks/stationary.py

    F(θ, p) = |θ + P p - a|² / 2 + ν |θ|² / 2,    G(θ, s) = |θ + P s - b|² / 2 + μ |s|² / 2,    |x|² = xᵀHx

θ has d weights, p and s have four; s*(θ) minimises G, and Φ(θ) = F(θ, s*(θ)) is what the bilevel problem asks for. All
steps are those of `zofo.zo`: T = 5 gradient steps on s, one on p, and a two-sided estimate for θ with one direction.

- The bias: |∇Φ| where the iteration ends, for λ = 1, 4, 16 and 64. The theory says C / λ.
- The dimensions: iterations until Φ has lost nine tenths of what it can, for d = 32 to 2,048, with the best of four
  rates; the eigenvalues of H are 0.9^i, so that tr(H) / |H| is 10 for all d, or all 1, so that it is d.

Writes `benchmarks/results/stationary.json`; nothing in it depends on the machine but rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zofo import direction
from zofo.zo.bilevel import Losses, Penalty, bilevel_step
from zofo.zo.estimators import two_sided

Array = NDArray[np.float64]
ADAPTER, MU, NU, LOWER_STEPS, EPS, SEEDS = 4, 0.5, 0.1, 5, 1e-3, 5
PENALTIES, DIMENSIONS = (1.0, 4.0, 16.0, 64.0), (32, 128, 512, 2048)
RATES = (1.0, 2.0, 4.0, 8.0)  # over tr(H) + 2 |H|
MOST = 20_000


@dataclass(frozen=True)
class Problem:
    """H as its diagonal (d,), P (d, 4), and the targets a and b (d,)."""

    h: Array
    p: Array
    a: Array
    b: Array

    @classmethod
    def of(cls, h: Array, seed: int) -> Problem:
        """A random one."""
        rng = np.random.default_rng(seed)
        size = len(h)
        places = rng.standard_normal((size, ADAPTER)) / np.sqrt(h.sum())
        return cls(h, places, rng.standard_normal(size), rng.standard_normal(size))

    def upper(self, theta: Array, p: Array) -> float:
        """F."""
        return float((self.h * ((theta + self.p @ p - self.a) ** 2 + NU * theta**2)).sum() / 2)

    def lower(self, theta: Array, s: Array) -> float:
        """G."""
        return float((self.h * (theta + self.p @ s - self.b) ** 2).sum() / 2 + MU * (s @ s) / 2)

    @property
    def curvature(self) -> Array:
        """(4, 4) of F in p; with μ on the diagonal, of G in s."""
        return self.p.T @ (self.h[:, None] * self.p)

    def by_p(self, theta: Array, p: Array) -> Array:
        """The gradient of F in p."""
        return self.p.T @ (self.h * (theta + self.p @ p - self.a))

    def by_s(self, theta: Array, s: Array) -> Array:
        """The gradient of G in s."""
        return self.p.T @ (self.h * (theta + self.p @ s - self.b)) + MU * s

    def best(self, theta: Array) -> Array:
        """s*(θ)."""
        return np.linalg.solve(self.curvature + MU * np.eye(ADAPTER), self.p.T @ (self.h * (self.b - theta)))

    def gradient(self, theta: Array) -> Array:
        """∇Φ: through θ, and through s*(θ)."""
        inner = self.by_p(theta, self.best(theta))
        through = np.linalg.solve(self.curvature + MU * np.eye(ADAPTER), inner)
        here = theta + self.p @ self.best(theta) - self.a
        return self.h * (here - self.p @ through) + NU * self.h * theta

    def value(self, theta: Array) -> float:
        """Φ."""
        return self.upper(theta, self.best(theta))


def least(problem: Problem) -> float:
    """The minimum of Φ, by conjugate gradients on ∇Φ = 0, which is linear in θ, scaled by H."""
    constant = problem.gradient(np.zeros_like(problem.a))
    x = np.zeros_like(problem.a)
    rest = -constant / problem.h
    along, size = rest.copy(), float(rest @ (problem.h * rest))
    for _ in range(200):
        if size < 1e-24:
            break
        image = (problem.gradient(along) - constant) / problem.h
        length = size / float(along @ (problem.h * image))
        x, rest = x + length * along, rest - length * image
        new = float(rest @ (problem.h * rest))
        along, size = rest + new / size * along, new
    return problem.value(x)


class Run:
    """θ, p and s of one run, from zero."""

    def __init__(self, problem: Problem, penalty: float, rate: float, seed: int) -> None:
        self.problem, self.penalty, self.rate, self.seed = problem, Penalty(penalty), rate, seed
        self.theta, self.p, self.s = np.zeros_like(problem.a), np.zeros(ADAPTER), np.zeros(ADAPTER)
        self._like = {"w": torch.zeros(len(problem.a))}
        self._step_of_s = 1 / (np.linalg.norm(problem.curvature, 2) + MU)

    def iterate(self, number: int) -> None:
        """One iteration."""
        problem, theta = self.problem, self.theta
        z = direction(self._like, self.seed, number)["w"].double().numpy()
        gradient = np.zeros(ADAPTER)

        def lower(t: int) -> float:
            self.s = self.s - self._step_of_s * problem.by_s(theta, self.s)
            return problem.lower(theta, self.s)

        def upper() -> Losses:
            of_f, of_g = self.penalty.factors
            gradient[:] = of_f * problem.by_p(theta, self.p) + of_g * problem.by_s(theta, self.p)
            return near(0.0)

        def near(scale: float) -> Losses:
            moved = theta + scale * z
            return Losses(problem.upper(moved, self.p), problem.lower(moved, self.p), problem.lower(moved, self.s))

        def estimator(measure: Any) -> tuple[float, ...]:
            return two_sided(lambda scale, query: measure([(scale, query)])[0], EPS, 1, "normal")

        found = bilevel_step(
            LOWER_STEPS, lower, upper, lambda points: [near(scale) for scale, _ in points], self.penalty, estimator
        )
        self.p = self.p - self._step_of_s * gradient
        self.theta = theta - self.rate * found.projected[0] * z


def biases() -> list[dict[str, float]]:
    """|∇Φ| where runs end, by λ, with eight weights in θ."""
    rows: list[dict[str, float]] = []
    for penalty in PENALTIES:
        norms: list[float] = []
        for seed in range(SEEDS):
            problem = Problem.of(np.linspace(0.5, 1.0, 8), seed)
            run = Run(problem, penalty, 1 / (problem.h.sum() + 2), seed)
            for number in range(int(600 * (1 + penalty))):  # L is divided by 1 + λ, and so is the step along F
                run.iterate(number)
            norms.append(float(np.linalg.norm(problem.gradient(run.theta))))
        rows.append({"penalty": penalty, "gradient": float(np.mean(norms)), "low": min(norms), "high": max(norms)})
        print(rows[-1], flush=True)
    return rows


def iterations(problem: Problem, penalty: float, rate: float, seed: int) -> int:
    """Until Φ has lost nine tenths of what it can; `MOST` if it has not."""
    start, end = problem.value(np.zeros_like(problem.a)), least(problem)
    run = Run(problem, penalty, rate / (problem.h.sum() + 2 * problem.h.max()), seed)
    for number in range(MOST):
        if number % 5 == 0:
            gap = (problem.value(run.theta) - end) / (start - end)
            if gap < 0.1 or not gap < 1e3:
                return number if gap < 0.1 else MOST
        run.iterate(number)
    return MOST


def dimensions() -> list[dict[str, Any]]:
    """Iterations by d, for H of a fixed effective rank and for H = 1, each at its best rate."""
    rows: list[dict[str, Any]] = []
    for name in ("0.9^i", "1"):
        for size in DIMENSIONS:
            h = np.maximum(0.9 ** np.arange(size), 1e-12) if name != "1" else np.ones(size)
            taken = {
                rate: float(np.median([iterations(Problem.of(h, seed), 4.0, rate, seed) for seed in range(SEEDS)]))
                for rate in RATES
            }
            best = min(taken, key=taken.__getitem__)
            rank = float(h.sum() / h.max())
            rows.append({"H": name, "d": size, "effective rank": rank, "rate": best, "iterations": taken[best]})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures, prints and writes."""
    found = {"bias": biases(), "dimensions": dimensions()}
    Path("benchmarks/results/stationary.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
