"""Misspelt options of the command line, found before transformers is imported, which takes seconds."""

import ast
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from zofo.errors import ZofoError
from zofo.habits import key_hint

# What zofo eval takes of the keys of zofo train: how rows of any task are read, and which rows of a task.
ANY_TASK_KEYS = ("loss", "dtype", "max_length", "chat_template", "system_prompt")
EVAL_KEYS = ("train_size", "test_size", "dev_size", "data_seed", "source", *ANY_TASK_KEYS)
_TAKEN = {"eval": EVAL_KEYS, "predict": ("template", *ANY_TASK_KEYS), "merge": (), "tasks": (), "compare": ()}
_CLASSES = {
    "ZOFOConfig": ("zofo", "config.py"),
    "Keys": ("zofo", "keys.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
}


def key_of(word: str) -> str:
    """The key that a word of the command line names.

    Examples:
        >>> key_of("--learning-rate=1e-3")
        'learning_rate'
    """
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def require_known(verb: str, own: Collection[str], words: Sequence[str]) -> None:
    """Refuses what is no option of a verb, and names what is; `words` are those that its `own` options have left."""
    taken, every = _TAKEN.get(verb), key_names()
    for word in words:
        key = key_of(word)
        if not word.startswith("--") or len(word) == 2 or " " in word:  # what argparse takes for a value
            if taken == ():
                raise ZofoError(f"unrecognized arguments: {' '.join(words)}; see zofo {verb} --help")
        elif taken is None and every and key.removeprefix("no_") not in every:
            refuse_unknown(key, "", {*every, *own})
        elif taken is not None and key not in taken:
            hint = key_hint(key, [*taken, *own], f"see zofo {verb} --help", every)
            raise ZofoError(f"zofo {verb} has no --{key}: {hint}")


def refuse_unknown(name: str, where: str, known: Collection[str]) -> NoReturn:
    """Refuses a key that there is not; `where` is what stands in front of the message."""
    raise ZofoError(f"{where}unknown key {name!r}: {key_hint(name, known, 'see `zofo train --help`')}")


def key_names() -> frozenset[str]:
    """All keys of zofo train, read from the source of their classes; none if a class inherits from further ones.

    Examples:
        >>> key_names() >= {"method", "penalty", "seed"}
        True
    """
    classes = [_class(name, *place) for name, place in _CLASSES.items()]
    if not {ast.unparse(base) for made in classes for base in made.bases} <= _CLASSES.keys():
        return frozenset()  # a later transformers: the parser will say what is unknown
    fields = [part for made in classes for part in made.body if isinstance(part, ast.AnnAssign)]
    named = {ast.unparse(part.target) for part in fields if "InitVar" not in ast.unparse(part.annotation)}
    return frozenset(name for name in named if not name.startswith("_"))


def _class(name: str, package: str, file: str) -> ast.ClassDef:
    spec = find_spec(package)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).with_name(file).read_text(encoding="utf-8"))
    return next(part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name)
