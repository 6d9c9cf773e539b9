"""One example as text: what a task makes of a row, and what becomes tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zofo.errors import ZofoError

Row = dict[str, Any]


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

    @property
    def right(self) -> tuple[str, ...]:
        """Every right answer."""
        return self.references or (self.completion,)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two records that ask the same question."""
        return (self.prompt, self.suffix, self.options) if self.suffix else (self.prompt,)


Rows = Sequence[Record] | Sequence[Row]


def records(rows: Rows) -> list[Record]:
    """Rows with the texts `prompt` and `completion`, and perhaps `options`, as records."""
    converted: list[Record] = []
    for index, row in enumerate(rows):
        if isinstance(row, Record):
            converted.append(row)
            continue
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str):
                raise ZofoError(f"row {index} has no text {key!r}: rows need prompt, completion and perhaps options")
        converted.append(checked(Record(row["prompt"], row["completion"], tuple(row.get("options") or ()))))
    return converted


def questions(rows: Rows, example: str = "") -> list[Record]:
    """Rows with the text `prompt`, and perhaps `options`, as records whose answer is not known; see `stand_in`."""
    converted: list[Record] = []
    for index, row in enumerate(rows):
        if isinstance(row, Record):
            converted.append(row)
            continue
        if not isinstance(row.get("prompt"), str):
            raise ZofoError(f"row {index} has no text 'prompt': rows to predict need prompt, and perhaps options")
        options = tuple(row.get("options") or ())
        converted.append(checked(Record(row["prompt"], stand_in(row["prompt"], options, example), options)))
    return converted


def stand_in(prompt: str, options: Sequence[str], example: str = "") -> str:
    """In place of an answer that is not known: an option, another row's answer, or a word that is like most answers."""
    if options or example:
        return options[0] if options else example
    return "a" if prompt[-1:].isspace() else " a"


def digest(records: Sequence[Record]) -> str:
    """A short hash of these records in this order, which detects changed training rows."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(repr(record).encode())
    return sha.hexdigest()[:16]


def checked(record: Record) -> Record:
    """The record itself. Refuses empty texts, equal options, and a completion that is none of the options."""
    if not record.prompt.strip():
        raise ZofoError("the prompt is empty")
    if not record.completion.strip():
        raise ZofoError("the answer is empty")
    if record.options and record.completion not in record.options:
        raise ZofoError(f"the answer {record.completion!r} is none of the options {list(record.options)}")
    if len(set(record.options)) < len(record.options):
        raise ZofoError(f"the options {list(record.options)} repeat one")
    if record.partial and not record.suffix.strip():
        raise ZofoError("nothing is left to score: the suffix is empty, and score is 'suffix'")
    return record
