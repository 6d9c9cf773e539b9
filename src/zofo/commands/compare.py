"""`zofo compare`: many methods on many tasks under the same budget, and a report of what can be told apart."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from zofo.commands.adapt import splits_of_new
from zofo.commands.estimate import estimate
from zofo.commands.eval import eval_config
from zofo.commands.results import as_json
from zofo.compare.collect import as_csv, report
from zofo.compare.page import page
from zofo.compare.plan import Plan
from zofo.compare.reading import read_plan
from zofo.compare.work import claim, work
from zofo.config import ZOFOConfig
from zofo.config_parser import parse_config
from zofo.console import Say
from zofo.report.words import duration
from zofo.tasks.leakage import require_apart
from zofo.tasks.records import Record
from zofo.tasks.task import load_task
from zofo.training.rows import run_splits


def compare(file: Path, say: Say, dry_run: bool = False) -> None:
    """Does the runs of a comparison that are not done, and writes its report; with `dry_run`, says what they are."""
    plan = read_plan(file, _seconds, dry_run)
    _require_new_tasks(plan)
    if dry_run:
        for line in planned(plan):
            say(line)
        return
    for note in claim(plan):
        say(note)
    work(plan, say)
    content = report(plan)
    folder = plan.output_dir
    (folder / "report.json").write_text(as_json(content), encoding="utf-8")
    (folder / "report.csv").write_text(as_csv(plan), encoding="utf-8")
    (folder / "report.html").write_text(page(content), encoding="utf-8")
    for task in content["tasks"]:
        say(task["sentence"])
        for line in task["gains"]:
            say(line)
    say(f"report: {folder / 'report.html'}")


def _require_new_tasks(plan: Plan) -> None:
    """Refuses other tasks that have too few rows, or rows that a run would train on, before any run."""
    for division in plan.divisions if plan.adapting or plan.forgetting else ():
        config = plan.config(plan.baseline, division, {})
        trained = [load_task(place, config.source) for place in division.tasks]
        train = {task.name: run_splits(task, config).train for task in trained}
        for name, test in _tests_of_other_tasks(plan, config):
            require_apart(train, {name: test})


def _tests_of_other_tasks(plan: Plan, config: ZOFOConfig) -> Generator[tuple[str, list[Record]]]:
    """The tasks that runs are scored on after training on those of `config`, each with its test rows."""
    if plan.forgetting:
        other = eval_config(str(plan.base["model"]), plan.forgetting, plan.of_other_task(plan.forgetting)[2:])
        task = load_task(plan.forgetting, other.source)
        yield task.name, run_splits(task, other).test
    if plan.adapting:
        of_new = replace(config, train_size=None, source=None)  # `zofo adapt` draws from all of them
        for place in plan.adapting.tasks:
            task = load_task(place)
            yield task.name, splits_of_new(task, of_new, plan.adapting.shots).test


def planned(plan: Plan) -> Generator[str]:
    """A line for each method: its runs, its iterations within the budget, and about how long they take."""
    places = len(plan.divisions)
    trials = sum(map(len, plan.search.values())) * (len(plan.tuning) or places)
    yield f"{places} tasks x {len(plan.runs)} methods x {len(plan.seeds)} seeds, {trials} trials before"
    total = 0.0
    for run in plan.runs:
        tried = plan.search.get(run, [])
        place, settings = plan.divisions[0], tried[0] if tried else {}
        if not plan.config(run, place, settings).method_class.trains():
            yield f"{run}: evaluations only"
            continue
        keys = plan.keys(run, place, settings)
        row = next(estimate(parse_config(keys | {"output_dir": "run"}, [])))
        count = len(tried) * (len(plan.tuning) or places) + len(plan.seeds) * places
        seconds = (row.whole or 0.0) * count
        total += seconds
        runs = f"{count} runs of {keys['max_steps']} iterations"
        yield f"{run}: {runs}, about {duration(seconds)} without evaluations" if seconds else f"{run}: {runs}"
    yield f"in all about {duration(total / plan.jobs)}, without evaluations and the start of each run"


def _seconds(config: ZOFOConfig) -> float | None:
    """Of an iteration, by `zofo estimate`."""
    return next(estimate(config)).seconds
