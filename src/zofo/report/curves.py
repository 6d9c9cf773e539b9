"""The curves of a run as a PNG, if matplotlib is installed."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOSSES = ("loss", "lower_loss", "upper_loss", "eval_loss", "eval_lower_loss")
_LEVELS = {"lower_loss": "training loss (lower steps)", "upper_loss": "training loss (upper rows, near θ)"}
_OTHERS = (
    ("projected gradient (rms)", ("projected_grad",)),
    ("zeroth-order learning rate", ("zo_learning_rate",)),
    ("signal to noise (1: noise alone)", ("signal_to_noise",)),
    ("penalty gap G(θ,p) - G(θ,s)", ("penalty_gap",)),
)
_COLUMNS = 5


def plot_curves(
    history: list[dict[str, Any]], title: str, file: Path, tasks: Sequence[str] = (), objective: str = "loss"
) -> bool:
    """Draws the losses, projected gradient and penalty gap of a log history; False if it has none, or no matplotlib.

    Of several `tasks`, it draws the dev losses of each as well. A reward, and an `objective` other than the loss, have
    a panel of their own.
    """
    values = sorted({objective, "reward"} - {"loss"})
    valued = [(name, (name, f"eval_{name}", f"eval_lower_{name}")) for name in values]
    logged = {key for log in history for key in log}
    if _mirrors(history, objective):
        logged.discard("loss")
    own = [(f"dev loss, {task}", (f"eval_{task}_loss", f"eval_{task}_lower_loss")) for task in tasks]
    named = (("loss", _LOSSES), *valued, *_OTHERS, *own)
    panels = [(name, [key for key in keys if key in logged]) for name, keys in named if logged & set(keys)]
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (name, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key in keys:
            points = [(log["step"], log[key]) for log in history if key in log]
            axes.plot(*zip(*points, strict=True), marker=".", label=_label(key, name))
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        if len(keys) > 1 or keys[0].startswith("eval_"):
            axes.legend()
    figure.savefig(file, dpi=120)
    return True


def _mirrors(history: list[dict[str, Any]], objective: str) -> bool:
    """Whether the training loss is the objective with the other sign, as where nothing else is trained on."""
    both = [(log["loss"], -log[objective]) for log in history if objective in log and "loss" in log]
    return objective != "loss" and bool(both) and all(math.isclose(*pair, abs_tol=1e-3) for pair in both)


def _label(key: str, panel: str) -> str:
    """Of a curve in its panel; those of single tasks are named as those of their mean."""
    if key in _LEVELS:
        return _LEVELS[key]
    rows = "dev" if key.startswith("eval_") else "training"
    lower = "lower_" in key
    what = "loss" if key.endswith("loss") else panel
    if rows == "training" and what != "loss":
        return f"training {what} (mean of the members)"
    return f"{rows} {what} ({'lower adapter' if lower else 'deployed'})"
