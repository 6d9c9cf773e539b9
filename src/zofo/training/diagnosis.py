"""What a run with `diagnose` measures at its evaluations, on one fixed batch. No weight changes."""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from zofo.errors import NonFiniteLossError, first_line
from zofo.methods.mean_losses import mean_losses
from zofo.methods.method import Bundle, Method, Part, by_stream
from zofo.methods.signal import Points
from zofo.methods.zeroth_order_level import ZerothOrderLevel
from zofo.models.adapters import AdaptedModel
from zofo.models.peft import LOWER, UPPER
from zofo.scoring.scorer import Scorer, Tokens, count
from zofo.training.rehearsal import same_randomness
from zofo.zo.alignment import Alignment, expected_cosine
from zofo.zo.estimators import Probes

logger = logging.getLogger(__name__)

_DIRECTIONS = 4  # of the variances, at least


class Diagnosis:
    """Measures how a method estimates its gradient; made before the first step, as it keeps the adapter of the start.

    Args:
        method: of the run.
        bundle: the batches of a micro-step, which every measurement is on.
    """

    def __init__(self, method: Method, bundle: Bundle) -> None:
        self._method = method
        self._bundle = bundle
        self._scorer = Scorer(method.adapted, Tokens(), method.scorer.layout)
        self._fits = not method.adapted.quantised
        self._compares = any(part.adapter == LOWER for part in method.objective(1.0))
        self._start = _values(method.adapted, LOWER) if self._compares else {}

    def measure(self, step: int, progress: float) -> dict[str, float]:
        """What to log, for the directions of a step, at `progress` in [0, 1) of the run.

        `cosine` of the estimate with the gradient that backpropagation finds, and its `cosine_expected`. With a lower
        adapter, also `variance` of the projected gradients over directions, and `row_variance`, their squared standard
        error over the rows; for s as trained, for s as it was at the start (`_s_start`), and for the backbone alone
        (`_no_adapter`).
        """
        level, parts = self._method.zeroth_order_level, self._method.objective(progress)
        if level is None:
            return {}
        try:
            with same_randomness(), _unchanged(self._method.adapted):
                points, projected = self._points(level, step, parts)
                found = self._variances(level, step, parts, points) if self._compares else {}
                if self._fits:
                    found |= self._cosine(level, step, parts, projected[: level.probes.queries])
        except NonFiniteLossError:
            return {}
        finally:
            level.release()
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def _points(self, level: ZerothOrderLevel, step: int, parts: Sequence[Part]) -> tuple[Points, tuple[float, ...]]:
        """The rows' losses near θ, and the projected gradients."""
        points = Points()
        asked = {f"{part.stream} {part.adapter}": (part.adapter, self._bundle[part.stream]) for part in parts}

        def evaluate(scale: float, query: int) -> float:
            rows: list[Tensor] = []
            with level.perturbed(step, scale, query):
                mean_losses(self._scorer, asked, rows)
            points.note(scale, query, by_stream(parts, rows))
            return sum(part.factor * float(values.mean()) for part, values in zip(parts, rows, strict=True))

        return points, measured(level, self._compares).project(evaluate)

    def _variances(
        self, level: ZerothOrderLevel, step: int, parts: Sequence[Part], trained: Points
    ) -> dict[str, float]:
        adapted = self._method.adapted
        alone = [part for part in parts if part.stream not in {p.stream for p in parts if p.adapter == LOWER}]
        with _replaced(adapted, LOWER, self._start):
            start, _ = self._points(level, step, parts)
        adapted.use(UPPER)
        with adapted.without_adapter():  # where G(θ, p) and G(θ, s) are the same
            without, _ = self._points(level, step, alone)
        found: dict[str, float] = {}
        for name, points in {"": trained, "_s_start": start, "_no_adapter": without}.items():
            gradients, errors = zip(*points.projections(), strict=True)
            found[f"variance{name}"] = sum(g * g for g in gradients) / len(gradients)
            found[f"row_variance{name}"] = sum(errors) / len(errors)
        return found

    def _cosine(
        self, level: ZerothOrderLevel, step: int, parts: Sequence[Part], projected: Sequence[float]
    ) -> dict[str, float]:
        """Nothing, from then on without trying, where no backward pass is possible."""
        adapted, wanted = self._method.adapted, {id(p) for p in level.parameters.values()}
        for parameter in level.parameters.values():
            parameter.requires_grad_(True)
        manner = (level.probes.distribution, level.optimizer.limits)
        alignment, losses = Alignment(level.parameters, level.seed, step, projected, *manner), list[Tensor]()
        adapted.model.eval()
        try:
            with torch.enable_grad(), alignment.watching():
                for part in parts:
                    adapted.use(part.adapter)  # which has peft choose what requires a gradient
                    for parameter in adapted.model.parameters():
                        parameter.requires_grad_(id(parameter) in wanted)
                    (batch,) = self._bundle[part.stream]
                    losses.append(self._scorer.loss(batch) * (part.factor / count(batch)))
                torch.stack(losses).sum().backward()
        except RuntimeError as error:
            logger.warning("diagnose leaves out the cosine: no backward pass is possible (%s)", first_line(error))
            self._fits = False
            return {}
        finally:
            for parameter in level.parameters.values():
                parameter.grad = None
        expected = expected_cosine(len(projected), perturbed_weights(level))
        return {"cosine": alignment.cosine, "cosine_expected": expected}


def measured(level: ZerothOrderLevel, compares: bool) -> Probes:
    """The losses of a measurement: those of a step; along more directions for variances, which `compares` asks for."""
    directions = max(level.probes.queries, _DIRECTIONS if compares else 1)
    return replace(level.probes, queries=directions)


def perturbed_weights(level: ZerothOrderLevel) -> int:
    """How many weights zeroth-order steps update: d."""
    limits = level.optimizer.limits
    return sum(int((p.abs() <= limits[n]).sum()) if n in limits else p.numel() for n, p in level.parameters.items())


def _values(adapted: AdaptedModel, adapter: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapted.adapter_parameters(adapter).items()}


@contextmanager
def _replaced(adapted: AdaptedModel, adapter: str, values: Mapping[str, Tensor]) -> Generator[None]:
    """Within the block, an adapter has these values."""
    kept, parameters = _values(adapted, adapter), adapted.adapter_parameters(adapter)
    try:
        for name, parameter in parameters.items():
            parameter.detach().copy_(values[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.detach().copy_(kept[name])


@contextmanager
def _unchanged(adapted: AdaptedModel) -> Generator[None]:
    """Puts back which adapter is in use, and which parameters require a gradient."""
    adapted.use(UPPER)
    required = [(parameter, parameter.requires_grad) for parameter in adapted.model.parameters()]
    try:
        with adapted.deployed_after():
            yield
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)
