"""Examples to one batch: as few tokens as the options allow, logits only where they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, Self, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.scoring.tokens import Example, LossKind

UNLIMITED = 1 << 30  # tokens of a row
PROMPT = 1  # the segment of the tokens that all options of a row read
# comparing so many pairs of positions costs less than one token in the rest of a model of 200 or more hidden units
_PAIRS_PER_TOKEN = 1000


class Batch(TypedDict):
    """Rows for one forward pass: R rows of S tokens, in which N tokens are scored.

    The columns of `scored` are (row, position, token): the token that this position must predict. Of B examples with
    at most J options, `slots[b, j]` are the columns of option j, padded by -1, and `gold[b]` is the right option.
    Where several options are in one row, `segments` is 1 for the prompt, another number for each option, and 0 for
    padding.
    """

    input_ids: Tensor  # (R, S)
    attention_mask: Tensor  # (R, S)
    scored: Tensor  # (3, N)
    segments: NotRequired[Tensor]  # (R, S)
    slots: NotRequired[Tensor]  # (B, J, A)
    gold: NotRequired[Tensor]  # (B,)
    examples: NotRequired[Sequence[Example]]  # of the B, where a metric is computed of them


@dataclass(frozen=True)
class Layout:
    """How the rows of a model's batches are laid out."""

    side: Literal["left", "right"] = "left"  # of the padding: "left" keeps answers together, "right" suits any model
    max_width: int = 0  # the most tokens of a row with several longer options; 0: a row for each option


@dataclass(frozen=True)
class _Row:
    """A prompt and some of its answers, each without its last token, which is predicted but not read."""

    ids: list[int]
    segments: list[int]
    scored: list[list[tuple[int, int]]]  # of each answer: (position, token)

    @classmethod
    def of(cls, example: Example, options: Sequence[int]) -> Self:
        ids, segments = list(example.prompt), [PROMPT] * len(example.prompt)
        scored: list[list[tuple[int, int]]] = []
        for option in options:
            answer, unscored = example.answers[option], example.unscored[option] if example.unscored else 0
            positions = [len(example.prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            scored.append(list(zip(positions, answer, strict=True))[unscored:])
            ids += answer[:-1]
            segments += [option + 1 + PROMPT] * (len(answer) - 1)
        return cls(ids, segments, scored)


def with_examples(examples: Sequence[Example], kind: LossKind, pad_id: int, layout: Layout) -> Batch:
    """The same as `collate`, with the examples themselves."""
    return {**collate(examples, kind, pad_id, layout), "examples": list(examples)}


def collate(examples: Sequence[Example], kind: LossKind, pad_id: int, layout: Layout = Layout()) -> Batch:
    """Examples to one batch: one forward pass gives the loss, or the scores of all options.

    `kind` is "lm" (only the right answer) or "options"; `layout` is that of the model's `Scorer`. Options of one token
    each share one row. Longer ones do so if the layout allows it and if it costs less: the prompt is read only once,
    but attention compares all options with each other.
    """
    if kind == "lm":
        return _pad([_Row.of(e, [e.gold]) for e in examples], pad_id, layout.side)
    if any(len(e.answers) < 2 for e in examples):
        raise ZofoError("loss is 'options', but a row has fewer than two: set loss to lm, or give options")
    longer = any(answer_tokens(e) for e in examples)
    side_by_side = longer and _pays(examples, layout)
    if longer and not side_by_side:
        rows = [_Row.of(e, [j]) for e in examples for j in range(len(e.answers))]
    else:
        rows = [_Row.of(e, range(len(e.answers))) for e in examples]
    batch = _pad(rows, pad_id, layout.side, segments=side_by_side)
    columns = torch.arange(batch["scored"].shape[1]).split([len(option) for row in rows for option in row.scored])
    options = pad_sequence(list(columns), batch_first=True, padding_value=-1)
    slots = pad_sequence(list(options.split([len(e.answers) for e in examples])), batch_first=True, padding_value=-1)
    return {**batch, "slots": slots, "gold": torch.tensor([e.gold for e in examples])}


def collate_prompts(examples: Sequence[Example], pad_id: int) -> Batch:
    """The prompts alone, for text generation."""
    return _pad([_Row.of(e, []) for e in examples], pad_id, "left")


def answer_tokens(example: Example) -> int:
    """The number of tokens of all answers that are read: the last token of each is only predicted."""
    return sum(len(answer) - 1 for answer in example.answers)


def width(example: Example, kind: LossKind) -> int:
    """The number of tokens that are read of an example: with all its options, or with the right answer."""
    answers = answer_tokens(example) if kind == "options" else len(example.answers[example.gold]) - 1
    return len(example.prompt) + answers


def stack(batches: Sequence[Batch], side: Literal["left", "right"]) -> Batch:
    """The rows of several batches as one, without `gold` and `slots`."""
    max_width = max(batch["input_ids"].shape[1] for batch in batches)

    def widened(tensors: Sequence[Tensor]) -> Tensor:
        missing = [max_width - tensor.shape[1] for tensor in tensors]
        sides = [(n, 0) if side == "left" else (0, n) for n in missing]
        # the ids of masked positions do not matter
        return torch.cat([functional.pad(tensor, pad) for tensor, pad in zip(tensors, sides, strict=True)])

    first_row, scored = 0, list[Tensor]()
    for batch in batches:
        rows, batch_width = batch["input_ids"].shape
        offset = (first_row, max_width - batch_width if side == "left" else 0, 0)
        scored.append(batch["scored"] + batch["scored"].new_tensor(offset)[:, None])
        first_row += rows
    stacked: Batch = {
        "input_ids": widened([batch["input_ids"] for batch in batches]),
        "attention_mask": widened([batch["attention_mask"] for batch in batches]),
        "scored": torch.cat(scored, dim=1),
    }
    if any("segments" in batch for batch in batches):
        stacked["segments"] = widened([batch.get("segments", batch["attention_mask"]) for batch in batches])
    return stacked


def share(batch: Batch, number: int, of: int) -> Batch:
    """Part `number` of a batch whose examples are divided into `of` parts, one after the other, as equal as can be."""
    if of == 1:
        return batch
    gold, slots, scored = batch.get("gold"), batch.get("slots"), batch["scored"]
    examples = len(batch["input_ids"] if gold is None else gold)
    low, high = (examples * part // of for part in (number, number + 1))
    if slots is None:
        inside = (scored[0] >= low) & (scored[0] < high)
    else:
        columns = torch.arange(scored.shape[1], device=scored.device)
        own = slots[low:high]
        inside = (columns >= own[own >= 0].min()) & (columns <= own.max())
    columns = inside.nonzero()[:, 0]
    first, last = int(scored[0, columns[0]]), int(scored[0, columns[-1]]) + 1
    part: Batch = {
        "input_ids": batch["input_ids"][first:last],
        "attention_mask": batch["attention_mask"][first:last],
        "scored": scored[:, columns] - scored.new_tensor((first, 0, 0))[:, None],
    }
    if "segments" in batch:
        part["segments"] = batch["segments"][first:last]
    if slots is not None and gold is not None:
        own = slots[low:high]
        part["slots"], part["gold"] = torch.where(own >= 0, own - columns[0], own), gold[low:high]
    return part


def parts(batch: Batch, tokens: int) -> list[Batch]:
    """A batch in parts of whole examples, each with at most about so many tokens, padding included."""
    examples = len(batch.get("gold", batch["input_ids"]))
    of = min(examples, max(1, -(-batch["input_ids"].numel() // tokens)))
    return [share(batch, number, of) for number in range(of)]


def apart(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch as a batch of its own, without padding, `gold` and `slots`; `scored` is ordered by rows."""
    for number, mask in enumerate(batch["attention_mask"]):
        used = mask.nonzero()[:, 0]
        start, end = int(used[0]), int(used[-1]) + 1
        scored = batch["scored"][:, batch["scored"][0] == number]
        yield {
            "input_ids": batch["input_ids"][number : number + 1, start:end],
            "attention_mask": batch["attention_mask"][number : number + 1, start:end],
            "scored": scored - scored.new_tensor((number, start, 0))[:, None],
        }


def _pays(examples: Sequence[Example], layout: Layout) -> bool:
    """Whether all options of each example fit into one row, and this costs less than a row for each option."""
    max_width = max(width(e, "options") for e in examples)
    apart = _cost(sum(len(e.answers) for e in examples), max(e.length for e in examples) - 1)
    return max_width <= layout.max_width and _cost(len(examples), max_width) < apart


def _cost(rows: int, width: int) -> int:
    """The cost of a forward pass, in pairs of positions that attention compares."""
    return rows * width * (width + _PAIRS_PER_TOKEN)


def _pad(rows: Sequence[_Row], pad_id: int, side: str, segments: bool = False) -> Batch:
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], True, pad_id, side)
    marks = pad_sequence([torch.tensor(row.segments) for row in rows], True, 0, side)
    scored: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        start = ids.shape[1] - len(row.ids) if side == "left" else 0
        scored += [(i, start + position, token) for option in row.scored for position, token in option]
    batch: Batch = {
        "input_ids": ids,
        "attention_mask": (marks > 0).long(),
        "scored": torch.tensor(scored, dtype=torch.long).reshape(-1, 3).T,
    }
    return {**batch, "segments": marks} if segments else batch


def by_length(examples: Sequence[Example], batch_size: int, kind: LossKind) -> list[list[int]]:
    """The indices of the examples in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: width(examples[i], kind))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding, which every tokenizer that `load_model` gives has."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id
