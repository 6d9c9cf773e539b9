"""Where the time of a run goes: its parts timed within the run itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from timing import MODEL, synchronise, trainer
from zofo import noise
from zofo.models.load import load_model
from zofo.scoring import scorer as scoring
from zofo.scoring.scorer import Scorer


class Clock:
    """Seconds in parts of a run, an inner part not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last = 0.0

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(None)

        return timed

    def _switch(self, part: str | None) -> None:
        synchronise()  # a GPU's work belongs to the part that asked for it
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        if part is None:
            self._open.pop()
        else:
            self._open.append(part)


@contextmanager
def patched(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Within the block, attributes have other values."""
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def timed_run(**keys: Any) -> tuple[dict[str, float], float]:
    """(seconds of each part, seconds from the first step to the last) of a run of `max_steps` iterations."""
    clock, span = Clock(), []

    class Span(TrainerCallback):
        """Leaves the first iteration out: it is the warm-up."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            span.append(time.perf_counter())
            if len(span) == 1:
                clock.seconds.clear()
                clock._last = span[0]

    model, tokenizer = load_model(MODEL)
    made = trainer(model, tokenizer, callbacks=[Span()], **keys)
    with patched(
        (noise, "write_sums", clock.wrap("noise", noise.write_sums)),
        (scoring.Scorer, "log_probabilities", clock.wrap("forward", Scorer.log_probabilities)),
        (Tensor, "backward", clock.wrap("backward", Tensor.backward)),
        (made.method, "step", clock.wrap("rest of the method", made.method.step)),
        (made.method.optimizer, "step", clock.wrap("optimizers", made.method.optimizer.step)),
        (made, "get_batch_samples", clock.wrap("loader", made.get_batch_samples)),
    ):
        made.train()
    return clock.seconds, span[-1] - span[0]
