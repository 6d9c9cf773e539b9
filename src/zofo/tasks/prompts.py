"""Changes to a record before a model reads it: examples in context, the order of channel scoring, a chat format."""

import dataclasses
import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Self

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError, first_line
from zofo.tasks.conversations import Turn
from zofo.tasks.records import Conversation, Record

SEPARATOR = "\n\n"


def demonstrations(pool: Sequence[Record], shots: int, seed: int, test: Sequence[Record] = ()) -> list[Record]:
    """A seeded choice of `shots` training rows to show in context, without those that are in `test` as well."""
    asked = {record.identity for record in test}
    free = [record for record in pool if record.identity not in asked]
    if shots > len(free):
        raise ZofoError(
            f"{shots} examples are wanted in context, but there are {len(free)} training rows: ask for fewer"
        )
    chosen = np.random.default_rng(seed).choice(len(free), size=shots, replace=False)
    return [free[i] for i in chosen]


def in_context(
    records: Sequence[Record], shown: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Record], list[int]]:
    """Puts examples with their answers before each record: as many of the last ones as fit into `max_length` tokens.

    The length of the whole is estimated as the sum of the lengths of its parts. Returns the records, and the number of
    examples before each of them.
    """
    blocks = _blocks(shown, tokenizer)
    return _behind(records, [blocks] * len(records), tokenizer, max_length)


def in_context_of_each_other(
    records: Sequence[Record],
    pool: Sequence[Record],
    shots: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Record], list[int]]:
    """Puts before each record `shots` others that are drawn for it from `pool`, as `in_context` does (MetaICL).

    A draw depends on `seed`, on the record and on which rows the pool holds, and not on any order. No record is in
    front of itself, nor in front of one of its group.

    Args:
        records: rows of the pool, or other ones.
        pool: the training rows of their task.
        shots: examples before each record, of which the last ones stay if not all fit.
        seed: of the draws.
        tokenizer: counts tokens.
        max_length: tokens of a record with its examples.

    Returns:
        The records, and the number of examples before each of them.

    Raises:
        ZofoError: if the pool has fewer than `shots` other rows for a record.

    References:
        S. Min et al., "MetaICL: Learning to Learn In Context" (2022).
    """
    pool = sorted(pool, key=lambda record: (repr(record.identity), record.completion))
    blocks = _blocks(pool, tokenizer)
    owners = [_owner(record) for record in pool]
    own = Counter(owners)
    chosen: list[list[_Block]] = []
    for record in records:
        owner = _owner(record)
        if shots > len(pool) - own[owner]:
            raise ZofoError(
                f"{shots} examples are wanted in context, but there are {len(pool) - own[owner]} other training rows: "
                "ask for fewer"
            )
        drawn = _random(record, seed).choice(len(pool), size=shots + own[owner], replace=False)
        chosen.append([blocks[i] for i in drawn if owners[i] != owner][:shots])
    return _behind(records, chosen, tokenizer, max_length)


@dataclass(frozen=True)
class _Block:
    """An example as it stands in front of a row, and the number of its tokens."""

    text: str
    tokens: int


def _blocks(shown: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[_Block]:
    texts = [f"{record.prompt}{record.completion}{record.suffix}{SEPARATOR}" for record in shown]
    return [_Block(text, tokens) for text, tokens in zip(texts, _lengths(texts, tokenizer), strict=True)]


def _behind(
    records: Sequence[Record], shown: Sequence[list[_Block]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Record], list[int]]:
    """Each record behind as many of the last of its blocks as fit, and how many these are."""
    longest = [max((record.options or (record.completion,)), key=len) for record in records]
    texts = [record.prompt + answer + record.suffix for record, answer in zip(records, longest, strict=True)]
    prompted: list[Record] = []
    counts: list[int] = []
    for record, blocks, length in zip(records, shown, _lengths(texts, tokenizer), strict=True):
        totals = list(accumulate(block.tokens for block in reversed(blocks)))  # of the last ones
        count = bisect_right(totals, max_length - 1 - length)
        prompt = "".join(block.text for block in blocks[len(blocks) - count :]) + record.prompt
        prompted.append(dataclasses.replace(record, prompt=prompt, question=record.identity))
        counts.append(count)
    return prompted, counts


def _lengths(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: Any = tokenizer([*texts])["input_ids"] if texts else []
    return [len(tokens) for tokens in ids]


def _owner(record: Record) -> tuple[Any, ...]:
    """Equal for rows that may not be examples for each other."""
    return (record.group,) if record.group else record.identity


def _random(record: Record, seed: int) -> np.random.Generator:
    """A generator for the draws of one record."""
    text = repr((seed, record.identity)).encode(errors="surrogatepass")
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest()))


def tokens_of_chat(record: Record, tokenizer: PreTrainedTokenizerBase, system: str | None) -> int:
    """How many tokens the chat format adds to a prompt: the system's words, earlier turns and the marks of turns."""
    whole = tokenizer(as_chat(record, tokenizer, system).prompt, add_special_tokens=False)["input_ids"]
    return len(whole) - len(tokenizer(record.prompt)["input_ids"])


def behind_premise(record: Record) -> Record:
    """The record with its premise as prompt, whose score a calibrated score subtracts."""
    return dataclasses.replace(record, prompt=record.premise)


def as_channel(record: Record) -> Record:
    """The record in reverse order: each option first, and then the prompt, which alone is scored.

    S. Min et al., "Noisy Channel Language Model Prompting for Few-Shot Text Classification" (2022).
    """
    if not record.options or record.suffix:
        raise ZofoError("channel scoring turns options around: it needs some, without a text after them")
    options = tuple(f"{option.strip()}\n" for option in record.options)
    completion = options[record.options.index(record.completion)]
    references = tuple(f"{text.strip()}\n" for text in record.references)
    return dataclasses.replace(
        record, prompt="", completion=completion, options=options, references=references, suffix=record.prompt,
        partial=True, question=record.identity,
    )  # fmt: skip


@dataclass(frozen=True)
class Chat(Conversation):
    """A record whose prompt is a whole chat, with its special tokens, around `said`, the words of the user's turn."""

    said: str = ""
    rendered: Callable[[str], str] = field(default=str, compare=False, repr=False)  # the chat around other words

    @property
    def asked(self) -> str:
        return self.said

    def saying(self, said: str) -> Self:
        """The same chat with other words in the user's turn."""
        return dataclasses.replace(self, prompt=self.rendered(said), said=said)


def as_chat(record: Record, tokenizer: PreTrainedTokenizerBase, system: str | None) -> Chat:
    """The prompt as a user's turn in the model's own chat format, after its earlier turns, if it has some.

    In front of them is a system turn, if `system` is given and the record has none of its own.
    """
    if not tokenizer.chat_template:
        raise ZofoError(
            "chat_template is true, but this model's tokenizer has none: leave it out, or take a chat model"
        )
    earlier = record.earlier if isinstance(record, Conversation) else ()
    if system is not None and not any(role == "system" for role, _ in earlier):
        earlier = (("system", system), *earlier)
    chat = Chat(**vars(record), rendered=partial(_rendered, tokenizer, earlier)).saying(record.prompt.rstrip())
    return dataclasses.replace(
        chat,
        completion=record.completion.lstrip(),
        options=tuple(option.lstrip() for option in record.options),
        references=tuple(reference.lstrip() for reference in record.references),
    )


def chat_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A short hash of the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()[:16]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template by which `apply_chat_template` writes a chat without tools."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ZofoError(
            "this model's tokenizer has several chat templates, but none that is called default: rename one of them, "
            "or leave chat_template out"
        ) from error


def _rendered(tokenizer: PreTrainedTokenizerBase, earlier: Sequence[Turn], said: str) -> str:
    """A chat in which the user says this, after earlier turns, and the model is to answer."""
    turns = [{"role": role, "content": words} for role, words in (*earlier, ("user", said))]
    template = _template(tokenizer)
    try:
        text: Any = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ZofoError(
            f"the model's chat template refuses this ({error}): leave out system_prompt or the system turn, or "
            "chat_template"
        ) from error
    except Exception as error:  # a template can fail in any way
        raise ZofoError(
            f"the model's chat template fails ({type(error).__name__}: {first_line(error)[:200]}): leave chat_template "
            "out, or mend it"
        ) from error
    return text
