"""The stream: its statistics, its bits against a second implementation, and what is done with it."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from plain_noise import hashes, integers, multiplier
from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Sum, Term, cpu, eager, streams
from zofo.noise.eager import Piece

N = 1 << 18
SIGMAS = 5  # every statistical bound: five standard deviations of the statistic, at a fixed seed, so it never flakes
KEYS = (0, 7, noise.stream_key(0), noise.stream_key(123, step=4, query=1, name="w"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_STARTS = (0, 1, 2**31 - 2, 2**32 - 3, 2**40 + 17, 2**63 - 2, 2**64 - 1000)
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def exact_distribution():
    """P(n) for n = -510 .. 510: the convolution of four uniform bytes."""
    byte = np.ones(256, dtype=np.int64)
    pairs = np.convolve(byte, byte)
    return np.arange(-510, 511), np.convolve(pairs, pairs)


def exact_moment(power):
    """E z**power, as a fraction of integers until the last step."""
    values, ways = exact_distribution()
    total = sum(Fraction(int(w)) * int(n) ** power for n, w in zip(values, ways, strict=True))
    return float(total / 256**4 / Fraction(21845) ** (power // 2))


def sigmas(a, b):
    """The sample correlation of two streams in its standard deviations: E ab = 0 and Var ab = 1 if independent."""
    return abs((a.double() * b.double()).mean().item()) * math.sqrt(a.numel())


def stream(**parts):
    return noise.normal(noise.stream_key(**{"seed": 0, **parts}), 0, N)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_moments_are_those_of_four_bytes(key, power):
    z = noise.normal(key, 0, N).double()
    expected = exact_moment(power) if power % 2 == 0 else 0.0
    deviation = math.sqrt((exact_moment(2 * power) - expected**2) / N)  # Var(mean of z^k) = (E z^2k - (E z^k)^2) / N
    assert abs((z**power).mean().item() - expected) < SIGMAS * deviation


def test_the_theory_is_a_bell_of_variance_one():
    assert exact_moment(2) == 1.0
    assert exact_moment(4) == pytest.approx(2.7, abs=1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_histogram_is_that_of_four_bytes(key):
    n = np.rint(noise.normal(key, 0, N).double().numpy() * math.sqrt(21845)).astype(int)
    _, ways = exact_distribution()
    expected, seen = ways / 256**4 * N, np.bincount(n + 510, minlength=1021)
    inner = expected >= 20  # chi-square's approximation needs filled bins; the two tails become one bin
    expected = np.append(expected[inner], expected[~inner].sum())
    seen = np.append(seen[inner], seen[~inner].sum())
    freedom = len(seen) - 1  # chi-square has mean k and variance 2k
    assert abs(((seen - expected) ** 2 / expected).sum() - freedom) < SIGMAS * math.sqrt(2 * freedom)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 64, 768, 1024, 65536])
@pytest.mark.parametrize("key", KEYS)
def test_elements_of_a_stream_are_uncorrelated(key, lag):
    z = noise.normal(key, 0, N)
    assert sigmas(z[lag:], z[:-lag]) < SIGMAS


@pytest.mark.parametrize("other", [1, 2, 3, 2**16, 2**31, 2**32, 2**47, 2**62, 2**63])
def test_raw_keys_that_differ_in_few_bits_are_uncorrelated(other):
    assert sigmas(noise.normal(5, 0, N), noise.normal(5 ^ other, 0, N)) < SIGMAS


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("other", [1, 2, 3, 2**32, 2**63])
def test_raw_keys_that_differ_in_few_bits_are_not_each_other_shuffled(other, shift):
    a, b = noise.normal(4, 0, N), noise.normal(4 ^ other, 0, N)
    assert sigmas(a[shift:], b[:-shift]) < SIGMAS


VARIANTS = {
    "seed": [0, 1, 2, -1, 2**31, 2**63, 2**64],
    "step": [0, 1, 2, 3, 1000, 2**20],
    "query": [-1, 0, 1, 2, 7],
    "name": ["", "w", "w.", "v", "layers.1.weight", "layers.11.weight", "1/w"],
}


@pytest.mark.parametrize("part", VARIANTS)
def test_seeds_steps_queries_and_names_give_uncorrelated_streams(part):
    streams = [stream(**{part: value}) for value in VARIANTS[part]]
    pairs = [(a, b) for i, a in enumerate(streams) for b in streams[:i]]
    assert max(sigmas(a, b) for a, b in pairs) < SIGMAS
    assert max(sigmas(a[1:], b[:-1]) for a, b in pairs) < SIGMAS
    assert max(sigmas((a**2 - 1) / 1.304, (b**2 - 1) / 1.304) for a, b in pairs) < SIGMAS  # sqrt(kurtosis - 1) = 1.304


@pytest.mark.parametrize("start", [2**31, 2**32, 2**33, 2**40, 2**63])
def test_the_stream_does_not_repeat_far_away(start):
    a, b = noise.normal(3, 0, N), noise.normal(3, start, N)
    assert sigmas(a, b) < SIGMAS
    assert sigmas(a[1:], b[:-1]) < SIGMAS


@pytest.mark.parametrize("key", [*KEYS, 2**64 - 1])
@pytest.mark.parametrize("start", ODD_STARTS)
def test_bits_equal_a_second_implementation(key, start):
    expected = (integers(key, start, 1000) * multiplier(1.0)).astype(np.float32)
    assert np.array_equal(noise.normal(key, start, 1000).numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("start", ODD_STARTS)
def test_rademacher_is_the_top_bit_of_the_same_hash(start):
    expected = np.where(hashes(KEYS[2], start, 1000) >> 31, 1.0, -1.0)
    assert np.array_equal(noise.rademacher(KEYS[2], start, 1000).numpy(), expected)


@pytest.mark.parametrize("key", KEYS[1:])
def test_rademacher_is_fair_and_uncorrelated(key):
    signs = noise.rademacher(key, 0, N)
    assert sigmas(signs, torch.ones(N)) < SIGMAS
    assert max(sigmas(signs[lag:], signs[:-lag]) for lag in (1, 2, 3, 64, 1024)) < SIGMAS


def test_a_large_draw_equals_a_second_implementation():
    expected = (integers(KEYS[2], 0, N) * multiplier(1.0)).astype(np.float32)  # more than one chunk of the eager form
    assert np.array_equal(noise.normal(KEYS[2], 0, N).numpy(), expected)


@pytest.mark.parametrize("start", [0, 2**32])
def test_keys_are_taken_modulo_two_to_the_64(start):
    assert torch.equal(noise.normal(-1, start, 50), noise.normal(2**64 - 1, start, 50))


@fixed
@given(
    key=st.integers(0, 2**64 - 1),
    start=st.sampled_from(ODD_STARTS) | st.integers(0, 2**64 - 1000),
    cuts=st.lists(st.integers(0, 300), max_size=5).map(sorted),
    distribution=st.sampled_from([*eager.SHAPES]),
)
def test_bits_do_not_depend_on_chunks(key, start, cuts, distribution):
    edges = [0, *cuts, 300]
    pieces = [noise.sample(key, start + low, high - low, distribution) for low, high in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), noise.sample(key, start, 300, distribution))


def test_bits_do_not_depend_on_the_size_of_the_internal_chunks(monkeypatch):
    w, terms = torch.randn(1000), [Term(key, 0.1) for key in (1, 2, 3)]
    whole, cut = torch.empty(1000), torch.empty(1000)
    noise.write_sums([Sum(w, whole, terms, 2**32 - 500)])
    monkeypatch.setattr(eager, "_CHUNK", 7)
    monkeypatch.setattr(streams, "c_kernel", lambda distribution: None)
    noise.write_sums([Sum(w, cut, terms, 2**32 - 500)])
    assert torch.equal(whole, cut)


def test_a_key_does_not_depend_on_what_was_asked_before():
    assert len({noise.stream_key(seed) for seed in (1, True, 1.0)}) == 3  # equal, but written differently


def test_bits_do_not_depend_on_threads():
    threads, draws = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            draws.append(noise.normal(9, 2**32 - 1000, N))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    noise.normal(1, 0, 100)
    noise.rademacher(1, 0, 100)
    update_(torch.ones(100, dtype=torch.bfloat16), [Term(1, 1e-3)], 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_draws_are_float32_whatever_the_default_dtype(dtype):
    expected = noise.normal(1, 0, 10)
    torch.set_default_dtype(dtype)
    try:
        drawn = noise.normal(1, 0, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)


# What is done with the stream: w + scale z, exactly.


def exact_sum(w, scale, key, dtype=np.float32, start=0):
    """W + multiplier * n in extended precision, rounded once to `dtype`."""
    n = integers(key, start, w.numel()).astype(np.longdouble)
    return torch.from_numpy((w.double().numpy().astype(np.longdouble) + multiplier(scale) * n).astype(dtype))


def update_(w, terms, rounding_key, distribution="normal"):
    noise.write_sums([Sum(w, w, terms, rounding_key=rounding_key)], distribution)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("scale", [1.0, 1e-3, -1e-3, 3.3e-7, 0.1, -12.5])
def test_the_product_of_multiplier_and_integer_is_exact_in_float32(scale):
    values, _ = exact_distribution()
    products = multiplier(scale) * values
    assert np.array_equal(products.astype(np.float32).astype(np.float64), products)


@pytest.mark.parametrize("scale", [1.0, 1e-3, -1e-3, 3.3e-7, 0.1, 0.0])
def test_float32_addition_is_rounded_once(scale):
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(noise.add_(w.clone(), 11, scale)), bits(exact_sum(w, scale, 11)))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("scale", [1.0, 1e-2, -1e-3])
def test_sixteen_bit_addition_is_the_float32_sum_rounded_once(dtype, scale):
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(bits(noise.add_(w.clone(), 11, scale)), bits(exact_sum(w, scale, 11).to(dtype)))


@pytest.mark.parametrize("distribution", eager.SHAPES)
@fixed
@given(scale=st.floats(1e-12, 1e6))
def test_the_representable_scale_is_the_one_applied(distribution, scale):
    applied = noise.representable(scale, distribution)
    assert abs(applied / scale - 1) <= 2**-15  # half a unit of 15 bits: 2**-16 relative to a mantissa >= 1/2
    assert noise.representable(-scale, distribution) == -applied
    if distribution == "rademacher":
        assert noise.add_(torch.zeros(20), 1, scale, 0, "rademacher").abs().max().item() == applied


def test_add_to_zeros_is_the_stream():
    assert torch.equal(noise.add_(torch.zeros(3, 5), 7, 1.0, start=40).view(-1), noise.normal(7, 40, 15))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_strides_count_in_row_major_order(dtype):
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (lambda t: t.t(), lambda t: t[1:5], lambda t: t[:, 2:7], lambda t: t[::2], lambda t: t[3, 4]):
        moved, untouched = base.clone(), torch.ones_like(base, dtype=torch.bool)
        noise.add_(view(moved), 5, 0.5)
        view(untouched).fill_(False)
        assert torch.equal(view(moved), noise.add_(view(base).clone().contiguous(), 5, 0.5))
        assert torch.equal(moved[untouched], base[untouched])


@pytest.mark.parametrize("distribution", eager.SHAPES)
def test_several_terms_in_one_pass_equal_several_passes(distribution):
    terms = [Term(key, scale) for key, scale in ((1, 0.3), (2, -1e-3), (3, 7e-5))]
    together = torch.randn(777, generator=torch.Generator().manual_seed(0))
    apart, updated = together.clone(), together.clone()
    for term in terms:
        noise.add_(apart, term.key, term.scale, 0, distribution)
    noise.write_sums([Sum(together, together, terms)], distribution)
    update_(updated, terms, 1, distribution)
    assert torch.equal(bits(together), bits(apart))
    assert torch.equal(bits(updated), bits(apart))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_sum_leaves_its_source_alone(source, target, count):
    w = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(source)
    before, out = w.clone(), torch.full((100,), math.nan, dtype=target)
    noise.write_sums([Sum(w, out, [Term(key, 0.1) for key in range(count)])])
    expected = w.float()
    for key in range(count):
        expected = exact_sum(expected, 0.1, key)
    assert torch.equal(bits(out), bits(expected.to(target)))
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float64])
def test_tensors_that_cannot_move_are_refused(dtype):
    w = torch.ones(4).to(dtype)
    for call in (lambda: noise.add_(w, 1, 1.0), lambda: update_(w, [Term(1, 1.0)], 2)):
        with pytest.raises(ZofoError, match=str(dtype)):
            call()
    assert torch.equal(w, torch.ones(4).to(dtype))


# value -> distance to its neighbours: bfloat16 and float16 normal numbers, float16 subnormal numbers
SMALL_STEPS = [
    (torch.bfloat16, 1.5, 2.0**-7), (torch.bfloat16, -1.5, 2.0**-7), (torch.float16, 1.5, 2.0**-10),
    (torch.float16, 2.0**-16, 2.0**-24), (torch.float16, -(2.0**-16), 2.0**-24), (torch.float16, 0.0, 2.0**-24),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value", "ulp"), SMALL_STEPS)
def test_stochastic_rounding_is_right_on_average(dtype, value, ulp):
    count, steps, term = 2048, 1000, Term(3, ulp / 50)
    moved = torch.full((count,), value, dtype=dtype)
    plain = moved.clone()
    for step in range(steps):
        update_(moved, [term], noise.stream_key(0, step, -1), "rademacher")
        noise.add_(plain, term.key, term.scale, 0, "rademacher")
    assert torch.equal(plain, torch.full((count,), value, dtype=dtype))
    walked = (moved.double() - value) / ulp * noise.rademacher(3, 0, count)
    # each step is a Bernoulli(1/50) of one ulp: mean 1000/50 = 20, variance 1000 (1/50) (49/50) = 19.6 per element
    assert abs(walked.mean().item() - 20) < SIGMAS * math.sqrt(19.6 / count)
    assert abs(walked.var().item() / 19.6 - 1) < SIGMAS * math.sqrt(2 / count)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_stochastic_rounding_takes_one_of_the_two_neighbours(dtype):
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, moved = exact_sum(w, 0.01, 11), w.clone()
    update_(moved, [Term(11, 0.01)], rounding_key=5)
    nearest = exact.to(dtype)
    assert ((bits(moved).int() - bits(nearest).int()).abs() <= 1).all()
    # between the exact sum and its other neighbour, so never further than the distance of the two
    gap = (torch.nextafter(nearest, moved).float() - nearest.float()).abs()
    assert ((moved.float() - exact).abs() <= gap.clamp(min=(nearest.float() - exact).abs())).all()
    assert (moved != nearest).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_of_zero_changes_no_bit(dtype):
    w = torch.tensor([1.0, -3.3, 1e-7, -0.0, 0.0, math.inf, -math.inf, 6e4]).to(dtype)
    before = w.clone()
    update_(w, [Term(1, 0.0)], rounding_key=2)
    assert torch.equal(w, before)


# every form must write the bits of the eager one: terms, distribution, keep, limit, rounding
FORMS = [
    *(([(1, 2, 1e-3)], distribution, 1.0, math.inf, None) for distribution in eager.NUMBERS),
    ([(1, 2, 2.0**-10), (3, 4, -0.5), (5, 6, 3.0)], "normal", 1.0, math.inf, (7, 8, 0.0)),
    ([(1, 2, 2.0**-10), (3, 4, -0.5), (5, 6, 3.0)], "normal", 1.0, math.inf, None),
    ([(2**32 - 1, 2**31, 1e-3)], "normal", 0.999, math.inf, (7, 8, 0.0)),
    ([], "normal", 0.999, math.inf, (7, 8, 0.0)),
    ([], "normal", 1.0, math.inf, None),
    ([(1, 2, 0.5)], "normal", 1.0, 0.75, None),
    ([(1, 2, 0.5)], "normal", 0.9, 0.75, (7, 8, 0.0)),
]
SIZES = [0, 1, 2, 17, 2047, 2048, 2049, 140_001]  # around a block, and enough for several threads


def both_ways(kernel, w, form):
    """What a kernel writes in place, and apart from what it reads."""
    apart = torch.full_like(w, math.nan)
    kernel(Piece(w, apart, 2**32 - 100, *form))
    before = w.clone()
    kernel(Piece(w, w, 2**32 - 100, *form))
    return before, w, apart


def assert_equal_to_eager(kernel, dtype, size, form):
    w = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, expected, _ = both_ways(eager.eager, w.clone(), form)
    for _ in range(2):  # a kernel compiled for one of the two must not be taken for the other afterwards
        source, in_place, apart = both_ways(kernel, w.clone(), form)
        assert torch.equal(bits(in_place), bits(expected))
        assert torch.equal(bits(apart), bits(expected))
        assert torch.equal(source, w)


@pytest.fixture(scope="module")
def c_kernel():
    return cpu.c_kernel() or pytest.skip("no working C compiler: the eager form is in use")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_c_kernel_writes_the_same_bits_and_nothing_else(c_kernel, dtype, form, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for size in SIZES:
            assert_equal_to_eager(c_kernel, dtype, size, form)
    finally:
        torch.set_num_threads(before)


def test_c_reads_every_sixteen_bit_number(c_kernel):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in DTYPES[1:]:
        out = torch.empty(2**16)
        c_kernel(Piece(patterns.view(dtype), out, 0, []))
        expected = patterns.view(dtype).float()
        assert torch.equal(bits(out)[~expected.isnan()], bits(expected)[~expected.isnan()])
        assert out[expected.isnan()].isnan().all()


def test_c_rounds_to_sixteen_bits_as_torch_does(c_kernel):
    patterns = torch.randint(-(2**31), 2**31, (2_000_000,), generator=torch.Generator().manual_seed(0))
    near_half = torch.arange(0x32000000, 0x48000000, 257)  # from below float16's smallest number to above its largest
    ties = torch.arange(0x33000000, 0x47800000, 0x1000)
    floats = torch.cat([patterns, near_half, near_half - 2**31, ties, ties - 2**31]).to(torch.int32).view(torch.float32)
    for dtype in DTYPES[1:]:
        out = torch.empty(len(floats), dtype=dtype)
        c_kernel(Piece(floats, out, 0, []))
        expected = floats.to(dtype)
        assert torch.equal(bits(out)[~floats.isnan()], bits(expected)[~floats.isnan()])
        assert out[floats.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", eager.NUMBERS)
def test_rows_are_those_of_the_whole_matrix(c_kernel, dtype, distribution):
    matrix = noise.normal(3, 0, 700 * 67).view(700, 67).to(dtype)
    terms = [Term(5, 0.3), Term(6, -1e-3)]
    whole = torch.empty_like(matrix)
    noise.write_sums([Sum(matrix, whole, terms)], distribution)
    for numbers in (torch.tensor([699, 0, 3, 3, 1]), torch.arange(700).repeat(2)):
        rows = torch.zeros(len(numbers) + 1, 67, dtype=dtype)
        assert noise.write_rows(matrix, numbers, terms, rows[:-1], distribution)
        assert torch.equal(bits(rows[:-1]), bits(whole[numbers]))
        assert not rows[-1].any()
    assert not noise.write_rows(matrix.T, torch.tensor([0]), terms, rows, distribution)


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOFO_CACHE", str(tmp_path / "cache"))
    cpu.c_kernel.cache_clear()
    yield tmp_path / "cache"
    cpu.c_kernel.cache_clear()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_c_compiler_the_eager_form_gives_the_same_bits(compiler, fresh_cache, monkeypatch):
    expected = noise.normal(5, 0, 1000)
    cpu.c_kernel.cache_clear()
    monkeypatch.setenv("CC", compiler)
    assert cpu.c_kernel() is None
    assert not noise.warm_up()
    assert torch.equal(noise.normal(5, 0, 1000), expected)


def test_a_compiler_without_openmp_will_do(c_kernel, fresh_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "plain-cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert noise.warm_up()
    assert_equal_to_eager(cpu.c_kernel(), torch.float32, 140_001, FORMS[0])
    assert len(list(fresh_cache.glob("noise-*.so"))) == len(list(fresh_cache.iterdir())) == 1


@pytest.mark.parametrize("lacking", ["-U__AVX512VNNI__", "-U__AVX512VNNI__ -U__AVX2__"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_processors_with_fewer_instructions_write_the_same_bits(c_kernel, fresh_cache, monkeypatch, dtype, lacking):
    monkeypatch.setenv("CC", f"cc {lacking}")
    plain = cpu.c_kernel()
    assert plain is not None
    for form in FORMS:
        for size in SIZES:
            assert_equal_to_eager(plain, dtype, size, form)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_are_left_out_before_any_kernel_is_asked(monkeypatch, device):
    def ask(*_):
        raise AssertionError("a kernel was asked")

    for kernel in ("c_kernel", "gpu_kernel", "eager"):
        monkeypatch.setattr(streams, kernel, ask)
    with FakeTensorMode():
        w = torch.nn.Parameter(torch.empty(5, 3, device=device))
        out, rows = torch.empty_like(w), torch.empty(5, dtype=torch.int64, device=device)
        noise.write_sums([Sum(w, w, [Term(1, 1.0)], rounding_key=2), Sum(w, out.T, [Term(1, 1.0)])])
        assert noise.write_rows(w, rows, [Term(1, 1.0)], out)


def test_fake_tensors_do_not_keep_others_from_being_written():
    w, fake = torch.zeros(5), FakeTensorMode().from_tensor(torch.zeros(5))
    noise.write_sums([Sum(t, t, [Term(7, 1.0)]) for t in (fake, w)])
    assert torch.equal(w, noise.normal(7, 0, 5))
