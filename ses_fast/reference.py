"""Plain torch of every op: the manual, the fallback and the oracle of the kernels. Imports torch only.

Start at `split_low_band` and `sample_population`: for Haar with PyWavelets' symmetric extension and any size,

    candidate[y, x] = residual[y, x] + low[y >> level, x >> level] / 2^level

so putting another lowest band into a latent needs no inverse transform.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MASK32 = 0xFFFFFFFF
FEW, AHEAD = 4096, 5  # where a generation needs at most FEW numbers, AHEAD generations are drawn in one call
PIL_BITS = 22  # the fraction bits of Pillow's integer filter weights

Seed = int | Tensor  # a Python int, or a 0-d int64 tensor on the device (a captured graph can then change it)


# ---------------------------------------------------------------- Haar: all bands


def haar_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
) -> list:
    """Haar transform of the last two dimensions, as `pywt.wavedec2(x, "db1", "symmetric", level)`.

    Returns [cA, (cH, cV, cD) of the coarsest level, ..., (cH, cV, cD) of the finest], each
    [..., ceil(H / 2^j), ceil(W / 2^j)], in fp32 (fp64 for fp64 input). Level 0 gives [x]. A level above
    log2 of the shorter side warns and goes on, as PyWavelets does. Raises ValueError for a level below 0
    and for a tensor that is not a floating [..., H, W].
    """
    check_latents(x, level)
    x = _wide(x)
    details: list = []
    for _ in range(level):
        p, q, r, s = _quads(x)
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
    shapes = check_bands(coeffs, size)
    low, *details = coeffs
    x = _wide(low)
    for (cH, cV, cD), (h, w) in zip(details, shapes[-2::-1], strict=True):
        cH, cV, cD = _wide(cH), _wide(cV), _wide(cD)
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
    check_latents(x, level)
    x = _wide(x)
    low = x if level else x.clone()
    for _ in range(level):
        p, q, r, s = _quads(low)
        low = (p + q + r + s) / 2
    return low, _merged(x, -low, level, x.shape[:-2], x.dtype)


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
    check_level(level)
    lead = check_low_band(residual, low, band_size(residual.shape[-2:], level))
    return _merged(residual, low, level, lead, dtype or residual.dtype)


def _merged(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]
    level: int,
    lead: Sequence[int],  # the leading dimensions, broadcast
    dtype: torch.dtype,
) -> Tensor:  # [*lead, H, W]
    height, width = residual.shape[-2:]
    block = 1 << level
    out = residual.new_empty((*lead, height, width), dtype=dtype)

    residual, low = _wide(residual.detach()), _wide(low.detach()) * 2.0**-level
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


# ---------------------------------------------------------------- noise


def philox4x32(
    key: tuple[Seed, Seed],  # two 32-bit words
    counter: tuple[Seed, Seed, Seed, Seed],  # four 32-bit words, broadcast against each other
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words.

    Words are ints or int64 tensors in [0, 2^32), on one device. A round is

        c0, c1, c2, c3 = high(c2 * M1) ^ c1 ^ k0, low(c2 * M1), high(c0 * M0) ^ c3 ^ k1, low(c0 * M0)

    The two products are made at once, in two lanes. They wrap around 2^64 in int64; both halves are exact.
    """
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
    on = candidates.device if isinstance(candidates, Tensor) else "cpu"  # not torch.set_default_device's
    rows = torch.as_tensor(candidates, dtype=torch.int64, device=on)[:, None]  # [P, 1]
    quads = torch.arange(-(-size // 4), device=rows.device)  # [Q]
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
    low_shape = check_population(residual, mean, std, level, popsize, seed, generation, first, draws)
    few = popsize * mean.numel() <= FEW and mean.device.type == "cpu" and not torch.compiler.is_compiling()
    if few and isinstance(seed, int) and isinstance(generation, int):
        block, row = divmod(generation, AHEAD)
        draws = _normals_ahead(seed, block, first, popsize, mean.numel())[row]
    elif seed is not None:
        numbers = torch.arange(first, first + popsize, device=mean.device)
        draws = philox_normal(seed, generation, numbers, mean.numel())
    assert draws is not None  # check_population saw to it
    low = mean + std * draws
    lead = (popsize, *low_shape[:-2])
    return _merged(residual, low.view(popsize, *low_shape), level, lead, dtype or residual.dtype), low


# ---------------------------------------------------------------- elites


class Elites(NamedTuple):
    """What `update_elites` gives."""

    low: Tensor  # [K, D] fp32, the best first
    scores: Tensor  # [K] fp64; minus infinity marks an empty place, which weighs nothing
    mean: Tensor  # [D] fp32
    variance: Tensor  # [D] fp32
    told: Tensor  # [P] fp64, the generation's scores, minus infinity if not finite


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

    The order is stable: earlier wins ties. A score that is not finite becomes minus infinity and weighs nothing.
    With a single elite the variance stays, with none the mean does too. Nothing waits for the device. Raises
    ValueError for wrong shapes, dtypes or devices.
    """
    check_elites(low, scores, elite_low, elite_scores, mean, variance, k_elites)
    told = scores.detach().double().nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    pool_low = torch.cat([elite_low, low])  # [K + P, D]
    pool_scores = torch.cat([elite_scores, told])  # [K + P]
    best = pool_scores.sort(descending=True, stable=True).indices[:k_elites]
    elite_low, elite_scores = pool_low[best], pool_scores[best]

    if elite_scores.device.type == "cpu" and elite_scores[-1] > -math.inf and len(elite_scores) > 1:
        new_variance, new_mean = torch.var_mean(elite_low, 0)  # no empty place: the same, in one call
        return Elites(elite_low, elite_scores, new_mean, new_variance + 1e-7, told)
    # Elsewhere only the device knows how many are finite.
    weight = (elite_scores > -math.inf)[:, None]  # [K, 1]
    count = weight.sum()
    new_mean = (weight * elite_low).sum(0) / count
    new_variance = (weight * (elite_low - new_mean).square()).sum(0) / (count - 1) + 1e-7
    return Elites(
        elite_low, elite_scores, new_mean.where(count > 0, mean), new_variance.where(count > 1, variance), told
    )


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
) -> Tensor:
    """Turns a decoder's images into a reward model's input: [n, 3, size, size] in `dtype` (None: the images').

    First both rules quantise as saving a picture would: trunc(clip((v + 1) * 127.5, 0, 255)), in the images' dtype.
    rule "crop" (CLIPProcessor): the shortest edge to `size` with Pillow's 8-bit bicubic, bit for bit; a centre crop.
        Across first, then down, as Pillow up to 12 and so the published rewards, whatever Pillow is installed:
        13 goes down first where a picture is more than about twice as tall as wide.
    rule "pad" (HPSv2): the longest edge to `size` with torch's antialiased bicubic on floats; zeros on both sides.
    Last, (x / 255 - mean) / std in fp32.

    centre: where "crop" cuts when an odd number of pixels is left over. "floor": (n - size) // 2; "round": half to
        even, as torchvision's CenterCrop and ImageReward do.

    Raises ValueError for another rule, centre, shape, dtype or size.
    """
    check_images(images, rule, size, mean, std, centre)
    call = _op if torch.compiler.is_compiling() else _resize_normalize
    return call(images, rule, size, list(mean), list(std), dtype or images.dtype, centre)


def _resize_normalize(
    images: Tensor,  # [n, 3, H, W]
    rule: str,
    size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    centre: str,
) -> Tensor:  # [n, 3, size, size]
    n, _, height, width = images.shape
    if rule == "crop":
        rows, columns = crop_resizes(height, width, size, centre)
        x = _quantised(images[..., slice(*rows.window()), slice(*columns.window())])  # what the crop can see
        tall = x.shape[2]
        x = _pil_resize(x.flatten(0, 2), columns)  # [size, n * 3 * tall]: Pillow goes across first,
        x = _pil_resize(x.reshape(size * n * 3, tall), rows)  # [size, size * n * 3]: then down
        x = x.reshape(size, size, n, 3).permute(2, 3, 0, 1).contiguous() / 255
    else:
        rows, columns = pad_resizes(height, width, size)
        x = F.interpolate(_quantised(images) / 255, (rows.target, columns.target), mode="bicubic", antialias=True)
        x = F.pad(x, (*columns.margins(), *rows.margins()))
    shift, spread = (_channels(tuple(values), x.device) for values in (mean, std))
    return ((x - shift) / spread).to(dtype)


@lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:  # [3, 1, 1]
    """A number for each channel, copied to the device once: a copy waits for it, and no captured graph takes one."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


# An operator to torch.compile: the filters are made from the pictures' size, by tensors that are read on the host.
_op = torch.library.custom_op("ses_fast::plain_resize_normalize", _resize_normalize, mutates_args=())


@_op.register_fake
def _(images, rule, size, mean, std, dtype, centre):
    return images.new_empty((len(images), 3, size, size), dtype=dtype)


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


def _quantised(
    images: Tensor,  # [n, 3, H, W] in [-1, 1]
) -> Tensor:
    """0 ... 255 as the uint8 of a picture, in fp32; computed in the images' own dtype, as DiffSynth does."""
    return (images.detach() + 1).mul_(127.5).clamp_(0, 255).trunc_().float()


# ---------------------------------------------------------------- shared pieces and checks


def _add_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a + b, rounded once. torch.compile takes no out= that is a view; it fuses the copy instead."""
    if torch.compiler.is_compiling():
        out.copy_(a + b)
    else:
        torch.add(a, b, out=out)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def band_size(size: Sequence[int], level: int) -> tuple[int, ...]:
    """(h, w) of the bands of (H, W): halved `level` times, rounded up each time, which is as once in the end."""
    return tuple(-(-n // 2**level) for n in size)


def _quads(
    x: Tensor,  # [..., H, W]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The corners of the 2x2 blocks, [..., h, w] each; an odd size first repeats its last row or column."""
    if x.shape[-2] % 2:
        x = torch.cat([x, x[..., -1:, :]], -2)
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], -1)
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]


def check_level(level: int) -> None:
    """ValueError unless `level` is an int, 0 or more."""
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        raise ValueError(f"level must be an int, 0 or more, got {level!r}")


def check_latents(
    x: Tensor,  # [..., H, W]
    level: int,
    filter_length: int = 2,
) -> None:
    """Raises ValueError for what no transform takes; warns above the useful level, where PyWavelets does."""
    check_level(level)
    if not x.is_floating_point():
        raise ValueError(f"latents must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"latents must be [..., H, W] and not empty, got {tuple(x.shape)}")
    size = tuple(x.shape[-2:])
    useful = max((min(size) // (filter_length - 1)).bit_length() - 1, 0)
    if level > useful:
        warnings.warn(
            f"level {level} is too high for {size}: above {useful} every coefficient sees the edge",
            stacklevel=3,
        )


def check_bands(coeffs: Sequence, size: Sequence[int]) -> list[tuple[int, ...]]:
    """The bands' sizes at levels 0, 1, ...; ValueError unless `coeffs` are those of a transform of `size`."""
    height, width = size
    low, *details = coeffs
    sizes = [band_size(size, j) for j in range(len(details) + 1)]  # finest first
    bands = [low, *(band for triple in details for band in triple)]
    lead = tuple(low.shape[:-2])
    expected = [(*lead, *sizes[-1])] + [(*lead, *size) for size in reversed(sizes[1:]) for _ in range(3)]
    shapes = [tuple(band.shape) for band in bands]
    if shapes != expected or any(len(triple) != 3 for triple in details):
        raise ValueError(
            f"the bands of a {height}x{width} transform at level {len(details)} are [cA, (cH, cV, cD), ...], "
            f"with cA's leading dimensions, of shapes {expected}, got {shapes}"
        )
    if not all(band.is_floating_point() for band in bands):
        raise ValueError(f"the bands must be floating, got {[band.dtype for band in bands]}")
    return sizes


def check_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., *expected]
    expected: tuple[int, ...],
) -> tuple[int, ...]:
    """The leading dimensions, broadcast; ValueError unless `low` [..., *expected] can be merged into `residual`."""
    if residual.dim() < 2 or not residual.is_floating_point() or not low.is_floating_point():
        raise ValueError(f"residual and low must be floating [..., H, W], got {residual.dtype} and {low.dtype}")
    if tuple(low.shape[-2:]) != expected:
        raise ValueError(f"at this level low of {tuple(residual.shape)} must end in {expected}, got {tuple(low.shape)}")
    longest = max(residual.dim(), low.dim())
    shapes = [(1,) * (longest - tensor.dim()) + tuple(tensor.shape[:-2]) for tensor in (residual, low)]
    if any(m != n and m != 1 and n != 1 for m, n in zip(*shapes, strict=True)):
        raise ValueError(
            f"the leading dimensions of residual {tuple(residual.shape)} and low {tuple(low.shape)} must broadcast"
        )
    return tuple(n if m == 1 else m for m, n in zip(*shapes, strict=True))


def check_residual(
    residual: Tensor,  # [1, ..., H, W]
) -> None:
    """ValueError unless it is one latent [1, ..., H, W], not empty, in fp32 or fp64."""
    if residual.dim() < 3 or residual.shape[0] != 1 or residual.numel() == 0:
        raise ValueError(f"residual must be one latent (1, ..., H, W), got {tuple(residual.shape)}")
    if residual.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"residual must be fp32 or fp64, as split_low_band gives it, got {residual.dtype}")


def check_population(
    residual: Tensor,  # [1, ..., H, W]
    mean: Tensor,  # [D]
    std: Tensor,  # [D]
    level: int,
    popsize: int,
    seed: Seed | None,
    generation: Seed,
    first: int,
    draws: Tensor | None,  # [popsize, D]
) -> tuple[int, ...]:
    """One candidate's low band (..., h, w); ValueError for what `sample_population` does not take."""
    check_level(level)
    check_residual(residual)
    if not isinstance(popsize, int) or popsize < 1:
        raise ValueError(f"popsize must be an int, 1 or more, got {popsize!r}")
    if not isinstance(first, int) or not 0 <= first <= MASK32 + 1 - popsize:
        raise ValueError(f"the candidates' numbers must lie in [0, 2^32), got first={first!r} and popsize={popsize}")
    if (seed is None) == (draws is None):
        raise ValueError("give exactly one of seed= and draws=")
    shape = (*residual.shape[1:-2], *band_size(residual.shape[-2:], level))
    size = math.prod(shape)
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {"mean": (mean, (size,)), "std": (std, (size,))}
    if draws is not None:
        tensors["draws"] = (draws, (popsize, size))
    for name, (tensor, expected) in tensors.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} at level {level}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.device != residual.device:
            raise ValueError(f"{name} must be floating and on {residual.device}, got {tensor.dtype} on {tensor.device}")
    if draws is None:
        _check_word("seed", seed, -(2**63), 2**63, residual.device)
        _check_word("generation", generation, 0, 2**32, residual.device)
    return shape


def _check_word(name: str, value: Seed | None, low: int, high: int, device: torch.device) -> None:
    if isinstance(value, Tensor):
        if value.dim() or value.dtype != torch.int64 or value.device != device:
            raise ValueError(
                f"{name} as a tensor must be 0-d, int64 and on {device}, "
                f"got {tuple(value.shape)}, {value.dtype} on {value.device}"
            )
    elif not isinstance(value, int) or not low <= value < high:
        raise ValueError(f"{name} must be an int in [{low}, {high}), got {value!r}")


def check_elites(
    low: Tensor,  # [P, D]
    scores: Tensor,  # [P]
    elite_low: Tensor,  # [K, D]
    elite_scores: Tensor,  # [K]
    mean: Tensor,  # [D]
    variance: Tensor,  # [D]
    k_elites: int,
) -> None:
    """ValueError for what `update_elites` does not take."""
    if not isinstance(k_elites, int) or k_elites < 1:
        raise ValueError(f"k_elites must be an int, 1 or more, got {k_elites!r}")
    before, popsize, size = len(elite_scores), len(scores), mean.numel()
    if before > k_elites or popsize < 1 or scores.is_complex():
        raise ValueError(
            f"expected at most {k_elites} elites and some real scores, got {before}, {popsize} {scores.dtype}"
        )
    tensors: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "low": (low, (popsize, size), torch.float32),
        "scores": (scores, (popsize,), scores.dtype),
        "elite_low": (elite_low, (before, size), torch.float32),
        "elite_scores": (elite_scores, (before,), torch.float64),
        "mean": (mean, (size,), torch.float32),
        "variance": (variance, (size,), torch.float32),
    }
    for name, (tensor, shape, dtype) in tensors.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != mean.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {dtype} {shape} on {mean.device}, got {got}")


def check_images(
    images: Tensor,  # [n, 3, H, W]
    rule: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    centre: str,
) -> None:
    """ValueError for what `resize_normalize` does not take."""
    if rule not in ("crop", "pad"):
        raise ValueError(f'rule must be "crop" or "pad", got {rule!r}')
    if centre not in ("floor", "round"):
        raise ValueError(f'centre must be "floor" or "round", got {centre!r}')
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (n, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating, in [-1, 1], got {images.dtype}")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an int, 1 or more, got {size!r}")
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ValueError(f"mean and std must be three numbers each, std not 0, got {mean} and {std}")
