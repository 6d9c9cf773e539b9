"""How fast zeroth-order steps can learn: signal, noise and curvature of the true gradients of single rows.

    python benchmarks/speed_limit.py TASK STEPS ROWS

SmolLM2-135M in float32, after STEPS steps of LoRA in the last 2 of 30 blocks (batch 8, 1e-3) on 1,000 rows. On ROWS of
these, one at a time, in eval mode: the gradient g of the loss by each parameter, and that of the loss of an answer
drawn from the model, whose mean square is the trace F of the Gauss-Newton matrix. By parameter, |G|² of the mean
gradient G and the variance σ² = E|g - G|², both unbiased.

One direction z for B rows has the projected gradient zᵀG with the variance (|G|² + σ²/B). With the best rate on a
quadratic with the Hessian's trace F the loss falls in one step of 2 B forwards by |G|⁴ / (2 F (|G|² + σ²/B)), that is,
for each forward of a row, by at most

    P = |G|⁴ / (4 F σ²)

which is reached where noise prevails: with few rows for a direction. It holds for whatever weights z moves, and adding
weights of the same proportions of |G|², σ² and F does not change it. Writes `benchmarks/results/speed-limit.json`, and
keeps there what was measured of other tasks and steps. About 1.2 s a row on one thread.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from typing import Any

import torch

from timing import MODEL, RESULTS, machine
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.models.load import load_model
from zofo.scoring.batch import collate, padding_id
from zofo.scoring.tokens import tokenize
from zofo.tasks.splits import split_records
from zofo.tasks.task import load_task

FILE = RESULTS / "speed-limit.json"
LENGTH = 48
KINDS = ("embed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")


def main() -> None:
    """Measures one state of the model, prints its groups of weights, writes."""
    task, steps, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trainer, rows, tokenizer = trained(task, steps)
    random.Random(5).shuffle(rows)
    loss, of_names = measured(trainer, rows[:count], tokenizer)
    groups: dict[str, list[float]] = {}
    for name, values in of_names.items():
        for group in ("all", kind_of(name), blocks_of(name)):
            groups[group] = [a + b for a, b in zip(groups.get(group, [0.0] * 4), values, strict=True)]
    found = {
        group: {"G2": g, "noise": n, "F": f, "weights": int(size), "P": g * abs(g) / (4 * f * n)}
        for group, (g, n, f, size) in sorted(groups.items())
    }
    for group, values in found.items():
        print(f"{group:12} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    kept = json.loads(FILE.read_text())["states"] if FILE.is_file() else {}
    kept[f"{task}, {steps} steps"] = {"machine": machine(), "loss": loss, "rows": count, "groups": found}
    FILE.write_text(json.dumps({"states": dict(sorted(kept.items()))}, indent=1) + "\n")


def trained(task: str, steps: int) -> tuple[ZOFOTrainer, list[Any], Any]:
    """The trainer after its steps, and its training rows."""
    model, tokenizer = load_model(MODEL)
    rows = split_records(load_task(task).records(), train_size=1000, dev_size=100, test_size=200, seed=0).train
    with tempfile.TemporaryDirectory() as folder:
        args = ZOFOConfig(
            output_dir=folder, method="fo", adapter_layers="last 2", max_length=LENGTH, max_steps=max(steps, 1),
            learning_rate=1e-3, report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        made = ZOFOTrainer(model, args, rows, processing_class=tokenizer)
        if steps:
            made.train()
    return made, list(rows), tokenizer


def measured(trainer: ZOFOTrainer, rows: list[Any], tokenizer: Any) -> tuple[float, dict[str, list[float]]]:
    """The mean loss; and of each parameter |G|², σ², F and its size."""
    adapted, scorer = trainer.adapted, trainer.method.scorer
    adapted.model.eval()
    names, parameters = list(adapted.movable), list(adapted.movable.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    total = [torch.zeros_like(p) for p in parameters]
    squares, fisher = torch.zeros(2, len(names), dtype=torch.float64)
    generator, loss, n = torch.Generator().manual_seed(0), 0.0, len(rows)
    for example in tokenize(rows, tokenizer, LENGTH)[0]:
        batch = collate([example], "options", padding_id(tokenizer), scorer.layout)
        log_p = scorer.option_totals(batch).means[0].log_softmax(-1)
        gold = int(batch["gold"][0])
        drawn = int(torch.multinomial(log_p.detach().exp(), 1, generator=generator))
        loss -= float(log_p[gold].detach()) / n
        gradients = torch.autograd.grad(-log_p[gold], parameters, retain_graph=True)
        torch._foreach_add_(total, list(gradients))
        squares += torch.stack(torch._foreach_norm(gradients)).double() ** 2
        of_drawn = torch.autograd.grad(-log_p[drawn], parameters)
        fisher += torch.stack(torch._foreach_norm(of_drawn)).double() ** 2 / n
    signal = (torch.stack(torch._foreach_norm(total)).double() ** 2 - squares) / (n * (n - 1))
    noise = squares / n - signal
    return loss, {
        name: [float(signal[i]), float(noise[i]), float(fisher[i]), float(parameters[i].numel())]
        for i, name in enumerate(names)
    }


def kind_of(name: str) -> str:
    """The kind of layer that a parameter is in."""
    return next(kind for kind in KINDS if kind in name)


def blocks_of(name: str) -> str:
    """Ten blocks each, or none."""
    number = re.search(r"layers\.(\d+)\.", name)
    return f"blocks {int(number[1]) // 10 * 10:02}+" if number else "no block"


if __name__ == "__main__":
    main()
