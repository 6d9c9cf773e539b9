"""What a run saves: plain transformers and peft read it, and it says truly what the run did."""

import dataclasses
import json
import math
import re
import shutil

import gguf
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plain import make_trainer, moved, same, weights, write_config, write_task
from zofo import ZOFOTrainer
from zofo.cli import main
from zofo.commands import results as results_of_runs
from zofo.commands import train as commands
from zofo.config_parser import parse_config
from zofo.report.card import base_licence
from zofo.report.curves import plot_curves

KEYS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "train_size": 18,
    "dev_size": 6,
    "test_size": 10,
    "learning_rate": 3e-2,
    "zo_learning_rate": 1e-2,
    "lower_steps": 3,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 3,
    "adapter": "lora",
}
RUNS = {
    "bilevel": {"penalty": 1.0},
    "fo": {"method": "fo"},
    "zo": {"method": "zo", "adapter": "none"},
    "prompt": {"adapter": "prompt", "penalty": 1.0},
    "prefix": {"method": "fo", "adapter": "prefix"},
    "none": {"method": "none", "adapter": "none"},
    "epoch": {"method": "fo", "max_steps": -1, "num_train_epochs": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and a task, where `trainers` puts a run of every name in `RUNS`."""
    return write_task(tmp_path_factory.mktemp("saving"))


@pytest.fixture(scope="module")
def trainers(folder):
    """{name: the trainer of the run}, after the command has ended."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_of_runs, "plot_curves", plot_curves)
        for name, keys in RUNS.items():

            def make(*args, name=name, **kwargs):
                made[name] = ZOFOTrainer(*args, **kwargs)
                return made[name]

            patch.setattr(commands, "ZOFOTrainer", make)
            config = write_config(folder, name, **{**KEYS, **keys})
            assert main(["train", "--config", str(config), "--output_dir", str(folder / name)]) == 0
    return made


def text(folder):
    """Two prompts as tensors."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return tokenizer(["the film number 3 was", "a story"], return_tensors="pt", padding=True)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def of_trainer(trainer, adapter, inputs):
    trainer.adapted.use(adapter)
    return logits(trainer.adapted.model, inputs)


def difference(first, second):
    return float((first - second).abs().max())


def results(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "adapters"),
    [("bilevel", ["upper", "lower"]), ("fo", ["upper"]), ("prompt", ["upper", "lower"]), ("zo", [])],
)
def test_plain_transformers_and_peft_reproduce_the_trainer_s_logits(folder, trainers, name, adapters):
    run, inputs = folder / name, text(folder)
    backbone = logits(AutoModelForCausalLM.from_pretrained(run / "backbone"), inputs)
    with trainers[name].adapted.without_adapter():
        assert difference(backbone, logits(trainers[name].adapted.model, inputs)) < 1e-5
    for adapter in adapters:
        plain = AutoModelForCausalLM.from_pretrained(run / "backbone")
        found = logits(PeftModel.from_pretrained(plain, run / adapter), inputs)
        wanted = of_trainer(trainers[name], adapter, inputs)
        assert difference(found, wanted) < 1e-5
        assert difference(found[:, -3:], backbone[:, -3:]) > 1e-2
        by_itself = AutoPeftModelForCausalLM.from_pretrained(run / adapter)  # adapter_config.json knows its backbone
        assert difference(logits(by_itself, inputs), wanted) < 1e-5
    if len(adapters) == 2:
        pair = [of_trainer(trainers[name], adapter, inputs) for adapter in adapters]
        assert difference(*pair) > 1e-3
    assert sorted(f.name for f in run.iterdir() if f.is_dir() and not f.name.startswith("checkpoint")) == sorted(
        ["backbone", *adapters]
    )


@pytest.mark.parametrize("adapter", ["upper", "lower"])
def test_merge_equals_adapter_plus_backbone_with_tied_weights_still_tied(folder, trainers, tmp_path, adapter):
    output, inputs = tmp_path / "merged", text(folder)
    assert main(["merge", "--run", str(folder / "bilevel"), "--adapter", adapter, "--output", str(output)]) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert difference(logits(model, inputs), of_trainer(trainers["bilevel"], adapter, inputs)) < 1e-5
    assert type(model) is type(trainers["bilevel"].adapted.base)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    stored = load_file(output / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert not any("lora" in name for name in stored)
    assert AutoTokenizer.from_pretrained(output)("a story")["input_ids"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["merged"]


def test_merge_of_a_run_without_adapters_is_its_backbone(folder, trainers, tmp_path):
    assert main(["merge", "--run", str(folder / "zo"), "--output", str(tmp_path / "merged")]) == 0
    merged, backbone = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", folder / "zo" / "backbone"))
    assert same(merged, backbone)


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        ("fo", ["--adapter", "lower"], "no adapter 'lower'"),
        ("model", [], "no finished run"),
    ],
)
def test_merge_refuses_what_it_cannot_do(folder, trainers, tmp_path, capsys, run, more, message):
    status = main(["merge", "--run", str(folder / run), *more, "--output", str(tmp_path / "merged")])
    errors = capsys.readouterr().err
    assert (status, errors.count("\n")) == (2, 1)
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["prompt", "prefix"])
def test_virtual_tokens_are_kept_beside_the_backbone(folder, trainers, tmp_path, capsys, run):
    output, inputs = tmp_path / "merged", text(folder)
    assert main(["merge", "--run", str(folder / run), "--output", str(output)]) == 0
    assert f"virtual tokens, which cannot be merged: it is kept in {output / 'upper'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    assert same(dict(model.named_parameters()), trainers[run].adapted.backbone)
    found = logits(PeftModel.from_pretrained(model, output / "upper"), inputs)
    assert difference(found, of_trainer(trainers[run], "upper", inputs)) < 1e-5


@pytest.mark.parametrize(("dtype", "stored", "most"), [(None, "float32", 1e-5), ("bfloat16", "bfloat16", 0.2)])
def test_merge_says_how_far_the_rounded_logits_are(folder, trainers, tmp_path, capsys, dtype, stored, most):
    output = tmp_path / "merged"
    more = ["--dtype", dtype] if dtype else []
    assert main(["merge", "--run", str(folder / "bilevel"), "--output", str(output), *more]) == 0
    said = re.search(rf"rounded to {stored}: the logits differ by (\S+) from", capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{stored}"}
    ids = torch.linspace(0, 319, 32).long().view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = difference(logits(model, inputs).float(), of_trainer(trainers["bilevel"], "upper", inputs))
    assert float(said[1]) == pytest.approx(wanted, rel=0.1, abs=2e-6)
    assert (1e-4 if dtype else 0) <= wanted < most


def test_merge_does_not_remove_what_is_in_its_way(folder, trainers, tmp_path, capsys):
    (tmp_path / "merged.half").mkdir()
    (tmp_path / "merged.half" / "mine.txt").write_text("mine")
    assert main(["merge", "--run", str(folder / "bilevel"), "--output", str(tmp_path / "merged")]) == 2
    assert "merged.half is in the way" in capsys.readouterr().err
    assert (tmp_path / "merged.half" / "mine.txt").read_text() == "mine"


def test_merge_writes_over_nothing(folder, trainers, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert main(["merge", "--run", str(folder / "bilevel"), "--output", str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "merged").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "adapter"), [("bilevel", "upper"), ("bilevel", "lower"), ("prompt", "upper"), ("zo", None)]
)
def test_eval_of_a_run_repeats_its_test_metrics_exactly(folder, trainers, tmp_path, name, adapter):
    run, output = folder / name, tmp_path / "scores.json"
    more = ["--adapter", str(run / adapter)] if adapter else []
    rows = ["--task", str(folder / "task.yaml"), "--output", str(output), "--batch_size", "8"]
    assert main(["eval", "--model", str(run / "backbone"), *more, *rows]) == 0
    scores = json.loads(output.read_text())["tasks"]["tiny"]
    assert scores == results(run)["metrics"][adapter or "upper"]
    assert scores["rows"] == 10
    written = output.read_bytes()
    assert main(["eval", "--model", str(run / "backbone"), *more, *rows]) == 2
    assert output.read_bytes() == written


@pytest.mark.parametrize("name", RUNS)
def test_results_have_the_keys_of_the_contract(folder, trainers, name):
    found = results(folder / name)
    contract = {"method", "seed", "model", "task", "metrics", "zero_shot", "cost", "backbone_change"}
    assert found.keys() == contract
    adapters = {"upper", "lower"} if name in ("bilevel", "prompt") else {"upper"}
    assert found["metrics"].keys() == adapters
    for scores in (found["zero_shot"], *found["metrics"].values()):
        assert scores.keys() == {"accuracy", "loss", "rows"}
        assert scores["rows"] == 10
        assert 0 <= scores["accuracy"] <= 1 < 1 + scores["loss"]
    assert found["cost"].keys() == {"forward_tokens", "backward_tokens", "wall_seconds", "peak_memory_bytes"}
    assert (found["seed"], found["task"], found["model"]) == (42, "tiny", str(folder / "model"))
    assert found["method"] == RUNS[name].get("method", "bilevel")


def test_results_on_dev_rows_say_so(folder, trainers):
    config = write_config(folder, "on-dev", **{**KEYS, "method": "fo", "max_steps": 1, "final_split": "dev"})
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "on-dev")]) == 0
    found = results(folder / "on-dev")
    assert found["final_split"] == "dev"
    assert "## Dev metrics" in (folder / "on-dev" / "README.md").read_text()
    assert {scores["rows"] for scores in (found["zero_shot"], *found["metrics"].values())} == {6}


def test_the_backbone_change_is_the_relative_norm_of_its_move(folder, trainers):
    start = load_file(folder / "model" / "model.safetensors")
    for name in RUNS:
        end = load_file(folder / name / "backbone" / "model.safetensors")
        squares = sum(float((end[n].double() - w.double()).square().sum()) for n, w in start.items())
        norm = sum(float(w.double().square().sum()) for w in start.values())
        assert results(folder / name)["backbone_change"] == pytest.approx(math.sqrt(squares / norm), rel=1e-9)
    changes = {name: results(folder / name)["backbone_change"] for name in RUNS}
    assert changes["fo"] == changes["prefix"] == changes["none"] == 0
    assert min(changes["bilevel"], changes["prompt"], changes["zo"]) > 1e-4


def test_costs_count_the_tokens_of_training(folder, trainers):
    costs = {name: results(folder / name)["cost"] for name in RUNS}
    for name in RUNS.keys() - {"none"}:
        assert costs[name]["wall_seconds"] > 0
        assert costs[name]["peak_memory_bytes"] > 1e7
    assert costs["zo"]["backward_tokens"] == 0 < costs["zo"]["forward_tokens"]
    assert costs["fo"]["backward_tokens"] == costs["fo"]["forward_tokens"] > 0
    # 3 lower steps and 2 p-terms go back; 2 points with 3 terms each only forward
    assert 1.8 < costs["bilevel"]["forward_tokens"] / costs["bilevel"]["backward_tokens"] < 2.6
    assert costs["none"]["forward_tokens"] == costs["none"]["backward_tokens"] == 0


def test_method_none_writes_the_zero_shot_scores(folder, trainers):
    found = results(folder / "none")
    assert found["metrics"] == {"upper": found["zero_shot"]}
    assert found["zero_shot"] == results(folder / "bilevel")["zero_shot"] == results(folder / "zo")["zero_shot"]
    assert results(folder / "zo")["metrics"]["upper"] != found["zero_shot"]


@pytest.mark.parametrize("name", ["bilevel", "zo"])
def test_the_stored_configuration_repeats_the_run_bitwise(folder, trainers, tmp_path, name):
    again = tmp_path / "again"
    assert main(["train", "--config", str(folder / name / "config.yaml"), "--output_dir", str(again)]) == 0
    files = [f.relative_to(folder / name) for f in (folder / name).glob("*/*.safetensors")]
    assert files
    for file in files:
        assert same(load_file(folder / name / file), load_file(again / file))
    for key in ("metrics", "zero_shot", "backbone_change"):
        assert results(again)[key] == results(folder / name)[key]


def test_the_stored_configuration_keeps_every_key(folder, tmp_path):
    given = {**KEYS, "seed": 7, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    given = {
        **given,
        "optim": "sgd",
        "penalty": 2.0,
        "penalty_schedule": "linear",
        "eval_steps": 2,
        "weight_decay": 0.1,
    }
    first = parse_config(write_config(folder, "given", output_dir=str(tmp_path / "run"), **given), [])
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(first.resolved()))
    second = parse_config(stored, [])
    assert second.identity() == first.identity()
    fields = [field.name for field in dataclasses.fields(first) if field.init]
    assert {key: vars(second)[key] for key in fields} == {key: vars(first)[key] for key in fields}


def test_the_curves_are_a_picture(folder, trainers):
    image = pytest.importorskip("matplotlib.image")
    for name in ("bilevel", "zo", "fo"):
        pixels = image.imread(folder / name / "curves.png")
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01
    assert not (folder / "none" / "curves.png").exists()


def test_a_norm_of_gradients_is_logged_only_where_there_are_some(trainers):
    for name, trainer in trainers.items():
        norms = [log.get("grad_norm") for log in trainer.state.log_history if "loss" in log]
        assert all(norm is None if name == "zo" else norm > 0 for norm in norms), name
        assert bool(norms) == (name != "none")


def test_the_model_card_tells_base_model_method_and_metrics(folder, trainers):
    for name in RUNS:
        card, found = (folder / name / "README.md").read_text(), results(folder / name)
        front = yaml.safe_load(card.split("---")[1])
        assert front["base_model"] == str(folder / "model")
        assert found["method"] in front["tags"]
        for label, scores in (
            ("zero-shot", found["zero_shot"]),
            *((f"`{a}`", s) for a, s in found["metrics"].items()),
        ):
            row = next(line for line in card.splitlines() if line.startswith(f"| {label} |"))
            assert f"{scores['accuracy']:.4f}" in row
            assert f"{scores['loss']:.4f}" in row
        assert ("PeftModel" in card) == (RUNS[name].get("adapter") != "none")
        assert "Licence of the base model: not stated." in card
        assert "Licence: not stated." in card
        assert "license" not in front
        assert "zofo train --config config.yaml --output_dir NEW" in card
        assert f" { {'epoch': 9, 'none': 0}.get(name, 3) } steps" in " ".join(card.split())
        assert ("; zo_optimizer: sgd;" in card) == (name in ("bilevel", "zo", "prompt"))


def test_the_licence_of_a_base_model_is_that_of_its_card_or_its_gguf(tmp_path):
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert base_licence(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\n[\n---\n# No YAML\n")
    assert base_licence(str(tmp_path)) is None
    assert base_licence("nobody/nothing-here") is None
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert base_licence(str(tmp_path / "m.gguf")) == "apache-2.0"


def test_what_a_killed_save_left_half_written_is_written_anew_without_a_word(folder, trainers, tmp_path, capfd, caplog):
    """The peft library reads the card that it finds, and says so when it is empty."""
    (tmp_path / "README.md").write_text("")
    with caplog.at_level("WARNING"):
        trainers["bilevel"].adapted.save(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    assert (caplog.text, capfd.readouterr().err) == ("", "")


def test_a_card_of_the_user_s_own_is_kept(trainers, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    trainers["bilevel"].save_model(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card
    assert "# My own words" in card


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "polynomial"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 3e-3}},
    ],
    ids=lambda keys: keys["lr_scheduler_type"],
)
@pytest.mark.parametrize("name", ["bilevel", "zo"])
def test_schedules_that_end_at_a_rate_work_with_every_method(tmp_path, name, keys):
    trainer = make_trainer(tmp_path, logging_steps=1, save_strategy="no", **RUNS[name], **keys)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "zo_learning_rate" in entry]
    rates = [entry["zo_learning_rate"] for entry in logs]
    assert rates[0] == trainer.args.zo_learning_rate, "that of the first step, and not of the one to come"
    if name == "bilevel":
        assert [entry["upper_learning_rate"] for entry in logs] == [entry["learning_rate"] for entry in logs]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


def test_there_is_no_pickle_outside_checkpoints(folder, trainers):
    for name in RUNS:
        files = [f for f in (folder / name).rglob("*") if f.is_file() and "checkpoint-" not in str(f)]
        assert len(files) > 5
        for file in files:
            assert file.suffix in (".json", ".yaml", ".md", ".png", ".safetensors", ".jinja", ".txt", ".jsonl")
            assert file.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")


@pytest.mark.parametrize("method", ["bilevel", "zo"])
def test_a_bfloat16_backbone_trains_with_adapters_in_float32(tmp_path, method):
    keys = {
        "method": method,
        "adapter": "lora" if method == "bilevel" else "none",
        "dtype": "bfloat16",
        "zo_eps": 0.05,
    }
    model = str(write_task(tmp_path) / "model")
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=2, **keys)
    start = weights(trainer.adapted, "backbone")
    trainer.train()
    trainer.save_model()
    end = weights(trainer.adapted, "backbone")
    assert moved(start, end) == start.keys()
    stored = load_file(tmp_path / "run" / "backbone" / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {w.dtype for w in end.values()} == {torch.bfloat16}
    for adapter in trainer.adapted.adapters:
        trained = weights(trainer.adapted, adapter)
        saved = load_file(tmp_path / "run" / adapter / "adapter_model.safetensors")
        assert {w.dtype for w in (*trained.values(), *saved.values())} == {torch.float32}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


CONFIGS = {
    "a date that is none": "method: fo\nseed: !!timestamp 2021-13-45\n",
    "an alias in itself": "method: fo\nzo_parameters: &a [*a]\n",
    "a repeated key": "method: fo\nmethod: zo\n",
    "a tag of Python": "method: !!python/name:os.system fo\n",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_was_edited_into_no_yaml_is_refused_in_one_line(
    folder, trainers, tmp_path, capsys, content
):
    run = tmp_path / "run"
    shutil.copytree(folder / "fo", run)
    (run / "config.yaml").write_text(content)
    for words in (["eval", "--run", str(run)], ["eval", "--model", str(run / "backbone")]):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{run / 'config.yaml'}, the configuration of the run, is no valid YAML" in said
