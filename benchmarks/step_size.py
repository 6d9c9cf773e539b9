"""`python benchmarks/step_size.py`: does `zo_learning_rate: auto` find a rate as good as the best constant one?

Four embedded tasks with SmolLM2-135M, of which one had no part in the choice of the rule, and two small models that
are pretrained for a minute on the spot; MeZO and, on one task, Bilevel ZOFO. Every run has the forwards of 100
two-sided steps: `auto` takes fewer steps, for its curvatures. The loss is that of rows that nothing was trained on.
Writes `benchmarks/results/step-size.json` after every run, goes on from there when started again, and draws
docs/step-size.png.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from timing import MODEL, RESULTS, machine
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.errors import ZofoError
from zofo.models.load import load_model
from zofo.models.peft import UPPER
from zofo.tasks.splits import split_records, two_levels
from zofo.tasks.task import load_task

FORWARDS = 200
TASKS = ("movie_reviews", "question_types", "tweets")
HELD_OUT = "sms_spam"  # was not looked at before the rule was chosen
COARSE = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4)
FINE = (1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 3e-3)
SMALL = {"Llama, 0.6 M": (128, 2), "Llama, 8.6 M": (320, 6)}  # hidden size, layers
FILE = RESULTS / "step-size.json"
TOKENS = 32


def main() -> None:
    """Takes all runs that are not there yet, then says what they amount to."""
    done: list[dict[str, Any]] = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        small = pretrained(Path(folder))
        while run := next((run for run in (*plan(), *looked_at_again(done)) if not taken(run, done)), None):
            done.append({**run, **take(**run, folder=small.get(run["model"], MODEL))})
            print(json.dumps({key: done[-1][key] for key in (*run, "loss", "seconds")}), flush=True)
            lines = ",\n".join(map(json.dumps, done))  # a line for each run
            FILE.write_text(f'{{"machine": {json.dumps(machine())}, "runs": [\n{lines}\n]}}\n')
    for line in verdicts(done):
        print(line)
    draw(done)


def plan() -> list[dict[str, Any]]:
    """All runs: three seeds of auto, one of each constant rate (three on the small models and in `bilevel`)."""
    runs: list[dict[str, Any]] = []
    for model in SMALL:
        for rate in ("auto", *FINE):
            runs += [run(model, "movie_reviews", "zo", rate, seed) for seed in range(3)]
    for task in (*TASKS, HELD_OUT):
        runs += [run("SmolLM2-135M", task, "zo", "auto", seed) for seed in range(3)]
        runs += [run("SmolLM2-135M", task, "zo", rate, 0) for rate in COARSE]
    runs += [run("SmolLM2-135M", "movie_reviews", "bilevel", "auto", seed) for seed in range(3)]
    for rate in (1e-6, 1e-5, 3e-5, 1e-4):
        runs += [run("SmolLM2-135M", "movie_reviews", "bilevel", rate, seed) for seed in range(3)]
    return runs


def taken(run: dict[str, Any], done: list[dict[str, Any]]) -> bool:
    """Whether a run is there already."""
    return any(all(old[key] == run[key] for key in run) for old in done)


def looked_at_again(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two more seeds of the best constant rate: the best of several single runs was also lucky."""
    runs: list[dict[str, Any]] = []
    for key, rates in groups(done).items():
        if key[0] not in SMALL and len(rates) > 1:
            runs += [run(*key, best_constant(rates), seed) for seed in (1, 2)]
    return runs


def best_constant(rates: dict[float | str, list[float]]) -> float | str:
    """The one with the lowest mean loss over the seeds that all rates have."""
    constant = {rate: losses for rate, losses in rates.items() if rate != "auto"}
    seeds = min(map(len, constant.values()))
    return min(constant, key=lambda rate: sum(constant[rate][:seeds]))


def run(model: str, task: str, method: str, rate: float | str, seed: int) -> dict[str, Any]:
    """What identifies a run."""
    return {"model": model, "task": task, "method": method, "rate": rate, "seed": seed}


class Watch(TrainerCallback):
    """Stops a run when its forwards are used up, and keeps the rates it took."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.used = 0
        self.rates: list[float] = []
        self.losses: list[float] = []

    def count(self, function: Any) -> Any:
        """The same evaluation, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.used += not torch.is_grad_enabled()
            return function(*args, **kwargs)

        return counted

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After every step."""
        if logs and "zo_learning_rate" in logs:
            self.rates.append(logs["zo_learning_rate"])
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run."""
        if self.used >= FORWARDS:
            control.should_training_stop = True


def take(model: str, task: str, method: str, rate: float | str, seed: int, folder: str) -> dict[str, Any]:
    """One run; its loss on 160 other rows."""
    started = time.perf_counter()
    loaded, tokenizer = load_model(folder)
    rows = split_records(load_task(task).records(), train_size=600, dev_size=8, test_size=160, seed=0)
    watch = Watch()
    bilevel = {"adapter": "lora", "penalty": 1.0, "lower_steps": 1, "learning_rate": 1e-3, "upper_learning_rate": 1e-3}
    args = ZOFOConfig(
        **{
            "output_dir": "runs/step-size",
            "method": method,
            "zo_learning_rate": rate,
            "seed": seed,
            "max_steps": 100 if method == "zo" else 30,
            "per_device_train_batch_size": 8 if method == "zo" else 4,
            "max_length": TOKENS,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **(bilevel if method == "bilevel" else {"adapter": "none"}),
        }
    )
    train = two_levels(rows.train, 0.5) if method == "bilevel" else (rows.train,)
    made = ZOFOTrainer(loaded, args, *train, processing_class=tokenizer, callbacks=[watch])
    test = made.examples(rows.test)
    if method == "zo":
        scorer = made.method.scorer
        scorer.losses = watch.count(scorer.losses)
    try:
        made.train()
        loss = made.score(test)[UPPER]["loss"]
    except ZofoError:  # a loss that is not finite: the run has diverged
        loss = math.inf
    return {
        "loss": loss if math.isfinite(loss) else None, "steps": made.state.global_step, "forwards": watch.used,
        "rates": [float(f"{rate:.3g}") for rate in watch.rates],
        "losses": [round(value, 3) for value in watch.losses],
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def pretrained(folder: Path) -> dict[str, str]:
    """Two small language models, trained for a minute on the texts of the embedded tasks."""
    texts = [record.prompt for task in TASKS for rows in load_task(task).records().values() for record in rows]
    random.Random(0).shuffle(texts)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000, special_tokens=["<pad>", "<eos>"], show_progress=False, initial_alphabet=alphabet
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    return {name: pretrain(folder / str(size[0]), size, texts, tokenizer) for name, size in SMALL.items()}


def pretrain(folder: Path, size: tuple[int, int], texts: list[str], tokenizer: PreTrainedTokenizerFast) -> str:
    """400 batches of language modelling, about a minute; a number of batches and no clock, so that it repeats."""
    torch.manual_seed(0)
    hidden, layers = size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(400):
        batch = tokenizer(
            texts[16 * number : 16 * number + 16], return_tensors="pt", padding=True, truncation=True, max_length=48
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def groups(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[float | str, list[float]]]:
    """(model, task, method) -> rate -> the losses of all seeds; infinity where a run diverged."""
    found: dict[tuple[str, str, str], dict[float | str, list[float]]] = {}
    for old in runs:
        rates = found.setdefault((old["model"], old["task"], old["method"]), {})
        rates.setdefault(old["rate"], []).append(math.inf if old["loss"] is None else old["loss"])
    return found


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """One line for each group: the best constant rate, and auto against it."""
    lines: list[str] = []
    for (model, task, method), rates in groups(runs).items():
        means = {rate: sum(losses) / len(losses) for rate, losses in rates.items()}
        auto = rates["auto"]
        best = best_constant(rates)
        lines.append(
            f"{model}, {task}, {method}: best constant {best:g} {means[best]:.4f} (first seed {rates[best][0]:.4f}); "
            f"auto {means['auto']:.4f} ({min(auto):.4f} to {max(auto):.4f}), "
            f"ratio {means['auto'] / means[best]:.3f} (to the first seed {means['auto'] / rates[best][0]:.3f}); "
            + ", ".join(f"{rate:g} {mean:.4f}" for rate, mean in means.items() if rate != "auto")
        )
    return lines


def draw(runs: list[dict[str, Any]]) -> None:
    """Loss against the constant rate, with auto as a band; and the rates that auto took."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = groups(runs)
    figure = Figure(figsize=(3.6 * len(found), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(found), squeeze=False)
    for (upper, lower), (key, rates) in zip(axes.T, found.items(), strict=True):
        constant = {rate: losses for rate, losses in rates.items() if rate != "auto"}
        top = 1.6 * max(min(losses) for losses in rates.values() if math.isfinite(min(losses)) and min(losses) < 5)
        upper.plot(list(constant), [min(top, sum(v) / len(v)) for v in constant.values()], "o-", label="constant")
        upper.axhspan(min(rates["auto"]), max(rates["auto"]), color="#cc7744", alpha=0.4, label="auto, all seeds")
        upper.set(xscale="log", xlabel="constant rate", title="\n".join(key), ylim=(None, top))
        upper.legend()
        for old in runs:
            if (old["model"], old["task"], old["method"]) == key and old["rate"] == "auto":
                lower.plot(range(1, len(old["rates"]) + 1), old["rates"], lw=1)
        lower.set(yscale="log", xlabel="step")
    axes[0][0].set_ylabel("loss on other rows (cut off at the top)")
    axes[1][0].set_ylabel("rate that auto took, each seed")
    figure.savefig("docs/step-size.png", dpi=100)


if __name__ == "__main__":
    main()
