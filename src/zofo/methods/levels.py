"""The two kinds of level that methods are made of: one moved by backpropagation, one by forward passes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError, first_line
from zofo.models.adapters import LOWER, AdaptedModel
from zofo.models.selection import magnitude_limits
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer, count
from zofo.zo import precision
from zofo.zo.buffers import Scratch
from zofo.zo.estimators import ESTIMATORS, Estimate, Evaluate, curvature
from zofo.zo.optimizers import REACH, ZOSGD, AutomaticZOSGD, ZerothOrderOptimizer
from zofo.zo.perturb import perturbed

logger = logging.getLogger(__name__)


class NonFiniteLossError(ZofoError):
    """A loss or gradient that is not finite; nothing has moved because of it."""


class FirstOrderLevel:
    """Parameters that backpropagation moves: an adapter, or the whole model where there is none.

    Args:
        adapted: the model.
        scorer: runs its batches.
        adapter: which adapter.
        learning_rate: of its optimizer.
        args: `optim` and its settings.
    """

    def __init__(
        self, adapted: AdaptedModel, scorer: Scorer, adapter: str, learning_rate: float, args: ZOFOConfig
    ) -> None:
        self._adapted = adapted
        self._scorer = scorer
        self._adapter = adapter
        self._args = args
        named = adapted.adapter_parameters(adapter) if adapted.adapters else adapted.backbone
        self._parameters = list(named.values())
        if (
            not adapted.adapters and args.method != "none"
        ):  # some kernels round otherwise where a gradient may be asked
            for parameter in self._parameters:
                parameter.requires_grad_(True)
        self.optimizer = _first_order_optimizer(self._parameters, learning_rate, args)

    def gradient(self, batches: Sequence[Batch], term: str, factor: float = 1.0) -> float:
        """Adds the gradient of `factor` times the mean loss over all batches to `.grad`; returns the mean loss.

        One batch at a time goes forward and backward, so memory is that of one. Train mode: dropout is on.

        Raises:
            NonFiniteLossError: if the loss or its gradient is not finite; the gradients are cleared.
        """
        self._adapted.use(self._adapter)
        self._adapted.model.train()
        total = sum(map(count, batches))
        loss = 0.0
        for batch in batches:
            part = self._scorer.loss(batch) / total
            loss += float(part.detach())
            self._require_finite(loss, term)
            (part * factor).backward()
            self._scorer.tokens.backward += int(batch["attention_mask"].sum())
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._require_finite(float(torch.nn.utils.get_total_norm(gradients)), f"{term} (its gradient)")
        return loss

    def step(self) -> None:
        """One optimizer step of its own, clipped as the trainer clips, for a level that the trainer does not step."""
        if self._args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._args.max_grad_norm)
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        """A copy of the parameters and of the optimizer's state."""
        return [p.detach().clone() for p in self._parameters], copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def restore(self, snapshot: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Back to a snapshot, bit for bit."""
        for parameter, value in zip(self._parameters, snapshot[0], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(snapshot[1])

    def _require_finite(self, value: float, term: str) -> None:
        if math.isfinite(value):
            return
        self.clear()
        rate = f"{'learning_rate' if self._adapter == LOWER else 'upper_learning_rate'} or zo_learning_rate"
        if self._args.method != "bilevel":
            rate = "learning_rate"
        raise NonFiniteLossError(f"{term} is {value}: lower {rate}, or set on_nonfinite: skip")


class ZerothOrderLevel:
    """Parameters that forward passes move.

    Args:
        adapted: the model.
        parameters: name -> tensor; they never get a `.grad`.
        args: learning rate, ε, q, estimator and rule.
    """

    def __init__(self, adapted: AdaptedModel, parameters: Mapping[str, Tensor], args: ZOFOConfig) -> None:
        self._model = adapted.model
        self._parameters = dict(parameters)
        self._args = args
        self._scratch = Scratch()
        self._accepted = False
        self._curvature: float | None = None
        rate = args.zo_learning_rate
        if isinstance(rate, float):
            rule, factor = ZOSGD(args.zo_weight_decay), rate
        else:
            rule, factor = AutomaticZOSGD(eps=args.zo_eps), 1.0
        limits = magnitude_limits(self._parameters, args.zo_sparsity)
        self.optimizer = ZerothOrderOptimizer(self._parameters, rule, factor, limits)
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)

    def perturbed(self, number: int, scale: float, query: int) -> AbstractContextManager[None]:
        """The model at θ + scale·z of this step and query. In the first step, every parameter must be read."""
        if scale == 0:
            return nullcontext()
        return perturbed(
            self._model,
            self._parameters,
            self._args.seed,
            scale,
            number,
            query,
            distribution=self._args.zo_distribution,
            limits=self.optimizer.limits,
            scratch=self._scratch,
            require_all=not self._accepted,
        )

    def project(self, number: int, evaluate: Evaluate) -> tuple[float, ...]:
        """The projected gradients of a loss at step `number`, by the configured estimator.

        Measures the curvature as well, if the rule wants it: one forward more, since the others are known.
        """
        eps, distribution, known = self._args.zo_eps, self._args.zo_distribution, dict[tuple[float, int], float]()

        def remembered(scale: float, query: int) -> float:
            if (scale, query) not in known:
                known[scale, query] = evaluate(scale, query)
            return known[scale, query]

        estimator, self._curvature = ESTIMATORS[self._args.zo_estimator], None
        projected = estimator(remembered, eps, self._args.num_perturbations, distribution)
        if self.optimizer.wants_curvature(number):
            self._curvature = curvature(remembered, eps, distribution)
        return projected

    def accept(self, number: int, projected: tuple[float, ...]) -> float:
        """Hands the estimate of step `number` to the optimizer; returns its root mean square."""
        self.optimizer.estimate = Estimate(
            self._args.seed, number, projected, self._args.zo_distribution, self._curvature, self.optimizer.limits
        )
        size = math.sqrt(sum(g * g for g in projected) / len(projected))
        if not self._accepted:
            rate, eps = self._args.zo_learning_rate, self._args.zo_eps
            moved = rate * size if isinstance(rate, float) else REACH * eps
            for warning in precision.warnings(self._parameters, eps, moved / math.sqrt(len(projected))):
                logger.warning(warning)
        self._accepted = True
        return size

    def release(self) -> None:
        """Frees the scratch memory, which is only worth keeping if nothing else needs much before the next step."""
        self._scratch.forget()

    def clear(self) -> None:
        """Forgets the estimate."""
        self.optimizer.estimate = None


@torch.no_grad()
def mean_losses(scorer: Scorer, terms: Mapping[str, tuple[str, Sequence[Batch]]]) -> list[float]:
    """The mean loss over the batches of each term in eval mode, summed in double precision.

    The n-th batches of all terms go through the model together, in one forward; in one for each adapter, where rows
    of one forward cannot go through different ones.

    Args:
        scorer: runs the batches.
        terms: what the loss is called -> the adapter to use and the batches, of the same number in all.

    Raises:
        NonFiniteLossError: if a loss is not finite.
    """
    scorer.adapted.model.eval()
    adapters = list(dict.fromkeys(adapter for adapter, _ in terms.values()))
    sums = dict.fromkeys(terms, 0.0)
    for together in [adapters] if scorer.adapted.mixes else [[adapter] for adapter in adapters]:
        group = {term: given for term, given in terms.items() if given[0] in together}
        names = [adapter for adapter, _ in group.values()]
        for batches in zip(*(batches for _, batches in group.values()), strict=True):
            for term, loss in zip(group, scorer.losses(batches, names), strict=True):
                sums[term] += float(loss)
    means: list[float] = []
    for term, (_, batches) in terms.items():
        means.append(sums[term] / sum(map(count, batches)))
        if not math.isfinite(means[-1]):
            raise NonFiniteLossError(
                f"{term} is {means[-1]}: lower zo_learning_rate or zo_eps, or set on_nonfinite: skip"
            )
    return means


def random_state() -> list[Tensor]:
    """The global random state of torch, on the CPU and on the accelerator, if there is one: what dropout advances."""
    accelerator = [torch.get_device_module().get_rng_state()] if torch.accelerator.is_available() else []
    return [torch.get_rng_state(), *accelerator]


def require_optimizer(args: ZOFOConfig) -> None:
    """Refuses an `optim` that cannot be had, before any work.

    Raises:
        ZofoError: if it is not installed, needs a model of its own kind, or keeps weights of its own.
    """
    if args.method not in ("bilevel", "fo", "two_stage"):
        return
    name = str(args.optim.value if isinstance(args.optim, Enum) else args.optim)
    if name.startswith("schedule_free"):
        raise ZofoError(f"optim {name} keeps weights of its own for training, which zofo does not: take adamw_torch")
    try:
        _first_order_optimizer([torch.zeros(1, requires_grad=True)], args.learning_rate, args)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ZofoError(f"optim {name} cannot be used ({first_line(error)}): take adamw_torch, say") from error


def _first_order_optimizer(parameters: Sequence[Tensor], learning_rate: float, args: ZOFOConfig) -> Optimizer:
    """`args.optim` as the trainer would make it; biases and norms are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    made: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args)
    kind, settings = made
    return kind([group for group in groups if group["params"]], **{**settings, "lr": learning_rate})
