"""What a run costs in forward equivalents: forwards of one row through the whole model."""

from functools import lru_cache

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_hollow
from zofo.models.peft import UPPER, adapter_config
from zofo.models.selection import layers_of


def iteration_cost(config: ZOFOConfig) -> float:
    """Forward equivalents of one iteration: rows (b (1 + c) + f).

    There are b forwards with a backward and f forwards alone, as the method says; c is what a backward counts: the
    part of the blocks that it runs through, twice where their weights get gradients, and once more where activations
    are computed again.

    Examples:
        >>> keys = {"output_dir": "run", "use_cpu": True, "adapter": "none"}
        >>> iteration_cost(ZOFOConfig(method="zo", zo_learning_rate=1e-6, **keys))
        16.0
        >>> iteration_cost(ZOFOConfig(method="fo", **keys))
        24.0
    """
    work = config.method_class.work(config)
    return config.per_device_train_batch_size * (work.backwards * (1 + _backward_cost(config)) + work.forwards)


def steps_within(config: ZOFOConfig, forward_equivalents: float) -> int:
    """Iterations that a budget pays for, which must be one at least."""
    each = iteration_cost(config)
    if each > forward_equivalents:
        raise ZofoError(
            f"one iteration of method {config.method} takes {each:,.0f} forward equivalents, but the budget is "
            f"{forward_equivalents:,.0f}: raise it, or lower per_device_train_batch_size or lower_steps"
        )
    return int(forward_equivalents / each)


def _backward_cost(config: ZOFOConfig) -> float:
    if not config.method_class.backpropagates:
        return 0.0
    again = 1.0 if config.activation_checkpointing else 0.0
    if config.adapter == "none":
        return 2.0 + again
    return _part(str(config.model), config.dtype, config.adapter, config.adapter_layers) * (1.0 + again)


@lru_cache
def _part(model: str, dtype: str, adapter: str, layers: str | None) -> float:
    """The part of the blocks from the lowest one with an adapter on; all, if the adapter is not in the blocks."""
    base = load_hollow(model, dtype)  # pyright: ignore[reportArgumentType]
    adapted = AdaptedModel(base, adapter_config(adapter, base, layers), (UPPER,))
    blocks = max(layers_of(adapted.backbone).values(), default=-1) + 1
    names = adapted.adapter_parameters(UPPER)
    inside = layers_of(names)
    if not blocks or len(inside) < len(names):
        return 1.0
    return (blocks - min(inside.values())) / blocks
