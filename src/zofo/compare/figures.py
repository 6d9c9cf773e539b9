"""The figures of a comparison: SVG that takes its colours and its font from the page around it."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from zofo.compare.cells import Cell, count, memory, time

Content = Mapping[str, Any]

# matplotlib draws with these colours; the page has a variable for each, for light and for dark
_INK, _GRID, _PAPER, _BASELINE = "#010000", "#020000", "#030000", "#040000"
_SERIES = tuple(f"#0000{number:02x}" for number in range(1, 9))
_VARIABLES = {
    **{_INK: "ink", _GRID: "line", _PAPER: "paper", _BASELINE: "baseline"},
    **{colour: f"series-{number}" for number, colour in enumerate(_SERIES)},
}
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # 8 colours x 5 markers: 40 methods differ
_WIDTH = 5.0  # inches, that is 360 units: on a phone, text keeps about its size
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zofo",
    "text.parse_math": False,
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere on the page."""

    colour: str
    marker: str
    glyph: str  # the marker as a character

    @property
    def variable(self) -> str:
        """The name of the page's variable with this colour."""
        return _VARIABLES[self.colour]


@dataclass(frozen=True)
class Figures:
    """The figures of a task, each as an SVG element; empty where there is nothing to draw."""

    looks: dict[str, Look]
    differences: str
    gains: str  # on held-back tasks
    pareto: list[tuple[str, str]]  # here and below: the name of a cost, and its figure
    curves: list[tuple[str, str]]
    costs: list[tuple[str, str]]


@dataclass(frozen=True)
class _Cost:
    key: str
    name: str
    cell: Cell
    units: tuple[tuple[float, float, str], ...]  # from which largest value on, how large, its name


_MEMORY = _Cost("peak_bytes", "peak memory", memory, ((2**30, 2**30, " (GiB)"), (0, 2**20, " (MiB)")))
_TIME = _Cost("seconds", "time", time, ((7200, 3600, " (h)"), (120, 60, " (min)"), (0, 1, " (s)")))
_FORWARD = _Cost("forward_equivalents", "forward-equivalents", count, ((0, 1, ""),))


def draw(report: Content) -> list[Figures]:
    """The figures of each task of a report."""
    looks = _looks([m["name"] for task in report["tasks"] for m in task["methods"]], report["baseline"])
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the glyphs, matplotlib need not
        return [_draw(task, report["baseline"], looks, f"t{number}") for number, task in enumerate(report["tasks"])]


def _looks(names: Iterable[str], baseline: str) -> dict[str, Look]:
    others = [name for name in dict.fromkeys(names) if name != baseline]
    looks = {
        name: Look(_SERIES[place % len(_SERIES)], *_MARKERS[place % len(_MARKERS)]) for place, name in enumerate(others)
    }
    return {baseline: Look(_BASELINE, "P", "✚"), **looks}


def _draw(task: Content, baseline: str, looks: dict[str, Look], place: str) -> Figures:
    def each(costs: Iterable[_Cost], kind: str, one: Callable[..., str]) -> list[tuple[str, str]]:
        drawn = [(cost.name, one(task, cost, looks, f"{place}-{kind}-{cost.key}")) for cost in costs]
        return [(name, figure) for name, figure in drawn if figure]

    return Figures(
        looks={method["name"]: looks[method["name"]] for method in task["methods"]},
        differences=_differences(task, baseline, looks, f"{place}-differences"),
        gains=_gains(task, baseline, looks, f"{place}-gains"),
        pareto=each((_MEMORY, _TIME, _FORWARD), "score", _pareto),
        curves=each((_FORWARD, _TIME), "loss", _curves),
        costs=each((_FORWARD, _TIME, _MEMORY), "bar", _bars),
    )


def _differences(task: Content, baseline: str, looks: dict[str, Look], place: str) -> str:
    """A line for each method: its difference to the baseline, with the interval."""
    found = [(str(m["name"]), m["difference"]) for m in task["methods"] if m["difference"]]
    rows = [(name, name, difference, bool(difference["significant"])) for name, difference in found]
    title = f"{task['name']}: differences to {baseline}, with 95 % intervals"
    return _intervals(rows, f"difference to {_label(baseline)} (points)", looks, title, place)


def _gains(task: Content, baseline: str, looks: dict[str, Look], place: str) -> str:
    """A line for each method and held-back task, and for their mean: what was gained over the baseline."""
    rows: list[tuple[str, str, Content, bool]] = []
    for method in task["methods"]:
        adapted: Content = method["adapted"] or {"tasks": []}
        each: list[Content] = [*adapted["tasks"]]
        if len(each) > 1:
            each.append({**adapted, "name": "mean"})
        for one in each:
            if gain := one["gain"]:
                sure = gain["low"] > 0 or gain["high"] < 0
                rows.append((method["name"], f"{method['name']}, {one['name']}", gain, sure))
    title = f"after adapting: gain over {baseline}, with 95 % intervals"
    return _intervals(rows, f"gain over {_label(baseline)} (points)", looks, title, place)


def _intervals(
    rows: list[tuple[str, str, Content, bool]], axis: str, looks: dict[str, Look], title: str, place: str
) -> str:
    """A line for each row: of which method, its name, its difference with the interval, and whether it is filled."""
    rows = [row for row in rows if math.isfinite(_number(row[2]["difference"]))]
    if not rows:
        return ""
    figure, axes = _figure(0.7 + 0.32 * len(rows))
    axes.axvline(0, color=_INK, linewidth=1)
    for row, (method, _, difference, sure) in enumerate(rows):
        look = looks[method]
        low, middle, high = (100 * _number(difference[key]) for key in ("low", "difference", "high"))
        axes.plot([low, high], [row, row], color=look.colour, linewidth=2, solid_capstyle="butt")
        face = look.colour if sure else _PAPER
        axes.plot(middle, row, look.marker, color=look.colour, markerfacecolor=face, markersize=7, markeredgewidth=1.5)
    axes.set_yticks(range(len(rows)), [_label(name) for _, name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(axis)
    return _svg(figure, title, place)


def _pareto(task: Content, cost: _Cost, looks: dict[str, Look], place: str) -> str:
    """Score, with its interval, against one cost."""
    found = [(m["name"], _number(m["cost"][cost.key]), *_score(m)) for m in task["methods"]]
    found = [point for point in found if math.isfinite(point[1]) and math.isfinite(point[3])]
    if not found:
        return ""
    figure, axes = _figure(2.6)
    scale = _scale(axes, cost, [x for _, x, *_ in found])
    for name, x, low, mean, high in found:
        look = looks[name]
        axes.plot([x / scale, x / scale], [low, high], color=look.colour, linewidth=1.2, alpha=0.7)
        axes.plot(x / scale, mean, look.marker, color=look.colour, markersize=7)
    most = max(x for _, x, *_ in found) / scale or 1
    axes.set_xlim(-0.04 * most, 1.06 * most)
    axes.set_ylabel(f"{_label(task['metric'])} (points)")
    return _svg(figure, f"{task['name']}: score against {cost.name}", place)


def _curves(task: Content, cost: _Cost, looks: dict[str, Look], place: str) -> str:
    """The loss on dev rows of each method against one cost."""
    lines = {m["name"]: [(_number(p[cost.key]), _number(p["loss"])) for p in m["curve"]] for m in task["methods"]}
    points = [point for line in lines.values() for point in line if all(map(math.isfinite, point))]
    if not points:
        return ""
    figure, axes = _figure(2.6)
    scale = _scale(axes, cost, [x for x, _ in points])
    for name, line in lines.items():
        look = looks[name]
        x, y = [x / scale for x, _ in line], [loss if math.isfinite(loss) else math.nan for _, loss in line]
        axes.plot(x, y, color=look.colour, marker=look.marker, markersize=4, linewidth=1.4)
    least, most = min(loss for _, loss in points), max(loss for _, loss in points)
    logarithmic = 0 < 20 * least < most  # a run that diverged should not flatten the others
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylabel("dev loss (logarithmic)" if logarithmic else "dev loss")
    return _svg(figure, f"{task['name']}: loss on dev rows against {cost.name}", place)


def _bars(task: Content, cost: _Cost, looks: dict[str, Look], place: str) -> str:
    found = [(m["name"], _number(m["cost"][cost.key])) for m in task["methods"]]
    if not any(math.isfinite(value) for _, value in found):
        return ""
    figure, axes = _figure(0.3 + 0.25 * len(found))
    bars = [value if math.isfinite(value) else 0.0 for _, value in found]
    axes.barh(range(len(found)), bars, height=0.7, color=[looks[name].colour for name, _ in found])
    for row, (_, value) in enumerate(found):
        axes.annotate(cost.cell(value), (bars[row], row), (3, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.3 * max(bars) or 1)  # room for the number
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), [_label(name) for name, _ in found])
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    return _svg(figure, f"{task['name']}: {cost.name} of each method", place)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _scale(axes: Axes, cost: _Cost, values: list[float]) -> float:
    """Labels the x axis in a unit that suits the values, and returns the unit."""
    scale, unit = next((scale, unit) for least, scale, unit in cost.units if max(values) >= least)
    axes.set_xlabel(cost.name + unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if not unit:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return scale


def _score(method: Content) -> tuple[float, float, float]:
    low, mean, high = (100 * _number(method[key]) for key in ("low", "mean", "high"))
    return low, mean, high


def _number(value: float | None) -> float:
    """The number, or nan for what is missing or infinite, which cannot be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def _label(name: str) -> str:
    """A name on one line, of characters that XML can hold; shortened in its middle, as names may begin or end alike."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return plain if len(plain) <= 24 else f"{plain[:10]}…{plain[-13:]}"


def _svg(figure: Figure, title: str, place: str) -> str:
    """The figure as an element of an HTML page; its ids begin with `place`, since they must differ within a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for element in list(root.iter()):
        for child in [child for child in element if _local(child.tag) in {"metadata", "style"}]:
            element.remove(child)
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _adapted(_local(key), value, place) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """The name without its namespace: HTML has none."""
    return name.rpartition("}")[2]


def _adapted(key: str, value: str, place: str) -> str:
    """An attribute with the page's variables for colours, the page's font, and ids of its own."""
    if key == "id":
        return f"{place}-{value}"
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?", "", value)
        value = re.sub("#[0-9a-f]{6}", lambda found: f"var(--{_VARIABLES[found[0]]})", value)
    return value.replace("url(#", f"url(#{place}-") if key != "href" else value.replace("#", f"#{place}-", 1)
