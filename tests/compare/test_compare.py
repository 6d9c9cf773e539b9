"""`zofo compare`: the runs that a plan asks for, each done once, on rows that the search never sees; and its report."""

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from scipy import stats

from shell import OPTIONS, failed, write_task
from tiny import save_tiny_model
from zofo.cli import main
from zofo.compare import work
from zofo.compare.budget import iteration_cost, steps_within
from zofo.compare.reading import read_plan
from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.identity import contents
from zofo.training.trained_rows import trained_rows_of

FILMS = [{"text": f"film {n} was {'great' if n % 2 else 'terrible'}", "label": n % 2} for n in range(80)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    return {"model": save_tiny_model(root / "model"), "task": named_task(root, "films", FILMS)}


def named_task(folder, name, rows=None, **changes):
    """A task file of this name; its rows are about days if none are given."""
    days = [{"text": f"day {n} was {OPTIONS[n % 3 == 0]}", "label": int(n % 3 == 0)} for n in range(80)]
    return str(write_task(folder / name, rows or days, **changes).rename(folder / name / f"{name}.yaml"))


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
    monkeypatch.setattr("zofo.compare.figures._svg", lambda *args: "")
    return begun


def planned(file, seconds=None):
    return read_plan(file, lambda config: seconds)


def compared(file):
    assert main(["compare", "--config", str(file)]) == 0
    folder = planned(file).output_dir
    return json.loads((folder / "report.json").read_text())


def rows_of(cell):
    return [json.loads(line) for line in (cell.folder / "predictions.jsonl").read_text().splitlines()]


def test_numbers_are_those_of_the_run_folders(tmp_path, made, here):
    file = plan_of(tmp_path, made)
    (task,) = compared(file)["tasks"]
    cells = planned(file).cells()
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
    assert np.any(paired)
    found = stats.permutation_test((paired,), np.mean, permutation_type="samples", n_resamples=3999, rng=0)
    assert mezo["difference"]["p"] >= found.pvalue - 0.05
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "report.csv").read_text())))
    assert [(row["run"], row["seed"]) for row in table] == [(c.run, str(c.seed)) for c in cells]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{100 * lora['mean']:.1f}" in page


def test_the_search_never_sees_a_test_row(tmp_path, made, here):
    file = plan_of(tmp_path, made, seeds=[0], search={"lora": {"learning_rate": [1e-3, 1e-1]}}, trials=2)
    (task,) = compared(file)["tasks"]
    plan = planned(file)
    tried = {row["row"] for cell in plan.trials for row in rows_of(cell)}
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
    first = compared(plan_of(tmp_path, made, seeds=[0]))
    assert len(here) == 2
    assert compared(plan_of(tmp_path, made, seeds=[0])) == first
    assert len(here) == 2
    capsys.readouterr()
    compared(plan_of(tmp_path, made, seeds=[0, 5]))
    assert len(here) == 4
    assert "2 of 4 runs were done before" in capsys.readouterr().out


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, made, here):
    file = plan_of(tmp_path, made, seeds=[0])
    compared(file)
    cell = planned(file).cells()[0]
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
        if "/broken/" not in " ".join(words):
            return whole(words)
        here.append(words)
        return subprocess.CompletedProcess(words, 2, "", "zofo: step 3: F is nan: lower learning_rate\n")

    monkeypatch.setattr(work, "ended", ended)
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
    assert lines[1].startswith("lora: 2 runs of 3 iterations, about ")
    assert lines[-1].startswith("in all about ")
    assert not here
    assert not (tmp_path / "out").exists()


@pytest.mark.embedded
def test_the_shipped_comparison_is_read():
    file = Path(__file__).parents[2] / "comparisons" / "demo.yaml"
    assert {cell.run for cell in planned(file).cells()} == {"zero-shot", "lora", "mezo", "bilevel"}


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
    assert cost(method="bilevel", penalty=1.0) == (3 + 1 + 1) * 2 + 2 * 3
    assert cost(method="bilevel") == 3 * 2 + 2
    config = ZOFOConfig(output_dir="run", use_cpu=True, model=str(made["model"]), method="fo")
    assert steps_within(config, 100) == 100 // 16


def test_a_budget_of_seconds_is_measured_once_for_all_processes_and_seeds(tmp_path, made, here):
    file = plan_of(tmp_path, made, budget={"seconds": 3})
    report_dir = tmp_path / "out"
    report_dir.mkdir()
    (report_dir / "comparison.yaml").write_text(file.read_text())
    assert {cell.keys["max_steps"] for cell in planned(file, seconds=0.4).cells()} == {7}
    assert {cell.keys["max_steps"] for cell in planned(file, seconds=0.1).cells()} == {7}
    with pytest.raises(ZofoError, match="takes 4 s, but the budget is 3 s"):
        read_plan(file, lambda config: 4.0, dry=True).cells()
    runs = {"whole": {"method": "bilevel"}, "frozen": {"method": "bilevel", "zo_learning_rate": 0}}
    file = plan_of(
        tmp_path, made, runs=runs, baseline="whole", budget={"seconds": 600}, output_dir=str(tmp_path / "two")
    )
    plan = read_plan(file, lambda config: 4.0 if config.zo_learning_rate == 0 else 7.0)
    assert {cell.run: cell.keys["max_steps"] for cell in plan.cells()} == {"whole": 85, "frozen": 150}
    file = plan_of(tmp_path, made, budget={"seconds": 3})
    with pytest.raises(ZofoError, match="does not fit into the free memory"):
        read_plan(file, lambda config: None, dry=True).cells()


def test_tuning_chooses_one_setting_for_all_tasks_by_the_mean_over_its_own(tmp_path, made, here):
    days = named_task(tmp_path, "days")
    file = plan_of(
        tmp_path, made, seeds=[5], tasks=[made["task"], days], trials=2, tuning={"tasks": [days], "seeds": [8, 9]},
        search={"mezo": {"zo_learning_rate": [1e-3, 1e-1]}},
    )  # fmt: skip
    report = compared(file)
    plan = planned(file)
    assert {(cell.division.tasks[0], cell.seed) for cell in plan.trials} == {(days, 8), (days, 9)}
    scores = {}
    for rate in (1e-3, 1e-1):
        own = [
            json.loads((c.folder / "results.json").read_text())
            for c in plan.trials
            if c.settings["zo_learning_rate"] == rate
        ]
        upper = [one["metrics"]["upper"] for one in own]
        scores[rate] = (np.mean([one["accuracy"] for one in upper]), -np.mean([one["loss"] for one in upper]))
    best = max(scores, key=scores.get)
    assert {c.keys["zo_learning_rate"] for c in plan.cells() if c.run == "mezo" and c.trial is None} == {best}
    assert len(here) == 4 + 2 * 2
    for task in report["tasks"]:
        trials = task["methods"][1]["search"]
        assert [trial["score"] for trial in trials] == pytest.approx([scores[rate][0] for rate in (1e-3, 1e-1)])


def test_data_seeds_divide_the_rows_anew_and_each_division_is_judged_for_itself(tmp_path, made, here):
    file = plan_of(tmp_path, made, seeds=[0], data_seeds=[3, 4])
    report = compared(file)
    assert [task["name"] for task in report["tasks"]] == ["films-data-seed-3", "films-data-seed-4"]
    rows = {}
    for cell in planned(file).cells():
        rows.setdefault(cell.division.data_seed, set()).add(frozenset(row["row"] for row in rows_of(cell)))
    assert all(len(same) == 1 for same in rows.values())
    assert rows[3] != rows[4]


def test_train_sizes_are_compared_on_the_same_test_rows(tmp_path, made, here):
    plan = plan_of(tmp_path, made, seeds=[0], train_sizes=[8, 24])
    content = yaml.safe_load(plan.read_text())
    del content["base"]["train_size"]
    plan.write_text(yaml.safe_dump(content))
    assert [task["name"] for task in compared(plan)["tasks"]] == ["films-train-size-8", "films-train-size-24"]
    cells = planned(plan).cells()
    assert [cell.keys["train_size"] for cell in cells] == [8, 8, 24, 24]
    assert len({tuple(row["row"] for row in rows_of(cell)) for cell in cells}) == 1
    trained = [trained_rows_of(str(cell.folder / "backbone")) for cell in cells]
    assert [len(rows) for rows in trained] == [16, 16, 48, 48]  # two digests of each
    assert trained[0] < trained[2]


def test_ctrl_c_begins_no_other_run_and_the_same_command_goes_on(tmp_path, made, here, monkeypatch, capsys):
    file, run = plan_of(tmp_path, made, seeds=[0]), work.ended
    interrupted = subprocess.CompletedProcess([], 130, "", "zofo: interrupted")
    monkeypatch.setattr(work, "ended", lambda words: run(words) if not here else interrupted)
    assert main(["compare", "--config", str(file)]) == 130
    assert capsys.readouterr().err.endswith("zofo: interrupted; the same command goes on\n")
    assert len(here) == 1
    assert not (tmp_path / "out" / "report.html").exists()
    assert not list((tmp_path / "out").rglob("*fail*"))
    monkeypatch.setattr(work, "ended", run)
    assert compared(file)["tasks"][0]["failed"] == []
    assert len(here) == 2


def test_a_run_that_outlived_its_comparison_is_waited_for(tmp_path, made, here, monkeypatch):
    file = plan_of(tmp_path, made, seeds=[0])
    plan = planned(file)
    folder = plan.cells()[0].folder
    folder.mkdir(parents=True)
    (folder / "live.txt").write_text("of the run under way")
    monkeypatch.setattr(work, "_WAIT", 0.05)
    with FileLock(folder / ".zofo.lock"), ThreadPoolExecutor(1) as pool:
        pool.submit(work.work, plan, lambda line: None)
        end = time.monotonic() + 60
        while not here and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        assert len(here) == 1
        assert (folder / "live.txt").exists()
        (folder / ".zofo.lock").unlink()  # as the run does at its end
    assert all(cell.is_done for cell in plan.cells())


def test_runs_on_files_that_were_edited_since_are_others(tmp_path, made, here):
    shutil.copytree(made["model"], tmp_path / "model")
    task = named_task(tmp_path, "days")
    (tmp_path / "rewards.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    file = plan_of(tmp_path, {"model": tmp_path / "model", "task": task})
    plan = yaml.safe_load(file.read_text())
    plan["base"] |= {"reward": [f"{tmp_path / 'rewards.py'}:one"]}
    file.write_text(yaml.safe_dump(plan))
    edited = [Path(task), next(Path(task).parent.glob("*.jsonl")), tmp_path / "model" / "config.json"]
    edited += [tmp_path / "rewards.py"]
    seen = []
    for place in [None, *edited]:
        if place:
            place.write_text(place.read_text() + "\n")
        contents.cache_clear()  # as in another process
        seen.append(tuple(cell.folder.name for cell in planned(file).cells()))
    assert len(set(seen)) == 5
    contents.cache_clear()
    assert tuple(cell.folder.name for cell in planned(file).cells()) == seen[-1]


def test_rows_without_a_reward_in_some_run_are_left_out_of_all(tmp_path, made, here):
    (tmp_path / "rewards.py").write_text(
        "def even(prompts, completions):\n"
        "    return [None if int(p.split()[1]) % 5 == 0 else float(int(p.split()[1]) % 2 == 0) for p in prompts]\n"
    )
    file = plan_of(tmp_path, made, seeds=[0])
    plan = yaml.safe_load(file.read_text())
    plan["base"] |= {"reward": f"{tmp_path / 'rewards.py'}:even", "max_new_tokens": 2}
    file.write_text(yaml.safe_dump(plan))
    (task,) = compared(file)["tasks"]
    scores = [row["score"] for row in rows_of(planned(file).cells()[0])]
    known = [value for value in scores if value is not None]
    assert 0 < len(known) < len(scores) == 30
    assert task["rows"] == len(known)
    assert [method["mean"] for method in task["methods"]] == pytest.approx([np.mean(known)] * 2)
    difference = task["methods"][1]["difference"]
    assert (difference["difference"], difference["p"], difference["significant"]) == (0, 1, False)
    assert f"{30 - len(known)} test rows, without a reward in some run, are left out" in task["sentence"]


def test_runs_over_several_tasks_are_adapted_to_held_back_ones(tmp_path, made, here):
    tasks = [named_task(tmp_path, name, [{"text": f"{name} {n}", "label": n % 2} for n in range(90)]) for name in "abc"]
    runs = {"zero": {"method": "none", "adapter": "none"}, "lora": {"method": "fo", "tasks_per_step": 2}}
    keys = {"adapter": "lora", "lora_r": 2, "max_steps": 2}
    asked = {"tasks": [tasks[2]], "shots": 4, "draws": 2, "start": {"lora": "mean"}, "keys": keys}
    file = plan_of(tmp_path, made, tasks=[tasks[:2]], runs=runs, baseline="zero", seeds=[0, 1], adapt=asked)
    (found,) = compared(file)["tasks"]
    assert found["name"] == "a+b"
    cells = [cell for cell in planned(file).cells() if cell.run == "lora"]
    assert all((cell.folder / "tasks" / name / "upper").is_dir() for cell in cells for name in "ab")
    lora, zero = sorted(found["methods"], key=lambda method: method["name"])
    results = [
        json.loads(next(cell.folder.parent.glob(f"{cell.folder.name}.adapted-*/c/results.json")).read_text())
        for cell in cells
    ]
    values = [value for one in results for value in one["metrics"]["accuracy"]["of_draws"]]
    (of_task,) = lora["adapted"]["tasks"]
    assert len(values) == 4
    assert (of_task["name"], of_task["mean"], of_task["worst"]) == ("c", pytest.approx(np.mean(values)), min(values))
    assert lora["adapted"]["mean"] == pytest.approx(np.mean(values))
    assert of_task["low"] <= of_task["mean"] <= of_task["high"]
    assert {(one["start"], one["method"]) for one in results} == {("mean", "fo")}
    gain = lora["adapted"]["gain"]
    assert gain == of_task["gain"]
    assert gain["difference"] == pytest.approx(np.mean(values) - zero["adapted"]["mean"])
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert zero["adapted"]["gain"] is None
    own = json.loads(next((tmp_path / "out").glob("runs/*/zero/*.adapted-*/c/results.json")).read_text())["metrics"]
    interval = own["accuracy"]["low"], own["accuracy"]["high"]  # no seed changes it: two seeds are not two runs
    assert (zero["adapted"]["low"], zero["adapted"]["high"]) == pytest.approx(interval)
    assert [line.split(":")[0] for line in found["gains"]] == ["lora, adapted to c from 4 rows"]
    first = {cell.run: cell for cell in planned(file).cells()}
    command = {
        run: " ".join(next(words for file, words in cell.evaluations.items() if "adapted" in str(file)))
        for run, cell in first.items()
    }
    assert "--start mean" in command["lora"]
    assert "--adapter" not in command["lora"]
    assert command["lora"].endswith("--max_steps 2 --disable_tqdm true")
    assert "--start fresh" in command["zero"]
    assert command["zero"].endswith("--adapter lora --lora_r 2 --max_steps 2 --disable_tqdm true")
    assert "Adapted to held-back tasks" in (file.parent / "out" / "report.html").read_text()
    before = list(here)
    compared(file)
    assert here == before
    (place,) = (tmp_path / "out").glob("runs/*/zero/*.adapted-*/c")
    place.rename(place.with_name("c.half"))  # as if killed while it adapted
    assert [note for note in work.claim(planned(file)) if "of an earlier plan" in note] == []
    again = compared(file)["tasks"][0]
    assert len(here) == len(before) + 1
    assert [one["adapted"]["mean"] for one in again["methods"]] == [one["adapted"]["mean"] for one in found["methods"]]


def test_a_fresh_adapter_is_the_same_for_all_runs(tmp_path, made, here):
    """A run without adapters, too, is adapted by that of the base, and not by all of its weights."""
    held = named_task(tmp_path, "days")
    runs = {"zero": {"method": "none"}, "lora": {"method": "fo"}}
    file = plan_of(
        tmp_path, made, runs=runs, baseline="zero", seeds=[0], adapt={"tasks": [held], "shots": 4, "draws": 1}
    )
    plan = yaml.safe_load(file.read_text())
    plan["base"] |= {"adapter_layers": "last 1", "lora_r": 2, "lora_target_modules": ["q_proj", "o_proj"]}
    plan["adapt"]["keys"] = {"max_steps": 1}
    file.write_text(yaml.safe_dump(plan))
    compared(file)
    stored = [
        yaml.safe_load(one.read_text()) for one in (tmp_path / "out").glob("runs/*/*/*.adapted-*/days/config.yaml")
    ]
    assert len(stored) == 2
    assert {(one["adapter"], one["adapter_layers"], one["lora_r"]) for one in stored} == {("lora", "last 1", 2)}
    assert all(one["lora_target_modules"] == ["q_proj", "o_proj"] for one in stored)


@pytest.mark.parametrize(
    ("rows", "shots", "said"),
    [
        ([{"text": f"day {n}", "label": n % 2} for n in range(90)], 70, "shots is 70, but task days has"),
        (FILMS[::-1], 4, "of the test task 'days' is row"),
    ],
)
def test_tasks_that_cannot_be_adapted_to_are_refused_before_any_run(tmp_path, made, here, capsys, rows, shots, said):
    held = named_task(tmp_path, "days", rows)
    file = plan_of(tmp_path, made, seeds=[0], adapt={"tasks": [held], "shots": shots, "draws": 1})
    assert main(["compare", "--config", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_over_several_tasks_are_the_mean_of_the_tasks_and_their_groups_are_apart(tmp_path, made, here):
    """Macro F1 of each task; one task has groups, which are called as rows of no group are not."""
    days = [
        {"text": f"day {n} was {OPTIONS[n % 3 == 0]}", "label": int(n % 3 == 0), "of": f"{n // 7}"} for n in range(80)
    ]
    grouped = named_task(tmp_path, "days", days, metric="macro_f1", group="{{ of }}")
    nights = [{"text": f"night {n}", "label": n % 2} for n in range(90)]
    alone = named_task(tmp_path, "nights", nights, metric="macro_f1")
    file = plan_of(tmp_path, made, tasks=[[grouped, alone]], seeds=[0])
    (found,) = compared(file)["tasks"]
    cells = {cell.run: cell for cell in planned(file).cells()}
    rows = rows_of(cells["lora"])
    sizes = [sum(row["task"] == name for row in rows) for name in ("days", "nights")]
    assert sizes[0] != sizes[1]
    assert found["metric"] == "macro_f1"
    for method in found["methods"]:
        results = json.loads((cells[method["name"]].folder / "results.json").read_text())
        assert method["mean"] == pytest.approx(results["metrics"]["upper"]["macro_f1"])
    assert found["clusters"] == len({row["group"] for row in rows if row["group"]}) + sizes[1]


def test_what_a_run_forgets_and_how_templates_spread_are_those_of_zofo_eval(tmp_path, made, here, capsys):
    other = named_task(tmp_path, "days")
    two = named_task(tmp_path, "two", FILMS, templates=[{"prompt": "Say of it: {{ text }}. It was"}])
    runs = {"zero": {"method": "none", "adapter": "none"}, "lora": {"method": "fo"}}
    file = plan_of(
        tmp_path, made, tasks=[two], runs=runs, baseline="zero", seeds=[0, 1], forgetting=other, templates=True
    )
    (found,) = compared(file)["tasks"]
    lora, zero = found["methods"]
    cells = [cell for cell in planned(file).cells() if cell.run == "lora"]

    def scored(*words):
        assert main(["eval", *words, "--batch_size", "8", "--output", str(tmp_path / "score.json")]) == 0
        (scores,) = json.loads((tmp_path / "score.json").read_text())["tasks"].values()
        (tmp_path / "score.json").unlink()
        return scores

    before = scored("--model", str(made["model"]), "--task", other, "--max_length", "64")["accuracy"]
    after = [
        scored("--model", str(cell.folder / "backbone"), "--adapter", str(cell.folder / "upper"), "--task", other)
        for cell in cells
    ]
    changes = [scores["accuracy"] - before for scores in after]
    assert lora["forgetting"] == {
        "task": "days", "before": before, "after": pytest.approx(before + np.mean(changes)), "changes": changes
    }  # fmt: skip
    assert zero["forgetting"] is zero["cost"]["seconds"] is zero["cost"]["peak_bytes"] is None
    by_hand = [[scored("--run", str(c.folder), "--template", t)["accuracy"] for t in "01"] for c in cells]
    assert lora["templates"] == pytest.approx(np.mean(by_hand, axis=0))
    assert lora["templates"][0] == pytest.approx(lora["mean"])
    assert len(zero["templates"]) == 2
    nights = named_task(tmp_path, "nights", [{"text": f"night {n}", "label": n % 2} for n in range(40)])
    file = plan_of(
        tmp_path, made, tasks=[two], runs=runs, baseline="zero", seeds=[0, 1], forgetting=nights, templates=True
    )
    trained = [words for words in here if "train" in words]
    changed = compared(file)["tasks"][0]["methods"][0]["forgetting"]
    assert [words for words in here if "train" in words] == trained
    assert changed["task"] == "nights"
    assert (
        changed["before"] == scored("--model", str(made["model"]), "--task", nights, "--max_length", "64")["accuracy"]
    )


def test_macro_f1_is_compared_by_values_of_rows_whose_mean_it_is(tmp_path, made, here):
    task = named_task(tmp_path, "days", metric="macro_f1")
    (found,) = compared(plan_of(tmp_path, made, tasks=[task], seeds=[0]))["tasks"]
    assert found["metric"] == "macro_f1"
    cells = {cell.run: cell for cell in planned(tmp_path / "plan.yaml").cells()}
    value = {run: json.loads((c.folder / "results.json").read_text())["metrics"]["upper"] for run, c in cells.items()}
    for method in found["methods"]:
        assert method["mean"] == pytest.approx(value[method["name"]]["macro_f1"])
    difference = value["mezo"]["macro_f1"] - value["lora"]["macro_f1"]
    assert found["methods"][1]["difference"]["difference"] == pytest.approx(difference)


def test_a_diagnosis_is_in_the_report_as_the_mean_over_seeds(tmp_path, made, here):
    mezo = {"method": "zo", "adapter": "none", "zo_learning_rate": 1e-3, "diagnose": True, "logging_steps": 1}
    file = plan_of(tmp_path, made, runs={"lora": {"method": "fo"}, "mezo": mezo})
    lora, found = compared(file)["tasks"][0]["methods"]
    assert lora["diagnosis"] is None
    cells = [cell for cell in planned(file).cells() if cell.run == "mezo"]
    entries = [json.loads((cell.folder / "results.json").read_text())["diagnosis"] for cell in cells]
    mean = np.mean([entry["signal_to_noise"]["mean"] for entry in entries])
    assert found["diagnosis"]["signal_to_noise"] == pytest.approx(mean)
    assert found["diagnosis"]["expected_cosine"] == pytest.approx(entries[0]["cosine"]["expected"])
    assert found["diagnosis"]["penalty_gap"] is found["diagnosis"]["adapter_gain"] is None
    assert "Diagnosis" in (tmp_path / "out" / "report.html").read_text()


SHARING = """
import json, os, subprocess, sys, time
from pathlib import Path
from zofo.compare import work
from zofo.compare.reading import read_plan

def ended(words):
    config = Path(words[words.index("--config") + 1])
    folder = config.with_suffix("")
    folder.mkdir()  # fails if another process does this run too
    time.sleep(0.2)
    (folder / "results.json").write_text(json.dumps({"process": os.getpid()}))
    return subprocess.CompletedProcess(words, 0, "", "")

work.ended = ended
plan = read_plan(Path(sys.argv[1]), lambda config: None)
work.claim(plan)
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[2]).parent.glob("ready-*"))) < 2:
    time.sleep(0.01)
work.work(plan, print)
"""


def test_two_processes_share_one_folder(tmp_path, made):
    file = plan_of(tmp_path, made, seeds=[0, 1, 2])
    words = [sys.executable, "-c", SHARING, str(file)]
    pair = [subprocess.Popen([*words, str(tmp_path / f"ready-{n}")], stdout=subprocess.PIPE, text=True) for n in "01"]
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    cells = planned(file).cells()
    done = [json.loads((cell.folder / "results.json").read_text())["process"] for cell in cells]
    assert {process.pid for process in pair} == set(done)
    begun = [line for text in said for line in text.splitlines() if line.startswith("begins: ")]
    assert sorted(begun) == sorted(f"begins: {cell.name}" for cell in cells)


RUNS = {"lora": {"method": "fo"}, "mezo": {"method": "zo", "adapter": "none"}}
BAD = {
    "an unknown key": ({"sedes": [1]}, "unknown key 'sedes': did you mean seeds?"),
    "a key that is missing": ({"budget": None}, "budget is not given"),
    "a baseline that is no run": ({"baseline": "lroa"}, "baseline is 'lroa', but must be one of the runs: lora, mezo"),
    "another budget": ({"budget": {"hours": 3}}, "budget is {'hours': 3}: give one of steps, forward_equivalents"),
    "a budget that no run reaches": ({"budget": {"forward_equivalents": 5}}, "one iteration of method fo takes 8"),
    "a run on another model": ({"runs": {**RUNS, "lora": {"model": "x"}}}, "the run lora changes model, which all"),
    "a run of another length": (
        {"runs": {**RUNS, "lora": {"max_steps": 3}}}, "the run lora holds max_steps, which a comparison says by budget"
    ),
    "a base with a seed": ({"base": {"model": "x", "seed": 3}}, "base holds seed, which a comparison says by seeds"),
    "a table": ({"base": {"model": "x", "data": "t.csv"}}, "base holds data, which a comparison says by tasks (of a"),
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
    "no model": ({"base": {"max_length": 8}}, "base holds no model, which all runs of a comparison start from"),
    "seconds side by side": ({"budget": {"seconds": 9}, "jobs": 2}, "runs side by side have no seconds of their own"),
    "tuning of nothing": ({"tuning": {"seeds": [1]}}, "tuning is given, but search is not"),
    "sizes and a size": ({"train_sizes": [8, 16]}, "train_sizes is given, and base holds train_size"),
    "two data seeds": ({"data_seeds": [1, 1]}, "data_seeds holds a value twice"),
    "adapted to what is trained on": (
        {"tasks": ["movie_reviews"], "adapt": {"tasks": ["movie_reviews"], "shots": 4}}, "which is also trained on"
    ),
    "adapted from no rows": ({"adapt": {"tasks": ["tweets"]}}, "adapt has no shots"),
    "adapted from adapters of a run that is not there": (
        {"adapt": {"tasks": ["tweets"], "shots": 4, "start": {"other": "mean"}}},
        "adapt: start names 'other', but the runs are lora, mezo",
    ),
    "adapted by a list": (
        {"adapt": {"tasks": ["tweets"], "shots": 4, "keys": {"optim_args": {"a": 1}}}}, "must be a value or a list"
    ),
    "adapted by adapters of two shapes": (
        {"runs": {**RUNS, "last": {"method": "fo", "adapter_layers": "last 1"}},
         "adapt": {"tasks": ["tweets"], "shots": 4}}, "of adapter_layers last has last 1, lora has nothing"
    ),
    "adapted by adapters of which one is the usual one": (
        {"runs": {**RUNS, "lora": {"method": "fo", "lora_r": 2}}, "adapt": {"tasks": ["tweets"], "shots": 4}},
        "of lora_r lora has 2, mezo has nothing",
    ),
    "seconds of generated text": (
        {"runs": {**RUNS, "mezo": {"method": "zo", "adapter": "none", "objective": "token_f1",
                                   "zo_shaping": "zscore"}}},
        "the budget is of forward equivalents, but the run mezo generates text",
    ),
    "tuning on rows that are tested": (
        {"data_seeds": [0, 1], "search": {"lora": {"learning_rate": [1e-3, 1e-2]}}, "trials": 2,
         "tuning": {"seeds": [5]}}, "so that it would see test rows"
    ),
    "adapted by a key that is none": (
        {"adapt": {"tasks": ["tweets"], "shots": 4, "keys": {"steps": 3}}}, "adapt: 'steps' is no key of adapting"
    ),
    "forgetting what is trained on": (
        {"tasks": ["movie_reviews"], "forgetting": "movie_reviews"}, "which is also trained on"
    ),
    "adapters that a run without training has not": (
        {"runs": {**RUNS, "zero": {"method": "none"}}, "adapt": {"tasks": ["tweets"], "shots": 4, "start": "mean"}},
        "adapt: start is mean, but the run zero trains no adapter",
    ),
    "templates of several tasks": (
        {"tasks": [["tweets", "sms_spam"]], "templates": True}, "templates is given, but runs"
    ),
    "forgetting of several tasks": (
        {"tasks": [["tweets", "sms_spam"]], "forgetting": "movie_reviews"}, "forgetting is given, but runs"
    ),
    "tasks without a common metric": ({"tasks": [["tweets", "squad"]]}, "no metric is of all of them"),
    "a run whose name is no folder": ({"runs": {**RUNS, "lora/r8": {"method": "fo"}}}, "cannot be the name of a fold"),
    "a budget without end": ({"budget": {"steps": float("inf")}}, "must be a number from 1"),
    "half a step": ({"budget": {"steps": 1.5}}, "must be a whole number"),
    "templates of a word": ({"templates": "all"}, "templates is 'all', but must be true or false"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_any_work(capsys, tmp_path, made, here, changes, message):
    assert message in failed(capsys, ["compare", "--config", str(plan_of(tmp_path, made, **changes))])
    assert not here
    assert not (tmp_path / "out").exists()


def test_tasks_are_told_apart_by_their_names(tmp_path, made):
    places = [write_task(tmp_path / name, FILMS, name=name) for name in ("one", "two")]
    assert [place.name for place in places] == ["task.yaml"] * 2
    plan = planned(plan_of(tmp_path, made, tasks=[*map(str, places)]))
    assert [division.name for division in plan.divisions] == ["one", "two"]
    write_task(tmp_path / "two", FILMS, name="one")
    with pytest.raises(ZofoError, match=r"two of the tasks are called one: .* give it another name"):
        planned(plan_of(tmp_path, made, tasks=[*map(str, places)]))
    for name in ("..", "glue/sst2"):
        write_task(tmp_path / "two", FILMS, name=name)
        with pytest.raises(ZofoError, match="cannot be the name of a folder"):
            planned(plan_of(tmp_path, made, tasks=[*map(str, places)]))


def test_text_tasks_of_one_run_are_scored_alike(tmp_path, made):
    for name, metrics in {"one": ["token_f1", "exact_match"], "two": ["exact_match"]}.items():
        write_task(tmp_path / name, FILMS, name=name, options=None, metric=metrics)
    plan = plan_of(tmp_path, made, tasks=[[str(tmp_path / name / "task.yaml") for name in ("one", "two")]])
    with pytest.raises(ZofoError, match="whose rows are scored by exact_match and token_f1: give them the same"):
        planned(plan)


def test_a_run_that_was_killed_says_so():
    words = [sys.executable, "-c", "import os; os.write(2, b'a warning'); os.kill(os.getpid(), 9)"]
    assert work.failure_of_process(work.ended(words)) == "killed by signal 9, perhaps for lack of memory"


def test_forgetting_on_rows_that_are_trained_on_is_refused(capsys, tmp_path, made, here):
    moods = named_task(tmp_path, "moods", FILMS, prompt="{{ text }}. It was")
    line = failed(capsys, ["compare", "--config", str(plan_of(tmp_path, made, forgetting=moods))])
    assert "moods" in line
    assert not here


def test_a_search_of_the_rate_under_its_other_name_is_no_search_without_effect(tmp_path, made):
    search = {"search": {"mezo": {"learning_rate": [1e-3, 1e-2]}}, "trials": 2}
    runs = {"lora": {"method": "fo"}, "mezo": {"method": "zo", "adapter": "none"}}
    assert len(planned(plan_of(tmp_path, made, runs=runs, **search)).trials) == 2


def test_scores_on_other_tasks_whose_files_were_edited_are_others(tmp_path, made):
    other, held_back = named_task(tmp_path, "days"), named_task(tmp_path, "nights")
    file = plan_of(tmp_path, made, forgetting=other, adapt={"tasks": [held_back], "shots": 4}, seeds=[0])

    def evaluated():
        contents.cache_clear()
        cells = planned(file).cells()
        return {path for cell in cells for path in cell.evaluations}, {cell.folder for cell in cells}

    before = evaluated()
    for task in (other, held_back):
        rows = Path(task).with_name("rows.jsonl")
        rows.write_text(rows.read_text().replace('"label": 1', '"label": 0', 1))
    after = evaluated()
    assert not before[0] & after[0]
    assert before[1] == after[1]


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
    cell = planned(file).cells()[0]
    lines = (cell.folder / "predictions.jsonl").read_text().splitlines()
    changed = {**json.loads(lines[0]), "row": "0" * 16}
    (cell.folder / "predictions.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    assert "were scored on different rows" in failed(capsys, ["compare", "--config", str(file)])
