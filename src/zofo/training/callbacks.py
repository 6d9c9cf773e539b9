"""What watches a run: its cost (tokens, seconds of training, peak memory), its length, and its progress bar."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerState

from zofo.keys import Keys
from zofo.scoring.scorer import Tokens
from zofo.training.peak import peak_memory, reset_peak_memory


@dataclass
class Cost(Tokens):
    """The entry `cost` of `results.json`: of training, without evaluations.

    Seconds are those in training steps; the peak is that of the process on a CPU, of torch's allocator on a GPU.
    """

    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0


class CostCallback(TrainerCallback):
    """Measures time and memory of the training steps of a run."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak_memory(args.device)  # evaluations and checkpoints lie between the steps
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cost.wall_seconds += time.perf_counter() - self._started
        self._cost.peak_memory_bytes = max(self._cost.peak_memory_bytes, peak_memory(args.device))


class StopBelowAdapters(TrainerCallback):
    """Takes back that inputs get gradients, which checkpointing asks for: backpropagation would never stop before them.

    Only reentrant checkpoints need it, which are refused.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model.disable_input_require_grads()


class GoingOn(TrainerCallback):
    """Makes a resumed run follow its own keys and folder, where transformers takes those of the checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step is not None and best.is_dir():  # the run may have been moved
            state.best_model_checkpoint = str(best)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback; a run that goes on counts from where its checkpoint stopped counting."""

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float | None = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)  # as they are stored in checkpoints
        self._began = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._began = state.global_step
        self.early_stopping_patience_counter = _evaluations_without_progress(state)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # the key may be new to the run

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if state.global_step > self._began:  # `eval_on_start` evaluates again where a run goes on
            super().on_evaluate(args, state, control, metrics, **kwargs)


def own_callbacks(cost: Cost, model: PreTrainedModel, args: Keys) -> list[TrainerCallback]:
    """Those of every run."""
    patience = args.early_stopping_patience
    stopping = [EarlyStopping(patience)] if patience else []
    return [CostCallback(cost), StopBelowAdapters(model), GoingOn(), *stopping]


def is_over(state: TrainerState, patience: int | None) -> bool:
    """Whether a run with this state has stopped early."""
    return patience is not None and _evaluations_without_progress(state) >= patience


def _evaluations_without_progress(state: TrainerState) -> int:
    callbacks: Any = state.stateful_callbacks or {}
    stored = callbacks.get(EarlyStopping.__name__, {}).get("attributes", {})
    return int(stored.get("early_stopping_patience_counter", 0))


_SHOWN = (
    "loss",
    "lower_loss",
    "upper_loss",
    "penalty_gap",
    "projected_grad",
    "eval_loss",
    "eval_accuracy",
    "eval_lower_loss",
)


class LossBar(ProgressCallback):
    """Transformers' bar, with the last logged values as its postfix instead of a line for each log."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._latest.update({key: f"{logs[key]:.4g}" for key in _SHOWN if key in logs})
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._latest)
