"""The task of a run and its rows, by the keys of the configuration: for training, evaluation and estimates alike."""

from typing import Any, TypeVar, cast

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.tasks.splits import Splits, split_records, two_levels
from zofo.tasks.table import make_table_task
from zofo.tasks.task import Task, load_task
from zofo.training.bundles import planned_steps

_T = TypeVar("_T")


def run_task(config: ZOFOConfig) -> tuple[Task, dict[str, Any] | None]:
    """The task that `task` names or `data` makes; with the content of its file, if it was made from a table."""
    if config.data:
        if config.task:
            raise ZofoError(f"both task ({config.task}) and data ({config.data}) are given: leave one out")
        if config.source:
            raise ZofoError(f"source ({config.source}) is of a task, but data ({config.data}) is given: leave one out")
        return make_table_task(config.data, config.text, config.label)
    for key in ("text", "label"):
        if vars(config)[key]:
            raise ZofoError(f"{key} ({vars(config)[key]}) is a column of data, but data is not given: leave it out")
    if not config.task:
        raise ZofoError(
            "task is not given: add task: ... to the config, or --task ... to the command; or give a table of "
            "your own with --data, --text and --label"
        )
    task = load_task(config.task, config.source)
    if config.needs_answers:
        task.require_answers()
    return task, None


def run_length(config: ZOFOConfig, rows: int) -> int:
    """Iterations of a run on so many training rows."""
    if config.max_steps > 0:
        return config.max_steps
    parts = level_rows([0] * rows, config)
    return planned_steps(config, {name: len(part) for name, part in parts.items()}, config.method_class.streams(config))


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
