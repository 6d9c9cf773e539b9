"""`python benchmarks/false_alarms.py`: how often does a comparison find a difference between methods that have none?

Synthetic scores of two methods that are equal in expectation, for numbers of seeds, rows and clusters of rows, and for
standard deviations over training seeds of a method's true accuracy; then with a true difference as large as the
comparison announced as `detectable`. Beside `paired_difference` it tries other rules on the same scores. Writes
`benchmarks/results/false-alarms.json` and prints the first table of docs/comparisons.md; 15 minutes on one core.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from scipy.stats import binomtest, norm, t

from timing import RESULTS
from zofo.compare.statistics import LEVEL, Array, Difference, paired_difference, row_values
from zofo.tasks.metrics import score

FILE = RESULTS / "false-alarms.json"
REPETITIONS, WITH_A_DIFFERENCE = 1000, 300
SHARED, OWN, NOISE = 0.5, 0.3, 0.2  # of a score's latent variance: of the row, of method and row, of the run
WITHIN = 0.5  # share of the first two that the rows of a cluster have in common
RESAMPLES = 400


@dataclass(frozen=True)
class Setting:
    """What synthetic scores are like."""

    seeds: int
    rows: int
    clusters: int  # 0: the rows are independent
    seed_sd: float  # of a method's true accuracy
    accuracy: float = 0.7
    other_seeds: int = 0  # of the second method, unpaired; 0: the same seeds
    correlation: float = 0.0  # of the two methods' true accuracies over seeds
    metric: str = "accuracy"


class Scores(NamedTuple):
    """Scores of two methods, (S, R) each, and the cluster of each row."""

    a: Array
    b: Array
    groups: list[int] | None


def main() -> None:
    """Takes all settings; the first table is that of the docs."""
    found: list[dict[str, Any]] = []
    for number, setting in enumerate(settings()):
        found.append(asdict(setting) | measure(setting, number))
        print(json.dumps(found[-1]), flush=True)
        lines = ",\n".join(map(json.dumps, found))  # a line for each setting
        versions = f'"numpy": "{np.__version__}", "scipy": "{scipy.__version__}"'
        FILE.write_text(f'{{{versions}, "settings": [\n{lines}\n]}}\n')
    print("\n".join(table(found)))


def settings() -> Iterator[Setting]:
    """Every combination, and then the corners."""
    for seeds, rows, clustered, sd in itertools.product((1, 3, 5), (100, 400), (False, True), (0.0, 0.01, 0.03)):
        yield Setting(seeds, rows, rows // 10 if clustered else 0, sd)
    yield Setting(2, 400, 0, 0.03)
    yield Setting(3, 400, 0, 0.1)
    yield Setting(3, 400, 0, 0.03, correlation=0.7)
    yield Setting(3, 400, 0, 0.03, other_seeds=5)
    yield Setting(1, 100, 0, 0.0, accuracy=0.97)
    yield Setting(3, 100, 0, 0.01, accuracy=0.97)
    yield Setting(3, 100, 0, 0.01, metric="macro_f1")


def measure(setting: Setting, number: int) -> dict[str, Any]:
    """How often a difference is found where there is none, and where there is one as large as announced."""
    random = np.random.default_rng(number)
    compared = [compare(setting, random, 0.0) for _ in range(REPETITIONS)]
    announced = float(np.median([found.detectable for found, _ in compared]))
    kept: dict[str, Any] = {"false_alarms": share([found.p < LEVEL for found, _ in compared])}
    for rule in compared[0][1]:
        kept[f"{rule}, false_alarms"] = share([others[rule] for _, others in compared])
    if setting.seed_sd in (0.0, 0.03) and setting.metric == "accuracy":
        with_difference = [compare(setting, random, announced) for _ in range(WITH_A_DIFFERENCE)]
        kept |= {"announced": round(announced, 4), "found": share([found.p < LEVEL for found, _ in with_difference])}
        for rule in with_difference[0][1]:
            kept[f"{rule}, found"] = share([others[rule] for _, others in with_difference])
    return kept


def compare(setting: Setting, random: np.random.Generator, difference: float) -> tuple[Difference, dict[str, bool]]:
    """A comparison of new scores, and what other rules say of the same scores."""
    a, b, groups = drawn = draw(setting, random, difference)
    if setting.metric != "accuracy":
        a, b = f1_values(drawn, random)
    found = paired_difference(a, b, groups, same_seeds=not setting.other_seeds)
    assert found.p >= LEVEL or found.low > 0 or found.high < 0
    tried = setting.seeds > 1 and setting.rows == 400 and not setting.other_seeds
    return found, other_rules(drawn, random) if tried else {}


def draw(setting: Setting, random: np.random.Generator, difference: float) -> Scores:
    """Binary scores: right where a latent normal variable is below the quantile of the run's true accuracy."""
    rows, clusters = setting.rows, setting.clusters
    groups = np.arange(rows) % clusters if clusters else np.arange(rows)

    def of_rows(methods: int) -> Array:
        common = random.normal(size=(methods, clusters or rows))[:, groups]
        return (
            math.sqrt(WITHIN) * common + math.sqrt(1 - WITHIN) * random.normal(size=(methods, rows))
            if clusters
            else common
        )

    shared, own = of_rows(1), of_rows(2)
    number = (setting.seeds, setting.other_seeds or setting.seeds)
    effects = [random.normal(size=seeds) for seeds in number]
    if setting.correlation:
        effects[1] = setting.correlation * effects[0] + math.sqrt(1 - setting.correlation**2) * effects[1]
    scores: list[Array] = []
    for method, sign in enumerate((0.5, -0.5)):
        accuracy = np.clip(setting.accuracy + sign * difference + setting.seed_sd * effects[method], 0.001, 0.999)
        noise = random.normal(size=(number[method], rows))
        latent = math.sqrt(SHARED) * shared + math.sqrt(OWN) * own[method] + math.sqrt(NOISE) * noise
        scores.append((latent < norm.ppf(accuracy)[:, None]).astype(np.float64))
    return Scores(scores[0], scores[1], groups.tolist() if clusters else None)


def f1_values(scores: Scores, random: np.random.Generator) -> tuple[Array, Array]:
    """Row values of macro F1 over three classes, one of them rare, if wrong rows have one of the other classes."""
    labels = random.choice(3, size=scores.a.shape[1], p=(0.5, 0.4, 0.1))

    def values(right: Array) -> Array:
        answers = np.where(right > 0, labels, (labels + random.integers(1, 3, labels.size)) % 3).astype(str)
        truth = [[str(label)] for label in labels]
        return row_values(
            lambda rows: score("macro_f1", answers[rows].tolist(), [truth[row] for row in rows]), labels.size
        )

    return np.array([values(row) for row in scores.a]), np.array([values(row) for row in scores.b])


def other_rules(scores: Scores, random: np.random.Generator) -> dict[str, bool]:
    """Whether other rules find a difference."""
    codes = np.arange(scores.a.shape[1]) if scores.groups is None else np.array(scores.groups)
    sums = np.array([np.bincount(codes, row) for row in scores.a - scores.b])  # (S, C), clusters of equal size
    means = sums / (scores.a.shape[1] / sums.shape[1])
    seeds, clusters = means.shape
    difference, of_rows = means.mean(), means.mean(0).var(ddof=1) / clusters
    of_seeds = means.mean(1).var(ddof=1) / seeds
    total = of_rows + of_seeds
    freedom = total**2 / (of_rows**2 / (clusters - 1) + of_seeds**2 / (seeds - 1))
    single = means - means.mean(0) - means.mean(1)[:, None] + difference
    of_both = (single**2).sum() / (seeds - 1) / (clusters - 1) / seeds / clusters
    quantile = (t.isf(LEVEL / 2, clusters - 1) * of_rows + t.isf(LEVEL / 2, seeds - 1) * of_seeds) / total
    picked = random.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES) / clusters
    runs = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    low, high = np.quantile(np.einsum("ns,sc,nc->n", runs, means, picked), (LEVEL / 2, 1 - LEVEL / 2))
    return {
        "rows only": bool(abs(difference) > t.isf(LEVEL / 2, clusters - 1) * math.sqrt(of_rows)),
        "bootstrap of seeds and rows": bool(low > 0 or high < 0),
        "Satterthwaite": bool(abs(difference) > t.isf(LEVEL / 2, freedom) * math.sqrt(total)),
        "less interaction": bool(abs(difference) > quantile * math.sqrt(of_rows + max(of_seeds - of_both, 0.0))),
    }


def share(cases: list[bool]) -> list[float]:
    """The share of true cases with its exact 95 % interval."""
    exact = binomtest(sum(cases), len(cases)).proportion_ci()
    return [round(float(number), 4) for number in (np.mean(cases), exact.low, exact.high)]


def table(found: list[dict[str, Any]]) -> list[str]:
    """docs/comparisons.md's first table: a row for the three standard deviations over seeds of each combination."""
    lines: list[str] = []
    for none, small, large in (found[first : first + 3] for first in range(0, 36, 3)):
        alarms = (told(old["false_alarms"]) for old in (none, small, large))
        power = (f"{100 * old['announced']:.1f}: {100 * old['found'][0]:.0f} %" for old in (none, large))
        rows = f"{none['rows']} in {none['clusters']} clusters" if none["clusters"] else str(none["rows"])
        lines.append(" | ".join(["", str(none["seeds"]), rows, *alarms, *power, ""]).strip())
    return lines


def told(numbers: list[float]) -> str:
    """A share with its interval, in percent."""
    rate, low, high = (100 * number for number in numbers)
    return f"{rate:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
