"""`python benchmarks/to_a_loss.py`: how soon is the loss reached that MeZO has after 1,000 steps at its usual rate?

SmolLM2-135M on movie reviews, float32, one seed. MeZO takes 1,000 steps of batch 8 at 1e-6; then MeZO with the
automatic rate, and Bilevel ZOFO (LoRA, T = 3, batch 4, automatic rate), train until their loss on the same 160 other
rows is as low, looked at every few steps. Evaluations count neither as time nor as tokens. Writes
`benchmarks/results/to-a-loss-<machine>.json`.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from timing import MODEL, write
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.adapters import UPPER
from zofo.models import load_model
from zofo.splits import split_records
from zofo.tasks import load_task

MEZO = {"method": "zo", "adapter": "none", "per_device_train_batch_size": 8}
BILEVEL = {"method": "bilevel", "adapter": "lora", "per_device_train_batch_size": 4, "lower_steps": 3}


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
        self.seen.append({"step": state.global_step, "loss": loss, **self.made.cost.as_json()})
        print(f"step {state.global_step}: loss {loss:.4f}, {self.made.cost.wall_seconds:.1f} s", flush=True)
        control.should_training_stop = loss <= self.goal


def run(name: str, goal: float, every: int, **keys: Any) -> dict[str, Any]:
    """One run, until the goal or its last step."""
    print(name)
    model, tokenizer = load_model(MODEL)
    rows = split_records(
        load_task("movie_reviews").records(), train_size=600, dev_size=8, test_size=160, lower_fraction=0.5, seed=0
    )
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
    both = args.method == "bilevel"
    made = ZOFOTrainer(
        model,
        args,
        rows.lower if both else rows.train,
        rows.upper if both else None,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    watch.made, watch.rows = made, made.examples(rows.test)
    made.train()
    return {"name": name, "keys": keys, "seen": watch.seen}


def main() -> None:
    """Runs the three, prints and writes."""
    usual = run("MeZO, 1e-6", -math.inf, 250, **MEZO, zo_learning_rate=1e-6, max_steps=1000)
    goal = usual["seen"][-1]["loss"]
    runs = [
        usual,
        run("MeZO, auto", goal, 5, **MEZO, max_steps=400),
        run("Bilevel ZOFO, auto", goal, 2, **BILEVEL, max_steps=100),
    ]
    for found in runs:
        last = found["seen"][-1]
        tokens = last["forward_tokens"] + last["backward_tokens"]
        print(
            f"{found['name']}: loss {last['loss']:.4f} after {last['step']} steps, {last['wall_seconds']:.0f} s, "
            f"{tokens:,} tokens"
        )
    write("to-a-loss", {"goal": goal, "runs": runs})


if __name__ == "__main__":
    main()
