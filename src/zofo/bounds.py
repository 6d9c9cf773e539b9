"""Which values a key may have: the type that is meant, and where a number must lie."""

import math
from dataclasses import dataclass
from numbers import Integral
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np

from zofo.errors import ZofoError

_MOST = 1 << 31  # what counters of the libraries hold, and more than any run uses


@dataclass(frozen=True)
class Bounds:
    """Where a number must lie; None is always allowed.

    Examples:
        >>> Bounds(above=0, below=1).require("zo_sparsity", 1.0)
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: zo_sparsity is 1.0, but must be greater than 0 and less than 1
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    def require(self, key: str, value: float | None) -> None:
        """Refuses a value outside, or one that is not finite."""
        if value is None:
            return
        if isinstance(value, bool | str):
            raise ZofoError(f"{key} is {value!r}, but must be a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ZofoError(f"{key} is {value}, but must be a finite number")
        limits = {
            f"greater than {self.above}": self.above is None or value > self.above,
            f"at least {self.at_least}": self.at_least is None or value >= self.at_least,
            f"less than {self.below}": self.below is None or value < self.below,
        }
        if not all(limits.values()):
            named = [limit for limit in limits if "None" not in limit]
            told = [limit for limit in named if not limits[limit] or str(_MOST) not in limit]
            raise ZofoError(f"{key} is {value}, but must be {' and '.join(told)}")


POSITIVE, NOT_NEGATIVE = Bounds(above=0, below=_MOST), Bounds(at_least=0, below=_MOST)
FRACTION = Bounds(above=0, below=1)


def require_type(key: str, value: Any, hint: Any, default: Any = None) -> None:
    """Refuses what is no whole number or no boolean where the type of a key asks for one; others are not looked at.

    Examples:
        >>> require_type("lower_steps", 2.0, int | None)
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: lower_steps is 2.0, but must be a whole number
    """
    kinds = _kinds(hint) - {NoneType}
    if value is None or (type(value) is type(default) and value == default):
        return
    if kinds == {bool} and not isinstance(value, bool | np.bool_):
        raise ZofoError(f"{key} is {value!r}, but must be True or False")
    if kinds == {int} and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ZofoError(f"{key} is {value!r}, but must be a whole number")


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint allows."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return set[Any]().union(*map(_kinds, get_args(hint)))
    return {hint}
