"""Objectives of which only values are known: a metric or a reward, or a loss whose population is shaped."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from zofo.errors import NonFiniteLossError, ZofoError
from zofo.keys import LOSS, Keys
from zofo.methods.zeroth_order_level import ZerothOrderLevel
from zofo.scoring.batch import Batch
from zofo.scoring.evaluation import Answer, Evaluator
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.scorer import Scorer
from zofo.scoring.tokens import Example
from zofo.tasks.metrics import MEANS, TEXT_METRICS, row_scores, score
from zofo.tasks.rewards import REWARD
from zofo.zo.estimators import Point
from zofo.zo.shaping import shaped

logger = logging.getLogger(__name__)


@dataclass
class BlackBox:
    """What zeroth-order steps descend in place of the loss: minus a metric of the rows of a step, shaped or not.

        f(θ + scale z) = - metric of what the model answers there,   or the loss
        all members of a step, which are its points other than θ, on the same rows

    Args:
        keys: name the objective and the shaping.
        evaluator: answers rows, with the scorer of the run, whose tokens count.
        told: whether it has been said that a population has no spread.
    """

    keys: Keys
    evaluator: Evaluator
    told: bool = False
    _measured: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])  # mean value, no spread

    @property
    def has_gradient(self) -> bool:
        """Whether backpropagation knows the objective."""
        return self.keys.objective == LOSS

    def use(self, span: AnswerSpan) -> None:
        """From now on answers are as long as those of a task, one of several."""
        self.evaluator = replace(self.evaluator, span=span)

    def measure(
        self, level: ZerothOrderLevel, step: int, points: Sequence[Point], adapter: str, batches: Sequence[Batch]
    ) -> list[float]:
        """What a step descends, at all of its points, over the rows of all batches together.

        Shaped values have the mean 0 over the members, which takes the place of the value at θ: it is not measured.

        Raises:
            ZofoError: if a reward function fails, or no reward applies to any row. With shaped values, one member
                alone may have none: it counts as the mean.
            NonFiniteLossError: if the model's answers are of logits that are nan.
        """
        shaping = self.keys.shaping
        members = [point for point in points if point[0] or shaping == "none"]
        values = self._values(level, step, members, adapter, batches)
        unknown = values.isnan().all(1)
        if unknown.all() or (shaping == "none" and unknown.any()):
            raise ZofoError(
                f"step {step}: no reward applies to any of the {values.shape[1]} completions of a member: let a reward "
                "function return a number for them, leave such rows out, or raise per_device_train_batch_size"
            )
        found = shaped(values, shaping, self.keys.zo_shaping_over == "prompt")
        self._measured.append((float(values.nanmean(1).nanmean()), found.no_spread))
        self._tell(step, found.no_spread)
        known = dict(zip(members, found.members, strict=True))
        return [known.get(point, 0.0) for point in points]

    def taken(self) -> dict[str, float]:
        """To log, of what was measured since the last call: the mean value, the metric, how much had no spread."""
        if not self._measured:
            return {}
        value, no_spread = (sum(column) / len(column) for column in zip(*self._measured, strict=True))
        self._measured.clear()
        metric = {} if self.has_gradient else {self.keys.objective: -value}
        return {"loss": value, **metric, "zo_no_spread": no_spread}

    def _values(
        self, level: ZerothOrderLevel, step: int, points: Sequence[Point], adapter: str, batches: Sequence[Batch]
    ) -> Tensor:
        """(M, C) float64: of each point and row, or of each point and all rows, where a metric is of all together."""
        if self.has_gradient:
            return _losses(level, self.evaluator.scorer, step, points, adapter, batches)
        examples = [example for batch in batches for example in batch.get("examples", ())]
        self.evaluator.scorer.adapted.use(adapter)
        together = self._together(level, step, points, examples) if self._shares(level) else None
        found: list[list[float]] = []
        for number, point in enumerate(points):
            if together is None:
                with level.perturbed(step, *point):
                    answers = self.evaluator.unrewarded(examples)
            else:
                answers = together[number]
            if any(answer.scores is not None and answer.scores.isnan().any() for answer in answers):
                raise NonFiniteLossError(
                    f"step {step}: the scores of options near θ are nan: lower zo_learning_rate or zo_eps, or set "
                    "on_nonfinite: skip"
                )
            found.append(self._metric(examples, self.evaluator.rewarded(examples, answers)))
        return -torch.tensor(found, dtype=torch.float64)

    def _shares(self, level: ZerothOrderLevel) -> bool:
        """Whether members generate their texts in the rows of one forward."""
        return level.probes.rank > 0 and level.most != 1 and self.keys.objective in (REWARD, *TEXT_METRICS)

    def _together(
        self, level: ZerothOrderLevel, step: int, points: Sequence[Point], examples: Sequence[Example]
    ) -> list[list[Answer]]:
        """What the model answers at each point, at many of them in one forward."""
        most, size = level.most or len(points), len(examples)
        found: list[list[Answer]] = []
        for some in (points[low : low + most] for low in range(0, len(points), most)):
            answers = self.evaluator.generated(examples, len(some), partial(_near, level, step, some))
            found += [answers[start : start + size] for start in range(0, len(answers), size)]
        return found

    def _metric(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
        metric, texts = self.keys.objective, [answer.text for answer in answers]
        if metric == REWARD:
            return [float("nan") if answer.reward is None else answer.reward for answer in answers]
        references = [(e.texts[e.gold], *e.right) for e in examples]
        if metric in MEANS:
            return row_scores(metric, texts, references)
        return [score(metric, texts, references, options=[e.texts for e in examples])]

    def _tell(self, step: int, no_spread: float) -> None:
        if no_spread < 1 or self.told:
            return
        self.told = True
        logger.warning(
            f"step {step}: all members of the population have the same {self.keys.objective}, so θ learns nothing from "
            "them: raise zo_eps, num_perturbations or per_device_train_batch_size, or take an objective with finer "
            "steps (zo_no_spread in the log says how often)"
        )


def _near(level: ZerothOrderLevel, step: int, points: Sequence[Point], rows: int) -> AbstractContextManager[None]:
    """The model with so many rows at each of the points, one after the other."""
    return level.together(step, [(point, rows) for point in points])


def _losses(
    level: ZerothOrderLevel,
    scorer: Scorer,
    step: int,
    points: Sequence[Point],
    adapter: str,
    batches: Sequence[Batch],
) -> Tensor:
    """(M, B) what each row contributes to the mean loss at each point."""
    rows: dict[Point, list[Tensor]] = {}
    level.losses_with_rows(scorer, step, points, {f"step {step}: the loss near θ": (adapter, batches)}, rows)
    return torch.stack([rows[point][0] for point in points]).cpu()
