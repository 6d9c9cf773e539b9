"""The usual metrics, from predictions and right answers."""

import re
import string
from collections import Counter
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

        accuracy            fraction of rows whose prediction is one of the right options
        macro_f1            mean F1 over the classes that occur
        f1                  F1 of the positive class, which is the last option (MultiRC's F1a)
        group_exact_match   fraction of groups all of whose rows are right (MultiRC's EM)
        exact_match         fraction of texts that equal one of the right ones after `normalise`
        token_f1            F1 over words after `normalise`, best over the right texts, as SQuAD defines it

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

    References:
        P. Rajpurkar et al., "SQuAD" (2016); D. Khashabi et al., "Looking Beyond the Surface" (2018) for MultiRC.
    """
    assert len(predictions) == len(references) > 0
    if metric == "macro_f1":
        return _macro_f1(predictions, [right[0] for right in references])
    if metric == "f1":
        return _f1(predictions, [right[0] for right in references], [row[-1] for row in options])
    hits = [_ROWS[metric](*pair) for pair in zip(predictions, references, strict=True)]
    if metric == "group_exact_match":
        wrong = {group for hit, group in zip(hits, groups, strict=True) if not hit}
        return (len(set(groups)) - len(wrong)) / len(set(groups))
    return sum(hits) / len(hits)


_ROWS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": lambda prediction, right: float(prediction in right),
    "group_exact_match": lambda prediction, right: float(prediction in right),
    "exact_match": lambda prediction, right: float(normalise(prediction) in map(normalise, right)),
    "token_f1": lambda prediction, right: max(_token_f1(prediction, reference) for reference in right),
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


def _token_f1(prediction: str, answer: str) -> float:
    left, right = normalise(prediction).split(), normalise(answer).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as in SQuAD's scorer."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())
