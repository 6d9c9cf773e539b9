"""Memory for W + scale·z, used again and again."""

from __future__ import annotations

from bisect import insort

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
