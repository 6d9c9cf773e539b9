"""`zofo eval --harness`: lm-evaluation-harness (the extra `harness`) on a model and adapter that are in memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_model, on_device


def evaluate_with_harness(
    model: str,
    adapter: str | None,
    tasks: Sequence[str],
    *,
    batch_size: int,
    shots: int = 0,
    dtype: DType = "float32",
    max_length: int | None = None,
) -> dict[str, Any]:
    """What `lm_eval` reports for each of its tasks: {task: {"acc,none": value, ...}}.

    Args:
        model: as for `load_model`.
        adapter: a PEFT folder, or None.
        tasks: names of the harness's tasks, or paths of task files in its format.
        batch_size: rows per forward.
        shots: its `num_fewshot`.
        dtype: of the model.
        max_length: tokens of all that is read; None for all positions that the model has.

    Raises:
        ZofoError: if the extra is not installed, or a task is unknown to the harness; before the model is loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ZofoError("--harness needs lm-evaluation-harness: pip install lm_eval")
    # by name: the extra is not there when types are checked
    lm_eval: Any = importlib.import_module("lm_eval")
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager()
    wanted = [_task(name, manager.all_tasks) for name in tasks]
    base, tokenizer = load_model(model, dtype)
    adapted = AdaptedModel(on_device(base), stored=adapter)
    lm = huggingface.HFLM(
        pretrained=adapted.model.eval(),
        tokenizer=tokenizer,
        backend="causal",  # peft's wrapper does not say by itself
        batch_size=batch_size,
        max_length=max_length or min(adapted.positions, 1 << 15),
    )
    found = lm_eval.simple_evaluate(lm, tasks=wanted, task_manager=manager, num_fewshot=shots or None)
    assert found is not None, "only further processes get no result"
    return {name: dict(scores) for name, scores in found["results"].items()}


def _task(name: str, known: Sequence[str]) -> str | dict[str, Any]:
    """A name, or the content of a file."""
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise ZofoError(f"there is no task file {file}")
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    if name not in known:
        raise ZofoError(
            f"lm-evaluation-harness has no task {name!r}: `lm_eval --tasks list` lists them; its names are not those "
            "of `zofo tasks`"
        )
    return name
