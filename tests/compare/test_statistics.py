"""Comparisons: intervals, p-values and power, against scipy, closed forms and simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm, permutation_test, t, ttest_1samp

from zofo.compare import statistics
from zofo.compare.statistics import difference_of_methods, mean_interval, paired_difference, row_values
from zofo.errors import ZofoError
from zofo.tasks.metrics import score


def draw(random, seeds, rows, seed_sd=0.0, difference=0.0):
    """Binary scores (2, S, R) of two methods whose runs have a true accuracy of 0.7 with a standard deviation."""
    shape = random.normal(size=rows) * 0.7 + random.normal(size=(2, 1, rows)) * 0.55
    latent = shape + random.normal(size=(2, seeds, rows)) * math.sqrt(1 - 0.7**2 - 0.55**2)
    accuracy = 0.7 + seed_sd * random.normal(size=(2, seeds, 1))
    accuracy[0] += difference
    return (latent < norm.ppf(np.clip(accuracy, 0.01, 0.99))).astype(np.float64)


def discordant(better, worse, rows=100):
    """One run each: `better` rows that a alone has right, and `worse` rows that b alone has right."""
    a, b = np.ones((1, rows)), np.ones((1, rows))
    b[0, :better] = 0
    a[0, better : better + worse] = 0
    return a, b


def test_one_seed_and_independent_rows_give_the_t_interval_of_scipy(random):
    scores = random.random((2, 1, 80))
    expected = ttest_1samp(scores[0, 0] - scores[1, 0], 0)
    found = paired_difference(*scores)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue, abs=0.03)  # the larger of it and the sign-flip test
    assert found.p >= expected.pvalue - 1e-9
    mean = mean_interval(scores[0])
    interval = ttest_1samp(scores[0, 0], 0).confidence_interval(0.95)
    assert (mean.low, mean.high) == pytest.approx((interval.low, interval.high))


def test_the_mean_of_several_tasks_varies_by_the_rows_within_each(random):
    """Two tasks with 30 and 300 rows: the variances of their means add up, each a quarter."""
    values = [random.random(size) for size in (30, 300)]
    scaled = np.concatenate([own * 330 / (2 * own.size) for own in values])[None]
    tasks = ["small"] * 30 + ["large"] * 300
    found = mean_interval(scaled, tasks=tasks, bounded=False)
    error = math.sqrt(sum(own.var(ddof=1) / own.size for own in values)) / 2
    assert found.mean == pytest.approx(np.mean([own.mean() for own in values]))
    assert found.high - found.mean == pytest.approx(t.isf(0.025, 329) * error, rel=0.02)
    all_right = np.concatenate([np.full(own.size, 330 / (2 * own.size)) for own in values])[None]
    perfect = paired_difference(all_right, 0 * all_right, tasks=tasks)
    assert (perfect.difference, perfect.low, perfect.high) == pytest.approx((1, 1, 1))


def test_clusters_of_one_size_count_as_one_observation_each(random):
    a, b = random.random((2, 1, 60)) * 0.5 + np.repeat(random.random((2, 1, 12)) * 0.5, 5, axis=2)
    found = paired_difference(a, b, groups=[f"passage {row // 5}" for row in range(60)])
    interval = ttest_1samp((a - b).reshape(12, 5).mean(1), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.rows, found.clusters, found.seeds) == (60, 12, 1)
    assert found.high - found.low > 1.2 * (paired_difference(a, b).high - paired_difference(a, b).low)


def test_clusters_of_several_sizes_give_the_standard_error_of_a_bootstrap(random):
    sizes = random.integers(1, 12, 150)
    groups = np.repeat(np.arange(150), sizes)
    a, b = np.clip(random.normal(0.5, 0.1, (2, 1, groups.size)) + random.normal(0, 0.2, (2, 1, 150))[..., groups], 0, 1)
    found = paired_difference(a, b, groups.tolist())
    sums = np.bincount(groups, (a - b)[0])
    ratio = bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True, vectorized=True, method="basic", n_resamples=4000, rng=random,
    )  # fmt: skip
    assert (found.high - found.low) / 2 / t.isf(0.025, 149) == pytest.approx(ratio.standard_error, rel=0.06)


def test_the_interval_of_several_seeds_is_cochrans(random):
    scores = draw(random, 3, 200, seed_sd=0.03)
    difference = scores[0] - scores[1]
    rows, seeds = difference.mean(0).var(ddof=1) / 200, difference.mean(1).var(ddof=1) / 3
    quantile = (rows * t.ppf(0.975, 199) + seeds * 4.302653) / (rows + seeds)  # t with 2 degrees, from a table
    found = paired_difference(*scores)
    assert found.high - found.difference == pytest.approx(quantile * math.sqrt(rows + seeds))
    assert found.seed_sd == pytest.approx(difference.mean(1).std(ddof=1))
    alone = mean_interval(scores[0])
    rows, seeds = scores[0].mean(0).var(ddof=1) / 200, scores[0].mean(1).var(ddof=1) / 3
    quantile = (rows * t.ppf(0.975, 199) + seeds * 4.302653) / (rows + seeds)
    assert alone.high - alone.mean == pytest.approx(quantile * math.sqrt(rows + seeds))


def test_unpaired_seeds_add_their_variances_in_any_order_and_number(random):
    a, b = draw(random, 3, 100, seed_sd=0.1)[0], draw(random, 5, 100, seed_sd=0.1)[1]
    found = paired_difference(a, b, same_seeds=False)
    assert found == paired_difference(a[::-1], b[[3, 0, 4, 2, 1]], same_seeds=False)
    assert found.seed_sd == pytest.approx(math.sqrt(a.mean(1).var(ddof=1) + b.mean(1).var(ddof=1)))
    parts = [(a.mean(0) - b.mean(0)).var(ddof=1) / 100, a.mean(1).var(ddof=1) / 3, b.mean(1).var(ddof=1) / 5]
    reach = sum(v * t.ppf(0.975, df) for v, df in zip(parts, (99, 2, 4), strict=True)) / math.sqrt(sum(parts))
    assert found.high - found.difference == pytest.approx(reach)
    assert found.seeds == 3


@pytest.mark.parametrize(("better", "worse"), [(6, 0), (5, 0), (8, 1), (9, 2), (4, 4), (1, 0)])
def test_p_of_one_seed_and_binary_scores_is_mcnemars(better, worse):
    found = paired_difference(*discordant(better, worse))
    assert found.p == pytest.approx(binomtest(better, better + worse).pvalue)


def test_p_of_many_differing_rows_is_mcnemars_within_its_resampling():
    exact = binomtest(40, 62).pvalue
    assert paired_difference(*discordant(40, 22, 200)).p == pytest.approx(exact, abs=4 * math.sqrt(exact / 3999))


def test_p_of_clusters_is_scipys_permutation_test(random):
    a, b = np.clip(random.normal(0.6, 0.3, (2, 1, 30)), 0, 1)
    groups = [row // 3 for row in range(30)]
    sums = (a - b).reshape(10, 3).sum(1)
    flipped = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-12 for signs in itertools.product((-1, 1), repeat=10)]
    exact = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert exact == pytest.approx(np.mean(flipped))
    of_t = ttest_1samp(sums, 0).pvalue
    assert paired_difference(a, b, groups).p == pytest.approx(max(exact, of_t))


def test_p_is_005_where_the_interval_begins_to_exclude_0(random):
    a, b = draw(random, 3, 400, seed_sd=0.05)
    found = paired_difference(a, b)
    moved = paired_difference(a - found.low, b)  # as far as the lower end reaches 0
    assert moved.low == pytest.approx(0, abs=1e-12)
    assert moved.p == pytest.approx(0.05)


def test_a_spread_over_seeds_is_no_difference_however_many_rows_there_are(random):
    accuracy = np.array([0.85, 0.80, 0.69])[:, None]
    a, b = (random.random((3, 1500)) < accuracy) * 1.0, (random.random((3, 1500)) < 0.7) * 1.0
    one_run = paired_difference(a[:1], b[:1])
    assert one_run.p < 0.001
    found = paired_difference(a, b)
    assert found.low < 0 < found.high
    assert found.p > 0.05


def test_seeds_alone_are_not_enough():
    a, b = np.full((5, 5), 0.9), np.full((5, 5), 0.1)
    found = paired_difference(a, b)
    assert found.p == pytest.approx(2 / 32)
    assert found.detectable == math.inf


def test_equal_scores_are_no_difference(random):
    scores = draw(random, 3, 50)[0]
    found = paired_difference(scores, scores)
    assert (found.difference, found.low, found.high, found.p, found.seed_sd) == (0, 0, 0, 1, 0)
    assert found.detectable == 8 / 50


def test_every_row_the_same_way_is_a_difference():
    found = paired_difference(np.ones((2, 30)), np.zeros((2, 30)))
    assert (found.difference, found.low, found.high) == (1, 1, 1)
    assert found.p < 0.001


def test_equal_inputs_give_equal_results():
    """Also a p-value of resampling."""
    assert len({paired_difference(*discordant(40, 22, 200)) for _ in range(4)}) == 1


@pytest.mark.parametrize(("groups", "rows"), [(None, 1), (["a"] * 9, 9)])
def test_rows_of_one_source_show_no_variance(groups, rows):
    with pytest.raises(ZofoError, match="one source"):
        mean_interval(np.ones((2, rows)), groups)
    with pytest.raises(ZofoError, match="one source"):
        paired_difference(np.ones((2, rows)), np.zeros((2, rows)), groups)


def test_scores_without_bounds_have_an_interval_around_their_mean(random):
    scores = random.normal(-2.5, 0.5, (1, 40))
    found = mean_interval(scores, bounded=False)
    interval = t.interval(0.95, 39, scores.mean(), scores.std(ddof=1) / math.sqrt(40))
    assert (found.low, found.high) == pytest.approx(interval)


def test_one_run_that_is_left_of_several_says_nothing_of_seeds(random):
    a, b = draw(random, 3, 100, seed_sd=0.1)
    found = difference_of_methods(a[:1], b, 3)
    assert (found.seeds, found.seed_sd) == (1, None)
    parts = [(a[0] - b.mean(0)).var(ddof=1) / 100, b.mean(1).var(ddof=1) / 3]
    reach = sum(v * t.ppf(0.975, df) for v, df in zip(parts, (99, 2), strict=True)) / math.sqrt(sum(parts))
    assert found.high - found.difference == pytest.approx(reach)


def test_a_perfect_score_is_not_certain():
    """The exact limit of 100 successes of 100 is 0.05 ** (1 / 100), one-sided."""
    assert mean_interval(np.ones((1, 100))).low == pytest.approx(0.05**0.01, abs=0.001)


def test_values_of_rows_are_the_scores_of_a_mean(random):
    scores = random.random(40)
    assert row_values(lambda rows: scores[rows].mean(), 40) == pytest.approx(scores)


def test_values_of_rows_have_mean_and_spread_of_macro_f1(random):
    labels = random.choice(3, size=300, p=(0.5, 0.3, 0.2)).astype(str)
    answers = np.where(random.random(300) < 0.7, labels, random.choice(3, size=300).astype(str))

    def macro_f1(rows):
        return score("macro_f1", answers[rows].tolist(), [[label] for label in labels[rows]])

    values = row_values(macro_f1, 300)
    assert values.mean() == pytest.approx(macro_f1(np.arange(300)))
    resampled = bootstrap(
        (np.arange(300),), macro_f1, vectorized=False, n_resamples=1000, method="basic", rng=random
    ).standard_error
    assert values.std(ddof=1) / math.sqrt(300) == pytest.approx(resampled, rel=0.08)


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


@pytest.mark.usefixtures("fewer_resamples")
def test_methods_that_are_equal_in_expectation_differ_rarely():
    """At most 5 % of 200, within three standard errors; the sign-flip test alone would find 29 %."""
    random = np.random.default_rng(7)
    found = [paired_difference(*draw(random, 3, 100, seed_sd=0.07)) for _ in range(200)]
    assert sum(one.p < 0.05 for one in found) <= 19


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("seeds", "rows"), [(1, 200), (5, 100)])
def test_a_detectable_difference_is_found_in_four_of_five_comparisons(seeds, rows):
    random = np.random.default_rng(8)
    announced = np.median([paired_difference(*draw(random, seeds, rows)).detectable for _ in range(20)])
    found = [paired_difference(*draw(random, seeds, rows, difference=announced)).p < 0.05 for _ in range(100)]
    assert 0.7 <= np.mean(found) <= 0.92


@pytest.fixture
def random():
    return np.random.default_rng(0)
