"""First-order meta-training of an adapter over tasks: Reptile, and MAML without second derivatives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo.keys import FIRST_ORDER_KEYS, SHARED, STEP_KEYS, Keys
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.first_order_optimizers import first_order_optimizer
from zofo.methods.method import Bundle, Logs, Method, Stream, Work, batches
from zofo.models.peft import UPPER
from zofo.zo.optimizers import JointOptimizer


class _Meta(Method, ABC):
    """Inner steps on one task from the shared adapter φ, which an outer step then moves; θ stays."""

    requires_adapter = True
    backpropagates = True
    keys_used = STEP_KEYS | FIRST_ORDER_KEYS | {"upper_learning_rate", "lower_steps"}

    inner: FirstOrderLevel
    outer: Optimizer

    def __post_init__(self) -> None:
        keys = self.keys
        self.inner = FirstOrderLevel(self.adapted, self.scorer, UPPER, keys.learning_rate, keys)
        self.outer = self._outer()
        self.optimizer = JointOptimizer({"lower": self.inner.optimizer, "upper": self.outer}, stepped=("upper",))

    @abstractmethod
    def _outer(self) -> Optimizer:
        """The optimizer of φ."""

    @contextmanager
    def _adapted_to_a_task(self, number: int, micro: Sequence[Bundle]) -> Generator[list[float]]:
        """Within the block, the adapter is φ after T inner steps, whose losses it gives; after it, φ again.

        The inner optimizer starts afresh for each task.
        """
        start = [p.detach().clone() for p in self.inner.parameters]
        outer = [p.grad for p in self.inner.parameters]  # of the tasks before
        losses: list[float] = []
        try:
            for parameter in self.inner.parameters:
                parameter.grad = None
            for t in range(self.keys.lower_steps):
                losses.append(self.inner.gradient(batches(micro, "lower", t), f"step {number}: inner step {t}"))
                self.inner.step()
            yield losses
        finally:
            with torch.no_grad():
                for parameter, value, gradient in zip(self.inner.parameters, start, outer, strict=True):
                    parameter.copy_(value)
                    parameter.grad = _sum(gradient, parameter.grad)
            self.inner.optimizer.state.clear()

    def learning_rates(self) -> Mapping[str, float]:
        return {"upper_learning_rate": self.outer.param_groups[0]["lr"]}


class Reptile(_Meta):
    """Moves φ towards what T steps make of it:  φ <- φ + η mean over tasks of (φ_T - φ).

    References:
        A. Nichol et al., "On First-Order Meta-Learning Algorithms" (arXiv 1803.02999), Algorithm 2.
    """

    name = "reptile"
    summary = "Reptile: an adapter that moves towards what a few steps on each task make of it"
    upper_rate = 1.0

    def _outer(self) -> Optimizer:
        assert self.keys.upper_learning_rate is not None
        return _Towards(self.inner.parameters, self.keys.upper_learning_rate)

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return {"lower": Stream("train", keys.lower_steps, order=0)}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        return Work(backwards=keys.gradient_accumulation_steps * keys.lower_steps, updates=keys.lower_steps)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        start = [p.detach().clone() for p in self.inner.parameters]
        with self._adapted_to_a_task(number, micro) as losses:
            ends = [p.detach().clone() for p in self.inner.parameters]
        assert isinstance(self.outer, _Towards)
        self.outer.add([end - begin for end, begin in zip(ends, start, strict=True)])
        return {"loss": sum(losses) / len(losses)}


class FirstOrderMAML(_Meta):
    """Descends each task's loss after T steps, as if these were a constant:  g = mean over tasks of grad L(φ_T).

    References:
        C. Finn et al., "Model-Agnostic Meta-Learning" (arXiv 1703.03400), section 5.2, the first-order approximation.
    """

    name = "fomaml"
    summary = "first-order MAML: an adapter that is good after a few steps on each task"
    keys_used = _Meta.keys_used | {"lower_fraction"}

    def _outer(self) -> Optimizer:
        assert self.keys.upper_learning_rate is not None
        return first_order_optimizer(self.inner.parameters, self.keys.upper_learning_rate, self.keys)

    @classmethod
    def splits(cls, keys: Keys) -> tuple[str, ...]:
        return ("train",) if keys.lower_fraction == SHARED else ("lower", "upper")

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        splits = cls.splits(keys)
        return {"lower": Stream(splits[0], keys.lower_steps, order=0), "upper": Stream(splits[-1], 1, order=2)}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        return Work(backwards=keys.gradient_accumulation_steps * (keys.lower_steps + 1), updates=keys.lower_steps + 1)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        with self._adapted_to_a_task(number, micro) as losses:
            loss = self.inner.gradient(batches(micro, "upper"), f"step {number}: the loss after the inner steps")
        return {"loss": loss, **({"lower_loss": sum(losses) / len(losses)} if losses else {})}


class _Towards(Optimizer):
    """w <- w + η mean of the displacements that were added since the last step."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self._added: list[list[Tensor]] = []

    def add(self, displacements: list[Tensor]) -> None:
        self._added.append(displacements)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._added = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter, moves in zip(group["params"], zip(*self._added, strict=True), strict=bool(self._added)):
                parameter.add_(sum(moves), alpha=group["lr"] / len(moves))
        self._added = []


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of gradients that may not be there."""
    return second if first is None else first if second is None else first + second
