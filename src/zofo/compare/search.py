"""The settings that a search tries: a grid where all of it fits, else points spread evenly over the ranges."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

from scipy.stats import qmc

from zofo.errors import ZofoError

Space = Mapping[str, Any]
Settings = dict[str, Any]


def points(space: Space, trials: int) -> list[Settings]:
    """At most `trials` settings of a space, the same ones every time.

    A list names values; {low, high} is a range, even in the logarithm where it spans a factor of ten or more. Lists
    alone give the whole grid if it has no more than `trials` points. Else the points are a Halton sequence.

    Examples:
        >>> points({"learning_rate": [1e-3, 1e-2]}, 5)
        [{'learning_rate': 0.001}, {'learning_rate': 0.01}]
        >>> [round(point["lr"], 5) for point in points({"lr": {"low": 1e-4, "high": 1e-2}}, 3)]
        [0.001, 0.00032, 0.00316]
    """
    for key, values in space.items():
        _require_values(key, values)
    if all(isinstance(values, list) for values in space.values()):
        grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        if len(grid) <= trials:
            return grid
    unit = qmc.Halton(len(space), scramble=False).random(trials + 1)[1:]  # the first point is the corner
    chosen = [{key: _at(values, float(u)) for (key, values), u in zip(space.items(), row, strict=True)} for row in unit]
    return [point for number, point in enumerate(chosen) if point not in chosen[:number]]


def _at(values: Any, u: float) -> Any:
    if isinstance(values, list):
        listed = cast("list[Any]", values)
        return listed[int(u * len(listed))]
    low, high = float(values["low"]), float(values["high"])
    if low > 0 and high >= 10 * low:
        return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return low + u * (high - low)


def _require_values(key: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    try:
        if isinstance(values, dict) and float(values["low"]) < float(values["high"]) and len(values) == 2:
            return
    except (KeyError, TypeError, ValueError):
        pass
    raise ZofoError(f"search: {key} is {values!r}: give a list of values, or a range {{low: 1e-4, high: 1e-2}}")
