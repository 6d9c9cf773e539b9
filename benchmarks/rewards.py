"""What the completions of a population cost: all members in one forward, against one member at a time.

    python benchmarks/rewards.py [ROUNDS]

SmolLM2-135M in float32, four directions and their antithetic pairs: 8 members, each of which writes 8 tokens after 4
prompts of 48 tokens, for a reward that costs nothing. Directions of rank 1 in one forward, the same one member at a
time, and directions of full rank; beside them, in the same process and each in turn, plain generation by θ of as many
rows in one batch. Medians of the ratios within rounds, to that generation. Then the peak of tensor storages in each,
the weights among them. Writes `benchmarks/results/rewards-*.json`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

from timing import MODEL, batches, interleaved, trainer, write
from zofo.models.load import load_model
from zofo.scoring.generation import AnswerSpan, generate
from zofo.training.memory import MemoryTracker

DIRECTIONS, ROWS, TOKENS = 4, 4, 8
LOW_RANK = {"zo_distribution": "low_rank"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "rank 1, one forward": LOW_RANK,
    "rank 1, one member at a time": {**LOW_RANK, "zo_members_per_forward": 1},
    "full rank, one member at a time": {},
}


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def main() -> None:
    """Measures, prints and writes."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    model, tokenizer = load_model(MODEL)
    keys = {
        "method": "zo",
        "adapter": "none",
        "objective": "reward",
        "reward": [f"{__file__}:length"],
        "max_new_tokens": TOKENS,
        "num_perturbations": DIRECTIONS,
        "per_device_train_batch_size": ROWS,
    }
    made = {name: trainer(model, tokenizer, **keys, **more) for name, more in CANDIDATES.items()}
    candidates = {"generation by θ": plain(next(iter(made.values()))), **{n: measured(t) for n, t in made.items()}}
    times = interleaved(candidates, rounds=rounds)
    base = times["generation by θ"]
    found = {name: float(statistics.median(values / base)) for name, values in times.items()}
    seconds = {name: float(statistics.median(values)) for name, values in times.items()}
    peaks = {name: peak(model, run) / 2**20 for name, run in candidates.items()}
    print(found, seconds, peaks, sep="\n")
    figures = {"ratios": found, "seconds": seconds, "peak_mib": peaks}
    write("rewards", {"members": 2 * DIRECTIONS, "rows": ROWS, "tokens": TOKENS, **figures})


def measured(made: Any) -> Callable[[], None]:
    """The values of all members of a step, without the update."""
    bundle = batches(made)
    return lambda: made.method.step(0, 0.0, [bundle])


def plain(made: Any) -> Callable[[], object]:
    """As many rows by θ alone, in one batch."""
    examples = batches(made)["zo"][0]["examples"] * (2 * DIRECTIONS)
    span = AnswerSpan.whole(TOKENS)
    return lambda: generate(made.method.scorer, made.processing_class, examples, span, len(examples))


def peak(model: Any, run: Callable[[], object]) -> int:
    """Bytes of storages that are alive together."""
    tracker = MemoryTracker()
    tracker.mark("weights", [*model.parameters(), *model.buffers()])
    with tracker:
        run()
    return tracker.peak


if __name__ == "__main__":
    main()
