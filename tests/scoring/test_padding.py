"""Rows in a padded batch have the scores of rows alone, whatever the model does with padding; or it is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plain import MORE_TOKENS, make_rows, make_trainer
from tiny import same_bits, snapshot, tiny_model, tiny_tokenizer
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.peft import UPPER
from zofo.scoring.batch import Layout, collate
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.padding import probe
from zofo.scoring.scorer import UNLIMITED, Scorer, Tokens
from zofo.scoring.tokens import Example
from zofo.tasks.records import records

TOKENIZER = tiny_tokenizer()
PAD = TOKENIZER.pad_token_id
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
_DECODER = {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 128, "is_decoder": True,
    "is_encoder_decoder": False,
}  # fmt: skip
_GATED = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
IGNORE_PADDING = {
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48},
    "recurrent_gemma": {
        **_GATED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64, "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "bart": _DECODER,
    "pegasus": _DECODER,
}  # fmt: skip
ROTATES_BY_LENGTH = {
    **_GATED,
    "num_hidden_layers": 2,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def random_model(family, **config):
    """A model whose weights are so large that every token in front of a text changes what follows."""
    ids = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ids, **config)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.2)
    return model


def rows(lengths=(3, 11, 30, 5), options=(2, 1, 4)):
    """Random rows with prompts and options of these lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return tuple(torch.randint(3, len(TOKENIZER), (count,), generator=generator).tolist())

    texts = tuple(map(str, range(len(options))))
    return [Example(ids(n), tuple(map(ids, options)), i % 2, texts) for i, n in enumerate(lengths)]


@torch.no_grad()
def alone(model, prompt, answer):
    """The log-probability of an answer: one text, one forward, nothing but its ids."""
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, -len(answer) :]
    return sum(logs[token] for logs, token in zip(logits.double().log_softmax(-1), answer, strict=True))


def expected(model, examples):
    return torch.stack([torch.stack([alone(model, e.prompt, a) for a in e.answers]) for e in examples]).float()


@torch.no_grad()
def sums(scorer, examples, size):
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return torch.cat([scorer.option_totals(collate(part, "options", PAD, scorer.layout)).sums for part in parts])


def require_exact(adapted, layout, examples):
    """Scores and losses in batches of 1, 2 and 4 are those of each candidate alone."""
    scorer, right = Scorer(adapted, Tokens(), layout), expected(adapted.model, examples)
    gold = sum(right[i, e.gold] for i, e in enumerate(examples))
    for size in (1, 2, 4):
        torch.testing.assert_close(sums(scorer, examples, size), right, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(scorer.loss(collate(examples, "lm", PAD, layout)), -gold, **CLOSE)
        apart = [collate([e], "lm", PAD, layout) for e in examples]
        torch.testing.assert_close(sum(scorer.losses(apart, [UPPER] * len(apart))), -gold, **CLOSE)


@pytest.mark.parametrize("options", [(2, 1, 4), (1, 1)], ids=["more tokens", "one token"])
@pytest.mark.parametrize("family", IGNORE_PADDING)
def test_a_model_that_does_not_honour_padding_in_front_of_a_text_gets_it_behind(family, options):
    adapted, examples = AdaptedModel(random_model(family, **IGNORE_PADDING[family])), rows(options=options)
    layout = probe(adapted, TOKENIZER)
    assert layout == Layout("right")
    require_exact(adapted, layout, examples)
    wrong = sums(Scorer(adapted, Tokens(), Layout("left")), examples, 4) - expected(adapted.model, examples)
    assert wrong.abs().max() > 100 * CLOSE["atol"], "the other side would be seen"


@pytest.mark.parametrize("kind", ["none", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_a_model_that_honours_it_keeps_options_side_by_side(family, kind):
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    adapted = AdaptedModel(model, adapter_config(kind, model))
    layout = probe(adapted, TOKENIZER)
    assert layout == Scorer(adapted, Tokens()).layout
    assert (layout.side, layout.max_width > 0) == ("left", True)
    require_exact(adapted, layout, rows())


def test_padding_on_the_left_may_be_exact_where_options_side_by_side_are_not():
    """State spaces read across options, but leave out what is masked."""
    adapted = AdaptedModel(tiny_model("mamba", vocab_size=len(TOKENIZER)))
    assert probe(adapted, TOKENIZER) == Layout("left")


def test_a_mask_of_four_dimensions_that_changes_a_score_is_not_used():
    adapted = AdaptedModel(tiny_model(vocab_size=len(TOKENIZER)))

    def forget(module, args, given):
        mask = given.get("attention_mask")
        return args, {**given, "attention_mask": None if mask is not None and mask.ndim == 4 else mask}

    adapted.base.register_forward_pre_hook(forget, with_kwargs=True)
    assert probe(adapted, TOKENIZER) == Layout("left")


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_16_bits_is_not_taken_for_padding(family, dtype):
    model = tiny_model("llama", vocab_size=len(TOKENIZER)) if family == "llama" else random_model("bart", **_DECODER)
    assert probe(AdaptedModel(model.to(dtype)), TOKENIZER).side == ("left" if family == "llama" else "right")


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_run_trains_and_evaluates_on_exact_scores(tmp_path):
    """The loss of the first step is that of plain forward passes, and evaluations do not depend on the batch size."""
    data, found = make_rows(6, options=MORE_TOKENS), []
    for size in (1, 6):
        keys = {"method": "fo", "adapter": "none", "loss": "lm", "max_steps": 1, "per_device_train_batch_size": 6}
        trainer = make_trainer(
            tmp_path, train=data, eval_rows=data, model=random_model("bart", **_DECODER, dropout=0.0),
            per_device_eval_batch_size=size, **keys,
        )  # fmt: skip
        examples = trainer.examples(records(data))
        right = -float(sum(alone(trainer.adapted.model, e.prompt, e.answers[e.gold]) for e in examples))
        right /= sum(len(e.answers[e.gold]) for e in examples)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(right, abs=1e-4)
        assert trainer.train().training_loss == pytest.approx(right, abs=1e-4)
        found.append(trainer.evaluate()["eval_accuracy"])
    assert found[0] == found[1]


def leak(model, dim):
    """Makes every token read all rows of its batch (dim 0) or the whole of its row (dim 1)."""
    return model.get_input_embeddings().register_forward_hook(lambda _, args, output: output + output.mean(dim, True))


@pytest.mark.parametrize("kind", ["none", "prompt"])
def test_a_model_for_which_no_padding_is_exact_is_refused_by_name(kind):
    model = tiny_model(vocab_size=len(TOKENIZER))
    adapted = AdaptedModel(model, adapter_config(kind, model))
    leak(model, 0)
    with pytest.raises(ZofoError, match=r"this llama model .* depends on the padding or on the other rows"):
        probe(adapted, TOKENIZER)


@pytest.mark.parametrize("kind", ["none", "prompt"])
def test_a_model_that_reads_what_follows_is_refused_by_name(kind):
    model = tiny_model(vocab_size=len(TOKENIZER))
    adapted = AdaptedModel(model, adapter_config(kind, model))
    leak(model, 1)
    with pytest.raises(ZofoError, match="this llama model reads the tokens behind those that it predicts"):
        probe(adapted, TOKENIZER)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_and_its_decoder_is_not(family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(ZofoError, match=f"this {family} model reads the tokens behind"):
        probe(AdaptedModel(random_model(family, **sizes)), TOKENIZER)
    probe(AdaptedModel(random_model(family, is_decoder=True, **sizes)), TOKENIZER)


def test_a_model_that_does_not_run_on_token_ids_is_refused_by_name():
    model = tiny_model(vocab_size=len(TOKENIZER))

    def ask_for_more(*_):
        raise ValueError("pixel_values\nare missing")

    model.register_forward_pre_hook(ask_for_more)
    with pytest.raises(ZofoError, match=r"this llama model cannot score token ids alone \(pixel_values are missing\)"):
        probe(AdaptedModel(model), TOKENIZER)


@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "a batch"])
def test_a_lack_of_memory_is_not_taken_for_a_model_that_cannot_read(rows):
    model = tiny_model(vocab_size=len(TOKENIZER))

    def fill_memory(_, args, given):
        if given["input_ids"].shape[0] >= rows:
            torch.empty(1 << 60, dtype=torch.uint8)

    model.register_forward_pre_hook(fill_memory, with_kwargs=True)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        probe(AdaptedModel(model), TOKENIZER)
    assert not isinstance(caught.value, ZofoError)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_with_virtual_tokens_rows_are_padded_on_the_right_and_the_backbone_s_own_on_the_left(kind):
    model = tiny_model(vocab_size=len(TOKENIZER))
    adapted = AdaptedModel(model, adapter_config(kind, model))
    layout = probe(adapted, TOKENIZER)
    assert layout == Scorer(AdaptedModel(tiny_model(vocab_size=len(TOKENIZER))), Tokens()).layout
    assert Scorer(adapted, Tokens(), layout).layout == Layout("right")
    with adapted.without_adapter():
        assert Scorer(adapted, Tokens(), layout).layout == layout


def test_the_probe_costs_little_and_leaves_no_trace():
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER), attn_pdrop=0.5, resid_pdrop=0.5).train()
    before, state, read = snapshot(model), torch.get_rng_state(), []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    layouts = {probe(AdaptedModel(model), TOKENIZER) for _ in range(2)}
    assert layouts == {Scorer(AdaptedModel(model), Tokens()).layout}
    assert len(read) == 2 * 6
    assert sum(read) < 2 * 100, "tokens"
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(model, before)


def test_numbers_that_are_not_finite_say_nothing_of_padding():
    model = tiny_model(vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    assert probe(AdaptedModel(model), TOKENIZER) == Scorer(AdaptedModel(model), Tokens()).layout


def test_a_model_of_few_positions_is_probed_within_them():
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER), n_positions=6)
    assert probe(AdaptedModel(model), TOKENIZER).side == "left"


@pytest.mark.parametrize("options", [(2, 1, 4), (1, 1)], ids=["more tokens", "one token"])
@pytest.mark.parametrize("kind", ["none", "prompt"])
def test_rows_that_would_rotate_each_other_are_read_apart(kind, options):
    """LongRoPE has other frequencies for all rows of a batch whose longest is beyond the original length."""
    model = random_model("phi3", **ROTATES_BY_LENGTH)
    adapted, examples = AdaptedModel(model, adapter_config(kind, model)), rows(options=options)
    layout = probe(adapted, TOKENIZER)
    require_exact(adapted, layout if kind == "none" else Layout("right"), examples)
    scorer = Scorer(adapted, Tokens(), layout)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    sums(scorer, rows((3, 7, 5), options), 3)
    assert len(calls) == (1 if kind == "none" else 3 * (1 if options == (1, 1) else 3)), "short rows share a forward"
    scorer._max_shared = UNLIMITED
    wrong = sums(scorer, examples, 4) - expected(adapted.model, examples)
    assert kind != "none" or wrong.abs().max() > 100 * CLOSE["atol"], "rotations would be seen"


def test_rows_apart_have_the_gradient_of_rows_together():
    made, gradients = AdaptedModel(tiny_model(vocab_size=len(TOKENIZER))), []
    weight = made.base.get_input_embeddings().weight.requires_grad_()
    scorer, examples = Scorer(made, Tokens(), Layout("left")), rows()
    for width in (UNLIMITED, 0):
        scorer._max_shared = width
        scorer.loss(collate(examples, "options", PAD, scorer.layout)).backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, **CLOSE)


@torch.no_grad()
def greedy(model, prompt, count):
    """The most probable next tokens, by one whole forward for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["bart", "rwkv", "llama"])
def test_generated_text_is_that_of_each_row_alone(family, monkeypatch):
    """`generate` pads on the left, whatever the model makes of it."""
    model = (
        tiny_model(vocab_size=len(TOKENIZER)) if family == "llama" else random_model(family, **IGNORE_PADDING[family])
    )
    adapted = AdaptedModel(model)
    scorer, sizes = Scorer(adapted, Tokens(), probe(adapted, TOKENIZER)), []
    generate = type(model).generate

    def spy(self, **given):
        sizes.append(len(given["input_ids"]))
        return generate(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    answers = Evaluator(scorer, TOKENIZER, ["exact_match"], "lm", 4).answers(rows())
    assert sizes == ([4] if family == "llama" else [1] * 4)
    for text, row in zip([answer.text for answer in answers], rows(), strict=True):
        assert text
        assert greedy(model, row.prompt, 60).strip().startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
