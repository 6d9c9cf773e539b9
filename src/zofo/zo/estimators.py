"""Zeroth-order estimates of a gradient, as a few numbers: never a stored gradient.

An estimate consists of one projected gradient for each direction z, and of the run's seed and the step, which
regenerate the directions. J. Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
Approximation" (1992); S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), Algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    def passes(self) -> int:
        """How many passes over a batch that are: two if directions divide it, each part of it read at two points."""
        return 2 if self.own else self.evaluations

    def points(self, curved: bool = False) -> list[Point]:
        """Where `project`, and `curvature` as well if `curved`, measure."""
        found = dict[Point, None]()

        def note(scale: float, query: int) -> float:
            found[scale, query] = None
            return 0.0

        self.project(note)
        if curved:
            self.curvature(note)
        return list(found)

    def project(self, evaluate: Evaluate) -> tuple[float, ...]:
        """The projected gradient of a loss along each direction."""
        estimator = ESTIMATORS[self.estimator]
        if self.own:
            alone = [_along(evaluate, query) for query in range(self.queries)]
            return tuple(estimator(along, self.eps, 1, self.distribution)[0] for along in alone)
        return estimator(evaluate, self.eps, self.queries, self.distribution)

    def curvature(self, evaluate: Evaluate) -> float:
        """The `curvature` along z_0; of low rank, the mean over the directions whose losses are measured anyway."""
        queries = self.queries if self.own or (self.rank and self.estimator == "two_sided") else 1
        alone = [_along(evaluate, query, at_theta=query if self.own else 0) for query in range(queries)]
        return sum(curvature(along, self.eps, self.distribution) for along in alone) / queries


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate g = (1/q) sum_j projected[j] z_j, with z_j = z(seed, step, j).

    The curvature is z_0ᵀHz_0, or a mean of z_jᵀHz_j. The error is the squared standard error of the projected gradients
    over the rows, a mean over the directions; None if a direction has one row, or nothing is known of rows.
    """

    seed: int
    step: int
    projected: tuple[float, ...]
    curvature: float | None = None
    error: float | None = None


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates of one step, of independent objectives along the same directions.

    Examples:
        >>> mean_estimate([Estimate(0, 5, (1.0,), error=2.0), Estimate(0, 5, (2.0,), error=4.0)])
        Estimate(seed=0, step=5, projected=(1.5,), curvature=None, error=1.5)
    """
    first, n = estimates[0], len(estimates)
    curvatures = [estimate.curvature for estimate in estimates if estimate.curvature is not None]
    errors = [estimate.error for estimate in estimates if estimate.error is not None]
    return Estimate(
        first.seed,
        first.step,
        tuple(sum(values) / n for values in zip(*(estimate.projected for estimate in estimates), strict=True)),
        sum(curvatures) / n if len(curvatures) == n else None,
        sum(errors) / n**2 if len(errors) == n else None,
    )


def _along(evaluate: Evaluate, query: int, at_theta: int | None = None) -> Evaluate:
    """The losses along one direction, at θ on the rows of direction `at_theta`; its own by default."""
    base = query if at_theta is None else at_theta
    return lambda scale, _: evaluate(scale, query if scale else base)


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
