"""The memory of a step: it runs on tensors that have shapes and no values, and storages are counted."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.methods.first_order_optimizers import first_order_optimizer
from zofo.methods.method import Method
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.load import load_hollow, replace_tensors
from zofo.scoring.batch import Batch
from zofo.scoring.scorer import Scorer, Tokens
from zofo.zo.optimizers import JointOptimizer, ZerothOrderOptimizer

OTHER = "activations"
_PROBE = 256  # rows and columns of a matrix for which an optimizer makes its states


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


@dataclass
class Memory:
    """Bytes at the peak of a step.

    Weights include the backbone's buffers; activations are all else that is alive; libraries are Python with what it
    has loaded; the allocator's are what malloc keeps between freed tensors.
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
        return sum(vars(self).values())


def fake(config: ZOFOConfig) -> AdaptedModel:
    """The model of a run, with fake tensors for weights."""
    assert config.model is not None
    base = load_hollow(config.model, config.dtype)
    adapted = AdaptedModel(base, adapter_config(config.adapter, base, config.lora), config.method_class.adapters)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = replace_tensors(
            adapted.model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=config.device)
        )
    adapted.backbone = {name: fakes[id(parameter)] for name, parameter in adapted.backbone.items()}
    adapted.movable = {name: adapted.backbone[name] for name in adapted.movable}
    return adapted


def step_memory(config: ZOFOConfig, adapted: AdaptedModel, longest: Batch) -> Memory:
    """The peak of a step of the run's method on a model that `fake` made, but for libraries and allocator."""
    tracker = MemoryTracker()
    adapters = {id(p): p for name in adapted.adapters for p in adapted.adapter_parameters(name).values()}
    held = {id(t): t for t in [*adapted.model.parameters(), *adapted.model.buffers()]}
    tracker.mark("weights", [t for key, t in held.items() if key not in adapters])
    tracker.mark("adapters", adapters.values())
    enable_activation_checkpointing(config, adapted)
    # more of these take time and no memory; a limit would be found by sorting values that are not there
    steps = min((config.lower_pool or 0) + 1, config.lower_steps)  # a pool keeps hidden states from the second round on
    few: dict[str, Any] = {"lower_steps": steps, "zo_sparsity": 0.0}
    if config.zo_distribution != "low_rank" and config.shaping == "none":  # which compares several
        few["num_perturbations"] = 1
    keys = config.variant(config.method, config.adapter, **few)
    method = keys.method_class(adapted, Scorer(adapted, Tokens()), keys)
    bundle = {name: [longest] * stream.batches for name, stream in method.streams(keys).items()}
    micro = [bundle] * min(2, config.gradient_accumulation_steps)
    _mark_in_steps(method.optimizer, tracker)
    try:
        with tracker:
            _make_states(method.optimizer)
            for stage in method.stages:
                method.step(0, stage, micro)
                method.optimizer.step()
                method.optimizer.zero_grad()
    except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ZofoError(
            f"a forward of this {adapted.base.config.model_type} model depends on the values of its weights "
            f"({error}), so its memory cannot be found without them: measure it with --max_steps 2"
        ) from error
    found = Memory(**tracker.at_peak())
    if method.adapter_levels and not config.shared_adapter and len(config.tasks) > 1 and config.device.type == "cpu":
        kept = 1 + len(config.tasks)  # those in the model, and a copy for each task; with a GPU they rest on the CPU
        found.adapters, found.optimizer = kept * found.adapters, kept * found.optimizer
    return found


def optimizer_states(method: Method, config: ZOFOConfig) -> int:
    """Bytes that a first-order optimizer will keep for the backbone; for an adapter they are next to nothing."""
    if method.adapted.adapters or not method.backpropagates:
        return 0
    probe = torch.zeros(_PROBE, _PROBE, dtype=next(iter(method.adapted.backbone.values())).dtype, requires_grad=True)
    optimizer = first_order_optimizer([probe], config.learning_rate, config)
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    states = [value for value in optimizer.state[probe].values() if torch.is_tensor(value)]
    weights = sum(p.numel() for p in method.adapted.backbone.values())
    return sum(state.nbytes for state in states if state.ndim) * weights // probe.numel()


def enable_activation_checkpointing(config: ZOFOConfig, adapted: AdaptedModel) -> None:
    """As `Trainer.train` does before its first step."""
    if config.activation_checkpointing:
        adapted.require_checkpointing()
        options = dict(cast(Any, config.activation_checkpointing_kwargs or {}))
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        adapted.base.activation_checkpointing_enable(options or None, **own)
        adapted.base.disable_input_require_grads()


def _members(optimizer: Optimizer) -> list[Optimizer]:
    return [*optimizer.members.values()] if isinstance(optimizer, JointOptimizer) else [optimizer]


def _make_states(optimizer: Optimizer) -> None:
    """A step of the first-order optimizers, which keep their states from the first one on."""
    for member in _members(optimizer):
        if not isinstance(member, ZerothOrderOptimizer):
            for parameter in (p for group in member.param_groups for p in group["params"]):
                parameter.grad = torch.empty_like(parameter)
                member.step()
                parameter.grad = None  # one at a time: all together they could be more than a step ever holds


def _mark_in_steps(optimizer: Optimizer, tracker: MemoryTracker) -> None:
    """Whenever an optimizer steps, its gradients and states are booked as such."""

    def gradients(member: Optimizer, *_: Any) -> None:
        parameters = [p for group in member.param_groups for p in group["params"]]
        tracker.mark("gradients", [p.grad for p in parameters if p.grad is not None])

    def states(member: Optimizer, *_: Any) -> None:
        values = [value for state in member.state.values() for value in state.values()]
        tracker.mark("optimizer", filter(torch.is_tensor, values))

    for member in _members(optimizer):
        member.register_step_pre_hook(gradients)
        member.register_step_post_hook(states)
