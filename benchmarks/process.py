"""One measurement in a process of its own, printed as JSON: `process.py WHAT MODEL [key=value ...]`.

bilevel, fo, zo    train a few steps, bilevel as published (penalty 1); the peak of memory during them
full               the same for full fine-tuning: `fo` without an adapter
inference          the same batch through plain transformers; the peak of memory
first-step         seconds from the start of the process until zofo begins its first training step
trainer            the same of a plain `transformers.Trainer`
loading            seconds from the start until plain transformers has loaded the model
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the imports that are part of what is measured

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    """Measures what the command line asks for."""
    what, model = sys.argv[1], sys.argv[2]
    keys = dict(argument.split("=", 1) for argument in sys.argv[3:])
    alone = {"inference": inference, "loading": loading, "first-step": first_step, "trainer": plain_trainer}
    found = alone[what](model) if what in alone else training(what, model, keys)
    print(json.dumps(found))


def training(method: str, model: str, keys: dict[str, Any]) -> dict[str, float]:
    """Peak bytes during two steps, or `max_steps`: the second one has all that the first one leaves behind."""
    from timing import trainer

    adapter = "none" if method in ("zo", "full") else "lora"
    method = "fo" if method == "full" else method
    settings = {"lower_steps": 1, "max_steps": 2, **{key: int(value) for key, value in keys.items()}}
    made = trainer(model, method=method, adapter=adapter, **settings)
    made.train()
    return {"peak": made.cost.peak_memory_bytes, "seconds": made.cost.wall_seconds}


def inference(model: str) -> dict[str, float]:
    """Peak bytes of forwards that need only the last logits."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        loaded.cuda()
    from zofo.training.peak import peak_memory, reset_peak_memory

    ids = torch.randint(10, 1000, (8, 48), device=loaded.device)
    reset_peak_memory(loaded.device)
    with torch.no_grad():
        for _ in range(4):
            loaded(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False)
    largest = max(p.numel() * p.element_size() for p in loaded.parameters())
    return {"peak": peak_memory(loaded.device), "largest": largest}


def loading(model: str) -> dict[str, float]:
    """Seconds of the imports that nobody can avoid, and of loading the weights."""
    import peft  # noqa: F401
    import torch
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    transformers.AutoTokenizer.from_pretrained(model)
    return {"seconds": time.perf_counter() - STARTED}


def first_step(model: str) -> dict[str, float]:
    """Seconds until the first step of a MeZO run may begin."""
    from timing import trainer

    return {"seconds": start_of(trainer(model, method="zo", adapter="none"))}


def plain_trainer(model: str) -> dict[str, float]:
    """Seconds until a plain `transformers.Trainer` may begin its first step."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = TrainingArguments(
        "runs/bench", per_device_train_batch_size=8, save_strategy="no", report_to="none", disable_tqdm=True
    )
    rows = [{"input_ids": [i] * 48, "labels": [i] * 48} for i in range(64)]
    return {"seconds": start_of(Trainer(loaded, args, train_dataset=rows, processing_class=tokenizer))}


def start_of(made: Any) -> float:
    """Seconds from the start of the process until a trainer begins its first step, which it does not take."""
    from transformers import TrainerCallback

    class BegunError(Exception):
        pass

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise BegunError

    made.add_callback(Stop())
    try:
        made.train()
    except BegunError:
        return time.perf_counter() - STARTED
    raise AssertionError("the trainer took no step")


if __name__ == "__main__":
    main()
