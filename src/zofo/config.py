"""`ZOFOConfig`: the keys of a run, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from zofo.errors import ZofoError
from zofo.models.adapters import KINDS
from zofo.models.load import DType
from zofo.noise import Distribution
from zofo.scoring.tokens import LossKind
from zofo.zo.bilevel import Schedule
from zofo.zo.estimators import EstimatorName

_INHERITED_IDENTITY = (
    "seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "optim_args",
)  # fmt: skip
_POSITIVE = (
    "zo_eps", "num_perturbations", "max_length", "per_device_train_batch_size", "per_device_eval_batch_size",
    "train_size", "dev_size", "test_size", "gradient_accumulation_steps", "logging_steps",
    "save_steps", "eval_steps", "num_train_epochs",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "upper_learning_rate", "penalty", "lower_steps", "zo_weight_decay", "weight_decay", "seed",
    "data_seed", "max_grad_norm", "template",
)  # fmt: skip
_CHECKPOINTING = tuple(
    f"{name}_checkpointing{rest}" for name in ("activation", "gradient") for rest in ("", "_kwargs")
)
_TIMELESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
_MANNER = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run was started, not what it is
AUTO = "auto"
_FREE = ("overwrite_output_dir", "on_nonfinite")

MethodName = Literal["bilevel", "zo", "fo", "two_stage", "none"]


def _key(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class ZOFOConfig(TrainingArguments):
    """Everything that decides a run. `max_steps` counts outer iterations; every key of `TrainingArguments` works too.

    Raises:
        ZofoError: if a value cannot be used, before any work.

    Examples:
        >>> ZOFOConfig(output_dir="runs/x", method="zo", zo_eps=0.0)
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: zo_eps is 0.0, but must be greater than 0
    """

    model: str | None = _key(None, "backbone: Hub id, folder, .gguf file, or pkg://PACKAGE/PATH")
    task: str | None = _key(None, "task: a name from `zofo tasks`, or the path of a task file")
    source: str | None = _key(None, "rows of the task from here: a folder of train.* and validation.*, or a file")
    template: int = _key(0, "which of the task's templates, from 0; zofo tasks NAME shows them")
    data: str | None = _key(
        None, "a data file in place of a task: options and prompt are made from `text` and `label`"
    )
    text: str | None = _key(None, "with data: the column of the text")
    label: str | None = _key(None, "with data: the column of the label")
    chat_template: bool = _key(False, "put prompts into the model's chat format")
    system_prompt: str | None = _key(None, "with chat_template: what the system says")
    method: MethodName = _key("bilevel", "update rule: bilevel, zo (MeZO), fo (PEFT or full), two_stage, none")
    adapter: str = _key("lora", "adapter: lora, prefix, prompt, none, or the path of a PEFT config JSON")
    learning_rate: float = _key(1e-3, "of the lower adapter s, and of the only adapter of fo")
    upper_learning_rate: float | None = _key(None, "of the upper adapter p; learning_rate if not given")
    zo_learning_rate: float | str = _key("auto", "of the zeroth-order level: auto, or a number")
    zo_eps: float = _key(1e-3, "ε, the distance of the two evaluations; 3e-3 for bfloat16")
    num_perturbations: int = _key(1, "q, directions per zeroth-order step")
    zo_estimator: EstimatorName = _key("two_sided", "two_sided or one_sided differences")
    zo_optimizer: Literal["sgd"] = _key("sgd", "rule of the zeroth-order level")
    zo_weight_decay: float = _key(
        0.0, "decoupled weight decay of the zeroth-order level, at a given rate; not on biases and norms"
    )
    zo_parameters: list[str] | None = _key(
        None, "backbone weights that move: kinds (attention, mlp, embeddings, norms, head), parts of names or patterns"
    )
    zo_exclude: list[str] | None = _key(None, "backbone weights that stay, in the same words")
    zo_layers: str | None = _key(None, "blocks whose weights move, from 0, such as 0-11,20; all if not given")
    zo_sparsity: float = _key(0.0, "share of each matrix that stays fixed: its largest weights (Sparse MeZO)")
    zo_distribution: Distribution = _key("normal", "of the directions: normal or rademacher")
    penalty: float = _key(1.0, "λ, how strongly the upper level is held to the lower level's optimum")
    penalty_schedule: Schedule = _key("constant", "constant, or linear: λ grows from 0 to `penalty` over the run")
    normalize_penalty: bool = _key(True, "divide the objective by 1 + λ, so that step sizes keep their meaning")
    lower_steps: int = _key(10, "T, first-order steps on s per outer iteration")
    lower_fraction: float = _key(2 / 3, "share of the training rows that the lower level trains on")
    two_stage_fraction: float = _key(0.5, "two_stage: share of the steps that train the adapter, before θ moves")
    train_size: int | None = _key(None, "training rows, for both levels together; all that remain if not given")
    dev_size: int | None = _key(None, "rows for model selection; if not given a fifth of the rows, at most 200")
    test_size: int | None = _key(None, "rows for the final metrics; if not given a fifth of the rows, at most 400")
    dtype: DType = _key("float32", "of the backbone; adapters train in float32")
    loss: LossKind = _key("options", "options: cross-entropy over the candidates; lm: over the answer's tokens")
    max_length: int = _key(512, "tokens of a prompt with its answer; longer prompts lose their beginning")
    on_nonfinite: Literal["raise", "skip"] = _key("raise", "at a loss that is not finite: raise, or skip the step")
    overwrite_output_dir: bool = _key(False, "remove the run that output_dir holds already")
    lr_scheduler_type: str = _key("constant", "as in TrainingArguments; scales all learning rates alike")
    logging_steps: float = _key(10, "as in TrainingArguments")
    logging_nan_inf_filter: bool = _key(False, "off: a loss that is not finite must be seen")
    remove_unused_columns: bool = _key(False, "off: rows are no model inputs")

    def __post_init__(self) -> None:
        """Checks the keys, then lets `TrainingArguments` check its own."""
        if self.upper_learning_rate is None:
            self.upper_learning_rate = self.learning_rate
        for name in _POSITIVE:
            self._require(name, ">", 0)
        for name in _NOT_NEGATIVE:
            self._require(name, ">=", 0)
        self._check_zo_learning_rate()
        self._check_selection()
        if self.max_steps != -1:
            self._require("max_steps", ">", 0)
        for name in ("lower_fraction", "two_stage_fraction"):
            if not 0 < vars(self)[name] < 1:
                raise ZofoError(f"{name} is {vars(self)[name]}, but must lie between 0 and 1, both excluded")
        for name, kind in get_type_hints(ZOFOConfig).items():
            if get_origin(kind) is Literal and vars(self)[name] not in get_args(kind):
                raise ZofoError(f"{name} is {vars(self)[name]!r}, but must be one of {', '.join(get_args(kind))}")
        if self.method == "none":
            self.adapter = "none"  # an adapter that is never trained would only be in the way
        if str(self.eval_strategy) == "no" and self.eval_steps:
            self.eval_strategy = "steps"
        self._settle_checkpointing()
        self._check_combinations()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ZofoError(" ".join(str(error).split())) from error
        if self.world_size > 1:
            raise ZofoError(
                f"this is one of {self.world_size} processes, but a run is a single one: start zofo without torchrun "
                "or accelerate launch"
            )
        if self.mixed_precision != "no":
            raise ZofoError(
                f"accelerate's settings switch autocast on (mixed_precision: {self.mixed_precision}), which zofo does "
                "not use: start zofo without accelerate launch, and set dtype"
            )
        self._n_gpu = min(self.n_gpu, 1)  # more would make Trainer split batches between copies of the model
        options: Any = self.activation_checkpointing_kwargs or {}
        if self.activation_checkpointing and options.get("use_reentrant"):
            raise ZofoError("use_reentrant: true loses the gradients of an adapter on a frozen backbone: leave it out")

    def _settle_checkpointing(self) -> None:
        """One meaning under both names; transformers would warn of the shorter one, which most people know."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.method in ("zo", "none"):
            self.activation_checkpointing = False  # forward passes keep nothing that could be computed again

    def _check_zo_learning_rate(self) -> None:
        if self.zo_learning_rate == AUTO:
            if self.zo_weight_decay and self.method in ("bilevel", "zo", "two_stage"):
                raise ZofoError(
                    f"zo_weight_decay is {self.zo_weight_decay}, but the automatic rate grows without bound where "
                    "losses are flat, and the decay with it: leave it out, or give zo_learning_rate as a number"
                )
            return
        try:
            self.zo_learning_rate = float(self.zo_learning_rate)
        except ValueError as error:
            raise ZofoError(f"zo_learning_rate is {self.zo_learning_rate!r}, but must be a number or auto") from error
        self._require("zo_learning_rate", ">", 0)

    def _check_selection(self) -> None:
        if not 0 <= self.zo_sparsity < 1:
            raise ZofoError(f"zo_sparsity is {self.zo_sparsity}, but must be at least 0 and less than 1")
        if isinstance(self.zo_parameters, str):
            self.zo_parameters = [self.zo_parameters]
        if isinstance(self.zo_exclude, str):
            self.zo_exclude = [self.zo_exclude]
        self.zo_layers = None if self.zo_layers is None else str(self.zo_layers)
        given = [key for key in ("zo_parameters", "zo_exclude", "zo_layers", "zo_sparsity") if vars(self)[key]]
        if given and (self.method == "fo" or not self.moves_backbone):
            raise ZofoError(
                f"{given[0]} chooses weights of the backbone, but method {self.method} with adapter {self.adapter} "
                "moves none of them by forward passes: leave it out, or choose bilevel, two_stage, or zo with adapter "
                "none"
            )

    def _check_combinations(self) -> None:
        if self.method in ("bilevel", "two_stage") and self.adapter == "none":
            raise ZofoError(
                f"method {self.method} trains an adapter, but adapter is none: choose lora, prefix or prompt, or "
                "method zo (MeZO) to move the backbone alone"
            )
        if self.load_best_model_at_end and str(self.eval_strategy) == "no":
            raise ZofoError(
                "load_best_model_at_end needs evaluations to choose by: give eval_steps, and save_steps alike"
            )
        if self.bf16 or self.fp16:
            raise ZofoError(
                "bf16 and fp16 switch autocast on, which zofo does not use: set dtype: bfloat16 or float16"
            )

    @property
    def moves_backbone(self) -> bool:
        """Whether the backbone's weights change."""
        return self.method in ("bilevel", "two_stage") or (self.method != "none" and self.adapter == "none")

    def identity(self) -> dict[str, Any]:
        """The keys that must not change when a run is resumed, as JSON values."""
        keys = [*_INHERITED_IDENTITY, *(key for key in own_keys() if key not in _FREE)]
        timeless = self.lr_scheduler_type in _TIMELESS and not 0 < self.warmup_steps < 1
        if self.method == "two_stage" or self.penalty_schedule != "constant" or not timeless:
            keys += ["max_steps", "num_train_epochs"]  # what a step does depends on how many there will be
        values = {key: _anywhere(key, vars(self)[key]) for key in keys}
        return {key: str(value) if isinstance(value, Enum) else value for key, value in values.items()}

    def resolved(self) -> dict[str, Any]:
        """Every key that differs from its default, or is one of zofo's own: what reading it back needs."""
        kept: dict[str, Any] = {}
        followed = () if self.upper_learning_rate != self.learning_rate else ("upper_learning_rate",)
        for field in dataclasses.fields(self):
            value = vars(self)[field.name]
            value = value.value if isinstance(value, Enum) else value
            if field.name in (*_MANNER, *_CHECKPOINTING, *followed) or not field.init:
                continue
            if field.name.endswith("_token"):  # a secret
                continue
            if (field.name in own_keys() or value != field.default) and _plain(value):
                kept[field.name] = _anywhere(field.name, value)
        if self.activation_checkpointing:  # by the name that people give it: two would contradict each other
            kept["gradient_checkpointing"] = True
            if self.activation_checkpointing_kwargs:
                kept["gradient_checkpointing_kwargs"] = self.activation_checkpointing_kwargs
        return kept

    def _require(self, name: str, relation: Literal[">", ">="], bound: float) -> None:
        value = vars(self)[name]
        if value is None:
            return
        if not math.isfinite(value):
            raise ZofoError(f"{name} is {value}, but must be a finite number")
        if not (value > bound if relation == ">" else value >= bound):
            words = "greater than" if relation == ">" else "at least"
            raise ZofoError(f"{name} is {value}, but must be {words} {bound}")


def _anywhere(key: str, value: Any) -> Any:
    """A path among the values as an absolute one, so that a run can be repeated from any folder."""
    if key not in ("model", "task", "adapter", "source", "data") or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    is_path = path.suffix in (".yaml", ".yml", ".json", ".gguf") or (key == "model" and path.is_dir())
    is_path = is_path or key in ("source", "data") or (key == "adapter" and path.is_dir() and value not in KINDS)
    return str(path.resolve()) if is_path and path.exists() else value


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, list | dict) and bool(value))


def own_keys() -> list[str]:
    """The names that `ZOFOConfig` adds to `TrainingArguments`.

    Examples:
        >>> "penalty" in own_keys(), "seed" in own_keys()
        (True, False)
    """
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    return [f.name for f in dataclasses.fields(ZOFOConfig) if f.name not in inherited]


def parser() -> HfArgumentParser:
    """The command-line parser of all keys; an error raises `ZofoError`."""
    return _Parser(ZOFOConfig, allow_abbrev=False, add_help=False)  # pyright: ignore[reportArgumentType]


def parse_config(file: Path | None, arguments: Sequence[str]) -> ZOFOConfig:
    """A config from a flat YAML file and `--key value` arguments; the arguments win.

    Args:
        file: the YAML file, or None.
        arguments: what came on the command line.

    Raises:
        ZofoError: for an unknown key, with the nearest right one, or a value of the wrong type.

    Examples:
        >>> parse_config(None, ["--penlty", "1"])
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: unknown key 'penlty': did you mean penalty?
    """
    tokens = [*_tokens(file), *arguments] if file else list(arguments)
    config, rest = parser().parse_args_into_dataclasses(tokens, return_remaining_strings=True)
    if rest:
        _refuse_unknown(rest[0], "")
    return config


_ARGUMENT = re.compile(r"argument --(\w+)(?:/--[\w-]+)?: ")


class _Parser(HfArgumentParser):
    def _get_value(self, action: Any, arg_string: str) -> Any:
        """As argparse, but one key may be a number or a word, which `ZOFOConfig` checks."""
        return arg_string if action.dest == "zo_learning_rate" else super()._get_value(action, arg_string)

    def error(self, message: str) -> Any:
        raise ZofoError(_ARGUMENT.sub(r"\1: ", message))


def _tokens(file: Path) -> list[str]:
    """A YAML file as command-line tokens, so that both are checked by the same parser."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ZofoError(f"there is no config file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ZofoError(f"cannot read the config file {file}: {error}") from error
    except yaml.YAMLError as error:
        raise ZofoError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ZofoError(f"{file} is no config: it must hold lines like `learning_rate: 1e-3`")
    tokens: list[str] = []
    for key, value in content.items():
        if key not in _field_names():
            _refuse_unknown(str(key), f"{file}: ")
        if value is None:
            continue
        if isinstance(value, list) and len(value) != 1 and not _takes_lists(key):
            raise ZofoError(f"{file}: {key} is {value}, but takes one value")
        tokens += [f"--{key}", *_words(value)]
    return tokens


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)]


def _takes_lists(key: str) -> bool:
    field = next(f for f in dataclasses.fields(ZOFOConfig) if f.name == key)
    return "list" in str(field.type) or "Any" in str(field.type)


def _field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(ZOFOConfig) if f.init]


def _refuse_unknown(key: str, where: str) -> None:
    name = key.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, _field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see `zofo train --help`"
    raise ZofoError(f"{where}unknown key {name!r}: {hint}")
