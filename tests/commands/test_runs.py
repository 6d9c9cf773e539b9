"""What a run meets on its way: folders that hold one already, damaged checkpoints, full disks, losses, Ctrl-C."""

import copy
import functools
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from shell import OPTIONS, QUICK, arguments, failed, refused, snapshot, write_task
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.cli import main
from zofo.commands.results import as_json
from zofo.training.checkpoint import last_sealed
from zofo.zo.optimizers import JointOptimizer

BILEVEL = {**QUICK, "method": "bilevel", "penalty": 1.0, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A model, a task, and a finished bilevel run of two steps with a checkpoint after each."""
    root = tmp_path_factory.mktemp("runs")
    keys = {"model": save_tiny_model(root / "model"), "task": write_task(root / "task"), "output_dir": root / "run"}
    assert main(arguments(**{**keys, **BILEVEL})) == 0
    return {**keys, **BILEVEL}


@pytest.fixture
def keys(made, tmp_path):
    """The keys of that run, with a copy of its folder."""
    shutil.copytree(made["output_dir"], tmp_path / "run")
    return {**made, "output_dir": tmp_path / "run"}


def without_run(keys):
    shutil.rmtree(keys["output_dir"])
    return keys


# ---- folders


@pytest.mark.parametrize("left", ["results.json", "backbone", "upper", "checkpoint-1", "config.yaml"])
def test_a_folder_that_holds_a_run_is_not_written_over(capsys, tmp_path, keys, left):
    for path in keys["output_dir"].iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = refused(capsys, arguments(**keys), tmp_path)
    assert f"{keys['output_dir']} already holds a run ({left}): choose another output_dir, resume_from" in line


def test_a_run_may_be_replaced_and_what_else_is_there_stays(tmp_path, keys):
    (keys["output_dir"] / "notes.txt").write_text("mine")
    assert main(arguments(**{**keys, "overwrite_output_dir": "true", "max_steps": 1})) == 0
    assert (keys["output_dir"] / "notes.txt").read_text() == "mine"
    assert not (keys["output_dir"] / "checkpoint-2").exists()
    assert (keys["output_dir"] / "checkpoint-1" / "seal.json").exists()


def test_replacing_a_run_with_bad_input_removes_nothing(capsys, tmp_path, keys):
    for wrong in ({"train_size": 999}, {"model": "none"}, {"adapter": "nosuch"}, {"max_length": 2}):
        refused(capsys, arguments(**{**keys, "overwrite_output_dir": "true", **wrong}), tmp_path)


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize("name", ["README.md", "task.yaml"])
def test_what_is_no_run_is_never_removed(capsys, tmp_path, keys, name, overwrite):
    without_run(keys)["output_dir"].mkdir()
    (keys["output_dir"] / name).write_text("mine")
    line = refused(capsys, arguments(**{**keys, "overwrite_output_dir": overwrite}), tmp_path)
    assert f"{keys['output_dir']} holds {name}, but no run that could be removed: choose another output_dir" in line


def test_a_run_does_not_remove_what_it_reads(capsys, tmp_path, keys):
    run = keys["output_dir"]
    shutil.copytree(Path(keys["task"]).parent, run / "backbone" / "rows")
    (run / "task.yaml").write_text(Path(keys["task"]).read_text())
    (run / "upper" / "lora.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}')
    inside = {"model": run / "backbone", "task": run / "task.yaml", "adapter": run / "upper" / "lora.json"}
    inside["source"] = run / "backbone" / "rows" / "rows.jsonl"
    for key, value in inside.items():
        line = refused(capsys, arguments(**{**keys, "overwrite_output_dir": "true", key: value}), tmp_path)
        assert f"{key} is {value}, which overwrite_output_dir would remove" in line


BEFORE_WORK = {
    "an unknown argument of the schedule": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"nosuch": 1}'},
    "a schedule without what it needs": {"lr_scheduler_type": "cosine_with_min_lr"},
    "a number of workers that is none": {"dataloader_num_workers": -1},
}


@pytest.mark.parametrize("wrong", BEFORE_WORK.values(), ids=BEFORE_WORK)
def test_what_the_libraries_cannot_make_is_one_line_and_the_old_run_stays(capsys, tmp_path, keys, wrong):
    refused(capsys, arguments(**{**keys, "overwrite_output_dir": "true", **wrong}), tmp_path)


def test_a_run_that_breaks_before_its_first_checkpoint_puts_back_the_old_one(tmp_path, keys, monkeypatch):
    before = snapshot(tmp_path)

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(ZOFOTrainer, "training_step", broken)
    with pytest.raises(MemoryError):
        main(arguments(**{**keys, "overwrite_output_dir": "true"}))
    assert snapshot(tmp_path) == before


def test_a_refused_resume_changes_nothing(capsys, tmp_path, keys):
    file = keys["output_dir"] / "checkpoint-2" / "backbone" / "config.json"
    file.write_bytes(bytes(file.stat().st_size))
    more = {**keys, "max_steps": 3, "resume_from_checkpoint": keys["output_dir"] / "checkpoint-2"}
    assert "backbone/config.json is not what was written" in refused(capsys, arguments(**more), tmp_path)


def test_the_file_given_as_config_is_not_removed(capsys, tmp_path, keys):
    words = arguments(config=keys["output_dir"] / "config.yaml", output_dir=keys["output_dir"])
    line = refused(capsys, [*words, "--overwrite_output_dir", "true"], tmp_path)
    assert "config.yaml, which overwrite_output_dir would remove with the run" in line


def test_going_on_from_elsewhere_does_not_write_over_a_run(capsys, tmp_path, keys):
    other = tmp_path / "other"
    shutil.copytree(keys["output_dir"], other)
    given = {**keys, "resume_from_checkpoint": keys["output_dir"] / "checkpoint-1", "output_dir": other}
    assert f"{other} already holds a run" in refused(capsys, arguments(**given), tmp_path)
    assert main(arguments(**{**given, "overwrite_output_dir": "true"})) == 0
    assert not (other / "checkpoint-1").exists()
    assert (keys["output_dir"] / "checkpoint-1" / "seal.json").exists()
    same = {**keys, "resume_from_checkpoint": keys["output_dir"] / "checkpoint-1"}
    assert main(arguments(**same)) == 0


def test_only_numbered_checkpoints_are_a_run_s(tmp_path, keys):
    best = keys["output_dir"] / "checkpoint-best"
    best.mkdir()
    assert main(arguments(**{**keys, "overwrite_output_dir": "true"})) == 0
    assert best.is_dir()


def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path, keys):
    (keys["output_dir"] / "checkpoint-2").rename(tmp_path / "elsewhere")
    (keys["output_dir"] / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert main(arguments(**{**keys, "resume_from_checkpoint": "true", "max_steps": 3})) == 0
    assert main(arguments(**{**keys, "overwrite_output_dir": "true"})) == 0
    assert not (keys["output_dir"] / "checkpoint-2").is_symlink()
    assert (tmp_path / "elsewhere" / "seal.json").exists()


def test_a_run_goes_on_with_the_same_rows_only(capsys, tmp_path, keys):
    task = write_task(tmp_path / "task")
    given = {**without_run(keys), "task": task, "source": None}
    assert main(arguments(**given)) == 0
    rows = (tmp_path / "task" / "rows.jsonl").read_text()
    (tmp_path / "task" / "rows.jsonl").write_text(rows.replace("film", "book"))
    more = {**given, "resume_from_checkpoint": "true", "max_steps": 3}
    assert "was written by a run on other training rows" in refused(capsys, arguments(**more), tmp_path)


def test_a_run_does_not_go_on_without_the_state_of_its_optimizer(capsys, tmp_path, keys):
    assert main(arguments(**{**without_run(keys), "save_only_model": "true"})) == 0
    assert main(arguments(**{**keys, "resume_from_checkpoint": "true"})) == 0  # it is finished, and needs none
    more = {**keys, "resume_from_checkpoint": "true", "max_steps": 3}
    assert "holds no optimizer.pt, as save_only_model leaves it out" in refused(capsys, arguments(**more), tmp_path)


def test_a_finished_run_that_goes_on_says_what_training_says(tmp_path, keys):
    tokenizer = tiny_tokenizer()
    args = ZOFOConfig(
        output_dir=str(tmp_path / "python"), method="fo", max_steps=2, save_steps=1, per_device_train_batch_size=2,
        use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    rows = [{"prompt": f"the film {i} was", "completion": OPTIONS[0], "options": OPTIONS} for i in range(8)]
    for resume in (None, True):
        model = tiny_model("llama", vocab_size=len(tokenizer))
        found = ZOFOTrainer(model, args, rows, processing_class=tokenizer).train(resume_from_checkpoint=resume)
        assert found.global_step == 2
        assert isinstance(found.metrics, dict)


def test_what_was_learned_is_saved_before_the_backbone_is_compared(tmp_path, keys, monkeypatch):
    from zofo.commands import results as commands

    def gone(*_):
        raise MemoryError

    monkeypatch.setattr(commands, "backbone_change", gone)
    with pytest.raises(MemoryError):
        main(arguments(**without_run({**keys, "save_strategy": "no"})))
    assert load_file(keys["output_dir"] / "upper" / "adapter_model.safetensors")
    assert load_file(keys["output_dir"] / "backbone" / "model.safetensors")


@pytest.mark.parametrize("below", ["", "sub/run"])
def test_a_folder_that_cannot_be_made_is_said_before_any_work(capsys, tmp_path, keys, below):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / below
    capsys.readouterr()
    line = refused(capsys, arguments(**{**keys, "output_dir": place}), tmp_path)
    assert str(tmp_path / "file") in line
    assert "choose another" in line


def test_a_folder_without_permission_is_said(capsys, tmp_path, keys, monkeypatch):
    def forbidden(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    line = failed(capsys, arguments(**without_run(keys)))
    assert f"cannot write {keys['output_dir']}" in line
    assert "Permission denied" in line
    assert "choose another output_dir" in line


@contextmanager
def full_disk(room):
    """Within the block no file of this process can grow beyond `room` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 5_000, 30_000])
@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_full_disk_is_one_line(capsys, keys, strategy, room):
    without_run(keys)
    with full_disk(room):
        line = failed(capsys, arguments(**{**keys, "save_strategy": strategy}))
    assert "free space" in line
    assert str(keys["output_dir"]) in line


def test_a_full_disk_while_merging_is_one_line_and_leaves_no_folder(capsys, tmp_path, keys):
    with full_disk(30_000):
        line = failed(capsys, arguments("merge", run=keys["output_dir"], output=tmp_path / "merged"))
    assert "free space" in line
    assert not (tmp_path / "merged").exists()


# ---- checkpoints


def cut(name):
    def damage(run):
        file = next((run / "checkpoint-2").rglob(name))
        file.write_bytes(file.read_bytes()[:-10])

    return damage


def remove(name):
    return lambda run: next((run / "checkpoint-2").rglob(name)).unlink()


CHECKPOINTS = {
    "half-written": (remove("seal.json"), "is no complete checkpoint: it was only half written; resume from an"),
    "a truncated backbone": (cut("model.safetensors"), "model.safetensors has"),
    "a truncated adapter": (cut("adapter_model.safetensors"), "adapter_model.safetensors has"),
    "a truncated optimizer": (cut("optimizer.pt"), "optimizer.pt has"),
    "a missing file": (remove("trainer_state.json"), "trainer_state.json is missing; resume from an earlier"),
    "a truncated seal": (cut("seal.json"), "checkpoint-2"),
    "an empty seal": (lambda run: (run / "checkpoint-2" / "seal.json").write_text(""), "checkpoint-2"),
    "not there": (lambda run: shutil.rmtree(run / "checkpoint-2"), "there is no checkpoint"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused_and_the_last_whole_one_found(capsys, tmp_path, keys, name):
    run, (damage, message) = keys["output_dir"], CHECKPOINTS[name]
    damage(run)
    words = arguments(**{**keys, "resume_from_checkpoint": run / "checkpoint-2"})
    assert message in refused(capsys, words, tmp_path)
    assert last_sealed(run) == run / "checkpoint-1"
    if name in ("half-written", "a truncated optimizer"):
        assert main(arguments(**{**keys, "resume_from_checkpoint": "true"})) == 0


CHANGES = {
    "method": {"method": "zo", "adapter": "lora"},
    "adapter": {"adapter": "prompt"},
    "penalty": {"penalty": 2},
    "learning_rate": {"learning_rate": 0.5},
    "seed": {"seed": 1},
    "train_size": {"train_size": 20},
    "test_size": {"test_size": 11},  # rows of test are cut first: with more of them, some would have been trained on
    "dev_size": {"dev_size": 11},
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
}


@pytest.mark.parametrize(("key", "changes"), CHANGES.items(), ids=CHANGES)
def test_a_checkpoint_of_another_configuration_is_refused(capsys, tmp_path, keys, key, changes):
    words = arguments(**{**keys, **changes, "resume_from_checkpoint": "true"})
    line = refused(capsys, words, tmp_path)
    assert f"checkpoint-2 was written with {key} = " in line
    assert "resume with the same configuration" in line


def test_resuming_without_a_checkpoint_is_refused(capsys, tmp_path, keys):
    without_run(keys)
    line = refused(capsys, arguments(**{**keys, "resume_from_checkpoint": "true"}), tmp_path)
    assert "holds no complete checkpoint to resume from" in line


# ---- merge

MERGE = {
    "no run": ({"run": "none"}, "none is no finished run: it holds no backbone/"),
    "an output that exists": ({"output": "."}, "exists already and is not overwritten: give a new folder"),
    "an unknown adapter": ({"adapter": "middle"}, "invalid choice: 'middle' (choose from 'upper', 'lower')"),
}


@pytest.mark.parametrize(("changes", "message"), MERGE.values(), ids=MERGE)
def test_merge(capsys, tmp_path, keys, changes, message):
    words = arguments("merge", **{"run": keys["output_dir"], "output": tmp_path / "merged", **changes})
    assert message in refused(capsys, words, tmp_path)


def test_an_adapter_that_the_run_does_not_have_cannot_be_merged(capsys, tmp_path, keys):
    shutil.rmtree(keys["output_dir"] / "lower")
    words = arguments("merge", run=keys["output_dir"], adapter="lower", output=tmp_path / "merged")
    assert "has no adapter 'lower', only upper" in refused(capsys, words, tmp_path)


# ---- losses that are not finite


def poison(folder, value):
    """Sets one weight of a saved model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


NON_FINITE = {
    "fo": ({"method": "fo"}, "step 0: the training loss", "learning_rate"),
    "zo": ({"method": "zo", "adapter": "none"}, "step 0: the loss near θ", "zo_learning_rate or zo_eps"),
    "bilevel": ({"method": "bilevel", "penalty": 1.0}, "step 0: G(θ, s) of lower step 0", "learning_rate"),
    "bilevel without lower steps": (
        {"method": "bilevel", "penalty": 1.0, "lower_steps": 0}, "F(θ, p)", "upper_learning_rate",
    ),
    "the limit of bilevel": ({"method": "bilevel"}, "step 0: G(θ, s) of lower step 0", "learning_rate"),
    "two stages": ({"method": "two_stage"}, "step 0: the training loss", "learning_rate"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "term", "mend"), NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_loss_that_is_not_finite_names_step_term_and_what_to_lower(
    capsys, tmp_path, keys, changes, term, mend, value
):
    model = poison(save_tiny_model(tmp_path / "model"), value)
    line = failed(capsys, arguments(**{**without_run(keys), **changes, "model": model}))
    assert term in line
    assert f"lower {mend}" in line
    assert "on_nonfinite: skip" in line


@pytest.mark.parametrize("changes", [{"method": "fo", "adapter": "none"}, {"method": "fo"}], ids=["full", "lora"])
def test_a_learning_rate_that_is_far_too_large_is_told_to_be_lowered(capsys, keys, changes):
    line = failed(
        capsys,
        arguments(
            **{
                **without_run(keys),
                **changes,
                "learning_rate": 2e9,
                "weight_decay": 1e6,
                "save_strategy": "no",
                "max_steps": 5,
            }
        ),
    )
    assert "the training loss" in line
    assert "lower learning_rate" in line


def test_weights_that_the_last_step_makes_infinite_are_refused_and_what_was_there_stays(
    capsys, tmp_path, keys, monkeypatch
):
    whole = ZOFOTrainer.training_step

    def step(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        with torch.no_grad():
            next(iter(self.adapted.adapter_parameters("upper").values())).fill_(float("nan"))
        return loss

    monkeypatch.setattr(ZOFOTrainer, "training_step", step)
    given = {**keys, "overwrite_output_dir": "true", "max_steps": 1}
    for strategy in ("no", "steps"):
        line = refused(capsys, arguments(**{**given, "save_strategy": strategy}), tmp_path)
        assert "of upper is not finite, and is not saved: lower upper_learning_rate" in line


def test_results_are_strict_json():
    found = json.loads(as_json({"a": {"loss": float("inf"), "rows": [3, float("nan")]}, "b": float("nan")}))
    assert found == {"a": {"loss": None, "rows": [3, None]}, "b": None}


def rows(text, count=8):
    return [{"prompt": f"{text} {n} It was", "completion": OPTIONS[n % 2], "options": OPTIONS} for n in range(count)]


def state(trainer):
    """θ, p, s, and what their optimizers hold."""
    joint = trainer.method.optimizer
    members = list(joint.members.values()) if isinstance(joint, JointOptimizer) else [joint]
    held = [copy.deepcopy(member.state_dict()["state"]) for member in members]
    numbers = {f"{i} {p} {key}": v for i, s in enumerate(held) for p in s for key, v in s[p].items()}
    return {**{name: value.clone() for name, value in trainer.adapted.model.state_dict().items()}, **numbers}


class Poison(TrainerCallback):
    """After the first step, makes the embedding of one token not a number, and remembers the state."""

    def __init__(self, token):
        self.token = token
        self.before = {}

    def on_step_end(self, args, state_, control, **kwargs):
        if state_.global_step == 1:
            with torch.no_grad():
                self.trainer.adapted.base.get_input_embeddings().weight[self.token] = float("nan")
            self.before = state(self.trainer)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("method", ["bilevel", "zo", "fo", "two_stage"])
@pytest.mark.parametrize("where", ["everywhere", "in the upper level"])
def test_a_skipped_step_leaves_theta_p_s_and_their_optimizers_untouched(tmp_path, method, where):
    """In the upper level: the lower steps go well, and then F(θ, p) is not a number."""
    tokenizer = tiny_tokenizer()
    poison_after_one = Poison(tokenizer("#")["input_ids"][0])
    args = ZOFOConfig(
        output_dir=str(tmp_path), method=method, max_steps=3, lower_steps=2, learning_rate=0.01, zo_learning_rate=0.01,
        weight_decay=0.1, zo_weight_decay=0.1, per_device_train_batch_size=4, on_nonfinite="skip", logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = ZOFOTrainer(
        tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False),
        args,
        rows("# the film" if where == "everywhere" or method != "bilevel" else "the film"),
        upper_dataset=rows("# a film"),
        processing_class=tokenizer,
        callbacks=[poison_after_one],
    )
    poison_after_one.trainer = trainer
    at_start = state(trainer)
    trainer.train()
    before, after = poison_after_one.before, state(trainer)
    assert any(not torch.equal(before[name], value) for name, value in at_start.items())  # the first step did move
    assert before.keys() == after.keys()
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    for entry, skipped in zip(trainer.state.log_history, (False, True, True), strict=False):
        assert entry.get("skipped_steps") == (1 if skipped else None)
        assert ("loss" in entry) != skipped  # there was none: 0 would be wrong


# ---- Ctrl-C


def test_ctrl_c_ends_with_130_and_one_line_and_the_last_checkpoint_is_whole(tmp_path, keys):
    run = without_run(keys)["output_dir"]
    words = arguments(**{**keys, "max_steps": 100_000, "save_total_limit": 3})
    process = subprocess.Popen(
        [sys.executable, "-m", "zofo.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # tests that a shell started in the background inherit that Ctrl-C is ignored
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 120
        while not list(run.glob("checkpoint-*/seal.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    number = int(last_sealed(run).name.removeprefix("checkpoint-"))
    command = shlex.join(["zofo", *words])
    assert said.splitlines()[-3:] == [
        f"zofo: interrupted; {run}/checkpoint-{number} is whole, after {number} iterations",
        f"  go on:      {command} --resume_from_checkpoint true",
        f"  start anew: {command} --overwrite_output_dir true",
    ]
    assert said.startswith(
        "\nzofo: the run ends after this step or evaluation, with a checkpoint; Ctrl-C again ends it"
    )
    before = snapshot(run / "backbone") if (run / "backbone").exists() else {}
    assert not before  # nothing that looks like the end of a run
    resumed = {**keys, "max_steps": number + 1, "resume_from_checkpoint": "true"}
    assert main(arguments(**resumed)) == 0
