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
DRAWN_NUMBERS = 2**28  # of a generator in one generation, 1 GiB: the reference's draws exist only as a whole


# ---------------------------------------------------------------- the ops


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
    if not isinstance(base, Tensor):
        raise ValueError(f"base_latents must be a torch.Tensor, got {type(base).__name__}")
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
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)


def check_options(*, time_limit: Any = None, **callbacks: Any) -> None:
    """Raises ValueError for a time_limit that is not above 0, and a callback that is neither None nor callable."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be callable, got {callback!r}")
    if time_limit is not None:
        if not isinstance(time_limit, Real) or isinstance(time_limit, bool) or not float(time_limit) > 0:
            raise ValueError(f"time_limit must be seconds above 0, got {time_limit!r}")


def differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, before, now) of each value in nested dicts that differs, by its dotted name."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        if was != now:
            yield name or "all", was, now
        return
    for each in sorted(was.keys() | now.keys()):
        yield from differences(was.get(each), now.get(each), f"{name}.{each}" if name else each)
