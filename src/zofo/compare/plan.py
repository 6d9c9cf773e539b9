"""The runs that a comparison consists of, each with its folder and its keys."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from zofo.compare.budget import Pace, steps_within
from zofo.compare.search import Settings
from zofo.config import ZOFOConfig
from zofo.config_parser import parse_config
from zofo.errors import ZofoError
from zofo.identity import contents
from zofo.keys import CHANNEL, OF_ADAPTER
from zofo.spelling import ANY_TASK_KEYS
from zofo.tasks.lists import name_of_task

FRESH = "fresh"
_ADAPTED = ("dev_size", "test_size", "data_seed", "per_device_eval_batch_size", "use_cpu")


@dataclass(frozen=True)
class Division:
    """Tasks of one run, mostly one, whose rows are divided in one way: what methods are compared on, by rows."""

    tasks: tuple[str, ...]
    data_seed: int
    train_size: int | None  # None: that of the base
    name: str

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, without their folders."""
        return [name_of_task(task) for task in self.tasks]


@dataclass(frozen=True)
class Adapting:
    """Held-back tasks that each run of the table is adapted to, from `shots` rows in `draws` draws.

    `start` says by method what adapters begin with, fresh if it does not say; `keys` are further ones of `zofo adapt`.
    """

    tasks: tuple[str, ...]
    shots: int
    draws: int
    start: dict[str, str]
    keys: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: of a method on a task with a seed, or a trial of the search, with its number."""

    run: str
    division: Division
    seed: int
    trial: int | None
    settings: Settings  # what the search chose, or tries
    keys: dict[str, Any]
    folder: Path
    evaluations: Mapping[Path, list[str]] = field(default_factory=dict[Path, list[str]])  # after it: result -> command

    @property
    def name(self) -> str:
        """What it is called in messages."""
        which = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}, seed {self.seed}"
        return f"{self.division.name}, {self.run}, {which}"

    @property
    def has_ended(self) -> bool:
        """Whether its training has ended, with results."""
        return (self.folder / "results.json").is_file()

    @property
    def is_done(self) -> bool:
        """Whether its training has ended, and all that is evaluated after it."""
        return self.has_ended and all(file.is_file() for file in self.evaluations)


@dataclass(frozen=True)
class Plan:
    """A comparison, checked; `read_plan` makes one."""

    text: str
    title: str
    output_dir: Path
    base: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    divisions: tuple[Division, ...]
    seeds: tuple[int, ...]
    budget: tuple[str, float]
    baseline: str
    search: dict[str, list[Settings]]  # run -> the settings to try
    tuning: tuple[tuple[Division, int], ...]  # what each setting is tried on, with its seed; empty: the table's own
    jobs: int
    pace: Pace
    forgetting: str | None
    templates: bool
    adapting: Adapting | None = None

    def cells(self) -> list[Cell]:
        """All runs: the trials of the search, then those of the table whose settings are known."""
        return [
            *self.trials,
            *(cell for place in self.divisions for run in self.runs for cell in self._row(place, run)),
        ]

    @cached_property
    def trials(self) -> list[Cell]:
        """The runs of the search, on dev rows."""
        places = self.tuning or [(division, self.seeds[0]) for division in self.divisions]
        return [
            self._cell(run, division, seed, number, settings)
            for division, seed in places
            for run, tried in self.search.items()
            for number, settings in enumerate(tried)
        ]

    def tried(self, run: str, division: Division) -> list[list[Cell]]:
        """The trials of each setting that decide for a method: on this division, or on those of `tuning`."""
        trials = [cell for cell in self.trials if cell.run == run and (self.tuning or cell.division == division)]
        return [[cell for cell in trials if cell.trial == number] for number in range(len(self.search.get(run, ())))]

    def chosen(self, run: str, division: Division) -> Settings | None:
        """The settings of a method: the best of its trials; None as long as one is neither done nor failed.

        The mean of the metric decides; of equal ones, that of the loss. A setting with a failed trial is not chosen.
        """
        if run not in self.search:
            return {}
        tried = self.tried(run, division)
        if not all(cell.is_done or failure(self, cell) for cells in tried for cell in cells):
            return None
        whole = [cells for cells in tried if all(cell.is_done for cell in cells)]
        return max(whole, key=mean_score)[0].settings if whole else None

    def keys(self, run: str, division: Division, settings: Settings) -> dict[str, Any]:
        """The keys of a run within the budget, but for its seed and its folder."""
        config = self.config(run, division, settings)
        keys = self._unlimited(run, division, settings)
        return keys | {"max_steps": self._steps(config)} if config.method_class.trains() else keys

    def config(self, run: str, division: Division, settings: Settings) -> ZOFOConfig:
        """The configuration of a run, but for its number of steps, its seed and its folder."""
        keys = self._unlimited(run, division, settings)
        try:
            return parse_config({**keys, "max_steps": 1, "output_dir": "run"}, [])
        except ZofoError as error:
            raise ZofoError(f"run {run}: {error}") from error

    def _unlimited(self, run: str, division: Division, settings: Settings) -> dict[str, Any]:
        task: Any = division.tasks[0] if len(division.tasks) == 1 else [*division.tasks]
        shared: dict[str, Any] = {"task": task, "data_seed": division.data_seed, "zero_shot": False}
        if division.train_size is not None:
            shared["train_size"] = division.train_size
        return {"save_total_limit": 1, **self.base, **self.runs[run], **settings, **shared}

    def _steps(self, config: ZOFOConfig) -> int:
        kind, amount = self.budget
        if kind == "steps":
            return int(amount)
        return steps_within(config, amount) if kind == "forward_equivalents" else self.pace.steps_within(config, amount)

    def _row(self, division: Division, run: str) -> list[Cell]:
        settings = self.chosen(run, division)
        if settings is None:
            return []
        config = self.config(run, division, settings)
        seeds = self.seeds if varies(config) else self.seeds[:1]
        return [self._cell(run, division, seed, None, settings) for seed in seeds]

    def _cell(self, run: str, division: Division, seed: int, trial: int | None, settings: Settings) -> Cell:
        keys = self.keys(run, division, settings) | {"seed": seed}
        if trial is not None:
            keys["final_split"] = "dev"
        name = f"{f'seed-{seed}' if trial is None else f'trial-{trial}'}-{_mark(keys | _contents(keys))}"
        folder = self.output_dir / "runs" / division.name / run / name
        after = {} if trial is not None else self._evaluations(run, folder, keys)
        return Cell(run, division, seed, trial, settings, keys | {"output_dir": str(folder)}, folder, after)

    def _evaluations(self, run: str, folder: Path, keys: dict[str, Any]) -> dict[Path, list[str]]:
        """What is evaluated after a run of the table: result -> the command of zofo that writes it."""
        found: dict[Path, list[str]] = {}
        if self.templates:
            shots = keys.get("train_shots") if "max_steps" in keys else keys.get("shots")
            manner = ["--shots", str(shots)] if shots else []
            manner += ["--scoring", CHANNEL] if "max_steps" in keys and keys.get("train_prompt") == CHANNEL else []
            found[templates_file(folder)] = self._eval(keys, "--run", str(folder), "--template", "all", *manner)
        if self.forgetting and "max_steps" in keys:  # it trains
            options = self.of_other_task(self.forgetting)
            found[before_file(self)] = self._eval(keys, "--model", str(self.base["model"]), *options)
            found[forgetting_file(self, folder)] = self._eval(keys, "--run", str(folder), *options)
        for task in self.adapting.tasks if self.adapting else ():
            found[adapted_file(self, folder, task)] = self._adapt(run, folder, task)
        return found

    def _eval(self, keys: dict[str, Any], *options: str) -> list[str]:
        return ["eval", *options, "--batch_size", str(keys.get("per_device_eval_batch_size", 8))]

    def _adapt(self, run: str, folder: Path, task: str) -> list[str]:
        asked = self.adapting
        assert asked is not None
        start = asked.start.get(run, FRESH)
        keys = {**self.adapting_keys, **asked.keys}
        keys = {k: v for k, v in keys.items() if start == FRESH or k not in OF_ADAPTER}  # a trained one has its own
        given = [word for key, value in keys.items() for word in (f"--{key}", *map(str, _listed(value)))]
        draws = ["--shots", str(asked.shots), "--draws", str(asked.draws), "--start", start]
        return ["adapt", "--run", str(folder), "--task", task, *draws, *given, "--disable_tqdm", "true"]

    @property
    def adapting_keys(self) -> dict[str, Any]:
        """What of the base counts for adapting: a fresh adapter is the same for all runs."""
        taken = _ADAPTED if self.base.get("adapter") == "none" else (*_ADAPTED, *OF_ADAPTER)
        return {key: self.base[key] for key in taken if key in self.base}

    def of_other_task(self, task: str) -> list[str]:
        """The words by which `zofo eval` scores a task that is not trained on."""
        given = [(f"--{key}", str(self.base[key])) for key in ANY_TASK_KEYS if key in self.base]
        return ["--task", task, *(word for pair in given for word in pair)]

    @property
    def forgetting_mark(self) -> str:
        """Names the results on the other task, so that those of an earlier plan, with another task, do not count."""
        asked = [self.base["model"], *self.of_other_task(str(self.forgetting))]
        read = _contents({"model": self.base["model"], "task": self.forgetting})
        return _mark([*asked, read])


def varies(config: ZOFOConfig) -> bool:
    """Whether a seed changes a run; else one run stands for all seeds."""
    return config.method_class.trains() or config.shots > 0


def templates_file(folder: Path) -> Path:
    """Where the scores of a run by every template of its task are kept."""
    return folder.with_suffix(".templates.json")


def forgetting_file(plan: Plan, folder: Path) -> Path:
    """Where the scores of a run on the task that it was not trained on are kept."""
    return folder.with_suffix(f".forgetting-{plan.forgetting_mark}.json")


def before_file(plan: Plan) -> Path:
    """Where the scores on that task before all training are kept."""
    return plan.output_dir / f"before-{plan.forgetting_mark}.json"


def adapted_file(plan: Plan, folder: Path, task: str) -> Path:
    """Where the scores of a run on a held-back task are, after it was adapted to that."""
    read = _contents({**plan.adapting_keys, **(plan.adapting.keys if plan.adapting else {}), "task": task})
    mark = _mark([str(plan.adapting), plan.adapting_keys, read])
    return folder.with_suffix(f".adapted-{mark}") / name_of_task(task) / "results.json"


def _contents(keys: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Digests of the files that keys name: a run on an edited file is another one."""
    found = {
        f"content of {key}": [contents(key, str(value), keys.get("source")) for value in _listed(keys[key])]
        for key in ("model", "task", "adapter", "adapter_init", "reward")
        if keys.get(key)
    }
    return {key: digests for key, digests in found.items() if any(digests)}


def _listed(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _mark(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def score_of(cell: Cell) -> tuple[float, float]:
    """The metric that decides, and minus the loss, of a run that has ended."""
    scores = json.loads((cell.folder / "results.json").read_text(encoding="utf-8"))["metrics"]["upper"]
    loss = scores.get("loss")  # rows without right answers have none
    return next(iter(scores.values())), -(loss if loss is not None else float("inf"))


def mean_score(cells: list[Cell]) -> tuple[float, float]:
    """`score_of`, averaged over the trials of one setting."""
    scores, losses = zip(*map(score_of, cells), strict=True)
    return sum(scores) / len(cells), sum(losses) / len(cells)


def failure_file(plan: Plan, cell: Cell) -> Path:
    """Where the message of a run that has failed is kept."""
    return plan.output_dir / "failed" / f"{cell.division.name}-{cell.run}-{cell.folder.name}.txt"


def failure(plan: Plan, cell: Cell) -> str:
    """Why a run has failed; empty if it has not."""
    file = failure_file(plan, cell)
    return file.read_text(encoding="utf-8").strip() if file.is_file() and not cell.is_done else ""
