"""What a file says, read strictly: YAML, JSON and tables as plain values, where nothing is guessed or overwritten."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml

from zofo.errors import ZofoError, first_line, in_one_line

_DEEPEST = 50  # lists and mappings inside each other; Python's own limit depends on who calls
_LARGEST_YAML = 100_000  # values, where an alias counts as all that it stands for
_Key = TypeVar("_Key", bound=Hashable)

_SEPARATOR = re.compile(r'"?sep=([^"\w\r\n])"?\r?\n', re.IGNORECASE)
_BARE_TEMPLATE = re.compile(r"(^|[:\[,-])\s*\{[{%]")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters


class Cell(str):
    """A cell of a table of text: always a text, so that comparing it with a number is an error and not False."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int | float):
            raise TypeError(f"the text {str(self)!r} cannot be compared with {other!r}")
        return str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        if self.lower() in ("0", "0.0", "false"):
            raise TypeError(f"the text {str(self)!r} would count as true")
        return len(self) > 0


def read_yaml(source: str | Path, where: str, *, old: bool = False) -> Any:
    """The content of a YAML text, or of a file: plain values, from the safe part of YAML.

    If not `old`, a plain word is a boolean if it is true or false, and a number if it is written as one is usually:
    yes, 007, 1_000, 12:30 and 2026-01-05 are texts, which YAML 1.1 takes for other things. Refuses keys that occur
    twice, and what is nested or repeated too much; `where` names the source in messages.

    Examples:
        >>> read_yaml("{seed: 3, output_dir: 007}", "run.yaml")
        {'seed': 3, 'output_dir': '007'}
    """
    text = ""
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        return (_OldLoader if old else _Loader)(text).get_single_data()
    except UnicodeDecodeError as error:
        raise ZofoError(f"{where} is not UTF-8 (byte {error.start}): save it in UTF-8") from error
    except yaml.YAMLError as error:
        place, found = _bare_template(error, text) or ("", in_one_line(error))
        raise ZofoError(f"{where}{place} is no valid YAML: {found}") from error
    except OSError:
        raise
    except Exception as error:  # PyYAML raises many unrelated types for a value that its tag does not fit
        raise ZofoError(f"{where} is no valid YAML: {first_line(error)} ({type(error).__name__})") from error


def _bare_template(error: yaml.YAMLError, text: str) -> tuple[str, str] | None:
    """Where a template without quotation marks is what is wrong, since YAML takes its braces for its own; and why."""
    marks = [error.problem_mark, error.context_mark] if isinstance(error, yaml.MarkedYAMLError) else []
    lines = text.split("\n")
    for number in (mark.line for mark in marks if mark is not None and mark.line < len(lines)):
        if _BARE_TEMPLATE.search(lines[number]):
            mend = "put the template into quotation marks, since YAML reads braces as a mapping"
            return f", line {number + 1},", f"{mend}: {lines[number].strip():.80}"
    return None


class _OldLoader(yaml.SafeLoader):
    """A loader of YAML 1.1 that checks each node as it is composed, before any value is made of it."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"it is nested more than {_DEEPEST} deep", self.get_mark())
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not is_alias:
            self._sizes[node] = self._checked_size(node)
        elif node is not None and node not in self._sizes:
            self._refuse("an alias stands inside what it repeats", node.start_mark)
        return node

    def _checked_size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            if not _can_be_encoded(node.value):
                self._refuse("a text holds half of a character (a lone surrogate)", node.start_mark)
            return 1
        children: list[yaml.Node] = list(node.value)
        if isinstance(node, yaml.MappingNode):
            key = _repeated((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if key is not None:
                self._refuse(f"the key {key[1]!r} occurs twice", node.start_mark)
            children = [child for pair in node.value for child in pair]
        size = 1 + sum(self._sizes[child] for child in children)
        if size > _LARGEST_YAML:
            self._refuse(f"it holds more than {_LARGEST_YAML} values", node.start_mark)
        return size

    def _refuse(self, problem: str, mark: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(None, None, problem, mark)


class _Loader(_OldLoader):
    """The same, by the few forms of plain words below."""


_Loader.yaml_implicit_resolvers = {}
for _kind, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9]\d*)", [*"-+0123456789"]),
    ("float", r"([-+]?\d+\.\d*|\.\d+)([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+0123456789."]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_form})$", re.ASCII), _first)


@dataclass(frozen=True)
class _RepeatedKey:
    """Stands for a JSON object with a repeated key, until `plain_values` can say where it is."""

    key: str


def read_json(text: str, where: str, line: int = 1) -> Any:
    """The content of a JSON text, before `plain_values`; `line` is the number of its first line, for messages."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{where}, line {line + error.lineno - 1}"
        raise ZofoError(
            f"{place}: broken JSON ({error.msg}, column {error.colno}): write one list of rows, or one row a line"
        ) from error
    except ValueError as error:
        raise ZofoError(f"{where}, line {line}: broken JSON ({first_line(error)})") from error
    except RecursionError as error:
        raise ZofoError(f"{where}, line {line}: broken JSON (nested too deep): nest at most {_DEEPEST} deep") from error


def _object(pairs: list[tuple[str, Any]]) -> Any:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    return _RepeatedKey(str(_repeated(key for key, _ in pairs)))


def plain_values(value: Any, where: str, depth: int = 0) -> Any:
    """A value from a file, with None for what is no number (NaN, infinite) and text for bytes that are UTF-8.

    Refuses repeated keys, texts that cannot be encoded, and lists that are nested too deep; `where` names the row.
    """
    if isinstance(value, str):
        if not _can_be_encoded(value):
            raise ZofoError(f"{where}: a text holds half of a character (a lone surrogate): mend or remove the row")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, _RepeatedKey):
        raise ZofoError(f"{where}: the key {value.key!r} occurs twice: keep one")
    if depth > _DEEPEST:
        raise ZofoError(f"{where}: it is nested more than {_DEEPEST} deep: make it flatter")
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {plain_values(key, where): plain_values(inner, where, depth + 1) for key, inner in items}
    if isinstance(value, list | tuple):
        return [plain_values(inner, where, depth + 1) for inner in cast("list[Any]", value)]
    return value


def read_table(text: str, where: str, delimiter: str | None = None) -> list[dict[str, Any]]:
    """The rows of a table of text with a header: every cell is the text that the file holds.

    Commas, semicolons and other separators are quoted as RFC 4180 says. Beside tabs, quotation marks are characters
    like any other, as corpora have them: each line is a row. `delimiter` separates the columns; by default, what the
    header has most of: commas, semicolons or tabs. A first line `sep=;` counts more than both.
    """
    named = _SEPARATOR.match(text)
    if named:
        delimiter, text = named[1], text[named.end() :]
    delimiter = delimiter or _delimiter(text, where)
    records = _records(text, delimiter, where, first=2 if named else 1)
    line, header = next(records, (1, list[str]()))
    require_unique(header, where)
    tabs = delimiter == "\t"
    if tabs and header and all(map(_QUOTED.fullmatch, header)):
        _refuse_quoted_tabs(where, line, header[0])
    rows: list[dict[str, Any]] = []
    for line, cells in records:
        if len(cells) != len(header):
            mend = "texts may hold no tab and no line break" if tabs else "quote texts that hold separators"
            raise ZofoError(
                f"cannot read {where}: line {line} has {len(cells)} fields, but the header has {len(header)} columns, "
                f"separated by {delimiter!r}: {mend}"
            )
        rows.append(dict(zip(header, map(Cell, cells), strict=True)))
    return rows


def require_unique(columns: list[str], where: str) -> None:
    """Refuses a table with two columns of one name, of which one would be lost."""
    column = _repeated(columns)
    if column is not None:
        name = f"named {column!r}" if column else "without a name"
        raise ZofoError(f"{where} has two columns {name}: give every column a name of its own")


def _records(text: str, delimiter: str, where: str, first: int = 1) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line and the cells of each record that is not an empty line.

    Python's csv, and no reader of data frames: those guess types from the other rows, or forgive what is broken.
    """
    if delimiter == "\t":
        for number, line in enumerate(text.split("\n"), start=first):
            cells = line.removesuffix("\r").split("\t")
            if cells != [""]:
                _require_unquoted(cells, where, number)
                yield number, cells
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = first
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = first + reader.line_num
    except csv.Error as error:
        raise ZofoError(
            f'cannot read {where}: line {line}: {error}: a text in quotation marks ends with one, and has "" for each '
            "inside"
        ) from error


def _require_unquoted(cells: list[str], where: str, line: int) -> None:
    """Refuses a cell that only a writer who quotes would write: in marks, and every mark inside doubled."""
    for cell in cells:
        if cell.startswith('"') and '""' in cell[1:-1] and _QUOTED.fullmatch(cell):
            _refuse_quoted_tabs(where, line, cell)


def _refuse_quoted_tabs(where: str, line: int, cell: str) -> NoReturn:
    raise ZofoError(
        f"{where}, line {line}: {cell[:40]} seems to be quoted, but beside tabs quotation marks are characters: "
        "save the table with commas, or without quoting"
    )


def _delimiter(text: str, where: str) -> str:
    """What separates the columns: spreadsheets write commas, semicolons or tabs, depending on their language."""
    counts = {mark: _columns(text, mark) for mark in ",;\t"}
    most = max(counts.values())
    found = [mark for mark, count in counts.items() if count == most]
    if most > 1 and len(found) > 1:
        raise ZofoError(
            f"{where}: the columns of the header may be separated by {' or '.join(map(repr, found))}: "
            "put a first line in front that names the right one, such as sep=;"
        )
    return found[0]


def _columns(text: str, delimiter: str) -> int:
    """How many columns the header has, were they separated so."""
    if delimiter == "\t":
        return text.lstrip("\r\n").partition("\n")[0].count("\t") + 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return next((len(cells) for cells in reader if cells), 1)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts, which may be empty."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _can_be_encoded(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _decoded(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _repeated(items: Iterable[_Key]) -> _Key | None:
    return next((item for item, count in Counter(items).items() if count > 1), None)


def numbers(value: Any) -> Any:
    """Nested values with numbers for texts that are numbers: YAML 1.1 reads 1e-5 as a text.

    Examples:
        >>> numbers({"min_lr": "1e-5", "decay_type": "linear"})
        {'min_lr': 1e-05, 'decay_type': 'linear'}
    """
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if not value.lstrip("+-").isdigit() else int(value)
    return value
