"""Text to tokens: BPE boundaries right, answers never cut."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.tasks.records import Record

logger = logging.getLogger(__name__)

LossKind = Literal["options", "lm"]


@dataclass(frozen=True)
class Example:
    """One record as token ids.

    Args:
        prompt: ids up to the first token that touches an answer.
        answers: ids of each candidate, or of the one answer.
        gold: which of them is right.
        texts: the candidates, or the one answer, as text.
        given: of each candidate, how many of its first tokens are only read and not scored (partial evaluation).
        references: all right answers as text, the one of `gold` among them.
        group: of the record.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    gold: int
    texts: tuple[str, ...]
    given: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with answer."""
        return len(self.prompt) + max(map(len, self.answers))

    @property
    def right(self) -> tuple[str, ...]:
        """All right answers."""
        return self.references or (self.texts[self.gold],)


def tokenize(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], int]:
    """Tokenises prompt and answer together, and cuts by character offsets.

    A token that reaches across the boundary belongs to the answer, so no boundary is guessed. Too long prompts
    lose their beginning; special tokens in front stay, and so does the whole answer. An empty prompt becomes the token
    that starts a text, or ends one where the tokenizer knows no other.

    Args:
        records: the texts.
        tokenizer: a fast tokenizer.
        max_length: tokens of prompt and answer together.

    Returns:
        The examples, and how many of them were truncated.

    Raises:
        ZofoError: if an answer alone is longer than `max_length`, or two options have the same tokens.
    """
    texts = [(r, answer) for r in records for answer in (r.options or (r.completion,))]
    encoded: Any = tokenizer(
        [r.prompt + answer + r.suffix for r, answer in texts],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    pieces = iter(
        _cut(record, answer, ids, offsets, special, tokenizer)
        for (record, answer), ids, offsets, special in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    )
    examples = [_join(record, [next(pieces) for _ in record.options or (record.completion,)]) for record in records]
    _warn_of_beginnings(examples)
    short = [_truncate(example, max_length, tokenizer) for example in examples]
    return short, sum(a.prompt != b.prompt for a, b in zip(examples, short, strict=True))


@dataclass(frozen=True)
class _Piece:
    """The tokens of one prompt with one answer; `given` of the answer's are not scored."""

    prompt: list[int]
    answer: list[int]
    given: int


def _cut(
    record: Record,
    answer: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> _Piece:
    while special[-1]:  # what a tokenizer puts at the end of a text does not belong between prompt and answer
        ids, offsets, special = ids[:-1], offsets[:-1], special[:-1]

    def first_behind(boundary: int) -> int:
        return next(i for i, (_, end) in enumerate(offsets) if end > boundary)

    start = first_behind(len(record.prompt))
    given = first_behind(len(record.prompt + answer)) - start if record.partial else 0
    ends: list[Any] = [] if record.options else [tokenizer.eos_token_id]  # must be learned; an option is only compared
    if None in ends:
        raise ZofoError(
            "the tokenizer has no eos_token, by which a generated answer ends: give it one, or give options"
        )
    prompt = ids[:start] or ([] if record.prompt else [_first_token(tokenizer)])
    return _Piece(prompt, ids[start:] + ends, given)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text starts with; models of the GPT-2 family separate texts by the token that ends them."""
    token: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _join(record: Record, pieces: list[_Piece]) -> Example:
    """One prompt for all options: what their tokenisations have in common before the first answer."""
    shared = min(len(piece.prompt) for piece in pieces)
    while any(piece.prompt[:shared] != pieces[0].prompt[:shared] for piece in pieces):
        shared -= 1
    if shared == 0:
        raise ZofoError(
            f"the prompt {record.prompt!r} melts into the first token of an answer: end it with a line break, or "
            "start the answers with a space"
        )
    answers = tuple(tuple((piece.prompt + piece.answer)[shared:]) for piece in pieces)
    if len(set(answers)) < len(answers):
        raise ZofoError(f"two of the options {list(record.options)} become the same tokens: choose other words")
    texts = record.options or (record.completion,)
    return Example(
        prompt=tuple(pieces[0].prompt[:shared]),
        answers=answers,
        gold=texts.index(record.completion),
        texts=texts,
        given=tuple(len(piece.prompt) - shared + piece.given for piece in pieces) if record.partial else (),
        references=record.references,
        group=record.group,
    )


def _warn_of_beginnings(examples: Sequence[Example]) -> None:
    """Says where an option is the beginning of another, which is then scored twice."""
    found = [
        (number, one, other)
        for number, example in enumerate(examples, start=1)
        for one, short in enumerate(example.answers)
        for other, long in enumerate(example.answers)
        if len(short) < len(long) and long[: len(short)] == short
    ]
    if found:
        number, one, other = found[0]
        texts = examples[number - 1].texts
        logger.warning(
            "%d of %d rows have an option that is the beginning of another (row %d: %r and %r): their scores "
            "differ by the rest alone; a text behind both, such as a full stop, tells them apart",
            len({number for number, *_ in found}), len(examples), number, texts[one], texts[other],
        )  # fmt: skip


def _truncate(example: Example, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    excess = example.length - max_length
    if excess <= 0:
        return example
    head = 0
    while head < len(example.prompt) and example.prompt[head] in tokenizer.all_special_ids:
        head += 1
    if excess > len(example.prompt) - head - 1:
        raise ZofoError(
            f"an answer of {example.length - len(example.prompt)} tokens leaves no room for a prompt in max_length "
            f"{max_length}: raise max_length, or shorten the answers"
        )
    return dataclasses.replace(example, prompt=example.prompt[:head] + example.prompt[head + excess :])
