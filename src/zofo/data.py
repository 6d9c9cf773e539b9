"""Text to tokens to batches: BPE boundaries right, answers never cut, logits only where they are needed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.records import Record

logger = logging.getLogger(__name__)

LossKind = Literal["options", "lm"]
IGNORED = -100
NO_CANDIDATE = -1


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

    def row(self, answer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(what is only read, what is scored) of one candidate."""
        given = self.given[answer] if self.given else 0
        return self.prompt + self.answers[answer][:given], self.answers[answer][given:]


class Batch(TypedDict):
    """Rows for one forward: R rows of S tokens, of B examples with at most J options.

    `targets[r, t]` is the token that position t of row r must predict, or -100. `gold[b]` is the right option. Where
    every option is one token, `candidates[b, j]` is the token of option j; else `rows[b, j]` is its row. Both are -1
    where example b has no option j.
    """

    input_ids: Tensor  # (R, S)
    attention_mask: Tensor  # (R, S)
    targets: Tensor  # (R, S)
    gold: NotRequired[Tensor]  # (B,)
    candidates: NotRequired[Tensor]  # (B, J)
    rows: NotRequired[Tensor]  # (B, J)


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


def collate(examples: Sequence[Example], kind: LossKind, pad_id: int, padding_side: str = "left") -> Batch:
    """Examples to one batch; a single forward gives the loss, or the scores of all options.

    Args:
        examples: what to batch.
        kind: "lm" (only the right answer), or "options".
        pad_id: the padding token.
        padding_side: "left" keeps the answers together at the end; "right" suits virtual tokens in front.

    Raises:
        ZofoError: if `kind` is "options" and an example has none.
    """
    if kind == "lm":
        return pad([e.row(e.gold) for e in examples], pad_id, padding_side)
    if any(len(e.answers) < 2 for e in examples):
        raise ZofoError("loss is 'options', but a row has fewer than two: set loss to lm, or give options")
    gold = torch.tensor([e.gold for e in examples])
    if not has_several_tokens(examples):
        batch = pad([(e.prompt, e.answers[e.gold]) for e in examples], pad_id, padding_side)
        return {**batch, "candidates": _ragged([[a[0] for a in e.answers] for e in examples]), "gold": gold}
    texts = [e.row(j) for e in examples for j in range(len(e.answers))]
    numbers = iter(range(len(texts)))
    rows = _ragged([[next(numbers) for _ in e.answers] for e in examples])
    return {**pad(texts, pad_id, padding_side), "rows": rows, "gold": gold}


def has_several_tokens(examples: Sequence[Example]) -> bool:
    """Whether an option of the examples has more than one token."""
    return any(len(answer) > 1 for e in examples for answer in e.answers)


def pad(texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int, side: str) -> Batch:
    """Rows of prompt and answer without its last token, which is only ever predicted."""
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in texts)
    ids = torch.full((len(texts), width), pad_id)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(texts):
        read = torch.tensor((prompt + answer)[:-1])
        start = width - len(read) if side == "left" else 0
        ids[row, start : start + len(read)] = read
        mask[row, start : start + len(read)] = 1
        first = start + len(prompt) - 1
        targets[row, first : first + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def stack(batches: Sequence[Batch], side: str) -> Batch:
    """The rows of several batches as one; what is asked of them (`gold` and its like) stays with each batch."""
    width = max(batch["input_ids"].shape[1] for batch in batches)

    def widened(key: Literal["input_ids", "attention_mask", "targets"], value: int) -> Tensor:
        tensors = [batch[key] for batch in batches]
        missing = [width - tensor.shape[1] for tensor in tensors]
        sides = [(n, 0) if side == "left" else (0, n) for n in missing]
        return torch.cat([functional.pad(t, pad, value=value) for t, pad in zip(tensors, sides, strict=True)])

    # any id will do behind the mask
    return {
        "input_ids": widened("input_ids", 0),
        "attention_mask": widened("attention_mask", 0),
        "targets": widened("targets", IGNORED),
    }


class SharedPrompts(TypedDict):
    """Prompts once, answers apart: R answers of at most A tokens, of B prompts of at most S."""

    prompts: Batch  # (B, S), each with the first token of its right answer as target
    answers: Batch  # (R, A - 1), padded on the right, the shortest first; targets are the tokens that are scored
    owner: Tensor  # (R,) the prompt of each answer
    first: Tensor  # (R,) the first token of each answer
    scored: Tensor  # (R,) whether that one is scored: it is not where it is given
    rows: Tensor  # (B, J) the answers of each prompt, as in `Batch`


def collate_shared(examples: Sequence[Example], pad_id: int) -> SharedPrompts:
    """Examples for scoring that reads every prompt once, however many options it has."""
    answers = [(i, j) for i, example in enumerate(examples) for j in range(len(example.answers))]
    answers.sort(key=lambda pair: len(examples[pair[0]].answers[pair[1]]))
    number = {pair: r for r, pair in enumerate(answers)}
    tokens = [examples[i].answers[j] for i, j in answers]
    given = [examples[i].given[j] if examples[i].given else 0 for i, j in answers]
    return {
        "prompts": pad([(e.prompt, e.answers[e.gold][:1]) for e in examples], pad_id, "left"),
        "answers": pad(
            [(a[: max(g, 1)], a[max(g, 1) :]) for a, g in zip(tokens, given, strict=True)], pad_id, "right"
        ),
        "owner": torch.tensor([i for i, _ in answers]),
        "first": torch.tensor([answer[0] for answer in tokens]),
        "scored": torch.tensor([g == 0 for g in given]),
        "rows": _ragged([[number[i, j] for j in range(len(e.answers))] for i, e in enumerate(examples)]),
    }


def _ragged(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([line + [NO_CANDIDATE] * (width - len(line)) for line in lists])
