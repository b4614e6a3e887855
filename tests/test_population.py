"""sample_population and its noise: Random123's own vectors, PyWavelets, and what a seed promises."""

import math

import numpy as np
import pytest
import pywt
import torch

from ses_fast import ops
from ses_fast.reference import philox4x32, philox_normal

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-6}  # fp64: the low band itself stays fp32

SHAPES = [
    pytest.param((1, 16, 128, 128), 4, id="z-image-1024"),
    pytest.param((1, 16, 166, 166), 4, id="qwen-1328"),
    pytest.param((1, 8, 167, 93), 3, id="odd-both-ways"),
    pytest.param((1, 128, 64, 64), 4, id="flux2-1024"),
    pytest.param((1, 3, 17, 5), 1, id="prime"),
    pytest.param((1, 2, 3, 9, 20), 2, id="5d-video"),
    pytest.param((1, 4, 6), 0, id="level-0-whole-latent"),
    pytest.param((1, 1, 1, 1), 0, id="one-number"),
]


def problem(shape, level, dtype=torch.float32):
    """(base, residual, mean, std): nothing zero or one, so that each must be used."""
    noise = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)
    low, residual = ops.split_low_band(base, level)
    mean = torch.randn(low.numel(), generator=noise)
    std = torch.rand(low.numel(), generator=noise) + 0.5
    return base, residual, mean, std


@pytest.mark.parametrize("as_tensors", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, words, as_tensors):
    """The vectors of philox4x32-10 in Random123's kat_vectors."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    if as_tensors:
        counter, key = map(torch.tensor, counter), map(torch.tensor, key)
    assert [int(word) for word in philox4x32(tuple(key), tuple(counter))] == words


def test_normals_by_hand():
    """Box-Muller of the words in Python's own doubles, at coefficients that take each of the four outputs."""
    seed, generation, candidate = -5, 7, 11
    got = philox_normal(seed, generation, [candidate], 11)[0]
    unsigned = seed % 2**64
    for d in range(11):
        w = philox4x32((unsigned % 2**32, unsigned >> 32), (d // 4, candidate, generation, 0))
        u = [(int(word) + 0.5) / 2**32 for word in w]
        radius, angle = (u[0], u[1]) if d % 4 < 2 else (u[2], u[3])
        turn = math.sin if d % 2 else math.cos
        want = math.sqrt(-2 * math.log(radius)) * turn(2 * math.pi * angle)
        assert got[d].item() == pytest.approx(want, rel=2**-24, abs=1e-12)  # half a step of fp32


def test_normals_are_normal():
    noise = philox_normal(0, 0, range(40), 5000).double()
    sigma = 1 / math.sqrt(noise.numel())
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(noise.pow(power).mean() - moment) < 4 * sigma * math.sqrt(spread)
    neighbours = torch.corrcoef(noise)[~torch.eye(40, dtype=torch.bool)]
    assert neighbours.abs().max() < 5 / math.sqrt(5000)  # candidates share nothing
    assert len(noise.unique()) > 0.98 * noise.numel()  # fp32 leaves a few equal ones


@pytest.mark.parametrize(
    "change",
    [dict(seed=4), dict(seed=3 + 2**32), dict(seed=3 - 2**63), dict(generation=1), dict(candidate=1)],
    ids=["low-word", "high-word", "sign", "generation", "candidate"],
)
def test_every_part_of_the_key_counts(change):
    key = dict(seed=3, generation=0, candidate=0)
    a, b = (philox_normal(k["seed"], k["generation"], [k["candidate"]], 400) for k in (key, key | change))
    assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 0.25


@pytest.mark.parametrize("shape, level", SHAPES)
def test_given_draws_are_pywavelets(shape, level):
    base, residual, mean, std = problem(shape, level)
    draws = torch.randn(3, mean.numel(), generator=torch.Generator().manual_seed(2))
    candidates, low = ops.sample_population(residual, mean, std, level, popsize=3, draws=draws)
    assert candidates.shape == (3, *shape[1:]) and candidates.is_contiguous()
    assert low.dtype == torch.float32 and low.equal(mean + std * draws)
    coeffs = pywt.wavedec2(base[0].numpy(), "db1", "symmetric", level)
    for i in range(3):
        coeffs[0] = low[i].view(coeffs[0].shape).numpy()
        want = pywt.waverec2(coeffs, "db1", "symmetric")[..., : shape[-2], : shape[-1]]
        np.testing.assert_allclose(candidates[i], want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape, level", SHAPES)
def test_a_seed_is_its_draws(shape, level):
    _, residual, mean, std = problem(shape, level)
    seeded = ops.sample_population(residual, mean, std, level, popsize=4, seed=2**40 + 9, generation=3, first=2)
    draws = philox_normal(2**40 + 9, 3, [2, 3, 4, 5], mean.numel())
    given = ops.sample_population(residual, mean, std, level, popsize=4, draws=draws)
    assert seeded[0].equal(given[0]) and seeded[1].equal(given[1])


def test_candidates_do_not_depend_on_who_asks():
    """A candidate is the same alone, among ten, in another process's share, and asked twice."""
    _, residual, mean, std = problem((1, 4, 33, 31), 2)
    whole, low = ops.sample_population(residual, mean, std, 2, popsize=10, seed=5, generation=1)
    again, _ = ops.sample_population(residual, mean, std, 2, popsize=10, seed=5, generation=1)
    assert whole.equal(again)
    for first, popsize in [(0, 1), (9, 1), (3, 4), (0, 10)]:
        share, share_low = ops.sample_population(
            residual, mean, std, 2, popsize=popsize, seed=5, generation=1, first=first
        )
        assert share.equal(whole[first : first + popsize]) and share_low.equal(low[first : first + popsize])


def test_seed_and_generation_as_tensors():
    _, residual, mean, std = problem((1, 4, 16, 16), 2)
    for seed, generation in [(-1, 0), (2**63 - 1, 2**32 - 1), (12, 5)]:
        ints = ops.sample_population(residual, mean, std, 2, popsize=2, seed=seed, generation=generation)
        tensors = ops.sample_population(
            residual, mean, std, 2, popsize=2, seed=torch.tensor(seed), generation=torch.tensor(generation)
        )
        assert ints[0].equal(tensors[0]) and ints[1].equal(tensors[1])


def test_the_global_generator_is_left_alone():
    _, residual, mean, std = problem((1, 4, 16, 16), 2)
    before = torch.get_rng_state()
    ops.sample_population(residual, mean, std, 2, popsize=2, seed=0)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """Half precision is rounded once, at the end; an fp64 latent keeps its residual in fp64."""
    base, residual, mean, std = problem((1, 4, 19, 14), 2, dtype)
    candidates, low = ops.sample_population(residual, mean, std, 2, popsize=3, seed=1, dtype=dtype)
    assert candidates.dtype == dtype and low.dtype == torch.float32
    coeffs = pywt.wavedec2(base.double().numpy()[0], "db1", "symmetric", 2)
    coeffs[0] = low[2].view(coeffs[0].shape).double().numpy()
    want = torch.from_numpy(pywt.waverec2(coeffs, "db1", "symmetric")[..., :19, :14].copy())
    if dtype == torch.float64:
        torch.testing.assert_close(candidates[2], want, rtol=0, atol=TOLERANCE[dtype])
    else:
        step = torch.finfo(dtype).eps
        assert ((candidates[2].double() - want).abs() <= want.abs() * step / 2 + TOLERANCE[torch.float32]).all()


def call(shape=(1, 4, 8, 8), level=1, **changes):
    _, residual, mean, std = problem(shape, level)
    settings = dict(residual=residual, mean=mean, std=std, level=level, popsize=2, seed=0) | changes
    return ops.sample_population(**settings)


BAD = [
    pytest.param(dict(residual=torch.zeros(2, 4, 8, 8)), r"one latent \(1, ..., H, W\)", id="two-latents"),
    pytest.param(dict(residual=torch.zeros(8, 8)), "one latent", id="no-batch"),
    pytest.param(dict(residual=torch.zeros(1, 0, 8, 8)), "one latent", id="empty"),
    pytest.param(dict(residual=torch.zeros(1, 4, 8, 8).half()), "fp32 or fp64", id="half-residual"),
    pytest.param(dict(mean=torch.zeros(63)), r"mean must be \(64,\)", id="mean-size"),
    pytest.param(dict(std=torch.zeros(1, 64)), r"std must be \(64,\)", id="std-shape"),
    pytest.param(dict(std=torch.zeros(64).long()), "std must be floating", id="std-int"),
    pytest.param(dict(level=-1), "level must be", id="level"),
    pytest.param(dict(popsize=0), "popsize must be", id="popsize-0"),
    pytest.param(dict(popsize=2.5), "popsize must be", id="popsize-float"),
    pytest.param(dict(first=-1), "numbers must lie", id="first"),
    pytest.param(dict(first=2**32 - 1), "numbers must lie", id="past-32-bits"),
    pytest.param(dict(seed=None), "exactly one of seed= and draws=", id="neither"),
    pytest.param(dict(draws=torch.zeros(2, 64)), "exactly one of seed= and draws=", id="both"),
    pytest.param(dict(seed=None, draws=torch.zeros(3, 64)), r"draws must be \(2, 64\)", id="draws-shape"),
    pytest.param(dict(seed=2**63), "seed must be an int in", id="seed-65-bits"),
    pytest.param(dict(seed=0.5), "seed must be an int in", id="seed-float"),
    pytest.param(dict(seed=torch.zeros(1).long()), "seed as a tensor must be 0-d, int64", id="seed-1d"),
    pytest.param(dict(seed=torch.tensor(1.0)), "seed as a tensor must be 0-d, int64", id="seed-float-tensor"),
    pytest.param(dict(generation=-1), "generation must be an int in", id="generation"),
    pytest.param(dict(mean=torch.zeros(64, device="meta")), "a shape and no numbers", id="another-device"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_input_says_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_triton_by_name_raises_here():
    if torch.cuda.is_available():
        pytest.skip("says what happens without a CUDA device")
    with pytest.raises(RuntimeError, match="cannot run here"):
        call(backend="triton")


def test_numbers_in_a_list_are_drawn_on_the_cpu_whatever_the_default_device():
    want = philox_normal(5, 1, [0, 7], 9)
    with torch.device("meta"):
        got = philox_normal(5, 1, [0, 7], 9)
    assert got.device.type == "cpu" and got.equal(want)
