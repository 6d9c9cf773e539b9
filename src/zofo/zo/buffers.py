"""Memory for W + scale·z, used again and again; on a GPU, filled for several parameters at a time."""

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """Identifies the storage of a tensor: the same for all its views; a fake tensor has one as well."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class Buffer:
    """Scratch memory for `size` elements, and the views of it that have been asked for."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.size, self.kind = size, (like.dtype, like.device)
        self.kept = False  # whether a result may still need it: it is then never written again
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            self._memory = torch.empty(self.size, dtype=like.dtype, device=like.device)
        self.storage = storage_of(self._memory)
        self._views: dict[tuple[torch.Size, int], Tensor] = {}

    def shaped(self, shape: torch.Size, start: int = 0) -> Tensor:
        """Its elements from `start` on in that shape: the same view every time, since making one is slow."""
        if (shape, start) not in self._views:
            with torch.inference_mode(False), torch.enable_grad():
                self._views[shape, start] = self._memory[start : start + shape.numel()].view(shape)
        return self._views[shape, start]


class Scratch:
    """Buffers for W + scale·z, used again by every parameter of the same dtype and device.

    They hold about as much as the largest copy. One `Scratch` for many `perturbed` blocks saves allocating and clearing
    the same memory in each.
    """

    def __init__(self) -> None:
        self.order: dict[int, int] = {}  # for `Ahead`: the id of a parameter -> that of the one read after it
        self.skipped: set[int] = set()  # for `Ahead`: parameters that were copied ahead and then not read
        self._free: list[Buffer] = []  # the smallest first

    def take(self, like: Tensor, size: int = 0) -> Buffer:
        """An uninitialised buffer of at least `size` elements, or as many as the tensor has."""
        size, kind = size or like.numel(), (like.dtype, like.device)
        for index, buffer in enumerate(self._free):
            if buffer.size >= size and buffer.kind == kind:
                return self._free.pop(index)
        self._free.clear()
        return Buffer(like, size)

    def forget(self) -> None:
        """Frees the memory, and keeps what is known of the order."""
        self._free.clear()

    def give_back(self, buffer: Buffer) -> None:
        """The buffer may be overwritten from now on."""
        insort(self._free, buffer, key=lambda buffer: buffer.size)


Kind = tuple[torch.dtype, torch.device]
Write = Callable[[Sequence[tuple[Tensor, Tensor]]], None]
"""Writes W + scale·z of each parameter to the copy beside it."""

_ALIGNMENT = 128  # elements: every copy begins at a multiple, so that all can be written in wide strides


@dataclass
class Ahead:
    """Copies of parameters, made before they are read, in memory as large as the largest parameter."""

    scratch: Scratch  # also remembers the order of the reads from one block to the next
    targets: Mapping[int, Tensor]  # the parameters that may be perturbed, by id
    copies: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # by the id of the parameter
    unread: set[int] = field(default_factory=set[int])  # the parameters among them that were not read yet
    _groups: dict[Kind, tuple[Buffer, list[int]]] = field(default_factory=dict[Kind, tuple[Buffer, list[int]]])
    _last: dict[Kind, int] = field(default_factory=dict[Kind, int])
    _largest: dict[Kind, int] = field(default_factory=dict[Kind, int])

    def copy(self, parameter: Tensor, alone: bool, write: Write) -> tuple[Buffer, Tensor] | None:
        """The buffer and the copy of a parameter, or None where other copies in use (not `alone`) leave no memory.

        `write` is no attribute: its owner holds this object, and a cycle keeps memory until the garbage collector runs.
        """
        kind, key = (parameter.dtype, parameter.device), id(parameter)
        if key not in self.copies:
            if kind in self._last:
                self.scratch.order[self._last[kind]] = key
            self._last[kind] = key
            if not alone:
                return None
            self._begin(parameter, kind, write)
        self.unread.discard(key)
        return self._groups[kind][0], self.copies[key]

    def holds(self, buffer: Buffer) -> bool:
        """Whether a buffer has copies that may still be asked for."""
        return any(held is buffer for held, _ in self._groups.values())

    def end(self) -> None:
        """Gives all memory back: what is added to the parameters changes."""
        for kind in list(self._groups):
            self._end(kind)
        self._last.clear()
        self._largest.clear()

    def _end(self, kind: Kind) -> None:
        buffer, keys = self._groups.pop(kind)
        for key in keys:
            del self.copies[key]
        self.unread.difference_update(keys)
        if not buffer.kept:
            self.scratch.give_back(buffer)

    def _begin(self, first: Tensor, kind: Kind, write: Write) -> None:
        """Copies a parameter and those that are read after it, as many as the memory holds."""
        if kind in self._groups:
            self.scratch.skipped |= self.unread.intersection(self._groups[kind][1])
            self._end(kind)
        if kind not in self._largest:
            self._largest[kind] = max(_aligned(p) for p in self.targets.values() if (p.dtype, p.device) == kind)
        buffer = self.scratch.take(first, self._largest[kind])
        copies: dict[int, Tensor] = {}
        key, end = id(first), 0
        while key in self.targets and key not in copies:
            parameter = self.targets[key]
            start, end = end, end + _aligned(parameter)
            if end > self._largest[kind] or (parameter.dtype, parameter.device) != kind:
                break
            if copies and key in self.scratch.skipped:
                break
            copies[key] = buffer.shaped(parameter.shape, start)
            key = self.scratch.order.get(key, 0)
        write([(self.targets[key], copy) for key, copy in copies.items()])
        self._groups[kind] = buffer, list(copies)
        self.copies |= copies
        self.unread |= copies.keys()
        self._last[kind] = list(copies)[-1]


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
