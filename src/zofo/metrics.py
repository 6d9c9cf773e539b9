"""The field's metrics, from predictions and answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

OPTION_METRICS = ("accuracy", "macro_f1")
TEXT_METRICS = ("exact_match", "token_f1")
METRICS = (*OPTION_METRICS, *TEXT_METRICS)

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(metric: str, predictions: Sequence[str], answers: Sequence[str]) -> float:
    """A metric in [0, 1].

    Args:
        metric: one of `METRICS`.
        predictions: what was chosen or generated.
        answers: what is right, in the same order.

    Examples:
        >>> score("accuracy", ["a", "b"], ["a", "a"])
        0.5
        >>> score("token_f1", ["the big cat"], ["A cat!"])
        0.6666666666666666
    """
    assert len(predictions) == len(answers) > 0
    if metric == "macro_f1":
        return _macro_f1(predictions, answers)
    one = {"accuracy": _same, "exact_match": _same_normalised, "token_f1": _token_f1}[metric]
    return sum(map(one, predictions, answers)) / len(answers)


def _same(prediction: str, answer: str) -> float:
    return float(prediction == answer)


def _same_normalised(prediction: str, answer: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def _macro_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """The mean F1 over the classes that occur among predictions or answers."""
    classes = sorted({*predictions, *answers})
    pairs = list(zip(predictions, answers, strict=True))
    hits = Counter(p for p, a in pairs if p == a)
    sizes = Counter(predictions) + Counter(answers)
    return sum(2 * hits[c] / sizes[c] for c in classes) / len(classes)


def _token_f1(prediction: str, answer: str) -> float:
    """F1 over words after `normalise`, as SQuAD defines it (P. Rajpurkar et al., 2016)."""
    left, right = normalise(prediction).split(), normalise(answer).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as SQuAD's scorer does.

    Examples:
        >>> normalise("The  Cat's hat.")
        'cats hat'
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())
