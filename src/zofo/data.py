"""Text to tokens to batches: BPE boundaries right, answers never cut, logits only where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.tasks import Record

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
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    gold: int
    texts: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with answer."""
        return len(self.prompt) + max(map(len, self.answers))


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
    lose their beginning; special tokens in front stay, and so does the whole answer.

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
        [r.prompt + answer for r, answer in texts], return_offsets_mapping=True, return_special_tokens_mask=True
    )
    end: Any = tokenizer.eos_token_id  # a generated answer must learn to stop; an option is only compared
    pieces = iter(
        _cut(ids, offsets, special, len(record.prompt), [] if record.options else [end])
        for (record, _), ids, offsets, special in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    )
    examples = [_join(record, [next(pieces) for _ in record.options or (record.completion,)]) for record in records]
    short = [_truncate(example, max_length, tokenizer) for example in examples]
    return short, sum(a.prompt != b.prompt for a, b in zip(examples, short, strict=True))


def _cut(
    ids: list[int], offsets: list[tuple[int, int]], special: list[int], boundary: int, ending: list[int]
) -> tuple[list[int], list[int]]:
    while special[-1]:  # what a tokenizer puts at the end of a text does not belong between prompt and answer
        ids, offsets, special = ids[:-1], offsets[:-1], special[:-1]
    start = next(i for i, (_, end) in enumerate(offsets) if end > boundary)
    return ids[:start], ids[start:] + ending


def _join(record: Record, pieces: list[tuple[list[int], list[int]]]) -> Example:
    """One prompt for all options: what their tokenisations have in common before the first answer."""
    shared = min(len(prompt) for prompt, _ in pieces)
    while any(prompt[:shared] != pieces[0][0][:shared] for prompt, _ in pieces):
        shared -= 1
    if shared == 0:
        raise ZofoError(
            f"the prompt {record.prompt!r} melts into the first token of an answer: end it with a line break, or "
            "start the answers with a space"
        )
    answers = tuple(tuple((prompt + answer)[shared:]) for prompt, answer in pieces)
    if len(set(answers)) < len(answers):
        raise ZofoError(f"two of the options {list(record.options)} become the same tokens: choose other words")
    texts = record.options or (record.completion,)
    return Example(tuple(pieces[0][0][:shared]), answers, texts.index(record.completion), texts)


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
    prompt = example.prompt[:head] + example.prompt[head + excess :]
    return Example(prompt, example.answers, example.gold, example.texts)


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
        return pad([(e.prompt, e.answers[e.gold]) for e in examples], pad_id, padding_side)
    if any(len(e.answers) < 2 for e in examples):
        raise ZofoError("loss is 'options', but a row has fewer than two: set loss to lm, or give options")
    gold = torch.tensor([e.gold for e in examples])
    if all(len(answer) == 1 for e in examples for answer in e.answers):
        batch = pad([(e.prompt, e.answers[e.gold]) for e in examples], pad_id, padding_side)
        return {**batch, "candidates": _ragged([[a[0] for a in e.answers] for e in examples]), "gold": gold}
    texts = [(e.prompt, answer) for e in examples for answer in e.answers]
    numbers = iter(range(len(texts)))
    rows = _ragged([[next(numbers) for _ in e.answers] for e in examples])
    return {**pad(texts, pad_id, padding_side), "rows": rows, "gold": gold}


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
    answers: Batch  # (R, A - 1), padded on the right: what follows a first token; targets are the tokens after it
    owner: Tensor  # (R,) the prompt of each answer
    first: Tensor  # (R,) the first token of each answer
    rows: Tensor  # (B, J) the answers of each prompt, as in `Batch`


def collate_shared(examples: Sequence[Example], pad_id: int) -> SharedPrompts:
    """Examples for scoring that reads every prompt once, however many options it has."""
    owner = [i for i, example in enumerate(examples) for _ in example.answers]
    answers = [answer for example in examples for answer in example.answers]
    numbers = iter(range(len(answers)))
    return {
        "prompts": pad([(e.prompt, e.answers[e.gold][:1]) for e in examples], pad_id, "left"),
        "answers": pad([(answer[:1], answer[1:]) for answer in answers], pad_id, "right"),
        "owner": torch.tensor(owner),
        "first": torch.tensor([answer[0] for answer in answers]),
        "rows": _ragged([[next(numbers) for _ in e.answers] for e in examples]),
    }


def _ragged(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([line + [NO_CANDIDATE] * (width - len(line)) for line in lists])
