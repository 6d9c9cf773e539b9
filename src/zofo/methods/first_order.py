"""First order: FO-PEFT with an adapter, full fine-tuning without."""

from collections.abc import Sequence

from zofo.keys import FIRST_ORDER_KEYS, FULL_KEYS, STEP_KEYS, Keys
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.method import Bundle, Logs, Method, Stream, Work, batches


class FirstOrder(Method):
    """Backpropagation alone."""

    name = "fo"
    summary = "first-order fine-tuning (backpropagation)"
    backpropagates = True
    keys_used = STEP_KEYS | FIRST_ORDER_KEYS | FULL_KEYS

    def __post_init__(self) -> None:
        self._level = FirstOrderLevel(self.adapted, self.scorer, self.adapters[0], self.keys.learning_rate, self.keys)
        self.optimizer = self._level.optimizer

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return {"adapter": Stream("train", batches=1, order=0)}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        return Work(backwards=keys.gradient_accumulation_steps, updates=1)

    @property
    def adapter_levels(self) -> tuple[FirstOrderLevel, ...]:
        return (self._level,) if self.adapted.adapters else ()

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        logs = {"loss": self._level.gradient(batches(micro, "adapter"), f"step {number}: the training loss")}
        if self.keys.optimizer_in_backward:
            logs["grad_norm"] = self._level.norm  # the trainer finds no gradient to measure
        return logs
