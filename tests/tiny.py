"""Tiny random causal language models and a tokenizer, built on the spot, and what tests ask of them."""

import copy
from pathlib import Path

import torch

from zofo import direction, noise

VOCAB_SIZE = 64
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_GATED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}  # 2 < 4: GQA
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # inside any vocabulary, else transformers warns

_EXPERTS = {**_GATED, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}

# family -> (config class, arguments)
_CONFIGS = {
    "llama": ("LlamaConfig", _GATED),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt2": ("GPT2Config", {**_SIZES, **_NO_DROPOUT, "attn_pdrop": 0.0}),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GATED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoXConfig", {**_SIZES, "intermediate_size": 48}),
}
_MORE = {
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 8, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", _GATED),
    "gemma3_text": ("Gemma3TextConfig", {**_GATED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {**_SIZES, "intermediate_size": 48}),
    "phi3": ("Phi3Config", {**_GATED, "tie_word_embeddings": False}),
    "falcon": ("FalconConfig", _SIZES),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "olmo2": ("Olmo2Config", _GATED),
    "granite": ("GraniteConfig", {**_GATED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("CohereConfig", {**_GATED, "logit_scale": 0.5}),
    "stablelm": ("StableLmConfig", {**_GATED, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8, "num_experts": 4}),
    "gpt_oss": ("GptOssConfig", {**_GATED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "deepseek_v3": ("DeepseekV3Config", {
        **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "num_mtp_layers": 0,
    }),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": ("Lfm2Config", {**_GATED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}  # fmt: skip
FAMILIES = tuple(_CONFIGS)
ALL_FAMILIES = (*_CONFIGS, *_MORE)

SENTENCES = (
    "the film was great and i would see it again",
    "a terrible plot, a dull cast and a long evening",
    "i liked the music but not the story",
    "what is the capital of the country with the longest river?",
    "who wrote the book that the film is based on?",
    "free prize! call now to claim your reward",
    "see you at home after work, do not forget the milk",
    "It was great. It was terrible. It was good. It was bad.",
    "The phone works well; the battery lasts for two days.",
    "Never again: it broke after 3 weeks and nobody answered.",
)


def tiny_model(family="llama", vocab_size=VOCAB_SIZE, seed=0, dtype=torch.float32, **config):
    """A random causal LM of about 20,000 parameters in eval mode; the global random state is kept."""
    import transformers

    name, arguments = {**_CONFIGS, **_MORE}[family]
    built = getattr(transformers, name)(vocab_size=vocab_size, **_TOKENS, **{**arguments, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(built, dtype=dtype).eval()
        _spread(model)
    return model


def tiny_tokenizer(vocab_size=320):
    """A byte-level BPE tokenizer trained on `SENTENCES`, padding on the left; `len(tokenizer)` is its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],  # ids 0, 1, 2: those of `tiny_model`
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def save_tiny_model(path, family="llama", **config):
    """Writes a tiny model and its tokenizer to a folder, and returns the folder."""
    tokenizer = tiny_tokenizer()
    tiny_model(family, vocab_size=len(tokenizer), **config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def token_batch(batch=2, length=7, vocab_size=VOCAB_SIZE, seed=1):
    """Random token ids of shape (batch, length)."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def theta_of(model):
    return dict(model.named_parameters())


def logits(model):
    with torch.no_grad():
        return model(token_batch()).logits


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def moved_copy(model, *moves, only=None):
    """A deep copy with scale z added in plain float64 arithmetic, for each (seed, scale)."""
    other = copy.deepcopy(model)
    for seed, scale in moves:
        z = direction(theta_of(model), seed, 0)
        factor = noise.representable(scale) / noise.representable(1.0)  # `direction` is the stream with scale 1
        for name, parameter in other.named_parameters():
            if only is None or name in only:
                parameter.copy_((parameter.double() + factor * z[name].double()).float())
    return other


@torch.no_grad()
def _spread(model):
    """Moves biases and norm weights off 0 and 1, where a fresh model would hide that one of them is not read."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
