"""Zeroth order: MeZO on the backbone; on an adapter, MeZO (LoRA) and the like."""

from collections.abc import Mapping, Sequence

from zofo.keys import STEP_KEYS, ZEROTH_ORDER_KEYS, Keys
from zofo.methods.levels import ZerothOrderLevel, evaluations, mean_losses, root_mean_square
from zofo.methods.method import Bundle, Logs, Method, Part, Stream, Work, batches


class ZerothOrder(Method):
    """Forward passes alone."""

    name = "zo"
    summary = "zeroth-order fine-tuning (MeZO): forward passes only"
    zeroth_order = True
    keys_used = STEP_KEYS | ZEROTH_ORDER_KEYS

    def __post_init__(self) -> None:
        self._level = ZerothOrderLevel(self.adapted, self.perturbed(self.adapted, self.keys), self.keys)
        self.optimizer = self._level.optimizer

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return {"zo": Stream("train", batches=1, order=2)}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        return Work(forwards=keys.gradient_accumulation_steps * evaluations(keys), zo_updates=1)

    @property
    def zeroth_order_level(self) -> ZerothOrderLevel | None:
        return self._level

    def objective(self, progress: float) -> tuple[Part, ...]:
        return (Part("zo", self.adapters[0]),)

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        asked = {f"step {number}: the loss near θ": (self.adapters[0], batches(micro, "zo"))}
        losses: list[float] = []

        def evaluate(scale: float, query: int) -> float:
            rows = [] if self.keys.diagnose else None
            with self._level.perturbed(number, scale, query):
                losses.extend(mean_losses(self.scorer, asked, rows))
            if rows:
                self._level.note(scale, query, {"zo": rows[0]})
            return losses[-1]

        projected = self._level.propose(number, evaluate)
        return {"loss": sum(losses) / len(losses), "projected_grad": root_mean_square(projected)}

    def learning_rates(self) -> Mapping[str, float]:
        """Also in place of the trainer's own, which is the factor of a schedule where the rate is automatic."""
        return {"zo_learning_rate": self._level.optimizer.rate, "learning_rate": self._level.optimizer.rate}
