"""What a run says of the right answers of its training rows."""

import pytest

from zofo import ZofoError
from zofo.tasks.answers import answer_counts
from zofo.tasks.records import Record


def rows(*answers, options=()):
    return [Record(f"row {number}", answer, tuple(options)) for number, answer in enumerate(answers)]


def said(*answers, options=()):
    return answer_counts(rows(*answers, options=options), "t").removeprefix(f"answers of the {len(answers)} ")


def test_the_most_frequent_option_comes_first_and_one_that_is_never_right_is_named():
    found = said(*[" bad"] * 2, *[" good"] * 3, options=(" bad", " good", " none\nof these"))
    assert found == "training rows: good 3, bad 2, none of these 0"


def test_of_many_classes_the_most_frequent_are_named():
    options = [f" class {number}" for number in range(6)]
    answers = [option for number, option in enumerate(options) for _ in range(number)]
    six = "class 5 5, class 4 4, class 3 3, class 2 2, class 1 1"
    assert said(*answers, options=options) == f"training rows: {six}, class 0 0"
    assert said(*answers, options=[*options, " class 6"]) == f"training rows: {six} and 2 others"


@pytest.mark.parametrize("options", [None, ()], ids=["options of each row", "generation"])
def test_answers_that_are_no_classes_are_counted(options):
    def counted(*answers):
        records = [
            Record(f"row {n}", text, (text, f"not {text}") if options is None else ()) for n, text in enumerate(answers)
        ]
        return answer_counts(records, "t").partition("rows: ")[2]

    assert counted(" a", " b", " a", " c") == "3 different"
    assert counted(" a", " b", " a") == "2 different, a 2"
    assert counted(" x" * 40, " b", " x" * 40) == f"2 different, {('x ' * 20)}... 2"


@pytest.mark.parametrize("options", [(" bad", " good"), ()], ids=["options", "generation"])
def test_rows_with_one_answer_are_refused(options):
    with pytest.raises(ZofoError, match=r"all 3 training rows of task films have the answer ' good', so .*`answer`"):
        answer_counts(rows(*[" good"] * 3, options=options), "films")


def test_a_single_row_may_be_learned():
    assert said(" good", options=(" bad", " good")) == "training rows: good 1, bad 0"
    assert said(" good") == "training rows: 1 different"
