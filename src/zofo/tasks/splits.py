"""Disjoint, seeded, stratified parts of a task's records."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from zofo.errors import ZofoError
from zofo.tasks.records import Record

DEV_ROWS = 200
TEST_ROWS = 400

_T = TypeVar("_T")


@dataclass(frozen=True)
class Splits:
    """The parts of a task, each in an order that spreads the classes evenly, and what to tell the user about them."""

    train: list[Record]
    dev: list[Record]
    test: list[Record]
    notes: tuple[str, ...] = ()
    total: int = 0  # rows that were divided, with those that are in no part

    def reworded(self, words: Callable[[list[Record]], list[Record]]) -> Self:
        """The same rows, with `words` applied to each part."""
        return type(self)(words(self.train), words(self.dev), words(self.test), self.notes, self.total)


def split_records(
    records: dict[str, list[Record]],
    *,
    train_size: int | None,
    dev_size: int | None,
    test_size: int | None,
    seed: int,
) -> Splits:
    """Divides records into train, dev and test.

    Test comes first, then dev, then train, all from one seeded order in which every section has nearly the class
    proportions of the whole: so the test rows do not depend on the sizes of the other parts. A prompt that occurs
    several times is kept once: in test rather than in dev, and in dev rather than in train. Rows of one group are in
    one part, so a part may have a few rows less than its size.

    Args:
        records: {"all": ...}, or {"train": ...} with "dev" or "test" where the source has them.
        train_size: number of training rows; None for all that remain.
        dev_size: None for a fifth of the rows, at most 200; or for all of the source's own dev rows, up to that number.
        test_size: the same for test, at most 400.
        seed: of the order.
    """
    records = {name: rows for name, rows in records.items() if rows}
    if not records.keys() & {"all", "train"}:
        raise ZofoError(
            f"the source has rows of {', '.join(records) or 'no split'}, but none to train on: name others in `source`"
        )
    queues = {name: _grouped(_stratified(rows, seed)) for name, rows in records.items()}
    pool = "all" if "all" in records else "train"
    total = len(records[pool])
    seen = Counter[tuple[Any, ...]]()

    def take(name: str, size: int | None, limit: int) -> list[Record]:
        default = limit if name in queues else min(limit, total // 5)
        return _take(queues.get(name, queues[pool]), seen, size, f"{name}_size", default)

    test = take("test", test_size, TEST_ROWS)
    dev = take("dev", dev_size, DEV_ROWS)
    train = _take(queues[pool], seen, train_size, "train_size", total)
    if not train:
        raise ZofoError(f"no row is left to train on after {len(test)} for test and {len(dev)} for dev: ask for fewer")
    dropped = seen.total() - len(seen)
    repeats = f"{dropped} rows dropped: their prompt occurs already in another row or split"
    return Splits(train, dev, test, (repeats,) if dropped else (), sum(map(len, records.values())))


def two_levels(rows: list[_T], fraction: float) -> tuple[list[_T], list[_T]]:
    """The rows of the lower and of the upper level: the first `fraction` of stratified rows, and the rest."""
    cut = round(len(rows) * fraction)
    if not 0 < cut < len(rows):
        raise ZofoError(f"{len(rows)} rows cannot be divided between two levels at {fraction}: give more rows")
    return rows[:cut], rows[cut:]


def halves(rows: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """The rows of the lower and of the upper level, of rows in any order: both have the class proportions of all."""
    return two_levels(_stratified(rows, seed), fraction)


def _take(
    queue: deque[list[Record]], seen: Counter[tuple[Any, ...]], size: int | None, key: str, default: int
) -> list[Record]:
    """The next `size` records whose prompts are new in `seen`; if that is None, `default` of them or fewer."""
    limit = default if size is None else size
    taken: list[Record] = []
    while queue and len(taken) < limit and (not taken or len(taken) + len(queue[0]) <= limit):
        for record in queue.popleft():
            seen[record.identity] += 1
            if seen[record.identity] == 1:
                taken.append(record)
    if size is not None and len(taken) < size and not queue:
        raise ZofoError(f"{key} is {size}, but only {len(taken)} rows are left for it: ask for fewer")
    return taken


def _grouped(rows: list[Record]) -> deque[list[Record]]:
    """The rows one by one, but all rows of a group where its first one is."""
    groups: dict[Any, list[Record]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group or index, []).append(row)
    return deque(groups.values())


def _stratified(rows: list[Record], seed: int) -> list[Record]:
    """A seeded order that spreads the classes evenly: the i-th of n rows of a class is near i / n of the whole."""
    classes: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        classes[row.completion if row.options else ""].append(row)
    random = np.random.default_rng(seed)
    keyed: list[tuple[float, Record]] = []
    for name in sorted(classes):
        members = classes[name]
        offset = random.random()
        keyed += [((i + offset) / len(members), members[j]) for i, j in enumerate(random.permutation(len(members)))]
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]
