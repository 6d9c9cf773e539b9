"""What T lower steps cost: on fresh batches, and passing over a pool of two (`lower_pool`).

    python benchmarks/pool.py [ROUNDS]

SmolLM2-135M in float32, 8 rows of 48 tokens, LoRA in the last 2 of 30 blocks, T = 10. Beside the steps on s, in the
same process and each in turn: a plain forward of a batch. Medians of the ratios within rounds, to that forward.
Writes `benchmarks/results/pool-<machine>.json`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import usual
from timing import MODEL, batches, interleaved, trainer, write
from zofo.models.load import load_model

STEPS, POOL = 10, 2


def main() -> None:
    """Measures, prints and writes."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    model, tokenizer = load_model(MODEL)
    keys = {"adapter_layers": "last 2", "lower_steps": STEPS, "penalty": 0.0, "zo_learning_rate": 0.0}
    pooled = trainer(model, tokenizer, lower_pool=POOL, **keys)
    batch = batches(pooled)["lower"][0]

    @torch.no_grad()
    def forward() -> None:
        usual.option_loss(pooled.adapted.base, batch, logits_to_keep=1)

    fresh = trainer(load_model(MODEL)[0], tokenizer, **keys)
    candidates = {"forward": forward, "fresh": lower_steps(fresh), "pool": lower_steps(pooled)}
    times = interleaved(candidates, rounds=rounds)
    found = {name: float(statistics.median(values / times["forward"])) for name, values in times.items()}
    print(found)
    seconds = {name: float(statistics.median(values)) for name, values in times.items()}
    write("pool", {"lower steps": STEPS, "pool": POOL, "forwards": found, "seconds": seconds})


def lower_steps(made: Any) -> Callable[[], None]:
    """The T steps on s of an iteration, without what follows them."""
    from zofo.methods.bilevel import _LowerSteps

    bundle, method = batches(made), made.method

    def steps() -> None:
        step = _LowerSteps(method, 0, [bundle])
        for t in range(STEPS):
            step(t)

    return steps


if __name__ == "__main__":
    main()
