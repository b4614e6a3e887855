"""The ops, public: each checks its arguments, chooses a backend and calls it. What each does is in `reference.py`.

The only file that chooses. "torch" is `fast_torch.py`, on any device. "triton" is `ses_fast.kernels`, on CUDA, with the
tensors' device made the current one. "auto" takes Triton only where every tensor is on one CUDA device, none is fp64
and the kernel's sizes suffice. A backend asked for by name runs or raises RuntimeError.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks, fast_torch
from .reference import CLIP_MEAN, CLIP_STD, Elites, Seed, band_size, documented

BACKENDS = ("auto", "triton", "torch")
F = TypeVar("F", bound=Callable)
_backend = "auto"


def set_backend(name: str) -> None:
    """The backend of every op called without `backend=`: "auto" (the default), "triton" or "torch"."""
    global _backend
    _backend = known_backend(name)


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors (none given: any at all), or None where they can."""
    devices = {tensor.device for tensor in tensors}
    elsewhere = sorted(str(device) for device in devices if device.type != "cuda")
    if elsewhere:
        return f"the kernels run on CUDA, and a tensor is on {elsewhere[0]}"
    if len(devices) > 1:
        return f"the tensors are on different devices: {', '.join(sorted(map(str, devices)))}"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernels compute in fp32, and a tensor is fp64"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.compiler.is_compiling():  # it cannot look for modules; the import itself will say what is missing
        return None
    return next(filter(None, map(_missing, ("haar", "population", "elites", "preprocess"))), None)


@lru_cache
def _missing(kernel: str) -> str | None:
    """What has to be installed before `ses_fast.kernels.<kernel>` can be imported."""
    for module in ("triton", "ses_fast.kernels", f"ses_fast.kernels.{kernel}"):
        if importlib.util.find_spec(module) is None:
            return f"the module {module} is not there"
    return None


def _call(
    op: str,
    kernel: str,
    backend: str | None,
    tensors: Sequence[Tensor | None],  # on one device, the first is none of the optional ones
    *args: Any,
    sizes: tuple | None = None,
    **kwargs: Any,
) -> Any:
    """The op of this name by the backend for `tensors`; sizes: as of `_module`."""
    module = _module(kernel, backend, *tensors, sizes=sizes)
    function = getattr(module, op)
    if module is fast_torch or torch.compiler.is_compiling():  # a compiled launch is guarded by its operator
        return function(*args, **kwargs)
    # Triton launches on the current device and its stream, which need not be the tensors'.
    with torch.cuda.device_of(tensors[0]):
        return function(*args, **kwargs)


def _module(kernel: str, backend: str | None, *tensors: Tensor | None, sizes: tuple | None = None) -> Any:
    """The module whose function of the op's name is to be called.

    sizes: the arguments of the kernel's `unfit`, where it has one. They are Python numbers: no device is waited for.
    """
    name = known_backend(_backend if backend is None else backend)
    if name == "torch":
        return fast_torch
    reason = why_not_triton(*(tensor for tensor in tensors if tensor is not None))
    if reason is None:
        module = _kernels(kernel)
        reason = None if sizes is None else module.unfit(*sizes)
        if reason is None:
            return module
    if name == "triton":
        raise RuntimeError(f'backend="triton" cannot run here: {reason}. backend="auto" would take torch')
    return fast_torch


def _kernels(name: str) -> Any:
    """`ses_fast.kernels.<name>`, by import statements, which torch.compile can follow."""
    if name == "haar":
        from .kernels import haar as module
    elif name == "population":
        from .kernels import population as module
    elif name == "elites":
        from .kernels import elites as module
    else:
        from .kernels import preprocess as module
    return module


def known_backend(name: str) -> str:
    """The name. Raises ValueError, with those there are, for any other."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r:.100}")
    return name


def _op(function: F) -> F:
    """Gives an op the docstring of its namesake in `reference.py`, and what `backend=` adds."""
    text = documented(function).__doc__
    assert text is not None
    function.__doc__ = f"""{text.rstrip()}

    backend: "auto", "triton" or "torch" for this call; None: what `set_backend` set. "triton" raises RuntimeError, and
    says why, where the kernels cannot run.
    """
    return function


@_op
def haar_dwt2(
    x: Tensor,  # [..., H, W]
    level: int,
    *,
    backend: str | None = None,
) -> list:
    checks.check_latents(x, level)
    return _call("haar_dwt2", "haar", backend, [x], x, level)


@_op
def haar_idwt2(
    coeffs: Sequence,  # [cA, (cH, cV, cD), ...] as of `haar_dwt2`
    size: Sequence[int],  # (H, W)
    *,
    backend: str | None = None,
) -> Tensor:
    checks.check_bands(coeffs, size)
    bands = [coeffs[0], *(band for triple in coeffs[1:] for band in triple)]
    return _call("haar_idwt2", "haar", backend, bands, coeffs, size)


@_op
def split_low_band(
    x: Tensor,  # [..., H, W]
    level: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    checks.check_latents(x, level)
    return _call("split_low_band", "haar", backend, [x], x, level)


@_op
def merge_low_band(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    level: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    checks.check_level(level)
    checks.check_rest(residual)
    checks.check_dtype(dtype)
    checks.check_low_band(residual, low, band_size(residual.shape[-2:], level))
    return _call("merge_low_band", "haar", backend, [residual, low], residual, low, level, dtype=dtype)


@_op
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    checks.check_population(residual, mean, std, level, popsize, seed, generation, first, draws)
    checks.check_dtype(dtype)
    return _call(
        "sample_population",
        "population",
        backend,
        [residual, mean, std, draws],
        residual,
        mean,
        std,
        level,
        popsize=popsize,
        seed=seed,
        generation=generation,
        first=first,
        draws=draws,
        dtype=dtype,
    )


@_op
def update_elites(
    low: Tensor,  # [P, D] fp32
    scores: Tensor,  # [P], any real dtype
    elite_low: Tensor,  # [K, D] fp32, the best first, K <= k_elites
    elite_scores: Tensor,  # [K] fp64
    mean: Tensor,  # [D] fp32
    variance: Tensor,  # [D] fp32
    *,
    k_elites: int,
    backend: str | None = None,
) -> Elites:
    checks.check_elites(low, scores, elite_low, elite_scores, mean, variance, k_elites)
    given = (low, scores, elite_low, elite_scores, mean, variance)
    tensors = [low, elite_low, mean, variance]  # the scores may be fp64: the kernel compares them as that
    sizes = (len(scores), k_elites)
    return _call("update_elites", "elites", backend, tensors, *given, sizes=sizes, k_elites=k_elites)


def check_update_elites(
    mean: Tensor,  # [D]
    popsize: int,
    k_elites: int,
    *,
    backend: str | None = None,
) -> None:
    """RuntimeError where `update_elites` would raise it: to be asked before the scores of a generation are paid for."""
    _module("elites", backend, mean, sizes=(popsize, k_elites))


@_op
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
    backend: str | None = None,
) -> Tensor:
    checks.check_images(images, rule, size, centre, rounding)
    checks.check_dtype(dtype)
    mean, std = checks.colour("mean", mean), checks.colour("std", std)
    return _call(
        "resize_normalize",
        "preprocess",
        backend,
        [images],
        images,
        rule,
        sizes=(*images.shape[-2:], rule, size),
        size=size,
        mean=mean,
        std=std,
        dtype=dtype,
        centre=centre,
        rounding=rounding,
    )
