"""`optimizer_in_backward`: the bits of plain full fine-tuning, one gradient at a time, and clear refusals."""

import math

import pytest
import torch

from plain import Watch, make_trainer, moved, same, trained, weights
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from zofo import ZOFOConfig, ZofoError
from zofo.commands.estimate import estimate
from zofo.config_parser import parse_config
from zofo.scoring import scorer

FULL = {"method": "fo", "adapter": "none", "learning_rate": 1e-3, "max_steps": 5}
IN_BACKWARD = {**FULL, "optimizer_in_backward": True}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop")


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(  # two of the families have a head that is tied to the embeddings
    ("family", "optim"), [*(("llama", name) for name in OPTIMIZERS), ("gpt2", "adamw_torch"), ("mistral", "adafactor")]
)
def test_the_weights_are_those_of_plain_full_fine_tuning_bitwise(tmp_path, family, optim):
    keys = {"family": family, "optim": optim, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    plain, of_plain = trained(tmp_path, **FULL, **keys, max_grad_norm=0.0)
    found, of_found = trained(tmp_path, **IN_BACKWARD, **keys)
    assert same(plain["backbone"], found["backbone"])
    start = weights(make_trainer(tmp_path, **FULL, **keys).adapted, "backbone")
    assert moved(start, found["backbone"]) == start.keys()
    for key in ("loss", "learning_rate"):
        assert logged(of_plain, key) == logged(of_found, key)
    assert logged(of_plain, "grad_norm") == pytest.approx(logged(of_found, "grad_norm"), rel=1e-6)
    constant, _ = trained(tmp_path, **IN_BACKWARD, **{**keys, "lr_scheduler_type": "constant"})
    assert moved(constant["backbone"], found["backbone"])  # so the schedule counts


def test_it_goes_with_gradient_checkpointing(tmp_path):
    plain, _ = trained(tmp_path, **IN_BACKWARD)
    again, _ = trained(tmp_path, **IN_BACKWARD, gradient_checkpointing=True)
    assert same(plain["backbone"], again["backbone"])


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_resumed_run_is_one_that_never_stopped_and_its_checkpoint_a_plain_one(tmp_path, optim):
    keys = {"optim": optim, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2, "warmup_steps": 2}
    whole, _ = trained(tmp_path / "whole", **IN_BACKWARD, **keys)
    again = make_trainer(tmp_path / "again", **IN_BACKWARD, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(whole["backbone"], weights(again.adapted, "backbone"))
    trained(tmp_path / "plain", **FULL, **keys, max_grad_norm=0.0)
    states = [
        torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for run in ("whole", "plain")
    ]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][name]))
    with pytest.raises(ZofoError, match="optimizer_in_backward = True, but now it is False"):
        make_trainer(tmp_path / "plain", **FULL, **keys).train(str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("keys", [FULL, IN_BACKWARD], ids=["plain", "in backward"])
def test_states_that_are_wider_than_the_weights_are_read_as_they_were_stored(tmp_path, keys):
    """Adafactor keeps float32 for weights in bfloat16, to which torch would round it."""
    keys = {**keys, "optim": "adafactor", "dtype": "bfloat16", "save_strategy": "steps", "save_steps": 2}

    def made(folder):
        model = tiny_model("llama", vocab_size=len(tiny_tokenizer()), dtype=torch.bfloat16)
        return make_trainer(folder, model=model, **keys)

    whole, again = made(tmp_path / "whole"), made(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.adapted, "backbone"), weights(again.adapted, "backbone"))
    states = [
        torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for run in ("whole", "again")
    ]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][name]))


def test_one_gradient_is_alive_at_a_time_and_none_between_steps(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **IN_BACKWARD)
    parameters, alive = list(trainer.adapted.backbone.values()), []
    step = torch.optim.AdamW.step

    def count(*args, **kwargs):
        alive.append(sum(p.grad is not None for p in parameters))
        return step(*args, **kwargs)

    between = []
    trainer.add_callback(Watch(lambda: between.append([p.grad for p in parameters if p.grad is not None])))
    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    trainer.train()
    assert alive == ([1] * len(parameters) + [0]) * 5  # the last step of each is the trainer's own, of nothing
    assert between == [[]] * 5


def test_nothing_stays_on_the_model(tmp_path):
    first = make_trainer(tmp_path, **IN_BACKWARD)
    first.train()
    after, _ = trained(tmp_path, model=first.adapted.base, **FULL, max_grad_norm=0.0)
    one, _ = trained(tmp_path, **IN_BACKWARD)
    other = make_trainer(tmp_path, **FULL, max_grad_norm=0.0)
    with torch.no_grad():
        for name, parameter in other.adapted.backbone.items():
            parameter.copy_(one["backbone"][name])
    other.train()
    assert same(after["backbone"], weights(other.adapted, "backbone"))


def test_a_loss_that_is_not_finite_raises_before_any_weight_is_written(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **IN_BACKWARD)
    history = [weights(trainer.adapted, "backbone")]
    trainer.add_callback(Watch(after=lambda: history.append(weights(trainer.adapted, "backbone"))))
    loss, calls = scorer._loss, []

    def spoil(batch, found):
        calls.append(1)
        return loss(batch, found) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(scorer, "_loss", spoil)
    with pytest.raises(ZofoError, match="step 2: the training loss is nan"):
        trainer.train()
    assert len(history) == 3
    assert same(history[2], weights(trainer.adapted, "backbone"))
    assert moved(history[1], history[2])


@pytest.mark.parametrize(("optim", "tied"), [("adamw_torch_fused", True), ("sgd", False)])
def test_the_estimate_counts_the_gradient_of_the_largest_weight_alone(tmp_path, optim, tied):
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=6, tie_word_embeddings=tied)
    found = {}
    for inside in (False, True):
        config = ZOFOConfig(
            output_dir=str(tmp_path), use_cpu=True, model=str(model), method="fo", adapter="none", optim=optim,
            optimizer_in_backward=inside, max_length=2, per_device_train_batch_size=1,
        )  # fmt: skip
        found[inside] = next(row for row in estimate(config, timed=False) if row.chosen)
    count, largest = found[True].parameters, 4 * 320 * 32
    assert found[False].memory.gradients == 4 * count
    assert found[True].memory.gradients == largest < 4 * count / 4
    assert found[True].memory.optimizer == found[False].memory.optimizer
    without = [row.memory.peak - row.memory.libraries for row in found.values()]
    assert without[1] < without[0] - 4 * count + 2 * largest


def test_its_steps_are_timed(tmp_path, model_folder):
    keys = {"model": str(model_folder), "max_length": 8, "per_device_train_batch_size": 1, "optim": "sgd"}
    config = ZOFOConfig(output_dir=str(tmp_path), use_cpu=True, **{**IN_BACKWARD, **keys})
    rows = list(estimate(config))
    assert all(row.seconds > 0 for row in rows)
    assert [(row.method, row.adapter) for row in rows if row.chosen] == [("fo", "none")]


REFUSED = {
    "an adapter": ({"adapter": "lora"}, "adapter is lora: leave it out, or set adapter: none"),
    "forward passes": ({"method": "zo"}, "method is zo: leave it out, or set method: fo"),
    "two levels": ({"method": "bilevel", "adapter": "lora"}, "method is bilevel"),
    "clipping": ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0, the norm of all gradients together"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, and each backward pass"),
    "skipping": ({"on_nonfinite": "skip"}, "on_nonfinite is skip, and a step that has begun cannot be taken back"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_needs_all_gradients_at_once_is_refused(changes, message):
    keys = {"output_dir": "run", "use_cpu": True, "method": "fo", "adapter": "none", "optimizer_in_backward": True}
    with pytest.raises(ZofoError, match=f"optimizer_in_backward is true, but {message}"):
        parse_config({**keys, **changes}, [])
    assert parse_config(keys, []).notices() == []
    assert parse_config({**keys, "max_grad_norm": 0.0}, []).optimizer_in_backward


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_optimizers_of_that_kind_by_their_own_names_are_refused_with_the_key(name):
    with pytest.raises(ZofoError, match="optimizer_in_backward: true"):
        ZOFOConfig(output_dir="run", use_cpu=True, method="fo", adapter="none", optim=name)
