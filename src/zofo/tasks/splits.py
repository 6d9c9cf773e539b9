"""Disjoint, seeded, stratified parts of a task's records."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zofo.errors import ZofoError
from zofo.tasks.records import Record

DEV_ROWS = 200
TEST_ROWS = 400


@dataclass(frozen=True)
class Splits:
    """The four parts, and what to tell the user about them."""

    lower: list[Record]
    upper: list[Record]
    dev: list[Record]
    test: list[Record]
    notes: tuple[str, ...] = ()

    def reworded(self, words: Callable[[list[Record]], list[Record]]) -> Splits:
        """The same rows, each part put through `words`."""
        parts = (words(part) for part in (self.lower, self.upper, self.dev, self.test))
        return Splits(*parts, notes=self.notes)

    @property
    def train(self) -> list[Record]:
        """Everything that a method without two levels trains on."""
        return [*self.lower, *self.upper]


def split_records(
    records: dict[str, list[Record]],
    *,
    train_size: int | None,
    dev_size: int | None,
    test_size: int | None,
    lower_fraction: float,
    seed: int,
) -> Splits:
    """Cuts records into lower, upper, dev and test.

    Test is cut first, then dev, then the training rows, all along one seeded order in which every stretch has
    nearly the class shares of the whole: so the test rows do not depend on how many rows the others get. A prompt
    that occurs more than once is kept once, test before dev before train. Rows of one group stay in one of
    test, dev and train, so a part may get a few rows less than wanted.

    Args:
        records: {"all": ...}, or {"train": ...} with "dev" or "test" where the source has them.
        train_size: rows for lower and upper together; None for all that remain.
        dev_size: rows for model selection; None for a fifth of the rows, at most 200.
        test_size: rows for the final figures; None for a fifth of the rows, at most 400. Of a file of their own, None
            takes all rows up to that many.
        lower_fraction: share of the training rows that goes to the lower level.
        seed: of the order.

    Raises:
        ZofoError: if more rows are wanted than there are.
    """
    records = {name: rows for name, rows in records.items() if rows}
    if not records.keys() & {"all", "train"}:
        raise ZofoError(
            f"the source has rows of {', '.join(records) or 'no split'}, but none to train on: name others in `source`"
        )
    queues = {name: _grouped(_ordered(rows, seed)) for name, rows in records.items()}
    pool = queues["all"] if "all" in queues else queues["train"]
    taken = _Taken(set(), 0)
    total = len(records["all"] if "all" in records else records["train"])

    def take(name: str, wanted: int | None, most: int) -> list[Record]:
        default = most if name in queues else min(most, total // 5)
        return taken.take(queues.get(name, pool), wanted, f"{name}_size", default)

    test = take("test", test_size, TEST_ROWS)
    dev = take("dev", dev_size, DEV_ROWS)
    train = taken.take(pool, train_size, "train_size", total)
    if not train:
        raise ZofoError(f"no row is left to train on after {len(test)} for test and {len(dev)} for dev: ask for fewer")
    cut = round(len(train) * lower_fraction)
    repeats = f"{taken.dropped} rows dropped: their prompt occurs already in another row or split"
    return Splits(train[:cut], train[cut:], dev, test, (repeats,) if taken.dropped else ())


def halves(rows: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Two disjoint parts of rows, each with the class shares of the whole; the first has `fraction` of them."""
    ordered = _ordered(rows, seed)
    cut = round(len(ordered) * fraction)
    if not 0 < cut < len(ordered):
        raise ZofoError(f"{len(rows)} rows cannot be divided between two levels at {fraction}: give more rows")
    return ordered[:cut], ordered[cut:]


@dataclass
class _Taken:
    seen: set[tuple[Any, ...]]
    dropped: int

    def take(self, queue: deque[list[Record]], wanted: int | None, key: str, default: int) -> list[Record]:
        """The next `wanted` records whose prompts are new; if that is None, `default` of them or fewer."""
        most = default if wanted is None else wanted
        taken: list[Record] = []
        while queue and len(taken) < most and (not taken or len(taken) + len(queue[0]) <= most):
            for record in queue.popleft():
                if record.identity in self.seen:
                    self.dropped += 1
                else:
                    self.seen.add(record.identity)
                    taken.append(record)
        if wanted is not None and len(taken) < wanted and not queue:
            raise ZofoError(f"{key} is {wanted}, but only {len(taken)} rows are left for it: ask for fewer")
        return taken


def _grouped(rows: list[Record]) -> deque[list[Record]]:
    """The rows one by one, or where they have groups all rows of a group where its first one stands."""
    groups: dict[Any, list[Record]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.group or number, []).append(row)
    return deque(groups.values())


def _ordered(rows: list[Record], seed: int) -> list[Record]:
    """A seeded order in which the classes are spread evenly: the i-th of n rows of a class stands near i / n."""
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
