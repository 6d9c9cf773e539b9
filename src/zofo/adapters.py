"""A backbone with its adapters: none, one (`upper`), or the twins `upper` and `lower` on the same weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
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
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zofo.errors import ZofoError
from zofo.models import DType, load_weights

UPPER = "upper"
LOWER = "lower"
_UNLIMITED = 1 << 30
KINDS = ("lora", "prefix", "prompt", "none")


def adapter_config(adapter: str, model: PreTrainedModel) -> PeftConfig | None:
    """The PEFT config behind the key `adapter`.

    Args:
        adapter: "lora" (r=8, alpha=16, on the modules peft chooses for this model), "prefix" (5 virtual tokens),
            "prompt" (10 virtual tokens, from the vocabulary), "none", or the path of a PEFT config JSON.
        model: the backbone it is meant for.

    Raises:
        ZofoError: if it is neither a known kind nor the path of a PEFT config.
    """
    if adapter == "none":
        return None
    if adapter == "lora":
        known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=8,
            lora_alpha=16,
            target_modules=None if known else "all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layout
        )
    if adapter == "prefix":
        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    if adapter == "prompt":
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
        )
    return _read_config(Path(adapter))


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

    Raises:
        ZofoError: if peft cannot put this adapter, or two of it, on this model.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig | None = None,
        twins: bool = False,
        stored: str | None = None,
    ) -> None:
        self.base = base
        self.backbone: dict[str, Tensor] = dict(base.named_parameters())
        self.adapters: tuple[str, ...] = (UPPER, LOWER) if twins else (UPPER,) if config or stored else ()
        for parameter in self.backbone.values():
            parameter.requires_grad_(False)
        self._alone = False
        self._peft = attach(base, stored) if stored else None if config is None else _wrap(base, config, twins)

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

    def adapter_parameters(self, adapter: str) -> dict[str, Tensor]:
        """The weights of one adapter, by name."""
        backbone = {id(p) for p in self.backbone.values()}
        return {
            name: p
            for name, p in self.model.named_parameters()
            if adapter in name.split(".") and id(p) not in backbone
        }

    def save(self, folder: Path) -> None:
        """Writes `backbone/` (a plain Hugging Face folder) and a PEFT folder for each adapter."""
        backbone = folder / "backbone"
        if self._peft is None:
            self.base.save_pretrained(backbone, max_shard_size="5GB")
            return
        state = get_base_model_state_dict(self._peft)
        self.base.save_pretrained(backbone, state_dict=state, max_shard_size="5GB")
        for config in self._peft.peft_config.values():
            # an adapter belongs to the moved backbone: on the original one it would be silently wrong
            config.base_model_name_or_path = str(backbone.resolve())
        (folder / "README.md").unlink(missing_ok=True)  # peft would read it, and a killed save left it half
        # asking the Hub whether the vocabulary grew would need a network
        self._peft.save_pretrained(str(folder), selected_adapters=list(self.adapters), save_embedding_layers=False)

    @property
    def positions(self) -> int:
        """How many tokens of text fit."""
        config = self.base.config.to_dict()
        most = config.get("max_position_embeddings") or config.get("n_positions") or _UNLIMITED
        if self._peft is None or not self.prompt_learning:
            return most
        prompt: Any = self._peft.peft_config[UPPER]
        return most - prompt.num_virtual_tokens

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copies the weights that `save` wrote into this model, bit for bit.

        Raises:
            ZofoError: if they are not there or are not of this model.
        """
        dtype: Any = str(next(iter(self.backbone.values())).dtype).removeprefix("torch.")
        values = dict(load_weights(str(folder / "backbone"), dtype).named_parameters())
        if values.keys() != self.backbone.keys():
            odd = sorted(values.keys() ^ self.backbone.keys())[0]
            raise ZofoError(f"{folder} holds another model's backbone: {odd} is in one and not in the other")
        for name, parameter in self.backbone.items():
            parameter.copy_(values[name])
        for adapter in self.adapters:
            assert self._peft is not None
            weights = load_peft_weights(str(folder / adapter), device="cpu")
            expected = get_peft_model_state_dict(self._peft, adapter_name=adapter, save_embedding_layers=False)
            if weights.keys() != expected.keys():
                raise ZofoError(f"{folder / adapter} holds an adapter of another kind than this run's")
            set_peft_model_state_dict(self._peft, weights, adapter_name=adapter)


def _wrap(base: PreTrainedModel, config: PeftConfig, twins: bool) -> PeftModel:
    try:
        model = get_peft_model(base, config, adapter_name=UPPER)
        assert isinstance(model, PeftModel)
        if twins:
            model.add_adapter(LOWER, copy.deepcopy(config))
            values = get_peft_model_state_dict(model, adapter_name=UPPER, save_embedding_layers=False)
            set_peft_model_state_dict(model, values, adapter_name=LOWER)
            model.set_adapter(UPPER)
    except (ValueError, NotImplementedError, KeyError, TypeError) as error:
        raise ZofoError(
            f"peft cannot put {config.peft_type} on this {base.config.model_type} model: {error}"
        ) from error
    return model


def merged(backbone: str, adapter: str, dtype: DType = "float32") -> PreTrainedModel:
    """The backbone with an adapter merged into its weights: a plain transformers model.

    Args:
        backbone: what `load_model` takes.
        adapter: a PEFT folder.
        dtype: of the result; the sum is taken in it.

    Raises:
        ZofoError: if the adapter cannot be merged, as prompts and prefixes cannot.
    """
    adapted = attach(load_weights(backbone, dtype), adapter)
    config = adapted.peft_config[UPPER]
    if config.is_prompt_learning:
        raise ZofoError(
            f"{adapter} consists of virtual tokens ({config.peft_type}), which cannot be merged into weights: deploy "
            "backbone/ and the adapter's folder together with peft"
        )
    return adapted.merge_and_unload(safe_merge=True)


def attach(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Puts a stored adapter on a model.

    Raises:
        ZofoError: if the folder is no PEFT folder, or does not fit.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ZofoError(f"{adapter} is no adapter: give a folder with adapter_config.json, such as RUN/upper")
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ZofoError(
            f"{adapter} has no adapter_model.safetensors: pickles (.bin) are never read; save it again in peft"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are an error below, and not a warning
            attached = PeftModel.from_pretrained(model, adapter, adapter_name=UPPER)
        stored = load_peft_weights(adapter, device="cpu").keys()
    except (ValueError, RuntimeError, OSError, KeyError, SafetensorError) as error:
        raise ZofoError(f"the adapter {adapter} does not fit this model: {str(error).splitlines()[0]}") from error
    lost = get_peft_model_state_dict(attached, adapter_name=UPPER, save_embedding_layers=False).keys() - stored
    if lost:
        raise ZofoError(f"the adapter {adapter} is not complete: {min(lost)} is missing; save it again in peft")
    return attached
