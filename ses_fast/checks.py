"""What the ops and the search refuse, and the one line that says what to do: ValueError, before any work."""

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .reference import MASK32, Seed, band_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OP_LEVELS = 100  # a coefficient of the lowest band is up to 2^level times a sample, and fp32 ends at 2^128
SEARCH_LEVELS = 24  # deeper, N(0, 1) / 2^level is below the last bit of an fp32 sample: all candidates would be one
POPULATION = 2**32  # candidates are numbered by one word of the noise's counter
LARGEST_SIDE = 2**15  # of a reward's picture, in pixels: far above any reward's, far below what no memory holds
MOST_SECONDS = 1e9  # 30 years
DRAWN_NUMBERS = 2**28  # of a generator in one generation, 1 GiB: the reference's draws exist only as a whole


# ---------------------------------------------------------------- the ops


def check_dense(name: str, value: Any) -> None:
    """ValueError unless it is a tensor with a number at every place: neither sparse nor nested, nor of shape alone."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {value.layout}")
    if value.is_meta:
        raise ValueError(f"{name} is on the device meta, where a tensor has a shape and no numbers")


def check_floating(name: str, value: Any) -> None:
    """ValueError unless it is a dense tensor in fp16, bf16, fp32 or fp64."""
    check_dense(name, value)
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} must be floating, fp16, bf16, fp32 or fp64, got {value.dtype}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """ValueError unless it is None or one that the ops write."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r}")


def check_level(level: int) -> None:
    """ValueError unless `level` is an int, 0 ... OP_LEVELS."""
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        raise ValueError(f"level must be an int, 0 or more, got {level!r}")
    if level > OP_LEVELS:
        raise ValueError(f"level must be at most {OP_LEVELS}, got {level}: its coefficients overflow fp32")


def check_latents(
    x: Tensor,  # [..., H, W]
    level: int,
    filter_length: int = 2,
) -> None:
    """Raises ValueError for what no transform takes; warns above the useful level, where PyWavelets does."""
    check_level(level)
    check_floating("latents", x)
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
    height, width = check_size(size)
    order = "[cA, (cH, cV, cD), ...]"
    if not isinstance(coeffs, list | tuple) or not coeffs:
        raise ValueError(f"the bands must be a list {order}, got {type(coeffs).__name__}")
    low, *details = coeffs
    if not all(isinstance(triple, list | tuple) and len(triple) == 3 for triple in details):
        raise ValueError(
            f"the bands of a {height}x{width} transform at level {len(details)} are {order}, "
            f"got after cA {', '.join(map(_kind, details))}"
        )
    bands = [low, *(band for triple in details for band in triple)]
    for band in bands:
        check_floating("each of the bands", band)
    sizes = [band_size((height, width), j) for j in range(len(details) + 1)]  # finest first
    lead = tuple(low.shape[:-2])
    expected = [(*lead, *sizes[-1])] + [(*lead, *size) for size in reversed(sizes[1:]) for _ in range(3)]
    shapes = [tuple(band.shape) for band in bands]
    if shapes != expected:
        raise ValueError(
            f"the bands of a {height}x{width} transform at level {len(details)} are {order}, "
            f"with cA's leading dimensions, of shapes {expected}, got {shapes}"
        )
    return sizes


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width); ValueError unless they are two whole numbers from 1 on."""
    sides = tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be (height, width), two ints from 1 on, got {size!r:.100}")
    return sides


def _kind(value: Any) -> str:
    return f"{len(value)} in a {type(value).__name__}" if isinstance(value, list | tuple) else type(value).__name__


def check_rest(
    residual: Tensor,  # [..., H, W]
) -> None:
    """ValueError unless it is what a split leaves of latents."""
    check_floating("residual", residual)
    if residual.dim() < 2 or 0 in residual.shape[-2:]:
        raise ValueError(f"residual must be [..., H, W] with sides from 1 on, got {tuple(residual.shape)}")


def check_low_band(
    residual: Tensor,  # [..., H, W], looked at by `check_rest`
    low: Tensor,  # [..., *expected]
    expected: tuple[int, ...],
) -> tuple[int, ...]:
    """The leading dimensions, broadcast; ValueError unless `low` [..., *expected] can be merged into `residual`."""
    check_floating("low", low)
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
    check_dense("residual", residual)
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
    if not isinstance(popsize, int) or isinstance(popsize, bool) or popsize < 1:
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
        check_floating(name, tensor)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} at level {level}, got {tuple(tensor.shape)}")
        if tensor.device != residual.device:
            raise ValueError(f"{name} must be on {residual.device}, as residual is, got it on {tensor.device}")
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
    given = {"low": low, "scores": scores, "elite_low": elite_low, "elite_scores": elite_scores}
    for name, tensor in (given | {"mean": mean, "variance": variance}).items():
        check_dense(name, tensor)
    before, popsize, size = elite_scores.numel(), scores.numel(), mean.numel()
    if before > k_elites:
        raise ValueError(f"elite_scores must be at most k_elites={k_elites} numbers, got {before}")
    if popsize < 1 or scores.is_complex():
        raise ValueError(f"scores must be some real numbers, got {popsize} of {scores.dtype}")
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
    centre: str,
    rounding: str,
) -> None:
    """ValueError for what `resize_normalize` does not take, but for its mean and std."""
    for name, given, known in (
        ("rule", rule, ("crop", "pad")),
        ("centre", centre, ("floor", "round")),
        ("rounding", rounding, ("down", "nearest")),
    ):
        if not isinstance(given, str) or given not in known:
            raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", got {given!r:.100}')
    check_floating("images", images)
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (n, 3, H, W), got {tuple(images.shape)}")
    if not isinstance(size, int) or not 1 <= size <= LARGEST_SIDE:
        raise ValueError(f"size must be an int from 1 to {LARGEST_SIDE}, got {size!r:.100}")


def colour(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """The mean or std of three colours as floats. ValueError unless they are finite, and a std none of 0."""
    try:
        three = tuple(map(float, values)) if not isinstance(values, str | bytes) else ()
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        three = ()
    if len(three) != 3 or not all(map(math.isfinite, three)) or (name == "std" and 0 in three):
        raise ValueError(f"{name} must be three numbers, finite and for std not 0, got {values!r:.100}")
    return three


# ---------------------------------------------------------------- the search


def check_sizes(popsize: Any, k_elites: Any, dwt_level: Any) -> tuple[int, int, int]:
    """The three as ints. Raises ValueError for another type, below 1 (a level: below 0), and where no search works."""
    popsize, k_elites = whole_number("popsize", popsize, 1), whole_number("k_elites", k_elites, 1)
    dwt_level = whole_number("dwt_level", dwt_level, 0)
    if popsize > POPULATION:
        raise ValueError(f"popsize must be at most 2^32, got {popsize}")
    if dwt_level > SEARCH_LEVELS:
        raise ValueError(
            f"dwt_level must be at most {SEARCH_LEVELS}, got {dwt_level}: N(0, 1) / 2^{dwt_level} moves no "
            "fp32 sample, so all candidates would be the same"
        )
    return popsize, k_elites, dwt_level


def check_drawn(popsize: int, size: int) -> None:
    """Raises ValueError where a generation of popsize x size numbers is too much to be drawn from a generator."""
    if popsize * size > DRAWN_NUMBERS:
        raise ValueError(
            f"popsize={popsize} needs {popsize * size} numbers in each generation, and a generator draws them whole: "
            f"at most {DRAWN_NUMBERS}. With seed= only the candidates that are scored are drawn"
        )


def check_noise(seed: Any, generator: Any) -> int | None:
    """The seed as an int. Raises ValueError unless it is an int64 or None, `generator` a CPU one or None, not both."""
    if generator is not None:
        if seed is not None:
            raise ValueError("give seed= or generator=, not both")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError(f"generator must be a CPU torch.Generator, on every device; got {generator!r}")
    if seed is None:
        return None
    seed = whole_number("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    return seed


def check_base(base: Tensor) -> None:
    """Raises ValueError unless the base is one finite floating (1, ..., H, W)."""
    check_dense("base_latents", base)
    if base.ndim < 3 or base.shape[0] != 1 or base.numel() == 0:
        shape = tuple(base.shape)
        raise ValueError(f"base_latents must be one base (1, ..., H, W), not empty; got {shape}: search one by one")
    if base.dtype not in DTYPES:
        raise ValueError(f"base_latents must be float16, bfloat16, float32 or float64; convert it from {base.dtype}")
    # NaN passes through both: a quarter of the time of base.isfinite().all(), and one copy from the device.
    if not all(map(math.isfinite, torch.stack(base.aminmax()).tolist())):
        raise ValueError("base_latents has values that are not finite: check how the noise was made")


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises ValueError for a bool, a float or another type, and below `least`."""
    try:
        number = None if isinstance(value, bool | Tensor) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r:.200}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number


def check_truths(**values: Any) -> None:
    """Raises ValueError for one that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r:.200}")


def check_options(*, time_limit: Any = None, **callbacks: Any) -> None:
    """ValueError for a time_limit that is not above 0 and finite, and a callback that is neither None nor callable."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be callable, got {callback!r}")
    if time_limit is not None:
        seconds = isinstance(time_limit, Real) and not isinstance(time_limit, bool)
        if not seconds or not 0 < time_limit <= MOST_SECONDS:  # without an end a search without a budget has none
            raise ValueError(f"time_limit must be seconds above 0, got {time_limit!r:.100}: None is no limit")


def differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, before, now) of each value in nested dicts that differs, by its dotted name."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        if was != now:
            yield name or "all", was, now
        return
    for each in sorted(was.keys() | now.keys()):
        yield from differences(was.get(each), now.get(each), f"{name}.{each}" if name else each)
