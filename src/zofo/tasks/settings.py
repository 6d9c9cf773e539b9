"""The settings of MetaICL: which tasks are trained on, and which others are tested on."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError, did_you_mean, listed
from zofo.parse import read_yaml
from zofo.tasks.metaicl import is_metaicl


def setting_names() -> list[str]:
    """The settings.

    Examples:
        >>> "hr_to_lr" in setting_names()
        True
    """
    return [*_settings()]


def setting(name: str, folder: str) -> tuple[list[str], list[str]]:
    """The tasks of a setting in a folder of tasks, as `load_task` takes them: those to train on, those to test on.

    Args:
        name: one of `setting_names()`.
        folder: holds for each task a folder in MetaICL's form or a task file, NAME or NAME.yaml. `FOLDER#K_SEED` names
            a draw of their rows.

    Raises:
        ZofoError: if there is no such setting; or if the folder lacks tasks, which are named.

    Examples:
        >>> setting("hr_to_lw", "data")
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: there is no setting 'hr_to_lw': did you mean hr_to_lr?

    References:
        S. Min et al., "MetaICL: Learning to Learn In Context" (2022).
    """
    known = _settings()
    if name not in known:
        raise ZofoError(f"there is no setting {name!r}: {did_you_mean(name, known, f'there are {listed(known)}')}")
    location, _, draw = folder.partition("#")
    place = Path(location).expanduser()
    found = {task: _found(place, task, draw) for part in known[name].values() for task in part}
    missing = [task for task, entry in found.items() if not entry]
    if missing:
        raise ZofoError(
            f"{place} lacks {len(missing)} of the {len(found)} tasks of the setting {name}: {listed(missing, 100)}; "
            "add folders of these names with their rows, or task files"
        )
    train, test = ([found[task] for task in known[name][part]] for part in ("train", "test"))
    return train, test


def _found(folder: Path, task: str, draw: str) -> str:
    """Where a task is in a folder of tasks; an empty text if it is not there."""
    if is_metaicl(str(folder / task)):
        return f"{folder / task}#{draw}" if draw else str(folder / task)
    return next((str(file) for end in ("yaml", "yml") if (file := folder / f"{task}.{end}").is_file()), "")


def _settings() -> dict[str, Any]:
    file = Path(str(files("zofo.tasks").joinpath("settings.yaml")))
    return read_yaml(file, str(file))
