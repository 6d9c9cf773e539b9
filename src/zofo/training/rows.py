"""The task of a run and its rows, by the keys of the configuration: for training, evaluation and estimates alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.tasks.splits import Splits, split_records, two_levels
from zofo.tasks.table import make_table_task
from zofo.tasks.task import Task, load_task
from zofo.training.bundles import planned_steps

_T = TypeVar("_T")


def run_task(config: ZOFOConfig) -> tuple[Task, dict[str, Any] | None]:
    """The only task, that `task` names or `data` makes; with the content of its file, if it was made from a table."""
    if config.data:
        if config.task:
            raise ZofoError(f"both task ({config.task}) and data ({config.data}) are given: leave one out")
        if config.source:
            raise ZofoError(f"source ({config.source}) is of a task, but data ({config.data}) is given: leave one out")
        return make_table_task(config.data, config.text, config.label)
    for key in ("text", "label"):
        if vars(config)[key]:
            raise ZofoError(f"{key} ({vars(config)[key]}) is a column of data, but data is not given: leave it out")
    if not config.tasks:
        raise ZofoError(
            "task is not given: add task: ... to the config, or --task ... to the command; or give a table of "
            "your own with --data, --text and --label"
        )
    if len(config.tasks) > 1:
        raise ZofoError(f"task is {', '.join(config.tasks)}, but one is needed here: give one of them")
    return load_task(config.tasks[0], config.source), None


def run_tasks(config: ZOFOConfig) -> dict[str, tuple[Task, dict[str, Any] | None]]:
    """The tasks of a run by their names: those that `task` lists, or the only one."""
    if len(config.tasks) < 2:
        task, spec = run_task(config)
        return {task.name: (task, spec)}
    if config.source or config.data:
        key = "source" if config.source else "data"
        raise ZofoError(
            f"{key} is {vars(config)[key]}, but task lists {len(config.tasks)} tasks: leave one of them out"
        )
    found: dict[str, tuple[Task, dict[str, Any] | None]] = {}
    for place in config.tasks:
        task = load_task(place)
        if task.name in found:
            raise ZofoError(f"two of the tasks are called {task.name}: give one of them another name, or leave it out")
        if Path(task.name).name != task.name or task.name.startswith("."):
            raise ZofoError(f"task {task.name!r} cannot be the name of a folder, which each of several tasks has")
        found[task.name] = task, None
    return found


def run_length(config: ZOFOConfig, rows: Sequence[int]) -> int:
    """Iterations of a run on so many training rows of each task."""
    if config.max_steps > 0:
        return config.max_steps
    tasks = [{name: len(part) for name, part in level_rows([0] * count, config).items()} for count in rows]
    return planned_steps(config, tasks, config.method_class.streams(config))


def level_rows(rows: list[_T], config: ZOFOConfig) -> dict[str, list[_T]]:
    """The training rows as the method reads them, by split: all, or those of the lower and of the upper level."""
    splits = config.method_class.splits(config)
    if len(splits) == 1:
        return {splits[0]: rows}
    return dict(zip(splits, two_levels(rows, cast(float, config.lower_fraction)), strict=True))


def run_splits(task: Task, config: ZOFOConfig) -> Splits:
    """The records of a task in train, dev and test, rendered by its first template."""
    return split_records(
        task.records(),
        train_size=config.train_size,
        dev_size=config.dev_size,
        test_size=config.test_size,
        seed=config.order_seed,
    )
