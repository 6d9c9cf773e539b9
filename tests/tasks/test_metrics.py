"""The metrics follow their published definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zofo.tasks.metrics import METRICS, normalise, score

LABELS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=60)


def reference_macro_f1(predictions, answers):
    """The mean of 2PR / (P + R) over the classes seen, as scikit-learn defines it with zero_division=0."""
    values = []
    p, a = np.array(predictions), np.array(answers)
    for c in np.union1d(p, a):
        tp = np.sum((p == c) & (a == c))
        precision = tp / np.sum(p == c) if np.any(p == c) else 0.0
        recall = tp / np.sum(a == c) if np.any(a == c) else 0.0
        values.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return np.mean(values)


@given(LABELS)
def test_macro_f1_is_the_mean_of_the_classes_f1(pairs):
    predictions, answers = zip(*pairs, strict=True)
    found = score("macro_f1", predictions, [[a] for a in answers])
    assert found == pytest.approx(reference_macro_f1(predictions, answers))


@given(LABELS)
def test_accuracy_is_the_share_of_equal_pairs(pairs):
    predictions, answers = zip(*pairs, strict=True)
    assert score("accuracy", predictions, [[a] for a in answers]) == pytest.approx(np.mean([p == a for p, a in pairs]))


def test_macro_f1_punishes_always_saying_the_frequent_class():
    assert score("macro_f1", ["no"] * 10, [["no"]] * 9 + [["yes"]]) == pytest.approx((2 * 9 / 19 + 0) / 2)


@pytest.mark.parametrize("metric", METRICS)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_right_answers_score_one(metric, answers):
    found = score(metric, answers, [[a] for a in answers], options=[["?", a] for a in answers], groups=answers)
    assert found == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The cat, a dog & an owl.", "cat dog owl"),
        ("ANTHEM", "anthem"),  # an article inside a word stays
        ("a-b", "ab"),  # punctuation goes without leaving a space
        ("a  b\tc\n", "b c"),
        ("Größe — “quoted”", "größe — “quoted”"),  # only ASCII punctuation goes, as in SQuAD's script
        ("...", ""),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise_is_squads(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "exact"),
    [
        ("The Eiffel Tower", "eiffel tower!", 1.0, 1.0),
        ("eiffel tower in paris", "Eiffel Tower", 2 / 3, 0.0),
        ("tower eiffel", "eiffel tower", 1.0, 0.0),
        (
            "to be or not to be",
            "to be",
            1 / 2,
            0.0,
        ),  # precision 2/6, recall 2/2
        ("nothing", "else", 0.0, 0.0),
        ("", "word", 0.0, 0.0),
        ("word", "", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),  # both are empty once articles are gone
    ],
)
def test_token_f1_and_exact_match(prediction, answer, f1, exact):
    assert score("token_f1", [prediction], [[answer]]) == pytest.approx(f1)
    assert score("exact_match", [prediction], [[answer]]) == exact


def test_accuracy_compares_options_as_they_stand():
    assert score("accuracy", [" Great", " great"], [[" great"], [" great"]]) == 0.5


def test_the_best_of_several_right_answers_counts():
    right = [["cat", "the big cat"], ["dog", "two dogs"]]
    assert score("token_f1", ["a big cat", "three dogs"], right) == pytest.approx((1.0 + 0.5) / 2)
    assert score("exact_match", ["The big cat.", "dogs"], right) == 0.5
    assert score("accuracy", ["the big cat", "dogs"], right) == 0.5


YES_NO = st.lists(
    st.tuples(st.sampled_from("ny"), st.sampled_from("ny"), st.sampled_from("123")), min_size=1, max_size=40
)


@given(YES_NO)
def test_f1_of_multirc_is_that_of_the_last_option_over_all_rows(rows):
    said, right, _ = zip(*rows, strict=True)
    both = sum(s == r == "y" for s, r in zip(said, right, strict=True))
    precision, recall = (both / max(1, words.count("y")) for words in (said, right))
    expected = 2 * precision * recall / (precision + recall) if both else 0.0
    found = score("f1", said, [[r] for r in right], options=[["n", "y"]] * len(rows))
    assert found == pytest.approx(expected)


@given(YES_NO)
def test_a_group_is_right_if_all_of_its_rows_are(rows):
    said, right, groups = zip(*rows, strict=True)
    whole = [all(s == r for s, r, g in rows if g == group) for group in set(groups)]
    found = score("group_exact_match", said, [[r] for r in right], groups=groups)
    assert found == pytest.approx(sum(whole) / len(whole))
