"""The table of `make bench` in docs/performance.md: ratios, how far they spread over the rounds, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timing import machine

PAGE = Path("docs/performance.md")
MARKS = ("<!-- table: begin, written by make bench -->\n", "<!-- table: end -->\n")


@dataclass(frozen=True)
class Row:
    """One line: `this` over `that` in each round, and the target for the median: at most, or for `faster` at least."""

    what: str
    against: str
    this: Any  # an array of one for each round, or one number
    that: Any
    target: float | None = None
    faster: bool = False

    @property
    def ratios(self) -> Any:
        """Of each round."""
        return np.atleast_1d(self.this / self.that)

    @property
    def ratio(self) -> float:
        """The median."""
        return float(np.median(self.ratios))

    @property
    def quickest(self) -> float:
        """Each side in the round that disturbed it least."""
        return float(np.min(self.this) / np.min(self.that))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the rounds."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)

    def cells(self) -> list[str]:
        """The line's cells."""
        ratio = f"{self.ratio:.3f}{' x faster' * self.faster}"
        several = self.ratios.size > 1
        spread = ["{:.3f} - {:.3f}".format(*self.quartiles), f"{self.quickest:.3f}"] if several else ["", ""]
        if self.target is None:
            return [self.what, self.against, ratio, *spread, "", ""]
        met = self.ratio >= self.target if self.faster else self.ratio <= self.target
        target = f"at least {self.target:g} x faster" if self.faster else f"at most {self.target:g}"
        return [self.what, self.against, ratio, *spread, target, "met" if met else "missed"]

    def numbers(self) -> dict[str, Any]:
        """The line for a file of results."""
        return {
            "what": self.what,
            "against": self.against,
            "ratio": self.ratio,
            "quartiles": self.quartiles,
            "quickest": self.quickest,
            "rounds": self.ratios.size,
            "target": self.target,
            "faster": self.faster,
        }


def write_table(rows: Sequence[Row], fractions: dict[str, float], seconds: float) -> None:
    """Replaces the table in docs/performance.md."""
    about = machine()
    lines = [
        f"The machine: {about['processor']}, {about['threads']} threads, {about['system']}, Python {about['python']}, "
        f"torch {about['torch']}. The whole took {seconds / 60:.0f} minutes.\n",
        "| what | against | ratio | interquartile range | quickest | target | |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
        "",
        "Where the time of one iteration of `bilevel` (T = 3) goes:\n",
        "| part | fraction |",
        "|---|---|",
        *(f"| {name} | {fraction:.1%} |" for name, fraction in fractions.items()),
    ]
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + after, encoding="utf-8")
