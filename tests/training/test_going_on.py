"""A run that goes on follows the keys it is given now: how often it evaluates, when it stops, what counts as best."""

import json
import shutil
from pathlib import Path

import pytest

from plain import make_rows, make_trainer
from zofo.errors import ZofoError
from zofo.training import checkpoint

BEST = {"eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "load_best_model_at_end": True}


def run(folder, **keys):
    """A run whose loss is never better than at its first evaluation."""
    given = {"method": "fo", "learning_rate": 1e-30, "max_steps": 3, **BEST, **keys}
    return make_trainer(folder, eval_rows=make_rows(4), **given)


def test_patience_may_be_new_to_it(tmp_path):
    run(tmp_path).train()
    again = run(tmp_path, max_steps=12, early_stopping_patience=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_the_callbacks_of_a_checkpoint_may_be_restored(tmp_path):
    keys = {"early_stopping_patience": 4, "restore_callback_states_from_checkpoint": True}
    run(tmp_path, **keys).train()
    again = run(tmp_path, max_steps=12, **keys)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_intervals_are_those_of_now(tmp_path):
    run(tmp_path).train()
    again = run(tmp_path, max_steps=9, eval_steps=3, save_steps=3, logging_steps=2)
    again.train(resume_from_checkpoint=True)
    log = again.state.log_history
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2, 3, 6, 9]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 6, 8]
    assert {file.name for file in tmp_path.glob("checkpoint-*")} >= {"checkpoint-6", "checkpoint-9"}
    assert not (tmp_path / "checkpoint-7").exists()


def test_an_evaluation_at_its_start_is_no_evaluation_without_progress(tmp_path):
    keys = {"eval_on_start": True, "early_stopping_patience": 2}
    whole, part = run(tmp_path / "whole", **keys, max_steps=9), run(tmp_path / "part", **keys, max_steps=1)
    whole.train()
    part.train()
    again = run(tmp_path / "part", **keys, max_steps=9)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 3


def test_evaluations_by_another_metric_are_not_compared_with_its_best_one(tmp_path):
    run(tmp_path, metric_for_best_model="accuracy").train()
    assert run(tmp_path, metric_for_best_model="eval_accuracy").train(resume_from_checkpoint=True).global_step == 3
    other = run(tmp_path, max_steps=6, metric_for_best_model="loss")
    with pytest.raises(ZofoError, match="written with metric_for_best_model = accuracy, but now it is loss, so its"):
        other.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_of_a_run_that_was_moved_is_found(tmp_path):
    keys = {"save_strategy": "best", "save_steps": 500, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    first = run(tmp_path / "old", **keys, max_steps=1)
    first.train()
    best = first.state.best_model_checkpoint
    shutil.move(tmp_path / "old", tmp_path / "new")
    again = run(tmp_path / "new", **{**keys, "learning_rate": 1e-2}, max_steps=2, greater_is_better=False)
    again.train(resume_from_checkpoint=True)
    assert Path(best).name == "checkpoint-1"
    assert Path(again.state.best_model_checkpoint).parent == tmp_path / "new"


def test_the_first_task_is_in_use_after_a_run_that_was_finished(tmp_path):
    tasks = {"a": make_rows(12), "b": make_rows(12, first=20)}
    keys = {"method": "fo", "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tasks, **keys)
    trainer.train()
    seals = [json.loads((folder / "seal.json").read_text()) for folder in tmp_path.glob("checkpoint-*")]
    assert len(seals) == 3
    for last in sorted(tmp_path.glob("checkpoint-*")):
        again = make_trainer(tmp_path, tasks, **{**keys, "max_steps": int(last.name[-1])})
        again.train(resume_from_checkpoint=str(last))
        assert again._joint.bank.current == "a"


def test_a_seal_that_cannot_be_renewed_stays(tmp_path, monkeypatch):
    """What was learned is sealed before its scores and its card are written."""
    (tmp_path / "weights").write_text("learned")
    checkpoint.seal(tmp_path, {})
    (tmp_path / "results.json").write_text("{}")

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.seal(tmp_path, {})
    assert checkpoint.sealed_files(tmp_path) == {"weights": 7}
    checkpoint.seal(tmp_path, {})
    assert checkpoint.sealed_files(tmp_path) == {"weights": 7, "results.json": 2}
