"""A run with a reward through the real command: prompts alone, a function in a file, and what is left behind."""

import json

import pytest

from shell import QUICK, arguments, refused, write_task
from tiny import save_tiny_model
from zofo.cli import main

SCORE = """
def vowels(prompts, completions, label, **columns):
    assert len(prompts) == len(completions) == len(label)
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def few(prompts, completions):
    return [1.0]
"""
REWARD = {
    **QUICK, "method": "zo", "adapter": "none", "objective": "reward", "max_new_tokens": 4, "zo_eps": 0.05,
    "num_perturbations": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a task without answers and reward functions."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    write_task(folder, answer=None, options=None)
    (folder / "score.py").write_text(SCORE)
    return folder


def words(place, output, **keys):
    given = {**REWARD, "model": place / "model", "task": place / "task.yaml", "reward": f"{place / 'score.py'}:vowels"}
    return arguments("train", **{**given, "output_dir": output, **keys})


def test_a_run_on_prompts_alone(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "zero-shot on 10 test rows: reward " in said
    assert "upper: reward " in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["upper"].keys() == {"reward", "rows"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert sum(row["score"] for row in rows) / 10 == pytest.approx(results["metrics"]["upper"]["reward"])
    assert {tuple(row["right"]) for row in rows} == {()}
    (tmp_path / "rows.jsonl").write_text('{"text": "the film"}\n')
    assert main(arguments("predict", run=tmp_path / "run", data=tmp_path / "rows.jsonl")) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]


def test_its_stored_configuration_repeats_it_from_another_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    assert main(words(place, tmp_path / "one", reward="score.py:vowels")) == 0
    monkeypatch.chdir(tmp_path)
    config = ["train", "--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    assert main(config) == 0
    one, two = ((tmp_path / name / "backbone" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


BAD = {
    "no reward": ({"reward": None}, "objective is reward, but reward is not given: add reward: FILE.py:function"),
    "a reward of no file": ({"reward": "no.py:f"}, "reward is 'no.py:f', but there is no file no.py"),
    "a reward that is no function": ({"reward": "{place}/score.py:vowel"}, "no function there: did you mean vowels?"),
    "another method": ({"method": "fo"}, "objective is reward, but method fo backpropagates"),
    "answers that adapters need": (
        {"method": "bilevel", "adapter": "lora", "loss": "lm"},
        "task task: the key 'answer' is missing: add it",
    ),
    "a value too few, found by the steps that are tried": (
        {"reward": "{place}/score.py:few"},
        "score.py:few returned 1 values for 4 completions: return one for each",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(place, tmp_path, capsys, name):
    keys, message = BAD[name]
    keys = {key: value and value.format(place=place) for key, value in keys.items()}
    assert message in refused(capsys, words(place, tmp_path / "run", **keys), tmp_path)


def test_a_file_that_only_a_task_names_is_never_run(place, tmp_path, capsys):
    task = write_task(tmp_path / "task", reward="score.py:vowels")
    line = refused(capsys, words(place, tmp_path / "run", task=task), tmp_path)
    assert "task.yaml: unknown key 'reward'" in line
