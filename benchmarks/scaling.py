"""`python benchmarks/scaling.py`: what a step costs as model, text, batch, queries and threads grow.

Llamas of random weights with SmolLM2's vocabulary, float32 on a CPU and bfloat16 on a GPU. Each point is a two-sided
MeZO step and, for the size of the model, a step of LoRA by backpropagation, beside the bare forwards; for one size
also an iteration of published Bilevel ZOFO, with T = 1 and 10. On a GPU every point has one (T = 1), the usual way of
MeZO, and the peaks of memory. Writes
`benchmarks/results/scaling-<machine>.json` and, on a CPU, draws docs/scaling.png.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import usual
from timing import MODEL, TOKENS, batches, device, interleaved, step_of, trainer, write
from zofo import ZOFOTrainer
from zofo.models.load import load_model
from zofo.scoring.scorer import Scorer, Tokens
from zofo.training.peak import peak_memory, reset_peak_memory

SIZES = {
    "15 M": (192, 12, 3),
    "60 M": (512, 12, 8),
    "135 M": (576, 30, 9),
    "360 M": (960, 32, 15),
    "1.0 B": (1792, 24, 28),
}
GPU_SIZES = {"135 M": SIZES["135 M"], "1.3 B": (2048, 22, 32), "7 B": (4096, 32, 32)}  # hidden size, layers, heads
ALL = ("zo", "fo", "bilevel")
LOWER_STEPS = "lower steps"  # for the page's text: not drawn
GPU = torch.cuda.is_available()


def main() -> None:
    """Measures every series, prints, writes and draws."""
    _, tokenizer = load_model(MODEL)
    small = SIZES["135 M"]
    points: list[dict[str, Any]] = []
    if GPU:
        for name, size in GPU_SIZES.items():
            for tokens in (TOKENS, 512):
                points.append(point(f"parameters, 8 x {tokens} tokens", name, size, tokenizer, ALL, tokens=tokens))
        return write("scaling", {"points": points})
    for name, size in SIZES.items():
        points.append(point("parameters", name, size, tokenizer, ("zo", "fo")))
    for tokens in (16, 48, 128, 256):
        points.append(point("tokens", tokens, small, tokenizer, tokens=tokens))
    for batch in (1, 4, 8, 16, 32):
        points.append(point("batch", batch, small, tokenizer, per_device_train_batch_size=batch))
    for queries in (1, 2, 4, 8):
        points.append(point("queries", queries, small, tokenizer, num_perturbations=queries))
    for steps in (1, 10):
        points.append(point(LOWER_STEPS, steps, small, tokenizer, ALL, lower_steps=steps))
    threads = torch.get_num_threads()
    for count in range(1, threads + 1):
        torch.set_num_threads(count)
        points.append(point("threads", count, small, tokenizer))
    torch.set_num_threads(threads)
    write("scaling", {"points": points})
    draw(points)
    return None


def point(
    series: str,
    x: Any,
    size: tuple[int, int, int],
    tokenizer: PreTrainedTokenizerBase,
    methods: tuple[str, ...] = ("zo",),
    **keys: Any,
) -> dict[str, Any]:
    """One point of a curve: seconds, and on a GPU peaks of memory."""
    found: dict[str, Any] = {"series": series, "x": x}
    for method in methods:
        gc.collect()  # the models before
        model = llama(size, len(tokenizer))
        own = {"adapter": "none"} if method == "zo" else {"adapter": "lora", "lower_steps": 1}
        dtype = "bfloat16" if GPU else "float32"
        made = trainer(model, tokenizer, method=method, dtype=dtype, **{**own, **keys})
        candidates: dict[str, Callable[[], object]] = {method: step_of(made)}
        if method == "zo":
            found["parameters"] = sum(p.numel() for p in model.parameters())
            found["largest"] = max(p.nbytes for p in model.parameters())
            candidates |= beside(made, model)
        if GPU:  # on a CPU, the process also holds what malloc kept of the points before
            found |= {f"{name}, peak": peak_of(candidate) for name, candidate in candidates.items()}
        times = interleaved(candidates, rounds=5 if found["parameters"] < 2e8 or GPU else 3)
        found |= {name: float(np.median(seconds)) for name, seconds in times.items()}
        if method == "zo":
            found["ratio"] = float(
                np.median(times["zo"] / times["forwards"])
            )  # within rounds, as the machine is shared
        del made, model, candidates
    print(
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
    )
    return found


def beside(made: ZOFOTrainer, model: LlamaForCausalLM) -> dict[str, Callable[[], object]]:
    """What a MeZO step is compared with: its bare forwards, and on a GPU the usual way."""
    batch, scorer = batches(made)["zo"][0], Scorer(made.adapted, Tokens())

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2 * made.args.num_perturbations):
            scorer.loss(batch)

    def usual_way() -> None:
        usual.mezo_step(made.adapted.backbone, lambda: usual.option_loss(model, batch), usual.gaussian(0), 1e-3, 1e-9)

    return {"forwards": forwards, **({"usual": usual_way} if GPU else {})}


def peak_of(candidate: Callable[[], object]) -> int:
    """Bytes of the GPU's memory while it runs, after it has run once."""
    candidate()
    here = torch.device(device())
    reset_peak_memory(here)
    candidate()
    return peak_memory(here)


def llama(size: tuple[int, int, int], vocabulary: int) -> LlamaForCausalLM:
    """A Llama of random weights."""
    hidden, layers, heads = size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    with torch.device(device()):
        model = LlamaForCausalLM(config).eval()
    return model.to(torch.bfloat16) if GPU else model


def draw(points: list[dict[str, Any]]) -> None:
    """One panel for each series: seconds above, the share beyond the bare forwards below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    series = list(dict.fromkeys(p["series"] for p in points if p["series"] != LOWER_STEPS))
    figure = Figure(figsize=(3.4 * len(series), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(series), squeeze=False)
    for (upper, lower), name in zip(axes.T, series, strict=True):
        own = [p for p in points if p["series"] == name]
        xs = [p["parameters"] / 1e6 if name == "parameters" else p["x"] for p in own]
        for key, label in (
            ("zo", "MeZO step"),
            ("forwards", "its bare forwards"),
            ("fo", "LoRA step (first order)"),
        ):
            known = [(x, p[key]) for x, p in zip(xs, own, strict=True) if key in p]
            if known:
                upper.plot(*zip(*known, strict=True), "o-", label=label)
        upper.set(xscale="log", yscale="log")
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_minor_formatter(NullFormatter())
        upper.grid(alpha=0.3, which="both")
        lower.plot(xs, [p["ratio"] for p in own], "o-")
        lower.set(xscale="log", xlabel=f"{name}{', millions' if name == 'parameters' else ''}", ylim=(1, None))
        lower.grid(alpha=0.3)
        for panel in (upper, lower):
            panel.set_xticks(xs, [f"{x:.0f}" for x in xs])
            panel.xaxis.set_minor_locator(NullLocator())
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("MeZO step / its bare forwards")
    axes[0][0].legend()
    figure.savefig("docs/scaling.png", dpi=100)


if __name__ == "__main__":
    main()
