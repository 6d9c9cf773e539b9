"""Who owns a run folder: one process at a time, and what a run may replace is what its marker says it has written.

    .zofo.lock      held by the run that writes the folder
    .zofo.json      the marker: what runs of zofo have written here
    .zofo.new       the final parts, until they are whole; sealed, they take their places one after the other
    .zofo.old       the run before, until its successor has a whole checkpoint or its final parts
    .zofo.aside     the same while it is being moved there, or back
    .zofo.trash     what is being removed

A process that was killed leaves some of these; `settle` finishes what was whole and undoes the rest.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from os.path import lexists
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zofo.errors import ZofoError
from zofo.parse import read_yaml
from zofo.tasks.table import TASK_FILE
from zofo.training.checkpoint import SEAL, checkpoints, read_seal, sealed_files, writing
from zofo.training.trained_rows import FILE as TRAINED_ROWS

MARKER = ".zofo.json"
_HALF = f"{MARKER}.half"
_FORMAT = 1
_LOCK, _NEW, _OLD, _ASIDE, _TRASH = (f".zofo.{name}" for name in ("lock", "new", "old", "aside", "trash"))
TASKS = "tasks"
"""Holds the adapters of each task, where a run has several."""
_RUN = ("config.yaml", "results.json", "backbone", "upper", "lower", TASKS, "trainer_state.json")
PREDICTIONS = "predictions.jsonl"
_BESIDE = (TASK_FILE, "README.md", "curves.png", "tokenizer", TRAINED_ROWS, PREDICTIONS)
_CONFIG_KEYS = {"model", "method", "adapter", "zo_eps"}  # in every config.yaml that a run has written
_RESULT_KEYS = {"method", "metrics", "zero_shot", "cost"}


@contextmanager
def owned(run: Path) -> Generator[None]:
    """Within the block no other process writes this folder; what a killed one has left is settled first.

    Nothing remains of a folder in which the block writes nothing.
    """
    run = run.resolve()  # one lock, however the folder is named
    made = [place for place in (run, *run.parents) if not place.exists()]
    lock = FileLock(run / _LOCK, timeout=0, is_singleton=True)
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ZofoError(
                f"{run} is being written by another run: wait until it has ended, or choose another output_dir"
            ) from error
    try:
        if lock.lock_counter == 1:  # not within another block of the same run
            with writing(run):
                settle(run)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            if lock.lock_counter == 1:
                (run / _LOCK).unlink()
        lock.release()
        for place in made:
            with contextlib.suppress(OSError):  # something has been written there
                place.rmdir()


@contextmanager
def reading(run: Path) -> Generator[None]:
    """Around the loading of a run's parts: an interrupted replacement is settled before, and none happens meanwhile."""
    _settle_interrupted(run)
    before = _marker(run)
    yield
    if _marker(run) != before:
        raise ZofoError(f"{run} was written anew while it was read: wait until its run has ended, and try again")


def settle_parts(*parts: str | None) -> None:
    """Settles what was interrupted in the runs that these folders belong to."""
    for part in parts:
        if part:
            _settle_interrupted(Path(part).expanduser().absolute().parent)


def _settle_interrupted(run: Path) -> None:
    if any((run / name).exists() for name in (_OLD, _ASIDE, f"{_NEW}/{SEAL}")):
        with owned(run):
            pass


def written(run: Path) -> list[str]:
    """The names of what runs of zofo have written in a folder, as far as it is there.

    By the marker. A copy of a run may have none: then its files say so, and not only their names; a sealed checkpoint
    says so of itself.
    """
    marker = _marker(run)
    if (run / MARKER).exists():
        return [name for name in marker["written"] if lexists(run / name)]
    return (
        _present(run)
        if _is_run_without_marker(run)
        else [folder.name for folder in checkpoints(run) if _is_sealed(folder)]
    )


def is_written(run: Path) -> bool:
    """Whether a process is writing this folder now."""
    if not (run / _LOCK).exists():
        return False
    try:
        with FileLock(run / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


def claim(run: Path, *names: str) -> None:
    """Notes in the marker that this run writes these; to be called before they are written."""
    marker = _marker(run)
    if missing := [name for name in names if name not in marker["written"]]:
        _write_marker(run, {**marker, "written": [*marker["written"], *missing]})


def require_free(run: Path, overwrite: bool, read: Mapping[str, Path]) -> None:
    """Refuses a folder for a new run if something there would be lost; `read` is what the run reads, by its key."""
    for key in ("model", "adapter_init", "source"):
        if key in read and run.is_dir() and read[key].expanduser().resolve() == run.resolve():
            raise ZofoError(f"output_dir is {run}, which is also {key}: choose another output_dir")
    present, own = _present(run), written(run)
    if not present and not own:
        return
    held = [name for name in present if name not in _BESIDE] or own
    if not held:
        raise ZofoError(f"{run} holds {present[0]}, but no run that could be removed: choose another output_dir")
    if not overwrite:
        raise ZofoError(
            f"{run} already holds a run ({held[0]}): choose another output_dir, resume_from_checkpoint: true to "
            "go on, or overwrite_output_dir: true to remove it"
        )
    for key, path in read.items():
        given = path.expanduser().resolve()
        if any((run / name).resolve() in (given, *given.parents) for name in (*own, *present)):
            raise ZofoError(
                f"{key} is {given}, which overwrite_output_dir would remove with the run in {run}: choose another "
                "output_dir"
            )
    require_own(run)
    _require_no_guests(run, own)


def require_own(run: Path) -> None:
    """Refuses a folder with files of the names that a run writes, if no run of zofo has written them."""
    own = written(run)
    if strange := [name for name in _present(run) if name not in own]:
        raise ZofoError(
            f"{run} holds {strange[0]}, and nothing says that a run of zofo wrote it: move it away, or choose another "
            "output_dir"
        )


@contextmanager
def replacing(run: Path, texts: Mapping[str, str]) -> Generator[None]:
    """A new run, which begins with these texts, in place of the one that the folder may hold.

    The old one is removed once the new one has a whole checkpoint or its final parts, and is put back if the new one
    fails before that.
    """
    with writing(run):
        _set_aside(run)
    try:
        with writing(run):
            claim(run, *texts)
            for name, text in texts.items():
                (run / name).write_text(text, encoding="utf-8")
        yield
    finally:
        settle(run)


@contextmanager
def final_parts(run: Path) -> Generator[Path]:
    """A hidden folder in which the final parts are written and sealed; at the end they take their places together.

    Whatever was sealed last counts, also if the block raises later; what was not sealed is removed.
    """
    new = run / _NEW
    with writing(run):
        _remove(new)
        new.mkdir()
    try:
        yield new
    finally:
        with writing(run):
            settle(run)


def drop_old(run: Path) -> None:
    """Removes the run before, whose successor has something whole now."""
    if (run / _OLD).exists():
        os.replace(run / _OLD, _fresh_trash(run) / _OLD)
        _remove(run / _TRASH)


def settle(run: Path) -> None:
    """Finishes or undoes what a process had begun in this folder; may itself be killed at any moment."""
    for name in (_TRASH, _HALF):
        _remove(run / name)
    if sealed_files(run / _NEW) is not None:
        _take_places(run)
    _remove(run / _NEW)
    if (run / _OLD).exists() and (_marker(run)["files"] or any(map(sealed_files, checkpoints(run)))):
        drop_old(run)  # its successor has something whole
    if (run / _OLD).exists():
        for name in [*_marker(run)["written"], MARKER]:  # of the run that failed
            _remove(run / name)
        os.replace(run / _OLD, run / _ASIDE)
    if (run / _ASIDE).exists():
        for part in sorted((run / _ASIDE).iterdir()):
            os.replace(part, run / part.name)
        (run / _ASIDE).rmdir()


def _set_aside(run: Path) -> None:
    own = written(run)
    (run / _ASIDE).mkdir()
    for name in [*own, MARKER]:
        if lexists(run / name):
            os.replace(run / name, run / _ASIDE / name)
    os.replace(run / _ASIDE, run / _OLD)


def _take_places(run: Path) -> None:
    """Moves the sealed final parts where they belong; those that are still in `.zofo.new` have not been moved yet."""
    files = [*(sealed_files(run / _NEW) or {})]
    names = sorted({file.split("/")[0] for file in files})
    former = {file.split("/")[0] for file in _marker(run)["files"]} - set(names)
    claim(run, *names)
    trash = _fresh_trash(run)
    for name in former:
        if lexists(run / name):
            os.replace(run / name, trash / name)
    for name in names:
        if (run / _NEW / name).exists():
            if lexists(run / name):
                os.replace(run / name, trash / name)
            os.replace(run / _NEW / name, run / name)
    _write_marker(run, {**_marker(run), "files": files})
    _remove(trash)


def _require_no_guests(run: Path, own: Sequence[str]) -> None:
    """Refuses a run in whose folders somebody has put files of their own."""
    final = _marker(run)["files"]
    for name in own:
        sealed = sealed_files(run / name)
        known = [f"{name}/{file}" for file in (*sealed, SEAL)] if sealed else final
        if (run / name).is_symlink() or not any(file.startswith(f"{name}/") for file in known):
            continue  # half written: nothing says what belongs there
        found = [file.relative_to(run).as_posix() for file in sorted((run / name).rglob("*")) if file.is_file()]
        if guests := [file for file in found if file not in known]:
            raise ZofoError(
                f"{run / guests[0]} was not written by the run that overwrite_output_dir would remove: move it away, "
                "or choose another output_dir"
            )


def _present(run: Path) -> list[str]:
    """What is there under the names that a run uses."""
    named = [name for name in (*_RUN, *_BESIDE) if lexists(run / name)]
    return [*named, *(folder.name for folder in checkpoints(run))]


def _is_run_without_marker(run: Path) -> bool:
    """Whether a folder without a marker holds a run: its configuration, and its results or a checkpoint."""
    try:
        config: Any = read_yaml(run / "config.yaml", "config.yaml")
    except (OSError, ZofoError):
        return False
    if not isinstance(config, dict) or not config.keys() >= _CONFIG_KEYS:
        return False
    try:
        results: Any = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        results = None
    return (isinstance(results, dict) and results.keys() >= _RESULT_KEYS) or any(map(_is_sealed, checkpoints(run)))


def _is_sealed(folder: Path) -> bool:
    try:
        read_seal(folder)
    except ZofoError:
        return False
    return True


def _marker(run: Path) -> dict[str, Any]:
    """The marker of a folder: `written`, the names there, and `files`, all that the final parts consist of."""
    try:
        marker: Any = json.loads((run / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {"format": _FORMAT, "written": [], "files": []}
    except (OSError, ValueError, RecursionError):
        marker = None
    known = isinstance(marker, dict) and marker.get("format") == _FORMAT
    if not known or not all(_is_names(marker.get(key)) for key in ("written", "files")):
        raise ZofoError(
            f"{run / MARKER}, where zofo notes what it has written, cannot be read: choose another output_dir"
        )
    return marker


def _is_names(value: Any) -> bool:
    """Whether these are paths below the folder."""
    return isinstance(value, list) and all(
        isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name in value
    )


def _write_marker(run: Path, marker: Mapping[str, Any]) -> None:
    (run / _HALF).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    os.replace(run / _HALF, run / MARKER)


def _fresh_trash(run: Path) -> Path:
    _remove(run / _TRASH)
    (run / _TRASH).mkdir()
    return run / _TRASH


def _remove(path: Path) -> None:
    """Removes a file, a folder, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
