"""`python benchmarks/precision.py`: does a 16-bit backbone learn what a float32 one learns?

Three ways to keep the weights: float32; bfloat16 with updates rounded stochastically, as zofo does it; and bfloat16
with updates rounded to the nearest, as an ordinary addition does it. On a quadratic, and on SmolLM2-135M with movie
reviews. And: how far is a projected gradient in bfloat16 from that in float32, along the same directions, and is that
what rounding W + εz must do to the gradient, weight by weight? Writes
`benchmarks/results/precision-<machine>.json` and draws docs/precision.png.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from timing import MODEL, batches, trainer, write
from zofo import ZOFOConfig, ZOFOTrainer, noise
from zofo.models.load import load_model
from zofo.models.peft import UPPER
from zofo.noise import Sum, Term, stream_key
from zofo.scoring.scorer import Scorer, Tokens
from zofo.tasks.splits import split_records
from zofo.tasks.task import load_task
from zofo.zo.estimators import Estimate, two_sided
from zofo.zo.optimizers import ZerothOrderOptimizer
from zofo.zo.perturb import perturbed
from zofo.zo.precision import rounding_error
from zofo.zo.rules import SGD

WAYS = ("float32", "bfloat16, stochastic", "bfloat16, nearest")
AUTOMATIC = ("float32, auto", "bfloat16, auto")
SEEDS = (0, 1, 2)
QUADRATIC_SEEDS = range(8)
STEPS, RATE, EPS, EVERY = 80, 1e-5, 3e-3, 20
SIZE, QUADRATIC_STEPS = 32, 2000
DISTANCES = (1e-4, 1e-3, 3e-3, 1e-2)
DIRECTIONS = 8


def main() -> None:
    """Measures, prints, writes and draws."""
    bowls = {way: [quadratic(way, seed) for seed in QUADRATIC_SEEDS] for way in WAYS}
    for way, curves in bowls.items():
        print(f"quadratic, {way}: {mean_and_spread([curve[-1] for curve in curves])}", flush=True)
    gradients = projected_gradients()
    for row in gradients:
        print(row, flush=True)
    runs = {way: [language_model(way, seed) for seed in SEEDS] for way in WAYS}
    runs |= {way: [language_model(way, seed) for seed in SEEDS[:1]] for way in AUTOMATIC}
    for way, curves in runs.items():
        print(f"SmolLM2, {way}: {mean_and_spread([curve[-1] for curve in curves])}")
    write("precision", {"quadratic": bowls, "projected_gradients": gradients, "language_model": runs})
    draw(bowls, runs)


def mean_and_spread(values: Sequence[float]) -> str:
    """As text."""
    return f"{statistics.mean(values):.4g} (seeds: {', '.join(f'{value:.4g}' for value in values)})"


@contextmanager
def rounding(way: str) -> Any:
    """Within the block, updates of 16-bit weights are rounded as `way` says."""
    before = noise.write_sums

    def nearest(sums: Sequence[noise.Sum], distribution: Any = "normal") -> None:
        before([one._replace(rounding_key=None) for one in sums], distribution)

    if way == "bfloat16, nearest":
        noise.write_sums = nearest
    try:
        yield
    finally:
        noise.write_sums = before


def quadratic(way: str, seed: int) -> list[float]:
    """The losses of ZO-SGD on 0.5 |w - 1|², from w = 1.5, by steps far below the gap of two neighbours at 1."""
    w = {"w": torch.full((SIZE,), 1.5, dtype=torch.float32 if way == "float32" else torch.bfloat16)}
    losses: list[float] = []

    def evaluate(step: int) -> Callable[[float, int], float]:
        def loss(scale: float, query: int) -> float:
            moved = torch.empty_like(w["w"])
            noise.write_sums([Sum(w["w"], moved, [Term(stream_key(seed, step, query, "w"), scale)])])
            return float(0.5 * (moved.double() - 1).square().sum())

        return loss

    optimizer = ZerothOrderOptimizer(w, SGD(), 5e-4)
    with rounding(way):
        for step in range(QUADRATIC_STEPS):
            projected = two_sided(evaluate(step), 2.0**-6, 1, "normal")
            optimizer.propose(Estimate(seed, step, projected))
            optimizer.step()
            if step % 50 == 49:
                losses.append(float(0.5 * (w["w"].double() - 1).square().sum()))
    return losses


def projected_gradients() -> list[dict[str, float]]:
    """How far projected gradients in bfloat16 are from those in float32, at the same weights and directions."""
    half, tokenizer = load_model(MODEL, "bfloat16")
    whole, _ = load_model(MODEL)
    whole.load_state_dict(half.state_dict())  # the same values
    made = {"half": trainer(half, tokenizer, method="zo", adapter="none", dtype="bfloat16")}
    made["whole"] = trainer(whole, tokenizer, method="zo", adapter="none")
    shares = gradient_by_gap(made["whole"])
    rows: list[dict[str, float]] = []
    for eps in DISTANCES:
        found: dict[str, list[float]] = {"float32": [], "weights alone in bfloat16": [], "bfloat16": []}
        for query in range(DIRECTIONS):
            found["float32"].append(projected(made["whole"], eps, query))
            found["bfloat16"].append(projected(made["half"], eps, query))
            found["weights alone in bfloat16"].append(with_rounded_weights(made, eps, query))
        size = rms(found["float32"])
        rows.append(
            {
                "eps": eps,
                "rms in float32": size,
                "predicted": predicted_error(shares["all"], eps),
                "predicted without norms": predicted_error(shares["without norms"], eps),
                **{
                    way: rms([a - b for a, b in zip(values, found["float32"], strict=True)]) / size
                    for way, values in found.items()
                    if way != "float32"
                },
            }
        )
    return rows


def gradient_by_gap(made: ZOFOTrainer) -> dict[str, dict[float, float]]:
    """Gap of bfloat16 at a weight -> the share of |∇L|² that weights with this gap have."""
    batch = batches(made)["zo"][0]
    weights = made.adapted.backbone
    for weight in weights.values():
        weight.requires_grad_(True)
    (Scorer(made.adapted, Tokens()).loss(batch) / 8).backward()
    found: dict[str, dict[float, float]] = {}
    for kind in ("all", "without norms"):
        squares: dict[float, float] = {}
        for name, weight in weights.items():
            if kind == "all" or "norm" not in name:
                exponents = torch.frexp(weight.detach())[1] - 1
                for exponent in exponents.unique().tolist():
                    gap = 2.0**exponent * torch.finfo(torch.bfloat16).eps
                    part = weight.grad[exponents == exponent].double().square().sum()
                    squares[gap] = squares.get(gap, 0.0) + float(part)
        found[kind] = {gap: part / sum(squares.values()) for gap, part in squares.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    return found


def predicted_error(shares: Mapping[float, float], eps: float) -> float:
    """The rounding error of a projected gradient over its size: each weight's, by its share of |∇L|²."""
    return math.sqrt(sum(share * rounding_error(eps, gap) ** 2 for gap, share in shares.items()))


@torch.no_grad()
def projected(made: ZOFOTrainer, eps: float, query: int) -> float:
    """[L(θ + εz) - L(θ - εz)] / 2ε on one batch."""
    batch, scorer = batches(made)["zo"][0], Scorer(made.adapted, Tokens())

    def loss(scale: float, query: int) -> float:
        with perturbed(made.adapted.base, made.adapted.backbone, 5, scale, 0, query):
            return float(scorer.loss(batch)) / 8

    eps = noise.representable(eps)
    return (loss(eps, query) - loss(-eps, query)) / (2 * eps)


@torch.no_grad()
def with_rounded_weights(made: Mapping[str, ZOFOTrainer], eps: float, query: int) -> float:
    """The same in float32 arithmetic, but with W + εz rounded to bfloat16."""
    whole, half = made["whole"], made["half"].adapted.backbone
    batch, scorer = batches(whole)["zo"][0], Scorer(whole.adapted, Tokens())
    eps = noise.representable(eps)

    def loss(scale: float) -> float:
        for name, parameter in whole.adapted.backbone.items():
            moved = torch.empty_like(half[name])
            noise.write_sums([Sum(half[name], moved, [Term(stream_key(5, 0, query, name), scale)])])
            parameter.copy_(moved)
        return float(scorer.loss(batch)) / 8

    value = (loss(eps) - loss(-eps)) / (2 * eps)
    for name, parameter in whole.adapted.backbone.items():
        parameter.copy_(half[name])
    return value


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return statistics.fmean(value * value for value in values) ** 0.5


class Watch(TrainerCallback):
    """Keeps the loss on other rows, every few steps."""

    def __init__(self) -> None:
        self.made: Any = None
        self.rows: Any = None
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks."""
        if state.global_step % EVERY == 0:
            self.losses.append(self.made.score(self.rows)[UPPER]["loss"])


def language_model(way: str, seed: int) -> list[float]:
    """MeZO's losses on 80 other rows."""
    dtype, rate = way.split(",")[0], "auto" if way in AUTOMATIC else RATE
    model, tokenizer = load_model(MODEL, dtype)  # pyright: ignore[reportArgumentType]
    rows = split_records(load_task("movie_reviews").records(), train_size=600, dev_size=8, test_size=80, seed=0)
    watch = Watch()
    args = ZOFOConfig(
        output_dir="runs/precision", method="zo", adapter="none", dtype=dtype, seed=seed, max_steps=STEPS,
        zo_learning_rate=rate, zo_eps=EPS, per_device_train_batch_size=8, max_length=32, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    made = ZOFOTrainer(model, args, rows.train, processing_class=tokenizer, callbacks=[watch])
    watch.made, watch.rows = made, made.examples(rows.test)
    first = made.score(watch.rows)[UPPER]["loss"]
    with rounding(way):
        made.train()
    print(f"SmolLM2, {way}, seed {seed}: {[round(loss, 4) for loss in watch.losses]}", flush=True)
    return [first, *watch.losses]


def draw(bowls: Mapping[str, Sequence[Sequence[float]]], runs: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The mean curve of each way over its seeds, and the spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, curves, first, every in ((left, bowls, 50, 50), (right, runs, 0, EVERY)):
        for way, seeds in curves.items():
            steps = [first + every * i for i in range(len(seeds[0]))]
            columns = list(zip(*seeds, strict=True))
            (line,) = axes.plot(steps, [statistics.mean(c) for c in columns], label=way)
            axes.fill_between(
                steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color()
            )
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    left.set(title="a quadratic, 32 weights", yscale="log", ylabel="loss")
    right.set(title=f"SmolLM2-135M, movie reviews, ε = {EPS:g}", ylabel="loss on other rows")
    right.legend()
    figure.savefig("docs/precision.png", dpi=100)


if __name__ == "__main__":
    main()
