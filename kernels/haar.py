"""The Haar transform, all levels in one launch.

A program takes a tile of whole 2^level x 2^level blocks through all levels in registers. PyWavelets' rule for odd
sizes, at each level the last row or column once more, is a rule about where a sample is read (`edge`), so that inside
a tile there is nothing but pairs. Bytes: the image once and the bands once, each way.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ses_fast import reference
from ses_fast.custom_op import operator
from ses_fast.reference import band_size, documented

from .population import fill_population

LEVELS = 6  # in one launch: a block of 64 x 64 is as much as a program can hold; more levels take more launches


@triton.jit
def tile_of_program(height, width, Y: tl.constexpr, X: tl.constexpr):
    """Which image, and which of its tiles of Y x X pixels, this program has: (i_n int64, i_y, i_x)."""
    tiles_x, tiles_y = tl.cdiv(width, X), tl.cdiv(height, Y)
    i = tl.program_id(0)
    i_x, i_y, i_n = i % tiles_x, i // tiles_x % tiles_y, (i // (tiles_x * tiles_y)).to(tl.int64)
    return i_n, i_y, i_x


@triton.jit
def edge(i, n, LEVEL: tl.constexpr):
    """The sample of a row of n that stands at i when the row is lengthened to whole blocks of 2^LEVEL.

    A band of odd length repeats its last coefficient, that is, the 2^k samples which that one is made of.
    """
    for k in tl.static_range(LEVEL - 1, -1, -1):
        i = tl.where((i >> k) > ((n - 1) >> k), i - (1 << k), i)
    return i


@triton.jit
def split_columns(x, Y: tl.constexpr, X: tl.constexpr):
    """[Y, 2 X] -> the even and the odd columns, [Y, X] each."""
    return tl.split(tl.reshape(x, [Y, X, 2]))


@triton.jit
def store_band(band, b_band, i_n, y, x, height, width):
    o = (i_n * height + y[:, None]) * width + x[None, :]
    tl.store(band + o, b_band, (y < height)[:, None] & (x < width)[None, :])


@triton.jit
def load_band(band, i_n, y, x, height, width):
    o = (i_n * height + y[:, None]) * width + x[None, :]
    return tl.load(band + o, (y < height)[:, None] & (x < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def haar_dwt2_kernel(
    x,  # [N, H, W], any strides
    low,  # [N, h, w]
    details,  # cH, cV, cD of level 1, of level 2, ...: 3 LEVEL of them, [N, ceil(H / 2^j), ceil(W / 2^j)]
    stride_n,
    stride_y,
    stride_x,
    height,
    width,
    LEVEL: tl.constexpr,  # shapes inside halve with it
    EDGE_Y: tl.constexpr,  # H is not whole blocks; where it is, addresses stay plain and loads wide
    EDGE_X: tl.constexpr,
    Y: tl.constexpr,  # a tile: Y x X pixels
    X: tl.constexpr,
):
    i_n, i_y, i_x = tile_of_program(height, width, Y, X)
    h, w = ((height - 1) >> LEVEL) + 1, ((width - 1) >> LEVEL) + 1
    r_top = i_y * Y + 2 * tl.arange(0, Y // 2)  # [Y / 2]
    r_bottom = r_top + 1
    r_x = i_x * X + tl.arange(0, X)  # [X]
    if EDGE_Y:
        m_y = (r_top >> LEVEL) < h
        r_top, r_bottom = edge(r_top, height, LEVEL), edge(r_bottom, height, LEVEL)
    else:
        m_y = r_top < height
    if EDGE_X:
        m_x = (r_x >> LEVEL) < w
        r_x = edge(r_x, width, LEVEL)
    else:
        m_x = r_x < width
    m = m_y[:, None] & m_x[None, :]
    p_x = x + i_n * stride_n + (r_x.to(tl.int64) * stride_x)[None, :]
    top = tl.load(p_x + (r_top.to(tl.int64) * stride_y)[:, None], m, other=0.0).to(tl.float32)  # [Y / 2, X]
    bottom = tl.load(p_x + (r_bottom.to(tl.int64) * stride_y)[:, None], m, other=0.0).to(tl.float32)

    for j in tl.static_range(1, LEVEL + 1):
        p, q = split_columns(top, Y >> j, X >> j)  # [Y / 2^j, X / 2^j]
        r, s = split_columns(bottom, Y >> j, X >> j)
        up, down, up_diff, down_diff = p + q, r + s, p - q, r - s
        y_j = i_y * (Y >> j) + tl.arange(0, Y >> j)
        x_j = i_x * (X >> j) + tl.arange(0, X >> j)
        h_j, w_j = ((height - 1) >> j) + 1, ((width - 1) >> j) + 1
        store_band(details[3 * j - 3], (up - down) * 0.5, i_n, y_j, x_j, h_j, w_j)
        store_band(details[3 * j - 2], (up_diff + down_diff) * 0.5, i_n, y_j, x_j, h_j, w_j)
        store_band(details[3 * j - 1], (up_diff - down_diff) * 0.5, i_n, y_j, x_j, h_j, w_j)
        b_low = (up + down) * 0.5
        if j < LEVEL:
            rows = tl.reshape(b_low, [Y >> (j + 1), 2, X >> j])
            top, bottom = tl.split(tl.permute(rows, [0, 2, 1]))  # [Y / 2^(j + 1), X / 2^j]
        else:
            store_band(low, b_low, i_n, y_j, x_j, h_j, w_j)


@triton.jit
def haar_idwt2_kernel(
    low,  # [N, h, w]
    details,  # as of haar_dwt2_kernel
    out,  # [N, H, W]
    height,
    width,
    LEVEL: tl.constexpr,  # shapes inside double with it
    Y: tl.constexpr,  # a tile: Y x X pixels
    X: tl.constexpr,
):
    i_n, i_y, i_x = tile_of_program(height, width, Y, X)
    r_h = i_y * (Y >> LEVEL) + tl.arange(0, Y >> LEVEL)
    r_w = i_x * (X >> LEVEL) + tl.arange(0, X >> LEVEL)
    b_low = load_band(low, i_n, r_h, r_w, ((height - 1) >> LEVEL) + 1, ((width - 1) >> LEVEL) + 1)
    for j in tl.static_range(LEVEL, 0, -1):
        y_j = i_y * (Y >> j) + tl.arange(0, Y >> j)
        x_j = i_x * (X >> j) + tl.arange(0, X >> j)
        h_j, w_j = ((height - 1) >> j) + 1, ((width - 1) >> j) + 1
        cH = load_band(details[3 * j - 3], i_n, y_j, x_j, h_j, w_j)
        cV = load_band(details[3 * j - 2], i_n, y_j, x_j, h_j, w_j)
        cD = load_band(details[3 * j - 1], i_n, y_j, x_j, h_j, w_j)
        plus, minus, plus_diff, minus_diff = b_low + cH, b_low - cH, cV + cD, cV - cD
        top = tl.join((plus + plus_diff) * 0.5, (plus - plus_diff) * 0.5)
        top = tl.reshape(top, [Y >> j, 2 * (X >> j)])
        bottom = tl.join((minus + minus_diff) * 0.5, (minus - minus_diff) * 0.5)
        bottom = tl.reshape(bottom, [Y >> j, 2 * (X >> j)])
        if j > 1:
            rows = tl.permute(tl.join(top, bottom), [0, 2, 1])
            b_low = tl.reshape(rows, [2 * (Y >> j), 2 * (X >> j)])

    r_y = i_y * Y + 2 * tl.arange(0, Y // 2)
    r_x = i_x * X + tl.arange(0, X)
    store_band(out, top, i_n, r_y, r_x, height, width)
    store_band(out, bottom, i_n, r_y + 1, r_x, height, width)


@triton.jit
def split_low_band_kernel(
    x,  # [N, H, W], any strides
    low,  # [N, h, w]
    residual,  # [N, H, W]
    stride_n,
    stride_y,
    stride_x,
    height,
    width,
    LEVEL: tl.constexpr,  # a block of 2^LEVEL x 2^LEVEL pixels is summed within registers
    Y: tl.constexpr,  # a tile: Y x X pixels
    X: tl.constexpr,
):
    BLOCK: tl.constexpr = 1 << LEVEL
    i_n, i_y, i_x = tile_of_program(height, width, Y, X)
    h, w = ((height - 1) >> LEVEL) + 1, ((width - 1) >> LEVEL) + 1
    i_h = i_y * (Y >> LEVEL) + tl.arange(0, Y >> LEVEL)
    i_w = i_x * (X >> LEVEL) + tl.arange(0, X >> LEVEL)
    r_y = (i_h * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]  # [Y / B, B]
    r_x = (i_w * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]  # [X / B, B]
    o_y = (edge(r_y, height, LEVEL).to(tl.int64) * stride_y)[:, :, None, None]
    o_x = (edge(r_x, width, LEVEL).to(tl.int64) * stride_x)[None, None, :, :]
    m = (i_h < h)[:, None, None, None] & (i_w < w)[None, None, :, None]
    b_x = tl.load(x + i_n * stride_n + o_y + o_x, m, other=0.0).to(tl.float32)  # [Y / B, B, X / B, B]
    b_low = tl.sum(tl.sum(b_x, 3), 1) * (1.0 / BLOCK)  # [Y / B, X / B]
    store_band(low, b_low, i_n, i_h, i_w, h, w)
    b_residual = b_x - (b_low * (1.0 / BLOCK))[:, None, :, None]
    o = ((i_n * height + r_y) * width)[:, :, None, None] + r_x[None, None, :, :]
    tl.store(residual + o, b_residual, (r_y < height)[:, :, None, None] & (r_x < width)[None, None, :, :])


def _tile(count: int, height: int, width: int, level: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the tile: whole blocks, some 2048 pixels of them at 16 a thread."""
    X = max(1 << level, min(64, triton.next_power_of_2(width)))
    Y = max(1 << level, min(2048 // X, triton.next_power_of_2(height)))
    warps = max(1, min(8, X * Y // 512))
    grid = (count * triton.cdiv(height, Y) * triton.cdiv(width, X),)
    return grid, {"LEVEL": level, "Y": Y, "X": X, "num_warps": warps}


# ---------------------------------------------------------------- all bands


@documented
def haar_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list:
    if level == 0:
        return reference.haar_dwt2(x, 0)
    if level > LEVELS:
        fine = haar_dwt2(x, LEVELS)
        return [*haar_dwt2(fine[0], level - LEVELS), *fine[1:]]
    low, *details = bands = _empty_bands(x, level)
    fill_haar_dwt2(x, bands, level)
    triples = [tuple(details[j : j + 3]) for j in range(0, 3 * level, 3)]  # finest first
    return [low, *reversed(triples)]


def _empty_bands(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list[Tensor]:
    """cA, and cH, cV, cD of level 1, of level 2, ..."""
    levels = [level, *(j for j in range(1, level + 1) for _ in range(3))]
    return [x.new_empty((*x.shape[:-2], *band_size(x.shape[-2:], j)), dtype=torch.float32) for j in levels]


@operator("bands")
def fill_haar_dwt2(
    x: Tensor,  # [..., H, W]
    bands: list[Tensor],  # as of `_empty_bands`
    level: int,
) -> None:
    height, width = x.shape[-2:]
    planes = x.detach().reshape(-1, height, width)
    grid, tile = _tile(len(planes), height, width, level)
    haar_dwt2_kernel[grid](
        planes,
        bands[0],
        tuple(bands[1:]),
        *planes.stride(),
        height,
        width,
        EDGE_Y=height % (1 << level) != 0,
        EDGE_X=width % (1 << level) != 0,
        **tile,
    )


@documented
def haar_idwt2(
    coeffs: Sequence,  # [cA, (cH, cV, cD), ...] as of `haar_dwt2`
    size: Sequence[int],  # (H, W)
) -> Tensor:
    low, *details = coeffs
    if not details:
        return reference.haar_idwt2(coeffs, size)
    if len(details) > LEVELS:
        low, details = haar_idwt2(coeffs[:-LEVELS], details[-LEVELS][0].shape[-2:]), details[-LEVELS:]
    out = low.new_empty((*low.shape[:-2], *size), dtype=torch.float32)
    fill_haar_idwt2([low, *itertools.chain.from_iterable(reversed(details))], out)
    return out


@operator("out")
def fill_haar_idwt2(
    bands: list[Tensor],  # as of `_empty_bands`
    out: Tensor,  # [..., H, W]
) -> None:
    height, width = out.shape[-2:]
    low, *details = (band.detach().contiguous() for band in bands)
    grid, tile = _tile(math.prod(out.shape[:-2]), height, width, len(details) // 3)
    haar_idwt2_kernel[grid](low, tuple(details), out, height, width, **tile)


# ---------------------------------------------------------------- the lowest band alone


@documented
def split_low_band(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:
    if level == 0:
        return reference.split_low_band(x, 0)
    if level > LEVELS:
        low = haar_dwt2(x, level)[0]
        return low, merge_low_band(x, -low, level, dtype=torch.float32)
    low = x.new_empty((*x.shape[:-2], *band_size(x.shape[-2:], level)), dtype=torch.float32)
    residual = x.new_empty(x.shape, dtype=torch.float32)
    fill_split_low_band(x, low, residual, level)
    return low, residual


@operator("low", "residual")
def fill_split_low_band(
    x: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]
    residual: Tensor,  # [..., H, W]
    level: int,
) -> None:
    height, width = x.shape[-2:]
    planes = x.detach().reshape(-1, height, width)
    grid, tile = _tile(len(planes), height, width, level)
    split_low_band_kernel[grid](planes, low, residual, *planes.stride(), height, width, **tile)


@documented
def merge_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    level: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    lead = torch.broadcast_shapes(residual.shape[:-2], low.shape[:-2])
    out = residual.new_empty((*lead, *residual.shape[-2:]), dtype=dtype or residual.dtype)
    # A population whose low bands are given. Where the residual lacks the first dimensions, or has one of each, they
    # number the candidates, and the rest are a candidate's planes. A residual that repeats elsewhere is written out.
    own = (1,) * (len(lead) - residual.dim() + 2) + tuple(residual.shape[:-2])
    split = 0
    while split < len(own) and own[split] == 1:
        split += 1
    if own[split:] != tuple(lead[split:]):
        residual, split = residual.expand(out.shape), 0
    popsize, planes = math.prod(lead[:split]), math.prod(lead[split:])
    fill_population(
        residual.detach().contiguous().view(planes, *residual.shape[-2:]),
        out.view(popsize, planes, *residual.shape[-2:]),
        level,
        None,
        None,
        low.detach().expand(*lead, *low.shape[-2:]).reshape(popsize, -1),
        None,
        0,
        0,
        None,
        None,
        0,
    )
    return out
