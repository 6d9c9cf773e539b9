"""`zofo eval --harness`: the same model, adapter and rows score alike in lm-evaluation-harness."""

import functools
import importlib.util
import json

import pytest
import yaml

from plain import write_config
from tiny import save_tiny_model
from zofo.cli import main
from zofo.commands import harness
from zofo.errors import ZofoError

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra harness is not installed"
)


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", "--model", "none", "--harness", "boolq"]) == 2
    assert "pip install lm_eval" in capsys.readouterr().err


def test_keys_of_our_own_tasks_do_not_go_with_it(capsys):
    assert main(["eval", "--model", "none", "--harness", "boolq", "--scoring", "pmi"]) == 2
    assert "--scoring is of zofo's own tasks" in capsys.readouterr().err


def test_a_task_or_the_harness_must_be_asked_for(capsys):
    assert main(["eval", "--model", "none"]) == 2
    assert "--harness" in capsys.readouterr().err


def test_a_task_says_whose_adapter_of_a_run_over_several(tmp_path, monkeypatch, capsys):
    for place in ("backbone", "tasks/one/upper", "tasks/two/upper"):
        (tmp_path / "run" / place).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("method: fo\ntask: [one, two]\n")
    (tmp_path / "run" / "results.json").write_text(json.dumps({"task": ["one", "two"]}))
    asked = []
    monkeypatch.setattr(harness, "evaluate_with_harness", lambda *given: asked.append(given[1]) or {})
    words = ["eval", "--run", str(tmp_path / "run"), "--harness", "boolq"]
    assert main(words) == 2
    assert "choose one with --task" in capsys.readouterr().err
    assert main([*words, "--task", "two"]) == 0
    assert asked == [str(tmp_path / "run" / "tasks" / "two" / "upper")]
    assert main(["eval", "--model", "none", "--harness", "boolq", "--task", "two"]) == 2
    assert "names one of several tasks of a --run" in capsys.readouterr().err


def test_a_task_file_that_is_no_yaml_is_refused_in_one_line(tmp_path):
    (tmp_path / "t.yaml").write_text("task: [\n")
    with pytest.raises(ZofoError, match=r"t\.yaml is no valid YAML"):
        harness._task(str(tmp_path / "t.yaml"), [])


def test_a_task_file_is_read_as_the_harness_reads_it(tmp_path):
    (tmp_path / "t.yaml").write_text("generation_kwargs: {do_sample: no}\n")
    assert harness._task(str(tmp_path / "t.yaml"), []) == {"generation_kwargs": {"do_sample": False}}


@pytest.fixture(scope="module")
def task_manager():
    """One for all tests: it reads every task of the harness."""
    tasks = importlib.import_module("lm_eval.tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


@needs_harness
@pytest.mark.usefixtures("task_manager")
def test_an_unknown_task_is_refused_before_the_model_is_loaded():
    with pytest.raises(ZofoError, match=r"no task 'rtee'.*lm_eval --tasks list"):
        harness.evaluate_with_harness("no such model", None, ["rtee"], harness.Manner(batch_size=2))


@needs_harness
@pytest.mark.usefixtures("task_manager")
@pytest.mark.filterwarnings("ignore")
def test_harness_and_own_task_agree_with_an_adapter(tmp_path, capsys):
    save_tiny_model(tmp_path / "model")
    rows = [{"text": f"the film was {'great' if i % 3 else 'bad'} {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({**row, "text": f"so {row['text']}"}) for row in rows))
    own = {
        "source": {"train": "train.jsonl", "test": "rows.jsonl"},
        "prompt": "{{ text }} it was",
        "answer": "{{ [' terrible', ' great'][label] }}",
        "options": [" terrible", " great"],
    }
    theirs = {
        "task": "rows", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": own["prompt"], "doc_to_target": "label",
        "doc_to_choice": ["terrible", "great"], "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    config = write_config(
        tmp_path, "run", task=None, data=str(tmp_path / "train.jsonl"), text="text", label="label", method="fo",
        adapter="lora", max_steps=3, learning_rate=0.05,
    )  # fmt: skip
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    model = ["eval", "--model", str(tmp_path / "run" / "backbone"), "--adapter", str(tmp_path / "run" / "upper")]
    capsys.readouterr()
    assert main([*model, "--task", str(tmp_path / "own.yaml"), "--scoring", "sum"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*model, "--harness", str(tmp_path / "theirs.yaml")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["harness"]["rows"]["acc,none"] == pytest.approx(found["tasks"]["own"]["accuracy"])
