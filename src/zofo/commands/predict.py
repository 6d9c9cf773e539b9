"""`zofo predict`: what a model answers to new rows, which need no labels."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from zofo.commands.results import write_new
from zofo.commands.stored import Loaded, StoredRun
from zofo.config import ZOFOConfig
from zofo.console import Say
from zofo.errors import ZofoError
from zofo.scoring.evaluation import Answer, Evaluator, require_numbers
from zofo.scoring.generation import ONE_LINE
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.prompts import as_chat
from zofo.tasks.records import Row
from zofo.tasks.sources import read_rows
from zofo.tasks.task import load_task

COLUMNS = ("prediction", "probability", "scores", "truncated")
"""What is added to each row; the second and the third one where options are compared."""

_SCORES = pyarrow.map_(pyarrow.string(), pyarrow.float64())


def predict(
    model: str,
    adapter: str | None,
    config: ZOFOConfig,
    rows: Sequence[Row],
    batch_size: int,
    say: Say,
) -> list[Row]:
    """The rows with the answers of a model, with or without a stored adapter.

    Where the task has options: `prediction` is the most probable one, `probability` is its softmax over the mean
    log-probabilities per token, and `scores` are these, in nats, by option. Else `prediction` is the generated text.
    `truncated` marks rows whose prompt was cut.

    `config` has the task, and how rows are put to the model; see `eval_config`. Rows that do not suit the task are
    refused before the model is loaded.
    """
    (name,) = config.tasks
    task = load_task(name)
    run = StoredRun.of(model, adapter)
    span = run.span(name) if run and run.is_of_task(name) else ONE_LINE
    records = task.questions(rows, config.template, span.example)
    loaded = Loaded.of(model, adapter, config.dtype)
    if config.chat_template:
        records = [as_chat(record, loaded.tokenizer, config.system_prompt) for record in records]
    width = min(config.max_length, loaded.adapted.positions)
    examples, truncated = tokenize(records, loaded.tokenizer, width)
    if truncated:
        say(f"{truncated} of {len(rows)} rows are longer than {width} tokens: they were truncated from the left")
    evaluator = Evaluator(
        loaded.scorer, loaded.tokenizer, task.metrics, config.loss, batch_size, loaded.place,
        span=span, progress="predict",
    )  # fmt: skip
    answers = evaluator.answers(examples)
    require_numbers(answers)
    return [{**row, **_columns(e, answer)} for row, e, answer in zip(rows, examples, answers, strict=True)]


def rows_of(data: str, output: Path | None) -> list[Row]:
    """The rows of a data file, or of a split of a Hub data set, which `output` can hold with their answers."""
    if output is not None and output.suffix.lower() not in _WRITERS:
        raise ZofoError(f"output is {output}, but must end in {', '.join(_WRITERS)}, by which its form is known")
    path = Path(data).expanduser()
    splits = read_rows(str(path.resolve()) if path.exists() else data, Path())
    if len(splits) > 1:
        raise ZofoError(f"data is {data}, which has {', '.join(splits)}: name one of them, such as {data}#test")
    (rows,) = splits.values()
    known = {column for row in rows for column in row}
    for column in COLUMNS:
        if column in known:
            raise ZofoError(f"{data} has a column {column!r} already, which zofo predict would write: rename it")
    if (output is None or output.suffix.lower() != ".parquet") and any(
        isinstance(value, bytes) for row in rows for value in row.values()
    ):
        raise ZofoError(f"{data} has binary values, which texts cannot hold: give --output FILE.parquet")
    return rows


def write(rows: Sequence[Row], file: Path) -> None:
    """Writes rows as CSV, JSON lines or Parquet, by the name of the file, which must be new."""
    write_new(file, _WRITERS[file.suffix.lower()](rows))


def as_jsonl(rows: Sequence[Row]) -> bytes:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def _columns(example: Example, answer: Answer) -> Row:
    if answer.scores is None:
        return {"prediction": answer.text, "truncated": example.truncated}
    names = [text.strip() for text in example.texts]
    names = names if len(set(names)) == len(names) else [*example.texts]
    best = example.texts.index(answer.text)
    return {
        "prediction": names[best],
        "probability": answer.probabilities[best],
        "scores": dict(zip(names, answer.scores.tolist(), strict=True)),
        "truncated": example.truncated,
    }


def _as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _names(rows))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _as_parquet(rows: Sequence[Row]) -> bytes:
    """A column whose values have several types becomes one of texts."""
    columns: dict[str, Any] = {}
    for name in _names(rows):
        values: list[Any] = [row.get(name) for row in rows]
        if name == "scores":  # rows may have options of their own
            columns[name] = pyarrow.array([[*value.items()] for value in values], _SCORES)
            continue
        try:
            columns[name] = pyarrow.array([str(value) if isinstance(value, str) else value for value in values])
            pyarrow.parquet.write_table(pyarrow.table({name: columns[name]}), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError):  # several types, none, or no number of 64 bits
            columns[name] = pyarrow.array([None if value is None else str(_cell(value)) for value in values])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _cell(value: Any) -> Any:
    """A value in a table of text: what has parts, or a name of its own in JSON, is written as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | bool) else value


_WRITERS = {".csv": _as_csv, ".jsonl": as_jsonl, ".parquet": _as_parquet}
