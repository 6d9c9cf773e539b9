"""Text becomes tokens as the model would read it; answers are never cut, and batches hold what they say."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tiny import SENTENCES, tiny_tokenizer
from zofo.errors import ZofoError
from zofo.scoring.batch import Layout, collate
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.task import Record

TOKENIZER = tiny_tokenizer()
TEXT = st.text(st.sampled_from("the film was great\n,.!äé漢"), min_size=1, max_size=30).filter(str.strip)
PAD = 2


def ids(text, tokenizer=TOKENIZER):
    return tuple(tokenizer(text)["input_ids"])


def one(prompt, completion, options=(), tokenizer=TOKENIZER, max_length=512):
    (example,), truncated = tokenize([Record(prompt, completion, options)], tokenizer, max_length)
    return example, truncated


def with_special_tokens(begin="<s>", end=""):
    """The tokenizer, with special tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end) if token]
    template = f"{begin} $A {end}".strip()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=known)
    assert len(tokenizer("a")["input_ids"]) == 1 + len(known)
    return tokenizer


def one_or_skip(*texts):
    """`one`, but passes over texts of which no prompt token is left, which are refused by name."""
    try:
        return one(*texts)
    except ZofoError as error:
        assume("melts" not in str(error))
        raise


@settings(deadline=None)
@given(TEXT, TEXT, TEXT)
def test_prompt_and_answer_together_are_the_tokens_of_the_whole_text(prompt, first, second):
    if ids(prompt + first) == ids(prompt + second):
        return
    example, _ = one_or_skip(prompt, first, (first, second))
    assert example.prompt + example.answers[0] == ids(prompt + first)
    assert example.prompt + example.answers[1] == ids(prompt + second)
    assert (example.gold, example.texts) == (0, (first, second))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_the_prompt_ends_before_the_first_token_that_touches_the_answer(prompt, answer):
    example, _ = one_or_skip(prompt, answer)
    kept = TOKENIZER.decode(example.prompt)
    assert prompt.startswith(kept.rstrip("\ufffd"))
    whole = TOKENIZER(prompt + answer, return_offsets_mapping=True)
    crossing = [i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(prompt)]
    assert len(example.prompt) == crossing[0]


def test_a_token_across_the_boundary_belongs_to_the_answer():
    (joined,) = ids(" was")
    example, _ = one("the film w", "as", ("as", "on"))
    assert example.prompt == ids("the film")
    assert example.answers[0] == (joined,)
    assert example.answers[1] == ids("the film won")[len(example.prompt) :]  # the same prompt for every option
    assert example.length == len(example.prompt) + len(example.answers[1])


def test_a_generated_answer_ends_with_the_end_token_and_an_option_does_not():
    assert one("the film", " was")[0].answers == ((*ids(" was"), TOKENIZER.eos_token_id),)
    assert one("the film", " was", (" was", " it"))[0].answers == (ids(" was"), ids(" it"))


def test_a_tokenizer_without_an_end_cannot_end_a_generated_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ZofoError, match="no eos_token, by which a generated answer ends"):
        one("the film was", " great", tokenizer=tokenizer)
    assert one("the film was", " great", (" great", " bad"), tokenizer=tokenizer)


def test_special_tokens_stand_in_front_and_not_between_prompt_and_answer_or_at_the_end():
    tokenizer = with_special_tokens("<s>", "</s>")
    example, _ = one("the film", " was", (" was", " it"), tokenizer)
    assert example.prompt == (0, *ids("the film"))
    assert example.answers == (ids(" was"), ids(" it"))


def test_options_that_become_the_same_tokens_are_refused():
    from tokenizers.normalizers import Lowercase

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(ZofoError, match="become the same tokens"):
        one("the film", " Was", (" Was", " was"), tokenizer)


def test_a_prompt_without_a_token_of_its_own_is_refused():
    """With one token across the boundary and nothing in front of it, no position predicts the answer."""
    assert len(ids("he")) == 1
    with pytest.raises(ZofoError, match="prompt"):
        collate([one("h", "e", ("e", "as"))[0]], "options", PAD)


@settings(deadline=None)
@given(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=4), st.integers(8, 60), st.booleans())
def test_truncation_keeps_special_tokens_the_end_of_the_prompt_and_the_answer(sentences, max_length, begins):
    tokenizer = with_special_tokens() if begins else TOKENIZER
    prompt, options = " ".join(sentences), (" great", " it was bad")
    full, none = one(prompt, options[0], options, tokenizer)
    short, truncated = one(prompt, options[0], options, tokenizer, max_length)
    assert none == 0
    assert truncated == int(full.length > max_length)
    assert short.length == min(max_length, full.length)
    assert short.answers == full.answers
    head = int(begins)
    assert short.prompt[:head] == full.prompt[:head]
    kept = len(short.prompt) - head
    assert kept > 0
    assert short.prompt[head:] == full.prompt[-kept:]


def test_truncated_rows_are_counted():
    records = [Record(prompt, " great", (" great", " bad")) for prompt in ("the", *SENTENCES[:3])]
    examples, truncated = tokenize(records, TOKENIZER, 10)
    assert truncated == 3
    assert max(e.length for e in examples) == 10


@pytest.mark.parametrize("begins", [False, True])
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(begins):
    tokenizer = with_special_tokens() if begins else TOKENIZER
    answer = " it was" * 5
    one("the film", answer, ("a", answer), tokenizer, max_length=10 + 1 + begins)
    with pytest.raises(ZofoError, match=rf"answer of 10 tokens .* max_length {10 + begins}: raise max_length"):
        one("the film", answer, ("a", answer), tokenizer, max_length=10 + begins)


def example(prompt, *answers, gold=0):
    return Example(prompt, answers, gold, tuple(map(str, range(len(answers)))))


@pytest.mark.parametrize(
    ("side", "input_ids", "scored"),
    [
        ("left", [[5, 6, 7, 8], [PAD, PAD, PAD, 9]], [[0, 2, 8], [0, 3, 10], [1, 3, 11]]),
        ("right", [[5, 6, 7, 8], [9, PAD, PAD, PAD]], [[0, 2, 8], [0, 3, 10], [1, 0, 11]]),
    ],
)
def test_each_token_is_scored_at_the_position_that_predicts_it(side, input_ids, scored):
    batch = collate([example((5, 6, 7), (8, 10)), example((9,), (11,))], "lm", PAD, Layout(side))
    assert batch["input_ids"].tolist() == input_ids
    assert batch["scored"].T.tolist() == scored
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    assert batch.keys() == {"input_ids", "attention_mask", "scored"}


def test_a_pad_token_inside_a_text_is_read():
    assert collate([example((5, PAD), (7,))], "lm", PAD)["attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize("room", [0, 100])
def test_options_of_one_token_share_a_row(room):
    rows = [example((5, 6), (7,), (8,)), example((5,), (7,), (9,), (3,), gold=2)]
    batch = collate(rows, "options", PAD, Layout(max_width=room))
    assert batch["input_ids"].tolist() == [[5, 6], [PAD, 5]]
    assert batch["scored"].T.tolist() == [[0, 1, 7], [0, 1, 8], [1, 1, 7], [1, 1, 9], [1, 1, 3]]
    assert batch["slots"].tolist() == [[[0], [1], [-1]], [[2], [3], [4]]]
    assert batch["gold"].tolist() == [0, 2]
    assert "segments" not in batch


LONGER = [example((5, 6), (7, 4), (8, 3, 9)), example((5,), (7,), (9, 4), (3,), gold=2)]


def test_longer_options_lie_side_by_side_where_there_is_room():
    batch = collate(LONGER, "options", PAD, Layout(max_width=5))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 3], [PAD, PAD, PAD, 5, 9]]
    assert batch["segments"].tolist() == [[1, 1, 2, 3, 3], [0, 0, 0, 1, 3]]
    first = [[0, 1, 7], [0, 2, 4], [0, 1, 8], [0, 3, 3], [0, 4, 9]]
    assert batch["scored"].T.tolist() == [*first, [1, 3, 7], [1, 3, 9], [1, 4, 4], [1, 3, 3]]
    assert batch["slots"].tolist() == [[[0, 1, -1], [2, 3, 4], [-1] * 3], [[5, -1, -1], [6, 7, -1], [8, -1, -1]]]


def test_longer_options_have_a_row_each_where_there_is_none():
    batch = collate(LONGER, "options", PAD, Layout(max_width=4))
    rows = [[PAD, 5, 6, 7], [5, 6, 8, 3], [PAD, PAD, PAD, 5], [PAD, PAD, 5, 9], [PAD, PAD, PAD, 5]]
    assert batch["input_ids"].tolist() == rows
    assert "segments" not in batch
    together = collate(LONGER, "options", PAD, Layout(max_width=5))
    assert torch.equal(batch["scored"][2], together["scored"][2])
    assert torch.equal(batch["slots"], together["slots"])


def test_options_with_little_before_them_have_a_row_each():
    """Side by side they would be compared with each other in vain, to save the reading of one token."""
    apart = example((5,), (7,) * 500, (8,) * 500)
    assert "segments" not in collate([apart], "options", PAD, Layout(max_width=10_000))
    behind = example((5,) * 500, (7,) * 500, (8,) * 500)
    assert "segments" in collate([behind], "options", PAD, Layout(max_width=10_000))


def test_the_lm_batch_holds_only_the_right_answers():
    batch = collate([example((5, 6), (7,), (8, 3), gold=1)], "lm", PAD, Layout(max_width=100))
    assert batch["input_ids"].tolist() == [[5, 6, 8]]
    assert batch["scored"].T.tolist() == [[0, 1, 8], [0, 2, 3]]
    assert "gold" not in batch


def test_a_loss_over_options_needs_two_of_them():
    with pytest.raises(ZofoError, match="fewer than two: set loss to lm, or give options"):
        collate([example((5,), (7,), (8,)), example((5,), (7,))], "options", PAD)
