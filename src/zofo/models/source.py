"""What is checked of a model's folder before its weights are loaded: no pickles, nothing damaged, nothing absurd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from zofo.errors import ZofoError


def require_model_folder(path: Path) -> None:
    """Refuses a folder that holds no model.

    Raises:
        ZofoError: if there is no config.json or no safetensors file, or one of these is damaged.
    """
    if not (path / "config.json").is_file():
        if (path / "backbone").is_dir():
            raise ZofoError(f"{path} is a run, not a model: give {path}/backbone (and --adapter {path}/upper)")
        raise ZofoError(
            f"{path} is no model folder: it has no config.json; give the folder that save_pretrained wrote"
        )
    if not any(path.glob("*.safetensors")):
        raise ZofoError(f"{path} holds no safetensors files{pickle_hint(str(path))}")
    if (path / "adapter_config.json").is_file():
        raise ZofoError(
            f"{path} holds a model and an adapter, which transformers would load as one: move adapter_config.json "
            "and adapter_model.safetensors to a folder of their own, and give it as the adapter"
        )
    _require_safetensors_alone(path)


def _require_safetensors_alone(path: Path) -> None:
    """Refuses names of weights that lead to other files: transformers would follow them, to pickles too."""
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
    """What to say about pickles in a folder, if there are some."""
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in Path(source).glob(pattern)]
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle, which can run code when it is opened, and is never read: convert it with "
        "model.save_pretrained(FOLDER) in transformers"
    )


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor in the safetensors files of a folder, from their headers.

    Raises:
        ZofoError: if one of the files is damaged.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                tensors.update({name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
        except (SafetensorError, OSError) as error:
            raise ZofoError(f"{file} is no complete safetensors file ({error}): copy or download it again") from error
    return tensors


def require_plausible(config: Any, folder: Path, hollow: Callable[[], nn.Module]) -> None:
    """Refuses a config that cannot be that of the folder's weights, before memory is taken for it.

    Args:
        config: a transformers config.
        folder: of its config.json and weights.
        hollow: makes the model of the config without values.

    Raises:
        ZofoError: if it asks for more layers than there are tensors, for more than twice the numbers that there are,
            or for sizes that cannot be; or if weights are stored as integers without saying how.
    """
    tensors = stored_tensors(folder)
    most = sum(math.prod(shape) for _, shape in tensors.values())
    text = config.get_text_config()
    limits = {"num_hidden_layers": len(tensors), "vocab_size": most, "hidden_size": most, "num_attention_heads": most}
    for key, limit in limits.items():
        value = text.to_dict().get(key, text.attribute_map.get(key) and text.to_dict().get(text.attribute_map[key]))
        if isinstance(value, int) and not 0 < value <= limit:
            raise ZofoError(
                f"{folder / 'config.json'} says {key} = {value}, but {len(tensors)} tensors of {most:,} numbers "
                "in all cannot be that: config and weights do not belong together"
            )
    if config.to_dict().get("quantization_config"):
        return
    try:
        wanted = sum(p.numel() for p in hollow().parameters())
    except Exception as error:  # a hostile config fails in any way
        raise ZofoError(f"{folder / 'config.json'} makes no model: {' '.join(str(error).split())[:200]}") from error
    if wanted > 2 * most:
        raise ZofoError(
            f"{folder / 'config.json'} asks for {wanted:,} weights, but {most:,} are stored: they do not belong "
            "together"
        )
    for name, (dtype, shape) in tensors.items():
        if dtype[0] in "IU" and name.endswith(".weight") and len(shape) > 1:
            raise ZofoError(
                f"{folder}: {name} of shape {shape} holds integers ({dtype}), but config.json does not say how they "
                "are quantised: use the original weights"
            )


def require_dense(config: Any, name: str, purpose: str) -> None:
    """Refuses quantised weights, which cannot move.

    Args:
        config: a transformers config.
        name: of the model.
        purpose: what would move them.

    Raises:
        ZofoError: if the config says that the weights are quantised.
    """
    found = config.to_dict().get("quantization_config")
    if not found:
        return
    how = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
    how = how.value if isinstance(how, Enum) else how
    raise ZofoError(
        f"the weights of {name} are quantised ({how}) and cannot be moved, as {purpose} would: use the original "
        "model, or model.dequantize() and save_pretrained in transformers, or a GGUF file, which zofo dequantises; or "
        "train an adapter alone, by method fo or zo, which leaves them as they are"
    )
