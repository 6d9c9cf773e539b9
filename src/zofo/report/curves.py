"""The curves of a run as a PNG, if matplotlib is installed."""

import importlib.util
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
_LABELS = {
    "loss": "training loss (deployed)",
    "lower_loss": "training loss (lower adapter)",
    "eval_loss": "dev loss (deployed)",
    "eval_lower_loss": "dev loss (lower adapter)",
    "reward": "training (mean of the members)",
    "eval_reward": "dev (deployed)",
    "eval_lower_reward": "dev (lower adapter)",
}


def plot_curves(history: list[dict[str, Any]], title: str, file: Path) -> bool:
    """Draws the losses, projected gradient and penalty gap of a log history; False if it has none, or no matplotlib."""
    logged = {key for log in history for key in log}
    panels = [(name, [key for key in keys if key in logged]) for name, keys in _PANELS if logged & set(keys)]
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (name, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for key in keys:
            points = [(log["step"], log[key]) for log in history if key in log]
            axes.plot(*zip(*points, strict=True), marker=".", label=_LABELS.get(key, name))
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
    figure.savefig(file, dpi=120)
    return True
