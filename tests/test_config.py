"""The configuration itself: what it refuses in Python too, what it stores, and what a resumed run must share."""

import pytest

from zofo import ZOFOConfig
from zofo.config import parse_config
from zofo.errors import ZofoError


def config(**keys):
    return ZOFOConfig(output_dir="run", use_cpu=True, **keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", "zoo"), ("zo_estimator", "both"), ("loss", "x"), ("dtype", "fp64"), ("on_nonfinite", "")],
)
def test_a_value_that_is_none_of_the_choices_is_refused(key, value):
    with pytest.raises(ZofoError, match=f"{key} is {value!r}, but must be one of"):
        config(**{key: value})


def test_the_best_model_needs_evaluations():
    with pytest.raises(ZofoError, match="load_best_model_at_end needs evaluations"):
        config(load_best_model_at_end=True)
    assert str(config(load_best_model_at_end=True, eval_steps=5, save_steps=5).eval_strategy.value) == "steps"


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
        ({"method": "bilevel", "penalty_schedule": "linear"}, False),
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

    first = config(method="bilevel", gradient_checkpointing=stored, learning_rate=1e-2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.resolved()))
    again = parse_config(tmp_path / "config.yaml", [])
    assert (again.activation_checkpointing, again.upper_learning_rate) == (stored, 1e-2)
    found = parse_config(tmp_path / "config.yaml", ["--gradient_checkpointing", given, "--learning_rate", "1e-4"])
    assert found.activation_checkpointing == (given == "true")
    assert found.upper_learning_rate == 1e-4
    apart = config(method="bilevel", learning_rate=1e-2, upper_learning_rate=3e-2).resolved()
    assert apart["upper_learning_rate"] == 3e-2


def test_a_secret_is_not_stored():
    assert "hf_secret" not in str(config(method="zo", hub_token="hf_secret").resolved())


def test_autocast_by_the_settings_of_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ZofoError, match=r"mixed_precision: bf16.*set dtype"):
        config(method="zo")


def test_a_list_of_one_task_is_that_task_and_more_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("task: [tweets]\noutput_dir: run")
    assert parse_config(file, []).task == "tweets"
    file.write_text("task: [tweets, sms_spam]\noutput_dir: run")
    with pytest.raises(ZofoError, match="takes one value"):
        parse_config(file, [])


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
