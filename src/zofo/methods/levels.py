"""The two kinds of level that methods are made of: one updated by backpropagation, one by forward passes."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zofo.errors import FORWARD_ERRORS, NonFiniteLossError, ZofoError, first_line, is_lack_of_memory
from zofo.keys import AUTO, Keys
from zofo.methods.first_order_optimizers import first_order_optimizer
from zofo.methods.populations import Asked, member_losses, require_groups
from zofo.methods.signal import Points, Signal, contributions, mean_error
from zofo.methods.signal import Rows as RowValues
from zofo.models.adapters import AdaptedModel
from zofo.models.below import Below, blocks_below
from zofo.models.selection import magnitude_limits
from zofo.models.starting import StartingWeights
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer, Tokens, count
from zofo.zo import precision
from zofo.zo.buffers import Scratch
from zofo.zo.estimators import Estimate, Measure, Point, Probes, mean_estimate
from zofo.zo.low_rank import require_rank
from zofo.zo.optimizers import Anchor, ZerothOrderOptimizer
from zofo.zo.perturb import perturbed
from zofo.zo.population import Rows, population
from zofo.zo.rules import CURVATURE_EVERY, RULES, Automatic

logger = logging.getLogger(__name__)

_TOGETHER = 2048  # tokens of a forward, beyond which one of more batches saves no time and takes their memory


class FirstOrderLevel:
    """Parameters that backpropagation updates: an adapter, or the whole model where there is none.

    `remedy` names the keys to lower where a loss is not finite.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        scorer: Scorer,
        adapter: str,
        learning_rate: float,
        keys: Keys,
        remedy: str = "learning_rate",
    ) -> None:
        self._adapted = adapted
        self._scorer = scorer
        self._adapter = adapter
        self._keys = keys
        self._remedy = remedy
        self._blocks_below = blocks_below(adapted) if adapted.adapters and keys.lower_pool else []
        self.norm = 0.0  # of the last gradient
        named = adapted.adapter_parameters(adapter) if adapted.adapters else adapted.backbone
        self.parameters = list(named.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = first_order_optimizer(self.parameters, learning_rate, keys)

    def gradient(self, batches: Sequence[Batch], label: str, factor: float = 1.0, below: Sequence[Below] = ()) -> float:
        """Adds the gradient of `factor` times the mean loss over all batches to `.grad`; returns the mean loss.

        One batch at a time goes forward and backward, so memory is that of one. Train mode: dropout is on. With
        `optimizer_in_backward` the parameters are updated when it returns, and have no `.grad`. With `below`, one for
        each batch, its forward begins above the blocks that have run for this batch before.
        """
        self._adapted.use(self._adapter)
        self._adapted.model.train()
        total = sum(map(count, batches))
        loss, norms = 0.0, list[Tensor]()
        for batch, kept in zip(batches, below or [Below() for _ in batches], strict=True):
            with kept.shared(self._blocks_below if below else ()):
                part = self._scorer.loss(batch) / total
            loss += float(part.detach())
            self._require_finite(loss, label)
            norms += self._backward(part * factor)
            self._scorer.tokens.backward_tokens += int(batch["attention_mask"].sum())
        gradients = norms or [p.grad for p in self.parameters if p.grad is not None]
        self.norm = float(torch.nn.utils.get_total_norm(gradients))
        self._require_finite(self.norm, f"{label} (its gradient)")
        return loss

    @torch.no_grad()
    def require_below(self, batch: Batch) -> None:
        """Refuses a model whose loss is another one where its forward begins above the blocks below the adapter."""
        scorer, below = Scorer(self._adapted, Tokens(), self._scorer.layout), Below()
        self._adapted.model.eval()
        losses: list[float] = []
        reason = "gives another loss"
        try:
            for _ in range(2):
                with self._adapted.deployed_after(), below.shared(self._blocks_below):
                    self._adapted.use(self._adapter)
                    losses.append(float(scorer.loss(batch)))
        except FORWARD_ERRORS as error:
            if is_lack_of_memory(error):
                raise
            reason = f"fails ({first_line(error)})"
        if not all(map(math.isfinite, losses)):
            return  # it shows nothing; the run itself has more to say of it
        tolerance = torch.finfo(self._adapted.base.dtype).eps ** 0.5
        if len(losses) < 2 or not math.isclose(*losses, rel_tol=tolerance):
            raise ZofoError(
                f"lower_pool is set, but a forward of this {self._adapted.base.config.model_type} model that begins "
                f"above the blocks below its adapter {reason}: leave lower_pool out"
            )

    def _backward(self, loss: Tensor) -> list[Tensor]:
        """Backpropagation; with `optimizer_in_backward`, the norm of each gradient, which is used and dropped in it.

        A hook runs when all uses of a parameter, as of a tied one, have added to its gradient. The optimizer passes
        over the other parameters, as they have none. Hooks are there for this pass only: the model may get another
        optimizer.
        """
        norms: list[Tensor] = []

        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norms.append(torch.linalg.vector_norm(parameter.grad))
            self.optimizer.step()
            parameter.grad = None

        with ExitStack() as hooks:
            for parameter in self.parameters if self._keys.optimizer_in_backward else ():
                hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)
            loss.backward()
        return norms

    def step(self) -> None:
        """One optimizer step of its own, clipped as the trainer clips, for a level that the trainer does not step."""
        if self._keys.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._keys.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        """A copy of the parameters and of the optimizer's state."""
        return [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def restore(self, snapshot: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Back to a snapshot, bit for bit."""
        for parameter, value in zip(self.parameters, snapshot[0], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(snapshot[1])

    def _require_finite(self, value: float, label: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{label} is {value}: lower {self._remedy}, or set on_nonfinite: skip")


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
        if self._first:
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


@torch.no_grad()
def mean_losses(scorer: Scorer, asked: Asked, rows: list[Tensor] | None = None) -> list[float]:
    """The mean loss over the batches of each entry in eval mode, summed in double precision.

    The n-th batches of all entries go through the model together, in one forward; in one for each adapter, where rows
    of one forward cannot go through different ones; one by one if they are large. `asked` is the loss's name -> the
    adapter and the batches. What the rows of each entry contribute to its mean is added to `rows`, where there are any:
    (B,) float64.
    """
    scorer.adapted.model.eval()
    adapters = list(dict.fromkeys(adapter for adapter, _ in asked.values()))
    sums, shares = dict.fromkeys(asked, 0.0), {label: list[Tensor]() for label in asked}
    for together in [adapters] if scorer.adapted.mixes else [[adapter] for adapter in adapters]:
        group = {label: pair for label, pair in asked.items() if pair[0] in together}
        names = [adapter for adapter, _ in group.values()]
        for batches in zip(*(batches for _, batches in group.values()), strict=True):
            with scorer.noting_rows(rows is not None) as noted:
                found = _losses(scorer, batches, names)
            for label, loss in zip(group, found, strict=True):
                sums[label] += float(loss)
            for label, part in zip(group, noted, strict=False):
                shares[label].append(part)
    means = {label: sums[label] / sum(map(count, batches)) for label, (_, batches) in asked.items()}
    for label, mean in means.items():
        if not math.isfinite(mean):
            raise NonFiniteLossError(f"{label} is {mean}: lower zo_learning_rate or zo_eps, or set on_nonfinite: skip")
    if rows is not None:
        rows += [contributions(shares[label], batches) for label, (_, batches) in asked.items()]
    return list(means.values())


def _losses(scorer: Scorer, batches: Sequence[Batch], names: Sequence[str]) -> list[Tensor]:
    if sum(batch["input_ids"].numel() for batch in batches) <= _TOGETHER:
        return scorer.losses(batches, names)
    return [scorer.losses([batch], [name])[0] for batch, name in zip(batches, names, strict=True)]


def random_state() -> list[Tensor]:
    """The global random state of torch, on the CPU and on the accelerator, if there is one: what dropout advances."""
    accelerator = [torch.get_device_module().get_rng_state()] if torch.accelerator.is_available() else []
    return [torch.get_rng_state(), *accelerator]


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
