"""The weights that a run started from, read from their files whenever they are needed: no second copy in memory."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from zofo.errors import ZofoError


class StartingWeights:
    """Reads weights of a model from the safetensors files of its folder, one at a time.

    Args:
        model: that was loaded from a folder.
        parameters: name -> the weight of the model, as it is now.

    Raises:
        ZofoError: if the folder does not hold one of these weights, or another value of it.
    """

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
        folder = Path(model.config.name_or_path or "-")
        held: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            with safe_open(file, framework="pt") as opened:
                held |= dict.fromkeys(opened.keys(), file)
        prefix = f"{model.base_model_prefix}."
        self._places: dict[str, tuple[Path, str]] = {}
        for name, parameter in parameters.items():
            found = next((own for own in (name, name.removeprefix(prefix)) if own in held), None)
            if found is None:
                raise ZofoError(
                    f"zo_anchor reads the starting weights from the files of the model, but {folder} holds no {name}: "
                    "save the model with save_pretrained, and give that folder; or leave zo_anchor out"
                )
            self._places[name] = held[found], found
            if not torch.equal(self.read(name).to(parameter), parameter.detach()):
                raise ZofoError(
                    f"zo_anchor is given, but {name} is not what {folder} holds: give the model as it was loaded"
                )

    def read(self, name: str) -> Tensor:
        """A weight as it was, in the dtype of its file; its memory is that of the file, until it is dropped."""
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(stored)
