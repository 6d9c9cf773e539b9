"""A GGUF file that is not whole is refused by the name of a tensor, and no copy of it is kept."""

import json

import gguf
import numpy as np
import pytest
import torch

from tiny import SENTENCES, tiny_model, tiny_tokenizer, token_batch
from zofo.errors import ZofoError
from zofo.models import source
from zofo.models.load import load_model
from zofo.models.source import local_source

VOCABULARY = 328  # more rows than tokens, as many models have


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOFO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=VOCABULARY, max_position_embeddings=128)


def tensors_of(model):
    """The tensors of a Llama by llama.cpp's public layout."""
    config, tensors = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for part, count in heads.items():
            if part in name:  # the halves of a rotation stand side by side in llama.cpp
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(values)
    return tensors


def write(path, model, tensors, layers=2, kind="llama", base=None, scaling=None):
    config, words = model.config, json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(base or config.rope_parameters["rope_theta"])
    if scaling:
        writer.add_rope_scaling_type(scaling)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, cache):
    with pytest.raises(ZofoError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert not list(cache.glob("*/"))  # a second try is refused as well
    return message


@pytest.mark.parametrize("beside", [{}, {"rope_freqs.weight": np.ones(4, np.float32)}])
def test_a_whole_file_is_read_with_a_tied_head_and_what_files_hold_beside_the_model(tmp_path, model, beside, capsys):
    read, _ = load_model(str(write(tmp_path / "m.gguf", model, {**tensors_of(model), **beside})))
    assert read.get_input_embeddings().weight is read.get_output_embeddings().weight
    ids = token_batch(vocab_size=320)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert "GGUF tensors" not in capsys.readouterr().err  # no progress bar


def test_an_untied_head_is_read(tmp_path, model):
    head = np.random.default_rng(0).normal(size=(VOCABULARY, 32)).astype(np.float32)
    read, _ = load_model(str(write(tmp_path / "m.gguf", model, {**tensors_of(model), "output.weight": head})))
    assert torch.equal(read.get_output_embeddings().weight, torch.from_numpy(head))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "embed_tokens.weight"),
    ],
)
def test_a_missing_tensor(tmp_path, model, cache, name, named):
    tensors = tensors_of(model)
    del tensors[name]
    message = refused(write(tmp_path / "m.gguf", model, tensors), cache)
    assert "is missing or has another shape" in message
    assert named in message or "lm_head.weight" in message


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.2.attn_norm.weight", "nowhere.weight"])
def test_a_superfluous_tensor(tmp_path, model, cache, name):
    tensors = {**tensors_of(model), name: np.ones(32, np.float32)}
    assert f"there is no place for {name} (1 such" in refused(write(tmp_path / "m.gguf", model, tensors), cache)


def test_a_tensor_of_another_shape(tmp_path, model, cache):
    tensors = {**tensors_of(model), "blk.0.ffn_up.weight": np.ones((40, 32), np.float32)}
    refused(write(tmp_path / "m.gguf", model, tensors), cache)


@pytest.mark.parametrize(("layers", "kind"), [(3, "llama"), (1, "llama"), (10**6, "llama"), (2, "qwen2")])
def test_a_header_that_does_not_fit(tmp_path, model, cache, layers, kind):
    refused(write(tmp_path / "m.gguf", model, tensors_of(model), layers, kind), cache)


@pytest.mark.parametrize(
    ("more", "keys", "named"),
    [
        ({"rope_freqs.weight": np.linspace(1, 8, 4, dtype=np.float32)}, {}, "rope_freqs.weight"),
        ({}, {"scaling": gguf.RopeScalingType.YARN}, "rope.scaling.type yarn"),
    ],
)
def test_rotations_that_transformers_does_not_read(tmp_path, model, cache, more, keys, named):
    path = write(tmp_path / "m.gguf", model, {**tensors_of(model), **more}, **keys)
    message = refused(path, cache)
    assert f"rotary embeddings ({named}) that transformers does not read" in message


def test_rotations_without_scaling_and_with_another_base_are_read(tmp_path, model):
    scaling = gguf.RopeScalingType.NONE
    read, _ = load_model(str(write(tmp_path / "m.gguf", model, tensors_of(model), base=5e5, scaling=scaling)))
    assert read.config.rope_parameters["rope_theta"] == 5e5


def test_a_file_without_tensors(tmp_path, model, cache):
    refused(write(tmp_path / "m.gguf", model, {}), cache)


@pytest.mark.parametrize("part", [0.2, 0.6, 0.99])
def test_a_file_that_is_cut_off(tmp_path, model, cache, part):
    path = write(tmp_path / "m.gguf", model, tensors_of(model))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(path, cache)


def test_a_copy_that_is_kept_is_used_again(tmp_path, model, cache, monkeypatch):
    path = write(tmp_path / "m.gguf", model, tensors_of(model))
    first = local_source(str(path))
    monkeypatch.setattr(source, "_convert", None)
    assert local_source(str(path)) == first
    assert len(list(cache.glob("*/"))) == 1


def test_a_vocabulary_with_a_row_for_each_token_and_no_end_of_text(tmp_path):
    """transformers adds <|endoftext|> to it, which has no row."""
    plain = tiny_tokenizer()
    model = tiny_model(vocab_size=len(plain), max_position_embeddings=128)
    _, tokenizer = load_model(str(write(tmp_path / "m.gguf", model, tensors_of(model))))
    assert tokenizer.get_vocab() == plain.get_vocab()
    text = f"{SENTENCES[0]} <|endoftext|>"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert max(tokenizer(text)["input_ids"]) < model.get_input_embeddings().weight.shape[0]
