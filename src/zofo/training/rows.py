"""The task of a run and its rows, by the keys of the configuration: for training, evaluation and estimates alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.tasks.lists import require_folder_name, require_options
from zofo.tasks.prompts import as_channel, demonstrations, in_context, in_context_of_each_other, tokens_of_chat
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits, split_records, two_levels
from zofo.tasks.table import make_table_task
from zofo.tasks.task import Task, load_task
from zofo.training.bundles import planned_steps
from zofo.training.trained_rows import was_trained_on

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
    return _loaded(config.tasks[0], config, config.source), None


def _loaded(name: str, config: ZOFOConfig, source: str | None = None) -> Task:
    """A task, whose rows have answers if the run needs these."""
    task = load_task(name, source)
    if config.needs_answers:
        task.require_answers()
    return task


def trained_on(task: Task, rows: Sequence[Record], known: frozenset[bytes]) -> list[bool]:
    """Whether each row, by any template of its task, is among those that a model says it was trained on."""
    wordings = task.wordings(rows) if known else [rows]
    return [any(was_trained_on(record, known) for record in each) for each in zip(*wordings, strict=True)]


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
        task = _loaded(place, config)
        require_folder_name(task.name)
        found[task.name] = task, None
    require_options([task for task, _ in found.values()], config.loss)
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
        seed=config.division_seed,
    )


def require_prompt(rows: Sequence[Record], task: str, config: ZOFOConfig) -> None:
    """Refuses `train_prompt: channel` for rows that cannot be turned around; `task` is the name of theirs."""
    bad = next((row for row in rows if not row.options or row.suffix), None) if config.is_channel else None
    if bad is not None:
        lacks = "a text behind its options" if bad.options else "no options"
        raise ZofoError(
            f"train_prompt is channel, which scores a prompt behind each of its options, but a row of task {task} has "
            f"{lacks}: set train_prompt: direct"
        )


@dataclass(frozen=True)
class Posing:
    """How a run puts the rows of one task to the model: behind training rows, turned around, or as they are.

    Args:
        config: of the run.
        pool: the training rows of the task, of all levels.
        tokenizer: of the model.
        width: tokens of a row with its examples.
    """

    config: ZOFOConfig
    pool: Sequence[Record]
    tokenizer: PreTrainedTokenizerBase
    width: int

    @property
    def shots(self) -> int:
        """Examples in front of a row."""
        return self.config.train_shots if self.config.method_class.trains() else self.config.shots

    def alone(self, rows: Sequence[Record]) -> list[Record]:
        """Rows without examples."""
        return [as_channel(row) for row in rows] if self.config.is_channel else [*rows]

    def trained(self, rows: Sequence[Record]) -> list[Record]:
        """Training rows, each behind others that are drawn for it."""
        if not self.shots or not self.config.method_class.trains():
            return self.alone(rows)
        pool, seed = self.alone(self.pool), self.config.seed
        return in_context_of_each_other(self.alone(rows), pool, self.shots, seed, self.tokenizer, self._free(rows))[0]

    def evaluated(self, rows: Sequence[Record]) -> tuple[list[Record], list[int]]:
        """Rows of dev or test, all behind the same training rows; and how many fit in front of each."""
        return self.behind(rows, self.shots)

    def behind(self, rows: Sequence[Record], shots: int) -> tuple[list[Record], list[int]]:
        """The same with a number of examples that is not of the run's configuration."""
        if not shots or not rows:
            return self.alone(rows), [0] * len(rows)
        shown = demonstrations(self.pool, shots, self.config.seed, rows)
        return in_context(self.alone(rows), self.alone(shown), self.tokenizer, self._free(rows))

    def _free(self, rows: Sequence[Record]) -> int:
        """Tokens of a row with its examples, without those of the chat around them."""
        config = self.config
        return self.width - (
            tokens_of_chat(rows[0], self.tokenizer, config.system_prompt) if config.chat_template else 0
        )
