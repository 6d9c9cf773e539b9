"""The progress bar, with the losses that matter beside it."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback

_SHOWN = ("loss", "lower_loss", "penalty_gap", "projected_grad", "eval_loss", "eval_accuracy", "eval_lower_loss")


class LossBar(ProgressCallback):
    """Transformers' bar, with the last logged values as its postfix instead of a line for each log."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._latest.update({key: f"{logs[key]:.4g}" for key in _SHOWN if key in logs})
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._latest)
