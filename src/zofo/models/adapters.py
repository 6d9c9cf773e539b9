"""A backbone with its adapters: none, one (`upper`), or the twins `upper` and `lower` on the same weights."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zofo.errors import ZofoError
from zofo.models.load import DTYPES, DType, load_weights
from zofo.models.peft import LOWER, UPPER, attach, mixing_layers, real_keys_and_values, with_adapters

_UNLIMITED = 1 << 30
_TRAINED = "adapters.safetensors"  # in a checkpoint: every adapter as it is trained
KINDS = ("lora", "prefix", "prompt", "none")


def adapter_config(adapter: str, model: PreTrainedModel) -> PeftConfig | None:
    """The PEFT config behind the key `adapter`.

    Args:
        adapter: "lora" (r=8, alpha=16, on queries and values), "prefix" (5 virtual tokens), "prompt" (10 virtual
            tokens, from the vocabulary), "none", or the path of a PEFT config JSON.
        model: the backbone it is meant for.

    Raises:
        ZofoError: if it is neither a known kind nor the path of a PEFT config.
    """
    if adapter == "none":
        return None
    if adapter == "lora":
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=8,
            lora_alpha=16,
            target_modules=_lora_targets(model),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layout
        )
    if adapter == "prefix":
        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    if adapter == "prompt":
        heads = model.config.to_dict().get("num_attention_heads", 1)  # peft asks for it, and does not use it
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            num_attention_heads=heads,
        )  # fmt: skip
    return _read_config(Path(adapter).expanduser())


def _lora_targets(model: PreTrainedModel) -> list[str] | str:
    """Queries and values where they are modules of their own; else what peft knows; else what is there instead."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    last = {name.split(".")[-1] for name in linear}
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    for names in (("q_proj", "v_proj"), tuple(known), ("in_proj", "x_proj")):  # the last are those of a state space
        if names and last.issuperset(names):
            return list(names)
    attention = {name.split(".")[-1] for name in linear if "attn" in name or "attention" in name}
    return sorted(attention) or "all-linear"


def _read_config(path: Path) -> PeftConfig:
    file = path / "adapter_config.json" if path.is_dir() else path
    if not file.is_file():
        raise ZofoError(f"adapter is {str(path)!r}: give one of {', '.join(KINDS)}, or the path of a PEFT config JSON")
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(**{"peft_type": content["peft_type"], **content})
    except (ValueError, TypeError, KeyError) as error:
        raise ZofoError(
            f"{file} is no PEFT config ({error}): write one with config.save_pretrained in peft"
        ) from error
    config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = False
    return config


class AdaptedModel:
    """A backbone, whose parameters keep their original names, and its adapters.

    Args:
        base: the backbone.
        config: of the adapter; None for a backbone alone.
        twins: add `lower`, with the values of `upper`.
        stored: instead of `config`, a PEFT folder whose adapter to use.
        real_prefix: start a prefix from the keys and values of real tokens, and not from peft's random numbers.

    Raises:
        ZofoError: if peft cannot put this adapter, or two of it, on this model.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig | None = None,
        twins: bool = False,
        stored: str | None = None,
        real_prefix: bool = False,
    ) -> None:
        self.base = base
        self.backbone: dict[str, Tensor] = dict(base.named_parameters())
        self.quantised = bool(base.config.to_dict().get("quantization_config"))  # then the backbone never moves
        self.adapters: tuple[str, ...] = (UPPER, LOWER) if twins else (UPPER,) if config or stored else ()
        for parameter in self.backbone.values():
            parameter.requires_grad_(False)
        self._alone = False
        self._peft: PeftModel | None = None
        if stored:
            self._peft = attach(base, stored)
        elif config is not None:
            start = real_keys_and_values(base, config) if real_prefix else None
            self._peft = with_adapters(base, config, twins, start)
        self.movable = self._without_replaced()

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """What is called: the backbone with the adapter in use."""
        return self.base if self._peft is None else self._peft

    @property
    def prompt_learning(self) -> bool:
        """Whether the adapter in use adds virtual tokens in front of the text."""
        return self._peft is not None and not self._alone and self._peft.peft_config[UPPER].is_prompt_learning

    def use(self, adapter: str) -> None:
        """Makes one adapter the one that forwards go through; without adapters, does nothing."""
        if self._peft is not None and self._peft.active_adapter != adapter:
            self._peft.set_adapter(adapter)

    @property
    def mixes(self) -> bool:
        """Whether rows of one batch can go through different adapters; asked first, it runs a tiny forward."""
        return bool(self._mixing)

    @cached_property
    def _mixing(self) -> list[nn.Module]:
        return mixing_layers(self._peft) if self._peft is not None and len(self.adapters) > 1 else []

    @contextmanager
    def through(self, adapters: Sequence[str]) -> Generator[None]:
        """Within the block, row i of a batch goes through `adapters[i]`: in eval mode, and if they differ, `mixes`."""
        if len(set(adapters)) == 1:
            self.use(adapters[0])
            yield
            return
        assert self.mixes
        # peft's own hooks for this argument stay when a forward raises
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "adapter_names": list(adapters)}), with_kwargs=True
            )
            for layer in self._mixing
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def without_adapter(self) -> Generator[None]:
        """Within the block the backbone works alone."""
        if self._peft is None:
            yield
        else:
            with self._peft.disable_adapter():
                self._alone = True
                try:
                    yield
                finally:
                    self._alone = False

    @torch.no_grad()
    def require_prompts(self) -> None:
        """Refuses virtual tokens that peft can make for this model, but the model cannot read: by a tiny forward.

        Raises:
            ZofoError: with what the model says.
        """
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.base.device)
        try:
            if self.prompt_learning:
                self.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            assert self._peft is not None
            kind = PeftType(self._peft.peft_config[UPPER].peft_type).value
            raise ZofoError(
                f"this {self.base.config.model_type} model does not work with {kind} of peft "
                f"({' '.join(str(error).split())[:200]}): choose another adapter, such as lora"
            ) from error

    def require_checkpointing(self) -> None:
        """Refuses what cannot compute activations again in the backward pass.

        Raises:
            ZofoError: for a model without checkpoints, or an adapter that they would cut off.
        """
        if not self.base.supports_gradient_checkpointing:
            raise ZofoError(
                f"gradient_checkpointing is true, but transformers has none for a {self.base.config.model_type} "
                "model: leave it out; a smaller batch with gradient_accumulation_steps saves memory as well"
            )
        kind = None if self._peft is None else self._peft.peft_config[UPPER].peft_type
        if kind in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
            name = PeftType(kind).value
            raise ZofoError(
                f"gradient_checkpointing is true, but would drop the adapter's keys and values ({name}) in the "
                "backward pass: leave it out, or choose the adapter lora or prompt"
            )

    def _without_replaced(self) -> dict[str, Tensor]:
        """The backbone without the modules that the adapter puts its own copies in the place of."""
        gone: set[int] = set()  # modules
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                gone |= {id(part) for part in module.original_module.modules()}
            elif isinstance(module, LNTuningLayer):
                gone |= {id(part) for part in module.base_layer.modules()}
        there = [module for module in self.model.modules() if id(module) not in gone]
        used = {id(p) for module in there for p in module.parameters(recurse=False)}
        return {name: p for name, p in self.backbone.items() if id(p) in used}

    def adapter_parameters(self, adapter: str) -> dict[str, Tensor]:
        """The weights of one adapter, by name."""
        backbone = {id(p) for p in self.backbone.values()}
        return {
            name: p
            for name, p in self.model.named_parameters()
            if adapter in name.split(".") and id(p) not in backbone
        }

    def save(self, folder: Path) -> Path:
        """Writes `backbone/` (a plain Hugging Face folder) and a PEFT folder for each adapter.

        A quantised backbone is not written: it is as it was, and transformers cannot write every kind.

        Returns:
            The folder that the tokenizer belongs to.
        """
        backbone = folder / "backbone"
        if self._peft is None:
            self.base.save_pretrained(backbone, max_shard_size="5GB")
            return backbone
        if not self.quantised:
            state = get_base_model_state_dict(self._peft)
            self.base.save_pretrained(backbone, state_dict=state, max_shard_size="5GB")
        for config in self._peft.peft_config.values():
            # an adapter belongs to the moved backbone: on the original one it would be silently wrong
            config.base_model_name_or_path = self.base.name_or_path if self.quantised else str(backbone.resolve())
        card = folder / "README.md"
        if card.is_file() and not card.read_bytes().strip():
            card.unlink()  # peft adds to what is there, and a killed save left nothing
        # asking the Hub whether the vocabulary grew would need a network
        self._peft.save_pretrained(str(folder), selected_adapters=list(self.adapters), save_embedding_layers=False)
        return folder / "tokenizer" if self.quantised else backbone

    @property
    def positions(self) -> int:
        """How many tokens of text fit."""
        config = self.base.config.to_dict()
        most = config.get("max_position_embeddings") or config.get("n_positions") or _UNLIMITED
        if self._peft is None or not self.prompt_learning:
            return most
        prompt: Any = self._peft.peft_config[UPPER]
        return most - prompt.num_virtual_tokens

    def save_trained(self, folder: Path) -> None:
        """Writes the adapters as they are trained.

        peft's folders do not always hold that: of p-tuning, they hold the prompt and not the network that makes it.
        """
        save_file(
            {name: p.detach().contiguous() for a in self.adapters for name, p in self.adapter_parameters(a).items()},
            folder / _TRAINED,
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copies what `save` and `save_trained` wrote into this model, bit for bit.

        Raises:
            ZofoError: if they are not there or are not of this model.
        """
        if not self.quantised:
            self._load_backbone(folder)
        trained = {name: p for adapter in self.adapters for name, p in self.adapter_parameters(adapter).items()}
        stored = load_file(folder / _TRAINED) if trained else {}
        if {n: p.shape for n, p in stored.items()} != {n: p.shape for n, p in trained.items()}:
            raise ZofoError(f"{folder} holds adapters of another kind than this run's")
        for name, parameter in trained.items():
            parameter.copy_(stored[name])

    def _load_backbone(self, folder: Path) -> None:
        kinds = {p.dtype for p in self.backbone.values()}
        dtype: Any = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"  # which holds them all
        values = dict(load_weights(str(folder / "backbone"), dtype).named_parameters())
        if values.keys() != self.backbone.keys():
            odd = sorted(values.keys() ^ self.backbone.keys())[0]
            raise ZofoError(f"{folder} holds another model's backbone: {odd} is in one and not in the other")
        for name, parameter in self.backbone.items():
            parameter.copy_(values[name])


@torch.no_grad()
def merged(backbone: str, adapter: str, dtype: DType = "float32") -> tuple[PreTrainedModel, float]:
    """The backbone with an adapter merged into its weights: a plain transformers model.

    Args:
        backbone: what `load_model` takes.
        adapter: a PEFT folder.
        dtype: of the result; the sum is taken in float32 and rounded once.

    Returns:
        The model, and the largest difference of its logits to those of backbone and adapter in float32, over some
        tokens from all of the vocabulary.

    Raises:
        ZofoError: if the adapter cannot be merged, as prompts and prefixes cannot.
    """
    adapted = attach(load_weights(backbone, "float32"), adapter)
    if adapted.peft_config[UPPER].is_prompt_learning:
        raise ZofoError(f"{adapter} consists of virtual tokens, which cannot be merged into weights")
    words = adapted.get_input_embeddings().weight.shape[0]
    probe = torch.linspace(0, words - 1, 32).long().view(2, 16)
    wanted = adapted.eval()(input_ids=probe).logits
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ZofoError(f"peft cannot merge {adapter} ({error}): deploy it beside the backbone, with peft") from error
    if float((model(input_ids=probe).logits - wanted).abs().max()) > 1e-3 * float(wanted.abs().max()):
        raise ZofoError(
            f"merged with {adapter}, the model is another one, as where the adapter is on a head that is tied to the "
            "embeddings: deploy it beside the backbone, with peft"
        )
    for parameter in model.parameters():  # and no buffers: rotations stay as precise as they are when it is loaded
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model, float((model(input_ids=probe).logits.float() - wanted).abs().max())


def is_prompt(adapter: Path) -> bool:
    """Whether a PEFT folder holds virtual tokens, which cannot be merged."""
    return PeftConfig.from_pretrained(str(adapter)).is_prompt_learning
