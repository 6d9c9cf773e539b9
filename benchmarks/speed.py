"""`make bench`: what a step costs against its forwards, and a run against the memory of its adapter.

Every figure is the median of the ratios of two things that are timed in turn, in five or more rounds after a warm-up,
beside the quartiles and the ratio of the quickest rounds. Peaks of memory are of whole processes, medians of three
where they vary. The embedded SmolLM2-135M in float32, batch 8 x 48 tokens unless said. Writes
`benchmarks/results/<machine>.json` and the table in docs/performance.md.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import usual
from clock import timed_run
from table import Row, write_table
from timing import MODEL, batches, child, device, interleaved, step_of, trainer, write
from zofo import direction, noise
from zofo.methods.first_order_level import FirstOrderLevel
from zofo.models.load import load_model
from zofo.models.peft import LOWER, UPPER
from zofo.models.source import local_source
from zofo.noise.eager import Piece, eager
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import tokenize
from zofo.tasks.task import Record

ELEMENTS = 33_500_000
EPS = 1e-3
QUERIES = 8
PARTS = 4  # of an evaluation set, one of which is scored one by one in each round


def main() -> None:
    """Measures everything, prints it, writes it."""
    started = time.perf_counter()
    whole, shares = whole_run_rows()
    rows: list[Row] = []
    for section in (noise_rows, zeroth_order_rows, bilevel_rows, lambda: whole, scoring_rows, process_rows):
        for row in section():
            print(" | ".join(row.cells()), flush=True)
            rows.append(row)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    print("one bilevel iteration (T = 3): " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    seconds = time.perf_counter() - started
    write("", {"seconds": round(seconds), "rows": [row.numbers() for row in rows], "shares": shares})
    if not torch.cuda.is_available():  # the page has one table: that of a machine without a GPU
        write_table(rows, shares, seconds)


def noise_rows() -> list[Row]:
    """Rows 1 and 2: one pass over memory."""
    noise.warm_up(torch.float32, device())
    made: dict[torch.dtype, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        noise.warm_up(dtype, device())
        weights, other = (torch.ones(ELEMENTS, dtype=dtype, device=device()) for _ in range(2))
        made[dtype] = interleaved(
            {
                "axpy": lambda w=weights, o=other: w.add_(o, alpha=1e-9),
                "noise": lambda w=weights: noise.write_sums([noise.Sum(w, w, [noise.Term(1, 1e-9)], rounding_key=2)]),
                "eager": lambda w=weights: eager(Piece(w, w, 0, [(1, 2, 1e-9)])),
                "torch.normal": lambda w=weights: w.add_(
                    torch.normal(0.0, 1.0, (ELEMENTS,), device=device()), alpha=1e-9
                ),
            },
            rounds=9,
        )
    whole, half = made[torch.float32], made[torch.bfloat16]
    axpy = "in-place axpy over the same memory"
    return [
        Row("noise pass, 33.5 M elements, float32", axpy, whole["noise"], whole["axpy"], 2.0),
        Row("the same in bfloat16, rounded stochastically", axpy, half["noise"], half["axpy"], 4.0),
        Row("the same in float32 without a compiler", axpy, whole["eager"], whole["axpy"]),
        Row("`torch.normal` and an add, float32", axpy, whole["torch.normal"], whole["axpy"]),
    ]


def zeroth_order_rows() -> list[Row]:
    """Rows 3, 4 and 12: a MeZO step."""
    model, tokenizer = load_model(MODEL)
    made = trainer(model, tokenizer, method="zo", adapter="none")
    many = trainer(model, tokenizer, method="zo", adapter="none", num_perturbations=QUERIES)
    backbone, batch = made.adapted.backbone, batches(made)["zo"][0]
    scorer = Scorer(made.adapted, Tokens())
    noise.warm_up(torch.float32, device())

    def loss() -> Tensor:
        return usual.option_loss(model, batch)

    check_mezo(backbone, loss, made)

    @torch.no_grad()
    def bare() -> None:
        usual.option_loss(model, batch, logits_to_keep=1)

    @torch.no_grad()
    def ours() -> None:
        scorer.loss(batch)

    step = step_of(made)
    one = interleaved(
        {
            "bare": times_(2, bare),
            "ours": times_(2, ours),
            "step": step,
            "usual": lambda: usual.mezo_step(backbone, loss, usual.gaussian(0), EPS, 1e-9),
            "axpy": axpy_over(backbone),
        },
        rounds=7,
    )
    least = one["ours"] + 3 * one["axpy"]  # z is needed at +ε, at -ε and in the update
    some = times_(QUERIES // 4, step)
    eight = interleaved({"before": some, "eight": step_of(many), "after": some})
    singles = 2 * (eight["before"] + eight["after"])
    way = "4 out-of-place Gaussian passes, 2 forwards with all logits"
    return [
        Row("two-sided ZO step, q = 1", "two forwards with `logits_to_keep=1`", one["step"], one["bare"], 1.15),
        Row("the same", "its own two forwards, whose head is read once", one["step"], one["ours"]),
        Row("the limit of this: these forwards and three in-place axpy over θ", "the same", least, one["ours"]),
        Row("MeZO step", way, one["usual"], one["step"], 3.0, True),
        Row("the limit of this: its two forwards alone", "the same", one["usual"], one["ours"], faster=True),
        Row("the same with three in-place axpy over θ", "the same", one["usual"], least, faster=True),
        Row("ZO step, q = 8", "8 steps with q = 1", eight["eight"], singles, 1.0),
    ]


def axpy_over(backbone: dict[str, Tensor]) -> Callable[[], None]:
    """One pass over θ that reads and writes it once, at the speed of memory."""
    other = {name: torch.zeros_like(p) for name, p in backbone.items()}

    @torch.no_grad()
    def run() -> None:
        for name, parameter in backbone.items():
            parameter.add_(other[name], alpha=1e-9)

    return run


def times_(number: int, function: Callable[[], object]) -> Callable[[], None]:
    """The same, several times."""

    def run() -> None:
        for _ in range(number):
            function()

    return run


def check_mezo(backbone: dict[str, Tensor], loss: Callable[[], Tensor], made: Any) -> None:
    """The usual way, with zofo's directions, finds zofo's projected gradient."""
    before = {name: p.detach().clone() for name, p in backbone.items()}
    z = direction(backbone, made.args.seed, 0)
    theirs = usual.mezo_step(backbone, loss, lambda: lambda name, p: z[name], EPS, 0.0)
    with torch.no_grad():
        for name, parameter in backbone.items():
            parameter.data = before[name]
    bundle = batches(made)
    made.method.step(0, 0.0, [bundle])
    (ours,) = made.method.optimizer.estimate.projected
    made.method.skip()
    agree("projected gradient of MeZO", ours, theirs)


def bilevel_rows() -> list[Row]:
    """Rows 5 and 6: the upper update and a lower step."""
    made = {}
    for estimator in ("two_sided", "one_sided"):
        model, tokenizer = load_model(MODEL)
        made[estimator] = trainer(model, tokenizer, method="bilevel", lower_steps=0, zo_estimator=estimator)
    two = made["two_sided"]
    adapted, bundle = two.adapted, batches(two)
    p, s = ([*adapted.adapter_parameters(name).values()] for name in (UPPER, LOWER))

    def loss(adapter: str, stream: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            adapted.use(adapter)
            return usual.option_loss(adapted.model, bundle[stream][0])

        return run

    upper_losses, lower_loss = (loss(UPPER, "upper"), loss(UPPER, "penalty")), loss(LOWER, "penalty")

    def stored(again: Callable[[], usual.Draw], *optimizers: torch.optim.Optimizer) -> float:
        return usual.stored_gradient_step(adapted.backbone, upper_losses, lower_loss, again, EPS, 1.0, optimizers)

    check_bilevel(two, stored)
    adam_p = torch.optim.Adam(p, lr=1e-9)
    adam_theta = torch.optim.Adam(list(adapted.backbone.values()), lr=1e-9)
    scorer, level = two.method.scorer, two.method.p

    def for_p() -> None:
        for stream in ("upper", "penalty"):
            level.gradient(bundle[stream], "the loss")
        level.clear()

    @torch.no_grad()
    def at_a_point() -> None:
        adapted.model.eval()
        scorer.losses([bundle[stream][0] for stream in ("upper", "penalty", "penalty")], [UPPER, UPPER, LOWER])

    @torch.no_grad()
    def of_s() -> None:
        adapted.model.eval()
        scorer.losses(bundle["penalty"], [LOWER])

    steps = {name: step_of(trainer_) for name, trainer_ in made.items()}
    times = interleaved(
        {
            **steps,
            "for p": for_p,
            "at a point": at_a_point,
            "of s": of_s,
            "stored gradient": lambda: stored(usual.gaussian(0), adam_p, adam_theta),
            "axpy": axpy_over(adapted.backbone),
        }
    )
    way = "2 forwards with backward, 6 forwards, 3 Gaussian passes, a stored gradient, Adam over θ"
    theirs = times["stored gradient"]
    # forwards and backwards for p; all three losses at two points, or at one and G(s) at θ
    bare = {2: times["for p"] + 2 * times["at a point"], 1: times["for p"] + times["at a point"] + times["of s"]}
    # each point away from θ needs z once, and the update once more
    least = {points: bare[points] + (points + 1) * times["axpy"] for points in (1, 2)}
    return [
        Row("upper update of `bilevel`, two-sided", way, theirs, times["two_sided"], 1.6, True),
        Row("the limit of this: its forwards and backwards alone", "the same", theirs, bare[2], faster=True),
        Row("the same with three in-place axpy over θ", "the same", theirs, least[2], faster=True),
        Row("upper update of `bilevel`, one-sided", way, theirs, times["one_sided"], 2.0, True),
        Row("the limit of this: its forwards and backwards alone", "the same", theirs, bare[1], faster=True),
        Row("the same with two in-place axpy over θ", "the same", theirs, least[1], faster=True),
        lower_row(two, s),
    ]


def check_bilevel(made: Any, stored: Callable[..., float]) -> None:
    """The stored-gradient way, with zofo's directions, finds zofo's gradients of θ and p."""
    backbone, p = made.adapted.backbone, made.adapted.adapter_parameters(UPPER)
    made.method.step(0, 0.0, [batches(made)])
    (ours,) = made.method.theta.optimizer.estimate.projected
    gradient = torch.cat([v.grad.flatten().clone() for v in p.values()])
    made.method.skip()
    before = {name: q.detach().clone() for name, q in backbone.items()}
    z = direction(backbone, made.args.seed, 0)
    theirs = stored(lambda: lambda name, q: z[name])
    agree("projected gradient of the bilevel objective", ours, theirs)
    other = torch.cat([v.grad.flatten() for v in p.values()])
    error = float((gradient - other).norm() / other.norm())
    print(f"gradient of p: relative difference {error:.1e}")
    assert error < 1e-4, "the two ways give different gradients of p"
    for name, q in backbone.items():
        agree_quietly = float((q.grad - theirs * z[name]).abs().max())
        assert agree_quietly == 0.0
        q.data, q.grad = before[name], None
    for v in p.values():
        v.grad = None


def agree(what: str, ours: float, theirs: float) -> None:
    """Says and checks that two ways give the same number up to rounding, which ε makes larger."""
    print(f"{what}: ours {ours:.5f}, the usual way {theirs:.5f}")
    assert abs(ours - theirs) < 20 * 2.0**-23 / EPS, f"{what}: the two ways give different numbers"


def lower_row(made: Any, parameters: list[Tensor]) -> Row:
    """A lower step against a bare loop on the same adapter."""
    adapted, batch = made.adapted, batches(made)["upper"][0]
    level: FirstOrderLevel = made.method.s
    bare_optimizer = torch.optim.AdamW(parameters, lr=1e-9)

    def ours() -> None:
        level.gradient([batch], "the loss")
        level.step()

    def bare() -> None:
        adapted.use(LOWER)
        usual.option_loss(adapted.model, batch, logits_to_keep=1).backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()

    times = interleaved({"ours": ours, "bare": bare}, rounds=9)
    return Row("lower step", "forward, backward and `torch.optim.AdamW` alone", times["ours"], times["bare"], 1.05)


def whole_run_rows() -> tuple[list[Row], dict[str, float]]:
    """Row 7: everything but forwards and backwards; and where the time of one bilevel iteration goes."""
    rows: list[Row] = []
    shares: dict[str, float] = {}
    for method, adapter in (("bilevel", "lora"), ("fo", "lora"), ("zo", "none")):
        parts, total = timed_run(method=method, adapter=adapter, lower_steps=3, max_steps=3)
        rows.append(
            Row(
                f"a whole run of `{method}`: loader, logging, callbacks",
                "the sum of its forwards and backwards, with the noise that they read",
                total,
                parts["forward"] + parts.get("backward", 0.0) + parts.get("noise", 0.0),
                1.10,
            )
        )
        if method == "bilevel":
            parts["trainer and rest"] = total - sum(parts.values())
            shares = {name: seconds / total for name, seconds in sorted(parts.items(), key=lambda item: -item[1])}
    return rows, shares


def scoring_rows() -> list[Row]:
    """Row 10: options of several tokens, on evaluation sets."""
    model, tokenizer = load_model(MODEL)
    made = trainer(model, tokenizer, method="none", adapter="none")
    kinds = ("a film that is", "a book of", "the weather in", "a football match of", "my old car and", "the price of")
    ends = ("history and art", "an old friend", "the far north", "last summer", "our own town", "several people")
    sentences = tuple(f" {a} {b}" for a, b in zip(kinds, ends, strict=True))
    names = (
        " a company", " a school or university", " an artist", " an athlete", " a holder of an office", " a vehicle",
        " a building", " a natural place", " a village", " an animal", " a plant", " a music album", " a film",
        " a written work",
    )  # fmt: skip
    letter = "to the editor of a small paper in the far north of this country, where winter is long and news is rare, "
    prompts = [
        f"Somebody wrote number {i} of many letters, {letter}{'and again ' * (i // PARTS % 4 + 6)}about"
        for i in range(4 * PARTS)
    ]
    return [
        *scored(made, tokenizer, prompts, sentences, "6 options of 6 or 7 tokens"),
        *scored(made, tokenizer, prompts[: 2 * PARTS], names, "14 options of 2 to 5 tokens"),
    ]


def scored(made: Any, tokenizer: Any, prompts: list[str], options: tuple[str, ...], what: str) -> list[Row]:
    """Ours against one candidate in a forward, which must give the same; and what ours would be with bare forwards."""
    examples, _ = tokenize([Record(p, options[0], options) for p in prompts], tokenizer, 512)
    found, alone, counted = dict[str, float](), dict[int, dict[str, float]](), Tokens()
    answers = sum(len(answer) - 1 for example in examples for answer in example.answers)  # the last is read by nobody
    needed = sum(len(example.prompt) for example in examples) + answers
    # a forward of as many rows and tokens, and logits where ours has them: of a row's last prompt token, and behind it
    shape = (len(examples), needed // len(examples))
    ids = torch.full(shape, tokenizer.eos_token_id, device=made.args.device)
    asked = torch.arange(-1 - answers // len(examples), 0, device=ids.device)
    parts = itertools.cycle(range(PARTS))  # whose prompts have the same lengths

    def ours() -> None:
        counted.forward_tokens = 0
        evaluator = Evaluator(
            Scorer(made.adapted, counted), tokenizer, ["accuracy"], "options", len(examples),
            place=lambda batch: made._prepare_inputs(batch),
        )  # fmt: skip
        found.update(evaluator.evaluate(examples))

    def one_by_one() -> None:
        part = next(parts)
        alone[part] = score_one_by_one(made.adapted.base, examples[part::PARTS])

    @torch.no_grad()
    def bare() -> None:
        made.adapted.base(input_ids=ids, logits_to_keep=asked, use_cache=False)

    times = interleaved({"ours": ours, "one by one": one_by_one, "bare": bare})
    assert counted.forward_tokens == needed, "other tokens were read than are needed"
    for key in ("accuracy", "loss"):
        value = statistics.mean(alone[part][key] for part in range(PARTS))
        assert abs(value - found[key]) < 1e-4, f"{key} differs: {found}, {alone}"
    way, theirs = "one forward per option, batch 1", times["one by one"] * PARTS
    return [
        Row(f"scoring {what} behind {len(examples)} prompts of about 50", way, theirs, times["ours"], 8.0, True),
        Row("the limit of this: a bare forward over its tokens", "the same", theirs, times["bare"], faster=True),
    ]


@torch.no_grad()
def score_one_by_one(model: PreTrainedModel, examples: Any) -> dict[str, float]:
    """Accuracy and loss, one candidate in one forward."""
    hits, loss = 0, 0.0
    for example in examples:
        scores = []
        for answer in example.answers:
            ids = torch.tensor([example.prompt + answer], device=model.device)
            predicted = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
            scores.append(predicted.gather(1, torch.tensor(answer, device=model.device)[:, None]).mean())
        hits += int(torch.stack(scores).argmax()) == example.gold
        loss -= float(torch.stack(scores).log_softmax(0)[example.gold])
    return {"accuracy": hits / len(examples), "loss": loss / len(examples)}


def process_rows() -> list[Row]:
    """Rows 8, 9 and 11: memory and start of whole processes."""
    folder = local_source(MODEL)
    runs = {
        "fo": (["fo", folder], 3),
        "bilevel": (["bilevel", folder], 3),
        "zo": (["zo", folder], 1),
        "q = 8": (["zo", folder, "num_perturbations=8"], 1),
        "inference": (["inference", folder], 1),
    }
    # where there is a backward, what malloc keeps between tensors differs from process to process: medians
    once = torch.cuda.is_available()  # the allocator for GPUs repeats itself
    made = {name: [child(*words) for _ in range(1 if once else times)] for name, (words, times) in runs.items()}
    peaks = {name: statistics.median(one["peak"] for one in several) for name, several in made.items()}
    largest = made["inference"][0]["largest"]
    print({name: f"{peak / 2**20:,.0f} MiB" for name, peak in peaks.items()})
    starts: dict[str, list[float]] = {"loading": [], "trainer": [], "first-step": []}
    for _ in range(5):
        for what, seconds in starts.items():
            seconds.append(child(what, folder)["seconds"])
    loading, plain, first = map(np.array, starts.values())
    return [
        Row("peak memory of `bilevel`", "`fo` with LoRA, same batch", peaks["bilevel"], peaks["fo"], 1.05),
        Row("peak memory of `zo`", "inference with the same batch + the largest parameter",
            peaks["zo"], peaks["inference"] + largest, 1.05),
        Row("peak memory of `zo`, q = 8", "q = 1", peaks["q = 8"], peaks["zo"], 1.01),
        Row("from the start of zofo to the first step", "`import torch, transformers, peft` and loading the model",
            first, loading, 1.2),
        Row("the limit of this: a plain `transformers.Trainer` until its first step", "the same", plain, loading),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
