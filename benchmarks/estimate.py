"""`python benchmarks/estimate.py`: what `zofo estimate` says, against runs of a few steps in processes of their own.

Three models: SmolLM2-135M, and a Llama and a GPT-2 of about 35 million random parameters, made on the spot. Prints the
ratio predicted / measured of each peak and of each step's time, and what gradient checkpointing and accumulation save.
Writes `benchmarks/results/estimate-<machine>.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import MODEL, write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import save_tiny_model

STEPS = 3
KEYS = {
    "task": "movie_reviews", "train_size": 400, "dev_size": 10, "test_size": 16, "per_device_eval_batch_size": 4,
    "penalty": 1, "lower_steps": 1, "max_steps": STEPS, "zo_learning_rate": 1e-6, "save_strategy": "no",
    "disable_tqdm": "true", "use_cpu": "true", "overwrite_output_dir": "true",
}  # fmt: skip
_WIDE = {"hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8, "max_position_embeddings": 256}
METHODS = [("fo", "lora"), ("zo", "none"), ("bilevel", "lora")]
# name -> (method, adapter, keys), on SmolLM2
SAVINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FO-LoRA, 16": ("fo", "lora", {"per_device_train_batch_size": 16}),
    "FO-LoRA, 16, checkpointing": (
        "fo",
        "lora",
        {"per_device_train_batch_size": 16, "gradient_checkpointing": "true"},
    ),
    "MeZO, 8": ("zo", "none", {"per_device_train_batch_size": 8}),
    "MeZO, 4 x 2 accumulated": (
        "zo",
        "none",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ),
}


def main() -> None:
    """Measures, prints and writes."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        models: dict[str, dict[str, Any]] = {
            "SmolLM2-135M": {"model": MODEL, "max_length": 48, "per_device_train_batch_size": 8},
            "Llama, 34 M": {
                "model": save_tiny_model(
                    home / "llama", "llama", **_WIDE, intermediate_size=1536, num_key_value_heads=8
                ),
                "max_length": 96,
                "per_device_train_batch_size": 4,
            },
            "GPT-2, 32 M": {
                "model": save_tiny_model(home / "gpt2", "gpt2", **_WIDE),
                "max_length": 96,
                "per_device_train_batch_size": 4,
            },
        }
        rows: list[dict[str, Any]] = []
        for model, keys in models.items():
            predicted = estimated(home, keys)
            for method, adapter in METHODS:
                rows.append(compared(model, method, adapter, predicted, measured(home, method, adapter, keys)))
        for name, (method, adapter, changes) in SAVINGS.items():
            keys = {**models["SmolLM2-135M"], **changes}
            found = compared(name, method, adapter, estimated(home, keys), measured(home, method, adapter, keys))
            rows.append(found)
    ratios = [row["predicted_bytes"] / row["measured_bytes"] for row in rows]
    print(f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}")
    write("estimate", {"rows": rows})


def estimated(home: Path, keys: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of `zofo estimate` by method and adapter."""
    file = home / "estimate.json"
    file.unlink(missing_ok=True)
    _zofo("estimate", {**KEYS, **keys, "output": file, "output_dir": home / "run"})
    return {(row["method"], row["adapter"]): row for row in json.loads(file.read_text())["rows"]}


def measured(home: Path, method: str, adapter: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The entry `cost` of a run of a few steps."""
    _zofo("train", {**KEYS, **keys, "method": method, "adapter": adapter, "output_dir": home / "run"})
    return json.loads((home / "run" / "results.json").read_text())["cost"]


def compared(
    name: str, method: str, adapter: str, predicted: dict[tuple[str, str], dict[str, Any]], cost: dict[str, Any]
) -> dict[str, Any]:
    """One row of the result, which is printed as well."""
    row = predicted[method, adapter]
    found = {
        "name": name,
        "method": method,
        "adapter": adapter,
        "predicted_bytes": row["memory"]["peak"],
        "measured_bytes": cost["peak_memory_bytes"],
        "predicted_seconds": row["seconds"],
        "measured_seconds": cost["wall_seconds"] / STEPS,
    }
    sizes = [found["predicted_bytes"] / 2**20, found["measured_bytes"] / 2**20]
    times = [found["predicted_seconds"], found["measured_seconds"]]
    print(
        f"{name:28} {method:8} {adapter:5} predicted {sizes[0]:6,.0f} MiB, measured {sizes[1]:6,.0f} "
        f"({sizes[0] / sizes[1]:.3f});  {times[0]:5.2f} s, measured {times[1]:5.2f} ({times[0] / times[1]:.2f})",
        flush=True,
    )
    return found


def _zofo(verb: str, keys: dict[str, Any]) -> None:
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "zofo.cli", verb, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
