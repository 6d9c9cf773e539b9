"""Reward functions, named by the user, called as trl calls them: reward(prompts, completions, **columns) -> numbers.

There is a number for each completion, or None where the reward does not apply.
"""

import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from torch import Tensor

from zofo.errors import ZofoError, did_you_mean, first_line, listed
from zofo.tasks.records import Record

REWARD = "reward"
_ANSWER_COLUMNS = ("prompt", "completion")  # handed over as prompts and completions
_GIVEN = ("prompts", "completions")

Reward = Callable[..., Any]


@dataclass(frozen=True)
class Rewards:
    """Some reward functions, whose weighted sum is the reward of a completion.

    Args:
        functions: name -> function.
        weights: one for each function.
        seconds: that a call may take.

    Examples:
        >>> def brief(prompts, completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> Rewards({"brief": brief}, (0.5,), 1.0).of([Record("Say it.", " a")], ["no"])
        [-1.0]
    """

    functions: Mapping[str, Reward]
    weights: tuple[float, ...]
    seconds: float

    def of(self, records: Sequence[Record], completions: Sequence[str]) -> list[float | None]:
        """The reward of each completion of a record's prompt; None where no function applies.

        Raises:
            ZofoError: if a function raises, takes too long, or does not return a number or None for each completion.
        """
        given = {"prompts": [record.asked for record in records], "completions": [*completions]}
        arguments = {**_columns(records), **given}
        totals: list[float | None] = [None] * len(completions)
        for (name, function), weight in zip(self.functions.items(), self.weights, strict=True):
            missing = dict.fromkeys(_needed(function) - arguments.keys(), [None] * len(completions))
            own = {key: [*values] for key, values in (arguments | missing).items()}  # which the function may change
            values = _checked(name, self._called(name, function, _taken(function, own)), completions)
            totals = [_added(total, value, weight) for total, value in zip(totals, values, strict=True)]
        return totals

    def require_columns(self, records: Sequence[Record]) -> None:
        """Refuses functions that need what is no column of any of the rows."""
        columns = _names(records)
        for name in _GIVEN:
            if name in columns:
                raise ZofoError(f"a column of the rows is called {name}, as an argument of every reward: rename it")
        for name, function in self.functions.items():
            try:
                inspect.signature(function).bind(**_taken(function, dict.fromkeys((*_GIVEN, *columns))))
            except TypeError as error:
                raise ZofoError(
                    f"reward {name} cannot be called ({first_line(error)}): it gets prompts, completions and the "
                    f"columns of the rows, which are {listed(columns) or 'none'}"
                ) from error
            except ValueError:
                continue  # a function of C that does not say what it takes

    def _called(self, name: str, function: Reward, arguments: Mapping[str, Any]) -> Any:
        """What the function returns, in a thread of its own, as nothing else can be left that takes too long."""
        returned: list[Any] = []
        raised: list[BaseException] = []

        def call() -> None:
            try:
                returned.append(function(**arguments))
            except BaseException as error:  # of SystemExit as well, a thread would end without a word
                raised.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.seconds)
        if raised:
            frame = traceback.extract_tb(raised[0].__traceback__)[-1]
            kind = type(raised[0]).__name__
            raise ZofoError(
                f"reward {name} failed ({kind}: {first_line(raised[0])[:200]}; {frame.filename}, line {frame.lineno}): "
                "mend it, or let it return None where it does not apply"
            ) from raised[0]
        if not returned:
            raise ZofoError(
                f"reward {name} has not returned after {self.seconds:g} seconds, for {len(arguments['completions'])} "
                "completions: make it faster, or raise reward_timeout"
            )
        return returned[0]


def require_name(name: str) -> tuple[str, str]:
    """The file or module, and the function that a name stands for; runs nothing."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise ZofoError(f"reward is {name!r}, but must be FILE.py:function or module:function")
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise ZofoError(f"reward is {name!r}, but there is no file {path}")
    return place, attribute


def load_rewards(names: Sequence[str], weights: Sequence[float] | None, seconds: float) -> Rewards:
    """The functions that `FILE.py:function` and `module:function` name. This runs the files.

    Raises:
        ZofoError: if there is no such function, or a file cannot be run.
    """
    functions: dict[str, Reward] = {}
    for name in names:
        place, attribute = require_name(name)
        if name in functions:
            raise ZofoError(f"reward names {name!r} twice: leave one of them out, and give it a reward_weights of 2")
        functions[name] = _function(_module(place, name), attribute, name)
    return made_rewards(functions, weights, seconds)


def made_rewards(functions: Mapping[str, Reward], weights: Sequence[float] | None, seconds: float) -> Rewards:
    """The rewards of some functions; `weights` are 1 by default."""
    if weights is not None and len(weights) != len(functions):
        raise ZofoError(
            f"reward_weights has {len(weights)} numbers for {len(functions)} rewards: give one for each, in their order"
        )
    given = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
    if not all(map(math.isfinite, given)) or not any(given):
        raise ZofoError(f"reward_weights is {given}, but must hold finite numbers that are not all 0")
    return Rewards(dict(functions), tuple(given), seconds)


def _module(place: str, name: str) -> ModuleType:
    path = Path(place).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"zofo_reward_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # which dataclasses and pickle look for
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        raise ZofoError(
            f"reward {name} cannot be loaded ({type(error).__name__}: {first_line(error)[:200]}): mend {place}"
        ) from error


def _function(module: ModuleType, attribute: str, name: str) -> Reward:
    found = vars(module).get(attribute)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(attribute, known, f"it has {listed(known) or 'none'}")
        raise ZofoError(f"reward is {name!r}, but {attribute} is no function there: {hint}")
    return found


def _names(records: Sequence[Record]) -> dict[str, None]:
    """The columns that some of the rows have, in their order, but for what becomes prompts and completions."""
    return dict.fromkeys(key for record in records for key in record.row or () if key not in _ANSWER_COLUMNS)


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The columns of the rows by name; None where a row lacks one."""
    return {name: [(record.row or {}).get(name) for record in records] for name in _names(records)}


def _needed(function: Reward) -> set[str]:
    """The arguments that a function names and cannot do without."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, one in parameters.items() if one.kind in named and one.default is one.empty}


def _taken(function: Reward, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes: all, or those that it names."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return dict(arguments)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _checked(name: str, values: Any, completions: Sequence[str]) -> list[float | None]:
    """What a reward returned, as a number or None for each completion."""
    found: Any = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(found, list | tuple):
        raise ZofoError(
            f"reward {name} returned {values!r:.80}: return a list, with a number or None for each completion"
        )
    listed: list[Any] = list(cast(Any, found))
    given = [one.item() if isinstance(one, Tensor | np.ndarray) and one.ndim == 0 else one for one in listed]
    if len(given) != len(completions):
        raise ZofoError(
            f"reward {name} returned {len(given)} values for {len(completions)} completions: return one for each, and "
            "None where it does not apply"
        )
    for value, completion in zip(given, completions, strict=True):
        if value is not None and not (isinstance(value, Real) and math.isfinite(float(value))):
            raise ZofoError(
                f"reward {name} returned {value!r:.80} for the completion {completion!r:.80}: return a finite number, "
                "or None where it does not apply"
            )
    return [None if value is None else float(value) for value in given]


def _added(total: float | None, value: float | None, weight: float) -> float | None:
    """A weighted sum of what applies."""
    return total if value is None else (total or 0.0) + weight * value
