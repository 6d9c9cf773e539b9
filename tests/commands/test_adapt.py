"""`zofo adapt`: a new task from a few examples, on the backbone of a run or on any other."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM

from plain import write_config, write_task
from zofo.cli import main
from zofo.commands.stored import StoredRun
from zofo.compare.statistics import over_draws
from zofo.errors import ZofoError
from zofo.tasks.task import load_task
from zofo.training.trained_rows import trained_rows_of, was_trained_on
from zofo.training.trainer import ZOFOTrainer

QUIET = ["--use_cpu", "true", "--disable_tqdm", "true"]


def write_rows(folder, name, words, swapped=False):
    """A task file with rows of its own."""
    spec = yaml.safe_load((folder / "task.yaml").read_text())
    rows = [{"text": f"the {words[i % len(words)]} number {i}", "label": i % 2} for i in range(40)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = "['great', 'terrible']" if swapped else "['terrible', 'great']"
    spec |= {"name": name, "source": f"{name}.jsonl", "answer": f" {{{{ {labels}[label] }}}}"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run over two tasks, and a third task."""
    folder = write_task(tmp_path_factory.mktemp("adapt"))
    write_rows(folder, "second", ("car", "tale"), swapped=True)
    write_rows(folder, "third", ("night", "song"))
    tasks = [str(folder / "task.yaml"), str(folder / "second.yaml")]
    keys = {
        "adapter": "lora",
        "max_steps": 4,
        "lower_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
    }
    config = write_config(folder, "meta", task=tasks, tasks_per_step=2, **keys)
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder


def adapt(folder, output, *words, run=True, task="third.yaml", shots="4"):
    source = ["--run", str(folder / "run")] if run else ["--model", str(folder / "model")]
    place = str(folder / task) if task.endswith("yaml") else task
    given = ["adapt", *source, "--task", place, "--shots", shots, "--output", str(output), *QUIET, *words]
    return main(given)


def test_a_run_adapts_to_a_new_task_and_says_what_that_gains(folder, tmp_path, capsys):
    assert adapt(folder, tmp_path / "a", "--draws", "3") == 0
    assert "metrics accuracy: mean" in capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (found["task"], found["shots"], found["draws"], found["start"]) == ("third", 4, 3, "fresh")
    assert found["zero_shot"]["rows"] == 8
    for part in ("in_context", "metrics"):
        accuracy = found[part]["accuracy"]
        values = accuracy["of_draws"]
        assert len(values) == 3
        assert accuracy["mean"] == pytest.approx(sum(values) / 3)
        assert accuracy["worst"] == min(values)
        assert found[part]["loss"]["worst"] == max(found[part]["loss"]["of_draws"])
    assert len(set(found["metrics"]["loss"]["of_draws"])) == 3
    assert found["examples_that_fit"] == 4
    again = adapt(folder, tmp_path / "b", "--draws", "3")
    other = json.loads((tmp_path / "b" / "results.json").read_text())
    assert again == 0
    assert {k: v for k, v in other.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    assert load_file(tmp_path / "a" / "draw-2" / "upper" / "adapter_model.safetensors")


def test_the_adapters_of_draws_load_in_plain_peft_on_the_run_s_backbone(folder, tmp_path):
    assert adapt(folder, tmp_path / "a", "--draws", "1", "--max_steps", "2") == 0
    place = tmp_path / "a" / "draw-0" / "upper"
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((folder / "run" / "backbone").resolve())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, str(place))
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_the_mean_start_is_the_mean_of_the_tasks_adapters(folder, tmp_path):
    """One step with a learning rate of nearly 0 leaves the start."""
    keys = ("--draws", "1", "--max_steps", "1", "--learning_rate", "1e-30")
    assert adapt(folder, tmp_path / "mean", "--start", "mean", *keys) == 0
    assert adapt(folder, tmp_path / "one", "--start", "second", *keys) == 0
    read = [
        load_file(folder / "run" / "tasks" / name / "upper" / "adapter_model.safetensors")
        for name in ("tiny", "second")
    ]
    mean = load_file(tmp_path / "mean" / "draw-0" / "upper" / "adapter_model.safetensors")
    one = load_file(tmp_path / "one" / "draw-0" / "upper" / "adapter_model.safetensors")
    for name in mean:
        torch.testing.assert_close(mean[name], (read[0][name] + read[1][name]) / 2, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one[name], read[1][name], rtol=1e-6, atol=1e-9)


def test_before_training_the_trained_start_counts_and_a_fresh_one_does_not(folder, tmp_path):
    """One step with a learning rate of nearly 0 leaves the start, so all three scores are of one model."""
    keys = ("--draws", "1", "--max_steps", "1", "--learning_rate", "1e-30")
    found = {}
    for start in ("fresh", "second"):
        assert adapt(folder, tmp_path / start, "--start", start, *keys) == 0
        found[start] = json.loads((tmp_path / start / "results.json").read_text())
        assert found[start]["zero_shot"]["loss"] == pytest.approx(found[start]["metrics"]["loss"]["mean"], abs=1e-6)
    for part in (lambda results: results["zero_shot"]["loss"], lambda results: results["in_context"]["loss"]["mean"]):
        assert abs(part(found["fresh"]) - part(found["second"])) > 1e-5


def test_any_model_is_the_baseline_and_without_adapter_all_weights_learn(folder, tmp_path):
    assert adapt(folder, tmp_path / "lora", "--draws", "2", run=False) == 0
    assert adapt(folder, tmp_path / "full", "--draws", "2", "--adapter", "none", "--max_steps", "3", run=False) == 0
    lora, full = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("lora", "full"))
    assert lora["zero_shot"] == full["zero_shot"]
    assert lora["metrics"]["loss"] != full["metrics"]["loss"]
    assert not (tmp_path / "full" / "draw-0").exists()


def test_the_keys_of_a_file_count_below_those_of_the_command_line(folder, tmp_path):
    config = tmp_path / "paper.yaml"
    config.write_text("lora_r: 16\nlearning_rate: 2e-4\nnum_train_epochs: 1\n")
    words = ("--config", str(config), "--draws", "1", "--learning_rate", "1e-4")
    assert adapt(folder, tmp_path / "a", *words, run=False, shots="5") == 0
    stored = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (stored["lora_r"], stored["learning_rate"], stored["num_train_epochs"]) == (16, 1e-4, 1)
    assert "max_steps" not in stored
    assert stored["per_device_train_batch_size"] == 5


def test_a_run_without_adapters_is_adapted_by_lora_and_not_by_all_of_its_weights(folder, tmp_path):
    config = write_config(folder, "plain", method="none", adapter="none", task=str(folder / "second.yaml"))
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    task = ["--task", str(folder / "third.yaml"), "--shots", "4", "--draws", "1", "--max_steps", "1", *QUIET]
    assert main(["adapt", "--run", str(tmp_path / "run"), *task, "--output", str(tmp_path / "a")]) == 0
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["adapter"] == "lora"
    assert (
        main(["adapt", "--run", str(tmp_path / "run"), *task, "--output", str(tmp_path / "b"), "--adapter", "none"])
        == 0
    )
    assert (tmp_path / "a" / "draw-0" / "upper").is_dir()
    assert not (tmp_path / "b" / "draw-0").exists()


def test_the_rows_of_source_take_the_place_of_the_task_s_own(folder, tmp_path):
    rows = [{"text": f"the other {i}", "label": i % 2} for i in range(20)]
    (folder / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--draws", "1", "--max_steps", "1", "--source", str(folder / "given.jsonl"), "--test_size", "4")
    assert adapt(folder, tmp_path / "a", *words, run=False) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["zero_shot"]["rows"] == 4
    assert adapt(folder, tmp_path / "b", *words[:-2], "--test_size", "21", run=False) == 2  # of 20


def test_the_adapter_of_a_draw_says_which_rows_have_trained_it(folder, tmp_path):
    assert adapt(folder, tmp_path / "a", "--draws", "1", "--max_steps", "1") == 0
    known = trained_rows_of(str(tmp_path / "a" / "draw-0" / "upper"))
    task = load_task(str(folder / "third.yaml"))
    shown = [row for row in task.records()["all"] if was_trained_on(row, known)]
    assert len(shown) == 4
    backbone = trained_rows_of(str(folder / "run" / "backbone"))
    assert backbone < known


def test_rows_that_a_model_was_trained_on_in_any_run_are_refused(folder, tmp_path, capsys):
    words = ["--task", str(folder / "second.yaml"), "--shots", "4", "--data_seed", "5", *QUIET]
    model = ["--model", str(folder / "run" / "backbone")]
    assert main(["adapt", *model, *words, "--output", str(tmp_path / "a")]) == 2
    assert "are among the rows that" in capsys.readouterr().err


def test_a_task_that_is_called_as_the_run_s_own_is_refused_whatever_its_file(folder, tmp_path, capsys):
    config = write_config(folder, "single", task=str(folder / "task.yaml"), max_steps=1, save_strategy="no")
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    spec = yaml.safe_load((folder / "third.yaml").read_text())
    (folder / "elsewhere.yaml").write_text(yaml.safe_dump({**spec, "name": "tiny"}))
    words = ["--task", str(folder / "elsewhere.yaml"), "--shots", "4", "--output", str(tmp_path / "a"), *QUIET]
    assert main(["adapt", "--run", str(tmp_path / "run"), *words]) == 2
    assert "has trained on the task tiny" in capsys.readouterr().err
    words[1] = str(folder / "third.yaml")
    assert main(["adapt", "--run", str(tmp_path / "run"), *words, "--start", "second"]) == 2
    assert "has no task 'second', but task:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "task", "said"),
    [
        ((), "second", "has trained on the task second"),
        (("--text", "text"), "third.yaml", "zofo adapt has no text"),
        (("--train_shots", "2"), "third.yaml", "zofo adapt has no train_shots"),
        (("--reward", "r.py:f"), "third.yaml", "zofo adapt has no reward"),
        ((), "task.yaml", "has trained on the task tiny"),
        (("--shots", "100"), "third.yaml", "shots is 100, but task third has"),
        (("--start", "fourth"), "third.yaml", "has no task 'fourth', but tiny, second"),
        (("--method", "zo"), "third.yaml", "set method: fo"),
        (("--penlty", "1"), "third.yaml", "did you mean penalty"),
        (("--seed", str(2**32 - 2)), "third.yaml", "seed is 4294967296, but must be"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, words, task, said):
    assert adapt(folder, tmp_path / "a", *words, task=task) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZofoError("the loss is nan")], ids=["Ctrl-C", "a failure"])
def test_draws_that_have_ended_are_kept_where_a_later_one_does_not_end(folder, tmp_path, capsys, monkeypatch, error):
    assert adapt(folder, tmp_path / "whole", "--draws", "3") == 0
    train, begun = ZOFOTrainer.train, []

    def stopped(trainer):
        begun.append(trainer)
        if len(begun) == 3:
            raise error
        return train(trainer)

    monkeypatch.setattr(ZOFOTrainer, "train", stopped)
    assert adapt(folder, tmp_path / "a", "--draws", "3") == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert "2 of 3 draws have ended" in capsys.readouterr().out
    assert not (tmp_path / "a" / "results.json").exists()
    files = (tmp_path / "whole" / "results.json", tmp_path / "a" / "stopped.json")
    whole, found = (json.loads(file.read_text()) for file in files)
    assert found["draws"] == 2
    assert found["metrics"]["loss"]["of_draws"] == whole["metrics"]["loss"]["of_draws"][:2]
    assert {place.name for place in (tmp_path / "a").glob("draw-*")} == {"draw-0", "draw-1"}


def test_rows_that_the_run_has_seen_are_refused_by_name(folder, tmp_path, capsys):
    spec = yaml.safe_load((folder / "third.yaml").read_text())
    rows = (folder / "second.jsonl").read_text().replace("the car", "the  car")
    (folder / "again.jsonl").write_text(rows)
    (folder / "again.yaml").write_text(yaml.safe_dump({**spec, "name": "again", "source": "again.jsonl"}))
    assert adapt(folder, tmp_path / "a", task="again.yaml") == 2
    assert "of the test task 'again' is row" in capsys.readouterr().err


def test_the_task_of_a_table_is_refused_by_its_file(folder, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"the dog number {i},{('no', 'yes')[i % 2]}\n" for i in range(60)))
    keys = ["--max_steps", "1", "--lower_steps", "1", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
    given = ["--data", str(table), "--text", "text", "--label", "label", "--output_dir", str(tmp_path / "one")]
    assert main(["train", "--model", str(folder / "model"), *given, *keys, "--report_to", "none", *QUIET]) == 0
    task, output = str(tmp_path / "one" / "task.yaml"), str(tmp_path / "a")
    asked = ["adapt", "--run", str(tmp_path / "one"), "--shots", "4", "--output", output, "--draws", "1", *QUIET]
    assert main([*asked, "--task", task]) == 2
    assert "has trained on the task" in capsys.readouterr().err
    assert main([*asked, "--task", str(folder / "third.yaml"), "--max_steps", "1"]) == 0


def test_the_interval_over_draws_is_student_s():
    values = [0.4, 0.5, 0.9, 0.7]
    found = over_draws([{"f1": value} for value in values])["f1"]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_answers_of_several_tasks_are_as_long_as_their_own(folder, tmp_path):
    """Also where the run is known by its backbone, which belongs to all of them."""
    shutil.copytree(folder / "run", tmp_path / "run")
    place = tmp_path / "run" / "results.json"
    spans = {"tiny": {"breaks": 0, "tokens": 5}, "second": {"breaks": 3, "tokens": 90}}
    place.write_text(json.dumps({**json.loads(place.read_text()), "answer_span": spans}))
    found = StoredRun.of(str(tmp_path / "run" / "backbone"), str(tmp_path / "run" / "tasks" / "second" / "upper"))
    assert found.name == "second"
    assert [(span.breaks, span.tokens) for span in map(found.span, ("tiny", "second"))] == [(0, 5), (3, 90)]


@pytest.mark.parametrize(("method", "place"), [("fo", "tasks/tiny/upper"), ("reptile", "upper")])
def test_the_card_of_a_run_over_tasks_names_an_adapter_that_is_there(folder, tmp_path, method, place):
    tasks = [str(folder / "task.yaml"), str(folder / "second.yaml")]
    keys = {"method": method, "adapter": "lora", "max_steps": 1, "per_device_train_batch_size": 4}
    config = write_config(tmp_path, "run", **keys, model=str(folder / "model"), task=tasks, save_strategy="no")
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    assert f'"{place}"' in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / place / "adapter_config.json").is_file()


def test_a_checkpoint_of_a_run_over_tasks_that_has_not_ended_is_scored(folder, tmp_path, capsys):
    keys = {"method": "fo", "adapter": "lora", "max_steps": 2, "per_device_train_batch_size": 4}
    tasks = [str(folder / "task.yaml"), str(folder / "second.yaml")]
    config = write_config(tmp_path, "run", **keys, model=str(folder / "model"), task=tasks, save_steps=1)
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "results.json").unlink()
    place = tmp_path / "run" / "checkpoint-1"
    given = ["--model", str(place / "backbone"), "--adapter", str(place / "tasks" / "second" / "upper")]
    capsys.readouterr()
    assert main(["eval", *given, "--task", str(folder / "second.yaml")]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"].keys() == {"second"}
