"""What the runs of a comparison have found, as the content of `report.json`, and as a table."""

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from zofo.compare.budget import iteration_cost
from zofo.compare.held_back import gains, held_back
from zofo.compare.plan import (
    Cell,
    Division,
    Plan,
    before_file,
    failure,
    forgetting_file,
    mean_score,
    score_of,
    templates_file,
    varies,
)
from zofo.compare.statistics import (
    LEVEL,
    Array,
    Difference,
    Groups,
    difference_of_methods,
    mean_interval,
    row_values,
)
from zofo.compare.verdicts import Compared, holm, summary, verdict
from zofo.compare.work import command
from zofo.config_parser import parse_config
from zofo.errors import ZofoError
from zofo.tasks.lists import name_of_task
from zofo.tasks.metrics import score
from zofo.tasks.rewards import REWARD

_VERSIONS = ("zofo", "torch", "transformers", "peft")
_COLUMNS = ("task", "run", "seed", "score", "loss", "steps", "forward_equivalents", "seconds", "peak_bytes", "folder")


def report(plan: Plan) -> dict[str, Any]:
    """All numbers of the report, in however many goes they came; runs that have failed are named and left out.

    Raises:
        ZofoError: if two runs of a task were scored on different rows.
    """
    tasks = [_Task(plan, division) for division in plan.divisions]
    compared = [(task, run, found) for task in tasks for run, found in task.differences.items()]
    adjusted = holm([found.p for _, _, found in compared]) if compared else []
    for (task, run, found), p in zip(compared, adjusted, strict=True):
        task.judge(run, found, p)
    one = (
        ["One seed: what is said holds for these trained models, not for the methods."] if len(plan.seeds) == 1 else []
    )
    untuned = [run for run in plan.runs if run not in plan.search]
    tuned = [f"Tuned on dev rows: {', '.join(plan.search)}; not tuned: {', '.join(untuned) or 'none'}."]
    return {
        "title": plan.title,
        "baseline": plan.baseline,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "versions": {name: version(name) for name in _VERSIONS},
        "notes": [*one, *(tuned if plan.search else ())],
        "plan": plan.text,
        "tasks": [task.content() for task in tasks],
    }


def as_csv(plan: Plan) -> str:
    """A line for each run of the table."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(_COLUMNS)
    for cell in plan.cells():
        if cell.trial is None and cell.is_done:
            run = _Run(cell)
            cost = run.cost
            value, minus_loss = score_of(cell)
            lines.writerow([cell.division.name, cell.run, cell.seed, value, -minus_loss, *cost.values(), cell.folder])
    return text.getvalue()


class _Run:
    """A run that has ended, as its folder says."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.results = json.loads((cell.folder / "results.json").read_text(encoding="utf-8"))
        lines = (cell.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.config = parse_config(yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8")), [])
        state = json.loads((cell.folder / "trainer_state.json").read_text(encoding="utf-8"))
        self.steps, self.history = int(state["global_step"]), state["log_history"]

    @cached_property
    def scores(self) -> Array:
        """A value of each test row, whose mean is the metric; of metrics that have none, whether the row is right.

        Of several tasks, the metric is the mean of the tasks' own ones, so that a row of a small task counts for more.
        """
        of_task: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            of_task.setdefault(row.get("task", ""), []).append(number)
        values = np.empty(len(self.rows), dtype=np.float64)
        for numbers in of_task.values():
            share = len(self.rows) / (len(of_task) * len(numbers))
            values[numbers] = share * self._values([self.rows[number] for number in numbers])
        return values

    def _values(self, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Of the rows of one task."""
        if self.metric != "macro_f1":
            return np.array([row["score"] for row in rows], dtype=np.float64)
        predictions, right = [row["prediction"] for row in rows], [row["right"] for row in rows]
        return row_values(
            lambda kept: score("macro_f1", [predictions[r] for r in kept], [right[r] for r in kept]), len(rows)
        )

    @property
    def metric(self) -> str:
        """What decides on this task."""
        return next(iter(self.results["metrics"]["upper"]))

    @property
    def cost(self) -> dict[str, float | None]:
        """Of training, evaluations aside; without training, nothing was measured."""
        trains, found = self.config.method_class.trains(), self.results["cost"]
        return {
            "steps": self.steps,
            "forward_equivalents": iteration_cost(self.config) * self.steps if trains else 0.0,
            "seconds": found["wall_seconds"] if trains else None,
            "peak_bytes": found["peak_memory_bytes"] if trains else None,
        }

    def curve(self, metric: str) -> list[dict[str, float]]:
        """Loss and score on dev rows against what had been spent."""
        whole, points = {key: value or 0.0 for key, value in self.cost.items()}, list[dict[str, float]]()
        for entry in self.history:
            if "eval_loss" in entry and self.steps:
                part = entry["step"] / self.steps
                spent = {key: whole[key] * part for key in ("forward_equivalents", "seconds")}
                points.append(spent | {"loss": entry["eval_loss"], "score": entry.get(f"eval_{metric}", float("nan"))})
        return points


class _Task:
    """All runs on one task."""

    def __init__(self, plan: Plan, division: Division) -> None:
        self._plan, self._division = plan, division
        cells = [cell for cell in plan.cells() if cell.trial is None and cell.division == division]
        self._failed = [cell for cell in cells if failure(plan, cell)]
        self._runs = {run: [_Run(c) for c in cells if c.run == run and c.is_done] for run in plan.runs}
        self._runs = {run: found for run, found in self._runs.items() if found}
        self._fixed = {run for run, found in self._runs.items() if not varies(found[0].config)}
        folders = {run: [one.cell.folder for one in own] for run, own in self._runs.items()}
        self._held_back = held_back(plan, folders, self._fixed)
        self._judged: dict[str, dict[str, Any]] = {}
        self._compared: list[Compared] = []
        self._require_same_rows()
        self._unscored = self._leave_out_unscored()
        self.differences = self._differences()

    def judge(self, run: str, found: Difference, p: float) -> None:
        """Takes the p-value that counts after all comparisons."""
        names = ("difference", "low", "high", "p", "detectable", "seed_sd")
        self._judged[run] = {name: vars(found)[name] for name in names} | {"p_holm": p, "significant": p < LEVEL}
        self._compared.append(Compared(run, found, p))

    def content(self) -> dict[str, Any]:
        """This task in `report.json`."""
        first = next((runs[0] for runs in self._runs.values()), None)
        groups, base, name = self._groups(first), self._plan.baseline, self._division.name
        trials = [
            cell
            for run in self._plan.search
            for cells in self._plan.tried(run, self._division)
            for cell in cells
            if failure(self._plan, cell)
        ]
        methods = [self._method(run, found) for run, found in self._runs.items()]
        return {
            "name": name,
            "metric": self._metric(first) if first else "",
            "rows": len(first.rows) if first else 0,
            "clusters": len(set(groups)) if groups else len(first.rows) if first else 0,
            "seeds": list(self._plan.seeds),
            "template": int(self._plan.base.get("template", 0)),
            "sentence": summary(self._compared, base) + self._left_out(),
            "verdicts": [verdict(one.found, one.p, one.method, base, name) for one in self._compared],
            "gains": gains(methods, base),
            "methods": methods,
            "failed": [
                {
                    "name": cell.run if cell.trial is None else f"{cell.run}, trial {cell.trial}",
                    "seed": cell.seed,
                    "message": failure(self._plan, cell),
                }
                for cell in (*trials, *self._failed)
            ],
        }

    def _left_out(self) -> str:
        """What is said of methods without all of their runs."""
        names = [f"{cell.run} with seed {cell.seed} failed and is left out" for cell in self._failed]
        names += [f"{run} has no run" for run in self._plan.runs if run not in self._runs]
        names += [f"{self._unscored} test rows, without a reward in some run, are left out"] if self._unscored else []
        return "".join(f" {name}." for name in names)

    def _method(self, run: str, found: Sequence[_Run]) -> dict[str, Any]:
        costs = [one.cost for one in found]
        bounded, tasks = found[0].metric != REWARD, self._tasks(found[0])
        mean = mean_interval(self._scores(run), self._groups(found[0]), bounded=bounded, tasks=tasks)
        return {
            "name": run,
            **vars(mean),
            "scores": {f"seed {one.cell.seed}": float(np.mean(one.scores)) for one in found},
            "difference": self._judged.get(run),
            "cost": {key: _mean([cost[key] for cost in costs]) for key in costs[0]},
            "batch": found[0].config.per_device_train_batch_size * found[0].config.gradient_accumulation_steps,
            "curve": found[0].curve(found[0].metric),
            "templates": self._templates(found),
            "forgetting": self._forgetting(found),
            "adapted": self._held_back.get(run),
            "diagnosis": self._diagnosis(found),
            "search": self._search(run),
            "commands": [" ".join(command(one.cell)) for one in found],
        }

    def _templates(self, found: Sequence[_Run]) -> list[float] | None:
        """The metric by each template of the task, averaged over seeds."""
        if not self._plan.templates:
            return None
        files = [templates_file(one.cell.folder) for one in found]
        scores = [[_first(of_one) for of_one in _scored(file)["templates"]] for file in files]
        return np.mean(scores, axis=0).tolist()

    def _forgetting(self, found: Sequence[_Run]) -> dict[str, Any] | None:
        """The metric on the other task before training and after it, and the changes of all seeds."""
        if self._plan.forgetting is None or not found[0].config.method_class.trains():
            return None
        before = _first(_scored(before_file(self._plan)))
        after = [_first(_scored(forgetting_file(self._plan, one.cell.folder))) for one in found]
        return {
            "task": name_of_task(self._plan.forgetting),
            "before": before,
            "after": float(np.mean(after)),
            "changes": [one - before for one in after],
        }

    def _diagnosis(self, found: Sequence[_Run]) -> dict[str, float | None] | None:
        """Of runs with `diagnose`, averaged over seeds: what their estimates were worth, and whose the gain is."""
        entries = [one.results["diagnosis"] for one in found if "diagnosis" in one.results]
        places = {
            "signal_to_noise": ("signal_to_noise", "mean"),
            "cosine": ("cosine", "mean"),
            "expected_cosine": ("cosine", "expected"),
            "penalty_gap": ("penalty_gap", "last"),
        }
        places |= {f"{part}_gain": ("gain", found[0].metric, part) for part in ("backbone", "adapter")}
        return {name: _mean_at(entries, path) for name, path in places.items()} if entries else None

    def _search(self, run: str) -> list[dict[str, Any]]:
        chosen = self._plan.chosen(run, self._division)
        ended = [
            cells for cells in self._plan.tried(run, self._division) if cells and all(cell.is_done for cell in cells)
        ]
        scores = map(mean_score, ended)
        return [
            {"settings": cells[0].settings, "score": dev, "loss": -loss, "chosen": cells[0].settings == chosen}
            for cells, (dev, loss) in zip(ended, scores, strict=True)
        ]

    def _differences(self) -> dict[str, Difference]:
        base = self._plan.baseline
        if base not in self._runs:
            return {}
        first, b = self._runs[base][0], self._scores(base)
        clusters = self._groups(first), self._tasks(first)
        found: dict[str, Difference] = {}
        for run in self._runs:
            if run != base:
                found[run] = difference_of_methods(self._scores(run), b, len(self._plan.seeds), *clusters)
        return found

    def _scores(self, run: str) -> Array:
        scores = np.array([one.scores for one in self._runs[run]], dtype=np.float64)
        return scores.repeat(len(self._plan.seeds), 0) if run in self._fixed else scores

    def _metric(self, run: _Run) -> str:
        """The task's metric if it is the mean of the rows' values; else the share of right rows stands for it."""
        metric, value = run.metric, run.results["metrics"]["upper"][run.metric]
        if metric == REWARD:
            return metric  # of the rows that are compared; the run has more where another one has no reward
        return metric if abs(float(np.mean(run.scores)) - value) < 1e-6 else f"right rows (the metric is {metric})"

    def _groups(self, run: _Run | None) -> Groups:
        """The source of each row: a row without one is its own, and those of different tasks are different."""
        rows = run.rows if run else []
        if not any(row["group"] for row in rows):
            return None
        return [str((row.get("task"), row["group"] or number)) for number, row in enumerate(rows)]

    def _tasks(self, run: _Run) -> Groups:
        """The task of each row, where a run has several."""
        return [row["task"] for row in run.rows] if any("task" in row for row in run.rows) else None

    def _require_same_rows(self) -> None:
        rows = {tuple(row["row"] for row in one.rows) for found in self._runs.values() for one in found}
        if len(rows) > 1:
            raise ZofoError(
                f"the runs of {self._division.name} in {self._plan.output_dir} were scored on different rows: its "
                "data has changed since; choose another output_dir"
            )

    def _leave_out_unscored(self) -> int:
        """Keeps the rows to which a reward applies in every run, so that all are compared on the same ones."""
        every = [one for found in self._runs.values() for one in found]
        unscored = {number for one in every for number, row in enumerate(one.rows) if row["score"] is None}
        for one in every:
            one.rows = [row for number, row in enumerate(one.rows) if number not in unscored]
        return len(unscored)


def _scored(file: Path) -> dict[str, Any]:
    """The scores that `zofo eval` has written on one task."""
    (scores,) = json.loads(file.read_text(encoding="utf-8"))["tasks"].values()
    return scores


def _first(scores: Mapping[str, float]) -> float:
    """The metric that decides."""
    return next(iter(scores.values()))


def _mean_at(entries: Sequence[dict[str, Any]], path: Sequence[str]) -> float | None:
    """The mean of what stands at a path of keys; None if it stands nowhere."""
    found: list[Any] = list(entries)
    for key in path:
        found = [entry[key] for entry in found if key in entry]
    return _mean(found)


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
