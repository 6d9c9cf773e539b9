"""`zofo estimate`: bytes that have a closed form, what a run in a process of its own takes, and bad input."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from shell import QUICK, arguments, failed, refused, write_task
from tiny import save_tiny_model, tiny_model
from zofo import ZOFOConfig
from zofo.cli import main
from zofo.commands import estimate as estimates
from zofo.commands.estimate import estimate, seconds
from zofo.commands.train import train
from zofo.methods import METHODS
from zofo.methods.method import Work
from zofo.training.memory import fake, step_memory

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
BATCH = {"max_length": 64, "per_device_train_batch_size": 4}


def rows_of(folder, timed=False, **keys):
    """The rows of an estimate by method and adapter."""
    config = ZOFOConfig(output_dir=str(folder), use_cpu=True, **{**BATCH, **keys})
    return {(row.method, row.adapter): row for row in estimate(config, timed)}


def row_of(folder, **keys):
    """The row of the run's own method and adapter, which comes first."""
    return next(estimate(ZOFOConfig(output_dir=str(folder), use_cpu=True, **{**BATCH, **keys}), timed=False))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_adapters_gradients_and_states_have_their_closed_forms(tmp_path, model_folder, dtype, size):
    model = tiny_model(vocab_size=json.loads((model_folder / "config.json").read_text())["vocab_size"])
    count = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    buffers = sum(b.nbytes for b in model.buffers())
    keys = {"dtype": dtype, "max_length": 2, "per_device_train_batch_size": 1, "penalty": 1.0}
    rows = rows_of(tmp_path, model=str(model_folder), **keys)
    full, lora, mezo, bilevel = (
        rows[key] for key in (("fo", "none"), ("fo", "lora"), ("zo", "none"), ("bilevel", "lora"))
    )
    assert {row.memory.weights for row in rows.values()} == {count * size + buffers}
    assert full.parameters == mezo.parameters == count
    assert full.memory.optimizer == 2 * count * size + 4 * tensors
    assert full.memory.gradients == count * size  # one token: at the peak all of them are there
    rank = lora.parameters  # numbers of one adapter, which is in float32 always
    assert lora.memory.adapters == 4 * rank
    assert bilevel.memory.adapters == 2 * 4 * rank
    assert bilevel.parameters == count + 2 * rank
    of_twins = 2 * lora.memory.optimizer
    assert lora.memory.optimizer > 2 * 4 * rank
    assert bilevel.memory.optimizer == of_twins
    assert mezo.memory.adapters == mezo.memory.gradients == mezo.memory.optimizer == 0
    assert all(row.memory.libraries > 100e6 for row in rows.values())
    assert [key for key, row in rows.items() if row.chosen] == [("bilevel", "lora")]


def test_each_task_has_adapters_and_states_of_its_own_unless_they_are_shared(tmp_path, model_folder):
    tasks = [str(write_task(tmp_path / name).rename(tmp_path / name / f"{name}.yaml")) for name in "abc"]
    keys = {"model": str(model_folder), "method": "bilevel"}
    alone = rows_of(tmp_path, task=tasks[0], **keys)
    for shared, kept in ((True, 1), (False, 4)):  # those in the model, and a copy for each of the three
        several = rows_of(tmp_path, task=tasks, shared_adapter=shared, **keys)
        for key in (("bilevel", "lora"), ("fo", "lora"), ("fo", "none")):
            one, all_of_them = alone[key].memory, several[key].memory
            copies = 1 if key == ("fo", "none") else kept
            assert all_of_them.adapters == copies * one.adapters
            assert all_of_them.optimizer == copies * one.optimizer
            assert all_of_them.weights == one.weights


@pytest.mark.parametrize(("method", "adapter"), [("fo", "lora"), ("zo", "none")])
def test_activations_grow_with_the_batch_and_not_with_accumulation(tmp_path, model_folder, method, adapter):
    sizes = {}
    for batch, accumulation in ((2, 1), (8, 1), (2, 4)):
        keys = {"model": str(model_folder), "gradient_accumulation_steps": accumulation, "use_cpu": True}
        config = ZOFOConfig(output_dir=str(tmp_path), method=method, adapter=adapter, loss="lm", **keys)
        tokens = torch.zeros(batch, 64, dtype=torch.long)
        scored = torch.cartesian_prod(torch.arange(batch), torch.arange(64), torch.tensor([0])).T
        rows = {"input_ids": tokens, "attention_mask": tokens + 1, "scored": scored}
        sizes[batch, accumulation] = step_memory(config, fake(config), rows).activations
    assert sizes[8, 1] > 2.5 * sizes[2, 1]
    assert sizes[2, 4] < 1.1 * sizes[2, 1]


@pytest.mark.parametrize(("method", "adapter"), [("two_stage", "lora"), ("bilevel", "prefix")])
def test_the_methods_of_a_run_get_a_row_of_their_own(tmp_path, model_folder, method, adapter):
    rows = rows_of(tmp_path, model=str(model_folder), method=method, adapter=adapter)
    assert [key for key, row in rows.items() if row.chosen] == [(method, adapter)]
    assert len(rows) == (4 if method == "bilevel" else 5)


def test_the_time_is_composed_as_documented(tmp_path):
    times = Work(backwards=1.0, updates=10.0, forwards=100.0, zo_updates=1000.0)
    keys = {"gradient_accumulation_steps": 3, "lower_steps": 4, "num_perturbations": 2, "two_stage_fraction": 0.25}
    keys = {**keys, "penalty": 1.0}
    config = ZOFOConfig(output_dir=str(tmp_path), use_cpu=True, zo_learning_rate=1e-6, **keys)
    automatic = dataclasses.replace(config, zo_learning_rate="auto")

    def of(config, method):
        return seconds(METHODS[method].work(config), times)

    assert of(automatic, "zo") == pytest.approx(3 * 4.1 * 100 + 1000)
    assert of(config, "fo") == 3 + 10
    assert of(config, "zo") == 3 * 4 * 100 + 1000
    assert of(config, "two_stage") == 0.25 * 13 + 0.75 * 2200
    # of one micro-step each: 5 gradients of F and G and 1 of the penalty; F, G(p) and G(s) near θ
    assert of(config, "bilevel") == 3 * 6 + 5 * 10 + 3 * 1200 + 1000
    config = dataclasses.replace(config, penalty=0.0, zo_estimator="one_sided")
    assert of(config, "bilevel") == 3 * 5 + 5 * 10 + 3 * 3 * 100 + 1000


def test_the_work_of_a_population_is_its_passes_over_a_batch(tmp_path):
    keys = {"zo_distribution": "low_rank", "num_perturbations": 4, "zo_learning_rate": 1e-3}
    for rows, estimator, passes in (
        ("own", "two_sided", 2), ("own", "one_sided", 2), ("shared", "two_sided", 8), ("shared", "one_sided", 5),
    ):  # fmt: skip
        config = ZOFOConfig(output_dir=str(tmp_path), use_cpu=True, zo_rows=rows, zo_estimator=estimator, **keys)
        assert METHODS["zo"].work(config) == Work(forwards=passes, zo_updates=1)


@pytest.mark.parametrize("method", ["zo", "bilevel"])
def test_a_population_takes_the_memory_of_all_rows_that_share_a_forward(tmp_path, model_folder, method):
    keys = {"model": str(model_folder), "num_perturbations": 4, "zo_distribution": "low_rank", "penalty": 1.0}
    adapter = "none" if method == "zo" else "lora"

    def activations(**more):
        return row_of(tmp_path, method=method, adapter=adapter, zo_eps=1e-3, **keys, **more).memory.activations

    single, own, shared = (activations(**more) for more in ({"zo_members_per_forward": 1}, {}, {"zo_rows": "shared"}))
    assert single < own < shared
    assert shared > 2 * own  # 8 times the rows of a batch, against twice


def test_every_method_is_timed(tmp_path, model_folder):
    rows = rows_of(tmp_path, timed=True, model=str(model_folder), lower_steps=2)
    assert all(row.seconds > 0 for row in rows.values())
    assert rows["bilevel", "lora"].seconds > 2 * rows["fo", "lora"].seconds


def test_a_table_of_one_s_own_is_read(tmp_path, model_folder):
    lines = [f"the film number {i} was seen,{'good' if i % 2 else 'bad'}" for i in range(40)]
    (tmp_path / "r.csv").write_text("\n".join(["text,label", *lines]))
    keys = {"model": str(model_folder), "max_length": 64, "method": "fo"}
    whole, own = (
        row_of(tmp_path, **keys, **more).memory.activations
        for more in ({}, {"data": str(tmp_path / "r.csv"), "text": "text", "label": "label"})
    )
    assert own < 0.9 * whole  # rows of max_length otherwise


def test_an_adapter_that_zeroth_order_moves_is_timed_by_itself(tmp_path, model_folder, monkeypatch):
    moved, level = [], estimates.ZerothOrderLevel
    monkeypatch.setattr(
        estimates,
        "ZerothOrderLevel",
        lambda adapted, named, config: moved.append(set(named)) or level(adapted, named, config),
    )
    keys = {"method": "zo", "adapter": "lora", "zo_parameters": None}
    rows = rows_of(tmp_path, timed=True, model=str(model_folder), **keys)
    assert rows["zo", "lora"].seconds > 0
    assert [all("lora" in name for name in names) for names in moved] == [True, False, False]


def test_the_run_s_own_method_comes_first_and_before_the_others_are_looked_at(tmp_path, model_folder, monkeypatch):
    looked, memory = [], estimates.step_memory
    monkeypatch.setattr(
        estimates, "step_memory", lambda config, *rest: looked.append(config.method) or memory(config, *rest)
    )
    keys = {**BATCH, "model": str(model_folder), "method": "zo", "adapter": "none", "use_cpu": True}
    rows = estimate(ZOFOConfig(output_dir=str(tmp_path), **keys), timed=False)
    assert next(rows).chosen
    assert looked == ["zo"]
    assert [(row.method, row.adapter) for row in rows] == [("fo", "none"), ("fo", "lora"), ("bilevel", "lora")]


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ("fo", {"num_train_epochs": 1.5}),
        ("fo", {"max_steps": 7}),
        ("bilevel", {"num_train_epochs": 3}),
        ("bilevel", {"num_train_epochs": 1.5}),
        ("two_stage", {"num_train_epochs": 3}),
    ],
)
def test_steps_are_those_that_the_run_takes(tmp_path, model_folder, method, length):
    task = write_task(tmp_path / "task")
    keys = {"model": str(model_folder), "task": str(task), "method": method, **length, "gradient_accumulation_steps": 2}
    keys |= {"lower_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    keys |= {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 3,
        "use_cpu": True,
        "report_to": "none",
    }
    config = ZOFOConfig(**keys)
    row = next(estimate(config, timed=False))
    train(config, lambda line: None)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == row.steps


def test_the_command_prints_a_table_and_writes_the_same_once(capsys, tmp_path, model_folder):
    keys = {"model": model_folder, "task": write_task(tmp_path / "task"), "output": tmp_path / "estimate.json"}
    words = [*arguments("estimate", **{**QUICK, **keys}), "--memory_only"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "\n> fo       lora " in text
    written = json.loads(keys["output"].read_text())
    (row,) = (row for row in written["rows"] if row["chosen"])
    assert row["memory"]["peak"] == sum(size for name, size in row["memory"].items() if name != "peak")
    assert f"{row['memory']['peak'] / 2**20:,.0f}" in text
    assert row["seconds"] is None
    assert "exists already and is not overwritten" in refused(capsys, words, tmp_path)


BAD = {
    "no model": ({"model": None}, "model is not given: add model: ... to the config"),
    "a model that is not there": ({"model": "none.gguf"}, "there is no file none.gguf"),
    "an unknown key": ({"penlty": 1}, "unknown key 'penlty': did you mean penalty?"),
    "an unknown task": ({"task": "movie_review"}, "there is no task 'movie_review'"),
    "an unknown adapter": ({"adapter": "loar"}, "adapter is 'loar'"),
    "nothing to train": ({"method": "none", "adapter": "none"}, "method none trains nothing"),
    "more directions than rows": (
        {"method": "zo", "adapter": "none", "zo_distribution": "low_rank", "num_perturbations": 99},
        "num_perturbations is 99, but",
    ),
    "more rows than exist": ({"train_size": 41}, "train_size is 41, but only 40 rows are left for it"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(capsys, tmp_path, model_folder, changes, message):
    keys = {**QUICK, "model": model_folder, "task": write_task(tmp_path / "task"), **changes}
    assert message in failed(capsys, arguments("estimate", **keys))


_BOTH = """
import json, os, sys
from zofo import cli
from zofo.commands import estimate
words = sys.argv[1:]
for verb, more in (("estimate", ["--memory_only", "--output", "estimate.json"]), ("train", [])):
    child = os.fork()  # each in a process of its own, with the libraries loaded once
    if not child:
        os._exit(cli.main([verb, *words, *more]))
    assert os.waitpid(child, 0)[1] == 0, verb
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, and a peak that can be reset")
def test_a_run_in_a_process_of_its_own_peaks_where_the_estimate_says(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    model = save_tiny_model(tmp_path / "model", **sizes)
    rows = [{"text": "the film was great and i would see it again " * 9 + str(n), "label": n % 2} for n in range(60)]
    keys = {
        **QUICK, "model": model, "task": write_task(tmp_path / "task", rows=rows), "output_dir": tmp_path / "run",
        "method": "bilevel", "max_length": 96, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = arguments(**keys)[1:]
    command = [sys.executable, "-W", "ignore", "-c", _BOTH, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in json.loads((tmp_path / "estimate.json").read_text())["rows"] if row["chosen"])
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["cost"]["peak_memory_bytes"]
    assert row["memory"]["activations"] > 40e6
    assert measured == pytest.approx(row["memory"]["peak"], rel=0.15)
    # and not only because of the libraries
    assert measured - row["memory"]["libraries"] > 0.9 * (row["memory"]["peak"] - row["memory"]["libraries"])
