"""Zeroth-order estimates of a gradient, as a few numbers: never a stored gradient.

An estimate consists of projected gradients, one number for each direction z, and of what regenerates the directions:
the run's seed and the step. J. Spall, "Multivariate Stochastic Approximation Using a Simultaneous
Perturbation Gradient Approximation" (1992); S. Malladi et al., "Fine-Tuning Language Models with Just
Forward Passes" (2023), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from zofo import noise
from zofo.noise import Distribution, Term

Evaluate = Callable[[float, int], float]
"""(scale, query) -> the loss at θ + scale·z_query, as a Python float. Scale 0 asks for the loss at θ."""

EstimatorName = Literal["two_sided", "one_sided"]


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate g = (1/q) sum_j projected[j] z_j, with z_j = z(seed, step, j).

    Args:
        seed: the run's seed.
        step: the optimizer step.
        projected: one projected gradient for each of the q directions.
        distribution: of the directions.
        curvature: zᵀHz along the first direction, where it was measured.
        limits: name -> the |W| above which a parameter's weights stay, and the directions are zero.

    Examples:
        >>> Estimate(seed=0, step=3, projected=(2.0, -1.0)).terms("w", factor=-0.1)[0].scale
        -0.1
    """

    seed: int
    step: int
    projected: tuple[float, ...]
    distribution: Distribution = "normal"
    curvature: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict[str, float])

    def terms(self, name: str, factor: float) -> list[Term]:
        """The addends of `factor * g` for the parameter `name`."""
        share = factor / len(self.projected)
        return [
            Term(noise.stream_key(self.seed, self.step, query, name), share * value)
            for query, value in enumerate(self.projected)
        ]


def two_sided(evaluate: Evaluate, eps: float, num_perturbations: int, distribution: Distribution) -> tuple[float, ...]:
    """Central differences: g_j = [L(θ + ε z_j) - L(θ - ε z_j)] / 2ε. Exact on a quadratic; 2q forwards.

    Args:
        evaluate: the loss at a perturbed point.
        eps: ε, in the weights' unit.
        num_perturbations: q, how many directions.
        distribution: of the directions; decides how ε is rounded.

    Examples:
        >>> two_sided(lambda scale, query: 3.0 * scale, 1e-3, 1, "normal")
        (3.0,)
    """
    eps = noise.representable(eps, distribution)
    return tuple((evaluate(eps, j) - evaluate(-eps, j)) / (2 * eps) for j in range(num_perturbations))


def one_sided(evaluate: Evaluate, eps: float, num_perturbations: int, distribution: Distribution) -> tuple[float, ...]:
    """Forward differences: g_j = [L(θ + ε z_j) - L(θ)] / ε. Biased by O(ε); q + 1 forwards.

    Args and example as for `two_sided`; the loss at θ is asked for once, with scale 0.

    Examples:
        >>> one_sided(lambda scale, query: 3.0 * scale + 1.0, 2.0, 1, "rademacher")
        (3.0,)
    """
    eps = noise.representable(eps, distribution)
    base = evaluate(0.0, 0)
    return tuple((evaluate(eps, j) - base) / eps for j in range(num_perturbations))


def curvature(evaluate: Evaluate, eps: float, distribution: Distribution) -> float:
    """The second difference along z_0: h = [L(θ + ε z_0) + L(θ - ε z_0) - 2 L(θ)] / ε².

    Its mean over z is the trace of the Hessian.

    Args:
        evaluate: the loss at a perturbed point; one that remembers makes this one forward more than a gradient.
        eps: ε, in the weights' unit.
        distribution: of the directions; decides how ε is rounded.

    Examples:
        >>> curvature(lambda scale, query: 3.0 * scale**2, 2.0**-10, "rademacher")
        6.0
    """
    eps = noise.representable(eps, distribution)
    return (evaluate(eps, 0) + evaluate(-eps, 0) - 2 * evaluate(0.0, 0)) / eps**2


ESTIMATORS: dict[EstimatorName, Callable[[Evaluate, float, int, Distribution], tuple[float, ...]]] = {
    "two_sided": two_sided,
    "one_sided": one_sided,
}
