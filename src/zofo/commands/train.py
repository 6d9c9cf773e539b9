"""`zofo train`: one run, from its configuration to its folder."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from zofo.config import ZOFOConfig
from zofo.console import Say
from zofo.errors import ZofoError, first_line
from zofo.keys import name_of
from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_model, load_weights, require_movable
from zofo.models.peft import UPPER
from zofo.report.card import Shown, model_card
from zofo.report.curves import plot_curves
from zofo.report.words import duration, size
from zofo.scoring.evaluation import Answer
from zofo.scoring.tokens import Example
from zofo.tasks.answers import answer_counts
from zofo.tasks.metrics import row_scores
from zofo.tasks.prompts import demonstrations, in_context, tokens_of_chat
from zofo.tasks.records import Record, digest
from zofo.tasks.splits import Splits
from zofo.tasks.table import TASK_FILE, introduction
from zofo.tasks.task import Task
from zofo.training.attribution import diagnosed
from zofo.training.checkpoint import checkpoints, is_of, last_sealed, read_seal, require_same, seal, steps_of, writing
from zofo.training.diagnosable import cost_line
from zofo.training.folder import PREDICTIONS, claim, final_parts, owned, replacing, require_free, require_own, written
from zofo.training.objective import run_rewards
from zofo.training.rows import level_rows, run_splits, run_task
from zofo.training.trainer import ZOFOTrainer

_PART = 1 << 24  # numbers in double precision at a time
_ZERO_SHOT = "zero_shot"
_READ = ("model", "task", "data", "source", "adapter", "adapter_init")


def train(config: ZOFOConfig, say: Say, config_file: Path | None = None) -> dict[str, Any]:
    """One run: loads, trains, evaluates, and writes the run folder. Returns what `results.json` holds.

    `config_file` is where `config` was read from; a run never removes it.

    Raises:
        ZofoError: if anything that was given cannot work; nothing has been overwritten then.
        KeyboardInterrupt: after Ctrl-C, with the last whole checkpoint, if there is one.
    """
    if not config.model:
        raise ZofoError("model is not given: add model: ... to the config, or --model ... to the command")
    run = Path(str(config.output_dir))
    with owned(run):
        try:
            return _train(config, run, say, _resume_point(config, run, config_file))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(*_last_of(config, run)) from stop


def _train(config: ZOFOConfig, run: Path, say: Say, resume: Path | None) -> dict[str, Any]:
    for notice in config.notices():
        say(notice)
    rewards = run_rewards(config)
    task, spec = run_task(config)
    splits = _splits(task, config, say)
    parts = level_rows(splits.train, config)
    named = parts | {"dev": splits.dev, "test": splits.test}
    say(f"{task.name}: " + ", ".join(f"{len(rows)} {name}" for name, rows in named.items()) + " rows")
    final = config.final_split
    rows = named[final]
    if not rows:
        raise ZofoError(f"no row is left for {final}: give more rows, or {final}_size")
    config.settle_evaluations(len(splits.dev))
    if config.method_class.trains() and config.needs_answers:
        say(answer_counts(splits.train, task.name))
    for line in introduction(splits.train[0], run / TASK_FILE) if spec and not resume else ():
        say(line)
    if config.updates_backbone:
        require_movable(str(config.model), f"method {config.method}")
    model, tokenizer = load_model(str(config.model), config.dtype)
    trainer = ZOFOTrainer(
        model,
        config,
        *parts.values(),
        eval_dataset=splits.dev,
        processing_class=tokenizer,
        metrics=task.metrics,
        reward_funcs=rewards,
    )
    test = trainer.examples(rows)
    if trainer.truncated:
        longer = f"{trainer.truncated} rows are longer than {trainer.longest} tokens"
        say(f"{longer}: their prompts were truncated from the left")
    trainer.require_scorable(test)
    asked, fitting = _in_context(trainer, splits.train, rows, say)
    in_front = trainer.examples(asked) if fitting else test
    texts = _texts(config, spec)
    if config.method_class.trains():
        trainer.require_trainable()
    if resume:
        trainer.require_resumable(resume)
    zero_shot: dict[str, float] = {}
    with _begun(run, resume, texts):
        if config.method_class.trains():
            for line in (_plan(trainer, resume), *_backward(trainer)):
                say(line)
            if config.diagnose:
                say(cost_line(trainer.method, config))
        if config.zero_shot and (config.method_class.trains() or fitting):
            zero_shot = _zero_shot(trainer, rows, test, resume)
            say(f"zero-shot on {len(test)} {final} rows: {_words(zero_shot)}")
        if config.method_class.trains():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            trainer.require_finite()
        scored = trainer.scored(in_front)
        metrics = {adapter: scores for adapter, (scores, _) in scored.items()}
        texts[PREDICTIONS] = _predictions(trainer, task, rows, test, scored[UPPER][1])
        if not config.method_class.trains() and not fitting:
            zero_shot = metrics[UPPER]
        scores = {"metrics": metrics, "zero_shot": zero_shot or None, **fitting}
        if final != "test":
            scores["final_split"] = final
        with final_parts(run) as new:
            results = _write_final(trainer, task, scores, _shown(trainer, asked, in_front), new, texts, test)
    for adapter, own in metrics.items():
        say(f"{adapter} on {len(test)} {final} rows: {_words(own)}")
    return results


def _plan(trainer: ZOFOTrainer, resume: Path | None) -> str:
    """What the run will do and take: iterations, time, memory, and where its checkpoints are."""
    config, steps = trainer.args, trainer.planned_steps()
    done = steps_of(resume) if resume else 0
    parts = [
        f"goes on from {resume}: {max(0, steps - done)} of {steps} iterations left" if resume else f"{steps} iterations"
    ]
    tried = trainer.try_step() if done < steps else None
    if tried:
        parts.append(f"about {duration(tried.seconds * (steps - done))} without evaluations")
        parts.append(f"{size(tried.peak)} at the peak")
    return f"{config.method}: {', '.join(parts)}; {_checkpoints(config, steps)}"


def _backward(trainer: ZOFOTrainer) -> list[str]:
    """A line that says through which blocks backpropagation runs, where it leaves some out."""
    adapted, method = trainer.adapted, trainer.args.method_class
    if not method.backpropagates or not adapted.adapters:
        return []
    through, blocks = adapted.blocks_of_backward
    if len(through) == blocks:
        return []
    where = f"layers {through.start}-{blocks - 1}" if len(through) > 1 else f"layer {through.start}"
    return [f"backpropagation runs through {where} alone; those below keep no activations"]


def _checkpoints(config: ZOFOConfig, steps: int) -> str:
    kind = name_of(config.save_strategy)
    if kind == "no":
        return "no checkpoints (save_strategy: no)"
    every = math.ceil(config.save_steps * steps if config.save_steps < 1 else config.save_steps)
    steadily = f"every {every} iterations" if every < steps else "at the end"
    when = {"steps": steadily, "epoch": "after every epoch", "best": "of better evaluations"}[kind]
    limit = config.save_total_limit
    kept = f", of which the last {limit} stay" if limit and limit > 1 else ", of which the last stays" if limit else ""
    return f"checkpoints {when} in {config.output_dir}{kept if when != 'at the end' else ''}"


def _zero_shot(
    trainer: ZOFOTrainer, records: Sequence[Record], test: Sequence[Example], resume: Path | None
) -> dict[str, float]:
    """The scores before training; a checkpoint of the same run on the same rows knows them."""
    rows = digest(records)
    stored = read_seal(resume).get(_ZERO_SHOT) if resume else None
    if not isinstance(stored, dict) or stored.get("rows") != rows:
        stored = {"rows": rows, "scores": trainer.score_backbone(test)}
    trainer.notes[_ZERO_SHOT] = stored
    return cast("dict[str, float]", stored["scores"])


def _predictions(
    trainer: ZOFOTrainer,
    task: Task,
    records: Sequence[Record],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> str:
    """JSON lines: of each test row a digest, what the deployed model answers, what is right, and the row's score."""
    texts = [answer.text for answer in answers]
    right = [e.right if record.answered else () for e, record in zip(examples, records, strict=True)]
    rewards = [answer.reward for answer in answers]
    scores = rewards if trainer.rewards else row_scores(task.metrics[0], texts, right)
    rows = [
        {"row": digest([record]), "group": record.group, "prediction": text, "right": [*given], "score": score}
        for record, text, given, score in zip(records, texts, right, scores, strict=True)
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _write_final(
    trainer: ZOFOTrainer,
    task: Task,
    scores: dict[str, Any],
    shown: Shown,
    new: Path,
    texts: Mapping[str, str],
    rows: Sequence[Example],
) -> dict[str, Any]:
    """Writes and seals what the run ends with: first what was learned, so that it stays whatever happens later."""
    config = trainer.args
    with writing(Path(str(config.output_dir))):
        trainer.save_final(new, home=new.parent)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        seal(new, {})
    results: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "model": config.model,
        "task": task.name,
        **scores,
        "cost": asdict(trainer.cost),
        "backbone_change": backbone_change(trainer.adapted, str(config.model), config.dtype),
        **({} if task.has_options and not trainer.rewards else {"answer_span": asdict(trainer.span)}),
    }
    if config.diagnose and config.method_class.trains():
        known = scores["zero_shot"], scores["metrics"][UPPER]
        results["diagnosis"] = diagnosed(trainer, str(config.model), rows, *known)
    backbone = str(config.model) if trainer.adapted.quantised else "backbone"
    card = model_card(config, results, task, trainer.state.global_step, backbone, shown, trainer.span)
    title = f"{config.method} ({config.adapter}) on {task.name}"
    with writing(Path(str(config.output_dir))):
        text = json.dumps(_strict(results), indent=2, allow_nan=False)
        (new / "results.json").write_text(text + "\n", encoding="utf-8")
        plot_curves(trainer.state.log_history, title, new / "curves.png")
        (new / "README.md").write_text(card, encoding="utf-8")
        seal(new, {})
    return results


def _shown(trainer: ZOFOTrainer, records: Sequence[Record], examples: Sequence[Example]) -> Shown:
    """The first test row whose prompt was not cut, or else the first one."""
    first = next((i for i, example in enumerate(examples) if not example.truncated), 0)
    (record,) = trainer.posed(records[first : first + 1])
    return Shown.of(record, examples[first], cast(PreTrainedTokenizerBase, trainer.processing_class))


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


def _in_context(
    trainer: ZOFOTrainer, train: Sequence[Record], rows: list[Record], say: Say
) -> tuple[list[Record], dict[str, Any]]:
    """The test rows behind `shots` training rows, which `seed` chooses, and how many fit; or just the test rows."""
    config, tokenizer = trainer.args, cast(PreTrainedTokenizerBase, trainer.processing_class)
    if config.method_class.trains() or not config.shots:
        return rows, {}
    shown = demonstrations(train, config.shots, config.seed, rows)
    around = tokens_of_chat(rows[0], tokenizer, config.system_prompt) if config.chat_template else 0
    records, used = in_context(rows, shown, tokenizer, trainer.longest - around)
    say(f"{min(used)} to {max(used)} of {config.shots} examples fit in front of a row")
    return records, {"shots": {"least": min(used), "mean": sum(used) / len(used)}}


def _resume_point(config: ZOFOConfig, run: Path, config_file: Path | None) -> Path | None:
    """The checkpoint to resume from; refuses to write over what `run` holds, unless it goes on from there."""
    wanted, folder = config.resume_from_checkpoint, None
    if wanted and str(wanted).lower() not in ("false", "none"):
        folder = last_sealed(run) if str(wanted).lower() == "true" else Path(str(wanted)).expanduser()
        require_same(read_seal(folder)["config"], config.identity(), folder)
    if folder is not None and is_of(folder, run):
        require_own(run)
        return folder
    read = {key: Path(str(value)) for key in _READ if (value := vars(config)[key])}
    read |= {"config": config_file} if config_file else {}
    read |= {"resume_from_checkpoint": folder} if folder else {}
    require_free(run, bool(config.overwrite_output_dir), read)
    return folder


def _last_of(config: ZOFOConfig, run: Path) -> list[str]:
    """The last checkpoint that this run could go on from, if there is one."""
    for folder in reversed(checkpoints(run)):
        with suppress(ZofoError):  # half written, or of the run before
            require_same(read_seal(folder)["config"], config.identity(), folder)
            return [f"{folder} is whole, after {steps_of(folder)} iterations"]
    return []


def _texts(config: ZOFOConfig, spec: dict[str, Any] | None) -> dict[str, str]:
    """The files that say what a run is, by name."""
    try:
        texts = {"config.yaml": yaml.safe_dump(config.resolved(), sort_keys=False)}
    except yaml.YAMLError as error:
        raise ZofoError(
            f"config.yaml cannot hold the keys of this run ({first_line(error)}): leave out what is no plain value"
        ) from error
    return texts | ({TASK_FILE: yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)} if spec else {})


@contextmanager
def _begun(run: Path, resume: Path | None, texts: Mapping[str, str]) -> Generator[None]:
    """A run that goes on leaves everything as it is until its next checkpoint; a new one replaces what was there."""
    if resume is None or not is_of(resume, run):
        with replacing(run, texts):
            yield
        return
    claim(run, *written(run))  # an older version has left no marker
    yield


def _strict(value: Any) -> Any:
    """The same with null for a number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(scores: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if key != "rows")
