"""Digests of tiny runs, by which a change that must not change a bit is held to it.

    python benchmarks/digests.py before.json          at the old commit
    python benchmarks/digests.py after.json before.json    at the new one: says which parts differ

Bits depend on the machine and on torch, so both files must come from one machine, with one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import yaml
from peft import LoraConfig
from safetensors import safe_open

from tiny import save_tiny_model
from zofo.cli import main

AUTO = {"zo_learning_rate": "auto"}
RUNS: dict[str, dict[str, Any]] = {
    "fo": {"method": "fo"},
    "fo prefix": {"method": "fo", "adapter": "prefix"},
    "fo prompt": {"method": "fo", "adapter": "prompt"},
    "fo full": {"method": "fo", "adapter": "none"},
    "fo full bfloat16": {"method": "fo", "adapter": "none", "dtype": "bfloat16"},
    "fo dropout accumulated": {"method": "fo", "adapter": "dropout", "gradient_accumulation_steps": 3},
    "fo checkpointed": {"method": "fo", "gradient_checkpointing": True},
    "fo lm": {"method": "fo", "loss": "lm", "task": "generated"},
    "fo float16": {"method": "fo", "dtype": "float16"},
    "zo": {"method": "zo", "adapter": "none"},
    "zo auto": {**AUTO, "method": "zo", "adapter": "none"},
    "zo auto q=3": {**AUTO, "method": "zo", "adapter": "none", "num_perturbations": 3},
    "zo one-sided q=2": {"method": "zo", "adapter": "none", "num_perturbations": 2, "zo_estimator": "one_sided"},
    "zo rademacher": {"method": "zo", "adapter": "none", "zo_distribution": "rademacher"},
    "zo sparse": {"method": "zo", "adapter": "none", "zo_sparsity": 0.75},
    "zo decayed": {"method": "zo", "adapter": "none", "zo_weight_decay": 0.1},
    "zo chosen weights": {"method": "zo", "adapter": "none", "zo_parameters": ["attention"], "zo_layers": "1"},
    "zo bfloat16": {**AUTO, "method": "zo", "adapter": "none", "dtype": "bfloat16", "zo_eps": 3e-3},
    "zo float16": {"method": "zo", "adapter": "none", "dtype": "float16"},
    "zo lora": {"method": "zo", "adapter": "lora"},
    "zo prefix": {**AUTO, "method": "zo", "adapter": "prefix"},
    "zo accumulated": {**AUTO, "method": "zo", "adapter": "none", "gradient_accumulation_steps": 2},
    "zo lm": {"method": "zo", "adapter": "none", "loss": "lm", "task": "generated"},
    "zo linear schedule": {"method": "zo", "adapter": "none", "lr_scheduler_type": "linear"},
    "two_stage": {**AUTO, "method": "two_stage"},
    "two_stage prompt": {"method": "two_stage", "adapter": "prompt"},
    "bilevel": {},
    "bilevel auto": AUTO,
    "bilevel prefix": {"adapter": "prefix"},
    "bilevel prompt": {"adapter": "prompt"},
    "bilevel dropout": {"adapter": "dropout"},
    "bilevel q=2 one-sided": {"num_perturbations": 2, "zo_estimator": "one_sided"},
    "bilevel auto q=2 rademacher": {**AUTO, "num_perturbations": 2, "zo_distribution": "rademacher"},
    "bilevel without lower steps": {"lower_steps": 0},
    "bilevel without penalty": {"penalty": 0.0},
    "bilevel infinite": {"penalty": "infinite"},
    "bilevel infinite auto pool": {**AUTO, "penalty": "infinite", "adapter_layers": "last 1", "lower_pool": 1},
    "bilevel growing penalty": {"penalty": 10.0, "penalty_schedule": "linear", "normalize_penalty": False},
    "bilevel accumulated": {"gradient_accumulation_steps": 2},
    "bilevel bfloat16": {"dtype": "bfloat16", "zo_eps": 3e-3},
    "bilevel float16": {"dtype": "float16"},
    "bilevel sparse": {"zo_sparsity": 0.5},
    "bilevel skips": {"on_nonfinite": "skip"},
    "bilevel best of evaluations": {"eval_steps": 2, "load_best_model_at_end": True},
    "bilevel linear schedule": {"lr_scheduler_type": "linear"},
    "bilevel several tokens": {"task": "several"},
    "bilevel lm": {"loss": "lm", "task": "generated"},
    "bilevel gpt2": {"model": "gpt2"},
    "bilevel opt": {"model": "opt"},
    "bilevel chat": {"system_prompt": None, "template": 1},
    "none": {"method": "none"},
    "none lm": {"method": "none", "loss": "lm", "task": "generated"},
}  # fmt: skip
_USUAL = {
    "method": "bilevel", "adapter": "lora", "model": "llama", "task": "options", "zo_learning_rate": 1e-3,
    "learning_rate": 1e-2, "penalty": 1.0, "lower_steps": 2, "max_steps": 4, "save_steps": 2, "dev_size": 8,
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4, "test_size": 12, "logging_steps": 1,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
_WORDS = ("film", "story", "phone", "evening")
_TASKS: dict[str, dict[str, Any]] = {
    "options": {"answer": "{{ [' a', ' the'][label] }}", "options": [" a", " the"]},
    "several": {"answer": "{{ [' terrible', ' great'][label] }}", "options": [" terrible", " great"]},
    "generated": {"answer": "{{ [' terrible', ' great'][label] }}"},
}


def write_inputs(folder: Path) -> dict[str, str]:
    """Tiny models, tasks and an adapter: name -> path."""
    rows = [{"text": f"the {_WORDS[i % 4]} number {i}", "label": (i // 2) % 2} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {name: folder / name for name in ("llama", "gpt2", "opt")}
    for family, path in paths.items():
        save_tiny_model(path, family)
    for name, words in _TASKS.items():
        task = {"name": name, "source": "rows.jsonl", "prompt": "{{ text }} was", **words}
        task["templates"] = [{"prompt": "of {{ text }}, it was"}]
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(task))
    paths["dropout"] = folder / "dropout"
    LoraConfig(lora_dropout=0.3, target_modules=["q_proj", "v_proj"]).save_pretrained(paths["dropout"])
    return {name: str(path) for name, path in paths.items()}


def run(name: str, paths: dict[str, str], folder: Path, **more: Any) -> dict[str, str]:
    """Trains one of `RUNS` into a folder, with `more` keys; part of what it wrote -> digest."""
    keys = {**_USUAL, **RUNS[name], **more, "output_dir": str(folder)}
    words = ["train"]
    for key, value in keys.items():
        if isinstance(value, list):
            words += [f"--{key}", *value]
        elif value is not None:
            words += [f"--{key}", paths.get(str(value), str(value))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(words)
    if status:
        return {"status": str(status)}
    results = json.loads((folder / "results.json").read_text())
    for varying in ("wall_seconds", "peak_memory_bytes"):
        del results["cost"][varying]
    del results["model"]
    found = {"results": digest(results)}
    for part in ("backbone", "upper", "lower"):
        if (folder / part).is_dir():
            found[part] = digest(tensors(folder / part))
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        found[f"{checkpoint.name}, adapters"] = digest(tensors(checkpoint))
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        found[f"{checkpoint.name}, optimizer"] = digest(state)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the safetensors files of a folder hold."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {f"{file.name}/{name}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def digest(value: Any) -> str:
    """A short name of numbers, texts and tensors, nested in any way, down to their bits."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            found.update(f"{len(value)} of".encode())
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The parts of runs whose digests are not the same."""
    return [
        f"{name}: {part}"
        for name in before
        for part in sorted({*before[name], *after.get(name, {})})
        if before[name].get(part) != after.get(name, {}).get(part)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(os.environ.get("KEEP") or place)
        folder.mkdir(parents=True, exist_ok=True)
        inputs, made = write_inputs(folder), {}
        for number, one in enumerate(RUNS):
            made[one] = run(one, inputs, folder / "runs" / str(number))
            print(one, made[one], file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")
    if len(sys.argv) > 2:
        odd = differences(json.loads(Path(sys.argv[2]).read_text()), made)
        print("\n".join(odd) or f"all parts of {len(made)} runs are the same, bit for bit")
        sys.exit(bool(odd))
