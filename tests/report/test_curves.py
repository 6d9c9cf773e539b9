"""The curves of a run: which panels there are, and what their curves are called."""

import matplotlib.figure
import pytest

from zofo.report.curves import plot_curves


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives by panel the curves with their values."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(history, **keys):
        assert plot_curves(history, "a run", tmp_path / "curves.png", **keys)
        lines = {axes.get_ylabel(): axes.get_lines() for axes in figures.pop().axes}
        return {panel: {line.get_label(): list(line.get_ydata()) for line in found} for panel, found in lines.items()}

    return draw


def test_an_objective_has_its_own_panel_and_its_negative_is_no_loss(drawn):
    history = [
        {"step": 1, "loss": -0.25, "reward": 0.25},
        {"step": 1, "eval_loss": 7.5, "eval_reward": 0.5},
        {"step": 2, "loss": -0.75, "reward": 0.75},
    ]
    assert drawn(history, objective="reward") == {
        "loss": {"dev loss (deployed)": [7.5]},
        "reward": {"training reward (mean of the members)": [0.25, 0.75], "dev reward (deployed)": [0.5]},
    }


def test_the_loss_of_an_adapter_stays_beside_the_objective(drawn):
    history = [
        {"step": 1, "loss": 3.0, "accuracy": 0.25},
        {"step": 1, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_lower_accuracy": 0.75},
    ]
    assert drawn(history, objective="accuracy") == {
        "loss": {"training loss (deployed)": [3.0], "dev loss (deployed)": [2.0]},
        "accuracy": {
            "training accuracy (mean of the members)": [0.25],
            "dev accuracy (deployed)": [0.5],
            "dev accuracy (lower adapter)": [0.75],
        },
    }


def test_a_reward_that_is_only_measured_and_the_losses_of_tasks_are_drawn(drawn):
    history = [
        {"step": 1, "loss": 1.0, "lower_loss": 0.5, "upper_loss": 0.75},
        {"step": 1, "eval_loss": 2.0, "eval_reward": 0.5, "eval_a_loss": 1.5, "eval_a_lower_loss": 1.25},
    ]
    assert drawn(history, tasks=["a"]) == {
        "loss": {
            "training loss (deployed)": [1.0],
            "training loss (lower steps)": [0.5],
            "training loss (upper rows, near θ)": [0.75],
            "dev loss (deployed)": [2.0],
        },
        "reward": {"dev reward (deployed)": [0.5]},
        "dev loss, a": {"dev loss (deployed)": [1.5], "dev loss (lower adapter)": [1.25]},
    }
