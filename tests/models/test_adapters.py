"""Adapters: twins start equal and stay apart, and the backbone under them is the original model."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from plain import make_trainer
from tiny import FAMILIES, save_tiny_model, snapshot, tiny_model, token_batch
from zofo import ZOFOConfig
from zofo.commands.estimate import estimate
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import Lora, adapter_config
from zofo.models.peft import LOWER, UPPER, attach, merged

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # peft, of its prefixes
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's layout
]
KINDS = ("lora", "prefix", "prompt")


def twins(family="llama", kind="lora"):
    model = tiny_model(family)
    adapted = AdaptedModel(model, adapter_config(kind, model), names=(UPPER, LOWER))
    adapted.model.eval()
    return adapted


@torch.no_grad()
def logits(adapted, adapter=None):
    if adapter:
        adapted.use(adapter)
    ids = token_batch()
    return adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@torch.no_grad()
def disturb(adapted, adapter):
    for parameter in adapted.adapter_parameters(adapter).values():
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))


def fill_memory(*_, **__):
    """Raises what torch raises where there is no more memory."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_start_equal_and_are_independent(family, kind):
    adapted = twins(family, kind)
    upper, lower = adapted.adapter_parameters(UPPER), adapted.adapter_parameters(LOWER)
    assert len(upper) == len(lower) > 0
    for (name, p), s in zip(upper.items(), (lower[name.replace(UPPER, LOWER)] for name in upper), strict=True):
        assert torch.equal(p, s), name
        assert p.data_ptr() != s.data_ptr()
    assert torch.equal(logits(adapted, UPPER), logits(adapted, LOWER))
    before = logits(adapted, UPPER)
    disturb(adapted, LOWER)
    assert torch.equal(logits(adapted, UPPER), before)
    assert not torch.equal(logits(adapted, LOWER), before)
    assert torch.equal(logits(adapted, UPPER), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_adapter_the_backbone_is_the_original_model_bit_for_bit(family, kind):
    adapted = twins(family, kind)
    disturb(adapted, UPPER)
    ids = token_batch()
    with torch.no_grad():
        original = tiny_model(family)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    changed = logits(adapted)
    assert not torch.equal(changed, original)
    with adapted.without_adapter():
        assert torch.equal(logits(adapted), original)
    assert torch.equal(logits(adapted), changed)


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_keeps_the_names_of_the_original_model(family, kind):
    original = tiny_model(family)
    model = tiny_model(family)
    adapted = AdaptedModel(model, adapter_config(kind, model), names=(UPPER, LOWER))
    assert adapted.backbone.keys() == dict(original.named_parameters()).keys()
    assert all(torch.equal(adapted.backbone[name], p) for name, p in original.named_parameters())
    assert not any(p.requires_grad for p in adapted.backbone.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_are_those_of_the_backbone_and_of_the_adapters(kind):
    adapted = twins("llama", kind)
    parts = [adapted.backbone, adapted.adapter_parameters(UPPER), adapted.adapter_parameters(LOWER)]
    seen = [id(p) for part in parts for p in part.values()]
    assert len(seen) == len(set(seen))
    assert {id(p) for p in adapted.model.parameters()} == set(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_adapters_lets_gradients_into_the_one_in_use_only(kind):
    adapted = twins("llama", kind)
    for used, other in ((LOWER, UPPER), (UPPER, LOWER)):
        adapted.use(used)
        ids = token_batch()
        adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        assert any(p.grad is not None for p in adapted.adapter_parameters(used).values())
        assert all(p.grad is None for p in adapted.adapter_parameters(other).values())
        assert all(p.grad is None for p in adapted.backbone.values())
        adapted.model.zero_grad(set_to_none=True)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_go_through_different_twins(family):
    adapted = twins(family)
    assert adapted.mixes
    disturb(adapted, LOWER)
    alone = {name: logits(adapted, name) for name in (UPPER, LOWER)}
    assert not torch.allclose(alone[UPPER], alone[LOWER], atol=1e-2)
    for rows in ([UPPER, LOWER], [LOWER, UPPER], [LOWER, LOWER]):
        with adapted.through(rows):
            mixed = logits(adapted)
        torch.testing.assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(rows)]))


def test_a_forward_that_fails_between_twins_leaves_nothing_behind():
    adapted = twins()
    before = logits(adapted, UPPER)
    with pytest.raises(ValueError, match="adapter_names"), adapted.through([UPPER, LOWER, LOWER]):
        logits(adapted)
    assert torch.equal(logits(adapted, UPPER), before)


def test_an_adapter_may_be_a_peft_config_file(tmp_path):
    model = tiny_model()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"])
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_config.json"):
        read = adapter_config(str(path), model)
        assert (read.r, read.lora_alpha, read.target_modules, read.inference_mode) == (3, 6, {"o_proj"}, False)
    adapted = AdaptedModel(model, read)
    assert {name.split(".lora")[0].split(".")[-1] for name in adapted.adapter_parameters(UPPER)} == {"o_proj"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "give one of lora, prefix, prompt, none, or the path of a PEFT config JSON"),
        ("{", "is no PEFT config"),
        ("{}", "is no PEFT config"),
        ("[]", "is no PEFT config"),
        (json.dumps({"peft_type": "NOSUCH"}), "is no PEFT config"),
    ],
)
def test_an_unknown_adapter_is_refused(tmp_path, content, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ZofoError) as caught:
        adapter_config(str(file), tiny_model())
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_adapter_names_those_that_there_are():
    with pytest.raises(ZofoError, match="adapter is 'loar': give one of lora, prefix, prompt, none"):
        adapter_config("loar", tiny_model())


@pytest.mark.parametrize(("layers", "blocks"), [("last 2", {2, 3}), ("0,2-3", {0, 2, 3}), (None, {0, 1, 2, 3})])
def test_lora_in_some_layers_alone(family, layers, blocks):
    model = tiny_model(family, num_hidden_layers=4)
    adapted = AdaptedModel(model, adapter_config("lora", model, Lora(layers)))
    names = adapted.adapter_parameters(UPPER)
    assert {int(re.search(r"\.(\d+)\.", name)[1]) for name in names} == blocks
    assert (len(names) == len(AdaptedModel(*_fresh(family)).adapter_parameters(UPPER))) == (layers is None)
    assert adapted.blocks_of_backward == (range(min(blocks), 4), 4)


def _fresh(family):
    model = tiny_model(family, num_hidden_layers=4)
    return model, adapter_config("lora", model)


def test_lora_of_the_size_that_keys_say_on_the_modules_that_they_name():
    model = tiny_model(num_hidden_layers=4)
    found = adapter_config("lora", model, Lora("last 1", 4, 12, ("o_proj", "down_proj")))
    assert found == LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["o_proj", "down_proj"], layers_to_transform=[3]
    )
    usual = adapter_config("lora", model)
    assert (usual.r, usual.lora_alpha, usual.layers_to_transform) == (8, 16, None)
    assert adapter_config("lora", model, Lora(r=2)).lora_alpha == 4
    everywhere = AdaptedModel(model, adapter_config("lora", model, Lora(targets=("all-linear",))))
    assert len(everywhere.adapter_parameters(UPPER)) == 4 * 7 * 2
    with pytest.raises(ZofoError, match="adapter_layers is 'last 1', but LoRA goes on all-linear: name the modules"):
        adapter_config("lora", model, Lora("last 1", targets=("all-linear",)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "v_prj"), "lora_target_modules has 'v_prj', but this model has no module of that name: its linear"),
        (("all-linear", "lm_head"), "lora_target_modules has 'all-linear', but .* all-linear, alone, means all but"),
        ((), "lora_target_modules is empty: name a module, or leave it out for queries and values"),
    ],
)
def test_modules_that_peft_would_pass_over_are_refused(targets, message):
    with pytest.raises(ZofoError, match=message):
        adapter_config("lora", tiny_model(), Lora(targets=targets))


def test_backpropagation_stops_at_the_lowest_layer_with_lora(tmp_path):
    sizes = []
    for layers in ("last 2", None):
        config = ZOFOConfig(
            output_dir="run", use_cpu=True, method="fo", adapter_layers=layers,
            model=str(save_tiny_model(tmp_path / "deep", num_hidden_layers=8)), max_length=96, loss="lm",
        )  # fmt: skip
        sizes.append(next(row for row in estimate(config, timed=False) if row.chosen).memory)
    assert sizes[0].adapters == sizes[1].adapters / 4
    assert sizes[0].activations < 0.6 * sizes[1].activations


def test_layers_beside_a_config_that_says_them_itself_are_refused(tmp_path):
    for given in ({"peft": LoraConfig(target_modules=["q_proj"])}, {"model": _peft_model()}):
        with pytest.raises(ZofoError, match="adapter_layers is 'last 1', but the adapter is given as a PEFT config or"):
            make_trainer(tmp_path, method="fo", adapter_layers="last 1", **given)
        with pytest.raises(ZofoError, match=r"lora_r is 4, but the adapter is given .* LoraConfig\(r=...\)"):
            make_trainer(tmp_path, method="fo", lora_r=4, **given)
    assert make_trainer(tmp_path, method="none", adapter_layers="last 1", lora_r=2).adapted.adapters == ()


def _peft_model():
    return get_peft_model(tiny_model(vocab_size=320), LoraConfig(target_modules=["q_proj"]))


def test_modules_that_the_model_lacks_are_named():
    model = tiny_model()
    with pytest.raises(ZofoError, match="nosuch"):
        AdaptedModel(model, LoraConfig(target_modules=["nosuch"]), names=(UPPER, LOWER))


@pytest.mark.parametrize("content", [None, "{", '{"peft_type": "NOSUCH"}'])
def test_a_stored_adapter_that_cannot_be_attached(tmp_path, content):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ZofoError, match=str(tmp_path)) as caught:
        attach(tiny_model(), str(tmp_path))
    assert "\n" not in str(caught.value)


def saved_adapter(path, kind="lora"):
    adapted = twins("llama", kind)
    disturb(adapted, UPPER)
    adapted.save(path)
    return path / UPPER


def test_a_stored_adapter_of_another_model_is_refused(tmp_path):
    stored = saved_adapter(tmp_path)
    with pytest.raises(ZofoError, match="does not fit this model"):
        attach(tiny_model("llama", hidden_size=64), str(stored))
    with pytest.raises(ZofoError, match="does not fit this model"):
        attach(tiny_model("gpt2"), str(stored))


@pytest.mark.parametrize("bytes_left", [0, 50, -100])
def test_a_stored_adapter_that_is_truncated_is_refused(tmp_path, bytes_left):
    stored = saved_adapter(tmp_path)
    file = stored / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(ZofoError, match=str(stored)):
        attach(tiny_model(), str(stored))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # what peft says and goes on
def test_a_stored_adapter_with_a_tensor_missing_is_refused(tmp_path):
    stored = saved_adapter(tmp_path)
    tensors = load_file(stored / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, stored / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZofoError, match=str(stored)):
        attach(tiny_model(), str(stored))


def test_a_stored_adapter_that_is_pickled_is_never_opened(tmp_path):
    stored = saved_adapter(tmp_path)
    tensors = load_file(stored / "adapter_model.safetensors")
    (stored / "adapter_model.safetensors").unlink()
    torch.save(tensors, stored / "adapter_model.bin")
    with pytest.raises(ZofoError, match=r"pickle|safetensors"):
        attach(tiny_model(), str(stored))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_cannot_be_merged(tmp_path, kind):
    stored = saved_adapter(tmp_path / "run", kind)
    backbone = save_tiny_model(tmp_path / "base")
    with pytest.raises(ZofoError, match="virtual tokens, which cannot be merged"):
        merged(str(backbone), str(stored))


@torch.no_grad()
def test_a_backbone_of_two_precisions_is_restored_to_the_bit(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.model.norm.float().weight.normal_(1, 0.1)
    adapted = AdaptedModel(model)
    before = {name: p.clone() for name, p in adapted.backbone.items()}
    adapted.save(tmp_path)
    for parameter in adapted.backbone.values():
        parameter.zero_()
    adapted.load(tmp_path)
    for name, parameter in adapted.backbone.items():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stored = saved_adapter(tmp_path)
    (tmp_path / "lora.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}')
    assert adapter_config("~/lora.json", tiny_model()).r == 2
    assert attach(tiny_model(), f"~/{stored.relative_to(tmp_path)}")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_lack_of_memory_is_not_taken_for_an_unfit_model(kind):
    adapted = twins(kind=kind)
    adapted.require_prompts()
    adapted.base.register_forward_pre_hook(fill_memory)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        adapted.require_prompts()
    assert not isinstance(caught.value, ZofoError)


def test_a_lack_of_memory_is_not_taken_for_an_unfit_adapter(tmp_path, monkeypatch):
    twins().save(tmp_path)
    attach(tiny_model(), str(tmp_path / UPPER))
    model = tiny_model()
    monkeypatch.setattr(torch.nn.Linear, "__init__", fill_memory)  # of the matrices of the adapter
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        attach(model, str(tmp_path / UPPER))
    assert not isinstance(caught.value, ZofoError)


def test_weights_that_somebody_froze_are_not_trained_without_a_word(tmp_path):
    model = tiny_model(vocab_size=320)
    model.model.embed_tokens.weight.requires_grad_(False)
    keys = {"adapter": "none", "model": model}
    for method in ("fo", "zo"):
        with pytest.raises(ZofoError, match=r"1 weights of the model are frozen, such as model.embed_tok"):
            make_trainer(tmp_path, method=method, **keys)
    make_trainer(tmp_path, method="fo", model=model).train()


@pytest.mark.parametrize("method", ["fo", "zo"])
def test_tables_that_the_architecture_freezes_stay_as_they_are(tmp_path, method):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    more = {"embedding_size": 32, "max_position_embeddings": 64, "is_decoder": True, "vocab_size": 320}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("roformer", **sizes, **more, pad_token_id=2))
    tables = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = snapshot(model)
    assert tables
    rates = {"zo_learning_rate": 1e-2} if method == "zo" else {}
    trainer = make_trainer(tmp_path, method=method, adapter="none", model=model, zero_shot=False, **rates)
    trainer.train()
    after = snapshot(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == tables
    trainer.save_model(str(tmp_path / "saved"))
    assert tables <= {*AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "backbone").state_dict()}


def test_noise_on_embeddings_does_not_go_with_virtual_tokens(tmp_path):
    with pytest.raises(ZofoError, match="neftune_noise_alpha is set, but virtual tokens are no embeddings of a text"):
        make_trainer(tmp_path, family="gpt2", method="fo", adapter="prompt", neftune_noise_alpha=5.0)


def test_layers_of_adapters_and_modules_outside_of_them_do_not_go_together(tmp_path):
    keys = {"method": "fo", "adapter_layers": "last 1", "lora_target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ZofoError, match="has 'lm_head', which is in none of the blocks that adapter_layers chooses"):
        make_trainer(tmp_path, **keys)
