"""Shaping of populations, against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from zofo.zo.shaping import Shaped, centered_rank, shaped, zscore

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.integers(0, 4, size=(9, 5)) / 3  # with ties
HOLES = np.where(RANDOM.random((9, 5)) < 0.2, np.nan, VALUES)


@pytest.mark.parametrize("values", [VALUES, HOLES], ids=["all", "some"])
def test_z_scores_are_those_of_scipy(values):
    expected = stats.zscore(values, axis=0, nan_policy="omit")
    np.testing.assert_allclose(zscore(torch.from_numpy(values)).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("values", [VALUES, HOLES], ids=["all", "some"])
def test_ranks_are_those_of_scipy_from_minus_to_plus_a_half(values):
    ranks = stats.rankdata(values, axis=0, nan_policy="omit")
    expected = (ranks - 1) / ((~np.isnan(values)).sum(0) - 1) - 0.5
    np.testing.assert_allclose(centered_rank(torch.from_numpy(values)).numpy(), expected, atol=1e-12)
    assert np.nansum(expected, axis=0) == pytest.approx(np.zeros(5))


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
def test_over_all_the_mean_over_the_rows_is_shaped(shaping):
    means = np.nanmean(HOLES, axis=1)
    wanted = {"zscore": (means - means.mean()) / means.std(), "centered_rank": np.argsort(np.argsort(means)) / 8 - 0.5}
    assert len(set(means)) == 9, "no ties, so that positions are ranks"
    assert shaped(torch.from_numpy(HOLES), shaping).members == pytest.approx(wanted[shaping])


def test_by_prompt_each_row_is_shaped_and_the_mean_taken():
    wanted = np.nanmean((HOLES - np.nanmean(HOLES, axis=0)) / np.nanstd(HOLES, axis=0), axis=1)
    assert shaped(torch.from_numpy(HOLES), "zscore", by_column=True).members == pytest.approx(wanted)


@pytest.mark.parametrize("shaping", ["none", "zscore", "centered_rank"])
def test_the_fraction_of_columns_without_spread(shaping):
    values = torch.tensor([[0.1, 1.0, np.nan], [0.1, 2.0, np.nan], [0.1, 3.0, np.nan]], dtype=torch.float64)
    assert shaped(values, shaping, by_column=True).no_spread == 0.5  # no member has a value in the last one
    assert shaped(values, shaping).no_spread == 0.0
    same = shaped(values[:, :1], shaping)
    assert same == Shaped(((0.1,) * 3 if shaping == "none" else (0.0,) * 3), 1.0)


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
def test_the_same_values_in_another_order_are_no_spread(shaping):
    values = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], dtype=torch.float64)
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1, "rounded sums would differ"
    assert shaped(values, shaping) == Shaped((0.0, 0.0), 1.0)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
def test_a_member_without_any_value_is_worth_the_mean(shaping, by_column):
    values = torch.tensor([[1.0, np.nan], [np.nan, np.nan], [3.0, 5.0]], dtype=torch.float64)
    others = shaped(values[[0, 2]], shaping, by_column).members
    assert shaped(values, shaping, by_column).members == pytest.approx((others[0], 0.0, others[1]))


def test_a_member_alone_is_worth_nothing():
    for shaping in ("zscore", "centered_rank"):
        assert shaped(torch.tensor([[3.0]]), shaping) == Shaped((0.0,), 1.0)


def test_the_scale_of_a_reward_does_not_matter():
    values = torch.from_numpy(VALUES)
    for shaping in ("zscore", "centered_rank"):
        assert shaped(1000 * values - 5, shaping).members == pytest.approx(shaped(values, shaping).members)
