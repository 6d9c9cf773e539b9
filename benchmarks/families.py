"""Does every causal model of transformers score a row in a padded batch as alone?

    python benchmarks/families.py [NAME ...]        # with names, only their lines of the result are written anew

Builds a small random model of each class that `AutoModelForCausalLM` knows, offline, from the default config with
smaller sizes. `padding.probe` chooses the layout, or refuses the model by name; then 16 rows with options of one and
of several tokens are scored in batches of 1, 4 and 16, and so is the loss over answers, and compared with one plain
forward pass for each candidate. Windows and blocks are wider than the probe's rows, and narrower than the longest of
these. Writes `benchmarks/results/families.txt`; the exit status is 1 where a model is silently wrong.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tiny import tiny_tokenizer
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import collate
from zofo.scoring.padding import probe
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example

RESULT = Path(__file__).parent / "results" / "families.txt"
TOKENIZER = tiny_tokenizer()
PARAMETERS = 20_000_000
TOLERANCE = 1e-4  # of a log-probability, against the largest of them
LENGTHS = (2, 3, 5, 9, 17, 33, 60)  # of prompts
SINGLE, SEVERAL = (1, 1, 1), (2, 6, 4)  # tokens of the options

_SIZES = {
    32: "hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim hidden_dim lru_width "
    "attention_hidden_size embed_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner dff dim_ff feed_forward_size "
    "ffn_hidden_size dense_intermediate_size shared_intermediate_size intermediate_size_mlp",
    16: "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size kv_lora_rank "
    "q_lora_rank expert_ffn_hidden_size index_head_dim o_lora_rank router_hidden_size prefix_dense_intermediate_size "
    "hidden_size_per_layer_input state_size ssm_state_size mamba_d_state moe_latent_size "
    "shared_experts_intermediate_size mamba_head_dim mamba_d_head adapter_rank",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim d_head d_kv attention_head_dim dim_head global_head_dim "
    "swa_head_dim attention_head_size rotary_dim linear_key_head_dim linear_value_head_dim kv_channels swa_v_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts swa_num_attention_heads linear_num_value_heads linear_num_key_heads mamba_num_heads n_mamba_heads "
    "mamba_n_heads num_linear_key_value_heads num_linear_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks "
    "num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token top_k_experts",
    1: "n_group topk_group num_expert_group topk_expert_group n_groups mamba_n_groups first_k_dense_replace "
    "num_nextn_predict_layers num_dense_layers mamba_ngroups",
    24: "sliding_window attention_window_size attention_chunk_size window_size index_topk sliding_window_size",
    128: "max_position_embeddings n_positions context_length n_ctx max_seq_len",
    len(TOKENIZER): "vocab_size decoder_vocab_size vocab_size_per_layer_input",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_LAYERS = _SIZES[2].split()[:8]
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# tried one after the other: sizes that some classes want
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"first_k_dense_replace": 0, "num_key_value_heads": 4},
    {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 1},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
)
# so many heads of an index seldom weigh a token with 0: ties are broken by rounding, in a batch as anywhere
_SMALL["index_n_heads"] = 32
ODD: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
}


def small_config(kind: type, name: str, sizes: dict[str, Any]) -> Any:
    """The default config of a class with smaller sizes; one layer of each kind."""
    default = kind()
    values = {**_smaller(default, sizes), **_TOKENS, "is_decoder": True}
    return kind(**{key: value for key, value in values.items() if key in default.to_dict()}, **ODD.get(name, {}))


def _smaller(default: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    given = default.to_dict()
    values = {key: size for key, size in (_SMALL | sizes).items() if given.get(key) is not None}
    values |= {key: token for key, token in _TOKENS.items() if key in given}
    kinds = given.get("layer_types") or given.get("layers_block_type")
    if kinds:
        few = list(dict.fromkeys(kinds))
        few = few * 2 if len(few) == 1 else few
        values |= {key: len(few) for key in _LAYERS if key in values}
        values["layer_types" if given.get("layer_types") else "layers_block_type"] = few
    for key in default.sub_configs:
        if vars(default).get(key) is not None:
            values[key] = {**vars(default)[key].to_dict(), **_smaller(vars(default)[key], sizes)}
    return values


def small_model(kind: type, name: str, sizes: dict[str, Any]) -> Any:
    """A random model in eval mode, whose weights are large enough for every part of it to matter."""
    config = small_config(kind, name, sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters, which is not small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def rows(options: Sequence[int]) -> list[Example]:
    """Sixteen rows of random ids, with prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, len(TOKENIZER), (count,), generator=generator).tolist())

    texts = tuple(map(str, range(len(options))))
    return [Example(ids(LENGTHS[i % len(LENGTHS)]), tuple(map(ids, options)), i % 3, texts) for i in range(16)]


@torch.no_grad()
def alone(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """The log-probabilities of an answer's tokens: one plain forward pass of one row."""
    logs = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
    return torch.stack([logs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


@torch.no_grad()
def worst(model: Any, scorer: Scorer) -> float:
    """The largest difference of a log-probability over all batches, against the largest log-probability."""
    differences = []
    for options in (SINGLE, SEVERAL):
        examples = rows(options)
        expected = [[alone(model, e.prompt, answer) for answer in e.answers] for e in examples]
        sums = torch.stack([torch.stack([answer.sum() for answer in own]) for own in expected])
        gold = torch.stack([own[e.gold].sum() for own, e in zip(expected, examples, strict=True)])
        for size in (1, 4, 16):
            for start in range(0, 16, size):
                part = slice(start, start + size)
                batch = collate(examples[part], "options", 2, scorer.layout)
                differences.append((scorer.option_totals(batch).sums - sums[part]).abs().max() / sums.abs().max())
                batch = collate(examples[part], "lm", 2, scorer.layout)
                differences.append((scorer.loss(batch) + gold[part].sum()).abs() / gold.abs().sum())
    return float(torch.stack(differences).max())


def verdict(kind: type, name: str) -> tuple[str, str]:
    """right, refused, WRONG or not built, and why."""
    model, why = None, ""
    for sizes in _VARIANTS:
        try:
            model = small_model(kind, name, sizes)
            alone(model, (3, 4), (5, 6))
            break
        except Exception as error:
            model, why = None, why or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if model is None:
        return "not built", why
    adapted = AdaptedModel(model)
    try:
        layout = probe(adapted, TOKENIZER)
    except ZofoError as error:
        return "refused", str(error)
    words = f"{layout.side}, side by side" if layout.max_width else layout.side
    try:
        error = worst(model, Scorer(adapted, Tokens(), layout))
    except Exception as raised:
        return "raises", f"{words}; {type(raised).__name__}: {' '.join(str(raised).split())[:90]}"
    return "right" if error < TOLERANCE else "WRONG", f"{words}; {error:.0e}"


def families(wanted: Sequence[str]) -> Iterator[tuple[str, type]]:
    """The name and the config class of every causal model."""
    kinds = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING.keys()}  # noqa: SIM118
    yield from sorted((name, kind) for name, kind in kinds.items() if not wanted or name in wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable()
    found = {line.split()[0]: line for line in RESULT.read_text().splitlines()[2:]} if sys.argv[1:] else {}
    for name, kind in families(sys.argv[1:]):
        with contextlib.redirect_stdout(sys.stderr):
            word, why = verdict(kind, name)
        found[name] = f"{name:28} {word:10} {why}".rstrip()
        print(found[name], flush=True)
    counts = Counter(line[29:].split("  ")[0] for line in found.values())
    summary = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    print(summary)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    RESULT.write_text("\n".join([versions, summary, *sorted(found.values())]) + "\n")
    sys.exit(counts["WRONG"] > 0)
