"""Killed by SIGKILL and resumed = never stopped, bit for bit, whenever the kill comes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from plain import Watch, make_rows, make_trainer, moved, same, weights, write_config, write_task
from zofo import ZofoError
from zofo.cli import main
from zofo.models.adapters import AdaptedModel
from zofo.training.checkpoint import last_sealed, read_seal, require_whole

STEPS = 6
COMMON = {
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "train_size": 18,
    "dev_size": 6,
    "test_size": 6,
    "learning_rate": 1e-2,
    "lower_steps": 2,
    "zo_learning_rate": 1e-2,
    "zo_weight_decay": 0.1,
    "lr_scheduler_type": "linear",  # so that the scheduler's state matters
    "warmup_steps": 3,
}
# an epoch has 3 steps in bilevel and 5 in the others: step 5, and checkpoint 4 before it, lie in the middle of one
RUNS = {
    "bilevel": {"method": "bilevel", "penalty": 1.0, "num_perturbations": 2, "per_device_train_batch_size": 1},
    "zo": {"method": "zo", "adapter": "none", "num_perturbations": 2, "per_device_train_batch_size": 2},
    "fo": {"method": "fo", "per_device_train_batch_size": 2},
    "two_stage": {"method": "two_stage", "two_stage_fraction": 0.8, "per_device_train_batch_size": 2},
    "tasks": {
        "method": "bilevel",
        "penalty": 1.0,
        "task_sampling": "temperature",
        "per_device_train_batch_size": 1,
    },
}
MORE = {
    "infinite": {"method": "bilevel", "num_perturbations": 2, "per_device_train_batch_size": 1},
    "auto": {
        "method": "zo",
        "adapter": "none",
        "zo_learning_rate": "auto",
        "zo_weight_decay": 0.0,
        "per_device_train_batch_size": 2,
    },
    "full": {"method": "fo", "adapter": "none", "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    "bfloat16": {
        "method": "bilevel",
        "penalty": 1.0,
        "dtype": "bfloat16",
        "zo_eps": 0.1,
        "per_device_train_batch_size": 1,
    },
}
NAMES = [*RUNS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]
MOMENTS = ("writing_weights", "writing_optimizer", "before_seal", "before_rotation")
AT_THE_END = ("in_final_save", "between_renames")


def environment():
    """For subprocesses: the modules of this one, one thread, so that they can fork, and no network."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs NAME (never stopped) and NAME-MOMENT (killed and resumed), and a report on each."""
    folder = write_task(tmp_path_factory.mktemp("resume"))
    spec = yaml.safe_load((folder / "task.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump({**spec, "name": "other", "prompt": "of {{ text }} it was"}))
    tasks = {"task": [str(folder / f"{task}.yaml") for task in ("task", "other")]}
    jobs = jobs_of(folder, {**RUNS, "tasks": {**RUNS["tasks"], **tasks}})
    config = write_config(folder, "limited", **{**COMMON, **RUNS["fo"]}, save_total_limit=1)
    jobs += [(config, f"fo-{moment}", moment, 4) for moment in MOMENTS]
    jobs += [(folder / "fo.yaml", f"fo-{moment}", moment, STEPS) for moment in AT_THE_END]
    return folder, reports_of(folder, jobs)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    """The same of the runs that `make test-full` adds."""
    folder = write_task(tmp_path_factory.mktemp("resume"))
    return folder, reports_of(folder, jobs_of(folder, MORE))


@pytest.fixture
def runs_of(name, request):
    """The folder with this run, and the reports."""
    return request.getfixturevalue("runs" if name in RUNS else "more_runs")


def jobs_of(folder, runs):
    """(config, output, moment of the kill, step) of each run that is never stopped, and killed within a step."""
    jobs = []
    for name, keys in runs.items():
        config = write_config(folder, name, **{**COMMON, **keys})
        jobs += [(config, name, None, 0), (config, f"{name}-in_step", "in_step", 5)]
    return jobs


def reports_of(folder, jobs):
    """Does the jobs, and returns what happened, by output."""
    wanted = [
        {"config": str(config), "output": str(folder / output), "kill": kill, "step": step}
        for config, output, kill, step in jobs
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "runner.py")],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    reports = {output: json.loads((folder / f"{output}.json").read_text()) for _, output, _, _ in jobs}
    for _, output, kill, _ in jobs:
        assert reports[output]["statuses"] == ([-signal.SIGKILL, 0] if kill else [0]), (output, done.stderr)
    return reports


def assert_same(first, second, where):
    """Bitwise equality of nested dicts, lists, tensors and numbers."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
        assert first.dtype == second.dtype, where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert first == second, where


def assert_same_run(first, second, summary=True):
    """Weights, optimizers, schedules, metrics, logs and costs of two run folders are equal.

    Without the summary that Trainer logs behind the last step, where a run went on behind it and took none.
    """
    last = f"checkpoint-{STEPS}"
    files = sorted(f.relative_to(first) for f in first.glob("*/*.safetensors") if "checkpoint" not in str(f))
    files += sorted(f.relative_to(first) for f in first.glob(f"{last}/*.safetensors"))
    files += sorted(f.relative_to(first) for f in first.glob(f"{last}/*/*.safetensors"))
    assert len(files) >= 2
    for file in files:
        assert_same(load_file(first / file), load_file(second / file), str(file))
    for name in ("optimizer.pt", "scheduler.pt", *(file.name for file in (first / last).glob("tasks.pt"))):
        loaded = [torch.load(run / last / name, weights_only=True) for run in (first, second)]
        assert_same(*loaded, name)
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    for result in results:
        for key in ("wall_seconds", "peak_memory_bytes"):
            assert result["cost"].pop(key) > 0
    assert_same(*results, "results.json")
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (first, second)]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [[log for log in history if summary or "train_runtime" not in log] for history in logs]
    cleaned = [[{k: v for k, v in log.items() if k not in timed} for log in history] for history in logs]
    assert_same(*cleaned, "log_history")


@pytest.mark.parametrize("name", NAMES)
def test_killed_in_the_middle_of_a_step_and_resumed_equals_never_stopped(runs_of, name):
    folder, reports = runs_of
    assert reports[f"{name}-in_step"]["whole"] == "checkpoint-4"
    assert reports[f"{name}-in_step"]["folders"] == ["checkpoint-2", "checkpoint-4"]
    assert_same_run(folder / name, folder / f"{name}-in_step")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving_and_resumed_equals_never_stopped(runs, moment):
    """`save_total_limit` is 1: the only whole checkpoint is not removed before the next one is whole."""
    folder, reports = runs
    whole = "checkpoint-4" if moment == "before_rotation" else "checkpoint-2"
    assert reports[f"fo-{moment}"]["whole"] == whole
    assert reports[f"fo-{moment}"]["folders"] == ["checkpoint-2", "checkpoint-4"]
    run = folder / f"fo-{moment}"
    assert [f.name for f in run.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same_run(folder / "fo", run)


@pytest.mark.parametrize("moment", AT_THE_END)
def test_killed_in_the_final_save_and_resumed_equals_never_stopped(runs, moment):
    folder, reports = runs
    assert reports[f"fo-{moment}"]["whole"] == f"checkpoint-{STEPS}"
    run = folder / f"fo-{moment}"
    assert_same_run(folder / "fo", run, summary=False)
    assert [f.name for f in run.glob(".zofo*")] == [".zofo.json"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_has_moved(runs_of, name):
    """Else equality would prove nothing."""
    folder, _ = runs_of
    start = load_file(folder / "model" / "model.safetensors")
    end = load_file(folder / name / "backbone" / "model.safetensors")
    assert any(not torch.equal(w, start[n].to(w.dtype)) for n, w in end.items()) == (name != "fo")
    if name in ("bilevel", "bfloat16"):
        state = torch.load(folder / name / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        assert {m: len(s["state"]) > 0 for m, s in state.items()} == {"lower": True, "upper": True, "zo": False}
        lower, upper = (load_file(folder / name / a / "adapter_model.safetensors") for a in ("lower", "upper"))
        assert all(w.dtype == torch.float32 for w in [*lower.values(), *upper.values()])
        assert all(not torch.equal(lower[n], upper[n]) for n in lower)


def test_a_resumed_run_stores_the_configuration_of_the_run_and_not_of_the_resumption(runs):
    """So that its config.yaml repeats it, as the model card says."""
    folder, _ = runs
    stored = [yaml.safe_load((folder / n / "config.yaml").read_text()) for n in ("bilevel", "bilevel-in_step")]
    for config in stored:
        config.pop("output_dir")
    assert stored[0] == stored[1]


def test_the_command_killed_from_outside_goes_on_where_it_was(tmp_path, one_thread):
    folder = write_task(tmp_path)
    keys = {"lr_scheduler_type": "constant", "warmup_steps": 0, "save_total_limit": 1, "lower_steps": 1}
    keys = {**COMMON, **RUNS["bilevel"], **keys, "eval_steps": 1000, "num_perturbations": 1}
    config = write_config(folder, "outside", **keys)
    run, whole = folder / "killed", folder / "whole"
    command = ["train", "--config", str(config), "--output_dir", str(run)]
    with subprocess.Popen(
        [sys.executable, "-m", "zofo.cli", *command, "--max_steps", "100000"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        started = time.monotonic()
        while not (run / "checkpoint-4" / "seal.json").exists() and not (run / "checkpoint-6").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < started + 120
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))  # at any moment
        process.kill()
        process.wait()
    reached = int(last_sealed(run).name.removeprefix("checkpoint-"))
    assert reached >= 4
    assert len(list(run.glob("checkpoint-*"))) <= 2
    more = ("--max_steps", str(reached + 3))
    assert main([*command, *more, "--resume_from_checkpoint", "true"]) == 0
    assert main(["train", "--config", str(config), "--output_dir", str(whole), *more]) == 0
    for file in ("backbone/model.safetensors", "upper/adapter_model.safetensors", "lower/adapter_model.safetensors"):
        assert_same(load_file(run / file), load_file(whole / file), file)
    last = f"checkpoint-{reached + 3}/optimizer.pt"
    assert_same(*(torch.load(r / last, weights_only=True) for r in (run, whole)), "optimizer.pt")
    assert read_seal((run / last).parent)["cost"]["forward_tokens"] > 0


@pytest.fixture
def one_thread():
    """As in the subprocesses: sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_kill_while_an_old_checkpoint_is_written_over_leaves_no_mixture_of_both(tmp_path, monkeypatch):
    """Resumed from an earlier one, a run meets the sealed checkpoints of its first life."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    sealed_while_writing = []
    save = AdaptedModel.save_backbone

    def watched(self, folder):
        sealed_while_writing.append((folder / "seal.json").exists())
        return save(self, folder)

    monkeypatch.setattr(AdaptedModel, "save_backbone", watched)
    again = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sealed_while_writing == [False, False]


def test_at_the_end_the_newest_the_best_and_those_of_other_runs_stay(tmp_path):
    keys = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 4}
    keys |= {"save_total_limit": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    (tmp_path / "checkpoint-77").mkdir()
    trainer, losses = make_trainer(tmp_path, eval_rows=make_rows(6, first=50), **keys), iter([0.9, 0.5, 0.7, 0.8])
    trainer.scored = lambda rows: {"upper": ({"loss": next(losses)}, [])}
    trainer.train()
    assert {place.name for place in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 77)}
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize("method", ["bilevel", "two_stage"])
def test_the_best_step_on_dev_is_what_a_run_ends_with(tmp_path, method):
    trainer = make_trainer(
        tmp_path,
        method=method,
        eval_rows=make_rows(6, first=50),
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    losses = iter([0.9, 0.5, 0.7, 0.8])
    history, parts = [], ("backbone", *trainer.adapted.adapters)

    def scored(rows):
        history.append({part: weights(trainer.adapted, part) for part in parts})
        return {"upper": ({"loss": next(losses)}, [])}

    trainer.scored = scored
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    for part in parts:
        assert same(weights(trainer.adapted, part), history[1][part])
        assert part != "backbone" or moved(history[1][part], history[3][part])
    assert {f.name for f in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}  # the best and the last


def test_resuming_takes_the_checkpoint_that_is_named(tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", **keys)
    whole.train()
    resumed = make_trainer(tmp_path / "other", **keys)
    steps = []
    resumed.add_callback(Watch(after=lambda: steps.append(resumed.state.global_step)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert steps == [3, 4]
    for part in ("backbone", "upper", "lower"):
        assert same(weights(resumed.adapted, part), weights(whole.adapted, part))


def test_a_checkpoint_of_another_configuration_or_a_damaged_one_is_refused(tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "method": "fo"}
    make_trainer(tmp_path, **keys).train()
    other = make_trainer(tmp_path, **{**keys, "learning_rate": 0.5})
    with pytest.raises(ZofoError, match=r"learning_rate = 0\.01, but now it is 0\.5"):
        other.train(resume_from_checkpoint=True)
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    os.truncate(file, file.stat().st_size - 1)
    trainer = make_trainer(tmp_path, **keys)
    with pytest.raises(ZofoError, match=r"optimizer\.pt has \d+ bytes instead of"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ZofoError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    folder = write_task(tmp_path)
    config = write_config(folder, "config", **{**COMMON, **RUNS["fo"]}, output_dir=str(folder / "run"))
    assert main(["train", "--config", str(config)]) == 0
    files = {f: f.read_bytes() for f in (folder / "run").rglob("*.safetensors")}
    results = json.loads((folder / "run" / "results.json").read_text())
    assert main(["train", "--config", str(config), "--resume_from_checkpoint", "true"]) == 0
    assert {f: f.read_bytes() for f in (folder / "run").rglob("*.safetensors")} == files
    assert json.loads((folder / "run" / "results.json").read_text()) == results


def damage_one_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 64
    file.write_bytes(content)


def test_a_changed_byte_in_any_file_of_a_checkpoint_is_found(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    last = tmp_path / "checkpoint-2"
    files = sorted(f for f in last.rglob("*") if f.is_file() and f.name != "seal.json")
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        damage_one_byte(file)
        with pytest.raises(ZofoError, match="is not what was written; resume from an earlier checkpoint"):
            require_whole(last)
        assert last_sealed(tmp_path) == tmp_path / "checkpoint-1"
        file.write_bytes(whole)
    assert last_sealed(tmp_path) == last


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", '"x"', "[" * 10**5, '{"files": []}', '{"files": {}}', '{"files": {}, "config": [], "cost": {}}',
     '{"files": {"a": "b"}, "config": {}, "cost": {}}', '{"files": {"a": 1}, "config": {"rows": 3}, "cost": {}}',
     '{"files": {"a": 1}, "config": {}}', '{"files": {"a": 1}, "sha256": [], "config": {}, "cost": {}}'],
)  # fmt: skip
def test_a_seal_of_another_form_is_damage(tmp_path, text):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "seal.json").write_text(text)
    with pytest.raises(ZofoError, match=r"is damaged: seal\.json cannot be read; resume from an earlier checkpoint"):
        read_seal(tmp_path / "checkpoint-1")
    with pytest.raises(ZofoError, match="holds no complete checkpoint"):
        last_sealed(tmp_path)


def test_only_checkpoints_of_this_run_are_removed(tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(tmp_path, **{**keys, "save_total_limit": 5}, max_steps=6).train()
    (tmp_path / "checkpoint-77").mkdir()
    make_trainer(tmp_path, **keys, max_steps=4, seed=1).train()
    assert {f.name for f in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 5, 6, 77)}
