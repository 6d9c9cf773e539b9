"""Reads a `ZOFOConfig` from YAML and from the words of a command line."""

import dataclasses
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from zofo import parse
from zofo.config import ZOFOConfig, field_names
from zofo.errors import ZofoError, first_line
from zofo.habits import refuse_values
from zofo.spelling import key_of, refuse_unknown


def parse_config(stored: Path | Mapping[str, Any] | None, arguments: Sequence[str]) -> ZOFOConfig:
    """A config from a flat YAML file, or its content, and `--key value` arguments; the arguments win.

    An unknown key is refused with the nearest one.

    Examples:
        >>> parse_config(None, ["--penlty", "1"])
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: unknown key 'penlty': did you mean penalty?
    """
    parser = _Parser(cast(Any, ZOFOConfig), allow_abbrev=False, add_help=False)
    values = {**(parser.stored(stored) if stored else {}), **parser.words(arguments)}
    return ZOFOConfig(**values, given=frozenset(values))


_ARGUMENT = re.compile(r"argument --(\w+)(?:/--[\w-]+)?: ")
_TEXTS = ("model", "task", "data", "source", "output_dir", "adapter_init", "text", "label", "run_name")
_NESTED = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


class _Parser(HfArgumentParser):
    """Reads values from words of a command line, or from YAML; both are checked alike, and only what is given counts.

    Values of YAML never become words: an item of a list may begin with `--`.
    """

    def words(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The keys on a command line."""
        for action in self._actions:
            action.default = SUPPRESS
        found, rest = self.parse_known_args(list(arguments))
        if rest:
            refuse_unknown(key_of(rest[0]), "", field_names())
        return vars(found)

    def stored(self, stored: Path | Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a YAML file, or of its content, where a key without a value is like no key."""
        where, content = (f"{stored}: ", read_config(stored)) if isinstance(stored, Path) else ("", stored)
        defaults = {f.name: f.default for f in dataclasses.fields(ZOFOConfig)}
        values: dict[str, Any] = {}
        for key, value in content.items():
            if key not in field_names():
                refuse_unknown(str(key), where, field_names())
            if value is not None:
                values[key] = self._value(key, value, where)
            elif where and key == "adapter":
                values[key] = ""  # refused, with what can be written
            elif where and defaults[key] is not None:
                raise ZofoError(f"{where}{key} is blank: give a value, or leave it out for {defaults[key]}")
        return values

    def _value(self, key: str, value: Any, where: str) -> Any:
        action = self._option_string_actions[f"--{key}"]
        if isinstance(value, dict) and key in _NESTED:
            return {name: _as_boolean(inner) for name, inner in cast("dict[str, Any]", value).items()}
        listed: list[Any] = value if isinstance(value, list) else [value]
        several = action.nargs == "+" or key == "report_to"
        if (not several and len(listed) != 1) or any(isinstance(item, dict | list | None) for item in listed):
            raise ZofoError(f"{where}{key} is {value}, but takes {'a list of words' if several else 'one value'}")
        made = [self._one(action, item, where) for item in listed]
        return made if several else made[0]

    def _one(self, action: Any, value: Any, where: str) -> Any:
        if isinstance(value, bool) and action.dest in _TEXTS:
            raise ZofoError(f"{where}{action.dest} is {value}, as YAML reads true and false: put it into quotes")
        if isinstance(value, float) and action.dest in _TEXTS:  # 1.10 is written otherwise
            raise ZofoError(f"{where}{action.dest} is {value}, as YAML reads a number: put it into quotes")
        strategy = action.dest.endswith("_strategy")
        if strategy or action.type is string_to_bool or action.dest == "resume_from_checkpoint":
            value = _as_boolean(value)
        word = "no" if value is False and strategy else str(value)
        try:
            made = self._get_value(action, word)
            self._check_value(action, made)
        except ArgumentError as error:
            raise ZofoError(where + _ARGUMENT.sub(r"\1: ", str(error))) from error
        return made

    def _check_value(self, action: Any, value: Any) -> None:
        refuse_values({action.dest: value})
        super()._check_value(action, value)

    def error(self, message: str) -> Any:
        raise ZofoError(_ARGUMENT.sub(r"\1: ", message))


def _as_boolean(value: Any) -> Any:
    """The words of YAML 1.1 for booleans, where one is asked for."""
    return {"yes": True, "on": True, "no": False, "off": False}.get(str(value).lower(), value)


def read_config(file: Path) -> dict[str, Any]:
    """The keys of a file, as YAML reads them."""
    try:
        content = parse.read_yaml(file, str(file))
    except FileNotFoundError as error:
        raise ZofoError(f"there is no config file {file}") from error
    except OSError as error:
        raise ZofoError(f"cannot read the config file {file}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ZofoError(f"{file} is no config: it must hold lines like `learning_rate: 1e-3`")
    return cast("dict[str, Any]", content)
