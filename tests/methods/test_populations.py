"""Runs with directions of low rank."""

import pytest

from plain import make_trainer, moved, same, trained, weights
from zofo import ZOFOConfig
from zofo.errors import ZofoError

LOW = {"zo_distribution": "low_rank", "zo_learning_rate": 1e-3}
RUNS = {
    "zo": {"method": "zo", "adapter": "none"},
    "zo lora": {"method": "zo", "adapter": "lora"},
    "zo bfloat16": {"method": "zo", "adapter": "none", "dtype": "bfloat16", "zo_rank": 2},
    "zo momentum": {"method": "zo", "adapter": "none", "zo_optimizer": "momentum", "num_perturbations": 2},
    "bilevel": {"num_perturbations": 2, "zo_parameters": ["attention"]},
    "two_stage": {"method": "two_stage"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(tmp_path, name):
    keys = {**LOW, **RUNS[name], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path / "whole", **keys)
    again = make_trainer(tmp_path / "again", **keys)
    before = {part: weights(again.adapted, part) for part in whole}
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for part, values in whole.items():
        assert same(values, weights(again.adapted, part))
    assert any(moved(before[part], values) for part, values in whole.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zo_rank": 2}, "zo_rank is 2, but zo_distribution is normal: set zo_distribution: low_rank"),
        ({**LOW, "zo_sparsity": 0.5}, "zo_sparsity is 0.5, but a direction of zo_distribution low_rank moves all"),
        ({**LOW, "zo_rank": 0}, "zo_rank is 0, but must be greater than 0"),
        ({**LOW, "num_perturbations": 0}, "num_perturbations is 0, but must be greater than 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ZofoError) as refusal:
        ZOFOConfig(output_dir="run", use_cpu=True, method="zo", adapter="none", **keys)
    assert str(refusal.value).startswith(message)


def test_a_rank_above_that_of_a_matrix_is_refused_before_training(tmp_path):
    with pytest.raises(ZofoError, match=r"zo_rank is 17, but model\.layers.*is a matrix of 16 x 32: set zo_rank to 16"):
        make_trainer(tmp_path, method="zo", adapter="none", **LOW, zo_rank=17)
