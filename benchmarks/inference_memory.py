"""Who trains in the memory of inference: peaks of whole processes, each method in one of its own.

    python benchmarks/inference_memory.py [TOKENS ...]

SmolLM2-135M in float32, 8 rows of 256 and 1,024 tokens with two options. Adapters in all layers with 256 alone, as they
would take 14 GB with 1,024; "row by row" are eight micro-batches of one row, with both lengths. "transformers"
evaluates such rows in a bare loop; "evaluation" is zofo's own loss of the batch without any step; the others train two
steps. What is measured is the resident memory of the process at its peak, from the first forward on. Writes
`benchmarks/results/inference-memory-<machine>.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LENGTHS = (256, 1024)
LAST = {"adapter": "lora", "adapter_layers": "last 2"}
ROW_BY_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
LOW = {"zo_distribution": "low_rank", "num_perturbations": 8}
RUNS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "evaluation": {"method": "none", "adapter": "none"},
    "zo": {"method": "zo", "adapter": "none"},
    "zo, low rank": {"method": "zo", "adapter": "none", **LOW},
    "fo, last 2 layers": {"method": "fo", **LAST},
    "bilevel, last 2 layers": {"method": "bilevel", "penalty": 1.0, "lower_steps": 1, **LAST},
    "bilevel, infinite penalty, last 2 layers": {"method": "bilevel", "penalty": "infinite", "lower_steps": 1, **LAST},
    "bilevel, last 2 layers, low rank": {"method": "bilevel", "penalty": 1.0, "lower_steps": 1, **LAST, **LOW},
    "fo, all layers, row by row": {"method": "fo", "adapter": "lora", **ROW_BY_ROW},
    "fo, all layers, row by row, checkpointing": {
        "method": "fo",
        "adapter": "lora",
        **ROW_BY_ROW,
        "gradient_checkpointing": True,
    },
    "all weights by SGD in the backward, one row a step, checkpointing": {
        "method": "fo",
        "adapter": "none",
        "optimizer_in_backward": True,
        "optim": "sgd",
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
    },
    "fo, all layers": {"method": "fo", "adapter": "lora"},
    "fo, all layers, checkpointing": {"method": "fo", "adapter": "lora", "gradient_checkpointing": True},
    "bilevel, all layers": {"method": "bilevel", "penalty": 1.0, "lower_steps": 1, "adapter": "lora"},
}


def main() -> None:
    """Measures each run in a process, prints the table, writes."""
    if "--of" in sys.argv:
        print(json.dumps(peak_of(sys.argv[2], int(sys.argv[3]))))
        return
    from timing import write

    found: dict[str, dict[str, int]] = {}
    for length in map(int, sys.argv[1:] or LENGTHS):
        for name in RUNS if length < LENGTHS[1] else list(RUNS)[:-3]:
            command = [sys.executable, "-W", "ignore", __file__, "--of", name, str(length)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found.setdefault(name, {})[str(length)] = json.loads(run.stdout.splitlines()[-1])
            print(f"{name:66} {length:5} {found[name][str(length)] / 2**20:,.0f} MiB", flush=True)
    write("inference-memory", {"peak MiB": {n: {k: v >> 20 for k, v in of.items()} for n, of in found.items()}})


def peak_of(name: str, length: int) -> int:
    """Bytes at the peak of one run."""
    import torch

    from timing import MODEL, batches, trainer
    from zofo.training.peak import peak_memory, reset_peak_memory

    if name == "transformers":
        from zofo.models.load import load_model

        model, _ = load_model(MODEL)
        ids = torch.randint(10, 1000, (8, length))
        reset_peak_memory(model.device)
        with torch.no_grad():
            for _ in range(3):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False)
        return peak_memory(model.device)
    keys = dict(RUNS[name])
    if name == "evaluation":
        keys["method"] = "zo"
    made = trainer(MODEL, tokens=length, max_steps=2, **keys)
    if name != "evaluation":
        made.train()
        return made.cost.peak_memory_bytes
    batch = batches(made)["zo"][0]
    reset_peak_memory(made.adapted.base.device)
    with torch.no_grad():
        for _ in range(3):
            made.method.scorer.loss(batch)
    return peak_memory(made.adapted.base.device)


if __name__ == "__main__":
    main()
