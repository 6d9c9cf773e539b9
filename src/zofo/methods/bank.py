"""The adapters of several tasks, of which one task's are in the model: the memory of K tasks is K adapters."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zofo.methods.first_order_level import FirstOrderLevel

_FILE = "tasks.pt"
_SHARED = ""
_Values = tuple[Tensor, dict[str, Any]]
Kept = list[_Values]
"""Of one task, on the CPU: each parameter's values, and its state in the optimizer with the device of each tensor."""


class AdapterBank:
    """Keeps an adapter, or a pair of them, for each task, with the states of its optimizers.

    What is kept is never changed in place, so that a step can be taken back by putting back what was there before it.
    Learning rates belong to the run and not to a task.

    Args:
        levels: that update the adapters in the model; all tasks start with the values that are there.
        tasks: their names.
        shared: whether all tasks share one adapter, so that nothing is ever exchanged.

    Attributes:
        exchanges: whether tasks have adapters of their own.
        current: the task whose adapters are in the model.
    """

    def __init__(self, levels: Sequence[FirstOrderLevel], tasks: Sequence[str], shared: bool) -> None:
        self._levels = tuple(levels)
        self.exchanges = bool(levels) and not shared and len(tasks) > 1
        self.current = tasks[0] if self.exchanges else _SHARED
        start = self._taken() if self.exchanges else []
        self._kept: dict[str, Kept] = dict.fromkeys(tasks if self.exchanges else [_SHARED], start)

    def use(self, task: str) -> None:
        """Puts a task's adapters into the model, and keeps those that were there."""
        if self.exchanges and task != self.current:
            self._kept[self.current] = self._taken()
            self.current = task
            self._put(self._kept[task])

    def step(self) -> None:
        """An optimizer step of the current task's adapters, where another task follows before the trainer's own."""
        if self.exchanges:
            for level in self._levels:
                level.step()

    def kept(self) -> dict[str, Kept]:
        """All tasks' adapters, with those that are in the model."""
        return {**self._kept, self.current: self._taken()}

    def put_back(self, kept: Mapping[str, Kept]) -> None:
        """Back to what `kept` returned, bit for bit."""
        self._kept = dict(kept)
        self._put(self._kept[self.current])

    def save(self, folder: Path) -> None:
        """Writes the adapters of all tasks, and which ones are in the model."""
        if self.exchanges:
            torch.save({"current": self.current, "kept": self.kept()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; the model itself is loaded by others."""
        if self.exchanges:
            stored: Any = torch.load(folder / _FILE, weights_only=True)
            if stored["kept"].keys() != self._kept.keys():
                raise KeyError(f"{_FILE} holds other tasks than this run's")
            self.current, self._kept = stored["current"], stored["kept"]
            self._put(self._kept[self.current])

    def _taken(self) -> Kept:
        pairs = [(p, level.optimizer.state.get(p, {})) for level in self._levels for p in level.parameters]
        return [
            (p.detach().to("cpu", copy=True), {key: _rested(value) for key, value in state.items()})
            for p, state in pairs
        ]

    @torch.no_grad()
    def _put(self, kept: Kept) -> None:
        pairs = [(p, level.optimizer) for level in self._levels for p in level.parameters]
        for (parameter, optimizer), (values, state) in zip(pairs, kept, strict=True):
            parameter.copy_(values)
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = {key: _woken(value) for key, value in state.items()}


def _rested(value: Any) -> tuple[Any, str]:
    """A copy on the CPU, and where it was."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True), str(value.device)
    return copy.deepcopy(value), ""


def _woken(rested: tuple[Any, str]) -> Any:
    value, device = rested
    return value.to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
