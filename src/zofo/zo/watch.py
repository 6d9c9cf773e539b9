"""Who is asked when a torch function reads a parameter: in a block, the parameter's class hands the call over."""

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofo.errors import ZofoError


class Answers(Protocol):
    """What answers the torch functions that read parameters, while a block is open."""

    thread: int
    asked: int  # how many functions asked

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function returns."""
        ...

    def holds(self, block: Any) -> bool:
        """Whether this block is open."""
        ...


ACTIVE: list[Answers] = []  # at most one: nested blocks share it

# Reads of these need no values. Whatever is missing here costs time, never correctness.
_PROPERTIES: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.layout, Tensor.is_cuda, Tensor.is_cpu,
    Tensor.is_meta, Tensor.requires_grad, Tensor.grad, Tensor.is_leaf, Tensor.grad_fn, Tensor.is_sparse,
    Tensor.is_quantized, Tensor.itemsize, Tensor.nbytes, Tensor.is_nested,
)  # fmt: skip
METADATA: frozenset[Any] = frozenset((
    *(p.__get__ for p in _PROPERTIES), Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.element_size, Tensor.__len__, Tensor.__hash__, Tensor.is_complex,
    torch.is_floating_point, torch.numel, torch.is_complex,
))  # fmt: skip

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset(["__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)])


class Noticed(TorchFunctionMode):
    """Whether any torch function was called: a block in which none was need not read the parameters."""

    def __init__(self, block: Any, names: Mapping[int, str]) -> None:
        super().__init__()
        self.anything = False
        self._block = block
        self._names = names

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not ACTIVE or not ACTIVE[0].holds(self._block):  # Ctrl-C at the edge of a block has left this behind
            return func(*args, **(kwargs or {}))
        self.anything = True
        known = self._names
        names = [known[id(value)] for value in (*args, *(kwargs or {}).values()) if id(value) in known]
        asked_before = ACTIVE[0].asked
        result = func(*args, **(kwargs or {}))
        if names and ACTIVE[0].asked == asked_before:  # data of torch.tensor, a number as alpha, what is set as .data
            raise ZofoError(
                f"{func.__name__} reads {names[0]} without asking for θ + scale·z: give it {names[0]}.clone() in the "
                "model's code, or leave this parameter out, in a config by zo_exclude"
            )
        return result


class _Watched:
    """Mixed into the class of a parameter for the time of a block."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] torch's documented way
            if ACTIVE and ACTIVE[0].thread == threading.get_ident():
                return ACTIVE[0].call(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))


@lru_cache
def watched(plain: type[Tensor]) -> type[Tensor]:
    """The class of a parameter for the time of a block."""
    return type(plain)(plain.__name__, (_Watched, plain), {})


def plain_class(cls: type[Tensor]) -> type[Tensor]:
    """The class without `_Watched`, which Ctrl-C at the very end of a block may have left."""
    return cls.__bases__[1] if issubclass(cls, _Watched) else cls


@lru_cache
def in_place(func: Callable[..., Any]) -> bool:
    """Whether a torch function writes its first argument."""
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
