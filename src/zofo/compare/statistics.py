"""Whether one method is better than another: intervals, p-values, and what a comparison could have seen.

    V  =  V_rows + V_seeds,    |difference| > t' sqrt(V),    t' = (V_rows t_rows + V_seeds t_seeds) / V

V_rows is the variance of a mean over test rows, or over clusters of rows, of scores averaged over the seeds. V_seeds is
the variance of a mean over training seeds. t' weighs the t quantiles of C - 1 and S - 1 degrees of freedom, for C
clusters and S seeds. With two seeds or more, it is the only rule of benchmarks/false_alarms.py whose false alarms were
at most 5 %, within the error of the simulation, at every spread between seeds. docs/comparisons.md has the
measurements, also of a bootstrap and of Satterthwaite's degrees of freedom.

References:
    W. G. Cochran and G. M. Cox, "Experimental Designs" (1950) for t'; E. Miller, "Adding Error Bars to Evals" (2024)
    for paired differences and clusters of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi2, permutation_test, t

from zofo.errors import ZofoError
from zofo.tasks.metrics import worst

Array = NDArray[np.float64]
Groups = Sequence[str] | Sequence[int] | None

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 3999  # p-values down to 0.0005
ENOUGH_CLUSTERS = 6  # the signs of five agree by chance in 2 of 32 cases, which is more than 5 %
ENOUGH_ROWS = 8  # of 8 expected rows that one method alone gets right, there are 6 or more in 80 % of cases


@dataclass(frozen=True)
class Mean:
    """A mean score with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference of scores, first method minus second, and how far it can be trusted."""

    difference: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided
    seed_sd: float | None  # of the differences of two runs; None if a method has one seed only
    detectable: float  # the smallest difference that is found in 80 % of cases, at 5 % two-sided
    rows: int
    clusters: int
    seeds: int  # of the method that has fewer


class _Part(NamedTuple):
    """A part of the variance of an estimate, and its degrees of freedom."""

    variance: float
    freedom: int


def mean_interval(scores: Array, groups: Groups = None, *, bounded: bool = True, tasks: Groups = None) -> Mean:
    """The mean over seeds and rows with its 95 % interval.

    Args:
        scores: of each run and test row, float64 (S, R). With one seed, the interval holds for this trained model only.
        groups: the source of each row, where rows share one.
        bounded: whether they are of a metric in [0, 1]; then the interval stays there, and is at least 3 / R wide on
            each side.
        tasks: of each row, where the mean is that of several tasks; each has a number of rows that no chance decides.

    Raises:
        ZofoError: with fewer than two rows or two groups.

    Examples:
        >>> mean_interval(np.ones((1, 100)))
        Mean(mean=1.0, low=0.97, high=1.0)

    References:
        J. A. Hanley and A. Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?" (1983) for 3 / R, the limit
        where all rows are right.
    """
    mean, rows = float(scores.mean()), scores.shape[1]
    reach = _reach([_row_part(scores.mean(0), _codes(groups, rows), tasks), *_seed_part(scores)], LEVEL / 2)
    if not bounded:
        return Mean(mean, mean - reach, mean + reach)
    reach = max(reach, 3 / rows)
    return Mean(mean, max(mean - reach, 0.0), min(mean + reach, 1.0))


def paired_difference(
    a: Array, b: Array, groups: Groups = None, *, same_seeds: bool = True, tasks: Groups = None
) -> Difference:
    """The mean difference of two methods on the same test rows.

        difference = mean over seeds and rows of a - b

    p is the larger of two: that of the interval, and that of the sign-flip test over clusters, which is exact where few
    rows differ but knows nothing of seeds. So p < 0.05 only if the interval excludes 0. With one seed, all of this
    holds for the two trained models and not for their methods.

    Args:
        a: scores of the first method for each run and test row, in [0, 1], float64 (S, R).
        b: scores of the second method, (S, R), or (S', R) with other seeds. What no seed changes, such as a model
            without training, has the same row for every seed of `a`.
        groups: the source of each row, where rows share one: rows of a source count as one observation.
        same_seeds: whether run i of both has the same seed; else the runs of both count as independent.
        tasks: of each row, where the mean is that of several tasks.

    Raises:
        ZofoError: with fewer than two rows or two groups.

    Examples:
        >>> a, b = np.ones((1, 10)), np.array([[0.0] * 7 + [1.0] * 3])
        >>> found = paired_difference(a, b)
        >>> found.difference, found.p, found.seed_sd
        (0.7, 0.015625, None)
    """
    assert a.shape[1] == b.shape[1]
    assert a.shape == b.shape or not same_seeds
    rows, seeds = a.shape[1], min(len(a), len(b))
    codes = _codes(groups, rows)
    clusters = int(codes.max()) + 1
    of_rows = a.mean(0) - b.mean(0)
    of_seeds = _seed_part(a - b) if same_seeds else _seed_part(a) + _seed_part(b)
    parts = [_row_part(of_rows, codes, tasks), *of_seeds]
    difference, reach = float(of_rows.mean()), _reach(parts, LEVEL / 2)
    return Difference(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p=max(_p_of_interval(difference, parts), _sign_flip_p(np.bincount(codes, of_rows).astype(np.float64))),
        seed_sd=None if seeds == 1 else math.sqrt(sum(v * (freedom + 1) for v, freedom in of_seeds)),
        detectable=max(_detectable(parts), ENOUGH_ROWS / rows) if clusters >= ENOUGH_CLUSTERS else math.inf,
        rows=rows,
        clusters=clusters,
        seeds=seeds,
    )


def difference_of_methods(a: Array, b: Array, seeds: int, groups: Groups = None, tasks: Groups = None) -> Difference:
    """`paired_difference` of two methods that were to have `seeds` runs each, of which some may be missing.

    Runs are paired by their seeds only if none is missing: it is not known which ones are. The one run of a method that
    no seed changes counts for every seed: it is given as often.

    Args:
        a: scores of the first method for each of its runs and test row, float64 (S, R).
        b: scores of the second method, (S', R).
        seeds: how many runs both were to have.
        groups: the source of each row, where rows share one.
        tasks: of each row, where the mean is that of several tasks.

    Examples:
        >>> difference_of_methods(np.array([[1.0, 1, 0], [1, 0, 0]]), np.zeros((2, 3)), 2).difference
        0.5
    """
    return paired_difference(a, b, groups, same_seeds=len(a) == len(b) == seeds, tasks=tasks)


def row_values(statistic: Callable[[NDArray[np.intp]], float], rows: int) -> Array:
    """A value for each row, of which a metric such as F1 is the mean: its jackknife pseudo-values, recentred.

        value_r = m + (R - 1) (mean over rows q of m_without_q - m_without_r)

    These take the place of scores in `mean_interval` and `paired_difference`; for a mean over rows they are the scores.

    Args:
        statistic: the metric m of the rows with these indices.
        rows: R, the number of test rows; `statistic` is called R + 1 times.

    Returns:
        float64 (R,).

    Examples:
        >>> scores = np.array([1.0, 0.5, 0.25])
        >>> row_values(lambda rows: scores[rows].mean(), 3).round(6).tolist()
        [1.0, 0.5, 0.25]

    References:
        B. Efron and C. Stein, "The Jackknife Estimate of Variance" (1981).
    """
    every = np.arange(rows)
    without = np.array([statistic(np.delete(every, row)) for row in every], dtype=np.float64)
    return statistic(every) + (rows - 1) * (without.mean() - without)


def over_draws(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, worst and 95 % interval of each score over draws, with those of each draw.

    The interval is mean ± t s / sqrt(N), of N draws with the standard deviation s; none of one draw.

    Examples:
        >>> found = over_draws([{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.7}])["accuracy"]
        >>> found["mean"], found["worst"], round(found["low"], 3)
        (0.65, 0.5, 0.321)
    """
    found: dict[str, dict[str, Any]] = {}
    for key in scores[0]:
        if key == "rows":
            continue
        values = [own[key] for own in scores]
        one = Mean(values[0], math.nan, math.nan)
        whole = mean_interval(np.array([values]), bounded=False) if len(values) > 1 else one
        found[key] = {**asdict(whole), "worst": worst(key, values), "of_draws": values}
    return found


def _codes(groups: Groups, rows: int) -> NDArray[np.intp]:
    """The number of each row's cluster."""
    codes = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    assert codes.size == rows
    if codes.max() == 0:
        raise ZofoError(
            f"{rows} test rows of one source cannot show how much scores vary: evaluate rows of two sources at least"
        )
    return codes


def _row_part(scores: Array, codes: NDArray[np.intp], tasks: Groups) -> _Part:
    """The variance of the mean of `scores` (R,) over rows in clusters, which may differ in size, within each task."""
    of_task = np.zeros(scores.size, np.intp) if tasks is None else np.unique(np.asarray(tasks), return_inverse=True)[1]
    means = np.bincount(of_task, scores) / np.bincount(of_task)
    deviations = np.bincount(codes, scores - means[of_task]) / scores.size
    clusters = deviations.size
    return _Part(clusters / (clusters - 1) * float(deviations @ deviations), clusters - 1)


def _seed_part(scores: Array) -> list[_Part]:
    """The variance of the mean of `scores` (S, R) over training seeds; nothing with one seed."""
    seeds = len(scores)
    return [] if seeds == 1 else [_Part(float(scores.mean(1).var(ddof=1)) / seeds, seeds - 1)]


def _reach(parts: list[_Part], tail: float) -> float:
    """Return t' sqrt(V), which the error of an estimate exceeds on one side with probability `tail`."""
    total = sum(part.variance for part in parts)
    if total == 0:
        return 0.0
    return sum(part.variance * float(t.isf(tail, part.freedom)) for part in parts) / math.sqrt(total)


def _detectable(parts: list[_Part]) -> float:
    """The difference whose estimate lies beyond the interval's reach in 80 % of cases.

    A variance of few degrees of freedom is mostly estimated too small: half of the estimates are below the median.
    """
    corrected = [_Part(variance * df / float(chi2.median(df)), df) for variance, df in parts]
    return _reach(corrected, LEVEL / 2) + _reach(corrected, 1 - POWER)


def _p_of_interval(difference: float, parts: list[_Part]) -> float:
    """The level at which the interval begins to exclude 0."""

    def excess(p: float) -> float:
        return _reach(parts, p / 2) - abs(difference)

    smallest = 1 / (10 * RESAMPLES)  # the sign-flip test gives a larger one
    root: Any = brentq(excess, smallest, 1.0) if excess(smallest) > 0 else smallest
    return float(root)


def _sign_flip_p(sums: Array) -> float:
    """P-value of the cluster sums if each could as well have the other sign; exact up to 11 of them."""
    differing = sums[sums != 0]
    if differing.size < 2:
        return 1.0
    found: Any = permutation_test(
        (differing,),
        np.sum,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=1000,  # faster than all at once
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
