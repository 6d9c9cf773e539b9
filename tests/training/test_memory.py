"""The bytes that the tracker counts are those of closed forms, on real and on fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tiny import save_tiny_model, theta_of, tiny_model, token_batch
from zofo.config import ZOFOConfig
from zofo.models.load import replace_tensors
from zofo.training.memory import MemoryTracker, fake, step_memory
from zofo.zo.population import population

FLOAT = 4


def faked(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_tensors(model, torch.empty_like)
    return model


@pytest.mark.parametrize("make", [lambda model: model, faked], ids=["real", "fake"])
@pytest.mark.parametrize("layers", [4, 7])
def test_a_stack_of_linear_layers_peaks_at_its_second_backward(make, layers):
    rows, width = 64, 16
    stack = make(nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))))
    with MemoryTracker() as tracker:
        tracker.mark("weights", stack.parameters())
        stack(torch.zeros(rows, width)).sum().backward()
        tracker.mark("gradients", [p.grad for p in stack.parameters()])
    found = tracker.at_peak()
    assert found["weights"] == FLOAT * layers * width**2
    assert found["gradients"] == FLOAT * 2 * width**2
    # the inputs of all layers but the last, and the gradients of the inputs of the last two; the loss and its gradient
    activations = FLOAT * (layers + 1) * rows * width
    assert activations <= found["activations"] <= activations + 2 * FLOAT
    assert tracker.peak == sum(found.values())


@pytest.mark.parametrize("make", [lambda model: model, faked], ids=["real", "fake"])
def test_the_states_of_adam_are_two_copies_and_a_counter(make):
    layer = make(nn.Linear(8, 8))
    adam = torch.optim.AdamW(layer.parameters(), fused=True)
    with MemoryTracker() as tracker:
        tracker.mark("weights", layer.parameters())
        for _ in range(2):
            layer(torch.zeros(1, 8)).sum().backward()
            adam.step()
            tracker.mark("optimizer", [value for state in adam.state.values() for value in state.values()])
    assert tracker.at_peak()["optimizer"] == FLOAT * (2 * (64 + 8) + 2)


def test_what_is_gone_is_not_counted_and_views_only_once():
    with MemoryTracker() as tracker:
        for _ in range(5):
            block = torch.zeros(100)
            block.view(10, 10).t()[0].add_(1)
            del block
    assert tracker.peak == FLOAT * 100


def test_fake_and_real_steps_of_a_language_model_peak_alike(family):
    peaks = []
    for make in (lambda model: model, faked):
        model = make(tiny_model(family).train().requires_grad_())
        with MemoryTracker() as tracker:
            tracker.mark("weights", theta_of(model).values())
            loss = model(input_ids=token_batch(), use_cache=False).logits.logsumexp(-1).sum()
            loss.backward()
            assert float(loss.detach()) > 0  # of a fake loss as well
        peaks.append(tracker.peak)
    assert peaks[0] == peaks[1] > 2 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [1, 3]], ids=["equal", "unequal"])
def test_fake_and_real_forwards_of_a_population_peak_alike(family, counts):
    peaks, points = [], [(0.1, 0), (-0.1, 0), (0.1, 1), (-0.1, 1)]
    for make in (lambda model: model, faked):
        model = make(tiny_model(family))
        with MemoryTracker() as tracker:
            tracker.mark("weights", theta_of(model).values())
            with population(model, theta_of(model), 0, list(zip(points, counts, strict=False)), rank=2):
                model(input_ids=token_batch(4, 30), use_cache=False)
        peaks.append(tracker.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)  # a real forward has a few numbers of its own


def test_a_tied_weight_stays_tied():
    model = tiny_model("llama")
    kept = dict(model.named_parameters())
    made = replace_tensors(model, torch.clone)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(made) == len({*map(id, kept.values()), *map(id, model.buffers())})
    assert all(p is made[id(kept[name])] for name, p in model.named_parameters())


def test_a_shaped_population_needs_the_memory_of_a_plain_one(tmp_path):
    """One direction would be refused, as its members have nothing to be compared with."""
    keys = {"method": "zo", "adapter": "none", "zo_estimator": "one_sided", "num_perturbations": 8, "loss": "lm"}
    keys |= {"model": str(save_tiny_model(tmp_path)), "output_dir": str(tmp_path), "use_cpu": True}
    ids = token_batch(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scored": torch.tensor([[0, 1], [4, 4], [0, 0]])}
    sizes = []
    for objective in ({}, {"objective": "token_f1", "zo_shaping": "zscore"}):
        config = ZOFOConfig(**keys, **objective)
        sizes.append(step_memory(config, fake(config), batch).activations)
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)  # a few numbers more
