"""What needs a GPU: the same bits as on a CPU, θ untouched, and the memory of an inference.

Without one, everything here is skipped, and the skips are listed at the end of a test run.
"""

import pytest
import torch
from test_streams import DTYPES, FORMS, bits

from plain import MORE_TOKENS, ONE_TOKEN, make_rows, make_trainer, micro_steps, same, weights
from tiny import FAMILIES, tiny_model
from zofo import direction, noise, perturbed
from zofo.noise import streams
from zofo.noise.eager import Piece, eager
from zofo.zo.buffers import Scratch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, so nothing is claimed about GPUs"),
]


@pytest.fixture(scope="module", params=["eager", "launched"])
def kernel(request):
    """The two forms of the noise that a GPU can run."""
    if request.param == "eager":
        return eager
    launch = streams.gpu_kernel()
    assert launch is not None, "the fast form of the noise does not work on this GPU"
    return lambda piece: launch([piece])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_noise_has_the_bits_of_the_cpu(kernel, dtype, form):
    for size in (1, 17, 4096, 140_001):
        w = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected, found, apart = w.clone(), w.cuda(), torch.empty_like(w, device="cuda")
        eager(Piece(expected, expected, 2**32 - 100, *form))
        kernel(Piece(found, apart, 2**32 - 100, *form))
        kernel(Piece(found, found, 2**32 - 100, *form))
        assert torch.equal(bits(found.cpu()), bits(expected))
        assert torch.equal(bits(apart.cpu()), bits(expected))


def test_rounding_to_sixteen_bits_is_that_of_torch(kernel):
    floats = torch.randint(-(2**31), 2**31, (2_000_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0x33000000, 0x47800000, 0x1000)
    floats = torch.cat([floats, ties, ties - 2**31]).to(torch.int32).view(torch.float32)
    for dtype in DTYPES[1:]:
        found = torch.empty(len(floats), dtype=dtype, device="cuda")
        kernel(Piece(floats.cuda(), found, 0, []))
        finite = ~floats.isnan()
        assert torch.equal(bits(found.cpu())[finite], bits(floats.to(dtype))[finite])


def test_many_tensors_at_once_get_what_each_gets_alone():
    kinds = [(torch.float32, 1), (torch.bfloat16, 3), (torch.bfloat16, 1), (torch.float32, 2)]
    whole = [torch.randn(997 * (i + 1), device="cuda").to(kinds[i % 4][0]) for i in range(40)]
    tensors = [w[1:] if i % 5 == 0 else w for i, w in enumerate(whole)]  # some begin at an odd address
    alone = [w.clone() for w in tensors]
    sums = [
        noise.Sum(w, w, [noise.Term(i + j, 0.01) for j in range(kinds[i % 4][1])], 7 * i, 0.99, 2.0, i)
        for i, w in enumerate(tensors)
    ]
    noise.write_sums(sums)
    for one, w, (before, first) in zip(sums, alone, zip(alone, whole, strict=True), strict=True):
        cpu = before.cpu()
        noise.write_sums([one._replace(read=cpu, write=cpu)])
        assert torch.equal(bits(one.write.cpu()), bits(cpu))
        assert first.shape[0] - w.shape[0] in (0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbed_forward_is_that_of_a_moved_copy_and_leaves_theta_alone(family):
    model = tiny_model(family).cuda()
    theta, before = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    ids, scratch, found = torch.arange(2, 12, device="cuda")[None], Scratch(), []
    for _ in range(2):  # the second knows in which order weights are read
        with torch.no_grad(), perturbed(model, theta, seed=3, scale=0.01, scratch=scratch):
            found.append(model(input_ids=ids).logits)
    assert torch.equal(*found)
    assert all(torch.equal(bits(p.cpu()), bits(before[n].cpu())) for n, p in theta.items())
    z = direction(theta, 3)
    with torch.no_grad():
        for name, parameter in theta.items():
            parameter.add_(z[name], alpha=noise.representable(0.01))
        torch.testing.assert_close(found[0], model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "adapter"), [("bilevel", "lora"), ("zo", "none")])
@pytest.mark.parametrize("options", [ONE_TOKEN, MORE_TOKENS], ids=["one token", "more tokens"])
def test_a_run_on_a_gpu_repeats_itself_and_is_that_of_the_cpu(tmp_path, method, adapter, options):
    rows, found = (make_rows(12, options=options), make_rows(10, first=100, options=options)), []
    for cpu in (False, False, True):
        trainer = make_trainer(tmp_path, *rows, method=method, adapter=adapter, use_cpu=cpu, zo_eps=0.03)
        trainer.train()
        found.append({name: value.cpu() for name, value in weights(trainer.adapted, "backbone").items()})
    assert same(found[0], found[1])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[2][name], rtol=0, atol=1e-4)


def test_a_zeroth_order_step_takes_an_inference_and_the_largest_parameter(tmp_path):
    sizes = {"vocab_size": 320, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    trainer = make_trainer(tmp_path, method="zo", adapter="none", model=tiny_model("llama", **sizes), use_cpu=False)
    model, batch = trainer.adapted.base, next(micro_steps(trainer))["upper"][0]
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(input_ids=batch["input_ids"].cuda(), logits_to_keep=1, use_cache=False)
    inference = torch.cuda.max_memory_allocated()
    largest = max(p.nbytes for p in model.parameters())
    trainer.train()
    assert trainer.cost.peak_memory_bytes < 1.05 * (inference + largest)
