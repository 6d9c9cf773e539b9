"""One example as text: what a task makes of a row, and what becomes tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from zofo.errors import ZofoError
from zofo.habits import column_hint, dataset_hint
from zofo.parse import is_texts
from zofo.tasks.conversations import Turn, turns_of

Row = dict[str, Any]
_R = TypeVar("_R", bound="Record")


@dataclass(frozen=True)
class Record:
    """One example as text.

    Args:
        prompt: what the model reads.
        completion: the right answer, as it continues the prompt.
        options: the candidates, one of which is `completion`; empty for generation.
        references: every right answer, where there are several; `completion` is the target of training.
        suffix: text that follows each option, and is scored with it.
        partial: score the suffix alone, after each option: partial evaluation, as for WinoGrande.
        premise: replaces the prompt in calibrated scores.
        group: rows with the same text are scored together by the metrics of groups.
        row: the row that it was made from.
        question: the identity of the record that it is another form of, such as the one behind examples.
        answered: whether `completion` is a right answer; else it stands in for one, see `stand_in`.
    """

    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    suffix: str = ""
    partial: bool = False
    premise: str = ""
    group: str = ""
    row: Row | None = field(default=None, compare=False, repr=False)
    question: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    answered: bool = field(default=True, compare=False, repr=False)

    @property
    def asked(self) -> str:
        """The prompt as the task makes it, without a chat format around it."""
        return self.prompt

    @property
    def right(self) -> tuple[str, ...]:
        return self.references or (self.completion,)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two records that ask the same question."""
        return self.question or self._asks

    @property
    def _asks(self) -> tuple[Any, ...]:
        return (self.prompt, self.suffix, self.options) if self.suffix else (self.prompt,)


@dataclass(frozen=True)
class Conversation(Record):
    """A record whose prompt is what the user says last, after the turns `earlier`; a chat format is needed for it."""

    earlier: tuple[Turn, ...] = ()

    @property
    def _asks(self) -> tuple[Any, ...]:
        return (*super()._asks, self.earlier)


Rows = Sequence[Record] | Sequence[Row]


def records(rows: Rows, name: str = "the data set", answered: bool = True) -> list[Record]:
    """Rows with the texts `prompt` and `completion`, and perhaps `options`, or conversations, as records.

    `rows` may be a list, a datasets.Dataset or a pandas DataFrame; `name` is for messages. Where the objective is a
    reward, they need not be `answered`.
    """
    made: list[Record] = []
    for row, where in _numbered(rows, name):
        if isinstance(row, Record):
            made.append(row)
            continue
        has_answer = answered or "completion" in row or "messages" in row
        made.append(replace(_record(row, where, None if has_answer else ""), row=row, answered=has_answer))
    return made


def questions(rows: Rows, example: str = "") -> list[Record]:
    """Rows with the text `prompt`, and perhaps `options`, as records whose answer is not known; see `stand_in`.

    A conversation may end with what the user says.
    """
    return [_record(row, where, example) for row, where in _numbered(rows, "the data set")]


def _numbered(rows: Rows, name: str) -> Iterator[tuple[Record | Row, str]]:
    """Each row, and what messages call it."""
    if type(rows).__name__ == "DataFrame" and type(rows).__module__.startswith("pandas"):
        import numpy as np  # which `zofo tasks` need not wait for

        frame: Any = rows
        table: list[Row] = frame.astype(object).where(frame.notna(), None).to_dict("records")
        rows = [{key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in row.items()} for row in table]
    if problem := dataset_hint(name, rows):
        raise ZofoError(problem)
    for index, row in enumerate(cast("Sequence[Any]", rows)):
        if not isinstance(row, Record | dict):
            raise ZofoError(
                f"row {index} is {row!r:.80}: rows must be dicts with prompt, completion and perhaps options"
            )
        yield cast("Record | Row", row), f"row {index}"


def _record(row: Record | Row, where: str, example: str | None) -> Record:
    """A row as a record; where `example` is given, one whose answer is not known."""
    try:
        return row if isinstance(row, Record) else checked(_made(row, where, example))
    except RecordError as error:
        raise ZofoError(f"{where}: {error}") from error


def _made(row: Row, where: str, example: str | None) -> Record:
    options: Any = row.get("options") or ()
    if not is_texts(options):
        raise ZofoError(f"{where}: options must be a list of texts, but are {options!r:.80}")
    options = tuple(options)
    turns = turns_of(row, where, unknown="" if example is None else stand_in("", options, example))
    if turns:
        *earlier, (_, asked), (_, answered) = turns
        return Conversation(asked, answered, options, earlier=tuple(earlier))
    if example is not None and not isinstance(row.get("prompt"), str):
        raise ZofoError(f"{where} has no text 'prompt': rows to predict need prompt, and perhaps options")
    for key in ("prompt", "completion") if example is None else ():
        if not isinstance(row.get(key), str):
            hint = column_hint(row) or "rows need prompt, completion and perhaps options, or messages"
            raise ZofoError(f"{where} has no text {key!r}: {hint}")
    completion = row["completion"] if example is None else stand_in(row["prompt"], options, example)
    return Record(row["prompt"], completion, options)


def stand_in(prompt: str, options: Sequence[str], example: str = "") -> str:
    """In place of an answer that is not known: an option, another row's answer, or a word that is like most answers."""
    if options or example:
        return options[0] if options else example
    return "a" if prompt[-1:].isspace() else " a"


def digest(records: Sequence[Record], columns: bool = False) -> str:
    """A short hash of these records in this order, and of all `columns` of their rows; detects changed rows."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(repr(record).encode())
        if columns and record.row:
            sha.update(repr(sorted(record.row.items())).encode())
    return sha.hexdigest()[:16]


class RecordError(ZofoError):
    """What is wrong with a record, for messages that say of which row it is."""


def checked(record: _R) -> _R:
    """The record itself. Refuses empty texts, equal options, and a completion that is none of the options."""
    if not record.prompt.strip():
        raise RecordError("the prompt is empty")
    if not record.completion.strip():
        raise RecordError("the answer is empty")
    if record.options and record.completion not in record.options:
        raise RecordError(f"the answer {record.completion!r} is none of the options {list(record.options)}")
    if len(set(record.options)) < len(record.options):
        raise RecordError(f"the options {list(record.options)} repeat one")
    if record.partial and not record.suffix.strip():
        raise RecordError("nothing is left to score: the suffix is empty, and score is 'suffix'")
    return record
