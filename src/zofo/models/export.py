"""Writes models and tokenizers so that transformers 4.57, which inference engines bundle, reads them as 5 does.

transformers 5 renamed keys of config.json and classes of tokenizers. Where 4.57 does not find a key, it takes its
default without a word: a Llama with `rope_theta` 500000 would be rotated with 10000. Both names are written side by
side, and transformers 5 reads from them what it reads from its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Json = dict[str, Any]

# Families with a rotation for each type of layers: the names of the bases of full and sliding attention in 4.57. Of the
# last two it uses the first base alone, so that different ones cannot be told to it.
_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
_NEOX = ("gpt_neox", "gpt_neox_japanese")  # have names of their own for the base and for the part that is rotated
_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}  # as the families below call them in 4.57
_MAMBA = {"granitemoehybrid": "layer_types", "zamba": "layers_block_type", "zamba2": "layers_block_type"}


def save_model(model: PreTrainedModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes a model (or other values for it) as `save_pretrained` does, with the old keys in config.json.

    A file that has other names as well is not written into, since its content would change under these too.
    """
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file() and file.lstat().st_nlink > 1:
            file.unlink()
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    _rewrite(folder / "config.json", with_old_keys)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a fast tokenizer as `save_pretrained` does, under a class that 4.57 has as well.

    This class takes everything from tokenizer.json. What other classes add to it depends on the version.
    """
    tokenizer.save_pretrained(folder)
    pre_tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}

    def portable(config: Json) -> Json:
        extra = config.pop("extra_special_tokens", None)
        if isinstance(extra, list):  # 4.57 expects a dict under this name
            config["additional_special_tokens"] = extra
        if "add_prefix_space" in pre_tokenizer:  # 4.57 would set it to false
            config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
        return config | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": tokenizer.model_input_names,  # the class of 4.57 adds token types
            "padding_side": tokenizer.padding_side,
        }

    _rewrite(folder / "tokenizer_config.json", portable)


def with_old_keys(config: Json) -> Json:
    """The content of a config.json, with the keys of transformers 4.57 beside those of 5, also in nested configs."""
    nested = {key: value for key, value in config.items() if isinstance(value, dict) and "model_type" in value}
    new = config | {key: with_old_keys(value) for key, value in nested.items()}
    kind = str(new.get("model_type"))
    if "dtype" in new:
        new["torch_dtype"] = new["dtype"]
    if kind in _MAMBA and new.get(_MAMBA[kind]):
        new[_MAMBA[kind]] = [_LAYERS.get(layer, layer) for layer in new[_MAMBA[kind]]]
    if kind == "qwen3_moe" and "num_local_experts" in new:
        new["num_experts"] = new["num_local_experts"]
    rope = new.get("rope_parameters")
    return new | (_old_rope(kind, rope) if rope else {})


def _old_rope(kind: str, rope: Json) -> Json:
    """`rope_parameters` in the form of 4.57; nothing, if 4.57 has no such form."""
    if any(isinstance(value, dict) for value in rope.values()):
        if kind not in _BASES:
            return {}
        full, sliding = _BASES[kind]
        old = {sliding: rope["sliding_attention"]["rope_theta"], full: rope["full_attention"]["rope_theta"]}
        return old if kind == "modernbert-decoder" else old | {"rope_scaling": _scaling(kind, rope["full_attention"])}
    base, part = ("rotary_emb_base", "rotary_pct") if kind in _NEOX else ("rope_theta", "partial_rotary_factor")
    old = {base: rope["rope_theta"], "rope_scaling": _scaling(kind, rope)}
    if "partial_rotary_factor" in rope:
        old[part] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return old


def _scaling(kind: str, rope: Json) -> Json | None:
    others = ("rope_theta", "partial_rotary_factor", "type")  # the last is an older name of rope_type
    scaling = {key: value for key, value in rope.items() if key not in others}
    if scaling == {"rope_type": "default"}:
        return None
    if kind in ("phi3", "phi4_multimodal"):  # 4.57 takes three keys, one by its older name
        scaling.pop("original_max_position_embeddings", None)
        scaling["type"] = scaling.pop("rope_type")
    return scaling


def _rewrite(file: Path, change: Callable[[Json], Json]) -> None:
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
