"""`zofo tasks`: the built-in tasks, and what a model sees of them."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from zofo.errors import ZofoError
from zofo.packages import PACKAGE_SCHEME, package_file
from zofo.tasks.records import Record
from zofo.tasks.task import Task, load_task, task_names

_MARK = "  <- right"
_LONGEST = 1_200  # characters of a prompt that are shown
_OPTIONS = 12


def listing() -> str:
    """A table of all tasks: name, kind, templates, metric, what is here offline, source, licence."""
    head = ("name", "kind", "templates", "metric", "offline", "source", "licence")
    lines = [head, *(_line(load_task(name)) for name in task_names())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    more = "zofo tasks NAME counts the rows of a task, and shows one in the words of each template."
    return "\n".join([*table, "", more])


def page(name: str, source: str | None = None) -> str:
    """A task with one rendered row for each of its templates."""
    task = load_task(name, source)
    splits = task.records()
    rows = next((splits[part] for part in ("all", "train", "dev", "test") if splits.get(part)), [])
    if not rows:
        raise ZofoError(f"task {task.name} keeps none of the rows of its source: check `where`")
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in splits.items())
    about = f"rows: {sizes}; metric: {', '.join(task.metrics)}; source: {_places(task)}; licence: {task.licence}"
    lines = [
        f"# {task.name}",
        "",
        textwrap.fill(task.description, 120),
        "",
        textwrap.fill(about, 120),
    ]
    for number in range(len(task.templates)):
        lines += ["", f"## template {number}", "", *_rendered(task.reworded(rows[:1], number)[0])]
    return "\n".join(lines)


def _line(task: Task) -> Sequence[str]:
    return (
        task.name,
        "options" if task.has_options else "generation",
        str(len(task.templates)),
        ", ".join(task.metrics),
        "yes" if all(map(_offline, task.source.values())) else "no",
        _places(task),
        task.licence,
    )


def _offline(source: str) -> bool:
    """Whether a source can be read without a network."""
    if source.startswith(PACKAGE_SCHEME):
        try:
            return package_file(source).is_file()
        except ZofoError:
            return False
    name, _, config = source.partition("#")[0].partition(":")
    # datasets.config.HF_DATASETS_CACHE, without the second that its import takes
    cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return (cache / name.replace("/", "___") / config).is_dir() or Path(name).exists()


def _places(task: Task) -> str:
    """Where the rows are, said once for all splits."""
    return ", ".join(dict.fromkeys(source.partition("#")[0] for source in task.source.values()))


def _rendered(record: Record) -> list[str]:
    """A record as the model sees it: a bar in front of its text, then the options."""
    prompt = record.prompt if len(record.prompt) <= _LONGEST else f"{record.prompt[:_LONGEST]} [...]"
    shown = [f"| {line}" for line in prompt.split("\n")]
    if not record.answered:
        return [*shown, "", "no answer, which rewards need not have"]
    if not record.options:
        return [*shown, "", f"answer: {record.completion!r}", *(f"also right: {text!r}" for text in record.right[1:])]
    options = [
        f"option: {option + record.suffix!r}" + _MARK * (option in record.right or option == record.completion)
        for option in record.options[:_OPTIONS]
    ]
    left = len(record.options) - len(options)
    more = [f"... and {left} more"] * (left > 0)
    only = [f"scored: {record.suffix!r} alone"] * record.partial
    return [*shown, "", *options, *more, *only]
