"""What a run with `diagnose` says at its end: how its estimates went, where θ changed, and what the gain is due to."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_weights
from zofo.models.peft import UPPER
from zofo.models.selection import parts_of
from zofo.scoring.tokens import Example
from zofo.training.diagnosable import left_out
from zofo.training.diagnosis import perturbed_weights
from zofo.training.trainer import ZOFOTrainer

_SERIES = (
    "signal_to_noise", "penalty_gap", "cosine", "variance", "variance_s_start", "variance_no_adapter", "row_variance",
    "row_variance_s_start", "row_variance_no_adapter",
)  # fmt: skip
_PART = 1 << 24  # numbers in double precision at a time
Scores = Mapping[str, float]


def diagnosed(
    trainer: ZOFOTrainer, model: str, rows: Sequence[Example], zero_shot: Scores | None, final: Scores
) -> dict[str, Any]:
    """The entry `diagnosis` of `results.json`.

    Args:
        trainer: after training.
        model: what it started from, which is loaded once more where θ was trained.
        rows: of the final scores.
        zero_shot: scores of the backbone of the start on them, if they are known.
        final: scores of the deployed model on them.
    """
    missing, config = left_out(trainer.method, trainer.args), trainer.args
    found: dict[str, Any] = series(trainer.state.log_history)
    level = trainer.method.zeroth_order_level
    if "cosine" in found and level is not None:
        expected = next(log["cosine_expected"] for log in trainer.state.log_history if "cosine_expected" in log)
        of_step = {"directions": level.probes.queries, "weights": perturbed_weights(level)}
        found["cosine"] |= {"expected": expected, **of_step}
    if "update" not in missing:
        start = {n: p.detach() for n, p in load_weights(model, config.dtype).named_parameters()}
        found["update"] = update_by_part(trainer.adapted, start)
        if "gain" not in missing:
            found |= _attributed(trainer, start, rows, zero_shot, final)
    return {**found, "left_out": missing}


def series(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """First and last value and mean of what was logged.

    Examples:
        >>> series([{"cosine": 1.0}, {"loss": 5.0}, {"cosine": 3.0}])
        {'cosine': {'first': 1.0, 'last': 3.0, 'mean': 2.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for key in _SERIES:
        values = [log[key] for log in history if key in log]
        if values:
            found[key] = {"first": values[0], "last": values[-1], "mean": sum(values) / len(values)}
    return found


@torch.no_grad()
def update_by_part(adapted: AdaptedModel, start: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """{part of the model: {"norm": |θ - θ_0|, "relative": |θ - θ_0| / |θ_0|}}, with θ_0 = `start` on the CPU."""
    totals: dict[str, list[float]] = {}
    for name, part in parts_of(adapted.base, adapted.backbone).items():
        total = totals.setdefault(part, [0.0, 0.0])
        moved, norm = squares(adapted.backbone[name], start[name])
        total[0] += moved
        total[1] += norm
    return {
        part: {"norm": moved**0.5, "relative": (moved / norm) ** 0.5 if norm else 0.0}
        for part, (moved, norm) in totals.items()
    }


@torch.no_grad()
def squares(now: Tensor, before: Tensor) -> tuple[float, float]:
    """|now - before|² and |before|² of a weight, in double precision; `before` is on the CPU.

    Examples:
        >>> squares(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        (9.0, 26.0)
    """
    moved, norm = 0.0, 0.0
    for new, old in zip(*(p.flatten().split(_PART) for p in (now, before)), strict=True):
        moved += float((new.cpu().double() - old.double()).square().sum())
        norm += float(old.double().square().sum())
    return moved, norm


@contextmanager
def at_start(adapted: AdaptedModel, start: Mapping[str, Tensor]) -> Generator[None]:
    """Within the block, θ is `start`, whose tensors hold the trained weights meanwhile; no third copy is made."""
    _swap(adapted, start)
    try:
        yield
    finally:
        _swap(adapted, start)


@torch.no_grad()
def _swap(adapted: AdaptedModel, start: Mapping[str, Tensor]) -> None:
    for name, parameter in adapted.backbone.items():
        kept = parameter.detach().clone()
        parameter.copy_(start[name])
        start[name].copy_(kept)


def _attributed(
    trainer: ZOFOTrainer,
    start: Mapping[str, Tensor],
    rows: Sequence[Example],
    zero_shot: Scores | None,
    final: Scores,
) -> dict[str, Any]:
    alone = trainer.score_backbone(rows)
    with at_start(trainer.adapted, start):
        neither = zero_shot or trainer.score_backbone(rows)
        adapter = trainer.score(rows, (UPPER,))[UPPER]
    scores = {"neither": dict(neither), "backbone": alone, "adapter": adapter, "both": dict(final)}
    return {"scores": scores, "gain": {key: gain(scores, key) for key in final if key != "rows"}}


def gain(scores: Mapping[str, Scores], key: str) -> dict[str, float]:
    """How much a score has improved, and which part of that is due to θ and to the adapter: their sum is the whole.

    Each one's part is its mean improvement over both orders: first of the two, and added to the other. A loss improves
    by falling.

    Examples:
        >>> scores = {"neither": {"loss": 3.0}, "backbone": {"loss": 2.5}, "adapter": {"loss": 1.0}}
        >>> gain({**scores, "both": {"loss": 0.75}}, "loss")
        {'whole': 2.25, 'backbone': 0.375, 'adapter': 1.875}

    References:
        The value of L. Shapley, "A Value for n-Person Games" (1953), of a game of two.
    """
    sign = -1.0 if key == "loss" else 1.0
    neither, backbone, adapter, both = (sign * scores[n][key] for n in ("neither", "backbone", "adapter", "both"))
    of_backbone = ((backbone - neither) + (both - adapter)) / 2
    return {"whole": both - neither, "backbone": of_backbone, "adapter": both - neither - of_backbone}
