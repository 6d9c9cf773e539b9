"""What stands around a record before a model reads it: examples in context, the order of channel scoring, a chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.tasks.records import Record

SEPARATOR = "\n\n"


def demonstrations(pool: Sequence[Record], shots: int, seed: int, test: Sequence[Record] = ()) -> list[Record]:
    """Examples to show in context: a seeded choice, never one that is asked about.

    Args:
        pool: training rows.
        shots: how many.
        seed: of the choice.
        test: the rows that are asked about.

    Raises:
        ZofoError: if the pool holds too few.

    Examples:
        >>> pool = [Record(f"{i} is", " a number") for i in range(9)]
        >>> len(demonstrations(pool, 3, seed=0))
        3
    """
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
    """Puts worked examples in front of each record: as many as fit, the last ones first.

    Args:
        records: to be asked.
        shown: the examples, each with its right answer.
        tokenizer: to count tokens.
        max_length: tokens of all together; the length of the parts is taken for the length of the whole.

    Returns:
        The records, and how many examples each of them got.
    """
    blocks = [f"{record.prompt}{record.completion}{record.suffix}{SEPARATOR}" for record in shown]
    sizes = [len(tokenizer(block)["input_ids"]) for block in blocks]
    made: list[Record] = []
    used: list[int] = []
    for record in records:
        longest = max((record.options or (record.completion,)), key=len)
        room = max_length - 1 - len(tokenizer(record.prompt + longest + record.suffix)["input_ids"])
        count = 0
        while count < len(blocks) and sum(sizes[len(blocks) - count - 1 :]) <= room:
            count += 1
        made.append(dataclasses.replace(record, prompt="".join(blocks[len(blocks) - count :]) + record.prompt))
        used.append(count)
    return made, used


def behind_premise(record: Record) -> Record:
    """The record without what is asked: what a calibrated score compares with."""
    return dataclasses.replace(record, prompt=record.premise)


def as_channel(record: Record) -> Record:
    """The record turned around: each option first, and then the prompt, which alone is scored.

    Raises:
        ZofoError: if there is nothing to turn around.

    Examples:
        >>> turned = as_channel(Record("A fine film.", " great", (" bad", " great")))
        >>> (turned.prompt + turned.completion + turned.suffix).splitlines()
        ['great', 'A fine film.']

    References:
        S. Min et al., "Noisy Channel Language Model Prompting for Few-Shot Text Classification" (2022).
    """
    if not record.options or record.suffix:
        raise ZofoError("channel scoring turns options around: it needs some, without a text behind them")
    options = tuple(f"{option.strip()}\n" for option in record.options)
    completion = options[record.options.index(record.completion)]
    references = tuple(f"{text.strip()}\n" for text in record.references)
    return dataclasses.replace(
        record, prompt="", completion=completion, options=options, references=references, suffix=record.prompt,
        partial=True,
    )  # fmt: skip


def as_chat(record: Record, tokenizer: PreTrainedTokenizerBase, system: str | None) -> Record:
    """The prompt as a user's turn in the model's own chat format; the answer is the assistant's.

    Args:
        record: as text.
        tokenizer: with a chat template.
        system: what the system says, or None for what the template says by itself.

    Raises:
        ZofoError: if the tokenizer has no chat template, or it refuses these turns.
    """
    if not tokenizer.chat_template:
        raise ZofoError(
            "chat_template is true, but this model's tokenizer has none: leave it out, or take a chat model"
        )
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": record.prompt.rstrip()})
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ZofoError(
            f"the model's chat template refuses this ({error}): leave out system_prompt, or chat_template"
        ) from error
    start = tokenizer.bos_token  # the tokenizer adds it itself
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return dataclasses.replace(
        record,
        prompt=text.removeprefix(start) if start and adds else text,
        completion=record.completion.lstrip(),
        options=tuple(option.lstrip() for option in record.options),
        references=tuple(reference.lstrip() for reference in record.references),
    )
