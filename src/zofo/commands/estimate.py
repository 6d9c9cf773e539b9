"""`zofo estimate`: the memory and the time that each method would take, before the run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo import noise
from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.levels import FirstOrderLevel, ZerothOrderLevel, mean_losses
from zofo.methods.method import Work
from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_hollow, load_tokenizer, load_weights
from zofo.models.peft import UPPER, adapter_config
from zofo.scoring.batch import Batch, collate, width
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.training.callbacks import free_memory, resident_memory
from zofo.training.memory import Memory, checkpoint, fake, step_memory
from zofo.training.rows import run_splits, run_task
from zofo.zo.estimators import Estimate

_SAMPLE = 1000  # rows that are searched for the longest ones
_TIMED = 3  # batches
_HOLES = 0.6  # of the activations: what glibc's malloc kept between freed tensors in nine runs, docs/performance.md

_NOTES = """{config.model} in {config.dtype}, batches of {config.per_device_train_batch_size} rows; memory at the
longest. Activations are whatever is in no other column; libraries are Python with all that it has loaded (on a CPU).
Evaluations take time and memory of their own (per_device_eval_batch_size), which are not counted.
The allocator is the holes that malloc keeps between freed tensors, taken as 60 % of the activations (on a CPU); with
MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives them back, and steps take longer."""


@dataclass
class Row:
    """What one method would take: numbers that it updates, bytes at the peak, seconds per step if it was timed."""

    method: str
    adapter: str
    chosen: bool
    parameters: int
    memory: Memory
    seconds: float | None = None


def estimate(config: ZOFOConfig, timed: bool = True) -> list[Row]:
    """The memory and the time of a step by each method, for a configuration's model, adapter and batches.

    Memory: the steps of every method run on tensors that have shapes but no values, on the longest rows of the task;
    the peak of what is alive is counted. On a CPU the size of this process is added, for the libraries.

    Time, of the methods that fit into the free memory: what a step consists of, as each method says it, is timed piece
    by piece: a forward at θ + εz, a forward with its backward, a step of each optimizer.

    Without a task, rows of `max_length` tokens are assumed.

    Raises:
        ZofoError: if the model, the adapter or the task cannot be read, or the model cannot run without its weights.
    """
    if config.model is None:
        raise ZofoError("model is not given: add model: ... to the config, or --model ... to the command")
    if not config.method_class.trains():
        raise ZofoError(f"method {config.method} trains nothing, so there is nothing to estimate: leave it out")
    base = load_hollow(config.model, config.dtype)
    tokenizer = load_tokenizer(config.model, base)
    batches = _Batches(config, tokenizer, _examples(config, tokenizer, base))
    libraries = resident_memory(config.device)
    rows: list[Row] = []
    for variant in _variants(config):
        adapted = fake(variant)
        memory = step_memory(variant, adapted, batches.longest(adapted))
        memory.libraries = libraries
        memory.allocator = int(_HOLES * memory.activations) if libraries else 0  # a GPU counts what is allocated
        chosen = (variant.method, variant.adapter) == (config.method, config.adapter)
        rows.append(Row(variant.method, variant.adapter, chosen, _updated(variant, adapted), memory))
    if timed:
        _time(config, rows, batches)
    return rows


def as_json(rows: Sequence[Row], config: ZOFOConfig) -> dict[str, Any]:
    """What `zofo estimate --output` writes: bytes, seconds, and of which configuration."""
    steps = config.max_steps if config.max_steps > 0 else None
    return {
        "config": config.resolved(),
        "rows": [
            {
                **asdict(row),
                "memory": {**asdict(row.memory), "peak": row.memory.peak},
                "seconds": row.seconds,
                "steps_per_second": row.seconds and 1 / row.seconds,
                "seconds_of_max_steps": row.seconds and steps and row.seconds * steps,
            }
            for row in rows
        ],
    }


def table(rows: Sequence[Row], config: ZOFOConfig) -> str:
    """The rows as aligned text, in MiB; `>` stands before the run's own method."""
    steps = config.max_steps if config.max_steps > 0 else None
    parts = list(vars(Memory()))
    whole_run = f"s for {steps or '?'} steps"
    lines = [["  method", "adapter", "trained", *parts, "peak MiB", "s/step", "steps/s", whole_run]]
    for row in rows:
        sizes = [f"{size / 2**20:,.0f}" for size in [*vars(row.memory).values(), row.memory.peak]]
        seconds = ["-"] * 3
        if row.seconds:
            seconds = [f"{row.seconds:.3g}", f"{1 / row.seconds:.3g}", f"{row.seconds * steps:,.0f}" if steps else "-"]
        name = f"{'>' if row.chosen else ' '} {row.method}"
        lines.append([name, Path(row.adapter).name, f"{row.parameters:,}", *sizes, *seconds])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = [_NOTES.format(config=config)]
    if any(row.seconds is None for row in rows):
        notes.append("- was not timed: --memory_only, or more memory than is free on this machine.")
    return "\n".join([*aligned, "", *notes])


def _variants(config: ZOFOConfig) -> list[ZOFOConfig]:
    """The runs of the table, in its order: the four that are always of interest, and the configuration's own."""
    adapter = "lora" if config.adapter == "none" else config.adapter
    always = [("fo", "none"), ("fo", adapter), ("zo", "none"), ("bilevel", adapter)]
    return [config.variant(*pair) for pair in dict.fromkeys([*always, (config.method, config.adapter)])]


def _examples(config: ZOFOConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> list[Example]:
    """A sample of the training rows; without a task, one row of the greatest length."""
    width = min(config.max_length, AdaptedModel(base).positions)
    if config.task is None and config.data is None:
        return [Example((0,) * (width - 1), ((0,), (1,)), 0, ("a", "b"))]
    task, _ = run_task(config)
    rows = run_splits(task, config).train[:_SAMPLE]
    return tokenize(task.reworded(rows, config.template), tokenizer, width)[0]


class _Batches:
    """Batches of a sample of rows: the one with the longest, and some as they come."""

    def __init__(self, config: ZOFOConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
        self._config = config
        self._pad_id = cast(int, tokenizer.pad_token_id)
        self._examples = list(examples) * -(-_TIMED * config.per_device_train_batch_size // len(examples))

    def longest(self, adapted: AdaptedModel) -> Batch:
        ordered = sorted(self._examples, key=lambda example: width(example, self._config.loss), reverse=True)
        return self._batch(adapted, ordered, 0)

    def typical(self, adapted: AdaptedModel) -> list[Batch]:
        return [self._batch(adapted, self._examples, number) for number in range(_TIMED)]

    def _batch(self, adapted: AdaptedModel, examples: Sequence[Example], number: int) -> Batch:
        size = self._config.per_device_train_batch_size
        layout = Scorer(adapted, Tokens()).layout
        batch: Any = collate(examples[number * size : (number + 1) * size], self._config.loss, self._pad_id, layout)
        return cast(Batch, {key: tensor.to(self._config.device) for key, tensor in batch.items()})


def _updated(config: ZOFOConfig, adapted: AdaptedModel) -> int:
    """How many numbers a run updates."""
    adapters = [p for name in adapted.adapters for p in adapted.adapter_parameters(name).values()]
    backbone = adapted.backbone.values() if config.updates_backbone else ()
    return sum(p.numel() for p in [*adapters, *backbone])


def _time(config: ZOFOConfig, rows: Sequence[Row], batches: _Batches) -> None:
    """Fills in the seconds of the rows that fit; those without an adapter first, as it cannot be taken off again."""
    assert config.model is not None
    free = free_memory(config.device)
    rows = [row for row in rows if row.memory.peak - row.memory.libraries <= free]
    model = load_weights(config.model, config.dtype) if rows else None
    for adapter in sorted({row.adapter for row in rows}, key=lambda name: name != "none"):
        assert model is not None
        group = [(config.variant(row.method, adapter), row) for row in rows if row.adapter == adapter]
        names = max((variant.method_class.adapters for variant, _ in group), key=len)
        adapted = AdaptedModel(model, adapter_config(adapter, model, group[0][0].adapter_layers), names)
        cast(nn.Module, adapted.model).to(config.device)
        checkpoint(config, adapted)
        clock = _Clock(adapted, batches.typical(adapted))
        for variant, row in group:
            row.seconds = clock.seconds(variant)


class _Clock:
    """Times the pieces of steps on one adapted model, each once; weights are written, but with what they hold."""

    def __init__(self, adapted: AdaptedModel, batches: Sequence[Batch]) -> None:
        self._adapted = adapted
        self._batches = batches
        self._scorer = Scorer(adapted, Tokens())
        self._first_order: tuple[float, float] | None = None
        self._zeroth_order: dict[tuple[str, ...], tuple[float, float]] = {}

    def seconds(self, config: ZOFOConfig) -> float:
        """Of one step of a run, put together from its pieces."""
        work, method = config.method_class.work(config), config.method_class
        forward, zo_update = self._zeroth(config) if method.zeroth_order else (0.0, 0.0)
        backward, update = self._first(config) if method.backpropagates else (0.0, 0.0)
        return seconds(work, Work(backward, update, forward, zo_update))

    def _zeroth(self, config: ZOFOConfig) -> tuple[float, float]:
        parameters = config.method_class.perturbed(self._adapted, config)
        if tuple(parameters) not in self._zeroth_order:
            noise.warm_up(next(iter(parameters.values())).dtype, config.device)
            level = ZerothOrderLevel(self._adapted, parameters, config)

            def near(batch: Batch) -> None:
                with level.perturbed(0, config.zo_eps, 0):
                    mean_losses(self._scorer, {"the loss near θ": (UPPER, [batch])})

            def update(batch: Batch) -> None:
                level.optimizer.propose(Estimate(0, 0, (0.0,) * level.probes.queries), lambda scale, query: 0.0)
                level.optimizer.step()

            self._zeroth_order[tuple(parameters)] = self._mean(near), self._mean(update)
        return self._zeroth_order[tuple(parameters)]

    def _first(self, config: ZOFOConfig) -> tuple[float, float]:
        if self._first_order is None:
            level = FirstOrderLevel(self._adapted, self._scorer, UPPER, 0.0, config)
            backward = self._mean(lambda batch: level.gradient([batch], "the loss"))
            self._first_order = backward, self._mean(lambda batch: level.optimizer.step())
            level.optimizer.zero_grad()
        return self._first_order

    def _mean(self, run: Callable[[Batch], object]) -> float:
        """Mean seconds over the batches, after one that does not count."""
        run(self._batches[0])
        started = time.perf_counter()
        for batch in self._batches:
            run(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(self._batches)


def seconds(work: Work, times: Work) -> float:
    """Of a step: how often it does each thing, times the seconds of each.

    Examples:
        >>> seconds(Work(backwards=2, updates=1), Work(backwards=0.5, updates=0.25))
        1.25
    """
    return sum(count * each for count, each in zip(vars(work).values(), vars(times).values(), strict=True))
