"""How a row becomes a record: the keys of a task file that put it into words, as one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from zofo.errors import ZofoError
from zofo.records import Record, Row, checked
from zofo.templates import Render, expression, text_template

WORDING_KEYS = ("prompt", "answer", "options", "references", "suffix", "score", "premise")
SCORES = ("answer", "suffix")

Convert = Callable[[Row], Record]


def wording(spec: dict[str, Any], where: str) -> Convert:
    """The function that renders a row.

    Args:
        spec: templates by key: `prompt` and `answer`, and where they are wanted `options`, `references`, `suffix`,
            `score`, `premise` and `group`.
        where: the file, and which of its templates, for messages.

    Raises:
        ZofoError: if a template is wrong.

    Examples:
        >>> spec = {"prompt": "{{ text }} It was", "answer": " {{ ['bad', 'good'][label] }}"}
        >>> wording(spec, "here")({"text": "Fine.", "label": 1}).completion
        ' good'
    """
    texts = {
        key: text_template(_text(spec, key, where), f"{where}, {key}")
        for key in ("prompt", "answer", "suffix", "premise", "group")
        if key in spec
    }
    options = _list_maker(spec, "options", where)
    references = _list_maker(spec, "references", where)
    partial = _partial(spec, where)

    def convert(row: Row) -> Record:
        values = {"row": row, **row}  # for columns whose names are no variables
        made = {key: render(values) for key, render in texts.items()}
        completion, right = made.pop("answer"), references(values)
        if right and completion not in right:
            raise ZofoError(f"the answer {completion!r} is none of the references {right}")
        record = Record(
            completion=completion,
            options=tuple(options(values)),
            references=tuple(right),
            partial=partial,
            row=row,
            **made,
        )
        return checked(record)

    return convert


def metaicl_record(row: Row) -> Record:
    """The record of a row in MetaICL's form: {"input", "output", "options"}."""
    missing = [key for key in ("input", "output") if not isinstance(row.get(key), str)]
    if missing:
        raise ZofoError(f"rows of format metaicl need the text fields input and output: {missing[0]} is missing")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ZofoError(f"options of a metaicl row must be a list of texts, but are {options!r}")
    return checked(dataclasses.replace(Record(row["input"] + "\n", row["output"], tuple(options)), row=row))


def _text(spec: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(spec[key], str):
        raise ZofoError(f"{where}: {key} must be text, but is {spec[key]!r}")
    return spec[key]


def _partial(spec: dict[str, Any], where: str) -> bool:
    score = spec.get("score", SCORES[0])
    if score not in SCORES:
        raise ZofoError(f"{where}: score is {score!r}, but must be {' or '.join(SCORES)}: what is scored of an option")
    if (score == "suffix" or "suffix" in spec) and "options" not in spec:
        raise ZofoError(f"{where}: a suffix follows the options, but there are none: leave suffix and score out")
    if score == "suffix" and "suffix" not in spec:
        raise ZofoError(f"{where}: score is 'suffix', but there is none: give the text that follows each option")
    return score == "suffix"


def _list_maker(spec: dict[str, Any], key: str, where: str) -> Render:
    given = spec.get(key)
    if given is None or (isinstance(given, list) and given and all(isinstance(text, str) for text in given)):
        fixed: tuple[str, ...] = tuple(given or ())
        return lambda row: fixed
    if not isinstance(given, str):
        raise ZofoError(f"{where}: {key} must be a list of texts, or a template that gives one, but is {given!r}")
    per_row = expression(given, f"{where}, {key}")

    def evaluate(row: Row) -> list[str]:
        value = per_row(row)
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ZofoError(f"{where}: {key} must give a list of texts, but gave {value!r}")
        return list(value)

    return evaluate
