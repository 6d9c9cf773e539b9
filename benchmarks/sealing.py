"""`python benchmarks/sealing.py [FOLDER]`: what the digests of a checkpoint of 500 MB cost, beside writing it.

Three times in turn, on real files: a checkpoint is written and brought to the disk; another one is written and sealed,
which brings it to the disk as well; this one is checked, as before a run goes on. Prints medians of the seconds, and
ratios to the first, and writes `benchmarks/results/sealing.txt`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerState

from zofo.training.checkpoint import require_whole, seal

RESULT = Path(__file__).parent / "results" / "sealing.txt"
WEIGHTS = {f"w{i}": torch.randn(10_000_000) for i in range(10)}  # 400 MB
STATE = {"state": {i: torch.randn(2_500_000) for i in range(10)}}  # 100 MB


def write(folder: Path) -> None:
    """Writes what a checkpoint of that size holds."""
    (folder / "backbone").mkdir(parents=True)
    save_file(WEIGHTS, folder / "backbone" / "model.safetensors")
    torch.save(STATE, folder / "optimizer.pt")
    TrainerState(global_step=1).save_to_json(str(folder / "trainer_state.json"))


def write_to_disk(folder: Path) -> None:
    """Writes it, and waits until the disk has it."""
    write(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as content:
                os.fsync(content.fileno())


def write_and_seal(folder: Path) -> None:
    """Writes it as a run does."""
    write(folder)
    seal(folder, {"config": {}, "cost": {}})


def seconds(work: Callable[[Path], object], folder: Path) -> float:
    """How long some work on a folder takes."""
    os.sync()  # nothing of what was written before is still on its way
    start = time.perf_counter()
    work(folder)
    return time.perf_counter() - start


def main(place: str | None) -> None:
    """Measures in a temporary folder of this place, and writes the result."""
    found: dict[str, list[float]] = {"written, to the disk": [], "written and sealed": [], "checked": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            plain, sealed = Path(folder) / "checkpoint-1", Path(folder) / "checkpoint-2"
            works = ((write_to_disk, plain), (write_and_seal, sealed), (require_whole, sealed))
            for name, (work, where) in zip(found, works, strict=True):
                found[name].append(seconds(work, where))
    medians = {name: statistics.median(times) for name, times in found.items()}
    first = next(iter(medians.values()))
    lines = [f"500 MB, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores; seconds, median, ratio to the first"]
    for name, times in found.items():
        each = " ".join(f"{value:.2f}" for value in times)
        lines.append(f"{name:22} {each}   {medians[name]:.2f}   {medians[name] / first:.2f}")
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:2] or [None])
