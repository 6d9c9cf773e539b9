"""Which rows a model was trained on: digests that travel with its folders, so that none of them is called test."""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers.utils.hub import cached_file

from zofo.errors import ZofoError
from zofo.packages import PACKAGE_SCHEME
from zofo.tasks.records import Record

FILE = "trained_rows.json"
_SIZE = 8  # bytes of a digest: among a million rows, one in ten billion others is taken for one of them
_ABOUT = "digests of the rows that zofo trained this model on; zofo eval leaves such rows out"


def digests(records: Iterable[Record]) -> frozenset[bytes]:
    """Two digests of each record: of its row, whatever the template, and of its prompt, whatever the columns."""
    return frozenset(digest for record in records for digest in _digests(record))


def was_trained_on(record: Record, known: frozenset[bytes]) -> bool:
    """Whether a record, or its row rendered by another template, is among those that `digests` named."""
    return not known.isdisjoint(_digests(record))


def _digests(record: Record) -> list[bytes]:
    texts = [repr(record.identity)] + ([repr(sorted(record.row.items()))] if record.row else [])
    return [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_SIZE).digest() for text in texts]


def write_trained_rows(folder: Path, known: frozenset[bytes]) -> None:
    """Leaves word in a folder of a model or of an adapter."""
    packed = base64.b85encode(b"".join(sorted(known))).decode()
    (folder / FILE).write_text(json.dumps({"about": _ABOUT, "digests": packed}) + "\n", encoding="utf-8")


def read_trained_rows(source: str) -> frozenset[bytes] | None:
    """What a folder, or a repository of the Hub, says of the rows that it was trained on; None if it says nothing."""
    if source.startswith(PACKAGE_SCHEME) or Path(source).suffix == ".gguf":
        return None
    path = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        file = cached_file(
            path, FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # no such repository, or no name of one: loading the model says so
        file = None
    if file is None:
        return None
    try:
        packed = base64.b85decode(json.loads(Path(file).read_text(encoding="utf-8"))["digests"])
    except (ValueError, KeyError, TypeError) as error:
        raise ZofoError(f"{file} is damaged: copy the folder again, or remove the file to evaluate all rows") from error
    return frozenset(packed[start : start + _SIZE] for start in range(0, len(packed), _SIZE))


def rows_of_folders(*places: str | None) -> frozenset[bytes]:
    """What those parts of a model that are folders say of the rows that it was trained on."""
    folders = [place for place in places if place and Path(place).expanduser().is_dir()]
    return trained_rows_of(*folders) or frozenset()


def trained_rows_of(*sources: str | None) -> frozenset[bytes] | None:
    """The rows of several parts of a model together; None if no part says anything."""
    said = [rows for rows in map(read_trained_rows, filter(None, sources)) if rows is not None]
    return frozenset().union(*said) if said else None
