"""Losses and scores of batches equal those of one plain forward for each candidate, for every family and adapter."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, RobertaConfig

from tiny import ALL_FAMILIES, FAMILIES, tiny_model, tiny_tokenizer
from zofo.errors import ZofoError
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.peft import UPPER
from zofo.scoring import evaluation
from zofo.scoring.batch import Layout, collate, share
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.scorer import Scorer, Tokens, count
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.task import Record

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # peft, of its prefixes
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning"),  # peft's generate
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # peft's generate
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's layout
]

TOKENIZER = tiny_tokenizer()
PAD = TOKENIZER.pad_token_id
PROMPTS = (
    "the film was",
    "i would see it again; the story was long but the cast of the film was the best of all",
    "music",
    "never again: it broke",
)
SINGLE = (" a", " it", " the")
MULTI = (" great film", " bad", " it was terrible")
WIDE = {"gemma2": {"sliding_window": 128}}  # a window that these rows fit into
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def adapted(family="llama", kind="none", **config):
    """A tiny model with an adapter whose values are large enough to matter."""
    model = tiny_model(family, vocab_size=len(TOKENIZER), **config)
    made = AdaptedModel(model, adapter_config(kind, model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.adapter_parameters(UPPER).values() if made.adapters else ():
            parameter.normal_(0, 0.5, generator=generator)
    made.model.eval()
    return made


def examples(options, prompts=PROMPTS, gold=0):
    return tokenize([Record(p, options[gold], tuple(options)) for p in prompts], TOKENIZER, 128)[0]


def ragged(first, second):
    """Rows with different numbers of options."""
    records = [Record(p, o[0], o) for p, o in zip(PROMPTS, (first[:2], first, second[:2], second), strict=True)]
    return tokenize(records, TOKENIZER, 128)[0]


@torch.no_grad()
def plain_log_probabilities(model, prompt, answer):
    """The log-probability of each answer token: one text, one forward, nothing padded, all logits."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :].double()
    predicting = logits[len(prompt) - 1 : -1]
    return predicting.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def plain_scores(model, example, width=0):
    scores = [float(plain_log_probabilities(model, example.prompt, a).mean()) for a in example.answers]
    return scores + [-math.inf] * (width - len(scores))


@torch.no_grad()
def scores(made, rows):
    scorer = Scorer(made, Tokens())
    return scorer.option_totals(collate(rows, "options", PAD, scorer.layout)).means


@pytest.mark.parametrize(
    ("family", "options"), [*((family, MULTI) for family in FAMILIES), ("llama", SINGLE), ("gpt2", SINGLE)]
)
@pytest.mark.parametrize("kind", ["none", "lora", "prefix", "prompt"])
def test_a_batch_scores_options_as_one_forward_for_each_candidate(family, kind, options):
    made = adapted(family, kind)
    rows = examples(options)
    assert {len(a) for a in rows[0].answers} == ({1} if options is SINGLE else {6, 3, 5})
    expected = torch.tensor([plain_scores(made.model, row) for row in rows])
    scorer = Scorer(made, Tokens())
    batch = collate(rows, "options", PAD, Layout(scorer.layout.side))
    assert len(batch["input_ids"]) == len(rows) * (1 if options is SINGLE else 3)
    with torch.no_grad():
        torch.testing.assert_close(scorer.option_totals(batch).means, expected, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "attention"), [("none", {}), ("none", {"attn_implementation": "eager"}), ("lora", {})]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_side_by_side_score_as_one_forward_for_each_candidate(family, kind, attention):
    made = adapted(family, kind, **attention, **WIDE.get(family, {}))
    scorer, rows = Scorer(made, Tokens()), ragged(MULTI, SINGLE)
    batch = collate(rows, "options", PAD, scorer.layout)
    assert batch["segments"].shape[0] == len(rows)
    with torch.no_grad():
        found = scorer.option_totals(batch).means
    expected = torch.tensor([plain_scores(made.model, row, width=3) for row in rows])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert scorer.tokens.forward_tokens == sum(len(e.prompt) + sum(len(a) - 1 for a in e.answers) for e in rows)


def test_options_side_by_side_have_the_gradient_of_options_apart():
    made = adapted("llama", "lora")
    rows, scorer, gradients = ragged(MULTI, SINGLE), Scorer(made, Tokens()), []
    for layout in (scorer.layout, Layout()):
        scorer.loss(collate(rows, "options", PAD, layout)).backward()
        gradients.append([p.grad.clone() for p in made.adapter_parameters(UPPER).values()])
        made.model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


ROOM = {
    **{"gemma2": 16, "mistral": 8, "gemma3_text": 8},  # their windows
    **{"lfm2": 0, "mamba": 0},  # a convolution reads across options
    **{"bloom": 0, "falcon": 0, "stablelm": 0},  # they make their masks themselves
}


@pytest.mark.parametrize(
    ("family", "kind", "room"),
    [
        *((family, "none", ROOM.get(family, 128)) for family in ALL_FAMILIES),
        ("llama", "lora", 128),
        ("llama", "prefix", 0),
    ],
)
def test_options_are_side_by_side_where_a_mask_alone_keeps_them_apart(family, kind, room):
    made = adapted(family, kind)
    scorer = Scorer(made, Tokens())
    assert scorer.layout.max_width == room
    rows = examples([" great film" * 4, " it was", " the"], PROMPTS[:2])
    found = scorer.option_totals(collate(rows, "options", PAD, scorer.layout)).means
    for row, example in zip(found, rows, strict=True):
        torch.testing.assert_close(row, torch.tensor(plain_scores(made.model, example)), **CLOSE)


def test_a_row_wider_than_the_window_keeps_its_window_beside_options_in_one_row():
    made = adapted("gemma2")
    scorer, wide = Scorer(made, Tokens()), (" great film was the best of all" * 2, " it")
    groups = [examples(MULTI, PROMPTS[2:3]), examples(wide, PROMPTS[1:2])]
    batches = [collate(group, "options", PAD, scorer.layout) for group in groups]
    assert ["segments" in batch for batch in batches] == [True, False]
    with torch.no_grad():
        found = scorer.losses(batches, [UPPER] * 2)
    for loss, (example,) in zip(found, groups, strict=True):
        expected = -torch.tensor(plain_scores(made.model, example)).log_softmax(0)[example.gold]
        torch.testing.assert_close(loss, expected, **CLOSE)


def test_options_side_by_side_are_read_right_in_16_bits():
    made = adapted("gemma2", **WIDE["gemma2"])
    made.base.to(torch.bfloat16)
    scorer, rows = Scorer(made, Tokens()), ragged(MULTI, SINGLE)
    with torch.no_grad():
        beside, apart = (
            scorer.option_totals(collate(rows, "options", PAD, x)).means for x in (scorer.layout, Layout())
        )
    torch.testing.assert_close(beside, apart, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_positions_that_begin_behind_the_padding_are_found_by_the_model(options):
    config = RobertaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, is_decoder=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    made = AdaptedModel(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        made.base.get_parameter("roberta.embeddings.position_embeddings.weight").normal_()
    rows = examples(options)
    assert Scorer(made, Tokens()).layout.max_width == 0
    expected = torch.tensor([plain_scores(made.model, row) for row in rows])
    torch.testing.assert_close(scores(made, rows), expected, **CLOSE)


def test_experts_that_are_balanced_take_a_mask_of_two_dimensions():
    made = adapted("qwen3_moe", output_router_logits=True)
    assert Scorer(made, Tokens()).layout.max_width == 0
    scores(made, examples(MULTI))


def test_other_kinds_of_attention_take_no_such_mask():
    made = adapted()
    made.base.config._attn_implementation = "flash_attention_2"
    assert Scorer(made, Tokens()).layout.max_width == 0


def test_a_choice_needs_options_to_choose_from():
    made = adapted()
    alone, _ = tokenize([Record("the film was", " great")], TOKENIZER, 128)
    one, _ = tokenize([Record("the film was", " great", (" great",))], TOKENIZER, 128)
    for bad in (alone, one):
        with pytest.raises(
            ZofoError, match=r"accuracy needs options to choose from, but the row with the answer .*set loss to lm"
        ):
            evaluated(made, [*examples(MULTI), *bad], "accuracy", "lm")


def test_few_tokens_of_answers_are_scored_at_a_time(monkeypatch):
    """Each of them has logits over the whole vocabulary."""
    made, read = adapted(), []
    rows = examples(MULTI)
    of_one = sum(len(answer) - 1 for answer in rows[0].answers)
    expected = evaluated(made, rows, "accuracy", "options", 4)
    made.base.register_forward_pre_hook(lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True)
    for most, sizes in ((4 * of_one, [4]), (3 * of_one, [2, 2]), (of_one - 1, [1, 1, 1, 1])):
        monkeypatch.setattr(evaluation, "_ANSWER_TOKENS", most)
        read.clear()
        assert evaluated(made, rows, "accuracy", "options", 4) == pytest.approx(expected, abs=1e-4)
        assert read == sizes


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_changes_the_scores(family, kind):
    made = adapted(family, kind)
    with_adapter = scores(made, examples(SINGLE))
    with made.without_adapter():
        assert (scores(made, examples(SINGLE)) - with_adapter).abs().max() > 10 * CLOSE["atol"]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_padding_on_the_other_side_would_be_seen(kind):
    """The tolerance of these tests is far below what wrong positions do."""
    made = adapted("gpt2", kind)
    rows = examples(SINGLE)
    with torch.no_grad():
        wrong = Scorer(made, Tokens()).option_totals(collate(rows, "options", PAD, Layout("left"))).means
    expected = torch.tensor([plain_scores(made.model, row) for row in rows])
    assert (wrong - expected).abs().max() > 10 * CLOSE["atol"]


@pytest.mark.parametrize("kind", ["none", "prompt"])
@pytest.mark.parametrize(("first", "second"), [(SINGLE, SINGLE), (MULTI, SINGLE)])
def test_rows_with_fewer_options_score_minus_infinity_for_the_missing_ones(kind, first, second):
    made = adapted("llama", kind)
    rows = ragged(first, second)
    expected = torch.tensor([plain_scores(made.model, row, width=3) for row in rows])
    torch.testing.assert_close(scores(made, rows), expected, **CLOSE)


@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_missing_options_leave_loss_and_gradient_finite(options):
    made = adapted("llama", "lora")
    rows = ragged(options, options)
    batch = collate(rows, "options", PAD)
    loss = Scorer(made, Tokens()).loss(batch)
    wanted = [torch.tensor(plain_scores(made.model, row)).log_softmax(0)[row.gold] for row in rows]
    torch.testing.assert_close(loss, -torch.stack(wanted).sum(), **CLOSE)
    loss.backward()
    gradients = [p.grad for p in made.adapter_parameters(UPPER).values()]
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lm_loss_is_that_of_hugging_faces_labels(family):
    made = adapted(family)
    (row,) = tokenize([Record(PROMPTS[1], " it was great", ())], TOKENIZER, 128)[0]
    ids = torch.tensor([row.prompt + row.answers[0]])
    labels = ids.clone()
    labels[:, : len(row.prompt)] = -100
    with torch.no_grad():
        theirs = made.model(input_ids=ids, labels=labels).loss
        batch = collate([row], "lm", PAD)
        ours = Scorer(made, Tokens()).loss(batch) / count(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "lora", "prefix", "prompt"])
def test_the_lm_loss_of_a_batch_is_the_sum_over_the_answers_tokens(kind):
    made = adapted("llama", kind)
    records = [Record(p, a, ()) for p, a in zip(PROMPTS, (" great", " it was a dull evening", " a", " b"), strict=True)]
    rows = tokenize(records, TOKENIZER, 128)[0]
    scorer = Scorer(made, Tokens())
    batch = collate(rows, "lm", PAD, scorer.layout)
    parts = torch.cat([plain_log_probabilities(made.model, row.prompt, row.answers[0]) for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(scorer.loss(batch), -parts.sum().float(), **CLOSE)
    assert count(batch) == len(parts) == sum(len(row.answers[0]) for row in rows)


@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_a_loss_over_options_counts_examples(options):
    assert count(collate(examples(options), "options", PAD)) == len(PROMPTS)


class Spy:
    """Records the arguments and the logits of every forward."""

    def __init__(self, model):
        self.calls = []
        self.shapes = []
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs, output):
        self.calls.append(kwargs)
        self.shapes.append(tuple(output.logits.shape))


@pytest.mark.parametrize("kind", ["none", "lora", "prefix"])  # padded left, left and right
@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_losses_of_batches_in_one_forward_are_those_of_one_forward_each(kind, options):
    made = adapted(kind=kind)
    scorer = Scorer(made, Tokens())
    groups = [(examples(options, PROMPTS[:1]), "options"), (examples(options), "options"), (examples(options), "lm")]
    batches = [collate(group, loss, PAD, scorer.layout) for group, loss in groups]
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
    alone = [scorer.loss(batch) for batch in batches]
    counted, scorer.tokens = scorer.tokens.forward_tokens, Tokens()
    made.model.eval()
    torch.testing.assert_close(torch.stack(scorer.losses(batches, [UPPER] * 3)), torch.stack(alone), **CLOSE)
    assert scorer.tokens.forward_tokens == counted


@pytest.mark.parametrize("layout", [Layout("left"), Layout("right"), Layout("left", 100)])
@pytest.mark.parametrize(("first", "second", "loss"), [(SINGLE, SINGLE, "options"), (SINGLE, MULTI, "options"),
                                                       (MULTI, MULTI, "options"), (MULTI, MULTI, "lm")])  # fmt: skip
def test_the_parts_of_a_batch_have_the_losses_of_their_examples(first, second, loss, layout):
    made, rows = adapted(), ragged(first, second)
    scorer = Scorer(made, Tokens(), layout)
    batch = collate(rows, loss, PAD, layout)
    assert share(batch, 0, 1) is batch
    for parts in (2, 3, 4):
        low = 0
        for number in range(parts):
            part, high = share(batch, number, parts), len(rows) * (number + 1) // parts
            alone = collate(rows[low:high], loss, PAD, layout)
            assert count(part) == count(alone)
            torch.testing.assert_close(scorer.loss(part), scorer.loss(alone), **CLOSE)
            low = high
        assert low == len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_logits_that_predict_answers_are_computed(family):
    made = adapted(family, **WIDE.get(family, {}))
    spy = Spy(made.base)
    rows = examples(SINGLE)
    contiguous: list[bool] = []
    head = made.base.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: contiguous.append(given[0].is_contiguous()))
    scores(made, rows)
    scores(made, examples(MULTI))
    last = 1 + sum(len(answer) - 1 for answer in examples(MULTI)[0].answers)
    assert [call["logits_to_keep"].tolist() for call in spy.calls] == [[-1], [*range(-last, 0)]]
    assert contiguous == [True, True], "torch reads the whole head for each row of what is not contiguous"
    assert spy.shapes == [(len(rows), 1, len(TOKENIZER)), (len(rows), last, len(TOKENIZER))]
    assert not any(call["use_cache"] for call in spy.calls)


def test_options_of_one_token_take_one_forward_of_one_row_each_and_tokens_are_counted():
    made = adapted()
    spy = Spy(made.base)
    rows = examples(SINGLE)
    tokens = Tokens()
    with torch.no_grad():
        Scorer(made, tokens).loss(collate(rows, "options", PAD))
    assert [call["input_ids"].shape[0] for call in spy.calls] == [len(rows)]
    assert (tokens.forward_tokens, tokens.backward_tokens) == (sum(len(row.prompt) for row in rows), 0)


def test_losses_are_float32_whatever_the_weights_are():
    made = adapted()
    made.model.to(torch.bfloat16)
    batch = collate(examples(MULTI), "options", PAD)
    with torch.no_grad():
        assert Scorer(made, Tokens()).loss(batch).dtype == torch.float32


def evaluated(made, rows, metric, kind, batch_size=2):
    return Evaluator(Scorer(made, Tokens()), TOKENIZER, [metric], kind, batch_size).evaluate(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_evaluation_equals_a_count_by_hand_in_any_batch_size(options, batch_size):
    made = adapted("llama", "lora")
    rows = [row for gold in range(3) for row in examples(options, gold=gold)]
    by_hand = [torch.tensor(plain_scores(made.model, row)) for row in rows]
    hits = [int(s.argmax()) == row.gold for s, row in zip(by_hand, rows, strict=True)]
    losses = [-float(s.log_softmax(0)[row.gold]) for s, row in zip(by_hand, rows, strict=True)]
    found = evaluated(made, rows, "accuracy", "options", batch_size)
    assert found == {
        "accuracy": sum(hits) / len(rows),
        "loss": pytest.approx(sum(losses) / len(rows), abs=1e-4),
        "rows": len(rows),
    }
    assert 0 < sum(hits) < len(rows)


def test_evaluation_keeps_each_prediction_with_its_row(monkeypatch):
    """Rows are sorted by length for the forwards; the metric must see them in their own order again."""
    seen = {}
    monkeypatch.setattr(evaluation, "score", lambda _, said, right, **rest: seen.update(said=said, right=right) or 0.0)
    made = adapted()
    rows = [row for gold in range(3) for row in examples(SINGLE, gold=gold)]
    evaluated(made, rows, "macro_f1", "options")
    best = [SINGLE[max(range(3), key=plain_scores(made.model, row).__getitem__)] for row in rows]
    assert seen["said"] == best
    assert [right[0] for right in seen["right"]] == [row.texts[row.gold] for row in rows]


def test_with_an_lm_loss_options_are_still_chosen_by_their_scores():
    made = adapted()
    rows = [row for gold in range(3) for row in examples(MULTI, gold=gold)]
    found = evaluated(made, rows, "accuracy", "lm")
    assert found["accuracy"] == evaluated(made, rows, "accuracy", "options")["accuracy"]
    parts = torch.cat([plain_log_probabilities(made.model, row.prompt, row.answers[row.gold]) for row in rows])
    assert found["loss"] == pytest.approx(float(-parts.mean()), abs=1e-4)


def test_evaluation_is_in_eval_mode_and_without_gradients():
    made = adapted("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    made.model.train()
    rows = examples(SINGLE)
    first, second = (evaluated(made, rows, "accuracy", "options") for _ in range(2))
    assert first == second
    assert all(p.grad is None for p in made.model.parameters())


@torch.no_grad()
def plain_greedy_text(model, prompt):
    """Greedy decoding with one whole forward for each token, up to 50 tokens, the end token or a line break."""
    said = []
    ends = [i for i in range(len(TOKENIZER)) if i == TOKENIZER.eos_token_id or "\n" in TOKENIZER.decode([i])]
    while len(said) < 50 and not (said and said[-1] in ends):
        ids = torch.tensor([[*prompt, *said]])
        said.append(int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
    return TOKENIZER.decode(said, skip_special_tokens=True).split("\n")[0].strip()


def generated(made, rows, monkeypatch):
    """What evaluation takes for the model's answers."""
    seen = []
    monkeypatch.setattr(evaluation, "score", lambda metric, said, right, **_: seen.extend(said) or 0.0)
    evaluated(made, rows, "exact_match", "lm", batch_size=4)
    return seen


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_behind_virtual_tokens_is_refused(kind):
    made = adapted("llama", kind)
    rows = tokenize([Record(p, " great", ()) for p in PROMPTS], TOKENIZER, 90)[0]
    with pytest.raises(ZofoError, match="exact_match needs generated text"):
        evaluated(made, rows, "exact_match", "lm")


@pytest.mark.parametrize("kind", ["none", "lora"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])
def test_generation_says_the_greedy_text_of_each_row_alone(monkeypatch, family, kind):
    made = adapted(family, kind)
    rows = tokenize([Record(p, " great", ()) for p in PROMPTS], TOKENIZER, 90)[0]
    alone = [plain_greedy_text(made.model, row.prompt) for row in rows]
    assert generated(made, rows, monkeypatch) == alone
    assert all(alone)


def test_generation_is_that_of_generate():
    made = adapted()
    (row,) = tokenize([Record(PROMPTS[0], " great", ())], TOKENIZER, 90)[0]
    ids = torch.tensor([row.prompt])
    output = made.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
    text = TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
    right = Example(row.prompt, row.answers, 0, (text,))
    assert evaluated(made, [right], "exact_match", "lm")["exact_match"] == 1.0
    assert evaluated(made, [row], "exact_match", "lm")["exact_match"] == 0.0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_generation_ends_where_the_models_positions_end(family):
    """A prompt and its answer may fill all positions; 50 new tokens would then be more than fit."""
    made = adapted(family)
    rows = tokenize([Record("the film was " * 60, " great", ())], TOKENIZER, made.positions)[0]
    assert rows[0].length == made.positions == 128
    assert evaluated(made, rows, "exact_match", "lm")["rows"] == 1


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_only_the_metric_that_decides_needs_options(kind):
    made, rows = adapted("llama", kind), tokenize([Record(PROMPTS[0], " great")], TOKENIZER, 128)[0]
    evaluator = Evaluator(Scorer(made, Tokens()), TOKENIZER, ["exact_match", "accuracy"], "lm", batch_size=1)
    found = evaluator.evaluate(rows)
    assert found["accuracy"] == found["exact_match"]


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_generation_is_greedy_whatever_the_model_s_own_file_wants(kind):
    made = adapted("llama", kind)
    rows = tokenize([Record(p, " great") for p in PROMPTS], TOKENIZER, 128)[0]
    evaluator = Evaluator(Scorer(made, Tokens()), TOKENIZER, ["exact_match"], "lm", batch_size=2)
    texts = [answer.text for answer in evaluator.answers(rows)]
    own = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3, suppress_tokens=[5, 6, 7])
    made.base.generation_config = own
    assert [answer.text for answer in evaluator.answers(rows)] == texts
    assert made.base.generation_config is own


def test_options_without_a_loss_over_them_are_refused():
    row = Example((5, 6), ((7,),), 0, ("x",))
    with pytest.raises(ZofoError, match="set loss to lm"):
        evaluated(adapted(), [row], "accuracy", "options")
