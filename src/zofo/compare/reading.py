"""The file of a comparison, checked before any work: whether its runs can be done, and are compared fairly."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from zofo.compare.budget import Pace
from zofo.compare.plan import FRESH, Adapting, Division, Plan
from zofo.compare.search import Settings, points
from zofo.config import ZOFOConfig, field_names
from zofo.errors import ZofoError, did_you_mean
from zofo.keys import OF_ADAPTER
from zofo.methods.objective_settings import GENERATED
from zofo.parse import read_yaml
from zofo.tasks.lists import name_of_task, require_folder_name, task_files
from zofo.tasks.metrics import TEXT_METRICS
from zofo.tasks.task import load_task

_NEEDED = ("output_dir", "base", "runs", "tasks", "seeds", "budget", "baseline")
KEYS = (
    *_NEEDED, "title", "search", "trials", "tuning", "jobs", "data_seeds", "train_sizes", "forgetting", "templates",
    "adapt",
)  # fmt: skip
_BUDGETS = ("steps", "forward_equivalents", "seconds")
_LENGTH = ("max_steps", "num_train_epochs")
_TABLE = ("data", "text", "label")
_OF_TABLE = "tasks (of a table: the task.yaml that a run on it has left)"
# What the comparison says itself of every run, by its own keys.
_ITS_OWN = {
    "task": "tasks", "seed": "seeds", **dict.fromkeys(_LENGTH, "budget"), **dict.fromkeys(_TABLE, _OF_TABLE),
    "output_dir": "output_dir", "final_split": "tuning", "zero_shot": "a run of method none",
}  # fmt: skip
# What else all runs share; a method that changes one of these is another comparison.
_SHARED = (
    *_ITS_OWN, "model", "source", "template", "data_seed", "train_size", "dev_size", "test_size",
    "overwrite_output_dir", "resume_from_checkpoint", "reward", "reward_weights", "max_new_tokens",
)  # fmt: skip

Measure = Callable[[ZOFOConfig], float | None]


def read_plan(file: Path, measure: Measure, dry: bool = False) -> Plan:
    """The plan in a YAML file.

    Args:
        file: the comparison.
        measure: the seconds of an iteration of a configuration, for a budget of seconds; None if it does not fit into
            memory.
        dry: keep no measured seconds in the comparison's folder.

    Raises:
        ZofoError: if a key is unknown, is missing or cannot be used, or a run is no fair part of the comparison.
    """
    try:
        text, content = file.read_text(encoding="utf-8"), read_yaml(file, str(file))
    except OSError as error:
        raise ZofoError(f"cannot read the comparison {file} ({error.strerror}): give a YAML file") from error
    try:
        return _plan(_whole_content(content), text, file, measure, dry)
    except ZofoError as error:
        raise ZofoError(f"{file}: {error}") from error


def _whole_content(content: Any) -> dict[str, Any]:
    """The keys of a comparison, all known, and none missing."""
    if not isinstance(content, dict):
        raise ZofoError(f"this is no comparison: it must hold {', '.join(_NEEDED)}")
    keys = {str(key): value for key, value in cast("dict[Any, Any]", content).items()}
    for key in keys:
        if key not in KEYS:
            raise ZofoError(f"unknown key {key!r}: {did_you_mean(key, KEYS, ', '.join(KEYS))}")
    for key in _NEEDED:
        if not keys.get(key) and keys.get(key) != 0:
            raise ZofoError(f"{key} is not given: a comparison has {', '.join(_NEEDED)}")
    return keys


def _plan(content: Mapping[str, Any], text: str, file: Path, measure: Measure, dry: bool) -> Plan:
    base = _mapping(file, "base", content["base"])
    runs = {str(name): _mapping(file, f"runs, {name}", keys) for name, keys in _dict(content, "runs").items()}
    output_dir = Path(str(content["output_dir"])).expanduser()
    seeds, divisions = _numbers(content, "seeds"), _divisions(content, base)
    plan = Plan(
        text=text,
        title=str(content.get("title", file.stem)),
        output_dir=output_dir,
        base=base,
        runs=runs,
        divisions=divisions,
        seeds=seeds,
        budget=_budget(content["budget"]),
        baseline=str(content["baseline"]),
        search=_search(content, runs),
        tuning=_tuning(content, divisions, seeds),
        jobs=_whole("jobs", content.get("jobs", 1)),
        pace=Pace(measure, None if dry else output_dir),
        forgetting=_forgetting(content, divisions),
        templates=_yes(content, "templates"),
        adapting=_adapting(content, divisions),
    )
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    if plan.baseline not in plan.runs:
        raise ZofoError(f"baseline is {plan.baseline!r}, but must be one of the runs: {', '.join(plan.runs)}")
    if plan.budget[0] == "seconds" and plan.jobs > 1:
        raise ZofoError(f"jobs is {plan.jobs}, but runs side by side have no seconds of their own: leave jobs out")
    if not plan.base.get("model"):
        raise ZofoError("base holds no model, which all runs of a comparison start from: add model: ... to base")
    for where, keys in {"base": plan.base, **{f"the run {run}": keys for run, keys in plan.runs.items()}}.items():
        if wrong := [key for key in keys if key in _ITS_OWN]:
            raise ZofoError(
                f"{where} holds {wrong[0]}, which a comparison says by {_ITS_OWN[wrong[0]]}: leave it out there"
            )
    for run in plan.runs:
        require_folder_name(run)
    for key in ("templates", "forgetting"):
        if vars(plan)[key] and any(len(division.tasks) > 1 for division in plan.divisions):
            raise ZofoError(f"{key} is given, but runs over several tasks have no such scores: leave it out")
    generates = plan.base.get("objective") in GENERATED
    for run, keys in plan.runs.items():
        if plan.budget[0] != "steps" and (generates or keys.get("objective") in GENERATED):
            raise ZofoError(
                f"the budget is of {plan.budget[0].replace('_', ' ')}, but the run {run} generates text, which takes "
                "many more forwards than it has rows: give budget: {steps: ...}, and compare the seconds of the report"
            )
        tried = {key for settings in plan.search.get(run, ()) for key in settings}
        for key in (*keys, *tried):
            if key in _SHARED:
                raise ZofoError(f"the run {run} changes {key}, which all runs of a comparison share: put it into base")
        first = (run, plan.divisions[0], plan.search.get(run, [{}])[0])
        config = plan.config(*first)
        if plan.budget[0] != "seconds":
            plan.keys(*first)  # whether the budget pays for an iteration
        for key in tried:
            if key in config.idle:
                raise ZofoError(f"search: {key} has no effect on the run {run}: leave it out")
        start = plan.adapting.start.get(run, FRESH) if plan.adapting else FRESH
        if start != FRESH and not config.method_class.trains():
            raise ZofoError(f"adapt: start is {start}, but the run {run} trains no adapter: name the runs that do")
    if plan.adapting:
        _require_one_fresh_adapter(plan, plan.adapting)


def _require_one_fresh_adapter(plan: Plan, asked: Adapting) -> None:
    """Refuses runs that would be adapted by adapters of different shapes; a run without one takes the usual one."""
    fresh = [run for run in plan.runs if asked.start.get(run, FRESH) == FRESH]
    for key in OF_ADAPTER:
        values = {run: _of_fresh(plan.runs[run], key) for run in fresh}
        if key not in (*plan.adapting_keys, *asked.keys) and len(set(map(str, values.values()))) > 1:
            said = ", ".join(f"{run} has {value or 'nothing'}" for run, value in values.items())
            raise ZofoError(
                f"adapt: a fresh adapter must be the same for all runs, but of {key} {said}: say it in keys of adapt"
            )


def _of_fresh(keys: Mapping[str, Any], key: str) -> Any:
    """What a run says of the adapter that it would be adapted by; a run without one takes the usual one."""
    alone = keys.get("adapter") == "none"
    return None if alone or (key == "adapter" and keys.get(key) == ZOFOConfig.adapter) else keys.get(key)


def _divisions(content: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[Division, ...]:
    for several, one in (("data_seeds", "data_seed"), ("train_sizes", "train_size")):
        if several in content and one in base:
            raise ZofoError(f"{several} is given, and base holds {one}: leave one of them out")
    data_seeds = _numbers(content, "data_seeds") if "data_seeds" in content else (base.get("data_seed", 0),)
    train_sizes = _numbers(content, "train_sizes") if "train_sizes" in content else (None,)
    tasks = _tasks(content, "tasks")
    of_seed = "-data-seed-{}" if len(data_seeds) > 1 else ""
    of_size = "-train-size-{}" if len(train_sizes) > 1 else ""
    return tuple(
        Division(task, seed, size, _name(task) + of_size.format(size) + of_seed.format(seed))
        for task in tasks
        for size in train_sizes
        for seed in data_seeds
    )


def _tasks(content: Mapping[str, Any], key: str) -> list[tuple[str, ...]]:
    """The entries of a list of tasks; one that is a list itself is the tasks of one run."""
    entries = [entry if isinstance(entry, list) else [entry] for entry in _list(content, key)]
    tasks = [tuple(task_files([str(task) for task in cast("list[Any]", entry)])) for entry in entries]
    known: dict[str, tuple[str, ...]] = {}
    for entry in tasks:
        for task in entry:
            require_folder_name(name_of_task(task))
        name = _name(entry)
        if name in known:
            both = f"{' '.join(known[name])} and {' '.join(entry)}"
            raise ZofoError(
                f"two of the {key} are called {name}: {both}; leave one of them out, or give it another name"
            )
        known[name] = entry
    for entry in tasks:
        metrics = [load_task(task).metrics for task in entry]
        if not set[str](metrics[0]).intersection(*metrics):
            raise ZofoError(
                f"{key} has {', '.join(entry)} in one run, but no metric is of all of them: make them entries of "
                "their own"
            )
        if len(firsts := {own[0] for own in metrics} & TEXT_METRICS.keys()) > 1:
            raise ZofoError(
                f"{key} has {', '.join(entry)} in one run, whose rows are scored by {' and '.join(sorted(firsts))}: "
                "give them the same first metric, or make them entries of their own"
            )
    return tasks


def _name(tasks: Sequence[str]) -> str:
    """Of tasks in a report, and of their folder: of many, the first one's and how many there are."""
    names = [name_of_task(task) for task in tasks]
    return "+".join(names) if len(names) < 4 else f"{names[0]}+{len(names) - 1}"


def _tuning(
    content: Mapping[str, Any], divisions: Sequence[Division], seeds: Sequence[int]
) -> tuple[tuple[Division, int], ...]:
    """What every setting is tried on; nothing where each task of the table is tuned for itself."""
    if "tuning" not in content:
        return ()
    given: dict[str, Any] = _dict(content, "tuning")
    if "search" not in content:
        raise ZofoError("tuning is given, but search is not: leave it out, or say what to search")
    if not given or given.keys() - {"tasks", "seeds"}:
        raise ZofoError(f"tuning is {given!r}: give tasks, seeds or both")
    places = divisions
    if "tasks" in given:
        rows = divisions[0].data_seed, divisions[0].train_size
        places = [Division(task, *rows, _name(task)) for task in _tasks(given, "tasks")]
    shared = {place.tasks for place in places} & {division.tasks for division in divisions}
    if shared and len({division.data_seed for division in divisions}) > 1:
        raise ZofoError(
            "tuning is on tasks of the table, which data_seeds divides several times, so that it would see test rows: "
            "tune on other tasks, or leave tuning out"
        )
    tuned = _numbers(given, "seeds") if "seeds" in given else seeds[:1]
    return tuple((place, seed) for place in places for seed in tuned)


def _forgetting(content: Mapping[str, Any], divisions: Sequence[Division]) -> str | None:
    if "forgetting" not in content:
        return None
    task = str(content["forgetting"])
    load_task(task)
    if name_of_task(task) in _trained(divisions):
        raise ZofoError(f"forgetting is {task}, which is also trained on: name a task that is not among the tasks")
    return task


def _trained(divisions: Sequence[Division]) -> set[str]:
    """The names of all tasks that runs train on."""
    return {name for division in divisions for name in division.task_names}


def _adapting(content: Mapping[str, Any], divisions: Sequence[Division]) -> Adapting | None:
    if "adapt" not in content:
        return None
    given = _dict(content, "adapt")
    known = ("tasks", "shots", "draws", "start", "keys")
    for key in given:
        if key not in known:
            raise ZofoError(f"adapt has the key {key!r}: {did_you_mean(str(key), known, ', '.join(known))}")
    for key in ("tasks", "shots"):
        if key not in given:
            raise ZofoError(f"adapt has no {key}: give tasks to adapt to, and how many of their rows (shots)")
    tasks = tuple(task for entry in _tasks(given, "tasks") for task in entry)
    if both := [task for task in tasks if name_of_task(task) in _trained(divisions)]:
        raise ZofoError(f"adapt names {both[0]}, which is also trained on: name tasks that are not among the tasks")
    shots, draws = _whole("shots", given["shots"]), _whole("draws", given.get("draws", 5))
    return Adapting(tasks, shots, draws, _starts(content, given), _keys_of_adapting(given))


def _starts(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """What adapters begin with, by run; `start` is a word for all runs, or one for each."""
    start, runs = given.get("start", FRESH), _dict(content, "runs")
    by_run = cast("dict[Any, Any]", start) if isinstance(start, dict) else dict.fromkeys(runs, start)
    if other := [run for run in by_run if run not in runs]:
        raise ZofoError(f"adapt: start names {other[0]!r}, but the runs are {', '.join(runs)}")
    return {str(run): str(word) for run, word in by_run.items()}


def _keys_of_adapting(given: Mapping[str, Any]) -> dict[str, Any]:
    """The further keys of `zofo adapt`: how it trains, for how long, but not on which rows."""
    keys = _dict(given, "keys") if "keys" in given else {}
    for key, value in keys.items():
        if key not in field_names() or (key in _SHARED and key not in _LENGTH):
            raise ZofoError(f"adapt: {key!r} is no key of adapting: give keys of zofo train that say how")
        if isinstance(value, dict):
            raise ZofoError(f"adapt: {key} is {value!r}, but must be a value or a list of them")
    return keys


def _mapping(file: Path, what: str, given: Any) -> dict[str, Any]:
    """Keys that stand in the plan, or in a file of their own, whose path is relative to the plan's."""
    if isinstance(given, str):
        place = file.parent / given
        if not place.is_file():
            raise ZofoError(f"{what} is {given}, but there is no such file: give a train config, or its keys")
        given = read_yaml(place, str(place))
    if given is not None and not isinstance(given, dict):
        raise ZofoError(f"{what} is {given!r}: give keys of zofo train, or a file that holds them")
    return {str(key): value for key, value in cast("dict[Any, Any]", given or {}).items()}


def _dict(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content[key], dict):
        raise ZofoError(f"{key} is {content[key]!r}, but must be a mapping")
    return content[key]


def _list(content: Mapping[str, Any], key: str) -> Sequence[Any]:
    given: Any = content[key]
    return given if isinstance(given, list) else [given]


def _numbers(content: Mapping[str, Any], key: str) -> tuple[int, ...]:
    numbers = tuple(_whole(key, number, least=0) for number in _list(content, key))
    _require_different(key, numbers)
    if not numbers:
        raise ZofoError(f"{key} is empty: give whole numbers, such as [0, 1]")
    return numbers


def _require_different(key: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise ZofoError(f"{key} holds a value twice: give each one once")


def _whole(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ZofoError(f"{key} is {value!r}, but must be a whole number from {least}")
    return value


def _yes(content: Mapping[str, Any], key: str) -> bool:
    if not isinstance(content.get(key, False), bool):
        raise ZofoError(f"{key} is {content[key]!r}, but must be true or false")
    return bool(content.get(key))


def _budget(given: Any) -> tuple[str, float]:
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in _BUDGETS:
        raise ZofoError(f"budget is {given!r}: give one of {', '.join(_BUDGETS)}, such as {{steps: 200}}")
    ((kind, amount),) = cast("dict[str, Any]", given).items()
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 1 <= amount < math.inf:
        raise ZofoError(f"the budget of {kind} is {amount!r}, but must be a number from 1")
    if kind == "steps" and amount != int(amount):
        raise ZofoError(f"the budget of steps is {amount!r}, but must be a whole number")
    return kind, float(amount)


def _search(content: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, list[Settings]]:
    if not content.get("search"):
        if "trials" in content:
            raise ZofoError("trials is given, but search is not: leave it out, or say what to search")
        return {}
    trials = _whole("trials", content.get("trials"))
    found: dict[str, list[Settings]] = {}
    for run, space in _dict(content, "search").items():
        if run not in runs:
            raise ZofoError(f"search names the run {run!r}: {did_you_mean(str(run), runs, ', '.join(runs))}")
        if not isinstance(space, dict) or not space:
            raise ZofoError(f"search, {run} is {space!r}, but must be a mapping from keys to values or a range")
        found[run] = points(cast("dict[str, Any]", space), trials)
    return found
