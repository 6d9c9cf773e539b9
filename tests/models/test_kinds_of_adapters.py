"""Kinds of peft beyond the usual ones: they train as twins, resume bitwise and are read by peft, or are refused."""

import copy
import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plain import make_trainer, moved, same, weights
from tiny import tiny_model, token_batch
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.peft import LOWER, UPPER, attach, merged, real_keys_and_values
from zofo.scoring.scorer import Scorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # peft, of its prefixes
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft, of norms
]

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "rslora": LoraConfig(use_rslora=True, **TARGETS),
    "dora": LoraConfig(use_dora=True, **TARGETS),
    "orthogonal lora": LoraConfig(init_lora_weights="orthogonal", **TARGETS),
    "lora with dropout": LoraConfig(lora_dropout=0.3, **TARGETS),
    "lora and a norm": LoraConfig(modules_to_save=["norm"], **TARGETS),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, **TARGETS),
    "lokr": LoKrConfig(r=4, **TARGETS),
    "oft": OFTConfig(oft_block_size=8, **TARGETS),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "layer norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix by projection": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16),
}
FIXED = {"vera": ("vera_A", "vera_B")}  # buffers that two layers share


def config_of(kind, folder):
    """Through a file, as users give it."""
    config = copy.deepcopy(KINDS[kind])
    config.save_pretrained(folder / "config")
    return adapter_config(str(folder / "config"), tiny_model())


def trainer_of(kind, folder, **keys):
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **keys}
    return make_trainer(folder / "run", peft=config_of(kind, folder), **keys)


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=token_batch(vocab_size=320)).logits


@pytest.fixture
def forwards(monkeypatch):
    """Of each scored forward, whether it kept its graph."""
    done, forward = [], Scorer.log_probabilities
    monkeypatch.setattr(
        Scorer, "log_probabilities", lambda *given: done.append(torch.is_grad_enabled()) or forward(*given)
    )
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_twins_start_equal_train_apart_resume_bitwise_and_are_read_by_peft(kind, tmp_path, forwards):
    trainer = trainer_of(kind, tmp_path)
    adapted = trainer.adapted
    start = {part: weights(adapted, part) for part in ("backbone", UPPER, LOWER)}
    assert [n.replace(UPPER, LOWER) for n in start[UPPER]] == list(start[LOWER])
    assert all(torch.equal(p, start[LOWER][n.replace(UPPER, LOWER)]) for n, p in start[UPPER].items())
    forwards.clear()  # of how it pads
    trainer.train()
    assert adapted.mixes == (kind in ("rslora", "orthogonal lora", "lora with dropout"))
    # of two steps: those of s, F(θ, p) and G(θ, p); near θ, both twins in one forward or in one each
    assert (forwards.count(True), forwards.count(False)) == (2 * (2 + 2), 2 * (2 if adapted.mixes else 4))
    end = {part: weights(adapted, part) for part in start}
    assert moved(start["backbone"], end["backbone"]) == adapted.movable.keys()
    for part in (UPPER, LOWER):
        assert moved(start[part], end[part]) == start[part].keys()
    resumed = trainer_of(kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(same(end[part], weights(resumed.adapted, part)) for part in end)
    trainer.save_model()
    for adapter in (UPPER, LOWER):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "backbone")
        found = logits_of(PeftModel.from_pretrained(plain, tmp_path / "run" / adapter))
        adapted.use(adapter)
        torch.testing.assert_close(found, logits_of(adapted.model), rtol=0, atol=1e-5)


def test_a_layer_that_gets_tokens_without_their_rows_keeps_the_twins_apart(tmp_path):
    LoraConfig(target_modules=["fc1", "q_proj"]).save_pretrained(tmp_path)
    for family, mixes in (("opt", False), ("phi", True)):  # OPT's multi-layer perceptron sees one long row
        model = tiny_model(family)
        assert AdaptedModel(model, adapter_config(str(tmp_path), model), names=(UPPER, LOWER)).mixes == mixes


def test_where_dtypes_differ_each_twin_has_a_forward_of_its_own():
    model = tiny_model(dtype=torch.bfloat16)
    assert not AdaptedModel(model, adapter_config("lora", model), names=(UPPER, LOWER)).mixes


def test_what_an_adapter_replaces_is_not_moved_in_the_backbone():
    model = tiny_model()
    for config, kept in ((KINDS["layer norms"], "layernorm"), (KINDS["lora and a norm"], "norm")):
        adapted = AdaptedModel(tiny_model(), copy.deepcopy(config), names=(UPPER, LOWER))
        gone = dict(model.named_parameters()).keys() - adapted.movable.keys()
        assert gone
        assert gone == {name for name, _ in model.named_parameters() if kept in name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(init_lora_weights="pissa", **TARGETS), "init_lora_weights is 'pissa', which changes the backbone"),
        (LoraConfig(init_lora_weights="olora", **TARGETS), "init_lora_weights is 'olora', which changes the backbone"),
        (LoraConfig(kasa_config=KasaConfig(), **TARGETS), "kasa_config changes the backbone when the adapter is made"),
        (LoraConfig(bias="all", **TARGETS), "bias is 'all', which trains biases of the backbone"),
        (AdaLoraConfig(total_step=10, **TARGETS), "the adapter ADALORA takes a part of the backbone"),
        (LoraConfig(target_modules=["nosuch"]), "nosuch"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(config, message, tmp_path):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ZofoError, match=message) as caught:
        AdaptedModel(model, config, names=(UPPER, LOWER))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_prefix_starts_from_the_keys_and_values_of_real_tokens(tmp_path):
    trainer = make_trainer(tmp_path, adapter="prefix")
    adapted = trainer.adapted
    rows = logits_of(adapted.model)
    config = adapter_config("prefix", tiny_model())
    model = tiny_model(vocab_size=320)
    torch.manual_seed(trainer.args.seed)
    ids = torch.randint(320, (1, config.num_virtual_tokens))
    text = torch.cat([ids.expand(2, -1), token_batch(vocab_size=320)], dim=1)
    with torch.no_grad():
        expected = model(input_ids=text).logits[:, ids.shape[1] :]
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_a_prefix_from_a_file_starts_as_peft_starts_it(tmp_path):
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5).save_pretrained(tmp_path / "config")
    read = make_trainer(tmp_path / "a", adapter=str(tmp_path / "config")).adapted
    ours = make_trainer(tmp_path / "b", adapter="prefix").adapted
    first, second = (next(iter(a.adapter_parameters(UPPER).values())) for a in (read, ours))
    assert first.shape == second.shape
    assert first.std() > 5 * second.std()  # unit normal numbers
    assert json.loads((tmp_path / "config" / "adapter_config.json").read_text())["num_virtual_tokens"] == 5


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_model_without_plain_caches_gives_no_start(family):
    model = tiny_model(family)
    assert real_keys_and_values(model, PrefixTuningConfig(num_virtual_tokens=3)) is None


def test_dropout_is_on_in_first_order_forwards_and_off_in_zeroth_order_ones(tmp_path):
    trainer = trainer_of("lora with dropout", tmp_path)
    modes = []
    layer = next(m for name, m in trainer.adapted.model.named_modules() if name.endswith(f"lora_dropout.{UPPER}"))
    layer.register_forward_hook(lambda module, args, output: modes.append((module.training, torch.is_grad_enabled())))
    trainer.train()
    assert set(modes) == {(True, True), (False, False)}


def test_a_model_that_has_an_adapter_already_is_refused(tmp_path):
    model = tiny_model(vocab_size=320)
    several = get_peft_model(model, LoraConfig(**TARGETS))
    several.add_adapter("another", LoraConfig(**TARGETS))
    with pytest.raises(ZofoError, match="adapter"):
        make_trainer(tmp_path, model=several)
    other = tiny_model(vocab_size=320)
    other._hf_peft_config_loaded = True  # as `other.add_adapter` or a folder with both leaves it
    with pytest.raises(ZofoError, match="with an adapter or of another kind"):
        make_trainer(tmp_path, model=other)


def test_lora_on_fused_experts_is_refused_where_the_backbone_moves(tmp_path):
    config = LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    with pytest.raises(ZofoError, match="targets parameters that are no modules"):
        make_trainer(tmp_path, model=tiny_model("mixtral", vocab_size=320), peft=config, method="two_stage")


def test_a_run_is_not_resumed_with_another_adapter(tmp_path):
    trainer_of("rslora", tmp_path).train()
    changed = copy.deepcopy(KINDS["rslora"])
    changed.lora_alpha = 99
    other = make_trainer(tmp_path / "run", peft=changed, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ZofoError, match="was written with peft_config = "):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_an_adapter_that_stores_embeddings_as_well_is_attached(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("mistral"), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens.base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    attach(tiny_model("mistral"), str(tmp_path))


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")  # peft, of the same
def test_an_adapter_on_a_tied_head_is_not_merged(tmp_path):
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    with pytest.raises(ZofoError, match="the model is another one, as where the adapter is on a head that is tied"):
        merged(str(tmp_path / "backbone"), str(tmp_path / "adapter"))
