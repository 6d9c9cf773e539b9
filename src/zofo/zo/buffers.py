"""Memory for W + scale·z, used again and again; on a GPU, filled for several parameters at a time."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Buffer:
    """Scratch memory for `size` elements, and the views of it that have been asked for."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.size, self.kind = size, (like.dtype, like.device)
        with torch.inference_mode(False):  # what is made in inference mode could not be written outside of it
            self._memory = torch.empty(self.size, dtype=like.dtype, device=like.device)
        self.address = self._memory.data_ptr()
        self._views: dict[tuple[torch.Size, int], Tensor] = {}

    def shaped(self, shape: torch.Size, start: int = 0) -> Tensor:
        """Its elements from `start` on in that shape: the same view every time, as making one takes its time."""
        if (shape, start) not in self._views:
            with torch.inference_mode(False), torch.enable_grad():
                self._views[shape, start] = self._memory[start : start + shape.numel()].view(shape)
        return self._views[shape, start]


class Scratch:
    """Buffers for W + scale·z, used again by every parameter of the same dtype and device.

    At any time they hold about as much as the largest copy that was made. One `Scratch` may serve many
    `perturbed` blocks one after the other, which saves the system from handing out and clearing the same
    memory in each.
    """

    def __init__(self) -> None:
        self.order: dict[int, int] = {}  # `ahead.py`: the id of a parameter -> that of the one which is read after it
        self.skipped: set[int] = set()  # those that were then not read
        self._free: list[Buffer] = []

    def take(self, like: Tensor, size: int = 0) -> Buffer:
        """An uninitialised buffer of at least `size` elements, or as many as the tensor has."""
        size, kind = size or like.numel(), (like.dtype, like.device)
        for place, buffer in enumerate(self._free):  # the smallest first
            if buffer.size >= size and buffer.kind == kind:
                return self._free.pop(place)
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
"""Writes what each parameter is at the perturbed point to the copy beside it."""

_STEP = 128  # elements: every copy begins at a multiple, so that all can be written in wide strides


@dataclass
class _Group:
    buffer: Buffer
    numbers: list[int]  # the ids of the parameters
    kept: bool = False  # somebody may still need the buffer: it is not used again


@dataclass
class Ahead:
    """Copies of parameters, made before they are asked for, in memory as large as the largest parameter.

    Args:
        scratch: gives the memory, and remembers the order of the reads from one block to the next.
        targets: the parameters that may be moved, by id.

    Attributes:
        copies: those that are made, by the id of the parameter.
        unread: the parameters among them that were not read yet.
    """

    scratch: Scratch
    targets: Mapping[int, Tensor]
    copies: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    unread: set[int] = field(default_factory=set[int])
    _groups: dict[Kind, _Group] = field(default_factory=dict[Kind, _Group])
    _last: dict[Kind, int] = field(default_factory=dict[Kind, int])
    _most: dict[Kind, int] = field(default_factory=dict[Kind, int])

    def copy(self, parameter: Tensor, alone: bool, write: Write) -> tuple[Buffer, Tensor] | None:
        """The buffer and the copy of a parameter, or None where a copy that is in use leaves no memory for it.

        Args:
            parameter: that is read now.
            alone: whether no copy is in use.
            write: makes copies. It is not kept: whoever makes them keeps this object, and memory that two objects
                keep for each other is only freed when Python looks for such pairs.
        """
        kind, number = (parameter.dtype, parameter.device), id(parameter)
        if number not in self.copies:
            if kind in self._last:
                self.scratch.order[self._last[kind]] = number
            self._last[kind] = number
            if not alone:
                return None
            self._begin(parameter, kind, write)
        self.unread.discard(number)
        return self._groups[kind].buffer, self.copies[number]

    def holds(self, buffer: Buffer) -> bool:
        """Whether a buffer has copies that may still be asked for."""
        return any(group.buffer is buffer for group in self._groups.values())

    def keep(self, buffer: Buffer) -> None:
        """Never writes to a buffer again."""
        for group in self._groups.values():
            group.kept |= group.buffer is buffer

    def end(self) -> None:
        """Gives all memory back: what is added to the parameters changes."""
        for kind in list(self._groups):
            self._end(kind)
        self._last.clear()
        self._most.clear()

    def _end(self, kind: Kind) -> None:
        group = self._groups.pop(kind)
        for number in group.numbers:
            del self.copies[number]
        self.unread.difference_update(group.numbers)
        if not group.kept:
            self.scratch.give_back(group.buffer)

    def _chain(self, parameter: Tensor, kind: Kind) -> dict[int, Tensor]:
        """The parameter and those that are read after it, as many as the memory holds."""
        chain: dict[int, Tensor] = {}
        number, size = id(parameter), 0
        while number in self.targets and number not in chain:
            following = self.targets[number]
            size += _rounded_up(following)
            if size > self._largest(kind) or (following.dtype, following.device) != kind:
                break
            if chain and number in self.scratch.skipped:
                break
            chain[number] = following
            number = self.scratch.order.get(number, 0)
        return chain

    def _largest(self, kind: Kind) -> int:
        if kind not in self._most:
            sizes = [_rounded_up(p) for p in self.targets.values() if (p.dtype, p.device) == kind]
            self._most[kind] = max(sizes)
        return self._most[kind]

    def _begin(self, first: Tensor, kind: Kind, write: Write) -> None:
        if kind in self._groups:
            self.scratch.skipped |= self.unread.intersection(self._groups[kind].numbers)
            self._end(kind)
        chain = self._chain(first, kind)
        buffer, start = self.scratch.take(first, self._largest(kind)), 0
        copies: dict[int, Tensor] = {}
        for number, parameter in chain.items():
            copies[number] = buffer.shaped(parameter.shape, start)
            start += _rounded_up(parameter)
        write([(parameter, copies[number]) for number, parameter in chain.items()])
        self._groups[kind] = _Group(buffer, list(chain))
        self.copies |= copies
        self.unread |= copies.keys()
        self._last[kind] = list(chain)[-1]


def _rounded_up(parameter: Tensor) -> int:
    return -(-parameter.numel() // _STEP) * _STEP
