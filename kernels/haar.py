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
from ses_fast.reference import band_size, check_bands, check_latents, check_level, check_low_band

from . import population

LEVELS = 6  # in one launch: a block of 64 x 64 is as much as a program can hold; more levels take more launches


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
    tiles_x, tiles_y = tl.cdiv(width, X), tl.cdiv(height, Y)
    i = tl.program_id(0)
    i_x, i_y, i_n = i % tiles_x, i // tiles_x % tiles_y, (i // (tiles_x * tiles_y)).to(tl.int64)

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
    tiles_x, tiles_y = tl.cdiv(width, X), tl.cdiv(height, Y)
    i = tl.program_id(0)
    i_x, i_y, i_n = i % tiles_x, i // tiles_x % tiles_y, (i // (tiles_x * tiles_y)).to(tl.int64)

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
    tiles_x, tiles_y = tl.cdiv(width, X), tl.cdiv(height, Y)
    i = tl.program_id(0)
    i_x, i_y, i_n = i % tiles_x, i // tiles_x % tiles_y, (i // (tiles_x * tiles_y)).to(tl.int64)

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


# ---------------------------------------------------------------- haar_dwt2


def haar_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list:
    check_latents(x, level)
    if level == 0:
        return reference.haar_dwt2(x, 0)
    return _chained_dwt2(x, level)


def _chained_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list:
    """haar_dwt2 after its checks and its warning."""
    if level > LEVELS:
        fine = _chained_dwt2(x, LEVELS)
        return [*_chained_dwt2(fine[0], level - LEVELS), *fine[1:]]
    low, *details = (_dwt2_op if torch.compiler.is_compiling() else _dwt2)(x, level)
    triples = [tuple(details[j : j + 3]) for j in range(0, 3 * level, 3)]  # finest first
    return [low, *reversed(triples)]


def _bands(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list[Tensor]:
    """Empty bands: cA, and cH, cV, cD of level 1, of level 2, ..."""
    levels = [level, *(j for j in range(1, level + 1) for _ in range(3))]
    return [x.new_empty((*x.shape[:-2], *band_size(x.shape[-2:], j)), dtype=torch.float32) for j in levels]


def _dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list[Tensor]:
    bands = _bands(x, level)
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
    return bands


# Operators to torch.compile, so that it neither breaks the graph nor looks inside.
_dwt2_op = torch.library.custom_op("ses_fast::haar_dwt2", _dwt2, mutates_args=())
_dwt2_op.register_fake(_bands)


# ---------------------------------------------------------------- haar_idwt2


def haar_idwt2(
    coeffs: Sequence,  # [cA, (cH, cV, cD), ...] as of `haar_dwt2`
    size: Sequence[int],  # (H, W)
) -> Tensor:
    check_bands(coeffs, size)
    low, *details = coeffs
    if not details:
        return reference.haar_idwt2(coeffs, size)
    if len(details) > LEVELS:
        low, details = haar_idwt2(coeffs[:-LEVELS], details[-LEVELS][0].shape[-2:]), details[-LEVELS:]
    bands = [low, *itertools.chain.from_iterable(reversed(details))]
    return (_idwt2_op if torch.compiler.is_compiling() else _idwt2)(bands, *size)


def _image(bands: list[Tensor], height: int, width: int) -> Tensor:
    return bands[0].new_empty((*bands[0].shape[:-2], height, width), dtype=torch.float32)


def _idwt2(bands: list[Tensor], height: int, width: int) -> Tensor:
    out = _image(bands, height, width)
    low, *details = (band.detach().contiguous() for band in bands)
    grid, tile = _tile(math.prod(out.shape[:-2]), height, width, len(details) // 3)
    haar_idwt2_kernel[grid](low, tuple(details), out, height, width, **tile)
    return out


_idwt2_op = torch.library.custom_op("ses_fast::haar_idwt2", _idwt2, mutates_args=())
_idwt2_op.register_fake(_image)


# ---------------------------------------------------------------- the lowest band alone


def split_low_band(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:
    check_latents(x, level)
    if level == 0:
        return reference.split_low_band(x, 0)
    if level <= LEVELS:
        return (_split_op if torch.compiler.is_compiling() else _split)(x, level)
    low = _chained_dwt2(x, level)[0]
    return low, merge_low_band(x, -low, level, dtype=torch.float32)


def _parts(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:  # low [..., h, w], residual [..., H, W]
    low = x.new_empty((*x.shape[:-2], *band_size(x.shape[-2:], level)), dtype=torch.float32)
    return low, x.new_empty(x.shape, dtype=torch.float32)


def _split(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:
    low, residual = _parts(x, level)
    height, width = x.shape[-2:]
    planes = x.detach().reshape(-1, height, width)
    grid, tile = _tile(len(planes), height, width, level)
    split_low_band_kernel[grid](planes, low, residual, *planes.stride(), height, width, **tile)
    return low, residual


_split_op = torch.library.custom_op("ses_fast::split_low_band", _split, mutates_args=())
_split_op.register_fake(_parts)


def merge_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    level: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_level(level)
    check_low_band(residual, low, band_size(residual.shape[-2:], level))
    return (_merge_op if torch.compiler.is_compiling() else _merge)(residual, low, level, dtype or residual.dtype)


def _merged(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]
    level: int,
    dtype: torch.dtype,
) -> Tensor:  # [..., H, W]
    lead = torch.broadcast_shapes(residual.shape[:-2], low.shape[:-2])
    return residual.new_empty((*lead, *residual.shape[-2:]), dtype=dtype)


def _merge(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]
    level: int,
    dtype: torch.dtype,
) -> Tensor:
    """A population whose low bands are given: the dimensions that the residual lacks number the candidates."""
    out = _merged(residual, low, level, dtype)
    own = tuple(itertools.dropwhile(lambda n: n == 1, residual.shape[:-2]))
    if own != out.shape[out.dim() - 2 - len(own) : -2]:
        residual, own = residual.expand(out.shape), out.shape[:-2]
    popsize = math.prod(out.shape[:-2]) // math.prod(own)
    low = low.detach().expand(*out.shape[:-2], *low.shape[-2:]).reshape(popsize, -1)
    planes = residual.detach().contiguous().view(-1, *residual.shape[-2:])
    population.launch(planes, out.view(popsize, *planes.shape), level, draws=low)
    return out


_merge_op = torch.library.custom_op("ses_fast::merge_low_band", _merge, mutates_args=())
_merge_op.register_fake(_merged)

for _op in (haar_dwt2, haar_idwt2, split_low_band, merge_low_band):
    _op.__doc__ = getattr(reference, _op.__name__).__doc__
