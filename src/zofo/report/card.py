"""The model card of a run folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedTokenizerBase

from zofo.config import ZOFOConfig
from zofo.models.kinds import KINDS
from zofo.packages import PACKAGE_SCHEME, package_file
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.tokens import Example
from zofo.tasks.prompts import Chat
from zofo.tasks.records import Record
from zofo.tasks.task import Task

_SERIES = {
    "signal_to_noise": "signal to noise (1: noise alone)",
    "penalty_gap": "penalty gap G(θ,p) - G(θ,s)",
    "cosine": "cosine with the true gradient",
    "variance": "variance of projected gradients",
    "variance_s_start": "the same with s as at the start",
    "variance_no_adapter": "the same without the adapter",
    "row_variance": "their squared standard error over the rows",
    "row_variance_s_start": "the same with s as at the start",
    "row_variance_no_adapter": "the same without the adapter",
}


@dataclass(frozen=True)
class Shown:
    """A row as plain code puts it to the model: what it reads, and what is scored behind it."""

    prompt: str
    options: tuple[str, ...]
    suffix: str
    partial: bool
    special: bool  # whether the tokenizer adds special tokens, as it does not around a chat
    appended: int  # how many of them it adds behind a text, which are no part of an answer

    @classmethod
    def of(cls, record: Record, example: Example, tokenizer: PreTrainedTokenizerBase) -> Self:
        """A record, put to the model as the example says: without spaces that belong to the answer's first token."""
        special = not isinstance(record, Chat)
        prompt, appended = record.prompt, _appended(tokenizer) if special else 0
        if not record.options:
            read: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
            prompt = prompt if tuple(read[: len(read) - appended]) == example.prompt else prompt.rstrip(" ")
        return cls(prompt, record.options, record.suffix, record.partial, special, appended)


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens a tokenizer adds behind a text."""
    mask: list[int] = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return len(list(takewhile(bool, reversed(mask))))


def model_card(
    config: ZOFOConfig,
    results: dict[str, Any],
    tasks: Sequence[Task],
    steps: int,
    backbone: str,
    place: str,
    shown: Shown,
    span: AnswerSpan,
    ends: Sequence[int],
) -> str:
    """The card as Markdown, with front matter that the Hub reads.

    `results` is the content of results.json, `backbone` a folder or the name of a model that did not change, `place`
    the folder of the adapter in the example, `shown` its row, `span` how much generated text is an answer, and `ends`
    the tokens that end it.
    """
    before = {"zero-shot": results["zero_shot"]} if results["zero_shot"] else {}
    scores = {**before, **{f"`{name}`": row for name, row in results["metrics"].items()}}
    columns = list(results["metrics"]["upper"])
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = json.dumps
    template = environment.from_string(files("zofo.report").joinpath("card.md").read_text(encoding="utf-8"))
    return template.render(
        config=config,
        results=results,
        cost=results["cost"],
        tasks=tasks,
        place=place,
        by_task=_by_task(results),
        steps=steps,
        backbone=backbone,
        summary=config.method_class.summary + ("; it is frozen in this run" if config.freezes_backbone else ""),
        rule=config.method_class.zeroth_order,
        adapter="upper" in results["metrics"] and config.adapter != "none",
        tokenizer="backbone" if backbone == "backbone" else "tokenizer",
        shown=shown,
        span=span,
        ends=ends,
        licence=base_licence(config.model or ""),
        adapter_tag=config.adapter if config.adapter in KINDS else "peft",
        columns=columns,
        diagnosis=_diagnosis(results["diagnosis"]) if "diagnosis" in results else None,
        rows=[(label, [_number(row[column]) for column in columns]) for label, row in scores.items()],
    )


def _by_task(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of several tasks, the scores of each: before training, and of the deployed adapter."""
    before = results.get("zero_shot_tasks", {})
    found: list[tuple[str, list[str]]] = []
    for name, own in results.get("tasks", {}).items():
        for label, row in (("zero-shot", before.get(name)), *own.items()):
            if row:
                found.append((f"{name} | {label}", [f"{key} {_number(value)}" for key, value in row.items()]))
    return found


def _diagnosis(found: dict[str, Any]) -> dict[str, list[tuple[str, list[str]]]]:
    """The rows of its tables: a label, and numbers in four figures."""

    def figures(values: Any) -> list[str]:
        return [f"{value:.4g}" for value in values]

    labels = {**_SERIES}
    if "cosine" in found:
        expected, q, d = (found["cosine"][key] for key in ("expected", "directions", "weights"))
        labels["cosine"] += f" ({expected:.2g} is expected: q = {q}, d = {d:,})"
    scores = found.get("scores", {})
    states = ("neither", "backbone", "adapter", "both")
    return {
        "series": [
            (label, figures(found[key][of] for of in ("first", "last", "mean")))
            for key, label in labels.items()
            if key in found
        ],
        "updates": [(part, figures(change.values())) for part, change in found.get("update", {}).items()],
        "scores": [
            (key, figures([*(scores[state][key] for state in states), gain["backbone"], gain["adapter"]]))
            for key, gain in found.get("gain", {}).items()
        ],
    }


def base_licence(model: str) -> str | None:
    """The licence that a model's card or the metadata of a GGUF file states, or None."""
    try:
        from gguf import GGUFReader  # here, because a top-level import would slow down the start of every run
        from huggingface_hub import ModelCard

        path = Path(package_file(model) if model.startswith(PACKAGE_SCHEME) else model).expanduser()
        if path.suffix == ".gguf":
            field = GGUFReader(path).fields.get("general.license")
            return None if field is None else str(field.contents())
        card = path / "README.md" if path.is_dir() else model
        return ModelCard.load(card).data.to_dict().get("license")
    except Exception:  # no card, no network, no valid YAML: a finished run should not fail because of these
        return None


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
