"""What peft makes of a backbone: an adapter or two on it, fresh or stored."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from zofo.errors import ZofoError

UPPER = "upper"
LOWER = "lower"
_FRESH_STARTS = (True, False, "gaussian", "orthogonal")  # of LoRA: those that leave the backbone as it is
# Kinds that take a part of the backbone, or keep some of their own parameters fixed.
_ENTANGLED = ("ADALORA", "PSOFT", "OSF", "ADAMSS", "CPT", "CARTRIDGE", "ADAPTION_PROMPT")
_REFUSALS = (ValueError, NotImplementedError, KeyError, TypeError, AttributeError, IndexError)  # peft's


def mixing_layers(model: PeftModel) -> list[nn.Module]:
    """The layers of an adapter if rows of one batch can go to different twins in them, or none: by a tiny forward.

    peft mixes plain LoRA alone; where adapter and weights are of two dtypes, it rounds otherwise when it does; and it
    needs the rows, which experts and some other layers get without order, or token by token.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    plain = all(type(layer) is Linear and not layer.lora_variant for layer in layers)
    dtypes = {p.dtype for layer in layers for p in layer.parameters()}
    replaced = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    if not layers or not plain or len(dtypes) > 1 or replaced:
        return []
    ids = torch.zeros((3, 2), dtype=torch.long, device=model.device)
    found: set[tuple[nn.Module, torch.Size]] = set()

    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.add((layer, given[0].shape[:-1]))

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return layers if found == {(layer, ids.shape) for layer in layers} else []


def with_adapters(base: PreTrainedModel, config: PeftConfig, twins: bool, start: Tensor | None = None) -> PeftModel:
    """Puts a fresh adapter `upper` on a backbone; with `twins` also `lower`, with the same values.

    Args:
        base: the backbone.
        config: of the adapter.
        twins: whether there are two.
        start: of a prefix: its keys and values, (2 x layers, heads, tokens, size).

    Raises:
        ZofoError: if the adapter changes the backbone, or peft cannot put it, or two of it, on this model.
    """
    _require_separate(config)
    try:
        if start is not None:
            config = _of_shape(cast(PrefixTuningConfig, config), start)
        model = get_peft_model(base, config, adapter_name=UPPER)
        assert isinstance(model, PeftModel)
        if start is not None:
            encoders: Any = model.prompt_encoder
            with torch.no_grad():
                encoders[UPPER].embedding.weight.copy_(start.permute(2, 0, 1, 3).flatten(1))
        if twins:
            model.add_adapter(LOWER, copy.deepcopy(config))
            _copy_values(model)
            model.set_adapter(UPPER)
    except _REFUSALS as error:
        raise ZofoError(
            f"peft cannot put {'two ' * twins}{PeftType(config.peft_type).value} on this {base.config.model_type} "
            f"model: {' '.join(str(error).split())}"
        ) from error
    return model


def _require_separate(config: PeftConfig) -> None:
    """Refuses an adapter that changes or trains the backbone's own weights."""
    values = config.to_dict()
    kind = PeftType(config.peft_type).value
    if kind in _ENTANGLED:
        raise ZofoError(
            f"the adapter {kind} takes a part of the backbone or keeps some of its own parameters fixed, so that p, s "
            "and θ could not be told apart: choose another kind, such as LORA"
        )
    if values.get("layer_replication"):
        raise ZofoError("layer_replication makes layers of the backbone anew when the adapter is made: leave it out")
    start = values.get("init_lora_weights", True)
    if start not in _FRESH_STARTS:
        raise ZofoError(
            f"init_lora_weights is {start!r}, which changes the backbone or needs data when the adapter is made, so "
            "that the twins p and s could not share it: use true, false, gaussian or orthogonal"
        )
    if values.get("bias", "none") != "none":
        raise ZofoError(
            f"bias is {values['bias']!r}, which trains biases of the backbone as if they were the adapter's: use none"
        )


@torch.no_grad()
def _copy_values(model: PeftModel) -> None:
    """Gives `lower` the values of `upper`."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if UPPER in name.split("."):
            twin = ".".join(LOWER if part == UPPER else part for part in name.split("."))
            parameters[twin].copy_(parameter)


@torch.no_grad()
def real_keys_and_values(base: PreTrainedModel, config: PeftConfig) -> Tensor | None:
    """The keys and values of a few random words, for a prefix: (2 x layers, heads, tokens, size), float32.

    None where a model's layers have keys of different shapes, or keep something else. X. L. Li and P. Liang,
    "Prefix-Tuning" (2021), section 7.4: such a start is better than random numbers.
    """
    if config.peft_type != PeftType.PREFIX_TUNING:
        return None
    number = cast(PrefixTuningConfig, config).num_virtual_tokens
    embeddings: Any = base.get_input_embeddings()
    ids = torch.randint(embeddings.weight.shape[0], (1, number), device=base.device)
    cache = base(input_ids=ids, use_cache=True).get("past_key_values")
    layers = list(cache.layers) if isinstance(cache, DynamicCache) else []
    found = [tensor for layer in layers if isinstance(layer, DynamicLayer) for tensor in (layer.keys, layer.values)]
    tensors = [tensor[0] for tensor in found if tensor is not None]
    if not tensors or len(tensors) < 2 * len(layers) or len({tensor.shape for tensor in tensors}) > 1:
        return None
    return torch.stack(tensors).float()


def _of_shape(config: PrefixTuningConfig, start: Tensor) -> PrefixTuningConfig:
    """The config with the sizes of the model's own cache, where peft would guess them from names in its config."""
    layers, heads, _, size = start.shape
    config = copy.deepcopy(config)
    config.num_layers, config.num_attention_heads, config.token_dim = layers // 2, heads, heads * size
    return config


def described(config: PeftConfig | None) -> str | None:
    """Everything that a PEFT config says of its adapter, in one line that can be compared."""
    if config is None:
        return None
    manner = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping")
    values = {key: value for key, value in config.to_dict().items() if key not in manner}
    return json.dumps(values, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(cast(set[str], value)) if isinstance(value, set) else str(value)


def attach(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Puts a stored adapter on a model.

    Raises:
        ZofoError: if the folder is no PEFT folder, or does not fit.
    """
    adapter = str(Path(adapter).expanduser())
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ZofoError(f"{adapter} is no adapter: give a folder with adapter_config.json, such as RUN/upper")
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ZofoError(
            f"{adapter} has no adapter_model.safetensors: pickles (.bin) are never read; save it again in peft"
        )
    own = {f"base_model.model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attached = PeftModel.from_pretrained(model, adapter, adapter_name=UPPER)
        stored = load_peft_weights(adapter, device="cpu").keys()
    except (*_REFUSALS, RuntimeError, OSError, SafetensorError) as error:
        raise ZofoError(f"the adapter {adapter} does not fit this model: {' '.join(str(error).split())}") from error
    missing = next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), "")
    if missing:
        raise ZofoError(f"the adapter {adapter} is not complete: {' '.join(missing.split())[:300]}")
    expected = get_peft_model_state_dict(attached, adapter_name=UPPER, save_embedding_layers=False).keys()
    extra = {
        name for name in stored - expected if name.replace(".base_layer", "") not in own
    }  # peft stores embeddings of the backbone as well, if asked to or if they grew
    if extra and not expected - stored:  # else peft has renamed what an older version of the model's code stored
        raise ZofoError(
            f"the adapter {adapter} does not fit this model: there is no place for {min(extra)}; use the "
            "adapter_config.json that it was saved with"
        )
    return attached
