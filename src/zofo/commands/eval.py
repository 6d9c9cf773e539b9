"""`zofo eval`: a model on the rows of tasks, in every way that a row can be put to it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import yaml
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from zofo.config import ZOFOConfig, parse_config
from zofo.errors import ZofoError, first_line
from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_model, on_device
from zofo.models.peft import note_of_move
from zofo.scoring.batch import Layout
from zofo.scoring.evaluation import Evaluator, Scoring
from zofo.scoring.padding import probe
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.metrics import OPTION_METRICS
from zofo.tasks.prompts import as_channel, as_chat, behind_premise, demonstrations, in_context
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits
from zofo.tasks.table import TASK_FILE
from zofo.tasks.task import Task
from zofo.training.rows import run_splits, run_task
from zofo.training.trained_rows import trained_rows_of, was_trained_on

ALL = "all"
# Which rows are read, and how; then those that are the same for any task.
_ROWS = ("train_size", "test_size", "dev_size", "data_seed", "source", "template")
_ANY_TASK = ("loss", "dtype", "max_length", "chat_template", "system_prompt")
EVAL_KEYS = (*_ROWS[:-1], *_ANY_TASK)


@dataclass(frozen=True)
class Manner:
    """How the rows are put to the model; `template` is a number, "all", or None for that of the configuration."""

    template: str | None = None
    shots: int = 0
    scoring: Scoring = "mean"
    split: str = "test"
    batch_size: int = 16


def eval_config(model: str, task: str, arguments: Sequence[str] = (), adapter: str | None = None) -> ZOFOConfig:
    """The keys of the run that `model` or `adapter` is of, if there is one, and over them those on the command line.

    So the rows called test are those that the run held out, and never some that it trained on.
    """
    run, stored = _config_of_run([path for path in (model, adapter) if path])
    if stored and not _is_task(task, str(stored.get("task") or run / TASK_FILE)):
        stored = {key: stored.get(key) for key in _ANY_TASK}  # its rows are of another task
    elif stored and stored.get("data_seed") is None:
        stored["data_seed"] = stored.get("seed")
    named = {word.lstrip("-").split("=")[0] for word in arguments}
    if named & {"source", "test_size", "dev_size", "data_seed"}:
        stored["train_size"] = None  # of rows that are divided otherwise
    kept = {key: stored.get(key) for key in (*_ROWS, *_ANY_TASK)}
    config = parse_config({"method": "none", "task": task, **kept}, arguments, EVAL_KEYS)
    config.data_seed = config.order_seed
    return config


def settings_of(config: ZOFOConfig, manner: Manner) -> dict[str, Any]:
    """What decides the scores of a task, for the report."""
    template = str(config.template) if manner.template is None else manner.template
    kept = {key: vars(config)[key] for key in EVAL_KEYS}
    return {**kept, "template": template, "shots": manner.shots, "scoring": manner.scoring}


def _is_task(given: str, stored: str) -> bool:
    """Whether a task is that of a run: the same file, or a copy, where both are files; else of the same name."""
    one, other = Path(given).expanduser(), Path(stored)
    if one.is_file() and other.is_file():
        return one.read_bytes() == other.read_bytes()
    return one.stem == other.stem


def _config_of_run(parts: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The run that one of these folders is a part of, and its configuration; that is empty if none is."""
    places = [Path(part).expanduser().resolve().parent for part in parts if Path(part).expanduser().is_dir()]
    for run in [place.parent if place.name.startswith("checkpoint-") else place for place in places]:
        file = run / "config.yaml"
        try:
            content: Any = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ZofoError(f"cannot read {file}, the configuration of the run: {first_line(error)}") from error
        if isinstance(content, dict) and "method" in content:
            return run, cast("dict[str, Any]", content)
    return Path(), {}


def evaluate_model(
    model: str,
    adapter: str | None,
    configs: Sequence[ZOFOConfig],
    manner: Manner,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{task: {metric, loss, rows}} of a model, with or without a stored adapter, on one split of each task.

    Of all templates: {task: {"templates": [those of each], metric: {"mean", "std", "worst"}, ...}}. What is wrong with
    a task or a template is said before the model is loaded.
    """
    known = trained_rows_of(model, adapter)
    sets = [_EvalSet.of(config, manner, known) for config in configs]
    names = [rows.task.name for rows in sets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ZofoError(f"two of the tasks are called {twice}: evaluate them one after the other")
    loaded, tokenizer = load_model(model, configs[0].dtype)
    base = AdaptedModel(on_device(loaded), stored=adapter)
    if adapter and (note := note_of_move(Path(adapter).expanduser())):
        say(note)
    layout = probe(base, tokenizer)
    results: dict[str, Any] = {}
    for rows in sets:
        scores = [rows.score(base, layout, tokenizer, template, say) for template in rows.templates]
        if rows.note:
            say(f"{rows.task.name}: {rows.note}")
        results[rows.task.name] = {"templates": scores, **spread(scores)} if manner.template == ALL else scores[0]
    return results


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst of every number that differs between templates.

    Examples:
        >>> spread([{"accuracy": 0.5}, {"accuracy": 0.75}])["accuracy"]["worst"]
        0.5
    """
    spreads: dict[str, dict[str, float]] = {}
    for key in scores[0]:
        values = [own[key] for own in scores]
        if key not in ("rows", "shots_least", "shots_mean"):
            worst = max(values) if key == "loss" else min(values)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            spreads[key] = {"mean": statistics.mean(values), "std": deviation, "worst": worst}
    return spreads


@dataclass(frozen=True)
class _EvalSet:
    """The rows of one task, checked before the model is loaded."""

    task: Task
    splits: Splits
    rows: list[Record]
    note: str  # what to say of these rows
    templates: list[int]
    config: ZOFOConfig
    manner: Manner

    @classmethod
    def of(cls, config: ZOFOConfig, manner: Manner, known: frozenset[bytes] | None) -> Self:
        task, _ = run_task(config)
        splits = run_splits(task, config)
        if not vars(splits)[manner.split]:
            split = manner.split
            raise ZofoError(f"task {task.name} has no row left for {split}: give more rows, or {split}_size")
        rows, note = _honest_rows(task, splits, manner.split, known)
        templates = _templates(task, config, manner)
        for template in templates:
            task.reworded(rows, template)
        return cls(task, splits, rows, note, templates, config, manner)

    def score(
        self,
        base: AdaptedModel,
        layout: Layout,
        tokenizer: PreTrainedTokenizerBase,
        template: int,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        """The scores of the rows, rendered by one template."""
        task, config, manner = self.task, self.config, self.manner
        records = task.reworded(self.rows, template)
        if manner.scoring != "mean" and not records[0].options:
            raise ZofoError(f"scoring {manner.scoring} compares options, but task {task.name} has none: leave it out")
        shots = demonstrations(self.splits.train, manner.shots, config.order_seed, self.rows)
        shots = task.reworded(shots, template)
        width = min(config.max_length, base.positions)
        pose = partial(_posed, shown=shots, tokenizer=tokenizer, width=width, config=config, scoring=manner.scoring)
        examples, truncated, used = pose(records)
        words = f"{task.name}, template {template}"
        if truncated:
            say(f"{words}: {truncated} rows are longer than {width} tokens: they were truncated from the left")
        premises = pose([behind_premise(record) for record in records])[0] if manner.scoring == "pmi" else []
        evaluator = Evaluator(
            Scorer(base, Tokens(), layout),
            tokenizer,
            task.metrics,
            config.loss if task.metrics[0] in OPTION_METRICS else "lm",
            manner.batch_size,
            partial(_placed, base),
            manner.scoring,
        )
        scores = evaluator.evaluate(examples, premises)
        if not manner.shots:
            return scores
        say(f"{words}: {min(used)} to {max(used)} of {manner.shots} examples fit in front of a row")
        return {**scores, "shots_least": min(used), "shots_mean": statistics.mean(used)}


def _honest_rows(task: Task, splits: Splits, split: str, known: frozenset[bytes] | None) -> tuple[list[Record], str]:
    """The rows of a split without those that the model was trained on (of train, exactly those), and what to say."""
    rows: list[Record] = vars(splits)[split]
    if known is None:
        return rows, "this model says nothing of the rows that it was trained on: some of these may be among them"
    if split == "train":
        every = [*splits.train, *splits.dev, *splits.test]
        rows = [row for row in every if was_trained_on(row, known)]
        if not rows:
            raise ZofoError(f"this model was trained on no row of task {task.name}: leave out --split train")
        return rows, f"{len(rows)} rows that this model was trained on"
    honest = [row for row in rows if not was_trained_on(row, known)]
    if not honest:
        raise ZofoError(f"this model was trained on all rows of {split} of task {task.name}: give other rows")
    left_out = len(rows) - len(honest)
    return honest, f"{left_out} of {len(rows)} rows were trained on, and are left out" if left_out else ""


def _templates(task: Task, config: ZOFOConfig, manner: Manner) -> list[int]:
    if manner.template is None:
        return [config.template]
    if manner.template == ALL:
        return list(range(len(task.templates)))
    if not manner.template.isdigit():
        raise ZofoError(f"template is {manner.template!r}, but must be a number from 0, or {ALL}")
    return [int(manner.template)]


def _placed(base: AdaptedModel, batch: Any) -> Any:
    return send_to_device(batch, base.base.device)


def _posed(
    records: list[Record],
    *,
    shown: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    width: int,
    config: ZOFOConfig,
    scoring: Scoring,
) -> tuple[list[Example], int, list[int]]:
    """The records as they are put to the model, how many of them were truncated, and the examples in front of each."""
    if scoring == "channel":
        records, shown = [as_channel(r) for r in records], [as_channel(r) for r in shown]
    around = 0
    if config.chat_template:  # the system's words and the marks of turns take their tokens as well
        plain, framed = records[0], as_chat(records[0], tokenizer, config.system_prompt)
        whole = tokenizer(framed.prompt, add_special_tokens=False)["input_ids"]
        around = len(whole) - len(tokenizer(plain.prompt)["input_ids"])
    records, used = in_context(records, shown, tokenizer, width - around)
    if config.chat_template:
        records = [as_chat(r, tokenizer, config.system_prompt) for r in records]
    return *tokenize(records, tokenizer, width), used
