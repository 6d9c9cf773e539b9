"""A chat is read as the tokenizer itself encodes it, and a long one loses words of the user alone."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import make_trainer
from tiny import SENTENCES, tiny_tokenizer
from zofo.errors import ZofoError
from zofo.scoring.tokens import tokenize
from zofo.tasks.prompts import as_chat, chat_identity
from zofo.tasks.records import Record
from zofo.training.checkpoint import require_same

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }} {% endfor %}assistant: "
TEMPLATES = {
    "marks": TURNS,
    "the beginning in the template": "{{ bos_token }}" + TURNS,
    "two tokens at the beginning": "<|a|><|b|>" + TURNS,
    "words, and a space at the end": NAMES,
}
OPTIONS = (" good", " it was bad")


def chat_tokenizer(template, begins=(), bos=True):
    """A tokenizer with a chat template, which puts the tokens `begins` in front of every other text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|a|>", "<|b|>"]})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in begins]
    if begins:
        sequence = " ".join([*begins, "$A"])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=sequence, special_tokens=known)
    tokenizer.chat_template = TEMPLATES[template]
    if not bos:
        tokenizer.bos_token = None
    return tokenizer


def plain_ids(tokenizer, said, system):
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": said})
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(("begins", "bos"), [((), True), (("<s>",), True), (("<|a|>", "<|b|>"), False)])
@pytest.mark.parametrize("template", ["marks", "two tokens at the beginning", "words, and a space at the end"])
@pytest.mark.parametrize("options", [(), OPTIONS])
def test_a_chat_has_the_tokens_of_the_tokenizer_itself(template, begins, bos, system, options):
    tokenizer = chat_tokenizer(template, begins, bos)
    record = Record("the film\n", " good", options)
    (example,), cut = tokenize([as_chat(record, tokenizer, system)], tokenizer, 200)
    assert list(example.prompt) == plain_ids(tokenizer, "the film", system)
    end = [] if options else [tokenizer.eos_token_id]
    answers = [option.strip() for option in options or (" good",)]
    assert [list(ids) for ids in example.answers] == [
        tokenizer(answer, add_special_tokens=False)["input_ids"] + end for answer in answers
    ]
    assert cut == 0


def test_the_token_that_starts_a_text_stands_once():
    tokenizer = chat_tokenizer("the beginning in the template", ("<s>",))
    (example,), _ = tokenize([as_chat(Record("hi", " good"), tokenizer, None)], tokenizer, 100)
    assert example.prompt.count(tokenizer.bos_token_id) == 1
    assert list(example.prompt) == plain_ids(tokenizer, "hi", None)


def test_the_suffix_alone_is_scored_in_a_chat_too():
    for template in ("marks", "words, and a space at the end"):
        tokenizer = chat_tokenizer(template)
        record = Record("the film", " good", OPTIONS, suffix=" and long", partial=True)
        (example,), _ = tokenize([as_chat(record, tokenizer, None)], tokenizer, 100)
        for answer, unscored in zip(example.answers, example.unscored, strict=True):
            assert tokenizer.decode(answer[unscored:]) == " and long"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=5).map(" ".join),
    st.integers(40, 110),
    st.sampled_from(["marks", "two tokens at the beginning", "words, and a space at the end"]),
)
def test_a_long_chat_keeps_its_turns_and_the_end_of_the_users_words(said, max_length, template):
    tokenizer = chat_tokenizer(template, ("<s>",))
    chat = as_chat(Record(said, " good", OPTIONS), tokenizer, "Judge films.")
    (full,), _ = tokenize([chat], tokenizer, 10_000)
    (short,), cut = tokenize([chat], tokenizer, max_length)
    assert cut == int(full.length > max_length)
    assert short.answers == full.answers
    kept = [i for i in range(len(said) + 1) if list(short.prompt) == plain_ids(tokenizer, said[i:], "Judge films.")]
    assert kept, "the prompt is the chat around an end of the words"
    around = len(short.prompt) - len(full.prompt) + full.length
    assert around == short.length <= max_length
    if cut:  # no longer end of the words fits better
        sizes = [len(plain_ids(tokenizer, said[i:], "Judge films.")) for i in range(kept[0])]
        assert max([size for size in sizes if size <= max_length - full.length + len(full.prompt)], default=0) <= len(
            short.prompt
        )


def test_two_system_turns_stay_two_after_truncation():
    tokenizer = chat_tokenizer("marks")
    record = Record(" ".join(SENTENCES), " good", OPTIONS)
    made = [tokenize([as_chat(record, tokenizer, words)], tokenizer, 80)[0][0] for words in ("Judge.", "Mend pipes.")]
    texts = [tokenizer.decode(example.prompt) for example in made]
    assert [text.count("<|im_start|>") for text in texts] == [3, 3]
    assert texts[0].startswith("<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n")
    assert texts[1].startswith("<|im_start|>system\nMend pipes.<|im_end|>\n<|im_start|>user\n")


def test_a_chat_that_does_not_fit_without_words_is_refused():
    tokenizer = chat_tokenizer("marks")
    chat = as_chat(Record(" ".join(SENTENCES), " good", OPTIONS), tokenizer, "Judge the films that you know of.")
    with pytest.raises(ZofoError, match=r"max_length 12 is too short for the chat even without .*: raise max_length"):
        tokenize([chat], tokenizer, 12)


def test_rewards_get_the_words_of_the_user_without_the_chat_around_them():
    (example,), _ = tokenize([as_chat(Record("it was", " a", row={"n": 1}), chat_tokenizer("marks"), None)],
                             chat_tokenizer("marks"), 100)  # fmt: skip
    assert example.record.prompt != example.record.asked == "it was"
    assert example.record.row == {"n": 1}


def test_a_chat_template_has_an_identity():
    plain, marks = tiny_tokenizer(), chat_tokenizer("marks")
    assert chat_identity(plain) is None
    assert chat_identity(marks) == chat_identity(chat_tokenizer("marks", ("<s>",)))
    assert chat_identity(marks) != chat_identity(chat_tokenizer("words, and a space at the end"))
    several = chat_tokenizer("marks")
    several.chat_template = {"default": TURNS, "tool_use": NAMES}
    assert chat_identity(several) == chat_identity(marks)
    several.chat_template = {"tool_use": NAMES, "rag": TURNS}
    for ask in (chat_identity, lambda tokenizer: as_chat(Record("hi", " good"), tokenizer, None)):
        with pytest.raises(ZofoError, match="several chat templates, but none that is called default"):
            ask(several)


def test_a_run_goes_on_under_the_same_chat_template_only(tmp_path):
    def identity(template, **keys):
        tokenizer = chat_tokenizer(template)
        return make_trainer(tmp_path, tokenizer=tokenizer, **keys).identity

    marks, names = (identity(template, chat_template=True) for template in ("marks", "words, and a space at the end"))
    plain = identity("marks")
    assert "chat_template_digest" not in plain
    assert marks["chat_template_digest"] == chat_identity(chat_tokenizer("marks"))
    require_same(marks, marks, Path("run"))
    with pytest.raises(ZofoError, match="was written with chat_template_digest = "):
        require_same(marks, names, Path("run"))
    with pytest.raises(ZofoError, match="was written with chat_template = True"):
        require_same(marks, plain, Path("run"))


FAILING = {
    "text and nothing": "{{ 'a' + none }}",
    "an item that is not there": "{{ messages[9].content }}",
    "a division": "{{ 1 / 0 }}",
    "more than there is memory": "{{ 'x' * 10 ** 15 }}",
    "macros without end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "its own refusal": "{{ raise_exception('no chat') }}",
}


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_said_in_one_line(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ZofoError, match=r"the model's chat template (fails|refuses this)") as caught:
        as_chat(Record("hi", OPTIONS[0], OPTIONS), tokenizer, None)
    assert "\n" not in str(caught.value)
