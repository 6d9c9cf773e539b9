"""Every family of models x every kind of adapter x every precision: trains, stays exact, is saved, resumed and read.

`make test` runs each family without adapter by `zo`, and with two of the adapters by `bilevel`, each in one precision,
so that each family and each adapter is seen in all three; `zo` on adapters with Llama alone; and what is refused.
`make test-full` runs every cell.

`python tests/methods/test_matrix.py` prints the table that docs/models.md shows.
"""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from plain import make_trainer, micro_steps, moved, same, weights
from tiny import ALL_FAMILIES, tiny_model, tiny_tokenizer
from zofo.errors import ZofoError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # peft, of its prefixes
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's layout
]

ADAPTERS = ("none", "lora", "prefix", "prompt", "ia3")
DTYPES = ("float32", "bfloat16", "float16")
SEEN = {
    "llama": "grouped-query attention, tied head",
    "opt": "biases, learned positions",
    "gpt2": "transposed weights, biases, learned positions, tied head",
    "qwen3": "norms of queries and keys",
    "gemma2": "sliding windows, soft caps, norms around each part",
    "gpt_neox": "parallel blocks, partly rotary, fused queries, keys and values",
    "mistral": "sliding window, untied head",
    "qwen2": "biases of queries, keys and values alone",
    "gemma3_text": "local and global layers with their own rotations",
    "phi": "parallel blocks, biases, a head with a bias",
    "phi3": "fused projections",
    "falcon": "one key head for all queries, parallel blocks",
    "bloom": "ALiBi, a norm behind the embeddings",
    "olmo2": "norms behind each part",
    "granite": "multipliers",
    "cohere": "parallel blocks, scaled logits, norms without biases",
    "stablelm": "partly rotary, norms with biases",
    "mixtral": "experts in one tensor",
    "qwen3_moe": "experts in one tensor, norms of queries and keys",
    "gpt_oss": "experts with biases, attention sinks",
    "deepseek_v3": "latent attention, a dense and a sparse layer, a shared expert",
    "mamba": "state space, convolutions, no attention",
    "lfm2": "gated convolutions and attention",
}
# (family, adapter) -> why it cannot be, and what the refusal says
REFUSED = {
    ("deepseek_v3", "prefix"): (
        "its cache holds latents",
        "does not work with PREFIX_TUNING of peft .*Sizes of tensors",
    ),
    ("mamba", "prefix"): ("it has no keys and values", "peft cannot put .*PREFIX_TUNING on this mamba model"),
    ("lfm2", "prefix"): ("its convolutions have none", "does not work with PREFIX_TUNING of peft .*conv state"),
}


def linear_names(model):
    """The last names of the linear layers within the blocks."""
    kinds, spoilt = (torch.nn.Linear, Conv1D), {"dt_proj", "out_proj"} if model.config.model_type == "mamba" else set()
    names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, kinds) and ".0." in name}
    return sorted(names - spoilt)  # of a state space, peft refuses one, and the model reads the other past its module


def trainer_of(folder, family, adapter, dtype, method, penalty):
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), dtype=getattr(torch, dtype))
    peft = None
    if adapter == "ia3":
        peft = IA3Config(task_type="CAUSAL_LM", target_modules=linear_names(model), feedforward_modules=[])
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "zo_eps": 0.02, "zo_learning_rate": 0.05}
    keys |= {"penalty": penalty} if method == "bilevel" else {}
    kind = "lora" if peft else adapter
    return make_trainer(folder, model=model, peft=peft, adapter=kind, dtype=dtype, method=method, **keys)


def parts_of(trainer):
    return {part: weights(trainer.adapted, part) for part in ("backbone", *trainer.adapted.adapters)}


def expected_moves(method, adapter, penalty):
    if method == "bilevel":
        return {"backbone", "upper"} if penalty == "infinite" else {"backbone", "upper", "lower"}
    return {"backbone"} if adapter == "none" else {"upper"}


def logits_of(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float()


def assert_exact(trainer):
    """A step that is not taken leaves θ as it was."""
    before = weights(trainer.adapted, "backbone")
    bundle = trainer._prepare_inputs(next(micro_steps(trainer)))
    trainer.method.step(9, 0.0, [bundle])
    trainer.method.skip()
    assert same(before, weights(trainer.adapted, "backbone"))


def assert_read_elsewhere(trainer, folder, dtype):
    """Plain transformers and plain peft read what was saved, bit for bit."""
    trainer.save_model()
    plain = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=getattr(torch, dtype))
    assert same(dict(plain.named_parameters()), trainer.adapted.backbone)
    inputs = trainer.processing_class(["the film", "my story was"], return_tensors="pt", padding=True)
    for adapter in trainer.adapted.adapters:
        plain = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=getattr(torch, dtype))
        trainer.adapted.use(adapter)
        # trainable, as ours: some kernels round otherwise where a gradient may be asked for
        prompt = trainer.adapted.prompt_learning
        read = PeftModel.from_pretrained(plain, folder / adapter, is_trainable=not prompt)
        found = logits_of(read, inputs)
        assert torch.equal(found, logits_of(trainer.adapted.model, inputs))


def cells():
    """All of them; those that `make test` leaves out are marked. λ is 1 and infinite in turn."""
    for i, family in enumerate(ALL_FAMILIES):
        for j, adapter in enumerate(ADAPTERS):
            for method in ("zo",) if adapter == "none" else ("zo", "bilevel"):
                of_two = (i // 2 + j) % 2 == 0 or (family, adapter) in REFUSED
                common = of_two if method == "bilevel" else adapter == "none" or family == "llama"
                for k, dtype in enumerate(DTYPES):
                    marks = () if common and (i + (j + 1) // 2) % 3 == k else pytest.mark.full
                    yield pytest.param(family, adapter, dtype, method, (1.0, "infinite")[(i + j) % 2], marks=marks)


@pytest.mark.parametrize(("family", "adapter", "dtype", "method", "penalty"), list(cells()))
def test_a_cell(family, adapter, dtype, method, penalty, tmp_path):
    if (family, adapter) in REFUSED:
        with pytest.raises(ZofoError, match=REFUSED[family, adapter][1]):
            trainer_of(tmp_path, family, adapter, dtype, method, penalty).train()
        return
    trainer = trainer_of(tmp_path, family, adapter, dtype, method, penalty)
    # of some models, transformers keeps a few float32
    dtypes = {p.dtype for p in trainer.adapted.backbone.values()}
    assert {getattr(torch, dtype)} <= dtypes <= {getattr(torch, dtype), torch.float32}
    start = parts_of(trainer)
    assert all(v.dtype == torch.float32 for part in start if part != "backbone" for v in start[part].values())
    trainer.train()
    end = parts_of(trainer)
    for part in start:
        wanted = start[part].keys() if part in expected_moves(method, adapter, penalty) else set()
        assert moved(start[part], end[part]) == wanted
    assert_exact(trainer)
    resumed = trainer_of(tmp_path, family, adapter, dtype, method, penalty)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = parts_of(resumed)
    assert all(same(end[part], again[part]) for part in end)
    assert_read_elsewhere(resumed, tmp_path, dtype)


def table():
    """The table of docs/models.md."""
    lines = [f"| family | what is special | {' | '.join(ADAPTERS)} |", "|---|---|" + "---|" * len(ADAPTERS)]
    for family in ALL_FAMILIES:
        cells = [f"no: {REFUSED[family, a][0]}" if (family, a) in REFUSED else "yes" for a in ADAPTERS]
        lines.append(f"| `{family}` | {SEEN[family]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_documentation_shows_this_table():
    assert table() in (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
