"""A level that forward passes update."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zofo.keys import AUTO, Keys
from zofo.methods.mean_losses import mean_losses
from zofo.methods.populations import Asked, member_losses, require_groups
from zofo.methods.signal import Points, Signal, mean_error
from zofo.methods.signal import Rows as RowValues
from zofo.models.adapters import AdaptedModel
from zofo.models.selection import magnitude_limits
from zofo.models.starting import StartingWeights
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer
from zofo.zo import precision
from zofo.zo.buffers import Scratch
from zofo.zo.estimators import Estimate, Measure, Point, Probes, mean_estimate
from zofo.zo.low_rank import require_rank
from zofo.zo.optimizers import Anchor, ZerothOrderOptimizer
from zofo.zo.perturb import perturbed
from zofo.zo.population import Rows, population
from zofo.zo.rules import CURVATURE_EVERY, RULES, Automatic

logger = logging.getLogger(__name__)


class ZerothOrderLevel:
    """Parameters that forward passes update; they never get a `.grad`."""

    def __init__(self, adapted: AdaptedModel, parameters: Mapping[str, Tensor], keys: Keys) -> None:
        self._model = adapted.model
        self.parameters = dict(parameters)
        self.seed = keys.seed
        self.signal = Signal() if keys.diagnose else None
        self._points = Points()
        self._estimates: list[Estimate] = []  # of this step
        self.most = keys.zo_members_per_forward
        self._scratch = Scratch()
        self._first, self._told = True, False
        self._judges = keys.zo_learning_rate == AUTO
        rule, rate = RULES[keys.zo_optimizer](), keys.zo_learning_rate
        if not isinstance(rate, float):
            rule, rate = Automatic(rule, keys.zo_eps, population=keys.zo_distribution == "low_rank"), 1.0
        self.probes = rule.probes(asked_probes(keys))
        require_rank(self.parameters, self.probes.rank)
        self.optimizer = ZerothOrderOptimizer(
            self.parameters,
            rule,
            rate,
            distribution=self.probes.distribution,
            rank=self.probes.rank,
            limits=magnitude_limits(self.parameters, keys.zo_sparsity),
            weight_decay=keys.zo_weight_decay,
            anchor=_anchor(adapted, self.parameters, keys),
        )
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    @property
    def notes_rows(self) -> bool:
        """Whether it needs the losses of single rows."""
        return self._judges or self.signal is not None

    def rates(self) -> dict[str, float]:
        """Its learning rate, and how much an automatic one trusts the estimates, as they are logged."""
        trust = self.optimizer.trust
        return {"zo_learning_rate": self.optimizer.rate, **({} if trust is None else {"zo_trust": trust})}

    def rests(self, step: int) -> bool:
        """Whether no loss near θ is worth a forward in this step."""
        return self.optimizer.rests(step)

    def perturbed(self, step: int, scale: float, query: int) -> AbstractContextManager[None]:
        """The model at θ + scale·z of a step and query. In the first step, every parameter must be read."""
        if scale == 0:
            return nullcontext()
        return perturbed(
            self._model,
            self.parameters,
            self.seed,
            scale,
            step,
            query,
            distribution=self.probes.distribution,
            rank=self.probes.rank,
            limits=self.optimizer.limits,
            scratch=self._scratch,
            require_all=self._first,
        )

    def losses(
        self,
        scorer: Scorer,
        step: int,
        points: Sequence[Point],
        asked: Asked,
        of_rows: Callable[[list[Tensor]], RowValues] | None = None,
    ) -> list[list[float]]:
        """The mean losses of `asked` at each point: with low rank on the rows of its direction, many in one forward.

        `of_rows` says what the rows contribute to the loss that `measure` of `propose` returns; it is asked with
        `diagnose` and where the rate is automatic.
        """
        rows: dict[Point, list[Tensor]] | None = {} if of_rows is not None and self.notes_rows else None
        found = self.losses_with_rows(scorer, step, points, asked, rows)
        for (scale, query), values in (rows or {}).items():
            assert of_rows is not None
            self._points.note(scale, query, of_rows(values))
        return found

    def losses_with_rows(
        self,
        scorer: Scorer,
        step: int,
        points: Sequence[Point],
        asked: Asked,
        rows: dict[Point, list[Tensor]] | None,
    ) -> list[list[float]]:
        """The same losses; `rows` gets for each point what the rows contribute to each of them."""
        if self.probes.rank:
            parts = self.probes.queries if self.probes.own else 1
            return member_losses(self, scorer, step, points, asked, parts, self.most, rows)
        found: list[list[float]] = []
        for point in points:
            noted = None if rows is None else rows.setdefault(point, [])
            with self.perturbed(step, *point):
                found.append(mean_losses(scorer, asked, noted))
        return found

    def require_groups(self, scorer: Scorer, adapters: Sequence[str], batch: Batch) -> None:
        """Refuses a model of which several points cannot share a forward, where they are to."""
        if self.probes.rank and self.most != 1:
            require_groups(self, scorer, adapters, batch, self.probes.eps)

    def together(self, step: int, rows: Sequence[Rows]) -> AbstractContextManager[None]:
        """The model with each of its rows at its own point. In the first step, every parameter must be read."""
        return population(
            self._model,
            self.parameters,
            self.seed,
            rows,
            step,
            distribution=self.probes.distribution,
            rank=self.probes.rank,
            require_all=self._first,
        )

    def propose(self, step: int, measure: Measure, at_once: bool = False) -> tuple[float, ...]:
        """Measures a loss at the points of a step, and has the rule propose an update; the projected gradients.

        Estimates of the same step, of one task after another, add up as gradients do: the proposal is by their mean.
        `at_once`: all points are measured in one call, as where their values are compared with each other.
        """
        known: dict[Point, float] = {}
        self._points = Points()
        curved = self.optimizer.wants_curvature(step)
        if at_once or self.probes.rank:  # else each loss is measured when it is asked for
            points = self.probes.points(curved)
            known.update(zip(points, measure(points), strict=True))

        def remembered(scale: float, query: int) -> float:
            if (scale, query) not in known:
                (known[scale, query],) = measure([(scale, query)])
            return known[scale, query]

        projected = self.probes.project(remembered)
        bend = self.probes.curvature(remembered) if curved else None
        if self.signal:
            self.signal.add(self._points)
        error = mean_error(self._points) if self._judges else None
        silent = self.optimizer.without_signal
        self._estimates = self._estimates if self.optimizer.estimate else []
        self._estimates.append(Estimate(self.seed, step, projected, bend, error))
        update = self.optimizer.propose(mean_estimate(self._estimates), remembered)
        if not self._told and not silent and self.optimizer.without_signal:
            self._told = True
            logger.warning(
                f"step {step}: the losses of the rows so far show no signal for the weights that zeroth-order steps "
                "update: they rest until there is one (zo_trust in the log)"
            )
        if self._first and update.size:  # nothing is known of a step of size 0, as at the start of a warm-up
            for warning in precision.warnings(self.parameters, self.probes.eps, update.size, self.probes.rank):
                logger.warning(warning)
        self._first = False
        return projected

    def release(self) -> None:
        """Frees the scratch memory, which is only worth keeping if nothing else needs much before the next step."""
        self._scratch.forget()


def _anchor(adapted: AdaptedModel, parameters: Mapping[str, Tensor], keys: Keys) -> Anchor | None:
    """The weights before training, if they draw those that are trained back."""
    if not keys.zo_anchor or any(isinstance(p, FakeTensor) for p in parameters.values()):
        return None
    return Anchor(keys.zo_anchor, StartingWeights(adapted.base, parameters).read)


def root_mean_square(projected: Sequence[float]) -> float:
    """The size of projected gradients, as it is logged."""
    return math.sqrt(sum(g * g for g in projected) / len(projected))


def asked_probes(keys: Keys) -> Probes:
    """What the keys ask of a zeroth-order step."""
    asked = keys.zo_estimator, keys.zo_eps, keys.num_perturbations
    if keys.zo_distribution == "low_rank":
        return Probes(*asked, rank=keys.zo_rank, own=keys.zo_rows == "own")
    return Probes(*asked, keys.zo_distribution)


def evaluations(keys: Keys, shaped: bool = True) -> float:
    """Losses over a whole batch that a zeroth-order step measures, on average; an automatic rate measures curvatures.

    Where directions have rows of their own, all of them together measure two such losses. One-sided values that are
    `shaped` need none at θ.
    """
    probes = RULES[keys.zo_optimizer]().probes(asked_probes(keys))
    spared = shaped and keys.shaping != "none" and keys.zo_estimator == "one_sided" and not probes.own
    return probes.passes - spared + (1 / CURVATURE_EVERY if keys.zo_learning_rate == AUTO else 0.0)
