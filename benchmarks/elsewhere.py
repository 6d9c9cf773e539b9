"""Whether transformers 4.57, which inference engines bundle, computes what 5 computes from the folders that we write.

    python -m venv four && four/bin/pip install torch "transformers==4.57.*"
    python benchmarks/elsewhere.py four/bin/python

Small random models with rotations of many kinds are written by zofo, and read by this Python and the other one. The
logits in float32 must differ by less than 1e-5 of the largest one: the two versions add some numbers in another order.
Both compute attention plainly ("eager"), since the default of 4.57 leaves out the soft caps of Gemma 2. The tokens must
be the same. The last column is the difference if `save_pretrained` alone has written the folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from safetensors.torch import load_file

from tiny import ALL_FAMILIES, SENTENCES, tiny_model, tiny_tokenizer
from zofo.models.export import save_model, save_tokenizer

TOLERANCE = 1e-5
PLAIN = {"attn_implementation": "eager"}
RESULT = Path(__file__).parent / "results" / "elsewhere.json"
IDS = torch.arange(1, 101).mul(7).remainder(311).add(3)[None]

BASE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA3 = {
    **BASE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    **BASE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
HALF = {**BASE, "partial_rotary_factor": 0.5}
LINEAR = {**BASE, "rope_type": "linear", "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 300.0}
TWO = ["sliding_attention", "full_attention"]
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}

# family, what is changed in tests/tiny.py or added to it
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": BASE}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, longrope": ("llama", {"rope_parameters": LONG}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}, "max_position_embeddings": 64},
    ),
    "mistral": ("mistral", {"rope_parameters": BASE}),
    "qwen2": ("qwen2", {"rope_parameters": BASE}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", {"rope_parameters": BASE}),
    "gemma3_text": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}, "layer_types": TWO},
    ),
    "gpt_neox": ("gpt_neox", {"rope_parameters": HALF}),
    "phi": ("phi", {"rope_parameters": HALF}),
    "phi3": ("phi3", {"rope_parameters": BASE}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "falcon": ("falcon", {"rope_parameters": BASE}),
    "olmo2": ("olmo2", {"rope_parameters": BASE}),
    "granite": ("granite", {"rope_parameters": BASE}),
    "cohere": ("cohere", {"rope_parameters": BASE}),
    "stablelm": ("stablelm", {"rope_parameters": HALF}),
    "mixtral": ("mixtral", {"rope_parameters": BASE}),
    "qwen3_moe": ("qwen3_moe", {"rope_parameters": BASE}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", {"rope_parameters": YARN}),
    "lfm2": ("lfm2", {"rope_parameters": BASE}),
    "olmo3, yarn": (
        "olmo3",
        {**GATED, "layer_types": TWO, "rope_parameters": {"full_attention": YARN, "sliding_attention": BASE}},
    ),
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            "intermediate_size": 48,
            "layer_types": TWO,
            "cls_token_id": 0,
            "sep_token_id": 1,
            "rope_parameters": {"full_attention": BASE, "sliding_attention": BASE},  # 4.57 has one base here
        },
    ),
    "glm4": ("glm4", {**GATED, "head_dim": 8, "rope_parameters": HALF}),
    "smollm3": ("smollm3", {**GATED, "rope_parameters": BASE}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **GATED,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "shared_intermediate_size": 16,
            "position_embedding_type": "rope",
            "rope_parameters": BASE,
        },
    ),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "bloom": ("bloom", {}),
    "mamba": ("mamba", {}),
}

# Run by the other Python: reads every folder, and writes its logits and tokens beside it.
READ = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import save_file
transformers.logging.set_verbosity_error()
ids, texts = torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        how = {"dtype": torch.float32, **json.loads(sys.argv[4])}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
        with torch.no_grad():
            save_file({"logits": model.eval()(ids).logits.contiguous()}, folder / "elsewhere.safetensors")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        told = {"ids": [list(tokenizer(text)["input_ids"]) for text in texts], "inputs": sorted(tokenizer("a"))}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"[:100]}
    (folder / "elsewhere.json").write_text(json.dumps(told))
print(transformers.__version__)
"""


def made(family: str, vocabulary: int, settings: dict[str, Any]) -> Any:
    """A small random model, of a family of tests/tiny.py or another one."""
    if family in ALL_FAMILIES:
        return tiny_model(family, vocab_size=vocabulary, **settings)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=vocabulary, **SMALL, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def spread(model: Any) -> None:
    """Makes the weights large enough that attention, and with it the positions, matter."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    """The logits by the transformers of this Python."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **PLAIN)
    return model.eval()(IDS).logits


def write(folder: Path) -> dict[str, torch.Tensor]:
    """Writes every model twice, by zofo and by `save_pretrained` alone; returns the logits from zofo's folders."""
    tokenizer, logits = tiny_tokenizer(), {}
    for name, (family, settings) in MODELS.items():
        model = made(family, len(tokenizer), settings)
        spread(model)
        save_model(model, folder / name)
        save_tokenizer(tokenizer, folder / name)
        model.save_pretrained(folder / f"{name} alone")
        logits[name], before = (logits_of(folder / written) for written in (name, f"{name} alone"))
        assert torch.equal(logits[name], before), f"{name}: transformers 5 itself computes something else"
    return logits


def difference(folder: Path, expected: torch.Tensor) -> float | str:
    """By how much the other Python's logits differ, as a part of the largest one, or why there are none."""
    file = folder / "elsewhere.safetensors"
    if not file.is_file():
        return json.loads((folder / "elsewhere.json").read_text())["error"]
    return float((load_file(file)["logits"] - expected).abs().max() / expected.abs().max())


def shown(value: float | str) -> str:
    """A difference, or the beginning of an error."""
    return f"{value:.1e}" if isinstance(value, float) else value.split(":")[0]


def main() -> None:
    """Writes, reads in both versions, compares, and keeps the result."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    texts = [*SENTENCES, " two  spaces\n", "<s>é漢"]
    with tempfile.TemporaryDirectory() as made:
        expected = write(Path(made))
        arguments = [made, json.dumps(IDS.tolist()), json.dumps(texts), json.dumps(PLAIN)]
        run = subprocess.run([sys.argv[1], "-c", READ, *arguments], check=True, text=True, stdout=subprocess.PIPE)
        versions = {"here": transformers.__version__, "elsewhere": run.stdout.split()[-1]}
        rows = {}
        print(f"{'':20} {'difference':12} {'tokens':12} {'alone':12}")
        for name, logits in expected.items():
            folder = Path(made) / name
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
            told = json.loads((folder / "elsewhere.json").read_text())
            found = difference(folder, logits)
            same = told.get("ids") == [tokenizer(text)["input_ids"] for text in texts]
            same = same and told["inputs"] == sorted(tokenizer("a"))
            alone = difference(Path(made) / f"{name} alone", logits)
            good = isinstance(found, float) and found < TOLERANCE and same
            rows[name] = {"difference": found, "same_tokens": same, "alone": alone, "ok": good}
            columns = [f"{name:20}", f"{shown(found):12}", f"{'same' if same else 'OTHER':12}", f"{shown(alone):12}"]
            print(*columns, "" if good else "BAD")
    RESULT.write_text(json.dumps({**versions, "tolerance": TOLERANCE, "models": rows}, indent=1) + "\n")
    sys.exit(0 if all(row["ok"] for row in rows.values()) else 1)


if __name__ == "__main__":
    main()
