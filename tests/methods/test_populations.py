"""Runs with directions of low rank."""

import itertools

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
    trained,
    weights,
    whole_and_resumed,
)
from tiny import tiny_model, tiny_tokenizer
from zofo import ZOFOConfig, direction
from zofo.errors import ZofoError
from zofo.zo.optimizers import JointOptimizer

LOW = {"zo_distribution": "low_rank", "zo_learning_rate": 1e-3}
AUTO = {"zo_learning_rate": "auto", "num_perturbations": 2}
RUNS = {
    "zo": {"method": "zo", "adapter": "none"},
    "zo lora": {"method": "zo", "adapter": "lora"},
    "zo bfloat16": {"method": "zo", "adapter": "none", "dtype": "bfloat16", "zo_rank": 2},
    "zo momentum": {"method": "zo", "adapter": "none", "zo_optimizer": "momentum", "num_perturbations": 2},
    "zo one by one": {"method": "zo", "adapter": "none", "zo_members_per_forward": 1},
    "bilevel": {"num_perturbations": 2, "zo_parameters": ["attention"]},
    "two_stage": {"method": "two_stage"},
    "zo auto": {"method": "zo", "adapter": "none", **AUTO},
    "bilevel auto": {**AUTO, "zo_estimator": "one_sided", "zo_rows": "shared"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(tmp_path, name):
    keys = {**LOW, **RUNS[name], "max_steps": 4}
    whole, again = whole_and_resumed(tmp_path, **keys)
    assert same_run(whole, again)
    assert not same_run(whole, make_trainer(tmp_path / "start", **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zo_rank": 2}, "zo_rank is 2, but zo_distribution is normal: set zo_distribution: low_rank"),
        ({**LOW, "zo_sparsity": 0.5}, "zo_sparsity is 0.5, but a direction of zo_distribution low_rank moves all"),
        ({**LOW, "diagnose": True}, "diagnose compares directions of full rank, but zo_distribution is low_rank"),
        ({**LOW, "zo_rank": 0}, "zo_rank is 0, but must be greater than 0"),
        ({**LOW, "num_perturbations": 0}, "num_perturbations is 0, but must be greater than 0"),
        ({**LOW, "zo_rows": "all"}, "zo_rows is 'all', but must be one of own, shared"),
        ({**LOW, "num_perturbations": 5, "per_device_train_batch_size": 4}, "num_perturbations is 5, but 4 rows of a"),
        ({"zo_rows": "shared"}, "zo_rows is shared, but zo_distribution is normal: set zo_distribution: low_rank"),
        ({"zo_members_per_forward": 1}, "zo_members_per_forward is 1, but zo_distribution is normal"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ZofoError) as refusal:
        ZOFOConfig(output_dir="run", use_cpu=True, method="zo", adapter="none", **keys)
    assert str(refusal.value).startswith(message)


STEPS = {
    "zo": {"method": "zo", "adapter": "none"},
    "zo of some layers": {"method": "zo", "adapter": "none", "zo_parameters": ["attention", "norms"], "zo_layers": "1"},
    "zo on lora": {"method": "zo", "adapter": "lora"},
    "zo accumulated": {"method": "zo", "adapter": "none", "gradient_accumulation_steps": 2},
    "zo with bias and Conv1D": {"method": "zo", "adapter": "none", "family": "gpt2"},
    "bilevel": {"lower_steps": 1},
    "bilevel of a prefix": {"adapter": "prefix", "lower_steps": 1},
    "bilevel accumulated": {"lower_steps": 1, "gradient_accumulation_steps": 2, "zo_exclude": ["norms"]},
}
MANNERS = [(rows, estimator) for rows in ("own", "shared") for estimator in ("two_sided", "one_sided")]
MEASURED = {
    "zo": MANNERS,
    "zo of some layers": MANNERS[:1],
    "zo on lora": MANNERS[3:],
    "zo accumulated": MANNERS[1:3],
    "zo with bias and Conv1D": MANNERS[2:3],
    "bilevel": MANNERS[1:3],
    "bilevel of a prefix": MANNERS[1:2],
    "bilevel accumulated": MANNERS[::3],
}


def proposed(folder, **keys):
    """(the trainer, its bundles, the logs of a step, how many forwards near θ it took); nothing is updated."""
    keys = {"per_device_train_batch_size": 3, "num_perturbations": 2, **LOW, "zo_eps": 0.02, **keys}
    trainer = make_trainer(folder, make_rows(24, options=MORE_TOKENS), **keys)
    bundles = list(itertools.islice(micro_steps(trainer), trainer.args.gradient_accumulation_steps))
    done, adapted = [], trainer.adapted
    handle = adapted.base.register_forward_hook(lambda *_: done.append(torch.is_grad_enabled()))
    logs = trainer.method.step(0, 0.0, bundles)
    handle.remove()
    return trainer, bundles, logs, done.count(False)


def zeroth(trainer):
    members = trainer.method.optimizer
    return members.members["zo"] if isinstance(members, JointOptimizer) else members


@pytest.mark.parametrize(
    ("name", "rows", "estimator"), [(name, *manner) for name in STEPS for manner in MEASURED[name]]
)
def test_a_step_of_a_population_measures_what_single_forwards_measure(tmp_path, name, rows, estimator):
    keys = {**STEPS[name], "zo_rows": rows, "zo_estimator": estimator}
    found = [proposed(tmp_path, **keys, zo_members_per_forward=most) for most in (None, 1, 3)]
    estimates = [zeroth(trainer).estimate.projected for trainer, *_ in found]
    for estimate in estimates[1:]:
        assert estimates[0] == pytest.approx(estimate, rel=1e-3, abs=1e-4)
    for key, value in found[1][2].items():
        assert found[0][2][key] == pytest.approx(value, rel=1e-3, abs=1e-4)
    micro = STEPS[name].get("gradient_accumulation_steps", 1)
    if "bilevel" not in name:
        points = 3 if (rows, estimator) == ("shared", "one_sided") else 4
        assert [forwards for *_, forwards in found] == [micro, micro * points, micro * -(-points // 3)]
    else:
        # in one forward but for G(θ, s) at θ, and for adapters that cannot be mixed
        assert found[0][3] <= min(4 * micro, found[1][3] - 1)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "estimator"), MANNERS)
def test_a_step_is_that_of_plain_forwards_at_materialised_weights(tmp_path, rows, estimator):
    keys = {"method": "zo", "adapter": "none", "zo_rows": rows, "zo_estimator": estimator}
    trainer, (bundle,), _, _ = proposed(tmp_path, **keys)
    theta, eps, (batch,) = trainer.adapted.backbone, 0.02, bundle["zo"]
    estimate = zeroth(trainer).estimate
    before, expected = weights(trainer.adapted, "backbone"), []
    for query, examples in enumerate(((0,), (1, 2)) if rows == "own" else ((0, 1, 2), (0, 1, 2))):
        z = direction(theta, trainer.args.seed, 0, query, rank=1)
        part = only(batch, examples)
        ends = [at(theta, z, scale, lambda part=part: plain_loss(trainer.adapted.model, part)) for scale in
                (eps, -eps if estimator == "two_sided" else 0.0)]  # fmt: skip
        expected.append((ends[0] - ends[1]) / (2 * eps if estimator == "two_sided" else eps))
    assert estimate.projected == pytest.approx(expected, rel=2e-3, abs=1e-4)
    zeroth(trainer).step()
    for name, parameter in theta.items():
        moves = [direction({name: parameter}, trainer.args.seed, 0, j, rank=1)[name] for j in range(2)]
        wanted = before[name] - 1e-3 / 2 * sum(g * z for g, z in zip(estimate.projected, moves, strict=True))
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-6)


def only(batch, examples):
    """These examples of a batch, as `plain_loss` reads them."""
    return {**batch, "slots": batch["slots"][list(examples)], "gold": batch["gold"][list(examples)]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["falcon", "mixtral", "mamba"])
def test_a_model_whose_rows_cannot_be_told_apart_is_refused_by_name_before_training(tmp_path, family, dtype):
    keys = {"method": "zo", "adapter": "none", "family": family, "dtype": dtype, **LOW}
    with pytest.raises(ZofoError, match=r"^\S+ is read by .*: set zo_members_per_forward: 1, or zo_distribution: "):
        make_trainer(tmp_path, **keys)
    trained(tmp_path, **keys, zo_members_per_forward=1, max_steps=1)


def test_virtual_tokens_that_move_are_refused_before_training(tmp_path):
    keys = {"method": "zo", "adapter": "prompt", "zo_distribution": "low_rank", "num_perturbations": 2}
    with pytest.raises(
        ZofoError, match=r"at several points fails .*: set zo_members_per_forward: 1, or zo_distribution"
    ):
        make_trainer(tmp_path, **keys)


def test_a_model_that_mixes_rows_is_refused(tmp_path):
    model = tiny_model(vocab_size=len(tiny_tokenizer()))

    def mix(module, args, output):
        rows = output.shape[0]
        return output if rows <= 6 else output + 0.3 * output.roll(1, 0)

    model.model.norm.register_forward_hook(mix)
    with pytest.raises(ZofoError, match="losses of this llama model at several points in one forward are not those"):
        make_trainer(tmp_path, model=model, method="zo", adapter="none", **LOW, num_perturbations=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_16_bit_models_are_not_refused(tmp_path, family, dtype):
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), dtype=getattr(torch, dtype))
    make_trainer(tmp_path, model=model, dtype=dtype, method="zo", adapter="none", **LOW)


def test_the_first_forwards_are_not_counted_as_a_cost(tmp_path):
    assert make_trainer(tmp_path, method="zo", adapter="none", **LOW).cost.forward_tokens == 0


def test_a_rank_above_that_of_a_matrix_is_refused_before_training(tmp_path):
    with pytest.raises(ZofoError, match=r"zo_rank is 17, but model\.layers.*is a matrix of 16 x 32: set zo_rank to 16"):
        make_trainer(tmp_path, method="zo", adapter="none", **LOW, zo_rank=17)


@pytest.mark.parametrize("rate", [1e-3, "auto"])
def test_a_population_of_bilevel_without_penalty_knows_its_losses_at_theta(tmp_path, rate):
    keys = {**LOW, "zo_learning_rate": rate, "zo_rows": "shared", "zo_estimator": "one_sided", "penalty": 0.0}
    trainer = make_trainer(tmp_path, num_perturbations=2, max_steps=2, zo_eps=0.02, **keys)
    trainer.train()
    assert trainer.state.log_history[0]["projected_grad"] > 0
