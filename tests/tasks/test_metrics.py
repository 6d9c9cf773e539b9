"""The metrics follow their published definitions."""

import re
import string

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


def squad(text):
    """`normalize_answer` of SQuAD v1.1's evaluate-v1.1.py."""
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def drop(text):
    """`_normalize_answer` of DROP's drop_eval.py."""

    def number(token):
        try:
            return float(token)
        except ValueError:
            return None

    parts = []
    for token in re.split(" |-", text):
        part = token.lower()
        if number(part) is None:
            part = "".join(c for c in part if c not in set(string.punctuation))
        part = part if number(part) is None else str(number(part))
        parts.append(" ".join(re.sub(r"\b(a|an|the)\b", " ", part).split()))
    return " ".join(part for part in parts if part)


def plain_f1(one, other):
    one, other = one.split(), other.split()
    same = sum(min(one.count(word), other.count(word)) for word in {*one, *other})
    return 2 * same / (len(one) + len(other)) if same else 0.0


WORDS = [
    "The",
    "a",
    "an",
    "theatre",
    "Zoë's",
    "(big)",
    "well-known",
    "R&B",
    '"no"',
    "U.S.",
    "and/or",
    "cat,",
    "end.",
    "&",
    "—",
]
SAID = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@given(SAID, SAID.filter(squad))
def test_words_are_compared_as_squad_compares_them(said, right):
    assert normalise(said) == squad(said)
    assert score("exact_match", [said], [[right]]) == float(squad(said) == squad(right))
    assert score("token_f1", [said], [[right]]) == pytest.approx(plain_f1(squad(said), squad(right)))


NUMBERS = [
    "5",
    "5.0",
    "05",
    "15",
    "1.5",
    "1.50",
    "15.0",
    "0.5",
    ".5",
    "1,000",
    "1000",
    "1000.0",
    "1e3",
    "100%",
    "$5",
    "$100",
]
NUMBERED = st.lists(st.sampled_from([*NUMBERS, "yards", "the", "5th", "Yards,"]), min_size=1, max_size=4).map(" ".join)


@given(NUMBERED, NUMBERED.filter(drop))
def test_numbers_are_compared_as_drop_compares_them(said, right):
    assert score("exact_match", [said], [[right]]) == float(drop(said) == drop(right))
    assert score("token_f1", [said], [[right]]) == pytest.approx(plain_f1(drop(said), drop(right)))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("7", "-7"), ("7", "- 7"), ("7", "\N{MINUS SIGN}7"), ("$7", "-$7"), ("7 °C", "-7 °C"), ("x = 7", "x = -7"),
        ("25", "2.5"), ("$25", "$2.5"), ("25kg", "2.5kg"), ("v25", "v2.5"), ("25", "2,5"), ("10", "1,0"),
        ("34", "3/4"), ("3 4", "3 / 4"), ("34", "(3)/(4)"), ("935", "9:35"), ("24", "2-4"), ("24", "2\N{EN DASH}4"),
        ("2 + 4", "2 - 4"), ("2 * 4", "2 / 4"), ("210", "2^10"), ("12", "1;2"), ("12", "1_2"), ("12", "1é2"),
        ("1e5", "1e\N{EN DASH}5"), ("62", "6'2\""),
        ("127001", "127.0.0.1"), ("1.10.0", "1.1.0"), ("1e5", "1e-5"), ("20240105", "2024-01-05"), ("123", "1,2,3"),
        ("12345678901234567890", "12345678901234567891"), ("C", "C++"), ("C#", "C++"), ("F", "F#"), ("A+", "A-"),
        ("B", "B-"), ("AB", "AB-"), ("x", "-x"), ("inf", "-inf"), ("x < y", "x > y"), ("x", "x = y"), ("5+", "5"),
        ("", "A"), ("the", "A"), ("", "+"), ("-", "+"), ("?", "!"), ("B", "A"), ("A big cat", "A"),
    ],
)  # fmt: skip
def test_what_makes_a_number_or_a_name_another_is_kept(said, right):
    assert score("exact_match", [said], [[right]]) == 0.0
    assert score("token_f1", [said], [[right]]) < 1.0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("1.0", "1"), ("7.", "7"), ("(7)", "7"), ("+7", "7"), ("-7.0", "\N{MINUS SIGN}7"), ("- 7", "-7"), ("-0.0", "0"),
        ("0.50", ".5"), ("-0.", "0"),
        ("1,234,567.80", "1234567.8"), ("$1,000", "1000"), ("1e3", "1000"), ("2.5e-3", "0.0025"), ("007", "7"),
        ("0.0", "0"), ("1.0/2", "1/2"), ("2\N{EN DASH}4", "2-4"), ("-7 degrees.", "-7 degrees"), ("5%", "5 %"),
        ("9:05", "9:05."), ("A.", "a"), ("The A", "the a"), ("C++.", "c++"), ('"F#"', "F#"), ("1990's", "1990s"),
        ("COVID-19", "covid19"), ("F-16", "F16"), ("in 1990. 5 men", "in 1990 5 men"),
    ],
)  # fmt: skip
def test_one_number_in_two_forms_is_one_answer(said, right):
    assert score("exact_match", [said], [[right]]) == score("token_f1", [said], [[right]]) == 1.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_a_number_is_the_same_however_it_is_written(number):
    forms = [f"{number}", f"{number:,}", f"{number:.7f}", f"{number:.12e}"]
    assert len({normalise(form) for form in forms}) == 1
    other = number + 1
    assert normalise(f"{number}") != normalise(f"{other}")
