"""Which weights move: by kind, name, layer and magnitude; what is left out keeps its bits."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig

from plain import make_trainer, moved, same, weights
from tiny import logits, same_bits, snapshot, theta_of, tiny_model
from zofo import ZOFOConfig, direction, noise, perturbed
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.peft import LOWER, UPPER
from zofo.models.selection import WEIGHT_KINDS, magnitude_limits, select
from zofo.noise import Sum, Term

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def chosen(model, *words, **more):
    return set(select(model, theta_of(model), words, **more))


def parts(names):
    return {name.removesuffix(".weight").split(".")[-1] for name in names}


def test_without_words_everything_moves():
    model = tiny_model()
    assert chosen(model) == theta_of(model).keys()


def test_kinds_of_a_llama():
    model = tiny_model("mistral")  # its head is not tied
    assert parts(chosen(model, "attention")) == ATTENTION
    assert parts(chosen(model, "mlp")) == {"gate_proj", "up_proj", "down_proj"}
    assert parts(chosen(model, "norms")) == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert chosen(model, "embeddings") == {"model.embed_tokens.weight"}
    assert chosen(model, "head") == {"lm_head.weight"}


KINDS_OF = {
    "opt": ("self_attn.out_proj.bias", "fc1.weight", "self_attn_layer_norm.bias"),
    "gpt2": ("attn.c_attn.weight", "mlp.c_fc.weight", "ln_1.weight"),
    "falcon": ("self_attention.dense.weight", "mlp.dense_h_to_4h.weight", "input_layernorm.weight"),
    "mixtral": ("self_attn.q_proj.weight", "mlp.experts.down_proj", "input_layernorm.weight"),
    "mamba": ("mixer.A_log", None, "norm.weight"),
    "lfm2": ("conv.conv.weight", "feed_forward.w1.weight", "operator_norm.weight"),
    "gpt_neox": ("attention.dense.bias", "mlp.dense_4h_to_h.bias", "post_attention_layernorm.bias"),
}


@pytest.mark.parametrize("family", KINDS_OF)
def test_kinds_of_other_families(family):
    model = tiny_model(family)
    endings = dict(zip(("attention", "mlp", "norms"), KINDS_OF[family], strict=True))
    of_kind = {kind: chosen(model, kind) for kind, ending in endings.items() if ending}
    for kind, ending in endings.items():
        if not ending:
            with pytest.raises(ZofoError, match=f"'{kind}' fits none"):
                chosen(model, kind)
            continue
        for other, names in of_kind.items():
            assert any(name.endswith(ending) for name in names) == (other == kind)


def test_every_weight_of_a_block_is_of_a_kind(family):
    model = tiny_model(family)
    kinds = [kind for kind in WEIGHT_KINDS if kind != "head"]
    assert chosen(model, *kinds, "head") == theta_of(model).keys()


def test_a_tied_weight_is_found_under_each_of_its_names():
    model = tiny_model("llama")
    both = {"model.embed_tokens.weight"}
    assert chosen(model, "head") == chosen(model, "embeddings") == chosen(model, "lm_head") == both


@pytest.mark.parametrize(
    ("words", "more", "names"),
    [
        (["q_proj"], {}, ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["q_proj"], {"layers": "1"}, ["layers.1.self_attn.q_proj"]),
        (["layers.0"], {"exclude": ["mlp", "norms", "k_proj", "v_proj", "o_proj"]}, ["layers.0.self_attn.q_proj"]),
        (["*.0.*.?_proj.weight"], {"exclude": ["*.[kvo]_proj.*"]}, ["layers.0.self_attn.q_proj"]),
    ],
)
def test_names_patterns_layers_and_exclusions(words, more, names):
    model = tiny_model()
    assert chosen(model, *words, **more) == {f"model.{name}.weight" for name in names}


def test_layers_are_numbers_and_not_prefixes():
    model = tiny_model(num_hidden_layers=12)
    assert {name.split(".")[2] for name in chosen(model, layers="1,10-11")} == {"1", "10", "11"}
    assert {name.split(".")[2] for name in chosen(model, "layers.1")} == {"1"}
    assert {name.split(".")[2] for name in chosen(model, layers="3, last 2")} == {"3", "10", "11"}


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (["atention"], {}, r"'atention' fits none .* did you mean attention"),
        (["qproj"], {}, "did you mean q_proj"),
        (["q_proj"], {"exclude": ["zzz"]}, r"'zzz' fits none .* give a kind \(attention, mlp"),
        ([], {"layers": "7"}, r"zo_layers is '7', but '7' is no range of layers of this model: they are 0-1"),
        ([], {"layers": "1-0"}, "no range of layers"),
        ([], {"layers": "last 0"}, "no range of layers"),
        ([], {"layers": "last 3"}, "write for example 0-3,7 or last 2"),
        ([], {"layers": "all"}, "no range of layers"),
        (["q_proj"], {"exclude": ["attention"]}, "no weight remains"),
    ],
)
def test_what_fits_nothing_is_refused(words, more, message):
    with pytest.raises(ZofoError, match=message):
        chosen(tiny_model(), *words, **more)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"method": "fo", "zo_parameters": ["mlp"]},
            r"chooses weights of the backbone.* of bilevel, zo \(adapter none\), ",
        ),
        ({"method": "zo", "adapter": "lora", "zo_layers": "0"}, "zo_layers chooses weights of the backbone"),
        ({"method": "zo", "adapter": "lora", "zo_sparsity": 0.5}, "zo_sparsity chooses weights of the backbone"),
        ({"zo_sparsity": 1.0}, "zo_sparsity is 1.0, but must be at least 0 and less than 1"),
    ],
)
def test_keys_that_cannot_be_used(keys, message):
    with pytest.raises(ZofoError, match=message):
        ZOFOConfig(output_dir="x", use_cpu=True, **keys)


def test_one_word_and_one_number_are_enough():
    args = ZOFOConfig(output_dir="x", use_cpu=True, zo_parameters="mlp", zo_exclude="norms", zo_layers=1)
    assert (args.zo_parameters, args.zo_exclude, args.zo_layers) == (["mlp"], ["norms"], "1")


def test_a_head_with_an_adapter_on_it_is_still_the_head():
    model = tiny_model("mistral")
    adapted = AdaptedModel(model, LoraConfig(target_modules=["lm_head", "q_proj"]), names=(UPPER, LOWER))
    assert select(model, adapted.backbone, ["head"]).keys() == {"lm_head.weight"}
    assert "model.layers.0.self_attn.q_proj.weight" in select(model, adapted.backbone, ["attention"])


@pytest.mark.parametrize("method", ["bilevel", "zo", "two_stage"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_chosen_keeps_its_bits(method, dtype, tmp_path):
    adapter = "none" if method == "zo" else "lora"
    keys = {"zo_parameters": ["attention", "norms"], "zo_layers": "1", "zo_exclude": ["v_proj"]}
    model = tiny_model(vocab_size=320).to(getattr(torch, dtype))
    trainer = make_trainer(tmp_path, model=model, method=method, adapter=adapter, dtype=dtype, **keys)
    before = weights(trainer.adapted, "backbone")
    trainer.train()
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm")
    found = moved(before, weights(trainer.adapted, "backbone"))
    assert found == {f"model.layers.1.{name}.weight" for name in names}


def test_linear_probing_moves_the_head_alone(tmp_path):
    model = tiny_model("mistral", vocab_size=320)
    trainer = make_trainer(tmp_path, model=model, method="zo", adapter="none", zo_parameters=["head"])
    before = weights(trainer.adapted, "backbone")
    trainer.train()
    assert moved(before, weights(trainer.adapted, "backbone")) == {"lm_head.weight"}


# ---- by magnitude


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_limits_are_quantiles(sparsity):
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    limit = magnitude_limits({"w": w, "b": w[0]}, sparsity)
    assert limit.keys() == {"w"}
    sizes = np.sort(np.abs(w.numpy().ravel()))
    assert limit["w"] == sizes[round((1 - sparsity) * 2000) - 1]


def test_without_sparsity_there_are_no_limits():
    assert magnitude_limits({"w": torch.ones(2, 2)}, 0.0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", ["sum", "update"])
def test_only_small_weights_move(dtype, write):
    start = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, part = start.clone(), start.clone()
    if write == "sum":
        noise.write_sums([Sum(start, whole, [Term(7, 0.1)])])
        noise.write_sums([Sum(start, part, [Term(7, 0.1)], limit=0.5)])
    else:
        noise.write_sums([Sum(whole, whole, [Term(7, 0.1)], keep=0.9, rounding_key=3)])
        noise.write_sums([Sum(part, part, [Term(7, 0.1)], keep=0.9, limit=0.5, rounding_key=3)])
    small = start.abs() <= 0.5
    assert 0 < int(small.sum()) < len(start)
    assert torch.equal(part, torch.where(small, whole, start))


def test_a_forward_and_an_update_agree_on_what_moves():
    model = tiny_model()
    theta, before = theta_of(model), snapshot(model)
    limits = magnitude_limits(theta, 0.7)
    z = direction(theta, 3)
    other = tiny_model()
    with torch.no_grad():
        for name, p in other.named_parameters():
            step = 0.05 * noise.representable(0.05) / 0.05 / noise.representable(1.0) * z[name]
            p.copy_(torch.where(p.abs() <= limits.get(name, math.inf), p + step, p))
    with perturbed(model, theta, 3, 0.05, limits=limits):
        torch.testing.assert_close(logits(model), logits(other))
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_weights_keep_their_bits_through_a_run_and_its_resumption(dtype, tmp_path):
    def trainer():
        model = tiny_model(vocab_size=320).to(getattr(torch, dtype))
        keys = {"method": "zo", "adapter": "none", "zo_sparsity": 0.75, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(tmp_path, model=model, dtype=dtype, **keys)

    first = trainer()
    before = weights(first.adapted, "backbone")
    limits = magnitude_limits(before, 0.75)
    first.train()
    after = weights(first.adapted, "backbone")
    for name, w in before.items():
        large = w.abs() > limits.get(name, math.inf)
        assert torch.equal(w[large], after[name][large])
        assert not torch.equal(w, after[name])
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(after, weights(again.adapted, "backbone"))
