"""`zofo compare`: the runs that a plan asks for, each done once, on rows that the search never sees; and its report."""

import csv
import io
import json
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from shell import OPTIONS, failed, write_task
from tiny import save_tiny_model
from zofo.cli import main
from zofo.compare import work
from zofo.compare.budget import iteration_cost, steps_within
from zofo.compare.plan import Cell, Plan
from zofo.config import ZOFOConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    rows = [{"text": f"film {n} was {'great' if n % 2 else 'terrible'}", "label": n % 2} for n in range(80)]
    return {"model": save_tiny_model(root / "model"), "task": str(write_task(root / "films", rows))}


def plan_of(folder, made, **changes):
    """A file of a comparison of two methods with two seeds."""
    base = {
        "model": str(made["model"]), "train_size": 30, "dev_size": 20, "test_size": 30, "max_length": 64,
        "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "learning_rate": 1e-2,
    }  # fmt: skip
    plan = {
        "output_dir": str(folder / "out"), "base": base,
        "runs": {"lora": {"method": "fo"}, "mezo": {"method": "zo", "adapter": "none", "zo_learning_rate": 1e-3}},
        "tasks": [made["task"]], "seeds": [0, 1], "budget": {"forward_equivalents": 24}, "baseline": "lora",
        **changes,
    }  # fmt: skip
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in plan.items() if value is not None}))
    return file


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, not in their own; the folders of those that were begun."""
    begun = []

    def run(words):
        begun.append(words)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(words[3:])
        return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

    monkeypatch.setattr(work, "ended", run)
    return begun


def compared(file):
    assert main(["compare", "--config", str(file)]) == 0
    folder = Plan.read(file).output_dir
    return json.loads((folder / "report.json").read_text())


is_done = Cell.is_done.fget


def rows_of(cell):
    return [json.loads(line) for line in (cell.folder / "predictions.jsonl").read_text().splitlines()]


def test_numbers_are_those_of_the_run_folders(tmp_path, made, here):
    file = plan_of(tmp_path, made)
    (task,) = compared(file)["tasks"]
    cells = Plan.read(file).cells()
    assert len(here) == len(cells) == 4
    by_hand = {run: [[row["score"] for row in rows_of(c)] for c in cells if c.run == run] for run in ("lora", "mezo")}
    for method in task["methods"]:
        scores = by_hand[method["name"]]
        assert method["mean"] == pytest.approx(np.mean(scores))
        assert method["scores"] == {f"seed {n}": pytest.approx(np.mean(own)) for n, own in enumerate(scores)}
        results = [json.loads((c.folder / "results.json").read_text()) for c in cells if c.run == method["name"]]
        assert np.mean(scores[0]) == pytest.approx(results[0]["metrics"]["upper"]["accuracy"])
        assert method["cost"]["seconds"] == pytest.approx(np.mean([r["cost"]["wall_seconds"] for r in results]))
    lora, mezo = task["methods"]
    # 4 rows: a forward and a backward through all blocks, and two forwards
    assert lora["cost"]["steps"] == mezo["cost"]["steps"] == 24 / 8
    assert lora["cost"]["forward_equivalents"] == mezo["cost"]["forward_equivalents"] == 24
    assert lora["difference"] is None
    paired = np.mean(by_hand["mezo"], 0) - np.mean(by_hand["lora"], 0)
    assert mezo["difference"]["difference"] == pytest.approx(paired.mean())
    if np.any(paired):
        found = stats.permutation_test((paired,), np.mean, permutation_type="samples", n_resamples=3999, rng=0)
        assert mezo["difference"]["p"] >= found.pvalue - 0.05
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "report.csv").read_text())))
    assert [(row["run"], row["seed"]) for row in table] == [(c.run, str(c.seed)) for c in cells]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{100 * lora['mean']:.1f}" in page


def test_the_search_never_sees_a_test_row(tmp_path, made, here):
    file = plan_of(tmp_path, made, search={"lora": {"learning_rate": [1e-3, 1e-1]}}, trials=2)
    (task,) = compared(file)["tasks"]
    plan = Plan.read(file)
    tried = {row["row"] for cell in plan.trials() for row in rows_of(cell)}
    tested = {row["row"] for cell in plan.cells() if cell.trial is None for row in rows_of(cell)}
    assert len(tried) == 20
    assert len(tested) == 30
    assert not tried & tested
    search = task["methods"][0]["search"]
    best = max(search, key=lambda trial: (trial["score"], -trial["loss"]))
    assert [trial["chosen"] for trial in search] == [trial is best for trial in search]
    (used,) = {cell.keys["learning_rate"] for cell in plan.cells() if cell.run == "lora" and cell.trial is None}
    assert used == best["settings"]["learning_rate"]


def test_no_run_is_done_twice_and_a_changed_plan_reuses_what_is_valid(tmp_path, made, here, capsys):
    compared(plan_of(tmp_path, made, seeds=[0]))
    assert len(here) == 2
    compared(plan_of(tmp_path, made, seeds=[0]))
    assert len(here) == 2
    capsys.readouterr()
    report = compared(plan_of(tmp_path, made, seeds=[0, 5]))
    assert len(here) == 4
    assert "2 of 4 runs are there already" in capsys.readouterr().out
    assert any("2 of 4 runs" in note for note in report["notes"])


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, made, here):
    file = plan_of(tmp_path, made, seeds=[0])
    compared(file)
    cell = Plan.read(file).cells()[0]
    before = rows_of(cell)
    for path in cell.folder.iterdir():  # as if killed after its last checkpoint
        if not path.name.startswith(("checkpoint-", ".zofo.json", "config.yaml")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    compared(file)
    assert here[-1][-2:] == ["--resume_from_checkpoint", "true"]
    assert rows_of(cell) == before


def test_a_run_that_fails_is_in_the_report_with_its_message(tmp_path, made, here, monkeypatch):
    whole = work.ended

    def ended(words):
        found = whole(words)
        if "/broken/" not in " ".join(words):
            return found
        return subprocess.CompletedProcess(words, 2, "", "zofo: step 3: F is nan: lower learning_rate\n")

    monkeypatch.setattr(work, "ended", ended)
    monkeypatch.setattr(Cell, "is_done", property(lambda cell: cell.run == "lora" and is_done(cell)))
    runs = {"lora": {"method": "fo"}, "broken": {"method": "fo"}}
    file = plan_of(tmp_path, made, runs=runs)
    (task,) = compared(file)["tasks"]
    assert [method["name"] for method in task["methods"]] == ["lora"]
    assert [(one["name"], one["seed"]) for one in task["failed"]] == [("broken", 0), ("broken", 1)]
    assert "lower learning_rate" in task["failed"][0]["message"]
    assert "broken with seed 0 failed and is left out" in task["sentence"]
    assert "lower learning_rate" in (tmp_path / "out" / "report.html").read_text()
    done = len(here)
    compared(file)  # tried again, as what made it fail may be mended
    assert len(here) == done + 2


def test_the_plan_is_shown_without_doing_it(tmp_path, made, here, capsys):
    assert main(["compare", "--config", str(plan_of(tmp_path, made)), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 tasks x 2 methods x 2 seeds, 0 trials before"
    assert lines[1].startswith("lora: 1 x (0 trials + 2 seeds), 3 iterations each, about ")
    assert lines[-1].startswith("in all about ")
    assert not here
    assert not (tmp_path / "out").exists()


@pytest.mark.embedded
def test_the_shipped_comparison_is_read():
    file = Path(__file__).parents[2] / "comparisons" / "demo.yaml"
    assert {cell.run for cell in Plan.read(file).cells()} == {"zero-shot", "lora", "mezo", "bilevel"}


def test_what_a_backward_costs(made):
    def cost(**keys):
        keys = {"per_device_train_batch_size": 1, "lower_steps": 3, "zo_learning_rate": 1e-3, **keys}
        return iteration_cost(ZOFOConfig(output_dir="run", use_cpu=True, model=str(made["model"]), **keys))

    assert cost(method="fo") == 1 + 1
    assert cost(method="fo", gradient_checkpointing=True) == 1 + 2
    assert cost(method="fo", adapter_layers="last 1") == 1 + 1 / 2  # of two blocks
    assert cost(method="fo", adapter="none") == 1 + 2
    assert cost(method="fo", adapter="prompt") == 1 + 1
    assert cost(method="zo", adapter="none", num_perturbations=4) == 8
    assert cost(method="bilevel") == (3 + 1 + 1) * 2 + 2 * 3
    config = ZOFOConfig(output_dir="run", use_cpu=True, model=str(made["model"]), method="fo")
    assert steps_within(config, 100) == 100 // 16


RUNS = {"lora": {"method": "fo"}, "mezo": {"method": "zo", "adapter": "none"}}
BAD = {
    "an unknown key": ({"sedes": [1]}, "unknown key 'sedes': did you mean seeds?"),
    "a key that is missing": ({"budget": None}, "budget is not given"),
    "a baseline that is no run": ({"baseline": "lroa"}, "baseline is 'lroa', but must be one of the runs: lora, mezo"),
    "another budget": ({"budget": {"hours": 3}}, "budget is {'hours': 3}: give one of steps, forward_equivalents"),
    "a budget that no run reaches": ({"budget": {"forward_equivalents": 5}}, "one iteration of method fo takes 8"),
    "a run on another model": ({"runs": {**RUNS, "lora": {"model": "x"}}}, "the run lora changes model, which all"),
    "a run with other rows": ({"runs": {**RUNS, "mezo": {"test_size": 5}}}, "the run mezo changes test_size"),
    "a run with an unknown key": ({"runs": {**RUNS, "mezo": {"penlty": 5}}}, "run mezo: unknown key 'penlty'"),
    "a file that is not there": ({"runs": {**RUNS, "mezo": "mezo.yaml"}}, "there is no such file"),
    "a search without effect": (
        {"search": {"lora": {"zo_eps": [1e-3, 1e-2]}}, "trials": 2}, "zo_eps has no effect on the run lora"
    ),
    "a search of no run": ({"search": {"lra": {"learning_rate": [1e-3]}}, "trials": 2}, "did you mean lora?"),
    "a search without values": (
        {"search": {"lora": {"learning_rate": 1e-3}}, "trials": 2}, "give a list of values, or a range"
    ),
    "trials of nothing": ({"trials": 3}, "trials is given, but search is not"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds holds a value twice"),
    "a task that is not there": ({"tasks": ["tweetz"]}, "there is no task 'tweetz'"),
    "no job": ({"jobs": 0}, "jobs is 0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_any_work(capsys, tmp_path, made, here, changes, message):
    assert message in failed(capsys, ["compare", "--config", str(plan_of(tmp_path, made, **changes))])
    assert not here
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path, made, here):
    file = plan_of(tmp_path, made)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("words")
    assert "holds something else than a comparison" in failed(capsys, ["compare", "--config", str(file)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_comparison_is_left_alone(capsys, tmp_path, made, here):
    compared(plan_of(tmp_path, made, seeds=[0]))
    runs = {"lora": {"method": "fo", "learning_rate": 5e-2}}
    other = plan_of(tmp_path, made, runs=runs, seeds=[3])
    assert "holds another comparison: none of its 2 runs is one of this plan" in failed(
        capsys, ["compare", "--config", str(other)]
    )


def test_rows_that_changed_between_runs_are_refused(capsys, tmp_path, made, here):
    task = write_task(tmp_path / "own", [{"text": f"film {n} was {OPTIONS[n % 2]}", "label": n % 2} for n in range(80)])
    file = plan_of(tmp_path, made, tasks=[str(task)], seeds=[0])
    compared(file)
    cell = Plan.read(file).cells()[0]
    lines = (cell.folder / "predictions.jsonl").read_text().splitlines()
    changed = {**json.loads(lines[0]), "row": "0" * 16}
    (cell.folder / "predictions.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    assert "were scored on different rows" in failed(capsys, ["compare", "--config", str(file)])
