"""Jinja2 templates from task files: sandboxed, and certain to end.

A task file may come from anybody. The sandbox keeps templates away from Python's internals. Only the constructs,
filters and methods named here are allowed, with one loop at most; products, replacements and rendered texts have a
largest size. So no template can run or grow without end.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    Undefined,
    UndefinedError,
    meta,
    nodes,
    pass_environment,
    pass_eval_context,
)
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import do_join, do_round, do_sum
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zofo.errors import ZofoError, first_line, listed

Render = Callable[[dict[str, Any]], Any]

_LONGEST = 1_000_000  # characters of a rendered field, and of any intermediate text
_LARGEST = 10**18  # the largest factor
_LARGEST_BASE = 10**6
_LARGEST_POWER = 64
_RANGE = 1_000
_DIGITS = 20  # to round to
_EXPRESSION = re.compile(r"^\s*\{\{(.*)\}\}\s*$", re.DOTALL)

_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict,
    nodes.Pair, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call, nodes.Keyword, nodes.Filter, nodes.Test,
    nodes.CondExpr, nodes.If, nodes.For, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg,
    nodes.Pos, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Concat,
)  # fmt: skip
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "first", "float", "int", "join", "last", "length", "list", "lower",
    "max", "min", "replace", "reverse", "round", "sort", "string", "sum", "title", "trim", "unique", "upper",
    "wordcount",
)  # fmt: skip
_OF_TEXT = ("capitalize", "lower", "string", "title", "trim", "upper", "wordcount")  # which make texts of anything
_METHODS = (
    "capitalize", "count", "endswith", "find", "get", "index", "isdigit", "items", "join", "keys", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "title", "upper", "values",
)  # fmt: skip
_LOOP = ("first", "index", "index0", "last", "length")


class _CodeGenerator(CodeGenerator):
    """Compiles `a ~ b` so that its parts may be what a text may be."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("str_join((")
        for part in node.nodes:
            self.write("environment.finalize(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "%", "**"])
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        super().__init__(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_plain, optimized=False
        )
        known: dict[str, Any] = self.filters
        self.filters: dict[str, Any] = {
            **{name: known[name] for name in _FILTERS},
            **{name: _of_text(known[name]) for name in _OF_TEXT},
            **{name: _to_number(known[name]) for name in ("int", "float")},
            "join": _join,
            "replace": _replace,
            "round": _round,
            "sum": _sum,
        }
        self.globals: dict[str, Any] = {"range": _short_range}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = _LOOP if type(obj).__name__ == "LoopContext" else _METHODS
        return attr in allowed and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, str) and (isinstance(obj, list | tuple) or _numbered_without(obj, argument)):
            raise TypeError(f"the text {str(argument)!r} is no position in {type(obj).__name__}")
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(value, int | float) for value in (left, right)):
            raise SecurityError(f"{operator} is for numbers only")
        limits = (_LARGEST_BASE, _LARGEST_POWER) if operator == "**" else (_LARGEST, _LARGEST)
        if abs(left) > limits[0] or abs(right) > limits[1]:
            raise SecurityError("a number is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, _context: Any, _function: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        bound = _function.__self__ if type(_function).__name__ == "builtin_function_or_method" else None
        if isinstance(bound, str | bytes) and _function.__name__ == "replace":
            return _replace(bound, *args, **kwargs)
        if isinstance(bound, str | bytes) and _function.__name__ == "join":
            return _joined(bound, *args, **kwargs)
        return super().call(_context, _function, *args, **kwargs)


def text_template(source: str, where: str) -> Render:
    """A Jinja2 template that renders a row, whose columns are its variables, to text; `where` is for messages."""
    names: Set[str] = _guarded(lambda: _check(source, where), where)
    template: Template = _guarded(lambda: _ENVIRONMENT.from_string(source), where)
    return lambda row: _guarded(lambda: _text(template, row), where, _lacking(names, row))


def expression(source: str, where: str) -> Render:
    """A Jinja2 expression, with or without `{{ }}` around it, that gives a Python value for a row."""
    match = _EXPRESSION.match(source)
    inner = match.group(1) if match else source
    names: Set[str] = _guarded(lambda: _check("{{ " + inner + " }}", where), where)
    evaluate = _guarded(lambda: _ENVIRONMENT.compile_expression(inner, undefined_to_none=False), where)

    def value_of(row: dict[str, Any]) -> Any:
        value = evaluate(row)
        if isinstance(value, Undefined):
            str(value)  # raises, and says which name is missing
        return value

    return lambda row: _guarded(lambda: value_of(row), where, _lacking(names, row))


def condition(source: str, where: str) -> Render:
    """An expression of which only counts whether it holds for a row."""
    value_of = expression(source, where)
    return lambda row: _guarded(lambda: bool(value_of(row)), where)


def _check(source: str, where: str) -> Set[str]:
    """The columns that a template names; refuses a template that could run without end."""
    tree = _ENVIRONMENT.parse(source)
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, (*_NODES, nodes.Helper, nodes.EvalContextModifier)):
            raise ZofoError(f"{where} uses {type(node).__name__.lower()}, which templates here may not: use plain ones")
    for loop in tree.find_all(nodes.For):
        if loop.recursive or any(isinstance(inner, nodes.For) or inner.find(nodes.For) for inner in loop.body):
            raise ZofoError(f"{where} has a loop inside a loop, which might never end: use one loop at most")
    return meta.find_undeclared_variables(tree) - _ENVIRONMENT.globals.keys()


def _text(template: Template, row: dict[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(row):
        pieces.append(piece)
        length += len(piece)
        if length > _LONGEST:
            raise SecurityError(f"it renders to more than {_LONGEST} characters")
    return "".join(pieces)


def _lacking(names: Set[str], row: dict[str, Any]) -> str:
    """The end of a message, that the row has not all columns that a template names; nothing if it has."""
    missing = sorted(names - row.keys())
    columns = listed(name for name in row if name != "row")
    return f"; the row has no column {listed(missing)}, but {columns}" if missing else ""


def _guarded(render: Callable[[], Any], where: str, lacks: str = "") -> Any:
    try:
        return render()
    except ZofoError:
        raise
    except (SecurityError, MemoryError) as error:
        raise ZofoError(f"{where} tries what templates may not do: {error}") from error
    except UndefinedError as error:
        raise ZofoError(f"{where}: {error}{lacks}") from error
    except TemplateError as error:
        raise ZofoError(f"{where} is no valid template: {first_line(error)}") from error
    except TypeError as error:
        mend = "`| int` and `| float` make numbers of texts, such as the cells of CSV files"
        raise ZofoError(f"{where}: {error} (TypeError){lacks}; {mend}") from error
    except (RecursionError, SyntaxError) as error:  # of Python, which templates are compiled to
        raise ZofoError(f"{where} is too long or nested too deep ({first_line(error)}): make it shorter") from error
    except (ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ZofoError(f"{where}: {error} ({type(error).__name__}){lacks}") from error


def _plain(value: Any) -> Any:
    """Refuses a field that is empty, nested, binary or no number in a text, where it would become Python's repr."""
    if value is None:
        kind = "empty (null)"
    elif isinstance(value, dict | list | tuple):
        kind = f"a nested {type(value).__name__}"  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, bytes):
        kind = "binary (bytes that are no UTF-8)"
    elif isinstance(value, float) and not math.isfinite(value):
        kind = f"no finite number ({value})"
    else:
        return value
    raise ValueError(f"a field is {kind}, and cannot be put into text")


def _of_text(convert: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes a text of what a text may be, and of nothing else."""

    @functools.wraps(convert)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        return convert(_plain(value), *args, **kwargs)

    return checked


def _to_number(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja2's filter without its default of 0: a missing label would be the first class."""

    @functools.wraps(convert)
    def checked(value: Any, default: Any = None, *args: Any, **kwargs: Any) -> Any:
        number = convert(value, default, *args, **kwargs)
        if number is None:
            raise ValueError(f"{value!r:.80} is no number")
        return number

    return checked


@pass_eval_context
def _join(context: nodes.EvalContext, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    parts = list(values) if attribute is not None else [_plain(value) for value in values]
    _require_short(str(_plain(d)), parts)
    joined: Any = do_join(context, parts, str(_plain(d)), attribute)
    return joined


def _joined(separator: Any, iterable: Iterable[Any], /) -> Any:
    parts = list(iterable)
    _require_short(separator, parts)
    return separator.join(parts)


def _require_short(separator: str | bytes, parts: Sequence[Any]) -> None:
    if len(separator) * len(parts) > _LONGEST:
        raise SecurityError(f"joined texts make more than {_LONGEST} characters")


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _DIGITS:
        raise SecurityError(f"a number is rounded to {precision} digits (at most {_DIGITS})")
    return do_round(value, precision, method)


@pass_environment
def _sum(environment: Any, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("sums are of numbers only")  # each sum of lists copies those before it
    return do_sum(environment, values, attribute, start)


def _numbered_without(obj: Any, key: str) -> bool:
    """Whether something is a mapping of numbers, which a text cannot select from."""
    return isinstance(obj, dict) and key not in obj and any(isinstance(known, int) for known in obj)  # pyright: ignore[reportUnknownVariableType]


def _replace(text: Any, old: Any, new: Any) -> str:
    text, old, new = (str(_plain(part)) for part in (text, old, new))
    if len(text) + (text.count(old) if old else len(text) + 1) * len(new) > _LONGEST:
        raise SecurityError(f"a replacement makes more than {_LONGEST} characters")
    return text.replace(old, new)


def _short_range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > _RANGE:
        raise SecurityError(f"a range of {len(numbers)} is too long (at most {_RANGE})")
    return numbers


_ENVIRONMENT = _Environment()
