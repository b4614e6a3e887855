"""Ahead-of-time compilation, which needs no GPU: `python tests/aot.py haar` prints one JSON object a kernel.

A row calls a public launcher on CPU tensors; instead of a launch, the kernel is compiled for each architecture with
just the arguments it was given. So what is checked is what would run, specialisations included.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def haar() -> dict[str, Callable]:
    from ses_fast.kernels import haar

    even, odd = torch.zeros(50, 16, 128, 128), torch.zeros(16, 167, 93, dtype=torch.bfloat16)
    bands, odd_bands = haar.haar_dwt2(even, 4), haar.haar_dwt2(odd, 6)
    half_bands = [odd_bands[0].bfloat16(), *(tuple(band.bfloat16() for band in triple) for triple in odd_bands[1:])]
    return {
        "dwt2 16x128x128 level 4": lambda: haar.haar_dwt2(even, 4),
        "dwt2 16x167x93 bf16 level 6": lambda: haar.haar_dwt2(odd, 6),
        "idwt2 16x128x128 level 4": lambda: haar.haar_idwt2(bands, (128, 128)),
        "idwt2 16x167x93 bf16 level 6": lambda: haar.haar_idwt2(half_bands, (167, 93)),
        "idwt2 16x167x93 level 6": lambda: haar.haar_idwt2(odd_bands, (167, 93)),
        "split 16x128x128 bf16 level 4": lambda: haar.split_low_band(even[0].bfloat16(), 4),
        "split 16x167x93 bf16 level 6": lambda: haar.split_low_band(odd, 6),
    }


def population() -> dict[str, Callable]:
    from ses_fast.kernels import population

    def ask(shape: tuple[int, ...], level: int, popsize: int, dtype=torch.bfloat16, **noise) -> Callable:
        size = shape[0] * -(-shape[1] // 2**level) * -(-shape[2] // 2**level)
        residual, mean = torch.zeros(1, *shape), torch.zeros(size)
        if "draws" in noise:
            noise["draws"] = torch.zeros(popsize, size)
        return lambda: population.sample_population(residual, mean, mean, level, popsize=popsize, dtype=dtype, **noise)

    seed = {"seed": torch.tensor(3), "generation": torch.tensor(0)}
    full = {"dtype": torch.float32, "seed": 2**40}  # as most seeds are: 64 bits
    return {
        "16x128x128 level 4, P=50": ask((16, 128, 128), 4, 50, seed=3),
        "16x128x128 level 4, P=10, seed on device": ask((16, 128, 128), 4, 10, **seed),
        "16x166x166 level 4, P=50": ask((16, 166, 166), 4, 50, seed=3),
        "16x167x93 level 4, P=10": ask((16, 167, 93), 4, 10, seed=3),
        "128x64x64 level 4, P=50": ask((128, 64, 64), 4, 50, seed=3),
        "16x128x128 level 4, P=50, fp32, seed of 64 bits": ask((16, 128, 128), 4, 50, **full),
        "16x166x166 level 4, P=50, fp32, seed of 64 bits": ask((16, 166, 166), 4, 50, **full),
        "128x64x64 level 4, P=10, fp32, seed of 64 bits": ask((128, 64, 64), 4, 10, **full),
        "16x128x128 level 4, P=50, seed of 64 bits": ask((16, 128, 128), 4, 50, seed=2**40),
        "16x128x128 level 0, P=10, fp32, seed of 64 bits": ask((16, 128, 128), 0, 10, **full),
        "16x128x128 level 0, P=10": ask((16, 128, 128), 0, 10, seed=3),
        "16x128x128 level 4, P=10, draws": ask((16, 128, 128), 4, 10, draws=True),
    }


def elites() -> dict[str, Callable]:
    from ses_fast.kernels import elites

    def tell(popsize: int, k_elites: int, size: int, dtype=torch.float32, before: bool = True) -> Callable:
        best = k_elites if before else 0
        state = torch.zeros(best, size), torch.zeros(best, dtype=torch.float64), torch.zeros(size), torch.ones(size)
        low, scores = torch.zeros(popsize, size), torch.zeros(popsize, dtype=dtype)
        return lambda: elites.update_elites(low, scores, *state, k_elites=k_elites)

    return {
        "P=10, k=5, 16x8x8, the first generation": tell(10, 5, 1024, before=False),
        "P=10, k=5, 16x8x8": tell(10, 5, 1024),
        "P=10, k=5, 16x11x11, fp64 scores": tell(10, 5, 1936, torch.float64),
        "P=50, k=10, 16x21x6x10, bf16 scores": tell(50, 10, 20160, torch.bfloat16),
        "P=10, k=1, 77": tell(10, 1, 77),
        "P=64, k=64, 16x8x8": tell(64, 64, 1024),
        "P=120, k=8, 16x8x8": tell(120, 8, 1024),
        "P=1, k=127, 16x8x8": tell(1, 127, 1024),
    }


def preprocess() -> dict[str, Callable]:
    from ses_fast.kernels import preprocess

    def resize(height: int, width: int, dtype: torch.dtype, rule: str = "crop", **options) -> Callable:
        images = torch.zeros(1, 3, height, width, dtype=dtype)
        return lambda: preprocess.resize_normalize(images, rule, dtype=torch.float32, **options)

    return {
        "crop 1024x1024 bf16": resize(1024, 1024, torch.bfloat16),
        "crop 1328x1328 bf16": resize(1328, 1328, torch.bfloat16),
        "crop 1024x1024 fp32": resize(1024, 1024, torch.float32),
        "crop 1024x1024 bf16, rounded": resize(1024, 1024, torch.bfloat16, rounding="nearest"),
        "crop 1024x1024 fp32, rounded": resize(1024, 1024, torch.float32, rounding="nearest"),
        "crop 2048x2048 fp32": resize(2048, 2048, torch.float32),
        "crop 4096x4096 fp32": resize(4096, 4096, torch.float32),
        "crop 928x1664 bf16": resize(928, 1664, torch.bfloat16),
        "crop 999x1001 fp16": resize(999, 1001, torch.float16),
        "crop 4096x4096 bf16": resize(4096, 4096, torch.bfloat16),
        "crop 130x100 bf16": resize(130, 100, torch.bfloat16),
        "pad 1024x1024 bf16": resize(1024, 1024, torch.bfloat16, "pad"),
        "pad 1328x1328 bf16": resize(1328, 1328, torch.bfloat16, "pad"),
        "pad 4096x4096 fp32": resize(4096, 4096, torch.float32, "pad"),
        "pad 928x1664 fp32": resize(928, 1664, torch.float32, "pad"),
        "pad 130x100 fp16": resize(130, 100, torch.float16, "pad"),
    }


class Compiler:
    """Stands where Triton looks for the CUDA driver; the architecture is also the device's number."""

    architecture = ARCHITECTURES[0]

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", dump.stdout)}


def main(group: str) -> None:
    compiler, run, compiled = Compiler(), JITFunction.run, []
    driver.set_active(compiler)
    JITFunction.run = lambda self, *args, **kw: compiled.append(run(self, *args, **kw | {"warmup": True}))
    for row, launch in globals()[group]().items():
        for compiler.architecture in ARCHITECTURES:
            compiled.clear()
            launch()
            for kernel in compiled:
                named = {"row": row, "kernel": kernel.metadata.name, "sm": compiler.architecture}
                used = resources(kernel.asm["cubin"]) | {"SHARED": kernel.metadata.shared}  # all of it dynamic
                used["DRAWS"] = kernel.asm["ptx"].count("sqrt.rn.f32")  # of noise in a thread, each has one root
                print(json.dumps(named | used), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
