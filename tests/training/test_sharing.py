"""A backbone that does not change is on the disk once, and every folder of the run is complete all the same."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from plain import Watch, make_trainer, same, trained, weights, write_config, write_task
from tiny import save_tiny_model
from zofo.cli import main
from zofo.training import checkpoint
from zofo.training.checkpoint import require_whole

KEYS = {"method": "fo", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
STEPS = (1, 2, 3)


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def on_disk(folder):
    """Bytes of the files of a folder, where each counts once whatever number of names it has."""
    return sum({file.stat().st_ino: file.stat().st_size for file in files(folder)}.values())


def state(folder):
    """What must not change in a folder that nobody writes."""
    found = {file: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files(folder)}
    assert found
    return found


def nodes(backbone):
    return {file.name: file.stat().st_ino for file in files(backbone)}


def no_links(monkeypatch):
    def refuse(*args, **keys):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)


def test_a_run_holds_the_bytes_of_one_backbone(tmp_path, monkeypatch):
    folder = write_task(tmp_path)
    more = {"train_size": 18, "dev_size": 4, "test_size": 4, "per_device_train_batch_size": 2}
    config = write_config(folder, "config", **KEYS, **more)
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "linked")]) == 0
    no_links(monkeypatch)
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "copied")]) == 0
    linked, copied = folder / "linked", folder / "copied"
    names = [[file.relative_to(run) for file in files(run)] for run in (linked, copied)]
    assert names[0] == names[1]
    backbone = sum(file.stat().st_size for file in files(linked / "backbone"))
    assert on_disk(copied) - on_disk(linked) == pytest.approx(3 * backbone, abs=500)  # the times in the other files
    parts = [run / "backbone" for run in (linked, *(linked / f"checkpoint-{step}" for step in STEPS))]
    assert len({tuple(nodes(part).items()) for part in parts}) == 1
    for file in files(copied):
        assert file.stat().st_nlink == 1
    for file in files(folder / "model"):
        assert file.stat().st_nlink == 1
    for run in (linked, copied):
        for step in STEPS:
            require_whole(run / f"checkpoint-{step}")
    for file in files(linked / "backbone"):
        assert file.read_bytes() == (copied / "backbone" / file.name).read_bytes()


@pytest.mark.parametrize("kept", STEPS)
def test_every_checkpoint_loads_by_itself(tmp_path, kept):
    trainer = make_trainer(tmp_path, **KEYS)
    logits = {}
    ids = torch.arange(3, 20)[None]

    def note():
        with torch.no_grad():
            logits[trainer.state.global_step] = trainer.adapted.model.eval()(input_ids=ids).logits

    trainer.add_callback(Watch(after=note))
    trainer.train()
    for step in STEPS:
        if step != kept:
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
    folder = tmp_path / f"checkpoint-{kept}"
    require_whole(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "backbone"), folder / "upper")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, logits[kept])
    assert len(AutoTokenizer.from_pretrained(folder / "backbone")) > 100


def test_a_run_that_goes_on_shares_with_the_checkpoint_it_came_from(tmp_path):
    whole, _ = trained(tmp_path / "whole", **KEYS)
    run = tmp_path / "run"
    make_trainer(run, **{**KEYS, "max_steps": 2}).train()
    before = state(run / "checkpoint-2")
    again = make_trainer(run, **KEYS)
    again.train(resume_from_checkpoint=True)
    assert state(run / "checkpoint-2") == before
    assert nodes(run / "checkpoint-3" / "backbone") == nodes(run / "checkpoint-1" / "backbone")
    for part, values in whole.items():
        assert same(values, weights(again.adapted, part))
    other = make_trainer(tmp_path / "other", **KEYS)
    other.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    nodes_of_run = nodes(run / "checkpoint-2" / "backbone").values()
    assert not set(nodes_of_run) & set(nodes(tmp_path / "other" / "checkpoint-3" / "backbone").values())


class Killed(BaseException):
    """Ends a run as a signal would."""


def kill_at(monkeypatch, module, name, call):
    """Ends the run at one call of a function, before which it has done half of its work."""
    real, calls = vars(module)[name], []

    def dying(*args, **keys):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **keys)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("call", [1, 3])
def test_a_kill_while_files_are_shared_harms_no_other_checkpoint(tmp_path, monkeypatch, call, links):
    whole, _ = trained(tmp_path / "whole", **KEYS)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if not links:
            no_links(patch)
        kill_at(patch, *((os, "link") if links else (shutil, "copyfile")), call)
        with pytest.raises(Killed):
            make_trainer(run, **KEYS).train()
    assert not (run / "checkpoint-2" / "seal.json").exists()
    before = state(run / "checkpoint-1")
    again = make_trainer(run, **KEYS)
    again.train(resume_from_checkpoint=True)
    assert state(run / "checkpoint-1") == before
    for step in STEPS:
        require_whole(run / f"checkpoint-{step}")
    for part, values in whole.items():
        assert same(values, weights(again.adapted, part))


def test_a_backbone_that_is_written_anew_leaves_those_that_it_was_shared_with(tmp_path, monkeypatch):
    """A half-written checkpoint of links is met by a run that came from elsewhere, and that is killed as well."""
    run = tmp_path / "run"
    make_trainer(run, **KEYS).train()
    shutil.copytree(run / "checkpoint-1", tmp_path / "elsewhere")
    (run / "checkpoint-2" / "seal.json").unlink()
    before = [state(run / f"checkpoint-{step}") for step in (1, 3)]

    def half(tensors, file, **keys):
        with open(file, "wb") as content:
            content.write(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", half)
        with pytest.raises(Killed):
            make_trainer(run, **KEYS).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert (run / "checkpoint-2" / "backbone" / "model.safetensors").read_bytes() == b"half"
    assert [state(run / f"checkpoint-{step}") for step in (1, 3)] == before
    again = make_trainer(run, **{**KEYS, "max_steps": 2})
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert [state(run / f"checkpoint-{step}") for step in (1, 3)] == before
    assert nodes(run / "checkpoint-2" / "backbone") != nodes(run / "checkpoint-1" / "backbone")
    again.save_model(str(run / "checkpoint-3"))
    assert state(run / "checkpoint-1") == before[0]


def test_what_is_saved_by_hand_is_not_shared(tmp_path):
    trainer = make_trainer(tmp_path / "run", **KEYS)
    trainer.train()
    trainer.save_model(str(tmp_path / "mine"))
    trainer.save_model()
    for folder in (tmp_path / "mine", tmp_path / "run" / "backbone"):
        assert {file.stat().st_nlink for file in files(folder)} == {1}


def test_removing_old_checkpoints_leaves_the_last_one_whole(tmp_path):
    make_trainer(tmp_path, **KEYS, save_total_limit=1).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    require_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("how", ["edited", "linked"])
def test_a_backbone_that_is_not_what_was_sealed_is_not_shared(tmp_path, how):
    trainer = make_trainer(tmp_path, **{**KEYS, "max_steps": 2})
    file = tmp_path / "checkpoint-1" / "backbone" / "config.json"

    def change():
        if trainer.state.global_step == 1 and how == "edited":
            file.write_text(json.dumps({"mine": True}))
        elif trainer.state.global_step == 1:
            file.rename(tmp_path / "config.json")
            file.symlink_to(tmp_path / "config.json")

    trainer.add_callback(Watch(before=change))
    trainer.train()
    require_whole(tmp_path / "checkpoint-2")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2" / "backbone").config.model_type == "llama"
    assert {file.stat().st_nlink for file in files(tmp_path)} == {1}


@pytest.mark.parametrize("keys", [{"method": "bilevel"}, {"method": "zo", "adapter": "none"}], ids=str)
def test_a_backbone_that_changes_is_not_shared(tmp_path, keys):
    make_trainer(tmp_path, **{**KEYS, **keys}).train()
    assert {file.stat().st_nlink for file in files(tmp_path)} == {1}


def test_a_shared_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    make_trainer(tmp_path, **KEYS).train()
    read = []
    real = checkpoint.hashlib.file_digest
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda f, kind: read.append(f.name) or real(f, kind))
    for step in STEPS:
        require_whole(tmp_path / f"checkpoint-{step}")
    assert not [name for name in read if "/backbone/" in name]
    file = tmp_path / "checkpoint-1" / "backbone" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for step in STEPS:
        with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
            require_whole(tmp_path / f"checkpoint-{step}")


def test_a_model_is_not_saved_through_a_name_that_something_else_has(tmp_path):
    """As `cp -al` leaves it."""
    trainer = make_trainer(tmp_path / "run", **{**KEYS, "method": "bilevel", "save_strategy": "no"})
    save_tiny_model(tmp_path / "mine")
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    for file in files(tmp_path / "mine"):
        os.link(file, tmp_path / "run" / "backbone" / file.name)
    before = {file: file.read_bytes() for file in files(tmp_path / "mine")}
    trainer.train()
    trainer.save_model()
    assert {file: file.read_bytes() for file in files(tmp_path / "mine")} == before
