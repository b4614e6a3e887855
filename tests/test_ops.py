"""What the ops share: one signature and docstring for op, reference and kernel, and the choice of a backend."""

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ses_fast
from ses_fast import fast_torch, ops, reference, spectral
from ses_fast.custom_op import operator

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KERNEL_OF = {
    "haar_dwt2": "haar",
    "haar_idwt2": "haar",
    "split_low_band": "haar",
    "merge_low_band": "haar",
    "sample_population": "population",
    "update_elites": "elites",
    "resize_normalize": "preprocess",
}


@pytest.mark.parametrize("name", KERNEL_OF)
def test_an_op_is_its_reference_and_a_backend(name):
    public, plain = getattr(ops, name), getattr(reference, name)
    parameters = dict(inspect.signature(public).parameters)
    assert parameters.pop("backend").default is None
    assert parameters == dict(inspect.signature(plain).parameters)
    assert public.__doc__.startswith(plain.__doc__.rstrip()) and "RuntimeError" in public.__doc__


@pytest.mark.parametrize("name", [*KERNEL_OF, "philox4x32", "philox_normal"])
def test_a_fast_op_is_its_reference(name):
    fast, plain = getattr(fast_torch, name), getattr(reference, name)
    assert inspect.signature(fast) == inspect.signature(plain) and fast.__doc__ == plain.__doc__


@needs_triton
@pytest.mark.parametrize("name", KERNEL_OF)
def test_a_kernels_launcher_is_its_reference(name):
    launcher, plain = getattr(import_module(f"ses_fast.kernels.{KERNEL_OF[name]}"), name), getattr(reference, name)
    assert inspect.signature(launcher) == inspect.signature(plain) and launcher.__doc__ == plain.__doc__


def test_backends(monkeypatch):
    x = torch.randn(4, 4)
    assert "CUDA" in ops.why_not_triton(x)
    with pytest.raises(RuntimeError, match='"triton" cannot run here: the kernels run on CUDA'):
        ops.haar_dwt2(x, 1, backend="triton")
    monkeypatch.setattr(ops, "_backend", "auto")
    ops.set_backend("triton")
    with pytest.raises(RuntimeError, match="a tensor is on cpu"):
        ops.split_low_band(x, 1)
    assert ops.split_low_band(x, 1, backend="torch")[0].shape == (2, 2)
    with pytest.raises(ValueError, match="auto, triton, torch"):
        ops.set_backend("gpu")
    with pytest.raises(RuntimeError, match="a tensor is on cpu"):  # as it was set before
        ops.split_low_band(x, 1)


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_resize_of_a_known_size_copies_nothing_from_the_host(rule):
    """A copy waits for the device, and a captured graph takes none. What is made of numbers is marked `lift_fresh`."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    images = torch.zeros(1, 3, 30, 40)
    ops.resize_normalize(images, rule, size=16, backend="torch")
    with Called():
        ops.resize_normalize(images, rule, size=16, backend="torch")
    assert "aten.div.Tensor" in names and not [name for name in names if "lift_fresh" in name]


# ---------------------------------------------------------------- the fast torch path against the formula

ROWS = [
    pytest.param((1, 4, 64, 64), 4, id="sdxl-at-512"),
    pytest.param((1, 2, 167, 93), 3, id="odd-both-ways"),
    pytest.param((1, 3, 17, 5), 1, id="prime"),
    pytest.param((1, 2, 3, 9, 20), 2, id="5d-video"),
    pytest.param((1, 4, 6), 0, id="level-0-whole-latent"),
    pytest.param((1, 2, 5, 5), 100, id="the-deepest"),
]


def same(ours, theirs):
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape, level", ROWS)
def test_the_fast_band_and_population_are_the_formulas_to_the_bit(shape, level, dtype):
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=noise).to(dtype)
    low, residual = fast_torch.split_low_band(x, level)
    same((low, residual), reference.split_low_band(x, level))
    many = low + torch.arange(3.0).view(-1, *[1] * (low.dim() - 1))
    given = dict(level=level, dtype=dtype)
    same([fast_torch.merge_low_band(residual, many, **given)], [reference.merge_low_band(residual, many, **given)])
    mean, std = torch.randn(low.numel(), generator=noise), torch.rand(low.numel(), generator=noise)
    for numbers in (
        dict(seed=2**40 + 9, generation=2**32 - 2, first=2),  # within a block of generations that are drawn at once
        dict(seed=-5, generation=5),  # and at its start
        dict(seed=torch.tensor(-5), generation=torch.tensor(5)),
        dict(draws=torch.randn(3, low.numel(), generator=noise)),
    ):
        given = (residual, mean, std, level)
        ours, theirs = (
            each.sample_population(*given, popsize=3, dtype=dtype, **numbers) for each in (fast_torch, reference)
        )
        same(ours, theirs)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("seed, generation", [(0, 0), (-5, 7), (2**63 - 1, 2**32 - 1), (-(2**63), 2**31)])
def test_the_fast_noise_is_the_formulas_to_the_bit(seed, generation, as_tensors):
    numbers = torch.tensor([0, 11, 2**32 - 1])
    counter = torch.arange(70), numbers[:, None], generation, 0
    key = seed & reference.MASK32, seed >> 32 & reference.MASK32
    if as_tensors:
        seed, generation, key = torch.tensor(seed), torch.tensor(generation), tuple(map(torch.tensor, key))
    same(fast_torch.philox4x32(key, counter), reference.philox4x32(key, counter))
    several = torch.stack([torch.as_tensor(generation), torch.tensor(3)])[:, None, None]
    for each in (generation, several):
        same(*([each_path.philox_normal(seed, each, numbers, 277)] for each_path in (fast_torch, reference)))


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([3.0, 1.0, 2.0, 3.0], id="all-finite"),
        pytest.param([float("nan"), 1.0, float("inf"), 3.0], id="two-finite"),
        pytest.param([float("nan")] * 4, id="none-finite"),
    ],
)
@pytest.mark.parametrize("k_elites", [1, 3, 6])
def test_the_fast_elites_are_the_formulas(k_elites, scores):
    low = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    state = torch.empty(0, 37), torch.empty(0, dtype=torch.float64), torch.zeros(37), torch.ones(37)
    for _ in range(2):
        given = (low, torch.tensor(scores), *state)
        ours, theirs = (each.update_elites(*given, k_elites=k_elites) for each in (fast_torch, reference))
        same([ours.elite_low, ours.elite_scores, ours.scores], [theirs.elite_low, theirs.elite_scores, theirs.scores])
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-6)  # the order of the sum
        torch.testing.assert_close(ours.variance, theirs.variance, rtol=0, atol=1e-6)
        state, low = theirs[:4], low + 1


@pytest.mark.parametrize("centre", ["floor", "round"])
@pytest.mark.parametrize("rule", ["crop", "pad"])
@pytest.mark.parametrize(
    "height, width, size",
    [
        pytest.param(300, 200, 224, id="300x200"),
        pytest.param(43, 24, 24, id="43x24-one-pass"),
        pytest.param(24, 24, 24, id="24x24-no-pass"),
        pytest.param(31, 17, 40, id="31x17-upscale"),
        pytest.param(500, 900, 3, id="500x900-to-3-sums-in-fp64"),
    ],
)
def test_the_fast_resize_is_the_formula_to_the_bit(height, width, size, rule, centre):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    ours, theirs = (each.resize_normalize(images, rule, size=size, centre=centre) for each in (fast_torch, reference))
    same([ours], [theirs])


# ---------------------------------------------------------------- every op at once: devices and defaults


def calls(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Callable]:
    """Each op on tensors of a device, by its arguments but `backend`."""
    x = torch.linspace(-1, 1, 96, device=device, dtype=dtype).view(1, 2, 6, 8)
    low, mean = torch.ones(1, 2, 3, 4, device=device), torch.ones(24, device=device)
    triple = (low, low, low)
    elites = torch.ones(2, 24, device=device), torch.ones(2, device=device, dtype=torch.float64)
    scores = torch.arange(3, device=device)
    images = torch.linspace(-1, 1, 720, device=device, dtype=dtype).view(1, 3, 12, 20)
    return {
        "haar_dwt2": partial(ops.haar_dwt2, x, 1),
        "haar_idwt2": partial(ops.haar_idwt2, [low, triple], (6, 8)),
        "split_low_band": partial(ops.split_low_band, x, 1),
        "merge_low_band": partial(ops.merge_low_band, x, low, 1),
        "sample_population": partial(ops.sample_population, x, mean, mean, 1, popsize=3, seed=1),
        "update_elites": partial(ops.update_elites, mean.repeat(3, 1), scores, *elites, mean, mean, k_elites=2),
        "resize_normalize": partial(ops.resize_normalize, images, size=8),
        "resize_normalize, pad": partial(ops.resize_normalize, images, "pad", size=8),
    }


@contextmanager
def default(device: str | None = None, dtype: torch.dtype | None = None):
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(dict(device="meta"), id="meta"),
        pytest.param(dict(device="cuda"), id="cuda"),  # without a GPU nothing can be made there
        pytest.param(dict(dtype=torch.float64), id="fp64"),
        pytest.param(dict(dtype=torch.bfloat16), id="bf16"),
    ],
)
@pytest.mark.parametrize("module", [fast_torch, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", calls())
def test_default_device_and_dtype_change_nothing(name, module, setting, monkeypatch):
    call = calls()[name]
    monkeypatch.setattr(ops, "_module", lambda *_, **__: module)
    for cached in (reference.pil_weights, fast_torch._normals_ahead, fast_torch._pil_blocks, fast_torch._channels):
        cached.cache_clear()
    with default(**setting):
        got = tree_leaves(call())
    for cached in (reference.pil_weights, fast_torch._normals_ahead, fast_torch._pil_blocks, fast_torch._channels):
        cached.cache_clear()
    same(got, tree_leaves(call()))


@pytest.mark.parametrize(
    "setting", [dict(device="meta"), dict(device="cuda"), dict(dtype=torch.float64)], ids=["meta", "cuda", "fp64"]
)
@pytest.mark.parametrize("source", ["seed", "generator"])
@pytest.mark.parametrize("wavelet", ["db1", "db2"])
def test_default_device_and_dtype_do_not_change_a_search(wavelet, source, setting):
    pytest.importorskip("pywt")
    base = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float32)

    def searched():
        noise = dict(seed=3) if source == "seed" else dict(generator=torch.Generator("cpu").manual_seed(3))
        return ses_fast.evolve(base, lambda z: z.mean().item(), 7, 3, 2, wavelet, 1, progress=False, **noise)

    spectral._matrices.cache_clear()
    with default(**setting):
        got = searched()
    spectral._matrices.cache_clear()
    want = searched()
    assert got.latents.equal(want.latents) and got.state.history == want.state.history


@needs_triton
@pytest.mark.parametrize("name", calls())
def test_a_launch_stands_under_the_tensors_device(name, monkeypatch):
    """With tensors on cuda:1 while cuda:0 is current. They are fake: no GPU is needed, and nothing is launched."""
    op = name.partition(",")[0]
    entered, launched = [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Torch 2.11 would then wake the GPU for a fake tensor.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    module = import_module(f"ses_fast.kernels.{KERNEL_OF[op]}")
    monkeypatch.setattr(module, op, lambda *args, **settings: launched.extend(entered))
    with FakeTensorMode():
        calls("cuda:1")[name](backend="triton")
    assert launched == [torch.device("cuda:1")] and not entered


@needs_triton
def test_a_compiled_launch_is_guarded_by_its_operator(monkeypatch):
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield

    @operator("out")
    def doubled(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    def call(x):
        out = torch.empty_like(x)
        doubled(x, out)
        return out + 1

    x = torch.arange(3.0)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    assert torch.compile(call, fullgraph=True, backend="aot_eager")(x).equal(x * 2 + 1) and entered == [x.device]
    assert call(x).equal(x * 2 + 1) and len(entered) == 1  # eagerly it is the plain function
    torch.library.opcheck(doubled.operator, (x, torch.empty_like(x)), test_utils=("test_schema", "test_faketensor"))
