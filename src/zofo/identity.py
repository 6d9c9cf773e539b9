"""Keys that name files: by absolute path where they are stored, and by content where runs must share it."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from zofo.models.kinds import KINDS
from zofo.tasks.metaicl import is_metaicl
from zofo.tasks.task import load_task, task_file, task_names

_DESCRIBED = ("task", "source", "data", "adapter")  # their content is compared anyway: as rows, or as `peft_config`
_WEIGHTS = ("model", "adapter_init")
REWARD_DECIDES = "reward_decides"  # whether a reward is followed, or chooses a model, and is not measured only
_REWARD = "reward"  # a list of FILE.py:function or module:function
_FILE = "a file"
_SHA = " (sha256 "
_CONFIGS = ("config.json", "tokenizer.json")
_BLOCK, _BLOCKS = 1 << 14, 512  # bytes, and how many of them at most stand for a file


def anywhere(key: str, value: Any) -> Any:
    """A path among the values as an absolute one, so that a run can be repeated from any folder."""
    if key == _REWARD and value:
        return [_named(name, lambda file, function: f"{file}:{function}") for name in value]
    if isinstance(value, list):
        return [anywhere(key, item) for item in cast("list[Any]", value)]
    place = _place(key, value)
    return value if place is None else f"{place}{_draw(key, value)}"


def known(key: str, value: Any) -> Any:
    """What a resumed run must share of a key: files may be moved, and weights are known by a digest of theirs."""
    if key == _REWARD and value:
        return [_named(name, lambda file, function: f"{function}{_SHA}{_digest(file)})") for name in value]
    if isinstance(value, list):
        return [known(key, item) for item in cast("list[Any]", value)]
    place = _place(key, value)
    if key in _DESCRIBED and (place or _is_absolute(value)):
        return _FILE
    return f"{place.name}{_SHA}{_digest(place)})" if place and key in _WEIGHTS else value


@lru_cache
def contents(key: str, value: str, source: str | None = None) -> str | None:
    """A digest of the files that a value names and that decide what a run finds; None if it names none.

    Of a task these are its file and its rows, or those of `source`. Files that change while the process runs are not
    noticed.
    """
    if key == "task":
        return _content_of_task(value, source) if source or value not in task_names() else None
    if key == _REWARD:
        found = _named(value, lambda file, function: _digest(file))
        return None if found == value else found
    place = _place(key, value)
    return _digest(place) if place else None


def _content_of_task(value: str, source: str | None) -> str:
    task = load_task(value, source)
    places = [task.folder / Path(place.partition("#")[0]).expanduser() for place in task.source.values()]
    files = [] if is_metaicl(value) else [task_file(value)]
    for place in places:
        files += sorted(place.iterdir()) if place.is_dir() else [place]
    found = hashlib.sha256()
    for file in [file for file in files if file.is_file()]:
        with open(file, "rb") as rows:  # whole, as one label may have been corrected
            found.update(hashlib.file_digest(rows, "sha256").digest())
    return found.hexdigest()[:16]


def same(key: str, before: Any, now: Any) -> bool:
    """Whether a key names the same for a stored run as for this one: weights may have another name or place."""
    if isinstance(before, list) and isinstance(now, list):
        pairs = zip(cast("list[Any]", before), cast("list[Any]", now), strict=False)
        return len(cast("list[Any]", before)) == len(cast("list[Any]", now)) and all(same(key, *pair) for pair in pairs)
    if before == now or (key in _DESCRIBED and _FILE in (before, now)):
        return True
    if key not in _WEIGHTS or not isinstance(before, str) or not isinstance(now, str):
        return False
    return _SHA in now and before.rpartition(_SHA)[1:] == now.rpartition(_SHA)[1:]


def _named(name: str, of_file: Callable[[Path, str], str]) -> str:
    """What stands for a reward: its name, or what is made of its file and function."""
    place, _, function = name.rpartition(":")
    file = Path(place).expanduser()
    return of_file(file.resolve(), function) if file.suffix == ".py" and file.is_file() else name


def _place(key: str, value: Any) -> Path | None:
    """The absolute path that a key names, if it names one and that exists."""
    if key not in (*_DESCRIBED, *_WEIGHTS) or not isinstance(value, str):
        return None
    path = Path(value.removesuffix(_draw(key, value))).expanduser()
    is_path = (
        _is_rows(key, value)
        or path.suffix in (".yaml", ".yml", ".json", ".gguf")
        or key in ("source", "data", "adapter_init")
        or (path.is_dir() and (key == "model" or (key == "adapter" and value not in KINDS)))
    )
    return path.resolve() if is_path and path.exists() else None


def _is_rows(key: str, value: str) -> bool:
    """Whether a task is a folder or a file of rows, without a task file."""
    return key == "task" and value not in task_names() and is_metaicl(value)


def _draw(key: str, value: str) -> str:
    """What stands behind the path of such a task, if anything does: which draw of its rows it is."""
    return "".join(value.partition("#")[1:]) if _is_rows(key, value) else ""


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _digest(place: Path) -> str:
    """Of the files of a model or an adapter, and of large ones in blocks all over them: another model differs there."""
    found = hashlib.sha256()
    files = [place] if place.is_file() else [*(place / name for name in _CONFIGS), *sorted(place.glob("*.safetensors"))]
    for file in [file for file in files if file.is_file()]:
        size = file.stat().st_size
        found.update(f"{size} ".encode())
        with open(file, "rb") as content:
            for start in range(0, size, max(_BLOCK, -(-size // _BLOCKS))):
                content.seek(start)
                found.update(content.read(_BLOCK))
    return found.hexdigest()[:16]
