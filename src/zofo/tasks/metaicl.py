"""Tasks without a task file: rows in MetaICL's form, {"input", "output", "options"}, in a file or in a folder."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError, listed
from zofo.parse import is_texts
from zofo.tasks.records import Row
from zofo.tasks.sources import read_rows, split_name

_ENDS = (".jsonl", ".jsonl.gz")
_NAME = re.compile(r"(?P<task>.+)_(?P<draw>\d+_\d+)_(?P<split>train|dev|test)")
_SPLITS = ("train", "dev", "test")
_PLAIN = ""  # the draw of files that are named after their split alone

Draws = dict[str, dict[str, Path]]


def is_metaicl(name: str) -> bool:
    """Whether a name is that of a .jsonl file, or of a folder with .jsonl files that are named after splits."""
    place = Path(name.partition("#")[0]).expanduser()
    return bool(_draws(place)) if place.is_dir() else place.name.endswith(_ENDS) and place.is_file()


def metaicl_name(name: str) -> str:
    """What the task of a folder or of a file is called.

    Examples:
        >>> metaicl_name("data/piqa"), metaicl_name("data/piqa#16_13"), metaicl_name("piqa_16_13_train.jsonl")
        ('piqa', 'piqa', 'piqa')
    """
    place = Path(name.partition("#")[0]).expanduser().resolve()
    stem = _stem(place)
    if stem is None:
        return place.name
    match = _NAME.fullmatch(stem)
    return match["task"] if match else place.parent.name if split_name(stem) else stem


def metaicl_spec(name: str) -> dict[str, Any]:
    """The content of a task file for rows in MetaICL's form, with the metric by which MetaICL scores them.

        options that are the same for all rows      macro_f1, accuracy
        options of each row's own                   accuracy
        no options                                  exact_match, token_f1

    Args:
        name: a .jsonl file, or a folder: with train.jsonl and perhaps dev.jsonl and test.jsonl, or with files
            TASK_K_SEED_train.jsonl and so on. Of several draws (K_SEED) in a folder, FOLDER#K_SEED names one.

    Raises:
        ZofoError: if there are no training rows, several draws of them, or rows of another form.

    References:
        S. Min et al., "MetaICL: Learning to Learn In Context" (2022).
    """
    location, _, draw = name.partition("#")
    place = Path(location).expanduser().resolve()
    files = _files(place, draw) if place.is_dir() else {"all": place}
    (train,) = read_rows(str(files.get("train", place)), place).values()
    return {
        "name": metaicl_name(name),
        "description": f"Rows in MetaICL's form from {place.name}.",
        "source": str(place) if place.is_file() else {name: str(files[name]) for name in _SPLITS if name in files},
        "metric": _metrics(train, str(files.get("train", place))),
        "format": "metaicl",
    }


def _files(folder: Path, draw: str) -> dict[str, Path]:
    """The files of one draw, by split."""
    draws = _draws(folder)
    if draw and draw not in draws:
        raise ZofoError(f"{folder} has no draw {draw!r}: it has {listed(filter(None, draws)) or 'plain files'}")
    if not draw and len(draws) > 1 and _PLAIN not in draws:
        first = min(draws)
        raise ZofoError(f"{folder} has several draws of its rows, {listed(draws)}: name one, as in {folder}#{first}")
    files = draws[draw or (_PLAIN if _PLAIN in draws else next(iter(draws)))]
    if "train" not in files:
        raise ZofoError(f"{folder} has rows of {', '.join(files)}, but none to train on: add {_wanted(folder, draw)}")
    return files


def _wanted(folder: Path, draw: str) -> str:
    return f"{folder.name}_{draw}_train.jsonl" if draw else "train.jsonl"


def _draws(folder: Path) -> Draws:
    """{draw: {split: file}} of the files in a folder. Refuses two for one split, and those of another task."""
    draws: Draws = defaultdict(dict)
    tasks: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        stem = _stem(file)
        match = _NAME.fullmatch(stem or "")
        split = match["split"] if match else split_name(stem or "")
        if stem is None or split is None or not file.is_file():
            continue
        part = draws[match["draw"] if match else _PLAIN]
        if split in part:
            raise ZofoError(f"{folder} has both {part[split].name} and {file.name}: keep one")
        part[split] = file
        tasks[match["task"] if match else folder.name] = file.name
        if match and len({task for task in tasks if task != folder.name} | {match["task"]}) > 1:
            raise ZofoError(f"{folder} has rows of several tasks, {listed(tasks)}: give each a folder of its own")
    return dict(draws)


def _stem(file: Path) -> str | None:
    """The name of a .jsonl file without its end; None for other names."""
    end = next((end for end in _ENDS if file.name.endswith(end)), None)
    return None if end is None else file.name.removesuffix(end)


def _metrics(rows: list[Row], where: str) -> list[str]:
    """What MetaICL scores such rows by."""
    if not {"input", "output"} <= rows[0].keys():
        raise ZofoError(
            f"{where} holds no rows in MetaICL's form, {{input, output, options}}, but {listed(rows[0])}: write a task "
            "file for it, or give it as data, with text and label"
        )
    options = [row.get("options") or () for row in rows]
    odd = next((value for value in options if value and not is_texts(value)), None)
    if odd is not None:
        raise ZofoError(f"options of a metaicl row must be a list of texts, but are {odd!r:.80} in {where}")
    lacking = sum(not value for value in options)
    if 0 < lacking < len(rows):
        raise ZofoError(f"{lacking} of the {len(rows)} rows of {where} have no options: give all rows options, or none")
    if lacking:
        return ["exact_match", "token_f1"]
    return ["macro_f1", "accuracy"] if len({tuple(sorted(value)) for value in options}) == 1 else ["accuracy"]
