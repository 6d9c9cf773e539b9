"""What the runs of a comparison are worth on held-back tasks, after they were adapted to these."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofo.compare.plan import Adapting, Plan, adapted_file
from zofo.compare.statistics import Array, difference_of_methods, mean_interval
from zofo.tasks.lists import name_of_task

_BEFORE = ("zero_shot", "in_context")


def held_back(plan: Plan, folders: Mapping[str, Sequence[Path]], fixed: Collection[str]) -> dict[str, dict[str, Any]]:
    """By method: its scores on each held-back task and their means, and what they gain over those of the baseline.

    Args:
        plan: the comparison, with tasks to adapt to.
        folders: of each method the folders of its runs, one for each seed.
        fixed: the methods that no seed changes, of which one run stands for all seeds.
    """
    asked = plan.adapting
    if asked is None:
        return {}
    read = {run: [_results(plan, places, task) for task in asked.tasks] for run, places in folders.items()}
    seeds = len(plan.seeds)
    draws = {
        run: [_draws(results).repeat(seeds if run in fixed else 1, 0) for results in found]
        for run, found in read.items()
    }
    base = draws.get(plan.baseline, [])
    return {
        run: _of_method(asked, found, draws[run], [] if run == plan.baseline else base, seeds)
        for run, found in read.items()
    }


def gains(methods: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """A line for each method of a report's task: its mean gain over the baseline after adapting.

    Examples:
        >>> gain = {"difference": 0.1234, "low": -0.01, "high": 0.25}
        >>> adapted = {"shots": 8, "tasks": [{"name": "tweets"}], "gain": gain}
        >>> gains([{"name": "meta", "adapted": adapted}, {"name": "original", "adapted": None}], "original")
        ['meta, adapted to tweets from 8 rows: +12.3 points over original (95 % interval -1.0 to +25.0).']
    """
    lines: list[str] = []
    for method in methods:
        found = method["adapted"]
        if found and found["gain"]:
            names = [task["name"] for task in found["tasks"]]
            tasks = names[0] if len(names) == 1 else f"{len(names)} held-back tasks"
            points, low, high = (f"{100 * found['gain'][key]:+.1f}" for key in ("difference", "low", "high"))
            lines.append(
                f"{method['name']}, adapted to {tasks} from {found['shots']} rows: {points} points over {baseline} "
                f"(95 % interval {low} to {high})."
            )
    return lines


def _results(plan: Plan, folders: Sequence[Path], task: str) -> list[dict[str, Any]]:
    """What `zofo adapt` has written for each seed."""
    return [json.loads(adapted_file(plan, folder, task).read_text(encoding="utf-8")) for folder in folders]


def _of_method(
    asked: Adapting, found: Sequence[list[dict[str, Any]]], each: Sequence[Array], base: Sequence[Array], seeds: int
) -> dict[str, Any]:
    tasks: list[dict[str, Any]] = []
    for number, (task, results) in enumerate(zip(asked.tasks, found, strict=True)):
        metric = _metric(results)
        before = {
            "zero_shot": float(np.mean([one["zero_shot"][metric] for one in results])),
            "in_context": float(np.mean([one["in_context"][metric]["mean"] for one in results])),
        }
        gain = _gain(each[number], base[number], seeds) if base else None
        tasks.append({"name": name_of_task(task), "metric": metric, **before, **_spread(each[number]), "gain": gain})
    means = {key: float(np.mean([task[key] for task in tasks])) for key in _BEFORE}
    worst = min(task["worst"] for task in tasks)
    gain = _gain(_mean(each), _mean(base), seeds) if base else None
    return {
        "shots": asked.shots,
        "draws": asked.draws,
        "tasks": tasks,
        **means,
        **_spread(_mean(each)),
        "worst": worst,
        "gain": gain,
    }


def _metric(results: Sequence[Mapping[str, Any]]) -> str:
    return str(next(iter(results[0]["zero_shot"])))


def _draws(results: Sequence[Mapping[str, Any]]) -> Array:
    """(S, N): the metric after adapting, of each seed and draw."""
    metric = _metric(results)
    return np.array([one["metrics"][metric]["of_draws"] for one in results], dtype=np.float64)


def _mean(each: Sequence[Array]) -> Array:
    """The mean over tasks, of each seed and draw."""
    return np.mean(np.stack(each), axis=0)


def _gain(a: Array, b: Array, seeds: int) -> dict[str, float] | None:
    """The difference of two methods on the same draws, which are its rows; none of one draw, as it has no interval."""
    if a.shape[1] < 2:
        return None
    found = difference_of_methods(a, b, seeds)
    return {"difference": found.difference, "low": found.low, "high": found.high}


def _spread(draws: Array) -> dict[str, Any]:
    """Mean, worst and interval of a metric; all seeds have the same draws, which are its rows; no interval of one."""
    worst = float(draws.min())
    if draws.shape[1] < 2:
        return {"mean": float(draws.mean()), "worst": worst, "low": None, "high": None}
    found = mean_interval(draws, bounded=False)
    return {"mean": found.mean, "worst": worst, "low": found.low, "high": found.high}
