"""Load the backbone: a Hub id, a folder, a `.gguf` file, or a file inside an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from zofo.cache import cache_folder
from zofo.errors import ZofoError, first_line
from zofo.models.source import pickle_hint, require_dense, require_model_folder, require_plausible

DType = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PACKAGE_SCHEME = "pkg://"
# Parts that a checkpoint may hold beside the text model, and buffers that models used to store.
_OTHER_PARTS = re.compile(
    r"vision|visual|audio|image|multi_modal|v_head|mtp|inv_freq|masked_bias|attention\.bias$|attn\.bias$|position_ids"
)
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # left out, transformers asks on standard input


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
        require_plausible(config, Path(source), lambda: _hollow(config, dtype))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **_NO_CODE
        )
    except Exception as error:  # a hostile config fails in any way
        raise ZofoError(f"cannot load the weights of {name}: {_explained(error)}{pickle_hint(source)}") from error
    model, report = loaded
    lost = [*report["missing_keys"], *report["mismatched_keys"]]
    if lost:
        raise ZofoError(
            f"the weights of {name} do not fit its config.json: {lost[0]} is missing or has another shape "
            f"({len(lost)} such tensors); use the complete checkpoint"
        )
    extra = sorted(name for name in report["unexpected_keys"] if not _OTHER_PARTS.search(name))
    if extra:
        raise ZofoError(
            f"the weights of {name} do not fit its config.json: there is no place for {extra[0]} ({len(extra)} such "
            "tensors); use the config.json that they were saved with"
        )
    return model.eval()


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, moved to the GPU if torch sees one."""
    cast(nn.Module, model).to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def stored_dtype(name: str) -> DType:
    """The dtype in which a model was saved; float32 if its config does not say."""
    found = _causal_config(local_source(name), name).dtype
    names: list[DType] = [name for name, dtype in DTYPES.items() if dtype == found]
    return names[0] if names else "float32"


def require_movable(name: str, purpose: str) -> None:
    """Refuses a model whose weights cannot move, before they are loaded or downloaded.

    Args:
        name: as in `load_model`.
        purpose: what would move them.

    Raises:
        ZofoError: if they are quantised; or if there is no such model.
    """
    source = local_source(name)
    require_dense(_causal_config(source, name), name, purpose)


def load_hollow(name: str, dtype: DType = "float32") -> PreTrainedModel:
    """The model of `load_weights` in next to no memory: each weight has its shape and dtype, but is one zero.

    Args:
        name: as in `load_model`. A GGUF file is converted first, which reads its weights once.
        dtype: of the weights.

    Raises:
        ZofoError: if there is no such model, or it is no causal language model.
    """
    model = _hollow(_causal_config(local_source(name), name), dtype)
    replace_tensors(model, lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    return model


def _hollow(config: Any, dtype: DType) -> PreTrainedModel:
    """A model without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **_NO_CODE).eval()


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Puts another tensor in the place of each parameter and buffer; what is tied stays tied.

    Args:
        model: is changed in place.
        make: from a parameter or buffer to its successor.

    Returns:
        The successors by the `id` of what they replace, which the caller must keep alive.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.requires_grad)
            module.register_parameter(name, cast(nn.Parameter, made[id(parameter)]))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            made.setdefault(id(buffer), make(buffer))
            module.register_buffer(name, made[id(buffer)])
    return made


def local_source(name: str) -> str:
    """What transformers can open: `name` itself, or the folder of the converted GGUF file."""
    path = Path(package_file(name) if name.startswith(PACKAGE_SCHEME) else name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ZofoError(f"there is no file {path}: give the path of an existing .gguf file")
        return str(_converted(path))
    if path.is_dir():
        require_model_folder(path)
        return str(path)
    if path.is_file() or name.startswith((PACKAGE_SCHEME, ".", "/", "~")) or name.count("/") > 1:
        raise ZofoError(
            f"there is no model at {name}: give a Hub id (ORGANISATION/NAME), a folder that holds config.json and "
            f"safetensors files, a .gguf file, or {PACKAGE_SCHEME}PACKAGE/PATH"
        )
    return name


def package_file(name: str) -> Path:
    """The file behind `pkg://PACKAGE/PATH`, without importing the package.

    Raises:
        ZofoError: if the package is not installed, or has no such file.
    """
    package, _, inner = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ZofoError(
            f"{name} names the package {package!r}, which is not installed: pip install it (see the README)"
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists() or ".." in Path(inner).parts:
        raise ZofoError(f"{name}: the installed package {package} has no file {inner!r}")
    return path


def _converted(file: Path) -> Path:
    """The folder with the dequantised copy of a GGUF file, made once.

    The lock goes away with the process that holds it, and the folder appears under its name only when complete: two
    processes may start at once, and one may be killed half-way.
    """
    stat = file.stat()
    mark = hashlib.sha256(f"1/{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{file.stem}-{mark}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            half = folder.with_name(folder.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            _convert(file, half)
            half.rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, **_NO_CODE)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **_NO_CODE
        )
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, SafetensorError) as error:
        raise ZofoError(
            f"cannot read {file}: {first_line(error)}; is it a complete GGUF of a causal model?"
        ) from error
    # a dequantised model is an ordinary one; with these marks left on, it would refuse to be saved or trained
    model.is_quantized = False
    model.hf_quantizer = None
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _causal_config(source: str, name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **_NO_CODE)
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **_NO_CODE)
    except Exception as error:  # a tokenizer.json can be wrong in any way
        raise ZofoError(
            f"{name} has no tokenizer that can be loaded ({first_line(error)}): add tokenizer.json"
        ) from error
    require_fitting_tokenizer(tokenizer, model)
    return tokenizer


def require_fitting_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Checks that a tokenizer is fast and fits the model, and gives it a pad token if it has none.

    Raises:
        ZofoError: if it has no offsets, no words, or more of them than the model has embeddings.
    """
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
