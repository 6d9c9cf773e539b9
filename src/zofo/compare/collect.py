"""What the runs of a comparison have found, as the content of `report.json`, and as a table."""

import csv
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from zofo.compare.budget import iteration_cost
from zofo.compare.plan import Cell, Plan, failure, score_of
from zofo.compare.statistics import Array, Difference, Groups, mean_interval, paired_difference
from zofo.compare.verdicts import holm, verdict
from zofo.compare.work import command
from zofo.config import parse_config
from zofo.errors import ZofoError

_VERSIONS = ("zofo", "torch", "transformers", "peft")
_COLUMNS = ("task", "run", "seed", "score", "loss", "steps", "forward_equivalents", "seconds", "peak_bytes", "folder")


def report(plan: Plan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """All numbers of the report; runs that have failed or are not done are named and left out."""
    tasks = [_Task(plan, task) for task in plan.tasks]
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
        "notes": [*notes, *one, *(tuned if plan.search else ())],
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
            lines.writerow(
                [cell.task_name, cell.run, cell.seed, *map(abs, score_of(cell)), *cost.values(), cell.folder]
            )
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

    @property
    def scores(self) -> list[float]:
        return [row["score"] for row in self.rows]

    @property
    def cost(self) -> dict[str, float]:
        """Of training, evaluations aside."""
        each = iteration_cost(self.config) if self.config.method_class.trains() else 0.0
        found = self.results["cost"]
        return {
            "steps": self.steps,
            "forward_equivalents": each * self.steps,
            "seconds": found["wall_seconds"],
            "peak_bytes": found["peak_memory_bytes"],
        }

    def curve(self, metric: str) -> list[dict[str, float]]:
        """Loss and score on dev rows against what had been spent."""
        whole, points = self.cost, list[dict[str, float]]()
        for entry in self.history:
            if "eval_loss" in entry and self.steps:
                part = entry["step"] / self.steps
                spent = {key: whole[key] * part for key in ("forward_equivalents", "seconds")}
                points.append(spent | {"loss": entry["eval_loss"], "score": entry.get(f"eval_{metric}", float("nan"))})
        return points


class _Task:
    def __init__(self, plan: Plan, task: str) -> None:
        self._plan, self._task = plan, task
        cells = [cell for cell in plan.cells() if cell.trial is None and cell.task == task]
        self._failed = [cell for cell in cells if failure(plan, cell)]
        self._runs = {run: [_Run(c) for c in cells if c.run == run and c.is_done] for run in plan.runs}
        self._runs = {run: found for run, found in self._runs.items() if found}
        self._judged: dict[str, dict[str, Any]] = {}
        self._sentences: list[str] = []
        self._require_same_rows()
        self.differences = self._differences()

    def judge(self, run: str, found: Difference, p: float) -> None:
        """Takes the p-value that counts after all comparisons."""
        names = ("difference", "low", "high", "p", "detectable", "seed_sd")
        self._judged[run] = {name: vars(found)[name] for name in names} | {"p_holm": p, "significant": p < 0.05}
        self._sentences.append(verdict(found, p, run, self._plan.baseline, Path(self._task).stem))

    def content(self) -> dict[str, Any]:
        """This task in `report.json`."""
        first = next((runs[0] for runs in self._runs.values()), None)
        groups = self._groups(first)
        missing = "; ".join(f"{cell.run} with seed {cell.seed} failed and is left out" for cell in self._failed)
        nothing = f"nothing to compare with {self._plan.baseline}"
        return {
            "name": Path(self._task).stem,
            "metric": self._metric(first) if first else "",
            "rows": len(first.rows) if first else 0,
            "clusters": len(set(groups)) if groups else len(first.rows) if first else 0,
            "seeds": list(self._plan.seeds),
            "template": int(self._plan.base.get("template", 0)),
            "sentence": ". ".join(filter(None, [*(self._sentences or [nothing]), missing])) + ".",
            "methods": [self._method(run, found) for run, found in self._runs.items()],
            "failed": [{"name": c.run, "seed": c.seed, "message": failure(self._plan, c)} for c in self._failed],
        }

    def _method(self, run: str, found: Sequence[_Run]) -> dict[str, Any]:
        costs = [one.cost for one in found]
        metric = self._metric(found[0])
        mean = mean_interval(self._scores(run), self._groups(found[0]))
        return {
            "name": run,
            **vars(mean),
            "scores": {f"seed {one.cell.seed}": float(np.mean(one.scores)) for one in found},
            "difference": self._judged.get(run),
            "cost": {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]},
            "curve": found[0].curve(metric),
            "forgetting": None,
            "search": self._search(run),
            "commands": [" ".join(command(one.cell)) for one in found],
        }

    def _search(self, run: str) -> list[dict[str, Any]]:
        chosen = self._plan.chosen(run, self._task)
        trials = [c for c in self._plan.trials() if (c.run, c.task) == (run, self._task) and c.is_done]
        scores = [score_of(cell) for cell in trials]
        return [
            {"settings": cell.settings, "score": score, "loss": -loss, "chosen": cell.settings == chosen}
            for cell, (score, loss) in zip(trials, scores, strict=True)
        ]

    def _differences(self) -> dict[str, Difference]:
        base = self._plan.baseline
        if base not in self._runs:
            return {}
        groups, b = self._groups(self._runs[base][0]), self._scores(base)
        found: dict[str, Difference] = {}
        for run in self._runs:
            if run != base:
                a = self._scores(run)
                if len(a) == len(b) == len(self._plan.seeds) or 1 in (len(a), len(b)):
                    seeds = max(len(a), len(b))
                    first, second = (one.repeat(seeds, 0) if len(one) == 1 else one for one in (a, b))
                    found[run] = paired_difference(first, second, groups)
                else:
                    found[run] = paired_difference(a, b, groups, same_seeds=False)
        return found

    def _scores(self, run: str) -> Array:
        return np.array([one.scores for one in self._runs[run]], dtype=np.float64)

    def _metric(self, run: _Run) -> str:
        """The task's metric if it is the mean of the rows' scores; else the share of right rows stands for it."""
        metric, value = next(iter(run.results["metrics"]["upper"].items()))
        return metric if abs(float(np.mean(run.scores)) - value) < 1e-6 else f"right rows (the metric is {metric})"

    def _groups(self, run: _Run | None) -> Groups:
        groups = [row["group"] for row in run.rows] if run else []
        return groups if any(groups) else None

    def _require_same_rows(self) -> None:
        rows = {tuple(row["row"] for row in one.rows) for found in self._runs.values() for one in found}
        if len(rows) > 1:
            raise ZofoError(
                f"the runs of {Path(self._task).stem} in {self._plan.output_dir} were scored on different rows: its "
                "data has changed since; choose another output_dir"
            )
