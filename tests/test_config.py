"""The configuration itself: what it refuses in Python too, what it stores, and what a resumed run must share."""

import dataclasses
import re
from collections import Counter
from contextlib import nullcontext
from typing import get_args

import numpy as np
import pytest
from transformers import HfArgumentParser

import zofo.keys
from zofo import ZOFOConfig
from zofo.config import own_keys
from zofo.config_parser import parse_config
from zofo.errors import ZofoError
from zofo.noise import Distribution
from zofo.noise.eager import SHAPES
from zofo.training.checkpoint import require_same
from zofo.zo.estimators import ESTIMATORS, EstimatorName
from zofo.zo.low_rank import DirectionName
from zofo.zo.rules import RULES, RuleName

# Keys that count for every method; each other one is in a group of `keys.py`, of which a method's class takes some.
FOR_EVERY_METHOD = (
    "method", "model", "task", "source", "template", "data", "text", "label", "chat_template", "system_prompt",
    "adapter", "train_size", "dev_size", "test_size", "final_split", "zero_shot", "dtype", "loss",
    "max_length", "overwrite_output_dir", "reward", "reward_weights", "reward_timeout", "max_new_tokens",
)  # fmt: skip


def config(**keys):
    return ZOFOConfig(output_dir="run", use_cpu=True, **keys)


def test_every_key_counts_for_every_method_or_is_in_one_group():
    groups = [group for name, group in vars(zofo.keys).items() if name.endswith("_KEYS")]
    found = Counter(key for group in (*groups, FOR_EVERY_METHOD) for key in group)
    assert set(own_keys()) <= found.keys() <= {f.name for f in dataclasses.fields(ZOFOConfig)}
    assert {key for key, times in found.items() if times > 1} == set()


@pytest.mark.parametrize(
    ("choices", "table"),
    [
        (RuleName, RULES),
        (Distribution, SHAPES),
        (DirectionName, (*SHAPES, "low_rank")),
        (EstimatorName, ESTIMATORS),
    ],
)
def test_the_choices_of_a_key_are_the_rows_of_its_table(choices, table):
    assert get_args(choices) == tuple(table)


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", "zoo"), ("zo_estimator", "both"), ("loss", "x"), ("dtype", "fp64"), ("on_nonfinite", "")],
)
def test_a_value_that_is_none_of_the_choices_is_refused(key, value):
    with pytest.raises(ZofoError, match=f"{key} is {value!r}, but must be one of"):
        config(**{key: value})


def test_the_best_model_needs_evaluations():
    with pytest.raises(ZofoError, match="load_best_model_at_end needs evaluations"):
        config(load_best_model_at_end=True, eval_strategy="no")


def test_evaluations_and_checkpoints_are_a_fifth_of_the_run_apart_and_the_last_three_stay():
    keys = config()
    assert (keys.eval_strategy, keys.eval_steps, keys.save_steps, keys.save_total_limit) == ("steps", 0.2, 0.2, 3)
    assert config(eval_strategy="no", eval_steps=5).eval_strategy == "no"


@pytest.mark.parametrize(
    ("given", "steps"), [({"eval_steps": 5}, 5), ({"save_steps": 7}, 7), ({}, 0.2), ({"eval_strategy": "epoch"}, None)]
)
def test_for_the_best_model_evaluations_and_checkpoints_follow_each_other(given, steps):
    keys = config(load_best_model_at_end=True, **given)
    assert keys.eval_strategy == keys.save_strategy
    assert steps is None or keys.eval_steps == keys.save_steps == steps


def test_without_dev_rows_evaluations_are_off_unless_somebody_asked_for_them():
    keys = config()
    keys.settle_evaluations(0)
    assert keys.eval_strategy == "no"
    with pytest.raises(ZofoError, match="eval_steps asks for evaluations, but no row is left for dev"):
        config(eval_steps=5).settle_evaluations(0)


@pytest.mark.parametrize(
    "given",
    [
        {"eval_on_start": True, "eval_strategy": "no"},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
    ],
)
def test_what_needs_evaluations_is_refused_without_dev_rows(given):
    keys = config(**given)
    keys.settle_evaluations(1)
    with pytest.raises(ZofoError, match="asks for evaluations, but no row is left for dev"):
        keys.settle_evaluations(0)


@pytest.mark.parametrize("more", [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"load_best_model_at_end": True}])
def test_what_follows_evaluations_follows_the_objective(more):
    keys = config(method="zo", adapter="none", objective="token_f1", zo_shaping="zscore", **more)
    assert keys.metric_for_best_model == "token_f1"


@pytest.mark.parametrize(
    ("given", "notice"),
    [
        ({"warmup_steps": 3, "lr_scheduler_type": "greedy"}, "not used by lr_scheduler_type greedy: warmup_steps"),
        ({"task_exponent": 0.3}, "not used by task_sampling uniform: task_exponent"),
        ({"zo_learning_rate": 0, "zo_anchor": 0.1}, "not used with zo_learning_rate: 0, which freezes the backbone"),
    ],
)
def test_keys_that_do_nothing_beside_others_are_named(given, notice):
    assert any(line.startswith(notice) for line in config(**given).notices())


def test_a_run_takes_one_device_of_several(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ZOFOConfig(output_dir="run").n_gpu == 1
    assert config().n_gpu == 0


def test_no_training_has_no_adapter():
    assert config(method="none", adapter="lora").adapter == "none"


@pytest.mark.parametrize(
    ("keys", "shared"),
    [
        ({"method": "two_stage"}, False),
        ({"method": "bilevel", "penalty": 1.0, "penalty_schedule": "linear"}, False),
        ({"method": "zo", "lr_scheduler_type": "linear"}, False),
        ({"method": "zo", "lr_scheduler_type": "inverse_sqrt"}, True),
        ({"method": "zo", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, False),
        ({"method": "zo", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, True),
        ({"method": "bilevel"}, True),
        ({"method": "zo"}, True),
    ],
)
def test_a_longer_run_may_go_on_unless_its_steps_depend_on_its_length(keys, shared):
    assert (config(max_steps=4, **keys).identity() == config(max_steps=8, **keys).identity()) is shared


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("num_perturbations", 2.0, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("save_total_limit", 2.5, "a whole number"),
        ("lora_r", 4.0, "a whole number"),
        ("lower_steps", 10.0, "a whole number"),  # equal to the default
        ("save_total_limit", "3", "a whole number"),
        ("save_total_limit", True, "a whole number"),
        ("max_length", np.float32(8), "a whole number"),
        ("zero_shot", "no", "True or False"),
        ("load_best_model_at_end", "false", "True or False"),
        ("diagnose", 1, "True or False"),
    ],
)
def test_values_of_another_type_are_refused(key, value, kind):
    with pytest.raises(ZofoError, match=re.escape(f"{key} is {value!r}, but must be {kind}")):
        config(**{key: value})


def test_numbers_of_numpy_are_as_good():
    made = config(lower_steps=np.int64(3), learning_rate=np.float64(0.5), diagnose=np.True_)
    assert (made.lower_steps, made.learning_rate, made.diagnose) == (3, 0.5, True)


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("on", True), ("off", False), ("no", False)])
def test_words_for_booleans_count_where_one_is_asked_for(tmp_path, word, value):
    text = f"diagnose: {word}\nrun_name: {word}\nmethod: fo\noutput_dir: {tmp_path / 'run'}\n"
    text += f"gradient_checkpointing_kwargs: {{preserve_rng_state: {word}}}\n" + "eval_strategy: off\n" * (not value)
    (tmp_path / "c.yaml").write_text(text)
    made = parse_config(tmp_path / "c.yaml", [])
    assert (made.diagnose, made.run_name) == (value, word)
    assert made.gradient_checkpointing_kwargs == {"preserve_rng_state": value}


@pytest.mark.parametrize(("word", "found"), [("false", "False"), ("no", "False"), ("yes", "True"), ("a/b", "a/b")])
def test_the_checkpoint_to_resume_from_may_be_a_word(tmp_path, word, found):
    (tmp_path / "c.yaml").write_text(f"resume_from_checkpoint: {word}\n")
    assert parse_config(tmp_path / "c.yaml", []).resume_from_checkpoint == found


def test_hf_argument_parser_makes_it(tmp_path):
    (made,) = HfArgumentParser(ZOFOConfig).parse_args_into_dataclasses(
        ["--method", "zo", "--output_dir", str(tmp_path)]
    )
    assert made.identity() == ZOFOConfig(method="zo", output_dir=str(tmp_path)).identity()
    assert made.notices() == []


@pytest.mark.parametrize(
    ("keys", "free"),
    [
        ({"method": "fo"}, True),
        ({"method": "zo", "adapter": "none"}, True),
        ({"method": "zo", "adapter": "none", "objective": "reward"}, False),
        ({"method": "fo", "load_best_model_at_end": True, "eval_strategy": "steps"}, False),
    ],
)
def test_a_reward_that_is_measured_only_may_be_mended_on_resume(tmp_path, keys, free):
    identities = []
    for number in (1, 2):
        (tmp_path / "score.py").write_text(f"def score(prompts, completions):\n    return [{number}] * len(prompts)\n")
        identities.append(config(reward=f"{tmp_path / 'score.py'}:score", **keys).identity())
    with nullcontext() if free else pytest.raises(ZofoError, match="was written with reward = "):
        require_same(*identities, tmp_path)
    if free:
        without = {**config(**keys).identity(), "rows": ["others"]}  # as rewards read all columns of the rows
        with pytest.raises(ZofoError, match=r"was written with reward = .*now it is None"):
            require_same({**identities[0], "rows": ["some"]}, without, tmp_path)
        best = config(reward=f"{tmp_path / 'score.py'}:score", save_strategy="best", **keys).identity()
        require_same(identities[1], best, tmp_path)  # of the same reward
        with pytest.raises(ZofoError, match="was written with reward = "):
            require_same(identities[0], best, tmp_path)


def test_paths_are_stored_so_that_they_hold_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "lora.json").write_text("{}")
    (tmp_path / "tweets").mkdir()
    monkeypatch.chdir(tmp_path)
    stored = config(task="mine.yaml", adapter="lora.json", model="tweets").resolved()
    assert stored["task"] == str(tmp_path / "mine.yaml")
    assert stored["adapter"] == str(tmp_path / "lora.json")
    assert stored["model"] == str(tmp_path / "tweets")
    assert config(task="tweets", adapter="lora").resolved()["task"] == "tweets"


def test_a_stored_configuration_reads_back_as_itself(tmp_path):
    import yaml

    first = config(method="bilevel", penalty=3.0, zo_learning_rate=3e-5, max_steps=7, lr_scheduler_type="linear")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.resolved()))
    second = parse_config(tmp_path / "config.yaml", [])
    assert second.identity() == first.identity()
    assert second.resolved() == first.resolved()


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("given", ["true", "false"])
def test_the_command_line_wins_over_a_stored_configuration(tmp_path, stored, given):
    import yaml

    first = config(method="bilevel", penalty=1.0, gradient_checkpointing=stored, learning_rate=1e-2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.resolved()))
    again = parse_config(tmp_path / "config.yaml", [])
    assert (again.activation_checkpointing, again.upper_learning_rate) == (stored, 1e-2)
    found = parse_config(tmp_path / "config.yaml", ["--gradient_checkpointing", given, "--learning_rate", "1e-4"])
    assert found.activation_checkpointing == (given == "true")
    assert found.upper_learning_rate == 1e-4
    apart = config(method="bilevel", penalty=1.0, learning_rate=1e-2, upper_learning_rate=3e-2).resolved()
    assert apart["upper_learning_rate"] == 3e-2


@pytest.mark.parametrize("method", ["bilevel", "reptile", "fomaml"])
@pytest.mark.parametrize("upper", [None, 1e-3, 1.0, 0.5])
def test_a_rate_that_follows_another_is_stored_where_it_was_given(method, upper):
    keys = {"penalty": 1.0} if method == "bilevel" else {}
    first = config(method=method, learning_rate=1e-3, **keys, **({"upper_learning_rate": upper} if upper else {}))
    assert first.upper_learning_rate == upper or upper is None
    assert parse_config(first.resolved(), []).upper_learning_rate == first.upper_learning_rate


@pytest.mark.parametrize("key", ["upper_learning_rate", "penalty_schedule", "normalize_penalty"])
def test_keys_of_the_upper_adapter_are_refused_where_there_is_none_of_its_own(key):
    value = {"upper_learning_rate": 3e-3, "penalty_schedule": "linear", "normalize_penalty": False}[key]
    for penalty in ({}, {"penalty": "infinite"}):
        with pytest.raises(ZofoError, match=f"{key} is {value}, but penalty is infinite, as it is by default"):
            config(method="bilevel", **penalty, **{key: value})
    assert vars(config(method="bilevel", penalty=1.0, **{key: value}))[key] == value


def test_a_copy_with_another_rate_is_a_run_with_that_rate():
    first = config(method="bilevel", learning_rate=1e-3)
    assert dataclasses.replace(first, learning_rate=1e-2).learning_rate == 1e-2


def test_a_key_that_the_method_does_not_use_may_change_when_a_run_goes_on():
    identity = config(method="fo").identity()
    assert not {"penalty", "zo_eps", "lower_steps"} & identity.keys()
    assert identity == config(method="fo", lower_steps=3).identity()


def test_a_secret_is_neither_taken_nor_told():
    with pytest.raises(ZofoError, match=r"hub_token is given, but has no effect in zofo") as refusal:
        config(method="zo", hub_token="hf_secret")
    assert "hf_secret" not in str(refusal.value)


def test_autocast_by_the_settings_of_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ZofoError, match=r"mixed_precision: bf16.*set dtype"):
        config(method="zo")


def test_a_list_of_one_task_is_that_task(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("task: [tweets]\noutput_dir: run")
    assert parse_config(file, []).task == "tweets"
    file.write_text("task: [tweets, sms_spam]\noutput_dir: run")
    assert parse_config(file, []).task == ["tweets", "sms_spam"]
    assert parse_config(file, ["--task", "sms_spam", "boolq"]).tasks == ["sms_spam", "boolq"]
    assert parse_config(file, []).resolved()["task"] == ["tweets", "sms_spam"]
    with pytest.raises(ZofoError, match="task is an empty list"):
        config(task=[])


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("3e-5", 3e-5), ("1", 1.0)])
def test_the_zeroth_order_rate_is_a_number_or_auto(tmp_path, given, value):
    file = tmp_path / "config.yaml"
    file.write_text(f"zo_learning_rate: {given}\n")
    assert parse_config(file, []).zo_learning_rate == value
    assert parse_config(None, ["--zo_learning_rate", given]).zo_learning_rate == value
    assert config(zo_learning_rate=given).zo_learning_rate == value


def test_a_rate_that_is_neither_is_refused():
    for make in (lambda: config(zo_learning_rate="fast"), lambda: parse_config(None, ["--zo_learning_rate", "fast"])):
        with pytest.raises(ZofoError, match=r"zo_learning_rate.*fast"):
            make()


WITHOUT_EFFECT = {
    "label_smoothing_factor": 0.3, "train_sampling_strategy": "group_by_length", "dataloader_drop_last": True,
    "auto_find_batch_size": True, "torch_compile": True, "optim_target_modules": "all-linear", "bf16_full_eval": True,
    "fp16_full_eval": True, "do_train": True, "do_eval": True, "do_predict": True, "ignore_data_skip": True,
    "use_liger_kernel": True, "fsdp": "full_shard", "push_to_hub": True, "hub_model_id": "a/b",
    "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3}}, "include_for_metrics": ["inputs"],
    "eval_accumulation_steps": 2, "torch_empty_cache_steps": 2, "ddp_timeout": 5, "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WITHOUT_EFFECT.items())
def test_a_key_that_nothing_reads_is_refused_by_name(key, value):
    with pytest.raises(ZofoError, match=f"{key} is given, but has no effect in zofo: "):
        config(method="fo", **{key: value})


def test_the_defaults_of_transformers_pass_and_a_configuration_can_be_copied():
    from transformers import TrainingArguments

    plain = TrainingArguments(output_dir="run", use_cpu=True)
    fields = {f.name: vars(plain)[f.name] for f in dataclasses.fields(plain) if f.init}
    assert ZOFOConfig(**fields, method="fo").notices() == []
    first = config(method="bilevel", eval_steps=5)
    assert dataclasses.replace(first, seed=1).identity() == {**first.identity(), "seed": 1}


def test_do_train_false_is_refused_where_somebody_wrote_it():
    with pytest.raises(ZofoError, match="do_train is given, but has no effect in zofo: zofo train always trains"):
        parse_config(None, ["--do_train", "false"])


def test_keys_of_another_method_are_named_in_one_line():
    words = ["--method", "fo", "--lower_steps", "2", "--zo_learning_rate", "auto", "--learning_rate", "1e-3"]
    assert parse_config(None, words).notices() == ["not used by fo: zo_learning_rate, lower_steps"]
    assert config(method="fo", lower_steps=2).notices() == ["not used by fo: lower_steps"]
    assert config(method="bilevel", lower_steps=2).notices() == []


def test_keys_that_wait_for_another_key_are_named():
    assert "without chat_template" in config(method="fo", system_prompt="Be brief.").notices()[0]
    assert "warmup_steps" in config(method="fo", warmup_steps=5).notices()[0]
    assert config(method="fo", warmup_steps=5, lr_scheduler_type="linear").notices() == []


def test_the_names_of_mezo_count_for_zo_on_the_backbone_alone():
    taken = config(method="zo", adapter="none", learning_rate=1e-6, weight_decay=0.5)
    plain = config(method="zo", adapter="none", zo_learning_rate=1e-6, zo_weight_decay=0.5)
    assert taken.identity() == plain.identity()
    assert taken.notices() == [
        "learning_rate is taken as zo_learning_rate: 1e-06", "weight_decay is taken as zo_weight_decay: 0.5"
    ]  # fmt: skip
    both = config(method="zo", adapter="none", learning_rate=1e-6, zo_learning_rate="auto")
    assert (both.zo_learning_rate, both.notices()) == ("auto", ["not used by zo: learning_rate"])
    assert config(method="zo", adapter="none").zo_learning_rate == "auto"
    assert config(method="zo", adapter="lora", learning_rate=1e-6).zo_learning_rate == "auto"
    assert config(learning_rate=1e-2).variant("zo", "none").zo_learning_rate == "auto"
    words = ["--method", "zo", "--adapter", "none", "--learning_rate", "1e-3"]
    assert parse_config(None, words).zo_learning_rate == 1e-3  # also where it is the default of the other key


def test_an_item_of_a_list_sets_no_other_key(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text('zo_parameters: [attention, "--seed", "3"]\nzo_exclude: ["--penalty", 7]\noutput_dir: run')
    found = parse_config(file, [])
    assert (found.zo_parameters, found.zo_exclude) == (["attention", "--seed", "3"], ["--penalty", "7"])
    assert (found.seed, found.penalty) == (42, "infinite")


def test_numbers_inside_of_mappings_are_numbers(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\nsave_strategy: no\n")
    found = parse_config(file, [])
    assert found.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert found.save_strategy == "no"


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("cosine_with_min_lr", {"min_rl": 1e-5}),
        ("cosine_with_min_lr", None),
        ("cosine_with_min_lr", {"min_lr": "low"}),
        ("warmup_stable_decay", None),
        ("constant", {"min_lr": 1e-5}),
        ("linear", "../.."),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_at_once(kind, kwargs):
    with pytest.raises(ZofoError, match="lr_scheduler_kwargs"):
        config(method="fo", lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, max_steps=10)


@pytest.mark.parametrize("value", ["beta1=7", "nonsense"])
def test_arguments_that_the_optimizer_does_not_read_are_refused(value):
    with pytest.raises(ZofoError, match="optim_args"):
        config(method="fo", optim="adamw_torch", optim_args=value)
    assert config(method="fo", optim="sgd", optim_args="momentum=0.9").optim_args == "momentum=0.9"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1 << 32), ("data_seed", 1 << 32), ("seed", 10**400), ("lower_steps", 10**12), ("lower_steps", 10**7),
        ("num_perturbations", 10**12), ("gradient_accumulation_steps", 10**8), ("dataloader_num_workers", 10**6),
        ("max_steps", 10**400), ("lower_steps", "3"),
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_use_are_refused(key, value):
    with pytest.raises(ZofoError, match=key):
        config(**{key: value})


@pytest.mark.parametrize("key", ["adapter", "seed", "method"])
def test_a_blank_key_is_not_guessed(tmp_path, key):
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}:\ndata_seed:\n")
    with pytest.raises(ZofoError, match=f"{key} is blank: "):
        parse_config(file, [])
