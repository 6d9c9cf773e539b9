"""`python benchmarks/rivals.py`: the peak memory of every method of `configs/compare`, in a process of its own each.

SmolLM2-135M in float32, 8 rows of 48 and of 256 tokens. What is measured is `cost.peak_memory_bytes` of `results.json`;
beside it stands what `zofo estimate` says. Two steps, as in the first one there are no states of the optimizer yet, and
malloc has kept less; T is 1, as lower steps come one after another. Writes `benchmarks/results/rivals-<machine>.json`
after each run, and keeps the rows there that are not measured again; half an hour on one thread. With
`MALLOC_MMAP_THRESHOLD_=65536` in the environment, malloc keeps nothing, and the rows are others.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import MODEL, RESULTS, write
from zofo.commands.estimate import estimate
from zofo.config_parser import parse_config

LENGTHS = (48, 256)
CONFIGS = Path("configs/compare")
KEYS = {
    "model": MODEL, "text": "text", "label": "label", "train_size": 40, "dev_size": 2, "test_size": 2,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2, "max_steps": 2, "learning_rate": 1e-6,
    "save_strategy": "no", "disable_tqdm": "true", "use_cpu": "true",
}  # fmt: skip
NOT_MEASURED = (
    "zero-shot", "in-context",  # no steps, whose memory could be measured
    "bilevel-one-lower-step", "bilevel-shared",  # the memory of `bilevel`: batches of the same size, one at a time
)  # fmt: skip


def main() -> None:
    """Measures, prints and writes; names of configs or lengths as arguments restrict it to these."""
    asked = sys.argv[1:]
    names = [name for name in sorted(file.stem for file in CONFIGS.iterdir()) if name not in NOT_MEASURED]
    names = [name for name in names if name in asked] or names
    lengths = [length for length in LENGTHS if str(length) in asked] or LENGTHS
    before = next(RESULTS.glob(f"rivals-{platform.machine()}-*.json"), None)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in json.loads(before.read_text())["rows"] if before else ():
        rows[_key(row)] = row
    for length in lengths:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                row = measured(name, length, Path(folder))
            rows[_key(row)] = row
            print(row, flush=True)
            write("rivals", {"rows": list(rows.values())})


def measured(name: str, length: int, home: Path) -> dict[str, Any]:
    """The peak of a run, the tokens and the seconds of a step, and the predicted peak, in bytes."""
    table = home / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([" and".join(["good"] * length + [str(i)]), ("bad", "fine")[i % 2]] for i in range(60))
    keys = {**KEYS, "data": table, "max_length": length + 1}  # with the answer's token
    if "bilevel" in name:
        keys["lower_steps"] = 1
    started = time.perf_counter()
    words = [word for key, value in {**keys, "output_dir": home / "run"}.items() for word in (f"--{key}", str(value))]
    config = CONFIGS / f"{name}.yaml"
    command = [sys.executable, "-W", "ignore", "-m", "zofo.cli", "train", "--config", str(config), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    results = json.loads((home / "run" / "results.json").read_text())
    predicted = next(estimate(parse_config(config, words), timed=False))  # the run's own method comes first
    return {
        "name": name,
        "tokens": length,
        "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "measured_bytes": results["cost"]["peak_memory_bytes"],
        "predicted_bytes": predicted.memory.peak,
        "predicted": vars(predicted.memory),
        "trained": predicted.parameters,
        "seconds": results["cost"]["wall_seconds"] / KEYS["max_steps"],
        "seconds_of_the_run": seconds,
        "loss": results["metrics"]["upper"]["loss"],
        "zero_shot_loss": results["zero_shot"]["loss"],
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["tokens"], row.get("mmap_threshold")


if __name__ == "__main__":
    main()
