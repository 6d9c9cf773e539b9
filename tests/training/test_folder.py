"""A run folder: one writer at a time, nothing removed that is not a run's, and no mixture of two runs, ever."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zofo import ZofoError
from zofo.training import folder as folders
from zofo.training.checkpoint import seal
from zofo.training.folder import (
    claim,
    drop_old,
    final_parts,
    owned,
    reading,
    replacing,
    require_free,
    require_own,
    settle,
    settle_parts,
    written,
)

PARTS = ("backbone/model.safetensors", "upper/adapter_model.safetensors", "results.json", "README.md")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save_final(run, word, parts=PARTS):
    with final_parts(run) as new:
        for part in parts:
            put(new / part, word)
        seal(new, {})


def save_checkpoint(run, word):
    claim(run, "checkpoint-1")
    put(run / "checkpoint-1" / "weights", word)
    seal(run / "checkpoint-1", {"config": {}, "cost": {}})
    drop_old(run)


def begin(run, word, checkpoint=True, parts=PARTS):
    """A new run from its first to its last file."""
    with owned(run), replacing(run, {"config.yaml": word}):
        if checkpoint:
            save_checkpoint(run, word)
        save_final(run, word, parts)


def go_on(run, word):
    """A run that goes on from its checkpoint and ends anew."""
    with owned(run):
        save_final(run, word)


def words(run):
    """{file: its content}, without seals and what zofo notes for itself; no such note may be left of anything begun."""
    left = {f.name for f in run.glob(".zofo.*")} - {".zofo.json", ".zofo.lock"}
    assert not left
    files = [f for f in run.rglob("*") if f.is_file() and not f.name.startswith(".zofo") and f.name != "seal.json"]
    return {f.relative_to(run).as_posix(): f.read_text() for f in files}


class Killed(BaseException):
    """Nothing that a process would still do happens after it."""


@pytest.fixture
def kill(monkeypatch):
    """kill(n, function): runs it until it changes the file system for the n-th time; whether it came that far."""

    def killed(number, function):
        calls = 0

        def counting(change):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= number:
                    raise Killed
                return change(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counting(os.replace))
            patch.setattr(shutil, "rmtree", counting(shutil.rmtree))
            for name in ("mkdir", "rmdir", "unlink", "write_text", "replace"):
                patch.setattr(Path, name, counting(getattr(Path, name)))
            try:
                function()
            except Killed:
                return True
        return False

    return killed


def finals(found):
    return {name: text for name, text in found.items() if name in PARTS}


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_new_run_killed_at_any_moment_leaves_the_old_one_or_something_whole(tmp_path, kill, checkpoint):
    number, seen = 1, set()
    while True:
        run = tmp_path / str(number)
        begin(run, "old", parts=(*PARTS, "curves.png"))
        old = words(run)
        if not kill(number, lambda run=run: begin(run, "new", checkpoint)):
            break
        settle(run)
        found = words(run)
        if found != old:
            assert set(found.values()) == {"new"}  # nothing of both
            whole = (run / "checkpoint-1" / "seal.json").exists() or finals(found) == dict.fromkeys(PARTS, "new")
            assert whole
            assert finals(found) in ({}, dict.fromkeys(PARTS, "new"))
        assert set(written(run)) == {name.split("/")[0] for name in found}
        seen.add("old" if found == old else "new")
        number += 1
    assert number > 20
    assert seen == {"old", "new"}


def test_a_final_save_killed_at_any_moment_is_finished_or_undone(tmp_path, kill):
    number, seen = 1, set()
    while True:
        run = tmp_path / str(number)
        begin(run, "old")
        if not kill(number, lambda run=run: go_on(run, "new")):
            break
        with reading(run):
            pass
        settle(run)
        found = finals(words(run))
        assert found in (dict.fromkeys(PARTS, "old"), dict.fromkeys(PARTS, "new"))
        seen |= set(found.values())
        number += 1
    assert number > 10
    assert seen == {"old", "new"}


def test_settling_may_be_killed_as_well(tmp_path, kill):
    seen = set()
    for first in range(8, 60, 5):  # of a run's changes
        for second in range(1, 30):  # of what settling changes
            run = tmp_path / f"{first}-{second}"
            begin(run, "old")
            if not kill(first, lambda run=run: begin(run, "new")) or not kill(second, lambda run=run: settle(run)):
                break
            settle(run)
            found = words(run)
            assert set(found.values()) in ({"old"}, {"new"})
            if "old" in found.values():
                assert finals(found) == dict.fromkeys(PARTS, "old")
                assert {"config.yaml", "checkpoint-1/weights"} < found.keys()
            seen |= set(found.values())
    assert seen == {"old", "new"}


def test_a_run_that_fails_puts_back_the_old_one_and_one_with_a_checkpoint_does_not(tmp_path):
    begin(tmp_path, "old")
    old = words(tmp_path)

    def fail(with_checkpoint):
        with owned(tmp_path), replacing(tmp_path, {"config.yaml": "new"}):
            assert words(tmp_path / "nothing") == {}
            if with_checkpoint:
                save_checkpoint(tmp_path, "new")
            raise RuntimeError("no rows")

    with pytest.raises(RuntimeError, match="no rows"):
        fail(with_checkpoint=False)
    assert words(tmp_path) == old
    with pytest.raises(RuntimeError, match="no rows"):
        fail(with_checkpoint=True)
    assert words(tmp_path) == {"config.yaml": "new", "checkpoint-1/weights": "new"}


def test_a_first_run_that_fails_leaves_the_folder_as_it_was(tmp_path):
    run = tmp_path / "some" / "where"

    def fail():
        with owned(run), replacing(run, {"config.yaml": "new"}):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "some").exists()


def test_what_was_sealed_last_is_kept_if_what_comes_after_fails(tmp_path):
    begin(tmp_path, "old")

    def fail():
        with owned(tmp_path), final_parts(tmp_path) as new:
            put(new / "backbone" / "model.safetensors", "new")
            seal(new, {})
            put(new / "results.json", "half")
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert finals(words(tmp_path)) == {"backbone/model.safetensors": "new"}  # no results of another run beside it


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from zofo.training.folder import owned
with owned(Path(sys.argv[1])), owned(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_is_written_by_one_process_until_it_ends_or_is_killed(tmp_path):
    run, old = tmp_path / "run", tmp_path / "old"
    begin(old, "old")
    command = [sys.executable, "-c", HOLD, str(run), str(old)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            before = sorted(run.iterdir())
            with pytest.raises(ZofoError, match=r"run is being written by another run: wait until it has ended, or"):
                owned(run).__enter__()
            assert sorted(run.iterdir()) == before
            (old / ".zofo.old").mkdir()  # of an interrupted replacement, which is not settled
            with pytest.raises(ZofoError, match="is being written by another run"):
                settle_parts(str(old / "backbone"), None)
        finally:
            process.kill()
    with owned(run):
        assert (run / ".zofo.lock").exists()
    assert not (run / ".zofo.lock").exists()


def test_a_process_may_enter_its_own_folder_twice_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with owned(Path("run")), owned(tmp_path / "link"), owned(tmp_path / "run"):
        claim(tmp_path / "run", "config.yaml")
    assert [f.name for f in (tmp_path / "run").iterdir()] == [".zofo.json"]


def test_parts_that_are_replaced_while_they_are_read_are_not_used(tmp_path):
    begin(tmp_path, "old", parts=PARTS)

    def read():
        with reading(tmp_path):
            go_on(tmp_path, "new")
            begin(tmp_path, "newer", parts=PARTS[:2])

    with pytest.raises(ZofoError, match="was written anew while it was read"):
        read()


# ---- whose files


def without_marker(run, **left_out):
    """A run that was copied without its marker."""
    config = {"model": "m", "method": "fo", "adapter": "lora", "zo_eps": 1e-3, "penalty": 1.0}
    results = {"method": "fo", "metrics": {}, "zero_shot": {}, "cost": {}}
    put(run / "config.yaml", yaml.safe_dump({k: v for k, v in config.items() if k not in left_out}))
    put(run / "results.json", json.dumps({k: v for k, v in results.items() if k not in left_out}))
    put(run / "README.md", "a card")
    put(run / "backbone" / "model.safetensors", "weights")
    return run


def test_a_run_without_marker_is_known_by_what_its_files_say(tmp_path):
    run = without_marker(tmp_path / "run")
    assert set(written(run)) == {"config.yaml", "results.json", "README.md", "backbone"}
    require_free(run, True, {})
    for key in ("zo_eps", "zero_shot"):
        assert written(without_marker(tmp_path / key, **{key: True})) == []
    (run / "results.json").unlink()
    assert written(run) == []
    put(run / "checkpoint-1" / "weights", "w")
    seal(run / "checkpoint-1", {"config": {}, "cost": {}})
    assert "backbone" in written(run)


@pytest.mark.parametrize(
    "name", ["config.yaml", "results.json", "backbone", "upper", "checkpoint-3", "trainer_state.json"]
)
def test_files_of_a_run_s_names_that_no_run_has_written_are_not_removed(tmp_path, name):
    put(tmp_path / name / "mine.txt" if "." not in name else tmp_path / name, "mine")
    with pytest.raises(ZofoError, match=rf"holds {name}, and nothing says that a run of zofo wrote it: move it away"):
        require_free(tmp_path, True, {})
    with pytest.raises(ZofoError, match=rf"already holds a run \({name}\)"):
        require_free(tmp_path, False, {})
    with pytest.raises(ZofoError, match="which is also model: choose another output_dir"):
        require_free(tmp_path, False, {"model": tmp_path})


def test_files_beside_and_within_a_run_are_not_removed(tmp_path):
    begin(tmp_path, "old")
    require_free(tmp_path, True, {})
    put(tmp_path / "curves.png", "mine")
    with pytest.raises(ZofoError, match=r"holds curves\.png, and nothing says that a run of zofo wrote it"):
        require_free(tmp_path, True, {})
    with pytest.raises(ZofoError, match=r"holds curves\.png"):
        require_own(tmp_path)
    (tmp_path / "curves.png").unlink()
    for part in ("backbone", "checkpoint-1"):
        put(tmp_path / part / "mine.txt", "mine")
        with pytest.raises(ZofoError, match=rf"{part}/mine\.txt was not written by the run that overwrite_output_dir"):
            require_free(tmp_path, True, {})
        (tmp_path / part / "mine.txt").unlink()
    require_free(tmp_path, True, {})


def test_what_the_new_run_reads_is_not_removed(tmp_path):
    begin(tmp_path, "old")
    for key, path in {"config": tmp_path / "config.yaml", "source": tmp_path / "backbone" / "rows.jsonl"}.items():
        with pytest.raises(ZofoError, match=rf"{key} is {path}, which overwrite_output_dir would remove"):
            require_free(tmp_path, True, {key: path})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"format": 2}', '{"format": 1, "written": ["../mine"], "files": []}', "[" * 10**5]
)
def test_a_marker_that_cannot_be_read_removes_nothing(tmp_path, text):
    begin(tmp_path, "old")
    (tmp_path / folders.MARKER).write_text(text)
    with pytest.raises(ZofoError, match="cannot be read: choose another output_dir"):
        require_free(tmp_path, True, {})


def test_a_marker_that_is_a_folder_removes_nothing(tmp_path):
    begin(tmp_path, "old")
    (tmp_path / folders.MARKER).unlink()
    put(tmp_path / folders.MARKER / "mine.txt", "mine")
    before = sorted(tmp_path.rglob("*"))
    for use in (written, settle_parts_of, lambda run: claim(run, "backbone"), lambda run: require_free(run, True, {})):
        with pytest.raises(ZofoError, match=rf"{folders.MARKER}, where .* cannot be read: choose another output_dir"):
            use(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


def settle_parts_of(run):
    with reading(run):
        pass
