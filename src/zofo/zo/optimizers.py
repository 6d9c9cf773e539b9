"""Torch optimizers for zeroth-order rules: schedulers and checkpoints treat them like any other. Only they write θ."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from zofo import noise
from zofo.noise import Distribution, Sum, Term, stream_key
from zofo.zo import low_rank
from zofo.zo.estimators import Estimate, Evaluate
from zofo.zo.low_rank import Matrix
from zofo.zo.rules import Proposal, Rule, Update


@dataclass(frozen=True)
class Anchor:
    """What weights are drawn back to: `rate` of the way in each step, to what `read` gives by a weight's name."""

    rate: float
    read: Callable[[str], Tensor]

    def pull(self, name: str, parameter: Tensor, rounding_key: int | None) -> None:
        """W <- W + rate (W_0 - W), in float32; 16 bits are rounded stochastically."""
        if isinstance(parameter, FakeTensor):  # it has no values: `zofo estimate` counts its memory
            return
        start = self.read(name).to(parameter.device, torch.float32, copy=True)
        pulled = start.lerp_(parameter.float(), 1 - self.rate)
        noise.write_sums([Sum(pulled, parameter, [], rounding_key=rounding_key)])


class ZerothOrderOptimizer(Optimizer):
    """A zeroth-order rule as a torch optimizer: `propose`, then `step`. Without a proposal a step does nothing.

        W <- (1 - η wd) (W + c (W_0 - W)) + sum of scale z,   where |W| <= limit

    Args:
        parameters: name -> tensor; none ever gets a `.grad`. 16-bit ones are rounded stochastically.
        rule: says what is added.
        lr: η, in the group like any optimizer's, so that schedulers can change it.
        distribution: of the directions.
        rank: r > 0: those of matrices are A Bᵀ / sqrt(r), as in `perturbed`; 0: full rank.
        limits: name -> the |W| above which a parameter's weights stay; part of the state.
        weight_decay: wd, decoupled, as in AdamW; parameters with fewer than two dimensions (biases, norms) are exempt.
        anchor: c and W_0; nothing is drawn back if not given.

    Examples:
        >>> w = torch.zeros(3)
        >>> optimizer = ZerothOrderOptimizer({"w": w}, Rule(), lr=0.1)
        >>> _ = optimizer.propose(Estimate(seed=0, step=0, projected=(2.0,)))
        >>> optimizer.step()
        >>> torch.allclose(w, -0.2 * noise.normal(stream_key(0, 0, 0, "w"), 0, 3), rtol=1e-4)
        True
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rule: Rule,
        lr: float,
        *,
        distribution: Distribution = "normal",
        rank: int = 0,
        limits: Mapping[str, float] | None = None,
        weight_decay: float = 0.0,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__(list(parameters.items()), {"lr": lr})
        self.rule = rule
        self.distribution: Distribution = distribution
        self.rank = rank
        self.weight_decay = weight_decay
        self.anchor = anchor
        self.estimate: Estimate | None = None  # behind the proposal, if there is one
        self._proposed: Proposal = Update({}), {}
        self._group["rule_state"] = rule.init()
        self._group["limits"] = dict(limits or {})

    @property
    def _group(self) -> dict[str, Any]:
        return self.param_groups[0]

    @property
    def rate(self) -> float:
        """The learning rate: what the proposal uses, or the last step, where the rule finds it; else the given one."""
        return self._state.get("rate", self._group["lr"])

    @property
    def trust(self) -> float | None:
        """In [0, 1], how much of the learning rate the signal is worth; None where the rate is given."""
        return self._state.get("trust")

    @property
    def _state(self) -> Mapping[str, Any]:
        """Of the rule, as it is after the proposal, if there is one."""
        return self._group["rule_state"] if self.estimate is None else self._proposed[1]

    @property
    def limits(self) -> dict[str, float]:
        return self._group["limits"]

    def wants_curvature(self, step: int) -> bool:
        return self.rule.wants_curvature(step, self._group["rule_state"])

    @property
    def without_signal(self) -> bool:
        """Whether the estimates so far, with that of the proposal, tell that there is nothing to follow."""
        return self.rule.without_signal(dict(self._state))

    def rests(self, step: int) -> bool:
        return self.rule.rests(step, self._group["rule_state"])

    def propose(self, estimate: Estimate, evaluate: Evaluate | None = None) -> Update:
        """Asks the rule what the next `step` is to write; neither weights nor state change before it."""
        evaluate = evaluate or _nothing_to_evaluate
        self._proposed = self.rule.update(estimate, self._group["lr"], self._group["rule_state"], evaluate)
        self.estimate = estimate
        return self._proposed[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the proposal, which stands where other optimizers have gradients."""
        self.estimate = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the losses were evaluated before the step"
        estimate, self.estimate = self.estimate, None
        if estimate is None:
            return
        update, self._group["rule_state"] = self._proposed
        named = [*zip(self._group["param_names"], self._group["params"], strict=True)]
        if self.anchor and not self.without_signal:  # where there is nothing to follow, what was learned stays
            for name, parameter in named:
                self.anchor.pull(name, parameter, self._rounding_key(name, parameter, estimate, "anchor "))
        factored = [pair for pair in named if self.rank and low_rank.is_matrix(pair[1])]
        for name, matrix in factored:
            factors = Matrix(matrix, name, self.rank, self.distribution).factors(estimate.seed, update.scales)
            low_rank.update_(matrix, factors, self._keep(matrix), self._rounding_key(name, matrix, estimate))
        whole = [self._sum(name, p, estimate, update) for name, p in named if not (self.rank and low_rank.is_matrix(p))]
        noise.write_sums(whole, self.distribution)

    def _sum(self, name: str, parameter: Tensor, estimate: Estimate, update: Update) -> Sum:
        seed = estimate.seed
        terms = [Term(stream_key(seed, step, query, name), scale) for (step, query), scale in update.scales.items()]
        limit, rounding_key = self.limits.get(name, math.inf), self._rounding_key(name, parameter, estimate)
        return Sum(parameter, parameter, terms, 0, self._keep(parameter), limit, rounding_key)

    def _keep(self, parameter: Tensor) -> float:
        return 1 - self._group["lr"] * self.weight_decay if parameter.ndim >= 2 else 1.0

    def _rounding_key(self, name: str, parameter: Tensor, estimate: Estimate, part: str = "") -> int | None:
        return None if parameter.dtype == torch.float32 else stream_key(estimate.seed, estimate.step, -1, name, part)


def _nothing_to_evaluate(scale: float, query: int) -> float:
    raise ValueError("this rule evaluates the loss once more, but none was given to `propose`")


class JointOptimizer(Optimizer):
    """Several optimizers with one `step`, one list of groups and one state.

    Args:
        members: name -> optimizer, in the order of their groups.
        stepped: the members that `step` steps; the others are stepped by whoever owns them.

    Examples:
        >>> w, v = torch.zeros(1, requires_grad=True), torch.zeros(1)
        >>> members = {"fo": torch.optim.SGD([w], lr=1.0), "zo": ZerothOrderOptimizer({"v": v}, Rule(), lr=0.1)}
        >>> [group["lr"] for group in JointOptimizer(members, ("fo", "zo")).param_groups]
        [1.0, 0.1]
    """

    def __init__(self, members: Mapping[str, Optimizer], stepped: tuple[str, ...]) -> None:
        # Not super().__init__(): groups and state belong to the members, whose load_state_dict replaces both.
        self.members = dict(members)
        self.stepped = stepped
        self.defaults = {"lr": next(iter(self.members.values())).defaults["lr"]}  # some schedules end in a part of it

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
