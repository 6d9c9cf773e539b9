"""What every method is: the batches that it reads, the optimizer that it fills, and what it says of itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.optim import Optimizer

from zofo.errors import ZofoError
from zofo.keys import Keys
from zofo.methods.black_box import BlackBox
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.zeroth_order_level import ZerothOrderLevel
from zofo.models.adapters import AdaptedModel
from zofo.models.peft import UPPER
from zofo.models.selection import select
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer

Logs = dict[str, float]
Bundle = dict[str, list[Batch]]
"""The batches of one micro-step of an iteration, by the name of the stream that they come from."""


@dataclass(frozen=True)
class Stream:
    """A named sequence of batches, of which each iteration reads some.

    Args:
        split: the training rows that it runs through.
        batches: how many an iteration reads.
        order: which of the seeded orders of the rows: 0 for backpropagation, 1 for the penalty, 2 for forward passes;
            so the limits of bilevel read the batches of the plain methods.
        counts: whether a pass over its rows counts for the length of an epoch.
    """

    split: str
    batches: int
    order: int
    counts: bool = True


@dataclass(frozen=True)
class Part:
    """A part of what zeroth-order steps descend: `factor` times the mean loss of a stream's rows with an adapter."""

    stream: str
    adapter: str
    factor: float = 1.0


@dataclass(frozen=True)
class Work:
    """What a step consists of: how often it does what takes time.

    Args:
        backwards: forwards with a backward, of one batch.
        resumed: of these, how often the blocks below the adapters have run before, for the same batch.
        updates: steps of a first-order optimizer.
        forwards: forwards at θ ± εz, of one batch.
        zo_updates: steps of a zeroth-order optimizer.
    """

    backwards: float = 0.0
    resumed: float = 0.0
    updates: float = 0.0
    forwards: float = 0.0
    zo_updates: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(factor * value for value in vars(self).values()))


@dataclass
class Method(ABC):
    """One way to train. The trainer asks it for a step and knows nothing of its inside.

    A method reads batches and leaves gradients (first order) or a proposal (zeroth order) in its optimizer. The
    trainer then clips the gradients and steps the optimizer, once per iteration. The class says all that others need
    to know of a method; its name is compared nowhere else.

    Args:
        adapted: the model.
        scorer: runs its batches.
        keys: the configuration.
        black_box: what zeroth-order steps descend in place of the loss; None: the loss as it is.

    Attributes:
        name: the value of the key `method`.
        summary: what it does, for the model card.
        adapters: that it keeps on the backbone, if the run has one at all; the first one is deployed.
        requires_adapter: whether it is pointless without.
        updates_both: whether it updates the backbone beside an adapter as well.
        backpropagates: whether it takes first-order steps.
        zeroth_order: whether it takes zeroth-order steps.
        freezes: whether it takes none where zo_learning_rate is 0, and goes on with the others.
        depends_on_length: whether a step depends on how many there will be.
        stages: a point of the run, in [0, 1], for each kind of step that it takes.
        upper_rate: what `upper_learning_rate` is if it is not given; None for `learning_rate`.
        keys_used: the keys that count for it, of those that do not count for every method.
        optimizer: what the trainer steps, schedules and stores.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]] = (UPPER,)
    requires_adapter: ClassVar[bool] = False
    updates_both: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    zeroth_order: ClassVar[bool] = False
    freezes: ClassVar[bool] = False
    depends_on_length: ClassVar[bool] = False
    stages: ClassVar[tuple[float, ...]] = (0.0,)
    upper_rate: ClassVar[float | None] = None
    keys_used: ClassVar[frozenset[str]] = frozenset()

    adapted: AdaptedModel
    scorer: Scorer
    keys: Keys
    black_box: BlackBox | None = None
    optimizer: Optimizer = field(init=False)

    @abstractmethod
    def __post_init__(self) -> None:
        """Makes the levels and the optimizer."""

    @classmethod
    def form_for(cls, keys: Keys) -> type[Self]:
        """The class for a configuration: this one, unless some keys ask for a form that says other things of itself."""
        return cls

    @classmethod
    def trains(cls) -> bool:
        """Whether there are steps at all."""
        return cls.backpropagates or cls.zeroth_order

    @classmethod
    def updates_backbone(cls, adapter: str) -> bool:
        """Whether the backbone's weights change, with an adapter of that kind."""
        return cls.trains() and (adapter == "none" or cls.updates_both)

    @classmethod
    def splits(cls, keys: Keys) -> tuple[str, ...]:
        """The parts of the training rows that it reads apart."""
        return ("train",)

    @classmethod
    def perturbed(cls, adapted: AdaptedModel, keys: Keys) -> dict[str, Tensor]:
        """The parameters that zeroth-order steps update, by name: of the backbone, those that the keys zo_* choose."""
        if not cls.zeroth_order:
            return {}
        if adapted.adapters and not cls.updates_both:
            return adapted.adapter_parameters(cls.adapters[0])
        if any(isinstance(module, ParamWrapper) for module in adapted.model.modules()):
            raise ZofoError(
                "this LoRA config targets parameters that are no modules (fused experts), whose adapter writes the "
                "backbone in each forward: give target_modules that are linear layers, such as q_proj and v_proj"
            )
        return select(adapted.base, adapted.movable, keys.zo_parameters or (), keys.zo_exclude or (), keys.zo_layers)

    @classmethod
    @abstractmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        """The batches of one iteration."""

    @classmethod
    @abstractmethod
    def work(cls, keys: Keys) -> Work:
        """What a step consists of, on average over a run."""

    @abstractmethod
    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        """Prepares iteration `number`, from 0, at `progress` in [0, 1) of the run; "loss" is among what it returns.

        Raises:
            NonFiniteLossError: if a loss is not finite.
        """

    @classmethod
    def iteration(cls, keys: Keys) -> Work:
        """What an iteration consists of: a step for each of its tasks, and one update of the backbone."""
        one = cls.work(keys)
        return replace(one * keys.tasks_per_step, zo_updates=one.zo_updates)

    @property
    def adapter_levels(self) -> tuple[FirstOrderLevel, ...]:
        """What backpropagation updates of adapters, of which several tasks have one each."""
        return ()

    @property
    def zeroth_order_level(self) -> ZerothOrderLevel | None:
        """What its zeroth-order steps update; None where it takes none."""
        return None

    def objective(self, progress: float) -> tuple[Part, ...]:
        """What its zeroth-order steps descend, at `progress` in [0, 1) of the run: the sum of these parts."""
        return ()

    def require_forwards(self, batch: Batch) -> None:  # noqa: B027 most methods ask nothing special of a model
        """Refuses, before training, a model that cannot take the forwards of a step; `batch` is one to try them on."""

    def skip(self) -> None:
        """Forgets what `step` prepared; a method whose `step` itself writes weights takes that back as well."""
        self.optimizer.zero_grad()

    def learning_rates(self) -> Mapping[str, float]:
        """Those to log beside the trainer's own, by name."""
        return {}

    def signal_to_noise(self) -> Mapping[str, float]:
        """With `diagnose`, that of the zeroth-order estimates since the last call, to be logged; else nothing."""
        level = self.zeroth_order_level
        return {} if level is None or level.signal is None else level.signal.taken()


def batches(micro: Sequence[Bundle], stream: str, index: int = 0) -> list[Batch]:
    """Batch `index` of a stream from every micro-step; none where the stream gives none."""
    return [bundle[stream][index] for bundle in micro if bundle[stream]]


def by_stream(parts: Sequence[Part], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the rows of each stream contribute to an objective, of (B,) contributions to the mean loss of each part."""
    found: dict[str, Tensor] = {}
    for part, values in zip(parts, rows, strict=True):
        found[part.stream] = part.factor * values + found.get(part.stream, 0.0)
    return found
