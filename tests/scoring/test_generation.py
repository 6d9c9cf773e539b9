"""What is generated is long enough for every right answer: its lines, a line break before it, and its tokens."""

import pytest
from test_scorer import TOKENIZER, adapted, pytestmark  # noqa: F401

from plain import make_trainer
from zofo.errors import ZofoError
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.generation import AnswerSpan, _with_room, end_tokens, generate
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import tokenize
from zofo.tasks.records import Record


def span(*answers, references=()):
    return AnswerSpan.of(
        tokenize([Record("it", a, references=references) for a in answers], TOKENIZER, 500)[0], TOKENIZER
    )


@pytest.mark.parametrize(
    ("answers", "text", "found"),
    [
        ([" a"], " one\ntwo", "one"),
        ([" a"], "\none", ""),
        ([" a", " a\nb"], " one\ntwo\nthree", "one\ntwo"),
        ([" a\nb"], "\none\ntwo", "one"),
        (["\na"], "\none\ntwo", "one"),
        (["\na"], " one\ntwo", "one"),
        (["\na"], "\n\none", ""),
        (["\n \na\n\nb"], "\none\n\ntwo\nthree", "one\n\ntwo"),
        ([" a\n"], " one\ntwo", "one"),
    ],
)
def test_as_many_lines_are_read_as_a_right_answer_has(answers, text, found):
    made = span(*answers)
    assert made.cut(text) == found
    ends = [made.is_full(text[:size]) for size in range(len(text) + 1)]
    assert ends == sorted(ends), "once full, always full"
    first = ends.index(True) if True in ends else len(text)
    assert made.cut(text[:first]) == found


def test_further_right_answers_count():
    made = span(" a", references=(" a", "b\nc", "the film was great " * 30))
    assert made.breaks == 1
    assert made.tokens > len(TOKENIZER("the film was great " * 30)["input_ids"])


def test_answers_of_one_short_line_are_generated_as_ever():
    assert span(" great", " it was", "x" * 49) == AnswerSpan(leading=0, breaks=0, tokens=50)
    assert span("x" * 400).tokens > len(TOKENIZER("x" * 400)["input_ids"])


def test_a_row_without_room_in_its_batch_goes_alone():
    records = [Record("it " * 100, " a"), Record("it", " x" * 40), Record("it was", " a")]
    rows, _ = tokenize(records, TOKENIZER, 128)
    positions = len(rows[0].prompt) + 10
    assert [*_with_room(rows, [[0, 1, 2]], positions)] == [[0, 2], [1]]
    assert [*_with_room(rows, [[0, 1, 2]], 10 * positions)] == [[0, 1, 2]]


def test_an_answer_beyond_the_positions_of_the_model_is_refused():
    made = adapted()
    rows, _ = tokenize([Record("it " * 100, " x" * 100)], TOKENIZER, 10_000)
    evaluator = Evaluator(Scorer(made, Tokens()), TOKENIZER, ["exact_match"], "lm", 2)
    with pytest.raises(ZofoError, match="do not fit into the 128 positions of the model: lower max_length"):
        evaluator.evaluate(rows)


@pytest.mark.parametrize(
    "answer",
    [" one\ntwo", "\n\none\n\ntwo", " the film was great and i would see it again" * 6],
    ids=["two lines", "line breaks in front", "more than 50 tokens"],
)
def test_what_was_learned_is_generated_to_its_end(tmp_path, answer):
    rows = [{"prompt": f"list {i}:", "completion": answer} for i in range(12)]
    trainer = make_trainer(
        tmp_path, rows, method="fo", adapter="none", loss="lm", learning_rate=1e-2, max_steps=80,
        per_device_train_batch_size=4, logging_steps=80,
    )  # fmt: skip
    assert len(TOKENIZER(answer)["input_ids"]) > 50 or "\n" in answer
    trainer.train()
    other = [Record(f"list {i}:", answer) for i in range(20, 23)]
    scores = trainer.score(trainer.examples(other))["upper"]
    assert scores["exact_match"] == 1.0
    few = [Record("list 30:", " one")]  # the answers of training need room, whatever is evaluated
    assert trainer.score(trainer.examples(few))["upper"]["exact_match"] == 0.0


def test_a_text_ends_where_the_model_ends_a_turn():
    made = adapted()
    settings = made.base.generation_config
    settings.eos_token_id = None
    assert end_tokens(made.base, TOKENIZER) == [TOKENIZER.eos_token_id]
    (row,) = tokenize([Record("it was", " a")], TOKENIZER, 500)[0]
    span = AnswerSpan(tokens=12, breaks=500)
    (free,) = generate(Scorer(made, Tokens()), TOKENIZER, [row], span, 1)
    first = TOKENIZER(f" {free}", add_special_tokens=False)["input_ids"][0]
    settings.eos_token_id = [TOKENIZER.eos_token_id, first]
    assert end_tokens(made.base, TOKENIZER) == settings.eos_token_id
    (ended,) = generate(Scorer(made, Tokens()), TOKENIZER, [row], span, 1)
    assert len(ended) < len(free)
