"""What the verbs of the command line do, as functions."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_model, load_weights, require_movable
from zofo.models.peft import UPPER
from zofo.report.card import model_card
from zofo.report.curves import plot_curves
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits, two_levels
from zofo.tasks.table import TASK_FILE, introduction, task_text
from zofo.tasks.task import Task
from zofo.training.checkpoint import checkpoints, last_sealed, read_seal, require_same, writing
from zofo.training.rows import run_splits, run_task
from zofo.training.trainer import ZOFOTrainer

Say = Callable[[str], None]

_PART = 1 << 24  # numbers in double precision at a time
_RUN = ("config.yaml", "results.json", "backbone", "upper", "lower", "trainer_state.json")  # nobody else has these
_BESIDE = (TASK_FILE, "README.md", "curves.png", "tokenizer")


def train(config: ZOFOConfig, say: Say) -> dict[str, Any]:
    """One run: loads, trains, evaluates, and writes the run folder. Returns what `results.json` holds.

    Raises:
        ZofoError: if anything that was given cannot work; nothing has been overwritten then.
    """
    if not config.model:
        raise ZofoError("model is not given: add model: ... to the config, or --model ... to the command")
    run = Path(str(config.output_dir))
    resume = _resume_point(config, run)
    task, spec = run_task(config)
    splits = _splits(task, config, say)
    parts = _training_parts(splits, config)
    named = dict(zip(config.method_class.splits, parts, strict=True)) | {"dev": splits.dev, "test": splits.test}
    say(f"{task.name}: " + ", ".join(f"{len(rows)} {name}" for name, rows in named.items()) + " rows")
    _require_rows(splits, config)
    for line in introduction(splits.train[0], run / TASK_FILE) if spec else ():
        say(line)
    if config.updates_backbone:
        require_movable(config.model, f"method {config.method}")
    model, tokenizer = load_model(config.model, config.dtype)
    trainer = ZOFOTrainer(
        model, config, *parts, eval_dataset=splits.dev, processing_class=tokenizer, metrics=task.metrics
    )
    test = trainer.examples(splits.test)
    if trainer.truncated:
        longer = f"{trainer.truncated} rows are longer than {config.max_length} tokens"
        say(f"{longer}: their prompts were truncated from the left")
    trainer.require_scorable(test)
    if resume:
        trainer.require_resumable(resume)
    _prepare_folder(run, config, resume)
    if spec:
        (run / TASK_FILE).write_text(task_text(spec), encoding="utf-8")
    zero_shot = trainer.score_backbone(test)
    say(f"zero-shot on {len(test)} test rows: {_words(zero_shot)}")
    trained = config.method_class.trains()
    if trained:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    metrics = trainer.score(test) if trained else {UPPER: zero_shot}
    trainer.save_model()
    trainer.save_state()
    results: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "model": config.model,
        "task": task.name,
        "metrics": metrics,
        "zero_shot": zero_shot,
        "cost": asdict(trainer.cost),
        "backbone_change": backbone_change(trainer.adapted, config.model, config.dtype),
    }
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_curves(trainer.state.log_history, f"{config.method} ({config.adapter}) on {task.name}", run / "curves.png")
    backbone = config.model if trainer.adapted.quantised else "backbone"
    summary = config.method_class.summary
    card = model_card(config, results, task, trainer.state.global_step, backbone, summary)
    (run / "README.md").write_text(card, encoding="utf-8")
    for adapter, scores in metrics.items():
        say(f"{adapter} on test: {_words(scores)}")
    return results


@torch.no_grad()
def backbone_change(adapted: AdaptedModel, model: str, dtype: DType) -> float:
    """|θ - θ_0| / |θ_0|, with θ_0 loaded once more."""
    if adapted.quantised:  # and so where it was
        return 0.0
    moved, norm = 0.0, 0.0
    now = adapted.backbone
    for name, start in load_weights(model, dtype).named_parameters():
        for part, before in zip(*(p.detach().flatten().split(_PART) for p in (now[name], start)), strict=True):
            moved += float((part.cpu().double() - before.double()).square().sum())
            norm += float(before.double().square().sum())
    return (moved / norm) ** 0.5


def _splits(task: Task, config: ZOFOConfig, say: Say) -> Splits:
    splits = run_splits(task, config)
    for note in splits.notes:
        say(note)
    return splits.reworded(lambda rows: task.reworded(rows, config.template))


def _training_parts(splits: Splits, config: ZOFOConfig) -> Sequence[list[Record]]:
    """The training rows as the method reads them: all, or those of the lower and of the upper level."""
    if len(config.method_class.splits) == 1:
        return (splits.train,)
    return two_levels(splits.train, config.lower_fraction)


def _require_rows(splits: Splits, config: ZOFOConfig) -> None:
    wanted = ["test"] if config.eval_strategy == "no" else ["test", "dev"]
    for name in wanted:
        if not vars(splits)[name]:
            raise ZofoError(f"no row is left for {name}: give more rows, or {name}_size")


def _resume_point(config: ZOFOConfig, run: Path) -> Path | None:
    """The checkpoint to resume from; refuses to write over what `run` holds, unless it goes on from there."""
    wanted, folder = config.resume_from_checkpoint, None
    if wanted and str(wanted).lower() not in ("false", "none"):
        folder = last_sealed(run) if str(wanted).lower() == "true" else Path(str(wanted)).expanduser()
        require_same(read_seal(folder)["config"], config.identity(), folder)
    if folder is None or not _is_of(folder, run):
        _require_free(run, config)
    return folder


def _is_of(checkpoint: Path, run: Path) -> bool:
    return checkpoint.absolute().parent.resolve() == run.resolve()  # which may be a link to a larger disk


def _held(run: Path) -> list[Path]:
    """What a folder holds of a run."""
    return [run / name for name in (*_RUN, *_BESIDE) if (run / name).exists()] + checkpoints(run)


def _require_free(run: Path, config: ZOFOConfig) -> None:
    held = _held(run)
    if not held:
        return
    if all(target.name in _BESIDE for target in held):
        raise ZofoError(f"{run} holds {held[0].name}, but no run that could be removed: choose another output_dir")
    if not config.overwrite_output_dir:
        raise ZofoError(
            f"{run} already holds a run ({held[0].name}): choose another output_dir, resume_from_checkpoint: true to "
            "go on, or overwrite_output_dir: true to remove it"
        )
    for key in ("model", "task", "data", "source", "adapter"):
        given = Path(str(vars(config)[key])).expanduser().resolve()
        if any(target.resolve() in (given, *given.parents) for target in held):
            raise ZofoError(
                f"{key} is {given}, which overwrite_output_dir would remove with the run in {run}: choose another "
                "output_dir"
            )


def _prepare_folder(run: Path, config: ZOFOConfig, resume: Path | None) -> None:
    if config.overwrite_output_dir and (resume is None or not _is_of(resume, run)):
        for target in _held(run):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        (run / "README.md").unlink(missing_ok=True)  # of the run that goes on: peft would add to it
        (run / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False), encoding="utf-8")


def _words(scores: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if key != "rows")
