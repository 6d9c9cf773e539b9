"""Adapters by peft: fresh and stored ones on a model; merged ones."""

import copy
import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
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

from zofo.errors import ZofoError, in_one_line, is_lack_of_memory
from zofo.models.load import DTYPES, DType, load_weights
from zofo.models.outside import require_nothing_outside, require_plain_tokenizer

UPPER = "upper"
LOWER = "lower"
# Initial values of LoRA that leave the backbone as it is.
_INITIAL_VALUES = (True, False, "gaussian", "orthogonal")
# Kinds that take a part of the backbone, or keep some of their own parameters fixed.
_ENTANGLED = ("ADALORA", "PSOFT", "OSF", "ADAMSS", "CPT", "CARTRIDGE", "ADAPTION_PROMPT")
_UNSTORED = ("kasa_config", "monteclora_config")  # variants of LoRA
_PEFT_ERRORS = (ValueError, NotImplementedError, KeyError, TypeError, AttributeError, IndexError)


def require_fresh(adapter: str) -> None:
    """Refuses an `adapter` that is blank, or a folder with trained weights, as what to do with these is not said."""
    if not adapter:
        raise ZofoError(
            "adapter is blank: write none for no adapter, lora, prefix, prompt or the path of a PEFT config JSON, or "
            "adapter_init: FOLDER to start from a trained one"
        )
    if _holds_weights(Path(adapter).expanduser()):
        raise ZofoError(
            f"adapter is {adapter}, a folder with trained weights, which would not be read: set adapter_init: "
            f"{adapter} to start from them, or adapter: {adapter}/adapter_config.json for a fresh one of its kind"
        )


def require_start(folder: str, adapter: str | None) -> None:
    """Refuses an `adapter_init` that is no trained adapter, or an `adapter` beside it that says something else."""
    if adapter not in (None, folder):
        raise ZofoError(
            f"adapter is {adapter!r}, but adapter_init ({folder}) says what kind of adapter it is: leave one of them "
            "out"
        )
    if not _holds_weights(Path(folder).expanduser()):
        raise ZofoError(
            f"adapter_init is {folder}, but that is no folder with adapter_config.json and adapter_model.safetensors: "
            "give one that zofo or peft has written, such as RUN/upper"
        )


def _holds_weights(folder: Path) -> bool:
    config, weights = folder / "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
    return config.is_file() and any((folder / name).is_file() for name in weights)


def described(config: PeftConfig | None) -> str | None:
    """All values of a PEFT config that define its adapter, in one line that can be compared."""
    if config is None:
        return None
    incidental = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping")
    values = {key: value for key, value in config.to_dict().items() if key not in incidental}
    return json.dumps(values, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(cast(set[str], value)) if isinstance(value, set) else str(value)


def with_adapters(
    base: PreTrainedModel, config: PeftConfig, names: Sequence[str], start: Tensor | str | None = None
) -> PeftModel:
    """Puts one adapter for each of `names` on a backbone; all have the values of the first one, which is active.

    `start` is the initial keys and values of a prefix, (2 x layers, heads, tokens, size), or the folder of a trained
    adapter of that config; without it, the adapters are fresh.
    """
    _require_separate(config)
    require_nothing_outside(config)
    if start is None:
        require_plain_tokenizer(config)
    first, *others = names
    if isinstance(start, str):
        _require_all_stored(config, start)
    stored = attach(base, start, first, config) if isinstance(start, str) else None
    try:
        if isinstance(start, Tensor):
            config = _with_sizes(cast(PrefixTuningConfig, config), start)
        model = stored or get_peft_model(base, config, adapter_name=first)
        assert isinstance(model, PeftModel)
        if isinstance(start, Tensor):
            encoders: Any = model.prompt_encoder
            with torch.no_grad():
                encoders[first].embedding.weight.copy_(start.permute(2, 0, 1, 3).flatten(1))
        for name in others:
            model.add_adapter(name, copy.deepcopy(config))
            _copy_values(model, first, name)
        if others:
            model.set_adapter(first)
    except _PEFT_ERRORS as error:
        kind = PeftType(config.peft_type).value
        raise ZofoError(
            f"peft cannot put {'several adapters of kind ' if others else ''}{kind} on this {base.config.model_type} "
            f"model: {in_one_line(error)}"
        ) from error
    return model


def _require_all_stored(config: PeftConfig, folder: str) -> None:
    """Refuses to go on from virtual tokens that a network makes, of which peft stores the tokens alone."""
    if config.peft_type == PeftType.P_TUNING or config.to_dict().get("prefix_projection"):
        raise ZofoError(
            f"{folder} holds virtual tokens, and not the network that made them, which would have to be trained "
            "further: start from a prefix without prefix_projection, from a prompt, or from LoRA"
        )


def taken_off(model: PeftModel, folder: str) -> PreTrainedModel:
    """The backbone of a model with one adapter, which is stored in a folder."""
    if len(model.peft_config) != 1:
        raise ZofoError(
            f"model is a PeftModel with {len(model.peft_config)} adapters ({', '.join(model.peft_config)}): delete all "
            "but the one to start from (model.delete_adapter)"
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ZofoError("the adapter of model is merged into its weights: call model.unmerge_adapter() first")
    name, config = next(iter(model.peft_config.items()))
    model.save_pretrained(folder, save_embedding_layers=False)
    if name != "default":
        for file in (Path(folder) / name).iterdir():
            file.rename(Path(folder) / file.name)
    inner: Any = model.base_model  # the backbone, or peft's wrapper of its layers
    return inner if config.is_prompt_learning else inner.unload()


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
        raise ZofoError("layer_replication adds layers to the backbone when the adapter is made: leave it out")
    initial = values.get("init_lora_weights", True)
    if initial not in _INITIAL_VALUES:
        raise ZofoError(
            f"init_lora_weights is {initial!r}, which changes the backbone or needs data when the adapter is made, so "
            "that the upper and lower adapter could not share it: use true, false, gaussian or orthogonal"
        )
    for variant in _UNSTORED:
        if values.get(variant):
            raise ZofoError(
                f"{variant} changes the backbone when the adapter is made, or keeps a state that is in none of its "
                "parameters, so that a stored run would be another model: leave it out"
            )
    if values.get("bias", "none") != "none":
        raise ZofoError(
            f"bias is {values['bias']!r}, which trains biases of the backbone as if they were the adapter's: use none"
        )


@torch.no_grad()
def _copy_values(model: PeftModel, source: str, target: str) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if source in parts:
            parameters[".".join(target if part == source else part for part in parts)].copy_(parameter)


@torch.no_grad()
def real_keys_and_values(base: PreTrainedModel, config: PeftConfig) -> Tensor | None:
    """The keys and values of a few random tokens, for a prefix: (2 x layers, heads, tokens, size), float32.

    None for other kinds of adapters, and for a model whose layers have keys of different shapes, or other states.
    X. L. Li and P. Liang, "Prefix-Tuning" (2021), section 7.4: such a start is better than random numbers.
    """
    if config.peft_type != PeftType.PREFIX_TUNING:
        return None
    virtual_tokens = cast(PrefixTuningConfig, config).num_virtual_tokens
    embeddings: Any = base.get_input_embeddings()
    ids = torch.randint(embeddings.weight.shape[0], (1, virtual_tokens), device=base.device)
    cache = base(input_ids=ids, use_cache=True).get("past_key_values")
    layers = list(cache.layers) if isinstance(cache, DynamicCache) else []
    cached = [tensor for layer in layers if isinstance(layer, DynamicLayer) for tensor in (layer.keys, layer.values)]
    tensors = [tensor[0] for tensor in cached if tensor is not None]
    if not tensors or len(tensors) < 2 * len(layers) or len({tensor.shape for tensor in tensors}) > 1:
        return None
    return torch.stack(tensors).float()


def _with_sizes(config: PrefixTuningConfig, start: Tensor) -> PrefixTuningConfig:
    """The config with the sizes of the model's own cache; peft would guess them from names in the model's config."""
    layers, heads, _, size = start.shape
    config = copy.deepcopy(config)
    config.num_layers, config.num_attention_heads, config.token_dim = layers // 2, heads, heads * size
    return config


def mixing_layers(model: PeftModel) -> list[nn.Module]:
    """The adapter layers, if the rows of one batch can use different adapters in them; else none.

    peft mixes plain LoRA only, and rounds differently where adapter and weights have different dtypes. It needs rows:
    experts and some other layers get tokens in another order, or one by one, which a tiny forward pass shows.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    plain = all(type(layer) is Linear and not layer.lora_variant for layer in layers)
    dtypes = {p.dtype for layer in layers for p in layer.parameters()}
    replaced = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    if not layers or not plain or len(dtypes) > 1 or replaced:
        return []
    ids = torch.zeros((3, 2), dtype=torch.long, device=model.device)
    input_shapes: set[tuple[nn.Module, torch.Size]] = set()

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        input_shapes.add((layer, inputs[0].shape[:-1]))

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(record))
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return layers if input_shapes == {(layer, ids.shape) for layer in layers} else []


def attach(model: PreTrainedModel, adapter: str, name: str = UPPER, config: PeftConfig | None = None) -> PeftModel:
    """Puts the stored adapter of a PEFT folder on a model, under a name; it can be trained if `config` is given."""
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ZofoError(f"{folder} is no adapter: give a folder with adapter_config.json, such as RUN/upper")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ZofoError(
            f"{folder} has no adapter_model.safetensors: pickles (.bin) are never read; save it again in peft"
        )
    backbone = {f"base_model.model.{key}" for key, _ in model.named_parameters(remove_duplicate=False)}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            require_nothing_outside(config or PeftConfig.from_pretrained(str(folder)))
            trainable = config is not None and not config.is_prompt_learning
            attached = PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=trainable, config=copy.deepcopy(config)
            )
            if config is not None and not trainable:  # peft loads virtual tokens for inference only
                attached.peft_config[name].inference_mode = False
                attached.prompt_encoder.requires_grad_(True)
        stored = load_peft_weights(str(folder), device="cpu").keys()
    except (*_PEFT_ERRORS, RuntimeError, OSError, SafetensorError) as error:
        if is_lack_of_memory(error):
            raise
        raise ZofoError(f"the adapter {folder} does not fit this model: {in_one_line(error)}") from error
    missing = next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), "")
    if missing:
        raise ZofoError(f"the adapter {folder} is not complete: {' '.join(missing.split())[:300]}")
    expected = get_peft_model_state_dict(attached, adapter_name=name, save_embedding_layers=False).keys()
    # peft stores embeddings of the backbone as well, if it is asked to or if they grew
    extra = {key for key in stored - expected if key.replace(".base_layer", "") not in backbone}
    if extra and not expected - stored:  # else peft has renamed what an older version of the model's code stored
        raise ZofoError(
            f"the adapter {folder} does not fit this model: there is no place for {min(extra)}; use the "
            "adapter_config.json that it was saved with"
        )
    return attached


@torch.no_grad()
def merged(backbone: str, adapter: str, dtype: DType = "float32") -> tuple[PreTrainedModel, float]:
    """The backbone with an adapter merged into its weights: a plain transformers model.

    The sum is computed in float32 and rounded once, to `dtype`. Returns the model, and the largest difference of its
    logits to those of backbone and adapter in float32, over some tokens from all of the vocabulary.
    """
    adapted = attach(load_weights(backbone, "float32"), adapter)
    if adapted.peft_config[UPPER].is_prompt_learning:
        raise ZofoError(f"{adapter} consists of virtual tokens, which cannot be merged into weights")
    vocabulary = adapted.get_input_embeddings().weight.shape[0]
    probe = torch.linspace(0, vocabulary - 1, 32).long().view(2, 16)
    expected = adapted.eval()(input_ids=probe).logits
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ZofoError(f"peft cannot merge {adapter} ({error}): deploy it beside the backbone, with peft") from error
    if float((model(input_ids=probe).logits - expected).abs().max()) > 1e-3 * float(expected.abs().max()):
        raise ZofoError(
            f"merged with {adapter}, the model is another one, as where the adapter is on a head that is tied to the "
            "embeddings: deploy it beside the backbone, with peft"
        )
    for parameter in model.parameters():  # and no buffers: rotations stay as precise as they are when it is loaded
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model, float((model(input_ids=probe).logits.float() - expected).abs().max())


def is_prompt(adapter: Path) -> bool:
    """Whether a PEFT folder holds virtual tokens, which cannot be merged."""
    return PeftConfig.from_pretrained(str(adapter)).is_prompt_learning


def note_of_move(adapter: Path) -> str | None:
    """What to say of an adapter whose config names a backbone that is gone, or is not the one beside it."""
    named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    beside = adapter.resolve().parent / "backbone"
    if not named or not beside.is_dir() or not Path(named).is_absolute() or Path(named).resolve() == beside:
        return None
    return (
        f"{adapter} was moved: AutoPeftModelForCausalLM would look for its backbone in {named}; load {beside} by "
        "AutoModelForCausalLM, and the adapter by PeftModel.from_pretrained(model, FOLDER)"
    )
