"""Loads the backbone, with its tokenizer, and models without values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from zofo.errors import ZofoError, first_line
from zofo.models.source import (
    NO_CODE,
    empty_model,
    local_source,
    pickle_hint,
    require_all_placed,
    require_dense,
    require_plausible,
    stored_tensors,
)
from zofo.parse import is_texts

DType = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, dtype: DType = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, dense and complete, with its tokenizer.

    Args:
        name: a Hub id, a folder, a `.gguf` file or `pkg://PACKAGE/PATH`.
        dtype: of the weights. GGUF files are dequantised.

    Returns:
        The model in eval mode on the CPU, and a fast tokenizer that has a pad token.

    Raises:
        ZofoError: if there is no such model, it is no causal language model, its weights are pickled, incomplete or of
            another shape, it needs code of its own, or its tokenizer is missing or does not fit.

    Examples:
        >>> load_model("nowhere/at-all.gguf")
        Traceback (most recent call last):
        ...
        zofo.errors.ZofoError: there is no file nowhere/at-all.gguf: give the path of an existing .gguf file
    """
    model = load_weights(name, dtype)
    return model, load_tokenizer(name, model)


def load_weights(name: str, dtype: DType = "float32") -> PreTrainedModel:
    """The model of `load_model` without its tokenizer."""
    source = local_source(name)
    config = _causal_config(source, name)
    if Path(source).is_dir():
        require_plausible(config, Path(source) / "config.json", stored_tensors(Path(source)))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    except Exception as error:  # a hostile config fails in any way
        raise ZofoError(f"cannot load the weights of {name}: {_explained(error)}{pickle_hint(source)}") from error
    model, report = loaded
    kinds = config.architectures if is_texts(config.architectures) else ()
    saved = [kind for kind in kinds if kind != type(model).__name__]
    require_all_placed(report, f"{name}{f', saved as a {saved[0]},' if saved else ''} do not fit its config.json")
    return model.eval()


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, moved to the GPU if torch sees one."""
    cast(nn.Module, model).to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def stored_dtype(name: str) -> DType:
    """The dtype in which a model was saved; float32 if its config does not say."""
    stored = _causal_config(local_source(name), name).dtype
    names: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(stored, "float32")


def require_movable(name: str, purpose: str) -> None:
    """Refuses a quantised model, which cannot be updated (as `purpose` would), before it is loaded or downloaded."""
    require_dense(_causal_config(local_source(name), name), name, purpose)


def load_hollow(name: str, dtype: DType = "float32") -> PreTrainedModel:
    """The model of `load_weights` in next to no memory: each weight has its shape and dtype, but is one zero."""
    model = empty_model(_causal_config(local_source(name), name), DTYPES[dtype])
    replace_tensors(model, lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    return model


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Replaces each parameter and buffer of a model, in place, by what `make` makes of it; what is tied stays tied.

    Returns the new tensors by the `id` of those that they replace, which the caller must keep alive.
    """
    replacements: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replacements:
                replacements[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.requires_grad)
            module.register_parameter(name, cast(nn.Parameter, replacements[id(parameter)]))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            replacements.setdefault(id(buffer), make(buffer))
            module.register_buffer(name, replacements[id(buffer)])
    return replacements


def _causal_config(source: str, name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **NO_CODE)
    except Exception as error:  # a config.json can be wrong in any way
        raise ZofoError(f"cannot load {name}: {_explained(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ZofoError(
            f"{name} is a {config.model_type} model, which is no causal language model: choose one that "
            "AutoModelForCausalLM can load"
        )
    return config


def _explained(error: BaseException) -> str:
    text, message = str(error), first_line(error)
    if "trust_remote_code" in text:
        return "it needs trust_remote_code, that is code from the model's own folder, which zofo never runs"
    if any(word in text.lower() for word in ("connect", "offline", "cached")):
        return f"it is neither a folder here nor in the Hub cache, and the Hub cannot be reached ({message})"
    return message


def load_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_model`, checked against the model."""
    source = local_source(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **NO_CODE)
    except Exception as error:  # a tokenizer.json can be wrong in any way
        raise ZofoError(
            f"{name} has no tokenizer that can be loaded ({first_line(error)}): add tokenizer.json"
        ) from error
    require_fitting_tokenizer(tokenizer, model)
    return tokenizer


def require_fitting_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Checks that a tokenizer is fast and fits the model, and gives it a pad token if it has none."""
    if not tokenizer.is_fast:
        raise ZofoError("the tokenizer is a slow one, which reports no offsets: provide tokenizer.json")
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if not 1 < len(tokenizer) <= rows:
        raise ZofoError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings: they do not belong together, "
            "or tokens were added without model.resize_token_embeddings"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
