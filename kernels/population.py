"""A generation's candidates in one launch: Philox -> mean + std * eps -> lowest-band replacement -> cast.

The image is cut into the blocks of 2^level x 2^level pixels that share a coefficient. A program holds one tile of the
residual in registers and goes over a few candidates; for each it draws once per coefficient and writes the blocks.
Bytes: the residual once (4 a pixel), mean and std once, the candidates (2 or 4 a pixel) and their low bands (4 each).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ses_fast.custom_op import operator
from ses_fast.reference import Seed, documented

from .philox import normal, number

TILE = 4096  # pixels a program holds: 32 registers a thread
PROGRAMS = 512  # 4 warps each: what fills the machine, about 16 warps a multiprocessor


@triton.jit(do_not_specialize=["seed", "generation", "first"])
def population_kernel(
    residual,  # [planes, H, W]
    mean,  # [D], or None: `draws` are the low bands themselves
    std,  # [D]
    draws,  # [P, D], or None: drawn here
    candidates,  # [P, planes, H, W]
    low,  # [P, D], or None
    seed,  # int, or a pointer to a 0-d tensor; so is `generation`
    generation,
    first,  # the number of candidate 0
    popsize,
    share,  # candidates a program writes
    size,  # planes * H * W
    low_size,  # planes * h * w
    rows,  # planes * h
    h,
    w,
    height,
    width_units,  # W / UNIT
    LEVEL: tl.constexpr,  # shifts by a constant
    SCALE: tl.constexpr,  # 2^-level
    UNIT: tl.constexpr,  # gcd(W, 8): what rows are aligned to decides how wide loads and stores are
    Y: tl.constexpr,  # a tile: rows of pixels
    R: tl.constexpr,  # in each of these rows of coefficients,
    C: tl.constexpr,  # coefficients in a row,
    X: tl.constexpr,  # pixels of each in a row
):
    width = width_units * UNIT
    tiles_x = tl.cdiv(width, C * X)
    tiles_y = tl.cdiv(tl.minimum(height, 1 << LEVEL), Y)
    i_tile = tl.program_id(0)
    i_x, i_y, i_r = i_tile % tiles_x, i_tile // tiles_x % tiles_y, i_tile // (tiles_x * tiles_y)

    r = i_r * R + tl.arange(0, R)  # [R]
    c = ((i_x * (C * X)) >> LEVEL) + tl.arange(0, C)  # [C]
    # R, C and X are one axis: given all four, the compiler chooses their order, and in Triton 3.6 a thread then draws
    # once for each of its rows of pixels.
    i_l = tl.arange(0, R * C * X)
    r_l = i_r * R + i_l // (C * X)  # [R C X]
    x = i_x * (C * X) + i_l % (C * X)  # [R C X]
    y = (i_y * Y + tl.arange(0, Y))[:, None] + ((r_l % h) << LEVEL)[None, :]  # [Y, R C X]
    i_plane = i_r * R // h  # of the tile's first row; offsets from there fit 32 bits and half the registers
    o = ((r_l // h - i_plane)[None, :] * height + y) * width + x[None, :]  # [Y, R C X]
    o_plane = i_plane.to(tl.int64) * height * width
    m = ((r_l < rows) & (x < width))[None, :] & (y < height)
    d = r.to(tl.int64)[:, None] * w + c[None, :]  # [R, C]
    m_d = (r < rows)[:, None] & (c < w)[None, :]
    # A coefficient may spread over several tiles: the first of them writes it down.
    is_first = (i_y == 0) & ((i_x * (C * X)) & ((1 << LEVEL) - 1) == 0)

    b_residual = tl.load(residual + o_plane + o, m, other=0.0).to(tl.float32)  # [Y, R C X]
    if mean is not None:
        b_mean, b_std = tl.load(mean + d, m_d, other=0.0), tl.load(std + d, m_d, other=0.0)  # [R, C]
    if draws is None:
        seed = number(seed)
        generation = number(generation)
        first = number(first)

    start = tl.program_id(1).to(tl.int64) * share
    for p in range(start, tl.minimum(start + share, popsize)):
        if draws is None:
            b_low = normal(seed, generation, first + p, d)  # [R, C]
        else:
            b_low = tl.load(draws + p * low_size + d, m_d, other=0.0).to(tl.float32)
        if mean is not None:
            b_low = b_mean + b_std * b_low
        if low is not None:
            if is_first:  # branch rather than mask: Triton 3.6 would draw again in the store's layout
                tl.store(low + p * low_size + d, b_low, m_d)
        b_blocks = tl.broadcast_to((b_low * SCALE)[:, :, None], [R, C, X])
        b_candidate = b_residual + tl.reshape(b_blocks, [1, R * C * X])
        tl.store(candidates + p * size + o_plane + o, b_candidate.to(candidates.dtype.element_ty), m)


@operator("candidates", "low")
def fill_population(
    residual: Tensor,  # [planes, H, W]
    candidates: Tensor,  # [P, planes, H, W]
    level: int,
    mean: Tensor | None,  # [D]; None: `draws` are the low bands themselves
    std: Tensor | None,  # [D]
    draws: Tensor | None,  # [P, D]; None: drawn here
    low: Tensor | None,  # [P, D]; None: not written down
    seed: int,
    generation: int,
    seed_tensor: Tensor | None,  # 0-d, in place of the number; and so the next
    generation_tensor: Tensor | None,
    first: int,
) -> None:
    """Fills `candidates` and, where given, `low`. All tensors are contiguous."""
    planes, height, width = residual.shape
    popsize = candidates.shape[0]
    if level == 0:  # every pixel is a coefficient: one long row
        planes, height, width = 1, 1, residual.numel()
    shift = min(level, 30)  # no side is longer than 2^30
    block = 1 << shift
    h, w = -(-height // block), -(-width // block)

    # The tile's order makes a thread hold pixels of one coefficient only, and draw once: lanes and warps lie along X,
    # C and R, registers along Y. 64 pixels of a row waste little of a row of 166 and still move whole cache lines.
    unit = math.gcd(width, 8)
    X = min(block, triton.next_power_of_2(width), 256)
    C = min(triton.next_power_of_2(w), max(1, 64 // X)) if level else 1024
    wide = min(unit, X, 16 // candidates.element_size())  # pixels in one store of a thread
    R = min(triton.next_power_of_2(planes * h), max(1, 128 * wide // (C * X)))
    Y = min(block, triton.next_power_of_2(height), TILE // (R * C * X))
    tiles = triton.cdiv(planes * h, R) * triton.cdiv(min(height, block), Y) * triton.cdiv(width, C * X)
    share = max(1, min(8, popsize * tiles // PROGRAMS))  # the residual is read once for each
    population_kernel[(tiles, triton.cdiv(popsize, share))](
        residual,
        mean,
        std,
        draws,
        candidates,
        low,
        seed if seed_tensor is None else seed_tensor,
        generation if generation_tensor is None else generation_tensor,
        first,
        popsize,
        share,
        residual.numel(),
        planes * h * w,
        planes * h,
        h,
        w,
        height,
        width // unit,
        LEVEL=shift,
        SCALE=2.0**-level,
        UNIT=unit,
        Y=Y,
        R=R,
        C=C,
        X=X,
        num_warps=4,
    )


@documented
def sample_population(
    residual: Tensor,  # [1, ..., H, W] fp32 or fp64, from `split_low_band`
    mean: Tensor,  # [D] fp32, D = the number of coefficients in the lowest band
    std: Tensor,  # [D] fp32
    level: int,
    *,
    popsize: int,
    seed: Seed | None = None,
    generation: Seed = 0,
    first: int = 0,
    draws: Tensor | None = None,  # [popsize, D], in place of a seed
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    (seed, seed_tensor), (generation, generation_tensor) = _apart(seed), _apart(generation)
    candidates = residual.new_empty((popsize, *residual.shape[1:]), dtype=dtype or residual.dtype)
    low = mean.new_empty((popsize, mean.numel()), dtype=torch.float32)
    fill_population(
        residual.detach().contiguous().view(-1, *residual.shape[-2:]),
        candidates,
        level,
        mean.detach().contiguous(),
        std.detach().contiguous(),
        None if draws is None else draws.detach().contiguous(),
        low,
        seed,
        generation,
        seed_tensor,
        generation_tensor,
        first,
    )
    return candidates, low


def _apart(value: Seed | None) -> tuple[int, Tensor | None]:
    """An operator's argument is a number or a tensor, but not either."""
    return (0, value) if isinstance(value, Tensor) else (value or 0, None)
