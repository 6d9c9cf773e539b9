"""`zofo compare`: many methods on many tasks under the same budget, and a report of what can be told apart."""

import json
from collections.abc import Generator
from pathlib import Path

from zofo.commands.estimate import estimate
from zofo.compare.collect import as_csv, report
from zofo.compare.page import page
from zofo.compare.plan import Plan
from zofo.compare.work import claim, work
from zofo.config import parse_config
from zofo.console import Say
from zofo.report.words import duration


def compare(file: Path, say: Say, dry_run: bool = False) -> None:
    """Does the runs of a comparison that are not done, and writes its report; with `dry_run`, says what they are."""
    plan = Plan.read(file)
    if dry_run:
        for line in planned(plan):
            say(line)
        return
    notes = claim(plan)
    for note in notes:
        say(note)
    work(plan, say)
    content = report(plan, notes)
    folder = plan.output_dir
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "report.csv").write_text(as_csv(plan), encoding="utf-8")
    (folder / "report.html").write_text(page(content), encoding="utf-8")
    for task in content["tasks"]:
        say(task["sentence"])
    say(f"report: {folder / 'report.html'}")


def planned(plan: Plan) -> Generator[str]:
    """A line for each method: its runs, its iterations within the budget, and about how long they take."""
    trials = sum(map(len, plan.search.values())) * len(plan.tasks)
    yield f"{len(plan.tasks)} tasks x {len(plan.runs)} methods x {len(plan.seeds)} seeds, {trials} trials before"
    total = 0.0
    for run in plan.runs:
        tried = plan.search.get(run, [])
        config = parse_config(plan.keys(run, plan.tasks[0], tried[0] if tried else {}) | {"output_dir": "run"}, [])
        runs = f"{len(plan.tasks)} x ({len(tried)} trials + {len(plan.seeds)} seeds)"
        if not config.method_class.trains():
            yield f"{run}: evaluations only"
            continue
        row = next(estimate(config))
        seconds = (row.whole or 0.0) * len(plan.tasks) * (len(tried) + len(plan.seeds))
        total += seconds
        yield f"{run}: {runs}, {config.max_steps} iterations each, about {duration(seconds)} without evaluations"
    yield f"in all about {duration(total / plan.jobs)}, without evaluations and the start of each run"
