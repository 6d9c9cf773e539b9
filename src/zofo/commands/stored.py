"""What is on disk as it is read back: a run folder with what it says of itself, and a model that is ready to score."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.load import DType, load_model, on_device
from zofo.models.peft import UPPER
from zofo.parse import read_yaml
from zofo.scoring.generation import ONE_LINE, AnswerSpan
from zofo.scoring.padding import probe
from zofo.scoring.scorer import Scorer, Tokens
from zofo.tasks.table import TASK_FILE


@dataclass(frozen=True)
class StoredRun:
    """A run, by its folder and the keys of its configuration."""

    folder: Path
    keys: dict[str, Any]

    @classmethod
    def of(cls, *parts: str | None) -> Self | None:
        """The run that one of these folders is a part of, such as its backbone; None if none is."""
        places = [Path(part).expanduser() for part in parts if part]
        folders = [place.resolve().parent for place in places if place.is_dir()]
        for folder in [folder.parent if folder.name.startswith("checkpoint-") else folder for folder in folders]:
            keys = _keys(folder)
            if keys is not None:
                return cls(folder, keys)
        return None

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The run in a folder, which must have ended."""
        keys = _keys(folder)
        if keys is None:
            raise ZofoError(f"{folder} is no run: it holds no config.yaml; give the output_dir of zofo train")
        if not (folder / "results.json").is_file():
            raise ZofoError(
                f"the run in {folder} has not ended: go on with resume_from_checkpoint: true, or give a checkpoint as "
                "--model checkpoint-N/backbone --adapter checkpoint-N/upper"
            )
        return cls(folder, keys)

    def parts(self, adapter: str = UPPER) -> tuple[str, str | None]:
        """The backbone, and the folder of an adapter; None in a run without adapters."""
        backbone = self.folder / "backbone"
        model = str(backbone) if backbone.is_dir() else str(self.keys.get("model"))  # a quantised one is not stored
        if (self.folder / adapter).is_dir():
            return model, str(self.folder / adapter)
        if adapter != UPPER or (self.folder / UPPER).is_dir():
            raise ZofoError(f"{self.folder} has no adapter {adapter!r}: leave --adapter out for the deployed one")
        return model, None

    @property
    def task(self) -> str:
        """The name or the file of the run's task."""
        return str(self.keys.get("task") or self.folder / TASK_FILE)

    @property
    def span(self) -> AnswerSpan:
        """How long the answers are that the run was trained to generate."""
        try:
            results: Any = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
            return AnswerSpan(**results["answer_span"])
        except (OSError, ValueError, KeyError, TypeError):  # of an older version, or not ended
            return ONE_LINE

    def is_of_task(self, task: str) -> bool:
        """Whether a task is this run's: the same file, or a copy, where both are files; else of the same name."""
        one, other = Path(task).expanduser(), Path(self.task)
        if one.is_file() and other.is_file():
            return one.read_bytes() == other.read_bytes()
        return one.stem == other.stem


def _keys(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.yaml"
    content: Any = read_yaml(file, f"{file}, the configuration of the run,") if file.is_file() else None
    return cast("dict[str, Any]", content) if isinstance(content, dict) and "method" in content else None


@dataclass(frozen=True)
class Loaded:
    """A model, with or without a stored adapter, on its device."""

    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer

    @classmethod
    def of(cls, model: str, adapter: str | None, dtype: DType) -> Self:
        """Loads it, and finds out how its rows must be padded."""
        base, tokenizer = load_model(model, dtype)
        adapted = AdaptedModel(on_device(base), stored=adapter)
        return cls(adapted, tokenizer, Scorer(adapted, Tokens(), probe(adapted, tokenizer)))

    def place(self, batch: Any) -> Any:
        return send_to_device(batch, self.adapted.base.device)
