"""Evaluating at θ + scale z: θ is never written, nothing is left behind, nothing is missed, however it is read."""

import contextlib
import functools
import gc
import os
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from tiny import logits, moved_copy, same_bits, snapshot, theta_of, tiny_model
from zofo import noise
from zofo.errors import ZofoError
from zofo.zo.buffers import Scratch
from zofo.zo.perturb import direction, perturbed

SEED, EPS = 3, 0.05


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


def leaf(model, share):
    """A linear layer or norm that the forward runs, `share` of the way through."""
    leaves = [m for m in model.modules() if list(m.parameters(recurse=False))]
    return leaves[int(share * (len(leaves) - 1))]


# Every family of models.


def test_theta_and_outputs_keep_their_bits(model):
    before, base = snapshot(model), logits(model)
    for scale in (EPS, -EPS):
        with perturbed(model, theta_of(model), SEED, scale):
            assert not torch.allclose(logits(model), base, atol=1e-4)
        assert same_bits(model, before)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("scale", [EPS, -EPS])
def test_the_forward_is_that_of_a_plainly_perturbed_copy(model, scale):
    expected = logits(moved_copy(model, (SEED, scale)))
    with perturbed(model, theta_of(model), SEED, scale):
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("error", "share"), [(torch.OutOfMemoryError, 0.0), (ValueError, 0.6), (KeyboardInterrupt, 1.0)]
)
def test_an_exception_inside_a_forward_leaves_nothing_behind(model, error, share):
    def interrupt(*_):
        raise error("in the middle of a forward")

    before, base, hooked = snapshot(model), logits(model), hooks(model)
    handle = leaf(model, share).register_forward_hook(interrupt)
    with pytest.raises(error, match="in the middle"), perturbed(model, theta_of(model), SEED, EPS):
        logits(model)
    handle.remove()
    assert same_bits(model, before)
    assert hooks(model) == hooked
    assert _get_current_function_mode_stack() == []
    assert torch.equal(logits(model), base)


def test_an_exception_between_forwards_leaves_nothing_behind(model):
    before, base = snapshot(model), logits(model)
    with pytest.raises(RuntimeError, match="between"), perturbed(model, theta_of(model), SEED, EPS):  # noqa: PT012
        logits(model)
        raise RuntimeError("between")
    assert same_bits(model, before)
    assert torch.equal(logits(model), base)


def test_each_parameter_alone_changes_the_logits(model):
    base, silent = logits(model), []
    for name, parameter in model.named_parameters():
        with perturbed(model, {name: parameter}, SEED, 1.0):
            if torch.allclose(logits(model), base, atol=1e-5, rtol=0):
                silent.append(name)
    # softmax does not see a shift that is the same for every key, so no method can move a bias of the keys
    assert silent == [name for name in theta_of(model) if name.endswith("k_proj.bias")]


def test_nothing_is_left_behind(model, monkeypatch):
    lent, take = [], Scratch.take

    def recorded(self, like, size=0):
        buffer = take(self, like, size)
        lent.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(Scratch, "take", recorded)
    before, hooked = torch.get_rng_state(), hooks(model)
    with perturbed(model, theta_of(model), SEED, EPS):
        kept = logits(model)
        assert hooks(model) == hooked
    gc.collect()
    embeddings = sum(isinstance(module, torch.nn.Embedding) for module in model.modules())  # only rows are moved
    assert len(lent) >= len(theta_of(model)) - embeddings
    assert [ref for ref in lent if ref() is not None] == []
    assert torch.isfinite(kept).all()
    assert _get_current_function_mode_stack() == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_extra_memory_is_the_largest_parameter(model, monkeypatch):
    made, take = [], Scratch.take

    def recorded(self, like, size=0):
        buffer = take(self, like, size)
        if not any(ref() is buffer for ref in made):
            made.append(weakref.ref(buffer))
        alive.append(sum(ref().size for ref in made if ref() is not None))
        return buffer

    monkeypatch.setattr(Scratch, "take", recorded)
    alive, scratch = [], Scratch()
    largest = max(parameter.numel() for parameter in model.parameters())
    for _ in range(3):
        with perturbed(model, theta_of(model), SEED, EPS, scratch=scratch):
            logits(model)
    # beside it only what one operation reads as well: the bias of a linear layer, at most 96 of 3072 numbers here
    assert max(alive) <= 1.1 * largest
    assert max(alive) < 0.3 * sum(parameter.numel() for parameter in model.parameters())


def test_nested_blocks_add_up(model):
    expected, outer = logits(moved_copy(model, (1, EPS), (2, -2 * EPS))), logits(moved_copy(model, (1, EPS)))
    theta = theta_of(model)
    with perturbed(model, theta, 1, EPS):
        with perturbed(model, theta, 2, -2 * EPS):
            torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(model), outer)


# One model is enough.


def test_nested_blocks_of_different_parameters_add_up():
    model = tiny_model()
    theta = theta_of(model)
    first = {name: p for name, p in theta.items() if "layers.0" in name}
    expected = logits(moved_copy(moved_copy(model, (1, EPS), only=first), (2, EPS)))
    with perturbed(model, first, 1, EPS), perturbed(model, theta, 2, EPS):
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_parameters_have_their_own_class_again_after_nested_blocks(error):
    class Special(nn.Parameter):
        """A kind of parameter that some library may have."""

    model = nn.Linear(4, 4)
    model.weight = Special(model.weight.detach())
    theta, x = theta_of(model), torch.ones(4)
    expected = moved_copy(model, (1, EPS))(x)
    with contextlib.suppress(KeyboardInterrupt), perturbed(model, theta, 1, EPS):
        with perturbed(model, {"weight": model.weight}, 2, EPS):
            assert isinstance(model.weight, Special)
            assert isinstance(model.bias, nn.Parameter)
        torch.testing.assert_close(model(x), expected)
        if error:
            raise error
    assert (type(model.weight), type(model.bias)) == (Special, nn.Parameter)


def test_a_class_that_was_left_behind_does_no_harm():
    model, x = nn.Linear(4, 4), torch.ones(4)
    with perturbed(model, theta_of(model), SEED, EPS):
        left, _ = type(model.weight), model(x)
    base, model.weight.__class__ = model(x), left
    assert torch.equal(model(x), base)
    with perturbed(model, theta_of(model), SEED, EPS):
        assert not torch.equal(model(x), base)
    assert type(model.weight) is nn.Parameter


def test_a_mode_that_was_left_behind_does_no_harm():
    """Ctrl-C may come between torch's push of the mode and the `with` that would pop it."""
    model, x = nn.Linear(4, 4), torch.ones(4)
    base = model(x)
    with perturbed(model, theta_of(model), SEED, EPS):
        expected, left = model(x), _get_current_function_mode_stack()[-1]
    with left:
        assert torch.equal(model(x), base)
        with perturbed(model, theta_of(model), SEED, EPS):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), base)
    assert _get_current_function_mode_stack() == []


def interrupt_at(number, files):
    """A trace that raises KeyboardInterrupt ahead of the first line of these files, the second one, ..."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(files):
            return None
        left -= event == "line"
        if not left:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    return trace


def test_ctrl_c_while_blocks_are_entered_leaves_a_model_that_works():
    model, x = nn.Linear(4, 4), torch.ones(4)
    theta, base, before = theta_of(model), model(x), sys.gettrace()
    expected = [moved_copy(model, (1, EPS))(x), moved_copy(moved_copy(model, (1, EPS)), (2, EPS))(x)]
    files = tuple(os.path.join("zo", name) for name in ("reads.py", "watch.py", "perturb.py"))
    number, entered = 0, False
    while not entered:
        number += 1
        sys.settrace(interrupt_at(number, files))
        with contextlib.suppress(KeyboardInterrupt), perturbed(model, theta, 1, EPS), perturbed(model, theta, 2, EPS):
            sys.settrace(before)
            entered = True
        sys.settrace(before)
        assert torch.equal(model(x), base), number
        with perturbed(model, theta, 1, EPS):
            torch.testing.assert_close(model(x), expected[0])
            with perturbed(model, theta, 2, EPS):
                torch.testing.assert_close(model(x), expected[1])
            torch.testing.assert_close(model(x), expected[0])
    assert number > 50, "lines until both were entered"


def test_another_thread_reads_theta_itself():
    model, x, found = nn.Linear(4, 4), torch.ones(4), []
    base = model(x)
    with perturbed(model, theta_of(model), SEED, EPS):
        moved = model(x)
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], base)
    assert not torch.equal(moved, base)


def test_a_tied_weight_is_one_parameter_with_one_direction():
    model = tiny_model("llama")
    name = "model.embed_tokens.weight"
    assert model.lm_head.weight is theta_of(model)[name]
    with perturbed(model, {name: theta_of(model)[name]}, SEED, EPS):
        read, head = model.model.embed_tokens.weight * 1, model.lm_head.weight * 1
    z = direction({name: read}, SEED, 0)[name]
    assert torch.equal(read, head)
    torch.testing.assert_close(read, model.lm_head.weight.detach() + EPS * z, rtol=1e-6, atol=4 * EPS * 2**-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_are_perturbed_in_their_dtype(dtype):
    model = tiny_model().to(dtype)
    before, expected = snapshot(model), logits(moved_copy(model, (SEED, EPS)))
    with perturbed(model, theta_of(model), SEED, EPS):
        moved = logits(model)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, expected)
    assert same_bits(model, before)


def test_a_scratch_is_used_again(monkeypatch):
    made, empty, model, scratch = [], torch.empty, tiny_model(), Scratch()
    for counted in (False, True):
        if counted:
            monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
        with perturbed(model, theta_of(model), SEED, EPS, scratch=scratch):
            logits(model)
    assert made == []


def test_rademacher_directions():
    model = nn.Linear(4, 3)
    signs = direction(theta_of(model), SEED, 7, 2, "rademacher")
    with torch.no_grad(), perturbed(model, theta_of(model), SEED, EPS, 7, 2, distribution="rademacher"):
        weight = model.weight * 1
        with pytest.raises(ZofoError, match="distribution"), perturbed(model, theta_of(model), SEED, EPS):
            pass
        model(torch.ones(4))
    torch.testing.assert_close(weight, model.weight.detach() + EPS * signs["weight"], rtol=1e-4, atol=1e-5)


# What is refused.


class Partly(nn.Module):
    """Reads `used` in the forward; `spare` never, or only through a detached copy made earlier."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.early = self.spare.weight.detach()

    def forward(self, x):
        return self.used(x) @ self.early


def test_a_parameter_that_is_never_read_is_named():
    model, x = Partly(), torch.ones(1, 4)
    with pytest.raises(ZofoError, match=r"spare\.weight.*\(1 of 3"), perturbed(model, theta_of(model), SEED, EPS):
        model(x)
    with perturbed(model, theta_of(model), SEED, EPS, require_all=False):
        moved = model(x)
    with perturbed(model, theta_of(model.used), SEED, EPS):
        model(x)
    assert not torch.equal(moved, model(x))


def test_many_parameters_that_are_never_read_are_counted():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(10))
    with (
        pytest.raises(ZofoError, match=r"2\.weight, .* \.\.\. .*\(18 of 20"),
        perturbed(model, theta_of(model), SEED, EPS),
    ):
        model[0](torch.ones(2))


def test_shapes_and_dtypes_do_not_count_as_reads():
    model = nn.Linear(4, 4, bias=False)
    with pytest.raises(ZofoError, match="weight"), perturbed(model, theta_of(model), SEED, EPS):
        torch.ones(model.weight.shape, dtype=model.weight.dtype, device=model.weight.device) * model.weight.numel()


def test_an_empty_block_is_allowed():
    model = nn.Linear(4, 4)
    with perturbed(model, theta_of(model), SEED, EPS):
        pass


def test_an_empty_inner_block_does_not_switch_off_the_outer_check():
    model = Partly()
    with pytest.raises(ZofoError, match="spare"), perturbed(model, theta_of(model), SEED, EPS):  # noqa: PT012
        model(torch.ones(1, 4))
        with perturbed(model, theta_of(model), SEED, EPS):
            pass


def test_parameters_of_another_model_are_refused():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    for strange in (theta_of(other), {"weight": model.weight.detach()}, {"weight": model.weight.clone()}):
        with pytest.raises(ZofoError, match="weight is not a parameter of this Linear"):
            perturbed(model, strange, SEED, EPS).__enter__()
    assert _get_current_function_mode_stack() == []


def sgd_step(w, **options):
    torch.optim.SGD([w], lr=1.0, **options).step()


WRITES = {
    "add_": lambda w: w.add_(1),
    "augmented": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__(0, 1.0),
    "out": lambda w: torch.add(w, 1, out=w),
    "copy_": lambda w: w.copy_(torch.zeros(4, 4)),
    "data": lambda w: setattr(w, "data", torch.zeros(4, 4)),
    "noise": lambda w: noise.add_(w, 1, 1.0),
    "optimizer": lambda w: sgd_step(w, foreach=False),
    "foreach optimizer": lambda w: sgd_step(w, foreach=True),
    "zeros_": lambda w: nn.init.zeros_(w),
    "normal_": lambda w: nn.init.normal_(w),
}


@pytest.mark.parametrize("how", WRITES)
def test_writes_inside_a_block_are_refused(how):
    model = nn.Linear(4, 4)
    model.weight.grad = torch.ones(4, 4)
    before = snapshot(model)
    block = perturbed(model, theta_of(model), SEED, EPS, require_all=False)
    refusal = r"writes weight .* read-only|weight is read through its address"
    with torch.no_grad(), pytest.raises(ZofoError, match=refusal), block:
        WRITES[how](model.weight)
    assert same_bits(model, before)


@pytest.mark.parametrize("write", [
    lambda w: w[0].add_(1), lambda w: w.view(-1).mul_(2), lambda w: w.data.zero_(), lambda w: w.detach().add_(1),
    lambda w: functional.relu(w, inplace=True), lambda w: torch.ops.aten.add_.Scalar(w, 1),
])  # fmt: skip
def test_a_write_to_a_view_or_through_a_back_door_does_not_reach_theta(write):
    model = nn.Linear(4, 4)
    before = snapshot(model)
    with torch.no_grad(), perturbed(model, theta_of(model), SEED, EPS, require_all=False):
        write(model.weight)
    assert same_bits(model, before)


# Together with autograd.


class Adapted(nn.Module):
    """A backbone of two layers with a low-rank adapter on the first."""

    def __init__(self, frozen):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)).requires_grad_(not frozen)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        hidden = torch.tanh(self.backbone[0](x) + x @ self.down.t() @ self.up.t())
        return self.backbone[2](self.backbone[1](hidden)).square().mean()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_an_adapter_are_those_of_a_perturbed_copy(frozen, inside):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Adapted(frozen), torch.randn(5, 6)
    theta = {name: p for name, p in model.named_parameters() if name.startswith("backbone")}
    other = moved_copy(model, (SEED, EPS), only=theta)
    other(x).backward()
    with perturbed(model, theta, SEED, EPS):
        loss = model(x)
        model.backbone[0](torch.zeros(6)).sum().item()  # reads the same scratch again before the backward
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for name in ("down", "up"):
        torch.testing.assert_close(getattr(model, name).grad, getattr(other, name).grad)
    assert all(p.grad is None for p in theta.values())


def test_a_scratch_serves_inference_mode_and_training_in_turn():
    model, x, scratch = nn.Linear(4, 4), torch.ones(1, 4), Scratch()
    with torch.inference_mode(), perturbed(model, theta_of(model), SEED, EPS, scratch=scratch):
        first = model(x).sum().item()
    with torch.no_grad(), perturbed(model, theta_of(model), SEED, EPS, scratch=scratch):
        assert model(x).sum().item() == first


# Mixtures of experts.


def mixture(implementation, visited):
    """Four experts in one tensor, of which tokens are sent to some."""
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight.zero_()
        layer.mlp.gate.register_forward_hook(functools.partial(send, visited))
    return model


def send(visited, module, args, output):
    logits, scores, indices = output
    return logits, scores, torch.tensor(visited)[torch.arange(indices.numel()) % len(visited)].view_as(indices)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_that_no_token_visits_are_neither_missed_nor_in_the_way(implementation):
    model, other = mixture(implementation, [0, 2]), mixture("eager", [0, 2])
    before = snapshot(model)
    with torch.no_grad():
        for name, parameter in moved_copy(model, (SEED, EPS)).named_parameters():
            dict(other.named_parameters())[name].copy_(parameter)
    with perturbed(model, theta_of(model), SEED, EPS):
        torch.testing.assert_close(logits(model), logits(other))
    assert same_bits(model, before)


def test_an_item_of_a_parameter_costs_its_own_noise_alone(monkeypatch):
    written, write = [], noise.write_sums
    sizes = lambda sums: [item.write.numel() for item in sums]  # noqa: E731
    monkeypatch.setattr(noise, "write_sums", lambda sums, *args: written.extend(sizes(sums)) or write(sums, *args))
    weight = nn.Parameter(torch.randn(4, 3, 5))
    model = nn.ParameterDict({"experts": weight})
    z = direction({"experts": weight}, SEED)["experts"]
    with torch.no_grad(), perturbed(model, {"experts": weight}, SEED, EPS):
        whole = weight * 1
        written.clear()
        items = [weight[i] for i in (0, -1, torch.tensor(2))]
    assert written == [15, 15, 15]
    assert all(torch.equal(item, whole[i]) for item, i in zip(items, (0, 3, 2), strict=True))
    torch.testing.assert_close(whole, weight.detach() + noise.representable(EPS) * z, rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError), torch.no_grad(), perturbed(model, {"experts": weight}, SEED, EPS):
        weight[4]


class Experts(nn.Module):
    """Experts as modules of their own, of which one is visited."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(4))
        self.other = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))

    def forward(self, x, other):
        return self.experts[2](x) + sum(self.other[i](x) for i in other)


def test_of_experts_in_modules_one_must_be_read_and_of_others_all():
    model = Experts()
    with perturbed(model, theta_of(model), SEED, EPS):
        model(torch.ones(3), [0, 1])
    with pytest.raises(ZofoError, match=r"other\.1\.weight"), perturbed(model, theta_of(model), SEED, EPS):
        model(torch.ones(3), [0])
