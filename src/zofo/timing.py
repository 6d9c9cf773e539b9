"""The time of a step, put together from a few timed forwards, backwards and updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zofo import noise
from zofo.adapters import UPPER, AdaptedModel
from zofo.collate import Batch
from zofo.config import AUTO, ZOFOConfig
from zofo.estimators import Estimate
from zofo.levels import FirstOrderLevel, ZerothOrderLevel, mean_losses
from zofo.memory import LEVELS
from zofo.methods import moved_backbone
from zofo.optimizers import CURVATURE_EVERY
from zofo.scoring import Scorer, Tokens


@dataclass(frozen=True)
class Times:
    """Seconds of b, u, f and u_zo of `estimate`."""

    backward: float = 0.0
    update: float = 0.0
    forward: float = 0.0
    zeroth_update: float = 0.0


def times(config: ZOFOConfig, adapted: AdaptedModel, batches: Sequence[Batch], methods: Sequence[str]) -> Times:
    """Measures what the methods need; the weights move, but for nothing.

    Args:
        config: of the run.
        adapted: the model.
        batches: of typical rows.
        methods: some of `memory.LEVELS`; "zo" alone moves the adapter, if there is one.
    """
    scorer = Scorer(adapted, Tokens())
    forward = zeroth_update = backward = update = 0.0
    if any(LEVELS[method][1] for method in methods):
        noise.warm_up(next(iter(adapted.backbone.values())).dtype, config.device)
        alone = list(methods) == ["zo"] and bool(adapted.adapters)
        moved = adapted.adapter_parameters(UPPER) if alone else moved_backbone(adapted, config)
        theta = ZerothOrderLevel(adapted, moved, config)

        def near(batch: Batch) -> None:
            with theta.perturbed(0, config.zo_eps, 0):
                mean_losses(scorer, {"the loss near θ": (UPPER, [batch])})

        def move(batch: Batch) -> None:
            theta.optimizer.estimate = Estimate(0, 0, (0.0,) * config.num_perturbations, config.zo_distribution)
            theta.optimizer.step()

        forward, zeroth_update = _clock(near, batches), _clock(move, batches)
    if any(LEVELS[method][0] for method in methods):
        level = FirstOrderLevel(adapted, scorer, UPPER, 0.0, config)
        backward = _clock(lambda batch: level.gradient([batch], "the loss"), batches)
        update = _clock(lambda batch: level.optimizer.step(), batches)
        level.clear()
    return Times(backward, update, forward, zeroth_update)


def _clock(run: Callable[[Batch], object], batches: Sequence[Batch]) -> float:
    """Mean seconds of a run over batches, after one that does not count."""
    run(batches[0])
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(batches)


def seconds(config: ZOFOConfig, method: str, times: Times) -> float:
    """Of one step of a method, by the formulas of `estimate`."""
    a, q, c = config.gradient_accumulation_steps, config.num_perturbations, int(config.penalty > 0)
    evaluations = a * (2 * q if config.zo_estimator == "two_sided" else q + 1)
    if config.zo_learning_rate == AUTO:
        evaluations += a / CURVATURE_EVERY
    fo = a * times.backward + times.update
    zo = evaluations * times.forward + times.zeroth_update
    match method:
        case "fo":
            return fo
        case "zo":
            return zo
        case "two_stage":
            return config.two_stage_fraction * fo + (1 - config.two_stage_fraction) * zo
        case _:
            coupled = c * a * times.backward + 2 * c * evaluations * times.forward
            return (config.lower_steps + 1) * fo + coupled + zo
