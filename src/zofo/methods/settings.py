"""Which values of keys go together, and which of transformers and accelerate can be used: some are made once."""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from zofo.errors import ZofoError, first_line
from zofo.keys import CHANNEL, FULL_KEYS, INFINITE, LORA_KEYS, Keys, name_of
from zofo.methods.first_order_optimizers import settings_of_optimizer
from zofo.methods.method import Method
from zofo.parse import numbers

_WITHOUT_KWARGS = ("constant", "constant_with_warmup")
_CHECKPOINTING_OPTIONS = (  # of transformers, and of torch.utils.checkpoint
    "every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug",
    "early_stop",
)  # fmt: skip
_MOST_BATCHES = 10**6  # of an iteration: their rows are a list


def require_single_process(keys: Keys) -> None:
    """Refuses what launchers and accelerate's settings ask for beside the keys."""
    if keys.world_size > 1:
        raise ZofoError(
            f"this is one of {keys.world_size} processes, but a run is a single one: start zofo without torchrun or "
            "accelerate launch"
        )
    if keys.mixed_precision != "no":
        raise ZofoError(
            f"accelerate's settings switch autocast on (mixed_precision: {keys.mixed_precision}), which zofo does not "
            "use: start zofo without accelerate launch, and set dtype"
        )


def settle_checkpoints(keys: Keys, given: Collection[str]) -> None:
    """The best model can be loaded only if evaluations and checkpoints fall together: one follows the other."""
    if not keys.load_best_model_at_end:
        return
    if not {"save_steps", "save_strategy"}.intersection(given):
        keys.save_steps, keys.save_strategy = keys.eval_steps or keys.save_steps, keys.eval_strategy
    elif not {"eval_steps", "eval_strategy"}.intersection(given):
        keys.eval_steps, keys.eval_strategy = keys.save_steps, keys.save_strategy


def settle_checkpointing(keys: Keys, method: type[Method]) -> None:
    """One meaning under both names; transformers would warn of the shorter one, which most people know."""
    if keys.activation_checkpointing is None:
        keys.activation_checkpointing = keys.gradient_checkpointing
    if keys.activation_checkpointing_kwargs is None:
        keys.activation_checkpointing_kwargs = keys.gradient_checkpointing_kwargs
    if not method.backpropagates:
        keys.activation_checkpointing = False  # forward passes keep nothing that could be computed again


def settle_checkpointing_options(keys: Keys) -> None:
    """What torch recommends where they do not say it, once transformers has read them; refuses what cannot work."""
    given = cast("dict[str, Any] | None", numbers(keys.activation_checkpointing_kwargs))
    if not given:
        return
    keys.activation_checkpointing_kwargs = options = {"use_reentrant": False, **given}
    if unknown := options.keys() - {*_CHECKPOINTING_OPTIONS}:
        raise ZofoError(
            f"gradient_checkpointing_kwargs has {sorted(unknown)[0]!r}, which nothing reads: it may have "
            f"{', '.join(_CHECKPOINTING_OPTIONS)}"
        )
    every = options.get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        raise ZofoError(f"every_n_layers of gradient_checkpointing_kwargs is {every!r}: give a whole number from 1 on")
    if keys.activation_checkpointing and options["use_reentrant"]:
        raise ZofoError("use_reentrant: true loses the gradients of an adapter on a frozen backbone: leave it out")
    if keys.activation_checkpointing and options.get("offload") and keys.device.type == "cpu":
        raise ZofoError("offload of gradient_checkpointing_kwargs moves activations off a GPU, but there is none here")


def require_evaluations(keys: Keys, method: type[Method]) -> None:
    """Refuses to choose the best model, or to stop early, without evaluations."""
    if keys.load_best_model_at_end and name_of(keys.eval_strategy) == "no":
        raise ZofoError("load_best_model_at_end needs evaluations to choose by: leave out eval_strategy: no")
    if keys.early_stopping_patience and len(method.stages) > 1:
        raise ZofoError(
            f"early_stopping_patience is {keys.early_stopping_patience}, but method {method.name} has two stages, and "
            "the first one may stop early before the second has begun: leave it out"
        )
    if keys.early_stopping_patience and not keys.load_best_model_at_end:
        raise ZofoError(
            f"early_stopping_patience is {keys.early_stopping_patience}, but without a best model nothing says when to "
            "stop: give load_best_model_at_end: true, eval_steps, and metric_for_best_model (by default the loss)"
        )


def require_lora(keys: Keys) -> None:
    """Refuses the keys of LoRA without this adapter."""
    for key, of_peft in LORA_KEYS.items():
        if vars(keys)[key] is not None and keys.adapter != "lora":
            raise ZofoError(
                f"{key} is {vars(keys)[key]!r}, but adapter is {keys.adapter}: leave it out, or set adapter: lora; a "
                f"PEFT config has {of_peft}"
            )


def require_pool(keys: Keys) -> None:
    """Refuses a pool of which the lower steps would not see all batches."""
    if keys.lower_pool and keys.lower_pool > keys.lower_steps:
        raise ZofoError(
            f"lower_pool is {keys.lower_pool}, but lower_steps is {keys.lower_steps}, so some of its batches would "
            f"never be used: {f'set it to {keys.lower_steps} at most, or ' if keys.lower_steps else ''}leave it out"
        )


def require_finite_penalty(keys: Keys) -> None:
    """Refuses, with an infinite penalty, the keys of an upper adapter that is another one than the lower one."""
    usual = {"upper_learning_rate": (None, keys.learning_rate), "penalty_schedule": ("constant",)}
    for key, values in {**usual, "normalize_penalty": (True,)}.items():
        value = vars(keys)[key]
        if keys.penalty == INFINITE and value not in values:
            raise ZofoError(
                f"{key} is {value}, but penalty is infinite, as it is by default, and upper and lower are one adapter: "
                f"give penalty: 1 for Bilevel ZOFO as published, or leave {key} out"
            )


def require_something_trained(keys: Keys) -> None:
    """Refuses an infinite penalty without steps on s and with θ frozen."""
    if keys.penalty == INFINITE and not keys.lower_steps and keys.zo_learning_rate == 0:
        raise ZofoError(
            "penalty is infinite, as it is by default, lower_steps is 0 and zo_learning_rate is 0, so nothing would be "
            "trained: raise one of the two, or give penalty: 1"
        )


def require_train_prompt(keys: Keys) -> None:
    """Refuses to turn around the rows of chats."""
    if keys.train_prompt == CHANNEL and keys.chat_template:
        raise ZofoError(
            "train_prompt is channel, where the answer stands in front of the prompt, but chat_template is true, and a "
            "chat begins with the prompt: leave one of them out"
        )


def require_low_rank(keys: Keys) -> None:
    """Refuses keys of low-rank directions without these, and what does not go with them."""
    if keys.zo_distribution != "low_rank":
        usual = {"zo_rank": 1, "zo_rows": "own", "zo_members_per_forward": None}
        for key, value in usual.items():
            if vars(keys)[key] != value:
                raise ZofoError(
                    f"{key} is {vars(keys)[key]}, but zo_distribution is {keys.zo_distribution}: set zo_distribution: "
                    "low_rank, or leave it out"
                )
        return
    if keys.zo_sparsity:
        raise ZofoError(
            f"zo_sparsity is {keys.zo_sparsity}, but a direction of zo_distribution low_rank moves all of a matrix: "
            "leave one of them out"
        )
    if keys.diagnose:
        raise ZofoError(
            "diagnose compares directions of full rank, but zo_distribution is low_rank: leave one of them out"
        )
    size = keys.per_device_train_batch_size
    if keys.zo_rows == "own" and keys.num_perturbations > size:
        raise ZofoError(
            f"num_perturbations is {keys.num_perturbations}, but {size} rows of a batch (per_device_train_batch_size) "
            "are divided among the directions: raise the batch size, or set zo_rows: shared"
        )


def require_whole_model(keys: Keys, method: type[Method], given: Collection[str]) -> None:
    """Refuses `optimizer_in_backward` where a step needs all gradients at once, or is another one.

    `given` are the keys that somebody wrote: gradients are not clipped, whatever the default of `max_grad_norm`.
    """
    if not keys.optimizer_in_backward:
        return
    reasons = {
        f"method is {method.name}: leave it out, or set method: fo": not method.keys_used >= FULL_KEYS,
        f"adapter is {keys.adapter}: leave it out, or set adapter: none": keys.adapter != "none",
        f"max_grad_norm is {keys.max_grad_norm}, the norm of all gradients together, which are never there at once: "
        "leave one of them out": "max_grad_norm" in given and keys.max_grad_norm > 0,
        f"gradient_accumulation_steps is {keys.gradient_accumulation_steps}, and each backward pass is a step: set it "
        "to 1, and gradient_checkpointing: true to save memory": keys.gradient_accumulation_steps > 1,
        "on_nonfinite is skip, and a step that has begun cannot be taken back: set on_nonfinite: raise":
            keys.on_nonfinite == "skip",
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise ZofoError(f"optimizer_in_backward is true, but {reason}")


def require_batches(keys: Keys, batches: Sequence[int]) -> None:
    """Refuses an iteration of no micro-batch, or of more than a run could read; `batches` of a step, by stream."""
    read = sum(batches) * keys.gradient_accumulation_steps
    if batches and not read:
        raise ZofoError("lower_steps is 0, and this method takes no other steps, so nothing would be trained: raise it")
    if read > _MOST_BATCHES:
        raise ZofoError(
            f"an iteration would read {read} batches (lower_steps: {keys.lower_steps}, gradient_accumulation_steps: "
            f"{keys.gradient_accumulation_steps}): lower these"
        )


def require_schedule(keys: Keys, rate: float) -> None:
    """Refuses `lr_scheduler_kwargs` that the schedule does not take, or lacks; `rate` is the learning rate at first."""
    kind, kwargs = name_of(keys.lr_scheduler_type), keys.lr_scheduler_kwargs
    if kwargs and not isinstance(kwargs, dict):
        raise ZofoError(f"lr_scheduler_kwargs is {kwargs!r}, but must be a mapping, such as {{min_lr: 1e-5}}")
    if kwargs and kind in _WITHOUT_KWARGS:
        raise ZofoError(f"lr_scheduler_kwargs is {kwargs}, but lr_scheduler_type {kind} takes none: leave it out")
    steps = keys.max_steps if keys.max_steps > 0 else 1000
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    try:
        schedule = get_scheduler(kind, optimizer, int(keys.get_warmup_steps(steps)), steps, cast(Any, kwargs))
        if isinstance(schedule, LambdaLR):
            for step in (0, 1, steps // 2, steps - 1):
                if not all(math.isfinite(factor(step)) for factor in schedule.lr_lambdas):
                    raise ValueError(f"the learning rate of step {step} is not finite")
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ZofoError(
            f"lr_scheduler_type {kind} cannot be used with lr_scheduler_kwargs {kwargs} ({first_line(error)}): correct "
            "lr_scheduler_kwargs, or choose another lr_scheduler_type"
        ) from error


def require_optim_args(keys: Keys) -> None:
    """Refuses `optim_args` that the optimizer does not read: without them, it gets the same settings."""
    items = str(keys.optim_args).replace(" ", "").split(",")
    try:
        settings = settings_of_optimizer(keys)[1]
        idle = [item for item in items if _without(keys, items, item) == settings]
    except ImportError:
        return  # said with the name of the package when the optimizer is made
    except (ValueError, TypeError, AttributeError) as error:
        raise ZofoError(f"optim_args is {keys.optim_args!r} ({first_line(error)}): write name=value,...") from error
    if idle:
        raise ZofoError(
            f"optim_args {idle[0]} changes nothing of {name_of(keys.optim)}: leave it out; Adam has adam_beta1, "
            "adam_beta2 and adam_epsilon"
        )


def _without(keys: Keys, items: list[str], item: str) -> dict[str, Any]:
    keys = copy.copy(keys)
    keys.optim_args = ",".join(other for other in items if other != item) or None
    return settings_of_optimizer(keys)[1]
