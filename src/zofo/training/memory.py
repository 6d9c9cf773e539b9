"""The memory of a step: it runs on tensors that have shapes and no values, and storages are counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.levels import FirstOrderLevel, mean_losses
from zofo.models.adapters import LOWER, UPPER, AdaptedModel, adapter_config
from zofo.models.load import load_hollow, replace_tensors
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer, Tokens
from zofo.zo.reads import PART

OTHER = "activations"


@dataclass
class _Block:
    """A storage: alive from the birth with its own number to the one with the number `last`."""

    size: int
    born: int
    kind: str = OTHER
    last: float = float("inf")
    watch: object = None  # the weak reference whose callback ends its life


class MemoryTracker(TorchDispatchMode):
    """Within the block, counts the bytes of all storages that torch's operators return, while something holds them.

    It works on real and on fake tensors (`FakeTensorMode`), which have shapes, strides and storages without memory.
    What an operator needs inside of itself is not seen. A fake number that Python asks for is answered with 1, so that
    losses are finite.

    Examples:
        >>> with MemoryTracker() as tracker:
        ...     a = torch.zeros(10, dtype=torch.float32)
        ...     b = (a + 1) * 2
        >>> tracker.peak  # a, a + 1 and b
        120
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._peak_at = 0
        self._blocks: list[_Block] = []
        self._live: dict[int, _Block] = {}

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Books the storages of living tensors under a name; those never seen were there before the block."""
        for tensor in tensors:
            self._see(tensor).kind = kind

    def at_peak(self) -> Counter[str]:
        """Bytes at the peak by name; `activations` are what was not marked."""
        sizes: Counter[str] = Counter()
        for block in self._blocks:
            if block.born <= self._peak_at <= block.last:
                sizes[block.kind] += block.size
        return sizes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the same as without this line, but most calls are of this kind
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        if id(storage) in self._live:
            return self._live[id(storage)]
        block = _Block(storage.nbytes(), len(self._blocks))
        block.watch = weakref.ref(storage, partial(self._end, id(storage)))
        self._blocks.append(block)
        self._live[id(storage)] = block
        self._total += block.size
        if self._total > self.peak:
            self.peak, self._peak_at = self._total, block.born
        return block

    def _end(self, key: int, reference: object) -> None:
        block = self._live.pop(key)
        block.last = len(self._blocks) - 1
        self._total -= block.size


# method -> the adapters that backpropagation trains, and whether there are forward passes at θ ± εz
LEVELS: dict[str, tuple[tuple[str, ...], bool]] = {
    "fo": ((UPPER,), False),
    "zo": ((), True),
    "two_stage": ((UPPER,), True),
    "bilevel": ((LOWER, UPPER), True),
}


@dataclass
class Memory:
    """Bytes at the peak of a step.

    Args:
        weights: of the backbone, with its buffers.
        adapters: of all of them.
        gradients: that are alive at that moment.
        optimizer: its states.
        activations: everything else that is alive.
        libraries: Python with all that it has loaded.
        allocator: what malloc keeps between freed tensors.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    libraries: int = 0
    allocator: int = 0

    @property
    def peak(self) -> int:
        """The sum."""
        return sum(vars(self).values())


def fake(config: ZOFOConfig, adapter: str, twins: bool) -> AdaptedModel:
    """The model of a run, with fake tensors for weights."""
    assert config.model is not None
    base = load_hollow(config.model, config.dtype)
    adapted = AdaptedModel(base, adapter_config(adapter, base), twins)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = replace_tensors(
            adapted.model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=config.device)
        )
    adapted.backbone = {name: made[id(parameter)] for name, parameter in adapted.backbone.items()}
    return adapted


def step_memory(config: ZOFOConfig, method: str, adapted: AdaptedModel, longest: Batch) -> Memory:
    """The peak of a step of a method, but for the libraries and the allocator.

    Args:
        config: of the run.
        method: one of `LEVELS`.
        adapted: what `fake` made.
        longest: the largest batch, of real tensors.

    Raises:
        ZofoError: if a forward of the model needs the values of its weights.
    """
    tracker = MemoryTracker()
    adapters = {id(p): p for name in adapted.adapters for p in adapted.adapter_parameters(name).values()}
    held = {id(t): t for t in [*adapted.model.parameters(), *adapted.model.buffers()]}
    tracker.mark("weights", [t for key, t in held.items() if key not in adapters])
    tracker.mark("adapters", adapters.values())
    checkpoint(config, adapted)
    try:
        with tracker:
            _two_steps(config, method, adapted, longest, tracker)
    except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ZofoError(
            f"a forward of this {adapted.base.config.model_type} model depends on the values of its weights "
            f"({error}), so its memory cannot be found without them: measure it with --max_steps 2"
        ) from error
    return Memory(**tracker.at_peak())


def checkpoint(config: ZOFOConfig, adapted: AdaptedModel) -> None:
    """What `Trainer.train` does before its first step."""
    if config.activation_checkpointing:
        adapted.require_checkpointing()
        options = dict(cast(Any, config.activation_checkpointing_kwargs or {}))
        adapted.base.activation_checkpointing_enable(every_n_layers=options.get("every_n_layers", 1))


def _two_steps(config: ZOFOConfig, method: str, adapted: AdaptedModel, batch: Batch, tracker: MemoryTracker) -> None:
    """What a step of the method keeps alive, twice: the second time the states of the optimizers are there as well."""
    scorer = Scorer(adapted, Tokens())
    first, zeroth = LEVELS[method]
    levels = {name: FirstOrderLevel(adapted, scorer, name, config.learning_rate, config) for name in first}
    moved = adapted.adapter_parameters(UPPER) if method == "zo" and adapted.adapters else adapted.backbone
    scratch: list[Tensor] = []
    near = {"the loss": (UPPER, [batch])}
    if method == "bilevel" and config.penalty > 0:
        near |= {"the coupled loss": (UPPER, [batch]), "the loss of s": (LOWER, [batch])}
    repeated = [batch] * min(2, config.gradient_accumulation_steps + (method == "bilevel"))

    def step(level: FirstOrderLevel) -> None:
        parameters = [p for group in level.optimizer.param_groups for p in group["params"]]
        tracker.mark("gradients", [p.grad for p in parameters if p.grad is not None])
        level.step()
        states = [value for state in level.optimizer.state.values() for value in state.values()]
        tracker.mark("optimizer", filter(torch.is_tensor, states))

    for _ in range(2):
        for name, level in levels.items():
            level.gradient(repeated, "the loss")
            if name == LOWER:
                step(level)
        if zeroth and not scratch:
            scratch.append(_largest_copy(adapted, moved.values()))
        if zeroth:
            mean_losses(scorer, near)
        if method == "bilevel":
            scratch.clear()
        if UPPER in levels:
            step(levels[UPPER])


def _largest_copy(adapted: AdaptedModel, moved: Iterable[Tensor]) -> Tensor:
    """The largest W + scale·z that a forward makes: on a CPU, few rows of what is multiplied with or looked up in."""
    modules = [module for module in adapted.model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    by_rows = {id(module.weight) for module in modules if module.weight.is_cpu}
    size, like = max(((min(p.numel(), PART) if id(p) in by_rows else p.numel(), p) for p in moved), key=itemgetter(0))
    return like.new_empty(size)
