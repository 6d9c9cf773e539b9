"""The field's metrics, from predictions and right answers."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

OPTION_METRICS = ("accuracy", "macro_f1", "f1", "group_exact_match")
TEXT_METRICS = ("exact_match", "token_f1")
METRICS = (*OPTION_METRICS, *TEXT_METRICS)

_ARTICLES = re.compile(r"\b(a|an|the)\b")

References = Sequence[Sequence[str]]


def score(
    metric: str,
    predictions: Sequence[str],
    references: References,
    *,
    options: Sequence[Sequence[str]] = (),
    groups: Sequence[str] = (),
) -> float:
    """A metric in [0, 1].

        accuracy            share of rows whose prediction is one of the right options
        macro_f1            mean F1 over the classes that occur
        f1                  F1 of the positive class, which is the last option (MultiRC's F1a)
        group_exact_match   share of groups all of whose rows are right (MultiRC's EM)
        exact_match         share of texts that equal one of the right ones after `normalise`
        token_f1            F1 over words after `normalise`, best over the right texts, as SQuAD defines it

    Args:
        metric: one of `METRICS`.
        predictions: what was chosen or generated.
        references: all that is right, in the same order; the first is the one that a row was labelled with.
        options: the candidates of each row, for `f1`.
        groups: to which group each row belongs, for `group_exact_match`.

    Examples:
        >>> score("accuracy", ["a", "b"], [["a"], ["a", "b"]])
        1.0
        >>> score("token_f1", ["the big cat"], [["dog", "A cat!"]])
        0.6666666666666666

    References:
        P. Rajpurkar et al., "SQuAD" (2016); D. Khashabi et al., "Looking Beyond the Surface" (2018) for MultiRC.
    """
    assert len(predictions) == len(references) > 0
    if metric == "macro_f1":
        return _macro_f1(predictions, [right[0] for right in references])
    if metric == "f1":
        return _f1(predictions, [right[0] for right in references], [own[-1] for own in options])
    hits = [_ROWS[metric](*pair) for pair in zip(predictions, references, strict=True)]
    if metric == "group_exact_match":
        return _all_right(hits, groups)
    return sum(hits) / len(hits)


def _same(prediction: str, right: Sequence[str]) -> float:
    return float(prediction in right)


def _same_normalised(prediction: str, right: Sequence[str]) -> float:
    return float(normalise(prediction) in map(normalise, right))


def _best_token_f1(prediction: str, right: Sequence[str]) -> float:
    return max(_token_f1(prediction, reference) for reference in right)


_ROWS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": _same,
    "group_exact_match": _same,
    "exact_match": _same_normalised,
    "token_f1": _best_token_f1,
}


def _macro_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """The mean F1 over the classes that occur among predictions or answers."""
    classes = sorted({*predictions, *answers})
    pairs = list(zip(predictions, answers, strict=True))
    hits = Counter(p for p, a in pairs if p == a)
    sizes = Counter(predictions) + Counter(answers)
    return sum(2 * hits[c] / sizes[c] for c in classes) / len(classes)


def _f1(predictions: Sequence[str], answers: Sequence[str], positive: Sequence[str]) -> float:
    """F1 of the positive class over all rows; 0 if it neither occurs nor is predicted."""
    rows = list(zip(predictions, answers, positive, strict=True))
    hits = sum(p == a == yes for p, a, yes in rows)
    size = sum((p == yes) + (a == yes) for p, a, yes in rows)
    return 2 * hits / size if size else 0.0


def _all_right(hits: Sequence[float], groups: Sequence[str]) -> float:
    members: dict[str, list[float]] = defaultdict(list)
    for hit, group in zip(hits, groups, strict=True):
        members[group].append(hit)
    return sum(all(own) for own in members.values()) / len(members)


def _token_f1(prediction: str, answer: str) -> float:
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
