"""The rewards of `examples/reward.py` learned by several methods, each in a process of its own.

    python benchmarks/reward_study.py METHOD SEED      one run, to benchmarks/results/reward-study/METHOD-SEED.json
    python benchmarks/reward_study.py table            the table of docs/results/rewards.md
    python benchmarks/reward_study.py difference A B   how much higher the reward of A is than that of B, seeds paired

SmolLM2-135M in float32 on movie reviews: completions of five tokens. Half of the reward is for a verdict, the whole
half for the right side and a quarter of the reward for the wrong one; the other half for a sentence that ends. 16 of
1,000 training rows have labels; the others are prompts that only the reward sees. The same 200 test rows for all. What
is forgotten is measured on question types.

- `zero-shot`: the model as it is.
- `zo`: all weights by the reward of the 1,000 prompts; `zo-anchor`: the same with `zo_anchor: 0.02`.
- `lora`: LoRA in all layers by the cross-entropy of the 16 labels; `lora-last-2`: in the last 2 of 30 layers;
  `lora-last-2-long`: the same for 200 steps in place of 40.
- `bilevel`: LoRA in the last 2 layers by these labels, all weights by the reward of the prompts (`penalty: infinite`).
  Of LoRA and `bilevel` the checkpoint counts that has the highest reward on 48 dev rows, of one every
  five steps; of all others the last one.
- `zo-long`, `bilevel-long`: `zo` and `bilevel` for 120 steps in place of 40, of which the best one in ten by dev reward
  counts; `bilevel-slow`: the same with the rate 3e-4 of the adapter in place of 1e-3.
- `bilevel-two-lower-steps`: T = 2; `bilevel-options`: T = 2, and the adapter compares the two options.
- `grpo-RATE`: LoRA in all layers by the reward, trl's GRPO, with as many generated tokens as `zo`. It needs trl, which
  zofo does not: give a folder with it (`pip install --no-deps --target DIR trl`) in PYTHONPATH.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any, cast

import numpy as np

sys.path.insert(0, "examples")

from reward import one_sentence, verdict
from timing import MODEL, RESULTS, machine
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.compare.statistics import mean_interval, paired_difference
from zofo.models.load import load_model
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.tokens import tokenize
from zofo.tasks.records import Record
from zofo.tasks.splits import halves, split_records
from zofo.tasks.task import load_task

FOLDER = RESULTS / "reward-study"
LABELS, PROMPTS, TEST = 16, 1000, 200
STEPS, ROWS, DIRECTIONS, TOKENS = 40, 8, 4, 5
BASE: dict[str, Any] = {
    "max_length": 40, "max_new_tokens": TOKENS, "reward_weights": [0.5, 0.5], "max_steps": STEPS, "loss": "lm",
    "per_device_train_batch_size": ROWS, "per_device_eval_batch_size": 50, "eval_steps": STEPS // 4,
    "logging_steps": 10, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
ZO: dict[str, Any] = {
    "objective": "reward", "num_perturbations": DIRECTIONS, "zo_distribution": "low_rank", "zo_learning_rate": 5e-6,
}  # fmt: skip
LAST_2 = {"adapter_layers": "last 2", "learning_rate": 1e-3}
BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "reward", "save_strategy": "steps", "save_steps": 5,
    "eval_steps": 5, "save_total_limit": 1, "learning_rate": 1e-3,
}  # fmt: skip
LAST = {**LAST_2, **BEST}
LONG = {**BEST, "max_steps": 120, "eval_steps": 10, "save_steps": 10}
INFINITE = {"method": "bilevel", "penalty": "infinite", **ZO}
METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "none", "adapter": "none"},
    "zo": {"method": "zo", "adapter": "none", **ZO},
    "zo-anchor": {"method": "zo", "adapter": "none", "zo_anchor": 0.02, **ZO},
    "lora": {"method": "fo", **BEST},
    "lora-last-2": {"method": "fo", **LAST},
    "lora-last-2-long": {"method": "fo", **LAST, "max_steps": 200},
    "bilevel": {**INFINITE, "lower_steps": 1, **LAST},
    "zo-long": {"method": "zo", "adapter": "none", **ZO, **LONG},
    "bilevel-long": {**INFINITE, "lower_steps": 1, **LAST, **LONG},
    "bilevel-slow": {**INFINITE, "lower_steps": 1, **LAST, **LONG, "learning_rate": 3e-4},
    "bilevel-two-lower-steps": {**INFINITE, "lower_steps": 2, **LAST_2},
    "bilevel-options": {**INFINITE, "lower_steps": 2, "loss": "options", **LAST_2},
}
GRPO = "grpo-"


def main() -> None:
    """One run, or the table of all."""
    if sys.argv[1] == "table":
        return write_table()
    if sys.argv[1] == "difference":
        return write_difference(*sys.argv[2:])
    name, seed = sys.argv[1], int(sys.argv[2])
    found = run_grpo(float(name.removeprefix(GRPO)), seed) if name.startswith(GRPO) else run(name, seed)
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}-{seed}.json"
    file.write_text(json.dumps({"method": name, "seed": seed, "machine": machine(), **found}) + "\n")
    print(name, seed, {key: np.mean(value) for key, value in found["test"].items()}, found["cost"], flush=True)


def parts(seed: int) -> tuple[list[Record], list[Record], list[Record], list[Record]]:
    """Rows with labels, prompts, dev rows and test rows: the last two are the same for every seed."""
    records = load_task("movie_reviews").records()
    rows = split_records(records, train_size=PROMPTS, dev_size=48, test_size=TEST, seed=0)
    labelled, prompts = halves(rows.train, LABELS / PROMPTS, seed)
    return labelled, prompts, rows.dev, rows.test


def run(name: str, seed: int) -> dict[str, Any]:
    """Trains by a method, and scores."""
    labelled, prompts, dev, test = parts(seed)
    keys = {**BASE, **METHODS[name], "seed": seed}
    bilevel, rewarded = keys["method"] == "bilevel", keys.get("objective") == "reward"
    train = prompts + labelled if rewarded and not bilevel else labelled
    model, tokenizer = load_model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ZOFOTrainer(
            model, ZOFOConfig(output_dir=folder, **keys), train, prompts if bilevel else None, dev,
            processing_class=tokenizer, reward_funcs=[verdict, one_sentence],
        )  # fmt: skip
        if trainer.args.method_class.trains():
            trainer.train()
        log = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
        scored = scores(trainer.scored(trainer.examples(test)), test)
        return {**scored, **forgotten(trainer), "dev": [[e["step"], e["eval_reward"]] for e in log],
                "cost": asdict(trainer.cost)}  # fmt: skip


def scores(found: Any, test: list[Record]) -> dict[str, Any]:
    """The parts of the reward of each test row, and the loss of the labels."""
    measured, answers = found["upper"]
    texts = [answer.text for answer in answers]
    sides = verdict(texts, [row.row["sentiment"] for row in test if row.row is not None])
    ends = one_sentence(texts)
    return {
        "test": {
            "reward": [0.5 * side + 0.5 * end for side, end in zip(sides, ends, strict=True)],
            "verdict": sides,
            "one sentence": ends,
        },
        "loss": measured["loss"],
        "texts": texts[:8],
    }


def forgotten(trainer: ZOFOTrainer) -> dict[str, Any]:
    """Whether the model as it is now answers each of 200 rows of another task, and its loss there."""
    rows = split_records(load_task("question_types").records(), train_size=10, dev_size=10, test_size=TEST, seed=0).test
    tokenizer: Any = trainer.processing_class
    evaluator = Evaluator(trainer.method.scorer, tokenizer, ("accuracy",), "options", 25)
    examples = tokenize(rows, tokenizer, 64)[0]
    answers = evaluator.answers(examples)
    right = [float(answer.text == row.completion) for answer, row in zip(answers, rows, strict=True)]
    return {"other task": right, "loss there": evaluator.measure(examples, answers)["loss"]}


def run_grpo(rate: float, seed: int) -> dict[str, Any]:
    """LoRA by trl's GRPO: for each of ROWS prompts a group of as many completions as `zo` has members."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    labelled, prompts, dev, test = parts(seed)
    rows = [{"prompt": row.prompt, "sentiment": row.row["sentiment"]} for row in prompts + labelled if row.row]
    model, tokenizer = load_model(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    group = 2 * DIRECTIONS
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, learning_rate=rate, num_generations=group, per_device_train_batch_size=ROWS * group,
            max_completion_length=TOKENS, max_steps=STEPS, reward_weights=BASE["reward_weights"], save_strategy="no",
            lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, seed=seed,
            logging_steps=10, gradient_checkpointing=False,
        )  # fmt: skip
        lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
        grpo = GRPOTrainer(
            model, [verdict, one_sentence], args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
        )
        started = time.perf_counter()
        grpo.train()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        merged: Any = cast(Any, grpo.model).merge_and_unload()
        scorer = ZOFOTrainer(
            merged, ZOFOConfig(output_dir=folder, **{**BASE, **METHODS["zero-shot"]}), test, None, dev,
            processing_class=tokenizer, reward_funcs=[verdict, one_sentence],
        )  # fmt: skip
        scored = scores(scorer.scored(scorer.examples(test)), test)
        return {**scored, **forgotten(scorer), "dev": [], "cost": {"wall_seconds": seconds, "peak_memory_bytes": peak}}


def write_table() -> None:
    """Reads all runs and writes the rows of the page."""
    found = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    zero = next(one for one in found if one["method"] == "zero-shot")
    others = sorted({one["method"] for one in found} - METHODS.keys())
    for name in [*METHODS, *others]:
        runs = [one for one in found if one["method"] == name]
        if runs:
            print(f"| {name} | {' | '.join(cells(runs, zero))} |")


def write_difference(first: str, second: str) -> None:
    """Of the rewards of two methods, on the seeds that both have."""
    found = {
        (one["method"], one["seed"]): one for one in (json.loads(file.read_text()) for file in FOLDER.glob("*.json"))
    }
    seeds = sorted(seed for method, seed in found if method == first and (second, seed) in found)
    a, b = (np.array([found[method, seed]["test"]["reward"] for seed in seeds]) for method in (first, second))
    print(seeds, a.mean(1), b.mean(1), paired_difference(a, b))


def interval(mean: Any) -> str:
    """A mean with its interval."""
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"


def cells(runs: list[dict[str, Any]], zero: dict[str, Any]) -> list[str]:
    """The cells of a method's row."""
    rewards, sentences = (
        mean_interval(np.array([run["test"][part] for run in runs])) for part in ("reward", "one sentence")
    )
    judged = [np.array(run["test"]["verdict"]) for run in runs]
    right = ", ".join(f"{(one == 1).sum() / (one > 0).sum():.2f}" for one in judged)
    other = np.array([run["other task"] for run in runs])
    change = paired_difference(other, np.array([zero["other task"]] * len(runs)), same_seeds=False)
    costs = [run["cost"] for run in runs]
    return [
        str(len(runs)), interval(rewards), f"{np.mean([one > 0 for one in judged]):.2f}", right, interval(sentences),
        f"{np.mean([run['loss'] for run in runs]):.2f}",
        f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
        f"{np.mean([run['loss there'] for run in runs]):.2f}",
        f"{np.mean([cost['wall_seconds'] for cost in costs]):.0f}",
        f"{np.mean([cost['peak_memory_bytes'] for cost in costs]) / 2**20:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
