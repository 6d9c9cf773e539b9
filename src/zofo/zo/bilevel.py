"""One outer iteration of Bilevel ZOFO, as a function of callables: no model, no data, no optimizer.

    bilevel   min_{θ,p} F(θ,p; D_f)   subject to   p in argmin_s G(θ,s; D_p)
    minimax   min_{θ,p} max_s  L(θ,p,s) = F(θ,p; D_f) + λ [ G(θ,p; D_p) - G(θ,s; D_p) ]

R. Shirkavand et al., "Bilevel ZOFO" (arXiv 2502.03604); J. Kwon et al., "A Fully First-Order Method for
Stochastic Bilevel Optimization" (arXiv 2301.10945) for the penalty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from zofo.zo.estimators import Measure, Point

Schedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class Losses:
    """The three losses of L at one θ: upper F(θ, p; B_f), upper_penalty G(θ, p; B_p), lower_penalty G(θ, s; B_p)."""

    upper: float
    upper_penalty: float = 0.0
    lower_penalty: float = 0.0


@dataclass(frozen=True)
class Penalty:
    """λ = `value` >= 0; `normalize` divides L by 1 + λ, so that learning rates keep their meaning.

    Examples:
        >>> Penalty(3.0).factors
        (0.25, 0.75)
        >>> Penalty(3.0, normalize=False).objective(Losses(1.0, 2.0, 1.5))
        2.5
    """

    value: float
    normalize: bool = True

    @property
    def factors(self) -> tuple[float, float]:
        """(factor of F, factor of both G)."""
        total = 1.0 + self.value if self.normalize else 1.0
        return 1.0 / total, self.value / total

    def objective(self, terms: Losses) -> float:
        """L(θ, p, s) of the three losses."""
        upper, coupling = self.factors
        return upper * terms.upper + coupling * (terms.upper_penalty - terms.lower_penalty)


def scheduled_penalty(value: float, schedule: Schedule, progress: float) -> float:
    """λ after the fraction `progress` of the run: constant, or growing linearly from 0 to `value`."""
    return value if schedule == "constant" else value * min(1.0, progress)


@dataclass(frozen=True)
class BilevelStep:
    """Of one outer iteration: G(θ, s) of each lower step, the losses of p at θ, the projected gradients."""

    lower: tuple[float, ...]
    upper: Losses
    projected: tuple[float, ...]


def bilevel_step(
    lower_steps: int,
    lower_step: Callable[[int], float],
    upper_gradient: Callable[[], Losses],
    evaluate: Callable[[Sequence[Point]], Sequence[Losses]],
    penalty: Penalty,
    propose: Callable[[Measure], tuple[float, ...]],
) -> BilevelStep:
    """Algorithm 2: T steps on s, then the gradients of p and of θ at one point, with which the caller updates p and θ.

    Args:
        lower_steps: T >= 0.
        lower_step: (t) -> G(θ, s; B_t); takes one first-order step on s.
        upper_gradient: leaves grad_p of the objective in p's `.grad`; returns F and G at (θ, p).
        evaluate: points (scale, query) -> the three losses at each θ + scale·z_query.
        penalty: λ.
        propose: (measure) -> the projected gradients; measures the objective near θ, and has a rule propose an update.

    Examples:
        >>> near = lambda points: [Losses(0.5 + 2.0 * scale) for scale, _ in points]
        >>> slope = lambda measure: (measure([(0.5, 0)])[0] - measure([(-0.5, 0)])[0],)
        >>> step = bilevel_step(2, lambda t: 1.0, lambda: Losses(0.5), near, Penalty(0.0), slope)
        >>> step.lower, step.projected
        ((1.0, 1.0), (2.0,))
    """
    lower = tuple(lower_step(t) for t in range(lower_steps))
    upper = upper_gradient()
    projected = propose(lambda points: [penalty.objective(losses) for losses in evaluate(points)])
    return BilevelStep(lower, upper, projected)
