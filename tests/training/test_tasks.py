"""Several tasks: one backbone, adapters for each, a step over the tasks that are drawn."""

import pytest
import torch

from plain import make_rows, make_trainer, same, weights
from zofo import ZofoError
from zofo.errors import NonFiniteLossError
from zofo.training.draws import Draws

TASKS = {name: make_rows(12, first=20 * place) for place, name in enumerate("abc")}
METHODS = [
    {"method": "bilevel"},
    {"method": "bilevel", "penalty": "infinite", "lower_steps": 3, "lower_pool": 2, "adapter_layers": "last 1"},
    {"method": "fo"},
    {"method": "fo", "adapter": "none", "learning_rate": 1e-4},
    {"method": "zo", "adapter": "none"},
    {"method": "zo", "adapter": "lora", "shared_adapter": True},
    {"method": "two_stage"},
    {"method": "bilevel", "shared_adapter": True, "zo_learning_rate": "auto"},
    {"method": "bilevel", "zo_distribution": "low_rank", "num_perturbations": 2},
]


def of(keys):
    return " ".join(map(str, keys.values()))


def state(trainer):
    """Everything that a run over tasks has moved: the backbone, and each task's adapters."""
    found = {("", name): value for name, value in weights(trainer.adapted, "backbone").items()}
    for task in trainer.each_task():
        for part in trainer.adapted.adapters:
            found |= {(task, name): value for name, value in weights(trainer.adapted, part).items()}
    return found


def several(folder, tasks=TASKS, **keys):
    return make_trainer(folder, tasks, **keys)


@pytest.mark.parametrize("keys", METHODS, ids=of)
def test_a_dict_of_one_task_is_the_run_of_that_task(tmp_path, keys):
    alone, one = make_trainer(tmp_path / "a", TASKS["a"], **keys), several(tmp_path / "b", {"a": TASKS["a"]}, **keys)
    alone.train()
    one.train()
    assert same(state(alone) if not alone.adapted.adapters else renamed(alone), state(one))


def renamed(trainer):
    return {("a" if task == "" and is_adapter(name) else task, name): v for (task, name), v in state(trainer).items()}


def is_adapter(name):
    return "lora_" in name


def test_a_generated_objective_reads_as_much_of_an_answer_as_the_own_task_has(tmp_path):
    """With the estimate of the task's own run, on rows whose batches do not show how long its answers may be."""
    long = "\nand the story of a film"
    rows = {
        name: [
            {"prompt": row["prompt"], "completion": " a" + long * (longest and i < 2)}
            for i, row in enumerate(make_rows(12, first=20 * longest))
        ]
        for longest, name in enumerate("ab")
    }
    keys = {"method": "zo", "adapter": "none", "objective": "token_f1", "loss": "lm", "max_steps": 1}
    alone = {name: make_trainer(tmp_path / name, part, **keys) for name, part in rows.items()}
    seen = []
    trainer = several(tmp_path / "both", rows, tasks_per_step=2, **keys)
    unrewarded = type(trainer.method.black_box.evaluator).unrewarded

    def noted(self, examples, *args):
        seen.append(self.span)
        return unrewarded(self, examples, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.method.black_box.evaluator), "unrewarded", noted)
        trainer.train()
    assert alone["a"].span.breaks < alone["b"].span.breaks
    assert set(seen) == {one.span for one in alone.values()}


@pytest.mark.parametrize(("keys", "per_step"), [(METHODS[0], 1), *((keys, 2) for keys in METHODS[1:])])
def test_a_run_over_tasks_goes_on_where_it_was_bit_for_bit(tmp_path, keys, per_step):
    keys = {**keys, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "tasks_per_step": per_step}
    whole, again = several(tmp_path / "whole", **keys), several(tmp_path / "again", **keys)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(state(whole), state(again))


@pytest.mark.parametrize("keys", [METHODS[0], METHODS[4], {"method": "reptile"}], ids=of)
def test_an_iteration_that_was_cut_short_leaves_nothing_to_the_next_training_of_the_same_trainer(tmp_path, keys):
    keys = {**keys, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "tasks_per_step": 2}
    whole, cut = several(tmp_path / "whole", **keys), several(tmp_path / "cut", **keys)
    whole.train()
    step, seen = cut.method.step, []

    def broken(*arguments):
        seen.append(1)
        if len(seen) == 4:  # the second task of the second iteration
            raise OSError
        return step(*arguments)

    cut.method.step = broken
    with pytest.raises(OSError):  # noqa: PT011
        cut.train()
    cut.train(resume_from_checkpoint=True)
    assert same(state(whole), state(cut))
    assert losses(whole) == losses(cut)


def test_a_second_training_begins_where_the_first_one_has_ended(tmp_path):
    found = []
    for on_nonfinite in ("skip", "raise"):
        trainer = make_trainer(tmp_path / on_nonfinite, max_steps=2, on_nonfinite=on_nonfinite)
        trainer.train()
        trainer.train()
        found.append(state(trainer))
    assert same(*found)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("keys", [{}, {"num_perturbations": 3}, {"zo_estimator": "one_sided"}], ids=of)
def test_the_backbone_gets_the_mean_of_the_tasks_estimates(tmp_path, keys):
    keys = {"method": "bilevel", "max_steps": 1, **keys}
    scalars = []
    for name, rows in TASKS.items():
        alone = make_trainer(tmp_path / name, rows, **keys)
        step = alone.method.theta.optimizer.step
        alone.method.theta.optimizer.step = lambda step=step, it=alone: (
            scalars.append(it.method.theta.optimizer.estimate),
            step(),
        )
        alone.train()
    joint = several(tmp_path / "joint", tasks_per_step=3, **keys)
    joint.train()
    mean = [sum(values) / 3 for values in zip(*(estimate.projected for estimate in scalars), strict=True)]
    assert len({estimate.projected for estimate in scalars}) == 3

    fresh = make_trainer(tmp_path / "by_hand", TASKS["a"], **keys)
    optimizer = fresh.method.theta.optimizer
    optimizer.propose(type(scalars[0])(fresh.args.seed, 0, tuple(mean)))
    optimizer.step()
    assert same(weights(fresh.adapted, "backbone"), weights(joint.adapted, "backbone"))


def test_each_task_s_adapters_make_the_steps_of_their_own_run(tmp_path):
    """With θ frozen, all tasks drawn in every iteration: each is the run of that task alone, bit for bit."""
    keys = {"method": "bilevel", "zo_learning_rate": 0.0}
    joint = several(tmp_path / "joint", tasks_per_step=3, **keys)
    joint.train()
    for name in joint.each_task():
        alone = make_trainer(tmp_path / name, TASKS[name], **keys)
        alone.train()
        for part in ("upper", "lower"):
            assert same(weights(alone.adapted, part), weights(joint.adapted, part))


def test_only_the_tasks_that_are_drawn_move(tmp_path):
    trainer = several(tmp_path, method="bilevel", max_steps=1, data_seed=3)
    before = state(trainer)
    trainer.train()
    drawn = [list(TASKS)[index] for index in Draws([12] * 3, 1, 0.0, 3).of(0)]
    assert len(drawn) == 1
    after = state(trainer)
    changed = {task for (task, name) in before if not torch.equal(before[task, name], after[task, name])}
    assert changed == {"", *drawn}


def test_opposite_labels_need_adapters_of_their_own(tmp_path):
    rows = make_rows(12)
    swapped = [{**row, "completion": next(o for o in row["options"] if o != row["completion"])} for row in rows]
    tasks = {"plain": rows, "opposite": swapped}
    keys = {"method": "fo", "max_steps": 60, "tasks_per_step": 2, "learning_rate": 3e-2, "eval_rows": tasks}
    own = make_trainer(tmp_path / "own", tasks, **keys)
    own.train()
    scores = own.evaluate()
    assert scores["eval_plain_accuracy"] == scores["eval_opposite_accuracy"] == scores["eval_accuracy"] == 1.0
    shared = make_trainer(tmp_path / "shared", tasks, shared_adapter=True, **keys)
    shared.train()
    scores = shared.evaluate()
    assert scores["eval_accuracy"] == 0.5
    assert scores["eval_rows"] == 24
    assert scores["eval_loss"] == (scores["eval_plain_loss"] + scores["eval_opposite_loss"]) / 2 >= 0.69


def test_a_shared_adapter_gets_the_mean_gradient(tmp_path):
    keys = {"method": "fo", "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    start = weights(make_trainer(tmp_path / "start", TASKS["a"], **keys).adapted, "upper")
    steps = []
    for name, rows in TASKS.items():
        alone = make_trainer(tmp_path / name, rows, **keys)
        alone.train()
        steps.append({key: value - start[key] for key, value in weights(alone.adapted, "upper").items()})
    joint = several(tmp_path / "joint", tasks_per_step=3, shared_adapter=True, **keys)
    joint.train()
    for key, value in weights(joint.adapted, "upper").items():
        expected = torch.stack([step[key] for step in steps]).mean(0)
        torch.testing.assert_close(value - start[key], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shared", [False, True])
def test_a_skipped_step_leaves_all_its_tasks_as_they_were(tmp_path, shared):
    keys = {"method": "bilevel", "on_nonfinite": "skip", "tasks_per_step": 3, "shared_adapter": shared, "max_steps": 2}
    trainer = several(tmp_path / "run", **keys)
    before, step, calls = state(trainer), trainer.method.step, []

    def fails(number, progress, micro):
        calls.append(number)
        logs = step(number, progress, micro)
        if len(calls) % 3 == 2:  # after this task's and an earlier one's adapters have moved
            raise NonFiniteLossError("the loss is nan")
        return logs

    trainer.method.step = fails
    with pytest.raises(ZofoError, match="not finite in 2 steps in a row"):
        trainer.train()
    assert same(before, state(trainer))
    assert not any(state for kept in trainer._joint.bank.kept().values() for _, state in kept)


def test_the_draws_are_a_function_of_seed_and_iteration():
    draws = Draws([10, 20, 70], 1, 1.0, 5)
    found = [draws.of(i) for i in range(2000)]
    assert found == [Draws([10, 20, 70], 1, 1.0, 5).of(i) for i in range(2000)]
    shares = [sum(task == (index,) for task in found) / 2000 for index in range(3)]
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    for iteration in (0, 7, 1999, 3, 12):
        assert draws.before(iteration) == tuple(sum(index in d for d in found[:iteration]) for index in range(3))
    alike = [Draws([1, 100, 10000], 2).of(i) for i in range(600)]
    assert all(len(set(pair)) == 2 for pair in alike)
    assert [sum(i in pair for pair in alike) / 600 for i in range(3)] == pytest.approx([2 / 3] * 3, abs=0.06)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tasks_per_step": 4}, r"tasks_per_step is 4, but there are 3 tasks: set it to 3 at most"),
        ({"method": "zo", "adapter": "lora"}, r"shared_adapter: true"),
        ({"diagnose": True}, r"diagnose measures on one task"),
        ({"per_device_train_batch_size": 9}, r"but there are 8 rows to train on \(lower of task a\)"),
        ({"metric_for_best_model": "eval_d_loss"}, r"metric_for_best_model is 'eval_d_loss', but evaluations report"),
        ({"metric_for_best_model": "lower_a_loss"}, r"evaluations report .*a_loss, .*a_lower_loss"),
        ({"eval_rows": make_rows(3)}, r"train_dataset has the tasks a, b, c: give eval_dataset as a dict"),
    ],
)
def test_what_does_not_go_with_these_tasks_is_one_line(tmp_path, keys, words):
    with pytest.raises(ZofoError, match=words):
        several(tmp_path, **keys)


@pytest.mark.parametrize("name", ["lower", "b_lower"])
def test_a_task_whose_scores_would_be_logged_as_those_of_an_adapter_is_refused(tmp_path, name):
    with pytest.raises(ZofoError, match=f"a task is called {name}, but scores of the adapter lower are logged under"):
        several(tmp_path, {"b": TASKS["a"], name: TASKS["b"]})
    several(tmp_path, {"a": TASKS["a"], "c_lower": TASKS["b"]})  # which no scores of an adapter are called
    several(tmp_path, {"b": TASKS["a"], name: TASKS["b"]}, penalty="infinite")  # which has no lower adapter


def test_the_best_model_may_be_chosen_by_the_lower_adapter_of_one_task(tmp_path):
    keys = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = several(tmp_path, eval_rows=TASKS, metric_for_best_model="a_lower_loss", **keys)
    trainer.train()
    found = [entry["eval_a_lower_loss"] for entry in trainer.state.log_history if "eval_a_lower_loss" in entry]
    assert trainer.state.best_metric == min(found)


def test_a_single_task_cannot_be_drawn_twice(tmp_path):
    with pytest.raises(ZofoError, match="tasks_per_step is 2, but there is 1 task: set it to 1 at most"):
        make_trainer(tmp_path, tasks_per_step=2)


def test_an_unknown_task_is_not_set(tmp_path):
    with pytest.raises(ZofoError, match=r"this run has no task 'd': its tasks are a, b, c"):
        several(tmp_path).set_task("d")
