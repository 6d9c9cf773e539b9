"""The rows that a trainer is given: of one task or of several, by the splits of the method; and their metrics."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.models.peft import UPPER
from zofo.tasks.metrics import Metric, metric_name
from zofo.tasks.records import Record, Rows, records
from zofo.tasks.rewards import REWARD
from zofo.tasks.splits import halves
from zofo.training.objective import objective_metrics
from zofo.training.tasks import ALONE, TaskRows

Metrics = Sequence[Metric] | Metric
TasksOrRows = Rows | Mapping[str, Rows]

_NO_TASKS = frozenset(("prompt", "completion", "messages", "text", "train", "validation", "dev", "test"))


def metrics_of_tasks(
    args: ZOFOConfig, given: Metrics | Mapping[str, Metrics], rows: Mapping[str, TaskRows], rewarded: bool
) -> dict[str, tuple[Metric, ...]]:
    """The metrics of each task: those that are given, for all or by task, else what fits its first row.

    Refuses a model selection by what no evaluation will report, before the first one has to be waited for. A function
    may report other names than its own; those are not known before.
    """
    found: dict[str, tuple[Metric, ...]] = {}
    for name, task in rows.items():
        own = given.get(name, ()) if isinstance(given, Mapping) else given
        default = ("accuracy" if next(iter(task.train.values()))[0].options else "exact_match",)
        metrics = cast(Any, (own,) if isinstance(own, str) or callable(own) else tuple(own) or default)
        found[name] = objective_metrics(args, metrics, bool(next(iter(task.train.values()))[0].options), rewarded)
    adapters = ["" if adapter == UPPER else f"{adapter}_" for adapter in args.method_class.adapters]
    losses = [not rewarded or all(record.answered for record in task.dev) for task in rows.values()]
    every = [
        [*map(_name_of_metric, metrics), *(["loss"] if known else [])]
        for metrics, known in zip(found.values(), losses, strict=True)
    ]
    shared = [name for name in every[0] if all(name in names for names in every)]
    tasks = [*zip(found, every, strict=True)] if len(found) > 1 else []
    parts = [("", shared), *((f"{task}_", names) for task, names in tasks)]
    known = [f"{task}{adapter}{name}" for task, names in parts for adapter in adapters for name in names]
    wanted, plain = args.metric_for_best_model, all(isinstance(m, str) for own in found.values() for m in own)
    if wanted is not None and wanted.removeprefix("eval_") not in known and plain:
        raise ZofoError(f"metric_for_best_model is {wanted!r}, but evaluations report {', '.join(known)}")
    return found


def _name_of_metric(metric: Metric) -> str:
    return REWARD if metric == REWARD else metric_name(metric)


def require_tasks(args: ZOFOConfig, tasks: Sequence[str]) -> None:
    """Refuses what does not go with so many tasks; `tasks` are their names."""
    if args.tasks_per_step > len(tasks):
        raise ZofoError(
            f"tasks_per_step is {args.tasks_per_step}, but there {'is 1 task' if len(tasks) == 1 else ''}"
            f"{f'are {len(tasks)} tasks' if len(tasks) > 1 else ''}: set it to {len(tasks)} at most"
        )
    if len(tasks) == 1:
        return
    method = args.method_class
    for adapter in method.adapters[1:]:
        if taken := [name for name in tasks if name == adapter or name in (f"{other}_{adapter}" for other in tasks)]:
            raise ZofoError(
                f"a task is called {taken[0]}, but scores of the adapter {adapter} are logged under that name, as "
                f"eval_{taken[0]}_loss: rename the task"
            )
    if args.diagnose:
        raise ZofoError("diagnose measures on one task, but there are several: leave it out, or train on one")
    if args.optimizer_in_backward and args.tasks_per_step > 1:
        raise ZofoError(
            f"optimizer_in_backward is true and tasks_per_step is {args.tasks_per_step}, but each backward pass is a "
            "step of its own then: set tasks_per_step to 1, or leave optimizer_in_backward out"
        )
    if args.adapter != "none" and method.zeroth_order and not method.backpropagates and not args.shared_adapter:
        raise ZofoError(
            f"method {method.name} with adapter {args.adapter} moves one adapter by forward passes, but there are "
            f"{len(tasks)} tasks: set shared_adapter: true, or adapter: none"
        )


def rows_of_tasks(
    args: ZOFOConfig, train: TasksOrRows | None, upper: TasksOrRows | None, evaluated: TasksOrRows | None
) -> dict[str, TaskRows]:
    """The rows of each task by its name; a dict has several tasks, everything else is the only one."""
    if not _by_task(train):
        require_tasks(args, [ALONE])
        rows = training_rows(args, cast(Any, train), cast(Any, upper))
        return {ALONE: TaskRows(rows, _evaluated(args, evaluated))}
    tasks = cast("dict[str, Rows]", train)
    require_tasks(args, [*tasks])
    found: dict[str, TaskRows] = {}
    for name, rows in tasks.items():
        own = {"upper_dataset": upper, "eval_dataset": evaluated}
        parts = {key: _of_task(given, key, name, tasks) for key, given in own.items()}
        with _naming(name):
            split = training_rows(args, rows, parts["upper_dataset"])
            found[name] = TaskRows(split, _evaluated(args, parts["eval_dataset"]))
    return found


def _by_task(given: object) -> bool:
    """Whether rows are given by task: in a plain dict, which holds neither the splits of one task nor its columns."""
    return type(given) is dict and bool(given) and not _NO_TASKS.intersection(cast("dict[str, Any]", given))


def _of_task(given: TasksOrRows | None, key: str, name: str, tasks: Mapping[str, Any]) -> Rows | None:
    if given is None:
        return None
    if not _by_task(given) or cast(Any, given).keys() != tasks.keys():
        raise ZofoError(f"train_dataset has the tasks {', '.join(tasks)}: give {key} as a dict with the same ones")
    return cast(Any, given)[name]


@contextmanager
def _naming(task: str) -> Generator[None]:
    """Puts the name of a task before what is wrong with it."""
    try:
        yield
    except ZofoError as error:
        raise ZofoError(f"task {task}: {error}") from error


def _evaluated(args: ZOFOConfig, given: Any) -> list[Record]:
    return [] if given is None else rows_of(args, given, "eval_dataset")


def training_rows(args: ZOFOConfig, train: Rows | None, upper: Rows | None) -> dict[str, list[Record]]:
    """The training rows by the splits of the method."""
    if train is None:
        raise ZofoError("train_dataset is not given: give rows with prompt, completion and perhaps options")
    first = rows_of(args, train, "train_dataset", learned=args.needs_answers)
    second = [] if upper is None else rows_of(args, upper, "upper_dataset")
    both = [*first, *second]
    if not first:
        raise ZofoError("train_dataset is empty: give it at least one row")
    if args.loss == "options" and any(len(record.options) < 2 for record in both):
        raise ZofoError("loss is options, but a row has fewer than two of them: set loss: lm, or give options")
    splits = args.method_class.splits(args)
    if len(splits) == 1:
        return {splits[0]: both}
    parts = (first, second) if second else halves(first, cast(float, args.lower_fraction), args.division_seed)
    return dict(zip(splits, parts, strict=True))


def require_rows_for_a_batch(args: ZOFOConfig, sizes: Mapping[str, int], task: str) -> None:
    """Refuses a batch of more rows than a task has; `sizes` are the rows by the splits of the method."""
    size = args.per_device_train_batch_size
    for stream in args.method_class.streams(args).values():
        rows = sizes[stream.split]
        if stream.batches and size > rows:
            raise ZofoError(
                f"per_device_train_batch_size is {size}, but there are {rows} rows to train on ({stream.split}"
                f"{f' of task {task}' if task else ''}): set it to {rows} at most, or give more rows"
            )


def rows_of(args: ZOFOConfig, rows: Rows, name: str, learned: bool = False) -> list[Record]:
    """Rows that are given, as records: with their answers, if the run needs these.

    Where θ follows a reward, only answers that are `learned` by adapters are needed: rows of the upper level and of
    evaluations have rewards.
    """
    made = records(rows, name, answered=args.objective != REWARD)
    if learned and not all(record.answered for record in made):
        raise ZofoError(
            f"a row of {name} has no completion, which method {args.method} needs for its adapters even where "
            "objective is reward: give completions; or these rows as upper_dataset, which θ alone reads; or set "
            "method: zo"
        )
    return made
