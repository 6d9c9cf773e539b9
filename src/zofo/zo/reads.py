"""Answer torch functions that read a parameter with W + scale·z.

It does not matter who reads a parameter or how: its module, another one, a tied head, a view, a fused operation. In a
block, its class has a `__torch_function__`, which torch calls in place of each function that reads it; others are free.
"""

import math
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Distribution, Sum, Term, representable
from zofo.zo import low_rank
from zofo.zo.buffers import Ahead, Buffer, Scratch, storage_of
from zofo.zo.low_rank import Factors, Matrix
from zofo.zo.watch import ACTIVE, METADATA, in_place, plain_class, watched

PART = 1 << 20  # elements of a large matrix that are perturbed, and then multiplied with, at a time


# These only read their arguments, none of them in a list, and return new memory. Whatever is missing here costs time.
_FRESH: frozenset[Any] = frozenset((
    functional.linear, functional.layer_norm, functional.rms_norm, torch.addmm, Tensor.mul, Tensor.__mul__,
    Tensor.__rmul__,
))  # fmt: skip


class Block:
    """What one `perturbed` block adds to which parameters, and which were read in it; keys are ids of parameters."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        direction: tuple[int, int, int],
        scale: float,
        distribution: Distribution,
        limits: Mapping[str, float],
        rank: int = 0,
    ) -> None:
        self.tensors = {id(p): p for p in parameters.values()}  # also keeps the ids alive
        self.names = {id(p): name for name, p in parameters.items()}
        self.terms = {id(p): Term(noise.stream_key(*direction, name), scale) for name, p in parameters.items()}
        self.limits = {id(p): limits[name] for name, p in parameters.items() if name in limits}
        self.distribution: Distribution = distribution
        self.rank = rank
        self.seen = set[int]()
        self._point = direction, representable(scale, distribution)

    def factors(self, matrix: Tensor) -> Factors:
        """What it adds to one of its matrices, where directions have a low rank."""
        (seed, step, query), scale = self._point
        named = Matrix(matrix, self.names[id(matrix)], self.rank, self.distribution)
        return named.factors(seed, {(step, query): scale})


class Reader:
    """Replaces the parameters in the arguments of the torch functions that read them."""

    def __init__(self, scratch: Scratch) -> None:
        self.thread = threading.get_ident()
        self.asked = 0  # how many functions asked
        self._scratch = scratch
        self._blocks: list[Block] = []  # the outer one first
        self._targets: dict[int, Tensor] = {}
        self._ahead = Ahead(scratch, {})

    @contextmanager
    def joined_by(self, block: Block) -> Generator[None]:
        kinds = [(other.distribution, other.limits, other.rank) for other in (*self._blocks, block)]
        if any(kind != kinds[0] for kind in kinds):
            raise ZofoError("nested perturbed blocks must share one distribution and rank, and the same limits")
        outer = self._targets
        classes = {key: plain_class(type(p)) for key, p in block.tensors.items() if key not in outer}
        self._ahead.end()
        try:
            self._blocks.append(block)
            self._targets = self._ahead.targets = outer | block.tensors
            for key, plain in classes.items():
                block.tensors[key].__class__ = watched(plain)
            yield
        finally:
            for key, plain in classes.items():
                block.tensors[key].__class__ = plain
            self._ahead.end()
            self._blocks[:] = [other for other in self._blocks if other is not block]
            self._targets = self._ahead.targets = outer

    def holds(self, block: Block) -> bool:
        """Whether this block is open."""
        return block in self._blocks

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function returns, with W + scale·z in place of each parameter W in its arguments."""
        self.asked += 1
        if func in METADATA:
            return func(*args, **kwargs)
        if func in _FRESH and not kwargs and (result := self._ready(func, args)) is not None:
            return result
        if self._blocks[0].rank and (result := self._by_factors(func, args, kwargs)) is not None:
            return result
        if func is functional.embedding and (result := self._looked_up(*args, **kwargs)) is not None:
            return result
        if func is functional.linear and (result := self._multiplied(*args, **kwargs)) is not None:
            return result
        if func is Tensor.__getitem__ and (result := self._item(*args)) is not None:
            return result
        self._require_readable(func, args, kwargs)
        targets = self._targets_in(args) | (self._targets_in(kwargs.values()) if kwargs else {})
        # the largest first: a small one must not occupy the buffer that fits a large one
        order = sorted(targets, key=lambda key: -targets[key].numel()) if len(targets) > 1 else targets
        copies: dict[int, tuple[Buffer, Tensor]] = {}
        for key in order:
            copies[key] = self._perturbed_copy(targets[key], alone=not copies)
        result = func(*_replaced(args, copies), **(_replaced(kwargs, copies) if kwargs else {}))
        for buffer, _ in copies.values():
            if _may_keep(result, buffer.storage):
                buffer.kept = True
            elif not self._ahead.holds(buffer):
                self._scratch.give_back(buffer)
        return result

    def _ready(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The result by the shortest way, where all copies have been made ahead; else None."""
        copies = self._ahead.copies
        if not copies or torch.is_grad_enabled():  # autograd may need a copy after its buffer has been overwritten
            return None
        perturbed: list[Any] = []
        for value in args:
            key = id(value)
            if key in self._targets:
                if key not in copies:
                    return None
                self._ahead.unread.discard(key)
                self._see(value)
                value = copies[key]
            perturbed.append(value)
        return func(*perturbed)

    def _targets_in(self, values: Iterable[Any]) -> dict[int, Tensor]:
        """The parameters among values, and in lists and dicts among them."""
        targets: dict[int, Tensor] = {}
        for value in values:
            if id(value) in self._targets:
                targets[id(value)] = value
            elif isinstance(value, (list, tuple, dict)):
                items: Iterable[Any] = value.values() if isinstance(value, dict) else value
                targets |= self._targets_in(items)
        return targets

    def _perturbed_copy(self, parameter: Tensor, alone: bool) -> tuple[Buffer, Tensor]:
        """(the buffer, its view as W + scale·z); `alone` if no other copy is in use."""
        self._see(parameter)
        if _is_launched(parameter) and (ahead := self._ahead.copy(parameter, alone, self._write)):
            return ahead
        buffer = self._scratch.take(parameter)
        copy = buffer.shaped(parameter.shape)
        self._write([(parameter, copy)])
        return buffer, copy

    def _write(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        sums: list[Sum] = []
        for parameter, copy in copies:
            if self._is_factored(parameter):
                low_rank.write(parameter.detach(), copy, self._factors(parameter))
                continue
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

    def _is_factored(self, tensor: Tensor) -> bool:
        """Whether what is added to a tensor is a product of factors."""
        return self._blocks[0].rank > 0 and id(tensor) in self._targets and low_rank.is_matrix(tensor)

    def _factors(self, matrix: Tensor) -> Factors:
        return low_rank.joined([block.factors(matrix) for block in self._blocks if id(matrix) in block.terms])

    def _by_factors(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The product with a matrix, or its rows, without a copy of it; None where a copy must be made."""
        read = low_rank.read_of(func, args, kwargs)
        if read is None or not self._is_factored(read.weight) or id(read.x) in self._targets:
            return None
        self._see(read.weight)
        moves = id(read.bias) in self._targets
        result = read.plus(read.plain(None if moves else read.bias), self._factors(read.weight))
        return self.call(Tensor.add_, (result, read.bias), {}) if moves else result

    def _looked_up(self, input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor | None:
        """The rows of an embedding that are asked for, or None where all of it must be perturbed."""
        normed = options.get("max_norm") is not None or any(rest[1:2])
        integer = input.dtype in (torch.int32, torch.int64)
        if id(weight) not in self._targets or normed or not integer or not weight.is_cpu or self._is_factored(weight):
            return None
        ids = input.reshape(-1).long().contiguous()
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= len(weight):
            return None  # torch says what is wrong with them
        rows = weight.new_empty(len(ids), weight.shape[1])
        self._see(weight)
        terms, limit = self._added(weight)
        if not noise.write_rows(weight.detach(), ids, terms, rows, self._blocks[0].distribution, limit):
            return None
        return rows.view(*input.shape, weight.shape[1])

    def _multiplied(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """The product with a large matrix, by parts of its rows, each multiplied in the caches; None if it is small."""
        if id(weight) not in self._targets or weight.numel() <= PART or not weight.is_cpu or torch.is_grad_enabled():
            return None
        if id(input) in self._targets or weight.ndim != 2 or not weight.is_contiguous() or self._is_factored(weight):
            return None
        if input.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
            return None  # torch says what is wrong with them
        self._see(weight)
        terms, limit = self._added(weight)
        distribution = self._blocks[0].distribution
        parts = weight.detach().split(math.ceil(len(weight) / math.ceil(weight.numel() / PART)))
        buffers, low, product = [self._scratch.take(parts[0])], 0, None
        if bias is not None and id(bias) in self._targets:
            buffer, bias = self._perturbed_copy(bias, alone=False)
            buffers.append(buffer)
        for part in parts:
            high, copy = low + len(part), buffers[0].shaped(part.shape)
            noise.write_sums([Sum(part, copy, terms, low * weight.shape[1], limit=limit)], distribution)
            columns = functional.linear(input, copy, None if bias is None else bias[low:high])
            product = columns.new_empty(*columns.shape[:-1], len(weight)) if product is None else product
            product[..., low:high] = columns
            low = high
        for buffer in buffers:
            self._scratch.give_back(buffer)
        return product

    def _item(self, tensor: Tensor, index: Any) -> Tensor | None:
        """One item of a parameter, as one of many experts, or None where all of it must be perturbed."""
        if isinstance(index, Tensor) and not index.ndim and index.dtype in (torch.int32, torch.int64):
            index = int(index)
        if id(tensor) not in self._targets or type(index) is not int or tensor.ndim < 2 or not tensor.is_contiguous():
            return None
        if not -len(tensor) <= index < len(tensor) or self._is_factored(tensor):
            return None  # torch says what is wrong with an index outside
        index %= len(tensor)
        item = tensor.detach()[index]
        self._see(tensor)
        terms, limit = self._added(tensor)
        copy = torch.empty_like(item)
        noise.write_sums([Sum(item, copy, terms, index * item.numel(), limit=limit)], self._blocks[0].distribution)
        return copy

    def _require_readable(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises for what cannot be answered with a copy: a write, or the address of the weights."""
        if func is Tensor.data_ptr:
            raise ZofoError(
                f"{self._name_of(args[0])} is read through its address, as by a custom kernel, where θ + scale·z "
                "cannot be handed out: use the model's plain torch implementation"
            )
        written = (args[:1], *map(kwargs.get, ("input", "self", "tensor"))) if in_place(func) else ()
        if not written and "out" not in kwargs:
            return
        for target in self._targets_in((*written, kwargs.get("out"))).values():
            what = f"{func.__name__} writes {self._name_of(target)}"
            raise ZofoError(f"{what} inside a perturbed block, where θ is read-only: do it after it")

    def _name_of(self, target: Tensor) -> str:
        return next(block.names[id(target)] for block in self._blocks if id(target) in block.names)


@contextmanager
def reader(scratch: Scratch | None) -> Generator[Reader]:
    """The reader of the block that is open, or a new one."""
    if ACTIVE:
        if not isinstance(ACTIVE[0], Reader):
            raise ZofoError("a perturbed block cannot be opened inside a population")
        yield ACTIVE[0]
        return
    try:
        made = Reader(scratch or Scratch())
        ACTIVE.append(made)
        yield made
    finally:
        ACTIVE.clear()


def _is_launched(parameter: Tensor) -> bool:
    """Whether a copy costs a launch; with gradients, all copies are kept, and none should be made too early."""
    return not parameter.is_cpu and not torch.is_grad_enabled()


def _replaced(value: Any, copies: Mapping[int, tuple[Buffer, Tensor]]) -> Any:
    if id(value) in copies:
        return copies[id(value)][1]
    if isinstance(value, (list, tuple)):
        items: list[Any] = [_replaced(item, copies) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _replaced(item, copies) for key, item in value.items()}
    return value


def _may_keep(result: Any, storage: int) -> bool:
    """Whether what a function returned may still need the buffer of that storage."""
    if isinstance(result, Tensor):
        return result.requires_grad or storage_of(result) == storage
    if isinstance(result, list | tuple):
        return any(_may_keep(item, storage) for item in result)  # pyright: ignore[reportUnknownVariableType]
    return not (result is None or isinstance(result, bool | int | float | str | torch.Size | torch.dtype))
