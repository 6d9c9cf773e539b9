"""Answer torch functions that read a parameter with W + scale·z.

It does not matter who reads a parameter or how: its own module, another one, a tied head, a view, a fused operation.
Within a block the parameters are of a class that torch asks before it reads them (`__torch_function__`); functions
that read none of them cost nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Distribution, Sum, Term
from zofo.zo.buffers import Ahead, Buffer, Scratch

PART = 1 << 20  # numbers of a large matrix that are moved, and then multiplied with, at a time

_ACTIVE: list[Reader] = []  # at most one: nested blocks share it

# Reads of these need no values. Whatever is missing here costs time, never correctness.
_PROPERTIES: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.layout, Tensor.is_cuda, Tensor.is_cpu,
    Tensor.is_meta, Tensor.requires_grad, Tensor.grad, Tensor.is_leaf, Tensor.grad_fn, Tensor.is_sparse,
    Tensor.is_quantized, Tensor.itemsize, Tensor.nbytes, Tensor.is_nested,
)  # fmt: skip
_METHODS: tuple[Any, ...] = (
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point,
    Tensor.element_size, Tensor.__len__, Tensor.__hash__, Tensor.is_complex, torch.is_floating_point, torch.numel,
    torch.is_complex,
)  # fmt: skip
_METADATA: frozenset[Any] = frozenset((*(p.__get__ for p in _PROPERTIES), *_METHODS))


# What only reads its arguments, none of them in a list, and returns new memory. Whatever is missing here costs time.
_FRESH: frozenset[Any] = frozenset(
    (functional.linear, functional.layer_norm, functional.rms_norm, torch.addmm, Tensor.mul, Tensor.__mul__,
     Tensor.__rmul__)
)  # fmt: skip

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset(["__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)])


@dataclass(eq=False)
class Block:
    """What one `perturbed` block adds to which tensor, and what has been read in it."""

    tensors: dict[int, Tensor]  # also keeps the ids alive
    names: dict[int, str]
    terms: dict[int, Term]
    distribution: Distribution
    limits: dict[int, float]
    seen: set[int] = field(default_factory=set)  # of what was read

    @staticmethod
    def of(
        parameters: Mapping[str, Tensor],
        direction: tuple[int, int, int],
        scale: float,
        distribution: Distribution,
        limits: Mapping[str, float],
    ) -> Block:
        return Block(
            tensors={id(p): p for p in parameters.values()},
            names={id(p): name for name, p in parameters.items()},
            terms={id(p): Term(noise.stream_key(*direction, name), scale) for name, p in parameters.items()},
            distribution=distribution,
            limits={id(p): limits[name] for name, p in parameters.items() if name in limits},
        )


class Noticed(TorchFunctionMode):
    """Whether any torch function was called: a block in which nothing happens need not read the parameters."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.anything = False
        self._names = block.names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.anything = True
        given = [self._names[id(value)] for value in (*args, *(kwargs or {}).values()) if id(value) in self._names]
        before = _ACTIVE[0].asked
        result = func(*args, **(kwargs or {}))
        if given and _ACTIVE[0].asked == before:  # data of torch.tensor, a number as alpha, what is set as .data
            raise ZofoError(
                f"{func.__name__} reads {given[0]} without asking for θ + scale·z: give it {given[0]}.clone() in the "
                "model's code, or leave this parameter out, in a config by zo_exclude"
            )
        return result


class _Watched:
    """Mixed into the class of a parameter for the time of a block: torch then asks before it reads it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] torch's documented way
            if _ACTIVE and _ACTIVE[0].thread == threading.get_ident():
                return _ACTIVE[0].call(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))


@lru_cache
def _watched(kind: type[Tensor]) -> type[Tensor]:
    return type(kind)(kind.__name__, (_Watched, kind), {})


def _plain(kind: type[Tensor]) -> type[Tensor]:
    """The class without `_Watched`, which Ctrl-C at the very end of a block may have left."""
    return kind.__bases__[1] if issubclass(kind, _Watched) else kind


class Reader:
    """Replaces the parameters in the arguments of the torch functions that read them."""

    def __init__(self, scratch: Scratch) -> None:
        self.thread = threading.get_ident()
        self.asked = 0  # how often a function asked
        self._scratch = scratch
        self._blocks: list[Block] = []  # the outer one first
        self._targets: dict[int, Tensor] = {}
        self._ahead = Ahead(scratch, {})

    @contextmanager
    def joined_by(self, block: Block) -> Generator[None]:
        if any((other.distribution, other.limits) != (block.distribution, block.limits) for other in self._blocks):
            raise ZofoError("nested perturbed blocks must share one distribution and the same limits")
        before = self._targets
        classes = {number: _plain(type(p)) for number, p in block.tensors.items() if number not in before}
        self._ahead.end()
        self._blocks.append(block)
        self._targets = self._ahead.targets = before | block.tensors
        try:
            for number, kind in classes.items():
                block.tensors[number].__class__ = _watched(kind)
            yield
        finally:
            for number, kind in classes.items():
                block.tensors[number].__class__ = kind
            self._ahead.end()
            self._blocks.remove(block)
            self._targets = self._ahead.targets = before

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function returns that gets a parameter, were it W + scale·z."""
        self.asked += 1
        if func in _METADATA:
            return func(*args, **kwargs)
        if func in _FRESH and not kwargs and (found := self._ready(func, args)) is not None:
            return found
        if func is functional.embedding and (found := self._looked_up(*args, **kwargs)) is not None:
            return found
        if func is functional.linear and (found := self._multiplied(*args, **kwargs)) is not None:
            return found
        if func is Tensor.__getitem__ and (found := self._item(*args)) is not None:
            return found
        self._refuse(func, args, kwargs)
        found = self._targets_in(args) | (self._targets_in(kwargs.values()) if kwargs else {})
        # the largest first: a small one must not occupy the buffer that fits a large one
        order = sorted(found, key=lambda number: -found[number].numel()) if len(found) > 1 else found
        copies: dict[int, tuple[Buffer, Tensor]] = {}
        for number in order:
            copies[number] = self._perturbed_copy(found[number], alone=not copies)
        result = func(*_replaced(args, copies), **(_replaced(kwargs, copies) if kwargs else {}))
        for buffer, _ in copies.values():
            if _may_keep(result, buffer.address):
                self._ahead.keep(buffer)
            elif not self._ahead.holds(buffer):
                self._scratch.give_back(buffer)
        return result

    def _ready(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What it returns, by the shortest way, where all copies have been made ahead; else None."""
        copies = self._ahead.copies
        if not copies or torch.is_grad_enabled():  # a gradient would need the copy when it is another weight's
            return None
        given: list[Any] = []
        for value in args:
            number = id(value)
            if number in self._targets:
                if number not in copies:
                    return None
                self._ahead.unread.discard(number)
                for block in self._blocks:
                    block.seen.add(number)
                value = copies[number]
            given.append(value)
        return func(*given)

    def _targets_in(self, values: Iterable[Any]) -> dict[int, Tensor]:
        """The parameters among values, and in lists and dicts among them."""
        found: dict[int, Tensor] = {}
        for value in values:
            if id(value) in self._targets:
                found[id(value)] = value
            elif isinstance(value, (list, tuple)):
                found |= self._targets_in(value)  # pyright: ignore[reportUnknownArgumentType]
            elif isinstance(value, dict):
                found |= self._targets_in(value.values())  # pyright: ignore[reportUnknownArgumentType]
        return found

    def _perturbed_copy(self, parameter: Tensor, alone: bool) -> tuple[Buffer, Tensor]:
        """(the buffer, its view as W + scale·z); `alone` if no other copy is in use."""
        self._see(parameter)
        if _is_launched(parameter) and (made := self._ahead.copy(parameter, alone, self._write)):
            return made
        buffer = self._scratch.take(parameter)
        copy = buffer.shaped(parameter.shape)
        self._write([(parameter, copy)])
        return buffer, copy

    def _write(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """W + scale·z of each parameter to the copy beside it."""
        sums: list[Sum] = []
        for parameter, copy in copies:
            terms, limit = self._added(parameter)
            sums.append(Sum(parameter, copy, terms, limit=limit))
        noise.write_sums(sums, self._blocks[0].distribution)

    def _see(self, parameter: Tensor) -> None:
        for block in self._blocks:
            block.seen.add(id(parameter))

    def _added(self, parameter: Tensor) -> tuple[list[Term], float]:
        """What is added to a parameter, and up to which magnitude."""
        blocks = [block for block in self._blocks if id(parameter) in block.terms]
        return [block.terms[id(parameter)] for block in blocks], blocks[0].limits.get(id(parameter), math.inf)

    def _read(self, parameter: Tensor) -> tuple[list[Term], Distribution, float]:
        """What is added to a parameter that is about to be read."""
        self._see(parameter)
        terms, limit = self._added(parameter)
        return terms, self._blocks[0].distribution, limit

    def _looked_up(self, input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor | None:
        """The rows of an embedding that are asked for, or None where the whole of it must be moved to tell."""
        normed = options.get("max_norm") is not None or any(rest[1:2])
        known = input.dtype in (torch.int32, torch.int64)
        if id(weight) not in self._targets or normed or not known or not weight.is_cpu:
            return None
        numbers = input.reshape(-1).long().contiguous()
        if not len(numbers) or int(numbers.min()) < 0 or int(numbers.max()) >= len(weight):
            return None  # torch says what is wrong with them
        rows = weight.new_empty(len(numbers), weight.shape[1])
        terms, distribution, limit = self._read(weight)
        if not noise.write_rows(weight.detach(), numbers, terms, rows, distribution, limit):
            return None
        return rows.view(*input.shape, weight.shape[1])

    def _multiplied(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The product with a large matrix, by parts of its rows: a part is multiplied while it is in the caches.

        None where the matrix is small, or must be moved as a whole.
        """
        if id(weight) not in self._targets or weight.numel() <= PART or not weight.is_cpu or torch.is_grad_enabled():
            return None
        if id(input) in self._targets or weight.ndim != 2 or not weight.is_contiguous():
            return None
        if input.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
            return None  # torch says what is wrong with them
        terms, distribution, limit = self._read(weight)
        rows = math.ceil(len(weight) / math.ceil(weight.numel() / PART))
        parts = weight.detach().split(rows)
        buffers, low, product = [self._scratch.take(parts[0])], 0, None
        if bias is not None and id(bias) in self._targets:
            buffer, bias = self._perturbed_copy(bias, alone=False)
            buffers.append(buffer)
        for part in parts:
            high, copy = low + len(part), buffers[0].shaped(part.shape)
            noise.write_sum(part, terms, copy, low * weight.shape[1], distribution, limit)
            columns = functional.linear(input, copy, None if bias is None else bias[low:high])
            product = columns.new_empty(*columns.shape[:-1], len(weight)) if product is None else product
            product[..., low:high] = columns
            low = high
        for buffer in buffers:
            self._scratch.give_back(buffer)
        return product

    def _item(self, tensor: Tensor, index: Any) -> Tensor | None:
        """One item of a parameter, as one of many experts, or None where the whole of it must be moved to tell."""
        integer = isinstance(index, Tensor) and not index.ndim and index.dtype in (torch.int32, torch.int64)
        number = int(index) if integer else index
        if id(tensor) not in self._targets or type(number) is not int or tensor.ndim < 2 or not tensor.is_contiguous():
            return None
        if not -len(tensor) <= number < len(tensor):
            return None  # torch says what is wrong with it
        number %= len(tensor)
        item = tensor.detach()[number]
        terms, distribution, limit = self._read(tensor)
        moved = torch.empty_like(item)
        noise.write_sum(item, terms, moved, number * item.numel(), distribution, limit)
        return moved

    def _refuse(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises for what cannot be answered with a copy: a write, or the address of the weights."""
        if func is Tensor.data_ptr:
            raise ZofoError(
                f"{self._name_of(args[0])} is read through its address, as by a custom kernel, where θ + scale·z "
                "cannot be handed out: use the model's plain torch implementation"
            )
        places = (args[:1], *map(kwargs.get, ("input", "self", "tensor"))) if _in_place(func) else ()
        if not places and "out" not in kwargs:
            return
        for target in self._targets_in((*places, kwargs.get("out"))).values():
            what = f"{func.__name__} writes {self._name_of(target)}"
            raise ZofoError(f"{what} inside a perturbed block, where θ is read-only: do it after it")

    def _name_of(self, target: Tensor) -> str:
        return next(block.names[id(target)] for block in self._blocks if id(target) in block.names)


@contextmanager
def reader(scratch: Scratch | None) -> Generator[Reader]:
    """The one reader of the block that is open, or a new one."""
    if _ACTIVE:
        yield _ACTIVE[0]
        return
    reader = Reader(scratch or Scratch())
    _ACTIVE.append(reader)
    try:
        yield reader
    finally:
        _ACTIVE.clear()


def _is_launched(parameter: Tensor) -> bool:
    """Whether moving it costs a launch; with gradients, all copies are kept, and none should be made too early."""
    return not parameter.is_cpu and not torch.is_grad_enabled()


@lru_cache
def _in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _replaced(value: Any, copies: Mapping[int, tuple[Buffer, Tensor]]) -> Any:
    if id(value) in copies:
        return copies[id(value)][1]
    if isinstance(value, (list, tuple)):
        items: list[Any] = [_replaced(item, copies) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _replaced(item, copies) for key, item in value.items()}
    return value


def _may_keep(result: Any, pointer: int) -> bool:
    """Whether what a function returned may still need the buffer at `pointer`."""
    if isinstance(result, Tensor):
        return result.requires_grad or result.untyped_storage().data_ptr() == pointer
    if isinstance(result, list | tuple):
        return any(_may_keep(item, pointer) for item in result)  # pyright: ignore[reportUnknownVariableType]
    return not (result is None or isinstance(result, bool | int | float | str | torch.Size | torch.dtype))
