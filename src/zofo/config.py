"""`ZOFOConfig`: what goes together, what is stored, what a resumed run must share."""

import dataclasses
from collections.abc import Collection
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Any, Self

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from zofo import parse
from zofo.bounds import POSITIVE
from zofo.errors import ZofoError, in_one_line
from zofo.habits import refuse_values
from zofo.identity import REWARD_DECIDES, anywhere, known
from zofo.keys import (
    AUTO,
    BY_EVALUATIONS,
    CHANNEL,
    LORA_KEYS,
    OBJECTIVE_KEYS,
    Keys,
    default_of,
    field,
    name_of,
    refusing_unknown,
    require_honoured,
)
from zofo.methods import METHODS, Method, settings
from zofo.methods.objective_settings import settle_objective
from zofo.models.peft import require_fresh, require_start
from zofo.tasks.lists import is_folder_of_tasks, task_files
from zofo.tasks.rewards import REWARD

_INHERITED_IDENTITY = (
    "seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "lr_scheduler_kwargs", "optim_args", "neftune_noise_alpha",
)  # fmt: skip
_CHECKPOINTING = tuple(f"{name}_checkpointing{rest}" for name in ("activation", "gradient") for rest in ("", "_kwargs"))
_TIMELESS = ("constant", "constant_with_warmup", "inverse_sqrt", *BY_EVALUATIONS)
_NEEDING_EVALUATIONS = ("best", *BY_EVALUATIONS, "True")
_MANNER = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run was started, not what it is
_FREE = (
    "final_split", "zero_shot", "overwrite_output_dir", "on_nonfinite", "early_stopping_patience", "diagnose",
    "reward_timeout",
)  # fmt: skip
_CHOOSING = ("zo_parameters", "zo_exclude", "zo_layers", "zo_sparsity")
_OF_ONE_METHOD = (  # which another one would refuse
    *_CHOOSING, "zo_weight_decay", "zo_anchor", "optimizer_in_backward", "upper_learning_rate", "penalty_schedule",
    "normalize_penalty",
)  # fmt: skip


@refusing_unknown
@dataclass
class ZOFOConfig(Keys):
    """Everything that decides a run. `max_steps` counts outer iterations; keys of `TrainingArguments` work too.

    Args:
        given: the names of the keys that somebody wrote; if not given, those that differ from their defaults.

    Raises:
        ZofoError: if a value cannot be used, before any work.

    Examples:
        >>> ZOFOConfig(output_dir="runs/x", method="zo", zo_eps=0.0)
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: zo_eps is 0.0, but must be greater than 0
    """

    method: str = field(
        "bilevel", f"update rule: {', '.join(METHODS)}; zo is MeZO, fo PEFT or full", choices=[*METHODS]
    )

    given: InitVar[Collection[str] | None] = None

    def __post_init__(self, given: Collection[str] | None) -> None:
        refuse_values(vars(self))
        if self.method not in METHODS:
            raise ZofoError(f"method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        self._settle_task()
        different = [f.name for f in dataclasses.fields(self) if f.init and not _is_default(f, vars(self)[f.name])]
        self._given = frozenset(different if given is None else given)
        self._notices: list[str] = []
        require_honoured({key: vars(self)[key] for key in self._given}, stated=given is not None)
        self._settle_learning_rates()
        self.require_bounds()
        if self.max_steps != -1:
            POSITIVE.require("max_steps", self.max_steps)
        if not self.method_class.trains():
            self.adapter = "none"  # one that is never trained would only be in the way
            vars(self).update(dict.fromkeys(LORA_KEYS))
        elif self.adapter_init:
            require_start(self.adapter_init, self.adapter if "adapter" in self._given else None)
            self.adapter = self.adapter_init
        elif not self.resume_from_checkpoint:  # which brings the weights
            require_fresh(self.adapter)
        self.settle_numbers(may_freeze=self.method_class.freezes)
        self._check_selection()
        self._notices += settle_objective(self, self.method_class, self._given)
        settings.settle_checkpoints(self, self._given)
        settings.settle_checkpointing(self, self.method_class)
        self._check_combinations()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ZofoError(in_one_line(error)) from error
        self.do_eval = False  # transformers sets it, and nothing reads it
        settings.require_single_process(self)
        self._n_gpu = min(self.n_gpu, 1)  # more would make Trainer split batches between copies of the model
        settings.require_batches(self, [stream.batches for stream in self.method_class.streams(self).values()])
        settings.settle_checkpointing_options(self)
        self.lr_scheduler_kwargs = parse.numbers(self.lr_scheduler_kwargs)
        first_order = self.method_class.backpropagates
        rate = self.learning_rate if first_order else self.zo_learning_rate
        settings.require_schedule(self, rate if isinstance(rate, float) else 1.0)
        if first_order and self.optim_args:
            settings.require_optim_args(self)

    @property
    def method_class(self) -> type[Method]:
        """The class of `method`, which says all that depends on it."""
        return METHODS[self.method].form_for(self)

    @property
    def updates_backbone(self) -> bool:
        """Whether the backbone's weights change."""
        return self.method_class.updates_backbone(self.adapter)

    @property
    def freezes_backbone(self) -> bool:
        """Whether a method that would update it takes no such step."""
        return self.method_class.freezes and self.zo_learning_rate == 0

    @property
    def needs_answers(self) -> bool:
        """Whether rows must have right answers; a reward alone needs prompts alone."""
        return self.objective != REWARD or self.method_class.backpropagates

    @property
    def is_channel(self) -> bool:
        """Whether it trains on prompts given their answers."""
        return self.method_class.trains() and self.train_prompt == CHANNEL

    @property
    def division_seed(self) -> int:
        """Of the division of the rows: `data_seed`, or `seed` if it is not given. Batches are drawn by `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def idle(self) -> tuple[str, ...]:
        """The keys that were given and that the method does not use."""
        unused = self._given & (_method_keys() - self.method_class.keys_used)
        return tuple(name for name in field_names() if name in unused)

    def notices(self) -> list[str]:
        """A line for each reason why a key that was given does nothing in this run, or another thing than it says."""
        notices = [*self._notices]
        if self.idle:
            notices.append(f"not used by {self.method}: {', '.join(self.idle)}")
        schedule = name_of(self.lr_scheduler_type)
        if self.warmup_steps and self.method_class.trains() and schedule in ("constant", *BY_EVALUATIONS):
            notices.append(f"not used by lr_scheduler_type {schedule}: warmup_steps (constant_with_warmup has it)")
        if "task_exponent" in self._given and self.task_sampling != "temperature":
            notices.append(f"not used by task_sampling {self.task_sampling}: task_exponent")
        if self.freezes_backbone and self.zo_anchor:
            notices.append("not used with zo_learning_rate: 0, which freezes the backbone: zo_anchor")
        if self.system_prompt and not self.chat_template:
            notices.append("not used without chat_template: system_prompt")
        return notices

    def _settle_task(self) -> None:
        """One task is a word, several are a list."""
        if self.task is not None and (len(self.tasks) != 1 or is_folder_of_tasks(self.tasks[0])):
            self.task = task_files(self.tasks)
        if len(self.tasks) == 1:
            (self.task,) = self.tasks

    def _settle_learning_rates(self) -> None:
        """What is not given follows another key; MeZO's own names count where nothing else could be meant."""
        if self.zo_learning_rate is None:
            self.zo_learning_rate = AUTO
            alone = self.method_class.zeroth_order and not self.method_class.backpropagates and self.updates_backbone
            if alone and "learning_rate" in self._given:
                self._rename("learning_rate", "zo_learning_rate")
                if "weight_decay" in self._given and not self.zo_weight_decay:
                    self._rename("weight_decay", "zo_weight_decay")
        if self.upper_learning_rate is None and "upper_learning_rate" in self.method_class.keys_used:
            self.upper_learning_rate = self._followed_rate

    @property
    def _followed_rate(self) -> float:
        """What `upper_learning_rate` is if it is not given."""
        return self.method_class.upper_rate or self.learning_rate

    def _rename(self, key: str, meant: str) -> None:
        values, defaults = vars(self), {f.name: f.default for f in dataclasses.fields(self)}
        values[meant], values[key] = values[key], defaults[key]
        self._given = (self._given - {key}) | {meant}
        self._notices.append(f"{key} is taken as {meant}: {values[meant]}")

    def settle_evaluations(self, dev_rows: int) -> None:
        """Without dev rows there are no evaluations; refuses that where somebody asked for them."""
        if dev_rows:
            return
        values = {key: name_of(vars(self)[key]) for key in ("save_strategy", "lr_scheduler_type", "eval_on_start")}
        asked = [key for key, value in values.items() if value in _NEEDING_EVALUATIONS]
        if name_of(self.eval_strategy) != "no":
            asked += [key for key in ("eval_strategy", "eval_steps", "load_best_model_at_end") if key in self._given]
        if asked:
            raise ZofoError(f"{asked[0]} asks for evaluations, but no row is left for dev: give more rows, or dev_size")
        self.eval_strategy = IntervalStrategy.NO

    def _check_selection(self) -> None:
        for key in ("zo_parameters", "zo_exclude", "lora_target_modules", "reward"):
            if isinstance(vars(self)[key], str):
                vars(self)[key] = [vars(self)[key]]
        self.zo_layers = None if self.zo_layers is None else str(self.zo_layers)
        self.adapter_layers = None if self.adapter_layers is None else str(self.adapter_layers)
        chosen = [key for key in (*_CHOOSING, "zo_anchor") if vars(self)[key]]
        if chosen and not (self.method_class.zeroth_order and self.updates_backbone):
            fitting = [n if m.updates_both else f"{n} (adapter none)" for n, m in METHODS.items() if m.zeroth_order]
            raise ZofoError(
                f"{chosen[0]} {'draws back' if chosen[0] == 'zo_anchor' else 'chooses'} weights of the backbone, but "
                f"method {self.method} with adapter {self.adapter} updates none of them by forward passes: leave it "
                f"out, or choose one of {', '.join(fitting)}"
            )

    def _check_combinations(self) -> None:
        if self.zo_learning_rate == AUTO and self.zo_weight_decay and self.method_class.zeroth_order:
            raise ZofoError(
                f"zo_weight_decay is {self.zo_weight_decay}, but the automatic rate grows without bound where losses "
                "are flat, and the decay with it: leave it out, or give zo_learning_rate as a number"
            )
        if self.method_class.requires_adapter and self.adapter == "none":
            raise ZofoError(
                f"method {self.method} trains an adapter, but adapter is none: choose lora, prefix or prompt, or "
                "method zo (MeZO) to update the backbone alone"
            )
        settings.require_lora(self)
        settings.require_low_rank(self)
        settings.require_train_prompt(self)
        if "lower_pool" in self.method_class.keys_used:
            settings.require_pool(self)
            settings.require_finite_penalty(self)
        settings.require_something_trained(self)
        settings.require_whole_model(self, self.method_class, self._given)
        settings.require_evaluations(self, self.method_class)

    def variant(self, method: str, adapter: str, **more: Any) -> Self:
        """The same run by another method, without the keys that do not count for it."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if (method, adapter) != (self.method, self.adapter):
            more = {**{key: defaults[key] for key in _OF_ONE_METHOD}, **more}
        if not METHODS[method].freezes and self.zo_learning_rate == 0:
            more = {"zo_learning_rate": None, **more}
        if not METHODS[method].keys_used >= OBJECTIVE_KEYS:
            more = {**{key: defaults[key] for key in OBJECTIVE_KEYS}, **more}
        if adapter != self.adapter:
            more = {"adapter_init": None, **dict.fromkeys(LORA_KEYS), **more}
        return dataclasses.replace(self, method=method, adapter=adapter, **more)

    def identity(self) -> dict[str, Any]:
        """The keys that must not change when a run is resumed, as JSON values."""
        timeless = self.lr_scheduler_type in _TIMELESS and not 0 < self.warmup_steps < 1
        scheduled = self.penalty_schedule != "constant" and "penalty_schedule" in self.method_class.keys_used
        lasting = self.method_class.depends_on_length or scheduled or not timeless
        free = {*_FREE, *(_method_keys() - self.method_class.keys_used)}
        keys = [*_INHERITED_IDENTITY, *(key for key in own_keys() if key not in free)]
        keys += ["max_steps", "num_train_epochs"] if lasting else []  # what a step does depends on how many there are
        choosing = (self.save_strategy, self.lr_scheduler_type, self.load_best_model_at_end)
        decides = self.objective == REWARD or {*map(name_of, choosing)}.intersection(_NEEDING_EVALUATIONS)
        return {**{key: _as_json(known(key, vars(self)[key])) for key in keys}, REWARD_DECIDES: bool(decides)}

    def resolved(self) -> dict[str, Any]:
        """Every key that differs from its default, or is one of zofo's own: what reading it back needs."""
        kept: dict[str, Any] = {}
        followed = () if self.upper_learning_rate != self._followed_rate else ("upper_learning_rate",)
        for own in dataclasses.fields(self):
            value = vars(self)[own.name]
            value = value.value if isinstance(value, Enum) else value
            if own.name in (*_MANNER, *_CHECKPOINTING, *followed) or not own.init:
                continue
            idle = own.name not in self.method_class.keys_used and own.name in _method_keys()
            if _is_default(own, value) and (idle or own.name not in own_keys()):
                continue
            if isinstance(value, bool | int | float | str) or (isinstance(value, list | dict) and value):
                kept[own.name] = anywhere(own.name, value)
        if self.activation_checkpointing:  # by the name that people give it: two would contradict each other
            kept["gradient_checkpointing"] = True
            if self.activation_checkpointing_kwargs:
                kept["gradient_checkpointing_kwargs"] = self.activation_checkpointing_kwargs
        return kept


def identity_defaults() -> dict[str, Any]:
    """What a run is known by where it leaves every key of zofo out, as JSON values."""
    keys = [key for key in dataclasses.fields(ZOFOConfig) if key.name in own_keys()]
    return {**{key.name: _as_json(default_of(key)) for key in keys}, "zo_learning_rate": AUTO}


def _is_default(key: dataclasses.Field[Any], value: Any) -> bool:
    return value == default_of(key) or (key.name, value) == ("zo_learning_rate", AUTO)


def _method_keys() -> frozenset[str]:
    """The keys that count for some methods only."""
    return frozenset[str]().union(*(method.keys_used for method in METHODS.values()))


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, Enum) else value


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


def field_names() -> list[str]:
    """All keys."""
    return [f.name for f in dataclasses.fields(ZOFOConfig) if f.init]
