"""Numbers as they stand in the report; a dash for what is not known."""

import math
from collections.abc import Callable

from zofo.report.words import duration, size

Cell = Callable[[float | None], str]
MISSING = "–"


def _known(tell: Callable[[float], str]) -> Cell:
    return lambda value: MISSING if value is None or not math.isfinite(value) else tell(value)


points = _known(lambda score: f"{100 * score:.1f}")
signed_points = _known(lambda difference: f"{100 * difference:+.1f}")
p_value = _known(lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}")
loss = _known(lambda value: f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}")
figures = _known(lambda value: f"{value:.2g}")
count = _known(lambda number: f"{number:,.0f}")
time = _known(lambda seconds: duration(seconds) if seconds else "0 s")
memory = _known(size)

CELLS = {
    "points": points,
    "signed_points": signed_points,
    "p_value": p_value,
    "loss": loss,
    "figures": figures,
    "count": count,
    "time": time,
    "memory": memory,
}
