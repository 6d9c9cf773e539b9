"""A step that is tried before a run and taken back: whether it fits, how long it takes, and its memory at the peak."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zofo.config import ZOFOConfig
from zofo.errors import NonFiniteLossError, ZofoError, is_lack_of_memory
from zofo.methods.method import Bundle, Method
from zofo.scoring.batch import Batch, width
from zofo.scoring.tokens import Example
from zofo.training.callbacks import Cost
from zofo.training.memory import enable_activation_checkpointing, optimizer_states
from zofo.training.peak import peak_memory, reset_peak_memory
from zofo.training.rehearsal import same_randomness


@dataclass(frozen=True)
class Trial:
    """What a step takes: seconds, without the update of its weights; bytes at the peak, on the longest rows."""

    seconds: float
    peak: int


def trial(
    method: Method,
    config: ZOFOConfig,
    cost: Cost,
    rows: Sequence[Example],
    collated: Callable[[Sequence[Example]], Batch],
) -> Trial | None:
    """Runs a step on the longest rows, which must fit, and one on the first rows, which is timed; nothing is changed.

    None if a loss is not finite, which the run says itself, with the step.
    """
    by_width = sorted(rows, key=lambda example: width(example, config.loss), reverse=True)
    longest, typical = (collated(part[: config.per_device_train_batch_size]) for part in (by_width, rows))
    enable_activation_checkpointing(config, method.adapted)
    counted, method.keys = copy.copy(vars(cost)), copy.copy(config)
    method.keys.on_nonfinite = "skip"  # so that lower steps are taken back as well
    black_box = method.black_box
    if black_box:
        black_box.told = True  # of these rows nothing is to be said
    reset_peak_memory(config.device)
    try:
        with same_randomness():
            _steps(method, config, longest)
            peak = peak_memory(config.device) + optimizer_states(method, config)
            started = time.perf_counter()
            _steps(method, config, typical)
            return Trial((time.perf_counter() - started) / len(method.stages), peak)
    except NonFiniteLossError:
        return None
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        raise ZofoError(
            f"a step on the longest rows ({longest['input_ids'].shape[1]} tokens) does not fit into the memory: lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps, lower max_length, set "
            "gradient_checkpointing: true, or see zofo estimate"
        ) from error
    finally:
        method.keys = config
        if black_box:
            black_box.told = False
        vars(cost).update(counted)
        method.signal_to_noise()  # what the tried steps have measured


def _steps(method: Method, config: ZOFOConfig, batch: Batch) -> None:
    """One in each stage of the run, all on the same rows."""
    bundle: Bundle = {name: [batch] * stream.batches for name, stream in method.streams(config).items()}
    for stage in method.stages:
        try:
            method.step(0, stage, [bundle] * config.gradient_accumulation_steps)
        finally:
            method.skip()
    if config.device.type == "cuda":
        torch.cuda.synchronize(config.device)
