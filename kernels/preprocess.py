"""A decoder's images to a reward's pixels in one launch: quantise -> across -> down -> normalise.

A program makes one tile of the output. The samples it needs, some 128 x 128 at 1024 pixels, are read once, and both
passes are matrix products in registers: nothing between them goes to memory. A weight is two fp16 limbs,
2^SHIFT high + low, and a grey level is exact in fp16. For "crop" every product and every sum is then a whole number
below 2^24, so fp32 accumulation is Pillow's integer arithmetic bit for bit; for "pad" it is as good as fp32 weights.
Bytes: the image once (2 or 4 a sample; tiles overlap by a fifth, which the L2 serves), the output once.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ses_fast.custom_op import operator
from ses_fast.reference import (
    CLIP_MEAN,
    CLIP_STD,
    PIL_BITS,
    Resize,
    crop_resizes,
    documented,
    pad_resizes,
    pil_weights,
)

SPAN = 128  # samples of a row (rows of a column) in one step: with 8 warps, 64 a thread
REDUCTION = 31  # at most: 125 taps, and 255 times as many low limbs, of at most 2^7 each, are below 2^22
ALIGN = 8  # tiles start at multiples of this, so that 16 bytes of bf16 are one load
BITS = tl.constexpr(PIL_BITS)
NAN = tl.constexpr(tl.PropagateNan.ALL)  # a broken picture must not pass for a black one


@triton.jit
def clipped(x):
    return tl.minimum(tl.maximum(x, 0.0, propagate_nan=NAN), 255.0, propagate_nan=NAN)


@triton.jit
def quantised(v, NEAREST: tl.constexpr):
    """The grey levels of v in fp16, see `resize_normalize`; rounded to v's dtype after each operation, as torch does.

    fp32 has more than twice the bits of fp16 and bf16, so that rounding twice is rounding once. The clip stands
    between product and sum: a fused multiply-add would round once where Python rounds twice.
    """
    if NEAREST:
        BIG: tl.constexpr = 1.5 * 2.0**23  # adding it rounds to whole numbers, half to even
        x = (v.to(tl.float32) * 0.5 + 0.5).to(v.dtype).to(tl.float32)
        return ((clipped(x * 255.0) + BIG) - BIG).to(tl.float16)
    x = (v.to(tl.float32) + 1.0).to(v.dtype).to(tl.float32)
    x = clipped((x * 127.5).to(v.dtype)).to(tl.float32)
    if v.dtype == tl.float32:
        return tl.floor(x).to(tl.float16)
    else:  # 1024 + x is exact in fp32, and fp16 has whole numbers there: one conversion, where floor is slow
        return (x + 1024.0).to(tl.float16, fp_downcast_rounding="rtz") - 1024.0


@triton.jit
def floored(x, N: tl.constexpr):
    """x - x mod 2^N of a whole |x| < 2^23, by additions, which are faster than floor and keep NaN.

    The first is exact and leaves no ties, the second rounds to a multiple of 2^N.
    """
    BIG: tl.constexpr = 1.5 * 2.0 ** (23 + N)
    return ((x - (2.0 ** (N - 1) - 0.5)) + BIG) - BIG


@triton.jit
def weighted(high, low, SHIFT: tl.constexpr, WHOLE: tl.constexpr):
    """(2^SHIFT high + low) / 2^22; WHOLE: rounded and clipped as Pillow does, (2^21 + ...) >> 22."""
    if WHOLE:
        low = floored(low + 2.0 ** (BITS - 1), SHIFT) * 2.0**-SHIFT
        return clipped(floored(high + low, BITS - SHIFT) * 2.0 ** (SHIFT - BITS))
    else:
        return (high + low * 2.0**-SHIFT) * 2.0 ** (SHIFT - BITS)


@triton.jit
def resize_normalize_kernel(
    images,  # [n, 3, H, W]
    out,  # [n, 3, size, size]
    across,  # the pass over columns: (starts, limbs, tiles, tile) of `Axis`
    down,  # the pass over rows
    scale,  # 1 / (255 std), three numbers
    offset,  # -mean / std
    strides,  # of the images, four
    sees,  # (width, left, right, bottom): the crop sees columns left ... right - 1, rows up to bottom - 1
    size,
    WHOLE: tl.constexpr,  # Pillow's whole numbers ("crop"), or fractions ("pad")
    NEAREST: tl.constexpr,  # how a grey level is rounded
    CUT: tl.constexpr,  # it does not see all columns
    ALIGN: tl.constexpr,  # so that the compiler knows what a tile's first column is a multiple of
    SHIFT_X: tl.constexpr,  # the bits of a low limb: scaling by 2^SHIFT is then a constant; and so the next
    SHIFT_Y: tl.constexpr,
    X: tl.constexpr,  # 16 or 32: sides of matrices, and so the next
    Y: tl.constexpr,
    SPAN_X: tl.constexpr,
    SPAN_Y: tl.constexpr,
    STEPS_X: tl.constexpr,  # 1 unless the image is large: a loop of one step is none
    STEPS_Y: tl.constexpr,
):
    columns, w_across, tiles_x, tile_x = across
    rows, w_down, tiles_y, tile_y = down
    stride_n, stride_c, stride_y, stride_x = strides
    width, left, right, bottom = sees

    i = tl.program_id(0)
    i_x, i_y, i_plane = i % tiles_x, i // tiles_x % tiles_y, (i // (tiles_x * tiles_y)).to(tl.int64)
    i_n, i_c = i_plane // 3, i_plane % 3
    p_plane = images + i_n * stride_n + i_c * stride_c
    start_x, start_y = tl.load(columns + i_x) * ALIGN, tl.load(rows + i_y)
    r_x, r_y = tl.arange(0, X), tl.arange(0, Y)
    r_span_x, r_span_y = tl.arange(0, SPAN_X), tl.arange(0, SPAN_Y)
    o_across = i_x * (2 * STEPS_X * SPAN_X * X)
    o_down = i_y * (2 * STEPS_Y * SPAN_Y * Y)

    high = tl.zeros([Y, X], tl.float32)
    low = tl.zeros([Y, X], tl.float32)
    for j in range(STEPS_Y):
        y = start_y + j * SPAN_Y + r_span_y  # [SPAN_Y]
        p_y = p_plane + (y.to(tl.int64) * stride_y)[:, None]
        row_high = tl.zeros([SPAN_Y, X], tl.float32)
        row_low = tl.zeros([SPAN_Y, X], tl.float32)
        for k in range(STEPS_X):
            x = start_x + k * SPAN_X + r_span_x  # [SPAN_X]
            m = (y < bottom)[:, None] & (x < width)[None, :]
            b_image = tl.load(p_y + (x.to(tl.int64) * stride_x)[None, :], m, other=0.0)  # [SPAN_Y, SPAN_X]
            if CUT:  # a NaN outside would pass a weight of 0; in the mask of the load it would make that narrow
                b_image = tl.where(((x >= left) & (x < right))[None, :], b_image, 0.0)
            p_across = w_across + o_across + (k * SPAN_X + r_span_x)[:, None] * X + r_x[None, :]
            w_high, w_low = tl.load(p_across), tl.load(p_across + STEPS_X * SPAN_X * X)  # [SPAN_X, X]
            b_grey = quantised(b_image, NEAREST)
            row_high = tl.dot(b_grey, w_high, row_high)
            row_low = tl.dot(b_grey, w_low, row_low)
        b_row = weighted(row_high, row_low, SHIFT_X, WHOLE)  # [SPAN_Y, X]

        p_down = w_down + o_down + r_y[:, None] * (STEPS_Y * SPAN_Y) + (j * SPAN_Y + r_span_y)[None, :]
        w_high, w_low = tl.load(p_down), tl.load(p_down + Y * (STEPS_Y * SPAN_Y))  # [Y, SPAN_Y]
        if WHOLE:
            b_row = b_row.to(tl.float16)
            high = tl.dot(w_high, b_row, high)
            low = tl.dot(w_low, b_row, low)
        else:
            BIG: tl.constexpr = 1.5 * 2.0**21
            b_quarters = (b_row + BIG) - BIG  # multiples of 1/4, 11 bits: the sums with w_high are exact
            b_rest = ((b_row - b_quarters) * 1024.0).to(tl.float16)
            b_quarters = b_quarters.to(tl.float16)
            high += tl.dot(w_high, b_rest) * (1 / 1024)
            low += tl.dot(w_low, b_rest) * (1 / 1024)
            high += tl.dot(w_high, b_quarters)
            low += tl.dot(w_low, b_quarters)

    b_scale = tl.where(i_c == 0, scale[0], tl.where(i_c == 1, scale[1], scale[2]))
    b_offset = tl.where(i_c == 0, offset[0], tl.where(i_c == 1, offset[1], offset[2]))
    b_out = weighted(high, low, SHIFT_Y, WHOLE) * b_scale + b_offset
    y, x = i_y * tile_y + r_y, i_x * tile_x + r_x
    m_y, m_x = (r_y < tile_y) & (y < size), (r_x < tile_x) & (x < size)
    p_out = out + (i_plane * size + y[:, None]) * size + x[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), m_y[:, None] & m_x[None, :])


class Axis(NamedTuple):
    """One pass, cut into tiles of `tile` outputs, padded with zero weights to `side` (16 or 32)."""

    starts: Tensor  # [tiles] int32, the first sample each tile reads, / align
    limbs: Tensor  # [tiles, 2, steps * span, side] fp16, high and low; of the rows [tiles, 2, side, steps * span]
    tile: int
    side: int
    span: int
    steps: int
    shift: int

    def data(self) -> tuple[Tensor, Tensor, int, int]:
        """What the kernel takes as one argument: (starts, limbs, tiles, tile)."""
        return self.starts, self.limbs, len(self.starts), self.tile


@lru_cache(maxsize=64)
def _axis(
    resize: Resize,
    rule: str,
    align: int,
    transposed: bool,
    device: torch.device,
    several: int = SPAN,  # the span where one step is not enough
) -> Axis:
    """The weights of a pass, made on the host the first time a size is seen (a captured graph needs that before)."""
    first_samples, weights = _filter(resize, rule)  # [length], [length, taps]
    samples = first_samples[:, None] + torch.arange(weights.shape[1], device="cpu")  # [length, taps]
    used = weights != 0  # an output that is padding uses none
    tile, base, reach = _tiles(samples, used, resize.source, align)
    side = 16 if tile <= 16 else 32
    span = min(SPAN, max(16, triton.next_power_of_2(reach)))
    span = span if reach <= span else several
    steps = max(1, math.ceil(reach / span))

    shift, *halves = _limbs(weights, rule)
    output = torch.arange(len(weights), device="cpu")[:, None].expand_as(samples)
    at = samples - base[output // tile]  # within the tile's own samples
    limbs = torch.zeros(len(base), 2, steps * span, side, dtype=torch.float16, device="cpu")
    for limb, values in enumerate(halves):
        limbs[(output // tile)[used], limb, at[used], (output % tile)[used]] = values[used].half()
    if transposed:
        limbs = limbs.mT.contiguous()
    return Axis((base // align).int().to(device), limbs.to(device), tile, side, span, steps, shift)


def _tiles(
    samples: Tensor,  # [length, taps] that each output reads
    used: Tensor,  # [length, taps] bool
    source: int,
    align: int,
) -> tuple[int, Tensor, int]:
    """(outputs of a tile, the tiles' first samples [tiles], how many samples the longest needs).

    The largest tile of at most 32 outputs whose samples fit one step; where more than 16 do not, 16.
    """
    first = samples.where(used, source).amin(1)
    stop = (samples + 1).where(used, 0).amax(1)

    def cut(tile: int) -> tuple[Tensor, int]:
        base = torch.stack([part.amin() for part in first.split(tile)]).clamp_max(source - 1) // align * align
        return base, int((torch.stack([part.amax() for part in stop.split(tile)]) - base).amax())

    length = len(samples)
    tile = next((tile for tile in range(min(32, length), 16, -1) if cut(tile)[1] <= SPAN), min(16, length))
    tile = math.ceil(length / math.ceil(length / tile))  # no short last tile
    return tile, *cut(tile)


def _limbs(
    weights: Tensor,  # [length, taps] fp64, in units of 2^-22
    rule: str,
) -> tuple[int, Tensor, Tensor]:
    """(SHIFT, high, low): weights = 2^SHIFT high + low, each exact in fp16.

    The high limb has 11 bits, and its sums must stay below 2^24: with 8-bit greys, or with the 11 bits of "pad".
    """
    shift = max(9 if rule == "pad" else 8, math.ceil(math.log2(float(weights.abs().max()))) - 11)
    high = (weights / 2**shift).round()
    low = weights - high * 2**shift
    # `unfit` saw to it.
    assert rule == "pad" or 255 * max(high.abs().sum(1).max(), 2 * low.abs().sum(1).max()) < 2**23 - 2**17
    return shift, high, low


def _filter(resize: Resize, rule: str) -> tuple[Tensor, Tensor]:
    """(the first sample of each output [length], weights [length, taps] fp64 in units of 2^-22)."""
    if rule == "crop":
        first_samples, integers = pil_weights(resize)
        return torch.tensor(first_samples, device="cpu"), integers.cpu().double()
    source, target, first, length = resize
    first_samples, integers = pil_weights(Resize(source, target, 0, target))  # torch's bicubic has the same windows
    taps = integers.shape[1]
    starts = torch.tensor(first_samples, device="cpu")
    # torch is asked for its weights, by unit impulses a window apart, because it rounds the windows' centres to fp32:
    # the exact weights are off by up to 1e-5, and its steps done again in fp32 are not equal to the bit either.
    impulses = torch.eye(taps, dtype=torch.float32, device="cpu").repeat(1, -(-source // taps))[:, None, None, :source]
    answers = F.interpolate(impulses, (1, target), mode="bicubic", antialias=True)[:, 0, 0]  # [taps, target]
    weights = answers.double().T.gather(1, (starts[:, None] + torch.arange(taps, device="cpu")) % taps) * 2**PIL_BITS
    # The outputs before 0 and from `target` on are padding.
    inside = slice(-first, -first + target)
    padded_starts = torch.zeros(length, dtype=torch.int64, device="cpu")
    padded_weights = torch.zeros(length, taps, dtype=torch.float64, device="cpu")
    padded_starts[inside], padded_weights[inside] = starts, weights
    return padded_starts, padded_weights


def unfit(height: int, width: int, rule: str, size: int) -> str | None:
    """Why the kernel cannot make this size of this picture, or None where it can."""
    short, long = min(height, width), max(height, width)
    if rule == "crop" and (short > REDUCTION * size or long > REDUCTION * (size * long // short)):
        return f"the kernel reduces at most {REDUCTION} times, and this is {height}x{width} to {size} pixels"
    return None


@documented
def resize_normalize(
    images: Tensor,  # [n, 3, H, W] in [-1, 1], any floating dtype
    rule: str = "crop",
    *,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype | None = None,
    centre: str = "floor",
    rounding: str = "down",
) -> Tensor:
    height, width = images.shape[-2:]
    if reason := unfit(height, width, rule, size):
        raise ValueError(reason)
    out = images.new_empty((len(images), 3, size, size), dtype=dtype or images.dtype)
    fill_resize_normalize(images, out, rule, list(mean), list(std), centre, rounding)
    return out


@operator("out")
def fill_resize_normalize(
    images: Tensor,  # [n, 3, H, W]
    out: Tensor,  # [n, 3, size, size]
    rule: str,
    mean: list[float],
    std: list[float],
    centre: str,
    rounding: str,
) -> None:
    if not len(images):
        return
    size = out.shape[-1]
    height, width = images.shape[-2:]
    resizes = crop_resizes(height, width, size, centre) if rule == "crop" else pad_resizes(height, width, size)
    down = _axis(resizes[0], rule, 1, True, images.device)
    # The steps are pipelined, and in fp32 the buffers of whole spans would not fit GPUs of 99 KB of shared memory.
    full = images.element_size() == 4
    across = _axis(resizes[1], rule, ALIGN, False, images.device, SPAN // 2 if full else SPAN)
    # No tile reads a row before the first that the crop sees.
    (_, bottom), (left, right) = (each.window() for each in resizes) if rule == "crop" else ((0, height), (0, width))
    grid = (len(images) * 3 * len(down.starts) * len(across.starts),)
    resize_normalize_kernel[grid](
        images.detach(),
        out,
        across.data(),
        down.data(),
        tuple(1 / (255 * s) for s in std),
        tuple(-m / s for m, s in zip(mean, std, strict=True)),
        images.stride(),
        (width, left, right, bottom),
        size,
        WHOLE=rule == "crop",
        NEAREST=rounding == "nearest",
        CUT=right - left < width,
        ALIGN=ALIGN,
        SHIFT_X=across.shift,
        SHIFT_Y=down.shift,
        X=across.side,
        Y=down.side,
        SPAN_X=across.span,
        SPAN_Y=down.span,
        STEPS_X=across.steps,
        STEPS_Y=down.steps,
        num_warps=8 if across.span * down.span > 64 * SPAN else 4,
        num_stages=2 if full else 3,
    )
