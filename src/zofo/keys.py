"""The keys of a run: each one's type, default, bounds and help, on top of `transformers.TrainingArguments`.

A key that is added here is in the YAML, on the command line, in `--help`, in the stored `config.yaml` and in what a
resumed run must share. What goes together is checked in `config.py`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from zofo.bounds import FRACTION, NOT_NEGATIVE, POSITIVE, Bounds, require_type
from zofo.errors import ZofoError
from zofo.habits import INSTEAD
from zofo.models.kinds import Lora
from zofo.models.load import DType
from zofo.scoring.tokens import LossKind
from zofo.spelling import refuse_unknown
from zofo.tasks.rewards import REWARD
from zofo.zo.bilevel import Schedule
from zofo.zo.estimators import EstimatorName
from zofo.zo.low_rank import DirectionName
from zofo.zo.rules import RuleName
from zofo.zo.shaping import ShapingName

AUTO = "auto"
SHARED = "shared"
INFINITE = "infinite"
CHANNEL = "channel"
PromptName = Literal["direct", "channel"]
LOSS = "loss"
ObjectiveName = Literal["loss", "accuracy", "f1", "macro_f1", "exact_match", "token_f1", "reward"]
RowsName = Literal["own", "shared"]
Order = Literal["adapter_first", "backbone_first"]
_T = TypeVar("_T")
_SEED = Bounds(at_least=0, below=1 << 32)  # of NumPy's generators
Rate = Annotated[float, NOT_NEGATIVE]
Count = Annotated[int, POSITIVE]

# Keys whose fields are those of transformers.
_INHERITED = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "num_train_epochs"),
        POSITIVE,
    ),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "dataloader_num_workers": Bounds(at_least=0, below=257),  # each one is a process
}  # fmt: skip

# Which keys count for whom; every method's class puts its own together.
STEP_KEYS = frozenset((
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "on_nonfinite", "adapter_init", "early_stopping_patience", "diagnose",
    "tasks_per_step", "task_sampling", "task_exponent", "shared_adapter",
    "train_shots", "train_prompt",
))  # fmt: skip
FIRST_ORDER_KEYS = frozenset((
    "learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "neftune_noise_alpha",
))  # fmt: skip
ZEROTH_ORDER_KEYS = frozenset((
    "zo_learning_rate", "zo_eps", "num_perturbations", "zo_estimator", "zo_optimizer", "zo_weight_decay", "zo_anchor",
    "zo_parameters", "zo_exclude", "zo_layers", "zo_sparsity", "zo_distribution", "zo_rank",
    "zo_rows", "zo_members_per_forward",
))  # fmt: skip
COUPLING_KEYS = frozenset((
    "upper_learning_rate", "penalty", "penalty_schedule", "normalize_penalty", "lower_steps", "lower_pool",
    "lower_fraction",
))  # fmt: skip
OBJECTIVE_KEYS = frozenset(("objective", "zo_shaping", "zo_shaping_over"))
BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules
STAGE_KEYS = frozenset(("two_stage_fraction", "two_stage_order"))
LORA_KEYS = {  # as LoraConfig calls them
    "adapter_layers": "layers_to_transform", "lora_r": "r", "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
}  # fmt: skip
OF_ADAPTER = ("adapter", *LORA_KEYS)
FULL_KEYS = frozenset(("optimizer_in_backward",))
CONTEXT_KEYS = frozenset(("shots",))

# What zofo honours of `TrainingArguments` beside the keys above; nothing reads the others.
_HONOURED = STEP_KEYS | FIRST_ORDER_KEYS | frozenset((
    "output_dir", "resume_from_checkpoint", "seed", "data_seed", "full_determinism", "use_cpu", "tf32",
    "dataloader_num_workers", "dataloader_pin_memory",
    "logging_strategy", "logging_steps", "logging_first_step", "log_level", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint",
))  # fmt: skip
_DONE_ANYWAY = ("do_train", "do_eval", "do_predict")  # whatever their value
_SETTLED: dict[str, Any] = {  # what else stands for a default, after __post_init__ or from HfArgumentParser
    "debug": ([], None), "accelerator_config": (AcceleratorConfig(),), "include_num_input_tokens_seen": (False,),
}  # fmt: skip


def require_honoured(given: Mapping[str, Any], stated: bool) -> None:
    """Refuses keys of `TrainingArguments` that nothing in zofo reads, unless they are at their defaults.

    `stated`: whether all of `given` was written by somebody, so that a default was asked for as well.
    """
    own = {f.name: f.default for f in dataclasses.fields(Keys)}
    for inherited in dataclasses.fields(TrainingArguments):
        name = inherited.name
        if name in _HONOURED or name not in given:
            continue
        default = default_of(inherited)
        if given[name] in (default, own[name], *_SETTLED.get(name, ())) and not (stated and name in _DONE_ANYWAY):
            continue
        instead = INSTEAD.get("push_to_hub" if name.startswith("hub_") else name, "leave it out")
        raise ZofoError(f"{name} is given, but has no effect in zofo: {instead}")


def refusing_unknown(made: type[_T]) -> type[_T]:
    """The same dataclass; its constructor refuses an unknown key as files do, where Python would raise a TypeError."""
    constructor = made.__init__

    @functools.wraps(constructor)
    def checked(self: _T, *values: Any, **keys: Any) -> None:
        known = inspect.signature(constructor).parameters.keys()
        for key in keys.keys() - known:
            refuse_unknown(key, "", known)
        constructor(self, *values, **keys)

    made.__init__ = checked
    return made


def field(default: Any, help: str, **more: Any) -> Any:
    """A field with its default and its help; `more` goes to argparse."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def default_of(key: dataclasses.Field[Any]) -> Any:
    """The default of a key; one that is made anew if it can be changed."""
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()


@dataclass
class Keys(TrainingArguments):
    """All keys but `method`, whose values are in a layer above; see `ZOFOConfig`."""

    model: str | None = field(None, "backbone: Hub id, folder, .gguf file, or pkg://PACKAGE/PATH")
    task: list[str] | None | str = field(  # noqa: RUF036 in this order HfArgumentParser reads a list
        None, "task: a name from `zofo tasks`, or the path of a task file; or several, which share the backbone"
    )
    tasks_per_step: Count = field(1, "with several tasks: how many are drawn for each iteration")
    task_sampling: Literal["uniform", "size", "temperature"] = field(
        "uniform", "with several tasks: draw them alike, by their training rows, or by these to the power task_exponent"
    )
    task_exponent: Annotated[float, Bounds(at_least=0, below=10)] = field(
        0.5, "with task_sampling temperature: of the number of training rows; 0 is uniform, 1 is size"
    )
    shared_adapter: bool = field(False, "with several tasks: one adapter for all of them, and not one for each")
    source: str | None = field(None, "rows of the task from here: a folder of train.* and validation.*, or a file")
    template: Annotated[int, NOT_NEGATIVE] = field(0, "which of the task's templates, from 0; see zofo tasks NAME")
    data: str | None = field(
        None, "a data file in place of a task: options and prompt are made from `text` and `label`"
    )
    text: str | None = field(None, "with data: the column of the text")
    label: str | None = field(None, "with data: the column of the label")
    chat_template: bool = field(False, "put prompts into the model's chat format")
    system_prompt: str | None = field(None, "with chat_template: what the system says")
    adapter: str = field("lora", "adapter: lora, prefix, prompt, none, or the path of a PEFT config JSON")
    adapter_init: str | None = field(None, "a PEFT folder: adapters of its kind, which start with its trained weights")
    adapter_layers: str | None = field(
        None, "with adapter lora: blocks that get one, from 0, such as 0-11,20 or last 2; all if not given"
    )
    lora_r: Count | None = field(None, "with adapter lora: its rank; 8 if not given")
    lora_alpha: Count | None = field(None, "with adapter lora: α, of its factor α/r; 2 r if not given")
    lora_target_modules: list[str] | None = field(
        None, "with adapter lora: the modules that get one, or all-linear; queries and values if not given"
    )
    learning_rate: Rate = field(1e-3, "of backpropagation; where there are two adapters, of the lower one, s")
    upper_learning_rate: Rate | None = field(
        None,
        "with a finite penalty of the upper adapter p, or of an outer step; learning_rate if not given, reptile: 1",
    )
    optimizer_in_backward: bool = field(
        False, "fo with adapter none: update each weight as soon as its gradient is there, and drop the gradient"
    )
    zo_learning_rate: float | str | None = field(
        None,
        "of the zeroth-order level: auto, or a number (bilevel: 0 freezes θ); auto if not given (zo with adapter none: "
        "learning_rate)",
    )
    zo_eps: Annotated[float, POSITIVE] = field(1e-3, "ε, the scale of the perturbation; 3e-3 for bfloat16")
    num_perturbations: Annotated[int, Bounds(above=0, below=10**6)] = field(1, "q, directions per zeroth-order step")
    zo_estimator: EstimatorName = field("two_sided", "two_sided or one_sided differences")
    zo_optimizer: RuleName = field("sgd", f"rule of the zeroth-order level: {', '.join(get_args(RuleName))}")
    zo_weight_decay: Rate = field(
        0.0, "decoupled weight decay of the zeroth-order level, at a given learning rate; not on biases and norms"
    )
    zo_anchor: Annotated[float, Bounds(at_least=0, below=1)] = field(
        0.0, "fraction of the way back to the starting weights in each zeroth-order step; read from the model's files"
    )
    zo_parameters: list[str] | None = field(
        None,
        "backbone weights to update: kinds (attention, mlp, embeddings, norms, head), parts of names or patterns",
    )
    zo_exclude: list[str] | None = field(None, "backbone weights not to update, in the same words")
    zo_layers: str | None = field(
        None, "blocks whose weights are updated, from 0, such as 0-11,20 or last 2; all if not given"
    )
    zo_sparsity: Annotated[float, Bounds(at_least=0, below=1)] = field(
        0.0, "fraction of each matrix that stays fixed: its largest weights (Sparse MeZO)"
    )
    zo_distribution: DirectionName = field("normal", f"of the directions: {', '.join(get_args(DirectionName))}")
    zo_rank: Annotated[int, POSITIVE] = field(1, "r, of the directions of matrices, with zo_distribution low_rank")
    zo_rows: RowsName = field(
        "own", "with zo_distribution low_rank: own: the directions divide the rows of a batch; shared: each sees all"
    )
    zo_members_per_forward: Count | None = field(
        None, "with zo_distribution low_rank: evaluations (direction and sign) that share a forward; all if not given"
    )
    objective: ObjectiveName = field(
        "loss",
        "what zeroth-order steps descend (zo, bilevel): the loss, or minus a metric of what the model answers: "
        f"{', '.join(get_args(ObjectiveName))}",
    )
    reward: list[str] | None = field(
        None,
        "FILE.py:function or module:function, (prompts, completions, **columns) -> numbers: evaluations measure it; "
        "objective reward follows it",
    )
    reward_weights: list[float] | None = field(None, "of several rewards, in their order; 1 if not given")
    reward_timeout: Annotated[float, POSITIVE] = field(60.0, "seconds that a call of a reward may take")
    max_new_tokens: Count | None = field(None, "with reward: tokens of a completion; 64 if not given")
    zo_shaping: ShapingName | None = field(
        None,
        "of the values of a population: none, zscore or centered_rank; zscore for objective reward if not given, else "
        "none",
    )
    zo_shaping_over: Literal["all", "prompt"] = field(
        "all", "with zo_shaping: all: the mean over the rows is shaped; prompt: each row is, and then the mean taken"
    )
    penalty: float | str | None = field(
        INFINITE,
        "λ, how strongly p is held to the lower level's optimum, 1 as published; infinite: p is s, one adapter",
    )
    penalty_schedule: Schedule = field("constant", "with a finite penalty: constant, or linear: λ grows from 0 to it")
    normalize_penalty: bool = field(True, "with a finite penalty: divide the objective by 1 + λ, for like step sizes")
    lower_steps: Annotated[int, NOT_NEGATIVE] = field(10, "T, first-order steps on s per outer iteration")
    lower_pool: Count | None = field(
        None,
        "batches that the T lower steps pass over, again and again, sharing the forwards of the blocks below the "
        "adapters; T batches if not given",
    )
    lower_fraction: float | str | None = field(
        2 / 3, "fraction of the training rows that the lower level trains on; or shared: both levels train on all"
    )
    two_stage_fraction: Annotated[float, FRACTION] = field(
        0.5, "two_stage: fraction of the steps that train the adapter; θ is updated in the others"
    )
    two_stage_order: Order = field("adapter_first", f"two_stage: {' or '.join(get_args(Order))}")
    shots: Annotated[int, NOT_NEGATIVE] = field(
        0, "none: training rows in front of each test row, chosen by seed, as many as fit"
    )
    train_shots: Annotated[int, NOT_NEGATIVE] = field(
        0, "training rows in front of each row, in training and in evaluations, as many as fit (MetaICL)"
    )
    train_prompt: PromptName = field(
        "direct", "direct: answers given their prompts; channel: prompts given their answers (noisy channel)"
    )
    train_size: Count | None = field(None, "training rows, for both levels together; all that remain if not given")
    dev_size: Count | None = field(None, "rows for model selection; if not given a fifth of the rows, at most 200")
    test_size: Count | None = field(None, "rows for the final metrics; if not given a fifth of the rows, at most 400")
    final_split: Literal["test", "dev"] = field(
        "test", "rows of the final scores: test; dev to choose settings by, so that test rows stay unseen"
    )
    zero_shot: bool = field(True, "score the backbone before training as well, for the results and the card")
    dtype: DType = field("float32", "of the backbone; adapters train in float32")
    loss: LossKind = field("options", "options: cross-entropy over the candidates; lm: over the answer's tokens")
    max_length: Count = field(512, "tokens of a prompt with its answer; longer prompts are truncated from the left")
    early_stopping_patience: Count | None = field(
        None, "end the run after so many evaluations without a better one; with eval_steps and load_best_model_at_end"
    )
    on_nonfinite: Literal["raise", "skip"] = field("raise", "at a loss that is not finite: raise, or skip the step")
    diagnose: bool = field(
        False, "record by what the run learns: signal to noise, the true gradient, gains; the weights stay the same"
    )
    overwrite_output_dir: bool = field(False, "remove the run that output_dir holds already")
    lr_scheduler_type: str = field("constant", "as in TrainingArguments; scales all learning rates alike")
    eval_strategy: str = field("steps", "as in TrainingArguments; no evaluations without dev rows")
    eval_steps: Annotated[float, POSITIVE] | None = field(0.2, "as in TrainingArguments: below 1, a part of the run")
    save_steps: Annotated[float, POSITIVE] = field(0.2, "as in TrainingArguments: below 1, a part of the run")
    save_total_limit: int | None = field(3, "as in TrainingArguments: the checkpoints that are kept")
    logging_steps: Annotated[float, POSITIVE] = field(10, "as in TrainingArguments")
    logging_nan_inf_filter: bool = field(False, "off: a loss that is not finite must be seen")
    remove_unused_columns: bool = field(False, "off: rows are no model inputs")

    @property
    def tasks(self) -> list[str]:
        """The names and files of `task`, of which there may be several."""
        return [self.task] if isinstance(self.task, str) else [*(self.task or ())]

    @property
    def shaping(self) -> ShapingName:
        """How the values of a population are shaped."""
        return self.zo_shaping or ("zscore" if self.objective == REWARD else "none")

    @property
    def black_box(self) -> bool:
        """Whether zeroth-order steps descend something else than the loss as it is."""
        return self.objective != LOSS or self.shaping != "none"

    @property
    def lora(self) -> Lora:
        """Where LoRA is put, and how large it is."""
        targets = self.lora_target_modules
        return Lora(self.adapter_layers, self.lora_r, self.lora_alpha, None if targets is None else tuple(targets))

    def settle_numbers(self, may_freeze: bool) -> None:
        """Reads the keys that are a number or one word; `zo_learning_rate` may be 0 where that freezes θ."""
        rates = NOT_NEGATIVE if may_freeze else POSITIVE
        words = (
            ("zo_learning_rate", AUTO, rates),
            ("lower_fraction", SHARED, FRACTION),
            ("penalty", INFINITE, NOT_NEGATIVE),
        )
        for key, word, bounds in words:
            value: Any = vars(self)[key]
            if value == word:
                continue
            if word == INFINITE and str(value).lstrip("+.").lower() in ("inf", "infinity"):
                vars(self)[key] = INFINITE
                continue
            try:
                vars(self)[key] = float(value)
            except (ValueError, TypeError) as error:
                raise ZofoError(f"{key} is {value!r}, but must be a number or {word}") from error
            bounds.require(key, vars(self)[key])

    def require_bounds(self) -> None:
        """Refuses values of another type or out of their bounds, words that are no choice, and what no path can be."""
        values, fields = vars(self), {f.name: f for f in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, str) and "\0" in value:
                raise ZofoError(f"{name} is {value!r:.80}, which holds a NUL character: take it out")
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for choices in (part for part in (hint, *get_args(hint)) if get_origin(part) is Literal):
                if values[name] not in (*get_args(choices), default_of(fields[name])):
                    raise ZofoError(f"{name} is {values[name]!r}, but must be one of {', '.join(get_args(choices))}")
            if name in fields:
                require_type(name, values[name], hint, default_of(fields[name]))
            annotated = [part for part in (hint, *get_args(hint)) if get_origin(part) is Annotated]
            for bounds in (bounds for part in annotated for bounds in get_args(part)[1:]):
                bounds.require(name, values[name])
        for name, bounds in _INHERITED.items():
            bounds.require(name, values[name])


def name_of(value: Any) -> str:
    """The word that stands for a member of one of transformers' enumerations."""
    return str(value.value if isinstance(value, Enum) else value)
