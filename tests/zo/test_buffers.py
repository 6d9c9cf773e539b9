"""Weights moved together with the one that is read, as on a GPU: here on a CPU, as if moving one cost a launch."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tiny import FAMILIES, tiny_model
from zofo import noise, perturbed
from zofo.zo import reads
from zofo.zo.buffers import Buffer, Scratch

IDS = torch.arange(2, 12)[None]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.setattr(reads, "_is_launched", lambda parameter: not torch.is_grad_enabled())
    monkeypatch.setattr(reads, "PART", 1 << 40)


@pytest.fixture
def launches(monkeypatch):
    """How many weights each launch moved."""
    made, write = [], noise.write_sums
    monkeypatch.setattr(noise, "write_sums", lambda sums, *rest: made.append(len(sums)) or write(sums, *rest))
    return made


def logits(model, scratch, seed=1):
    with torch.no_grad(), perturbed(model, dict(model.named_parameters()), seed, 0.01, scratch=scratch):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_in_a_known_order_has_the_same_bits_and_few_launches(family, launches, monkeypatch):
    model, scratch = tiny_model(family), Scratch()
    before = [p.detach().clone() for p in model.parameters()]
    found = [logits(model, scratch, seed) for seed in (1, 2, 2)]
    together = len(launches)
    monkeypatch.setattr(reads, "_is_launched", lambda parameter: False)
    assert torch.equal(found[0], logits(model, Scratch(), 1))
    assert torch.equal(found[1], logits(model, Scratch(), 2))
    assert torch.equal(found[1], found[2])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    alone = (len(launches) - together) / 2
    assert together - alone < 0.8 * 2 * alone  # the first forward does not know the order yet
    assert max(launches[:together]) > 2


def test_a_weight_is_moved_ahead_only_within_the_memory_of_the_largest(monkeypatch):
    model, scratch, sizes, init = tiny_model(), Scratch(), [], Buffer.__init__
    monkeypatch.setattr(Buffer, "__init__", lambda self, like, size: sizes.append(size) or init(self, like, size))
    for seed in range(3):
        logits(model, scratch, seed)
    assert max(sizes) == max(p.numel() for p in model.parameters())
    assert len(sizes) == 1


class Choosing(nn.Module):
    """Layers of which an input chooses some."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 400), nn.Linear(400, 1)
        self.choice = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])

    def forward(self, which):
        return self.last(self.first(self.choice[which](self.choice[0](torch.ones(1, 4)))))


def test_what_was_moved_and_not_read_is_not_moved_ahead_again(launches):
    torch.manual_seed(0)
    model, scratch = Choosing(), Scratch()
    theta = dict(model.named_parameters())

    def run(which):
        with torch.no_grad(), perturbed(model, theta, which, 0.1, scratch=scratch, require_all=False):
            launches.clear()
            found = model(which)
            count = sum(launches)
        moved = {name: p + 0.1 * noise.normal(noise.stream_key(which, 0, 0, name), 0, p.numel()).view(p.shape)
                 for name, p in theta.items()}  # fmt: skip
        torch.testing.assert_close(found, torch.func.functional_call(model, moved, (which,)), rtol=1e-4, atol=1e-4)
        return count

    counts = [run(which) for which in (1, 2, 3, 1, 2, 3, 1, 2, 3)]
    # each input reads the weights and biases of four layers
    assert max(counts) > 8
    assert counts[-3:] == [8, 8, 8]


def test_a_view_that_is_kept_stays_as_it_was():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))

        def forward(self, x):
            turned = self.a.t()
            for weight in (self.b, self.c, self.b):
                x = nn.functional.linear(x, weight)
            return x @ turned

    model, scratch = Keeps(), Scratch()
    with torch.no_grad():
        for seed in range(3):
            theta = dict(model.named_parameters())
            with perturbed(model, theta, seed, 0.1, scratch=scratch):
                found = model(torch.ones(1, 4))
            a, b, c = (torch.ones(4, 4) + 0.1 * noise.normal(noise.stream_key(seed, 0, 0, n), 0, 16).view(4, 4)
                       for n in "abc")  # fmt: skip
            torch.testing.assert_close(found, torch.ones(1, 4) @ b.T @ c.T @ b.T @ a.T, rtol=1e-4, atol=1e-4)


def test_a_gradient_keeps_its_own_copy():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 400), *(nn.Linear(4, 4, bias=False) for _ in range(3))])
    theta, scratch, x = dict(layers.named_parameters()), Scratch(), torch.ones(1, 4, requires_grad=True)

    @torch.no_grad()
    def forwards(*order):
        for number in order:
            layers[number](x)

    for seed in range(3):
        with perturbed(layers, theta, seed, 0.1, scratch=scratch):
            forwards(0, 1, 2, 3)
            loss = layers[2](x).sum()
            forwards(0, 3, 2, 1)
            (found,) = torch.autograd.grad(loss, x)
        moved = theta["2.weight"] + 0.1 * noise.normal(noise.stream_key(seed, 0, 0, "2.weight"), 0, 16).view(4, 4)
        torch.testing.assert_close(found, moved.detach().sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


def test_all_memory_is_given_back_without_a_search_for_it():
    model, scratch = tiny_model(), Scratch()
    for _ in range(2):
        logits(model, scratch)
    (buffer,) = (weakref.ref(b) for b in scratch._free)
    gc.disable()
    try:
        del scratch
        assert buffer() is None
    finally:
        gc.enable()


def test_the_order_is_still_known_after_the_memory_was_given_back(launches):
    model, scratch = tiny_model(), Scratch()
    logits(model, scratch)
    first, known = launches[:], len(launches)
    logits(model, scratch)
    second, known = launches[known:], len(launches)
    scratch.forget()
    assert not scratch._free
    logits(model, scratch)
    assert launches[known:] == second
    assert len(second) < len(first)


def test_with_gradients_every_weight_is_moved_alone(launches):
    model, scratch = tiny_model(), Scratch()
    for _ in range(2):
        with perturbed(model, dict(model.named_parameters()), 1, 0.01, scratch=scratch):
            model(input_ids=IDS)
    assert set(launches) == {1}
