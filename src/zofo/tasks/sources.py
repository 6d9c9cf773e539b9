"""Rows from a local file, a file inside an installed package, a folder with a file for each split, or the Hub."""

import gzip
import itertools
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zofo.errors import ZofoError, first_line
from zofo.packages import PACKAGE_SCHEME, package_file
from zofo.parse import plain_values, read_json, read_table, require_unique
from zofo.tasks.records import Row

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_GROWTH, _UNPACKED = 100, 1 << 26  # of a .gz file: how many times larger, and how many bytes it may be in any case
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("dev", "val", "valid", "validation", "eval"), "dev")
_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d+)-of-(?P<total>\d+)")
# what a split may be kept in, and is not read here: passed over, it would be replaced by a part of the training rows
_UNREAD = (
    ".arrow", ".bz2", ".feather", ".jsonlines", ".ndjson", ".ods", ".orc", ".pkl", ".tar", ".xls", ".xlsx", ".xz",
    ".zip", ".zst",
)  # fmt: skip
_ABOUT = ("citation", "dataset_info", "dataset_infos", "licence", "license", "readme")  # files that hold no rows


def split_name(name: str) -> str | None:
    """train, dev or test, for any name that a split goes by; None for others.

    Examples:
        >>> split_name("validation")
        'dev'
    """
    return _SPLITS.get(name.lower())


def read_rows(source: str, folder: Path) -> dict[str, list[Row]]:
    """Reads a source into named splits.

    Args:
        source: a path relative to `folder`, `pkg://PACKAGE/PATH`, or a Hub data set as `ID` or `ID:CONFIG`. Files are
            JSON (one row a line, or a list), CSV, TSV, Parquet or text (one row a line, in the column `text`); `.gz`
            too. A folder has a file for each split, such as train.jsonl, or its shards. `#SPLIT` after a data set or a
            folder selects one of them.
        folder: where relative paths start.

    Returns:
        {"all": rows} for a file or one split; rows by train, dev and test otherwise.
    """
    if "\0" in source:
        raise ZofoError(f"source is {source!r:.80}, which holds a NUL character: take it out")
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


@dataclass(frozen=True)
class _Shard:
    """A file of a folder: the split that its name says, if any, and which part of it this is."""

    file: Path
    split: str | None
    index: int = 0
    total: int = 1

    @classmethod
    def of(cls, file: Path) -> Self:
        """What the name of a file says."""
        match = _SHARD.fullmatch(_stem(file))
        if match is None:
            return cls(file, split_name(_stem(file)))
        return cls(file, split_name(match["split"]), int(match["index"]), int(match["total"]))


def _read_folder(folder: Path, split: str) -> dict[str, list[Row]]:
    """{split: rows} of the files in a folder that are named after splits, or {"all": rows} of one split."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if not split:
        for entry in entries:
            _require_read(entry)
    shards = [_Shard.of(entry) for entry in entries if entry.is_file() and _suffix(entry) in SUFFIXES]
    names = dict.fromkeys(shard.split for shard in shards if shard.split)
    if not names:
        raise ZofoError(f"{folder} holds no data: it needs files named after splits, such as train.jsonl or test.csv")
    files = {name: _in_order([shard for shard in shards if shard.split == name], folder) for name in names}
    if not split:
        return {name: _rows_of(*found) for name, found in files.items()}
    wanted = split_name(split) or split
    if wanted not in files:
        raise ZofoError(f"{folder} has no split {split!r}: it has {', '.join(files)}")
    return {"all": _rows_of(*files[wanted])}


def _require_read(entry: Path) -> None:
    """Refuses a file of rows that belongs to no split, and a split that is kept in a form that is not read."""
    if entry.is_file() and _suffix(entry) in SUFFIXES:
        passed_over = _Shard.of(entry).split is None and _stem(entry).lower() not in _ABOUT
    else:
        holds_rows = entry.is_dir() and any(_suffix(inner) in SUFFIXES for inner in entry.iterdir())
        first_word = re.split(r"[.-]", entry.name)[0]
        passed_over = split_name(first_word) is not None and (holds_rows or entry.suffix.lower() in _UNREAD)
    if passed_over:
        raise ZofoError(
            f"{entry.parent} holds {entry.name}, which would not be read: name it after its split, such as train.jsonl "
            "or test.csv, or name the files to read in `source`, such as {train: a.jsonl, test: b.jsonl}"
        )


def _in_order(shards: list[_Shard], folder: Path) -> list[Path]:
    """The files of a split by their numbers. Refuses one that is missing, and two for the same rows."""
    shards = sorted(shards, key=lambda shard: shard.index)
    total = shards[0].total
    for one, other in itertools.pairwise(shards):
        if one.index == other.index or one.total != other.total:
            raise ZofoError(
                f"{folder} has both {one.file.name} and {other.file.name}: keep one, or name a file in `source`"
            )
    if [shard.index for shard in shards] != list(range(total)):
        missing = sorted(set(range(total)) - {shard.index for shard in shards})
        raise ZofoError(
            f"{folder} has {shards[0].file.name}, but the parts of {shards[0].split} should be numbered from 0 to "
            f"{total - 1}{f', and {missing[0]} is missing' if missing else ''}: complete the folder"
        )
    return [shard.file for shard in shards]


def _rows_of(*files: Path) -> list[Row]:
    for file in files:
        if not file.is_file():
            raise ZofoError(f"there is no data file {file}: correct `source`; paths are relative to the task file")
    try:
        rows = [row for file in files for row in _read_file(file)]
    except MemoryError as error:
        raise ZofoError(f"the rows of {files[0]} do not fit into memory: give a part of them") from error
    if not rows:
        raise ZofoError(f"{files[0]} is empty: give a file with at least one row")
    return rows


def _read_file(path: Path) -> list[Row]:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        text = _read_text(path)
    except UnicodeDecodeError as error:
        raise ZofoError(f"{path} is not UTF-8 (byte {error.start}): save it in UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ZofoError(f"cannot read {path}: {first_line(error)}") from error
    if suffix == ".txt":
        return [{"text": line.rstrip("\r")} for line in text.split("\n") if line.strip()]
    if suffix in (".csv", ".tsv"):
        return read_table(text, str(path), delimiter="\t" if suffix == ".tsv" else None)
    return _parse_json(path, text)


def _read_text(path: Path) -> str:
    if path.suffix.lower() != ".gz":
        return path.read_bytes().decode("utf-8-sig")
    most = max(_UNPACKED, _GROWTH * path.stat().st_size)
    with gzip.open(path) as packed:
        data = packed.read(most + 1)
    if len(data) > most:
        raise ZofoError(f"{path} holds more than {_GROWTH} times its own size, {most:,} bytes: unpack it first")
    return data.decode("utf-8-sig")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet  # here and not above: most sources need neither this nor `datasets`, which take a second

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise ZofoError(f"cannot read {path}: {first_line(error)}") from error
    require_unique(table.column_names, str(path))
    return _plain_rows(table.to_pylist(), str(path))


def _parse_json(path: Path, text: str) -> list[Row]:
    """The rows of a list, or of one object a line, whatever the file is called: programs call both either way."""
    if text.lstrip().startswith("["):
        return _plain_rows(read_json(text, str(path)), str(path))
    # splitlines would also cut at U+2028 within a text
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if _suffix(path) == ".json" and len(lines) == 1:
        raise ZofoError(f"{path} holds no list of rows: write [{{...}}, ...], or one row a line in a .jsonl file")
    return [_row(read_json(line, str(path), number), f"{path}, line {number}") for number, line in lines]


def _plain_rows(rows: Iterable[Any], where: str) -> list[Row]:
    return [_row(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def _row(value: Any, where: str) -> Row:
    row = plain_values(value, where)
    if not isinstance(row, dict):
        raise ZofoError(f'{where}: a row must be an object with named fields, like {{"text": "...", "label": 1}}')
    return row


def _hub(source: str, split: str) -> dict[str, list[Row]]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        loaded: Any = load_dataset(name, config or None, split=split or None)
    except Exception as error:  # datasets raises many unrelated types
        raise ZofoError(
            f"cannot load the data set {source!r} ({first_line(error)}): give a file that ends in "
            f"{', '.join(SUFFIXES)}, or the id of a Hub data set that can be reached"
        ) from error
    if split:
        return {"all": _plain_rows(loaded, f"{source}#{split}")}
    splits: dict[str, list[Row]] = {}
    for key, rows in loaded.items():
        known = split_name(key)
        if known is None or known in splits:
            problem = "none of train, dev and test" if known is None else f"a second {known}"
            raise ZofoError(
                f"the data set {source} has {', '.join(loaded)}, of which {key} is {problem}: name those to use in "
                f"`source`, such as {{train: {source}#train, test: {source}#test}}"
            )
        splits[known] = _plain_rows(rows, f"{source}#{key}")
    return splits


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _suffix(path: Path) -> str:
    return _unpacked(path).suffix.lower()


def _stem(path: Path) -> str:
    return _unpacked(path).stem
