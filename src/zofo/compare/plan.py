"""What a comparison consists of: its file, and the runs that it asks for, each with its folder and its keys."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from zofo.compare.budget import steps_within
from zofo.compare.search import Settings, points
from zofo.config import ZOFOConfig, parse_config
from zofo.errors import ZofoError, did_you_mean
from zofo.parse import read_yaml
from zofo.tasks.task import load_task

KEYS = ("output_dir", "base", "runs", "tasks", "seeds", "budget", "baseline", "search", "trials", "jobs", "title")
_NEEDED = KEYS[:7]
_BUDGETS = ("steps", "forward_equivalents")
# What all runs of a comparison share; a method that changes one of these is another comparison.
_SHARED = (
    "model", "task", "data", "source", "text", "label", "template", "seed", "data_seed", "train_size", "dev_size",
    "test_size", "final_split", "zero_shot", "max_steps", "num_train_epochs", "output_dir", "overwrite_output_dir",
    "resume_from_checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: of a method on a task with a seed, or a trial of the search, with its number."""

    run: str
    task: str
    seed: int
    trial: int | None
    settings: Settings  # what the search chose, or tries
    keys: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """What it is called in messages."""
        which = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"
        return f"{self.task_name}, {self.run}, {which}"

    @property
    def task_name(self) -> str:
        """The task's name, without its folder."""
        return Path(self.task).stem

    @property
    def is_done(self) -> bool:
        """Whether its run has ended."""
        return (self.folder / "results.json").is_file()


@dataclass(frozen=True)
class Plan:
    """A comparison, checked. Make one with `Plan.read`."""

    text: str
    title: str
    output_dir: Path
    base: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: tuple[str, float]
    baseline: str
    search: dict[str, list[Settings]]  # run -> the settings to try
    jobs: int

    @classmethod
    def read(cls, file: Path) -> Self:
        """The plan in a YAML file; refuses one of which a run is no fair part of the comparison."""
        try:
            text, content = file.read_text(encoding="utf-8"), read_yaml(file, str(file))
        except OSError as error:
            raise ZofoError(f"cannot read the comparison {file} ({error.strerror}): give a YAML file") from error
        if not isinstance(content, dict):
            raise ZofoError(f"{file} is no comparison: it must hold {', '.join(_NEEDED)}")
        for key in content:
            if key not in KEYS:
                raise ZofoError(f"{file}: unknown key {key!r}: {did_you_mean(str(key), KEYS, ', '.join(KEYS))}")
        for key in _NEEDED:
            if not content.get(key) and content.get(key) != 0:
                raise ZofoError(f"{file}: {key} is not given: a comparison has {', '.join(_NEEDED)}")
        runs = {str(name): _mapping(file, f"runs, {name}", keys) for name, keys in _dict(file, content, "runs").items()}
        plan = cls(
            text=text,
            title=str(content.get("title", file.stem)),
            output_dir=Path(str(content["output_dir"])).expanduser(),
            base=_mapping(file, "base", content["base"]),
            runs=runs,
            tasks=tuple(map(str, _list(file, content, "tasks"))),
            seeds=tuple(_whole(file, "seeds", seed) for seed in _list(file, content, "seeds")),
            budget=_budget(file, content["budget"]),
            baseline=str(content["baseline"]),
            search=_search(file, content, runs),
            jobs=_whole(file, "jobs", content.get("jobs", 1)),
        )
        plan._check(file)
        return plan

    def cells(self) -> list[Cell]:
        """All runs: the trials of the search, then those of the table whose settings are known."""
        table = [cell for task in self.tasks for run in self.runs for cell in self._row(task, run)]
        return [*self.trials(), *table]

    def trials(self) -> list[Cell]:
        """The runs of the search, which is done for each method on each task, with the first seed, on dev rows."""
        return [
            self._cell(run, task, self.seeds[0], number, settings)
            for task in self.tasks
            for run, tried in self.search.items()
            for number, settings in enumerate(tried)
        ]

    def chosen(self, run: str, task: str) -> Settings | None:
        """The settings of a method on a task: the best of its trials on dev rows; None as long as one has not ended.

        The metric decides; of equal ones, the loss.
        """
        if run not in self.search:
            return {}
        trials = [cell for cell in self.trials() if (cell.run, cell.task) == (run, task)]
        ended = [cell for cell in trials if cell.is_done]
        if not all(cell.is_done or failure(self, cell) for cell in trials) or not ended:
            return None
        return max(ended, key=lambda cell: score_of(cell)).settings

    def keys(self, run: str, task: str, settings: Settings) -> dict[str, Any]:
        """The keys of a run within the budget, but for its seed and its folder."""
        keys = {"data_seed": 0, "save_total_limit": 1, **self.base, **self.runs[run], **settings}
        keys |= {"task": task, "zero_shot": False}
        config = _parsed({**keys, "max_steps": 1}, run)
        if not config.method_class.trains():
            return keys
        kind, amount = self.budget
        return keys | {"max_steps": int(amount) if kind == "steps" else steps_within(config, amount)}

    def _row(self, task: str, run: str) -> list[Cell]:
        settings = self.chosen(run, task)
        if settings is None:
            return []
        config = _parsed(self.keys(run, task, settings), run)
        seeds = self.seeds if config.method_class.trains() or config.shots else self.seeds[:1]  # else all are equal
        return [self._cell(run, task, seed, None, settings) for seed in seeds]

    def _cell(self, run: str, task: str, seed: int, trial: int | None, settings: Settings) -> Cell:
        keys = self.keys(run, task, settings) | {"seed": seed}
        if trial is not None:
            keys["final_split"] = "dev"
        mark = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode()).hexdigest()[:8]
        name = f"seed-{seed}-{mark}" if trial is None else f"trial-{trial}-{mark}"
        folder = self.output_dir / "runs" / Path(task).stem / run / name
        return Cell(run, task, seed, trial, settings, keys | {"output_dir": str(folder)}, folder)

    def _check(self, file: Path) -> None:
        if self.baseline not in self.runs:
            raise ZofoError(
                f"{file}: baseline is {self.baseline!r}, but must be one of the runs: {', '.join(self.runs)}"
            )
        for what, values in (("seeds", self.seeds), ("tasks", [Path(task).stem for task in self.tasks])):
            if len(set(values)) < len(values):
                raise ZofoError(f"{file}: {what} holds a value twice: give each one once")
        for task in self.tasks:
            load_task(task)
        for key in ("task", "seed", "max_steps", "num_train_epochs", "output_dir", "final_split", "zero_shot"):
            if key in self.base:
                raise ZofoError(f"{file}: base holds {key}, which a comparison sets itself: leave it out")
        for run, keys in self.runs.items():
            tried = {key for settings in self.search.get(run, ()) for key in settings}
            for key in (*keys, *tried):
                if key in _SHARED:
                    raise ZofoError(
                        f"{file}: the run {run} changes {key}, which all runs of a comparison share: put it into base"
                    )
            first = self.search.get(run, [{}])[0]
            config = _parsed(self.keys(run, self.tasks[0], first), run)
            for key in tried:
                if any(key in notice for notice in config.notices()):
                    raise ZofoError(f"{file}: search: {key} has no effect on the run {run}: leave it out")


def score_of(cell: Cell) -> tuple[float, float]:
    """The metric that decides, and minus the loss, of a run that has ended."""
    scores = json.loads((cell.folder / "results.json").read_text(encoding="utf-8"))["metrics"]["upper"]
    loss = scores["loss"]
    return next(iter(scores.values())), -(loss if loss is not None else float("inf"))


def failure_file(plan: Plan, cell: Cell) -> Path:
    """Where the message of a run that has failed is kept."""
    return plan.output_dir / "failed" / f"{cell.folder.parent.parent.name}-{cell.run}-{cell.folder.name}.txt"


def failure(plan: Plan, cell: Cell) -> str:
    """Why a run has failed; empty if it has not."""
    file = failure_file(plan, cell)
    return file.read_text(encoding="utf-8").strip() if file.is_file() and not cell.is_done else ""


def _parsed(keys: Mapping[str, Any], run: str) -> ZOFOConfig:
    try:
        return parse_config({**keys, "output_dir": "run"}, [])
    except ZofoError as error:
        raise ZofoError(f"run {run}: {error}") from error


def _mapping(file: Path, what: str, given: Any) -> dict[str, Any]:
    """Keys that stand in the plan, or in a file of their own, whose path is relative to the plan's."""
    if isinstance(given, str):
        place = file.parent / given
        if not place.is_file():
            raise ZofoError(f"{file}: {what} is {given}, but there is no such file: give a train config, or its keys")
        given = read_yaml(place, str(place))
    if given is not None and not isinstance(given, dict):
        raise ZofoError(f"{file}: {what} is {given!r}: give keys of zofo train, or a file that holds them")
    return {str(key): value for key, value in cast("dict[Any, Any]", given or {}).items()}


def _dict(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content[key], dict):
        raise ZofoError(f"{file}: {key} is {content[key]!r}, but must be a mapping from names")
    return content[key]


def _list(file: Path, content: Mapping[str, Any], key: str) -> Sequence[Any]:
    given: Any = content[key]
    return given if isinstance(given, list) else [given]


def _whole(file: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < (key != "seeds"):
        raise ZofoError(f"{file}: {key} is {value!r}, but must be a whole number")
    return value


def _budget(file: Path, given: Any) -> tuple[str, float]:
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in _BUDGETS:
        raise ZofoError(f"{file}: budget is {given!r}: give one of {', '.join(_BUDGETS)}, such as {{steps: 200}}")
    ((kind, amount),) = cast("dict[str, Any]", given).items()
    if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 1:
        raise ZofoError(f"{file}: the budget of {kind} is {amount!r}, but must be a number from 1")
    return kind, float(amount)


def _search(file: Path, content: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, list[Settings]]:
    given: Any = content.get("search") or {}
    if not given:
        if "trials" in content:
            raise ZofoError(f"{file}: trials is given, but search is not: leave it out, or say what to search")
        return {}
    trials = _whole(file, "trials", content.get("trials"))
    found: dict[str, list[Settings]] = {}
    for run, space in _dict(file, content, "search").items():
        if run not in runs:
            raise ZofoError(f"{file}: search names the run {run!r}: {did_you_mean(str(run), runs, ', '.join(runs))}")
        if not isinstance(space, dict) or not space:
            raise ZofoError(f"{file}: search, {run} is {space!r}, but must be a mapping from keys to values or a range")
        found[run] = points(cast("dict[str, Any]", space), trials)
    return found
