"""Ctrl-C during training: the first one ends the run after its step, with a checkpoint; the second one at once."""

import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

_NOTE = "\nzofo: the run ends after this step or evaluation, with a checkpoint; Ctrl-C again ends it now, without one"


class Interrupt(TrainerCallback):
    """Ends a run where its weights are whole; must come after the trainer's own callbacks."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, saves: bool) -> Generator[None]:
        """Within the block Ctrl-C is noticed, and raised at its end; handlers and threads of others are left alone.

        A run that `saves` nothing has nothing to wait for.
        """
        self.asked = False
        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if not saves or not main or before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(_NOTE, file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end; an evaluation that is due happens before, as it belongs to the state."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)
