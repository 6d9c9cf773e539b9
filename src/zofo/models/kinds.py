"""The kinds of adapter: which config of peft the keys ask for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, TaskType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zofo.errors import ZofoError
from zofo.models.selection import chosen_layers

KINDS = ("lora", "prefix", "prompt", "none")
_ALL_LINEAR = "all-linear"  # peft's word for all layers but the head
_R = 8


class Lora(NamedTuple):
    """Where LoRA is put and how large it is, by the keys; None: by default."""

    layers: str | None = None  # the blocks that get it, such as "0-3,7" or "last 2"; all
    r: int | None = None  # 8
    alpha: int | None = None  # 2 r
    targets: tuple[str, ...] | None = None  # the ends of modules' names, or "all-linear"; queries and values


EVERYWHERE = Lora()


def adapter_config(adapter: str, model: PreTrainedModel, lora: Lora = EVERYWHERE) -> PeftConfig | None:
    """The PEFT config that the key `adapter` names.

    Args:
        adapter: "lora", "prefix" (5 virtual tokens), "prompt" (10 virtual tokens, from the vocabulary), "none", or the
            path of a PEFT config JSON.
        model: the backbone that the adapter is for.
        lora: of "lora" alone.
    """
    if adapter == "none":
        return None
    if adapter == "lora":
        return _lora_config(model, lora)
    if adapter == "prefix":
        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    if adapter == "prompt":
        heads = model.config.to_dict().get("num_attention_heads", 1)  # peft asks for it, and does not use it
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            num_attention_heads=heads,
        )  # fmt: skip
    return _read_config(Path(adapter).expanduser())


def _lora_config(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    targets = _usual_targets(model) if lora.targets is None else _asked(lora.targets, model)
    layers = None
    if lora.layers is not None:
        if isinstance(targets, str):
            raise ZofoError(
                f"adapter_layers is {lora.layers!r}, but LoRA goes on {targets}: name the modules that get one in "
                "lora_target_modules, such as q_proj v_proj"
            )
        _require_in_blocks(targets, model)
        names = (name for name, _ in model.named_parameters())
        layers = sorted(chosen_layers("adapter_layers", lora.layers, names))
    r = lora.r or _R
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=lora.alpha or 2 * r,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layout
        layers_to_transform=layers,
    )


def _asked(targets: tuple[str, ...], model: PreTrainedModel) -> list[str] | str:
    """Refuses what peft would pass over: a name without a module, none, all-linear beside others."""
    if targets == (_ALL_LINEAR,):
        return _ALL_LINEAR
    paths = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            known = sorted(
                {p.split(".")[-1] for p, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
            )
            raise ZofoError(
                f"lora_target_modules has {target!r}, but this model has no module of that name: its linear layers are "
                f"{', '.join(known)}; all-linear, alone, means all but the head"
            )
    if not targets:
        raise ZofoError("lora_target_modules is empty: name a module, or leave it out for queries and values")
    return list(targets)


def _require_in_blocks(targets: Sequence[str], model: PreTrainedModel) -> None:
    """Refuses a module outside of the blocks, which peft would pass over, or give an adapter nevertheless."""
    inside = [name for name, _ in model.named_modules() if any(part.isdigit() for part in name.split("."))]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in inside):
            raise ZofoError(
                f"lora_target_modules has {target!r}, which is in none of the blocks that adapter_layers chooses from: "
                "leave one of them out"
            )


def _usual_targets(model: PreTrainedModel) -> list[str] | str:
    """Queries and values, where these are separate modules; else peft's targets; else the model's own layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    last_parts = {name.split(".")[-1] for name in linear}
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    for targets in (("q_proj", "v_proj"), tuple(known), ("in_proj", "x_proj")):  # the last are of state-space models
        if targets and last_parts.issuperset(targets):
            return list(targets)
    attention = {name.split(".")[-1] for name in linear if "attn" in name or "attention" in name}
    return sorted(attention) or _ALL_LINEAR


def _read_config(path: Path) -> PeftConfig:
    file = path / "adapter_config.json" if path.is_dir() else path
    if not file.is_file():
        raise ZofoError(f"adapter is {str(path)!r}: give one of {', '.join(KINDS)}, or the path of a PEFT config JSON")
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(**{"peft_type": content["peft_type"], **content})
    except (ValueError, TypeError, KeyError) as error:
        raise ZofoError(f"{file} is no PEFT config ({error}): write one with config.save_pretrained in peft") from error
    config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = False
    return config
