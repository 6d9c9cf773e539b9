"""Every way to score equals a plain scorer that reads one candidate in one forward."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorer import MULTI, PAD, PROMPTS, SINGLE, TOKENIZER, WIDE, adapted, plain_log_probabilities, pytestmark  # noqa: F401

from zofo.commands.eval import Manner, eval_config, settings_of
from zofo.errors import ZofoError
from zofo.scoring.batch import Layout, collate
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import tokenize
from zofo.tasks.prompts import as_channel, behind_premise
from zofo.tasks.records import Record

SUFFIX = " and i would see it again"


@torch.no_grad()
def totals(made, rows):
    scorer = Scorer(made, Tokens())
    return scorer.option_totals(collate(rows, "options", PAD, scorer.layout))


def plain_totals(model, record, scored=None):
    """The log-probability of each option (with its suffix), from text; of its last `scored(option)` tokens only."""
    start = TOKENIZER(record.prompt)["input_ids"] if record.prompt else [TOKENIZER.bos_token_id]
    totals = []
    for option in record.options:
        whole = TOKENIZER(record.prompt + option + record.suffix)["input_ids"]
        whole = whole if record.prompt else start + whole
        assert whole[: len(start)] == start
        parts = plain_log_probabilities(model, tuple(start), tuple(whole[len(start) :]))
        totals.append(float((parts[-scored(option) :] if scored else parts).sum()))
    return torch.tensor(totals)


def of(record, completion=None):
    return dataclasses.replace(record, completion=completion or record.options[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("beside", [False, True], ids=["apart", "side by side"])
@pytest.mark.parametrize("partial", [False, True], ids=["with the option", "the suffix alone"])
def test_a_suffix_is_scored_as_in_one_forward_for_each_candidate(family, beside, partial):
    made = adapted(family, **WIDE.get(family, {}))
    records = [Record(p, MULTI[0], MULTI, suffix=SUFFIX, partial=partial) for p in PROMPTS]
    rows, _ = tokenize(records, TOKENIZER, 128)
    suffix = len(TOKENIZER(SUFFIX)["input_ids"])
    expected = torch.stack([plain_totals(made.model, r, (lambda _: suffix) if partial else None) for r in records])
    scorer = Scorer(made, Tokens())
    batch = collate(rows, "options", PAD, scorer.layout if beside else Layout())
    assert ("segments" in batch) == beside
    with torch.no_grad():
        found = scorer.option_totals(batch)
    torch.testing.assert_close(found.sums, expected, rtol=1e-4, atol=1e-4)
    sizes = [suffix + (0 if partial else len(TOKENIZER(option)["input_ids"])) for option in MULTI]
    assert found.counts.tolist() == [sizes] * len(records)


def test_partial_scores_are_trained_on_too():
    made = adapted()
    rows, _ = tokenize([Record("the", " a", SINGLE, suffix=SUFFIX, partial=True)], TOKENIZER, 128)
    scorer = Scorer(made, Tokens())
    batch = collate(rows, "options", PAD)
    with torch.no_grad():
        means = scorer.option_totals(batch).means
        assert float(scorer.loss(batch)) == pytest.approx(float(-means.log_softmax(1)[0, 0]), abs=1e-5)


@pytest.mark.parametrize("options", [SINGLE, MULTI], ids=["one token", "more tokens"])
def test_sums_and_calibrated_scores_choose_what_a_plain_scorer_chooses(options):
    made = adapted()
    records = [
        Record(p, option, tuple(options), premise=premise)
        for p in PROMPTS
        for option in options
        for premise in ("it was", "")
    ]
    rows, premises = (tokenize(r, TOKENIZER, 128)[0] for r in (records, [behind_premise(r) for r in records]))
    expected = {"sum": [plain_totals(made.model, r) for r in records]}
    expected["pmi"] = [
        own - plain_totals(made.model, behind_premise(r)) for own, r in zip(expected["sum"], records, strict=True)
    ]
    for scoring, scores in expected.items():
        evaluator = Evaluator(Scorer(made, Tokens()), TOKENIZER, ["accuracy"], "options", 5, scoring=scoring)
        found = evaluator.evaluate(rows, premises if scoring == "pmi" else ())
        hits = [int(s.argmax()) == row.gold for s, row in zip(scores, rows, strict=True)]
        losses = [-float(s.log_softmax(0)[row.gold]) for s, row in zip(scores, rows, strict=True)]
        assert found["accuracy"] == sum(hits) / len(rows)
        assert found["loss"] == pytest.approx(sum(losses) / len(rows), abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channel_scores_are_those_of_the_prompt_behind_each_option(family):
    made = adapted(family)
    records = [as_channel(Record(p, MULTI[0], MULTI)) for p in PROMPTS]
    rows, _ = tokenize(records, TOKENIZER, 128)
    for row, record, prompt in zip(rows, records, PROMPTS, strict=True):
        expected = plain_totals(made.model, record, lambda _, prompt=prompt: len(TOKENIZER(prompt)["input_ids"]))
        found = totals(made, [row]).sums[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_of_several_right_options_is_right():
    made = adapted()
    records = [Record(PROMPTS[0], " bad", MULTI, references=(" bad", option)) for option in MULTI]
    rows, _ = tokenize(records, TOKENIZER, 128)
    best = int(plain_mean(made.model, records[0]).argmax())
    found = Evaluator(Scorer(made, Tokens()), TOKENIZER, ["accuracy"], "options", batch_size=2).evaluate(rows)
    assert found["accuracy"] == sum(MULTI[best] in r.references for r in records) / 3


def plain_mean(model, record):
    sizes = torch.tensor([len(TOKENIZER(option)["input_ids"]) for option in record.options])
    return plain_totals(model, record) / sizes


MODEL = adapted("gpt2")
TEXTS = st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(TEXTS, st.integers(1, 6), st.randoms(use_true_random=False), st.booleans())
def test_batch_size_and_order_change_no_score(prompts, batch_size, random, partial):
    records = [Record(f"{p} {i}", MULTI[0], MULTI, suffix=SUFFIX, partial=partial) for i, p in enumerate(prompts)]
    rows, _ = tokenize(records, TOKENIZER, 128)
    alone = [totals(MODEL, [row]).sums[0] for row in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        found = totals(MODEL, [rows[i] for i in numbers]).sums
        for i, own in zip(numbers, found, strict=True):
            torch.testing.assert_close(own, alone[i], rtol=0, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(TEXTS, st.sampled_from([torch.int64, torch.int32, torch.bool]))
def test_the_padding_side_and_the_dtype_of_the_mask_change_no_score(prompts, dtype):
    rows, _ = tokenize([Record(f"{p} {i}", MULTI[0], MULTI) for i, p in enumerate(prompts)], TOKENIZER, 128)
    found = []
    for side in ("left", "right"):
        batch = collate(rows, "options", PAD, Layout(side))
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        with torch.no_grad():
            found.append(Scorer(MODEL, Tokens()).option_totals(batch))
    torch.testing.assert_close(found[0].sums, found[1].sums, rtol=0, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=10).filter(str.strip), st.integers(16, 200))
def test_truncation_keeps_the_answer_and_the_suffix(prompt, option, room):
    options = (f" {option}", f" not {option}")
    record = Record(f"x {prompt}", options[0], options, suffix=" end", partial=True)
    whole = tokenize([record], TOKENIZER, 10_000)[0][0]
    if whole.length - len(whole.prompt) >= room:
        return
    (short,), _ = tokenize([record], TOKENIZER, room)
    assert short.length <= room
    assert (short.answers, short.unscored) == (whole.answers, whole.unscored)
    assert whole.prompt[len(whole.prompt) - len(short.prompt) :] == short.prompt
    batch = collate([short], "lm", PAD)
    assert batch["scored"].shape[1] == len(short.answers[0]) - short.unscored[0] > 0


USUAL = {
    "train_size": None, "test_size": None, "dev_size": None, "data_seed": 42, "max_length": 512, "loss": "options",
    "dtype": "float32", "template": "0", "shots": 0, "scoring": "mean", "source": None, "chat_template": False,
    "system_prompt": None,
}  # fmt: skip


def test_a_run_is_found_by_its_backbone_or_by_its_adapter(tmp_path, monkeypatch):
    """The backbone of a run on quantised weights lies elsewhere; its held-out rows are still the run's."""
    run = tmp_path / "run"
    for part in ("backbone", "upper"):
        (run / part).mkdir(parents=True)
    (run / "config.yaml").write_text("method: zo\ntask: movie_reviews\ndata_seed: 7\ntest_size: 50\ntrain_size: 9\n")
    for model, adapter in ((str(run / "backbone"), None), ("owner/model", str(run / "upper"))):
        found = eval_config(model, "movie_reviews", adapter=adapter)
        assert (found.data_seed, found.test_size, found.train_size) == (7, 50, 9)
        assert settings_of(eval_config(model, "tweets", adapter=adapter), Manner()) == USUAL
        other = eval_config(model, "movie_reviews", ["--test_size", "60"], adapter)
        assert (other.data_seed, other.test_size, other.train_size) == (7, 60, None)
    (run / "checkpoint-20" / "backbone").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(run / "checkpoint-20" / "backbone"), "~/run/backbone", "~/run/checkpoint-20/backbone"):
        assert eval_config(path, "movie_reviews").test_size == 50
    monkeypatch.chdir(run / "backbone")
    assert eval_config(".", "movie_reviews").test_size == 50
    assert eval_config("owner/model", "movie_reviews").data_seed == 42


def test_task_files_of_one_name_are_told_apart(tmp_path):
    for name in ("mine", "other", "run/backbone"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "task.yaml").write_text(f"# {name}")
    own, other = (str(tmp_path / name / "task.yaml") for name in ("mine", "other"))
    (tmp_path / "run" / "config.yaml").write_text(f"method: zo\ntask: {own}\ntest_size: 50\n")
    model = str(tmp_path / "run" / "backbone")
    assert [eval_config(model, task).test_size for task in (own, other)] == [50, None]
    (tmp_path / "other" / "task.yaml").write_text("# mine")  # a copy
    assert eval_config(model, other).test_size == 50
    (tmp_path / "other" / "task.yaml").write_text("# other")
    (tmp_path / "mine" / "task.yaml").unlink()  # moved: the name decides
    assert eval_config(model, other).test_size == 50


@pytest.mark.parametrize("content", ["", "- a", "test_size: 3\n"])
def test_a_config_of_something_else_is_no_run(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    Path("model").mkdir()
    for model in ("gpt2", "model.gguf", "model"):
        assert settings_of(eval_config(model, "movie_reviews"), Manner()) == USUAL


def test_a_run_whose_configuration_is_broken_is_not_evaluated_on_other_rows(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "config.yaml").write_text("task: [")
    with pytest.raises(ZofoError, match=r"config\.yaml, the configuration of the run, is no valid YAML"):
        eval_config(str(tmp_path / "backbone"), "movie_reviews")
