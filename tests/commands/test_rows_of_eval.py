"""Which rows `zofo eval` scores, what it refuses before it loads a model, and how it writes what it has found."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shell import QUICK, arguments, failed, write_task
from tiny import save_tiny_model
from zofo.cli import main
from zofo.commands.results import write_new


def rows(first, last):
    return [{"text": f"film {i} was {'great' if i % 2 else 'terrible'}", "label": i % 2} for i in range(first, last)]


def write_rows(file, first, last):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(first, last)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("eval") / "model")


def scored(capsys, *words):
    """The scores of the only task, and what was said beside them."""
    capsys.readouterr()
    assert main(["eval", *map(str, words)]) == 0
    said = capsys.readouterr()
    (found,) = json.loads(said.out)["tasks"].values()
    return found, said.err


def test_a_folder_with_splits_as_source_is_tested_on_its_test_rows(capsys, tmp_path, model):
    for folder in ("data", "other"):
        write_rows(tmp_path / folder / "train.jsonl", 0, 20)
        write_rows(tmp_path / folder / "test.jsonl", 20, 26)
    task = write_task(tmp_path, rows=None, source="data")
    whole = write_rows(tmp_path / "whole.jsonl", 0, 15)
    for source, count in ((tmp_path / "data", 6), (tmp_path / "other", 6), (whole, 15)):
        assert scored(capsys, "--model", model, "--task", task, "--source", source)[0]["rows"] == count


def test_training_rows_are_known_by_every_template_and_beside_other_columns(capsys, tmp_path, model):
    keys = {**QUICK, "model": model, "text": "text", "label": "label", "method": "zo", "adapter": "none"}
    table = tmp_path / "r.csv"
    table.write_text("text,label\n" + "".join(f"film number {i},{('bad', 'good')[i % 2]}\n" for i in range(40)))
    more = tmp_path / "more.csv"
    lines = table.read_text().splitlines()
    more.write_text("\n".join(f"{line},{i if i else 'id'}" for i, line in enumerate(lines)) + "\n")
    given = arguments(**keys, data=table, template=1, output_dir=tmp_path / "run")
    assert main(given) == 0
    for data in (table, more):
        found, said = scored(capsys, "--run", tmp_path / "run", "--data", data)
        assert found["rows"] < 40
        assert "of 40 rows were trained on, and are left out" in said
        columns = ["--text", "text", "--label", "label"]
        assert scored(capsys, "--run", tmp_path / "run", "--data", data, *columns)[0] == found
    other = ["eval", "--run", str(tmp_path / "run"), "--data", str(more), "--text", "text", "--label", "id"]
    line = failed(capsys, other)
    assert "label is 'id', but the task of the run" in line
    assert "reads the column 'label': name it so" in line
    assert f"--model {tmp_path / 'run' / 'backbone'} in place of --run" in line
    model = tmp_path / "run" / "backbone"
    assert scored(capsys, "--model", model, "--data", more, "--text", "id", "--label", "label")[0]["rows"] == 40


def test_an_adapter_beside_a_merged_model_is_not_passed_over_without_a_word(capsys, tmp_path, model):
    task = write_task(tmp_path / "task", rows(0, 20))
    shutil.copytree(model, tmp_path / "merged")
    assert "adapter" not in scored(capsys, "--model", tmp_path / "merged", "--task", task)[1]
    (tmp_path / "merged" / "upper").mkdir()
    (tmp_path / "merged" / "upper" / "adapter_config.json").write_text("{}")
    said = scored(capsys, "--model", tmp_path / "merged", "--task", task)[1]
    assert f"counts without the adapter beside it: with it, add --adapter {tmp_path / 'merged' / 'upper'}" in said


def test_a_run_may_lie_in_a_folder_called_tasks(capsys, tmp_path, model):
    task = write_task(tmp_path / "task", rows(0, 40))
    for home in ("plain", "tasks"):
        keys = {**QUICK, "model": model, "task": task, "max_length": 20, "test_size": 4}
        assert main(arguments(**keys, output_dir=tmp_path / home / "one")) == 0
    found = [scored(capsys, "--run", tmp_path / home / "one")[0] for home in ("plain", "tasks")]
    assert found[0] == found[1]
    assert found[0]["rows"] == 4


def test_scores_that_are_nan_are_no_answers(capsys, tmp_path, model):
    task = write_task(tmp_path / "task", rows(0, 20))
    broken = save_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {n: torch.full_like(w, math.nan) for n, w in weights.items()}, broken / "model.safetensors", {"format": "pt"}
    )
    line = failed(capsys, ["eval", "--model", str(broken), "--task", str(task)])
    assert "nan" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "30"], "30 examples are wanted in context, but there are"),
        (["--scoring", "channel", "--chat_template", "true"], "chat begins with the prompt: leave one of them out"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(capsys, tmp_path, monkeypatch, model, words, message):
    task = write_task(tmp_path / "task", rows(0, 20))
    monkeypatch.setattr("zofo.commands.eval.Loaded.of", lambda *args: pytest.fail("the model was loaded"))
    given = ["eval", "--model", str(model), "--task", str(task), *words]
    assert message in failed(capsys, given)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_new(tmp_path / "a.json", b"whole")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a.json", b"other")
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *args: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        write_new(tmp_path / "b.json", b"whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"whole"
