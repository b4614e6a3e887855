"""sample_population's kernel under the interpreter: Philox bit for bit, normals, candidates, what a seed promises.

Run by test_kernels.py, in a process with TRITON_INTERPRET=1: the launchers in `ses_fast.kernels` on CPU tensors.
"""

import pytest
import torch
from noise_kernels import box_muller_kernel, words_kernel

from ses_fast import ops, reference
from ses_fast.kernels import population

NORMALS = 2e-6  # kernel against fp64
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-6}  # added in fp32, rounded once

SHAPES = [
    pytest.param((1, 2, 32, 128), 4, torch.float32, id="z-image-rows"),
    pytest.param((1, 1, 33, 166), 4, torch.float16, id="qwen-width-166-fp16"),
    pytest.param((1, 2, 29, 93), 3, torch.float32, id="odd-both-ways"),
    pytest.param((1, 3, 17, 5), 1, torch.float32, id="prime-level-1"),
    pytest.param((1, 2, 3, 9, 20), 2, torch.float32, id="5d-video"),
    pytest.param((1, 4, 6), 0, torch.float16, id="level-0-whole-latent"),
    pytest.param((1, 1, 1, 1), 0, torch.float32, id="one-number"),
    pytest.param((1, 2, 20, 33), 7, torch.float32, id="block-larger-than-the-image"),
    pytest.param((1, 1, 3, 300), 9, torch.float32, id="coefficient-over-two-tiles"),
    pytest.param((1, 2, 5, 5), 100, torch.float32, id="level-100"),
]


def problem(shape, level):
    noise = torch.Generator().manual_seed(1)
    residual = torch.randn(shape, generator=noise)
    block = 2**level
    size = residual[..., 0, 0].numel() * -(-shape[-2] // block) * -(-shape[-1] // block)
    return residual, torch.randn(size, generator=noise), torch.rand(size, generator=noise) + 0.5


@pytest.mark.parametrize(
    "seed, generation, candidate",
    [(0, 0, 0), (-5, 7, 11), (2**63 - 1, 2**32 - 1, 2**32 - 1), (-(2**63), 2**31, 3)],
    ids=["zeros", "negative-seed", "largest", "smallest-seed"],
)
def test_words_bit_for_bit(seed, generation, candidate):
    out = torch.zeros(4, 64, dtype=torch.int64)
    words_kernel[(1,)](out, seed, generation, candidate, 64)
    key = (seed & reference.MASK32, (seed >> 32) & reference.MASK32)
    want = reference.philox4x32(key, (torch.arange(64) // 4, candidate, generation, 0))
    assert out.equal(torch.stack(want))


def test_box_muller():
    """Where u is nearest 0 and 1, on both sides of each change of formula, and over all of it."""
    edges = [0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, 2**32 - 2**24, 2**32 - 2**10, 2**32 - 1]
    edges += [round(2**31.5), round(2**30.5), round(2**3.5)]
    near = [min(max(edge + i, 0), 2**32 - 1) for edge in edges for i in range(-3, 4)]
    spread = torch.randint(2**32, (2**14 - len(near),), generator=torch.Generator().manual_seed(0))
    w = torch.cat([torch.tensor(near), spread])
    radius, cosine, sine = (torch.empty(2**14) for _ in range(3))
    box_muller_kernel[(1,)](w, radius, cosine, sine, 2**14)
    u = (w.double() + 0.5) / 2**32
    r = (-2 * u.log()).sqrt()
    assert (radius.double() - r).abs().max() < NORMALS / 2
    for turn, ours in [((u * 2 * torch.pi).cos(), cosine), ((u * 2 * torch.pi).sin(), sine)]:
        assert (ours.double() - turn).abs().max() < 2e-7
        # Any radius meets any angle.
        shuffled = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
        assert (radius[shuffled].double() * ours - r[shuffled] * turn).abs().max() < NORMALS / 2


@pytest.mark.parametrize("shape, level, dtype", SHAPES)
def test_seed_and_draws(shape, level, dtype):
    residual, mean, std = problem(shape, level)
    numbers = dict(popsize=3, seed=2**40 + 9, generation=2**32 - 2, first=2)
    candidates, low = population.sample_population(residual, mean, std, level, dtype=dtype, **numbers)
    assert candidates.dtype == dtype and candidates.is_contiguous() and low.dtype == torch.float32
    plain, plain_low = reference.sample_population(residual, mean, std, level, dtype=dtype, **numbers)
    torch.testing.assert_close(low, plain_low, rtol=0, atol=2 * NORMALS)  # std is at most 1.5
    # A product with a power of two is exact: the kernel's own low bands, merged and rounded once, to the bit.
    merged = reference.merge_low_band(residual, low.view(3, *lows(shape, level)), level, dtype=dtype)
    assert candidates.equal(merged)
    if dtype == torch.float32:
        torch.testing.assert_close(candidates, plain, rtol=0, atol=TOLERANCE[dtype])

    draws = torch.randn(3, mean.numel(), generator=torch.Generator().manual_seed(2))
    given, given_low = population.sample_population(residual, mean, std, level, popsize=3, draws=draws, dtype=dtype)
    want, want_low = reference.sample_population(residual, mean, std, level, popsize=3, draws=draws, dtype=dtype)
    torch.testing.assert_close(given_low, want_low, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(given, want, rtol=0, atol=TOLERANCE[dtype] if dtype == torch.float32 else 2e-3)


def lows(shape, level):
    return (*shape[1:-2], *(-(-n // 2**level) for n in shape[-2:]))


def test_a_share_of_a_generation_is_the_same(monkeypatch):
    """Whatever the caller's share is, and a program's: here 8 and then the 3 that are left."""
    residual, mean, std = problem((1, 1, 8, 16), 2)
    numbers = dict(seed=5, generation=1)
    whole, low = population.sample_population(residual, mean, std, 2, popsize=11, **numbers)
    monkeypatch.setattr(population, "PROGRAMS", 1)
    shared = population.sample_population(residual, mean, std, 2, popsize=11, **numbers)
    assert shared[0].equal(whole) and shared[1].equal(low)
    for first, popsize in ((0, 3), (7, 2), (10, 1)):
        share = population.sample_population(residual, mean, std, 2, popsize=popsize, first=first, **numbers)
        assert share[0].equal(whole[first : first + popsize]) and share[1].equal(low[first : first + popsize])


def test_seed_and_generation_as_tensors():
    residual, mean, std = problem((1, 2, 16, 16), 2)
    for seed, generation in [(-1, 0), (2**63 - 1, 2**32 - 1), (1, 1)]:
        ints = population.sample_population(residual, mean, std, 2, popsize=2, seed=seed, generation=generation)
        tensors = population.sample_population(
            residual, mean, std, 2, popsize=2, seed=torch.tensor(seed), generation=torch.tensor(generation)
        )
        assert ints[0].equal(tensors[0]) and ints[1].equal(tensors[1])


def test_strided_input_and_checks():
    residual, mean, std = problem((1, 2, 12, 10), 1)
    want = population.sample_population(residual, mean, std, 1, popsize=2, seed=0)
    strided = residual.mT.contiguous().mT
    doubled = torch.stack([mean, mean], 1)[:, 0]
    assert not strided.is_contiguous() and not doubled.is_contiguous()
    got = population.sample_population(strided, doubled, std, 1, popsize=2, seed=0)
    assert got[0].equal(want[0]) and got[1].equal(want[1])
    with pytest.raises(ValueError, match="exactly one of seed= and draws="):
        population.sample_population(residual, mean, std, 1, popsize=2)


def test_compile_sees_one_operator(monkeypatch):
    """The dispatch that a CUDA tensor takes, without a graph break, with numbers and with 0-d tensors."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)
    residual, mean, std = problem((1, 2, 9, 12), 2)

    def ask(mean, seed, generation):
        candidates, low = ops.sample_population(
            residual, mean, std, 2, popsize=3, seed=seed, generation=generation, dtype=torch.float16
        )
        return candidates * 2, low

    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    for seed, generation in [(3, 4), (torch.tensor(3), torch.tensor(4))]:
        for got, want in zip(compiled(mean, seed, generation), ask(mean, seed, generation), strict=True):
            assert got.dtype == want.dtype and got.equal(want)
