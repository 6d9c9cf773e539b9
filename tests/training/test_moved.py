"""A run goes on in another place: files are known by what they hold, and a resumed run still shares all else."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plain import same
from shell import QUICK, arguments, failed, write_task
from tiny import save_tiny_model
from zofo.cli import main

KEYS = {
    **QUICK, "model": "model", "task": "task.yaml", "output_dir": "run", "save_strategy": "steps", "save_steps": 1,
    "train_size": 20, "seed": 3,
}  # fmt: skip
MORE = {**KEYS, "max_steps": 3, "resume_from_checkpoint": "true"}
ADAPTERS = {"lora": {}, "none": {"adapter": "none"}, "file": {"adapter": "mine.json"}, "start": {"adapter_init": "p"}}
TABLE = {"task": None, "data": "rows.csv", "text": "text", "label": "label"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with all that a run reads, which is the working directory."""
    folder = write_task(tmp_path / "project").parent
    save_tiny_model(folder / "model")
    (folder / "rows.csv").write_text(
        "text,label\n" + "".join(f"film {n},{'no' if n % 2 else 'yes'}\n" for n in range(60))
    )
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(folder / "config")
    (folder / "config" / "adapter_config.json").rename(folder / "mine.json")
    monkeypatch.chdir(folder)
    return folder


def run(**keys):
    assert main(arguments(**keys)) == 0


def moved(project, monkeypatch, how="moved"):
    """The project in another place, which is the working directory then."""
    place = project.parent / "elsewhere" / "further"
    place.parent.mkdir()
    monkeypatch.chdir(project.parent)
    if how == "moved":
        project.rename(place)
    else:
        shutil.copytree(project, place)
    monkeypatch.chdir(place)
    return place


def started(**keys):
    """A run with the keys, after a run whose adapter it may start from."""
    if "adapter_init" in keys:
        run(**{**KEYS, "output_dir": "first"})
        os.replace("first/upper", "p")
    run(**{**KEYS, **keys})


@pytest.mark.parametrize(
    ("keys", "how"),
    [*((keys, "moved") for keys in (*ADAPTERS.values(), TABLE, {"source": "rows.jsonl"})), (TABLE, "copied")],
    ids=str,
)
def test_a_project_that_was_moved_goes_on_bit_for_bit(project, monkeypatch, keys, how):
    started(**keys)
    run(**{**KEYS, **keys, "max_steps": 3, "output_dir": "whole"})
    place = moved(project, monkeypatch, how)
    run(**{**MORE, **keys})
    files = [*place.glob("whole/*/*.safetensors")]
    assert files
    for file in files:
        assert same(load_file(file), load_file(place / "run" / file.relative_to(place / "whole")))
    if how == "copied":
        assert not (project / "run" / "checkpoint-3").exists()


def test_a_file_may_be_renamed(project):
    run(**KEYS, adapter="mine.json")
    for old, new in (("model", "base"), ("task.yaml", "words.yaml"), ("mine.json", "lora.json")):
        os.replace(old, new)
    run(**{**MORE, "model": "base", "task": "words.yaml", "adapter": "lora.json"})


def test_another_model_is_refused(capsys, project):
    run(**KEYS)
    save_tiny_model(project / "other", seed=1)
    line = failed(capsys, arguments(**{**MORE, "model": "other"}))
    assert re.search(
        "checkpoint-2 was written with model = .*, but now it is 'other .sha256 [0-9a-f]{16}.': resume", line
    )


@pytest.mark.parametrize("change", ["weights", "config"])
def test_another_model_at_the_same_place_is_refused(capsys, project, change):
    run(**KEYS)
    config = json.loads((project / "model" / "config.json").read_text())
    if change == "weights":
        shutil.rmtree(project / "model")
        save_tiny_model(project / "model", seed=1)
    else:
        (project / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "checkpoint-2 was written with model = 'model (sha256 " in failed(capsys, arguments(**MORE))


def test_another_task_or_adapter_at_the_same_place_is_refused(capsys, project):
    started(adapter="mine.json")
    before = (project / "task.yaml").read_text()
    write_task(project, prompt="{{ text }} It seemed")
    assert "on other training rows" in failed(capsys, arguments(**MORE, adapter="mine.json"))
    (project / "task.yaml").write_text(before)
    config = json.loads((project / "mine.json").read_text())
    (project / "mine.json").write_text(json.dumps({**config, "r": 4}))
    line = failed(capsys, arguments(**MORE, adapter="mine.json"))
    assert "was written with peft_config = {'r': 2}, but now it is {'r': 4}" in line


def test_another_adapter_to_start_from_is_refused(capsys, project):
    started(adapter_init="p")
    run(**{**KEYS, "output_dir": "second", "seed": 4})
    shutil.rmtree("p")
    os.replace("second/upper", "p")
    line = failed(capsys, arguments(**MORE, adapter_init="p"))
    assert "was written with adapter_init = 'p (sha256 " in line


def test_a_task_or_a_model_that_is_gone_is_the_ordinary_error(capsys, project):
    run(**KEYS)
    assert "nosuch.yaml" in failed(capsys, arguments(**{**MORE, "task": "nosuch.yaml"}))
    os.replace("task.yaml", "gone.yaml")
    assert "task.yaml" in failed(capsys, arguments(**MORE))
    assert "but now it is 'nosuch'" in failed(capsys, arguments(**{**MORE, "task": "gone.yaml", "model": "nosuch"}))


def test_peft_finds_the_backbone_where_it_was_written_and_beside_a_moved_adapter(capsys, project, monkeypatch):
    """As docs/models.md and the card say."""
    run(**KEYS)
    AutoPeftModelForCausalLM.from_pretrained("run/upper")
    rows = {"task": "task.yaml", "model": "run/backbone", "adapter": "run/upper"}
    capsys.readouterr()
    run_of("eval", **rows)
    run_of("merge", run="run", output="merged")
    assert "AutoPeft" not in "".join(capsys.readouterr())
    moved(project, monkeypatch)
    with pytest.raises(OSError, match="run/backbone"):
        AutoPeftModelForCausalLM.from_pretrained("run/upper")
    os.chdir("run")
    assert (
        "`AutoPeftModelForCausalLM` finds the backbone only where this run was trained" in Path("README.md").read_text()
    )
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("backbone"), "upper")
    os.chdir("..")
    for verb, keys in (("eval", rows), ("merge", {"run": "run", "output": "again"})):
        run_of(verb, **keys)
        said = "".join(capsys.readouterr())
        assert (
            f"upper was moved: AutoPeftModelForCausalLM would look for its backbone in {project}/run/backbone;" in said
        )
    run(**MORE)
    AutoPeftModelForCausalLM.from_pretrained("run/upper")


def run_of(verb, **keys):
    assert main(arguments(verb, **keys)) == 0
