"""`zofo estimate`: the memory and the time that each method would take, before the run."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo import noise
from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.methods.method import Work
from zofo.methods.zeroth_order_level import ZerothOrderLevel
from zofo.models.adapters import AdaptedModel, positions_of
from zofo.models.below import Below
from zofo.models.kinds import adapter_config
from zofo.models.load import load_hollow, load_tokenizer, load_weights
from zofo.models.peft import UPPER
from zofo.report.words import duration
from zofo.scoring.batch import Batch, collate, padding_id, width
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.records import Record
from zofo.training.memory import Memory, enable_activation_checkpointing, fake, step_memory
from zofo.training.peak import free_memory, resident_memory
from zofo.training.rows import Posing, run_length, run_splits, run_tasks
from zofo.zo.estimators import Estimate

_SAMPLE = 1000  # rows that are searched for the longest ones
_TIMED = 3  # batches
_HOLES = 0.6  # of the activations: what glibc's malloc kept between freed tensors in nine runs, docs/performance.md

_TIMES = ("steps", "s/step", "all steps")
_NOTES = """
{config.model} in {config.dtype}, batches of {config.per_device_train_batch_size} rows; memory at the
longest, in MiB. Activations are whatever is in no other column; libraries are Python with all that it has loaded (on a
CPU).
Evaluations take time and memory of their own (per_device_eval_batch_size), which are not counted.
The allocator is the holes that malloc keeps between freed tensors, taken as 60 % of the activations (on a CPU); with
MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives them back, and steps take longer."""


@dataclass
class Row:
    """What one method would take: numbers that it updates, bytes at the peak, steps; seconds per step if timed."""

    method: str
    adapter: str
    chosen: bool
    parameters: int
    memory: Memory
    steps: int | None = None
    seconds: float | None = None

    @property
    def whole(self) -> float | None:
        """Seconds of all steps."""
        return self.seconds and self.steps and self.seconds * self.steps


def estimate(config: ZOFOConfig, timed: bool = True) -> Generator[Row]:
    """The memory and the time of a step by each method, for a configuration's model, adapter and batches.

    The run's own method comes first, and every row as soon as it is known.

    Memory: the steps of a method run on tensors that have shapes but no values, on the longest rows of the task; the
    peak of what is alive is counted. On a CPU the size of this process is added, for the libraries.

    Time, of the methods that fit into the free memory: what a step consists of, as each method says it, is timed piece
    by piece: a forward at θ + εz, a forward with its backward, a step of each optimizer.

    Without a task, rows of `max_length` tokens are assumed.
    """
    if config.model is None:
        raise ZofoError("model is not given: add model: ... to the config, or --model ... to the command")
    if not config.method_class.trains():
        raise ZofoError(f"method {config.method} trains nothing, so there is nothing to estimate: leave it out")
    base = load_hollow(config.model, config.dtype)
    tokenizer = load_tokenizer(config.model, base)
    examples, counts = _examples(config, tokenizer, base)
    batches = _Batches(config, tokenizer, examples)
    libraries, free = resident_memory(config.device), free_memory(config.device)
    pairs = _pairs(config)
    for adapter in dict.fromkeys(adapter for _, adapter in pairs):  # one after the other: none can be taken off again
        variants = [config.variant(*pair) for pair in pairs if pair[1] == adapter]
        clock: _Clock | None = None
        for variant in variants:
            hollow = fake(variant)
            memory = step_memory(variant, hollow, batches.longest(hollow))
            memory.libraries = libraries
            memory.allocator = int(_HOLES * memory.activations) if libraries else 0  # a GPU counts what is allocated
            chosen = (variant.method, variant.adapter) == (config.method, config.adapter)
            steps = run_length(variant, counts) if counts or variant.max_steps > 0 else None
            row = Row(variant.method, adapter, chosen, _updated(variant, hollow), memory, steps)
            if timed and memory.peak - libraries <= free:
                clock = clock or _Clock(variants, batches)
                row.seconds = clock.seconds(variant)
            yield row


def as_json(rows: Sequence[Row], config: ZOFOConfig) -> dict[str, Any]:
    """What `zofo estimate --output` writes: bytes, seconds, and of which configuration."""
    return {
        "config": config.resolved(),
        "rows": [
            {
                **asdict(row),
                "memory": {**asdict(row.memory), "peak": row.memory.peak},
                "steps_per_second": row.seconds and 1 / row.seconds,
                "seconds_of_all_steps": row.whole,
            }
            for row in rows
        ],
    }


def head(config: ZOFOConfig) -> str:
    """The line above the rows; sizes are in MiB."""
    return _aligned(config, "  method", "adapter", ["trained", *vars(Memory()), "peak", *_TIMES])


def line(row: Row, config: ZOFOConfig) -> str:
    """A row as text; `>` stands before the run's own method."""
    sizes = [f"{size / 2**20:,.0f}" for size in [*vars(row.memory).values(), row.memory.peak]]
    times = [f"{row.steps:,}" if row.steps else "?", "-", "-"]
    if row.seconds:
        times[1:] = f"{row.seconds:.3g}", duration(row.whole) if row.whole else "?"
    name = f"{'>' if row.chosen else ' '} {row.method}"
    return _aligned(config, name, Path(row.adapter).name, [f"{row.parameters:,}", *sizes, *times])


def notes(rows: Sequence[Row], config: ZOFOConfig) -> str:
    """What stands below the rows."""
    untimed = "\n- was not timed: --memory_only, or more memory than is free on this machine."
    return _NOTES.format(config=config) + untimed * any(row.seconds is None for row in rows)


def _aligned(config: ZOFOConfig, method: str, adapter: str, words: Sequence[str]) -> str:
    names = [[f"  {pair[0]}", Path(pair[1]).name] for pair in _pairs(config)]
    first, second = (max(map(len, column)) for column in zip(*names, ("  method", "adapter"), strict=True))
    widths = [13, *(max(7, len(part)) for part in vars(Memory())), 7, 7, 7, 12]
    cells = [word.rjust(width) for word, width in zip(words, widths, strict=True)]
    return "  ".join([method.ljust(first), adapter.ljust(second), *cells])


def _pairs(config: ZOFOConfig) -> list[tuple[str, str]]:
    """Method and adapter of the rows: the run's own, then the four that are always of interest."""
    adapter = "lora" if config.adapter == "none" else config.adapter
    always = [("fo", "none"), ("fo", adapter), ("zo", "none"), ("bilevel", adapter)]
    return [*dict.fromkeys([(config.method, config.adapter), *always])]


def _examples(
    config: ZOFOConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> tuple[list[Example], list[int]]:
    """A sample of the training rows, and how many each task has; without a task, a row of the greatest length."""
    width = min(config.max_length, positions_of(base))
    if config.task is None and config.data is None:
        return [Example((0,) * (width - 1), ((0,), (1,)), 0, ("a", "b"))], []
    tasks, shown, counts = run_tasks(config), list[Record](), list[int]()
    for task, _ in tasks.values():
        rows = task.reworded(run_splits(task, config).train, config.template)
        shown += Posing(config, rows, tokenizer, width).trained(rows[: _SAMPLE // len(tasks)])
        counts.append(len(rows))
    return tokenize(shown, tokenizer, width)[0], counts


class _Batches:
    """Batches of a sample of rows: the one with the longest, and some as they come."""

    def __init__(self, config: ZOFOConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
        self._config = config
        self._pad_id = padding_id(tokenizer)
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
    adapters = [p for name in adapted.adapters for p in adapted.adapter_parameters(name).values()]
    backbone = adapted.backbone.values() if config.updates_backbone else ()
    return sum(p.numel() for p in [*adapters, *backbone])


class _Clock:
    """Times the pieces of steps of several methods with one adapter, each once, on a model of its own."""

    def __init__(self, variants: Sequence[ZOFOConfig], batches: _Batches) -> None:
        config = variants[0]
        model = load_weights(str(config.model), config.dtype)
        names = max((variant.method_class.adapters for variant in variants), key=len)
        self._adapted = AdaptedModel(model, adapter_config(config.adapter, model, config.lora), names)
        cast(nn.Module, self._adapted.model).to(config.device)
        enable_activation_checkpointing(config, self._adapted)
        self._batches = batches.typical(self._adapted)
        self._scorer = Scorer(self._adapted, Tokens())
        self._first_order: Work | None = None
        self._zeroth_order: dict[tuple[str, ...], tuple[float, float]] = {}

    def seconds(self, config: ZOFOConfig) -> float:
        """Of one step of a run, put together from its pieces."""
        work, method = config.method_class.iteration(config), config.method_class
        forward, zo_update = self._zeroth(config) if method.zeroth_order else (0.0, 0.0)
        first = self._first(config) if method.backpropagates else Work()
        return seconds(work, first + Work(forwards=forward, zo_updates=zo_update))

    def _zeroth(self, config: ZOFOConfig) -> tuple[float, float]:
        parameters = config.method_class.perturbed(self._adapted, config)
        if tuple(parameters) not in self._zeroth_order:
            noise.warm_up(next(iter(parameters.values())).dtype, config.device)
            level = ZerothOrderLevel(self._adapted, parameters, config)

            points = level.probes.points() if level.probes.rank else [(config.zo_eps, 0)]
            passes = level.probes.passes if level.probes.rank else 1  # over a batch, by all points together

            def near(batch: Batch) -> None:
                level.losses(self._scorer, 0, points, {"the loss near θ": (UPPER, [batch])})

            def update(batch: Batch) -> None:
                level.optimizer.propose(Estimate(0, 0, (0.0,) * level.probes.queries), lambda scale, query: 0.0)
                level.optimizer.step()

            self._zeroth_order[tuple(parameters)] = self._mean(near) / passes, self._mean(update)
        return self._zeroth_order[tuple(parameters)]

    def _first(self, config: ZOFOConfig) -> Work:
        if self._first_order is None:
            level = FirstOrderLevel(self._adapted, self._scorer, UPPER, 0.0, config)
            below = {id(batch): Below() for batch in self._batches}

            def again(batch: Batch) -> None:
                level.gradient([batch], "the loss", below=[below[id(batch)]])

            backward = self._mean(lambda batch: level.gradient([batch], "the loss"))
            resumed = 0.0
            if config.lower_pool:
                for batch in self._batches:
                    again(batch)
                resumed = self._mean(again) - backward
            update = self._mean(lambda batch: level.optimizer.step())
            level.optimizer.zero_grad()
            self._first_order = Work(backwards=backward, resumed=resumed, updates=update)
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
