"""Zeroth-order estimates of a gradient, as a few numbers: never a stored gradient.

An estimate consists of one projected gradient for each direction z, and of the run's seed and the step, which
regenerate the directions. J. Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
Approximation" (1992); S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), Algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zofo.noise import Distribution, representable

Point = tuple[float, int]
"""(scale, query): the point θ + scale·z_query of a step."""

Evaluate = Callable[[float, int], float]
"""(scale, query) -> the loss at θ + scale·z_query, as a Python float. Scale 0 asks for the loss at θ."""

Measure = Callable[[Sequence[Point]], Sequence[float]]
"""The losses at several points, in their order: all that a step asks of whoever evaluates a model."""

Estimator = Callable[[Evaluate, float, int, Distribution], tuple[float, ...]]
EstimatorName = Literal["two_sided", "one_sided"]


@dataclass(frozen=True)
class Probes:
    """Which losses a step measures: along q = `queries` directions, at the scale ε = `eps`, in the weights' unit.

    With `own`, every direction has rows of its own, on which all its losses are measured, also those at θ.
    """

    estimator: EstimatorName = "two_sided"
    eps: float = 1e-3
    queries: int = 1
    distribution: Distribution = "normal"
    rank: int = 0  # of the directions of matrices; 0: full
    own: bool = False

    @property
    def evaluations(self) -> int:
        """How many losses that are."""
        return 2 * self.queries if self.estimator == "two_sided" else self.queries + 1

    @property
    def points(self) -> list[Point]:
        """Where `project` measures, the points of a direction side by side."""
        eps = representable(self.eps, self.distribution)
        if self.estimator == "one_sided" and not self.own:
            return [(0.0, 0), *((eps, query) for query in range(self.queries))]
        scales = (eps, 0.0) if self.estimator == "one_sided" else (eps, -eps)
        return [(scale, query) for query in range(self.queries) for scale in scales]

    def project(self, evaluate: Evaluate) -> tuple[float, ...]:
        """The projected gradient of a loss along each direction."""
        if self.own:
            return tuple(
                replace(self, queries=1, own=False).project(lambda scale, _, query=query: evaluate(scale, query))[0]
                for query in range(self.queries)
            )
        return ESTIMATORS[self.estimator](evaluate, self.eps, self.queries, self.distribution)


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate g = (1/q) sum_j projected[j] z_j, with z_j = z(seed, step, j); curvature is z_0ᵀHz_0."""

    seed: int
    step: int
    projected: tuple[float, ...]
    curvature: float | None = None


def two_sided(evaluate: Evaluate, eps: float, num_perturbations: int, distribution: Distribution) -> tuple[float, ...]:
    """Central differences: g_j = [L(θ + ε z_j) - L(θ - ε z_j)] / 2ε, j < q. Exact on a quadratic; 2q forward passes.

    ε = `eps` is in the weights' unit, rounded by `representable`; q = `num_perturbations`.

    Examples:
        >>> two_sided(lambda scale, query: 3.0 * scale, 1e-3, 1, "normal")
        (3.0,)
    """
    eps = representable(eps, distribution)
    return tuple((evaluate(eps, j) - evaluate(-eps, j)) / (2 * eps) for j in range(num_perturbations))


def one_sided(evaluate: Evaluate, eps: float, num_perturbations: int, distribution: Distribution) -> tuple[float, ...]:
    """Forward differences: g_j = [L(θ + ε z_j) - L(θ)] / ε, ε and q as above. Biased by O(ε); q + 1 forward passes.

    Examples:
        >>> one_sided(lambda scale, query: 3.0 * scale + 1.0, 2.0, 1, "rademacher")
        (3.0,)
    """
    eps = representable(eps, distribution)
    base = evaluate(0.0, 0)
    return tuple((evaluate(eps, j) - base) / eps for j in range(num_perturbations))


def curvature(evaluate: Evaluate, eps: float, distribution: Distribution) -> float:
    """The second difference along z_0: h = [L(θ + ε z_0) + L(θ - ε z_0) - 2 L(θ)] / ε², whose mean over z is tr(H).

    With an `evaluate` that remembers its losses, it costs one forward pass more than a gradient estimate.

    Examples:
        >>> curvature(lambda scale, query: 3.0 * scale**2, 2.0**-10, "rademacher")
        6.0
    """
    eps = representable(eps, distribution)
    return (evaluate(eps, 0) + evaluate(-eps, 0) - 2 * evaluate(0.0, 0)) / eps**2


ESTIMATORS: dict[EstimatorName, Estimator] = {"two_sided": two_sided, "one_sided": one_sided}
