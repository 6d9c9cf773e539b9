"""Checkpoints that are whole or not there: sealed when complete, checked before use."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from zofo.config import identity_defaults
from zofo.errors import ZofoError, first_line, is_lack_of_memory
from zofo.identity import REWARD_DECIDES, same
from zofo.parse import is_texts
from zofo.tasks.rewards import REWARD

SEAL = "seal.json"
_HALF = f"{SEAL}.half"
_DIGESTS = "sha256"  # as fast as blake2b where the processor has instructions for it
_READ: dict[tuple[int, int, int, int], str] = {}  # digests by device, inode, time and size
_NAME = re.compile(r"checkpoint-(\d+)")
_UNWRITTEN = ("inline_container", "PytorchStreamWriter", "iostream error", "(os error ")  # the last of Rust
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError, EOFError,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Declares a folder complete: writes size and digest of each of its files, and `content`, in one atomic step.

    A process that is killed earlier leaves a folder without a seal, which `last_sealed` passes over, or with the seal
    that it had.
    """
    every = [f.relative_to(folder).as_posix() for f in sorted(folder.rglob("*")) if f.is_file()]
    names = [name for name in every if name not in (SEAL, _HALF)]
    sizes = {name: (folder / name).stat().st_size for name in names}
    digests = {name: _digest(folder / name) for name in names}
    for name in names:
        _to_disk(folder / name)
    half = folder / _HALF
    half.write_text(json.dumps({"files": sizes, _DIGESTS: digests, **content}, indent=1))
    _to_disk(half)
    half.replace(folder / SEAL)


def unseal(folder: Path) -> None:
    """Marks a checkpoint that is about to be written over as incomplete."""
    for name in (SEAL, _HALF):
        (folder / name).unlink(missing_ok=True)


def share(whole: Path, folder: Path, part: str) -> bool:
    """Gives a folder the files of one part of a sealed one: by hard links, or as copies where there are none.

    False if that part is not, or no longer, what was sealed, or lies elsewhere by a symbolic link.
    """
    try:
        digests: dict[str, str] = _content(whole)[_DIGESTS]
        names = [name for name in digests if name.startswith(f"{part}/")]
        home = whole.parent.resolve() / whole.name
        if not names or any((whole / name).resolve() != home / name for name in names):
            return False
        if any(_digest(whole / name) != digests[name] for name in names):
            return False
    except (OSError, ZofoError):
        return False
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a file may have other names, and is never written over in place
        try:
            os.link(whole / name, file)
        except OSError:
            shutil.copyfile(whole / name, file)
    return True


def half_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.with_name(folder.name + ".half")


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """Turns what the libraries raise when a disk is full or forbidden into one line."""
    try:
        yield
    except ZofoError:
        raise
    except Exception as error:  # the writers of C++ and Rust raise what they like
        cause = first_line(error)
        if not isinstance(error, OSError | SafetensorError) and not any(words in cause for words in _UNWRITTEN):
            raise  # a real bug must stay visible
        raise ZofoError(
            f"cannot write {folder} ({cause}): free space or choose another output_dir; earlier checkpoints are whole"
        ) from error


@contextmanager
def loading(folder: Path) -> Generator[None]:
    """Turns what the libraries raise for a file that they cannot read into one line."""
    try:
        yield
    except ZofoError:
        raise
    except _UNREADABLE as error:
        if is_lack_of_memory(error):
            raise
        raise _damaged(folder, f"it cannot be loaded ({first_line(error)[:200]})") from error


def sealed_files(folder: Path) -> dict[str, int] | None:
    """The files that a seal names, with their sizes; None without a seal that can be read."""
    try:
        return _content(folder)["files"]
    except (OSError, ZofoError):
        return None


def read_seal(folder: Path) -> dict[str, Any]:
    """What `seal` wrote; refuses a folder that is no checkpoint, half written, or with files of other sizes."""
    if not folder.is_dir():
        raise ZofoError(
            f"there is no checkpoint {folder}: give the path of a checkpoint-N folder, or true for the last"
        )
    if not (folder / SEAL).is_file() and not folder.name.startswith("checkpoint-"):
        raise ZofoError(
            f"{folder} is no checkpoint: give true for the last of a run, or one of its checkpoint-N folders"
        )
    if not (folder / SEAL).is_file():
        raise ZofoError(f"{folder} is no complete checkpoint: it was only half written; resume from an earlier one")
    content = _content(folder)
    config, cost = content.get("config"), content.get("cost")
    if not isinstance(config, dict) or not isinstance(cost, dict) or not is_texts(config.get("rows") or []):
        raise _damaged(folder, f"{SEAL} cannot be read")
    for name, size in content["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise _damaged(folder, f"{name} {state}")
    return content


def require_whole(folder: Path) -> dict[str, Any]:
    """What `seal` wrote; refuses a checkpoint of which any file is not what it was when it was sealed."""
    content = read_seal(folder)
    for name, digest in content[_DIGESTS].items():
        with loading(folder):
            found = _digest(folder / name)
        if found != digest:
            raise _damaged(folder, f"{name} is not what was written")
    return content


def steps_of(folder: Path) -> int:
    """How many steps a checkpoint has behind it."""
    with loading(folder):
        steps: Any = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        if not isinstance(steps, int):
            raise ValueError(f"{TRAINER_STATE_NAME} holds no number of steps")
        return steps


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the oldest first."""
    numbered = {int(m[1]): f for f in run.glob("checkpoint-*") if (m := _NAME.fullmatch(f.name))}
    return [numbered[number] for number in sorted(numbered)]


def last_sealed(run: Path) -> Path:
    """The newest whole checkpoint of a run."""
    for folder in reversed(checkpoints(run)):
        with suppress(ZofoError):
            require_whole(folder)
            return folder
    raise ZofoError(f"{run} holds no complete checkpoint to resume from: start without resume_from_checkpoint")


def siblings(resumed: Path, run: Path, identity: dict[str, Any]) -> set[str]:
    """The names of the complete checkpoints of the run in this folder, if the one that is resumed from is of it."""
    own: set[str] = set()
    for folder in checkpoints(run) if is_of(resumed, run) else ():
        with suppress(ZofoError):  # half written, damaged, or of another run: not for this one to remove
            require_same(read_seal(folder)["config"], identity, folder)
            own.add(folder.name)
    return own


def is_of(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint lies in the folder of this run, and not of another one."""
    return checkpoint.absolute().parent.resolve() == run.resolve()  # which may be a link to a larger disk


def rotate_checkpoints(run: Path, limit: int | None, best: str | None, own: Collection[str]) -> None:
    """Removes the oldest checkpoints of a run's `own` beyond `limit`, but never the best one or the newest."""
    sealed = [folder for folder in checkpoints(run) if folder.name in own and (folder / SEAL).is_file()]
    sealed.sort(key=lambda folder: (folder / SEAL).stat().st_mtime_ns)  # a run that was resumed writes some anew
    kept = {folder.name for folder in sealed[-1:]} | ({Path(best).name} if best else set())
    surplus = len(sealed) - max(limit, len(kept)) if limit and limit > 0 else 0
    for folder in [folder for folder in sealed if folder.name not in kept][: max(surplus, 0)]:
        unseal(folder)
        shutil.rmtree(folder.resolve(), ignore_errors=True)
        if folder.is_symlink():
            folder.unlink()


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

    A key that the stored run does not know counts as if it had been at its default, so that a key that is added later
    never makes an older run impossible to resume. A reward that is measured only may be mended.
    """
    before = {**identity_defaults(), **stored}
    if bool(before.get(REWARD)) != bool(current.get(REWARD)):
        raise _other(REWARD, before.get(REWARD), current.get(REWARD), folder)
    if "rows" in current and stored.get("rows") != current["rows"]:
        raise ZofoError(
            f"{folder} was written by a run on other training rows: give it the same data and task file, or start a "
            "new run in another output_dir"
        )
    decides = stored.get(REWARD_DECIDES, True) or current.get(REWARD_DECIDES, True)
    mended = (REWARD, "reward_weights") if current.get(REWARD) and not decides else ()
    free = ("rows", REWARD_DECIDES, *mended)
    for key in [key for key in current if key not in free]:
        found, given = before.get(key), current[key]
        if not same(key, found, given):
            if key == "peft_config" and found and given:
                found, given = _differences(json.loads(found), json.loads(given))
            raise _other(key, found, given, folder)


def _other(key: str, found: Any, given: Any, folder: Path) -> ZofoError:
    return ZofoError(
        f"{folder} was written with {key} = {found!r}, but now it is {given!r}: resume with the "
        "same configuration, or start a new run in another output_dir"
    )


def require_same_selection(content: Mapping[str, Any], selection: Mapping[str, Any], folder: Path) -> None:
    """Refuses to compare evaluations with the best one of a checkpoint that was chosen by something else."""
    for key, value in selection.items():
        before = content.get(key)
        if None not in (before, value) and before != value:
            raise ZofoError(
                f"{folder} was written with {key} = {before}, but now it is {value}, so its best evaluation says "
                f"nothing: give {key}: {before}, or start a new run in another output_dir"
            )


def _differences(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return {name: first.get(name) for name in names}, {name: second.get(name) for name in names}


def _content(folder: Path) -> dict[str, Any]:
    """The JSON of a seal, of the right form as far as files are concerned."""
    try:
        content: Any = json.loads((folder / SEAL).read_text())
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{SEAL} cannot be read") from error
    files = content.get("files") if isinstance(content, dict) else None
    if not files or not isinstance(files, dict) or not all(isinstance(size, int) for size in files.values()):
        raise _damaged(folder, f"{SEAL} cannot be read")
    digests = content.get(_DIGESTS)
    if not isinstance(digests, dict) or digests.keys() != files.keys() or not is_texts([*digests.values()]):
        raise _damaged(folder, f"{SEAL} cannot be read")
    return content


def _damaged(folder: Path, what: str) -> ZofoError:
    return ZofoError(f"{folder} is damaged: {what}; resume from an earlier checkpoint")


def _digest(file: Path) -> str:
    """Of files with several names, which are never written over in place, each is read once in a process."""
    stat = file.stat()
    known = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    if known in _READ and stat.st_nlink > 1:
        return _READ[known]
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, _DIGESTS).hexdigest()
    if stat.st_nlink > 1:
        _READ[known] = digest
    return digest


def _to_disk(file: Path) -> None:
    if file.stat().st_nlink > 1:
        return  # shared with a sealed folder, and so there already
    with open(file, "rb+") as content:  # Windows flushes only what may be written
        os.fsync(content.fileno())
