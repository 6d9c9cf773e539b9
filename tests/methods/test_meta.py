"""Reptile and first-order MAML: against the steps that they consist of."""

import pytest
import torch

from plain import make_rows, make_trainer, same, weights
from zofo import ZOFOConfig, ZofoError
from zofo.methods.first_order_level import FirstOrderLevel

TASKS = {name: make_rows(12, first=20 * place) for place, name in enumerate("ab")}
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "tasks_per_step": 2, "max_steps": 1}


def test_reptile_without_lower_steps_would_train_nothing():
    with pytest.raises(ZofoError, match="lower_steps is 0, and this method takes no other steps"):
        ZOFOConfig(output_dir="run", use_cpu=True, method="reptile", lower_steps=0)
    assert ZOFOConfig(output_dir="run", use_cpu=True, method="none", lower_steps=0).lower_steps == 0


def bundles(trainer):
    """The batches of the first iteration, by task."""
    return dict(zip(TASKS, next(iter(trainer.get_train_dataloader())), strict=True))


def inner_steps(trainer, batches, rate):
    """Plain SGD on the adapter of a trainer; the gradient of each step."""
    level = FirstOrderLevel(trainer.adapted, trainer.method.scorer, "upper", rate, trainer.args)
    for batch in batches:
        level.gradient([batch], "the loss")
        with torch.no_grad():
            for parameter in level.parameters:
                parameter -= rate * parameter.grad
                parameter.grad = None
    return level


def put(trainer, values):
    with torch.no_grad():
        for name, parameter in trainer.adapted.adapter_parameters("upper").items():
            parameter.copy_(values[name])


@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (3, 0.25)])
def test_reptile_moves_towards_what_the_tasks_make_of_the_adapter(tmp_path, steps, rate):
    keys = {"method": "reptile", "lower_steps": steps, "upper_learning_rate": rate, **PLAIN}
    by_hand, trainer = (make_trainer(tmp_path / name, TASKS, **keys) for name in "ab")
    start, ends = weights(by_hand.adapted, "upper"), []
    for bundle in bundles(by_hand).values():
        put(by_hand, start)
        inner_steps(by_hand, bundle["lower"], 0.5)
        ends.append(weights(by_hand.adapted, "upper"))
    trainer.train()
    for name, value in weights(trainer.adapted, "upper").items():
        expected = start[name] + rate * sum(end[name] - start[name] for end in ends) / 2
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)
    assert not same(start, weights(trainer.adapted, "upper"))


@pytest.mark.parametrize("steps", [0, 2])
def test_maml_descends_the_losses_behind_the_inner_steps(tmp_path, steps):
    keys = {"method": "fomaml", "lower_steps": steps, "upper_learning_rate": 0.1, **PLAIN}
    by_hand, trainer = (make_trainer(tmp_path / name, TASKS, **keys) for name in "ab")
    start, gradients = weights(by_hand.adapted, "upper"), []
    for bundle in bundles(by_hand).values():
        put(by_hand, start)
        level = inner_steps(by_hand, bundle["lower"], 0.5)
        level.gradient(bundle["upper"], "the loss")
        gradients.append([p.grad.clone() for p in level.parameters])
        level.optimizer.zero_grad()
    trainer.train()
    names = list(trainer.adapted.adapter_parameters("upper"))
    for name, *each in zip(names, *gradients, strict=True):
        expected = start[name] - 0.1 * sum(each) / 2
        torch.testing.assert_close(weights(trainer.adapted, "upper")[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["reptile", "fomaml"])
def test_meta_training_over_tasks_goes_on_bit_for_bit_and_leaves_the_backbone(tmp_path, method):
    keys = {"method": method, "lower_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, again = make_trainer(tmp_path / "whole", TASKS, **keys), make_trainer(tmp_path / "again", TASKS, **keys)
    before = weights(whole.adapted, "backbone")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.adapted, "upper"), weights(again.adapted, "upper"))
    assert same(before, weights(whole.adapted, "backbone"))


def test_reptile_moves_all_the_way_if_no_rate_is_given(tmp_path):
    assert make_trainer(tmp_path, method="reptile").args.upper_learning_rate == 1.0
    assert make_trainer(tmp_path, method="fomaml", learning_rate=0.02).args.upper_learning_rate == 0.02
