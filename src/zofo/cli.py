"""The command line: `zofo train`, `estimate`, `eval`, `merge`, `tasks`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zofo.errors import ZofoError

_TRAIN_HELP = """usage: zofo train --config FILE [--key value ...]

One run: loads a model and a task, trains, evaluates on test rows, and writes a run folder with backbone/, the
adapters, checkpoints, results.json, curves.png and a model card. Keys come from a flat YAML file; the command line
wins.

  zofo train --config configs/demo.yaml --method zo --adapter none --zo_learning_rate 3e-5 --output_dir runs/mezo
  zofo train --config configs/demo.yaml --output_dir runs/bilevel --resume_from_checkpoint true

keys of zofo:
{own}

keys of transformers.TrainingArguments work as well, among them:
{inherited}
"""
_ESTIMATE_HELP = """usage: zofo estimate --config FILE [--key value ...] [--memory_only] [--output FILE]

What a run would take, before it: the memory of each method at its peak, found without the weights by running a step on
tensors that have shapes only, and the seconds of a step, from a few timed forwards and backwards. The model, the
adapter, the batches and the other keys are those of zofo train, from the same file; the row of the run's own method is
marked. Evaluations are not counted. Without a task or data, rows of max_length tokens are assumed; chat_template adds
nothing; and `trained` counts the whole backbone, whatever zo_parameters, zo_exclude and zo_layers say.

  zofo estimate --config configs/demo.yaml
  zofo estimate --config configs/demo.yaml --per_device_train_batch_size 16 --gradient_checkpointing true --memory_only

  --memory_only          do not load the weights, and measure no time
  --output               also write the result to this JSON file
"""
_INHERITED = (
    "output_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "weight_decay",
    "max_grad_norm", "warmup_steps", "eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "resume_from_checkpoint", "report_to", "use_cpu", "disable_tqdm",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except ZofoError as error:
        return _fail(" ".join(str(error).split()), 2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or ''} - free space or choose another folder", 2)
    except KeyboardInterrupt:
        return _fail("interrupted; checkpoints written so far are whole (resume_from_checkpoint: true goes on)", 130)


def _fail(message: str, status: int) -> int:
    print(f"zofo: {message}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    parser = _parser()
    for verb, run in {"train": _train, "estimate": _estimate}.items():
        if arguments[:1] == [verb]:  # they take every key of the configuration
            return run(arguments[1:])
    options = parser.parse_args(arguments or ["--help"])
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ZofoError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from zofo import __version__

    parser = _Parser(
        prog="zofo",
        description="Fine-tune every weight of a language model in the memory of PEFT.",
        epilog="Start with: zofo tasks; zofo train --help",
    )
    parser.add_argument("--version", action="version", version=f"zofo {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    verbs.add_parser("train", help="one run: train, evaluate, write a run folder", add_help=False)
    verbs.add_parser("estimate", help="memory and time of a run, before it", add_help=False)
    _add_eval(verbs)
    _add_merge(verbs)
    _add_tasks(verbs)
    return parser


def _add_eval(verbs: Any) -> None:
    parser = verbs.add_parser(
        "eval",
        help="score a model, with or without an adapter, on a task",
        description="Scores a model on the rows that a training run with the same sizes and data seed calls test.",
        epilog="Example: zofo eval --model runs/bilevel/backbone --adapter runs/bilevel/upper --task movie_reviews",
    )
    parser.add_argument("--model", required=True, help="Hub id, folder, .gguf file, or pkg://PACKAGE/PATH")
    parser.add_argument("--adapter", help="a PEFT folder, such as RUN/upper; none by default")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", nargs="+", help="names from `zofo tasks`, or task files")
    which.add_argument("--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, by its own rules")
    parser.add_argument("--split", default="test", choices=["test", "dev", "train"], help="default: test")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--batch_size", type=_positive, default=16, help="rows per forward (default 16)")
    group = parser.add_argument_group("which rows; by default those of the run that the model is the backbone of")
    group.add_argument("--test_size", type=_positive, help="rows of test (otherwise a fifth of all, at most 400)")
    group.add_argument("--dev_size", type=_positive, help="rows of dev (otherwise a fifth of all, at most 200)")
    group.add_argument("--data_seed", type=int, help="order of the rows (otherwise 42, as in training)")
    group.add_argument("--max_length", type=_positive, help="tokens of prompt and answer (otherwise 512)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(otherwise float32)")
    group.add_argument("--loss", choices=["options", "lm"], help="which loss to report (otherwise options)")
    group.add_argument("--source", help="the task's rows: a folder of train.* and validation.*, or a file")
    group = parser.add_argument_group("how a row is put to the model, and how options are compared")
    group.add_argument("--template", help="number of one of the task's templates (otherwise 0), or all")
    group.add_argument("--shots", type=_positive, help="training rows in front of each row, as many as fit")
    group.add_argument(
        "--scoring",
        choices=["mean", "sum", "pmi", "channel"],
        help="log-probability of an option per token (mean, otherwise), in all (sum), less that behind the task's "
        "premise (pmi, calibrated), or of the prompt behind the option (channel)",
    )
    group.add_argument("--chat_template", action="store_true", default=None, help="use the model's chat format")
    group.add_argument("--system_prompt", help="of the chat")
    parser.set_defaults(run=_eval)


def _add_merge(verbs: Any) -> None:
    parser = verbs.add_parser(
        "merge",
        help="write backbone and adapter as one plain Hugging Face folder",
        description="Merges an adapter of a run into its backbone; the result loads with plain transformers.",
        epilog="Example: zofo merge --run runs/bilevel --adapter upper --output merged",
    )
    parser.add_argument("--run", required=True, type=Path, dest="folder", help="the output_dir of zofo train")
    parser.add_argument("--adapter", default="upper", choices=["upper", "lower"], help="default: upper")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the result; default: the backbone's"
    )
    parser.set_defaults(run=_merge)


def _add_tasks(verbs: Any) -> None:
    parser = verbs.add_parser(
        "tasks",
        help="what can be trained on out of the box",
        description="Lists the tasks in the box, or shows one row of a task in the words of each of its templates. A "
        "task of your own is a YAML file; see docs/tasks.md.",
        epilog="Example: zofo tasks; zofo tasks tweets; then zofo train --model ... --task tweets",
    )
    parser.add_argument("name", nargs="?", help="of a task, or a task file")
    parser.add_argument("--source", help="the task's rows: a folder of train.* and validation.*, or a file")
    parser.set_defaults(run=_tasks)


def _train(arguments: list[str]) -> int:
    from zofo.config import parse_config

    if "--help" in arguments or "-h" in arguments:
        print(_train_help())
        return 0
    parser = _Parser(prog="zofo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    options, keys = parser.parse_known_args(arguments)
    _settle()
    from zofo.commands.train import train

    config = parse_config(options.config, keys)
    _quiet_libraries()
    train(config, _say)
    _say(f"run folder: {config.output_dir}")
    return 0


def _estimate(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(_ESTIMATE_HELP)
        return 0
    parser = _Parser(prog="zofo estimate", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory_only", action="store_true")
    options, keys = parser.parse_known_args(arguments)
    _require_new(options.output)
    _settle()
    from zofo.commands import estimate
    from zofo.config import parse_config

    config = parse_config(options.config, keys)
    _quiet_libraries()
    rows = estimate.estimate(config, timed=not options.memory_only)
    print(estimate.table(rows, config))
    if options.output:
        text = json.dumps(estimate.as_json(rows, config), indent=2)
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _eval(options: argparse.Namespace) -> int:
    _require_new(options.output)
    _settle()
    if options.harness:
        return _harness(options)
    from zofo.commands import eval as evaluator

    _quiet_libraries()
    tasks = {task: evaluator.eval_settings(options.model, task, vars(options)) for task in options.task}
    scores = evaluator.evaluate_model(options.model, options.adapter, tasks, options.split, options.batch_size, _note)
    said = {
        "model": options.model,
        "adapter": options.adapter,
        "split": options.split,
        "settings": {task: dataclasses.asdict(settings) for task, settings in tasks.items()},
        "tasks": scores,
    }
    _report(said, options.output)
    return 0


def _harness(options: argparse.Namespace) -> int:
    taken = ("split", "test_size", "dev_size", "data_seed", "loss", "source", "template", "scoring", "system_prompt")
    stated = vars(options)
    given = [name for name in (*taken, "chat_template") if stated[name] not in (None, "test")]
    if given:
        raise ZofoError(f"--{given[0]} is of zofo's own tasks: the harness has its own rows, words and scores")
    from zofo.commands import harness

    _quiet_libraries()
    scores = harness.evaluate_with_harness(
        options.model,
        options.adapter,
        options.harness,
        batch_size=options.batch_size,
        shots=options.shots or 0,
        dtype=options.dtype or "float32",
        max_length=options.max_length,
    )
    _report({"model": options.model, "adapter": options.adapter, "harness": scores}, options.output)
    return 0


def _report(found: dict[str, Any], file: Path | None) -> None:
    text = json.dumps(found, indent=2)
    print(text)
    if file:
        file.write_text(text + "\n", encoding="utf-8")


def _merge(options: argparse.Namespace) -> int:
    _settle()
    from zofo.commands.merge import merge

    _quiet_libraries()
    merge(options.folder, options.adapter, options.output, options.dtype, _say)
    _say(f"merged model: {options.output}")
    return 0


def _tasks(options: argparse.Namespace) -> int:
    _settle()
    from zofo.commands import tasks as gallery

    _quiet_libraries()
    print(gallery.page(options.name, options.source) if options.name else gallery.listing())
    return 0


def _train_help() -> str:
    from zofo.config import ZOFOConfig, own_keys

    fields = {f.name: f for f in dataclasses.fields(ZOFOConfig)}
    own = [*own_keys(), "learning_rate", "lr_scheduler_type", "logging_steps"]
    lines = [f"  {n:22} {fields[n].metadata['help']} (default {fields[n].default})" for n in own]
    inherited = [f"  {', '.join(_INHERITED[i : i + 5])}" for i in range(0, len(_INHERITED), 5)]
    return _TRAIN_HELP.format(own="\n".join(lines), inherited="\n".join(inherited))


def _settle() -> None:
    """Before the libraries are imported: no warnings of theirs, no clash of tokenizer threads and forks."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _quiet_libraries() -> None:
    """Keeps loading bars and notices of the libraries from burying what the run has to say."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _require_new(file: Path | None) -> None:
    if file and file.exists():
        raise ZofoError(f"{file} exists already and is not overwritten: give a new file")


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, but is {value}")
    return value


def _say(line: str) -> None:
    print(line, flush=True)


def _note(line: str) -> None:
    """Says something beside a result that is read by programs."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
