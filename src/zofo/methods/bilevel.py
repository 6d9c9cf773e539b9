"""Bilevel ZOFO on a language model: the callables that `zo/bilevel.py` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from zofo.keys import (
    COUPLING_KEYS,
    FIRST_ORDER_KEYS,
    INFINITE,
    LOSS,
    OBJECTIVE_KEYS,
    SHARED,
    STEP_KEYS,
    ZEROTH_ORDER_KEYS,
    Keys,
)
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.method import Bundle, Logs, Method, Part, Stream, Work, batches, by_stream
from zofo.methods.signal import contributions
from zofo.methods.zeroth_order_level import ZerothOrderLevel, evaluations, root_mean_square
from zofo.models.below import Below
from zofo.models.peft import LOWER, UPPER
from zofo.scoring.batch import Batch
from zofo.zo.bilevel import Losses, Penalty, bilevel_step, scheduled_penalty
from zofo.zo.estimators import Measure, Point
from zofo.zo.optimizers import JointOptimizer


class Bilevel(Method):
    """T first-order steps on s; then p by backpropagation and θ by forward passes, at one point.

    References:
        R. Shirkavand et al., "Bilevel ZOFO" (arXiv 2502.03604), Algorithm 2.
    """

    name = "bilevel"
    summary = "Bilevel ZOFO: the backbone updated by forward passes only, beside adapters trained by backpropagation"
    adapters = (UPPER, LOWER)
    requires_adapter = True
    updates_both = True
    backpropagates = True
    zeroth_order = True
    freezes = True
    keys_used = STEP_KEYS | FIRST_ORDER_KEYS | ZEROTH_ORDER_KEYS | COUPLING_KEYS | OBJECTIVE_KEYS

    def __post_init__(self) -> None:
        keys, model = self.keys, (self.adapted, self.scorer)
        assert keys.upper_learning_rate is not None
        rates = (keys.learning_rate, keys.upper_learning_rate)
        self.s = FirstOrderLevel(*model, LOWER, rates[0], keys, remedy="learning_rate or zo_learning_rate")
        self.p = FirstOrderLevel(*model, UPPER, rates[1], keys, remedy="upper_learning_rate or zo_learning_rate")
        self._before: tuple[list[Tensor], dict[str, Any]] | None = None
        self.theta = ZerothOrderLevel(self.adapted, self.perturbed(self.adapted, keys), keys)
        members = {"lower": self.s.optimizer, "upper": self.p.optimizer, "zo": self.theta.optimizer}
        self.optimizer = JointOptimizer(members, stepped=("upper", "zo"))

    @classmethod
    def form_for(cls, keys: Keys) -> type[Bilevel]:
        return InfinitePenalty if keys.penalty == INFINITE else cls

    @classmethod
    def splits(cls, keys: Keys) -> tuple[str, ...]:
        return ("train",) if keys.lower_fraction == SHARED else ("lower", "upper")

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        splits = cls.splits(keys)
        return {
            "lower": lower_stream(keys, splits[0]),
            "penalty": Stream(splits[0], int(_weight(keys) > 0), order=1, counts=False),
            "upper": upper_stream(keys, splits[-1]),
        }

    @classmethod
    def work(cls, keys: Keys) -> Work:
        micro, moves = keys.gradient_accumulation_steps, int(keys.zo_learning_rate != 0)
        coupled = int(_weight(keys) > 0)
        return Work(
            backwards=micro * (keys.lower_steps + int(keys.objective == LOSS) + coupled),
            resumed=micro * (keys.lower_steps - cls.streams(keys)["lower"].batches),
            updates=keys.lower_steps + 1,
            forwards=moves * micro * (evaluations(keys) + 2 * coupled * evaluations(keys, shaped=False)),
            zo_updates=moves,
        )

    @property
    def adapter_levels(self) -> tuple[FirstOrderLevel, ...]:
        return self.s, self.p

    @property
    def zeroth_order_level(self) -> ZerothOrderLevel | None:
        return self.theta if self.moves else None

    @property
    def moves(self) -> bool:
        """Whether θ is updated."""
        return self.keys.zo_learning_rate != 0

    @property
    def trains_adapters(self) -> bool:
        """Whether an iteration is worth something while θ rests."""
        return self.keys.lower_steps > 0 or self.keys.upper_learning_rate != 0

    def propose(self, number: int, measure: Measure) -> tuple[float, ...]:
        """Estimates θ's gradient, if a loss near θ is worth a forward pass: the projected gradients, or none."""
        if not self.moves or (self.trains_adapters and self.theta.rests(number)):
            return ()
        projected = self.theta.propose(number, measure, at_once=self.black_box is not None)
        self.theta.release()
        return projected

    @property
    def has_gradient(self) -> bool:
        """Whether p follows F by backpropagation."""
        return self.black_box is None or self.black_box.has_gradient

    def objective(self, progress: float) -> tuple[Part, ...]:
        return _parts(self._penalty(progress), coupled=_weight(self.keys) > 0)

    def _penalty(self, progress: float) -> Penalty:
        keys = self.keys
        return Penalty(scheduled_penalty(_weight(keys), keys.penalty_schedule, progress), keys.normalize_penalty)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        keys = self.keys
        if keys.on_nonfinite == "skip":
            self._before = self.s.snapshot()
        iteration = _Iteration(self, number, micro, self._penalty(progress))
        found = bilevel_step(
            keys.lower_steps,
            _LowerSteps(self, number, micro),
            iteration.upper_gradient,
            iteration.evaluate,
            iteration.penalty,
            partial(self.propose, number),
        )
        logs = {"loss": found.upper.upper if self.has_gradient else found.upper.upper_penalty}
        if found.projected:
            logs["projected_grad"] = root_mean_square(found.projected)
        if found.lower:
            logs["lower_loss"] = sum(found.lower) / len(found.lower)
        if found.projected and _weight(keys) > 0:
            logs["penalty_gap"] = iteration.gap
        if self.black_box:
            logs = {**self.black_box.taken(), **logs}
        return logs

    def require_forwards(self, batch: Batch) -> None:
        if self.moves:
            self.theta.require_groups(self.scorer, self.adapters, batch)
        if self.work(self.keys).resumed:
            self.s.require_below(batch)

    def skip(self) -> None:
        super().skip()
        if self._before is not None:
            self.s.restore(self._before)  # the lower steps of a skipped iteration are taken back as well
            self._before = None

    def learning_rates(self) -> Mapping[str, float]:
        upper = self.p.optimizer.param_groups[0]["lr"]
        return {"upper_learning_rate": upper, **self.theta.rates()}


class InfinitePenalty(Bilevel):
    """λ towards infinity, where p must be s: one adapter, and θ's estimate is of F(θ, s) alone.

        min over θ of F(θ, s(θ)),   s(θ) in argmin_s G(θ, s)      with s held fixed in the estimate

    T first-order steps on s; then θ by forward passes of F. Two forwards a direction where the finite penalty takes
    six, no adapter beside the one that is deployed, and no first-order step but those on s.
    """

    summary = "Bilevel ZOFO, λ infinite: the backbone updated by forward passes, beside one adapter by backpropagation"
    adapters = (UPPER,)
    keys_used = Bilevel.keys_used - {"upper_learning_rate", "penalty_schedule", "normalize_penalty"}

    def __post_init__(self) -> None:
        keys = self.keys
        remedy = "learning_rate or zo_learning_rate"
        self.s = FirstOrderLevel(self.adapted, self.scorer, UPPER, keys.learning_rate, keys, remedy)
        self._before: tuple[list[Tensor], dict[str, Any]] | None = None
        self.theta = ZerothOrderLevel(self.adapted, self.perturbed(self.adapted, keys), keys)
        self.optimizer = JointOptimizer({"lower": self.s.optimizer, "zo": self.theta.optimizer}, stepped=("zo",))

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        splits = cls.splits(keys)
        return {"lower": lower_stream(keys, splits[0]), "upper": upper_stream(keys, splits[-1])}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        micro, moves = keys.gradient_accumulation_steps, int(keys.zo_learning_rate != 0)
        return Work(
            backwards=micro * keys.lower_steps,
            resumed=micro * (keys.lower_steps - cls.streams(keys)["lower"].batches),
            updates=keys.lower_steps,
            forwards=moves * micro * evaluations(keys),
            zo_updates=moves,
        )

    @property
    def adapter_levels(self) -> tuple[FirstOrderLevel, ...]:
        return (self.s,)

    @property
    def trains_adapters(self) -> bool:
        return self.keys.lower_steps > 0

    def objective(self, progress: float) -> tuple[Part, ...]:
        return (Part("upper", UPPER),)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        if self.keys.on_nonfinite == "skip":
            self._before = self.s.snapshot()
        take = _LowerSteps(self, number, micro)
        lower = [take(t) for t in range(self.keys.lower_steps)]
        asked = {f"step {number}: F(θ, s) near θ": (UPPER, batches(micro, "upper"))}
        near: list[float] = []

        def measure(points: Sequence[Point]) -> list[float]:
            if self.black_box:
                return self.black_box.measure(self.theta, number, points, UPPER, batches(micro, "upper"))
            found = self.theta.losses(self.scorer, number, points, asked, lambda rows: {"upper": rows[0]})
            near.extend(loss for (loss,) in found)
            return near[-len(points) :]

        projected = self.propose(number, measure)
        measured = self.black_box.taken() if self.black_box else {"loss": sum(near) / len(near)} if near else {}
        logs = {**measured, "loss": sum(lower) / len(lower) if lower else measured["loss"]}
        if projected:
            logs |= {"projected_grad": root_mean_square(projected), "upper_loss": measured["loss"]}
        return logs

    def learning_rates(self) -> Mapping[str, float]:
        return self.theta.rates()


def lower_stream(keys: Keys, split: str) -> Stream:
    """The batches of the T steps on s."""
    return Stream(split, min(keys.lower_steps, keys.lower_pool or keys.lower_steps), order=0)


def upper_stream(keys: Keys, split: str) -> Stream:
    """The batch of F, whose rows count for the length of an epoch where the lower steps do not learn the same loss."""
    return Stream(split, 1, order=2, counts=not keys.lower_steps or keys.objective != LOSS)


def _weight(keys: Keys) -> float:
    """λ."""
    return cast(float, keys.penalty)


def _parts(penalty: Penalty, coupled: bool) -> tuple[Part, ...]:
    """Of L: F(θ, p), G(θ, p) and G(θ, s)."""
    of_upper, of_coupling = penalty.factors
    coupling = (Part("penalty", UPPER, of_coupling), Part("penalty", LOWER, -of_coupling))
    return (Part("upper", UPPER, of_upper), *(coupling if coupled else ()))


class _LowerSteps:
    """The T steps on s of one iteration."""

    def __init__(self, method: Bilevel, number: int, micro: Sequence[Bundle]) -> None:
        self._method, self._number = method, number
        pool = method.streams(method.keys)["lower"].batches
        self._batches = [batches(micro, "lower", t) for t in range(pool)]
        self._kept = [[Below() for _ in part] for part in self._batches] if pool < method.keys.lower_steps else []

    def __call__(self, t: int) -> float:
        label, place = f"step {self._number}: G(θ, s) of lower step {t}", t % len(self._batches)
        kept = self._kept[place] if self._kept else ()
        loss = self._method.s.gradient(self._batches[place], label, below=kept)
        if t + 1 == self._method.keys.lower_steps:
            self._kept = []  # hidden states of a pool: the rest of the iteration needs its memory
        self._method.s.step()
        return loss


class _Iteration:
    """The callables of one iteration."""

    def __init__(self, method: Bilevel, number: int, micro: Sequence[Bundle], penalty: Penalty) -> None:
        self.penalty = penalty
        self._parts = _parts(penalty, coupled=_weight(method.keys) > 0)
        self.gap = 0.0
        self._method = method
        self._black_box = method.black_box
        self._number = number
        self._penalty_batches = batches(micro, "penalty")
        self._upper = batches(micro, "upper")
        self._at_theta: Losses | None = None
        self._rows_at_theta: list[Tensor] = []  # where they are noted, of F(θ, p) and G(θ, p)

    def upper_gradient(self) -> Losses:
        before = _random_state()
        of_upper, of_coupling = self.penalty.factors
        upper = self._p_gradient(self._upper, "F(θ, p)", of_upper) if self._method.has_gradient else 0.0
        coupled = self._p_gradient(self._penalty_batches, "G(θ, p)", of_coupling) if self._penalty_batches else 0.0
        losses = Losses(upper, coupled)
        if all(map(torch.equal, before, _random_state())):
            self._at_theta = losses  # no dropout: the same numbers as in eval mode
        return losses

    def _p_gradient(self, batches: Sequence[Batch], label: str, factor: float) -> float:
        with self._method.scorer.noting_rows(self._method.theta.notes_rows) as shares:
            loss = self._method.p.gradient(batches, f"step {self._number}: {label}", factor)
        if shares:
            self._rows_at_theta.append(contributions(shares, batches))
        return loss

    def evaluate(self, points: Sequence[Point]) -> list[Losses]:
        """At θ, where its losses over all rows are known, only G(θ, s) is measured."""
        known = None if self._method.theta.probes.own else self._at_theta
        at_theta = [point for point in points if known and point[0] == 0]
        near = [point for point in points if point not in at_theta]
        losses = dict(zip([*near, *at_theta], [*self._losses(near, None), *self._losses(at_theta, known)], strict=True))
        found = [losses[point] for point in points]
        if self._black_box:
            values = self._black_box.measure(self._method.theta, self._number, points, UPPER, self._upper)
            found = [replace(each, upper=value) for each, value in zip(found, values, strict=True)]
        self.gap = sum(each.upper_penalty - each.lower_penalty for each in found) / len(found)
        return found

    def _losses(self, points: Sequence[Point], known: Losses | None) -> list[Losses]:
        upper = [] if self._black_box else self._upper  # which measures F itself
        asked = {} if known else {"F(θ, p)": (UPPER, upper), "G(θ, p)": (UPPER, self._penalty_batches)}
        asked["G(θ, s)"] = (LOWER, self._penalty_batches)
        named = {f"step {self._number}: {label} near θ": pair for label, pair in asked.items() if pair[1]}
        if not points:
            return []
        first = [known.upper, known.upper_penalty] if known else [0.0] if self._black_box else []
        if self._black_box and not named:  # F is measured elsewhere, and nothing is coupled to it
            return [Losses(*first) for _ in points]
        before = self._rows_at_theta if known else []
        level, scorer = self._method.theta, self._method.scorer
        each = level.losses(scorer, self._number, points, named, lambda rows: by_stream(self._parts, [*before, *rows]))
        return [Losses(*first, *found) for found in each]


def _random_state() -> list[Tensor]:
    """The global random state of torch, on the CPU and on the accelerator, if there is one: what dropout advances."""
    accelerator = [torch.get_device_module().get_rng_state()] if torch.accelerator.is_available() else []
    return [torch.get_rng_state(), *accelerator]
