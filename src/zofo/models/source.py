"""Where a model is, and what is checked of its files before it is loaded: no pickles, nothing damaged or absurd."""

import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from zofo.cache import cache_folder
from zofo.errors import ZofoError, first_line

PACKAGE_SCHEME = "pkg://"
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # without it, transformers asks on standard input


def local_source(name: str) -> str:
    """What transformers can open: `name` itself, or the folder of the converted GGUF file."""
    path = Path(package_file(name) if name.startswith(PACKAGE_SCHEME) else name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ZofoError(f"there is no file {path}: give the path of an existing .gguf file")
        return str(_converted(path))
    if path.is_dir():
        _require_model_folder(path)
        return str(path)
    if path.is_file() or name.startswith((PACKAGE_SCHEME, ".", "/", "~")) or name.count("/") > 1:
        raise ZofoError(
            f"there is no model at {name}: give a Hub id (ORGANISATION/NAME), a folder that holds config.json and "
            f"safetensors files, a .gguf file, or {PACKAGE_SCHEME}PACKAGE/PATH"
        )
    return name


def package_file(name: str) -> Path:
    """The file behind `pkg://PACKAGE/PATH`, without importing the package."""
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

    Several processes may start at once, and may be killed: a process that ends releases its lock, and the folder gets
    its name only when it is complete.
    """
    stat = file.stat()
    version = hashlib.sha256(f"1/{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{file.stem}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            incomplete = folder.with_name(folder.name + ".half")
            shutil.rmtree(incomplete, ignore_errors=True)
            _convert(file, incomplete)
            incomplete.rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location, **NO_CODE)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **NO_CODE
        )
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, SafetensorError) as error:
        raise ZofoError(f"cannot read {file}: {first_line(error)}; is it a complete GGUF of a causal model?") from error
    # a dequantised model is an ordinary one; with these attributes, transformers would refuse to save or train it
    model.is_quantized = False
    model.hf_quantizer = None
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _require_model_folder(path: Path) -> None:
    """Refuses a folder without config.json or safetensors files, or where one of these is damaged."""
    if not (path / "config.json").is_file():
        if (path / "backbone").is_dir():
            raise ZofoError(f"{path} is a run, not a model: give {path}/backbone (and --adapter {path}/upper)")
        raise ZofoError(f"{path} is no model folder: it has no config.json; give the folder that save_pretrained wrote")
    if not any(path.glob("*.safetensors")):
        raise ZofoError(f"{path} holds no safetensors files{pickle_hint(str(path))}")
    if (path / "adapter_config.json").is_file():
        raise ZofoError(
            f"{path} holds a model and an adapter, which transformers would load as one: move adapter_config.json "
            "and adapter_model.safetensors to a folder of their own, and give it as the adapter"
        )
    _require_safetensors_only(path)


def _require_safetensors_only(path: Path) -> None:
    """Refuses a config or index that names other files of weights: transformers would read them, pickles too."""
    names: list[str] = []
    try:
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names += json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
        names += [] if named is None else [named.removesuffix(".index.json")]
        for name in names:
            if Path(name).name != name or Path(name).suffix != ".safetensors":
                raise ZofoError(f"{path} says that weights are in {name!r}: only safetensors files beside it are read")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZofoError(f"{path}: config.json or the index of the weights is damaged ({error})") from error


def pickle_hint(source: str) -> str:
    """The end of an error message: what to do with the pickles in a folder, if there are any."""
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in Path(source).glob(pattern)]
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle, which can run code when it is opened, and is never read: convert it with "
        "model.save_pretrained(FOLDER) in transformers"
    )


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor in the safetensors files of a folder, from their headers."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                tensors.update({name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
        except (SafetensorError, OSError) as error:
            raise ZofoError(f"{file} is no complete safetensors file ({error}): copy or download it again") from error
    return tensors


def require_plausible(config: Any, folder: Path, empty_model: Callable[[], nn.Module]) -> None:
    """Refuses a config that does not match the weights in its folder, before memory is allocated for it.

    That is: impossible sizes, more than twice as many weights as are stored, or weights that are stored as integers
    without a quantisation method. `empty_model` makes the model of the config without values.
    """
    tensors = stored_tensors(folder)
    stored = sum(math.prod(shape) for _, shape in tensors.values())
    text = config.get_text_config()
    limits = {
        "num_hidden_layers": len(tensors), "vocab_size": stored, "hidden_size": stored, "num_attention_heads": stored,
    }  # fmt: skip
    for key, limit in limits.items():
        value = text.to_dict().get(key, text.attribute_map.get(key) and text.to_dict().get(text.attribute_map[key]))
        if isinstance(value, int) and not 0 < value <= limit:
            raise ZofoError(
                f"{folder / 'config.json'} says {key} = {value}, but {len(tensors)} tensors of {stored:,} numbers "
                "in all cannot be that: config and weights do not belong together"
            )
    if config.to_dict().get("quantization_config"):
        return
    try:
        needed = sum(p.numel() for p in empty_model().parameters())
    except Exception as error:  # a hostile config fails in any way
        raise ZofoError(f"{folder / 'config.json'} makes no model: {' '.join(str(error).split())[:200]}") from error
    if needed > 2 * stored:
        raise ZofoError(
            f"{folder / 'config.json'} asks for {needed:,} weights, but {stored:,} are stored: they do not belong "
            "together"
        )
    for name, (dtype, shape) in tensors.items():
        if dtype[0] in "IU" and name.endswith(".weight") and len(shape) > 1:
            raise ZofoError(
                f"{folder}: {name} of shape {shape} holds integers ({dtype}), but config.json does not say how they "
                "are quantised: use the original weights"
            )


def require_dense(config: Any, name: str, purpose: str) -> None:
    """Refuses a model whose config says that its weights are quantised: they cannot be updated, as `purpose` would."""
    quantisation = config.to_dict().get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method", "unknown method") if isinstance(quantisation, dict) else "unknown method"
    method = method.value if isinstance(method, Enum) else method
    raise ZofoError(
        f"the weights of {name} are quantised ({method}) and cannot be updated, as {purpose} would: use the original "
        "model, or model.dequantize() and save_pretrained in transformers, or a GGUF file, which zofo dequantises; or "
        "train an adapter alone, by method fo or zo, which leaves them as they are"
    )
