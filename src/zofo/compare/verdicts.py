"""What comparisons amount to: p-values of several together, and a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zofo.compare.statistics import LEVEL, Difference


class Compared(NamedTuple):
    """A method against the baseline on one task."""

    method: str
    found: Difference
    p: float  # after `holm`


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm: the chance that any of the comparisons below 0.05 is false is at most 5 %.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    References:
        S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1)
    return adjusted.tolist()


def verdict(found: Difference, adjusted_p: float, method: str, baseline: str, task: str) -> str:
    """What a comparison amounts to, in one sentence; 1 point is 0.01 of a score.

    `found` is `method` minus `baseline`, and `adjusted_p` its p-value after `holm` over all comparisons that are
    reported together.

    Examples:
        >>> from zofo.compare.statistics import paired_difference
        >>> found = paired_difference(np.ones((1, 50)), np.array([[0.0] * 10 + [1.0] * 40]))
        >>> verdict(found, found.p, "lora", "mezo", "trec").split(" (")[0]
        'lora is significantly better than mezo on trec'
    """
    p = "p < 0.001" if adjusted_p < 0.001 else f"p = {adjusted_p:.3f}"
    numbers = (
        f"({100 * found.difference:+.1f} points, 95 % interval {100 * found.low:.1f} to {100 * found.high:.1f}, "
        f"Holm-adjusted {p})"
    )
    few = "; with one seed, this holds for these trained models only" if found.seeds == 1 else ""
    if adjusted_p < LEVEL:
        comparison = "better" if found.difference > 0 else "worse"
        return f"{method} is significantly {comparison} than {baseline} on {task} {numbers}{few}"
    return f"no significant difference between {method} and {baseline} on {task} {numbers}: {_seen(found)}{few}"


def summary(compared: Sequence[Compared], baseline: str) -> str:
    """What all comparisons on a task amount to, in one sentence.

    Examples:
        >>> from zofo.compare.statistics import paired_difference
        >>> found = paired_difference(np.ones((1, 50)), np.array([[0.0] * 10 + [1.0] * 40]))
        >>> summary([Compared("lora", found, found.p)], "mezo")
        'Significantly better than mezo: lora (+20.0 points).'
    """
    if not compared:
        return f"Nothing to compare with {baseline}."
    won = [one for one in compared if one.p < LEVEL and one.found.difference > 0]
    lost = [one for one in compared if one.p < LEVEL and one.found.difference < 0]
    parts = [
        f"{how} than {baseline}: "
        + ", ".join(f"{one.method} ({100 * one.found.difference:+.1f} points)" for one in found)
        for how, found in (("significantly better", won), ("significantly worse", lost))
        if found
    ]
    rest = [one for one in compared if one.p >= LEVEL]
    if rest:
        parts.append("undecided: " + ", ".join(f"{one.method} ({_interval(one.found)})" for one in rest))
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _interval(found: Difference) -> str:
    points, low, high = (f"{100 * value:+.1f}" for value in (found.difference, found.low, found.high))
    return f"{points} points, 95 % interval {low} to {high}"


def _seen(found: Difference) -> str:
    if math.isinf(found.detectable):
        return f"no difference could be seen with {found.clusters} independent groups of rows"
    return f"this comparison could have seen differences from {100 * found.detectable:.1f} points"
