"""What every method's class says of itself is what its steps do."""

import functools
import math
from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_leaves

from plain import Watch, make_trainer, moved, same, trained, weights
from zofo import ZOFOConfig, ZofoError
from zofo.config_parser import parse_config
from zofo.methods import METHODS
from zofo.methods.method import Work
from zofo.scoring import scorer
from zofo.scoring.scorer import Scorer
from zofo.training import trainer as training
from zofo.zo.optimizers import JointOptimizer, ZerothOrderOptimizer

# A row for every method: the adapters that it is tried with.
ADAPTERS = {
    "bilevel": ("lora", "prompt"),
    "zo": ("none", "lora"),
    "fo": ("none", "lora"),
    "two_stage": ("lora",),
    "reptile": ("lora", "prompt"),
    "fomaml": ("lora", "prompt"),
    "none": ("none",),
}
CASES = [(name, adapter) for name, adapters in ADAPTERS.items() for adapter in adapters]
FULL = (("bilevel", "prompt"), ("reptile", "lora"), ("fomaml", "prompt"))
TRAINED = [
    pytest.param(*case, marks=pytest.mark.full if case in FULL else ()) for case in CASES if METHODS[case[0]].trains()
]


def test_every_method_has_its_row_and_says_what_it_does():
    assert ADAPTERS.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.adapters
        assert method.trains() == (name != "none")


@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_what_it_says_that_it_updates_is_updated(tmp_path, name, adapter):
    trainer = make_trainer(tmp_path, method=name, adapter=adapter, max_steps=4)
    method, adapted = METHODS[name], trainer.adapted
    assert adapted.adapters == (() if adapter == "none" else method.adapters)
    assert (
        trainer._sizes[0].keys()
        == set(method.splits(trainer.args))
        == {s.split for s in method.streams(trainer.args).values()}
    )
    before = {part: weights(adapted, part) for part in ("backbone", *adapted.adapters)}
    members = trainer.method.optimizer
    members = members.members.values() if isinstance(members, JointOptimizer) else [members]
    zeroth = [member for member in members if isinstance(member, ZerothOrderOptimizer)]
    assert bool(zeroth) == method.zeroth_order
    assert (len(members) > len(zeroth)) == method.backpropagates
    written = {id(p) for member in zeroth for group in member.param_groups for p in group["params"]}
    assert written == {id(p) for p in method.perturbed(adapted, trainer.args).values()}
    trainer.train()
    assert bool(moved(before["backbone"], weights(adapted, "backbone"))) == method.updates_backbone(adapter)
    assert all(moved(before[part], weights(adapted, part)) for part in adapted.adapters)
    assert (trainer.cost.backward_tokens > 0) == method.backpropagates


def work_done(trainer, monkeypatch):
    """What the steps of a run are made of, on average."""
    done, in_levels = Counter(), {}
    for level, kind in ((Scorer, "loss"), (Scorer, "losses")):
        in_levels[kind] = vars(level)[kind]
    monkeypatch.setattr(
        Scorer,
        "loss",
        lambda self, batch: done.update(backwards=torch.is_grad_enabled()) or in_levels["loss"](self, batch),
    )
    monkeypatch.setattr(
        Scorer,
        "losses",
        lambda self, batches, names: done.update(forwards=len(batches)) or in_levels["losses"](self, batches, names),
    )
    members = trainer.method.optimizer
    for member in members.members.values() if isinstance(members, JointOptimizer) else [members]:
        zeroth = isinstance(member, ZerothOrderOptimizer)
        member.register_step_pre_hook(
            lambda it, *_, zeroth=zeroth: done.update(
                zo_updates=zeroth and it.estimate is not None,
                updates=not zeroth and any(p.grad is not None for g in it.param_groups for p in g["params"]),
            )
        )
    trainer.train()
    return Work(*(done[part] / trainer.args.max_steps for part in vars(Work())))


@pytest.mark.parametrize("keys", [{}, {"num_perturbations": 3, "zo_estimator": "one_sided", "penalty": 0.0}])
@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_its_work_is_what_its_steps_are_made_of(tmp_path, monkeypatch, name, adapter, keys):
    keys = {"gradient_accumulation_steps": 2, "two_stage_fraction": 0.5, "max_steps": 4, **keys}
    trainer = make_trainer(tmp_path, method=name, adapter=adapter, **keys)
    counted, said = work_done(trainer, monkeypatch), METHODS[name].work(trainer.args)
    if trainer.args.zo_estimator == "one_sided" and name == "bilevel":
        # the losses at θ are those of p's backpropagation: one forward less than is said
        counted = counted + Work(forwards=2)
    assert vars(counted) == pytest.approx(vars(said))


@pytest.mark.parametrize("method", [{"method": "zo", "adapter": "none"}, {"method": "bilevel", "penalty": "infinite"}])
def test_shaped_one_sided_values_need_no_loss_at_theta(tmp_path, monkeypatch, method):
    keys = {"num_perturbations": 3, "zo_estimator": "one_sided", "zo_shaping": "zscore", "zo_learning_rate": 1e-5}
    trainer = make_trainer(tmp_path, **method, **keys)
    counted = work_done(trainer, monkeypatch)
    assert counted.forwards == 3
    assert vars(counted) == vars(trainer.args.method_class.work(trainer.args))


def test_an_objective_without_a_gradient_has_no_backward_pass(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, objective="accuracy", penalty=1.0, zo_learning_rate=1e-5)
    said = trainer.args.method_class.work(trainer.args)
    assert work_done(trainer, monkeypatch).backwards == said.backwards == trainer.args.lower_steps + 1


@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_a_step_one_of_whose_losses_is_nan_changes_no_bit(tmp_path, monkeypatch, name, adapter):
    """The first loss of a step, of the next one the second, ... until a step has no such loss and is taken; again."""
    keys = {"zo_optimizer": "momentum", "zo_learning_rate": "auto", "on_nonfinite": "skip", "max_steps": 64}
    trainer = make_trainer(tmp_path, method=name, adapter=adapter, gradient_accumulation_steps=2, **keys)
    loss, spoiled, measured, taken = scorer._loss, 0, 0, []

    def spoil(batch, found):
        nonlocal measured
        measured += 1
        return loss(batch, found) * (math.nan if measured == spoiled else 1.0)

    def state():
        parts = [weights(trainer.adapted, part) for part in ("backbone", *trainer.adapted.adapters)]
        leaves = tree_leaves([parts, trainer.method.optimizer.state_dict()])
        return [leaf.numpy().tobytes() if torch.is_tensor(leaf) else leaf for leaf in leaves]

    def check():
        nonlocal before, spoiled, measured
        after, skipped = state(), 1 <= spoiled <= measured
        assert (after == before) == skipped
        if not skipped:
            taken.append(trainer.state.global_step)
        before, spoiled, measured = after, spoiled + 1 if skipped else 1, 0

    before = state()
    monkeypatch.setattr(training, "_SKIPPED_IN_A_ROW", math.inf)
    monkeypatch.setattr(scorer, "_loss", spoil)
    trainer.add_callback(Watch(after=check))
    trainer.train()
    assert len(taken) > 2
    assert taken[-1] > 32  # in the second of two stages


@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_a_stopped_and_resumed_run_of_it_is_one_that_never_stopped_bit_for_bit(tmp_path, name, adapter):
    keys = {"method": name, "adapter": adapter, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path / "whole", **keys)
    again = make_trainer(tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for part, values in whole.items():
        assert same(values, weights(again.adapted, part))


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_a_run_of_it_can_be_configured_stored_and_varied(name, adapter):
    config = ZOFOConfig(output_dir="run", use_cpu=True, method=name, adapter=adapter)
    assert parse_config(config.resolved(), []).identity() == config.identity()
    other = ZOFOConfig(output_dir="run", use_cpu=True, method="zo", adapter="none", zo_layers="0", zo_sparsity=0.5)
    varied, same = other.variant(name, adapter), (name, adapter) == ("zo", "none")
    assert varied.identity() == (other if same else config).identity()
    longer = ZOFOConfig(output_dir="run", use_cpu=True, method=name, adapter=adapter, max_steps=9)
    assert (longer.identity() == config.identity()) != METHODS[name].depends_on_length


@pytest.mark.parametrize("name", METHODS)
def test_one_that_needs_an_adapter_says_so(name):
    if not METHODS[name].requires_adapter:
        assert ZOFOConfig(output_dir="run", use_cpu=True, method=name, adapter="none").adapter == "none"
        return
    with pytest.raises(ZofoError, match=f"method {name} trains an adapter, but adapter is none"):
        ZOFOConfig(output_dir="run", use_cpu=True, method=name, adapter="none")


# Another value for every key that counts for some methods ...
OTHER = {
    "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear",
    "learning_rate": 0.03, "optim": "sgd", "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.5,
    "adam_epsilon": 0.1, "max_grad_norm": 0.01, "neftune_noise_alpha": 5.0, "zo_learning_rate": 0.03, "zo_eps": 0.01,
    "num_perturbations": 2, "zo_estimator": "one_sided", "zo_optimizer": "sign", "zo_weight_decay": 0.3,
    "zo_distribution": "rademacher", "upper_learning_rate": 0.03, "penalty": 3.0, "penalty_schedule": "linear",
    "normalize_penalty": False, "lower_steps": 1, "lower_pool": 1, "lower_fraction": 0.5, "two_stage_fraction": 0.3,
    "two_stage_order": "backbone_first", "zo_shaping": "centered_rank",
}  # fmt: skip
# ... but those that alone change nothing, and those that are refused where they do not count.
WITHOUT_OTHER = {
    "early_stopping_patience",  # tested with its evaluations
    "optimizer_in_backward", "shots", "train_shots", "train_prompt", "diagnose",  # the same weights, or none
    "num_train_epochs", "lr_scheduler_kwargs", "warmup_steps", "on_nonfinite", "adapter_init", "optim_args",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "zo_parameters", "zo_exclude", "zo_layers", "zo_sparsity",
    "zo_rank", "zo_rows", "zo_members_per_forward", "zo_anchor",  # needs a model in a folder
    "tasks_per_step", "task_sampling", "task_exponent", "shared_adapter",  # of several tasks
    "objective", "reward", "reward_weights", "reward_timeout", "max_new_tokens", "zo_shaping_over",
}  # fmt: skip


def test_every_key_that_counts_for_some_methods_has_another_value():
    counting = frozenset().union(*(method.keys_used for method in METHODS.values()))
    assert OTHER.keys() == counting - WITHOUT_OTHER


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """plain(method, adapter): the weights by part after a run without other keys, which is done once."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda name, adapter: trained(folder, method=name, adapter=adapter)[0])


@pytest.mark.parametrize(("name", "adapter"), TRAINED)
def test_keys_that_it_does_not_use_change_nothing(tmp_path, plain, name, adapter):
    unused = {key: value for key, value in OTHER.items() if key not in METHODS[name].keys_used}
    other, _ = trained(tmp_path, method=name, adapter=adapter, **unused)
    assert not any(moved(values, other[part]) for part, values in plain(name, adapter).items())


@pytest.mark.parametrize("key", OTHER)
def test_a_key_that_a_method_uses_changes_its_weights(tmp_path, plain, key):
    name = "two_stage" if key.startswith("two_stage") else "bilevel"
    assert key in METHODS[name].keys_used
    other, _ = trained(tmp_path, method=name, adapter="lora", **{key: OTHER[key]})
    assert any(moved(values, other[part]) for part, values in plain(name, "lora").items())
