"""What a run costs: in forward equivalents, which are forwards of one row through the whole model; and in seconds."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import Lora, adapter_config
from zofo.models.load import load_hollow
from zofo.models.peft import UPPER


def iteration_cost(config: ZOFOConfig) -> float:
    """Forward equivalents of one iteration: rows (b (1 + c) + f - r (1 - a)).

    There are b forwards with a backward and f forwards alone, as the method says; c is what a backward counts: the
    part a of the blocks that it runs through, twice where their weights get gradients, and once more where activations
    are computed again. r forwards run through this part alone.

    Examples:
        >>> keys = {"output_dir": "run", "use_cpu": True, "adapter": "none"}
        >>> iteration_cost(ZOFOConfig(method="zo", zo_learning_rate=1e-6, **keys))
        16.0
        >>> iteration_cost(ZOFOConfig(method="fo", **keys))
        24.0
    """
    work = config.method_class.iteration(config)
    saved = work.resumed * (1 - _part(config)) if work.resumed else 0.0
    return config.per_device_train_batch_size * (work.backwards * (1 + _backward_cost(config)) + work.forwards - saved)


def steps_within(config: ZOFOConfig, forward_equivalents: float) -> int:
    """Iterations that a budget pays for, which must be one at least."""
    each = iteration_cost(config)
    if each > forward_equivalents:
        raise ZofoError(
            f"one iteration of method {config.method} takes {each:,.0f} forward equivalents, but the budget is "
            f"{forward_equivalents:,.0f}: raise it, or lower per_device_train_batch_size or lower_steps"
        )
    return int(forward_equivalents / each)


class Pace:
    """Seconds of an iteration, measured once for each configuration of a comparison and kept in its folder.

    All processes and all seeds take the same number, since the steps that it gives are part of a run's identity.

    Args:
        measure: the seconds of an iteration of a configuration; None if it does not fit into memory.
        folder: of the comparison; None to keep nothing.
    """

    def __init__(self, measure: Callable[[ZOFOConfig], float | None], folder: Path | None) -> None:
        self._measure = measure
        self._folder = folder
        self._known: dict[str, float] = {}

    def steps_within(self, config: ZOFOConfig, seconds: float) -> int:
        """Iterations that a budget of seconds pays for.

        Raises:
            ZofoError: if it does not pay for one, or the run does not fit into memory.
        """
        keys = {key: value for key, value in config.resolved().items() if not key.endswith("learning_rate")}
        if not isinstance(config.zo_learning_rate, float) or not config.zo_learning_rate:
            keys["rate"] = config.zo_learning_rate  # `auto` measures curvatures, and 0 measures nothing near θ
        mark = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode()).hexdigest()[:16]
        each = self._known.get(mark) or self._kept(mark, config)
        self._known[mark] = each
        if each > seconds:
            raise ZofoError(
                f"one iteration of method {config.method} takes {each:.3g} s, but the budget is {seconds:g} s: raise it"
            )
        return int(seconds / each)

    def _kept(self, mark: str, config: ZOFOConfig) -> float:
        if self._folder is None:
            return self._measured(config)
        file = self._folder / "pace.json"
        with FileLock(file.with_suffix(".lock")):
            kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if mark not in kept:
                kept[mark] = self._measured(config)
                part = file.with_suffix(".part")
                part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                part.replace(file)
            return kept[mark]

    def _measured(self, config: ZOFOConfig) -> float:
        seconds = self._measure(config)
        if seconds is None:
            raise ZofoError(f"method {config.method} with adapter {config.adapter} does not fit into the free memory")
        return seconds


def _backward_cost(config: ZOFOConfig) -> float:
    if not config.method_class.backpropagates:
        return 0.0
    again = 1.0 if config.activation_checkpointing else 0.0
    if config.adapter == "none":
        return 2.0 + again
    return _part(config) * (1.0 + again)


def _part(config: ZOFOConfig) -> float:
    """The part of the blocks that backpropagation to an adapter runs through."""
    return _part_of(str(config.model), config.dtype, config.adapter, config.lora)


@lru_cache
def _part_of(model: str, dtype: str, adapter: str, lora: Lora) -> float:
    base = load_hollow(model, dtype)  # pyright: ignore[reportArgumentType]
    through, blocks = AdaptedModel(base, adapter_config(adapter, base, lora), (UPPER,)).blocks_of_backward
    return len(through) / blocks if blocks else 1.0
