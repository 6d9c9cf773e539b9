"""`zofo estimate`: the memory and the time that each method would take, before the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo import noise
from zofo.config import AUTO, ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.levels import FirstOrderLevel, ZerothOrderLevel, mean_losses
from zofo.methods.methods import moved_backbone
from zofo.models.adapters import UPPER, AdaptedModel, adapter_config
from zofo.models.load import load_hollow, load_tokenizer, load_weights
from zofo.scoring.batch import Batch, collate, width
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.splits import split_records
from zofo.tasks.table import make_table_task
from zofo.tasks.task import load_task
from zofo.training.callbacks import free_memory, resident_memory
from zofo.training.memory import LEVELS, Memory, checkpoint, fake, step_memory
from zofo.zo.estimators import Estimate
from zofo.zo.optimizers import CURVATURE_EVERY


@dataclass(frozen=True)
class Times:
    """Seconds of b, u, f and u_zo of `estimate`."""

    backward: float = 0.0
    update: float = 0.0
    forward: float = 0.0
    zeroth_update: float = 0.0


def times(config: ZOFOConfig, adapted: AdaptedModel, batches: Sequence[Batch], methods: Sequence[str]) -> Times:
    """Measures what the methods need; the weights move, but for nothing.

    Args:
        config: of the run.
        adapted: the model.
        batches: of typical rows.
        methods: some of `memory.LEVELS`; "zo" alone moves the adapter, if there is one.
    """
    scorer = Scorer(adapted, Tokens())
    forward = zeroth_update = backward = update = 0.0
    if any(LEVELS[method][1] for method in methods):
        noise.warm_up(next(iter(adapted.backbone.values())).dtype, config.device)
        alone = list(methods) == ["zo"] and bool(adapted.adapters)
        moved = adapted.adapter_parameters(UPPER) if alone else moved_backbone(adapted, config)
        theta = ZerothOrderLevel(adapted, moved, config)

        def near(batch: Batch) -> None:
            with theta.perturbed(0, config.zo_eps, 0):
                mean_losses(scorer, {"the loss near θ": (UPPER, [batch])})

        def move(batch: Batch) -> None:
            theta.optimizer.estimate = Estimate(0, 0, (0.0,) * config.num_perturbations, config.zo_distribution)
            theta.optimizer.step()

        forward, zeroth_update = _clock(near, batches), _clock(move, batches)
    if any(LEVELS[method][0] for method in methods):
        level = FirstOrderLevel(adapted, scorer, UPPER, 0.0, config)
        backward = _clock(lambda batch: level.gradient([batch], "the loss"), batches)
        update = _clock(lambda batch: level.optimizer.step(), batches)
        level.clear()
    return Times(backward, update, forward, zeroth_update)


def _clock(run: Callable[[Batch], object], batches: Sequence[Batch]) -> float:
    """Mean seconds of a run over batches, after one that does not count."""
    run(batches[0])
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(batches)


def seconds(config: ZOFOConfig, method: str, times: Times) -> float:
    """Of one step of a method, by the formulas of `estimate`."""
    a, q, c = config.gradient_accumulation_steps, config.num_perturbations, int(config.penalty > 0)
    evaluations = a * (2 * q if config.zo_estimator == "two_sided" else q + 1)
    if config.zo_learning_rate == AUTO:
        evaluations += a / CURVATURE_EVERY
    fo = a * times.backward + times.update
    zo = evaluations * times.forward + times.zeroth_update
    match method:
        case "fo":
            return fo
        case "zo":
            return zo
        case "two_stage":
            return config.two_stage_fraction * fo + (1 - config.two_stage_fraction) * zo
        case _:
            coupled = c * a * times.backward + 2 * c * evaluations * times.forward
            return (config.lower_steps + 1) * fo + coupled + zo


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
    """What one method would take.

    Args:
        method: of the key `method`.
        adapter: of the key `adapter`.
        chosen: whether the configuration asks for this one.
        parameters: how many numbers it moves.
        memory: at the peak.
        seconds: per step, without evaluations; None if it was not timed.
    """

    method: str
    adapter: str
    chosen: bool
    parameters: int
    memory: Memory
    seconds: float | None = None


def estimate(config: ZOFOConfig, timed: bool = True) -> list[Row]:
    """The memory and the time of a step by each method, for a configuration's model, adapter and batches.

    Memory: every method's forwards, backwards and optimizer steps run on tensors that have shapes but no memory, and
    the peak of what is alive is counted, on the longest rows of the task. On a CPU the size of this process is added,
    which holds the libraries that a run holds.

    Time: a few real forwards at θ + εz (f), forwards with backwards (b) and steps of the optimizers (u, u_zo) on rows
    as they come, put together with a = `gradient_accumulation_steps`, T = `lower_steps`, c = 1 if there is a penalty,
    and E = 2q evaluations (two-sided; one-sided q + 1; a tenth more of one for an automatic rate):

        fo           a b + u
        zo           a E f + u_zo
        two_stage    both, by their shares of the steps
        bilevel      (T + 1) (a b + u) + c a b + (1 + 2 c) a E f + u_zo

    Args:
        config: of the run; without a task, rows of `max_length` tokens are assumed.
        timed: also load the weights and measure the time, of the methods that fit into the free memory.

    Raises:
        ZofoError: if the model, the adapter or the task cannot be read, or the model cannot run without its weights.

    Examples:
        >>> estimate(ZOFOConfig(model="nowhere/at-all.gguf"))
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: there is no file nowhere/at-all.gguf: give the path of an existing .gguf file
    """
    if config.model is None:
        raise ZofoError("model is not given: add model: ... to the config, or --model ... to the command")
    if config.method == "none":
        raise ZofoError("method none trains nothing, so there is nothing to estimate: leave it out")
    base = load_hollow(config.model, config.dtype)
    tokenizer = load_tokenizer(config.model, base)
    batches = _Batches(config, tokenizer, _examples(config, tokenizer, base))
    libraries = resident_memory(config.device)
    rows: list[Row] = []
    for method, adapter in _variants(config):
        adapted = fake(config, adapter, twins=method == "bilevel")
        memory = step_memory(config, method, adapted, batches.longest(adapted))
        memory.libraries = libraries
        memory.allocator = int(_HOLES * memory.activations) if libraries else 0  # a GPU counts what is allocated
        rows.append(Row(method, adapter, (method, adapter) == _own(config), _moved(method, adapted), memory))
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


def _own(config: ZOFOConfig) -> tuple[str, str]:
    return config.method, config.adapter


def _variants(config: ZOFOConfig) -> list[tuple[str, str]]:
    """Methods and adapters in the order of the table: the four that are always of interest, and the run's own."""
    adapter = "lora" if config.adapter == "none" else config.adapter
    always = [("fo", "none"), ("fo", adapter), ("zo", "none"), ("bilevel", adapter)]
    return list(dict.fromkeys([*always, _own(config)]))


def _examples(config: ZOFOConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> list[Example]:
    """A sample of the training rows; without a task, one row of the greatest length."""
    room = min(config.max_length, AdaptedModel(base).positions)
    if config.task is None and config.data is None:
        return [Example((0,) * (room - 1), ((0,), (1,)), 0, ("a", "b"))]
    if config.data:
        task, _ = make_table_task(config.data, config.text, config.label)
    else:
        task = load_task(str(config.task), config.source)
    splits = split_records(
        task.records(),
        train_size=config.train_size,
        dev_size=config.dev_size,
        test_size=config.test_size,
        lower_fraction=config.lower_fraction,
        seed=config.seed if config.data_seed is None else config.data_seed,
    )
    return tokenize(task.reworded(splits.train[:_SAMPLE], config.template), tokenizer, room)[0]


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


def _moved(method: str, adapted: AdaptedModel) -> int:
    adapters = [p for name in adapted.adapters for p in adapted.adapter_parameters(name).values()]
    whole = method in ("bilevel", "two_stage") or not adapters
    return sum(p.numel() for p in [*adapters, *(adapted.backbone.values() if whole else ())])


def _time(config: ZOFOConfig, rows: Sequence[Row], batches: _Batches) -> None:
    """Fills in the seconds of the rows that fit; those without an adapter first, as it cannot be taken off again."""
    assert config.model is not None
    room = free_memory(config.device)
    rows = [row for row in rows if row.memory.peak - row.memory.libraries <= room]
    model = load_weights(config.model, config.dtype) if rows else None
    for adapter in sorted({row.adapter for row in rows}, key=lambda name: name != "none"):
        assert model is not None
        group = [row for row in rows if row.adapter == adapter]
        adapted = AdaptedModel(model, adapter_config(adapter, model), twins=any(r.method == "bilevel" for r in group))
        cast(nn.Module, adapted.model).to(config.device)
        checkpoint(config, adapted)
        adapter_alone = [row for row in group if row.method == "zo" and adapted.adapters]
        for rows_alike in ([row for row in group if row not in adapter_alone], adapter_alone):
            measured = times(config, adapted, batches.typical(adapted), [row.method for row in rows_alike])
            for row in rows_alike:
                row.seconds = seconds(config, row.method, measured)
