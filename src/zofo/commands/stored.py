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
from zofo.tasks.lists import name_of_task
from zofo.tasks.table import TASK_FILE
from zofo.training.folder import TASKS


@dataclass(frozen=True)
class StoredRun:
    """A run, by its folder and the keys of its configuration."""

    folder: Path
    keys: dict[str, Any]
    name: str | None = None  # of the task, where a folder is a part of one task among several

    @classmethod
    def of(cls, *parts: str | None) -> Self | None:
        """The run that one of these folders is a part of, such as its backbone; None if none is."""
        places = [Path(part).expanduser().resolve() for part in parts if part]
        found: Self | None = None
        for place in [place for place in places if place.is_dir()]:
            of_task = place.parent.parent.name == TASKS and _keys(place.parent) is None
            folder = place.parent.parent.parent if of_task else place.parent
            folder = folder.parent if folder.name.startswith("checkpoint-") else folder
            keys = _keys(folder)
            if keys is not None and (found is None or (of_task and found.folder == folder)):
                found = cls(folder, keys, place.parent.name if of_task else None)
        return found

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The run in a folder, which must have ended."""
        keys = _keys(folder)
        if keys is None:
            raise ZofoError(f"{folder} is no run: it holds no config.yaml; give the output_dir of zofo train")
        if not (folder / "results.json").is_file():
            raise ZofoError(
                f"the run in {folder} has not ended: go on with resume_from_checkpoint: true, or give a checkpoint as "
                "--model checkpoint-N/backbone --adapter checkpoint-N/upper (of several tasks tasks/NAME/upper)"
            )
        return cls(folder, keys)

    @property
    def backbone(self) -> str:
        """The folder of the backbone, or the name of the run's model: a quantised one is not stored."""
        backbone = self.folder / "backbone"
        return str(backbone) if backbone.is_dir() else str(self.keys.get("model"))

    def parts(self, adapter: str = UPPER, task: str | None = None) -> tuple[str, str | None]:
        """The backbone, and the folder of an adapter, of a task if there are several; None in a run without adapters.

        Raises:
            ZofoError: if there is no such adapter, or `task` is none of several tasks.
        """
        model, place = self.backbone, self.folder
        if (self.folder / TASKS).is_dir():
            place = self.folder / TASKS / self.named(task)
        if (place / adapter).is_dir():
            return model, str(place / adapter)
        if adapter != UPPER or (place / UPPER).is_dir():
            raise ZofoError(f"{place} has no adapter {adapter!r}: leave --adapter out for the deployed one")
        return model, None

    @property
    def tasks(self) -> dict[str, str]:
        """The tasks of the run: their names, and the names or files that they were given by."""
        given = self.keys.get("task")
        if not isinstance(given, list):
            place = str(given or self.folder / TASK_FILE)
            return {Path(place).stem: place}
        names = self._results().get("task")
        places = [str(place) for place in cast("list[Any]", given)]
        if not isinstance(names, list) or len(cast("list[Any]", names)) != len(places):  # it has not ended
            names = [name_of_task(place) for place in places]
        return dict(zip(map(str, cast("list[Any]", names)), places, strict=True))

    @property
    def task(self) -> str:
        """The name or the file of the run's task; of several, of the one that the folder belongs to."""
        if len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        return self.tasks[self.named(self.name)]

    def place(self, task: str | None) -> str | None:
        """The name or file that one of the run's tasks was given by; another task as it is."""
        return self.tasks.get(task, task) if task else task

    def named(self, task: str | None) -> str:
        """The name of one of several tasks, given by this, or by what the run was given."""
        for name, place in self.tasks.items():
            if task in (name, place) or (task is not None and _same_task(task, place)):
                return name
        known = ", ".join(self.tasks)
        if task is None:
            raise ZofoError(f"the run in {self.folder} has the tasks {known}: choose one with --task")
        raise ZofoError(
            f"the run in {self.folder} has no task {task!r}, but {known}: for another task, give its backbone alone as "
            f"--model {self.folder / 'backbone'}, or an adapter of its own by zofo adapt"
        )

    def span(self, task: str) -> AnswerSpan:
        """How long the answers are that the run was trained to generate for one of its tasks."""
        found: Any = self._results().get("answer_span")
        try:
            return AnswerSpan(**(found[self.named(task)] if len(self.tasks) > 1 else found))
        except (KeyError, TypeError):  # answers that are chosen, or a run that has not ended
            return ONE_LINE

    def _results(self) -> dict[str, Any]:
        try:
            results: Any = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", results) if isinstance(results, dict) else {}

    def is_of_task(self, task: str) -> bool:
        """Whether a task is one of this run's."""
        return any(_same_task(task, place) or task == name for name, place in self.tasks.items())


def _same_task(task: str, place: str) -> bool:
    """Whether two words name the same task: the same name and, where both are files, the same content."""
    one, other = Path(task).expanduser(), Path(place)
    if one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
        return False
    return one.stem == other.stem  # files of equal content under two names read the rows that lie beside each


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
