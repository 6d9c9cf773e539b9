"""Ctrl-C: the step ends, a checkpoint is written, and the run goes on from there as if nothing had happened."""

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from plain import make_rows, make_trainer, weights
from zofo.training.checkpoint import last_sealed


class Press(TrainerCallback):
    """Presses Ctrl-C at the beginning of a step, or in its evaluation."""

    def __init__(self, step, times=1, moment="on_step_begin"):
        def press(args, state, control, **kwargs):
            if state.global_step == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        vars(self)[moment] = press


def run(tmp_path, press=None, **keys):
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "no", **keys}
    trainer = make_trainer(tmp_path, method="bilevel", zo_learning_rate=1e-3, **keys)
    if press:
        trainer.add_callback(press)
    return trainer


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_step_ends_with_a_checkpoint_and_the_run_goes_on_bitwise(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    whole.train()
    stopped = run(tmp_path / "stopped", Press(2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert "ends after this step or evaluation, with a checkpoint" in capsys.readouterr().err
    assert last_sealed(tmp_path / "stopped").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = run(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    for part in ("backbone", "upper", "lower"):
        one, other = weights(whole.adapted, part), weights(resumed.adapted, part)
        assert all(one[name].equal(other[name]) for name in one)


def test_the_second_one_does_not_wait(tmp_path):
    stopped = run(tmp_path, Press(2, times=2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_evaluation_ends_first_as_it_belongs_to_the_state(tmp_path):
    stopped = run(tmp_path, Press(2, moment="on_evaluate"), eval_rows=make_rows(4, first=50), eval_strategy="steps",
                  eval_steps=2)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert last_sealed(tmp_path).name in ("checkpoint-2", "checkpoint-3")
    assert any("eval_loss" in entry for entry in stopped.state.log_history)


@pytest.mark.parametrize("moment", ["on_step_begin", "on_evaluate"])
def test_a_run_that_saves_its_best_steps_alone_saves_the_last_one_as_well(tmp_path, moment):
    keys = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    stopped = run(tmp_path, Press(3, moment=moment), eval_rows=make_rows(4, first=50), **keys)
    losses = iter([0.5, 0.6, 0.7, 0.8, 0.9])
    stopped.scored = lambda rows: {"upper": ({"loss": next(losses)}, [])}
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert {"checkpoint-1", f"checkpoint-{4 if moment == 'on_step_begin' else 3}"} <= {
        place.name for place in tmp_path.glob("checkpoint-*")
    }


def test_a_run_without_checkpoints_ends_at_once(tmp_path):
    stopped = run(tmp_path, Press(2), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 2


def test_handlers_of_others_and_other_threads_are_left_alone(tmp_path):
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    trainer = run(tmp_path / "one", Press(2))
    trainer.train()
    assert seen == [1]
    assert trainer.state.global_step == 6
    thread = threading.Thread(target=run(tmp_path / "two").train)
    thread.start()
    thread.join()
    assert last_sealed(tmp_path / "two").name == "checkpoint-6"
