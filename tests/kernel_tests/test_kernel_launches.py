"""What only a GPU shows: launches, captured graphs, whole searches, Inductor.

`pytest tests/kernel_tests --require-gpu`. Every call asks for `backend="triton"` by name.
"""

import pytest
import torch
from kernel_device import noise

from ses_fast import ops, reference
from ses_fast.evolution import EvolutionConfig, ask, start, tell
from ses_fast.loop import evolve
from ses_fast.strategies import STRATEGIES

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: dict(rtol=0, atol=5e-6), torch.bfloat16: dict(rtol=2**-7, atol=5e-6)}
NAN = float("nan")


def problem(shape, level):
    low, residual = reference.split_low_band(noise(*shape), level)
    return residual, noise(low.numel(), seed=1), noise(low.numel(), seed=2).abs() + 0.5


def pictures(height: int, width: int) -> torch.Tensor:
    return (torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2).cuda().bfloat16()


def kernels_launched(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_each(monkeypatch):
    monkeypatch.undo()  # poison is launches too
    residual, mean, std = problem((1, 16, 166, 166), 4)
    coeffs = ops.haar_dwt2(residual, 6, backend="triton")
    images = pictures(1024, 1024)
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


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_captured_graph_draws_the_next_generation(backend):
    """That is what a seed and a generation on the device are for: a number would be captured too."""
    residual, mean, std = problem((1, 16, 128, 128), 4)
    seed, generation = torch.tensor(2**40 + 1, device="cuda"), torch.tensor(-1, device="cuda")

    def draw(**numbers):
        return ops.sample_population(
            residual, mean, std, 4, popsize=10, dtype=torch.bfloat16, backend=backend, **numbers
        )

    def following():
        generation.add_(1)
        return draw(seed=seed, generation=generation)

    graph, (candidates, low) = captured(following)
    generation.fill_(-1)
    for number in range(3):
        candidates.fill_(NAN), low.fill_(NAN)
        graph.replay()
        want = draw(seed=2**40 + 1, generation=number)
        assert candidates.equal(want[0]) and low.equal(want[1])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_captured_graph_resizes_the_next_picture(rule, backend):
    images, others = pictures(300, 400).split(1)
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


def test_compile_has_no_graph_break(monkeypatch):
    monkeypatch.undo()
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


@pytest.mark.parametrize("raced", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_without_synchronisation(strategy, raced):
    """ask and tell with scores on the device: CUDA itself raises where the host would wait."""
    base, target = noise(1, 16, 128, 128, dtype=torch.bfloat16), noise(16, 128, 128, seed=1)

    def generation(state, backend):
        candidates, low = ask(state, backend=backend)
        scores = -(candidates.float() - target).square().mean((1, 2, 3))
        return tell(state, low, scores, steps=torch.tensor([0, 4] * 5) if raced else None, backend=backend)

    config = EvolutionConfig(strategy=strategy)
    state, plain = (start(base, config, seed=1, backend=backend) for backend in ("triton", "torch"))
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
