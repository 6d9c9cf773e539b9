"""The cosine of an estimate with a gradient, against gradients that are all there at once."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from zofo import direction
from zofo.zo.alignment import Alignment, expected_cosine


@pytest.mark.parametrize(("q", "d"), [(1, 40), (3, 40), (1, 3)])
def test_the_expected_cosine_is_the_mean_over_random_projections(q, d):
    generator = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        basis, _ = np.linalg.qr(generator.normal(size=(d, q)))
        gradient = generator.normal(size=d)
        found.append(np.linalg.norm(basis.T @ gradient) / np.linalg.norm(gradient))
    assert expected_cosine(q, d) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 4000**0.5)


def test_at_most_one_gradient_is_there_at_a_time_and_a_tied_or_unread_weight_counts_once():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    layers[1].weight = layers[0].weight
    theta = dict(layers.named_parameters())
    alignment, seen = Alignment(theta, 1, 2, (0.5, -2.0)), []

    def look(found):
        seen.append([p.grad is None for p in theta.values()])

    def loss():
        x = torch.ones(3)
        for layer in layers[:3]:
            x = torch.tanh(layer(x))
        return x.sum()

    with alignment.watching():
        for parameter in theta.values():
            parameter.register_post_accumulate_grad_hook(look)
        loss().backward()
    assert seen == [[True] * len(theta)] * (len(theta) - 2)
    gradients = torch.autograd.grad(loss(), list(theta.values()), allow_unused=True)
    z = [direction(theta, 1, 2, j) for j in range(2)]
    estimate = torch.cat([(0.5 * z[0][n] - 2.0 * z[1][n]).flatten() for n in theta])
    flat = zip(theta.values(), gradients, strict=True)
    true = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in flat])
    assert alignment.cosine == pytest.approx(float(functional.cosine_similarity(estimate, true, dim=0)), abs=1e-5)


def test_weights_beyond_a_limit_count_in_neither():
    torch.manual_seed(0)
    layer = nn.Linear(40, 1, bias=False)
    theta, limit = dict(layer.named_parameters()), float(layer.weight.detach().abs().median())
    alignment = Alignment(theta, 1, 2, (1.0,), limits={"weight": limit})
    slope = torch.randn(1, 40)
    with alignment.watching():
        (layer.weight * slope).sum().backward()
    perturbed = layer.weight.detach().abs() <= limit
    assert 0 < perturbed.sum() < 40
    expected = functional.cosine_similarity(direction(theta, 1, 2, 0)["weight"][perturbed], slope[perturbed], dim=0)
    assert alignment.cosine == pytest.approx(float(expected), abs=1e-5)
