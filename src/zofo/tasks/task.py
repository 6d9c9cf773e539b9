"""A task: where its rows come from, and how a row becomes a prompt, an answer and options. A page of YAML."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, cast

from zofo.errors import ZofoError, did_you_mean
from zofo.habits import task_hint
from zofo.parse import is_texts, read_yaml
from zofo.tasks.metaicl import is_metaicl, metaicl_spec
from zofo.tasks.metrics import METRICS, OPTION_METRICS
from zofo.tasks.records import Record, Row, checked, stand_in
from zofo.tasks.sources import read_rows, split_name
from zofo.tasks.templates import Render, condition, expression, text_template

TEMPLATE_KEYS = ("prompt", "answer", "options", "references", "suffix", "score", "premise")
KEYS = ("name", "description", "licence", "source", "where", *TEMPLATE_KEYS, "group", "templates", "metric", "format")
_SCORES = ("answer", "suffix")
_ANSWERS = ("answer", "group")  # what a row without a label need not have

ToRecord = Callable[[Row, bool], Record]
"""Makes a record of a row, with or without its right answer."""


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
        templates: each makes a record of a row; the first one is that of the file's own keys.
        keep: which rows are used.
        answered: whether it says what the right answers are; rewards need none.
    """

    name: str
    description: str
    licence: str
    source: dict[str, str]
    metrics: tuple[str, ...]
    folder: Path
    templates: tuple[ToRecord, ...] = field(repr=False)
    keep: Render | None = field(repr=False, default=None)
    answered: bool = True

    @property
    def has_options(self) -> bool:
        """Whether options are compared; otherwise text is generated."""
        return self.metrics[0] in OPTION_METRICS

    def require_answers(self) -> None:
        """Refuses a task that does not say what the right answers are."""
        if not self.answered:
            raise ZofoError(
                f"task {self.name}: the key 'answer' is missing: add it; only method zo with objective: reward needs "
                "none"
            )

    def records(self) -> dict[str, list[Record]]:
        """Every row as a record, by the first template and by split: {"all": ...}, or the splits of the source."""
        splits: dict[str, list[Row]] = {}
        for name, source in self.source.items():
            available = read_rows(source, self.folder)
            if name == "all":
                splits.update(available)
            elif "all" in available or name in available:
                splits[name] = available.get("all", available.get(name, []))
            else:
                raise ZofoError(f"the source {source} of {self.name} has no {name}: it has {', '.join(available)}")
        records = {
            name: self._render(rows, 0, "" if name == "all" else f", {name}", self.keep)
            for name, rows in splits.items()
        }
        for name, kept in records.items():
            if not kept:  # it would be replaced by a part of the training rows
                read = f"`where` keeps none of its {len(splits[name])} rows" if splits[name] else "it has no rows"
                raise ZofoError(
                    f"task {self.name}: nothing is left of {name}: {read}; correct `where`, or name in `source` "
                    "the splits to use"
                )
        return records

    def reworded(self, records: Sequence[Record], template: int) -> list[Record]:
        """The same rows by another template, with its index from 0."""
        self._require_template(template)
        if template == 0:
            return list(records)
        rows = [record.row for record in records if record.row is not None]
        assert len(rows) == len(records), "records that were made from no rows"
        return self._render(rows, template, f", template {template}")

    def wordings(self, records: Sequence[Record]) -> list[list[Record]]:
        """The same rows as they are, and by each template that suits them."""
        rows = [record.row for record in records if record.row is not None]
        found = [list(records)]
        for template in range(len(self.templates)) if len(self.templates) > 1 and len(rows) == len(records) else ():
            with contextlib.suppress(ZofoError):
                found.append(self._render(rows, template, ""))
        return found

    def questions(self, rows: Sequence[Row], template: int, example: str = "") -> list[Record]:
        """Rows without their answers, which they need not have, and whatever `where` says: for predictions.

        The completion of a record is its first option, or `example`, an answer that stands for any; see `stand_in`.
        """
        self._require_template(template)
        asked = self._render(rows, template, "", answered=False)
        return [replace(r, completion=stand_in(r.prompt, r.options, example)) for r in asked]

    def _require_template(self, template: int) -> None:
        if not 0 <= template < len(self.templates):
            raise ZofoError(
                f"task {self.name} has no template {template}: it has {len(self.templates)}, numbered from 0; "
                f"`zofo tasks {self.name}` shows them"
            )

    def from_source(self, source: str) -> Self:
        """The same task with its rows from local files: a folder of train.* and validation.*, or one file."""
        path = Path(source).expanduser().resolve()
        if not path.is_dir():
            return replace(self, source={"all": str(path)})
        parts = {name: old.partition("#")[2] or name for name, old in self.source.items()}
        return replace(
            self, source={name: str(path) if name == "all" else f"{path}#{part}" for name, part in parts.items()}
        )

    def _render(
        self, rows: Sequence[Row], template: int, where: str, keep: Render | None = None, answered: bool = True
    ) -> list[Record]:
        records: list[Record] = []
        bad: list[tuple[int, str]] = []
        for number, row in enumerate(rows, start=1):
            try:
                if keep is None or keep(_columns(row)):
                    records.append(self.templates[template](row, answered))
            except ZofoError as error:
                bad.append((number, str(error)))
        if bad:
            numbers = ", ".join(str(number) for number, _ in bad[:3])
            raise ZofoError(
                f"task {self.name}{where}: {len(bad)} of {len(rows)} rows cannot be used (rows {numbers}"
                f"{', ...' * (len(bad) > 3)}): {bad[0][1]}"
            )
        return records


def task_names() -> list[str]:
    """The built-in tasks.

    Examples:
        >>> "movie_reviews" in task_names()
        True
    """
    return sorted(Path(str(file)).stem for file in files("zofo.tasks").joinpath("builtin").iterdir())


def load_task(name: str, source: str | None = None) -> Task:
    """A task by its name, from a YAML file, or of rows in MetaICL's form: a folder, or a .jsonl file (`metaicl_spec`).

    A built-in task comes before a folder of the same name, which `./NAME` names. `source` is read in place of the
    task's own: a folder of train.* and validation.*, or a file.

    Raises:
        ZofoError: if there is no such task, or if it is wrong.

    Examples:
        >>> load_task("movie_reviews").metrics[0]
        'accuracy'
    """
    if name not in task_names() and is_metaicl(name):
        task = parse_task(metaicl_spec(name), Path(name).expanduser())
    else:
        path = task_file(name)
        task = parse_task(read_task_file(path), path)
    return task.from_source(source) if source else task


def is_task_file(name: str) -> bool:
    """Whether a name is that of a task file."""
    return Path(name).suffix in (".yaml", ".yml")


def task_file(name: str) -> Path:
    """The file of a built-in task, or the one that is named; refuses what is neither."""
    path = Path(name).expanduser()
    if name in task_names():
        return Path(str(files("zofo.tasks").joinpath("builtin", f"{name}.yaml")))
    if is_task_file(name) and path.is_file():
        return path
    if is_task_file(name) or (path.suffix == ".jsonl" and not path.is_file()):
        raise ZofoError(f"there is no task file {path}")
    if path.is_dir():
        raise ZofoError(f"{name} is a folder without rows of its own, such as train.jsonl: name a task inside it")
    raise ZofoError(f"there is no task {name!r}: {task_hint(name, task_names())}")


def read_task_file(path: Path) -> dict[str, Any]:
    """The content of a task file."""
    spec = read_yaml(path, str(path))
    if not isinstance(spec, dict):
        raise ZofoError(f"{path} is no task file: it must name {', '.join(KEYS)}")
    return cast("dict[str, Any]", spec)


def parse_task(spec: dict[str, Any], path: Path) -> Task:
    """A task from the content of its file; relative paths start at the folder of `path`."""
    _check_keys(spec, path)
    return Task(
        name=spec.get("name") or path.stem,
        description=" ".join(str(spec.get("description", "")).split()),
        licence=" ".join(str(spec.get("licence", "not stated")).split()),
        source=_sources(spec["source"], path),
        metrics=_metrics(spec, path),
        folder=path.parent,
        templates=_templates(spec, path),
        keep=condition(str(spec["where"]), f"{path}, where") if "where" in spec else None,
        answered="answer" in spec or _is_metaicl(spec),
    )


def _is_metaicl(spec: dict[str, Any]) -> bool:
    return spec.get("format") == "metaicl"


def _check_keys(spec: dict[str, Any], path: Path) -> None:
    _refuse_unknown(spec, KEYS, str(path))
    if spec.get("format") not in (None, "metaicl"):
        raise ZofoError(f"{path}: format is {spec['format']!r}, but only 'metaicl' is known; leave it out otherwise")
    template_keys = [key for key in (*TEMPLATE_KEYS, "templates") if key in spec]
    if _is_metaicl(spec) and template_keys:
        raise ZofoError(f"{path}: rows of format metaicl bring their own {template_keys[0]}: leave the key out")
    name = spec.get("name")
    if name is not None and not isinstance(name, str):
        raise ZofoError(f"{path}: name is {name!r}, as YAML reads it: put it into quotes")
    for key in ["source"] if _is_metaicl(spec) else ["source", "prompt"]:
        if key not in spec:
            raise ZofoError(f"{path}: the key {key!r} is missing")


def _refuse_unknown(spec: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in spec:
        if key not in known:
            hint = did_you_mean(str(key), known, f"the keys are {', '.join(known)}")
            raise ZofoError(f"{where}: unknown key {key!r}; {hint}")


def _sources(source: Any, path: Path) -> dict[str, str]:
    if isinstance(source, str):
        return {"all": source}
    if isinstance(source, dict):
        named = {split_name(str(key)): str(value) for key, value in source.items()}
        if "train" in named and None not in named and len(named) == len(source):
            return {name: value for name, value in named.items() if name}
    raise ZofoError(f"{path}: source must be a path, or {{train: PATH, test: PATH}} (and dev), but is {source!r:.200}")


def _metrics(spec: dict[str, Any], path: Path) -> tuple[str, ...]:
    has_options = "options" in spec or _is_metaicl(spec)
    value = spec.get("metric", "accuracy" if has_options else "exact_match")
    metrics: list[str] = [str(metric) for metric in value] if isinstance(value, list) and value else [str(value)]
    for metric in metrics:
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS, f"there are {', '.join(METRICS)}")
            raise ZofoError(f"{path}: unknown metric {metric!r:.200}; {hint}")
        if not _is_metaicl(spec) and (metric in OPTION_METRICS) != has_options:
            options = "options" if has_options else "no options"
            fitting = [m for m in METRICS if (m in OPTION_METRICS) == has_options]
            raise ZofoError(f"{path}: metric {metric} does not go with {options}: choose {' or '.join(fitting)}")
        if metric == "group_exact_match" and "group" not in spec:
            raise ZofoError(f"{path}: metric {metric} scores groups of rows: say with the key group what they share")
    return tuple(metrics)


def _templates(spec: dict[str, Any], path: Path) -> tuple[ToRecord, ...]:
    if _is_metaicl(spec):
        return (_metaicl_record,)
    more = spec.get("templates", [])
    if not isinstance(more, list) or not all(isinstance(entry, dict) for entry in more):
        raise ZofoError(f"{path}: templates must be a list of entries like {{prompt: ..., answer: ...}}")
    base = {key: spec[key] for key in (*TEMPLATE_KEYS, "group") if key in spec}
    templates = [_template(base, str(path))]
    for number, entry in enumerate(more, start=1):
        where = f"{path}, template {number}"
        _refuse_unknown(entry, TEMPLATE_KEYS, where)
        if ("options" in entry) > ("options" in base):
            raise ZofoError(f"{where} has options, but the task generates: leave them out")
        templates.append(_template({**base, **entry}, where))
    return tuple(templates)


def _columns(row: Row) -> dict[str, Any]:
    """What templates know of a row: its columns, and `row` for those whose names are not valid variable names."""
    return {**row, "row": row}


def _template(spec: dict[str, Any], where: str) -> ToRecord:
    """The function that makes a record of a row; `where` is the file, and which of its templates, for messages."""
    texts: dict[str, Render] = {}
    for key in ("prompt", "answer", "suffix", "premise", "group"):
        if key in spec:
            if not isinstance(spec[key], str):
                raise ZofoError(f"{where}: {key} must be text, but is {spec[key]!r:.200}")
            texts[key] = text_template(spec[key], f"{where}, {key}")
    options = _list_template(spec, "options", where)
    references = _list_template(spec, "references", where)
    partial = _is_partial(spec, where)

    def to_record(row: Row, answered: bool) -> Record:
        columns = _columns(row)
        asked = [key for key in texts if answered or key not in _ANSWERS]
        rendered = {key: texts[key](columns) for key in asked}
        known = answered and "answer" in texts
        candidates, right = tuple(options(columns)), tuple(references(columns)) if known else ()
        completion = rendered.pop("answer") if known else stand_in(rendered["prompt"], candidates)
        if right and completion not in right:
            raise ZofoError(f"the answer {completion!r} is none of the references {list(right)}")
        record = Record(
            completion=completion,
            options=candidates,
            references=right,
            partial=partial,
            row=row,
            answered=known,
            **rendered,
        )
        return checked(record)

    return to_record


def _is_partial(spec: dict[str, Any], where: str) -> bool:
    score = spec.get("score", _SCORES[0])
    if score not in _SCORES:
        raise ZofoError(
            f"{where}: score is {score!r:.200}, but must be {' or '.join(_SCORES)}: what is scored of an option"
        )
    if (score == "suffix" or "suffix" in spec) and "options" not in spec:
        raise ZofoError(f"{where}: a suffix follows the options, but there are none: leave suffix and score out")
    if score == "suffix" and "suffix" not in spec:
        raise ZofoError(f"{where}: score is 'suffix', but there is none: give the text that follows each option")
    return score == "suffix"


def _list_template(spec: dict[str, Any], key: str, where: str) -> Render:
    """The function that gives the list of texts of a key for a row: the same for all rows, or by an expression."""
    value = spec.get(key)
    if value is None or (value and is_texts(value)):
        return lambda row: value or ()
    if not isinstance(value, str):
        raise ZofoError(f"{where}: {key} must be a list of texts, or a template that gives one, but is {value!r:.200}")
    render = expression(value, f"{where}, {key}")

    def texts(row: Row) -> list[str]:
        rendered = render(row)
        if not is_texts(rendered):
            raise ZofoError(f"{where}: {key} must give a list of texts, but gave {rendered!r:.200}")
        return [str(text) for text in rendered]  # plain texts, of the cells of a table too

    return texts


def _metaicl_record(row: Row, answered: bool) -> Record:
    """The record of a row in MetaICL's form: {"input", "output", "options"}."""
    needed = ("input", "output") if answered else ("input",)
    missing = [key for key in needed if not isinstance(row.get(key), str)]
    if missing:
        raise ZofoError(f"rows of format metaicl need the text fields {' and '.join(needed)}: {missing[0]} is missing")
    options = row.get("options") or []
    if not is_texts(options):
        raise ZofoError(f"options of a metaicl row must be a list of texts, but are {options!r:.200}")
    prompt = row["input"] + "\n"
    completion = str(row["output"]) if answered else stand_in(prompt, options)
    return checked(Record(prompt, completion, tuple(options), row=row, answered=answered))
