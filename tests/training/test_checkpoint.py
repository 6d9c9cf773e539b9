"""Checkpoints that do not know a key: it counts as its default; all else must be the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from plain import make_trainer, same, trained, weights
from zofo import ZOFOConfig, ZofoError
from zofo.config import own_keys
from zofo.training.checkpoint import SEAL, loading, require_same, writing
from zofo.training.rehearsal import require_schedule_and_batches
from zofo.training.start import setting_up

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def older(folder, *unknown):
    """Turns the first checkpoint of a run into one of a version that did not know some keys; returns its path."""
    seal = folder / "checkpoint-2" / SEAL
    content = json.loads(seal.read_text())
    for key in unknown:
        content["config"].pop(key, None)  # a key that the method does not use is not there
    seal.write_text(json.dumps(content))
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    "keys", [{}, {"method": "zo", "adapter": "none"}, {"method": "fo"}, {"method": "two_stage"}], ids=str
)
def test_a_checkpoint_without_a_newer_key_goes_on_bit_for_bit(tmp_path, keys):
    whole, _ = trained(tmp_path, **SAVING, **keys)
    first = older(tmp_path, "zo_distribution", "zo_sparsity", "zo_optimizer")
    again = make_trainer(tmp_path / "again", **SAVING, **keys)
    again.train(resume_from_checkpoint=first)
    for part, values in whole.items():
        assert same(values, weights(again.adapted, part))


def test_a_newer_key_that_is_not_at_its_default_is_refused(tmp_path):
    trained(tmp_path, **SAVING)
    first = older(tmp_path, "zo_distribution")
    other = make_trainer(tmp_path / "other", **SAVING, zo_distribution="rademacher")
    with pytest.raises(ZofoError, match=r"was written with zo_distribution = 'normal', but now it is 'rademacher'"):
        other.train(resume_from_checkpoint=first)


# The last one follows another key, so that its default says nothing.
NOT_BY_DEFAULT = ("overwrite_output_dir", "on_nonfinite", "upper_learning_rate")


@pytest.mark.parametrize("key", [key for key in own_keys() if key not in NOT_BY_DEFAULT])
def test_every_key_of_zofo_counts_as_its_default_where_it_is_missing(tmp_path, key):
    current = ZOFOConfig(output_dir="run", use_cpu=True).identity()
    require_same({name: value for name, value in current.items() if name != key}, current, tmp_path)
    with pytest.raises(ZofoError, match=f"was written with {key} = "):
        require_same(current, {**current, key: "another"}, tmp_path)


def rehearsed(fail):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    require_schedule_and_batches(optimizer, schedule=lambda: None, batch=fail)


def loaded(fail):
    with loading(Path("run/checkpoint-1")):
        fail()


def set_up(fail):
    with setting_up(ZOFOConfig(output_dir="run", use_cpu=True, report_to=["tensorboard"])):
        fail()


def fill_memory():
    torch.empty(1 << 60, dtype=torch.uint8)


def fill_accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB in all.")


def refuse_matrices():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("fail", [fill_memory, fill_accelerator, refuse_matrices])
@pytest.mark.parametrize("guarded", [rehearsed, loaded, set_up])
def test_a_lack_of_memory_is_not_taken_for_damage_or_for_a_wrong_key(guarded, fail):
    with pytest.raises(RuntimeError) as caught:
        guarded(fail)
    with pytest.raises(type(caught.value)) as plain:
        fail()
    assert str(caught.value) == str(plain.value)


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
    RuntimeError("basic_ios::clear: iostream error"),
    Exception("Permission denied (os error 13)"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_whatever_a_writer_raises_where_a_disk_is_full_is_said_in_one_line(error):
    with (
        pytest.raises(ZofoError, match=r"cannot write run .*: free space or choose"),
        writing("run"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("a"), ZofoError("b")]
)
def test_what_is_no_fault_of_the_disk_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, writing("run"):
        raise error
    assert caught.value is error
