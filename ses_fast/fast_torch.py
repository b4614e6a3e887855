"""The ops in torch, written for speed: what the backend "torch" is, on any device.

Each has the name, the signature and the docstring of its namesake in `reference.py`, which a test holds it against.
Where the formula is fast as it stands, it is the reference's own function.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .custom_op import operator
from .reference import (
    CLIP_MEAN,
    CLIP_STD,
    MASK32,
    PIL_BITS,
    Elites,
    Resize,
    Seed,
    band_size,
    crop_resizes,
    documented,
    haar_dwt2,
    haar_idwt2,
    pad_resizes,
    pil_weights,
    quads,
    quantised,
    select_elites,
    wide,
)
from .reference import update_elites as plain_update_elites

__all__ = [
    "haar_dwt2",
    "haar_idwt2",
    "merge_low_band",
    "philox4x32",
    "philox_normal",
    "resize_normalize",
    "sample_population",
    "split_low_band",
    "update_elites",
]

FEW, AHEAD = 4096, 5  # where a generation needs at most FEW numbers, AHEAD generations are drawn in one call


# ---------------------------------------------------------------- the lowest band alone


@documented
def split_low_band(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:
    x = wide(x)
    low = x if level else x.clone()
    for _ in range(level):
        p, q, r, s = quads(low)
        low = (p + q + r + s) / 2
    return low, _merged(x, -low, level, x.shape[:-2], x.dtype)


@documented
def merge_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    level: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    lead = torch.broadcast_shapes(residual.shape[:-2], low.shape[:-2])
    return _merged(residual, low, level, lead, dtype or residual.dtype)


def _merged(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]
    level: int,
    lead: Sequence[int],  # the leading dimensions, broadcast: a fifth of a small population's time to find out
    dtype: torch.dtype,
) -> Tensor:  # [*lead, H, W]
    """Never makes the blocks: each coefficient is added to its rows where they lie."""
    height, width = residual.shape[-2:]
    block = 1 << level
    out = residual.new_empty((*lead, height, width), dtype=dtype)

    residual, low = wide(residual), wide(low) * 2.0**-level
    # Widen the small tensor first: the large additions then run along whole rows, whatever the width.
    low = low[..., None].expand(*low.shape, min(block, width)).flatten(-2)[..., :width]  # [..., h, W]
    whole = height // block * block  # the last block of rows of an odd size is shorter
    if whole:
        _add_into(
            out[..., :whole, :].unflatten(-2, (-1, block)),
            residual[..., :whole, :].unflatten(-2, (-1, block)),  # [..., h, block, W]
            low[..., : whole // block, None, :],  # [..., h, 1, W]
        )
    if whole < height:
        _add_into(out[..., whole:, :], residual[..., whole:, :], low[..., -1:, :])
    return out


def _add_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a + b, rounded once. torch.compile takes no out= that is a view; it fuses the copy instead."""
    if torch.compiler.is_compiling():
        out.copy_(a + b)
    else:
        torch.add(a, b, out=out)


# ---------------------------------------------------------------- noise


@documented
def philox4x32(
    key: tuple[Seed, Seed],  # two 32-bit words
    counter: tuple[Seed, Seed, Seed, Seed],  # four 32-bit words, broadcast against each other
) -> tuple[Tensor, ...]:
    # The two products of a round are made at once, in two lanes.
    tensors = [word for word in (*key, *counter) if isinstance(word, Tensor)]
    dimensions = max([0, *[word.dim() for word in tensors]])
    device = tensors[0].device if tensors else "cpu"
    lane = torch.arange(2, device=device).view(2, *[1] * dimensions)

    def lanes(first: Seed, second: Seed) -> Tensor:
        return first + (second - first) * lane  # by arithmetic: a captured graph takes no copies from the host

    factors, steps, keys = lanes(0xD2511F53, 0xCD9E8D57), lanes(0x9E3779B9, 0xBB67AE85), lanes(*key)
    even, odd = torch.broadcast_tensors(lanes(counter[0], counter[2]), lanes(counter[1], counter[3]))
    rounds = torch.arange(10, device=device).view(10, *[1] * (dimensions + 1))
    for key_of_round in (keys + steps * rounds).unbind():
        products = (even * factors).flip(0)
        # High bits that do not belong to a word stay in `odd` and in the keys until the mask takes them off.
        even = (products >> 32).bitwise_xor_(odd).bitwise_xor_(key_of_round).bitwise_and_(MASK32)
        odd = products
    odd = odd & MASK32
    return even[0], odd[0], even[1], odd[1]


@documented
def philox_normal(
    seed: Seed,
    generation: Seed,  # or [G, 1, 1]: several at once
    candidates: Tensor | Sequence[int],  # [P] the candidates' numbers
    size: int,
) -> Tensor:
    device = candidates.device if isinstance(candidates, Tensor) else "cpu"
    rows = torch.as_tensor(candidates, dtype=torch.int64, device=device)[:, None]  # [P, 1]
    quads = torch.arange(-(-size // 4), device=device)  # [Q]
    w0, w1, w2, w3 = philox4x32((seed & MASK32, (seed >> 32) & MASK32), (quads, rows, generation, 0))
    u = (torch.stack([w0, w2, w1, w3]).double() + 0.5) * 2**-32  # [4, ..., P, Q]
    radius, angle = (u[:2].log() * -2).sqrt(), u[2:] * (2 * math.pi)  # [2, ..., P, Q]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)  # [2, ..., P, Q, 2]
    return normals.movedim(0, -2).flatten(-3)[..., :size].float()


@lru_cache(maxsize=16)
def _normals_ahead(seed: int, block: int, first: int, popsize: int, size: int) -> Tensor:
    """`philox_normal` of AHEAD generations on the CPU, [AHEAD, P, size]: where numbers are few, calls are the cost."""
    generations = torch.arange(block * AHEAD, (block + 1) * AHEAD, device="cpu")[:, None, None]
    return philox_normal(seed, generations, torch.arange(first, first + popsize, device="cpu"), size)


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
    size = mean.numel()
    few = popsize * size <= FEW and mean.device.type == "cpu" and not torch.compiler.is_compiling()
    if few and isinstance(seed, int) and isinstance(generation, int):
        block, row = divmod(generation, AHEAD)
        draws = _normals_ahead(seed, block, first, popsize, size)[row]
    elif seed is not None:
        draws = philox_normal(seed, generation, torch.arange(first, first + popsize, device=mean.device), size)
    assert draws is not None
    low = mean + std * draws
    bands = low.view(popsize, *residual.shape[1:-2], *band_size(residual.shape[-2:], level))
    return _merged(residual, bands, level, bands.shape[:-2], dtype or residual.dtype), low


# ---------------------------------------------------------------- elites


@documented
def update_elites(
    low: Tensor,  # [P, D] fp32
    scores: Tensor,  # [P], any real dtype
    elite_low: Tensor,  # [K, D] fp32, the best first, K <= k_elites
    elite_scores: Tensor,  # [K] fp64
    mean: Tensor,  # [D] fp32
    variance: Tensor,  # [D] fp32
    *,
    k_elites: int,
) -> Elites:
    if mean.device.type != "cpu":  # only the device knows how many scores are finite
        return plain_update_elites(low, scores, elite_low, elite_scores, mean, variance, k_elites=k_elites)
    best_low, best_scores, finite = select_elites(low, scores, elite_low, elite_scores, k_elites)
    if len(best_scores) == 1 or best_scores[-1] == -math.inf:
        return plain_update_elites(low, scores, elite_low, elite_scores, mean, variance, k_elites=k_elites)
    variance, mean = torch.var_mean(best_low, 0)  # every slot is used: the same in one call
    return Elites(best_low, best_scores, mean, variance + 1e-7, finite)


# ---------------------------------------------------------------- images for a reward


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
    out = images.new_empty((len(images), 3, size, size), dtype=dtype or images.dtype)
    plain_resize_normalize(images, out, rule, list(mean), list(std), centre, rounding)
    return out


# An operator because the filters are made from the pictures' size, by tensors that are read on the host.
@operator("out")
def plain_resize_normalize(
    images: Tensor,  # [n, 3, H, W]
    out: Tensor,  # [n, 3, size, size]
    rule: str,
    mean: list[float],
    std: list[float],
    centre: str,
    rounding: str,
) -> None:
    n, _, height, width = images.shape
    size = out.shape[-1]
    if rule == "crop":
        rows, columns = crop_resizes(height, width, size, centre)
        seen = images[..., slice(*rows.window()), slice(*columns.window())]  # what the crop can see
        x = quantised(seen, rounding)
        tall = x.shape[2]
        x = _pil_resize(x.flatten(0, 2), columns)  # [size, n * 3 * tall]: Pillow goes across first,
        x = _pil_resize(x.reshape(size * n * 3, tall), rows)  # [size, size * n * 3]: then down
        x = x.reshape(size, size, n, 3).permute(2, 3, 0, 1).contiguous() / 255
    else:
        rows, columns = pad_resizes(height, width, size)
        x = F.interpolate(
            quantised(images, rounding) / 255, (rows.target, columns.target), mode="bicubic", antialias=True
        )
        x = F.pad(x, (*columns.margins(), *rows.margins()))
    shift, spread = (_channels(tuple(values), x.device) for values in (mean, std))
    out.copy_((x - shift) / spread)


@lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:  # [3, 1, 1]
    """A number for each channel, copied to the device once: a copy waits for it, and no captured graph takes one."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@lru_cache(maxsize=64)
def _pil_blocks(resize: Resize, device: torch.device) -> list[tuple[int, Tensor]]:
    """The filter in blocks of a few neighbouring outputs: [(first sample, limbs [3 * outputs, samples]), ...].

    Dense over the whole row it would be nearly all zeros; neighbours share most of their samples. A weight is
    limbs of 8 bits, limb0 + 2^8 limb1 + 2^16 limb2, none above 128: they, the samples and the sums are whole
    numbers that fp32 holds exactly, and TF32 and bf16 the factors.
    """
    starts, weights = pil_weights(resize)
    dtype = torch.float32 if weights.shape[1] < 440 else torch.float64  # that many samples: a sum below 2^24
    blocks = []
    for i in range(0, resize.length, 8):
        base, span = starts[i], weights[i : i + 8]
        offsets = torch.tensor(starts[i : i + 8], device="cpu") - base
        block = torch.zeros(len(span), int(offsets[-1]) + span.shape[1], dtype=torch.int64, device="cpu")
        block.scatter_(1, offsets[:, None] + torch.arange(span.shape[1], device="cpu"), span)
        middle = (block + 2**7) >> 8
        upper = (middle + 2**7) >> 8
        limbs = torch.cat([block - middle * 2**8, middle - upper * 2**8, upper])
        blocks.append((base - resize.window()[0], limbs.to(device, dtype)))
    return blocks


def _pil_resize(
    rows: Tensor,  # [rows, samples of resize.window()], whole numbers 0 ... 255 in fp32
    resize: Resize,
) -> Tensor:
    """Resized, rounded and clipped as Pillow does after each pass, and turned: [length, rows] fp32."""
    if resize.source == resize.target:
        return rows.T
    blocks = _pil_blocks(resize, rows.device)
    samples = rows.to(blocks[0][1].dtype).T
    with torch.autocast(rows.device.type, enabled=False):
        products = [w @ samples[at : at + w.shape[1]] for at, w in blocks]
    sums = torch.cat([product.view(3, len(product) // 3, len(rows)) for product in products], 1)  # [3, length, rows]
    # (2^21 + sum0 + 2^8 sum1 + 2^16 sum2) >> 22, limb by limb: no number on the way is above 2^24.
    out = sums[0].add_(2 ** (PIL_BITS - 1)).mul_(2**-8).floor_()
    out = out.add_(sums[1]).mul_(2**-8).floor_()
    return out.add_(sums[2]).mul_(2 ** (16 - PIL_BITS)).floor_().clamp_(0, 255).float()
