"""The Triton kernels on a GPU: `pytest tests/test_kernels_gpu.py --require-gpu`. Outputs start as NaN, and every call
asks for `backend="triton"` by name. Truth is reference.py on the same device.
"""

from dataclasses import replace

import pytest
import torch

from ses_fast import ops, reference
from ses_fast.evolution import EvolutionConfig, ask, start, tell
from ses_fast.loop import evolve

pytestmark = pytest.mark.gpu

NORMALS = 2e-6  # kernel against fp64
# The kernels add in fp32 and round once, so half precision differs by a rounding where fp32 is next to a tie.
TOLERANCE = {
    torch.float32: dict(rtol=0, atol=5e-6),
    torch.float16: dict(rtol=2**-10, atol=5e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=5e-6),
}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SHAPES = [
    pytest.param((1, 16, 128, 128), 4, id="z-image-flux1-at-1024"),
    pytest.param((1, 16, 166, 166), 4, id="qwen-at-1328"),
    pytest.param((1, 128, 64, 64), 4, id="flux2-at-1024"),
    pytest.param((1, 4, 64, 64), 4, id="sdxl-at-512"),
    pytest.param((1, 16, 167, 93), 4, id="odd-both-ways"),
    pytest.param((1, 16, 21, 90, 160), 4, id="5d-video"),
    pytest.param((1, 3, 17, 5), 1, id="prime"),
    pytest.param((1, 2, 33, 70), 2, id="level-2"),
    pytest.param((1, 4, 61, 67), 6, id="six-levels-prime"),
    pytest.param((1, 2, 300, 7), 8, id="block-of-more-than-a-tile"),
    pytest.param((1, 4, 31, 6), 0, id="level-0-whole-latent"),
    pytest.param((1, 1, 1, 1), 0, id="one-number"),
    pytest.param((1, 1, 4096, 4096), 5, id="4096-pixels"),
]
IGNORE_LEVEL = pytest.mark.filterwarnings("ignore:level .* is too high")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.Tensor.new_empty

    def new_nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


def noise(*shape: int, dtype: torch.dtype = torch.float32, number: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(number), device="cuda").to(dtype)


def problem(shape, level):
    base = noise(*shape)
    low, residual = reference.split_low_band(base, level)
    return residual, noise(low.numel(), number=1), noise(low.numel(), number=2).abs() + 0.5, low.shape[1:]


def flat(coeffs: list) -> list:
    return [coeffs[0], *(band for triple in coeffs[1:] for band in triple)]


@IGNORE_LEVEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, level", SHAPES)
def test_haar(shape, level, dtype):
    x = noise(*shape, dtype=dtype)
    exact, close = x.double(), TOLERANCE[torch.float32]
    coeffs = ops.haar_dwt2(x, level, backend="triton")
    for ours, want in zip(flat(coeffs), flat(reference.haar_dwt2(exact, level)), strict=True):
        torch.testing.assert_close(ours, want.float(), **close)
    torch.testing.assert_close(ops.haar_idwt2(coeffs, shape[-2:], backend="triton"), x.float(), **close)
    low, residual = ops.split_low_band(x, level, backend="triton")
    want_low, want_residual = reference.split_low_band(exact, level)
    torch.testing.assert_close(low, want_low.float(), **close)
    torch.testing.assert_close(residual, want_residual.float(), **close)
    merged = ops.merge_low_band(residual, low, level, dtype=dtype, backend="triton")
    torch.testing.assert_close(merged, x, **TOLERANCE[dtype])
    rounded = [coeffs[0].to(dtype), *(tuple(band.to(dtype) for band in triple) for triple in coeffs[1:])]
    got = ops.haar_idwt2(rounded, shape[-2:], backend="triton")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, reference.haar_idwt2(rounded, shape[-2:]), **close)


@IGNORE_LEVEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popsize", [1, 10, 50])
@pytest.mark.parametrize("shape, level", SHAPES)
def test_population(shape, level, popsize, dtype):
    if popsize == 50 and shape[-1] == 4096:
        pytest.skip("the same code as popsize 10, for gigabytes")
    residual, mean, std, low_shape = problem(shape, level)
    numbers = dict(popsize=popsize, seed=2**40 + 9, generation=2**32 - 2, first=2)
    candidates, low = ops.sample_population(residual, mean, std, level, dtype=dtype, backend="triton", **numbers)
    assert candidates.dtype == dtype and candidates.shape == (popsize, *shape[1:]) and candidates.is_contiguous()
    _, want = reference.sample_population(residual, mean, std, level, **numbers)
    assert ((low - want).abs() <= NORMALS * std + 5e-7 * want.abs() + 1e-7).all()
    # A product with a power of two is exact: the kernel's own low bands, merged and rounded once, to the bit.
    merged = reference.merge_low_band(residual, low.view(popsize, *low_shape), level, dtype=dtype)
    assert candidates.equal(merged)
    draws = noise(popsize, mean.numel(), number=3)
    given, low = ops.sample_population(
        residual, mean, std, level, popsize=popsize, draws=draws, dtype=dtype, backend="triton"
    )
    torch.testing.assert_close(low, mean + std * draws, **TOLERANCE[torch.float32])
    want, _ = reference.sample_population(residual, mean, std, level, popsize=popsize, draws=draws, dtype=dtype)
    torch.testing.assert_close(given, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_the_nearest(dtype):
    """fp32 halfway points between neighbours, above even and above odd ones, and one step to each side of them."""
    bits = torch.arange(1, 2**15 - 1, 7, device="cuda", dtype=torch.int16)
    steps, following = bits.view(dtype).float(), (bits + 1).view(dtype).float()
    inside = following.isfinite() & (steps > 2.0**-10) & (steps < 2.0**10)
    steps, following, odd = steps[inside], following[inside], (bits & 1)[inside]
    half = steps + (following - steps) / 2
    assert (half - steps).equal(following - half) and 0.4 < odd.float().mean() < 0.6
    x = torch.cat([half, half.nextafter(steps), half.nextafter(following), -half])[None]
    zero = torch.zeros_like(x)
    got = ops.merge_low_band(x, zero, 0, dtype=dtype, backend="triton")
    assert got.equal(x.to(dtype))


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1, -(2**63)])
def test_philox_words_bit_for_bit(seed):
    from noise_kernels import words_kernel  # imports triton

    out = torch.zeros(4, 64, dtype=torch.int64, device="cuda")
    words_kernel[(1,)](out, seed, 2**32 - 1, 2**31 + 3, 64)
    key = (seed & reference.MASK32, (seed >> 32) & reference.MASK32)
    want = reference.philox4x32(key, (torch.arange(64) // 4, 2**31 + 3, 2**32 - 1, 0))
    assert out.cpu().equal(torch.stack(want))


def test_box_muller():
    """Where u is nearest 0 and 1, on both sides of each change of formula, and over all of it."""
    from noise_kernels import box_muller_kernel

    edges = [0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, 2**32 - 2**24, 2**32 - 2**10, 2**32 - 1]
    edges += [round(2**31.5), round(2**30.5), round(2**3.5)]
    near = [min(max(edge + i, 0), 2**32 - 1) for edge in edges for i in range(-3, 4)]
    spread = torch.randint(2**32, (2**14 - len(near),), generator=torch.Generator().manual_seed(0))
    w = torch.cat([torch.tensor(near), spread])
    radius, cosine, sine = (torch.empty(2**14, device="cuda") for _ in range(3))
    box_muller_kernel[(1,)](w.cuda(), radius, cosine, sine, 2**14)
    radius, cosine, sine = radius.cpu(), cosine.cpu(), sine.cpu()
    u = (w.double() + 0.5) / 2**32
    r = (-2 * u.log()).sqrt()
    assert (radius.double() - r).abs().max() < NORMALS / 2
    for turn, ours in [((u * 2 * torch.pi).cos(), cosine), ((u * 2 * torch.pi).sin(), sine)]:
        assert (ours.double() - turn).abs().max() < 2e-7
        # Any radius meets any angle.
        shuffled = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
        assert (radius[shuffled].double() * ours - r[shuffled] * turn).abs().max() < NORMALS / 2


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: noise(2, 48, 34).mT, id="transposed"),
        pytest.param(lambda: noise(1, 4096, 128).mT.unflatten(2, (64, 64)), id="flux2"),
        pytest.param(lambda: noise(3, 40, 90)[:, 1::2, ::3], id="strided"),
        pytest.param(lambda: noise(1, 33, 20).expand(3, 33, 20), id="expanded"),
    ],
)
def test_strides_do_not_matter(view):
    x = view()
    assert not x.is_contiguous()
    contiguous = x.contiguous()
    bands = ops.haar_dwt2(x, 3, backend="triton")
    for ours, want in zip(flat(bands), flat(ops.haar_dwt2(contiguous, 3, backend="triton")), strict=True):
        assert ours.equal(want)
    for ours, want in zip(
        ops.split_low_band(x, 3, backend="triton"), ops.split_low_band(contiguous, 3, backend="triton"), strict=True
    ):
        torch.testing.assert_close(ours, want, **TOLERANCE[torch.float32])
    merged = ops.merge_low_band(x, bands[0], 3, backend="triton")
    assert merged.equal(ops.merge_low_band(contiguous, bands[0], 3, backend="triton"))


def test_shares_of_a_generation_are_the_same():
    residual, mean, std, _ = problem((1, 16, 128, 128), 4)
    whole, low = ops.sample_population(residual, mean, std, 4, popsize=50, seed=5, generation=1, backend="triton")
    for first, popsize in [(0, 50), (7, 1), (40, 10)]:
        share = ops.sample_population(
            residual, mean, std, 4, popsize=popsize, seed=5, generation=1, first=first, backend="triton"
        )
        assert share[0].equal(whole[first : first + popsize]) and share[1].equal(low[first : first + popsize])


# ---------------------------------------------------------------- elites

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE, torch.int64], ids=str)
@pytest.mark.parametrize(
    "popsize, k_elites, size",
    [
        pytest.param(10, 5, 1024, id="as-by-default"),
        pytest.param(10, 5, 77, id="odd"),
        pytest.param(50, 10, 20160, id="of-50-video"),
        pytest.param(1, 1, 64, id="one-candidate-one-elite"),
        pytest.param(3, 5, 1, id="more-elites-than-candidates-one-coefficient"),
        pytest.param(1, 127, 5, id="as-many-elites-as-it-holds"),
        pytest.param(127, 1, 300, id="as-many-candidates"),
    ],
)
def test_elites(popsize, k_elites, size, dtype):
    state = torch.empty(0, size), torch.empty(0, dtype=torch.float64), torch.zeros(size), torch.ones(size)
    for number in range(4):
        low = noise(popsize, size, number=number).cpu()
        scores = torch.randint(4, (popsize,), generator=torch.Generator().manual_seed(number)).to(dtype)
        if number < 2 and dtype.is_floating_point:  # none is finite, then some are
            bad = torch.tensor([NAN, INF, -INF], dtype=dtype)[torch.arange(popsize) % 3]
            scores = bad if number == 0 else scores.where(torch.arange(popsize) % 2 == 0, bad)
        want = reference.update_elites(low, scores, *state, k_elites=k_elites)
        given = (tensor.cuda() for tensor in (low, scores, *state))
        got = reference.Elites(*(t.cpu() for t in ops.update_elites(*given, k_elites=k_elites, backend="triton")))
        assert got.low.equal(want.low) and got.scores.equal(want.scores) and got.told.equal(want.told)
        torch.testing.assert_close(got.mean, want.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.variance, want.variance, rtol=1e-6, atol=1e-6)
        state = want[:4]


# ---------------------------------------------------------------- images for a reward

PICTURES = [
    pytest.param(1024, 1024, 224, id="1024"),
    pytest.param(1328, 1328, 224, id="1328-qwen"),
    pytest.param(928, 1664, 224, id="wide-qwen"),
    pytest.param(1001, 999, 224, id="odd-both-ways"),
    pytest.param(1024, 1029, 224, id="odd-cut: 225 to 224"),
    pytest.param(130, 100, 224, id="upscale"),
    pytest.param(224, 224, 224, id="no-pass"),
    pytest.param(3, 40, 5, id="thin"),
    pytest.param(5, 1, 3, id="one-column"),
]
PIXELS = {"grey": 1e-3, "crop": 1e-6, "pad": 4e-6}  # grey: of 255, so that the nearest whole number is Pillow's


def pictures(height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Noise past both ends in one, hard edges in the other; on the CPU."""
    numbers = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, generator=numbers) * 2.4 - 1.2
    edges = torch.where(torch.rand(3, height // 7 + 1, width // 7 + 1, generator=numbers) < 0.5, -1.0, 1.0)
    images[1] = edges.repeat_interleave(7, 1).repeat_interleave(7, 2)[:, :height, :width]
    return images.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", ["floor", "round"])
@pytest.mark.parametrize("height, width, size", PICTURES)
def test_crop_is_pillow_bit_for_bit(height, width, size, centre, dtype):
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    images = pictures(height, width, dtype)
    settings = dict(size=size, centre=centre, dtype=torch.float32)
    grid = ops.resize_normalize(images.cuda(), mean=(0, 0, 0), std=(1, 1, 1), backend="triton", **settings) * 255
    tall = size if height <= width else int(size * height / width)
    wide = size if width <= height else int(size * width / height)
    # round() takes a half to the even number.
    left, top = (round((n - size) / 2) if centre == "round" else (n - size) // 2 for n in (wide, tall))
    for got, each in zip(grid.cpu(), images, strict=True):
        grey = ((each.permute(1, 2, 0) + 1) * 127.5).clip(0, 255).to(torch.uint8)  # in the images' dtype
        picture = np.array(image.fromarray(grey.numpy()).resize((wide, tall), image.Resampling.BICUBIC))
        want = torch.from_numpy(picture[top : top + size, left : left + size]).permute(2, 0, 1).float()
        torch.testing.assert_close(got, want, rtol=0, atol=PIXELS["grey"])
    got = ops.resize_normalize(images.cuda(), backend="triton", **settings)
    torch.testing.assert_close(got.cpu(), reference.resize_normalize(images, **settings), rtol=0, atol=PIXELS["crop"])


# torch's antialiased bicubic repeats the first row of a picture one column wide: no oracle for "one-column".
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height, width, size", PICTURES[:-1])
def test_pad_is_the_antialiased_bicubic(height, width, size, dtype):
    images = pictures(height, width, dtype)
    got = ops.resize_normalize(images.cuda(), "pad", size=size, dtype=torch.float32, backend="triton")
    want = reference.resize_normalize(images, "pad", size=size, dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=PIXELS["pad"])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_the_largest_picture(rule):
    images = pictures(4096, 4096, torch.bfloat16)
    got = ops.resize_normalize(images.cuda(), rule, dtype=torch.float32, backend="triton")
    want = reference.resize_normalize(images, rule, dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=PIXELS[rule])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_pictures_strides_batches_and_dtypes(rule):
    images = pictures(300, 400, torch.float32).cuda()
    want = ops.resize_normalize(images, rule, backend="triton")
    last = images.to(memory_format=torch.channels_last)
    assert not last.is_contiguous() and ops.resize_normalize(last, rule, backend="triton").equal(want)
    assert ops.resize_normalize(images[1:], rule, backend="triton").equal(want[1:])
    assert ops.resize_normalize(images[:0], rule, backend="triton").shape == (0, 3, 224, 224)
    for dtype in (torch.float16, torch.bfloat16):
        assert ops.resize_normalize(images, rule, dtype=dtype, backend="triton").equal(want.to(dtype))


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_broken_picture_does_not_pass_for_a_black_one(rule):
    images = pictures(300, 300, torch.bfloat16).cuda()
    images[0, 1, 150, 150] = torch.nan
    got = ops.resize_normalize(images, rule, backend="triton")
    assert got[0].isnan().any() and got[1].isfinite().all()


# ---------------------------------------------------------------- launches, graphs, compilation


def kernels_launched(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_each(monkeypatch):
    monkeypatch.undo()  # poison is launches too
    residual, mean, std, _ = problem((1, 16, 166, 166), 4)
    coeffs = ops.haar_dwt2(residual, 6, backend="triton")
    images = pictures(1024, 1024, torch.bfloat16).cuda()
    state = start(residual, EvolutionConfig(), seed=1)
    low, scores = noise(10, state.mean.numel()), noise(10)
    state = tell(state, low, scores, backend="triton")
    for name, call in {
        "population_kernel": lambda: ops.sample_population(
            residual, mean, std, 4, popsize=10, seed=1, dtype=torch.bfloat16, backend="triton"
        ),
        "haar_dwt2_kernel": lambda: ops.haar_dwt2(residual, 6, backend="triton"),
        "haar_idwt2_kernel": lambda: ops.haar_idwt2(coeffs, (166, 166), backend="triton"),
        "split_low_band_kernel": lambda: ops.split_low_band(residual, 4, backend="triton"),
        "update_elites_kernel": lambda: tell(state, low, scores, backend="triton"),
        "resize_normalize_kernel": lambda: ops.resize_normalize(images, dtype=torch.float32, backend="triton"),
    }.items():
        assert kernels_launched(call) == [name]


def captured(call):
    """The graph of a call, and what a replay fills."""
    call()  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_captured_graph_asks_for_the_next_generation(backend, include_base):
    base = noise(1, 16, 128, 128, dtype=torch.bfloat16)
    state = start(base, EvolutionConfig(), seed=2**40 + 1, include_base=include_base, backend=backend)
    seed, generation = torch.tensor(state.seed, device="cuda"), torch.tensor(-1, device="cuda")

    def draw():
        generation.add_(1)
        return ask(state, seed=seed, generation=generation, backend=backend)

    graph, (candidates, low) = captured(draw)
    generation.fill_(-1)
    for number in range(3):
        candidates.fill_(NAN), low.fill_(NAN)
        graph.replay()
        want = ask(replace(state, evaluations=10 * number), backend=backend)
        assert candidates.equal(want[0]) and low.equal(want[1])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_captured_graph_resizes_the_next_picture(rule, backend):
    images, others = pictures(300, 400, torch.bfloat16).cuda().split(1)
    graph, pixels = captured(lambda: ops.resize_normalize(images, rule, backend=backend))
    images.copy_(others)
    pixels.fill_(NAN)
    graph.replay()
    assert pixels.equal(ops.resize_normalize(others, rule, backend=backend))


def test_a_whole_search_waits_once(monkeypatch):
    """Before the first candidate the base is looked at, and at the end the scores: nothing between."""
    monkeypatch.undo()
    base = noise(1, 16, 128, 128, dtype=torch.bfloat16)

    def objective(candidates):
        return -candidates.float().square().mean((1, 2, 3))

    def searched():
        return evolve(base, objective, 50, batch_size=10, seed=1, progress=False, backend="triton")

    searched()
    copies = [name for name in kernels_launched(searched) if "DtoH" in name]
    assert len(copies) == 2, copies


def test_compile_has_no_graph_break():
    x = noise(1, 16, 83, 128)

    def everything(x, seed, generation):
        coeffs = ops.haar_dwt2(x, 4, backend="triton")
        low, residual = ops.split_low_band(ops.haar_idwt2(coeffs, x.shape[-2:], backend="triton"), 4, backend="triton")
        mean = low.flatten() * 0.5
        candidates, low = ops.sample_population(
            residual, mean, mean.abs(), 4, popsize=5, seed=seed, generation=generation, dtype=torch.bfloat16,
            backend="triton",
        )  # fmt: skip
        return candidates + 1, ops.merge_low_band(residual, low[0].view(1, 16, 6, 8), 4, backend="triton")

    compiled = torch.compile(everything, fullgraph=True)
    for seed, generation in [(3, 1), (torch.tensor(3, device="cuda"), torch.tensor(1, device="cuda"))]:
        for got, want in zip(compiled(x, seed, generation), everything(x, seed, generation), strict=True):
            torch.testing.assert_close(got, want, **TOLERANCE[got.dtype])


def test_a_search_without_synchronisation():
    """ask and tell with scores on the device: CUDA itself raises where the host would wait."""
    base, target = noise(1, 16, 128, 128, dtype=torch.bfloat16), noise(16, 128, 128, number=1)

    def generation(state, backend):
        candidates, low = ask(state, backend=backend)
        return tell(state, low, -(candidates.float() - target).square().mean((1, 2, 3)), backend=backend)

    state, plain = (start(base, EvolutionConfig(), seed=1, backend=backend) for backend in ("triton", "torch"))
    generation(generation(state, "triton"), "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            state = generation(state, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(5):
        plain = generation(plain, "torch")
    assert state.evaluations == 50 and state.scores.isfinite().all()
    torch.testing.assert_close(state.scores, plain.scores, rtol=0, atol=1e-5)
