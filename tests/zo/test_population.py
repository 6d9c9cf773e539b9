"""A forward of a population is the forwards of its members, one by one; what cannot be is refused by name."""

import pytest
import torch
from torch import nn

from tiny import ALL_FAMILIES, same_bits, snapshot, theta_of, tiny_model, token_batch
from zofo.errors import ZofoError
from zofo.zo.perturb import perturbed
from zofo.zo.population import population

SEED, EPS = 3, 0.02
# views of weights; experts that gather tokens; convolutions
REFUSED = {"falcon", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba", "lfm2"}
POINTS = [(scale, query) for query in (2, 3, 5) for scale in (EPS, -EPS)]


@torch.no_grad()
def one_by_one(model, ids, rows, rank, parameters=None):
    found, low = [], 0
    for (scale, query), count in rows:
        with perturbed(model, parameters or theta_of(model), SEED, scale, 4, query, rank=rank):
            found.append(model(ids[low : low + count]).logits)
        low += count
    return torch.cat(found)


def together(model, ids, rows, rank, parameters=None):
    with population(model, parameters or theta_of(model), SEED, rows, 4, rank=rank):
        return model(ids).logits


@pytest.mark.parametrize("counts", [[2] * 6, [1, 1, 3, 3, 2, 2]], ids=["equal", "unequal"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_forward_of_a_population_is_its_members_forwards(family, counts):
    model, ids = tiny_model(family), token_batch(12)
    rows, before = list(zip(POINTS, counts, strict=True)), snapshot(model)
    if family in REFUSED:
        with pytest.raises(
            ZofoError, match=r"is read by .*: set zo_members_per_forward: 1, or zo_distribution: normal"
        ):
            together(model, ids, rows, rank=2)
    else:
        expected = one_by_one(model, ids, rows, rank=2)
        found = together(model, ids, rows, rank=2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
        with torch.no_grad():
            assert not torch.allclose(found, model(ids).logits, atol=1e-2 * float(expected.std()))
    assert same_bits(model, before)


class Reads(nn.Module):
    """A matrix and a vector, read by a function; another matrix, so that one more is read."""

    def __init__(self, function):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(4, 4, generator=generator)), nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.v)


linear = nn.functional.linear
GOOD = {
    "linear with a bias": lambda x, w, v: linear(x, w, v),
    "keywords": lambda x, w, v: linear(input=x, weight=w, bias=v),
    "flattened": lambda x, w, v: torch.addmm(v, x.reshape(-1, 4), w).view(x.shape),
    "layer norm": lambda x, w, v: nn.functional.layer_norm(linear(x, w), (4,), v, v, 1e-3),
    "a norm with 1 + v": lambda x, w, v: linear(x, w) * (1.0 + v.float()),
    "heads": lambda x, w, v: v * linear(x, w).view(*x.shape[:2], 1, 4).expand(-1, -1, 3, -1),
    "a gate of one number": lambda x, w, v: linear(x, w) * v[2].tanh(),
    "properties": lambda x, w, v: linear(x, w) * v.to(x.dtype) / v.shape[0] + (1.0 - v).numel(),
}
BAD = {
    "transposed": lambda x, w, v: x @ w.t() * v,
    "a property": lambda x, w, v: x @ w.T * v,
    "in a list": lambda x, w, v: linear(x, w) + torch.stack([v, v]).sum(0),
    "written": lambda x, w, v: linear(x, w) + v.add_(1.0),
    "an address": lambda x, w, v: linear(x, w) + v.data_ptr(),
    "rows that are lost": lambda x, w, v: linear(x[:3].sum(0), w, v),
    "some rows": lambda x, w, v: linear(x[:5], w, v),
    "a sum over rows": lambda x, w, v: linear(x, w) + torch.einsum("rtm,m->", x, v),
    "a number": lambda x, w, v: linear(x, w) * float(v[0]),
    "the weight as an input": lambda x, w, v: linear(x, w) + linear(w, x[0, :2].repeat(2, 1), v).sum(),
}


@pytest.mark.parametrize("counts", [[2] * 6, [1, 1, 3, 3, 2, 2]], ids=["equal", "unequal"])
@pytest.mark.parametrize("how", GOOD)
@torch.no_grad()
def test_reads_that_can_be_told_apart_by_rows(how, counts):
    model, x = Reads(GOOD[how]), torch.randn(12, 2, 4, generator=torch.Generator().manual_seed(1))
    expected, low = [], 0
    for (scale, query), count in zip(POINTS, counts, strict=True):
        with perturbed(model, theta_of(model), SEED, scale, query=query, rank=1):
            expected.append(model(x[low : low + count]))
        low += count
    with population(model, theta_of(model), SEED, list(zip(POINTS, counts, strict=True)), rank=1):
        torch.testing.assert_close(model(x), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", BAD)
def test_reads_that_cannot_are_refused_by_name(how):
    model, x = Reads(BAD[how]), torch.randn(12, 2, 4)
    before = snapshot(model)
    with (
        pytest.raises(ZofoError, match=r"^[wv] is read by .*: set zo_members_per_forward: 1"),
        population(model, theta_of(model), SEED, [(point, 2) for point in POINTS]),
    ):
        model(x)
    assert same_bits(model, before)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_a_vector_that_rests_beside_one_that_moves_has_no_rows_whatever_its_length(name):
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    theta = {name: dict(model.named_parameters())[name]}
    rows, x = list(zip(POINTS[:4], [2] * 4, strict=True)), torch.randn(8, 3, 16)
    with torch.no_grad(), population(model, theta, SEED, rows, 4, rank=1):
        found = model(x)
    for place, (scale, query) in enumerate(POINTS[:4]):
        with torch.no_grad(), perturbed(model, theta, SEED, scale, 4, query, rank=1):
            torch.testing.assert_close(found[2 * place : 2 * place + 2], model(x[2 * place : 2 * place + 2]))


def test_rows_at_scale_zero_are_at_theta_and_a_block_can_be_used_again():
    model, ids = tiny_model(), token_batch(4)
    for _ in range(2):
        found = together(model, ids, [((0.0, 0), 2), ((EPS, 0), 2)], rank=1)
        with torch.no_grad():
            base = model(ids).logits
        torch.testing.assert_close(found[:2], base[:2])
        assert not torch.allclose(found[2:], base[2:], atol=1e-3)


def test_what_is_not_read_or_not_the_models_is_refused():
    model, ids, rows = tiny_model(), token_batch(4), [((EPS, 0), 2), ((-EPS, 0), 2)]
    model.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ZofoError, match="the forward never read extra"):
        together(model, ids, rows, rank=1)
    with pytest.raises(ZofoError, match="foreign is not a parameter of this"):
        together(model, ids, rows, 1, {"foreign": torch.ones(3)})
    with pytest.raises(ZofoError, match="zo_rank is 64"):
        together(model, ids, rows, 64)


def test_blocks_do_not_nest():
    model, rows = tiny_model(), [((EPS, 0), 2), ((-EPS, 0), 2)]
    theta = theta_of(model)
    blocks = [perturbed(model, theta, 1, EPS, require_all=False), population(model, theta, 1, rows, require_all=False)]
    with pytest.raises(ZofoError, match="inside a perturbed block"), blocks[0], population(model, theta, 1, rows):
        pass
    with pytest.raises(ZofoError, match="inside a population"), blocks[1], perturbed(model, theta, 1, EPS):
        pass
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_an_exception_leaves_nothing_behind():
    model, ids, rows = tiny_model(), token_batch(4), [((EPS, 0), 2), ((-EPS, 0), 2)]
    before, base = snapshot(model), model(ids).logits
    with pytest.raises(KeyboardInterrupt), population(model, theta_of(model), 1, rows):
        raise KeyboardInterrupt
    assert same_bits(model, before)
    assert torch.equal(model(ids).logits, base)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
