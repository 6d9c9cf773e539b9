"""Two stages: the adapter by backpropagation, then the backbone by forward passes."""

from collections.abc import Mapping, Sequence

from zofo.keys import FIRST_ORDER_KEYS, STAGE_KEYS, STEP_KEYS, ZEROTH_ORDER_KEYS, Keys
from zofo.methods.first_order import FirstOrder
from zofo.methods.method import Bundle, Logs, Method, Stream, Work
from zofo.methods.zeroth_order import ZerothOrder
from zofo.zo.optimizers import JointOptimizer


class _BackboneAlone(ZerothOrder):
    """The second stage: the adapter is there, and stays as it is."""

    updates_both = True


class TwoStage(Method):
    """First the adapter by backpropagation; then the backbone by forward passes, with the adapter fixed."""

    name = "two_stage"
    summary = "two stages: the adapter by backpropagation, then the backbone by forward passes"
    requires_adapter = True
    updates_both = True
    backpropagates = True
    zeroth_order = True
    keys_used = STEP_KEYS | FIRST_ORDER_KEYS | ZEROTH_ORDER_KEYS | STAGE_KEYS
    depends_on_length = True
    stages = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._first = FirstOrder(self.adapted, self.scorer, self.keys)
        self._second = _BackboneAlone(self.adapted, self.scorer, self.keys)
        members = {"adapter": self._first.optimizer, "zo": self._second.optimizer}
        self.optimizer = JointOptimizer(members, stepped=("adapter", "zo"))

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return FirstOrder.streams(keys) | ZerothOrder.streams(keys)

    @classmethod
    def work(cls, keys: Keys) -> Work:
        fraction = keys.two_stage_fraction
        return FirstOrder.work(keys) * fraction + ZerothOrder.work(keys) * (1 - fraction)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        stage = self._second if progress >= self.keys.two_stage_fraction else self._first
        return stage.step(number, progress, micro)

    def learning_rates(self) -> Mapping[str, float]:
        return {"zo_learning_rate": self._second.learning_rates()["zo_learning_rate"]}
