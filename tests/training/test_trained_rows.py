"""No row that a model was trained on is called test: in a run, a copy, a merged folder, or with data that grew."""

import json
import shutil

import pytest

from shell import QUICK, arguments, failed, write_task
from tiny import save_tiny_model
from zofo.cli import main
from zofo.tasks.records import Record
from zofo.training.trained_rows import (
    FILE,
    digests,
    read_trained_rows,
    trained_rows_of,
    was_trained_on,
    write_trained_rows,
)

WORDS = ("film", "story", "phone", "evening", "song")
ROWS = [{"text": f"the {WORDS[n % 5]} number {n}", "label": n % 2} for n in range(60)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run with a seed of its own, and its merged folder."""
    folder = tmp_path_factory.mktemp("trained")
    keys = {
        **QUICK, "model": save_tiny_model(folder / "model"), "task": write_task(folder / "task", rows=ROWS),
        "output_dir": folder / "run", "data_seed": 7, "method": "bilevel", "penalty": 1.0, "max_steps": 1,
    }  # fmt: skip
    assert main(arguments(**keys)) == 0
    assert main(["merge", "--run", str(folder / "run"), "--output", str(folder / "merged")]) == 0
    return folder


def evaluated(capsys, model, task, *words):
    capsys.readouterr()
    assert main(["eval", "--model", str(model), "--task", str(task), *words]) == 0
    out, notes = capsys.readouterr()
    (scores,) = json.loads(out)["tasks"].values()
    return scores, notes


def test_every_part_of_a_run_and_a_merged_folder_say_the_same(home):
    said = {part: read_trained_rows(str(home / part)) for part in ("run/backbone", "run/upper", "run/lower", "merged")}
    assert len(set(said.values())) == 1
    assert len(said["merged"]) == 2 * 40  # 60 rows, 10 for dev and 10 for test; row and prompt of each
    assert (home / "merged" / FILE).stat().st_size < 2000


def test_a_run_evaluates_what_it_held_out_without_a_word(home, capsys):
    scores, notes = evaluated(capsys, home / "run" / "backbone", home / "task" / "task.yaml")
    assert scores["rows"] == 10
    assert notes == ""


@pytest.mark.parametrize("part", ["merged", "copy"])
def test_a_folder_that_is_of_no_run_leaves_out_what_it_was_trained_on(home, capsys, part, tmp_path):
    shutil.copytree(home / ("run/backbone" if part == "copy" else part), tmp_path / "elsewhere")
    scores, notes = evaluated(capsys, tmp_path / "elsewhere", home / "task" / "task.yaml", "--test_size", "40")
    assert 10 <= scores["rows"] < 40  # 20 of all rows were not trained on
    left_out = 40 - scores["rows"]
    assert notes == f"task: {left_out} of 40 rows were trained on, and are left out\n"


def test_data_that_grew_and_other_words_do_not_hide_a_row(home, capsys, tmp_path):
    more = [{"text": f"another {WORDS[n % 5]} of {n}", "label": n % 2} for n in range(30)]
    task = write_task(tmp_path / "task", rows=ROWS + more, prompt="of {{ text }}, they say it was")
    scores, _ = evaluated(capsys, home / "merged", task, "--test_size", "80", "--dev_size", "1")
    assert scores["rows"] == 80 - 40 + trained_among_the_others(home, task)


def trained_among_the_others(home, task):
    """How many of the trained rows the division of the grown data does not call test."""
    from zofo.tasks.splits import split_records
    from zofo.tasks.task import load_task

    known = read_trained_rows(str(home / "merged"))
    splits = split_records(load_task(str(task)).records(), train_size=None, dev_size=1, test_size=80, seed=42)
    return sum(was_trained_on(row, known) for row in [*splits.train, *splits.dev])


def test_the_split_train_is_exactly_what_was_trained_on(home, capsys):
    scores, notes = evaluated(capsys, home / "merged", home / "task" / "task.yaml", "--split", "train")
    assert scores["rows"] == 40
    assert notes == "task: 40 rows that this model was trained on\n"


def test_a_model_that_says_nothing_is_said_to(home, capsys):
    _, notes = evaluated(capsys, home / "model", home / "task" / "task.yaml")
    assert "says nothing of the rows that it was trained on" in notes


def test_no_row_that_is_left_is_an_error(home, capsys, tmp_path):
    known = read_trained_rows(str(home / "merged"))
    rows = [row for row in ROWS if was_trained_on(Record(f"{row['text']} It was", " bad"), known)]
    assert len(rows) == 40
    task = write_task(tmp_path / "task", rows=rows)
    line = failed(capsys, arguments("eval", model=home / "merged", task=task))
    assert line == "this model was trained on all rows of test of task task: give other rows"
    other = write_task(tmp_path / "other", rows=[{"text": f"so {n}", "label": n % 2} for n in range(20)])
    line = failed(capsys, arguments("eval", model=home / "merged", task=other, split="train"))
    assert line == "this model was trained on no row of task task: leave out --split train"


def test_a_run_on_the_backbone_of_another_remembers_both(home, tmp_path):
    more = [{"text": f"another {WORDS[n % 5]} of {n}", "label": n % 2} for n in range(30)]
    keys = {
        **QUICK, "model": home / "run" / "backbone", "task": write_task(tmp_path / "task", rows=more),
        "output_dir": tmp_path / "run", "max_steps": 1,
    }  # fmt: skip
    assert main(arguments(**keys)) == 0
    before, after = (read_trained_rows(str(folder / "run" / "upper")) for folder in (home, tmp_path))
    assert before < after
    assert len(after - before) == 2 * 10


def test_a_run_on_a_trained_model_does_not_test_it_on_rows_that_it_knows(home, tmp_path, capsys):
    """With another division of the same rows; with that of the first run, none is left out."""
    keys = {
        **QUICK, "model": home / "merged", "task": home / "task" / "task.yaml", "max_steps": 1, "dev_size": 10,
        "test_size": 30,
    }  # fmt: skip
    assert main(arguments(**{**keys, "output_dir": tmp_path / "other", "data_seed": 8})) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    seen = [json.loads(line)["row"] for line in (tmp_path / "other" / "predictions.jsonl").read_text().splitlines()]
    left_out = 30 - len(seen)
    assert left_out > 0
    assert f"task: this model was trained on {left_out} rows of test before: they are left out" in said
    assert results["metrics"]["upper"]["rows"] == len(seen)
    assert main(arguments(**{**keys, "output_dir": tmp_path / "same", "data_seed": 7, "test_size": 10})) == 0
    assert "left out" not in capsys.readouterr().out


def test_digests_survive_a_file_and_a_damaged_one_is_refused(tmp_path, capsys):
    known = digests([Record("a", " b"), Record("c", " d", row={"text": "c", "half": "\ud800"})])
    write_trained_rows(tmp_path, known)
    assert trained_rows_of(str(tmp_path), None) == known
    assert len(known) == 3
    assert trained_rows_of("nowhere/at-all", str(tmp_path / "nothing")) is None
    (tmp_path / FILE).write_text("{}")
    from zofo import ZofoError

    with pytest.raises(ZofoError, match=r"trained_rows\.json is damaged"):
        read_trained_rows(str(tmp_path))
