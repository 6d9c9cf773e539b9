"""Objectives without a gradient: what zeroth-order steps descend in place of the loss, against forwards by hand."""

import itertools
import logging

import numpy as np
import pytest
import torch

from plain import (
    MORE_TOKENS,
    at,
    make_rows,
    make_trainer,
    micro_steps,
    plain_loss,
    same_run,
    weights,
    whole_and_resumed,
)
from tiny import FAMILIES
from zofo import ZofoError, direction
from zofo.errors import NonFiniteLossError
from zofo.zo.optimizers import JointOptimizer

EPS = 0.25  # so far that answers of a random model change
LETTERS = "aeiou"


def vowels(prompts, completions, **columns):
    """A number that differs between most texts."""
    return [sum(letter in LETTERS for letter in text) / (1 + len(text)) for text in completions]


def rows_of(count, first=0):
    return [{"prompt": row["prompt"], "kind": i % 2} for i, row in enumerate(make_rows(count, first))]


def stepped(folder, train=None, **keys):
    """(trainer, bundles, logs of a step, estimate): nothing is updated but s."""
    given = {"zo_learning_rate": 1e-3, "zo_eps": EPS, "per_device_train_batch_size": 4, "max_steps": 3}
    trainer = make_trainer(folder, train, **{**given, **keys})
    bundles = list(itertools.islice(micro_steps(trainer), trainer.args.gradient_accumulation_steps))
    logs = trainer.method.step(0, 0.0, bundles)
    return trainer, bundles, logs, zeroth(trainer).estimate


def zeroth(trainer):
    optimizer = trainer.method.optimizer
    return optimizer.members["zo"] if isinstance(optimizer, JointOptimizer) else optimizer


def moved(trainer, query, scale, evaluate, rank=0):
    """A value at θ + scale·z, with θ written over and put back."""
    theta = zeroth(trainer).param_groups[0]
    named = dict(zip(theta["param_names"], theta["params"], strict=True))
    return at(named, direction(named, trainer.args.seed, 0, query, rank=rank), scale, evaluate)


@torch.no_grad()
def chosen(model, example):
    """The option with the highest mean log-probability, by a forward for each option of one row, without padding."""
    scores = []
    for answer in example.answers:
        ids = torch.tensor([[*example.prompt, *answer]])
        found = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(len(example.prompt) - 1, ids.shape[1] - 1)
        scores.append(np.mean([float(found[place, ids[0, place + 1]]) for place in places]))
    return int(np.argmax(scores))


@torch.no_grad()
def greedy(model, tokenizer, example, tokens):
    """The greedy text of one row, without a cache or padding."""
    ids = torch.tensor([[*example.prompt]])
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, len(example.prompt) :], skip_special_tokens=True)


def metric_by_hand(name, predicted, gold):
    predicted, gold = np.array(predicted), np.array(gold)
    if name == "accuracy":
        return float((predicted == gold).mean())
    f1 = {}
    for c in {*predicted, *gold}:
        right, wrong = ((predicted == c) & (gold == c)).sum(), ((predicted == c) != (gold == c)).sum()
        f1[c] = float(2 * right / (2 * right + wrong))
    return f1.get(1, 0.0) if name == "f1" else float(np.mean(list(f1.values())))


def examples_of(bundles, stream):
    return [example for bundle in bundles for batch in bundle[stream] for example in batch["examples"]]


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1"])
def test_a_step_descends_minus_the_metric_of_all_its_rows(tmp_path, metric, estimator):
    keys = {"num_perturbations": 3, "gradient_accumulation_steps": 2, "objective": metric, "zo_estimator": estimator}
    rows = make_rows(24, options=MORE_TOKENS)
    trainer, bundles, logs, estimate = stepped(tmp_path, rows, method="zo", adapter="none", **keys)
    examples, model = examples_of(bundles, "zo"), trainer.adapted.base
    assert len(examples) == 8

    def value():
        return -metric_by_hand(metric, [chosen(model, e) for e in examples], [e.gold for e in examples])

    ends = [(moved(trainer, q, EPS, value), moved(trainer, q, -EPS, value)) for q in range(3)]
    if estimator == "two_sided":
        expected, seen = [(up - down) / (2 * EPS) for up, down in ends], [end for pair in ends for end in pair]
    else:
        expected, seen = [(up - value()) / EPS for up, _ in ends], [value(), *(up for up, _ in ends)]
    assert any(expected)
    assert estimate.projected == pytest.approx(expected, rel=1e-4)
    assert logs["loss"] == -logs[metric] == pytest.approx(np.mean(seen))


def shaped_by_hand(values, shaping):
    """(M,) members -> (M,)"""
    if shaping == "zscore":
        return (values - values.mean()) / values.std() if values.std() else 0 * values
    order = np.sort(values)
    ranks = np.array([np.mean(np.flatnonzero(order == value)) for value in values])
    return ranks / (len(values) - 1) - 0.5


def projected_by_hand(values, shaping, over, estimator):
    """The projected gradients, of an (M, R) array of what is descended; two-sided members are pairs."""
    if over == "all":
        worth = shaped_by_hand(values.mean(1), shaping)
    else:
        worth = np.mean([shaped_by_hand(column, shaping) for column in values.T], axis=0)
    if estimator == "one_sided":
        return worth / EPS
    return (worth[0::2] - worth[1::2]) / (2 * EPS)


@pytest.mark.parametrize(  # every pair of values
    ("objective", "shaping", "over", "estimator", "distribution"),
    [
        ("reward", "zscore", "all", "two_sided", "normal"),
        ("reward", "zscore", "prompt", "two_sided", "low_rank"),
        ("reward", "centered_rank", "all", "one_sided", "normal"),
        ("reward", "centered_rank", "prompt", "one_sided", "low_rank"),
        ("loss", "zscore", "all", "one_sided", "low_rank"),
        ("loss", "zscore", "prompt", "one_sided", "normal"),
        ("loss", "centered_rank", "all", "two_sided", "low_rank"),
        ("loss", "centered_rank", "prompt", "two_sided", "normal"),
    ],
)
def test_shaped_members_are_those_of_numpy(tmp_path, objective, shaping, over, estimator, distribution):
    keys = {"num_perturbations": 3, "zo_shaping": shaping, "zo_shaping_over": over, "zo_estimator": estimator}
    train, more = make_rows(12), {}
    if objective == "reward":
        train, more = rows_of(12), {"reward_funcs": vowels, "max_new_tokens": 6, "objective": "reward"}
    keys |= {"zo_distribution": distribution, **more}
    trainer, bundles, logs, estimate = stepped(tmp_path, train, method="zo", adapter="none", **keys)
    model, tokenizer, (batch,) = trainer.adapted.base, trainer.processing_class, bundles[0]["zo"]

    def of_rows():
        if objective == "loss":
            slots = range(len(batch["gold"]))
            return [float(plain_loss(model, one_row(batch, [i]))) for i in slots]
        return [-value for value in vowels([], [greedy(model, tokenizer, e, 6) for e in examples_of(bundles, "zo")])]

    signs = (1, -1) if estimator == "two_sided" else (1,)
    values = np.array([rows_at(trainer, q, sign * EPS, of_rows, distribution) for q in range(3) for sign in signs])
    expected = projected_by_hand(values, shaping, over, estimator)
    assert np.abs(expected).max() > 0
    tolerance = 2e-2 if objective == "loss" else 1e-4  # z-scores enlarge the rounding of losses
    assert estimate.projected == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert logs["loss"] == pytest.approx(values.mean(), rel=1e-4)


def rows_at(trainer, query, scale, of_rows, distribution):
    found = []
    moved(trainer, query, scale, lambda: found.append(of_rows()) or 0.0, rank=int(distribution == "low_rank"))
    return found[0]


def one_row(batch, places):
    return {**batch, "slots": batch["slots"][places], "gold": batch["gold"][places]}


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("objective", ["accuracy", "reward"])
def test_a_bilevel_step_estimates_f_plus_lambda_g_for_theta_and_lambda_g_alone_for_p(tmp_path, objective, estimator):
    keys = {"objective": objective, "penalty": 3.0, "num_perturbations": 2, "zo_estimator": estimator}
    if objective == "reward":
        keys |= {"reward_funcs": vowels, "max_new_tokens": 6}
    rows = make_rows(24, options=MORE_TOKENS)
    trainer, (bundle,), logs, estimate = stepped(tmp_path, rows, **keys)
    adapted, (penalty,), examples = trainer.adapted, bundle["penalty"], examples_of([bundle], "upper")

    def coupling():
        return sum(sign * plain(adapted, adapter, penalty) for adapter, sign in (("upper", 1), ("lower", -1)))

    def value():
        adapted.use("upper")
        if objective == "accuracy":
            return -metric_by_hand("accuracy", [chosen(adapted.model, e) for e in examples], [e.gold for e in examples])
        texts = [greedy(adapted.model, trainer.processing_class, e, 6) for e in examples]
        return -np.mean(vowels([], texts))

    points = [(EPS, 0), (-EPS, 0), (EPS, 1), (-EPS, 1)] if estimator == "two_sided" else [(EPS, 0), (EPS, 1), (0.0, 0)]
    f, g = ([moved(trainer, q, scale, found) for scale, q in points] for found in (value, coupling))
    if objective == "reward":  # z-scores of the members, of which θ is none
        members = f if estimator == "two_sided" else f[:-1]
        f = [*shaped_by_hand(np.array(members), "zscore"), *([] if estimator == "two_sided" else [0.0])]
    whole = [(a + 3 * b) / 4 for a, b in zip(f, g, strict=True)]
    if estimator == "two_sided":
        expected = [(whole[0] - whole[1]) / (2 * EPS), (whole[2] - whole[3]) / (2 * EPS)]
    else:
        expected = [(whole[0] - whole[2]) / EPS, (whole[1] - whole[2]) / EPS]
    assert max(map(abs, f)) > 0
    assert estimate.projected == pytest.approx(expected, rel=1e-3, abs=1e-4)

    found = {name: p.grad for name, p in adapted.adapter_parameters("upper").items()}
    adapted.use("upper")
    p = adapted.adapter_parameters("upper")
    wanted = torch.autograd.grad(0.75 * plain_loss(adapted.model, penalty), list(p.values()))
    for (name, gradient), other in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7, msg=name)
    assert logs["loss"] == pytest.approx(plain(adapted, "upper", penalty), rel=1e-4)
    assert objective in logs


@torch.no_grad()
def plain(adapted, adapter, batch):
    adapted.use(adapter)
    return float(plain_loss(adapted.model, batch))


def test_an_infinite_penalty_estimates_f_of_theta_and_s_after_its_steps(tmp_path):
    keys = {"objective": "accuracy", "penalty": "infinite", "num_perturbations": 2, "lower_steps": 2}
    rows = make_rows(24, options=MORE_TOKENS)
    trainer, (bundle,), logs, estimate = stepped(tmp_path, rows, **keys)
    examples, model = examples_of([bundle], "upper"), trainer.adapted.model

    def value():
        return -metric_by_hand("accuracy", [chosen(model, e) for e in examples], [e.gold for e in examples])

    ends = [(moved(trainer, q, EPS, value), moved(trainer, q, -EPS, value)) for q in range(2)]
    expected = [(up - down) / (2 * EPS) for up, down in ends]
    assert any(expected)
    assert estimate.projected == pytest.approx(expected, rel=1e-4)
    assert logs["upper_loss"] == -logs["accuracy"] == pytest.approx(np.mean(ends))


RUNS = {
    "zo": {"method": "zo", "adapter": "none"},
    "zo on lora": {"method": "zo", "adapter": "lora"},
    "zo of low rank": {"method": "zo", "adapter": "none", "zo_distribution": "low_rank"},
    "bilevel": {},
    "bilevel, infinite": {"penalty": "infinite"},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_completions_rewards_and_weights_resumed_too(tmp_path, name):
    seen = []

    def noted(prompts, completions, **columns):
        seen.append((list(prompts), list(completions), vowels(prompts, completions)))
        return seen[-1][-1]

    keys = {"objective": "reward", "reward_funcs": noted, "max_new_tokens": 5, "num_perturbations": 2, "max_steps": 4}
    keys |= {"zo_eps": EPS, "zo_learning_rate": 0.05, **RUNS[name]}
    whole, again = whole_and_resumed(tmp_path, **keys)
    assert same_run(whole, again)
    assert not same_run(whole, make_trainer(tmp_path / "start", **keys))
    of_whole, of_again = seen[: 4 * 4], seen[4 * 4 :]
    assert of_again == of_whole[2 * 4 :], "the last two steps, of four members each"
    assert len({text for _, texts, _ in of_whole for text in texts}) > 4
    logs = [log["reward"] for log in whole.state.log_history if "reward" in log]
    assert logs == pytest.approx([np.mean([v for _, _, v in of_whole[4 * n : 4 * n + 4]]) for n in range(4)])


def test_shaped_losses_without_a_penalty_move_the_backbone(tmp_path):
    keys = {"penalty": 0.0, "zo_shaping": "zscore", "zo_learning_rate": 1e-3}
    _, _, logs, found = stepped(tmp_path, **keys)
    assert abs(found.projected[0]) == pytest.approx(1 / EPS, rel=1e-4)  # the z-scores of two members are 1 and -1
    assert "penalty_gap" not in logs


def test_a_training_row_without_options_is_refused_before_any_step(tmp_path):
    rows = [*make_rows(8), {"prompt": "the film was", "completion": " a"}]
    with pytest.raises(ZofoError, match="accuracy needs options to choose from, but the row with the answer ' a' has"):
        make_trainer(tmp_path, rows, method="zo", adapter="none", loss="lm", objective="accuracy")


def test_a_population_without_spread_moves_nothing_and_says_so_once(tmp_path, caplog):
    keys = {"objective": "reward", "max_new_tokens": 2, "num_perturbations": 2, "method": "zo", "adapter": "none"}
    trainer = make_trainer(tmp_path, rows_of(12), reward_funcs=constant, **keys)
    before = weights(trainer.adapted, "backbone")
    with caplog.at_level(logging.WARNING):
        trainer.try_step()
        assert not caplog.records, "of a step that is only tried, nothing is said"
        trainer.train()
    warnings = [record.message for record in caplog.records if "have the same reward" in record.message]
    assert len(warnings) == 1
    assert "raise zo_eps, num_perturbations or per_device_train_batch_size" in warnings[0]
    assert [log["zo_no_spread"] for log in trainer.state.log_history if "loss" in log] == [1.0, 1.0, 1.0]
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer.adapted, "backbone").items())


def constant(completions):
    return [0.5] * len(completions)


def absent(prompts, completions):
    return [None] * len(completions)


def sometimes():
    """Numbers for all but one of four members, by turns."""
    calls = itertools.count()

    def reward(prompts, completions):
        call = next(calls)
        return [None if call == 1 else float(call)] * len(completions)

    return reward


def test_a_member_without_a_reward_counts_as_the_mean_and_a_step_without_any_ends_the_run(tmp_path):
    keys = {"method": "zo", "adapter": "none", "objective": "reward", "num_perturbations": 2, "max_new_tokens": 2}
    _, _, logs, estimate = stepped(tmp_path / "a", rows_of(12), reward_funcs=[sometimes()], **keys)
    worth = (np.array([0.0, 2.0, 3.0]) - 5 / 3) / np.std([0.0, 2.0, 3.0])
    wanted = [-(worth[0] - 0.0) / (2 * EPS), -(worth[1] - worth[2]) / (2 * EPS)]
    assert estimate.projected == pytest.approx(wanted, rel=1e-4)
    assert logs["reward"] == pytest.approx(5 / 3)
    with pytest.raises(ZofoError, match="step 0: no reward applies to any of the 4 completions of a member"):
        stepped(tmp_path / "b", rows_of(12), reward_funcs=[absent], **keys)
    with pytest.raises(ZofoError, match="no reward applies"):
        stepped(tmp_path / "c", rows_of(12), reward_funcs=[sometimes()], zo_shaping="none", **keys)


@pytest.mark.parametrize("objective", ["accuracy", "reward"])
def test_answers_of_logits_that_are_nan_are_no_answers(tmp_path, objective):
    rows = make_rows(12, options=MORE_TOKENS) if objective == "accuracy" else rows_of(12)
    rewards = {"reward_funcs": [vowels]} if objective == "reward" else {}
    keys = {"method": "zo", "adapter": "none", "objective": objective, "zo_learning_rate": 1e-3, **rewards}
    trainer = make_trainer(tmp_path, rows, **keys)
    next(iter(trainer.adapted.backbone.values())).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="nan"):
        trainer.method.step(0, 0.0, [next(micro_steps(trainer))])


def test_a_reward_that_is_only_measured_gets_the_columns_of_the_rows(tmp_path):
    seen = []

    def reward(completions, kind):
        seen.append(kind)
        return [1.0] * len(completions)

    rows = [{**row, "kind": number} for number, row in enumerate(make_rows(6))]
    trainer = make_trainer(tmp_path, rows, method="fo", reward_funcs=[reward], eval_rows=rows)
    trainer.evaluate()
    assert sorted(itertools.chain(*seen)) == [*range(6)]


def lengths(completions):
    return [float(len(text)) for text in completions]


def test_other_columns_or_other_functions_are_another_run_for_a_reward(tmp_path):
    keys = {"method": "zo", "adapter": "none", "objective": "reward", "zo_learning_rate": 1e-3, "zo_eps": EPS}
    keys |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "reward_funcs": [vowels], "max_new_tokens": 2}
    make_trainer(tmp_path, rows_of(12), **keys).train()
    other = [{**row, "kind": 5} for row in rows_of(12)]
    with pytest.raises(ZofoError, match="was written by a run on other training rows"):
        make_trainer(tmp_path, other, **keys).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    keys["reward_funcs"] = [lengths]
    with pytest.raises(ZofoError, match=r"with reward_funcs = \['vowels'\], but now it is \['lengths'\]: resume"):
        make_trainer(tmp_path, rows_of(12), **keys).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_part_of_prompts_without_spread_is_logged(tmp_path):
    def of_odd_rows(completions, kind, **columns):
        return [value * odd for value, odd in zip(vowels([], completions), kind, strict=True)]

    keys = {"objective": "reward", "max_new_tokens": 6, "num_perturbations": 3, "method": "zo", "adapter": "none"}
    keys |= {"zo_shaping_over": "prompt", "reward_funcs": of_odd_rows}
    _, bundles, logs, _ = stepped(tmp_path, rows_of(12), **keys)
    even = np.mean([e.record.row["kind"] == 0 for e in examples_of(bundles, "zo")])
    assert logs["zo_no_spread"] == even > 0


def test_evaluations_report_the_reward_and_show_completions(tmp_path, capsys):
    keys = {"objective": "reward", "reward_funcs": vowels, "max_new_tokens": 6, "method": "zo", "adapter": "none"}
    trainer = make_trainer(tmp_path, rows_of(12), eval_rows=rows_of(5, first=40), **keys)
    scores = trainer.evaluate()
    examples = trainer.eval_dataset
    texts = [greedy(trainer.adapted.base, trainer.processing_class, e, 6) for e in examples]
    assert scores.keys() == {"eval_reward", "eval_rows", "epoch"}
    assert scores["eval_reward"] == pytest.approx(np.mean(vowels([], texts)))
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("upper: reward ")]
    assert len(lines) == 3
    for line, example, text in zip(lines, examples, texts, strict=False):
        assert repr(example.record.prompt) in line
        assert line.endswith(f"-> {text!r}")


def test_rows_with_answers_have_a_loss_beside_the_reward(tmp_path):
    keys = {"objective": "reward", "reward_funcs": vowels, "max_new_tokens": 4}
    scores = make_trainer(tmp_path, eval_rows=make_rows(4, first=40), **keys).evaluate()
    assert {"eval_reward", "eval_loss", "eval_lower_reward", "eval_lower_loss"} <= scores.keys()


def test_an_objective_of_texts_compares_generated_answers(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in make_rows(12)]
    trainer, _, logs, _ = stepped(tmp_path, rows, method="zo", adapter="none", objective="token_f1")
    assert trainer.args.loss == "lm"
    assert trainer.metrics == ("exact_match", "token_f1")
    assert 0 <= logs["token_f1"] <= 1
    assert logs["loss"] == -logs["token_f1"]


def test_the_best_model_is_chosen_by_the_objective(tmp_path):
    keys = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_steps": 1, "objective": "accuracy"}
    trainer = make_trainer(tmp_path, eval_rows=make_rows(4, first=40), method="zo", adapter="none", **keys)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("accuracy", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_members_that_share_a_forward_write_what_each_writes_alone(tmp_path, family):
    found, forwards = [], []
    for most in (None, 3, 1):
        seen = []
        keys = {"objective": "reward", "max_new_tokens": 5, "num_perturbations": 3, "zo_distribution": "low_rank"}
        keys |= {"method": "zo", "adapter": "none", "zo_members_per_forward": most, "family": family}
        trainer = make_trainer(tmp_path, rows_of(12), reward_funcs=noting(seen), zo_eps=0.05, **keys)
        (bundle,) = itertools.islice(micro_steps(trainer), 1)
        done = []
        handle = trainer.adapted.base.register_forward_hook(lambda *_, done=done: done.append(1))
        trainer.method.step(0, 0.0, [bundle])
        handle.remove()
        found.append(seen)
        forwards.append(len(done))
    assert found[0] == found[1] == found[2]
    assert len({text for texts in found[0] for text in texts}) > 1
    assert forwards[0] <= 5
    assert forwards[0] < forwards[1] < forwards[2]


def noting(seen):
    def reward(completions):
        seen.append(list(completions))
        return vowels([], completions)

    return reward
