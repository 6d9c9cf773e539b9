"""The parts of a task: disjoint, stratified, seeded, and what is dropped is counted."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo.errors import ZofoError
from zofo.tasks.splits import halves, split_records, two_levels
from zofo.tasks.task import Record

SIZES = {"train_size": None, "dev_size": 10, "test_size": 20, "seed": 0}


def classified(counts, start=0):
    """Distinct records, counts[c] of class c."""
    options = tuple(f" {c}" for c in range(max(2, len(counts))))
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    return [Record(f"row {start + i}", options[c], options) for i, c in enumerate(labels)]


def split(records, **changes):
    return split_records({"all": records} if isinstance(records, list) else records, **{**SIZES, **changes})


def parts(found, fraction=0.5):
    lower, upper = two_levels(found.train, fraction)
    return {"lower": lower, "upper": upper, "dev": found.dev, "test": found.test}


def prompts(rows):
    return [row.prompt for row in rows]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=80, max_size=200),
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 0.9),
)
def test_no_prompt_is_in_two_parts_or_twice_in_one(pairs, seed, fraction):
    records = [Record(f"p{prompt}", f" {label}", (" 0", " 1", " 2")) for prompt, label in pairs]
    distinct = len(set(prompts(records)))
    if distinct < 36:
        return
    found = split(records, seed=seed)
    whole = parts(found, fraction)
    everything = [p for rows in whole.values() for p in prompts(rows)]
    assert len(everything) == len(set(everything)) == distinct
    assert len(found.test) == 20
    assert len(found.dev) == 10
    assert len(whole["lower"]) == round(len(found.train) * fraction)
    dropped = len(records) - distinct
    assert found.notes == () if dropped == 0 else str(dropped) in found.notes[0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(20, 80), min_size=2, max_size=4), st.integers(0, 1000))
def test_every_part_has_the_class_shares_of_the_whole(counts, seed):
    found = split(classified(counts), seed=seed)
    for name, rows in parts(found).items():
        seen = Counter(row.completion for row in rows)
        for c, n in enumerate(counts):
            assert abs(seen[f" {c}"] - len(rows) * n / sum(counts)) <= 2, (name, c)


def test_the_same_seed_gives_the_same_parts_and_another_seed_others():
    records = classified([60, 40])
    again = [parts(split(records, seed=seed)) for seed in (3, 3, 4)]
    assert again[0] == again[1]
    assert again[0]["test"] != again[2]["test"]


def test_rows_are_shuffled_within_their_classes():
    found = split(classified([50, 50]))
    numbers = [int(p.split()[1]) for p in prompts(found.test) if int(p.split()[1]) < 50]
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("change", [{"train_size": 12}, {"train_size": 70}, {"dev_size": 3}])
def test_test_rows_do_not_depend_on_how_many_rows_the_others_get(change):
    records = classified([60, 40])
    assert split(records, **change).test == split(records).test


@pytest.mark.parametrize(("rows", "dev", "test"), [(100, 20, 20), (1500, 200, 300), (3000, 200, 400)])
def test_without_sizes_test_and_dev_are_a_fifth_each_up_to_a_bound(rows, dev, test):
    found = split(classified([rows // 2, rows // 2]), dev_size=None, test_size=None)
    assert (len(found.dev), len(found.test), len(found.train)) == (dev, test, rows - dev - test)


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one():
    records = classified([60, 40])
    assert set(prompts(split(records, train_size=20).train)) < set(prompts(split(records, train_size=40).train))


def test_a_source_with_its_own_test_split_keeps_it_apart():
    given_test = classified([15, 15], start=1000)
    train = [*classified([40, 40]), given_test[0], given_test[1]]
    found = split({"train": train, "test": given_test}, test_size=30)
    assert sorted(prompts(found.test)) == sorted(prompts(given_test))
    assert len(found.train) + len(found.dev) == 80
    assert "2 rows dropped" in found.notes[0]


def test_a_source_with_its_own_dev_split_uses_it():
    dev = classified([10, 10], start=500)
    found = split({"train": classified([40, 40]), "dev": dev})
    assert set(prompts(found.dev)) < set(prompts(dev))


def test_an_empty_split_is_no_split():
    """As of a Hub data set whose test labels are hidden, once such rows are left out."""
    train = classified([40, 40])
    assert split({"train": train, "test": [], "dev": []}) == split({"train": train})
    with pytest.raises(ZofoError, match="has rows of test, but none to train on"):
        split({"train": [], "test": train})


@pytest.mark.parametrize(
    ("change", "key"),
    [({"test_size": 101}, "test_size"), ({"dev_size": 90}, "dev_size"), ({"train_size": 71}, "train_size")],
)
def test_more_rows_than_there_are_is_refused_with_the_key_and_both_numbers(change, key):
    with pytest.raises(ZofoError, match=rf"{key} is {change[key]}, but only \d+ rows are left for it: ask for fewer"):
        split(classified([50, 50]), **change)


def test_no_row_left_to_train_on_is_refused():
    with pytest.raises(ZofoError, match="no row is left to train on"):
        split(classified([15, 15]))


def test_a_source_without_training_rows_is_refused():
    """As a Hub data set may be that holds a test split only."""
    with pytest.raises(ZofoError, match="train"):
        split({"test": classified([40, 40])})


def test_halves_are_disjoint_stratified_and_complete():
    records = classified([30, 60])
    first, second = halves(records, 0.5, seed=1)
    assert sorted(prompts(first) + prompts(second)) == sorted(prompts(records))
    assert math.isclose(sum(r.completion == " 0" for r in first), 15, abs_tol=1)


@pytest.mark.parametrize("rows", [0, 1])
def test_halves_of_too_few_rows_are_refused(rows):
    with pytest.raises(ZofoError, match="give more rows"):
        halves(classified([rows]), 0.5, seed=0)
