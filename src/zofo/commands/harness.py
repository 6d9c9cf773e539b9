"""`zofo eval --harness`: lm-evaluation-harness (the extra `harness`) on a model and adapter that are in memory."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zofo.commands.eval import Manner, given_keys
from zofo.config_parser import parse_config
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_model, on_device
from zofo.parse import read_yaml


def evaluate_with_harness(
    model: str, adapter: str | None, tasks: Sequence[str], manner: Manner, keys: Sequence[str] = ()
) -> dict[str, Any]:
    """What `lm_eval` reports for each of its tasks: {task: {"acc,none": value, ...}}.

    Tasks are names of the harness's own, or paths of task files in its format. Of the keys on the command line, only
    dtype and max_length have a meaning; without max_length, all positions of the model are read.
    """
    config = parse_config({"method": "none"}, keys)
    given = [*given_keys(keys)]
    given += [name for name in ("split", "template", "scoring") if vars(manner)[name] != vars(Manner())[name]]
    foreign = [name for name in given if name not in ("dtype", "max_length")]
    if foreign:
        raise ZofoError(f"--{foreign[0]} is of zofo's own tasks: the harness has its own rows, words and scores")
    if importlib.util.find_spec("lm_eval") is None:
        raise ZofoError("--harness needs lm-evaluation-harness: pip install lm_eval")
    # by name: the extra is not there when types are checked
    lm_eval: Any = importlib.import_module("lm_eval")
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager()
    wanted = [_task(name, manager.all_tasks) for name in tasks]
    base, tokenizer = load_model(model, config.dtype)
    adapted = AdaptedModel(on_device(base), stored=adapter)
    lm = huggingface.HFLM(
        pretrained=adapted.model.eval(),
        tokenizer=tokenizer,
        backend="causal",  # peft's wrapper does not say by itself
        batch_size=manner.batch_size,
        max_length=config.max_length if "max_length" in given else min(adapted.positions, 1 << 15),
    )
    found = lm_eval.simple_evaluate(lm, tasks=wanted, task_manager=manager, num_fewshot=manner.shots or None)
    assert found is not None, "only further processes get no result"
    return {name: dict(scores) for name, scores in found["results"].items()}


def _task(name: str, known: Sequence[str]) -> str | dict[str, Any]:
    """A name, or the content of a file."""
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise ZofoError(f"there is no task file {file}")
        return read_yaml(file, name, old=True)  # as the harness reads it
    if name not in known:
        raise ZofoError(
            f"lm-evaluation-harness has no task {name!r}: `lm_eval --tasks list` lists them; its names are not those "
            "of `zofo tasks`"
        )
    return name
