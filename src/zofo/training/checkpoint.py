"""Checkpoints that are whole or not there: sealed when complete, checked before use."""

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zofo.config import identity_of_before
from zofo.errors import ZofoError, first_line

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Declares a checkpoint complete: writes the size of each of its files, and `content`, in one atomic step.

    A process that is killed earlier leaves a folder without a seal, which `last_sealed` passes over.
    """
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in sizes:
        with open(folder / name, "rb+") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
    half = folder / f"{SEAL}.half"
    half.write_text(json.dumps({"files": sizes, **content}, indent=1))
    half.rename(folder / SEAL)


def unseal(folder: Path) -> None:
    """Marks a checkpoint that is about to be written over as incomplete."""
    (folder / SEAL).unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """Turns what the libraries raise when a disk is full or forbidden into one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = first_line(error)
        if isinstance(error, RuntimeError) and "inline_container" not in cause and "PytorchStreamWriter" not in cause:
            raise  # not torch's zip writer: a real bug must stay visible
        raise ZofoError(
            f"cannot write {folder} ({cause}): free space or choose another output_dir; earlier checkpoints are whole"
        ) from error


def read_seal(folder: Path) -> dict[str, Any]:
    """What `seal` wrote; refuses a folder that is no checkpoint, half written, or damaged."""
    if not folder.is_dir():
        raise ZofoError(
            f"there is no checkpoint {folder}: give the path of a checkpoint-N folder, or true for the last"
        )
    if not (folder / SEAL).is_file():
        raise ZofoError(f"{folder} is no complete checkpoint: it was only half written; resume from an earlier one")
    try:
        content: dict[str, Any] = json.loads((folder / SEAL).read_text())
        files: dict[str, int] = content["files"]
    except (ValueError, KeyError) as error:
        raise ZofoError(f"{folder} is damaged: {SEAL} cannot be read; resume from an earlier checkpoint") from error
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ZofoError(f"{folder} is damaged: {name} {state}; resume from an earlier checkpoint")
    return content


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the oldest first."""
    numbered = {int(m[1]): f for f in run.glob("checkpoint-*") if (m := _NAME.fullmatch(f.name))}
    return [numbered[number] for number in sorted(numbered)]


def last_sealed(run: Path) -> Path:
    """The newest complete checkpoint of a run."""
    for folder in reversed(checkpoints(run)):
        try:
            read_seal(folder)
        except ZofoError:
            continue
        return folder
    raise ZofoError(f"{run} holds no complete checkpoint to resume from: start without resume_from_checkpoint")


def require_optimizer_state(folder: Path) -> None:
    """Refuses to go on from a checkpoint that holds a model only."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (folder / name).is_file():
            raise ZofoError(
                f"{folder} holds no {name}, as save_only_model leaves it out: a run cannot go on from there; its "
                "model can be evaluated"
            )


def require_same(stored: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuses to resume a run under another configuration, or on other rows.

    A key that the stored run does not know yet counts as if it had been at its default.
    """
    rows = list(dict.fromkeys(stored.get("rows") or ()))  # rows of two levels at once stood there twice
    if "rows" in current and rows != current["rows"]:
        raise ZofoError(
            f"{folder} was written by a run on other training rows: give it the same data and task file, or start a "
            "new run in another output_dir"
        )
    before = identity_of_before(stored)
    for key, value in current.items():
        if key != "rows" and before.get(key) != value:
            raise ZofoError(
                f"{folder} was written with {key} = {before.get(key)!r}, but now it is {value!r}: resume with the "
                "same configuration, or start a new run in another output_dir"
            )
