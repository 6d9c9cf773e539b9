"""Generated answers: greedy text, as far as it can be an answer."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from zofo.errors import NonFiniteLossError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import by_length, collate_prompts, padding_id
from zofo.scoring.scorer import Scorer
from zofo.scoring.tokens import Example

Place = Callable[[Any], Any]
Bar = Callable[[list[list[int]]], Iterable[list[int]]]
Near = Callable[[int], AbstractContextManager[None]]

_NEW_TOKENS = 50  # of a generated text, unless a right answer is longer
_ANY = 1 << 30  # line breaks
_MARGIN = 10  # tokens more than the longest right answer: a model may divide the same text into more of them


@dataclass(frozen=True)
class AnswerSpan:
    """How much generated text is an answer, which follows from the right answers.

    Args:
        leading: line breaks before the first word that are skipped: as many as a right answer begins with.
        breaks: line breaks inside an answer.
        tokens: the most that are generated.
        example: one of the right answers: it stands for those that are not known, as its first token may begin in the
            prompt.
    """

    leading: int = 0
    breaks: int = 0
    tokens: int = _NEW_TOKENS
    example: str = field(default="", compare=False)

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The span that holds each right answer of these examples."""
        texts = {text for e in examples for text in (e.texts[e.gold], *e.right)}
        lengths = [len(e.answers[e.gold]) - 1 for e in examples]  # without the end
        long = [text for text in texts if len(text.encode()) >= _NEW_TOKENS]  # no token is shorter than a byte
        if long:
            behind_a_prompt = [f" {text.strip()}" for text in long]
            lengths += [len(ids) for ids in tokenizer(behind_a_prompt, add_special_tokens=False)["input_ids"]]
        longest = max(lengths)
        return cls(
            leading=max(text[: len(text) - len(text.lstrip())].count("\n") for text in texts),
            breaks=max(text.strip().count("\n") for text in texts),
            tokens=longest + _MARGIN if longest > _NEW_TOKENS else _NEW_TOKENS,
            example=examples[0].texts[examples[0].gold],
        )

    @classmethod
    def whole(cls, tokens: int) -> Self:
        """That of texts which are answers as they are, with all their lines."""
        return cls(breaks=_ANY, tokens=tokens)

    @property
    def is_whole(self) -> bool:
        """Whether a generated text is the answer as it is."""
        return self.breaks == _ANY

    def __or__(self, other: Self) -> Self:
        """The span that holds what either holds; whole texts stay as long as they are."""
        if self.is_whole:
            return self
        return type(self)(
            max(self.leading, other.leading),
            max(self.breaks, other.breaks),
            max(self.tokens, other.tokens),
            self.example or other.example,
        )

    def cut(self, text: str) -> str:
        """The answer at the start of a generated text."""
        if self.is_whole:
            return text
        return "\n".join(self._lines(text)[: self.breaks + 1]).strip()

    def is_full(self, text: str) -> bool:
        """Whether no more text can become a part of the answer."""
        return len(self._lines(text)) > self.breaks + 1

    def _lines(self, text: str) -> list[str]:
        lines = text.split("\n")
        skipped = 0
        while skipped < min(self.leading, len(lines) - 1) and not lines[skipped].strip():
            skipped += 1
        return lines[skipped:]


ONE_LINE = AnswerSpan()


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a generated text: the tokenizer's token, and those that the model names, such as the end of a turn."""
    stored: Any = model.generation_config.eos_token_id if model.generation_config else None
    named: list[Any] = stored if isinstance(stored, list) else [stored]
    every: list[Any] = [tokenizer.eos_token_id, *named]
    return list(dict.fromkeys(int(token) for token in every if token is not None))


@torch.no_grad()
def generate(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    span: AnswerSpan,
    batch_size: int,
    place: Place = lambda batch: batch,
    bar: Bar = lambda batches: batches,
    copies: int = 1,
    near: Near = nullcontext,
) -> list[str]:
    """The greedy text of each example, as far as it can be an answer; with `copies`, those of each copy in turn.

    `place` moves a batch to the model's device; `bar` shows the progress over the batches. All copies of a batch are
    generated together: copy after copy in the rows of a forward, inside `near`, which is told the rows of one copy.

    Raises:
        NonFiniteLossError: if logits are nan.
    """
    adapted = scorer.adapted
    model: Any = adapted.model
    texts: dict[tuple[int, int], str] = {}
    size = 1 if scorer.generates_alone else batch_size
    batches = [*_with_room(examples, by_length(examples, size, "lm"), adapted.positions)]
    for indices in bar(batches):
        batch = place(collate_prompts([examples[i] for i in indices] * copies, padding_id(tokenizer)))
        ids = batch["input_ids"]
        config = GenerationConfig(
            max_new_tokens=max(1, min(span.tokens, adapted.positions - ids.shape[1])),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(adapted.base, tokenizer),
        )
        ends = [] if span.is_whole else [_AnswerEnds(tokenizer, span, ids.shape[1])]
        with near(len(indices)), _plain_generation(adapted):
            output = model.generate(
                input_ids=ids, attention_mask=batch["attention_mask"], generation_config=config,
                stopping_criteria=StoppingCriteriaList(ends), logits_processor=LogitsProcessorList([_Numbers()]),
            )  # fmt: skip
        scorer.tokens.forward_tokens += int(batch["attention_mask"].sum()) + output[:, ids.shape[1] + 1 :].numel()
        answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        places = [(copy, i) for copy in range(copies) for i in indices]
        texts.update({place: span.cut(text) for place, text in zip(places, answers, strict=True)})
    return [texts[copy, i] for copy in range(copies) for i in range(len(examples))]


def room_wanted(example: Example) -> int:
    """The positions that an answer takes after its prompt: its last token is generated, but not read."""
    return len(example.answers[example.gold]) - 1


def _with_room(examples: Sequence[Example], batches: Sequence[list[int]], positions: int) -> Generator[list[int]]:
    """The batches; an example for whose answer the padding of its batch leaves no room goes alone."""
    for batch in batches:
        room = positions - max(len(examples[i].prompt) for i in batch)
        alone = [i for i in batch if room_wanted(examples[i]) > room]
        together = [i for i in batch if i not in alone]
        yield from [together] if together else []
        yield from ([i] for i in alone)


class _Numbers(LogitsProcessor):
    """Refuses logits that are nan, of which the greedy token is any, so that a broken model would seem to answer."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if scores.isnan().any():
            raise NonFiniteLossError(
                "the logits of generated tokens are nan: lower the learning rates or zo_eps, or set dtype: float32; in "
                "a run on_nonfinite: skip passes over such a step"
            )
        return scores


class _AnswerEnds(StoppingCriteria):
    """Ends the generation of each text of which no more can become a part of an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, span: AnswerSpan, start: int) -> None:
        self._tokenizer, self._span, self._start = tokenizer, span, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        texts: list[str] = self._tokenizer.batch_decode(input_ids[:, -1:])
        if any("\n" in text for text in texts):  # only a line break can end a text
            texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([self._span.is_full(text) for text in texts], device=input_ids.device)


@contextmanager
def _plain_generation(adapted: AdaptedModel) -> Generator[None]:
    """Within the block, the model's own generation settings (penalties, beams) are not used."""
    stored, adapted.base.generation_config = adapted.base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        adapted.base.generation_config = stored
