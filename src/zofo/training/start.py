"""What a run starts with, of what it is given: a name, a model, or a model with an adapter; and that it can start."""

import inspect
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo import noise
from zofo.config import ZOFOConfig, field_names
from zofo.errors import ZofoError, first_line, is_lack_of_memory
from zofo.habits import refuse_arguments
from zofo.keys import CHANNEL, LORA_KEYS
from zofo.methods.first_order_optimizers import settings_of_optimizer
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.load import load_model, require_fitting_tokenizer
from zofo.models.peft import UPPER, described, taken_off
from zofo.models.source import require_dense
from zofo.tasks.metrics import Metric, metric_name
from zofo.tasks.records import Record, Rows, records, rewarded
from zofo.tasks.rewards import REWARD
from zofo.tasks.splits import halves
from zofo.training.objective import objective_metrics
from zofo.training.tasks import ALONE, TaskRows

logger = logging.getLogger(__name__)

Metrics = Sequence[Metric] | Metric
TasksOrRows = Rows | Mapping[str, Rows]

_SKIPPED_IN_A_ROW = 20
_NO_TASKS = frozenset(("prompt", "completion", "messages", "text", "train", "validation", "dev", "test"))


def require_config(trainer: type, args: Any, others: Mapping[str, Any]) -> ZOFOConfig:
    """The configuration; refuses what is none, and `others`, which are no arguments of the trainer."""
    known = [name for name in inspect.signature(trainer).parameters if name != "others"]
    refuse_arguments(others, known, field_names())
    if args is None:
        raise ZofoError("args is not given: give at least ZOFOConfig(output_dir='run'), where the run is written to")
    if isinstance(args, dict):
        raise ZofoError("args is a dict: write ZOFOConfig(**args)")
    if not isinstance(args, ZOFOConfig):
        raise ZofoError(
            f"args is a {type(args).__name__}, which lacks the keys of zofo: write ZOFOConfig(...), which takes the "
            "keys of TrainingArguments as well, such as ZOFOConfig(output_dir='run', method='bilevel', max_length=512)"
        )
    return args


def starting_model(
    model: PreTrainedModel | PeftModel | str,
    args: ZOFOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
) -> tuple[AdaptedModel, PreTrainedTokenizerBase, str | None]:
    """The backbone with its adapters, the tokenizer, and what the adapters' config says; these must go together."""
    if isinstance(model, str):
        model, loaded = load_model(model, args.dtype)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise ZofoError("a loaded model comes without its tokenizer: pass it as processing_class")
    _require_kind("processing_class", tokenizer, PreTrainedTokenizerBase, "AutoTokenizer.from_pretrained(...)")
    _require_kind("peft_config", peft_config, PeftConfig | None, "LoraConfig(...), of a dict LoraConfig(**it)")
    with _parts(model, args, peft_config) as (base, folder):
        require_fitting_tokenizer(tokenizer, base)
        if args.updates_backbone or not args.method_class.trains():  # Trainer takes no quantised model alone
            require_dense(base.config, base.config.name_or_path or type(base).__name__, f"method {args.method}")
        config = peft_config or adapter_config(folder or args.adapter, base, args.lora)
        description = described(config)  # before peft fills in what it finds in the model
        real_prefix = peft_config is None and folder is None and args.adapter == "prefix"
        adapted = AdaptedModel(base, config, args.method_class.adapters, real_prefix=real_prefix, start=folder)
    adapted.require_prompts()
    if args.activation_checkpointing:
        adapted.require_checkpointing()
    if args.method_class.backpropagates and not adapted.adapters:
        _require_epsilon(args, adapted)
    return adapted, tokenizer, description


def _require_kind(name: str, value: object, kind: Any, mend: str) -> None:
    if not isinstance(value, kind):
        raise ZofoError(f"{name} is a {type(value).__name__}, but must be what {mend} gives")


@contextmanager
def _parts(
    model: PreTrainedModel | PeftModel, args: ZOFOConfig, peft_config: PeftConfig | None
) -> Generator[tuple[PreTrainedModel, str | None]]:
    """The backbone, and the folder of the trained adapter to start from, if there is one."""
    if peft_config is not None and args.adapter == "none":
        raise ZofoError("peft_config is given, but adapter is none: leave one of them out")
    if peft_config is not None and args.adapter_init:
        raise ZofoError(f"both peft_config and adapter_init ({args.adapter_init}) are given: leave one of them out")
    for key in LORA_KEYS if peft_config is not None or isinstance(model, PeftModel) else ():
        if vars(args)[key] is not None:
            raise ZofoError(
                f"{key} is {vars(args)[key]!r}, but the adapter is given as a PEFT config or a PeftModel: leave it "
                f"out, and give LoraConfig({LORA_KEYS[key]}=...)"
            )
    if isinstance(model, PeftModel):
        if peft_config is not None or args.adapter_init or args.adapter == "none":
            raise ZofoError(
                "model is a PeftModel, whose adapter is trained, but peft_config, adapter_init or adapter: none says "
                "otherwise: leave that out, or pass the plain transformers model"
            )
        with tempfile.TemporaryDirectory() as folder:
            yield taken_off(model, folder), folder
        return
    if not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded:  # pyright: ignore
        raise ZofoError(
            f"model is a {type(model).__name__} with an adapter or of another kind: pass the plain transformers "
            "model, and its adapter as peft_config; or a PeftModel, to start from the values of its adapter"
        )
    yield model, args.adapter_init


def _require_epsilon(args: ZOFOConfig, adapted: AdaptedModel) -> None:
    """Refuses an optimizer of torch whose ε is 0 in the weights' own dtype: a tiny gradient would become 0/0."""
    kind, settings = settings_of_optimizer(args)
    epsilon = settings.get("eps")
    if not str(kind.__module__).startswith("torch.") or not isinstance(epsilon, float):
        return  # others keep their state in float32
    for dtype in {p.dtype for p in adapted.backbone.values()}:
        if epsilon and not torch.tensor(epsilon).to(dtype):
            raise ZofoError(
                f"adam_epsilon is {epsilon}, which is 0 in {str(dtype).removeprefix('torch.')}, so that weights with a "
                "tiny gradient would become 0/0: set adam_epsilon: 1e-4, or dtype: bfloat16 or float32"
            )


@contextmanager
def setting_up(args: ZOFOConfig) -> Generator[None]:
    """Turns what Trainer's constructor refuses into one line: mostly a package to report to that is not there."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        if is_lack_of_memory(error):
            raise
        reports: list[str] = list(cast(Any, args.report_to) or [])
        mend = f": report_to is {', '.join(reports)}: install what that needs, or set report_to: none"
        raise ZofoError(f"the run cannot be set up ({first_line(error)}){mend if reports else ''}") from error


def warm_up(adapted: AdaptedModel) -> None:
    """Makes the noise kernels ready, and says so if there are none."""
    parameter = next(iter(adapted.backbone.values()))
    if not noise.warm_up(parameter.dtype, parameter.device):
        logger.warning("there is no working compiler for the noise kernels: zeroth-order steps are slower")


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


def require_progress(skipped: int, number: int, steps: int) -> None:
    """Ends a run that only skips: step `number` of `steps` is the last of so many that were skipped in a row.

    A bad batch or a bad direction is followed by a good one; weights that are not finite stay so.
    """
    if skipped >= min(_SKIPPED_IN_A_ROW, steps):
        raise ZofoError(
            f"step {number}: the loss was not finite in {skipped} steps in a row, so skipping does not help: start "
            "again with lower learning rates, or with dtype: float32"
        )


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
    named = [*shared, *(f"{task}_{name}" for task, names in tasks for name in names)]
    known = [f"{adapter}{name}" for adapter in adapters for name in named]
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


def is_channel(args: ZOFOConfig) -> bool:
    """Whether a run trains on prompts given their answers."""
    return args.method_class.trains() and args.train_prompt == CHANNEL


def rows_of(args: ZOFOConfig, rows: Rows, name: str, learned: bool = False) -> list[Record]:
    """Rows that are given, as records: with their answers, if the run needs these.

    Where θ follows a reward, only answers that are `learned` by adapters are needed: rows of the upper level and of
    evaluations have rewards.
    """
    made = rewarded(rows, name) if args.objective == REWARD else records(rows, name)
    if learned and not all(record.answered for record in made):
        raise ZofoError(
            f"a row of {name} has no completion, which method {args.method} needs for its adapters even where "
            "objective is reward: give completions; or these rows as upper_dataset, which θ alone reads; or set "
            "method: zo"
        )
    return made
