"""The model card of a run folder."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from zofo.config import ZOFOConfig
from zofo.models.peft import KINDS
from zofo.models.source import PACKAGE_SCHEME, package_file
from zofo.tasks.task import Task


def model_card(config: ZOFOConfig, results: dict[str, Any], task: Task, steps: int, backbone: str, summary: str) -> str:
    """The card as Markdown, with front matter that the Hub reads.

    `results` is the content of results.json, `backbone` a folder or the name of a model that did not change, and
    `summary` the method in a sentence without a full stop.
    """
    scores = {"zero-shot": results["zero_shot"], **{f"`{name}`": row for name, row in results["metrics"].items()}}
    columns = list(results["zero_shot"])
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = json.dumps
    template = environment.from_string(files("zofo.report").joinpath("card.md").read_text(encoding="utf-8"))
    return template.render(
        config=config,
        results=results,
        cost=results["cost"],
        task=task,
        steps=steps,
        backbone=backbone,
        summary=summary,
        licence=base_licence(config.model or ""),
        adapter_tag=config.adapter if config.adapter in KINDS else "peft",
        columns=columns,
        rows=[(label, [_number(row[column]) for column in columns]) for label, row in scores.items()],
    )


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
