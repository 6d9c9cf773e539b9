"""A parameter is perturbed whoever reads it and however: views, lists, fused kernels, foreign modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tiny import moved_copy, same_bits, snapshot, theta_of
from zofo.errors import ZofoError
from zofo.zo import reads
from zofo.zo.buffers import Scratch
from zofo.zo.perturb import perturbed

SEED = 3


class Reads(nn.Module):
    """Two parameters, read by a function."""

    def __init__(self, function, shape=(4, 4)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w, self.v = (nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.v)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


IDS = torch.tensor([3, 0])


def keep(view):
    """A view of w, held while v is read: the scratch under it must not be used again meanwhile."""

    def function(x, w, v):
        kept = view(w)
        return x @ (v * 1) @ (v + 1) + x @ kept

    return function


ODD_READS = {
    "another module's weight": lambda x, w, v: functional.linear(functional.linear(x, w), v),
    "kept transpose": keep(lambda w: w.t()),
    "kept property": keep(lambda w: w.T),
    "kept view": keep(lambda w: w.view(16).view(4, 4)),
    "kept chunk": keep(lambda w: w.chunk(2)[1].t() @ torch.ones(2, 4)),
    "kept chunks": lambda x, w, v: (lambda parts: x @ (v * 1) @ (v + 1) + x[:, :2] @ parts[0] + x[:, 2:] @ parts[1])(
        w.chunk(2)
    ),
    "kept detached": keep(lambda w: w.detach()),
    "kept data": keep(lambda w: w.data),
    "kept row": lambda x, w, v: (lambda row: x @ (v * 1) @ (v + 1) + row)(w[1]),
    "cat": lambda x, w, v: x @ torch.cat([w, v], dim=1),
    "stack": lambda x, w, v: x @ torch.stack((w, v)).sum(0),
    "keywords": lambda x, w, v: functional.linear(input=x, weight=w, bias=v[0]),
    "einsum": lambda x, w, v: torch.einsum("bi,ij,jk->bk", x, w, v),
    "list of operands": lambda x, w, v: torch.einsum("bi,ij,jk->bk", [x, w, v]),
    "operators": lambda x, w, v: x @ (1 - w) / (2 + v.abs()).sum(),
    "iteration": lambda x, w, v: torch.stack([x @ row for row in w]) + sum(row.sum() for row in v),
    "numbers": lambda x, w, v: x * w.tolist()[0][0] + float(v[0, 0]) + v[1, 1].item(),
    "numpy": lambda x, w, v: x @ torch.from_numpy(w.detach().numpy() + v.detach().numpy()),
    "custom function": lambda x, w, v: Product.apply(x, w) + Product.apply(x, v),
    "aten": lambda x, w, v: torch.ops.aten.linear(x, w) + torch.ops.aten.mm.default(x, v),
    "in place into another tensor": lambda x, w, v: x.clone().add_(w[0]).mul_(v[0]),
    "out": lambda x, w, v: torch.mm(x, w, out=torch.empty(2, 4)) @ v,
    "expert by index": lambda x, w, v: torch.stack([x * w[e] + v[e] for e in (0, 2)]),
    "the same twice": lambda x, w, v: torch.bmm(torch.stack([w, w]), torch.stack([v, w])) + x.sum(),
    "module called functionally": lambda x, w, v: torch.func.functional_call(
        nn.Linear(4, 4), {"weight": w, "bias": v[0]}, (x,)
    ),
    "checkpoint": lambda x, w, v: torch.utils.checkpoint.checkpoint(lambda a: a @ w @ v, x, use_reentrant=False),
    "embeddings": lambda x, w, v: (
        x
        + functional.embedding(IDS, w)
        + functional.embedding(input=IDS.int(), weight=v, padding_idx=1)
        + functional.embedding(torch.tensor([[3, 9], [1, 9]])[:, 0], w, 0, None, 2.0)
        + functional.embedding(IDS, v * 2)
    ),
    "embedding of two-dimensional ids": lambda x, w, v: x + functional.embedding(IDS[:, None], w)[:, 0] @ v,
    "truth and integers": lambda x, w, v: x * int(w[0, 0] > 0) + int(w[:1, :1] * 100) + int(v.sum() * 100),
}


@pytest.mark.parametrize("how", ODD_READS)
@torch.no_grad()
def test_a_parameter_is_perturbed_however_it_is_read(how):
    model, x = Reads(ODD_READS[how]), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    before, base, expected = snapshot(model), model(x), moved_copy(model, (SEED, 0.5))(x)
    with perturbed(model, theta_of(model), SEED, 0.5):
        moved = model(x)
    torch.testing.assert_close(moved, expected)
    assert not torch.allclose(moved, base)
    assert same_bits(model, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_has_the_bits_of_the_moved_matrix_in_nested_blocks_too(dtype):
    model = nn.Embedding(1000, 48).to(dtype)
    ids = torch.arange(40).view(5, 8) * 25
    theta = theta_of(model)
    with perturbed(model, theta, SEED, 0.5), perturbed(model, theta, SEED, -0.25, query=1):
        looked_up, whole = model(ids), model.weight.clone()
    assert torch.equal(looked_up, whole[ids])


SPLIT = 100  # numbers at a time: matrices of 7 columns then go by parts of 14 rows


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_matrix_is_multiplied_by_parts_of_its_rows_that_have_its_bits(monkeypatch, dtype, bias):
    monkeypatch.setattr(reads, "PART", SPLIT)
    made, take = [], Scratch.take
    monkeypatch.setattr(
        Scratch, "take", lambda self, like, size=0: made.append(size or like.numel()) or take(self, like, size)
    )
    model = nn.Linear(7, 53, bias).to(dtype)
    theta = theta_of(model)
    if bias:
        model.bias.zero_()
    with perturbed(model, theta, SEED, 0.5), perturbed(model, theta, SEED, -0.25, query=1):
        product = model(torch.eye(7, dtype=dtype).view(1, 7, 7))
        assert max(made) <= SPLIT
        whole, added = model.weight.clone(), model.bias.clone() if bias else torch.zeros((), dtype=dtype)
    assert torch.equal(product, (whole.t() + added).unsqueeze(0))


@pytest.mark.parametrize("inputs", [torch.ones(6), torch.ones(2, 8), torch.tensor(1.0)])
@torch.no_grad()
def test_inputs_that_do_not_fit_a_large_matrix_are_refused_as_ever(monkeypatch, inputs):
    monkeypatch.setattr(reads, "PART", SPLIT)
    model = nn.Linear(7, 53)
    refused = pytest.raises(RuntimeError) if inputs.ndim else pytest.raises((RuntimeError, IndexError))
    with perturbed(model, theta_of(model), SEED, 0.5), refused:
        model(inputs)


@pytest.mark.parametrize("how", ODD_READS)
@torch.no_grad()
def test_parts_of_every_size_change_no_read(monkeypatch, how):
    monkeypatch.setattr(reads, "PART", 4)
    model, x = Reads(ODD_READS[how]), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    expected = moved_copy(model, (SEED, 0.5))(x)
    with perturbed(model, theta_of(model), SEED, 0.5):
        torch.testing.assert_close(model(x), expected)


def test_gradients_go_through_a_large_matrix(monkeypatch):
    monkeypatch.setattr(reads, "PART", SPLIT)
    model, x = nn.Sequential(nn.Linear(7, 53), nn.Tanh(), nn.Linear(53, 3)), torch.randn(2, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(moved_copy(model, (SEED, 0.5))(x).square().sum(), x)
    with perturbed(model, theta_of(model), SEED, 0.5):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_ids_outside_of_an_embedding_are_refused_as_ever():
    model = nn.Embedding(10, 4)
    for ids in ([0, 10], [-1, 3]):
        with perturbed(model, theta_of(model), SEED, 0.5), pytest.raises(IndexError):
            model(torch.tensor(ids))
    with perturbed(model, theta_of(model), SEED, 0.5), pytest.raises(RuntimeError):
        model(torch.tensor([0.5]))


@torch.no_grad()
def test_a_parameter_of_one_number_can_be_read_as_an_integer():
    model = Reads(lambda x, w, v: x * int(w) + int(v), shape=(1,))
    for parameter in model.parameters():
        parameter.fill_(1000.0)
    expected = moved_copy(model, (SEED, 50.0))(torch.ones(3))
    with perturbed(model, theta_of(model), SEED, 50.0):
        torch.testing.assert_close(model(torch.ones(3)), expected)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        chosen = [torch.where(x.sum(-1).floor() % 3 == e)[0] for e in range(3)]
        return sum(torch.zeros_like(x).index_add(0, rows, x[rows] @ self.experts[e]) for e, rows in enumerate(chosen))


@pytest.mark.parametrize("make", [
    lambda: Mixture(), lambda: nn.LSTM(4, 4, num_layers=2), lambda: nn.GRUCell(4, 4), lambda: nn.Bilinear(4, 4, 2),
    lambda: nn.MultiheadAttention(4, 2), lambda: nn.TransformerEncoderLayer(4, 2, 8), lambda: nn.Conv1d(6, 2, 3),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), lambda: nn.PReLU(4), lambda: nn.RMSNorm(4),
])  # fmt: skip
@torch.no_grad()
def test_modules_that_read_their_parameters_in_unusual_ways(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(6, 4)
    inputs = {nn.MultiheadAttention: (x, x, x), nn.Bilinear: (x, x)}.get(type(model), (x,))

    def output(module):
        result = module(*inputs)
        return result[0] if isinstance(result, tuple) else result

    before, base, expected = snapshot(model), output(model), output(moved_copy(model, (SEED, 0.2)))
    with perturbed(model, theta_of(model), SEED, 0.2):
        moved = output(model)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, base, atol=1e-3)
    assert same_bits(model, before)


def test_a_read_through_the_address_is_refused():
    model = nn.Linear(4, 4)
    with (
        pytest.raises(ZofoError, match="weight is read through its address"),
        perturbed(model, theta_of(model), 0, 0.1),
    ):
        model.weight.data_ptr()


SILENT = {
    "tensor": lambda x, w, v: x * torch.tensor(w) * v * w,
    "data": lambda x, w, v: x * torch.tensor(data=w) * v * w,
    "new_tensor": lambda x, w, v: x * x.new_tensor(w) * v * w,
    "alpha": lambda x, w, v: torch.add(x, x, alpha=w) * v * w,
    "full": lambda x, w, v: torch.full((4,), w) * x * v * w,
}


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch advises against some of these
def test_a_read_that_asks_nobody_is_refused(how):
    model = Reads(SILENT[how], shape=()).requires_grad_(False)  # as a backbone is: else torch refuses some itself
    with (
        torch.no_grad(),
        pytest.raises(ZofoError, match="reads w without asking"),
        perturbed(model, theta_of(model), 0, 0.1),
    ):
        model(torch.ones(4))
