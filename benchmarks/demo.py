"""`make demo`: FO-LoRA, MeZO and Bilevel ZOFO on one task at one budget, in one table and one picture.

The budget is counted in rows through the network: a forward of one row counts 1, its backward 1.

    FO-LoRA        batch 8:   80 steps x 8 x 2                                   = 1,280
    MeZO           batch 16:  40 steps x 16 x 2                                  = 1,280
    Bilevel ZOFO   batch 4:   20 iterations x 4 x (2 T + 4 + 6), with T = 3      = 1,280

(one bilevel iteration: T lower steps; F and G forward and backward for p; F, G(p) and G(s) at θ + εz and θ - εz.)
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

RUNS = Path("runs/demo")
METHODS = {
    "FO-LoRA": ["--method", "fo", "--max_steps", "80", "--per_device_train_batch_size", "8"],
    "MeZO": ["--method", "zo", "--adapter", "none", "--max_steps", "40", "--per_device_train_batch_size", "16"],
    "Bilevel ZOFO": [],
}
Z95 = 1.959964


def main() -> None:
    """Runs the three methods, then prints the table and says where the picture is."""
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name, options in METHODS.items():
        folder = RUNS / name.lower().replace(" ", "-")
        print(f"\n--- {name}", flush=True)
        command = [sys.executable, "-m", "zofo.cli", "train", "--config", "configs/demo.yaml", "--output_dir"]
        subprocess.run([*command, str(folder), "--overwrite_output_dir", "true", *options], check=True)
        results[name] = json.loads((folder / "results.json").read_text())
    rows = table_rows(results)
    print("\n" + render(rows))
    print("\n" + verdict(rows))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    (RUNS / "demo.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    picture = draw(rows)
    print(f"\nPicture: {picture}\nRun folders: {', '.join(str(f) for f in sorted(RUNS.iterdir()) if f.is_dir())}")
    print(f"Total: {time.perf_counter() - started:.0f} s")


def table_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for zero-shot and one for each evaluated adapter."""
    first = next(iter(results.values()))
    rows = [{"name": "zero-shot", **first["zero_shot"]}]
    for name, result in results.items():
        for adapter, scores in result["metrics"].items():
            label = f"{name}, {'p, deployed' if adapter == 'upper' else 's'}" if len(result["metrics"]) > 1 else name
            rows.append({"name": label, **scores, **result["cost"], "backbone_change": result["backbone_change"]})
    for row in rows:
        row["low"], row["high"] = wilson(row["accuracy"], row["rows"])
    return rows


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (E. Wilson, 1927)."""
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return center - half, center + half


def render(rows: list[dict[str, Any]]) -> str:
    """The table as aligned text."""
    head = [
        "",
        "accuracy",
        "95 % interval",
        "loss",
        "test rows",
        "tokens fwd",
        "tokens bwd",
        "seconds",
        "peak MiB",
        "|Δθ|/|θ|",
    ]
    lines = [head]
    for row in rows:
        cost = ["-"] * 5
        if "wall_seconds" in row:
            cost = [
                f"{row['forward_tokens']:,}",
                f"{row['backward_tokens']:,}",
                f"{row['wall_seconds']:.0f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                f"{row['backbone_change']:.1e}",
            ]
        interval = f"{row['low']:.3f} - {row['high']:.3f}"
        lines.append([row["name"], f"{row['accuracy']:.3f}", interval, f"{row['loss']:.3f}", str(row["rows"]), *cost])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(aligned)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which rows these test rows cannot tell apart."""
    close = [f"{a['name']} / {b['name']}" for a, b in combinations(rows, 2) if not differ(a, b)]
    if not close:
        return "All rows differ from each other at the 95 % level (one seed; other seeds may order them otherwise)."
    return f"This budget, with one seed and {rows[0]['rows']} test rows, does not tell apart: " + "; ".join(close) + "."


def differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the 95 % interval of the difference of two accuracies excludes 0 (R. Newcombe, 1998, method 10)."""
    high, low = (a, b) if a["accuracy"] >= b["accuracy"] else (b, a)
    gap = high["accuracy"] - low["accuracy"]
    return gap > math.hypot(high["accuracy"] - high["low"], low["high"] - low["accuracy"])


def draw(rows: list[dict[str, Any]]) -> Path:
    """Accuracy with intervals, and loss, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["name"] for row in rows][::-1]
    left, right = figure.subplots(1, 2, sharey=True)
    accuracy = [row["accuracy"] for row in rows][::-1]
    errors = [[a - row["low"], row["high"] - a] for a, row in zip(accuracy, rows[::-1], strict=True)]
    left.barh(names, accuracy, color="#88aacc", xerr=list(zip(*errors, strict=True)), capsize=3)
    left.set(xlabel=f"test accuracy, 95 % interval, {rows[0]['rows']} rows", xlim=(0.4, 1))
    right.barh(names, [row["loss"] for row in rows][::-1], color="#ccaa88")
    right.set(xlabel="test loss")
    figure.suptitle("SmolLM2-135M on movie reviews: one budget, one seed")
    file = RUNS / "demo.png"
    figure.savefig(file, dpi=120)
    return file


if __name__ == "__main__":
    main()
