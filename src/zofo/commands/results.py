"""What a run ends with: results, card and curves, beside the backbone and the adapters."""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_weights
from zofo.models.peft import UPPER
from zofo.report.card import Shown, model_card
from zofo.report.curves import plot_curves
from zofo.scoring.generation import end_tokens
from zofo.scoring.tokens import Example
from zofo.tasks.records import Record
from zofo.tasks.task import Task
from zofo.training.attribution import diagnosed, squares
from zofo.training.checkpoint import seal, writing
from zofo.training.folder import TASKS
from zofo.training.trainer import ZOFOTrainer


@dataclass(frozen=True)
class Tested:
    """The rows of a task's final scores: as they are, and as the model reads them.

    `asked` and `posed` are the same with training rows in front of them, where `shots` says so.
    """

    task: Task
    rows: list[Record]
    examples: list[Example]
    asked: list[Record]
    posed: list[Example]
    shots: dict[str, float] | None = None  # how many fit in front of a row

    def shown(self, trainer: ZOFOTrainer) -> Shown:
        """The first row whose prompt was not cut, or else the first one."""
        first = next((i for i, example in enumerate(self.posed) if not example.truncated), 0)
        (record,) = trainer.posed(self.asked[first : first + 1])
        return Shown.of(record, self.posed[first], cast(PreTrainedTokenizerBase, trainer.processing_class))


def write_final(
    trainer: ZOFOTrainer, tests: Mapping[str, Tested], scores: dict[str, Any], new: Path, texts: Mapping[str, str]
) -> dict[str, Any]:
    """Writes and seals what the run ends with: first what was learned, so that it stays whatever happens later."""
    config, several = trainer.args, len(tests) > 1
    first = next(iter(tests.values()))
    with writing(Path(str(config.output_dir))):
        trainer.save_final(new, home=new.parent)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        seal(new, {})
    results: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "model": config.model,
        "task": [*tests] if several else first.task.name,
        **scores,
        "cost": asdict(trainer.cost),
        "backbone_change": backbone_change(trainer.adapted, str(config.model), config.dtype),
        **_spans(trainer, tests),
    }
    if config.diagnose and config.method_class.trains():
        known = None if first.shots else scores["zero_shot"], scores["metrics"][UPPER]
        results["diagnosis"] = diagnosed(trainer, str(config.model), first.posed, *known)
    backbone = str(config.model) if trainer.adapted.quantised else "backbone"
    tasks = [test.task for test in tests.values()]
    place = f"{TASKS}/{tasks[0].name}/{UPPER}" if (new / TASKS).is_dir() else UPPER
    steps = trainer.state.global_step
    ends = end_tokens(trainer.adapted.base, cast(PreTrainedTokenizerBase, trainer.processing_class))
    card = model_card(config, results, tasks, steps, backbone, place, first.shown(trainer), trainer.span, ends)
    title = f"{config.method} ({config.adapter}) on {', '.join(task.name for task in tasks)}"
    with writing(Path(str(config.output_dir))):
        (new / "results.json").write_text(as_json(results), encoding="utf-8")
        history, names = trainer.state.log_history, [*tests] if several else []
        plot_curves(history, title, new / "curves.png", names, config.objective)
        (new / "README.md").write_text(card, encoding="utf-8")
        seal(new, {})
    return results


def _spans(trainer: ZOFOTrainer, tests: Mapping[str, Tested]) -> dict[str, Any]:
    """How long generated answers are: of the only task, or of each of several."""
    spans = {
        name: asdict(trainer.tasks[name].span)
        for name, test in tests.items()
        if trainer.rewards or not test.task.has_options
    }
    if not spans:
        return {}
    return {"answer_span": spans} if len(tests) > 1 else {"answer_span": next(iter(spans.values()))}


def as_json(value: Any) -> str:
    """JSON on several lines, with null for a number that it does not have.

    Examples:
        >>> as_json({"low": math.nan, "of_draws": [0.5, math.inf]}).split()
        ['{', '"low":', 'null,', '"of_draws":', '[', '0.5,', 'null', ']', '}']
    """
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def write_new(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all; what another process has written there meanwhile stays.

    Raises:
        FileExistsError: if there is one.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        if file.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def backbone_change(adapted: AdaptedModel, model: str, dtype: DType) -> float:
    """|θ - θ_0| / |θ_0|, with θ_0 loaded once more."""
    if adapted.quantised:  # and so where it was
        return 0.0
    start = load_weights(model, dtype).named_parameters()
    moved, norm = zip(*(squares(adapted.backbone[name], before) for name, before in start), strict=True)
    return (sum(moved) / sum(norm)) ** 0.5
