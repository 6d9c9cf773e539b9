"""`python benchmarks/first.py`: zero-shot, 8-shot, FO-LoRA and Bilevel ZOFO on the six tasks that need no network.

SmolLM2-135M, float32, one seed, the budget of `make demo`: 640 rows through the network, where a forward of a row
counts 1 and its backward 1. No rate was tuned on any of these tasks but movie reviews: they are those of the demo, and
the automatic one for the backbone. Writes `benchmarks/results/first-<machine>.json` and `docs/results/first.md`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import MODEL, machine, write

TASKS = ("movie_reviews", "tweets", "amazon_reviews", "editorials", "question_types", "sms_spam")
ROWS = ["--test_size", "200", "--dev_size", "40", "--data_seed", "1"]
EIGHT = ["eval", "--model", MODEL, *ROWS, "--shots", "8", "--max_length", "768", "--batch_size", "8"]
TRAIN = ["train", "--config", "configs/demo.yaml", *ROWS, "--save_strategy", "no"]
BILEVEL = [*TRAIN, "--zo_learning_rate", "auto", "--max_steps", "10"]
FO = [*TRAIN, "--method", "fo", "--max_steps", "40", "--per_device_train_batch_size", "8"]
PAGE = Path("docs/results/first.md")
Z95 = 1.959964


def zofo(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run([sys.executable, "-m", "zofo.cli", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def trained(task: str, name: str, command: list[str]) -> dict[str, Any]:
    """The results of a training run."""
    folder = f"runs/first/{task}-{name}"
    zofo(*command, "--task", task, "--output_dir", folder, "--overwrite_output_dir", "true")
    return json.loads(Path(folder, "results.json").read_text())


def measure(task: str) -> list[dict[str, Any]]:
    """The rows of one task's part of the table."""
    fo, bilevel = trained(task, "fo", FO), trained(task, "bilevel", BILEVEL)
    assert fo["zero_shot"]["accuracy"] == bilevel["zero_shot"]["accuracy"], "not the same test rows"
    eight = json.loads(zofo(*EIGHT, "--task", task))["tasks"][task]
    found = {
        "zero-shot": fo["zero_shot"],
        "8-shot": eight,
        "FO-LoRA": fo["metrics"]["upper"],
        "Bilevel ZOFO, θ + p, deployed": bilevel["metrics"]["upper"],
        "Bilevel ZOFO, θ + s": bilevel["metrics"]["lower"],
    }
    rows = [{"task": task, "name": name, **scores} for name, scores in found.items()]
    for row in rows:
        row["low"], row["high"] = wilson(row["accuracy"], row["rows"])
        print(row, flush=True)
    return rows


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (E. Wilson, 1927)."""
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return center - half, center + half


def differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the 95 % interval of the difference of two accuracies excludes 0 (R. Newcombe, 1998, method 10)."""
    high, low = (a, b) if a["accuracy"] >= b["accuracy"] else (b, a)
    gap = high["accuracy"] - low["accuracy"]
    return gap > math.hypot(high["accuracy"] - high["low"], low["high"] - low["accuracy"])


def page(rows: list[dict[str, Any]]) -> str:
    """The table as a page."""
    here = machine()
    lines = [
        "# First results on six tasks",
        "",
        "Written by `python benchmarks/first.py`; the figures are in "
        "[`benchmarks/results/`](../../benchmarks/results/), `first-*.json`.",
        f"SmolLM2-135M-Instruct in float32 on {here['threads']} threads of {here['processor']}, one seed, "
        "200 test rows of each task, 95 % intervals (Wilson).",
        "Training reads 640 rows, forwards and backwards counted alike: 40 steps of batch 8 for FO-LoRA, "
        "10 iterations of batch 4 with T = 3 for Bilevel ZOFO. The rates are those of the demo, for movie reviews; "
        "that of the backbone is automatic. The prompt is the task's first template, the score of an option its mean "
        "log-probability.",
        "",
        "| task | method | accuracy | 95 % interval | loss |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        interval = f"{row['low']:.3f} - {row['high']:.3f}"
        lines.append(f"| {row['task']} | {row['name']} | {row['accuracy']:.3f} | {interval} | {row['loss']:.3f} |")
    runs = {"bilevel": BILEVEL, "fo": FO}
    commands = "\n".join(
        [*(f"zofo {' '.join(command)} --task TASK --output_dir runs/TASK-{name}" for name, command in runs.items()),
         f"zofo {' '.join(EIGHT)} --task TASK"]
    )  # fmt: skip
    return "\n".join([*lines, "", *verdicts(rows), "", "The commands:", "", "```bash", commands, "```", ""])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the test rows tell apart: for each task, the deployed model against the other ways."""
    made = [
        "Accuracy of Bilevel ZOFO, deployed, compared with the other methods by the 95 % confidence interval of the "
        "difference (Newcombe):",
        "",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["name"]: row for row in rows if row["task"] == task}
        deployed = own["Bilevel ZOFO, θ + p, deployed"]
        parts: list[str] = []
        for name in ("zero-shot", "8-shot", "FO-LoRA"):
            other = own[name]
            side = "above" if deployed["accuracy"] > other["accuracy"] else "below"
            parts.append(f"{side} {name}" if differ(deployed, other) else f"not significantly different from {name}")
        made.append(f"- {task}: {', '.join(parts)}")
    spam = [f"{row['name']} {row['macro_f1']:.3f}" for row in rows if "macro_f1" in row]
    return [*made, "", f"Macro-F1 on sms_spam, whose classes are imbalanced: {', '.join(spam)}."]


def main() -> None:
    """Measures and writes."""
    rows = [row for task in TASKS for row in measure(task)]
    write("first", {"model": MODEL, "rows": rows})
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
