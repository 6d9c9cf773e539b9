"""A task: where its rows come from, and how a row becomes a prompt, an answer and options. A page of YAML."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from zofo.errors import ZofoError
from zofo.metrics import METRICS, OPTION_METRICS
from zofo.sources import Row, read_rows
from zofo.templates import Render, expression, text_template

KEYS = ("name", "description", "source", "where", "prompt", "answer", "options", "metric", "format")
SPLIT_NAMES = ("train", "dev", "test")
_SOURCE_NAMES = {"validation": "dev"}


@dataclass(frozen=True)
class Record:
    """One example as text.

    Args:
        prompt: what the model reads.
        completion: the right answer, as it continues the prompt.
        options: the candidates, one of which is `completion`; empty for generation.
    """

    prompt: str
    completion: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task file, checked. Make one with `load_task`."""

    name: str
    description: str
    source: dict[str, str]  # "all", or "train" with "dev" or "test"
    metric: str
    folder: Path
    convert: Callable[[Row], Record] = field(repr=False)
    keep: Render | None = field(repr=False, default=None)

    def records(self) -> dict[str, list[Record]]:
        """Every row as a record, by split: {"all": ...}, or the splits that the source has.

        Raises:
            ZofoError: with the first three bad rows, if any row cannot be rendered.
        """
        splits: dict[str, list[Row]] = {}
        for name, source in self.source.items():
            found = read_rows(source, self.folder)
            if name == "all":
                splits.update({_SOURCE_NAMES.get(key, key): rows for key, rows in found.items()})
            else:
                splits[name] = found.get("all", found.get(name, []))
        return {name: self._render(rows, name) for name, rows in splits.items() if name in ("all", *SPLIT_NAMES)}

    def _render(self, rows: list[Row], split: str) -> list[Record]:
        records: list[Record] = []
        bad: list[tuple[int, str]] = []
        for number, row in enumerate(rows, start=1):
            try:
                if self.keep is None or self.keep(row):
                    records.append(self.convert(row))
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
    return sorted(Path(str(file)).stem for file in files("zofo").joinpath("task_files").iterdir())


def load_task(name: str) -> Task:
    """A task by its name, or from a YAML file.

    Args:
        name: one of `task_names()`, or the path of a task file.

    Raises:
        ZofoError: if there is none, or the file is wrong: with the file, the key, and the nearest right one.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in task_names():
            near = difflib.get_close_matches(name, task_names(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(task_names())}."
            raise ZofoError(f"there is no task {name!r}: {hint} A task of your own is the path of a .yaml file")
        path = Path(str(files("zofo").joinpath("task_files", f"{name}.yaml")))
    if not path.is_file():
        raise ZofoError(f"there is no task file {path}")
    return _parse(path)


def _parse(path: Path) -> Task:
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ZofoError(f"{path} is not UTF-8 (byte {error.start}): save it in UTF-8") from error
    except yaml.YAMLError as error:
        raise ZofoError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise ZofoError(f"{path} is no task file: it must name {', '.join(KEYS)}")
    _check_keys(spec, path)
    convert = _metaicl_record if spec.get("format") == "metaicl" else _record_maker(spec, path)
    return Task(
        name=str(spec.get("name", path.stem)),
        description=" ".join(str(spec.get("description", "")).split()),
        source=_sources(spec["source"], path),
        metric=_metric(spec, path),
        folder=path.parent,
        convert=convert,
        keep=expression(str(spec["where"]), f"{path}, where") if "where" in spec else None,
    )


def _check_keys(spec: dict[str, Any], path: Path) -> None:
    for key in spec:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ZofoError(f"{path}: unknown key {key!r}; {hint}")
    if spec.get("format") not in (None, "metaicl"):
        raise ZofoError(f"{path}: format is {spec['format']!r}, but only 'metaicl' is known; leave it out otherwise")
    own = [key for key in ("prompt", "answer", "options") if key in spec]
    if spec.get("format") == "metaicl" and own:
        raise ZofoError(f"{path}: rows of format metaicl bring their own {own[0]}: leave the key out")
    needed = ["source"] if spec.get("format") == "metaicl" else ["source", "prompt", "answer"]
    for key in needed:
        if key not in spec:
            raise ZofoError(f"{path}: the key {key!r} is missing")


def _sources(source: Any, path: Path) -> dict[str, str]:
    if isinstance(source, str):
        return {"all": source}
    if isinstance(source, dict):
        named: dict[str, str] = {_SOURCE_NAMES.get(str(key), str(key)): str(value) for key, value in source.items()}
        if "train" in named and named.keys() <= set(SPLIT_NAMES):
            return named
    raise ZofoError(f"{path}: source must be a path, or {{train: PATH, test: PATH}} (and dev), but is {source!r}")


def _metric(spec: dict[str, Any], path: Path) -> str:
    has_options = "options" in spec or spec.get("format") == "metaicl"
    metric = spec.get("metric", "accuracy" if has_options else "exact_match")
    if metric not in METRICS:
        near = difflib.get_close_matches(str(metric), METRICS, n=1)
        raise ZofoError(f"{path}: unknown metric {metric!r}; {f'did you mean {near[0]}?' if near else METRICS}")
    if spec.get("format") != "metaicl" and (metric in OPTION_METRICS) != has_options:
        kind = "options" if has_options else "no options"
        fitting = [m for m in METRICS if (m in OPTION_METRICS) == has_options]
        raise ZofoError(f"{path}: metric {metric} does not go with {kind}: choose {' or '.join(fitting)}")
    return metric


def _record_maker(spec: dict[str, Any], path: Path) -> Callable[[Row], Record]:
    prompt = text_template(_text(spec, "prompt", path), f"{path}, prompt")
    answer = text_template(_text(spec, "answer", path), f"{path}, answer")
    options = _options_maker(spec.get("options"), path)

    def convert(row: Row) -> Record:
        return checked(Record(prompt(row), answer(row), tuple(options(row))))

    return convert


def _text(spec: dict[str, Any], key: str, path: Path) -> str:
    if not isinstance(spec[key], str):
        raise ZofoError(f"{path}: {key} must be text, but is {spec[key]!r}")
    return spec[key]


def _options_maker(options: Any, path: Path) -> Render:
    if options is None or (isinstance(options, list) and options and all(isinstance(o, str) for o in options)):
        fixed: tuple[str, ...] = tuple(options or ())
        return lambda row: fixed
    if not isinstance(options, str):
        raise ZofoError(f"{path}: options must be a list of texts, or a template that gives one, but is {options!r}")
    per_row = expression(options, f"{path}, options")

    def evaluate(row: Row) -> list[str]:
        value = per_row(row)
        if not isinstance(value, list | tuple) or not all(isinstance(o, str) for o in value):
            raise ZofoError(f"{path}: options must give a list of texts, but gave {value!r}")
        return list(value)

    return evaluate


def _metaicl_record(row: Row) -> Record:
    missing = [key for key in ("input", "output") if not isinstance(row.get(key), str)]
    if missing:
        raise ZofoError(f"rows of format metaicl need the text fields input and output: {missing[0]} is missing")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ZofoError(f"options of a metaicl row must be a list of texts, but are {options!r}")
    return checked(Record(row["input"] + "\n", row["output"], tuple(options)))


def checked(record: Record) -> Record:
    """The record itself, if it makes sense.

    Raises:
        ZofoError: if a field is empty, the completion is none of the options, or two options are equal.
    """
    if not record.prompt.strip():
        raise ZofoError("the prompt is empty")
    if not record.completion.strip():
        raise ZofoError("the answer is empty")
    if record.options and record.completion not in record.options:
        raise ZofoError(f"the answer {record.completion!r} is none of the options {list(record.options)}")
    if len(set(record.options)) < len(record.options):
        raise ZofoError(f"the options {list(record.options)} repeat one")
    return record
