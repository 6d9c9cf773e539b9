"""Verdicts: Holm's p-values, and the sentences."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo.compare.verdicts import holm, verdict


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A comparison is kept at the largest p-value of any set of comparisons that it belongs to."""
    places = range(len(p_values))
    sets = [chosen for size in places for chosen in itertools.combinations(places, size + 1)]
    bonferroni = {chosen: min(1, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets}
    assert holm(p_values) == pytest.approx([max(bonferroni[c] for c in sets if place in c) for place in places])


def told(**changes):
    values = {"difference": 0.041, "low": 0.012, "high": 0.07, "detectable": 0.039, "seeds": 3, "clusters": 400}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("found", "p", "sentence"),
    [
        (
            told(),
            0.0042,
            "lora is significantly better than mezo on trec (+4.1 points, 95 % interval 1.2 to 7.0, Holm-adjusted "
            "p = 0.004)",
        ),
        (
            told(difference=-0.041, low=-0.07, high=-0.012, seeds=1),
            0.0001,
            "lora is significantly worse than mezo on trec (-4.1 points, 95 % interval -7.0 to -1.2, Holm-adjusted "
            "p < 0.001); with one seed, this holds for these trained models only",
        ),
        (
            told(),
            0.3,
            "no significant difference between lora and mezo on trec (+4.1 points, 95 % interval 1.2 to 7.0, "
            "Holm-adjusted p = 0.300): this comparison could have seen differences from 3.9 points",
        ),
        (
            told(difference=0.0, low=0.0, high=0.0, detectable=math.inf, clusters=5),
            1.0,
            "no significant difference between lora and mezo on trec (+0.0 points, 95 % interval 0.0 to 0.0, "
            "Holm-adjusted p = 1.000): no difference could be seen with 5 independent groups of rows",
        ),
    ],
)
def test_a_verdict_is_one_sentence(found, p, sentence):
    assert verdict(found, p, "lora", "mezo", "trec") == sentence
