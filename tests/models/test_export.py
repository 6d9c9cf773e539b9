"""config.json has the keys of transformers 4.57 beside those of 5, and transformers 5 still reads the same.

benchmarks/elsewhere.py compares the numbers in both versions.
"""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny import SENTENCES, save_tiny_model, tiny_model, tiny_tokenizer, token_batch
from zofo.cli import main
from zofo.models.adapters import AdaptedModel
from zofo.models.export import save_model, save_tokenizer, with_old_keys

BASE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 300.0}

# family, its settings in transformers 5, the keys by which 4.57 knows them
OLD_KEYS = {
    "plain": ("llama", {"rope_parameters": BASE}, {"rope_theta": 500_000.0, "rope_scaling": None}),
    "scaled": (
        "llama", {"rope_parameters": {**LLAMA3, "rope_theta": 300.0}}, {"rope_theta": 300.0, "rope_scaling": LLAMA3},
    ),
    "long": (
        "llama",
        {"rope_parameters": {**LONG, "rope_theta": 300.0, "original_max_position_embeddings": 32}},
        {"original_max_position_embeddings": 32,
         "rope_scaling": {**LONG, "original_max_position_embeddings": 32}},
    ),
    "three keys": (
        "phi3",
        {"rope_parameters": {**LONG, "rope_theta": 300.0}, "original_max_position_embeddings": 32},
        {"rope_theta": 300.0, "original_max_position_embeddings": 32,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    ),
    "partly rotated": (
        "stablelm", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
        {"rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    ),
    "names of its own": (
        "gpt_neox", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 500_000.0, "rotary_pct": 0.5},
    ),
    "two types of layers": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 700.0}, "sliding_attention": LOCAL}},
        {"rope_theta": 700.0, "rope_scaling": LINEAR, "rope_local_base_freq": 300.0},
    ),
    "experts": ("qwen3_moe", {}, {"num_experts": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_KEYS)
def test_the_old_keys_are_there_and_nothing_changes_for_the_new_version(tmp_path, case):
    family, settings, expected = OLD_KEYS[case]
    model = tiny_model(family, **settings)
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    assert written["torch_dtype"] == written["dtype"] == "float32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert rope_of(again.config.to_dict()) == rope_of(model.config.to_dict())
    save_model(again, tmp_path / "again")
    once_more = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: once_more[key] for key in expected} == expected
    with torch.no_grad():
        assert torch.equal(again(token_batch()).logits, model(token_batch()).logits)


def rope_of(config):
    """The rotation, without the older name of `rope_type`, which transformers 5 keeps if a file has it."""
    return {key: value for key, value in (config.get("rope_parameters") or {}).items() if key != "type"}


def default_configs():
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            yield family, CONFIG_MAPPING[family]()
        except Exception:  # some cannot be made without their parts
            continue


@pytest.mark.filterwarnings("ignore")
def test_of_no_family_does_the_new_version_read_another_rotation_from_the_old_keys(tmp_path):
    rotated = 0
    for family, config in default_configs():
        plain = json.loads(config.to_json_string(use_diff=False))
        if not plain.get("rope_parameters"):
            continue
        rotated += 1
        (tmp_path / "config.json").write_text(json.dumps(with_old_keys(plain)))
        again = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
        assert rope_of(again) == rope_of(plain), family
        for key in ("layer_types", "dtype", "head_dim", "num_hidden_layers"):
            assert again.get(key) == plain.get(key), f"{family}: {key}"
    assert rotated > 60


def test_layers_have_their_old_names_where_the_old_version_knows_no_others():
    names = ["linear_attention", "full_attention"]
    assert with_old_keys({"model_type": "zamba2", "layers_block_type": names})["layers_block_type"] == [
        "mamba", "attention",
    ]  # fmt: skip
    assert with_old_keys({"model_type": "qwen3_next", "layer_types": names})["layer_types"] == names


def test_configs_within_configs_have_old_keys_too():
    inner = {"model_type": "llama", "rope_parameters": dict(BASE), "dtype": "float32"}
    made = with_old_keys({"model_type": "outer", "text_config": inner})
    assert made["text_config"]["rope_theta"] == 500_000.0
    assert made["text_config"]["torch_dtype"] == "float32"


def test_a_form_that_the_old_version_does_not_have_is_left_alone():
    rope = {"full_attention": dict(BASE), "sliding_attention": dict(LOCAL)}
    config = {"model_type": "of-tomorrow", "rope_parameters": rope}
    assert with_old_keys(config) == config


def test_a_tokenizer_has_a_class_that_both_versions_have_and_the_same_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<turn>"]
    assert "extra_special_tokens" not in written
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["padding_side"] == "left"
    assert written["add_prefix_space"] is False
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.chat_template == tokenizer.chat_template
    for text in (*SENTENCES, "a<turn> b"):
        assert again(text).data == tokenizer(text).data


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_is_kept(tmp_path, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == side


def test_a_backbone_beside_adapters_has_the_old_keys(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    AdaptedModel(tiny_model(rope_parameters=dict(BASE)), config).save(tmp_path)
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["rope_theta"] == 500_000.0


def test_a_merged_folder_has_the_old_keys_and_a_class_that_both_versions_have(tmp_path):
    save_tiny_model(tmp_path / "run" / "backbone", rope_parameters=dict(BASE))
    assert main(["merge", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_theta"] == 500_000.0
    tokenizer = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
