"""A task: where its rows come from, and how a row becomes a prompt, an answer and options. A page of YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from zofo.errors import ZofoError
from zofo.tasks.metrics import METRICS, OPTION_METRICS
from zofo.tasks.records import Record, Row, checked
from zofo.tasks.sources import read_rows
from zofo.tasks.templates import Render, expression, text_template

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


__all__ = ["Record", "Task", "checked", "load_task", "parse_task", "task_names"]

KEYS = ("name", "description", "licence", "source", "where", *WORDING_KEYS, "group", "templates", "metric", "format")
SPLIT_NAMES = ("train", "dev", "test")
_SOURCE_NAMES = {"validation": "dev"}


@dataclass(frozen=True)
class Task:
    """A task file, checked. Make one with `load_task`.

    Args:
        name: of the task.
        description: what its rows are, and where they are from.
        licence: of the data, as far as it is known.
        source: "all", or "train" with "dev" or "test": where `read_rows` finds them.
        metrics: the first one decides.
        folder: where relative paths start.
        templates: the ways to put a row into words; the first one is the file's own.
        keep: which rows are used.
    """

    name: str
    description: str
    licence: str
    source: dict[str, str]
    metrics: tuple[str, ...]
    folder: Path
    templates: tuple[Convert, ...] = field(repr=False)
    keep: Render | None = field(repr=False, default=None)

    @property
    def has_options(self) -> bool:
        """Whether candidates are compared, and not text generated."""
        return self.metrics[0] in OPTION_METRICS

    def records(self) -> dict[str, list[Record]]:
        """Every row as a record, in the words of the first template, by split: {"all": ...}, or what the source has.

        Raises:
            ZofoError: with the first three bad rows, if any row cannot be rendered.
        """
        splits: dict[str, list[Row]] = {}
        for name, source in self.source.items():
            found = {_SOURCE_NAMES.get(key, key): rows for key, rows in read_rows(source, self.folder).items()}
            if name == "all":
                splits.update(found)
            elif "all" in found or name in found:
                splits[name] = found.get("all", found.get(name, []))
            else:
                raise ZofoError(f"the source {source} of {self.name} has no {name}: it has {', '.join(found)}")
        return {name: self._render(rows, name) for name, rows in splits.items() if name in ("all", *SPLIT_NAMES)}

    def reworded(self, records: Sequence[Record], template: int) -> list[Record]:
        """The same rows in the words of another template.

        Args:
            records: as `records` gave them, or some of them.
            template: its number, from 0.

        Raises:
            ZofoError: if there is no such template, or it cannot render a row.
        """
        if not 0 <= template < len(self.templates):
            raise ZofoError(
                f"task {self.name} has no template {template}: it has {len(self.templates)}, numbered from 0; "
                f"`zofo tasks {self.name}` shows them"
            )
        if template == 0:
            return list(records)
        rows = [record.row for record in records]
        assert all(row is not None for row in rows), "records that were made from no rows"
        return self._render([row for row in rows if row is not None], f"template {template}", template, filtered=True)

    def from_source(self, source: str) -> Task:
        """The same task with its rows from local files: a folder of train.* and validation.*, or one file."""
        path = Path(source).expanduser().resolve()
        if not path.is_dir():
            return replace(self, source={"all": str(path)})
        parts = {name: str(own).partition("#")[2] or name for name, own in self.source.items()}
        return replace(
            self, source={name: str(path) if name == "all" else f"{path}#{part}" for name, part in parts.items()}
        )

    def _render(self, rows: list[Row], split: str, template: int = 0, filtered: bool = False) -> list[Record]:
        records: list[Record] = []
        bad: list[tuple[int, str]] = []
        for number, row in enumerate(rows, start=1):
            try:
                if filtered or self.keep is None or self.keep(row):
                    records.append(self.templates[template](row))
            except ZofoError as error:
                bad.append((number, str(error)))
        if bad:
            numbers = ", ".join(str(number) for number, _ in bad[:3])
            where = self.name if split == "all" else f"{self.name}, {split}"
            raise ZofoError(
                f"task {where}: {len(bad)} of {len(rows)} rows cannot be used (rows {numbers}"
                f"{', ...' * (len(bad) > 3)}): {bad[0][1]}"
            )
        return records


def task_names() -> list[str]:
    """The tasks in the box.

    Examples:
        >>> "movie_reviews" in task_names()
        True
    """
    return sorted(Path(str(file)).stem for file in files("zofo.tasks").joinpath("builtin").iterdir())


def load_task(name: str, source: str | None = None) -> Task:
    """A task by its name, or from a YAML file.

    Args:
        name: one of `task_names()`, or the path of a task file.
        source: a folder of train.* and validation.*, or a file, to read in place of the task's own source.

    Raises:
        ZofoError: if there is none, or the file is wrong: with the file, the key, and the nearest right one.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in task_names():
            near = difflib.get_close_matches(name, task_names(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(task_names())}."
            raise ZofoError(f"there is no task {name!r}: {hint} A task of your own is the path of a .yaml file")
        path = Path(str(files("zofo.tasks").joinpath("builtin", f"{name}.yaml")))
    if not path.is_file():
        raise ZofoError(f"there is no task file {path}")
    task = parse_task(_read(path), path)
    return task.from_source(source) if source else task


def parse_task(spec: dict[str, Any], path: Path) -> Task:
    """A task from the content of its file.

    Args:
        spec: the keys.
        path: the file, for messages and as the start of relative paths.

    Raises:
        ZofoError: if a key is unknown, missing or wrong.
    """
    _check_keys(spec, path)
    return Task(
        name=str(spec.get("name", path.stem)),
        description=" ".join(str(spec.get("description", "")).split()),
        licence=" ".join(str(spec.get("licence", "not stated")).split()),
        source=_sources(spec["source"], path),
        metrics=_metrics(spec, path),
        folder=path.parent,
        templates=_templates(spec, path),
        keep=expression(str(spec["where"]), f"{path}, where") if "where" in spec else None,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ZofoError(f"{path} is not UTF-8 (byte {error.start}): save it in UTF-8") from error
    except yaml.YAMLError as error:
        raise ZofoError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise ZofoError(f"{path} is no task file: it must name {', '.join(KEYS)}")
    return spec


def _check_keys(spec: dict[str, Any], path: Path) -> None:
    _refuse_unknown(spec, KEYS, str(path))
    if spec.get("format") not in (None, "metaicl"):
        raise ZofoError(f"{path}: format is {spec['format']!r}, but only 'metaicl' is known; leave it out otherwise")
    own = [key for key in (*WORDING_KEYS, "templates") if key in spec]
    if spec.get("format") == "metaicl" and own:
        raise ZofoError(f"{path}: rows of format metaicl bring their own {own[0]}: leave the key out")
    needed = ["source"] if spec.get("format") == "metaicl" else ["source", "prompt", "answer"]
    for key in needed:
        if key not in spec:
            raise ZofoError(f"{path}: the key {key!r} is missing")


def _refuse_unknown(spec: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise ZofoError(f"{where}: unknown key {key!r}; {hint}")


def _templates(spec: dict[str, Any], path: Path) -> tuple[Convert, ...]:
    if spec.get("format") == "metaicl":
        return (metaicl_record,)
    more = spec.get("templates", [])
    if not isinstance(more, list) or not all(isinstance(entry, dict) for entry in more):
        raise ZofoError(f"{path}: templates must be a list of entries like {{prompt: ..., answer: ...}}")
    own = {key: spec[key] for key in (*WORDING_KEYS, "group") if key in spec}
    made = [wording(own, str(path))]
    for number, entry in enumerate(more, start=1):
        where = f"{path}, template {number}"
        _refuse_unknown(entry, WORDING_KEYS, where)
        if ("options" in entry) > ("options" in own):
            raise ZofoError(f"{where} has options, but the task generates: leave them out")
        made.append(wording({**own, **entry}, where))
    return tuple(made)


def _sources(source: Any, path: Path) -> dict[str, str]:
    if isinstance(source, str):
        return {"all": source}
    if isinstance(source, dict):
        named: dict[str, str] = {_SOURCE_NAMES.get(str(key), str(key)): str(value) for key, value in source.items()}
        if "train" in named and named.keys() <= set(SPLIT_NAMES):
            return named
    raise ZofoError(f"{path}: source must be a path, or {{train: PATH, test: PATH}} (and dev), but is {source!r}")


def _metrics(spec: dict[str, Any], path: Path) -> tuple[str, ...]:
    has_options = "options" in spec or spec.get("format") == "metaicl"
    given = spec.get("metric", "accuracy" if has_options else "exact_match")
    metrics: list[str] = [str(metric) for metric in given] if isinstance(given, list) and given else [str(given)]
    for metric in metrics:
        if metric not in METRICS:
            near = difflib.get_close_matches(str(metric), METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
            raise ZofoError(f"{path}: unknown metric {metric!r}; {hint}")
        if spec.get("format") != "metaicl" and (metric in OPTION_METRICS) != has_options:
            kind = "options" if has_options else "no options"
            fitting = [m for m in METRICS if (m in OPTION_METRICS) == has_options]
            raise ZofoError(f"{path}: metric {metric} does not go with {kind}: choose {' or '.join(fitting)}")
        if metric == "group_exact_match" and "group" not in spec:
            raise ZofoError(f"{path}: metric {metric} scores groups of rows: say with the key group what they share")
    return tuple(metrics)
