"""`zofo train`: one run, from its configuration to its folder."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml

from zofo.commands.results import Tested, write_final
from zofo.config import ZOFOConfig
from zofo.console import Say
from zofo.errors import ZofoError, first_line
from zofo.keys import name_of
from zofo.models.adapters import positions_of
from zofo.models.load import load_model, require_movable
from zofo.models.peft import UPPER
from zofo.report.words import duration, size
from zofo.scoring.evaluation import Answer
from zofo.tasks.answers import answer_counts
from zofo.tasks.metrics import row_scores
from zofo.tasks.records import Record, digest
from zofo.tasks.splits import Splits
from zofo.tasks.table import TASK_FILE, introduction
from zofo.tasks.task import Task
from zofo.training.checkpoint import checkpoints, is_of, last_sealed, read_seal, require_same, steps_of
from zofo.training.diagnosable import cost_line
from zofo.training.folder import PREDICTIONS, claim, final_parts, owned, replacing, require_free, require_own, written
from zofo.training.given_rows import require_tasks
from zofo.training.objective import run_rewards
from zofo.training.rows import Posing, level_rows, require_prompt, run_splits, run_tasks, trained_on
from zofo.training.tasks import Scores, mean_scores
from zofo.training.trained_rows import rows_of_folders
from zofo.training.trainer import ZOFOTrainer

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
    trainer, tests, spec = _prepared(config, run, say, resume)
    texts, trains = _texts(config, spec), config.method_class.trains()
    in_context = any(test.shots for test in tests.values())
    if trains:
        trainer.require_trainable()
    if resume:
        trainer.require_resumable(resume)
    zero_shot: dict[str, dict[str, float]] = {}
    with _begun(run, resume, texts):
        if trains:
            _announce(trainer, resume, say)
        if config.zero_shot and (trains or in_context):
            zero_shot = _zero_shot(trainer, tests, resume)
            _tell("zero-shot", zero_shot, tests, config.final_split, say)
        if trains:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            trainer.require_finite()
        scored = {name: trainer.scored(tests[name].posed) for name in trainer.each_task()}
        metrics = {name: {a: scores for a, (scores, _) in own.items()} for name, own in scored.items()}
        texts[PREDICTIONS] = "".join(
            _predictions(trainer, name, tests[name], own[UPPER][1]) for name, own in scored.items()
        )
        if not trains and not in_context:
            zero_shot = {name: own[UPPER] for name, own in metrics.items()}
        found = _scores(config, metrics, zero_shot, tests)
        with final_parts(run) as new:
            results = write_final(trainer, tests, found, new, texts)
    for adapter, mean in results["metrics"].items():
        _tell(adapter, {name: own[adapter] for name, own in metrics.items()}, tests, config.final_split, say)
        if len(tests) > 1:
            say(f"{adapter}, mean of {len(tests)} tasks: {_words(mean)}")
    return results


def _prepared(
    config: ZOFOConfig, run: Path, say: Say, resume: Path | None
) -> tuple[ZOFOTrainer, dict[str, Tested], dict[str, Any] | None]:
    """The trainer, the rows of the final scores by task, and the content of a task file that was made from a table."""
    rewards = run_rewards(config)
    tasks = run_tasks(config)
    require_tasks(config, [*tasks])
    parts = {name: _part(task, config, say) for name, (task, _) in tasks.items()}
    spec = next(iter(tasks.values()))[1]
    config.settle_evaluations(sum(len(part.dev) for part in parts.values()))
    for part in parts.values() if config.method_class.trains() and config.needs_answers else ():
        say(answer_counts(part.splits.train, part.task.name))
    if spec and not resume:
        for line in introduction(next(iter(parts.values())).splits.train[0], run / TASK_FILE):
            say(line)
    if config.updates_backbone:
        require_movable(str(config.model), f"method {config.method}")
    model, tokenizer = load_model(str(config.model), config.dtype)
    width = min(config.max_length, positions_of(model))
    posed = {name: Posing(config, part.splits.train, tokenizer, width) for name, part in parts.items()}
    trainer = ZOFOTrainer(model, config, processing_class=tokenizer, reward_funcs=rewards, **_datasets(parts, posed))
    given = list(zip(trainer.tasks, parts.values(), posed.values(), strict=True))
    tests = {name: _tested(trainer, part, posing) for name, part, posing in given}
    if trainer.truncated:
        longer = f"{trainer.truncated} rows are longer than {trainer.longest} tokens"
        say(f"{longer}: their prompts were truncated from the left")
    tests = {name: _in_context(trainer, tests[name], posing, say) for name, _, posing in given}
    for name in trainer.each_task():
        trainer.require_scorable(tests[name].posed)
    return trainer, tests, spec


def _announce(trainer: ZOFOTrainer, resume: Path | None, say: Say) -> None:
    """What the training will do and take."""
    for line in (_plan(trainer, resume), *_backward(trainer)):
        say(line)
    if trainer.args.diagnose:
        say(cost_line(trainer.method, trainer.args))


def _tell(of: str, scores: Mapping[str, dict[str, float]], tests: Mapping[str, Tested], split: str, say: Say) -> None:
    """A line for each task."""
    for name, own in scores.items():
        say(f"{_of(name)}{of} on {len(tests[name].examples)} {split} rows: {_words(own)}")


@dataclass(frozen=True)
class _Part:
    """The rows of one of a run's tasks."""

    task: Task
    splits: Splits
    train: dict[str, list[Record]]  # by level
    final: list[Record]

    @property
    def dev(self) -> list[Record]:
        return self.splits.dev


def _part(task: Task, config: ZOFOConfig, say: Say) -> _Part:
    splits = _unseen(_splits(task, config, say), task, rows_of_folders(config.model, config.adapter_init), say)
    train = level_rows(splits.train, config)
    named = train | {"dev": splits.dev, "test": splits.test}
    say(f"{task.name}: " + ", ".join(f"{len(rows)} {name}" for name, rows in named.items()) + " rows")
    final = config.final_split
    if not named[final]:
        raise ZofoError(f"task {task.name}: no row is left for {final}: give more rows, or {final}_size")
    require_prompt(splits.train, task.name, config)
    return _Part(task, splits, train, named[final])


def _unseen(splits: Splits, task: Task, known: frozenset[bytes], say: Say) -> Splits:
    """The splits without the rows of dev and test that the model was trained on in an earlier run."""
    kept: dict[str, list[Record]] = {}
    for name, rows in {"dev": splits.dev, "test": splits.test}.items():
        kept[name] = [row for row, seen in zip(rows, trained_on(task, rows, known), strict=True) if not seen]
        if left_out := len(rows) - len(kept[name]):
            say(f"{task.name}: this model was trained on {left_out} rows of {name} before: they are left out")
    return replace(splits, **kept)


def _datasets(parts: Mapping[str, _Part], posed: Mapping[str, Posing]) -> dict[str, Any]:
    """The rows and metrics for `ZOFOTrainer`: of the only task, or of several by their names."""
    levels = [*next(iter(parts.values())).train]
    found: dict[str, dict[str, Any]] = {
        key: {name: posed[name].trained(part.train[level]) for name, part in parts.items()}
        for key, level in zip(("train_dataset", "upper_dataset"), levels, strict=False)
    }
    found["eval_dataset"] = {name: posed[name].evaluated(part.dev)[0] for name, part in parts.items()}
    found["metrics"] = {name: part.task.metrics for name, part in parts.items()}
    if len(parts) > 1:
        return found
    return {key: next(iter(by_task.values())) for key, by_task in found.items()}


def _tested(trainer: ZOFOTrainer, part: _Part, posing: Posing) -> Tested:
    """The rows of the final scores, as the model reads them without examples."""
    records = posing.alone(part.final)
    examples = trainer.examples(records)
    return Tested(part.task, part.final, examples, records, examples)


def _scores(
    config: ZOFOConfig,
    metrics: Mapping[str, Scores],
    zero_shot: Mapping[str, dict[str, float]],
    tests: Mapping[str, Tested],
) -> dict[str, Any]:
    """The entries of results.json that hold scores: of several tasks their means, and each one's own."""
    means = mean_scores([{UPPER: scores} for scores in zero_shot.values()])[UPPER] if zero_shot else None
    found: dict[str, Any] = {"metrics": mean_scores([*metrics.values()]), "zero_shot": means}
    if len(tests) > 1:
        found["tasks"] = dict(metrics)
        found["zero_shot_tasks"] = dict(zero_shot)
    else:
        shots = next(iter(tests.values())).shots
        found |= {"shots": shots} if shots else {}
    if config.final_split != "test":
        found["final_split"] = config.final_split
    return found


def _of(task: str) -> str:
    return f"{task}: " if task else ""


def _plan(trainer: ZOFOTrainer, resume: Path | None) -> str:
    """What the run will do and take: iterations, time, memory, and where its checkpoints are."""
    config, steps = trainer.args, trainer.planned_steps()
    done = steps_of(resume) if resume else 0
    parts = [
        f"goes on from {resume}: {max(0, steps - done)} of {steps} iterations left" if resume else f"{steps} iterations"
    ]
    tried = trainer.try_step() if done < steps else None
    if tried:
        parts.append(f"about {duration(tried.seconds * config.tasks_per_step * (steps - done))} without evaluations")
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


def _zero_shot(trainer: ZOFOTrainer, tests: Mapping[str, Tested], resume: Path | None) -> dict[str, dict[str, float]]:
    """The scores before training, by task; a checkpoint of the same run on the same rows knows them."""
    known = read_seal(resume) if resume else {}
    found: dict[str, dict[str, float]] = {}
    for name in trainer.each_task():
        key = f"{_ZERO_SHOT} {name}" if name else _ZERO_SHOT
        rows, stored = digest(tests[name].rows, columns=trainer.rewards is not None), known.get(key)
        metrics = {metric for metric in trainer.metrics if isinstance(metric, str)}
        if not isinstance(stored, dict) or stored.get("rows") != rows or metrics - stored.get("scores", {}).keys():
            stored = {"rows": rows, "scores": trainer.score_backbone(tests[name].examples)}
        trainer.notes[key] = stored
        found[name] = cast("dict[str, float]", stored["scores"])
    return found


def _predictions(trainer: ZOFOTrainer, task: str, test: Tested, answers: Sequence[Answer]) -> str:
    """JSON lines: of each test row a digest, what the deployed model answers, what is right, and the row's score."""
    texts = [answer.text for answer in answers]
    right = [e.right if record.answered else () for e, record in zip(test.examples, test.rows, strict=True)]
    rewards = [answer.reward for answer in answers]
    scores = rewards if trainer.rewards else row_scores(test.task.metrics[0], texts, right)
    named = {"task": task} if task else {}
    rows = [
        {**named, "row": digest([record]), "group": record.group, "prediction": text, "right": [*given], "score": score}
        for record, text, given, score in zip(test.rows, texts, right, scores, strict=True)
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _splits(task: Task, config: ZOFOConfig, say: Say) -> Splits:
    splits = run_splits(task, config)
    for note in splits.notes:
        say(note)
    return splits.reworded(lambda rows: task.reworded(rows, config.template))


def _in_context(trainer: ZOFOTrainer, test: Tested, posing: Posing, say: Say) -> Tested:
    """The same with training rows in front of the test rows, which `seed` chooses, as many as fit."""
    if not posing.shots:
        return test
    records, used = posing.evaluated(test.rows)
    say(f"{min(used)} to {max(used)} of {posing.shots} examples fit in front of a row")
    fitting = {"least": min(used), "mean": sum(used) / len(used)}
    return replace(test, asked=records, posed=trainer.examples(records), shots=fitting)


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
    claim(run, *written(run))  # a copied one may have no marker
    yield


def _words(scores: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if key != "rows")
