"""How θ moves: zeroth-order rules, and the torch optimizers that carry them.

A rule is a small object with `init` and `update`, as in optax; it sees names, tensors and an `Estimate`, and
nothing of models or training. `ZerothOrderOptimizer` gives a rule the face of a `torch.optim.Optimizer`, so that
schedulers and checkpoints treat it like any other; `JointOptimizer` steps several optimizers as one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo import noise
from zofo.zo.estimators import Estimate

State = dict[str, Any]

# Found on three tasks with SmolLM2-135M, confirmed on small models and on a task that was not looked at before:
# docs/step-size.md
REACH = 1.5
_CAUTION = 0.15
_MEMORY = 0.9
_FIRST_CURVATURES = 5
CURVATURE_EVERY = 10
_KEPT_CURVATURES = 9


class ZerothOrderRule(Protocol):
    """What a zeroth-order rule must offer."""

    def init(self, parameters: Mapping[str, Tensor]) -> State:
        """The rule's state at the start: numbers and tensors only, it goes into the checkpoint."""
        ...

    def update(
        self, parameters: Mapping[str, Tensor], estimate: Estimate, learning_rate: float, state: State
    ) -> State:
        """Moves the parameters in place and returns the new state."""
        ...


@dataclass(frozen=True)
class ZOSGD:
    """Plain descent: W <- (1 - η wd) W - (η / q) sum_j g_j z_j, one pass over the weights for all q directions.

    Args:
        weight_decay: decoupled, as in AdamW; biases and norm weights (parameters with fewer than two dimensions) are
            not decayed.

    Examples:
        >>> w = {"w": torch.zeros(3)}
        >>> _ = ZOSGD().update(w, Estimate(0, 0, (2.0,)), learning_rate=0.1, state={})
        >>> torch.allclose(w["w"], -0.2 * noise.normal(noise.stream_key(0, 0, 0, "w"), 0, 3), rtol=1e-4)
        True

    References:
        S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023).
    """

    weight_decay: float = 0.0

    def init(self, parameters: Mapping[str, Tensor]) -> State:
        return {}

    @torch.no_grad()
    def update(
        self, parameters: Mapping[str, Tensor], estimate: Estimate, learning_rate: float, state: State
    ) -> State:
        sums: list[noise.Sum] = []
        for name, parameter in parameters.items():
            keep = 1 - learning_rate * self.weight_decay if parameter.ndim >= 2 else 1.0
            exact = parameter.dtype == torch.float32
            rounding_key = None if exact else noise.stream_key(estimate.seed, estimate.step, -1, name)
            terms = estimate.terms(name, -learning_rate)
            limit = estimate.limits.get(name, math.inf)
            sums.append(noise.Sum(parameter, parameter, terms, 0, keep, limit, rounding_key))
        noise.write_sums(sums, estimate.distribution)
        return state


@dataclass(frozen=True)
class AutomaticZOSGD(ZOSGD):
    """`ZOSGD` that finds its own rate, so that no model needs one to be guessed.

        η = q min( 1.5 ε / rms(g),  0.15 / median|h| )

    The first bound moves the weights along each direction by 1.5 ε on average, about the distance at which the losses
    were measured, whatever the scale of the loss. The second keeps to 0.15 / tr(H), where 1 / tr(H) is the best step
    on a quadratic without batch noise: it holds where the loss is so curved that ε is too far. The root mean square
    runs along and includes the newest value, so one outlier moves the weights by less than 4.8 ε; the median is of the
    last nine curvatures, which have outliers too. `learning_rate` multiplies η: it is 1, or what a schedule makes of
    it.

    Args:
        weight_decay: as in `ZOSGD`.
        eps: ε of the estimates.

    Examples:
        >>> w, rule = {"w": torch.zeros(3)}, AutomaticZOSGD(eps=2.0**-10)
        >>> state = rule.update(w, Estimate(0, 0, (-7.0,)), learning_rate=1.0, state=rule.init(w))
        >>> torch.allclose(w["w"], 1.5 * 2.0**-10 * noise.normal(noise.stream_key(0, 0, 0, "w"), 0, 3), rtol=1e-4)
        True

    References:
        The normalisation by a scalar second moment of g is that of MEAZO (arXiv 2605.03869) and of normalised descent.
    """

    eps: float = 1e-3

    def init(self, parameters: Mapping[str, Tensor]) -> State:
        return {"total": 0.0, "weight": 0.0, "curvatures": [], "rate": 0.0}

    def wants_curvature(self, step: int, state: State) -> bool:
        """Whether this step should measure h: some of the first, then one in ten."""
        return len(state["curvatures"]) < _FIRST_CURVATURES or step % CURVATURE_EVERY == 0

    def update(
        self, parameters: Mapping[str, Tensor], estimate: Estimate, learning_rate: float, state: State
    ) -> State:
        queries = len(estimate.projected)
        total = _MEMORY * state["total"] + (1 - _MEMORY) * sum(g * g for g in estimate.projected) / queries
        weight = _MEMORY * state["weight"] + 1 - _MEMORY
        newest = [] if estimate.curvature is None else [abs(estimate.curvature)]
        curvatures = [*state["curvatures"], *newest][-_KEPT_CURVATURES:]
        scales = [(REACH * self.eps, math.sqrt(total / weight)), (_CAUTION, statistics.median(curvatures or [0.0]))]
        bounds = [factor / scale for factor, scale in scales if scale > 0]  # what is flat so far says nothing
        rate = learning_rate * queries * min(bounds, default=0.0)
        super().update(parameters, estimate, rate, state)
        return {"total": total, "weight": weight, "curvatures": curvatures, "rate": rate}


class ZerothOrderOptimizer(Optimizer):
    """A zeroth-order rule as a torch optimizer. Set `estimate` before `step`; without one a step does nothing.

    Args:
        parameters: name -> tensor; none of them ever gets a `.grad`.
        rule: how they move.
        lr: the learning rate, in the group like any optimizer's, so that schedulers can change it.
        limits: name -> the |W| above which a parameter's weights stay; part of the state.

    Examples:
        >>> optimizer = ZerothOrderOptimizer({"w": torch.zeros(3)}, ZOSGD(), lr=0.1)
        >>> optimizer.estimate = Estimate(seed=0, step=0, projected=(1.0,))
        >>> optimizer.step()
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rule: ZerothOrderRule,
        lr: float,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(list(parameters.items()), {"lr": lr})
        self.rule = rule
        self.estimate: Estimate | None = None
        self.param_groups[0]["rule_state"] = rule.init(parameters)
        self.param_groups[0]["limits"] = dict(limits or {})

    @property
    def rate(self) -> float:
        """The rate of the last step, or of the first one where the learning rate is given."""
        group = self.param_groups[0]
        return group["rule_state"].get("rate", group["lr"])

    @property
    def limits(self) -> dict[str, float]:
        """Name -> the |W| above which a parameter's weights stay."""
        return self.param_groups[0]["limits"]

    def wants_curvature(self, step: int) -> bool:
        """Whether the estimate of a step should come with a curvature."""
        state = self.param_groups[0]["rule_state"]
        return isinstance(self.rule, AutomaticZOSGD) and self.rule.wants_curvature(step, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the losses were evaluated before the step"
        if self.estimate is None:
            return
        group = self.param_groups[0]
        named = dict(zip(group["param_names"], group["params"], strict=True))
        group["rule_state"] = self.rule.update(named, self.estimate, group["lr"], group["rule_state"])
        self.estimate = None


class JointOptimizer(Optimizer):
    """Several optimizers with one `step`, one list of groups and one state.

    Args:
        members: name -> optimizer, in the order of their groups.
        stepped: the members that `step` moves; the others are stepped by whoever owns them.

    Examples:
        >>> w, v = torch.zeros(1, requires_grad=True), torch.zeros(1)
        >>> sgd, zo = torch.optim.SGD([w], lr=1.0), ZerothOrderOptimizer({"v": v}, ZOSGD(), lr=0.1)
        >>> [group["lr"] for group in JointOptimizer({"fo": sgd, "zo": zo}, ("fo", "zo")).param_groups]
        [1.0, 0.1]
    """

    def __init__(self, members: Mapping[str, Optimizer], stepped: tuple[str, ...]) -> None:
        # Not super().__init__(): groups and state belong to the members, whose load_state_dict replaces both.
        self.members = dict(members)
        self.stepped = stepped
        self.defaults = {"lr": next(iter(self.members.values())).defaults["lr"]}  # some schedules end in parts of it

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [group for member in self.members.values() for group in member.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {key: value for member in self.members.values() for key, value in member.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name in self.stepped:
            self.members[name].step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members.values():
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state_dict[name])
