"""Two rewards: the model says in its own words whether a review likes the film, and it says so in one sentence."""

from collections.abc import Sequence
from typing import Any

PRAISE = {"amazing", "beautiful", "best", "brilliant", "excellent", "fun", "funny", "good", "great", "wonderful"}
BLAME = {"awful", "bad", "boring", "disappointing", "dull", "horrible", "mess", "not", "terrible", "worst"}


def verdict(completions: Sequence[str], sentiment: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a word of praise or blame, as the critic means it; 0.5 for one of the wrong side; 0 for none, or both.

    So there is something to be learned before the sides can be told apart: to judge at all.

    Args:
        completions: what the model wrote after "... It was".
        sentiment: a column of the rows, from -4 to 4.
        columns: the others.

    Examples:
        >>> verdict([" a great film.", " great!", " a film"], ["2.5", "-1.8", "3"])
        [1.0, 0.5, 0.0]
    """
    meant = [1 if float(value) > 0 else -1 for value in sentiment]
    said = [_side(text) for text in completions]
    return [0.5 * abs(side) + 0.5 * (side == right) for side, right in zip(said, meant, strict=True)]


def one_sentence(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where a sentence ends before the completion is cut off, else 0.

    Examples:
        >>> one_sentence([" great.", " a great film about a"])
        [1.0, 0.0]
    """
    return [float(any(mark in text for mark in ".!?")) for text in completions]


def _side(text: str) -> int:
    words = {word.strip(".,;:!?\"'").lower() for word in text.split()}
    return bool(words & PRAISE) - bool(words & BLAME)
