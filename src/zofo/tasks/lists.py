"""Lists of tasks: what the words of a list stand for, and whether their tasks go together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError, listed
from zofo.tasks.metaicl import is_metaicl, metaicl_name
from zofo.tasks.task import Task, is_task_file, read_task_file, task_file, task_names


def task_files(words: Sequence[str]) -> list[str]:
    """What `load_task` takes, one entry for each task that a list names.

    Args:
        words: names of built-in tasks, task files, .jsonl files and folders of rows in MetaICL's form, and folders of
            task files or else of such folders, whose tasks are taken from a to z. `FOLDER#K_SEED` names a draw, of all
            tasks in the folder.

    Raises:
        ZofoError: if the list or a folder is empty, if something is not there, or if two tasks have the same name.

    Examples:
        >>> task_files(["tweets", "movie_reviews"])
        ['tweets', 'movie_reviews']
    """
    if not words:
        raise ZofoError("task is an empty list: name at least one task, task file or folder of tasks")
    names: dict[str, str] = {}
    for entry in [entry for word in words for entry in _expanded(word)]:
        name = name_of_task(entry)
        if name in names:
            raise ZofoError(f"two of the tasks are called {name}: {names[name]} and {entry}; leave one of them out")
        names[name] = entry
    return [*names.values()]


def is_folder_of_tasks(word: Any) -> bool:
    """Whether a word names a folder that may hold several tasks, and is none itself."""
    folder = Path(str(word).partition("#")[0]).expanduser()
    return word not in task_names() and folder.is_dir() and not is_metaicl(str(word))


def require_options(tasks: Sequence[Task], loss: str) -> None:
    """Refuses tasks without options where the loss is over options."""
    without = [task.name for task in tasks if not task.has_options]
    if loss == "options" and without:
        raise ZofoError(
            f"loss is options, but of the {len(tasks)} tasks {listed(without)} have none to compare: leave them "
            "out, or set loss: lm"
        )


def _expanded(word: Any) -> list[str]:
    """The tasks that a word of a list stands for."""
    if not isinstance(word, str) or not word.strip():
        raise ZofoError(f"{word!r:.80} is in the list of tasks: name a task, a task file or a folder of tasks")
    location, _, draw = word.partition("#")
    folder = Path(location).expanduser()
    if word in task_names() or is_task_file(word) or is_metaicl(word) or not folder.is_dir():
        if not is_metaicl(word):
            task_file(word)  # refuses what is not there
        return [word]
    inside = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if of_yaml := [str(entry) for entry in inside if is_task_file(entry.name)]:
        return of_yaml
    folders = [entry for entry in inside if entry.is_dir()]
    if not folders:
        raise ZofoError(f"{folder} holds no task: it needs task files, or folders with train.jsonl and test.jsonl")
    for entry in folders:
        if not is_metaicl(str(entry)):
            raise ZofoError(f"{entry} holds no rows in MetaICL's form, such as train.jsonl: complete it or remove it")
    return [f"{entry}#{draw}" if draw else str(entry) for entry in folders]


def require_folder_name(name: str) -> None:
    """Refuses the name of a task, or of a run of a comparison, that cannot be that of a folder."""
    if Path(name).name != name or name.startswith("."):
        raise ZofoError(
            f"{name!r} cannot be the name of a folder, which each of several tasks or runs has: give it another name"
        )


def name_of_task(entry: str) -> str:
    """The name of the task that a name, a task file or a folder in MetaICL's form stands for."""
    if entry not in task_names() and is_metaicl(entry):
        return metaicl_name(entry)
    path = task_file(entry)
    return str(read_task_file(path).get("name") or path.stem)
