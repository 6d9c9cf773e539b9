"""One example as text: what a task makes of a row, and what becomes tokens."""

from __future__ import annotations

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
        references: every right answer, where there are several; `completion` is what is trained on.
        suffix: text that follows each option, and is scored with it.
        partial: score the suffix alone, after each option: partial evaluation, as for WinoGrande.
        premise: the prompt without what is asked, which a calibrated score compares with.
        group: rows with the same text are scored together by the metrics of groups.
        row: what it was made from.
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
        """What makes two records the same question."""
        return (self.prompt, self.suffix, self.options) if self.suffix else (self.prompt,)


Rows = Sequence[Record] | Sequence[Row]


def records(rows: Rows) -> list[Record]:
    """Rows as records.

    Raises:
        ZofoError: if a row lacks `prompt` or `completion`.
    """
    made: list[Record] = []
    for number, row in enumerate(rows):
        if isinstance(row, Record):
            made.append(row)
            continue
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str):
                raise ZofoError(f"row {number} has no text {key!r}: rows need prompt, completion and perhaps options")
        made.append(checked(Record(row["prompt"], row["completion"], tuple(row.get("options") or ()))))
    return made


def digest(records: Sequence[Record]) -> str:
    """A short name of these records in this order, by which a changed set is known.

    Examples:
        >>> one, other = Record("a", " b"), Record("a", " c")
        >>> digest([one]) == digest([one]), digest([one]) == digest([other])
        (True, False)
    """
    found = hashlib.sha256()
    for record in records:
        found.update(repr(record).encode())
    return found.hexdigest()[:16]


def checked(record: Record) -> Record:
    """The record itself, if it makes sense.

    Raises:
        ZofoError: if a field is empty, the completion is none of the options, or an option repeats another.
    """
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
