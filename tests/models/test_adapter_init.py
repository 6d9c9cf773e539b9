"""Runs that start from a trained adapter: its values, in every adapter of the run, and nothing guessed."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file

from plain import make_trainer, trained, weights
from tiny import tiny_model, tiny_tokenizer
from zofo import ZofoError


def stored(folder, kind="lora"):
    """The PEFT folder of an adapter that has been moved from its initial values, and its values."""
    kinds = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"]),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    model = get_peft_model(tiny_model(vocab_size=len(tiny_tokenizer())), kinds[kind])
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter) * (number + 1))
    model.save_pretrained(folder)
    return model, sorted(load_file(folder / "adapter_model.safetensors").values(), key=lambda v: float(v.sum()))


def assert_starts(trainer, values):
    for adapter in trainer.adapted.adapters:
        found = sorted(weights(trainer.adapted, adapter).values(), key=lambda v: float(v.sum()))
        assert len(found) == len(values)
        assert all(map(torch.equal, found, values))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("method", ["fo", "bilevel", "zo"])
def test_every_adapter_starts_with_the_stored_values(tmp_path, kind, method):
    _, values = stored(tmp_path / "old", kind)
    trainer = make_trainer(tmp_path / "run", method=method, adapter_init=str(tmp_path / "old"))
    assert len(trainer.adapted.adapters) == (2 if method == "bilevel" else 1)
    assert_starts(trainer, values)
    before = weights(trainer.adapted, "upper")
    trainer.train()
    after = weights(trainer.adapted, "upper")
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_peft_model_is_one_as_well(tmp_path, kind):
    model, values = stored(tmp_path / "old", kind)
    assert_starts(make_trainer(tmp_path / "run", method="bilevel", model=model), values)
    with pytest.raises(ZofoError, match="model is a PeftModel"):
        make_trainer(tmp_path / "run", method="fo", model=stored(tmp_path / "old")[0], adapter="none")


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    stored(tmp_path / "old")
    keys = {"method": "bilevel", "adapter_init": str(tmp_path / "old"), "save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path / "whole", max_steps=4, **keys)
    again = make_trainer(tmp_path / "again", max_steps=4, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for part, values in whole.items():
        assert all(torch.equal(values[name], value) for name, value in weights(again.adapted, part).items())


def test_trained_weights_under_adapter_are_refused_with_what_can_be_meant(tmp_path):
    stored(tmp_path / "old")
    with pytest.raises(ZofoError, match=r"trained weights, which would not be read: set adapter_init"):
        make_trainer(tmp_path / "run", method="fo", adapter=str(tmp_path / "old"))
    fresh = make_trainer(tmp_path / "run", method="fo", adapter=str(tmp_path / "old" / "adapter_config.json"))
    assert fresh.adapted.adapters == ("upper",)
    with pytest.raises(ZofoError, match="leave one of them out"):
        make_trainer(tmp_path / "run", method="fo", adapter="prefix", adapter_init=str(tmp_path / "old"))
    with pytest.raises(ZofoError, match=r"adapter_init is .* but that is no folder"):
        make_trainer(tmp_path / "run", method="fo", adapter_init=str(tmp_path / "none"))


def test_full_fine_tuning_in_float16_needs_an_epsilon_that_it_can_hold(tmp_path):
    def start(**keys):
        model = tiny_model(vocab_size=len(tiny_tokenizer()), dtype=torch.float16)
        return make_trainer(tmp_path, method="fo", adapter="none", model=model, dtype="float16", **keys)

    with pytest.raises(ZofoError, match=r"adam_epsilon is 1e-08, which is 0 in float16.*set adam_epsilon: 1e-4"):
        start()
    start(adam_epsilon=1e-4)
    start(optim="sgd")


def test_a_package_to_report_to_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ZofoError, match=r"report_to is wandb: install what that needs, or set report_to: none"):
        make_trainer(tmp_path, method="fo", report_to="wandb")


def test_a_run_that_only_skips_ends(tmp_path):
    trainer = make_trainer(tmp_path, method="fo", adapter="none", on_nonfinite="skip", max_steps=3)
    with torch.no_grad():
        next(iter(trainer.adapted.backbone.values())).fill_(float("nan"))
    with pytest.raises(ZofoError, match="not finite in 3 steps in a row, so skipping does not help"):
        trainer.train()


def test_a_batch_of_more_rows_than_there_are_is_refused(tmp_path):
    with pytest.raises(ZofoError, match="per_device_train_batch_size is 9, but there are 8 rows to train on"):
        make_trainer(tmp_path, per_device_train_batch_size=9)
