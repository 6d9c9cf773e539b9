"""Which weights the zeroth-order level updates: by name or kind, by layer, by magnitude."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from zofo.errors import ZofoError, did_you_mean

WEIGHT_KINDS = ("attention", "mlp", "embeddings", "norms", "head")
# Classes of transformers that mix the tokens of a block; the other parts of a block process each token alone.
_MIXERS = re.compile(r"attention|attn|mixer|mamba|deltanet|shortconv|recurrent|retention", re.IGNORECASE)
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?|last(\d+)")


def select(
    model: PreTrainedModel,
    parameters: Mapping[str, Tensor],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
) -> dict[str, Tensor]:
    """The parameters to update: those of `include` (all, if empty) and of `layers`, without those of `exclude`.

    Args:
        model: which has the parameters.
        parameters: name -> tensor; a tied weight occurs once, and matches by each of its names and kinds.
        include: a kind (attention, mlp, embeddings, norms, head), a part of a name between dots (`q_proj`,
            `layers.3`), or a pattern (`*.mlp.*.weight`).
        exclude: the same.
        layers: indices of blocks, from 0: "0-11", "3,7", "20-29,31", "last 2".

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> list(select(llama, dict(llama.named_parameters()), ["attention"], ["o_proj", "v_proj"], "1"))
        ['model.layers.1.self_attn.q_proj.weight', 'model.layers.1.self_attn.k_proj.weight']
    """
    names = _all_names(model, parameters)
    kinds = _kinds(model, parameters)
    chosen = _matching(include, names, kinds) if include else set(parameters)
    if layers is not None:
        indices = layers_of(parameters)
        wanted = chosen_layers("zo_layers", layers, indices)
        chosen &= {name for name, index in indices.items() if index in wanted}
    chosen -= _matching(exclude, names, kinds)
    if not chosen:
        raise ZofoError(
            f"no weight remains to be updated: zo_parameters {list(include) or 'all'}, zo_layers {layers or 'all'} "
            f"and zo_exclude {list(exclude)} leave none of {len(parameters)}"
        )
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


@torch.no_grad()
def magnitude_limits(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """For each matrix, the |W| that a fraction 1 - sparsity of its weights does not exceed: only these are updated.

    Vectors (biases, norms) have no limit. `sparsity` is in [0, 1).

    Examples:
        >>> magnitude_limits({"w": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "b": torch.ones(2)}, 0.5)
        {'w': 2.0}

    References:
        Y. Liu et al., "Sparse MeZO" (arXiv 2402.15751).
    """
    limits: dict[str, float] = {}
    for name, parameter in parameters.items():
        if sparsity > 0 and parameter.ndim >= 2:
            updated = max(1, round((1 - sparsity) * parameter.numel()))
            limits[name] = float(parameter.abs().flatten().float().kthvalue(updated).values)
    return limits


def _matching(words: Iterable[str], names: Mapping[str, set[str]], kinds: Mapping[str, set[str]]) -> set[str]:
    """The parameters that match any of the words, by their own names."""
    chosen: set[str] = set()
    for word in words:
        matches = kinds[word] & names.keys() if word in kinds else _matching_by_name(word, names)
        if not matches:
            parts = {part for aliases in names.values() for name in aliases for part in name.split(".")}
            hint = did_you_mean(
                word,
                [*WEIGHT_KINDS, *(part for part in parts if not part.isdigit())],
                f"give a kind ({', '.join(WEIGHT_KINDS)}) or a part of a name such as {next(iter(names))}",
                most=3,
            )
            raise ZofoError(f"{word!r} fits none of the weights that can be updated: {hint}")
        chosen |= matches
    return chosen


def _matching_by_name(word: str, names: Mapping[str, set[str]]) -> set[str]:
    return {
        name
        for name, aliases in names.items()
        if any(fnmatchcase(alias, word) or f".{word}." in f".{alias}." for alias in aliases)
    }


def layers_of(parameters: Iterable[str]) -> dict[str, int]:
    """The index of its block for each parameter that is in one."""
    return {name: int(m[1]) for name in parameters if (m := _BLOCK.search(name))}


def block_paths(parameters: Iterable[str]) -> dict[int, str]:
    """The path of the module of each block.

    Examples:
        >>> block_paths(["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
        {0: 'model.layers.0'}
    """
    return {int(m[1]): name[: m.end()] for name in parameters if (m := _BLOCK.search(name))}


def parts_of(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The part of the model that each parameter is in: `embeddings`, `block 0` and so on, `head`, or `other`."""
    blocks, kinds = layers_of(parameters), _kinds(model, parameters)
    outside = {name: kind for kind in ("head", "embeddings") for name in kinds[kind]}  # tied: embeddings
    return {n: f"block {blocks[n]}" if n in blocks else outside.get(n, "other") for n in parameters}


def chosen_layers(key: str, layers: str, parameters: Iterable[str]) -> set[int]:
    """The indices of the blocks that a key names, in a model with parameters of these names.

    Examples:
        >>> sorted(chosen_layers("zo_layers", "0, last 2", (f"layers.{n}.weight" for n in range(30))))
        [0, 28, 29]
    """
    last = max(layers_of(parameters).values(), default=-1)
    wanted: set[int] = set()
    for part in layers.replace(" ", "").split(","):
        match = _RANGE.fullmatch(part)
        low, high = (int(match[1] or last + 1 - int(match[3])), int(match[2] or match[1] or last)) if match else (1, 0)
        if not 0 <= low <= high <= last:
            raise ZofoError(
                f"{key} is {layers!r}, but {part!r} is no range of layers of this model: they are 0-{last}; write "
                "for example 0-3,7 or last 2"
            )
        wanted |= set(range(low, high + 1))
    return wanted


def _all_names(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Each parameter's names: a tied weight has several."""
    first = {id(parameter): name for name, parameter in parameters.items()}
    names = {name: {name} for name in parameters}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            names[first[id(parameter)]].add(name)
    return names


def _kinds(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Kind -> names of parameters; adapters around a module do not change these."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    kinds: dict[str, set[str]] = {kind: set() for kind in WEIGHT_KINDS}
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    family = type(model).__name__.removesuffix("ForCausalLM")
    for path, module in modules.items():
        block = _BLOCK.search(path)
        ends = [m.start() for m in re.finditer(r"$|\.", path)]
        inside = [path[:end] for end in ends if block is not None and end > block.end()]
        classes = [type(modules[part]).__name__.removeprefix(family) for part in inside]
        classes = [name for name in classes if not name.endswith("DecoderLayer")]
        of_module = {names[id(p)] for p in module.parameters(recurse=False) if id(p) in names}
        for kind in ["head"] if module is head else _kinds_of(module, classes):
            kinds[kind] |= of_module
    return kinds


def _kinds_of(module: nn.Module, classes: list[str]) -> list[str]:
    """The kinds of a module's own parameters, from its class and those of the modules around it, within a block."""
    if isinstance(module, nn.Embedding):
        return ["embeddings"]
    norm = ["norms"] if "norm" in type(module).__name__.lower() else []
    if any(map(_MIXERS.search, classes[:-1] if norm else classes)):  # the norm itself may be a MambaRMSNorm
        return ["attention", *norm]
    return norm or (["mlp"] if classes else [])
