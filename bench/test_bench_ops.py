"""Every op against what one would use instead, in the same run:

    python -m bench.ops    # runs this file, writes bench/results/<device>-<date>.json and prints its table
    python -m bench.table bench/results/<device>-<date>.json

Each result is first held to an oracle: PyWavelets (`reference.py` in fp64 where it is missing), PIL, or `ses_search`;
what is wrong is not timed. Of PyWavelets, ptwt, transformers and diffsynth, what is missing is left out.

For each row, `extra_info` holds the bytes that have to move (each input read once, each output written once), and the
floor: those bytes at the speed of a copy measured in this run. On a GPU it also holds the time in a CUDA graph over
rotated buffers of more than twice the L2 cache; the plain time there is that of one call, host included.
"""

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ses_fast
from bench.environment import clock, environment
from ses_fast import ops, reference

try:
    import pywt
except ImportError:
    pywt = None

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
FAST = "triton" if CUDA else "torch"

LATENTS = [
    pytest.param((16, 128, 128), id="16x128x128"),
    pytest.param((16, 166, 166), id="16x166x166"),
    pytest.param((16, 167, 93), id="16x167x93"),
    pytest.param((128, 64, 64), id="128x64x64"),
    pytest.param((4, 64, 64), id="4x64x64"),
]
LEVEL = 4
# Noise is the same to 2e-6 before it is scaled, candidates to 5e-6; PIL's processor to 1e-6 of up to 2.7.
TOLERANCE = {"bands": 1e-5, "low": 2e-5, "candidates": 1e-5, "pixels": 2e-6, "search": 5e-6}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """AssertionError where they differ by more than TOLERANCE[what], and a narrower dtype's last bit."""
    rounding = 0.0 if found.dtype in (torch.float32, torch.float64) else torch.finfo(found.dtype).eps
    assert_close(found.cpu().double(), expected.cpu().double(), atol=TOLERANCE[what], rtol=rounding)


# ---------------------------------------------------------------- the oracle, in fp64


def analysed(x: Tensor) -> list:
    """The bands of x, in PyWavelets' order."""
    x = x.cpu().double()
    return pywt.wavedec2(x.numpy(), "db1", level=LEVEL) if pywt else reference.haar_dwt2(x, LEVEL)


def composed(bands: list, size: tuple[int, int]) -> Tensor:
    bands = [band if isinstance(band, tuple | list) else (band,) for band in bands]
    bands = [tuple(torch.as_tensor(each).cpu().double() for each in band) for band in bands]
    if pywt is None:
        return reference.haar_idwt2([*bands[0], *bands[1:]], size)
    low, *details = [tuple(each.numpy() for each in band) for band in bands]
    return torch.from_numpy(pywt.waverec2([*low, *details], "db1"))[..., : size[0], : size[1]]


# ---------------------------------------------------------------- the clock


def graph_seconds(call: Callable, make: Callable, nbytes: int, check: Callable = lambda *_: None) -> float:
    """The median time of one call inside a CUDA graph of calls on `make()`'s tensors, each with its own."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    inputs = [make() for _ in range(min(400, max(4, math.ceil(2.2 * cache / nbytes))))]
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*tensors) for tensors in inputs]  # an output that is freed would be used again
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(inputs))
    check(kept[-1], *inputs[-1])
    return statistics.median(times[5:])


@pytest.fixture(scope="session")
def copy_speed() -> float:
    """Bytes a second of a copy, reads and writes together, of far more than a cache holds."""
    # Written first: pages that never were are all one page of zeros, in cache.
    source = torch.ones(2**30 if CUDA else 2**27, dtype=torch.uint8, device=DEVICE)
    target = torch.ones_like(source)
    if CUDA:
        return 2 * source.numel() / graph_seconds(lambda a, b: b.copy_(a), lambda: (source, target), 2**40)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() / statistics.median(times)


@pytest.fixture
def measure(benchmark, copy_speed):
    """measure(row, call, make, nbytes, check): the wall time of `call(*make())`, and what it is compared with.

    check(call(*tensors), *tensors) comes first and raises AssertionError where the result is wrong.
    captured: whether a CUDA graph can hold the call.
    """

    def run(row: str, call: Callable, make: Callable, nbytes: int, check: Callable, captured: bool = True) -> None:
        tensors = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(call(*tensors), *tensors)

            def once():
                call(*tensors)
                clock(DEVICE)  # when a GPU has done it

            benchmark.pedantic(once, rounds=30 if CUDA else 10, warmup_rounds=1)
        floor = nbytes / copy_speed
        seconds = benchmark.stats.stats.median
        info = {"row": row, "bytes": nbytes, "GB/s": nbytes / seconds / 1e9, "floor": seconds / floor}
        if CUDA and captured:
            graph = graph_seconds(call, make, nbytes, check)
            info |= {"graph_us": graph * 1e6, "graph_GB/s": nbytes / graph / 1e9, "graph_floor": graph / floor}
        benchmark.extra_info.update(info | {"copy_GB/s": copy_speed / 1e9, "environment": environment(DEVICE)})

    return run


# ---------------------------------------------------------------- the ops


@pytest.mark.parametrize("way", [FAST, "torch", "pywt", "ptwt"] if CUDA else ["torch", "pywt", "ptwt"])
@pytest.mark.parametrize("popsize", [10, 50])
@pytest.mark.parametrize("shape", LATENTS)
def test_sample_population(measure, shape, popsize, way):
    pixels = math.prod(shape)
    band = (shape[0], *(-(-n // 2**LEVEL) for n in shape[1:]))
    size = math.prod(band)
    # The residual, mean and std in fp32, read once; the candidates, and their low bands in fp32, written once.
    nbytes = 4 * pixels + 8 * size + popsize * (pixels * DTYPE.itemsize + 4 * size)
    row = f"sample_population P={popsize} {shape}|{way}"

    def right(candidates: Tensor, low: Tensor, base: Tensor) -> None:
        """candidates [n, C, H, W] are the base with the low bands [n, ...] in its own one's place."""
        details = [tuple(torch.as_tensor(each) for each in triple) for triple in analysed(base)[1:]]
        for candidate, each in zip(candidates, low, strict=True):
            expected = composed([each.view(1, *band), *details], shape[1:])
            same(candidate[None, ..., : shape[1], : shape[2]], expected, "candidates")

    if way in ("torch", "triton"):
        # Given draws on the CPU, as beside it: drawing is no part of what PyWavelets does.
        draws = None if CUDA else noise(popsize, size)
        given = {"seed": 1} if CUDA else {"draws": draws}
        settings = {"level": LEVEL, "popsize": popsize, "dtype": DTYPE, "backend": way, **given}

        def make():
            low, residual = ops.split_low_band(noise(1, *shape), LEVEL, backend="torch")
            return residual, noise(low.numel()), noise(low.numel()).abs() + 0.5

        def check(found, residual, mean, std):
            eps = reference.philox_normal(1, 0, torch.arange(popsize), size) if draws is None else draws
            same(found[1], mean.cpu() + std.cpu() * eps, "low")
            right(*found, residual)

        measure(row, lambda *tensors: ops.sample_population(*tensors, **settings), make, nbytes, check)
    elif way == "pywt":
        pytest.importorskip("pywt")
        base, low = torch.randn(1, *shape), torch.randn(popsize, *band)
        details = pywt.wavedec2(base[0].numpy(), "db1", level=LEVEL)[1:]

        def one_by_one(low):
            """What `diffsynth.utils.ses` does for each candidate; the last one."""
            for each in low:
                candidate = pywt.waverec2([each, *details], "db1")
            return torch.from_numpy(candidate)

        def check(found, low):
            right(found[None], torch.from_numpy(low[-1:]), base)

        measure(row, one_by_one, lambda: (low.numpy(),), nbytes, check, captured=False)
    else:
        ptwt = pytest.importorskip("ptwt")
        base = noise(1, *shape)
        details = ptwt.wavedec2(base, "db1", level=LEVEL, mode="symmetric")[1:]
        details = tuple(tuple(each.expand(popsize, *each.shape[1:]) for each in triple) for triple in details)
        # It copies its filters from the host in each call: no graph.
        call = lambda low: ptwt.waverec2((low, *details), "db1")  # noqa: E731
        measure(row, call, lambda: (noise(popsize, *band),), nbytes, lambda f, low: right(f, low, base), captured=False)


@pytest.mark.parametrize("way", [FAST, "torch", "pywt", "ptwt"] if CUDA else ["torch", "pywt", "ptwt"])
@pytest.mark.parametrize("op", ["haar_dwt2", "haar_idwt2"])
@pytest.mark.parametrize("shape", [pytest.param((50, 16, 128, 128), id="50x16x128x128")])
def test_haar(measure, shape, op, way):
    nbytes = 2 * 4 * math.prod(shape)  # fp32 in, fp32 out
    if way in ("torch", "triton"):
        forward = partial(ops.haar_dwt2, level=LEVEL, backend=way)
        inverse = partial(ops.haar_idwt2, size=shape[-2:], backend=way)
    elif way == "pywt":
        pytest.importorskip("pywt")
        forward, inverse = partial(pywt.wavedec2, wavelet="db1", level=LEVEL), partial(pywt.waverec2, wavelet="db1")
    else:
        ptwt = pytest.importorskip("ptwt")
        forward = partial(ptwt.wavedec2, wavelet="db1", level=LEVEL, mode="symmetric")
        inverse = partial(ptwt.waverec2, wavelet="db1")

    def make():
        x = torch.randn(shape).numpy() if way == "pywt" else noise(*shape)
        return (x,) if op == "haar_dwt2" else (forward(x),)

    def check(found, given):
        if op == "haar_dwt2":
            low, *details = analysed(torch.as_tensor(given))
            pairs = [(found[0], low)]
            for ours, theirs in zip(found[1:], details, strict=True):
                pairs += zip(ours, theirs, strict=True)
        else:
            pairs = [(found, composed(list(given), shape[-2:]))]
        for ours, theirs in pairs:
            same(torch.as_tensor(ours), torch.as_tensor(theirs), "bands")

    call = forward if op == "haar_dwt2" else inverse
    measure(f"{op} {shape}|{way}", call, make, nbytes, check, captured=way in ("torch", "triton"))


@pytest.mark.parametrize("way", [FAST, "torch"] if CUDA else ["torch"])
@pytest.mark.parametrize("shape", LATENTS)
def test_update_elites(measure, shape, way):
    popsize, k_elites = 10, 5
    size = shape[0] * math.prod(-(-n // 2**LEVEL) for n in shape[1:])
    # The low bands of the generation and of the elites, mean and variance, read once; elites, mean, variance written.
    nbytes = 4 * size * (popsize + k_elites + 2 + k_elites + 2)

    def make():
        scores = torch.randn(popsize + k_elites, device=DEVICE, dtype=torch.float64)
        elites = scores[popsize:].sort(descending=True).values
        low, elite_low, mean, variance = (noise(*n, size) for n in ((popsize,), (k_elites,), (), ()))
        return low, scores[:popsize], elite_low, elites, mean, variance.abs()

    def check(found, *given):
        # By Python's own stable sort.
        low, scores, elite_low, elite_scores, *_ = (each.cpu() for each in given)
        pool = torch.cat([elite_low, low])
        order = sorted(range(len(pool)), key=lambda i: -torch.cat([elite_scores, scores])[i])[:k_elites]
        for ours, theirs in zip(found[:4], (pool[order], None, pool[order].mean(0), pool[order].var(0)), strict=True):
            if theirs is not None:
                same(ours.cpu(), theirs, "bands")

    call = partial(ops.update_elites, k_elites=k_elites, backend=way)
    measure(f"update_elites P={popsize} k={k_elites} {shape}|{way}", call, make, nbytes, check)


@pytest.mark.parametrize("way", [FAST, "torch", "pil"] if CUDA else ["torch", "pil"])
@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("size", [1024, 1328])
def test_resize_normalize(measure, size, batch, way):
    # The images read once, 224 x 224 fp32 written once.
    nbytes = batch * 3 * (size**2 * DTYPE.itemsize + 224**2 * 4)
    row = f"resize_normalize {batch}x3x{size}x{size}|{way}"

    def make():
        return (noise(batch, 3, size, size).clamp(-1, 1).to(DTYPE),)

    def through_pil(images: Tensor):
        grid = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return processor([Image.fromarray(picture) for picture in grid], return_tensors="pt").pixel_values

    try:
        from PIL import Image

        from bench.clip import PILProcessor

        processor = PILProcessor()
    except ImportError:
        if way == "pil":
            pytest.skip("no PIL or no transformers")
        oracle = partial(reference.resize_normalize, dtype=torch.float32)
    else:
        oracle = through_pil

    def check(found, images):
        same(found, oracle(images.cpu()), "pixels")

    if way == "pil":
        measure(row, through_pil, make, nbytes, check, captured=False)
    else:
        measure(row, partial(ops.resize_normalize, dtype=torch.float32, backend=way), make, nbytes, check)


@pytest.mark.parametrize("way", ["ses_fast", "diffsynth"])
@pytest.mark.parametrize("shape", LATENTS)
def test_search(measure, shape, way):
    """50 evaluations of a trivial objective, in batches of a generation; the reference takes one at a time."""

    def objective(latents: Tensor) -> Tensor:
        return -latents.float().square().mean(tuple(range(1, latents.dim())))

    try:
        from ses_fast._torchvision import declare_torchvision_ops

        declare_torchvision_ops()
        from diffsynth.utils.ses import ses_search
    except ImportError:
        if way == "diffsynth":
            pytest.skip("no diffsynth, or not all that it needs")
        ses_search = None
    ours = partial(ses_fast.search, objective_reward_fn=objective, total_eval_budget=50, batch_size=10, progress=False)

    def theirs(base: Tensor) -> Tensor:
        return ses_search(base, lambda latents: objective(latents).item(), total_eval_budget=50)

    def check(_, base: Tensor) -> None:
        """Both under the same draws, in fp32: in bf16 a last bit may choose other elites."""
        base = base.float()
        torch.manual_seed(3)
        expected = (
            theirs(base) if ses_search else ours(base, generator=torch.Generator().manual_seed(3), backend="torch")
        )
        same(ours(base, generator=torch.Generator().manual_seed(3)), expected, "search")

    seeds = itertools.count()  # a new one for each call: noise that was drawn may be kept
    call = theirs if way == "diffsynth" else lambda base: ours(base, seed=next(seeds))
    nbytes = 50 * math.prod(shape) * DTYPE.itemsize  # the candidates, written once
    # A search waits for its scores: it cannot be captured.
    row = f"search budget=50 {shape}|{way}"
    measure(row, call, lambda: (noise(1, *shape, dtype=DTYPE),), nbytes, check, captured=False)
