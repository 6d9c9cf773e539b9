"""The optimizer of a first-order level: that of the key `optim`, as transformers makes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from zofo.errors import ZofoError, first_line
from zofo.keys import Keys, name_of


def require_optimizer(keys: Keys) -> None:
    """Refuses, before any work, an `optim` that is not there, needs another kind of model, or keeps weights."""
    name = name_of(keys.optim)
    if name.startswith("schedule_free"):
        raise ZofoError(f"optim {name} keeps weights of its own for training, which zofo does not: take adamw_torch")
    try:
        first_order_optimizer([torch.zeros(1, requires_grad=True)], keys.learning_rate, keys)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ZofoError(f"optim {name} cannot be used ({first_line(error)}): take adamw_torch, say") from error


def settings_of_optimizer(keys: Keys) -> tuple[Any, dict[str, Any]]:
    """The class of the first-order optimizer, and what it is made with."""
    made: Any = Trainer.get_optimizer_cls_and_kwargs(keys)
    return made


def first_order_optimizer(parameters: Sequence[Tensor], learning_rate: float, keys: Keys) -> Optimizer:
    """`optim` as the trainer would make it; biases and norms are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": keys.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind, settings = settings_of_optimizer(keys)
    return _reading_as_stored(kind([group for group in groups if group["params"]], **{**settings, "lr": learning_rate}))


def _reading_as_stored(optimizer: Optimizer) -> Optimizer:
    """It, with states that it reads in the dtypes of the file: torch rounds them to those of the weights."""
    stored: list[dict[str, Any]] = []

    def restore(own: Optimizer) -> None:
        content = stored.pop()
        ids = [number for group in content["param_groups"] for number in group["params"]]
        parameters = [parameter for group in own.param_groups for parameter in group["params"]]
        for number, parameter in zip(ids, parameters, strict=True):
            state = own.state.get(parameter, {})
            for key, value in content["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != state[key].dtype:
                    state[key] = value.to(state[key].device, copy=True)

    optimizer.register_load_state_dict_pre_hook(lambda own, content: stored.append(content))
    optimizer.register_load_state_dict_post_hook(restore)
    return optimizer
