"""Plain torch of every op: the formula, the manual, and the oracle of the fast ones. Imports torch only.

Start at `split_low_band` and `sample_population`: for Haar with PyWavelets' symmetric extension and any size,

    candidate[y, x] = residual[y, x] + low[y >> level, x >> level] / 2^level

so putting another lowest band into a latent needs no inverse transform.

Nothing here is written for speed (`fast_torch.py` and `ses_fast.kernels` are) and nothing checks its arguments
(`ops.py` does, by `checks.py`); their errors stand in the docstrings here because all share them.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MASK32 = 0xFFFFFFFF
PIL_BITS = 22  # the fraction bits of Pillow's integer filter weights

Seed = int | Tensor  # a Python int, or a 0-d int64 tensor on the device (a captured graph can then change it)
Op = TypeVar("Op", bound=Callable)


def documented(op: Op) -> Op:
    """Gives an op of another file the docstring of its namesake here."""
    op.__doc__ = globals()[op.__name__].__doc__
    return op


# ---------------------------------------------------------------- Haar: all bands


def haar_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list:
    """Haar transform of the last two dimensions, as `pywt.wavedec2(x, "db1", "symmetric", level)`.

    Returns [cA, (cH, cV, cD) of the coarsest level, ..., (cH, cV, cD) of the finest], each
    [..., ceil(H / 2^j), ceil(W / 2^j)], in fp32 (fp64 for fp64 input). Level 0 gives [x]. A level above
    log2 of the shorter side warns and goes on, as PyWavelets does. Raises ValueError for a level below 0
    or above 100, and for a tensor that is not a floating [..., H, W].
    """
    x = wide(x)
    details: list = []
    for _ in range(level):
        p, q, r, s = quads(x)
        top, bottom, top_diff, bottom_diff = p + q, r + s, p - q, r - s
        details.insert(0, ((top - bottom) / 2, (top_diff + bottom_diff) / 2, (top_diff - bottom_diff) / 2))
        x = (top + bottom) / 2
    return [x, *details]


def haar_idwt2(
    coeffs: Sequence,  # [cA, (cH, cV, cD), ...] as of `haar_dwt2`
    size: Sequence[int],  # (H, W)
) -> Tensor:
    """Inverse of `haar_dwt2`: [..., H, W] in the coefficients' dtype (fp32 for half precision).

    Equal to `pywt.waverec2(coeffs, "db1", "symmetric")` cropped to `size`. Raises ValueError where the bands'
    shapes are not those of a transform of `size`.
    """
    low, *details = coeffs
    x = wide(low)
    for level, (cH, cV, cD) in zip(range(len(details) - 1, -1, -1), details, strict=True):
        h, w = band_size(size, level)
        cH, cV, cD = wide(cH), wide(cV), wide(cD)
        plus, minus, plus_diff, minus_diff = x + cH, x - cH, cV + cD, cV - cD
        out = x.new_empty(*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1])
        out[..., 0::2, 0::2] = (plus + plus_diff) / 2
        out[..., 0::2, 1::2] = (plus - plus_diff) / 2
        out[..., 1::2, 0::2] = (minus + minus_diff) / 2
        out[..., 1::2, 1::2] = (minus - minus_diff) / 2
        x = out[..., :h, :w]
    return x


# ---------------------------------------------------------------- Haar: the lowest band alone


def split_low_band(
    x: Tensor,  # [..., H, W]
    level: int,
) -> tuple[Tensor, Tensor]:
    """The lowest Haar band and what stays when it is taken out: (low [..., h, w], residual [..., H, W]).

    Both fp32 (fp64 for fp64 input), h = ceil(H / 2^level). `merge_low_band(residual, low, level)` is x again.
    Level 0 gives (x, zeros). Errors and warning: as `haar_dwt2`.
    """
    x = wide(x)
    low = x if level else x.clone()
    for _ in range(level):
        p, q, r, s = quads(low)
        low = (p + q + r + s) / 2
    return low, merge_low_band(x, -low, level)


def merge_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    level: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual[y, x] + low[y >> level, x >> level] / 2^level, added in fp32 (fp64), then cast to `dtype`.

    dtype None means the residual's. Raises ValueError where `low` is not [..., ceil(H / 2^level), ...].
    """
    shift = min(level, 62)  # no side is longer than 2^62, and an int64 shifts no further
    y, x = (torch.arange(n, device=low.device) >> shift for n in residual.shape[-2:])
    blocks = low[..., y[:, None], x]  # [..., H, W]
    return (wide(residual) + wide(blocks) * 2.0**-level).to(dtype or residual.dtype)


# ---------------------------------------------------------------- noise


def philox4x32(
    key: tuple[Seed, Seed],  # two 32-bit words
    counter: tuple[Seed, Seed, Seed, Seed],  # four 32-bit words, broadcast against each other
) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words.

    Words are ints or int64 tensors in [0, 2^32), on one device. The products wrap around 2^64; both halves are exact.
    """
    device = next((word.device for word in (*key, *counter) if isinstance(word, Tensor)), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.int64, device=device)  # added, not copied: a captured graph takes no copies
    k0, k1, c0, c1, c2, c3 = (zero + word for word in (*key, *counter))
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & MASK32 ^ c1 ^ k0, p1 & MASK32, p0 >> 32 & MASK32 ^ c3 ^ k1, p0 & MASK32
        k0, k1 = k0 + 0x9E3779B9 & MASK32, k1 + 0xBB67AE85 & MASK32
    return torch.broadcast_tensors(c0, c1, c2, c3)


def philox_normal(
    seed: Seed,
    generation: Seed,  # or [G, 1, 1]: several at once
    candidates: Tensor | Sequence[int],  # [P] the candidates' numbers
    size: int,
) -> Tensor:
    """Standard normals [P, size] in fp32, a function of (seed, generation, candidate, coefficient) alone.

    key = the seed's low and high 32 bits, counter = (coefficient // 4, candidate, generation, 0); the words
    w0..w3 give four coefficients by Box-Muller, u = (w + 0.5) / 2^32: r(u0) cos(2 pi u1), r(u0) sin(2 pi u1),
    r(u2) cos(2 pi u3), r(u2) sin(2 pi u3) with r(u) = sqrt(-2 ln u), in fp64 and rounded once. Several
    generations give [G, P, size].
    """
    device = candidates.device if isinstance(candidates, Tensor) else "cpu"  # not torch.set_default_device's
    rows = torch.as_tensor(candidates, dtype=torch.int64, device=device)[:, None]  # [P, 1]
    quads = torch.arange(-(-size // 4), device=device)  # [Q]
    words = philox4x32((seed & MASK32, seed >> 32 & MASK32), (quads, rows, generation, 0))
    u0, u1, u2, u3 = ((word.double() + 0.5) * 2**-32 for word in words)  # [..., P, Q]
    r0, r2 = (u0.log() * -2).sqrt(), (u2.log() * -2).sqrt()
    a1, a3 = u1 * (2 * math.pi), u3 * (2 * math.pi)
    normals = torch.stack([r0 * a1.cos(), r0 * a1.sin(), r2 * a3.cos(), r2 * a3.sin()], -1)  # [..., P, Q, 4]
    return normals.flatten(-2)[..., :size].float()


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
    """The candidates first ... first + popsize - 1 of a generation: (candidates [P, ..., H, W], low [P, D]).

    low = mean + std * eps, put in place of the lowest band; eps is `philox_normal(seed, generation, ...)` or
    `draws`. Candidates are in `dtype` (None: the residual's). `seed` is any int64, `generation` any unsigned
    32-bit number; both may be 0-d int64 tensors on the device. Raises ValueError for wrong shapes, dtypes or
    devices, and unless exactly one of seed and draws is given.
    """
    if seed is not None:
        numbers = torch.arange(first, first + popsize, device=mean.device)
        draws = philox_normal(seed, generation, numbers, mean.numel())
    assert draws is not None
    low = mean + std * draws
    bands = low.view(popsize, *residual.shape[1:-2], *band_size(residual.shape[-2:], level))
    return merge_low_band(residual, bands, level, dtype=dtype), low


# ---------------------------------------------------------------- elites


class Elites(NamedTuple):
    """What `update_elites` gives."""

    elite_low: Tensor  # [K, D] fp32, the best first
    elite_scores: Tensor  # [K] fp64; -inf marks an unused slot, ignored in mean and variance
    mean: Tensor  # [D] fp32
    variance: Tensor  # [D] fp32
    scores: Tensor  # [P] fp64, the generation's own; -inf for one that was not finite


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
    """The k_elites best of the elites so far and a generation; their mean, and their unbiased variance + 1e-7.

    The order is stable: earlier wins ties. A score that is not finite becomes -inf and is ignored in mean and
    variance. With a single elite the variance stays, with none the mean does too. Nothing waits for the device.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    elite_low, elite_scores, scores = select_elites(low, scores, elite_low, elite_scores, k_elites)
    used = (elite_scores > -math.inf)[:, None]  # [K, 1]
    count = used.sum()
    new_mean = (used * elite_low).sum(0) / count
    new_variance = (used * (elite_low - new_mean).square()).sum(0) / (count - 1) + 1e-7
    mean, variance = new_mean.where(count > 0, mean), new_variance.where(count > 1, variance)
    return Elites(elite_low, elite_scores, mean, variance, scores)


def select_elites(
    low: Tensor,  # [P, D]
    scores: Tensor,  # [P]
    elite_low: Tensor,  # [K, D]
    elite_scores: Tensor,  # [K]
    k_elites: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of `update_elites`: the elites' low bands and scores, and the generation's scores in fp64."""
    scores = scores.detach().double().nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    pool_low, pool_scores = torch.cat([elite_low, low]), torch.cat([elite_scores, scores])  # [K + P, D], [K + P]
    best = pool_scores.sort(descending=True, stable=True).indices[:k_elites]
    return pool_low[best], pool_scores[best], scores


# ---------------------------------------------------------------- images for a reward


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
    """Turns a decoder's images into a reward model's input: [n, 3, size, size] in `dtype` (None: the images').

    First both rules quantise to 8 bits as saving a picture would, see `rounding`.
    rule "crop" (CLIPProcessor): the shortest edge to `size` with Pillow's 8-bit bicubic, bit for bit; a centre crop.
        Across first, then down, as Pillow up to 12 and so the published rewards, whatever Pillow is installed:
        13 goes down first where a picture is more than about twice as tall as wide.
    rule "pad" (HPSv2): the longest edge to `size` with torch's antialiased bicubic on floats; zeros on both sides.
    Last, (x / 255 - mean) / std in fp32.

    centre: where "crop" cuts when an odd number of pixels is left over. "floor": (n - size) // 2; "round": half to
        even, as torchvision's CenterCrop and ImageReward do.
    rounding: which picture is saved. "down": DiffSynth's, trunc(clip((v + 1) * 127.5, 0, 255)) in the images' dtype;
        "nearest": diffusers' (VaeImageProcessor), clip(v / 2 + 0.5, 0, 1) in their dtype, then round(255 x) in fp32,
        half to even.

    Raises ValueError for another rule, centre, rounding, shape, dtype or size.
    """
    height, width = images.shape[-2:]
    if rule == "crop":
        rows, columns = crop_resizes(height, width, size, centre)
        x = (
            pil_resize(pil_resize(quantised(images, rounding), columns).mT, rows).mT / 255
        )  # Pillow goes across first, then down
    else:
        rows, columns = pad_resizes(height, width, size)
        x = F.interpolate(
            quantised(images, rounding) / 255, (rows.target, columns.target), mode="bicubic", antialias=True
        )
        x = F.pad(x, (*columns.margins(), *rows.margins()))
    shift, spread = (
        torch.tensor(values, dtype=torch.float32, device=x.device)[:, None, None] for values in (mean, std)
    )
    return ((x - shift) / spread).to(dtype or images.dtype)


def quantised(
    images: Tensor,  # [n, 3, H, W] in [-1, 1]
    rounding: str = "down",
) -> Tensor:
    """0 ... 255 as the uint8 of a picture, in fp32; see `resize_normalize`."""
    if rounding == "nearest":
        return (images.detach() * 0.5).add_(0.5).clamp_(0, 1).float().mul(255).round_()
    return (images.detach() + 1).mul_(127.5).clamp_(0, 255).trunc_().float()


def pil_resize(
    x: Tensor,  # [..., source], whole numbers 0 ... 255 in fp32
    resize: "Resize",
) -> Tensor:  # [..., length] fp32
    """One pass along the last dimension, rounded and clipped as Pillow does after each: (2^21 + sum) >> 22.

    Every product and sum is a whole number below 2^53, exact in fp64 in any order.
    """
    start, stop = resize.window()
    x = x[..., start:stop].double()  # what lies outside does not count, even where it is NaN
    if resize.source == resize.target:
        return x.float()
    firsts, weights = pil_weights(resize)
    at = torch.tensor(firsts, device="cpu")[:, None] - start + torch.arange(weights.shape[1], device="cpu")
    matrix = weights.new_zeros(resize.length, stop - start).scatter_(1, at, weights).double().to(x.device)
    return ((x @ matrix.mT + 2 ** (PIL_BITS - 1)) * 2.0**-PIL_BITS).floor().clamp(0, 255).float()


def _shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shortest edge at `size`, the other cut to an integer, as in transformers."""
    short, long = sorted((height, width))
    return (size, int(size * long / short)) if height <= width else (int(size * long / short), size)


class Resize(NamedTuple):
    """One pass of Pillow's bicubic, `source` samples to `target`; `length` from `first` on are wanted."""

    source: int
    target: int
    first: int
    length: int

    def window(self) -> tuple[int, int]:
        """The samples the wanted outputs read: (start, stop)."""
        if self.source == self.target:
            return self.first, self.first + self.length
        starts, weights = pil_weights(self)
        return starts[0], starts[-1] + weights.shape[1]

    def margins(self) -> tuple[int, int]:
        """What is wanted before the first and after the last output: the padding."""
        return -self.first, self.first + self.length - self.target


def crop_resizes(height: int, width: int, size: int, centre: str) -> tuple[Resize, Resize]:
    """The passes of the crop rule, (rows, columns)."""
    tall, wide = _shortest_edge(height, width, size)
    # round() takes a half to the even number.
    top, left = (round((n - size) / 2) if centre == "round" else (n - size) // 2 for n in (tall, wide))
    return Resize(height, tall, top, size), Resize(width, wide, left, size)


def pad_resizes(height: int, width: int, size: int) -> tuple[Resize, Resize]:
    """The passes of the pad rule, (rows, columns): `first` is not above 0, and what lies outside is padding."""
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    return Resize(height, tall, -((size - tall) // 2), size), Resize(width, wide, -((size - wide) // 2), size)


@lru_cache(maxsize=64)
def pil_weights(resize: Resize) -> tuple[list[int], Tensor]:
    """Pillow's integer filter for the wanted outputs: (first sample of each, weights [length, taps] int64).

    The weights are round-half-away(k * 2^22), k the bicubic with a = -0.5, widened by the downscale and
    normalised in double (Pillow, libImaging/Resample.c). An output is clip((2^21 + sum(weights * samples)) >>
    22, 0, 255). Samples past the end have weight 0, and starts are moved back so that no row of weights
    reaches past it.
    """
    source, target, first, length = resize
    scale = source / target
    widen = max(scale, 1.0)
    taps = min(2 * math.ceil(2 * widen) + 1, source)
    centre = (
        torch.arange(first, first + length, dtype=torch.float64, device="cpu")[:, None] + 0.5
    ) * scale  # [length, 1]
    low = (centre - 2 * widen + 0.5).long().clamp_min(0)  # truncation, as a C cast
    high = (centre + 2 * widen + 0.5).long().clamp_max(source)
    start = low.clamp_max(source - taps)
    sample = start + torch.arange(taps, device="cpu")  # [length, taps]
    x = ((sample - centre + 0.5) / widen).abs()
    kernel = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    kernel = torch.where((x < 2) & (sample >= low) & (sample < high), kernel, 0.0)
    kernel = kernel / kernel.sum(1, keepdim=True) * 2**PIL_BITS
    return start[:, 0].tolist(), (kernel + kernel.sign() * 0.5).long()


# ---------------------------------------------------------------- shared pieces


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is; without its graph."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def band_size(size: Sequence[int], level: int) -> tuple[int, ...]:
    """(h, w) of the bands of (H, W): halved `level` times, rounded up each time, which is as once in the end."""
    return tuple(-(-n // 2**level) for n in size)


def quads(
    x: Tensor,  # [..., H, W]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The corners of the 2x2 blocks, [..., h, w] each; an odd size first repeats its last row or column."""
    if x.shape[-2] % 2:
        x = torch.cat([x, x[..., -1:, :]], -2)
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], -1)
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]
