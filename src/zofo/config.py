"""`ZOFOConfig`: what goes together, what is stored, what a resumed run must share; and its parser."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

import yaml
from transformers import HfArgumentParser, TrainingArguments

from zofo.errors import ZofoError, did_you_mean
from zofo.keys import AUTO, POSITIVE, Keys, field
from zofo.methods import METHODS, Method
from zofo.models.peft import KINDS

_INHERITED_IDENTITY = (
    "seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "optim_args",
)  # fmt: skip
_CHECKPOINTING = tuple(f"{name}_checkpointing{rest}" for name in ("activation", "gradient") for rest in ("", "_kwargs"))
_TIMELESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
_MANNER = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run was started, not what it is
_FREE = ("overwrite_output_dir", "on_nonfinite")
_CHOOSING = ("zo_parameters", "zo_exclude", "zo_layers", "zo_sparsity")


@dataclass
class ZOFOConfig(Keys):
    """Everything that decides a run. `max_steps` counts outer iterations; every key of `TrainingArguments` works too.

    Raises:
        ZofoError: if a value cannot be used, before any work.

    Examples:
        >>> ZOFOConfig(output_dir="runs/x", method="zo", zo_eps=0.0)
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: zo_eps is 0.0, but must be greater than 0
    """

    method: str = field(
        "bilevel", "update rule: bilevel, zo (MeZO), fo (PEFT or full), two_stage, none", choices=[*METHODS]
    )

    def __post_init__(self) -> None:
        """Checks the keys, then lets `TrainingArguments` check its own."""
        if self.method not in METHODS:
            raise ZofoError(f"method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        if self.upper_learning_rate is None:
            self.upper_learning_rate = self.learning_rate
        self.require_bounds()
        if self.max_steps != -1:
            POSITIVE.require("max_steps", self.max_steps)
        if not self.method_class.trains():
            self.adapter = "none"  # an adapter that is never trained would only be in the way
        self._check_zo_learning_rate()
        self._check_selection()
        if str(self.eval_strategy) == "no" and self.eval_steps:
            self.eval_strategy = "steps"
        self._settle_checkpointing()
        self._check_combinations()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ZofoError(" ".join(str(error).split())) from error
        self._check_launch()

    @property
    def method_class(self) -> type[Method]:
        """The class of `method`, which says all that depends on it."""
        return METHODS[self.method]

    @property
    def updates_backbone(self) -> bool:
        """Whether the backbone's weights change."""
        return self.method_class.updates_backbone(self.adapter)

    @property
    def order_seed(self) -> int:
        """Of the order of the rows: `data_seed`, or `seed` if it is not given."""
        return self.seed if self.data_seed is None else self.data_seed

    def _check_launch(self) -> None:
        """Refuses what launchers and accelerate's settings ask for beside the keys."""
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
        if not self.method_class.backpropagates:
            self.activation_checkpointing = False  # forward passes keep nothing that could be computed again

    def _check_zo_learning_rate(self) -> None:
        if self.zo_learning_rate == AUTO:
            if self.zo_weight_decay and self.method_class.zeroth_order:
                raise ZofoError(
                    f"zo_weight_decay is {self.zo_weight_decay}, but the automatic rate grows without bound where "
                    "losses are flat, and the decay with it: leave it out, or give zo_learning_rate as a number"
                )
            return
        try:
            self.zo_learning_rate = float(self.zo_learning_rate)
        except ValueError as error:
            raise ZofoError(f"zo_learning_rate is {self.zo_learning_rate!r}, but must be a number or auto") from error
        POSITIVE.require("zo_learning_rate", self.zo_learning_rate)

    def _check_selection(self) -> None:
        if isinstance(self.zo_parameters, str):
            self.zo_parameters = [self.zo_parameters]
        if isinstance(self.zo_exclude, str):
            self.zo_exclude = [self.zo_exclude]
        self.zo_layers = None if self.zo_layers is None else str(self.zo_layers)
        chosen = [key for key in _CHOOSING if vars(self)[key]]
        if chosen and not (self.method_class.zeroth_order and self.updates_backbone):
            raise ZofoError(
                f"{chosen[0]} chooses weights of the backbone, but method {self.method} with adapter {self.adapter} "
                "updates none of them by forward passes: leave it out, or choose bilevel, two_stage, or zo with "
                "adapter none"
            )

    def _check_combinations(self) -> None:
        if self.method_class.requires_adapter and self.adapter == "none":
            raise ZofoError(
                f"method {self.method} trains an adapter, but adapter is none: choose lora, prefix or prompt, or "
                "method zo (MeZO) to update the backbone alone"
            )
        if self.load_best_model_at_end and str(self.eval_strategy) == "no":
            raise ZofoError(
                "load_best_model_at_end needs evaluations to choose by: give eval_steps, and save_steps alike"
            )
        if self.bf16 or self.fp16:
            raise ZofoError("bf16 and fp16 switch autocast on, which zofo does not use: set dtype: bfloat16 or float16")

    def variant(self, method: str, adapter: str, **more: Any) -> Self:
        """The same run by another method, without the keys that do not count for it."""
        if (method, adapter) != (self.method, self.adapter):
            more = {**dict.fromkeys(_CHOOSING[:3]), "zo_sparsity": 0.0, "zo_weight_decay": 0.0, **more}
        return dataclasses.replace(self, method=method, adapter=adapter, **more)

    def identity(self) -> dict[str, Any]:
        """The keys that must not change when a run is resumed, as JSON values."""
        timeless = self.lr_scheduler_type in _TIMELESS and not 0 < self.warmup_steps < 1
        lasting = self.method_class.depends_on_length or self.penalty_schedule != "constant" or not timeless
        keys = [*_INHERITED_IDENTITY, *(key for key in own_keys() if key not in _FREE)]
        keys += ["max_steps", "num_train_epochs"] if lasting else []  # what a step does depends on how many there are
        return {key: _as_json(_anywhere(key, vars(self)[key])) for key in keys}

    def resolved(self) -> dict[str, Any]:
        """Every key that differs from its default, or is one of zofo's own: what reading it back needs."""
        kept: dict[str, Any] = {}
        followed = () if self.upper_learning_rate != self.learning_rate else ("upper_learning_rate",)
        for own in dataclasses.fields(self):
            value = vars(self)[own.name]
            value = value.value if isinstance(value, Enum) else value
            if own.name in (*_MANNER, *_CHECKPOINTING, *followed) or not own.init:
                continue
            if own.name.endswith("_token"):  # a secret
                continue
            if (own.name in own_keys() or value != own.default) and _plain(value):
                kept[own.name] = _anywhere(own.name, value)
        if self.activation_checkpointing:  # by the name that people give it: two would contradict each other
            kept["gradient_checkpointing"] = True
            if self.activation_checkpointing_kwargs:
                kept["gradient_checkpointing_kwargs"] = self.activation_checkpointing_kwargs
        return kept


def identity_of_before(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an older run, with the keys that it does not know yet at their defaults.

    So a key that is added later never makes an older run impossible to resume.
    """
    return {**{f.name: _as_json(f.default) for f in dataclasses.fields(ZOFOConfig) if f.name in own_keys()}, **stored}


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, Enum) else value


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
    """The names that zofo adds to `TrainingArguments`, the method first.

    Examples:
        >>> own_keys()[0], "penalty" in own_keys(), "seed" in own_keys()
        ('method', True, False)
    """
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    return ["method", *(f.name for f in dataclasses.fields(Keys) if f.name not in inherited)]


def key_help() -> list[str]:
    """A line for every key of zofo."""
    fields = {f.name: f for f in dataclasses.fields(ZOFOConfig)}
    names = [*own_keys(), "learning_rate", "lr_scheduler_type", "logging_steps"]
    return [f"  {n:22} {fields[n].metadata['help']} (default {fields[n].default})" for n in names]


def parse_config(
    stored: Path | Mapping[str, Any] | None, arguments: Sequence[str], known: Sequence[str] = ()
) -> ZOFOConfig:
    """A config from a flat YAML file, or its content, and `--key value` arguments; the arguments win.

    Among the arguments only `known` keys may stand, if there are some. An unknown key is refused with the nearest one.

    Examples:
        >>> parse_config(None, ["--penlty", "1"])
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: unknown key 'penlty': did you mean penalty?
    """
    for name in (_key_name(word) for word in arguments if known and word.startswith("--")):
        if name not in known:
            raise ZofoError(f"unknown option --{name}: {did_you_mean(name, known, 'see --help')}")
    tokens = [*(_tokens(stored) if stored else ()), *arguments]
    config, rest = _Parser(ZOFOConfig, allow_abbrev=False, add_help=False).parse_args_into_dataclasses(  # pyright: ignore[reportArgumentType]
        tokens, return_remaining_strings=True
    )
    if rest:
        _refuse_unknown(_key_name(rest[0]), "", _field_names())
    return config


_ARGUMENT = re.compile(r"argument --(\w+)(?:/--[\w-]+)?: ")


class _Parser(HfArgumentParser):
    def _get_value(self, action: Any, arg_string: str) -> Any:
        """As argparse, but one key may be a number or a word, which `ZOFOConfig` checks."""
        return arg_string if action.dest == "zo_learning_rate" else super()._get_value(action, arg_string)

    def error(self, message: str) -> Any:
        raise ZofoError(_ARGUMENT.sub(r"\1: ", message))


def _tokens(stored: Path | Mapping[str, Any]) -> list[str]:
    """A YAML file or its content as command-line tokens, so that all are checked by the same parser."""
    where, content = (f"{stored}: ", read_yaml(stored)) if isinstance(stored, Path) else ("", stored)
    tokens: list[str] = []
    for key, value in content.items():
        if key not in _field_names():
            _refuse_unknown(str(key), where, _field_names())
        if value is None:
            continue
        if isinstance(value, list) and len(value) != 1 and not _takes_lists(key):
            raise ZofoError(f"{where}{key} is {value}, but takes one value")
        tokens += [f"--{key}", *_words(value)]
    return tokens


def read_yaml(file: Path) -> dict[str, Any]:
    """The content of a config file."""
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
    return content


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)]


def _takes_lists(key: str) -> bool:
    declared = next(str(f.type) for f in dataclasses.fields(ZOFOConfig) if f.name == key)
    return "list" in declared or "Any" in declared


def _field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(ZOFOConfig) if f.init]


def _key_name(word: str) -> str:
    return word.lstrip("-").split("=")[0].replace("-", "_")


def _refuse_unknown(name: str, where: str, known: Iterable[str]) -> None:
    raise ZofoError(f"{where}unknown key {name!r}: {did_you_mean(name, known, 'see `zofo train --help`')}")
