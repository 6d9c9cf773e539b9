"""A backbone with adapters on the same weights: none, one, or several, by name."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from zofo.errors import FORWARD_ERRORS, ZofoError, in_one_line, is_lack_of_memory
from zofo.models.export import save_model
from zofo.models.load import load_weights
from zofo.models.peft import UPPER, attach, mixing_layers, real_keys_and_values, with_adapters
from zofo.models.selection import layers_of

BACKBONE = "backbone"
_UNLIMITED = 1 << 30
_TRAINED = "adapters.safetensors"  # in a checkpoint: the trained parameters of every adapter


class AdaptedModel:
    """A backbone, whose parameters keep their original names, and its adapters.

    Args:
        base: the backbone.
        config: of the adapters; None for a backbone alone.
        names: of the adapters; forward passes use the first one at first, and the others start with its values.
        stored: instead of `config`, a PEFT folder, whose adapter gets the first name.
        real_prefix: start a prefix from the keys and values of real tokens, and not from peft's random numbers.
        start: a PEFT folder with the trained weights that all adapters start from.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig | None = None,
        names: Sequence[str] = (UPPER,),
        stored: str | None = None,
        real_prefix: bool = False,
        start: str | None = None,
    ) -> None:
        self.base = base
        self.backbone: dict[str, Tensor] = dict(base.named_parameters())
        self.quantised = bool(base.config.to_dict().get("quantization_config"))  # then the backbone is never updated
        self.adapters: tuple[str, ...] = tuple(names[:1]) if stored else tuple(names) if config else ()
        learnt = {name for name, parameter in self.backbone.items() if parameter.requires_grad}
        for parameter in self.backbone.values():
            parameter.requires_grad_(False)
        self._disabled = False
        self._peft: PeftModel | None = None
        if stored:
            self._peft = attach(base, stored, names[0])
        elif config is not None:
            values = real_keys_and_values(base, config) if real_prefix else start
            self._peft = with_adapters(base, config, names, values)
        # tables that the architecture freezes are constant; a model of an earlier run is frozen as a whole
        self.movable = {name: p for name, p in self._without_replaced().items() if name in learnt or not learnt}

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """What is called: the backbone with the adapter in use."""
        return self.base if self._peft is None else self._peft

    @property
    def _config(self) -> PeftConfig | None:
        """The config of the first adapter, and so of all."""
        return None if self._peft is None else self._peft.peft_config[self.adapters[0]]

    @property
    def prompt_learning(self) -> bool:
        """Whether the adapter in use adds virtual tokens before the text."""
        return self._config is not None and not self._disabled and self._config.is_prompt_learning

    @property
    def positions(self) -> int:
        """The largest number of text tokens that the model can read."""
        positions = positions_of(self.base)
        prompt: Any = self._config
        return positions - prompt.num_virtual_tokens if self.prompt_learning else positions

    @property
    def blocks_of_backward(self) -> tuple[range, int]:
        """The blocks that backpropagation to the adapters runs through, from the lowest one on, and how many there are.

        All of them, if part of an adapter is outside of the blocks.
        """
        blocks = max(layers_of(self.backbone).values(), default=-1) + 1
        names = self.adapter_parameters(self.adapters[0])
        inside = layers_of(names)
        return range(min(inside.values()) if len(inside) == len(names) else 0, blocks), blocks

    def use(self, adapter: str) -> None:
        """Makes forward passes use this adapter; without adapters, does nothing."""
        if self._peft is not None and self._peft.active_adapter != adapter:
            self._peft.set_adapter(adapter)

    @contextmanager
    def deployed_after(self) -> Generator[None]:
        """After the block, also after an exception in it, forwards go through the adapter that is deployed."""
        try:
            yield
        finally:
            for adapter in self.adapters[:1]:
                self.use(adapter)

    @property
    def mixes(self) -> bool:
        """Whether the rows of one batch can use different adapters; the first call runs a tiny forward pass."""
        return bool(self._mixing)

    @cached_property
    def _mixing(self) -> list[nn.Module]:
        return mixing_layers(self._peft) if self._peft is not None and len(self.adapters) > 1 else []

    @contextmanager
    def through(self, adapters: Sequence[str]) -> Generator[None]:
        """Within the block, row i uses `adapters[i]`; different ones only in eval mode, and if the model `mixes`."""
        if len(set(adapters)) == 1:
            self.use(adapters[0])
            yield
            return
        assert self.mixes

        def named(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": list(adapters)}

        with ExitStack() as hooks:  # peft's own for this argument remain after a forward pass that raises
            for layer in self._mixing:
                hooks.enter_context(layer.register_forward_pre_hook(named, with_kwargs=True))
            yield

    @contextmanager
    def without_adapter(self) -> Generator[None]:
        """Within the block, forward passes use the backbone alone."""
        with nullcontext() if self._peft is None else self._peft.disable_adapter():
            self._disabled = True
            try:
                yield
            finally:
                self._disabled = False

    @torch.no_grad()
    def require_prompts(self) -> None:
        """Refuses virtual tokens that the model cannot read, although peft can make them: by a tiny forward pass."""
        if self._config is None or not self.prompt_learning:
            return
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.base.device)
        try:
            self.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except FORWARD_ERRORS as error:
            if is_lack_of_memory(error):
                raise
            raise ZofoError(
                f"this {self.base.config.model_type} model does not work with {PeftType(self._config.peft_type).value}"
                f" of peft ({in_one_line(error, 200)}): choose another adapter, such as lora"
            ) from error

    def require_checkpointing(self) -> None:
        """Refuses a model that has no gradient checkpointing, or an adapter that loses its gradient with it."""
        if not self.base.supports_gradient_checkpointing:
            raise ZofoError(
                f"gradient_checkpointing is true, but transformers has none for a {self.base.config.model_type} "
                "model: leave it out; a smaller batch with gradient_accumulation_steps saves memory as well"
            )
        if self._config is not None and self._config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
            raise ZofoError(
                "gradient_checkpointing is true, but would drop the adapter's keys and values "
                f"({PeftType(self._config.peft_type).value}) in the backward pass: leave it out, or choose the "
                "adapter lora or prompt"
            )

    def _without_replaced(self) -> dict[str, Tensor]:
        """The backbone's parameters, except those of modules that the adapter replaces by its own copies."""
        replaced: set[int] = set()
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                replaced |= {id(part) for part in module.original_module.modules()}
            elif isinstance(module, LNTuningLayer):
                replaced |= {id(part) for part in module.base_layer.modules()}
        modules = [module for module in self.model.modules() if id(module) not in replaced]
        used = {id(p) for module in modules for p in module.parameters(recurse=False)}
        return {name: p for name, p in self.backbone.items() if id(p) in used}

    def adapter_parameters(self, adapter: str) -> dict[str, Tensor]:
        """The weights of one adapter, by name."""
        backbone = {id(p) for p in self.backbone.values()}
        return {
            name: p for name, p in self.model.named_parameters() if adapter in name.split(".") and id(p) not in backbone
        }

    def save(self, folder: Path, home: Path | None = None) -> Path:
        """Writes the backbone, as `save_backbone`, and the adapters, as `save_adapters`."""
        place = self.save_backbone(folder)
        self.save_adapters(folder, home)
        return place

    def save_backbone(self, folder: Path) -> Path:
        """Writes `backbone/`, a plain Hugging Face folder; returns the folder that the tokenizer belongs to.

        A quantised backbone is not written: it has not changed, and transformers cannot write every kind.
        """
        backbone = folder / BACKBONE
        if self._peft is None:
            save_model(self.base, backbone)
            return backbone
        if not self.quantised:
            state = get_base_model_state_dict(self._peft)
            save_model(self.base, backbone, state)
        return folder / "tokenizer" if self.quantised else backbone

    def save_adapters(self, folder: Path, home: Path | None = None, backbone: str | None = None) -> None:
        """Writes a PEFT folder for each adapter; they belong to `backbone`, by default the one that `save` writes.

        `home` is where that will be in the end, if not in `folder`.
        """
        if self._peft is None:
            return
        for config in self._peft.peft_config.values():
            # an adapter belongs to the updated backbone: on the original one it would be silently wrong
            config.base_model_name_or_path = backbone or (
                self.base.name_or_path if self.quantised else str((home or folder).resolve() / BACKBONE)
            )
        card = folder / "README.md"
        if card.is_file() and not card.read_bytes().strip():
            card.unlink()  # left by a save that was killed; peft would add to it
        # without the last argument, peft asks the Hub whether the vocabulary grew, which needs a network
        self._peft.save_pretrained(str(folder), selected_adapters=list(self.adapters), save_embedding_layers=False)

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for adapter in self.adapters for name, p in self.adapter_parameters(adapter).items()}

    def save_trained(self, folder: Path) -> None:
        """Writes the trained parameters of the adapters.

        peft's folders do not always hold these: of p-tuning, they hold the prompt and not the network that makes it.
        """
        save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / _TRAINED)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copies what `save` and `save_trained` wrote into this model, bit for bit."""
        if not self.quantised:
            self._load_backbone(folder)
        trained = self._trained()
        stored = load_file(folder / _TRAINED) if trained else {}
        if {n: p.shape for n, p in stored.items()} != {n: p.shape for n, p in trained.items()}:
            raise ZofoError(f"{folder} holds adapters of another kind than this run's")
        for name, parameter in trained.items():
            parameter.copy_(stored[name])

    def _load_backbone(self, folder: Path) -> None:
        dtypes = {p.dtype for p in self.backbone.values()}
        # float32 holds the values of all dtypes
        dtype: Any = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
        stored = dict(load_weights(str(folder / BACKBONE), dtype).named_parameters())
        if stored.keys() != self.backbone.keys():
            odd = sorted(stored.keys() ^ self.backbone.keys())[0]
            raise ZofoError(f"{folder} holds another model's backbone: {odd} is in one and not in the other")
        for name, parameter in self.backbone.items():
            parameter.copy_(stored[name])


def positions_of(base: PreTrainedModel) -> int:
    """The largest number of tokens that a model can read, without an adapter."""
    config = base.config.to_dict()
    return config.get("max_position_embeddings") or config.get("n_positions") or _UNLIMITED
