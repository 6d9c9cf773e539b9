"""A task from a table: `zofo train --data reviews.csv --text text --label label`."""

import re
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError, did_you_mean, listed
from zofo.parse import Cell
from zofo.tasks.records import Record, Row
from zofo.tasks.sources import read_rows
from zofo.tasks.task import Task, parse_task

TASK_FILE = "task.yaml"
_MOST_LABELS = 20
_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def table_task(file: str, text: str | None, label: str | None) -> dict[str, Any]:
    """The content of a task file for a table, from its columns of texts and labels: each label text is an option.

    Refuses columns with gaps, and labels that are no classes: one only, more than 20, or numbers to be predicted.
    """
    if text is None or label is None:
        missing = "--text" if text is None else "--label"
        raise ZofoError(f"data is {file}, but {missing} is not given: name the column that holds the {missing[2:]}")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ZofoError(
            f"data is {file}, and there is no such file: give a table; for a folder, a package's file or a Hub data "
            "set write a task file (docs/tasks.md)"
        )
    (rows,) = read_rows(str(path), path.parent).values()
    for column in (text, label):
        _require_column(rows, column, file)
    labels = sorted({_cell_text(row[label]) for row in rows})
    _require_classes(labels, [row[label] for row in rows], label, file)
    text_template, label_template = (f"{{{{ row[{column!r}] | trim }}}}" for column in (text, label))
    return {
        "name": path.name.split(".")[0],
        "description": f"Made from {path.name}: the column {text} as text, the column {label} as label.",
        "source": str(path),
        "prompt": f"{text_template}\n{label.replace('_', ' ').strip().capitalize()}:",
        "answer": f" {label_template}",
        "options": [f" {name}" for name in labels],
        "metric": ["accuracy", "macro_f1"],
        "templates": [{"prompt": f"{text_template}\n", "answer": label_template, "options": labels}],
    }


def make_table_task(file: str, text: str | None, label: str | None) -> tuple[Task, dict[str, Any]]:
    """The task of a table, and the content of its file."""
    spec = table_task(file, text, label)
    return parse_task(spec, Path(spec["source"]).with_suffix(".yaml")), spec


def introduction(record: Record, file: Path) -> list[str]:
    """Lines that show the task of a table, from its first record, and how to improve it."""
    return [
        f"the prompt, of the first row: {record.prompt!r}",
        f"the candidates after it: {', '.join(map(repr, record.options))}",
        f"the run keeps this task as {file}; words that say what is asked usually score better: copy it, edit prompt, "
        "answer and options (docs/tasks.md), and give it as --task",
    ]


def _require_column(rows: list[Row], column: str, file: str) -> None:
    known = list(dict.fromkeys(key for row in rows for key in row))
    if column not in known:
        hint = did_you_mean(column, known, "")
        raise ZofoError(f"{file} has no column {column!r}: {hint}{' ' * bool(hint)}it has {listed(known)}")
    empty = [number for number, row in enumerate(rows, start=1) if not _cell_text(row.get(column))]
    if empty:
        first = ", ".join(map(str, empty[:3]))
        more = ", ..." * (len(empty) > 3)
        raise ZofoError(
            f"{file}: {len(empty)} of {len(rows)} rows have nothing in the column {column!r} (rows {first}{more}): "
            "fill them in or remove them"
        )
    if any(isinstance(row[column], bytes) for row in rows):
        raise ZofoError(f"{file}: the column {column!r} is binary (bytes that are no UTF-8): give a column of texts")
    nested = next((row[column] for row in rows if isinstance(row[column], dict | list)), None)
    if nested is not None:
        raise ZofoError(
            f"{file}: the column {column!r} holds {nested!r:.80}, but must hold texts: write a task file instead"
        )


def _require_classes(labels: list[str], values: list[Any], column: str, file: str) -> None:
    numbers = [number for number in map(_number, values) if number is not None]
    if len(labels) == 1:
        raise ZofoError(f"{file}: every row has the label {labels[0]!r}: there is nothing to learn; check the column")
    if any(not float(number).is_integer() for number in numbers) or (
        len(numbers) == len(values) and len(labels) > _MOST_LABELS
    ):
        raise ZofoError(
            f"{file}: the column {column!r} holds numbers such as {numbers[0]:g}, and numbers are not predicted: make "
            "a few classes of them"
        )
    if len(labels) > _MOST_LABELS:
        raise ZofoError(
            f"{file}: the column {column!r} has {len(labels)} labels, and at most {_MOST_LABELS} can be options: "
            "write a task file that generates the answer, or give another column"
        )


def _number(value: Any) -> float | None:
    """A label as a number, if it is one: in JSON a number, in a table of text a text of digits."""
    if isinstance(value, Cell):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cell_text(value: Any) -> str:
    return "" if value is None else str(value).strip()
