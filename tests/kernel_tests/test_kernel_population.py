"""sample_population's kernel: Philox bit for bit, normals, candidates, what a seed promises, against reference.py.

Interpreted by test_kernels.py, or on a GPU.
"""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, needs_gpu, noise, rows

from ses_fast import ops, reference

pytestmark = needs_gpu

NORMALS = 2e-6  # kernel against fp64
# The kernels add in fp32 and round once, so half precision differs by a rounding where fp32 is next to a tie.
TOLERANCE = {
    torch.float32: dict(rtol=0, atol=5e-6),
    torch.float16: dict(rtol=2**-10, atol=5e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=5e-6),
}

SHAPES = rows(
    [
        pytest.param((1, 2, 32, 128), 4, id="2x32x128-z-image-rows"),
        pytest.param((1, 1, 33, 166), 4, id="1x33x166-qwen-rows"),
        pytest.param((1, 2, 29, 93), 3, id="2x29x93-odd-both-ways"),
        pytest.param((1, 3, 17, 5), 1, id="3x17x5-prime-level-1"),
        pytest.param((1, 2, 3, 9, 20), 2, id="2x3x9x20-5d-video"),
        pytest.param((1, 4, 6), 0, id="4x6-level-0-whole-latent"),
        pytest.param((1, 1, 1, 1), 0, id="1x1x1-one-number"),
        pytest.param((1, 2, 20, 33), 7, id="2x20x33-block-larger-than-the-image"),
        pytest.param((1, 1, 3, 300), 9, id="1x3x300-coefficient-over-two-tiles"),
        pytest.param((1, 2, 5, 5), 100, id="2x5x5-level-100"),
    ],
    [
        pytest.param((1, 16, 128, 128), 4, id="16x128x128-z-image-flux1-at-1024"),
        pytest.param((1, 16, 166, 166), 4, id="16x166x166-qwen-at-1328"),
        pytest.param((1, 128, 64, 64), 4, id="128x64x64-flux2-at-1024"),
        pytest.param((1, 4, 64, 64), 4, id="4x64x64-sdxl-at-512"),
        pytest.param((1, 16, 167, 93), 4, id="16x167x93-odd-both-ways"),
        pytest.param((1, 16, 21, 90, 160), 4, id="16x21x90x160-5d-video"),
        pytest.param((1, 4, 61, 67), 6, id="4x61x67-six-levels-prime"),
        pytest.param((1, 1, 4096, 4096), 5, id="1x4096x4096"),
    ],
)


def problem(shape, level):
    size = torch.Size((*shape[1:-2], *reference.band_size(shape[-2:], level))).numel()
    return noise(*shape), noise(size, seed=1), noise(size, seed=2).abs() + 0.5


@pytest.mark.parametrize(
    "seed, generation, candidate",
    [(0, 0, 0), (-5, 7, 11), (2**63 - 1, 2**32 - 1, 2**32 - 1), (-(2**63), 2**31, 3)],
    ids=["zeros", "negative-seed", "largest", "smallest-seed"],
)
def test_words_bit_for_bit(seed, generation, candidate):
    from noise_kernels import words_kernel  # imports triton

    out = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, seed, generation, candidate, 64)
    key = (seed & reference.MASK32, (seed >> 32) & reference.MASK32)
    want = reference.philox4x32(key, (torch.arange(64) // 4, candidate, generation, 0))
    assert out.cpu().equal(torch.stack(want))


def test_box_muller():
    """Where u is nearest 0 and 1, on both sides of each change of formula, and over all of it."""
    from noise_kernels import box_muller_kernel  # imports triton

    edges = [0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, 2**32 - 2**24, 2**32 - 2**10, 2**32 - 1]
    edges += [round(2**31.5), round(2**30.5), round(2**3.5)]
    near = [min(max(edge + i, 0), 2**32 - 1) for edge in edges for i in range(-3, 4)]
    spread = torch.randint(2**32, (2**14 - len(near),), generator=torch.Generator().manual_seed(0))
    w = torch.cat([torch.tensor(near), spread])
    outputs = [torch.full((2**14,), torch.nan, device=DEVICE) for _ in range(3)]
    box_muller_kernel[(1,)](w.to(DEVICE), *outputs, 2**14)
    radius, cosine, sine = (out.cpu() for out in outputs)
    u = (w.double() + 0.5) / 2**32
    r = (-2 * u.log()).sqrt()
    assert (radius.double() - r).abs().max() < NORMALS / 2
    for turn, ours in [((u * 2 * torch.pi).cos(), cosine), ((u * 2 * torch.pi).sin(), sine)]:
        assert (ours.double() - turn).abs().max() < 2e-7
        # Any radius meets any angle.
        shuffled = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
        assert (radius[shuffled].double() * ours - r[shuffled] * turn).abs().max() < NORMALS / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popsize", rows([3], [1, 10, 50]))
@pytest.mark.parametrize("shape, level", SHAPES)
def test_seed_and_draws(shape, level, popsize, dtype):
    if popsize == 50 and shape[-1] == 4096:
        pytest.skip("the same code as popsize 10, for gigabytes")
    residual, mean, std = problem(shape, level)
    numbers = dict(popsize=popsize, seed=2**40 + 9, generation=2**32 - 2, first=2)
    candidates, low = ops.sample_population(residual, mean, std, level, dtype=dtype, backend="triton", **numbers)
    assert candidates.dtype == dtype and candidates.shape == (popsize, *shape[1:]) and candidates.is_contiguous()
    _, want = reference.sample_population(residual, mean, std, level, **numbers)
    assert low.dtype == torch.float32
    assert ((low - want).abs() <= NORMALS * std + 5e-7 * want.abs() + 1e-7).all()
    # A product with a power of two is exact: the kernel's own low bands, merged and rounded once, to the bit.
    bands = low.view(popsize, *shape[1:-2], *reference.band_size(shape[-2:], level))
    assert candidates.equal(reference.merge_low_band(residual, bands, level, dtype=dtype))

    draws = noise(popsize, mean.numel(), seed=3)
    given, low = ops.sample_population(
        residual, mean, std, level, popsize=popsize, draws=draws, dtype=dtype, backend="triton"
    )
    want, want_low = reference.sample_population(residual, mean, std, level, popsize=popsize, draws=draws, dtype=dtype)
    torch.testing.assert_close(low, want_low, **TOLERANCE[torch.float32])
    torch.testing.assert_close(given, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("programs", [512, 1], ids=["as-it-is", "8-candidates-and-then-3-in-a-program"])
def test_a_share_of_a_generation_is_the_same(monkeypatch, programs):
    """Whatever the caller's share is, and a program's."""
    from ses_fast.kernels import population  # imports triton

    residual, mean, std = problem((1, 1, 8, 16), 2)
    numbers = dict(seed=5, generation=1, backend="triton")
    whole, low = ops.sample_population(residual, mean, std, 2, popsize=11, **numbers)
    monkeypatch.setattr(population, "PROGRAMS", programs)
    for first, popsize in ((0, 11), (0, 3), (7, 2), (10, 1)):
        share = ops.sample_population(residual, mean, std, 2, popsize=popsize, first=first, **numbers)
        assert share[0].equal(whole[first : first + popsize]) and share[1].equal(low[first : first + popsize])


def test_seed_and_generation_as_tensors():
    residual, mean, std = problem((1, 2, 16, 16), 2)
    for seed, generation in [(-1, 0), (2**63 - 1, 2**32 - 1), (1, 1)]:
        on_device = dict(seed=torch.tensor(seed, device=DEVICE), generation=torch.tensor(generation, device=DEVICE))
        ints, tensors = (
            ops.sample_population(residual, mean, std, 2, popsize=2, backend="triton", **numbers)
            for numbers in (dict(seed=seed, generation=generation), on_device)
        )
        assert ints[0].equal(tensors[0]) and ints[1].equal(tensors[1])


def test_strides_do_not_matter():
    residual, mean, std = problem((1, 2, 12, 10), 1)
    want = ops.sample_population(residual, mean, std, 1, popsize=2, seed=0, backend="triton")
    strided = residual.mT.contiguous().mT
    doubled = torch.stack([mean, mean], 1)[:, 0]
    assert not strided.is_contiguous() and not doubled.is_contiguous()
    got = ops.sample_population(strided, doubled, std, 1, popsize=2, seed=0, backend="triton")
    assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_compile_sees_one_operator(monkeypatch):
    """Without a graph break, with numbers and with 0-d tensors."""
    monkeypatch.undo()
    residual, mean, std = problem((1, 2, 9, 12), 2)

    def ask(mean, seed, generation):
        candidates, low = ops.sample_population(
            residual, mean, std, 2, popsize=3, seed=seed, generation=generation, dtype=torch.float16, backend="triton"
        )
        return candidates * 2, low

    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    for seed, generation in [(3, 4), (torch.tensor(3, device=DEVICE), torch.tensor(4, device=DEVICE))]:
        for got, want in zip(compiled(mean, seed, generation), ask(mean, seed, generation), strict=True):
            assert got.dtype == want.dtype and got.equal(want)
