"""Where the kernels' tests run: on a GPU, or under Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = [] if INTERPRETED else [pytest.mark.gpu]
# The interpreter gets bf16 wrong: its sums are garbage and its casts truncate.
DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not (INTERPRETED and dtype == torch.bfloat16)
]


def rows(small: list, large: list) -> list:
    """The interpreter takes seconds for each of the large ones."""
    return small if INTERPRETED else small + large


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
