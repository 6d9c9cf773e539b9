"""What a run costs: tokens, seconds of training, peak memory."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from zofo.scoring import Tokens

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """The cost of training: evaluation is not counted.

    Args:
        tokens: through the model, forward and backward.
        wall_seconds: in training steps.
        peak_memory_bytes: of the process on a CPU, of torch's allocator on a GPU; the weights included.
    """

    tokens: Tokens = field(default_factory=Tokens)
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The entry `cost` of `results.json`."""
        return {
            "forward_tokens": self.tokens.forward,
            "backward_tokens": self.tokens.backward,
            "wall_seconds": self.wall_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def restore(self, stored: dict[str, Any]) -> None:
        """Goes on from what `as_json` gave in an earlier process."""
        self.tokens.forward = stored["forward_tokens"]
        self.tokens.backward = stored["backward_tokens"]
        self.wall_seconds = stored["wall_seconds"]
        self.peak_memory_bytes = stored["peak_memory_bytes"]


class CostCallback(TrainerCallback):
    """Measures time and memory of the training steps of a run."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cost.wall_seconds += time.perf_counter() - self._started
        self._cost.peak_memory_bytes = max(self._cost.peak_memory_bytes, peak_memory())


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory`, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_PEAK.exists():
        with contextlib.suppress(OSError):  # some containers forbid it; the peak then includes what came before
            _CLEAR_PEAK.write_text("5")  # Linux: sets the peak of this process to what it uses now


def peak_memory() -> int:
    """Bytes at the peak since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of this process on a CPU; 0 where a GPU's allocator is measured, which holds no libraries."""
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def free_memory() -> int:
    """Bytes that can still be had, on the GPU if there is one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
