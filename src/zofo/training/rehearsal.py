"""What is tried before a run begins, and looked at before anything is saved."""

import contextlib
import random
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch.optim import Optimizer

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError, first_line, is_lack_of_memory
from zofo.models.adapters import AdaptedModel
from zofo.models.peft import UPPER


def require_schedule_and_batches(
    optimizer: Optimizer, schedule: Callable[[], object], batch: Callable[[], object]
) -> None:
    """Makes a schedule and one batch, as training will, and leaves no trace of them."""
    try:
        with _restored(optimizer):
            schedule()
        with same_randomness():
            batch()
    except ZofoError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError, ImportError, RuntimeError) as error:
        if is_lack_of_memory(error):
            raise
        raise ZofoError(
            f"the schedule or the batches of this run cannot be made ({first_line(error)}): change lr_scheduler_type, "
            "lr_scheduler_kwargs, warmup_steps, num_train_epochs or the dataloader_* keys"
        ) from error


def require_finite(adapted: AdaptedModel, keys: ZOFOConfig, steps: int) -> None:
    """Refuses weights that the last step has made infinite or not a number; losses say so of all steps before."""
    parts = {name: adapted.adapter_parameters(name) for name in adapted.adapters}
    if keys.updates_backbone:
        parts["backbone"] = adapted.movable
    for part, weights in parts.items():
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise ZofoError(
                    f"after step {steps} {name} of {part} is not finite, and is not saved: lower "
                    f"{_rate_of(part, keys)}; earlier checkpoints are whole"
                )


def _rate_of(part: str, keys: ZOFOConfig) -> str:
    """The key to lower where a part of the model has moved too far."""
    if part == UPPER and len(keys.method_class.adapters) > 1:
        return "upper_learning_rate"
    return "zo_learning_rate" if part == "backbone" and keys.method_class.zeroth_order else "learning_rate"


@contextlib.contextmanager
def _restored(optimizer: Optimizer) -> Generator[None]:
    """Puts back the rates of an optimizer on which a schedule was tried."""
    kept = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            group.clear()
            group.update(before)


@contextlib.contextmanager
def same_randomness() -> Generator[None]:
    """Puts back the global random states, which the workers of a data loader are seeded from."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
