"""Zeroth order: MeZO on the backbone; on an adapter, MeZO (LoRA) and the like."""

from collections.abc import Mapping, Sequence

from zofo.keys import OBJECTIVE_KEYS, STEP_KEYS, ZEROTH_ORDER_KEYS, Keys
from zofo.methods.black_box import BlackBox
from zofo.methods.method import Bundle, Logs, Method, Part, Stream, Work, batches
from zofo.methods.zeroth_order_level import ZerothOrderLevel, evaluations, root_mean_square
from zofo.scoring.batch import Batch
from zofo.zo.estimators import Point


class ZerothOrder(Method):
    """Forward passes alone."""

    name = "zo"
    summary = "zeroth-order fine-tuning (MeZO): forward passes only"
    zeroth_order = True
    keys_used = STEP_KEYS | ZEROTH_ORDER_KEYS | OBJECTIVE_KEYS

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
        if self.black_box:
            return self._descend(self.black_box, number, batches(micro, "zo"))
        asked = {f"step {number}: the loss near θ": (self.adapters[0], batches(micro, "zo"))}
        losses: list[float] = []

        def measure(points: Sequence[Point]) -> list[float]:
            found = self._level.losses(self.scorer, number, points, asked, lambda rows: {"zo": rows[0]})
            losses.extend(loss for (loss,) in found)
            return losses[-len(points) :]

        projected = self._level.propose(number, measure)
        return {"loss": sum(losses) / len(losses), "projected_grad": root_mean_square(projected)}

    def _descend(self, black_box: BlackBox, number: int, rows: Sequence[Batch]) -> Logs:
        """A step on an objective of which only values are known."""

        def measure(points: Sequence[Point]) -> list[float]:
            return black_box.measure(self._level, number, points, self.adapters[0], rows)

        projected = self._level.propose(number, measure, at_once=True)
        return {**black_box.taken(), "projected_grad": root_mean_square(projected)}

    def require_forwards(self, batch: Batch) -> None:
        self._level.require_groups(self.scorer, self.adapters[:1], batch)

    def learning_rates(self) -> Mapping[str, float]:
        """Also in place of the trainer's own, which is the factor of a schedule where the rate is automatic."""
        return {**self._level.rates(), "learning_rate": self._level.optimizer.rate}
