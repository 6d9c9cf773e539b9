"""Where the rows of a batch are padded: what a model does with padding is measured at the start."""

from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zofo.errors import FORWARD_ERRORS, ZofoError, in_one_line, is_lack_of_memory
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import Batch, Layout, collate, padding_id
from zofo.scoring.scorer import Scorer, Tokens, widest_layout
from zofo.scoring.tokens import Example

_PROMPTS = (3, 10)  # tokens
_ANSWERS = (2, 4)


@torch.no_grad()
def probe(adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout of rows of text with which a padded batch has the scores of each row alone.

    It is the first exact one of: options side by side and padding on the left, padding on the left, padding on the
    right. Some models ignore the attention mask, or count positions from the left end of a row; behind a text, padding
    is exact for every causal model, as nothing that is scored reads it. Random tokens of a fixed seed are scored in
    each layout, and by plain forward passes of one row, in eval mode. With virtual tokens rows are always padded on
    the right, and this is probed as well; the layout is then that of the backbone alone.

    Effects of more than the dozen tokens of such rows are not seen. A model for which no layout is exact is refused,
    and so is one that reads the tokens behind those which it predicts, such as an encoder.
    """
    adapted.model.eval()
    devices = [adapted.base.device] if adapted.base.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # some models draw random numbers even in eval mode
        if not adapted.prompt_learning:
            return _first_exact(adapted, tokenizer, _candidates(adapted))
        _first_exact(adapted, tokenizer, [Layout("right")])
        with adapted.without_adapter():
            return _first_exact(adapted, tokenizer, _candidates(adapted))


def _candidates(adapted: AdaptedModel) -> list[Layout]:
    return [*dict.fromkeys((widest_layout(adapted), Layout("left"), Layout("right")))]


def _first_exact(adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, layouts: list[Layout]) -> Layout:
    examples = _random_examples(adapted, tokenizer)
    try:
        alone = torch.cat([_alone(adapted, e.prompt, answer) for e in examples for answer in e.answers])
    except FORWARD_ERRORS as error:
        if is_lack_of_memory(error):
            raise
        raise ZofoError(
            f"this {adapted.base.config.model_type} model cannot score token ids alone "
            f"({in_one_line(error, 200)}): choose another model"
        ) from error
    _require_causal(adapted, examples[0], alone)
    for layout in layouts:
        if _is_exact(alone, _in_a_batch(adapted, tokenizer, examples, layout), adapted.base.dtype):
            return layout
    raise ZofoError(
        f"what this {adapted.base.config.model_type} model says of a row depends on the padding or on the other rows "
        "of its batch, on the left and on the right, so no loss would be right: choose another model"
    )


def _require_causal(adapted: AdaptedModel, example: Example, alone: Tensor) -> None:
    """Refuses a model whose scores depend on what follows: transformers loads encoders as causal models, too.

    `alone` holds the log-probabilities of all answers of the example, and of others behind them.
    """
    first, (*before, changed, last) = example.answers
    other = next((token for token in (*example.prompt, *before) if token != changed), last)
    followed = alone.clone()
    part = slice(len(first), len(first) + len(before))
    followed[part] = _alone(adapted, example.prompt, (*before, other, last))[: len(before)]
    if not _is_exact(alone, followed, adapted.base.dtype):
        raise ZofoError(
            f"this {adapted.base.config.model_type} model reads the tokens behind those that it predicts, as an "
            "encoder does, so its scores would know the answers: choose a causal language model"
        )


def random_batch(adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> Batch:
    """Rows of random tokens on which a step can be tried: three examples of different lengths."""
    return collate(_random_examples(adapted, tokenizer, (*_PROMPTS, 5)), "options", padding_id(tokenizer), layout)


def _random_examples(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[int] = _PROMPTS
) -> list[Example]:
    """Short and longer prompts, each with options of two lengths, of ids that have no special meaning."""
    special = tokenizer.all_special_ids
    ordinary = [i for i in range(min(len(tokenizer), 1000)) if i not in special]
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        drawn = torch.randint(len(ordinary), (count,), generator=generator).tolist()
        return tuple(ordinary[i] for i in drawn)

    room = max(1, adapted.positions - max(_ANSWERS))
    texts = tuple(map(str, _ANSWERS))
    return [Example(ids(min(count, room)), tuple(map(ids, _ANSWERS)), 0, texts) for count in prompts]


def _alone(adapted: AdaptedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """The log-probability of each token of an answer, by a plain forward pass."""
    ids = torch.tensor([prompt + answer], device=adapted.base.device)
    logits = adapted.model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(answer) :]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def _in_a_batch(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], layout: Layout
) -> Tensor | None:
    """The same log-probabilities from one batch; None where the model cannot read it."""
    scorer = Scorer(adapted, Tokens(), layout)
    batch = collate(examples, "options", padding_id(tokenizer), scorer.layout)
    try:
        return scorer.log_probabilities(send_to_device(batch, adapted.base.device))
    except FORWARD_ERRORS as error:
        if is_lack_of_memory(error):
            raise
        return None


def _is_exact(alone: Tensor, batched: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether two vectors of log-probabilities differ by rounding only, which is far below √eps of their spread.

    What is not finite alone, such as in float16, shows nothing.
    """
    known = alone.isfinite()
    if batched is None or not known.any():
        return batched is not None
    error = (alone - batched)[known].square().mean().sqrt()
    return bool(error <= torch.finfo(dtype).eps ** 0.5 * alone[known].std(correction=0))
