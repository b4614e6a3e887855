"""The Triton kernels without a GPU: interpreted, and compiled ahead of time. Each in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported and cannot compile under it. The tests themselves are in
`kernel_tests/`, the same for the interpreter and for a GPU (`pytest tests/kernel_tests --require-gpu`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ses_fast import ops

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = ["elites", "haar", "population", "preprocess"]


def run(*arguments: object, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("group", INTERPRETED)
def test_interpreted(group):
    path = TESTS / "kernel_tests" / f"test_kernel_{group}.py"
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", path, TRITON_INTERPRET="1")
    assert "skipped" not in said, said


@needs_triton
@pytest.mark.parametrize("group", ["haar", "population", "elites", "preprocess"])
def test_compiled_ahead_of_time(group):
    """No spills: cuobjdump's LOCAL stays 0 even where the stack is used, STACK does not.

    A block's shared memory fits GPUs of 99 KB (sm_86, sm_89). A thread draws noise at most twice: for its pixels, and
    for the low band that is written down. (At level 0 a pixel is a coefficient.)
    """
    kernels = [json.loads(line) for line in run(TESTS / "aot.py", group).splitlines()]
    assert {kernel["sm"] for kernel in kernels} == {80, 90, 100}
    for kernel in kernels:
        print(
            f"{kernel['kernel']:24} sm_{kernel['sm']:<4} {kernel['REG']:4} registers  {kernel['SHARED']:6} bytes shared"
            f"  {kernel['DRAWS']:2} draws  {kernel['row']}"
        )
    assert not [kernel for kernel in kernels if kernel["STACK"] or kernel["LOCAL"]]
    assert max(kernel["SHARED"] for kernel in kernels) <= 99 * 1024
    assert not [kernel for kernel in kernels if kernel["DRAWS"] > 2 and "level 0" not in kernel["row"]]
    assert group != "population" or any(kernel["DRAWS"] for kernel in kernels)


def test_torch_path_compiles_without_a_graph_break():
    def search_step(x, seed, generation):
        coeffs = ops.haar_dwt2(x, 2)
        low, residual = ops.split_low_band(ops.haar_idwt2(coeffs, x.shape[-2:]), 2)
        mean = low.flatten()
        candidates, low = ops.sample_population(
            residual, mean, mean.abs(), 2, popsize=3, seed=seed, generation=generation, dtype=torch.bfloat16
        )
        return candidates, ops.merge_low_band(residual, low[1].view(1, 3, 5, 4), 2)

    x = torch.randn(1, 3, 18, 13, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(search_step, fullgraph=True, backend="aot_eager")
    for seed, generation in [(3, 1), (torch.tensor(3), torch.tensor(1))]:
        for got, want in zip(compiled(x, seed, generation), search_step(x, seed, generation), strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_torch_resize_compiles_without_a_graph_break():
    def prepare(images):
        return ops.resize_normalize(images, size=16) * 2, ops.resize_normalize(
            images, "pad", size=16, dtype=torch.bfloat16
        )

    compiled = torch.compile(prepare, fullgraph=True, backend="aot_eager")
    for shape in [(1, 3, 30, 40), (2, 3, 50, 20)]:  # the second asks for a graph of any size
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for got, want in zip(compiled(images), prepare(images), strict=True):
            assert got.dtype == want.dtype and got.equal(want)
