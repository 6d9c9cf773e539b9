"""The curves of a run as a PNG, if matplotlib is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PANELS = (
    ("loss", ("loss", "lower_loss", "eval_loss", "eval_lower_loss")),
    ("reward", ("reward", "eval_reward", "eval_lower_reward")),
    ("projected gradient (rms)", ("projected_grad",)),
    ("zeroth-order learning rate", ("zo_learning_rate",)),
    ("signal to noise (1: noise alone)", ("signal_to_noise",)),
    ("penalty gap G(θ,p) - G(θ,s)", ("penalty_gap",)),
)
_COLUMNS = 5
_LABELS = {
    "loss": "training loss (deployed)",
    "lower_loss": "training loss (lower adapter)",
    "eval_loss": "dev loss (deployed)",
    "eval_lower_loss": "dev loss (lower adapter)",
    "reward": "training (mean of the members)",
    "eval_reward": "dev (deployed)",
    "eval_lower_reward": "dev (lower adapter)",
}


def _label(key: str, panel: str) -> str:
    """Of a curve in its panel; those of single tasks are named as those of their mean."""
    if key.startswith("eval_"):
        key = "eval_lower_loss" if key.endswith("_lower_loss") else "eval_loss"
    return _LABELS.get(key, panel)


def plot_curves(history: list[dict[str, Any]], title: str, file: Path, tasks: Sequence[str] = ()) -> bool:
    """Draws the losses, projected gradient and penalty gap of a log history; False if it has none, or no matplotlib.

    Of several `tasks`, it draws the dev losses of each as well.
    """
    logged = {key for log in history for key in log}
    own = [(f"dev loss, {task}", (f"eval_{task}_loss", f"eval_{task}_lower_loss")) for task in tasks]
    named = (*_PANELS, *own)
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
        if len(keys) > 1:
            axes.legend()
    figure.savefig(file, dpi=120)
    return True
