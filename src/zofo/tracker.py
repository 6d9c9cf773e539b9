"""What a computation keeps in memory, and when most: found by watching storages come and go."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
