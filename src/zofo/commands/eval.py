"""`zofo eval`: a model on the rows of tasks, in every way that a row can be put to it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from zofo.commands.stored import Loaded, StoredRun
from zofo.config import ZOFOConfig
from zofo.config_parser import parse_config
from zofo.console import Say
from zofo.errors import ZofoError
from zofo.models.peft import note_of_move
from zofo.scoring.evaluation import Answer, Evaluator, Scoring, require_numbers
from zofo.scoring.generation import ONE_LINE, AnswerSpan
from zofo.scoring.tokens import Example, tokenize
from zofo.spelling import ANY_TASK_KEYS, EVAL_KEYS, key_of
from zofo.tasks.metrics import OPTION_METRICS, worst
from zofo.tasks.prompts import as_channel, as_chat, behind_premise, demonstrations, in_context, tokens_of_chat
from zofo.tasks.records import Record
from zofo.tasks.splits import Splits
from zofo.tasks.task import Task
from zofo.training.rows import run_splits, run_task, trained_on
from zofo.training.trained_rows import trained_rows_of

ALL = "all"


@dataclass(frozen=True)
class Manner:
    """How the rows are put to the model.

    Args:
        template: a number, "all", or None for that of the configuration.
        shots: training rows in front of each row.
        scoring: of options; see `Evaluator`.
        split: which rows.
        batch_size: rows per forward pass.
        whole: every row of a file that was named for this evaluation, and not the part of it that is called test.
    """

    template: str | None = None
    shots: int = 0
    scoring: Scoring = "mean"
    split: str = "test"
    batch_size: int = 16
    whole: bool = False


def eval_config(
    model: str | None,
    task: str | None,
    arguments: Sequence[str] = (),
    adapter: str | None = None,
    table: Mapping[str, str | None] | None = None,
) -> ZOFOConfig:
    """The keys of the run that `model` or `adapter` is of, if there is one, and over them those on the command line.

    So the rows called test are those that the run held out, and never some that it trained on. Without a task, that of
    the run counts, on the rows of `table["data"]` if given; or a table with its columns `text` and `label` is the task.
    """
    run = StoredRun.of(model, adapter)
    stored = dict(run.keys) if run else {}
    table = {key: value for key, value in (table or {}).items() if value is not None}
    if task is None and run and not table.keys() & {"text", "label"}:
        task = run.task
        if "data" in table:
            arguments = [*arguments, "--source", table.pop("data")]
    if task is None and not table:
        raise ZofoError(
            "task is not given: add --task; or --data with --text and --label; or --harness; or the --run that knows it"
        )
    own = run is not None and task is not None and run.is_of_task(task)
    if run and not own:
        stored = {key: stored.get(key) for key in ANY_TASK_KEYS}  # its rows are of another task
    elif stored and stored.get("data_seed") is None:
        stored["data_seed"] = stored.get("seed")
    named = given_keys(arguments)
    if named & {"source", "test_size", "dev_size", "data_seed"}:
        stored["train_size"] = None  # of rows that are divided otherwise
    if "source" in named:
        stored["test_size"] = stored["dev_size"] = None
    kept = {key: stored.get(key) for key in (*EVAL_KEYS, "template", "seed")}
    config = parse_config({"method": "none", "task": task, **kept, **table}, arguments)
    config.data_seed = config.division_seed
    if not own:
        config.seed = config.data_seed  # else it is that of the run, which shows the same examples
    return config


def table_of_run(run: StoredRun, table: Mapping[str, str | None]) -> dict[str, str | None]:
    """What --data, --text and --label say of rows for the task of a run: its columns, if named again, are left out.

    Other columns would make another task of the table, with its own prompt and options.

    Raises:
        ZofoError: if a column is none of the run's.
    """
    for name in ("text", "label"):
        own, given = run.keys.get(name), table.get(name)
        if given is not None and given != own:
            reads = f"reads the column {own!r}: name it so" if own else "says itself what it reads"
            model, adapter = run.parts(task=run.name or next(iter(run.tasks)))
            words = f"--model {model}{f' --adapter {adapter}' if adapter else ''}"
            raise ZofoError(
                f"{name} is {given!r}, but the task of the run in {run.folder} {reads}, and leave --text and --label "
                f"out; or score the table as a task of its own, with {words} in place of --run"
            )
    return {key: value for key, value in table.items() if key not in ("text", "label")}


def given_keys(arguments: Sequence[str]) -> set[str]:
    """The keys among the words of a command line."""
    return {key_of(word) for word in arguments if word.startswith("--")}


def settings_of(config: ZOFOConfig, manner: Manner) -> dict[str, Any]:
    """What decides the scores of a task, for the report."""
    template = str(config.template) if manner.template is None else manner.template
    kept = {key: vars(config)[key] for key in EVAL_KEYS}
    return {**kept, "template": template, "shots": manner.shots, "scoring": manner.scoring}


def evaluate_model(
    model: str,
    adapter: str | None,
    configs: Sequence[ZOFOConfig],
    manner: Manner,
    say: Say,
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """{task: {metric, loss, rows}} of a model, with or without a stored adapter, on one split of each task.

    Of all templates: {task: {"templates": [those of each], metric: {"mean", "std", "worst"}, ...}}. What is wrong with
    a task or a template is said before the model is loaded. `samples` gets an entry for each row and template.
    """
    known = trained_rows_of(model, adapter)
    sets = [_EvalSet.of(config, manner, known) for config in configs]
    names = [rows.task.name for rows in sets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ZofoError(f"two of the tasks are called {twice}: evaluate them one after the other")
    loaded, run = Loaded.of(model, adapter, configs[0].dtype), StoredRun.of(model, adapter)
    if adapter and (note := note_of_move(Path(adapter).expanduser())):
        say(note)
    results: dict[str, Any] = {}
    for rows in sets:
        own = run is not None and run.is_of_task(str(rows.config.task))
        span = run.span(str(rows.config.task)) if run and own else ONE_LINE
        scores: list[dict[str, float]] = []
        for template in rows.templates:
            scored, found = rows.score(loaded, template, span, say)
            scores.append(scored)
            samples += found
        asked = own or manner.split == "train" or rows.config.test_size is not None
        counted = "" if asked else rows.counted
        for note in filter(None, (counted, rows.note)):
            say(f"{rows.task.name}: {note}")
        every = manner.template == ALL
        results[rows.task.name] = {"templates": scores, **over_templates(scores)} if every else scores[0]
    return results


def over_templates(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst of every number that differs between templates.

    Examples:
        >>> over_templates([{"accuracy": 0.5}, {"accuracy": 0.75}])["accuracy"]["worst"]
        0.5
    """
    spreads: dict[str, dict[str, float]] = {}
    for key in scores[0]:
        values = [own[key] for own in scores]
        if key not in ("rows", "shots_least", "shots_mean"):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            spreads[key] = {"mean": statistics.mean(values), "std": deviation, "worst": worst(key, values)}
    return spreads


@dataclass(frozen=True)
class _EvalSet:
    """The rows of one task, checked before the model is loaded."""

    task: Task
    splits: Splits
    rows: list[Record]
    note: str  # what to say of these rows
    counted: str  # and of their number
    templates: list[int]
    config: ZOFOConfig
    manner: Manner

    @classmethod
    def of(cls, config: ZOFOConfig, manner: Manner, known: frozenset[bytes] | None) -> Self:
        task, _ = run_task(config)
        splits, counted = _splits(task, config, manner)
        if not vars(splits)[manner.split]:
            split = manner.split
            raise ZofoError(f"task {task.name} has no row left for {split}: give more rows, or {split}_size")
        rows, note = _honest_rows(task, splits, manner.split, known)
        templates = _templates(task, config, manner)
        for template in templates:
            _require_scoring(task, task.reworded(rows, template), manner.scoring, config)
        demonstrations(splits.train, manner.shots, config.seed, rows)
        return cls(task, splits, rows, note, counted, templates, config, manner)

    def score(
        self, loaded: Loaded, template: int, span: AnswerSpan, say: Say
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The scores of the rows, rendered by one template, and a sample of each row."""
        task, config, manner = self.task, self.config, self.manner
        records = task.reworded(self.rows, template)
        shots = demonstrations(self.splits.train, manner.shots, config.seed, self.rows)
        shots = task.reworded(shots, template)
        width = min(config.max_length, loaded.adapted.positions)
        pose = partial(
            _posed, shown=shots, tokenizer=loaded.tokenizer, width=width, config=config, scoring=manner.scoring
        )
        examples, truncated, used = pose(records)
        words = f"{task.name}, template {template}"
        if truncated:
            say(f"{words}: {truncated} rows are longer than {width} tokens: they were truncated from the left")
        premises: list[Example] = []
        if manner.scoring == "pmi":  # behind the examples that the row has, where those of a premise could be more
            kept = [shots[len(shots) - number :] for number in used]
            premises = [pose([behind_premise(r)], shown=s)[0][0] for r, s in zip(records, kept, strict=True)]
        evaluator = Evaluator(
            loaded.scorer, loaded.tokenizer, task.metrics,
            config.loss if task.metrics[0] in OPTION_METRICS else "lm",
            manner.batch_size, loaded.place, manner.scoring, span=span, progress=words,
        )  # fmt: skip
        answers = evaluator.answers(examples, premises)
        require_numbers(answers)
        scores = evaluator.measure(examples, answers, premises)
        samples = [_sample(task, template, loaded.tokenizer, *pair) for pair in zip(examples, answers, strict=True)]
        if not manner.shots:
            return scores, samples
        say(f"{words}: {min(used)} to {max(used)} of {manner.shots} examples fit in front of a row")
        return {**scores, "shots_least": min(used), "shots_mean": statistics.mean(used)}, samples


def _sample(
    task: Task, template: int, tokenizer: PreTrainedTokenizerBase, example: Example, answer: Answer
) -> dict[str, Any]:
    """What the model read and answered, and what is right."""
    scores = {} if answer.scores is None else dict(zip(example.texts, answer.scores.tolist(), strict=True))
    return {
        "task": task.name,
        "template": template,
        "prompt": tokenizer.decode([*example.prompt]),
        "truncated": example.truncated,
        "answer": answer.text,
        **({"scores": scores} if scores else {}),
        "right": [*example.right],
    }


def _splits(task: Task, config: ZOFOConfig, manner: Manner) -> tuple[Splits, str]:
    """The rows of a task in train, dev and test, and what to say of their number."""
    is_file = manner.whole and not (config.test_size or config.dev_size) and task.records().keys() == {"all"}
    if is_file and not manner.shots:
        return Splits([], [], task.records()["all"]), ""
    splits = run_splits(task, config)
    part = f"{len(vars(splits)[manner.split])} of {splits.total} rows"
    if is_file:
        return splits, f"{part}, as the examples in context are taken from the others"
    return splits, f"{part} are {manner.split}; --source FILE scores every row of a file"


def _honest_rows(task: Task, splits: Splits, split: str, known: frozenset[bytes] | None) -> tuple[list[Record], str]:
    """The rows of a split without those that the model was trained on (of train, exactly those), and what to say."""
    rows: list[Record] = vars(splits)[split]
    if known is None:
        return rows, "this model says nothing of the rows that it was trained on: some of these may be among them"
    if split == "train":
        every = [*splits.train, *splits.dev, *splits.test]
        rows = [row for row, seen in zip(every, trained_on(task, every, known), strict=True) if seen]
        if not rows:
            raise ZofoError(f"this model was trained on no row of task {task.name}: leave out --split train")
        return rows, f"{len(rows)} rows that this model was trained on"
    honest = [row for row, seen in zip(rows, trained_on(task, rows, known), strict=True) if not seen]
    if not honest:
        raise ZofoError(f"this model was trained on all rows of {split} of task {task.name}: give other rows")
    left_out = len(rows) - len(honest)
    return honest, f"{left_out} of {len(rows)} rows were trained on, and are left out" if left_out else ""


def _require_scoring(task: Task, records: Sequence[Record], scoring: Scoring, config: ZOFOConfig) -> None:
    """Refuses a scoring that these rows cannot have."""
    if scoring != "mean" and not records[0].options:
        raise ZofoError(f"scoring {scoring} compares options, but task {task.name} has none: leave it out")
    if scoring == "channel" and config.chat_template:
        raise ZofoError(
            "scoring is channel, which begins with the answer, but chat_template is true, and a chat begins with the "
            "prompt: leave one of them out"
        )
    for record in records if scoring == "channel" else ():
        as_channel(record)


def _templates(task: Task, config: ZOFOConfig, manner: Manner) -> list[int]:
    if manner.template is None:
        return [config.template]
    if manner.template == ALL:
        return list(range(len(task.templates)))
    if not (manner.template.isascii() and manner.template.isdecimal()):
        raise ZofoError(f"template is {manner.template!r}, but must be a number from 0, or {ALL}")
    return [int(manner.template)]


def _posed(
    records: list[Record],
    *,
    shown: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    width: int,
    config: ZOFOConfig,
    scoring: Scoring,
) -> tuple[list[Example], int, list[int]]:
    """The records as they are put to the model, how many of them were truncated, and the examples in front of each."""
    if scoring == "channel":
        records, shown = [as_channel(r) for r in records], [as_channel(r) for r in shown]
    around = tokens_of_chat(records[0], tokenizer, config.system_prompt) if config.chat_template else 0
    records, used = in_context(records, shown, tokenizer, width - around)
    if config.chat_template:
        records = [as_chat(r, tokenizer, config.system_prompt) for r in records]
    return *tokenize(records, tokenizer, width), used
