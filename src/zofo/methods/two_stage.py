"""Two stages: the adapter by backpropagation and the backbone by forward passes, one after the other."""

from collections.abc import Mapping, Sequence

from zofo.keys import FIRST_ORDER_KEYS, STAGE_KEYS, STEP_KEYS, ZEROTH_ORDER_KEYS, Keys
from zofo.methods.first_order import FirstOrder
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.method import Bundle, Logs, Method, Part, Stream, Work
from zofo.methods.zeroth_order import ZerothOrder
from zofo.methods.zeroth_order_level import ZerothOrderLevel
from zofo.scoring.batch import Batch
from zofo.zo.optimizers import JointOptimizer


class _BackboneAlone(ZerothOrder):
    """The stage of the backbone: the adapter is there, and stays as it is."""

    updates_both = True

    def release(self) -> None:
        """Frees what only forward passes near θ need."""
        self._level.release()


class TwoStage(Method):
    """The adapter by backpropagation, with the backbone fixed; and the backbone by forward passes, with it fixed."""

    name = "two_stage"
    summary = "two stages: the adapter by backpropagation and the backbone by forward passes, one after the other"
    requires_adapter = True
    updates_both = True
    backpropagates = True
    zeroth_order = True
    keys_used = STEP_KEYS | FIRST_ORDER_KEYS | ZEROTH_ORDER_KEYS | STAGE_KEYS
    depends_on_length = True
    stages = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._adapter = FirstOrder(self.adapted, self.scorer, self.keys)
        self._backbone = _BackboneAlone(self.adapted, self.scorer, self.keys)
        members = {"adapter": self._adapter.optimizer, "zo": self._backbone.optimizer}
        self.optimizer = JointOptimizer(members, stepped=("adapter", "zo"))

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return FirstOrder.streams(keys) | ZerothOrder.streams(keys)

    @classmethod
    def work(cls, keys: Keys) -> Work:
        fraction = keys.two_stage_fraction
        return FirstOrder.work(keys) * fraction + ZerothOrder.work(keys) * (1 - fraction)

    @property
    def adapter_levels(self) -> tuple[FirstOrderLevel, ...]:
        return self._adapter.adapter_levels

    @property
    def zeroth_order_level(self) -> ZerothOrderLevel | None:
        return self._backbone.zeroth_order_level

    def objective(self, progress: float) -> tuple[Part, ...]:
        return self._backbone.objective(progress)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        fraction = self.keys.two_stage_fraction
        last = progress + fraction >= 1  # with 1 - fraction, rounding would move the border by a step
        of_adapter = progress < fraction if self.keys.two_stage_order == "adapter_first" else last
        if of_adapter:
            self._backbone.release()
        return (self._adapter if of_adapter else self._backbone).step(number, progress, micro)

    def require_forwards(self, batch: Batch) -> None:
        self._backbone.require_forwards(batch)

    def learning_rates(self) -> Mapping[str, float]:
        level = self._backbone.zeroth_order_level
        return {} if level is None else level.rates()
