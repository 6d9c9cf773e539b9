"""No row that is tested on may have been trained on: a check across tasks, which nothing switches off."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from zofo.errors import ZofoError, listed
from zofo.tasks.records import Conversation, Record

_LONGEST = 80  # characters of a row that are shown


def require_apart(train: Mapping[str, Sequence[Record]], test: Mapping[str, Sequence[Record]]) -> None:
    """Refuses a task that is trained and tested on, and a row of a test task that is among the training rows.

    Two rows are the same if their prompts, with what follows their options, are equal but for white space; and if all
    their columns are equal, whatever the prompts make of them.

    Args:
        train: the training rows of the tasks to train on, by the names of the tasks.
        test: the rows of the tasks to test on.

    Raises:
        ZofoError: names the tasks, the first such row, and how many there are.

    Examples:
        >>> rows = [Record("a dull  film", " bad")]
        >>> require_apart({"films": rows}, {"reviews": [Record("a dull film ", " poor")]})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: row 1 of the test task 'reviews' is row 1 of the training task 'films': 'a dull film'...
    """
    if both := [name for name in train if name in test]:
        raise ZofoError(f"{listed(both)}: trained and tested on alike; leave such tasks out of one of the lists")
    known = {digest: place for place, record in _rows(train) for digest in _digests(record)}
    shared = [
        (known[digest], place, record)
        for place, record in _rows(test)
        if (digest := next((digest for digest in _digests(record) if digest in known), None))
    ]
    if not shared:
        return
    ((task, row), (asked, number), record), *_ = shared
    pairs = dict.fromkeys(f"{of_test} and {of_train}" for (of_train, _), (of_test, _), _ in shared)
    others = f"{len(shared)} rows are in both, of {listed(pairs, 10)}; " if len(shared) > 1 else ""
    raise ZofoError(
        f"row {number} of the test task {asked!r} is row {row} of the training task {task!r}: "
        f"{_text(record)[:_LONGEST]!r}; {others}remove such rows from the training rows, or leave one of the tasks out"
    )


def _rows(tasks: Mapping[str, Sequence[Record]]) -> Iterator[tuple[tuple[str, int], Record]]:
    """Each row, with its task and its number from 1."""
    for task, rows in tasks.items():
        yield from (((task, number), record) for number, record in enumerate(rows, start=1))


def _digests(record: Record) -> list[bytes]:
    """Of what a row asks, and of its columns."""
    texts = [_text(record)] + ([repr(sorted(record.row.items()))] if record.row else [])
    return [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts]


def _text(record: Record) -> str:
    """What a row asks, with single spaces."""
    earlier = [said for _, said in record.earlier] if isinstance(record, Conversation) else []
    return " ".join(" ".join((*earlier, record.prompt, record.suffix)).split())
