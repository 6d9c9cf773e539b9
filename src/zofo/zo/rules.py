"""Zeroth-order rules: from the losses that a step measured to what is added to the weights.

A rule sees numbers and no weights: dtypes, stochastic rounding, sparsity limits, weight decay and the distribution are
handled once, in `optimizers.ZerothOrderOptimizer`.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zofo.zo.estimators import Estimate, Evaluate, Probes

State = dict[str, Any]
"""What a rule remembers: numbers, strings, tensors, and lists and dicts of them. It goes into the checkpoint."""

RuleName = Literal["sgd", "sign", "momentum"]

# Tuned on three tasks with SmolLM2-135M, confirmed on small models and on a held-out task: docs/step-size.md
REACH, _CAUTION, _MEMORY = 1.5, 0.15, 0.9
_FIRST_CURVATURES, CURVATURE_EVERY, _KEPT_CURVATURES = 5, 10, 9
_LONG_MEMORY, _PRIOR = 0.995, 10  # of the part of signal, and for how many steps its start counts


@dataclass(frozen=True)
class Update:
    """What is added to the weights: W <- W + sum of scale z(seed, step, query); `scales` has (step, query) -> scale.

    Examples:
        >>> Update({(7, 0): 3e-3, (7, 1): -4e-3}).size
        0.005
    """

    scales: Mapping[tuple[int, int], float]

    @property
    def size(self) -> float:
        """The root mean square over the weights of what is added, as directions are independent."""
        return math.sqrt(sum(scale * scale for scale in self.scales.values()))


Proposal = tuple[Update, State]
"""What to add to the weights, and the rule's state after that."""


class Rule:
    """A zeroth-order rule; without overrides, plain descent along what `weigh` makes of the projected gradients."""

    def probes(self, asked: Probes) -> Probes:
        """Which losses a step measures: those of the configuration, unless the rule needs others."""
        return asked

    def init(self) -> State:
        """The state before the first step."""
        return {}

    def wants_curvature(self, step: int, state: State) -> bool:
        """Whether the estimate of a step should come with zᵀHz, which costs one more evaluation."""
        return False

    def without_signal(self, state: State) -> bool:
        """Whether the estimates so far tell that there is nothing to follow."""
        return False

    def rests(self, step: int, state: State) -> bool:
        """Whether nothing is to be measured in a step, where a method has something else to do: nine steps of ten."""
        return self.without_signal(state) and step % CURVATURE_EVERY != 0

    def weigh(self, projected: tuple[float, ...]) -> tuple[float, ...]:
        """Takes the place of the projected gradients: z_j gets the scale -η / q times its value, over all steps."""
        return projected

    def update(self, estimate: Estimate, learning_rate: float, state: State, evaluate: Evaluate) -> Proposal:
        """What to add to the weights, by directions of this step or of earlier ones, and the new state.

        η is `learning_rate`. `state` is as `init` or the step before returned it, and is not changed. `evaluate` gives
        further losses along the directions of this step; only new ones cost a forward pass.
        """
        factor = -learning_rate / len(estimate.projected)
        weighed = enumerate(self.weigh(estimate.projected))
        return Update({(estimate.step, query): factor * value for query, value in weighed}), state


class SGD(Rule):
    """Plain descent, MeZO (arXiv 2305.17333), Algorithm 1: W <- W - (η / q) sum_j g_j z_j.

    Examples:
        >>> update, _ = SGD().update(Estimate(0, 5, (2.0,)), 0.1, {}, lambda scale, query: 0.0)
        >>> update.scales
        {(5, 0): -0.2}
    """


class Sign(Rule):
    """Only the signs of the projected gradients, FeedSign (arXiv 2501.17610): W <- W - (η / q) sum_j sign(g_j) z_j.

    Examples:
        >>> Sign().weigh((-3.0, 0.0, 1e-9))
        (-1.0, 0.0, 1.0)
    """

    def weigh(self, projected: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(math.copysign(1.0, value) if value else 0.0 for value in projected)


@dataclass(frozen=True)
class Momentum(Rule):
    """Descent along a moving average of the last K = `window` estimates, with β = `decay` in [0, 1).

        W <- W - η (1 - β) sum_{i < K} β^i (1 / q) sum_j g_{t-i,j} z_{t-i,j}

    It stores numbers, no buffer of the model's size: each step regenerates K q directions. MeZO, appendix B.2.

    Examples:
        >>> rule, state = Momentum(decay=0.5), {"window": [[1, [4.0]]]}
        >>> rule.update(Estimate(0, 2, (2.0,)), 1.0, state, lambda scale, query: 0.0)[0].scales
        {(2, 0): -1.0, (1, 0): -1.0}
    """

    decay: float = 0.9
    window: int = 16

    def init(self) -> State:
        return {"window": []}

    def update(self, estimate: Estimate, learning_rate: float, state: State, evaluate: Evaluate) -> Proposal:
        newest: list[Any] = [estimate.step, list(self.weigh(estimate.projected))]
        window: list[list[Any]] = [newest, *state["window"]][: self.window]
        scales = {
            (step, query): -learning_rate * (1 - self.decay) * self.decay**age / len(values) * value
            for age, (step, values) in enumerate(window)
            for query, value in enumerate(values)
        }
        return Update(scales), {**state, "window": window}


@dataclass(frozen=True)
class Automatic(Rule):
    """Another rule with a learning rate found from the estimates.

        η = q' min( 1.5 ε / rms(w),  0.15 rms(g) / (rms(w) median|h|) ),   w = `weigh` of the rule; w = g for SGD

    q' is q, and sqrt(q) for a `population`: q directions together then move the weights by 1.5 ε (root mean square),
    however many they are. The best step on a quadratic is q s / (tr(H) + ...), where s = |G|² / mean g² is the part of
    signal in a projected gradient: q without noise of the rows, and about constant where directions divide the rows of
    a batch and noise prevails. sqrt(q) is between these, and known to be stable in both: docs/step-size.md.

    η is multiplied by min(1, s / s_0), where s = (sum of g² - e²) / sum of g² is found from the errors e² of estimates
    that know them. s_0 = 0.15 q' / q is what the second bound takes for granted; s starts there, and this start counts
    for ten steps with their noise. Without signal, steps would only follow the noise of the rows.

    The first bound updates the weights along each direction by 1.5 ε on average, about the distance at which the losses
    were measured, whatever the scale of the loss. The second keeps to 0.15 / tr(H), where 1 / tr(H) is the best step on
    a quadratic without batch noise: it matters where the loss is so curved that ε is too far. rms is a running one that
    includes the newest value, so one outlier updates the weights by less than 4.8 ε; the median is over the last nine
    curvatures h, which have outliers too. `learning_rate` multiplies η: 1, or what a schedule makes of it. The scalar
    second moment of g is that of MEAZO (arXiv 2605.03869) and of normalised descent.

    Examples:
        >>> rule = Automatic(SGD(), eps=2.0**-10)
        >>> update, state = rule.update(Estimate(0, 0, (-7.0,)), 1.0, rule.init(), lambda scale, query: 0.0)
        >>> update.scales[0, 0] / 2.0**-10
        1.5
    """

    rule: Rule
    eps: float = 1e-3
    population: bool = False

    def probes(self, asked: Probes) -> Probes:
        return self.rule.probes(asked)

    def init(self) -> State:
        sums = dict.fromkeys(("total", "weight", "signal", "power", "size", "count", "rate"), 0.0)
        return {**self.rule.init(), **sums, "trust": 1.0, "curvatures": []}

    def wants_curvature(self, step: int, state: State) -> bool:
        """Some of the first steps, then one in ten."""
        return len(state["curvatures"]) < _FIRST_CURVATURES or step % CURVATURE_EVERY == 0

    def without_signal(self, state: State) -> bool:
        """From ten estimates on: fewer say too little, whatever the rate makes of them."""
        return not state["trust"] and state["count"] > _PRIOR - 1  # as the older ones count a little less

    def weigh(self, projected: tuple[float, ...]) -> tuple[float, ...]:
        return self.rule.weigh(projected)

    def update(self, estimate: Estimate, learning_rate: float, state: State, evaluate: Evaluate) -> Proposal:
        queries = len(estimate.projected)
        of_gradient = sum(value * value for value in estimate.projected)
        of_weighed = sum(value * value for value in self.weigh(estimate.projected))
        total = _MEMORY * state["total"] + (1 - _MEMORY) * of_weighed / queries
        weight = _MEMORY * state["weight"] + 1 - _MEMORY
        newest = [] if estimate.curvature is None else [abs(estimate.curvature)]
        curvatures = [*state["curvatures"], *newest][-_KEPT_CURVATURES:]
        caution = _CAUTION * math.sqrt(of_gradient / of_weighed) if of_weighed else _CAUTION
        rms, bend = math.sqrt(total / weight), statistics.median(curvatures or [0.0])
        bounds = [factor / size for factor, size in ((REACH * self.eps, rms), (caution, bend)) if size > 0]
        factor = math.sqrt(queries) if self.population else queries
        judged = self._judged(estimate, state, _CAUTION * factor / queries)
        rate = learning_rate * factor * min(bounds, default=0.0) * judged["trust"]
        update, inner = self.rule.update(estimate, rate, state, evaluate)
        return update, {**inner, **judged, "total": total, "weight": weight, "curvatures": curvatures, "rate": rate}

    def _judged(self, estimate: Estimate, state: State, assumed: float) -> State:
        """How much of the projected gradients is signal, against what is assumed."""
        known = {key: state[key] for key in ("signal", "power", "size", "count", "trust")}
        squares = sum(value * value for value in estimate.projected)
        if estimate.error is None or not squares:
            return known
        queries = len(estimate.projected)
        signal = _LONG_MEMORY * known["signal"] + squares - queries * estimate.error
        power = _LONG_MEMORY * known["power"] + squares
        size = _LONG_MEMORY * known["size"] + squares + queries * estimate.error
        count = _LONG_MEMORY * known["count"] + 1
        start = _PRIOR * size / count
        trust = (assumed * start + signal) / (start + power) / assumed
        found = {"signal": signal, "power": power, "size": size, "count": count}
        return {**found, "trust": min(1.0, max(0.0, trust))}


RULES: dict[RuleName, Callable[[], Rule]] = {"sgd": SGD, "sign": Sign, "momentum": Momentum}
