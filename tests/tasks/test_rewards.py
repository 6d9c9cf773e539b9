"""Reward functions: how they are found, what they get, and what they must return."""

import time

import numpy as np
import pytest
import torch

from zofo.errors import ZofoError
from zofo.tasks.records import Record, records
from zofo.tasks.rewards import load_rewards, made_rewards

ROWS = records([{"prompt": "a b", "n": 3}, {"prompt": "c", "n": 4, "more": "x"}], answered=False)


def of(function, records=ROWS, texts=("one", "two"), seconds=5.0):
    return made_rewards({"f": function}, None, seconds).of(records, texts)


def test_a_function_gets_prompts_completions_and_the_columns_by_name():
    seen = {}

    def reward(**given):
        seen.update(given)
        return [1, 2.5]

    assert of(reward) == [1.0, 2.5]
    assert seen == {"prompts": ["a b", "c"], "completions": ["one", "two"], "n": [3, 4], "more": [None, "x"]}


def test_a_function_gets_only_what_it_names_if_it_takes_no_further_arguments():
    def reward(completions, n):
        return [len(text) + number for text, number in zip(completions, n, strict=True)]

    assert of(reward) == [6.0, 7.0]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5]),
        torch.tensor([1, 0.5]),
        [torch.tensor(1), np.float32(0.5)],
        [np.array(1), 0.5],
    ],
)
def test_values_may_be_a_list_or_an_array(values):
    assert of(lambda completions: values) == [1.0, 0.5]


def test_a_function_that_changes_what_it_gets_leaves_the_others_theirs():
    def sorts(completions, n):
        completions.sort()
        n.clear()
        return [0.0, 0.0]

    def lengths(completions, n):
        return [len(text) + number for text, number in zip(completions, n, strict=True)]

    assert made_rewards({"a": sorts, "b": lengths}, None, 5.0).of(ROWS, ("two words", "one")) == [12.0, 7.0]


def test_several_rewards_are_a_weighted_sum_of_those_that_apply():
    functions = {"f": lambda completions: [1.0, None, None], "g": lambda completions: [10.0, 20.0, None]}
    assert made_rewards(functions, [2.0, 0.5], 5.0).of([*ROWS, ROWS[0]], ["x"] * 3) == [7.0, 10.0, None]
    assert made_rewards(functions, None, 5.0).of([*ROWS, ROWS[0]], ["x"] * 3) == [11.0, 20.0, None]


def raises(completions):
    raise KeyError("no such word")


WRONG = {
    "too few": (lambda completions: [1.0], "reward f returned 1 values for 2 completions: return one for each"),
    "nan": (lambda completions: [1.0, float("nan")], "reward f returned nan for the completion 'two': return a finite"),
    "infinity": (lambda completions: [float("-inf"), 0.0], "reward f returned -inf for the completion 'one'"),
    "strings": (lambda completions: ["good", "bad"], "reward f returned 'good' for the completion 'one'"),
    "a number": (lambda completions: 1.0, "reward f returned 1.0: return a list, with a number or None for each"),
    "nothing": (lambda completions: None, "reward f returned None: return a list"),
    "a text": (lambda completions: "ab", "reward f returned 'ab': return a list"),
    "an exception": (raises, "reward f failed (KeyError: 'no such word'; "),
    "an exit": (lambda completions: exit(3), "reward f failed (SystemExit: 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_number_for_each_completion_is_refused_in_one_line(name):
    function, message = WRONG[name]
    with pytest.raises(ZofoError) as refusal:
        of(function)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_an_exception_is_told_with_the_line_that_raised_it():
    with pytest.raises(ZofoError, match=rf"{raises.__code__.co_filename}, line {raises.__code__.co_firstlineno + 1}\)"):
        of(raises)


def test_a_call_that_takes_too_long_ends():
    started = time.perf_counter()
    with pytest.raises(ZofoError, match=r"reward f has not returned after 0\.2 seconds, for 2 completions: make it"):
        of(lambda completions: time.sleep(20), seconds=0.2)
    assert time.perf_counter() - started < 5


def test_a_file_is_loaded_by_its_name(tmp_path):
    file = tmp_path / "score.py"
    file.write_text(
        "WORDS = {'one'}\n\ndef known(completions, **columns):\n    return [t in WORDS for t in completions]\n"
    )
    loaded = load_rewards([f"{file}:known"], None, 5.0)
    assert loaded.of(ROWS, ["one", "two"]) == [1.0, 0.0]
    assert load_rewards(["statistics:mean"], None, 5.0).functions.keys() == {"statistics:mean"}


NAMES = {
    "no function": ("{file}", None, "must be FILE.py:function or module:function"),
    "no file": ("{file}x.py:known", None, "but there is no file"),
    "no such function": ("{file}:konwn", None, "konwn is no function there: did you mean known?"),
    "no such module": ("no_such_module_:f", None, "cannot be loaded (ModuleNotFoundError: No module named"),
    "a file that fails": ("{broken}:f", None, "cannot be loaded (ZeroDivisionError: division by zero): mend"),
    "too many weights": ("{file}:known", [1.0, 2.0], "reward_weights has 2 numbers for 1 rewards: give one for each"),
    "weights of 0": ("{file}:known", [0.0], "must hold finite numbers that are not all 0"),
    "weights of nan": ("{file}:known", [float("nan")], "must hold finite numbers"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_stands_for_no_function_is_refused(tmp_path, name):
    file, broken = tmp_path / "score.py", tmp_path / "broken.py"
    file.write_text("def known(completions):\n    return [1.0] * len(completions)\n")
    broken.write_text("1 / 0\n")
    given, weights, message = NAMES[name]
    with pytest.raises(ZofoError) as refusal:
        load_rewards([given.format(file=file, broken=broken)], weights, 5.0)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_same_reward_twice_is_refused(tmp_path):
    (tmp_path / "score.py").write_text("def known(completions):\n    return [1.0] * len(completions)\n")
    with pytest.raises(ZofoError, match="twice: leave one of them out, and give it a reward_weights of 2"):
        load_rewards([f"{tmp_path / 'score.py'}:known"] * 2, None, 5.0)


def test_a_function_that_needs_what_is_no_column_is_refused_before_it_is_called():
    def reward(completions, solution):
        raise AssertionError

    with pytest.raises(
        ZofoError, match=r"reward f cannot be called \(missing a required argument: 'solution'\): .*'n'"
    ):
        made_rewards({"f": reward}, None, 5.0).require_columns(ROWS)
    made_rewards({"f": reward}, None, 5.0).require_columns(records([{"prompt": "a", "solution": "b"}], answered=False))


def test_a_column_that_some_rows_lack_is_none_there_also_where_all_of_a_batch_do():
    rows = records([{"prompt": "a"}, {"prompt": "b", "hint": "c"}], answered=False)
    seen = []

    def reward(completions, hint):
        seen.append(hint)
        return [0.0] * len(completions)

    made = made_rewards({"f": reward}, None, 5.0)
    made.require_columns(rows)
    made.of(rows[:1], ["x"])
    made.of(rows, ["x", "y"])
    assert seen == [[None], [None, "c"]]


def test_a_column_called_completions_is_refused():
    rows = records([{"prompt": "a", "completions": 1}], answered=False)
    with pytest.raises(ZofoError, match="a column of the rows is called completions"):
        made_rewards({"f": len}, None, 5.0).require_columns(rows)


def test_a_row_needs_no_answer_and_keeps_one_that_it_has():
    with_answer, without = records([{"prompt": "a", "completion": " b"}, {"prompt": "a"}], answered=False)
    assert (with_answer.completion, with_answer.answered) == (" b", True)
    assert (without, without.answered) == (Record("a", " a"), False)
