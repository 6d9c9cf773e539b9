"""Examples to one batch: as few tokens as the options allow, logits only where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from zofo.errors import ZofoError
from zofo.scoring.tokens import Example, LossKind

PROMPT = 1  # the segment of what all options of a row read
# comparing so many pairs of positions costs less than one token costs the rest of a model of 200 or more hidden units
_PAIRS_PER_TOKEN = 1000


class Batch(TypedDict):
    """Rows for one forward: R rows of S tokens, in which N tokens are scored.

    The columns of `scored` are (row, position, token): what that position must predict. Of B examples with at most J
    options, `slots[b, j]` are the columns of option j, -1 behind the last, and `gold[b]` is the right option. Where
    options lie side by side, `segments` is 1 for what all of a row's options read, and another number for each of
    them; the padding's is 0.
    """

    input_ids: Tensor  # (R, S)
    attention_mask: Tensor  # (R, S)
    scored: Tensor  # (3, N)
    segments: NotRequired[Tensor]  # (R, S)
    slots: NotRequired[Tensor]  # (B, J, A)
    gold: NotRequired[Tensor]  # (B,)


@dataclass(frozen=True)
class Layout:
    """How a model takes its rows.

    Args:
        side: of the padding. "left" keeps the answers together at the end; "right" suits virtual tokens in front.
        room: tokens of a row in which options of several tokens lie side by side; 0 if each needs a row of its own.
    """

    side: Literal["left", "right"] = "left"
    room: int = 0


@dataclass(frozen=True)
class _Row:
    """A prompt and some of its answers, each without its last token, which is only ever predicted."""

    ids: list[int]
    segments: list[int]
    scored: list[list[tuple[int, int]]]  # of each answer: (position, token)

    @staticmethod
    def of(example: Example, numbers: Sequence[int]) -> _Row:
        ids, segments = list(example.prompt), [PROMPT] * len(example.prompt)
        scored: list[list[tuple[int, int]]] = []
        for number in numbers:
            answer, given = example.answers[number], example.given[number] if example.given else 0
            before = [len(example.prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            scored.append(list(zip(before, answer, strict=True))[given:])
            ids += answer[:-1]
            segments += [number + 1 + PROMPT] * (len(answer) - 1)
        return _Row(ids, segments, scored)


def collate(examples: Sequence[Example], kind: LossKind, pad_id: int, layout: Layout = Layout()) -> Batch:
    """Examples to one batch; a single forward gives the loss, or the scores of all options.

    The options of an example share a row if they are one token each. Longer ones do if the layout has room for them
    and it costs less: it saves the tokens of the prompt, and has attention compare every option with every other.

    Args:
        examples: what to batch.
        kind: "lm" (only the right answer), or "options".
        pad_id: the padding token.
        layout: of the model, as its `Scorer` says.

    Raises:
        ZofoError: if `kind` is "options" and an example has fewer than two.
    """
    if kind == "lm":
        return _pad([_Row.of(e, [e.gold]) for e in examples], pad_id, layout.side)
    if any(len(e.answers) < 2 for e in examples):
        raise ZofoError("loss is 'options', but a row has fewer than two: set loss to lm, or give options")
    several = any(answer_tokens(e) for e in examples)
    side_by_side = several and _pays(examples, layout)
    if several and not side_by_side:
        rows = [_Row.of(e, [j]) for e in examples for j in range(len(e.answers))]
    else:
        rows = [_Row.of(e, range(len(e.answers))) for e in examples]
    batch = _pad(rows, pad_id, layout.side, segments=side_by_side)
    numbers = iter(range(batch["scored"].shape[1]))
    options = iter([[next(numbers) for _ in option] for row in rows for option in row.scored])
    slots = _ragged([[next(options) for _ in e.answers] for e in examples])
    return {**batch, "slots": slots, "gold": torch.tensor([e.gold for e in examples])}


def collate_prompts(examples: Sequence[Example], pad_id: int) -> Batch:
    """The prompts alone, for text that is to go on from them."""
    return _pad([_Row.of(e, []) for e in examples], pad_id, "left")


def answer_tokens(example: Example) -> int:
    """How many tokens of all its answers are read: the last of each is only predicted."""
    return sum(len(answer) - 1 for answer in example.answers)


def width(example: Example, kind: LossKind) -> int:
    """Tokens that are read of an example, with all of its options, or with the right answer."""
    return len(example.prompt) + (
        answer_tokens(example) if kind == "options" else len(example.answers[example.gold]) - 1
    )


def stack(batches: Sequence[Batch], side: Literal["left", "right"]) -> Batch:
    """The rows of several batches as one; what is asked of them (`gold` and `slots`) stays with each batch."""
    widest = max(batch["input_ids"].shape[1] for batch in batches)

    def widened(tensors: Sequence[Tensor]) -> Tensor:
        missing = [widest - tensor.shape[1] for tensor in tensors]
        sides = [(n, 0) if side == "left" else (0, n) for n in missing]
        # any id will do behind the mask
        return torch.cat([functional.pad(tensor, pad) for tensor, pad in zip(tensors, sides, strict=True)])

    first, scored = 0, list[Tensor]()
    for batch in batches:
        rows, own = batch["input_ids"].shape
        moved = (first, widest - own if side == "left" else 0, 0)
        scored.append(batch["scored"] + batch["scored"].new_tensor(moved)[:, None])
        first += rows
    found: Batch = {
        "input_ids": widened([batch["input_ids"] for batch in batches]),
        "attention_mask": widened([batch["attention_mask"] for batch in batches]),
        "scored": torch.cat(scored, dim=1),
    }
    if any("segments" in batch for batch in batches):
        found["segments"] = widened([batch.get("segments", batch["attention_mask"]) for batch in batches])
    return found


def _pays(examples: Sequence[Example], layout: Layout) -> bool:
    """Whether there is room for the options of each example in one row, and it costs less than a row for each."""
    widest = max(width(e, "options") for e in examples)
    apart = _cost(sum(len(e.answers) for e in examples), max(e.length for e in examples) - 1)
    return widest <= layout.room and _cost(len(examples), widest) < apart


def _cost(rows: int, width: int) -> int:
    """In pairs of positions, all of which attention compares in a row."""
    return rows * width * (width + _PAIRS_PER_TOKEN)


def _pad(rows: Sequence[_Row], pad_id: int, side: str, segments: bool = False) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    marks = torch.zeros_like(ids)
    scored: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        start = width - len(row.ids) if side == "left" else 0
        ids[number, start : start + len(row.ids)] = torch.tensor(row.ids)
        marks[number, start : start + len(row.ids)] = torch.tensor(row.segments)
        scored += [(number, start + position, token) for option in row.scored for position, token in option]
    batch: Batch = {
        "input_ids": ids,
        "attention_mask": (marks > 0).long(),
        "scored": torch.tensor(scored, dtype=torch.long).reshape(-1, 3).T,
    }
    return {**batch, "segments": marks} if segments else batch


def _ragged(lists: list[list[list[int]]]) -> Tensor:
    """(B, J, A), with -1 where there is nothing."""
    options, tokens = max(map(len, lists)), max(len(inner) for outer in lists for inner in outer)
    slots = torch.full((len(lists), options, tokens), -1)
    for b, outer in enumerate(lists):
        for j, inner in enumerate(outer):
            slots[b, j, : len(inner)] = torch.tensor(inner)
    return slots
