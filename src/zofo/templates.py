"""Jinja2 templates from task files: sandboxed, and sure to end.

A task file may come from anybody. The sandbox keeps templates away from Python's internals; what could
run or grow without end (macros, nested or recursive loops, huge ranges, powers and repetitions) is refused when
the template is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zofo.errors import ZofoError

_LONGEST = 1_000_000  # characters of one rendered field
_REPEATS = 10_000
_POWER = 64
_RANGE = 1_000
_ENDLESS = (nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_EXPRESSION = re.compile(r"^\s*\{\{(.*)\}\}\s*$", re.DOTALL)

Render = Callable[[dict[str, Any]], Any]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > _POWER:
            raise SecurityError(f"a power of {right} is too large")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple) and times > _REPEATS:
                raise SecurityError(f"a repetition of {times} times is too large")
        return super().call_binop(context, operator, left, right)


def _short_range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > _RANGE:
        raise SecurityError(f"a range of {len(numbers)} is too long (at most {_RANGE})")
    return numbers


_ENVIRONMENT = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
_GLOBALS: dict[str, Any] = _ENVIRONMENT.globals
_GLOBALS["range"] = _short_range


def text_template(source: str, where: str) -> Render:
    """A template that renders a row to text.

    Args:
        source: Jinja2 text; a row's columns are its variables.
        where: file and key, for messages.

    Raises:
        ZofoError: if it cannot be parsed or might not end.

    Examples:
        >>> text_template("{{ text }} It was", "here")({"text": "Good."})
        'Good. It was'
    """
    _check(source, where)
    template = _ENVIRONMENT.from_string(source)

    def render(row: dict[str, Any]) -> str:
        text = _guarded(lambda: template.render(row), where)
        if len(text) > _LONGEST:
            raise ZofoError(f"{where} renders to {len(text)} characters: more than {_LONGEST} cannot be meant")
        return text

    return render


def expression(source: str, where: str) -> Render:
    """A bare Jinja2 expression, or one inside `{{ }}`, that gives a Python value for a row.

    Examples:
        >>> expression("{{ [a, b] }}", "here")({"a": 1, "b": 2})
        [1, 2]
    """
    match = _EXPRESSION.match(source)
    inner = match.group(1) if match else source
    _check("{{ " + inner + " }}", where)
    evaluate = _ENVIRONMENT.compile_expression(inner, undefined_to_none=False)
    return lambda row: _guarded(lambda: evaluate(row), where)


def _check(source: str, where: str) -> None:
    try:
        tree = _ENVIRONMENT.parse(source)
    except TemplateError as error:
        raise ZofoError(f"{where} is no valid template: {error}") from error
    for node in tree.find_all(_ENDLESS):
        raise ZofoError(f"{where} uses {type(node).__name__.lower()}, which templates here may not: write plain text")
    for loop in tree.find_all(nodes.For):
        if loop.recursive or any(True for inner in loop.body for _ in _loops(inner)):
            raise ZofoError(f"{where} has a loop inside a loop, which might never end: use one loop at most")


def _loops(node: nodes.Node) -> list[nodes.Node]:
    return [node] if isinstance(node, nodes.For) else list(node.find_all(nodes.For))


def _guarded(render: Callable[[], Any], where: str) -> Any:
    try:
        return render()
    except SecurityError as error:
        raise ZofoError(f"{where} tries what templates may not do: {error}") from error
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ZofoError(f"{where}: {error}") from error
