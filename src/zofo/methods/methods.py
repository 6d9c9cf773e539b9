"""The methods: one small class each. The trainer asks one for a step and knows nothing of its inside.

A method reads batches, leaves gradients (first order) or an estimate (zeroth order) in its optimizer, and returns
what to log. The trainer then clips the gradients and steps the optimizer, once per iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.optim import Optimizer

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.levels import FirstOrderLevel, ZerothOrderLevel, mean_losses, random_state
from zofo.models.adapters import LOWER, UPPER, AdaptedModel
from zofo.models.selection import select
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer
from zofo.training.bundles import Bundle, Plan, Stream
from zofo.zo.bilevel import Penalty, Terms, bilevel_step, scheduled_penalty
from zofo.zo.estimators import Evaluate
from zofo.zo.optimizers import JointOptimizer

Logs = dict[str, float]


class Method(ABC):
    """What the trainer sees of a method.

    Attributes:
        plan: the batches of one iteration.
        optimizer: what the trainer steps, schedules and stores.
    """

    plan: Plan
    optimizer: Optimizer

    @abstractmethod
    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        """Prepares an iteration; "loss" is among what it returns.

        Args:
            number: of the iteration, from 0.
            progress: share of the run that is done, in [0, 1).
            micro: the bundles of its micro-steps.

        Raises:
            NonFiniteLossError: if a loss is not finite.
        """

    @abstractmethod
    def skip(self) -> None:
        """Forgets what `step` prepared, so that the optimizer's next step moves nothing."""


class FirstOrder(Method):
    """Backpropagation: FO-PEFT with an adapter, full fine-tuning without."""

    def __init__(self, adapted: AdaptedModel, scorer: Scorer, args: ZOFOConfig) -> None:
        self.plan = Plan(lower=1)
        self._level = FirstOrderLevel(adapted, scorer, UPPER, args.learning_rate, args)
        self.optimizer = self._level.optimizer

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        return {"loss": self._level.gradient(_batches(micro, "lower"), f"step {number}: the training loss")}

    def skip(self) -> None:
        self._level.clear()


class ZerothOrder(Method):
    """Forward passes only: MeZO on the backbone; MeZO (LoRA) and the like on an adapter.

    Args:
        adapted: the model.
        scorer: runs its batches.
        args: the configuration.
        backbone: move the backbone even if there is an adapter.
    """

    def __init__(self, adapted: AdaptedModel, scorer: Scorer, args: ZOFOConfig, backbone: bool = False) -> None:
        self.plan = Plan(upper=1)
        self._scorer = scorer
        whole = backbone or not adapted.adapters
        moved = moved_backbone(adapted, args) if whole else adapted.adapter_parameters(UPPER)
        self._level = ZerothOrderLevel(adapted, moved, args)
        self.optimizer = self._level.optimizer

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        batches = _batches(micro, "upper")
        losses: list[float] = []

        def evaluate(scale: float, query: int) -> float:
            with self._level.perturbed(number, scale, query):
                losses.extend(mean_losses(self._scorer, {f"step {number}: the loss near θ": (UPPER, batches)}))
            return losses[-1]

        size = self._level.accept(number, self._level.project(number, evaluate))
        return {"loss": sum(losses) / len(losses), "projected_grad": size}

    def skip(self) -> None:
        self._level.clear()


class TwoStage(Method):
    """First the adapter by backpropagation; then the backbone by forward passes, with the adapter fixed."""

    def __init__(self, adapted: AdaptedModel, scorer: Scorer, args: ZOFOConfig) -> None:
        self.plan = Plan(lower=1, upper=1)
        self._switch = args.two_stage_fraction
        self._stages = (FirstOrder(adapted, scorer, args), ZerothOrder(adapted, scorer, args, backbone=True))
        members = {"lower": self._stages[0].optimizer, "zo": self._stages[1].optimizer}
        self.optimizer = JointOptimizer(members, stepped=("lower", "zo"))

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        return self._stages[progress >= self._switch].step(number, progress, micro)

    def skip(self) -> None:
        for stage in self._stages:
            stage.skip()


class Bilevel(Method):
    """Bilevel ZOFO: T first-order steps on s; then p by backpropagation and θ by forward passes, at one point."""

    def __init__(self, adapted: AdaptedModel, scorer: Scorer, args: ZOFOConfig) -> None:
        assert args.upper_learning_rate is not None
        self.plan = Plan(lower=args.lower_steps, penalty=int(args.penalty > 0), upper=1)
        self._args = args
        self.scorer = scorer
        self.s = FirstOrderLevel(adapted, scorer, LOWER, args.learning_rate, args)
        self.p = FirstOrderLevel(adapted, scorer, UPPER, args.upper_learning_rate, args)
        self._before: tuple[list[Tensor], dict[str, Any]] | None = None
        self.theta = ZerothOrderLevel(adapted, moved_backbone(adapted, args), args)
        members = {"lower": self.s.optimizer, "upper": self.p.optimizer, "zo": self.theta.optimizer}
        self.optimizer = JointOptimizer(members, stepped=("upper", "zo"))

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        strength = scheduled_penalty(self._args.penalty, self._args.penalty_schedule, progress)
        if self._args.on_nonfinite == "skip":
            self._before = self.s.snapshot()
        iteration = _Iteration(self, number, micro, Penalty(strength, self._args.normalize_penalty))
        found = bilevel_step(
            self.plan.lower,
            iteration.lower_step,
            iteration.upper_gradient,
            iteration.evaluate,
            iteration.penalty,
            self._project(number),
        )
        logs = {"loss": found.upper.upper, "projected_grad": self.theta.accept(number, found.projected)}
        if found.lower:
            logs["lower_loss"] = sum(found.lower) / len(found.lower)
        if self.plan.penalty:
            logs["penalty_gap"] = iteration.gap
        return logs

    def _project(self, number: int) -> Callable[[Evaluate], tuple[float, ...]]:
        def project(evaluate: Evaluate) -> tuple[float, ...]:
            projected = self.theta.project(number, evaluate)
            self.theta.release()
            return projected

        return project

    def skip(self) -> None:
        for level in (self.s, self.p, self.theta):
            level.clear()
        if self._before is not None:
            self.s.restore(self._before)  # the lower steps of a skipped iteration are taken back as well


class _Iteration:
    """The callables of one bilevel step on a language model."""

    def __init__(self, method: Bilevel, number: int, micro: Sequence[Bundle], penalty: Penalty) -> None:
        self.penalty = penalty
        self.gap = 0.0
        self._method = method
        self._number = number
        self._lower = [_batches(micro, "lower", t) for t in range(method.plan.lower)]
        self._penalty_batches = _batches(micro, "penalty") if method.plan.penalty else []
        self._upper = _batches(micro, "upper")
        self._at_theta: Terms | None = None

    def lower_step(self, t: int) -> float:
        loss = self._method.s.gradient(self._lower[t], f"step {self._number}: G(θ, s) of lower step {t}")
        self._method.s.step()
        return loss

    def upper_gradient(self) -> Terms:
        before = random_state()
        of_upper, of_coupling = self.penalty.factors
        upper = self._method.p.gradient(self._upper, f"step {self._number}: F(θ, p)", of_upper)
        coupled = 0.0
        if self._penalty_batches:
            coupled = self._method.p.gradient(self._penalty_batches, f"step {self._number}: G(θ, p)", of_coupling)
        terms = Terms(upper, coupled)
        if all(map(torch.equal, before, random_state())):
            self._at_theta = terms  # no dropout: the same numbers as in eval mode
        return terms

    def evaluate(self, scale: float, query: int) -> Terms:
        known = self._at_theta if scale == 0 else None
        terms = {} if known else {"F(θ, p)": (UPPER, self._upper), "G(θ, p)": (UPPER, self._penalty_batches)}
        terms["G(θ, s)"] = (LOWER, self._penalty_batches)
        named = {f"step {self._number}: {term} near θ": given for term, given in terms.items() if given[1]}
        with self._method.theta.perturbed(self._number, scale, query):
            losses = mean_losses(self._method.scorer, named)
        found = Terms(known.upper, known.upper_penalty, *losses) if known else Terms(*losses)
        self.gap = found.upper_penalty - found.lower_penalty
        return found


def make_method(adapted: AdaptedModel, scorer: Scorer, args: ZOFOConfig) -> Method:
    """The method that the key `method` names."""
    match args.method:
        case "bilevel":
            return Bilevel(adapted, scorer, args)
        case "two_stage":
            return TwoStage(adapted, scorer, args)
        case "zo":
            return ZerothOrder(adapted, scorer, args)
        case "fo" | "none":
            return FirstOrder(adapted, scorer, args)


def moved_backbone(adapted: AdaptedModel, args: ZOFOConfig) -> dict[str, Tensor]:
    """The backbone's weights that the zeroth-order level moves."""
    if any(isinstance(module, ParamWrapper) for module in adapted.model.modules()):
        raise ZofoError(
            "this LoRA config targets parameters that are no modules (fused experts), whose adapter writes the "
            "backbone in each forward: give target_modules that are linear layers, such as q_proj and v_proj"
        )
    return select(adapted.base, adapted.movable, args.zo_parameters or (), args.zo_exclude or (), args.zo_layers)


def _batches(micro: Sequence[Bundle], stream: Stream, index: int = 0) -> list[Batch]:
    """Batch `index` of a stream from every micro-step."""
    return [bundle[stream][index] for bundle in micro]
