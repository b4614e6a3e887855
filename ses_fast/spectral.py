"""Split and merge of the lowest band, any PyWavelets wavelet. Haar goes to the ops, the rest is two matrices:

    candidate = base - R(low) + R(low'),   R(c) = A_h c A_w^T

A is built once a size, by sending unit vectors through PyWavelets' own 1-D transform, so it holds its edge
rule too. `backend` is the ops'; the matrices are torch's, on any device. Where a wavelet reconstructs only nearly
("dmey", to 0.03), the base that stays is the base itself, not PyWavelets' reconstruction of it.
"""

import difflib
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_dtype, check_latents, check_level, check_low_band, check_residual, check_rest
from .errors import missing_extra
from .reference import Seed

HAAR = ("db1", "haar")


def split(
    x: Tensor,  # [..., H, W]
    wavelet: str,
    level: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(low [..., h, w], residual [..., H, W]) in fp32 (fp64 for fp64); `merge(residual, low, ...)` is x.

    low is cA of `pywt.wavedec2(x, wavelet, "symmetric", level)`. A level above the useful one warns and goes
    on, as PyWavelets does. Raises ValueError for an unknown wavelet, a level below 0, an empty or integer x.
    """
    if is_haar(wavelet):
        return ops.split_low_band(x, level, backend=backend)
    _check_backend(backend)
    check_latents(x, level, filter_length=_pywt().Wavelet(wavelet).dec_len)
    (down, _), (across, _) = (_matrices(wavelet.lower(), level, n, x.device) for n in x.shape[-2:])
    wide = torch.promote_types(x.dtype, torch.float32)
    low = (down @ x.double() @ across.mT).to(wide)
    return low, merge(x.to(wide), -low, wavelet, level)


def merge(
    residual: Tensor,  # [..., H, W]
    low: Tensor,  # [..., h, w]; leading dimensions broadcast with the residual's
    wavelet: str,
    level: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The latent whose lowest band is `low` and whose rest is `residual`, in `dtype` (None: the residual's).

    Raises ValueError where `low` has not the size of that band.
    """
    if is_haar(wavelet):
        return ops.merge_low_band(residual, low, level, dtype=dtype, backend=backend)
    _check_backend(backend)
    check_level(level)
    check_rest(residual)
    check_dtype(dtype)
    (_, down), (_, across) = (_matrices(wavelet.lower(), level, n, residual.device) for n in residual.shape[-2:])
    check_low_band(residual, low, (down.shape[1], across.shape[1]))
    wide = torch.promote_types(residual.dtype, torch.float32)
    return (residual + down @ low.double() @ across.mT).to(wide).to(dtype or residual.dtype)


def sample_population(
    residual: Tensor,  # [1, ..., H, W] fp32 or fp64, from `split`
    mean: Tensor,  # [D]
    std: Tensor,  # [D]
    wavelet: str,
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
    """`ops.sample_population` for any wavelet: (candidates [P, ..., H, W] in `dtype`, low [P, D]).

    The same seed gives the same noise for every wavelet of an equal D. Errors: as `ops.sample_population`.
    """
    noise: dict[str, Any] = dict(
        popsize=popsize, seed=seed, generation=generation, first=first, draws=draws, backend=backend
    )
    if is_haar(wavelet):
        return ops.sample_population(residual, mean, std, level, dtype=dtype, **noise)
    check_level(level)
    check_residual(residual)
    (_, down), (_, across) = (_matrices(wavelet.lower(), level, n, residual.device) for n in residual.shape[-2:])
    shape = (*residual.shape[1:-2], down.shape[1], across.shape[1])
    # At level 0 the lowest band of a latent is all of it: the op's draws then serve any wavelet.
    flat = residual.new_zeros(1, 1, torch.Size(shape).numel())
    _, low = ops.sample_population(flat, mean, std, 0, **noise)
    return merge(residual, low.view(popsize, *shape), wavelet, level, dtype=dtype), low


class Band(NamedTuple):
    """The numbers of a noise that a search moves: its lowest band; all of it at level 0; or one high band of as many.

    high: a sign that changes at every half block of 2^level samples, down and across, turns the high band into the
        lowest one and back. With Haar, and sides that are whole blocks, it is cD of the coarsest level.
    """

    wavelet: str
    level: int
    high: bool = False  # then the level is 1 or more

    def split(self, base: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """`split` of the base [1, ..., H, W], for this band."""
        return split(self._turned(base), self.wavelet, self.level, backend=backend)

    def merge(
        self, residual: Tensor, numbers: Tensor, *, dtype: torch.dtype | None = None, backend: str | None = None
    ) -> Tensor:
        """`merge` of the band's numbers [..., h, w], for this band."""
        return self._turned(merge(residual, numbers, self.wavelet, self.level, dtype=dtype, backend=backend))

    def sample(self, residual: Tensor, mean: Tensor, std: Tensor, **noise: Any) -> tuple[Tensor, Tensor]:
        """`sample_population`, for this band."""
        candidates, numbers = sample_population(residual, mean, std, self.wavelet, self.level, **noise)
        return self._turned(candidates), numbers

    def _turned(self, x: Tensor) -> Tensor:
        if not self.high:
            return x
        down, across = (1 - 2 * (torch.arange(n, device=x.device) >> (self.level - 1) & 1) for n in x.shape[-2:])
        return x * down[:, None].to(x.dtype) * across.to(x.dtype)


def check_wavelet(wavelet: str) -> None:
    """Raises ValueError, with close names, for what is not a discrete wavelet. Haar needs no PyWavelets."""
    if isinstance(wavelet, str) and wavelet.lower() in HAAR:
        return
    known = _pywt().wavelist(kind="discrete")
    if not isinstance(wavelet, str) or wavelet.lower() not in known:
        close = difflib.get_close_matches(str(wavelet).lower(), known, n=5, cutoff=0.4)
        families = ", ".join(f for f in _pywt().families() if _pywt().wavelist(f, kind="discrete"))
        raise ValueError(
            f"unknown wavelet {wavelet!r}: close names are {', '.join(close) or 'none'}; families: {families}"
        )


def is_haar(wavelet: str) -> bool:
    """Whether it is Haar by one of its names. Raises ValueError for an unknown wavelet."""
    check_wavelet(wavelet)
    return wavelet.lower() in HAAR


def _check_backend(backend: str | None) -> None:
    """Raises ValueError for a name that is none, where the matrices need no backend."""
    if backend is not None:
        ops.known_backend(backend)


@lru_cache(maxsize=64)
def _matrices(wavelet: str, level: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Analysis [c, n] and synthesis [n, c] of the lowest band of n samples.

    fp64: results are rounded once, whatever the batch, and neither autocast nor the TF32 modes touch them.
    """
    pywt = _pywt()
    with warnings.catch_warnings():  # `split` has warned about the level, every time and not only the first
        warnings.simplefilter("ignore", UserWarning)
        low, *details = pywt.wavedec(
            torch.eye(n, dtype=torch.float64, device="cpu").numpy(), wavelet, "symmetric", level, axis=0
        )
    units = torch.eye(len(low), dtype=torch.float64, device="cpu").numpy()
    zeros = [torch.zeros(len(d), len(low), dtype=torch.float64, device="cpu").numpy() for d in details]
    synthesis = pywt.waverec([units, *zeros], wavelet, "symmetric", axis=0)[:n]
    return torch.from_numpy(low.copy()).to(device), torch.from_numpy(synthesis.copy()).to(device)


def _pywt() -> Any:
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise missing_extra("PyWavelets for any wavelet but db1", "wavelets") from error
    return pywt
