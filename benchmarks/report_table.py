"""The table that a page shows of the report of a comparison, and differences of two of its methods.

    python benchmarks/report_table.py FOLDER
    python benchmarks/report_table.py FOLDER METHOD OTHER

FOLDER holds `report.json` and `report.csv`, as `zofo compare` writes them. The first form prints Markdown: a row for
each task and method, with what the search chose, the mean of its metric with the 95 % interval, the difference to the
baseline in points (* where significant after Holm's correction), and the mean and range over seeds of the test loss.
The second prints for each task the difference of two methods, paired by rows and seeds, with its p-value, which is not
corrected; it needs the `predictions.jsonl` of the run folders.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofo.compare.statistics import paired_difference


def rows(report: dict[str, Any], runs: Sequence[dict[str, str]]) -> list[list[str]]:
    """The cells of each row."""
    found: list[list[str]] = []
    for task in report["tasks"]:
        for method in task["methods"]:
            losses = [float(r["loss"]) for r in runs if (r["task"], r["run"]) == (task["name"], method["name"])]
            cost, peak = method["cost"], method["cost"]["peak_bytes"]
            found.append(
                [
                    task["name"].replace("_", " "),
                    f"`{method['name']}`",
                    chosen(method["search"]),
                    f"{cost['steps']:.0f}",
                    f"{peak / 2**20:,.0f}" if peak else "",
                    f"{method['mean']:.3f} ({method['low']:.3f} to {method['high']:.3f})",
                    points(method["difference"]),
                    f"{sum(losses) / len(losses):.3f} ({min(losses):.3f} - {max(losses):.3f})",
                ]
            )
    return found


def chosen(trials: Sequence[dict[str, Any]]) -> str:
    """The values of the setting that the search took."""
    values = [value for trial in trials if trial["chosen"] for value in trial["settings"].values()]
    return ", ".join(f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") for value in values)


def points(difference: dict[str, Any] | None) -> str:
    """A difference of scores in points of 100."""
    if difference is None:
        return ""
    mean, low, high = (100 * difference[key] for key in ("difference", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f}){'*' if difference['significant'] else ''}"


def scores(runs: Sequence[dict[str, str]], task: str, method: str) -> Any:
    """Of each run and test row, float64 (S, R)."""
    own = sorted((r for r in runs if (r["task"], r["run"]) == (task, method)), key=lambda r: int(r["seed"]))
    files = [(Path(r["folder"]) / "predictions.jsonl").read_text(encoding="utf-8").splitlines() for r in own]
    return np.array([[json.loads(line)["score"] for line in lines] for lines in files], dtype=np.float64)


def main() -> None:
    """Prints what the command asks for."""
    folder, pair = Path(sys.argv[1]), sys.argv[2:]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    if pair:
        for task in [task["name"] for task in report["tasks"]]:
            found = paired_difference(*(scores(runs, task, method) for method in pair))
            print(f"{task}: {points(vars(found) | {'significant': False})}, p = {found.p:.3f}")
        return
    table = rows(report, runs)
    title = [
        "task",
        "method",
        "rate",
        "steps",
        "peak, MiB",
        "metric",
        f"to `{report['baseline']}`, points",
        "test loss",
    ]
    for line in (title, ["---"] * len(title), *table):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
