"""What a population costs: many directions in one forward against single forwards, and against full-rank steps.

    python benchmarks/populations.py [ROUNDS]

SmolLM2-135M in float32, 48 tokens, low-rank directions of rank 1, two-sided. q = 8 with 1, 2 and 4 rows for each
direction: 16 evaluations in one forward; and q = 1 with 8 rows. Beside them in the same process, each in turn: as many
plain forwards of the same rows, one plain forward of all these rows together, and zofo's step with full-rank noise on
as many rows for each evaluation. Medians of the ratios within rounds. Peaks count the storages of all tensors alive,
weights included, against a plain forward of all these rows. Writes `benchmarks/results/populations-<machine>.json`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import usual
from timing import MODEL, batches, interleaved, trainer, write
from zofo.methods.populations import member_losses
from zofo.models.load import load_model
from zofo.scoring.batch import share, stack
from zofo.training.memory import MemoryTracker

CASES = ((8, 1), (8, 2), (8, 4), (1, 8))  # directions, and rows for each of them
BARS = {(8, 1): 0.65, (8, 2): 0.65, (8, 4): 0.85, (1, 8): 0.95}  # of a forward against single ones


def main() -> None:
    """Measures every case, prints it, writes it."""
    rounds, started = int(sys.argv[1]) if len(sys.argv) > 1 else 7, time.perf_counter()
    model, tokenizer = load_model(MODEL)
    cases: list[dict[str, Any]] = []
    for queries, rows in CASES:
        cases.append(measured(model, tokenizer, queries, rows, rounds))
        print(cases[-1], flush=True)
    write("populations", {"seconds": round(time.perf_counter() - started), "rounds": rounds, "cases": cases})


def measured(model: Any, tokenizer: Any, queries: int, rows: int, rounds: int) -> dict[str, Any]:
    """The ratios of one case."""
    keys = {"method": "zo", "adapter": "none", "num_perturbations": queries}
    low = trainer(model, tokenizer, **keys, zo_distribution="low_rank", per_device_train_batch_size=queries * rows)
    full = trainer(model, tokenizer, **keys, per_device_train_batch_size=rows)
    bundle, level = batches(low), low.method._level
    batch = bundle["zo"][0]
    parts = [share(batch, query, queries) for query in range(queries) for _ in range(2)]
    whole = {**stack(parts, low.method.scorer.layout.side), **answers(batch, parts)}

    @torch.no_grad()
    def bare() -> None:
        for part in parts:
            usual.option_loss(model, part, logits_to_keep=1)

    @torch.no_grad()
    def bare_together() -> None:
        usual.option_loss(model, whole, logits_to_keep=1)

    def forward() -> None:
        asked = {"the loss": ("upper", [batch])}
        member_losses(level, low.method.scorer, 0, level.probes.points(), asked, queries)

    times = interleaved(
        {
            "bare": bare,
            "bare together": bare_together,
            "forward": forward,
            "step": step_of(low, bundle),
            "full rank": step_of(full, batches(full)),
        },
        rounds=rounds,
    )
    peaks = {name: peak(model, run) for name, run in (("bare together", bare_together), ("forward", forward))}
    found: dict[str, Any] = {
        name: {"seconds": float(statistics.median(values)), "ratio": ratio(values, times["bare"])}
        for name, values in times.items()
    }
    return {
        "q": queries,
        "rows": rows,
        "bar": BARS[queries, rows],
        **found,
        "step over full rank": ratio(times["step"], times["full rank"]),
        "peak over inference": peaks["forward"] / peaks["bare together"],
    }


def answers(batch: Any, parts: list[Any]) -> dict[str, Any]:
    """`slots` and `gold` of parts that are stacked."""
    firsts = [sum(part["scored"].shape[1] for part in parts[:number]) for number in range(len(parts))]
    slots = torch.cat([part["slots"] + first for part, first in zip(parts, firsts, strict=True)])
    return {"slots": slots, "gold": torch.cat([part["gold"] for part in parts])}


def ratio(times: Any, others: Any) -> float:
    """The median of the ratios of each round."""
    return float(statistics.median(times / others))


def step_of(made: Any, bundle: Any) -> Callable[[], None]:
    """A whole step with its update, which is too small to change anything."""

    def step() -> None:
        made.method.step(0, 0.0, [bundle])
        made.method.optimizer.step()
        made.method.optimizer.zero_grad()

    return step


def peak(model: Any, run: Callable[[], None]) -> int:
    """Bytes of all tensors that are alive at once."""
    tracker = MemoryTracker()
    tracker.mark("weights", [*model.parameters(), *model.buffers()])
    with tracker:
        run()
    return tracker.peak


if __name__ == "__main__":
    main()
