"""`zofo eval`: a model on the rows of tasks, in every way that a row can be put to it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError, first_line
from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_model, on_device
from zofo.scoring.evaluation import Scoring, evaluate
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, LossKind, tokenize
from zofo.tasks.metrics import OPTION_METRICS
from zofo.tasks.prompts import as_channel, as_chat, behind_premise, demonstrations, in_context
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits, split_records
from zofo.tasks.table import TASK_FILE
from zofo.tasks.task import Task, load_task

ALL = "all"


@dataclass(frozen=True)
class EvalSettings:
    """Which rows `zofo eval` reads, and how; the defaults are those of a training run.

    Args:
        train_size: training rows, as in training.
        test_size: rows of test, as in training.
        dev_size: rows of dev, as in training.
        data_seed: of the order of the rows, and of the choice of examples in context.
        max_length: tokens of all that is read.
        loss: which loss to report.
        dtype: of the model.
        template: which of the task's templates, or all.
        shots: training rows to show in context.
        scoring: how options are compared.
        source: where the rows are, in place of the task's own source.
        chat_template: put prompts into the model's chat format.
        system_prompt: of the chat.
    """

    train_size: int | None = None
    test_size: int | None = None
    dev_size: int | None = None
    data_seed: int = 42
    max_length: int = 512
    loss: LossKind = "options"
    dtype: DType = "float32"
    template: str = "0"
    shots: int = 0
    scoring: Scoring = "mean"
    source: str | None = None
    chat_template: bool = False
    system_prompt: str | None = None


def eval_settings(model: str, task: str, given: dict[str, Any]) -> EvalSettings:
    """The settings of the run that `model` or the adapter is of, if there is one, and over them what is given.

    So that the rows called test are those that the run held out, and never some that it trained on.

    Raises:
        ZofoError: if the run's configuration cannot be read.
    """
    run, stored = _config_of_run([path for path in (model, given.get("adapter")) if path])
    if stored and not _is_task(task, str(stored.get("task") or run / TASK_FILE)):
        # its rows are of another task
        stored = {key: stored.get(key) for key in ("loss", "dtype", "max_length", "chat_template", "system_prompt")}
    elif stored and stored.get("data_seed") is None:
        stored["data_seed"] = stored.get("seed", EvalSettings.data_seed)
    if any(given.get(key) is not None for key in ("source", "test_size", "dev_size", "data_seed")):
        stored["train_size"] = None  # of rows that are divided otherwise
    chosen = {name: value for name, value in [*stored.items(), *given.items()] if value is not None}
    chosen["template"] = str(chosen.get("template", EvalSettings.template))
    names = [field.name for field in fields(EvalSettings)]
    return EvalSettings(**{name: value for name, value in chosen.items() if name in names})


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
    tasks: Mapping[str, EvalSettings],
    split: str,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{task: {metric, loss, rows}} of a model, with or without a stored adapter, on one split of each task.

    Of all templates: {task: {"templates": [those of each], metric: {"mean", "std", "worst"}, ...}}.

    Raises:
        ZofoError: if a task or template is wrong, or a row cannot be put to the model so; before the model is loaded,
            where that can be known.
    """
    parts: dict[str, tuple[Task, Splits, list[Record], EvalSettings]] = {}
    for given, settings in tasks.items():
        task = load_task(given, settings.source)
        splits = _split(task, settings)
        rows = {"test": splits.test, "dev": splits.dev, "train": splits.train}[split]
        if task.name in parts:
            raise ZofoError(f"two of the tasks are called {task.name}: evaluate them one after the other")
        if not rows:
            raise ZofoError(f"task {task.name} has no row left for {split}: give more rows, or {split}_size")
        for number in _numbers(task, settings):
            task.reworded(rows, number)
        parts[task.name] = (task, splits, rows, settings)
    loaded, tokenizer = load_model(model, next(iter(tasks.values())).dtype)
    base = AdaptedModel(on_device(loaded), stored=adapter)
    found: dict[str, Any] = {}
    for name, (task, splits, rows, settings) in parts.items():
        numbers = _numbers(task, settings)
        scores = [
            _of_template(base, tokenizer, task, rows, splits, number, batch_size, settings, say) for number in numbers
        ]
        found[name] = scores[0] if settings.template != ALL else {"templates": scores, **spread(scores)}
    return found


def spread(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst of every number that differs between templates.

    Examples:
        >>> spread([{"accuracy": 0.5}, {"accuracy": 0.75}])["accuracy"]["worst"]
        0.5
    """
    made: dict[str, dict[str, float]] = {}
    for key in scores[0]:
        values = [own[key] for own in scores]
        if key not in ("rows", "shots_least", "shots_mean"):
            worst = max(values) if key == "loss" else min(values)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            made[key] = {"mean": statistics.mean(values), "std": deviation, "worst": worst}
    return made


def _numbers(task: Task, settings: EvalSettings) -> list[int]:
    if settings.template == ALL:
        return list(range(len(task.templates)))
    if not settings.template.isdigit():
        raise ZofoError(f"template is {settings.template!r}, but must be a number from 0, or {ALL}")
    return [int(settings.template)]


def _split(task: Task, settings: EvalSettings) -> Splits:
    return split_records(
        task.records(),
        train_size=settings.train_size,
        dev_size=settings.dev_size,
        test_size=settings.test_size,
        lower_fraction=0.5,
        seed=settings.data_seed,
    )


def _of_template(
    base: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Record],
    splits: Splits,
    template: int,
    batch_size: int,
    settings: EvalSettings,
    say: Callable[[str], None],
) -> dict[str, float]:
    kind = settings.loss if task.metrics[0] in OPTION_METRICS else "lm"
    asked = task.reworded(rows, template)
    if settings.scoring != "mean" and not asked[0].options:
        raise ZofoError(f"scoring {settings.scoring} compares options, but task {task.name} has none: leave it out")
    shown = task.reworded(demonstrations(splits.train, settings.shots, settings.data_seed, rows), template)
    room = min(settings.max_length, base.positions)
    pose = partial(_posed, shown=shown, tokenizer=tokenizer, room=room, settings=settings)
    examples, cut, used = pose(asked)
    words = f"{task.name}, template {template}"
    if cut:
        say(f"{words}: {cut} rows are longer than {room} tokens: they lost their beginning")
    premises = pose([behind_premise(record) for record in asked])[0] if settings.scoring == "pmi" else []
    found = evaluate(
        Scorer(base, Tokens()), examples, metrics=task.metrics, kind=kind, tokenizer=tokenizer, batch_size=batch_size,
        scoring=settings.scoring, premises=premises, place=partial(_placed, base),
    )  # fmt: skip
    if settings.shots:
        say(f"{words}: {min(used)} to {max(used)} of {settings.shots} examples fit in front of a row")
        found = {**found, "shots_least": min(used), "shots_mean": statistics.mean(used)}
    return found


def _placed(base: AdaptedModel, batch: Any) -> Any:
    return send_to_device(batch, base.base.device)


def _posed(
    records: list[Record],
    *,
    shown: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    settings: EvalSettings,
) -> tuple[list[Example], int, list[int]]:
    """The records as they are put to the model, how many of them were cut, and the examples in front of each."""
    if settings.scoring == "channel":
        records, shown = [as_channel(r) for r in records], [as_channel(r) for r in shown]
    around = 0
    if settings.chat_template:  # the system's words and the marks of turns take their room as well
        plain, framed = records[0], as_chat(records[0], tokenizer, settings.system_prompt)
        around = len(tokenizer(framed.prompt)["input_ids"]) - len(tokenizer(plain.prompt)["input_ids"])
    records, used = in_context(records, shown, tokenizer, room - around)
    if settings.chat_template:
        records = [as_chat(r, tokenizer, settings.system_prompt) for r in records]
    return *tokenize(records, tokenizer, room), used
