"""Does the automatic rate harm a model that is trained already? With and without its part of signal.

    python benchmarks/trained_start.py [TASK ...]
    python benchmarks/trained_start.py seeds TASK SEED ...

SmolLM2-135M in float32 on the six built-in tasks that need no network, texts of at most 32 tokens: 100 steps of LoRA in
the last 2 layers (batch 8, 1e-3), then 60 zeroth-order steps on all weights with the automatic rate, 8 rows each, the
adapter fixed (`two_stage`). The loss of 200 dev rows before and after these, and the difference by rows with its 95 %
interval; the same with `Automatic` as it was before it looked at errors. And 60 such steps without an adapter, from the
untrained model. One seed. Writes `benchmarks/results/trained-start.json` after each of these, and keeps the others. The
second form repeats a task beside a trained adapter, with the factor, with other seeds, of the rows and of the run.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from typing import Any

import torch
from transformers import TrainerCallback

from timing import MODEL, RESULTS, machine
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.models.load import load_model
from zofo.scoring.batch import collate, padding_id
from zofo.scoring.tokens import tokenize
from zofo.tasks.splits import split_records
from zofo.tasks.task import load_task
from zofo.zo.rules import Automatic

FILE = RESULTS / "trained-start.json"
TASKS = ("question_types", "movie_reviews", "tweets", "sms_spam", "amazon_reviews", "editorials")
LORA, STEPS, LENGTH, DEV = 100, 60, 32, 200


class At(TrainerCallback):
    """Calls a function after a step."""

    def __init__(self, step: int, call: Any) -> None:
        self._step, self._call = step, call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the step."""
        if state.global_step == self._step:
            self._call()


def main() -> None:
    """Measures each task, prints it, writes."""
    if "seeds" in sys.argv:
        for seed in map(int, sys.argv[3:]):
            store(sys.argv[2], "with", f"trained, seed {seed}", moved(sys.argv[2], LORA, seed))
        return
    rules = {"with": Automatic._judged, "without": lambda self, estimate, state, assumed: {"trust": 1.0}}
    for (name, rule), lora, task in itertools.product(rules.items(), (LORA, 0), sys.argv[1:] or TASKS):
        Automatic._judged = rule  # pyright: ignore[reportAttributeAccessIssue]
        store(task, name, "trained" if lora else "untrained", moved(task, lora))


def store(task: str, rule: str, start: str, measured: dict[str, Any]) -> None:
    """Prints a result, and writes it beside the others."""
    found = {**measured, "machine": machine()}
    kept = json.loads(FILE.read_text())["tasks"] if FILE.is_file() else {}
    kept.setdefault(task, {}).setdefault(rule, {})[start] = found
    FILE.write_text(json.dumps({"tasks": kept}, indent=1) + "\n")
    print(task, rule, start, json.dumps(found), flush=True)


def moved(task: str, lora: int, seed: int = 0) -> dict[str, Any]:
    """The mean dev loss before and after the zeroth-order steps, and the difference with half its interval."""
    model, tokenizer = load_model(MODEL)
    records = load_task(task).records()
    rows = split_records(records, train_size=1000, dev_size=DEV, test_size=100, seed=seed)
    keys: dict[str, Any] = {"method": "zo", "adapter": "none"}
    if lora:
        keys = {"method": "two_stage", "adapter_layers": "last 2", "two_stage_fraction": lora / (lora + STEPS)}
    with tempfile.TemporaryDirectory() as folder:
        args = ZOFOConfig(
            output_dir=folder, max_steps=lora + STEPS, max_length=LENGTH, per_device_train_batch_size=8,
            gradient_accumulation_steps=1, learning_rate=1e-3, zo_learning_rate="auto", report_to="none",
            save_strategy="no", eval_strategy="no", disable_tqdm=True, seed=seed, **keys,
        )  # fmt: skip
        made = ZOFOTrainer(model, args, rows.train, processing_class=tokenizer)
        before: list[torch.Tensor] = [] if lora else [losses(made, rows.dev, tokenizer)]
        made.add_callback(At(lora, lambda: before.append(losses(made, rows.dev, tokenizer))))
        made.train()
        change = losses(made, rows.dev, tokenizer) - before[0]
    trust = made.method.zeroth_order_level.optimizer.trust
    return {
        "before": float(before[0].mean()),
        "change": float(change.mean()),
        "half interval": 1.96 * float(change.std()) / math.sqrt(len(change)),
        "trust": float(trust or 0.0),
    }


@torch.no_grad()
def losses(made: ZOFOTrainer, rows: Any, tokenizer: Any) -> torch.Tensor:
    """(R,) the loss of each row, in eval mode."""
    scorer = made.method.scorer
    made.adapted.model.eval()
    examples, found = tokenize(rows, tokenizer, LENGTH)[0], []
    with scorer.noting_rows() as noted:
        for low in range(0, len(examples), 20):
            batch: Any = collate(examples[low : low + 20], "options", padding_id(tokenizer), scorer.layout)
            scorer.loss(batch)
        found = torch.cat(noted)
    return found


if __name__ == "__main__":
    main()
