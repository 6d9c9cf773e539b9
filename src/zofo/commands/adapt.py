"""`zofo adapt`: a model on a new task from a few examples, in several draws of them."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from zofo.commands.eval import given_keys
from zofo.commands.merge import new_folder
from zofo.commands.results import as_json
from zofo.commands.stored import StoredRun
from zofo.compare.plan import FRESH
from zofo.compare.statistics import over_draws
from zofo.config import ZOFOConfig
from zofo.config_parser import parse_config, read_config
from zofo.console import Say
from zofo.errors import ZofoError
from zofo.keys import OF_ADAPTER
from zofo.models.adapters import positions_of
from zofo.models.load import load_model
from zofo.models.peft import UPPER
from zofo.scoring.tokens import Example
from zofo.spelling import ANY_TASK_KEYS
from zofo.tasks.leakage import require_apart
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits
from zofo.tasks.task import Task, load_task
from zofo.training.checkpoint import writing
from zofo.training.rows import Posing, run_splits, trained_on
from zofo.training.trained_rows import trained_rows_of, write_trained_rows
from zofo.training.trainer import ZOFOTrainer

MEAN = "mean"
_OF_RUN = (*OF_ADAPTER, "train_prompt", *ANY_TASK_KEYS)
_NOT_HERE = (
    "data", "text", "label", "final_split", "train_shots", "reward", "reward_weights", "diagnose", "zero_shot",
    "resume_from_checkpoint",
)  # fmt: skip
_USUAL: dict[str, Any] = {
    "max_steps": 20,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
}
_BATCH = 8


@dataclass(frozen=True)
class Asked:
    """What is adapted, to what, and how often.

    Args:
        model: the backbone, in any form that `load_model` takes.
        run: that it is the backbone of, if it is of one.
        task: the new task.
        shots: K, training rows in each draw.
        draws: N.
        start: fresh, mean (of the adapters of the run's tasks) or the name of one of these.
    """

    model: str
    run: StoredRun | None
    task: str
    shots: int
    draws: int = 5
    start: str = FRESH


def adapt_config(asked: Asked, file: Path | None, arguments: Sequence[str], output: Path) -> ZOFOConfig:
    """The keys of a draw's run: those of the run that is adapted, as far as they count, under those that are given.

    A run without adapters says nothing of the one that is trained here: it is LoRA, if nothing else is given.
    """
    given = read_config(file) if file else {}
    named = {*given, *given_keys(arguments)}
    for key in _NOT_HERE:
        if key in named:
            raise ZofoError(f"zofo adapt has no {key}: leave it out (other rows of the task: source)")
    kept = {key: asked.run.keys.get(key) for key in _OF_RUN} if asked.run else {}
    alone = kept.get("adapter") == "none"
    usual = {**_USUAL, "per_device_train_batch_size": min(_BATCH, asked.shots)}
    if "num_train_epochs" in named:
        del usual["max_steps"]
    for key in OF_ADAPTER if alone or asked.start != FRESH or "adapter_init" in named else ():
        kept.pop(key, None)  # the trained adapter says it, or there is none
    fixed = {"task": asked.task, "model": asked.model, "output_dir": str(output)}
    return parse_config({"method": "fo", **usual, **kept, **given, **fixed}, arguments)


def adapt(asked: Asked, config: ZOFOConfig, output: Path, say: Say) -> dict[str, Any]:
    """Scores a model without examples, behind K of them, and with an adapter that K of them have trained.

    For N draws of K training rows: mean, worst, and the 95 % interval of the mean over the draws. The test rows are
    the same in all draws. Before training, an adapter that starts from trained values counts; a fresh one does not.
    Writes `results.json`, the configuration and the adapter of each draw; where a draw is interrupted or fails, those
    before it, and `stopped.json`.

    Returns:
        What `results.json` holds.

    Raises:
        ZofoError: if the run has trained on the task or on some of its test rows, or anything cannot work.
    """
    for notice in config.notices():
        say(notice)
    if not config.method_class.trains() or config.method_class.zeroth_order:
        raise ZofoError(f"method is {config.method}, but a few examples are learned by backpropagation: set method: fo")
    task = load_task(asked.task, config.source)
    splits = splits_of_new(task, config, asked.shots)
    if asked.run:
        _require_new(asked.run, asked.task, task, splits.test)
    _require_unseen(asked.model, task, splits.test)
    with new_folder(output) as half, tempfile.TemporaryDirectory() as scratch:
        (half / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False), encoding="utf-8")
        found, stopped = _draws(asked, config, task, splits, half, Path(scratch), say)
        results = _results(asked, task, config, found)
        name = "stopped.json" if stopped else "results.json"
        with writing(output):
            (half / name).write_text(as_json(results), encoding="utf-8")
    if stopped:
        say(f"{len(found)} of {asked.draws} draws have ended: {output / name}; for all of them give another --output")
        raise stopped
    return results


def splits_of_new(task: Task, config: ZOFOConfig, shots: int) -> Splits:
    """The rows of a task to adapt to, which has enough of them."""
    splits = run_splits(task, config).reworded(lambda rows: task.reworded(rows, config.template))
    asked = {record.identity for record in splits.test}  # by another template than the one by which rows were divided
    splits = replace(splits, train=[record for record in splits.train if record.identity not in asked])
    if shots > len(splits.train):
        raise ZofoError(
            f"shots is {shots}, but task {task.name} has {len(splits.train)} training rows: lower it, or "
            "test_size and dev_size"
        )
    if not splits.test:
        raise ZofoError(f"task {task.name} has no test row: give more rows, or test_size")
    return splits


@dataclass(frozen=True)
class _Draw:
    """The scores of one draw, and the seconds that training took."""

    zero_shot: dict[str, float]
    in_context: dict[str, float]
    adapted: dict[str, float]
    fitting: float
    seconds: float


def _draws(
    asked: Asked, config: ZOFOConfig, task: Task, splits: Splits, output: Path, scratch: Path, say: Say
) -> tuple[list[_Draw], BaseException | None]:
    """The draws that have ended, at least one, and what has stopped the next one, if anything has."""
    start, found = _start(asked, scratch), list[_Draw]()
    places = [str(scratch / str(number)) for number in range(asked.draws)]
    configs = [replace(config, seed=config.seed + n, output_dir=place, **start) for n, place in enumerate(places)]
    for number, drawn in enumerate(configs):
        shown = _drawn(splits.train, asked.shots, config.division_seed, number)
        zero_shot, place = found[0].zero_shot if found else None, output / f"draw-{number}"
        try:
            draw = _draw(asked.model, task, shown, splits.test, drawn, place, zero_shot)
            words = ", ".join(f"{key} {draw.adapted[key]:.4g}" for key in (str(task.metrics[0]), "loss"))
            say(f"draw {number}: {words} in {draw.seconds:.0f} s")
        except (Exception, KeyboardInterrupt) as error:
            if not found:
                raise
            shutil.rmtree(place, ignore_errors=True)
            return found, error
        found.append(draw)
    return found, None


def _draw(
    model: str,
    task: Task,
    shown: list[Record],
    test: list[Record],
    config: ZOFOConfig,
    place: Path,
    zero_shot: dict[str, float] | None,
) -> _Draw:
    base, tokenizer = load_model(model, config.dtype)
    posing = Posing(config, shown, tokenizer, min(config.max_length, positions_of(base)))
    trainer = ZOFOTrainer(base, config, posing.trained(shown), processing_class=tokenizer, metrics=task.metrics)
    examples = trainer.examples(posing.alone(test))
    trainer.require_scorable(examples)
    trainer.require_trainable()
    records, used = posing.behind(test, len(shown))
    score = _score_of_upper(trainer) if config.adapter_init else trainer.score_backbone
    scores = zero_shot or score(examples)
    in_context = score(trainer.examples(records))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    adapted = _score_of_upper(trainer)(examples)
    if trainer.adapted.adapters:
        trainer.adapted.save_adapters(place, backbone=str(Path(model).resolve()) if Path(model).exists() else model)
        (place / "README.md").unlink()  # peft's, which says nothing
        for adapter in trainer.adapted.adapters:
            write_trained_rows(place / adapter, trainer.trained_rows)
    return _Draw(scores, in_context, adapted, sum(used) / len(used), seconds)


def _score_of_upper(trainer: ZOFOTrainer) -> Callable[[Sequence[Example]], dict[str, float]]:
    """The scores of rows with the adapter as it is."""
    return lambda rows: trainer.score(rows)[UPPER]


def _drawn(rows: Sequence[Record], shots: int, seed: int, number: int) -> list[Record]:
    """K different rows of draw `number`, a function of the seed alone."""
    chosen = np.random.default_rng([seed, number]).permutation(len(rows))[:shots]
    return [rows[int(index)] for index in chosen]


def _require_new(run: StoredRun, place: str, task: Task, test: Sequence[Record]) -> None:
    """Refuses a task that the run has trained on, or of which it has seen test rows; `place` is how it was given."""
    stored = parse_config({key: value for key, value in run.keys.items() if key != "model"}, [])
    owns = {name: (own, load_task(own, stored.source)) for name, own in run.tasks.items()}
    if run.is_of_task(place) or task.name in {own.name for _, own in owns.values()}:
        raise ZofoError(
            f"the run in {run.folder} has trained on the task {task.name}: name another one, or measure this one with "
            "zofo eval"
        )
    trained: dict[str, list[Record]] = {}
    for name, (given, own) in owns.items():
        rows = run_splits(own, replace(stored, task=given)).train
        trained[name] = own.reworded(rows, stored.template)
    require_apart(trained, {task.name: test})


def _require_unseen(model: str, task: Task, test: Sequence[Record]) -> None:
    """Refuses test rows that the model says it was trained on, in whatever run before."""
    known = trained_rows_of(model) or frozenset()
    if seen := [row for row, was in zip(test, trained_on(task, test, known), strict=True) if was]:
        raise ZofoError(
            f"{len(seen)} of {len(test)} test rows of the task {task.name} are among the rows that {model} was trained "
            f"on, such as {seen[0].prompt[:60]!r}: name another task, or give other rows by source"
        )


def _start(asked: Asked, scratch: Path) -> dict[str, Any]:
    """The keys by which adapters start: fresh, or from the values of trained ones."""
    if asked.start == FRESH:
        return {}
    if asked.run is None:
        raise ZofoError(f"start is {asked.start}, but a plain model has no trained adapters: leave it out")
    names = [*asked.run.tasks] if asked.start == MEAN else [asked.run.named(asked.start)]
    folders = [asked.run.parts(UPPER, asked.run.place(name))[1] for name in names]
    own = [Path(folder) for folder in dict.fromkeys(folders) if folder is not None]
    if not own:
        raise ZofoError(f"start is {asked.start}, but the run in {asked.run.folder} has no adapters: leave it out")
    return {"adapter_init": str(own[0] if len(own) == 1 else _mean_of(own, scratch / MEAN))}


def _mean_of(folders: Sequence[Path], place: Path) -> Path:
    """A PEFT folder with the mean of several adapters' weights, in float32."""
    place.mkdir()
    PeftConfig.from_pretrained(str(folders[0])).save_pretrained(str(place))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = {name: torch.stack([each[name].float() for each in weights]).mean(0) for name in weights[0]}
    save_file(mean, place / "adapter_model.safetensors")
    return place


def _results(asked: Asked, task: Task, config: ZOFOConfig, found: Sequence[_Draw]) -> dict[str, Any]:
    return {
        "model": asked.model,
        "task": task.name,
        "shots": asked.shots,
        "draws": len(found),
        "start": asked.start,
        "method": config.method,
        "seed": config.seed,
        "zero_shot": found[0].zero_shot,
        "in_context": over_draws([draw.in_context for draw in found]),
        "metrics": over_draws([draw.adapted for draw in found]),
        "examples_that_fit": sum(draw.fitting for draw in found) / len(found),
        "seconds": sum(draw.seconds for draw in found) / len(found),
    }
