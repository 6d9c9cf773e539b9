"""Gradient checkpointing: the same weights bit for bit, less memory, and a clear word where it cannot be."""

import pytest
import torch

from plain import make_trainer, moved, same, trained, weights, write_task
from shell import arguments, refused
from tiny import save_tiny_model
from zofo import ZOFOConfig, ZofoError
from zofo.config_parser import parse_config
from zofo.training.memory import fake, step_memory

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


def layer_runs(trainer):
    """How often the first layer runs during training."""
    layer, runs = trainer.adapted.base.model.layers[0], []
    inner = layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    inner.remove()
    return len(runs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "adapter"),
    [("fo", "lora"), ("fo", "none"), ("fo", "prompt"), ("bilevel", "lora"), ("two_stage", "lora"), ("zo", "none")],
)
def test_the_weights_are_those_without_it_bitwise(tmp_path, family, method, adapter):
    keys = {"family": family, "method": method, "adapter": adapter}
    plain, _ = trained(tmp_path, **keys)
    again, _ = trained(tmp_path, gradient_checkpointing=True, **keys)
    for part in plain:
        assert same(plain[part], again[part])


def test_layers_run_again_in_the_backward_pass_only(tmp_path):
    for method, factor in (("fo", 2), ("zo", 1)):
        keys = {"method": method, "adapter": "lora" if method == "fo" else "none"}
        plain = layer_runs(make_trainer(tmp_path, **keys))
        assert layer_runs(make_trainer(tmp_path, gradient_checkpointing=True, **keys)) == factor * plain > 0


def test_backpropagation_stops_below_the_adapters_all_the_same(tmp_path):
    """Transformers gives the inputs gradients with checkpointing, which would take it through all blocks."""
    keys = {"method": "fo", "adapter_layers": "last 1"}
    trainer, seen = make_trainer(tmp_path / "again", gradient_checkpointing=True, **keys), []
    for layer in trainer.adapted.base.model.layers:
        layer.register_forward_hook(lambda block, args, output: seen.append(output.requires_grad))
    trainer.train()
    assert {tuple(seen[i : i + 2]) for i in range(0, len(seen), 2)} == {(False, True)}
    plain, _ = trained(tmp_path / "plain", **keys)
    again, _ = trained(tmp_path / "again", gradient_checkpointing=True, **keys)
    assert all(same(values, again[part]) for part, values in plain.items())


@pytest.mark.parametrize("options", [{"preserve_rng_state": False}, {"every_n_layers": 2}, {"use_reentrant": False}])
def test_other_settings_of_checkpoints_keep_them_from_being_reentrant(tmp_path, options):
    keys = {"method": "fo", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}
    plain, _ = trained(tmp_path, method="fo")
    again, _ = trained(tmp_path, **keys)
    assert all(same(values, again[part]) for part, values in plain.items())


def test_prefixes_are_refused_before_anything_is_written(capsys, tmp_path):
    folder = write_task(tmp_path)
    keys = {"model": folder / "model", "task": folder / "task.yaml", "output_dir": tmp_path / "run", "use_cpu": "true"}
    for verb in ("train", "estimate"):
        words = arguments(verb, **keys, method="fo", adapter="prefix", gradient_checkpointing="true")
        assert "would drop the adapter's keys and values (PREFIX_TUNING)" in refused(capsys, words, tmp_path)


def test_prefixes_are_moved_by_forward_passes_all_the_same(tmp_path):
    keys = {"method": "zo", "adapter": "prefix", "max_steps": 1}
    start = weights(make_trainer(tmp_path / "start", **keys).adapted, "upper")
    plain, _ = trained(tmp_path / "plain", **keys)
    again, _ = trained(tmp_path / "again", **keys, gradient_checkpointing=True)
    assert moved(start, again["upper"]) == start.keys()
    assert same(plain["upper"], again["upper"])


def test_options_on_the_command_line_are_json(tmp_path):
    words = ["--output_dir", str(tmp_path), "--gradient_checkpointing", "true", "--use_cpu", "true"]
    config = parse_config(None, [*words, "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'])
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False, "every_n_layers": 2}


def test_the_reentrant_form_is_refused(tmp_path):
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ZofoError, match="use_reentrant: true loses the gradients"):
        ZOFOConfig(output_dir=str(tmp_path), **keys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_layers": 0}, "every_n_layers of gradient_checkpointing_kwargs is 0: give a whole number from 1 on"),
        ({"every": 2}, "gradient_checkpointing_kwargs has 'every', which nothing reads"),
        ({"offload": True}, "moves activations off a GPU, but there is none here"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(ZofoError, match=words):
        ZOFOConfig(
            output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True, gradient_checkpointing_kwargs=options
        )


def test_the_estimate_sees_fewer_activations(tmp_path):
    keys = {"model": str(save_tiny_model(tmp_path / "deep", num_hidden_layers=8)), "max_length": 96, "use_cpu": True}
    sizes = []
    for on in (False, True):
        config = ZOFOConfig(output_dir=str(tmp_path), method="fo", loss="lm", gradient_checkpointing=on, **keys)
        tokens = torch.zeros(8, 96, dtype=torch.long)
        scored = torch.cartesian_prod(torch.arange(8), torch.arange(96), torch.tensor([0])).T
        batch = {"input_ids": tokens, "attention_mask": tokens + 1, "scored": scored}
        sizes.append(step_memory(config, fake(config), batch).activations)
    assert sizes[1] < sizes[0] / 3
