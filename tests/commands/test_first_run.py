"""What a run shows of itself: its plan, what it goes on from, the answers to its test rows."""

import json
import re
import shutil

import pytest

from shell import QUICK, arguments, write_task
from tiny import save_tiny_model
from zofo.cli import _interrupted, main
from zofo.commands import train as commands
from zofo.tasks.metrics import score
from zofo.training.trainer import ZOFOTrainer

CHECKPOINTS = {**QUICK, "method": "bilevel", "penalty": 1.0, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("first")
    return {"model": save_tiny_model(root / "model"), "task": write_task(root / "task")}


def said(capsys, **keys):
    capsys.readouterr()
    assert main(arguments(**keys)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ({"max_steps": 10}, "checkpoints every 2 iterations in {run}, of which the last 3 stay"),
        ({"max_steps": 10, "save_total_limit": 1, "save_steps": 4},
         "checkpoints every 4 iterations in {run}, of which the last stays"),
        ({"save_steps": 500}, "checkpoints at the end in {run}"),
        ({"save_strategy": "epoch"}, "checkpoints after every epoch in {run}, of which the last 3 stay"),
        ({"save_strategy": "no"}, "no checkpoints (save_strategy: no)"),
    ],
)  # fmt: skip
def test_one_line_says_what_a_run_will_take(capsys, tmp_path, made, keys, end):
    lines = said(capsys, **made, **{**CHECKPOINTS, **keys}, output_dir=tmp_path / "run")
    (plan,) = [line for line in lines if line.startswith("bilevel: ")]
    steps = keys.get("max_steps", 2)
    words = rf"bilevel: {steps} iterations, about \d+ s without evaluations, [\d.,]+ [MG]iB at the peak; "
    assert re.fullmatch(words + re.escape(end.format(run=tmp_path / "run")), plan)
    assert lines.index(plan) < next(i for i, line in enumerate(lines) if line.startswith("zero-shot on"))


def test_a_line_says_where_backpropagation_stops(capsys, tmp_path, made):
    keys = {**made, **CHECKPOINTS, "save_strategy": "no", "output_dir": tmp_path}
    lines = said(capsys, **keys, adapter_layers="last 1", lora_r=2)
    assert "backpropagation runs through layer 1 alone; those below keep no activations" in lines
    assert json.loads((tmp_path / "upper" / "adapter_config.json").read_text())["r"] == 2
    again = said(capsys, **keys, overwrite_output_dir=True)
    assert not [line for line in again if line.startswith("backpropagation")]


def test_its_checkpoints_are_where_the_line_says(capsys, tmp_path, made):
    said(capsys, **made, **CHECKPOINTS | {"max_steps": 10}, output_dir=tmp_path)
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (6, 8, 10)}
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 6, 8, 10]


def test_a_run_that_goes_on_says_from_where_and_does_not_repeat_what_is_known(capsys, tmp_path, made, monkeypatch):
    keys = {**made, **CHECKPOINTS, "output_dir": tmp_path / "run", "max_steps": 10}
    first = said(capsys, **keys)
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    monkeypatch.setattr(ZOFOTrainer, "score_backbone", None)  # nobody asks for it
    again = said(capsys, **keys, resume_from_checkpoint="true")
    (plan,) = [line for line in again if line.startswith("bilevel: ")]
    assert plan.startswith(f"bilevel: goes on from {tmp_path}/run/checkpoint-8: 2 of 10 iterations left, about ")
    for start in ("zero-shot on", "upper on", "lower on"):
        assert [line for line in again if line.startswith(start)] == [line for line in first if line.startswith(start)]


def test_other_test_rows_are_scored_anew(capsys, tmp_path, made, monkeypatch):
    keys = {**made, **CHECKPOINTS, "output_dir": tmp_path / "run"}
    said(capsys, **keys)
    scored = []
    whole = ZOFOTrainer.score_backbone
    monkeypatch.setattr(ZOFOTrainer, "score_backbone", lambda *a: scored.append(1) or whole(*a))
    monkeypatch.setattr(commands, "digest", lambda rows, columns=False: "of other rows")
    said(capsys, **keys, resume_from_checkpoint="true")
    assert scored


@pytest.mark.parametrize("method", ["fo", "none"])
def test_the_answers_to_the_test_rows_are_in_the_folder(capsys, tmp_path, made, method):
    said(capsys, **made, **{**QUICK, "method": method}, output_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "results.json").read_text())["metrics"]["upper"]
    assert len({row["row"] for row in rows}) == len(rows) == results["rows"] == 10
    assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(results["accuracy"])
    assert score("accuracy", [r["prediction"] for r in rows], [r["right"] for r in rows]) == results["accuracy"]


def test_before_the_first_checkpoint_the_run_before_is_back(capsys, tmp_path, made, monkeypatch):
    keys = {**made, **CHECKPOINTS, "output_dir": tmp_path / "run"}
    said(capsys, **keys)
    before = (tmp_path / "run" / "results.json").read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.ZOFOTrainer, "train", stop)
    words = arguments(**{**keys, "seed": 3}, overwrite_output_dir="true")
    assert main(words) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "zofo: interrupted before the first checkpoint; nothing of this run is kept"
    assert lines[1].startswith("  start anew: zofo train --model ")
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "given",
    [
        ["--resume_from_checkpoint", "true"],
        ["--resume-from-checkpoint=true", "--overwrite_output_dir"],
        ["--overwrite_output_dir", "true"],
        [],
    ],
)
def test_the_commands_that_are_offered_say_each_key_once(given):
    lines = _interrupted(["train", *given, "--data", "my rows.csv"], "run/checkpoint-2 is whole").splitlines()
    assert lines == [
        "interrupted; run/checkpoint-2 is whole",
        "  go on:      zofo train --data 'my rows.csv' --resume_from_checkpoint true",
        "  start anew: zofo train --data 'my rows.csv' --overwrite_output_dir true",
    ]
