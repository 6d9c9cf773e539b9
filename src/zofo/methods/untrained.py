"""No training: the backbone as it is, for zero-shot scores and for those with examples in context."""

from collections.abc import Sequence

import torch

from zofo.keys import CONTEXT_KEYS, Keys
from zofo.methods.method import Bundle, Logs, Method, Stream, Work


class Untrained(Method):
    """Takes no step; its optimizer is there for the trainer alone, and holds nothing of the model."""

    name = "none"
    summary = "no training"
    keys_used = CONTEXT_KEYS

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD([torch.zeros(1)])

    @classmethod
    def streams(cls, keys: Keys) -> dict[str, Stream]:
        return {}

    @classmethod
    def work(cls, keys: Keys) -> Work:
        return Work()

    def step(self, number: int, progress: float, micro: Sequence[Bundle]) -> Logs:
        return {"loss": 0.0}
