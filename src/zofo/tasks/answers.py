"""The right answers of training rows, counted: a wrong `answer` or column shows before anything is trained."""

from collections import Counter
from collections.abc import Sequence

from zofo.errors import ZofoError
from zofo.tasks.records import Record

_MOST = 6  # classes that are named one by one; of more, one less and the number of the others
_LONGEST = 40  # characters of an answer


def answer_counts(records: Sequence[Record], task: str) -> str:
    """A line: how many rows have each of the options as answer; where options differ or are none, how many answers.

    Refuses several rows that all have the same answer, by which nothing is learned; `task` is its name.

    Examples:
        >>> rows = [Record(f"{n} is", answer, (" odd", " even")) for n, answer in enumerate([" even", " odd", " even"])]
        >>> answer_counts(rows, "parity")
        'answers of the 3 training rows: even 2, odd 1'
    """
    counts = Counter(record.completion for record in records)
    (first, most), *_ = counts.most_common()
    if len(counts) == 1 < len(records):
        raise ZofoError(
            f"all {len(records)} training rows of task {task} have the answer {first!r:.80}, so nothing is learned: "
            "check `answer` in the task file, and the column of labels that it reads; or give other rows"
        )
    options = records[0].options
    if options and all(record.options == options for record in records):
        ranked = sorted(options, key=lambda option: -counts[option])
        named = ranked if len(ranked) <= _MOST else ranked[: _MOST - 1]
        left = len(ranked) - len(named)
        said = ", ".join(f"{_short(option)} {counts[option]}" for option in named) + f" and {left} others" * (left > 0)
    else:
        said = f"{len(counts)} different" + f", {_short(first)} {most}" * (2 * most > len(records) > 1)
    return f"answers of the {len(records)} training rows: {said}"


def _short(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
