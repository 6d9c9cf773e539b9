"""The model card of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zofo.config import ZOFOConfig
from zofo.models.adapters import KINDS
from zofo.models.load import PACKAGE_SCHEME, package_file
from zofo.tasks.task import Task

_METHODS = {
    "bilevel": "Bilevel ZOFO: the backbone moved by forward passes only, beside adapters trained by backpropagation",
    "zo": "zeroth-order fine-tuning (MeZO): forward passes only",
    "fo": "first-order fine-tuning (backpropagation)",
    "two_stage": "two stages: the adapter by backpropagation, then the backbone by forward passes",
    "none": "no training",
}


def model_card(config: ZOFOConfig, results: dict[str, Any], task: Task, steps: int, backbone: str) -> str:
    """The card as Markdown, with front matter that the Hub reads.

    Args:
        config: of the run.
        results: what `results.json` holds.
        task: that was trained on.
        steps: that were trained.
        backbone: where it is: in the folder, or a model that stayed as it was.
    """
    rows = [("zero-shot", results["zero_shot"]), *((f"`{a}`", m) for a, m in results["metrics"].items())]
    names = list(results["zero_shot"])
    table = [
        "| adapter | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *("| " + label + " | " + " | ".join(_number(m[n]) for n in names) + " |" for label, m in rows),
    ]
    cost, licence = results["cost"], base_licence(config.model or "")
    return "\n".join(
        [
            "---",
            "library_name: zofo",
            f"base_model: {json.dumps(config.model)}",
            *([f"license: {json.dumps(licence)}"] if licence else []),
            f"tags: [zofo, {config.method}, {config.adapter if config.adapter in KINDS else 'peft'}]",
            "---",
            f"# {config.model} on {results['task']}",
            "",
            f"{_METHODS[config.method]}; adapter: {config.adapter}; seed {config.seed}, {steps} steps.",
            "",
            f"Licence of the base model: {licence or 'not stated'}.",
            "",
            "## Data",
            "",
            f"{task.description} Licence: {task.licence}.",
            "",
            "## Test metrics",
            "",
            *table,
            "",
            f"`upper` is the adapter that is deployed with `{backbone}` (or, without an adapter, the backbone",
            "itself); `lower` is its first-order twin."
            + " The checkpoint was chosen on a dev split that no level trains on." * config.load_best_model_at_end,
            "",
            f"The backbone moved by {results['backbone_change']:.2e} of its norm. Training took "
            f"{cost['forward_tokens']:,} tokens forward, {cost['backward_tokens']:,} backward, "
            f"{cost['wall_seconds']:.0f} s and {cost['peak_memory_bytes'] / 2**20:,.0f} MiB at the peak.",
            "",
            "## Use",
            "",
            f"`{backbone}` loads with `transformers`, an adapter on top of it with `peft`:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(backbone)})",
            *(
                ["from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "upper")']
                if config.adapter != "none"
                else []
            ),
            "```",
            "",
            "This command, in this folder, repeats the run:",
            "",
            "```bash",
            "zofo train --config config.yaml --output_dir NEW",
            "```",
            "",
        ]
    )


def base_licence(model: str) -> str | None:
    """The licence that a model's card or the metadata of a GGUF file states, or None."""
    try:
        from gguf import GGUFReader  # here, since every run would wait for it at its start
        from huggingface_hub import ModelCard

        path = Path(package_file(model) if model.startswith(PACKAGE_SCHEME) else model).expanduser()
        if path.suffix == ".gguf":
            field = GGUFReader(path).fields.get("general.license")
            return None if field is None else str(field.contents())
        card = path / "README.md" if path.is_dir() else model
        return ModelCard.load(card).data.to_dict().get("license")
    except Exception:  # no card, no network, no valid YAML: nothing that a finished run should fail for
        return None


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
