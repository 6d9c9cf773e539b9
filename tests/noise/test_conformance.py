"""Conformance vectors: what another program must give to take part in a run; and one that does, without zofo.

`conformance.json` holds, for streams of every distribution, the key (64 bits), indices and the bits of float32 there;
for directions of low rank the bits of A and B, transposed, without a scale; and whole steps of a tiny model, with a
tolerance. Run as a script, this file writes it anew. The tests compute the same in `examples/`, from the equations.
"""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from plain import MORE_TOKENS, assert_close, make_rows, make_trainer, micro_steps, weights
from plain_noise import hashes, normal, stream_key
from worker import Worker
from zofo import noise
from zofo.zo.estimators import Estimate, Probes
from zofo.zo.low_rank import Matrix
from zofo.zo.optimizers import ZerothOrderOptimizer
from zofo.zo.perturb import perturbed
from zofo.zo.rules import SGD

FILE = Path(__file__).with_name("conformance.json")
NAME = "model.layers.0.self_attn.q_proj.weight"
STREAMS = [(0, 0, 0, ""), (1, 0, 0, NAME), (0, 1, 0, NAME), (0, 0, 1, NAME), (42, 7, 3, NAME), (42, 7, -1, NAME)]
STARTS = (0, 1000, 2**32 - 3, 2**40 + 5)
MATRICES = [(1, (5, 3)), (2, (3, 4))]  # rank and shape
COUNT, QUERIES = 6, 2
MODEL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
ROWS = [[3, 17, 4, 9, 30], [8, 8, 21, 5, 12], [25, 2, 14, 19, 7]]
SEED, STEP, RATE, EPS = 42, 7, 0.01, 0.001
TOLERANCE = {"loss": 2e-6, "after": 2e-6}


def bits(values):
    return [f"{value:08x}" for value in np.asarray(values, np.float32).reshape(-1).view(np.uint32).tolist()]


def start():
    """A Llama of `MODEL`, each weight 0.1 z of the stream "initial NAME", norms 1 more."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.1 * normal(stream_key(f"initial {name}"), 0, parameter.numel()) + (parameter.ndim == 1)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)).view_as(parameter))
    return model


def rows():
    """The last token of each row is to be predicted."""
    ids = torch.tensor(ROWS)
    return {"input_ids": ids, "labels": ids.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, -100)}


def a_step(rank):
    """Two directions, two-sided, on all rows, and the update that follows, by this package."""
    model, probes = start(), Probes(queries=QUERIES, eps=EPS, rank=rank)
    theta = dict(model.named_parameters())
    losses = {}
    for scale, query in probes.points():
        with torch.no_grad(), perturbed(model, theta, SEED, scale, STEP, query, rank=rank):
            losses[scale, query] = float(model(**rows()).loss)
    optimizer = ZerothOrderOptimizer(theta, SGD(), RATE, rank=rank)
    projected = probes.project(lambda scale, query: losses[scale, query])
    update = optimizer.propose(Estimate(SEED, STEP, projected))
    optimizer.step()
    return {
        "seed": SEED, "step": STEP, "rank": rank, "rate": RATE, "eps": EPS, "rows": ROWS, "model": MODEL,
        "losses": [[*point, loss] for point, loss in losses.items()],
        "scales": [[*key, scale] for key, scale in update.scales.items()],
        "after": {name: value.detach().reshape(-1)[:4].tolist() for name, value in theta.items()},
        "tolerance": TOLERANCE,
    }  # fmt: skip


def written():
    """What the file holds, by this package."""
    streams = [
        {
            "seed": seed, "step": step, "query": query, "name": name, "distribution": distribution, "start": start,
            "key": f"{noise.stream_key(seed, step, query, name):016x}",
            "float32": bits(noise.sample(noise.stream_key(seed, step, query, name), start, COUNT, distribution)),
        }
        for seed, step, query, name in STREAMS for distribution in ("normal", "rademacher") for start in STARTS
    ]  # fmt: skip
    low_rank = []
    for rank, shape in MATRICES:
        a, b = Matrix(torch.empty(shape), NAME, rank).drawn(SEED, STEP, range(QUERIES))
        key = noise.stream_key(SEED, STEP, 0, NAME, part="low rank ")
        low_rank += [
            {
                "seed": SEED, "step": STEP, "query": query, "name": NAME, "rank": rank, "shape": list(shape),
                "key": f"{key:016x}", "A transposed": bits(a[query]), "B transposed": bits(b[query]),
            }
            for query in range(QUERIES)
        ]  # fmt: skip
    return {"streams": streams, "low_rank": low_rank, "steps": [a_step(rank=0), a_step(rank=2)]}


@pytest.fixture
def stored():
    return json.loads(FILE.read_text())


def close(found, expected, tolerance):
    return np.allclose(found, expected, rtol=0, atol=tolerance)


def test_the_file_is_what_this_package_gives(stored):
    made = written()
    assert (made["streams"], made["low_rank"]) == (stored["streams"], stored["low_rank"])
    assert len(made["steps"]) == len(stored["steps"])
    for step, kept in zip(made["steps"], stored["steps"], strict=True):
        assert close(step.pop("losses"), kept.pop("losses"), TOLERANCE["loss"])
        assert close([*step.pop("after").values()], [*kept.pop("after").values()], TOLERANCE["after"])
        assert close(step.pop("scales"), kept.pop("scales"), RATE * TOLERANCE["loss"] / EPS)
        assert step == kept


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_streams_are_the_equations(stored, distribution):
    rows = [row for row in stored["streams"] if row["distribution"] == distribution]
    assert len(rows) == len(STREAMS) * len(STARTS)
    for row in rows:
        key = stream_key("{seed}/{step}/{query}/{name}".format(**row))
        signs = np.where(hashes(key, row["start"], COUNT) >> 31, 1.0, -1.0)
        assert f"{key:016x}" == row["key"]
        assert bits(signs if distribution == "rademacher" else normal(key, row["start"], COUNT)) == row["float32"]


def test_directions_of_low_rank_are_the_equations(stored):
    assert len(stored["low_rank"]) == len(MATRICES) * QUERIES
    for row in stored["low_rank"]:
        worker = Worker(start(), row["seed"], row["rank"])
        a, b = worker.factors(row["name"], row["shape"], row["step"], row["query"])
        assert f"{stream_key('low rank {seed}/{step}/0/{name}'.format(**row)):016x}" == row["key"]
        assert (bits(a), bits(b)) == (row["A transposed"], row["B transposed"])


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_is_what_a_worker_in_plain_transformers_gives(stored, which):
    stored = stored["steps"][which]
    worker = Worker(start(), stored["seed"], stored["rank"])
    points = [(scale, query) for scale, query, _ in stored["losses"]]
    expected = [loss for _, _, loss in stored["losses"]]
    losses = worker.losses(stored["step"], points, rows())
    assert close(losses, expected, stored["tolerance"]["loss"])
    assert not close(losses[:2], losses[2:], 10 * stored["tolerance"]["loss"])
    worker.update({(step, query): scale for step, query, scale in stored["scales"]})
    before, theta = dict(start().named_parameters()), dict(worker.model.named_parameters())
    assert theta.keys() == stored["after"].keys()
    for name, after in stored["after"].items():
        assert close(theta[name].detach().reshape(-1)[:4], after, stored["tolerance"]["after"])
        assert not close(before[name].detach().reshape(-1)[:4], after, 100 * stored["tolerance"]["after"])


def inputs(batch):
    """A batch of zofo as the model's own forward takes it; the last token of an answer is not read by zofo's."""
    ids, mask = (functional.pad(batch[name], (0, 1), value=1) for name in ("input_ids", "attention_mask"))
    labels = torch.full_like(ids, -100)
    row, position, token = batch["scored"]
    labels[row, position + 1] = token
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("low_rank", [{}, {"zo_distribution": "low_rank", "zo_rows": "shared", "zo_rank": 2}])
def test_a_worker_follows_a_run_by_numbers_alone(tmp_path, low_rank):
    rule, probes = SGD(), Probes(queries=2, rank=low_rank.get("zo_rank", 0))
    keys = {"zo_learning_rate": RATE, "num_perturbations": 2, "loss": "lm", **low_rank}
    trainer = make_trainer(tmp_path, make_rows(12, options=MORE_TOKENS), method="zo", adapter="none", **keys)
    worker = Worker(copy.deepcopy(trainer.adapted.base), trainer.args.seed, probes.rank)
    before = weights(trainer.adapted, "backbone")
    for step, bundle in enumerate(itertools.islice(micro_steps(trainer), 3)):
        asked = probes.points()
        losses = dict(zip(asked, worker.losses(step, asked, inputs(bundle["zo"][0])), strict=True))
        projected = probes.project(lambda scale, query, known=losses: known[scale, query])
        update, _ = rule.update(Estimate(trainer.args.seed, step, projected), RATE, {}, None)
        worker.update(update.scales)
    trainer.train()
    run, followed = weights(trainer.adapted, "backbone"), dict(worker.model.named_parameters())
    largest = max(float((run[name] - before[name]).abs().max()) for name in run)
    assert_close(run, {name: value.detach() for name, value in followed.items()}, atol=0.02 * largest)


if __name__ == "__main__":
    FILE.write_text(json.dumps(written(), indent=1) + "\n")
