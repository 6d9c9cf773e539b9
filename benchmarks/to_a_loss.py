"""`python benchmarks/to_a_loss.py`: how soon is the loss reached that MeZO has after 1,000 steps at its usual rate?

SmolLM2-135M on movie reviews, float32. MeZO takes 1,000 steps of batch 8 at 1e-6, one seed; then MeZO with the
automatic rate, published Bilevel ZOFO (λ = 1, LoRA, T = 3, batch 4, automatic rate) and LoRA alone, three seeds each,
train until their loss on the same 80 other rows is as low, looked at every few steps. Evaluations count neither as time
nor as forwards. Writes `benchmarks/results/to-a-loss-<machine>.json`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from timing import MODEL, write
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.models.load import load_model
from zofo.models.peft import UPPER
from zofo.tasks.splits import split_records, two_levels
from zofo.tasks.task import load_task

STEPS = 1000
SEEDS = range(3)
MEZO = {"method": "zo", "adapter": "none", "per_device_train_batch_size": 8}
BILEVEL = {"method": "bilevel", "adapter": "lora", "per_device_train_batch_size": 4, "lower_steps": 3, "penalty": 1.0}
LORA = {"method": "fo", "adapter": "lora", "per_device_train_batch_size": 8}


class Until(TrainerCallback):
    """Stops when the loss is low enough, and keeps what was seen."""

    def __init__(self, goal: float, every: int) -> None:
        self.made: Any = None
        self.rows: Any = None
        self.goal, self.every = goal, every
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks, now and then; after CostCallback, so that looking costs nothing."""
        if state.global_step % self.every:
            return
        loss = self.made.score(self.rows)[UPPER]["loss"]
        self.seen.append({"step": state.global_step, "loss": loss, **asdict(self.made.cost)})
        print(f"step {state.global_step}: loss {loss:.4f}, {self.made.cost.wall_seconds:.1f} s", flush=True)
        control.should_training_stop = loss <= self.goal


def run(name: str, goal: float, every: int, **keys: Any) -> dict[str, Any]:
    """One run, until the goal or its last step."""
    print(name)
    model, tokenizer = load_model(MODEL)
    rows = split_records(load_task("movie_reviews").records(), train_size=600, dev_size=8, test_size=80, seed=0)
    watch = Until(goal, every)
    settings = {
        "output_dir": "runs/to-a-loss",
        "max_length": 32,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = ZOFOConfig(**{**settings, **keys})
    made = ZOFOTrainer(
        model,
        args,
        *(two_levels(rows.train, 0.5) if args.method == "bilevel" else (rows.train,)),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    watch.made, watch.rows = made, made.examples(rows.test)
    made.train()
    return {"name": name, "keys": keys, "seen": watch.seen}


def main() -> None:
    """Takes all runs, writes and prints."""
    usual = run("MeZO, 1e-6", -math.inf, STEPS // 4, **MEZO, zo_learning_rate=1e-6, max_steps=STEPS)
    goal = usual["seen"][-1]["loss"]
    runs = [usual]
    for seed in SEEDS:
        runs += [
            run("MeZO, auto", goal, 2, **MEZO, seed=seed, max_steps=400),
            run("Bilevel ZOFO, auto", goal, 1, **BILEVEL, seed=seed, max_steps=100),
            run("FO-LoRA, 1e-3", goal, 2, **LORA, learning_rate=1e-3, seed=seed, max_steps=200),
        ]
    write("to-a-loss", {"goal": goal, "runs": runs})
    print(f"loss {goal:.4f} is reached after (median, least to greatest; how often MeZO's goes into the median)")
    for name in dict.fromkeys(found["name"] for found in runs):
        print(name, *(line(name, what, runs, goal) for what in ("step", "wall_seconds", "tokens")), sep="; ")


def line(name: str, what: str, runs: list[dict[str, Any]], goal: float) -> str:
    """How much of something the runs of a name took, beside the first run; infinity where it was not enough."""
    took: list[tuple[str, float]] = []
    for found in runs:
        last = found["seen"][-1]
        last = {**last, "tokens": last["forward_tokens"] + last["backward_tokens"]}
        took.append((found["name"], last[what] if last["loss"] <= goal else math.inf))
    own = sorted(value for other, value in took if other == name)
    middle = statistics.median(own)
    return f"{what} {middle:,.0f} ({own[0]:,.0f} to {own[-1]:,.0f}; {took[0][1] / middle:.1f} x)"


if __name__ == "__main__":
    main()
