"""Does it matter that the backbone has changed? Stored runs, tested again with their adapter on the original model.

    python benchmarks/reset_backbone.py COMPARISON METHOD [METHOD ...]

COMPARISON is the folder of a `zofo compare`, whose run folders still hold their weights. Every run of these methods is
scored by `zofo eval` with its adapter `upper` on the model that it started from, on the test rows of the run. Prints,
for each task and method, how far the backbone moved, accuracy and loss with its backbone and with the original one, and
the difference of the accuracies over rows and seeds with its 95 % interval. Writes
`benchmarks/results/reset-backbone.json`, and scores no run twice that is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from timing import RESULTS, machine
from zofo.compare.statistics import paired_difference
from zofo.spelling import EVAL_KEYS

FILE = RESULTS / "reset-backbone.json"


def main() -> None:
    """Scores what is not scored yet, and prints the table."""
    comparison, methods = Path(sys.argv[1]), sys.argv[2:]
    kept: dict[str, Any] = json.loads(FILE.read_text())["runs"] if FILE.is_file() else {}
    for folder in sorted(comparison.glob("runs/*/*/seed-*/")):
        task, method = folder.parts[-3:-1]
        name = f"{task}/{method}/{folder.name}"
        if method in methods and name not in kept:
            kept[name] = {"task": task, "method": method, **scored(folder)}
            FILE.write_text(json.dumps({"machine": machine(), "runs": kept}) + "\n")
    print("| task | method | backbone moved | accuracy, with its backbone | original | difference | loss | original |")
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in kept.values()):
        print(row(task, method, [run for run in kept.values() if (run["task"], run["method"]) == (task, method)]))


def scored(folder: Path) -> dict[str, Any]:
    """Which rows are right with the backbone of a run and with the original one, and both losses."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    results = json.loads((folder / "results.json").read_text())
    before = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    given = [word for key in EVAL_KEYS if config.get(key) is not None for word in (f"--{key}", str(config[key]))]
    with tempfile.TemporaryDirectory() as scratch:
        samples, output = Path(scratch) / "samples.jsonl", Path(scratch) / "results.json"
        subprocess.run(
            [sys.executable, "-m", "zofo.cli", "eval", "--model", config["model"], "--adapter", str(folder / "upper"),
             "--task", config["task"], *given, "--log_samples", str(samples), "--output", str(output),
             "--batch_size", str(config["per_device_eval_batch_size"])],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        (found,) = json.loads(output.read_text())["tasks"].values()
    reset = [float(one["answer"] in one["right"]) for one in rows]
    assert [one["right"] for one in rows] == [one["right"] for one in before]
    assert abs(np.mean(reset) - found["accuracy"]) < 1e-9
    return {
        "moved": results["backbone_change"],
        "own": [one["score"] for one in before],
        "reset": reset,
        "own loss": results["metrics"]["upper"]["loss"],
        "reset loss": found["loss"],
    }


def row(task: str, method: str, runs: list[dict[str, Any]]) -> str:
    """The line of a task and a method."""
    own, reset = (np.array([run[key] for run in runs]) for key in ("own", "reset"))
    found = paired_difference(own, reset)
    losses = [f"{np.mean([run[key] for run in runs]):.3f}" for key in ("own loss", "reset loss")]
    moved = f"{100 * np.mean([run['moved'] for run in runs]):.1f} %"
    points = f"{100 * found.difference:+.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"| {task} | {method} | {moved} | {own.mean():.3f} | {reset.mean():.3f} | {points} | {' | '.join(losses)} |"


if __name__ == "__main__":
    main()
