"""Rows from a local file, a file inside an installed package, or a Hub data set."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from datasets import load_dataset

from zofo.errors import ZofoError, first_line
from zofo.models.source import PACKAGE_SCHEME, package_file
from zofo.tasks.records import Row

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SPLITS = ("train", "dev", "validation", "test")
_ALIASES = {"dev": "validation", "validation": "dev"}


def read_rows(source: str, folder: Path) -> dict[str, list[Row]]:
    """Reads a source into named splits.

    Args:
        source: a path relative to `folder`, `pkg://PACKAGE/PATH`, or a Hub data set as `ID` or `ID:CONFIG`. Files are
            JSONL, JSON (a list), CSV, TSV, Parquet or text (one row a line, in the column `text`); `.gz` too. A folder
            has a file for each split, such as train.jsonl. `#SPLIT` after a data set or a folder selects one of them.
        folder: where relative paths start.

    Returns:
        {"all": rows} for a file or one split; {split: rows} otherwise.
    """
    if source.startswith(PACKAGE_SCHEME):
        return {"all": _rows_of(package_file(source))}
    path = folder / Path(source).expanduser()
    if _suffix(path) in SUFFIXES:
        return {"all": _rows_of(path)}
    if path.is_file():
        raise ZofoError(f"{path} is no data file: it must end in {', '.join(SUFFIXES)}, or be a Hub data set's id")
    location, _, split = source.partition("#")
    inside = folder / Path(location).expanduser()
    return _read_folder(inside, split) if inside.is_dir() else _hub(location, split)


def _read_folder(folder: Path, split: str) -> dict[str, list[Row]]:
    """{split: rows} of the files in a folder that are named after splits, or {"all": rows} of one split.

    A folder with dev and no validation has dev as validation, and the other way round.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        name = file.name.split(".")[0]
        if file.is_file() and _suffix(file) in SUFFIXES and name in SPLITS:
            if name in files:
                raise ZofoError(
                    f"{folder} has both {files[name].name} and {file.name}: keep one, or name a file in `source`"
                )
            files[name] = file
    if not files:
        raise ZofoError(f"{folder} holds no data: it needs files named after splits, such as train.jsonl or test.csv")
    if not split:
        return {name: _rows_of(file) for name, file in files.items()}
    name = split if split in files else _ALIASES.get(split, split)
    if name not in files:
        raise ZofoError(f"{folder} has no split {split!r}: it has {', '.join(files)}")
    return {"all": _rows_of(files[name])}


def _rows_of(path: Path) -> list[Row]:
    if not path.is_file():
        raise ZofoError(f"there is no data file {path}: correct `source`; paths are relative to the task file")
    rows = _read_file(path)
    if not rows:
        raise ZofoError(f"{path} is empty: give a file with at least one row")
    return rows


def _read_file(path: Path) -> list[Row]:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        if suffix in (".csv", ".tsv"):
            return _read_csv(path)
        text = _read_text(path)
    except UnicodeDecodeError as error:
        raise ZofoError(f"{path} is not UTF-8 (byte {error.start}): save it in UTF-8") from error
    except (pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise ZofoError(f"cannot read {path}: {first_line(error)}") from error
    if suffix == ".txt":
        return [{"text": line.rstrip("\r")} for line in text.split("\n") if line.strip()]
    return _parse_json(path, text) if suffix == ".json" else _parse_json_lines(path, text)


def _read_text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8-sig")


def _read_csv(path: Path) -> list[Row]:
    text = _read_text(path)
    if not text.strip():
        return []
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(text), newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=False),
    )
    return table.to_pylist()


def _delimiter(text: str) -> str:
    """The separator of the columns: spreadsheets write commas, semicolons or tabs, depending on their language."""
    header = text.lstrip("\r\n").splitlines()[0]
    unquoted = "".join(header.split('"')[::2])
    return max(",;\t", key=unquoted.count)


def _parse_json_lines(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 within a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ZofoError(f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})") from error
        rows.append(_require_row(row, f"{path}, line {number}"))
    return rows


def _parse_json(path: Path, text: str) -> list[Row]:
    try:
        rows = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        raise ZofoError(f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(rows, list):
        raise ZofoError(f"{path} holds no list of rows: write [{{...}}, ...], or one row a line in a .jsonl file")
    return [_require_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _require_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ZofoError(f'{where}: a row must be an object with named fields, like {{"text": "...", "label": 1}}')
    return row


def _hub(source: str, split: str) -> dict[str, list[Row]]:
    name, _, config = source.partition(":")
    try:
        loaded: Any = load_dataset(name, config or None, split=split or None)
    except Exception as error:  # datasets raises many unrelated types
        raise ZofoError(
            f"cannot load the data set {source!r} ({first_line(error)}): give a file that ends in "
            f"{', '.join(SUFFIXES)}, or the id of a Hub data set that can be reached"
        ) from error
    return {"all": list(loaded)} if split else {name: list(rows) for name, rows in loaded.items()}


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
