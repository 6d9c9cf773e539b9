"""`diagnose`: each number against plain torch, NumPy, files or `zofo eval`; and a run that trains as without it."""

import json
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from plain import Watch, at, make_rows, make_trainer, plain_loss, same, trained, weights, write_config, write_task
from shell import QUICK, arguments
from tiny import save_tiny_model
from zofo import direction, noise
from zofo.cli import main
from zofo.config_parser import parse_config
from zofo.report.curves import plot_curves
from zofo.zo.alignment import expected_cosine

DROPOUT = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
EVALUATED = {"diagnose": True, "eval_rows": make_rows(4, first=40), "eval_steps": 2, "max_steps": 4}
METHODS = [("bilevel", "lora"), ("zo", "none"), ("zo", "lora"), ("two_stage", "lora"), ("fo", "lora")]


def state(trainer):
    """Everything that later steps depend on, as bytes."""
    parts = [weights(trainer.adapted, part) for part in ("backbone", *trainer.adapted.adapters)]
    generators = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    leaves = tree_leaves([parts, trainer.method.optimizer.state_dict(), generators])
    return [leaf.numpy().tobytes() if torch.is_tensor(leaf) else str(leaf) for leaf in leaves]


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize(("method", "adapter"), METHODS)
def test_a_diagnosed_run_trains_bit_for_bit_and_reads_no_more_in_its_steps(tmp_path, method, adapter):
    keys = {**EVALUATED, "method": method, "adapter": adapter, "gradient_accumulation_steps": 2}
    peft = None if adapter == "none" else DROPOUT
    ends, costs = [], []
    for diagnose in (False, True):
        trainer = make_trainer(tmp_path, peft=peft, **{**keys, "diagnose": diagnose})
        trainer.try_step()
        required = [p.requires_grad for p in trainer.adapted.model.parameters()]
        trainer.train()
        ends.append([*state(trainer), required == [p.requires_grad for p in trainer.adapted.model.parameters()]])
        costs.append((trainer.cost.forward_tokens, trainer.cost.backward_tokens))
        assert not any(p.grad is not None for p in trainer.adapted.model.parameters())
        assert len(logged(trainer, "cosine")) == (2 if diagnose and method != "fo" else 0)
    assert ends[0] == ends[1]
    assert costs[0] == costs[1]


def test_a_diagnosed_run_resumes_bitwise_and_with_its_log_also_where_the_key_is_left_out(tmp_path):
    keys = {**EVALUATED, "save_strategy": "steps", "save_steps": 2}
    whole, first = trained(tmp_path / "whole", **keys)
    for diagnose in (True, False):
        again = make_trainer(tmp_path / f"again-{diagnose}", **{**keys, "diagnose": diagnose})
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert all(same(values, weights(again.adapted, part)) for part, values in whole.items())
        for key in ("cosine", "signal_to_noise", "variance_s_start"):
            found = logged(again, key)
            assert found == logged(first, key)[: len(found)]
            assert (len(found) == len(logged(first, key))) == diagnose


def row_loss(model, example, kind="options"):
    """The loss of a row by one plain forward for each answer."""

    def log_probabilities(answer):
        ids = torch.tensor([[*example.prompt, *answer]])
        logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]

    if kind == "lm":
        return -log_probabilities(example.answers[example.gold]).sum()
    scores = torch.stack([log_probabilities(answer).mean() for answer in example.answers])
    return functional.cross_entropy(scores[None], torch.tensor([example.gold]))


class Noticed:
    """(g, e²) of each step along its direction, by NumPy from the plain losses of single rows near θ."""

    def __init__(self, trainer):
        self.trainer, self.found = trainer, []
        self.rows, (sampler, _) = [], trainer._order()
        for epoch in range(2):
            sampler.set_epoch(epoch)
            self.rows += [[trainer.train_dataset[i] for i in indices] for indices in sampler]
        trainer.add_callback(Watch(before=self.look))

    @torch.no_grad()
    def look(self):
        trainer, adapted = self.trainer, self.trainer.adapted
        args, number = trainer.args, trainer.state.global_step
        size, parts = args.per_device_train_batch_size, trainer.method.objective(number / args.max_steps)
        rows = self.rows[number]
        streams = {"zo": rows, "upper": rows[-size:], "penalty": rows[-2 * size : -size]}
        level, gathered = trainer.method.zeroth_order_level, {}
        adapted.model.eval()
        z = direction(level.parameters, args.seed, number)
        back_scale = 0.0 if args.zo_estimator == "one_sided" else -args.zo_eps
        for part in parts:
            adapted.use(part.adapter)
            tokens = sum(len(example.answers[example.gold]) for example in streams[part.stream])
            unit = size / tokens if args.loss == "lm" else 1.0
            for example in streams[part.stream]:
                points = [
                    at(level.parameters, z, scale, lambda e=example: row_loss(adapted.model, e, args.loss))
                    for scale in (args.zo_eps, back_scale)
                ]
                contribution = part.factor * unit * (points[0] - points[1]) / (args.zo_eps - back_scale)
                gathered.setdefault((part.stream, id(example)), []).append(contribution)
        by_stream = {part.stream: [] for part in parts}
        for (stream, _), values in gathered.items():
            by_stream[stream].append(sum(values))
        self.found.append((
            sum(np.mean(d) for d in by_stream.values()),
            sum(np.var(d, ddof=1) / len(d) for d in by_stream.values()),
        ))  # fmt: skip
        adapted.use("upper")


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "zo", "adapter": "none"},
        {"method": "zo", "adapter": "none", "zo_estimator": "one_sided", "loss": "lm", "zo_eps": 0.02},
        {"method": "zo", "adapter": "lora", "num_perturbations": 1},
        {"penalty": 3.0},
        {"penalty": 3.0, "zo_estimator": "one_sided", "loss": "lm", "zo_eps": 0.02},
        {"penalty": 2.0, "penalty_schedule": "linear", "adapter": "prompt"},
    ],
)
def test_signal_to_noise_is_that_of_plain_losses_of_single_rows(tmp_path, keys):
    rows = make_rows(14, options=[" great", " the long evening"])
    trainer = make_trainer(
        tmp_path, rows, diagnose=True, per_device_train_batch_size=3, learning_rate=0.1,
        **{"zo_eps": 0.01, **keys},
    )  # fmt: skip
    noticed = Noticed(trainer)
    trainer.train()
    wanted = [math.sqrt(mean**2 / error) for mean, error in noticed.found]
    np.testing.assert_allclose(logged(trainer, "signal_to_noise"), wanted, rtol=1e-3)


def test_signal_to_noise_is_pooled_over_the_steps_since_the_last_log(tmp_path):
    keys = {"method": "zo", "adapter": "none", "per_device_train_batch_size": 3, "diagnose": True}
    trainer = make_trainer(tmp_path, logging_steps=3, **keys)
    noticed = Noticed(trainer)
    trainer.try_step()  # which does not count
    trainer.train()
    means, errors = np.array(noticed.found).T
    assert logged(trainer, "signal_to_noise") == pytest.approx([math.sqrt((means**2).sum() / errors.sum())], rel=1e-2)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "zo", "adapter": "none", "num_perturbations": 2},
        {"method": "zo", "adapter": "none", "zo_sparsity": 0.5, "zo_distribution": "rademacher"},
        {"method": "zo", "adapter": "lora"},
        {"method": "two_stage", "zo_parameters": ["attention"]},
        {"penalty": 3.0, "num_perturbations": 3},
        {"penalty": 3.0, "adapter": "prompt", "zo_estimator": "one_sided"},
    ],
)
def test_the_cosine_is_that_of_materialised_directions_with_plain_autograd(tmp_path, keys):
    trainer = make_trainer(tmp_path, diagnose=True, **keys)
    trainer.train()
    args, adapted, level = trainer.args, trainer.adapted, trainer.method.zeroth_order_level
    logs = trainer._diagnosis.measure(7, 0.5)
    bundle, theta = trainer._diagnosis._bundle, level.parameters
    parts = trainer.method.objective(0.5)

    def objective():
        losses = []
        for part in parts:
            adapted.use(part.adapter)
            adapted.model.requires_grad_(False)
            for parameter in theta.values():
                parameter.requires_grad_(True)
            losses.append(part.factor * plain_loss(adapted.model, bundle[part.stream][0]))
        return sum(losses)

    adapted.model.eval()
    gradients = torch.autograd.grad(objective(), list(theta.values()), allow_unused=True)
    directions = [direction(theta, args.seed, 7, j, args.zo_distribution) for j in range(args.num_perturbations)]
    inside = {n: p.detach().abs() <= level.optimizer.limits.get(n, math.inf) for n, p in theta.items()}
    directions = [{n: z[n] * inside[n] for n in z} for z in directions]
    side = 0.0 if args.zo_estimator == "one_sided" else -args.zo_eps
    scales = [at(theta, z, args.zo_eps, objective) - at(theta, z, side, objective) for z in directions]
    estimate = [sum(g * z[n].double() for g, z in zip(scales, directions, strict=True)) for n in theta]
    pairs = zip(theta, gradients, strict=True)
    true = [torch.zeros(()) if g is None else g * inside[n] for n, g in pairs]  # of the weights that are moved
    product = sum(float((e * g.double()).sum()) for e, g in zip(estimate, true, strict=True))
    norms = [math.sqrt(sum(float(v.double().square().sum()) for v in many)) for many in (estimate, true)]
    assert logs["cosine"] == pytest.approx(product / math.prod(norms), rel=0.02, abs=1e-6)
    weights_moved = sum(int(mask.sum()) for mask in inside.values())
    assert logs["cosine_expected"] == expected_cosine(args.num_perturbations, weights_moved)
    assert 0.02 < logs["cosine"] / logs["cosine_expected"] < 5


def test_the_variances_are_those_of_plain_losses_with_s_as_trained_as_at_the_start_and_without_adapter(tmp_path):
    trainer = make_trainer(
        tmp_path, diagnose=True, penalty=3.0, learning_rate=0.1, zo_eps=0.01, per_device_train_batch_size=3
    )
    adapted, args = trainer.adapted, trainer.args
    start = weights(adapted, "lower")
    trainer.train()
    before = state(trainer)
    logs = trainer._diagnosis.measure(5, 1.0)
    assert state(trainer) == before
    now = weights(adapted, "lower")
    indices = next(iter(trainer._order()[0]))
    penalty, upper = ([trainer.train_dataset[i] for i in part] for part in (indices[-6:-3], indices[-3:]))
    z = [direction(adapted.backbone, args.seed, 5, j) for j in range(4)]

    def differences(rows, adapter, j):
        """Of the loss of each row, through an adapter or none."""

        def loss(example):
            if adapter is None:
                with adapted.without_adapter():
                    return float(row_loss(adapted.model, example))
            adapted.use(adapter)
            return float(row_loss(adapted.model, example))

        near = [
            [at(adapted.backbone, z[j], scale, lambda e=example: loss(e)) for scale in (0.01, -0.01)]
            for example in rows
        ]
        return np.array([(there - back) / (2 * noise.representable(0.01)) for there, back in near])

    @torch.no_grad()
    def check(name, s, coupled=True):
        for parameter, value in zip(adapted.adapter_parameters("lower").values(), s.values(), strict=True):
            parameter.copy_(value)
        squares, errors = [], []
        for j in range(4):
            parts = [0.25 * differences(upper, "upper" if coupled else None, j)]
            if coupled:
                parts += [0.75 * (differences(penalty, "upper", j) - differences(penalty, "lower", j))]
            squares.append(sum(part.mean() for part in parts) ** 2)
            errors.append(sum(part.var(ddof=1) / len(part) for part in parts))
        assert logs[f"variance{name}"] == pytest.approx(np.mean(squares), rel=0.03)
        assert logs[f"row_variance{name}"] == pytest.approx(np.mean(errors), rel=0.03)

    adapted.model.eval()
    check("", now)
    check("_s_start", start)
    check("_no_adapter", now, coupled=False)


SMALL = {
    "penalty": 1.0,
    "max_steps": 4, "per_device_train_batch_size": 4, "train_size": 20, "dev_size": 6, "test_size": 10,
    "learning_rate": 3e-2, "lower_steps": 2, "logging_steps": 1, "eval_steps": 2, "zo_learning_rate": 1e-2,
    "save_strategy": "no", "adapter": "lora",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, a task, and a diagnosed run `run`; `said.txt` is what the command has said."""
    folder = write_task(tmp_path_factory.mktemp("diagnosis"))
    config = write_config(folder, "run", **SMALL)
    assert main(["train", "--config", str(config), "--output_dir", str(folder / "run"), "--diagnose"]) == 0
    return folder


def results(run):
    return json.loads((run / "results.json").read_text())


def test_the_updates_are_those_of_the_files(folder):
    start, end = (load_file(folder / part / "model.safetensors") for part in ("model", "run/backbone"))
    found = results(folder / "run")
    squares = {}
    for name, before in start.items():
        words = name.split(".")
        part = f"block {words[2]}" if "layers" in words else "embeddings" if "embed_tokens" in words else "other"
        total = squares.setdefault(part, np.zeros(2))
        total += np.square(end[name].numpy() - before.numpy()).sum(), np.square(before.numpy()).sum()
    assert found["diagnosis"]["update"].keys() == squares.keys() == {"embeddings", "block 0", "block 1", "other"}
    for part, (moved, norm) in squares.items():
        assert found["diagnosis"]["update"][part]["norm"] == pytest.approx(moved**0.5, rel=1e-4)
        assert found["diagnosis"]["update"][part]["relative"] == pytest.approx((moved / norm) ** 0.5, rel=1e-4)
    whole = np.sqrt(np.divide(*sum(squares.values())))
    assert found["backbone_change"] == pytest.approx(whole, rel=1e-4)


def test_the_scores_behind_the_gains_are_those_of_zofo_eval_on_folders_put_together_by_hand(folder):
    diagnosis = results(folder / "run")["diagnosis"]
    sizes = [word for key in ("train_size", "dev_size", "test_size") for word in (f"--{key}", str(SMALL[key]))]
    models = {
        "neither": ("model", []),
        "backbone": ("run/backbone", []),
        "adapter": ("model", ["--adapter", str(folder / "run" / "upper")]),
        "both": ("run/backbone", ["--adapter", str(folder / "run" / "upper")]),
    }
    for state_of, (model, adapter) in models.items():
        output = folder / f"{state_of}.json"
        words = ["eval", "--model", str(folder / model), *adapter, "--task", str(folder / "task.yaml"), *sizes]
        assert main([*words, "--output", str(output)]) == 0
        scores = json.loads(output.read_text())["tasks"]["tiny"]
        assert diagnosis["scores"][state_of] == pytest.approx(scores, abs=1e-6)
    assert diagnosis["scores"]["both"] == results(folder / "run")["metrics"]["upper"]
    assert diagnosis["scores"]["neither"] == results(folder / "run")["zero_shot"]
    for key, gain in diagnosis["gain"].items():
        sign = -1 if key == "loss" else 1
        assert gain["backbone"] + gain["adapter"] == pytest.approx(gain["whole"])
        whole = diagnosis["scores"]["both"][key] - diagnosis["scores"]["neither"][key]
        assert gain["whole"] == pytest.approx(sign * whole)


def test_the_run_says_its_diagnosis_in_results_log_and_card(folder):
    found = results(folder / "run")["diagnosis"]
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    for key in ("signal_to_noise", "penalty_gap", "cosine", "variance", "row_variance_no_adapter"):
        values = [log[key] for log in history if key in log]
        assert len(values) == (4 if key in ("signal_to_noise", "penalty_gap") else 2)
        assert found[key]["first"] == values[0]
        assert found[key]["last"] == values[-1]
        assert found[key]["mean"] == pytest.approx(np.mean(values))
    count = sum(p.numel() for p in load_file(folder / "model" / "model.safetensors").values())
    assert found["cosine"]["weights"] == count
    assert found["cosine"]["directions"] == 1
    assert found["cosine"]["expected"] == pytest.approx(math.sqrt(2 / math.pi / count), rel=1e-4)
    assert found["left_out"] == {}
    card = (folder / "run" / "README.md").read_text()
    for words in ("| signal to noise", "| penalty gap", "| cosine with", "| block 1 |", "| loss |", "| embeddings |"):
        assert words in card
    assert plot_curves(history, "a run", folder / "curves.png")
    assert (folder / "curves.png").exists()


@pytest.mark.parametrize(
    ("keys", "line", "kept"),
    [
        ({"method": "fo"}, "diagnose adds nothing; without signal_to_noise, penalty_gap, cosine, variance (method fo "
         "takes no zeroth-order step); without update, gain (θ is not trained)", set()),
        ({"method": "fo", "adapter": "none", "optimizer_in_backward": "true"},
         "diagnose adds at the end a second copy of θ in memory; without signal_to_noise, ", {"update"}),
        ({"method": "bilevel", "zo_learning_rate": 0}, "diagnose adds at the end 2 evaluations on the test rows; at "
         "the end a second copy of θ in memory; without signal_to_noise, penalty_gap, cosine, variance "
         "(zo_learning_rate is 0)", {"update", "scores", "gain"}),
        ({"method": "bilevel", "penalty": 0, "eval_strategy": "no", "logging_steps": 1},
         "diagnose adds at the end 2 evaluations", {"signal_to_noise", "update", "scores", "gain"}),
        ({"method": "zo", "adapter": "none", "eval_steps": 1, "per_device_train_batch_size": 1},
         "diagnose adds at each evaluation 2 forwards of 1 rows and a backward of 1 rows, in memory its activations "
         "and one gradient at a time, of at most 0.0 MiB; at the end a second copy of θ in memory; without "
         "signal_to_noise (a batch of one row has no standard error); ", {"cosine", "update"}),
        ({"method": "none", "adapter": "none"}, "not used by none: ", None),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_left_out_and_said(capsys, tmp_path, keys, line, kept):
    made = {"model": save_tiny_model(tmp_path / "model"), "task": write_task(tmp_path) / "task.yaml"}
    assert main(arguments(**made, **{**QUICK, **keys}, diagnose="true", output_dir=tmp_path / "run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [said for said in lines if said.startswith(line)]
    found = results(tmp_path / "run")
    if kept is None:
        assert "diagnosis" not in found
        return
    assert found["diagnosis"].keys() - {"left_out"} == kept
    assert "Left out: penalty_gap (" in (tmp_path / "run" / "README.md").read_text()


def test_a_backward_pass_that_does_not_fit_is_left_out_and_said_once(tmp_path, caplog, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    trainer = make_trainer(tmp_path, method="zo", adapter="none", **EVALUATED)
    trainer.train()
    assert logged(trainer, "cosine") == []
    assert caplog.text.count("no backward pass is possible (CUDA out of memory)") == 1
    assert not any(p.requires_grad or p.grad is not None for p in trainer.adapted.backbone.values())


def test_the_key_is_a_flag_and_no_part_of_a_run_s_identity():
    words = ["--output_dir", "run", "--use_cpu", "true"]
    assert parse_config(None, [*words, "--diagnose"]).diagnose
    assert parse_config(None, [*words, "--diagnose"]).identity() == parse_config(None, words).identity()
