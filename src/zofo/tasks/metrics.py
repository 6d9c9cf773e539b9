"""The usual metrics, from predictions and right answers."""

import inspect
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from zofo.errors import ZofoError, did_you_mean

_MARKS = re.escape(string.punctuation)
_ARTICLES = re.compile(rf"\b(?<![{_MARKS}])(a|an|the)\b(?![{_MARKS}])")
_MINUS = "\\-\N{MINUS SIGN}\N{EN DASH}"  # in brackets, where a plain hyphen would make a range
# What SQuAD's scorer deletes, and what is more than punctuation there; the text is in lower case, with single spaces.
_PARTS = re.compile(
    rf"""
    (?P<number> (?<![\w.]) (?: \d{{1,3}}(?:,\d{{3}})+(?!,?\d) | \d+ | (?=\.\d) )
                (?:\.\d+)? (?:e[+{_MINUS}]?\d{{1,9}}(?!\w))? (?!\.?\d) )
    | (?P<between> (?<=\d) (?: [{_MARKS}{_MINUS}]+ | [ ][/*^{_MINUS}][ ] ) (?=\d) )
    | (?P<sign> (?: (?<![\w)\]}}]) [{_MINUS}] (?=[^\w\s]?\.?\d) (?!\$?(?:0+\.?0*|\.0+)(?![\w.]))  # -5 and -$5, not -0
                  | (?: ^ | (?<=[=<>+*/^][ ]) ) [{_MINUS}][ ] (?=\$?\.?\d)      # - 5, x = - 5
                  | (?<!\w) [{_MINUS}] (?=[a-z]\b|inf|∞) ) )                  # -x
    | (?P<plus> (?<![\w)\]}}]) \+ (?=[^\w\s]?\.?\d) )                      # +5 is 5
    | (?P<symbol> [+<=>] | (?<=[^\W\d_])\# | (?<=\b[a-z])-(?!\w) | (?<=\b[a-z][a-z])-(?!\w) )  # C++, F#, A-
    | (?P<mark> [{_MARKS}] )
    """,
    re.VERBOSE,
)

References = Sequence[Sequence[str]]
Function = Callable[[list[str], list[list[str]]], float | Mapping[str, float]]
Metric = str | Function  # one of `METRICS`, or a function of predictions and references


class Rows(NamedTuple):
    """What a metric is computed from, as `score` takes it."""

    predictions: Sequence[str]
    references: References
    options: Sequence[Sequence[str]]
    groups: Sequence[str]


def score(
    metric: str,
    predictions: Sequence[str],
    references: References,
    *,
    options: Sequence[Sequence[str]] = (),
    groups: Sequence[str] = (),
) -> float:
    """A metric in [0, 1].

        accuracy            fraction of rows whose prediction is one of the right options
        macro_f1            mean F1 over the classes that occur
        f1                  F1 of the positive class, which is the last option (MultiRC's F1a)
        group_exact_match   fraction of groups all of whose rows are right (MultiRC's EM)
        exact_match         fraction of texts that equal one of the right ones after `normalise`
        token_f1            F1 over words after `normalise`, best over the right texts, as SQuAD defines it

    A right answer of which `normalise` leaves nothing (`A`, `+`) is compared with its article or with its punctuation.

    Args:
        metric: one of `METRICS`.
        predictions: the chosen options or generated texts.
        references: all right answers of each row; the first one is the row's label.
        options: of each row, for `f1`.
        groups: the group of each row, for `group_exact_match`.

    Examples:
        >>> score("accuracy", ["a", "b"], [["a"], ["a", "b"]])
        1.0
        >>> score("token_f1", ["the big cat"], [["dog", "A cat!"]])
        0.6666666666666666
        >>> score("exact_match", ["5", "1,000.0"], [["-5"], ["1000"]])
        0.5

    References:
        P. Rajpurkar et al., "SQuAD" (2016); D. Dua et al., "DROP" (2019) for numbers; D. Khashabi et al., "Looking
        Beyond the Surface" (2018) for MultiRC.
    """
    assert len(predictions) == len(references) > 0
    return METRICS[metric](Rows(predictions, references, options, groups))


def row_scores(metric: Metric, predictions: Sequence[str], references: References) -> list[float]:
    """What each row adds to a metric that is a mean over rows; for others, whether the row is right.

    Examples:
        >>> row_scores("macro_f1", ["a", "b"], [["a"], ["a"]])
        [1.0, 0.0]
    """
    fitting = "accuracy" if metric in OPTION_METRICS else "exact_match"
    named = metric if isinstance(metric, str) and metric in MEANS else fitting
    return [score(named, [p], [right]) for p, right in zip(predictions, references, strict=True)]


def compares_options(metrics: Sequence[Metric], has_options: bool) -> bool:
    """Whether options are compared, and no text is generated: by the first metric with a name, else by the rows."""
    named = next((metric for metric in metrics if isinstance(metric, str)), None)
    return has_options if named is None else named in OPTION_METRICS


def metric_name(metric: Metric) -> str:
    """The name under which a metric is reported: one of `METRICS`, or that of a function."""
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ZofoError(f"unknown metric {metric!r}: {did_you_mean(metric, METRICS, ', '.join(METRICS))}")
        return metric
    if not isinstance(metric, FunctionType | MethodType) or not metric.__name__.isidentifier():
        raise ZofoError(f"metric {metric!r:.80} has no name: give a name, or a function made with def")
    try:
        inspect.signature(metric).bind([], [])
    except TypeError as error:
        raise ZofoError(
            f"metric {metric.__name__} must take (predictions, references), lists of texts and of lists of texts, "
            f"but cannot: {error}; zofo has no logits to hand over"
        ) from error
    return metric.__name__


def score_by(metric: Function, predictions: Sequence[str], references: References) -> dict[str, float]:
    """What a function makes of predictions, by name: one number, or several."""
    name = metric_name(metric)
    value: Any = metric(list(predictions), [list(right) for right in references])
    values: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {name: value}
    try:
        return {str(key): float(number) for key, number in values.items()}
    except (TypeError, ValueError) as error:
        raise ZofoError(f"metric {name} gave {value!r:.80}: return a number, or a dict of numbers") from error


def worst(key: str, values: Sequence[float]) -> float:
    """The worst of several values of a score: the largest loss, the smallest of any other.

    Examples:
        >>> worst("loss", [0.5, 0.25]), worst("accuracy", [0.5, 0.25])
        (0.5, 0.25)
    """
    return max(values) if key == "loss" else min(values)


def _mean_best(of_pair: Callable[[str, str], float], rows: Rows) -> float:
    """The mean over the rows of the best value over the right answers."""
    best = [max(of_pair(p, right) for right in r) for p, r in zip(rows.predictions, rows.references, strict=True)]
    return sum(best) / len(best)


def _macro_f1(rows: Rows) -> float:
    """The mean F1 over the classes that occur among predictions or answers."""
    predictions, answers = rows.predictions, [right[0] for right in rows.references]
    hits = Counter(p for p, a in zip(predictions, answers, strict=True) if p == a)
    sizes = Counter(predictions) + Counter(answers)
    return sum(2 * hits[c] / sizes[c] for c in sorted(sizes)) / len(sizes)


def _f1(rows: Rows) -> float:
    """F1 of the positive class over all rows; 0 if it neither occurs nor is predicted."""
    both = list(zip(rows.predictions, (right[0] for right in rows.references), rows.options, strict=True))
    hits = sum(p == a == row[-1] for p, a, row in both)
    size = sum((p == row[-1]) + (a == row[-1]) for p, a, row in both)
    return 2 * hits / size if size else 0.0


def _group_exact_match(rows: Rows) -> float:
    """The fraction of groups all of whose rows are right."""
    both = zip(rows.groups, rows.predictions, rows.references, strict=True)
    groups, wrong = set(rows.groups), {group for group, prediction, right in both if prediction not in right}
    return (len(groups) - len(wrong)) / len(groups)


def _exact(prediction: str, answer: str) -> bool:
    normal = _form_for(answer)
    return normal(prediction) == normal(answer)


def _token_f1(prediction: str, answer: str) -> float:
    normal = _form_for(answer)
    left, right = normal(prediction).split(), normal(answer).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


_Named = Callable[[Rows], float]
OPTION_METRICS: dict[str, _Named] = {
    "accuracy": partial(_mean_best, operator.eq),
    "macro_f1": _macro_f1,
    "f1": _f1,
    "group_exact_match": _group_exact_match,
}
TEXT_METRICS: dict[str, _Named] = {
    "exact_match": partial(_mean_best, _exact),
    "token_f1": partial(_mean_best, _token_f1),
}
METRICS = OPTION_METRICS | TEXT_METRICS
MEANS = ("accuracy", "exact_match", "token_f1")  # over rows


def _form_for(answer: str) -> Callable[[str], str]:
    """The strongest normalisation that leaves something of a right answer."""
    return next((form for form in (normalise, _without_marks, _lower) if form(answer)), normalise)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as in SQuAD's scorer; but numbers are numbers.

    A number keeps its sign, point, exponent, slash, colon and hyphen, loses the commas of its thousands, and has one
    form only, as in DROP's scorer: 1,000.0 is 1000. Nor are `+`, `<`, `=`, `>`, the `#` of F# and the `-` of A-
    deleted.

    Examples:
        >>> normalise("The cat, a dog & an owl."), normalise("-1,500.0 m"), normalise("C++")
        ('cat dog owl', '-1500 m', 'c++')
    """
    return " ".join(_ARTICLES.sub(" ", _without_marks(text)).split())


def _without_marks(text: str) -> str:
    return " ".join(_PARTS.sub(_kept, _lower(text)).split())


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _kept(part: re.Match[str]) -> str:
    """What stays of a number, of punctuation between two digits, or of any other punctuation."""
    match part.lastgroup:
        case "number":
            return _number(part[0])
        case "between":  # never nothing: 1;2 is not 12
            return re.sub(r"[^ /:*^.+<=>-]", "", re.sub("[,;]", " ", _ascii_minus(part[0]))) or " "
        case "sign":
            return "-"
        case "symbol":
            return part[0]
        case _:
            return ""


def _ascii_minus(text: str) -> str:
    return re.sub(f"[{_MINUS}]", "-", text)


def _number(text: str) -> str:
    """The one form of a number without a sign; exact, as floats of many digits are not."""
    _, digits, exponent = Decimal(_ascii_minus(text.replace(",", ""))).as_tuple()
    assert isinstance(exponent, int), "the pattern knows neither infinity nor nan"
    whole = "".join(map(str, digits)).lstrip("0")
    significant = whole.rstrip("0")
    exponent += len(whole) - len(significant)
    if not significant:
        return "0"
    if 0 <= exponent <= 30:
        return significant + "0" * exponent
    if -30 <= exponent < 0:
        padded = significant.rjust(1 - exponent, "0")
        return f"{padded[:exponent]}.{padded[exponent:]}"
    return f"{significant}e{exponent}"
