"""What an adapter's config may make peft read or run: nothing but the adapter's own files."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tiny import tiny_model, tiny_tokenizer
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.peft import attach

MORE = {
    "a module to import": {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "this_module"},
    "a pickle": {
        "peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 1, "token_dim": 32,
        "prompt_tuning_init": "ONLY_SOURCE_SHARED", "prompt_tuning_init_state_dict_path": "state.bin",
    },
    "another model": {"peft_type": "SHADOW", "shadow_model": "somebody/model"},
    "other adapters": {"peft_type": "XLORA", "hidden_size": 32, "adapters": {"0": "somebody/adapter"}},
}  # fmt: skip
IMPORTED = {key: MORE["a module to import"][key] for key in ("megatron_config", "megatron_core")}


@pytest.mark.parametrize("content", MORE.values(), ids=MORE)
def test_fields_that_name_other_files_or_code_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **content}))
    model = tiny_model()
    with pytest.raises(ZofoError, match="which makes peft open other files or import code: leave it out"):
        AdaptedModel(model, adapter_config(str(tmp_path / "a.json"), model))


def test_a_stored_adapter_cannot_name_a_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "this_module.py").write_text("open('was-run', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    attach(tiny_model(), str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | IMPORTED))
    with pytest.raises(ZofoError, match=r"does not fit this model: megatron_config is \{'a': 1\}"):
        attach(tiny_model(), str(tmp_path / "a"))
    assert not (tmp_path / "was-run").exists()


def text_prompt(tokenizer, **more):
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=4, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="It was great", tokenizer_name_or_path=str(tokenizer), **more,
    )  # fmt: skip


def test_virtual_tokens_may_start_from_the_embeddings_of_a_text(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model(vocab_size=320)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("It was great")["input_ids"]
    adapted = AdaptedModel(model, text_prompt(tmp_path))
    (prompt,) = adapted.adapter_parameters("upper").values()
    assert torch.equal(prompt, model.get_input_embeddings().weight[(ids * 4)[:4]])


@pytest.mark.parametrize("more", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}], ids=["asked", "trusted"])
def test_a_tokenizer_with_code_of_its_own_is_refused_and_nothing_is_asked(tmp_path, monkeypatch, more):
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ZofoError, match=r"cannot be loaded without code of its own .*: give the folder of the model's"):
        AdaptedModel(tiny_model(), text_prompt(tmp_path, **more))
    assert not (tmp_path / "was-run").exists()
