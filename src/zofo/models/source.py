"""Where a model is, and what is checked of its files before it is loaded: no pickles, nothing damaged or absurd."""

import hashlib
import io
import json
import math
import re
import shutil
from contextlib import redirect_stderr
from enum import Enum
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from zofo.cache import cache_folder
from zofo.errors import ZofoError, first_line, in_one_line
from zofo.packages import PACKAGE_SCHEME, package_file

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # without it, transformers asks on standard input
# Parts that a checkpoint may hold beside the text model, and buffers that models used to store.
_OTHER_PARTS = re.compile(
    r"vision|visual|audio|image|multi_modal|v_head|mtp|inv_freq|masked_bias|attention\.bias$|attn\.bias$|position_ids"
)
_ROTATIONS = ("rope_freqs", "rope_factors")
_OTHER_GGUF = re.compile(rf"^({'|'.join(_ROTATIONS)})|\.nextn\.")  # and layers that predict a second token


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


def _converted(file: Path) -> Path:
    """The folder with the dequantised copy of a GGUF file, made once.

    Several processes may start at once, and may be killed: a process that ends releases its lock, and the folder gets
    its name only when it is complete.
    """
    stat = file.stat()
    version = hashlib.sha256(f"4/{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
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
        reader = gguf.GGUFReader(file)
        require_plausible(AutoConfig.from_pretrained(**location, **NO_CODE), file, _tensors(reader))
        tokenizer = AutoTokenizer.from_pretrained(**location, **NO_CODE)
        with redirect_stderr(io.StringIO()):  # there is no other way to turn its progress bar off
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True, **NO_CODE,
            )  # fmt: skip
    except ZofoError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ZofoError(f"cannot read {file}: {first_line(error)}; is it a complete GGUF of a causal model?") from error
    model, report = loaded
    _require_plain_rotation(reader, model, file)
    needed = dict(model.named_parameters(remove_duplicate=False))  # buffers are made anew
    missing = [name for name in report["missing_keys"] if name in needed]
    extra = _without_place(reader, model)  # transformers does not report these
    require_all_placed({**report, "missing_keys": missing, "unexpected_keys": extra}, f"{file} do not fit its header")
    # a dequantised model is an ordinary one; with these attributes, transformers would refuse to save or train it
    model.is_quantized = False
    model.hf_quantizer = None
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    _drop_tokens(folder / "tokenizer.json", len(model.get_input_embeddings().weight))
    model.save_pretrained(folder)


def _drop_tokens(file: Path, rows: int) -> None:
    """Takes out the added tokens that have no embedding: transformers adds <|endoftext|> where a file has none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _tensors(reader: gguf.GGUFReader) -> Tensors:
    return {tensor.name: ("GGUF", tuple(int(size) for size in tensor.shape)) for tensor in reader.tensors}


def _without_place(reader: gguf.GGUFReader, model: PreTrainedModel) -> list[str]:
    """Tensors of a GGUF file that are not in the model which was made of it, as the number of values shows."""
    stored = {name: math.prod(shape) for name, (_, shape) in _tensors(reader).items() if not _OTHER_GGUF.search(name)}
    if model.config.tie_word_embeddings:
        stored.pop("output.weight", None)  # some files repeat the embeddings
    placed = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # once, where it is tied
    if sum(stored.values()) <= sum(placed.values()):
        return []
    architecture = reader.fields["general.architecture"]
    kind = bytes(architecture.parts[architecture.data[0]]).decode()
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    return [name for name in stored if name not in known]


def _require_plain_rotation(reader: gguf.GGUFReader, model: PreTrainedModel, file: Path) -> None:
    """Refuses rotary embeddings that transformers does not read from a GGUF file, so that the model would be another.

    They are scaled by tensors (Llama 3.1, Phi 3), or by keys of the header, or have another base.
    """
    scaled = [t.name for t in reader.tensors if t.name.startswith(_ROTATIONS) and not (t.data == 1).all()]
    rotations = _rotations(model.config.get_text_config())
    kind, base = _header(reader, "rope.scaling.type"), _header(reader, "rope.freq_base")
    if kind not in (None, "none") and all(one.get("rope_type", "default") == "default" for one in rotations):
        scaled.append(f"rope.scaling.type {kind}")
    known = [one["rope_theta"] for one in rotations if "rope_theta" in one]
    if base is not None and known and not any(math.isclose(base, theta, rel_tol=1e-4) for theta in known):
        scaled.append(f"rope.freq_base {base:g}")
    if scaled:
        raise ZofoError(
            f"{file} has rotary embeddings ({', '.join(scaled)}) that transformers does not read from GGUF files: give "
            "the folder or the Hub id of the original model"
        )


def _rotations(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: of all its layers, or of each kind of layer."""
    found: dict[str, Any] = vars(config).get("rope_parameters") or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return cast("list[dict[str, Any]]", nested) or [found]


def _header(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a key of the header that is named after the architecture; None if it is not there."""
    architecture = reader.fields["general.architecture"].contents()
    field = reader.fields.get(f"{architecture}.{key}")
    return None if field is None else field.contents()


def _require_model_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "backbone").is_dir():
            raise ZofoError(f"{path} is a run, not a model: give {path}/backbone (and --adapter {path}/upper)")
        if (path / "adapter_config.json").is_file():
            raise ZofoError(
                f"{path} is an adapter, not a model: give the model that it was trained on, and the adapter as "
                "adapter_init to train it, or as --adapter to score it"
            )
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


def stored_tensors(folder: Path) -> Tensors:
    """Dtype and shape of every tensor in the safetensors files of a folder, from their headers."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                tensors.update({name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
        except (SafetensorError, OSError) as error:
            raise ZofoError(f"{file} is no complete safetensors file ({error}): copy or download it again") from error
    return tensors


def empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, in eval mode, without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE).eval()


def require_all_placed(report: Any, what: str) -> None:
    """Refuses weights of which transformers reports that some have no place, or that some places have no weights."""
    lost = sorted([*report["missing_keys"], *report["mismatched_keys"]])
    if lost:
        raise ZofoError(
            f"the weights of {what}: {lost[0]} is missing or has another shape ({len(lost)} such tensors); use the "
            "complete checkpoint"
        )
    extra = sorted(key for key in report["unexpected_keys"] if not _OTHER_PARTS.search(key))
    if extra:
        raise ZofoError(
            f"the weights of {what}: there is no place for {extra[0]} ({len(extra)} such tensors); use the file that "
            "they were saved with"
        )


def require_plausible(config: Any, source: Path, tensors: Tensors) -> None:
    """Refuses a config that does not match the stored weights, before memory is allocated for it.

    That is: impossible sizes, more than twice as many weights as are stored, or weights that are stored as integers
    without a quantisation method. `source` is the file that the config is from.
    """
    stored = sum(math.prod(shape) for _, shape in tensors.values())
    text = config.get_text_config()
    limits = {
        "num_hidden_layers": len(tensors), "vocab_size": stored, "hidden_size": stored, "num_attention_heads": stored,
    }  # fmt: skip
    for key, limit in limits.items():
        value = text.to_dict().get(key, text.attribute_map.get(key) and text.to_dict().get(text.attribute_map[key]))
        if isinstance(value, int) and not 0 < value <= limit:
            raise ZofoError(
                f"{source} says {key} = {value}, but {len(tensors)} tensors of {stored:,} numbers "
                "in all cannot be that: config and weights do not belong together"
            )
    if config.to_dict().get("quantization_config"):
        return
    try:
        needed = sum(p.numel() for p in empty_model(config, torch.float32).parameters())
    except Exception as error:  # a hostile config fails in any way
        raise ZofoError(f"{source} makes no model: {in_one_line(error, 200)}") from error
    if needed > 2 * stored:
        raise ZofoError(f"{source} asks for {needed:,} weights, but {stored:,} are stored: they do not belong together")
    for name, (dtype, shape) in tensors.items():
        if dtype[0] in "IU" and name.endswith(".weight") and len(shape) > 1:
            raise ZofoError(
                f"{name} of shape {shape} holds integers ({dtype}), but {source} does not say how they are quantised: "
                "use the original weights"
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
