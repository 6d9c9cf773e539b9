"""Keys of objectives: what follows from them, and what is refused before any work."""

from typing import get_args

import pytest
import torch

from plain import make_rows, make_trainer
from zofo import ZOFOConfig
from zofo.errors import ZofoError
from zofo.keys import ObjectiveName
from zofo.tasks.metrics import METRICS

ZO = {"method": "zo", "adapter": "none", "zo_learning_rate": 1e-6}
REWARD = {**ZO, "objective": "reward"}
ACCURACY = {**ZO, "objective": "accuracy"}
ONE_SIDED = {"zo_estimator": "one_sided", "zo_shaping": "zscore"}
WRONG = {
    "an unknown objective": ({**ZO, "objective": "bleu"}, "objective is 'bleu', but must be one of loss, accuracy"),
    "an unknown shaping": ({**ZO, "zo_shaping": "rank"}, "zo_shaping is 'rank', but must be one of none, zscore"),
    "first order": (
        {"method": "fo", "objective": "accuracy"},
        "objective is accuracy, but method fo backpropagates, and that has no gradient: set method: zo or bilevel",
    ),
    "two stages": (
        {"method": "two_stage", "objective": "accuracy"},
        "objective is accuracy, but method two_stage backpropagates, and that has no gradient: set method: zo",
    ),
    "no training": ({"method": "none", "objective": "reward"}, "objective is reward, but method none takes no zeroth"),
    "a reward beside a metric": (
        {**ACCURACY, "reward": ["statistics:mean"]},
        "reward is ['statistics:mean'], but objective is accuracy, and evaluations have one of them: set objective: re",
    ),
    "a name without a function": ({**REWARD, "reward": ["a.py"]}, "reward is 'a.py', but must be FILE.py:function"),
    "a file that is not there": ({**REWARD, "reward": ["no.py:f"]}, "reward is 'no.py:f', but there is no file no.py"),
    "weights of another number": (
        {**REWARD, "reward": ["statistics:mean"], "reward_weights": [1.0, 2.0]},
        "reward_weights has 2 numbers, and reward 1 names: give one number for each reward, in their order",
    ),
    "a population of one": (
        {**ACCURACY, **ONE_SIDED},
        "zo_shaping zscore compares the members of a population, but zo_estimator one_sided with num_perturbations 1",
    ),
    "rows of a metric of sets": (
        {**ACCURACY, "objective": "f1", "zo_shaping": "zscore", "zo_shaping_over": "prompt"},
        "zo_shaping_over is prompt, but f1 is of all rows of a step together, and no row has one of its own",
    ),
    "rows without shaping": ({**ACCURACY, "zo_shaping_over": "prompt"}, "zo_shaping_over is prompt, but zo_shaping is"),
    "an automatic rate": (
        {**ACCURACY, "zo_learning_rate": "auto"},
        "zo_learning_rate is auto, which is found from the curvature of the loss and the noise of its rows, but "
        "objective is accuracy with zo_shaping none: give a number",
    ),
    "a diagnosis": ({**ACCURACY, "diagnose": True}, "diagnose compares with the gradient of the loss, but steps"),
    "a diagnosis of a shaped loss": (
        {**ZO, "zo_shaping": "zscore", "diagnose": True},
        "diagnose compares with the gradient of the loss, but steps descend another objective (zo_shaping zscore)",
    ),
    "a fixed backbone": (
        {"objective": "accuracy", "zo_learning_rate": 0},
        "objective is accuracy, but zo_learning_rate 0 freezes θ, which alone could follow it",
    ),
    "an adapter that nothing trains": (
        {"objective": "accuracy", "zo_learning_rate": 1e-6, "penalty": 0},
        "penalty is 0, but objective accuracy has no gradient, so that nothing would train the adapter upper",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_do_not_go_together_are_refused(name):
    keys, message = WRONG[name]
    with pytest.raises(ZofoError) as refusal:
        ZOFOConfig(output_dir="run", use_cpu=True, **keys)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_rows_of_their_own_are_refused_where_somebody_asks_for_them():
    keys = {**ACCURACY, "zo_distribution": "low_rank", "zo_rows": "own"}
    with pytest.raises(ZofoError, match="zo_rows is own, but the members of a population are compared with each other"):
        ZOFOConfig(output_dir="run", use_cpu=True, **keys, given={*keys, "output_dir", "use_cpu"})
    assert ZOFOConfig(output_dir="run", use_cpu=True, **keys).zo_rows == "shared"


def test_what_follows_from_a_reward():
    keys = {"method": "zo", "adapter": "none", "objective": "reward", "zo_eps": 0.01, "load_best_model_at_end": True}
    config = ZOFOConfig(output_dir="run", use_cpu=True, **keys)
    assert (config.shaping, config.loss, config.metric_for_best_model) == ("zscore", "lm", "reward")
    assert config.zo_learning_rate == 0.01**2 / 2
    notices = config.notices()
    assert notices[0].startswith("zo_learning_rate is not given: zo_eps² / 2 = 5e-05, as is usual for shaped values")
    signs = ZOFOConfig(output_dir="run", use_cpu=True, zo_optimizer="sign", **keys)
    assert signs.zo_learning_rate == 0.01 / 2  # of a gradient of ±1, and not of ±1 / zo_eps
    assert signs.notices()[0].startswith("zo_learning_rate is not given: zo_eps / 2 = 0.005")
    assert notices[1].startswith("zo_shaping zscore of two members, at θ + εz and θ - εz, is the sign of their differ")


def test_every_objective_is_the_loss_a_metric_or_a_reward():
    assert {*get_args(ObjectiveName)} == {"loss", "reward", *METRICS} - {"group_exact_match"}  # of groups of rows


def test_a_loss_stays_as_it_is():
    config = ZOFOConfig(output_dir="run", use_cpu=True)
    assert (config.shaping, config.loss, config.zo_learning_rate, config.black_box) == (
        "none",
        "options",
        "auto",
        False,
    )


def test_what_a_bilevel_run_says_of_an_objective_without_gradient():
    keys = {"objective": "accuracy", "zo_learning_rate": 1e-6}
    says = "objective accuracy has no gradient: θ follows it by forward passes; "
    (line,) = ZOFOConfig(output_dir="run", use_cpu=True, **keys, penalty=1.0).notices()
    assert line == f"{says}p follows λ G and s follows G, their cross-entropy, alone"
    (line,) = ZOFOConfig(output_dir="run", use_cpu=True, **keys).notices()
    assert line == f"{says}the adapter follows G, its cross-entropy, alone"


def test_stored_keys_of_a_run_are_those_of_the_next_one(tmp_path):
    (tmp_path / "score.py").write_text("def known(completions):\n    return [1.0] * len(completions)\n")
    reward = {**REWARD, "reward": [f"{tmp_path / 'score.py'}:known"], "zo_distribution": "low_rank"}
    for keys in (ZO, reward, {}):
        stored = ZOFOConfig(output_dir="run", use_cpu=True, **keys).resolved()
        again = ZOFOConfig(**stored, given=frozenset(stored))
        assert again.resolved() == stored


def test_other_methods_of_a_comparison_have_the_loss():
    config = ZOFOConfig(output_dir="run", use_cpu=True, **{**ACCURACY, "zo_shaping": "zscore"})
    assert (config.variant("fo", "lora").objective, config.variant("fo", "lora").shaping) == ("loss", "none")
    assert config.variant("bilevel", "lora").objective == "accuracy"


def test_a_reward_is_known_by_its_content_and_not_by_its_place(tmp_path):
    found = []
    for folder, text in (("a", "1.0"), ("b", "1.0"), ("c", "2.0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "score.py").write_text(f"def f(completions):\n    return [{text}] * len(completions)\n")
        keys = {**REWARD, "reward": [f"{tmp_path / folder / 'score.py'}:f"]}
        found.append(ZOFOConfig(output_dir="run", use_cpu=True, **keys).identity())
    assert found[0] == found[1] != found[2]


NO_OPTIONS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in make_rows(12)]
PROMPTS = [{"prompt": row["prompt"]} for row in make_rows(12)]


def ones(completions):
    return [1.0] * len(completions)


def of_solutions(completions, solution):
    return ones(completions)


TRAINERS = {
    "options that are not there": (
        {"objective": "accuracy", "loss": "lm"},
        NO_OPTIONS,
        "accuracy, but the rows of thi",
    ),
    "texts where options are": (
        {"objective": "token_f1"},
        make_rows(12),
        "token_f1, but the rows of this task have opt",
    ),
    "no reward": (
        {"objective": "reward"},
        PROMPTS,
        "objective is reward, but reward is not given: add reward: FILE.py",
    ),
    "functions beside a metric": (
        {"objective": "accuracy", "reward_funcs": ones},
        make_rows(12),
        "reward_funcs is given, but objective is accuracy, and evaluations have one of them: set objective: reward",
    ),
    "tokens without a reward": (
        {"max_new_tokens": 5},
        make_rows(12),
        "max_new_tokens is 5, but there is no reward: add reward, or leave max_new_tokens out",
    ),
    "a time without a reward": (
        {"reward_timeout": 5.0},
        make_rows(12),
        "reward_timeout is 5.0, but there is no rew",
    ),
    "weights without a reward": ({"reward_weights": [1.0]}, make_rows(12), "reward_weights is [1.0], but there is no"),
    "two kinds of rewards": (
        {"objective": "reward", "reward_funcs": ones, "reward": ["statistics:mean"]},
        PROMPTS,
        "reward_funcs is given, and reward is ['statistics:mean']: leave one of them out",
    ),
    "a reward without a name": (
        {"objective": "reward", "reward_funcs": [len]},
        PROMPTS,
        "give functions made with def",
    ),
    "two of a name": ({"objective": "reward", "reward_funcs": [ones, ones]}, PROMPTS, "two functions called ones"),
    "a column that is not there": (
        {"objective": "reward", "reward_funcs": of_solutions},
        PROMPTS,
        "reward of_solutions cannot be called (missing a required argument: 'solution')",
    ),
    "no room": (
        {"objective": "reward", "reward_funcs": ones, "max_new_tokens": 5000},
        PROMPTS,
        "and max_new_tokens 5000 do not fit into the",
    ),
    "virtual tokens": (
        {"objective": "reward", "reward_funcs": ones, "adapter": "prefix"},
        PROMPTS,
        "reward needs generated text, which peft gets wrong after virtual tokens",
    ),
    "adapters without answers": (
        {"objective": "reward", "reward_funcs": ones, "method": "bilevel", "adapter": "lora"},
        PROMPTS,
        "a row of train_dataset has no completion, which method bilevel needs for its adapters",
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_rows_and_rewards_that_do_not_go_together_are_refused_before_training(tmp_path, name):
    keys, rows, message = TRAINERS[name]
    with pytest.raises(ZofoError) as refusal:
        make_trainer(tmp_path, rows, **{"method": "zo", "adapter": "none", **keys})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_functions_are_weighed_in_their_order(tmp_path):
    def halves(completions):
        return [0.5] * len(completions)

    keys = {"objective": "reward", "method": "zo", "adapter": "none", "max_new_tokens": 2, "reward_weights": [1, 3]}
    trainer = make_trainer(tmp_path, PROMPTS, reward_funcs=[ones, halves], eval_rows=PROMPTS, **keys)
    assert trainer.evaluate()["eval_reward"] == 2.5
    with pytest.raises(ZofoError, match="reward_weights has 2 numbers for 1 rewards: give one for each"):
        make_trainer(tmp_path, PROMPTS, reward_funcs=[ones], **keys)


def capitals(completions):
    return [sum(letter.isupper() for letter in text) / 4 for text in completions]


def test_a_reward_that_is_no_objective_is_measured_and_changes_nothing_else(tmp_path):
    keys = {"max_steps": 3, "eval_steps": 3, "learning_rate": 1e-2, "method": "fo"}
    found, weights = [], []
    for more in ({}, {"reward_funcs": capitals, "max_new_tokens": 3}):
        trainer = make_trainer(tmp_path, make_rows(12), eval_rows=make_rows(6), **keys, **more)
        trainer.train()
        found.append(trainer.state.log_history[-2])
        weights.append({name: value.clone() for name, value in trainer.adapted.model.named_parameters()})
    plain, rewarded = found
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert rewarded["eval_loss"] == plain["eval_loss"]
    texts = [answer.text for answer in trainer.predict([{"prompt": row["prompt"]} for row in make_rows(6)])]
    assert rewarded["eval_reward"] == pytest.approx(sum(capitals(texts)) / 6)
    assert "eval_accuracy" in plain
    assert "eval_accuracy" not in rewarded


def test_rows_that_only_the_backbone_reads_need_no_answers(tmp_path):
    keys = {"objective": "reward", "method": "bilevel", "adapter": "lora", "max_new_tokens": 2, "loss": "lm"}
    trainer = make_trainer(
        tmp_path, NO_OPTIONS, reward_funcs=ones, upper=PROMPTS, eval_rows=PROMPTS, max_steps=1, **keys
    )
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == 1
    assert "eval_loss" not in trainer.evaluate()


def test_rewards_of_which_none_applies_end_the_run(tmp_path):
    keys = {"objective": "reward", "method": "zo", "adapter": "none", "max_new_tokens": 2}
    trainer = make_trainer(tmp_path, PROMPTS, reward_funcs=never, **keys)
    with pytest.raises(
        ZofoError, match="no reward applies to any of the 2 completions of a member: let a reward function return a"
    ):
        trainer.train()


def never(completions):
    return [None] * len(completions)
