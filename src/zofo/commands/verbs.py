"""What each verb of the command line does with its options. Libraries are imported when it runs: they take seconds."""

import argparse
import sys
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError


def train(options: argparse.Namespace, keys: list[str]) -> None:
    """One run, and where it is."""
    from zofo.commands.train import train
    from zofo.config_parser import parse_config

    config = parse_config(options.config, keys)
    _quiet_libraries()
    results = train(config, _say, options.config)
    run = Path(str(config.output_dir))
    adapter = " with the adapter upper/" if (run / "upper").is_dir() else ""
    adapter = " with the adapter of a task in tasks/" if (run / "tasks").is_dir() else adapter
    task = f" --task {results['task'][0]}" if isinstance(results["task"], list) else ""
    _say(f"run folder: {run}; to deploy: backbone/{adapter}, as zofo predict --run {run}{task} does")


def estimate(options: argparse.Namespace, keys: list[str]) -> None:
    """Memory and time of the methods, as they are found."""
    from zofo.commands import estimate
    from zofo.config_parser import parse_config

    config = parse_config(options.config, keys)
    _quiet_libraries()
    rows: list[estimate.Row] = []
    for row in estimate.estimate(config, timed=not options.memory_only):
        if not rows:
            _say(estimate.head(config))
        rows.append(row)
        _say(estimate.line(row, config))
    _say(estimate.notes(rows, config))
    _write(estimate.as_json(rows, config), options.output)


def evaluate(options: argparse.Namespace, keys: list[str]) -> None:
    """The scores of a model, or of all tasks of a run."""
    from zofo.commands.eval import Manner, eval_config, evaluate_model, given_keys, settings_of, table_of_run
    from zofo.commands.harness import evaluate_with_harness
    from zofo.commands.predict import write
    from zofo.commands.results import as_json
    from zofo.commands.stored import StoredRun

    for name in ("text", "label", "log_samples") if options.harness else ():
        if vars(options)[name]:
            raise ZofoError(f"--{name} is of zofo's own tasks: the harness has its own rows, words and scores")
    _quiet_libraries()
    whole = bool(options.data or "source" in given_keys(keys)) and options.split == "test"
    manner = Manner(options.template, options.shots, options.scoring, options.split, options.batch_size, whole)
    if options.task and options.data:
        raise ZofoError("--data is not allowed with --task: for rows of your own in its form, give --source FILE")
    if options.harness:
        model, adapter = _parts(options, _whose_adapter(options))
        _note_of_beside(model, adapter)
        report: dict[str, Any] = {"model": model, "adapter": adapter}
        report["harness"] = evaluate_with_harness(model, adapter, options.harness, manner, keys)
    else:
        table = {key: vars(options)[key] for key in ("data", "text", "label")}
        if options.folder and options.data and not options.task:
            table = table_of_run(StoredRun.at(options.folder), table)
        groups = _groups(options, table)
        samples: list[dict[str, Any]] = []
        (model, adapter), *others = groups
        report = {"model": model, "adapter": [adapter, *(each for _, each in others)] if others else adapter}
        report |= {"split": options.split, "settings": {}, "tasks": {}}
        for (model, adapter), tasks in groups.items():
            _note_of_beside(model, adapter)
            configs = [eval_config(model, task, keys, adapter, table) for task in tasks]
            scores = evaluate_model(model, adapter, configs, manner, _note, samples)
            for (name, own), config in zip(scores.items(), configs, strict=True):
                report["settings"][name], report["tasks"][name] = settings_of(config, manner), own
        if options.log_samples:
            write(samples, options.log_samples)
    _say(as_json(report).rstrip("\n"))
    _write(report, options.output)


def predict(options: argparse.Namespace, keys: list[str]) -> None:
    """Answers to the rows of a table."""
    from zofo.commands import predict
    from zofo.commands.eval import eval_config
    from zofo.commands.stored import StoredRun

    _quiet_libraries()
    task = StoredRun.at(options.folder).place(options.task) if options.folder else options.task
    model, adapter = _parts(options, task)
    _note_of_beside(model, adapter)
    config = eval_config(model, task, keys, adapter)
    rows = predict.rows_of(options.data, options.output)
    found = predict.predict(model, adapter, config, rows, options.batch_size, _note)
    if options.output:
        predict.write(found, options.output)
        _note(f"{len(found)} rows: {options.output}")
    else:
        _say(predict.as_jsonl(found).decode().rstrip("\n"))


def _groups(options: argparse.Namespace, table: dict[str, Any]) -> dict[tuple[str, str | None], list[str | None]]:
    """The models and adapters to evaluate, each with its tasks: of a run over several tasks, all of them."""
    from zofo.commands.stored import StoredRun

    tasks: list[str | None] = options.task or [None]
    run = StoredRun.at(options.folder) if options.folder else None
    if run and tasks == [None] and len(run.tasks) > 1 and not any(table.values()):
        tasks = [*run.tasks.values()]
    groups: dict[tuple[str, str | None], list[str | None]] = {}
    for task in tasks:
        place = run.place(task) if run else task
        groups.setdefault(_parts(options, place), []).append(place)
    return groups


def _whose_adapter(options: argparse.Namespace) -> str | None:
    """The task that the harness takes the adapter of, in a run over several; --task has no other meaning there."""
    from zofo.commands.stored import StoredRun

    if not options.task:
        return None
    if len(options.task) > 1 or not options.folder or len(StoredRun.at(options.folder).tasks) < 2:
        raise ZofoError(
            "--task with --harness names one of several tasks of a --run, whose adapter counts: leave it out"
        )
    return options.task[0]


def _parts(options: argparse.Namespace, task: str | None = None) -> tuple[str, str | None]:
    """The model and the adapter that --run or --model and --adapter name; of a run over several tasks, that of one."""
    from zofo.commands.stored import StoredRun
    from zofo.training.folder import settle_parts

    if options.folder:
        settle_parts(str(options.folder / "backbone"))
        return StoredRun.at(options.folder).parts(options.adapter or "upper", task)
    settle_parts(options.model, options.adapter)
    return options.model, options.adapter


def _note_of_beside(model: str, adapter: str | None) -> None:
    """Says that a merged model is scored without the virtual tokens that could not be merged into it."""
    place = Path(model).expanduser()
    if adapter or not (place / "config.json").is_file():
        return
    for file in sorted(place.glob("*/adapter_config.json")):
        _note(f"{model} counts without the adapter beside it: with it, add --adapter {file.parent}")


def compare(options: argparse.Namespace, keys: list[str]) -> None:
    """Several methods under one budget."""
    from zofo.commands.compare import compare

    _quiet_libraries()
    compare(options.config, _say, options.dry_run)


def merge(options: argparse.Namespace, keys: list[str]) -> None:
    """A run as one plain model folder."""
    from zofo.commands.merge import merge

    _quiet_libraries()
    merge(options.folder, options.adapter, options.output, options.dtype, _say, options.task)
    _say(f"merged model: {options.output}")


def adapt(options: argparse.Namespace, keys: list[str]) -> None:
    """A new task from a few examples."""
    from zofo.commands.adapt import Asked, adapt, adapt_config
    from zofo.commands.stored import StoredRun

    _quiet_libraries()
    run = StoredRun.at(options.folder) if options.folder else None
    model = run.backbone if run else options.model
    task = run.place(options.task) if run else options.task
    asked = Asked(model, run, str(task), options.shots, options.draws, options.start)
    results = adapt(asked, adapt_config(asked, options.config, keys, options.output), options.output, _say)
    for name in ("in_context", "metrics"):
        for key, of in results[name].items():
            _say(f"{name} {key}: mean {of['mean']:.4g}, worst {of['worst']:.4g} of {options.draws} draws")
    _say(f"results: {options.output / 'results.json'}")


def tasks(options: argparse.Namespace, keys: list[str]) -> None:
    """What can be trained on."""
    from zofo.commands import tasks

    _say(tasks.page(options.name, options.source) if options.name else tasks.listing())


def _quiet_libraries() -> None:
    """Keeps loading bars and notices of the libraries from burying what the run has to say."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _say(line: str) -> None:
    print(line, flush=True)


def _note(line: str) -> None:
    """Says something beside a result that is read by programs."""
    print(line, file=sys.stderr, flush=True)


def _write(report: Any, file: Path | None) -> None:
    from zofo.commands.results import as_json, write_new

    if file:
        write_new(file, as_json(report).encode())
