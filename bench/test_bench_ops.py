"""Every op against what one would use instead, in the same run:

    python -m bench.ops    # runs this file, writes bench/results/<device>-<date>.json and prints its table
    python -m bench.table bench/results/<device>-<date>.json

For each row, `extra_info` holds the bytes that have to move (each input read once, each output written once), and the
floor: those bytes at the speed of a copy measured in this run. On a GPU it also holds the time in a CUDA graph over
rotated buffers of more than twice the L2 cache; the plain time there is that of one call, host included.
"""

import math
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import pywt
import torch

import ses_fast
from bench.environment import environment
from ses_fast import ops

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


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def graph_seconds(call: Callable, make: Callable, nbytes: int) -> float:
    """The median time of one call inside a CUDA graph of calls on `make()`'s tensors, each with its own."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    inputs = [make() for _ in range(min(400, max(4, math.ceil(2.2 * cache / nbytes))))]
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*tensors) for tensors in inputs]  # noqa: F841  an output that is freed would be used again
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(inputs))
    return statistics.median(times[5:])


@pytest.fixture(scope="session")
def copy_speed() -> float:
    """Bytes a second of a copy, reads and writes together, of far more than a cache holds."""
    source = torch.empty(2**30 if CUDA else 2**27, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    if CUDA:
        return 2 * source.numel() / graph_seconds(lambda a, b: b.copy_(a), lambda: (source, target), 2**40)
    from time import perf_counter

    times = []
    for _ in range(10):
        begin = perf_counter()
        target.copy_(source)
        times.append(perf_counter() - begin)
    return 2 * source.numel() / statistics.median(times)


@pytest.fixture
def measure(benchmark, copy_speed):
    """measure(row, call, make, nbytes): the wall time of `call(*make())`, and what it is compared with."""

    def run(row: str, call: Callable, make: Callable, nbytes: int, on_device: bool = True) -> None:
        tensors = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*tensors)

            def once():
                call(*tensors)
                if CUDA and on_device:
                    torch.cuda.synchronize()

            benchmark.pedantic(once, rounds=30 if CUDA else 10, warmup_rounds=1)
        floor = nbytes / copy_speed
        seconds = benchmark.stats.stats.median
        info = {"row": row, "bytes": nbytes, "GB/s": nbytes / seconds / 1e9, "floor": seconds / floor}
        if CUDA and on_device:
            graph = graph_seconds(call, make, nbytes)
            info |= {"graph_us": graph * 1e6, "graph_GB/s": nbytes / graph / 1e9, "graph_floor": graph / floor}
        benchmark.extra_info.update(info | {"copy_GB/s": copy_speed / 1e9, "environment": environment(DEVICE)})

    return run


def population_problem(shape: tuple[int, ...]):
    low, residual = ops.split_low_band(noise(1, *shape), LEVEL, backend="torch")
    return residual, noise(low.numel()), noise(low.numel()).abs() + 0.5


def one_by_one(draws: torch.Tensor, base: torch.Tensor) -> None:
    """What `diffsynth.utils.ses` does for each candidate."""
    coeffs = pywt.wavedec2(base[0].numpy(), "db1", level=LEVEL)
    for candidate in draws:
        pywt.waverec2([candidate.view(coeffs[0].shape).numpy(), *coeffs[1:]], "db1")


@pytest.mark.parametrize("way", [FAST, "torch", "pywt", "ptwt"] if CUDA else ["torch", "pywt", "ptwt"])
@pytest.mark.parametrize("popsize", [10, 50])
@pytest.mark.parametrize("shape", LATENTS)
def test_sample_population(measure, shape, popsize, way):
    pixels = math.prod(shape)
    size = shape[0] * math.prod(-(-n // 2**LEVEL) for n in shape[1:])
    # The residual, mean and std in fp32, read once; the candidates, and their low bands in fp32, written once.
    nbytes = 4 * pixels + 8 * size + popsize * (pixels * DTYPE.itemsize + 4 * size)
    row = f"sample_population P={popsize} {shape}|{way}"
    if way in ("torch", "triton"):
        # Given draws on the CPU, as beside it: drawing is no part of what PyWavelets does.
        draws = None if CUDA else noise(popsize, size)
        call = partial(
            ops.sample_population,
            level=LEVEL,
            popsize=popsize,
            seed=1 if CUDA else None,
            draws=draws,
            dtype=DTYPE,
            backend=way,
        )
        measure(row, call, lambda: population_problem(shape), nbytes)
    elif way == "pywt":
        measure(row, one_by_one, lambda: (torch.randn(popsize, size), torch.randn(1, *shape)), nbytes, False)
    else:
        ptwt = pytest.importorskip("ptwt")
        details = ptwt.wavedec2(noise(1, *shape), "db1", level=LEVEL, mode="symmetric")[1:]
        details = tuple(tuple(band.expand(popsize, *band.shape[1:]) for band in triple) for triple in details)
        low_shape = (popsize, shape[0], *(-(-n // 2**LEVEL) for n in shape[1:]))
        measure(row, lambda low: ptwt.waverec2((low, *details), "db1"), lambda: (noise(*low_shape),), nbytes)


@pytest.mark.parametrize("way", [FAST, "torch", "pywt", "ptwt"] if CUDA else ["torch", "pywt", "ptwt"])
@pytest.mark.parametrize("op", ["haar_dwt2", "haar_idwt2"])
@pytest.mark.parametrize("shape", [pytest.param((50, 16, 128, 128), id="50x16x128x128")])
def test_haar(measure, shape, op, way):
    nbytes = 2 * 4 * math.prod(shape)  # fp32 in, fp32 out
    row = f"{op} {shape}|{way}"

    def make():
        x = noise(*shape)
        return (x,) if op == "haar_dwt2" else (ops.haar_dwt2(x, LEVEL, backend="torch"), shape[-2:])

    if way in ("torch", "triton"):
        call = partial(getattr(ops, op), backend=way)
        measure(row, partial(call, level=LEVEL) if op == "haar_dwt2" else call, make, nbytes)
    elif way == "pywt":
        coeffs = pywt.wavedec2(torch.randn(shape).numpy(), "db1", level=LEVEL)
        forward = partial(pywt.wavedec2, wavelet="db1", level=LEVEL)
        if op == "haar_dwt2":
            measure(row, forward, lambda: (torch.randn(shape).numpy(),), nbytes, False)
        else:
            measure(row, lambda: pywt.waverec2(coeffs, "db1"), lambda: (), nbytes, False)
    else:
        ptwt = pytest.importorskip("ptwt")
        forward = partial(ptwt.wavedec2, wavelet="db1", level=LEVEL, mode="symmetric")
        if op == "haar_dwt2":
            measure(row, forward, lambda: (noise(*shape),), nbytes)
        else:
            measure(row, lambda *c: ptwt.waverec2(c, "db1"), lambda: tuple(forward(noise(*shape))), nbytes)


@pytest.mark.parametrize("way", [FAST, "torch", "pil"] if CUDA else ["torch", "pil"])
@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("size", [1024, 1328])
def test_resize_normalize(measure, size, batch, way):
    # The images read once, 224 x 224 fp32 written once.
    nbytes = batch * 3 * (size**2 * DTYPE.itemsize + 224**2 * 4)
    row = f"resize_normalize {batch}x3x{size}x{size}|{way}"

    def make():
        return (noise(batch, 3, size, size).clamp(-1, 1).to(DTYPE),)

    if way == "pil":
        image = pytest.importorskip("PIL.Image")
        transformers = pytest.importorskip("transformers")
        processor = transformers.CLIPImageProcessor()

        def through_pil(images: torch.Tensor):
            grid = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            return processor([image.fromarray(picture) for picture in grid], return_tensors="pt")

        measure(row, through_pil, make, nbytes, False)
    else:
        measure(row, partial(ops.resize_normalize, dtype=torch.float32, backend=way), make, nbytes)


@pytest.mark.parametrize("way", ["ses_fast", "diffsynth"])
@pytest.mark.parametrize("shape", LATENTS)
def test_search(measure, shape, way):
    """50 evaluations of a trivial objective, in batches of a generation; the reference takes one at a time."""

    def objective(latents: torch.Tensor) -> torch.Tensor:
        return -latents.float().square().mean(tuple(range(1, latents.dim())))

    pixels = math.prod(shape)
    nbytes = 50 * pixels * DTYPE.itemsize  # the candidates, written once
    row = f"search budget=50 {shape}|{way}"
    if way == "ses_fast":
        call = partial(ses_fast.search, objective_reward_fn=objective, total_eval_budget=50, batch_size=10, seed=0)
        call = partial(call, progress=False)
    else:
        from ses_fast._torchvision import mend_torchvision

        mend_torchvision()
        reference = pytest.importorskip("diffsynth.utils.ses")

        def call(base):
            return reference.ses_search(base, lambda latents: objective(latents).item(), total_eval_budget=50)

    # A search waits for its scores: it cannot be captured.
    measure(row, call, lambda: (noise(1, *shape, dtype=DTYPE),), nbytes, on_device=False)
