"""A reward for `examples/reward.yaml`: the model says in its own words whether a review likes the film."""

from collections.abc import Sequence
from typing import Any

PRAISE = {"amazing", "beautiful", "best", "brilliant", "excellent", "fun", "funny", "good", "great", "wonderful"}
BLAME = {"awful", "bad", "boring", "disappointing", "dull", "horrible", "mess", "not", "terrible", "worst"}


def verdict(completions: Sequence[str], sentiment: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a word of the right side, -1 for one of the wrong side, 0 for neither or both.

    Args:
        completions: what the model wrote after "... It was".
        sentiment: a column of the rows, from -4 to 4.
        columns: the others.

    Examples:
        >>> verdict([" a great film.", " great!", " a film"], ["2.5", "-1.8", "3"])
        [1.0, -1.0, 0.0]
    """
    signs = [1.0 if float(value) > 0 else -1.0 for value in sentiment]
    return [sign * _side(text) for sign, text in zip(signs, completions, strict=True)]


def _side(text: str) -> int:
    words = {word.strip(".,;:!?\"'").lower() for word in text.split()}
    return bool(words & PRAISE) - bool(words & BLAME)
