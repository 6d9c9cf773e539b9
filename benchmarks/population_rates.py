"""The automatic rate of populations on a quadratic whose rows have noise, against the best of ten constant rates.

    python benchmarks/population_rates.py

    f(x) = x'Hx / 2, H diagonal with eigenvalues proportional to 1 / i, trace 50, 400 weights; a row's gradient is
    H x + noise sqrt(H) u, u normal; q directions divide 32 rows; 200 steps, means of three seeds

The rule with q and with sqrt(q) in front of its bounds. Writes `benchmarks/results/population-rates.json`; nothing in
it depends on the machine but rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from zofo.zo.estimators import Estimate
from zofo.zo.rules import SGD, Automatic

WEIGHTS, TRACE, ROWS, STEPS, SEEDS, EPS = 400, 50.0, 32, 200, 3, 0.02
EIGENVALUES = TRACE / np.arange(1, WEIGHTS + 1) / (1 / np.arange(1, WEIGHTS + 1)).sum()


def final(q: int, noise: float, seed: int, rate: float | None = None, population: bool = False) -> float:
    """The loss after all steps, at a constant rate or at that of the rule; infinite if it has grown without bound."""
    rng, rule = np.random.default_rng(seed), Automatic(SGD(), EPS, population)
    x, state = rng.standard_normal(WEIGHTS), rule.init()
    for step in range(STEPS):
        z = rng.standard_normal((q, WEIGHTS))
        noisy = noise * np.sqrt(EIGENVALUES * q / ROWS) * rng.standard_normal((q, WEIGHTS))
        projected = (z * (EIGENVALUES * x + noisy)).sum(1)
        bend = float((z * z * EIGENVALUES).sum(1).mean()) if rule.wants_curvature(step, state) else None
        scales = -(rate or 0.0) / q * projected
        if rate is None:
            found = Estimate(seed, step, tuple(projected.tolist()), bend)
            update, state = rule.update(found, 1.0, state, lambda scale, query: 0.0)
            scales = np.array(list(update.scales.values()))
        x = x + scales @ z
        if not (EIGENVALUES * x * x).sum() < 1e6:
            return math.inf
    return float((EIGENVALUES * x * x).sum() / 2)


def mean(q: int, noise: float, **how: Any) -> float:
    """Over the seeds."""
    return float(np.mean([final(q, noise, seed, **how) for seed in range(SEEDS)]))


def main() -> None:
    """Measures, prints and writes."""
    rows: list[dict[str, Any]] = []
    for noise in (0.0, 1.0, 3.0):
        for q in (1, 8, 32):
            constant = {float(rate): mean(q, noise, rate=float(rate)) for rate in np.geomspace(1e-3, 1, 10)}
            best = min(constant, key=constant.__getitem__)
            rows.append({
                "noise": noise, "q": q, "best constant": best, "its loss": constant[best],
                "with q": mean(q, noise), "with sqrt(q)": mean(q, noise, population=True),
            })  # fmt: skip
            print(" | ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
    Path("benchmarks/results/population-rates.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
