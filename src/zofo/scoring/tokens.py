"""Text to tokens: no token boundary is guessed, and no answer is truncated."""

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations, takewhile
from typing import Any, Literal

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.tasks.prompts import Chat
from zofo.tasks.records import Conversation, Record

logger = logging.getLogger(__name__)

LossKind = Literal["options", "lm"]


@dataclass(frozen=True)
class Example:
    """One record as token ids."""

    prompt: tuple[int, ...]  # up to the first token that contains a part of an answer
    answers: tuple[tuple[int, ...], ...]  # of each option, or of the one answer
    gold: int  # the index of the right answer
    texts: tuple[str, ...]  # of the answers
    unscored: tuple[int, ...] = ()  # how many first tokens of each option are not scored (partial evaluation)
    references: tuple[str, ...] = ()  # all right answers, with that of `gold`
    group: str = ""
    truncated: bool = False  # whether the prompt is shorter than what the record says
    record: Record | None = field(default=None, compare=False, repr=False)  # that it was made from

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with answer."""
        return len(self.prompt) + max(map(len, self.answers))

    @property
    def right(self) -> tuple[str, ...]:
        return self.references or (self.texts[self.gold],)


def tokenize(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], int]:
    """Tokenizes prompt and answer together, and cuts by character offsets.

    A token that reaches across the boundary belongs to the answer, so no boundary is guessed. Long prompts are
    truncated from the left, except for special tokens at their start; answers are never truncated. An empty prompt
    becomes the token that starts a text, or that ends one if the tokenizer has no other.

    The prompt of a chat has exactly the tokens of `apply_chat_template(..., tokenize=True)`; a long one loses the
    beginning of the user's words, and keeps its other turns and the marks of all turns.

    Returns the examples, with at most `max_length` tokens each, and how many of them were truncated.
    """
    whole = _examples(records, tokenizer)
    _warn_of_prefixes(whole)
    pairs = zip(records, whole, strict=True)
    truncated = [_truncate(record, example, max_length, tokenizer) for record, example in pairs]
    return truncated, sum(example.truncated for example in truncated)


def _examples(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The records at their full length; the tokenizer is called once for all of them."""
    answered = [(record, answer) for record in records for answer in record.options or (record.completion,)]
    chats = [(record, answer) for record, answer in answered if isinstance(record, Chat)]
    assert len(chats) in (0, len(answered)), "the records of a set are put to the model in one way"
    if not chats and any(isinstance(record, Conversation) for record in records):
        raise ZofoError("rows with messages need the model's chat format: set chat_template: true")
    pieces = iter(_chat_pieces(chats, tokenizer) if chats else _plain_pieces(answered, tokenizer))
    return [_join(record, [next(pieces) for _ in record.options or (record.completion,)]) for record in records]


def _plain_pieces(answered: Sequence[tuple[Record, str]], tokenizer: PreTrainedTokenizerBase) -> list["_Piece"]:
    encodings: Any = tokenizer([r.prompt + answer + r.suffix for r, answer in answered]).encodings
    return [_cut(r, text, encoding, tokenizer) for (r, text), encoding in zip(answered, encodings, strict=True)]


def _chat_pieces(answered: Sequence[tuple[Chat, str]], tokenizer: PreTrainedTokenizerBase) -> list["_Piece"]:
    """The prompts as they are tokenised alone; then the tokens by which an answer continues them."""

    def encoded(texts: list[str]) -> Any:
        return tokenizer(texts, add_special_tokens=False).encodings

    prompts = list(dict.fromkeys(chat.prompt for chat, _ in answered))
    ids_of_prompt = {prompt: encoding.ids for prompt, encoding in zip(prompts, encoded(prompts), strict=True)}
    wholes = encoded([chat.prompt + answer + chat.suffix for chat, answer in answered])
    pieces: list[_Piece] = []
    for (chat, answer), whole in zip(answered, wholes, strict=True):
        prompt: list[int] = ids_of_prompt[chat.prompt]
        before = len(chat.prompt)
        if whole.ids[: len(prompt)] != prompt:  # a token lies across the boundary; the model reads the prompt as it is
            (whole,) = encoded([answer + chat.suffix])
            before = 0
        start = len(prompt) if before else 0
        unscored = _first_after(whole, before + len(answer)) - start if chat.partial else 0
        pieces.append(_Piece(prompt, whole.ids[start:] + _end(chat, tokenizer), unscored))
    return pieces


@dataclass(frozen=True)
class _Piece:
    """The tokens of one prompt with one answer, whose first `unscored` tokens are not scored."""

    prompt: list[int]
    answer: list[int]
    unscored: int


def _cut(record: Record, answer: str, encoding: Encoding, tokenizer: PreTrainedTokenizerBase) -> _Piece:
    ids = encoding.ids
    while encoding.special_tokens_mask[len(ids) - 1]:  # special tokens at the end of a text are no part of an answer
        ids = ids[:-1]

    start = _first_after(encoding, len(record.prompt))
    unscored = _first_after(encoding, len(record.prompt + answer)) - start if record.partial else 0
    # models of the GPT-2 family separate texts by the token that ends them
    first: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return _Piece(ids[:start] or ([] if record.prompt else [first]), ids[start:] + _end(record, tokenizer), unscored)


def _first_after(encoding: Encoding, boundary: int) -> int:
    """The index of the first token that contains a character behind the boundary."""
    return next(i for i, (_, end) in enumerate(encoding.offsets) if end > boundary)


def _end(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What follows an answer: generation learns to end; options need not."""
    if record.options:
        return []
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ZofoError(
            "the tokenizer has no eos_token, by which a generated answer ends: give it one, or give options"
        )
    return [end]


def _join(record: Record, pieces: list[_Piece]) -> Example:
    """One prompt for all options: the tokens that these have in common before the first answer."""
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
        unscored=tuple(len(piece.prompt) - shared + piece.unscored for piece in pieces) if record.partial else (),
        references=record.references,
        group=record.group,
        record=dataclasses.replace(record, rendered=str) if isinstance(record, Chat) else record,  # no tokenizer in it
    )


def _warn_of_prefixes(examples: Sequence[Example]) -> None:
    """Logs a warning if an option is a prefix of another: its tokens are then scored in both."""
    prefixes = [
        (i, shorter, longer)
        for i, example in enumerate(examples)
        for shorter, longer in permutations(range(len(example.answers)), 2)  # different ones, as `_join` has seen to
        if example.answers[longer][: len(example.answers[shorter])] == example.answers[shorter]
    ]
    if prefixes:
        i, shorter, longer = prefixes[0]
        texts = examples[i].texts
        logger.warning(
            "%d of %d rows have an option that is the beginning of another (row %d: %r and %r): their scores "
            "differ only by the remaining tokens; a text after both, such as a full stop, tells them apart",
            len({i for i, *_ in prefixes}), len(examples), i + 1, texts[shorter], texts[longer],
        )  # fmt: skip


def _truncate(record: Record, example: Example, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    excess = example.length - max_length
    if excess <= 0:
        return example
    if isinstance(record, Chat):
        return _truncate_chat(record, example, max_length, tokenizer)
    special = sum(1 for _ in takewhile(tokenizer.all_special_ids.__contains__, example.prompt))
    if excess > len(example.prompt) - special - 1:
        behind, texts = (", with the text behind it,", "texts") if record.suffix else ("", "answers")
        raise ZofoError(
            f"an answer of {example.length - len(example.prompt)} tokens{behind} leaves no room for a prompt in "
            f"max_length {max_length}: raise max_length, or shorten the {texts}"
        )
    shorter = example.prompt[:special] + example.prompt[special + excess :]
    return dataclasses.replace(example, prompt=shorter, truncated=True)


def _truncate_chat(chat: Chat, example: Example, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The chat with as much of the end of the user's words as fits."""

    def made(start: int) -> Example:
        (cut,) = _examples([chat.saying(chat.said[start:])], tokenizer)
        return dataclasses.replace(cut, truncated=True)

    encodings: Any = tokenizer(chat.said, add_special_tokens=False).encodings
    starts = [*sorted({start for start, _ in encodings[0].offsets} | {0}), len(chat.said)]
    # as if every token of the words were a token of the chat
    first = bisect_left(starts, True, key=lambda start: made(start).length <= max_length)
    if first == len(starts):
        raise ZofoError(
            f"max_length {max_length} is too short for the chat even without the user's words (the longest answer has "
            f"{example.length - len(example.prompt)} tokens): raise max_length, or shorten system_prompt, the earlier "
            "turns or the answers"
        )
    shortest = made(starts[first])
    if shortest.length == max_length:
        return shortest
    nearest = range(starts[max(0, first - 2)], starts[first])  # within a token: a part can have fewer tokens
    fitting = [example for start in nearest if (example := made(start)).length <= max_length]
    return max([*fitting, shortest], key=lambda example: example.length)
