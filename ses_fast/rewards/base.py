"""What every reward shares: the checks, the prompt encoded once, and where its files come from."""

import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .._torchvision import mend_torchvision
from ..errors import missing_extra


class Reward:
    """Scores images against a prompt; a subclass gives `load`, `encode` and `score`.

    `model` is the network that is moved with `to`; `dtype` is what it computes in.
    """

    def __init__(self, model: Any, device: torch.device | str | None, dtype: torch.dtype | None):
        self.device, self.dtype = default_device(device), default_dtype(device, dtype)
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self._prompt: str | None = None
        self._encoded: Any = None

    @classmethod
    def load(
        cls,
        name: str,
        weights: str | os.PathLike | None,
        ids: dict[str, str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The reward `name` from `weights` (None: from its default `ids`)."""
        raise NotImplementedError

    def encode(self, prompt: str) -> Any:
        """What `score` needs of the prompt; called once for each new prompt."""
        raise NotImplementedError

    def score(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        encoded: Any,
    ) -> Tensor:  # [n]
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1], any float dtype and device
        prompt: str,
    ) -> Tensor:  # [n] fp32, on the reward's device
        """One score for each image, higher is better. ValueError for any other shape, dtype or prompt."""
        if not isinstance(prompt, str):
            raise ValueError(f"a reward needs one prompt, a string; got {type(prompt).__name__}")
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"a reward needs a float tensor of images in [-1, 1]; got {got}")
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"a reward needs images of shape (n, 3, H, W), n > 0; got {tuple(images.shape)}")
        if prompt != self._prompt:
            self._prompt, self._encoded = prompt, self.encode(prompt)
        return self.score(images, self._encoded).float()

    def to(self, device: torch.device | str) -> Self:
        """Moves the reward, as `Module.to`; its dtype stays."""
        self.device, self._prompt, self._encoded = default_device(device), None, None
        self.model.to(self.device)
        return self


def default_device(device: torch.device | str | None) -> torch.device:
    """`device` with its index; None is the current GPU, the CPU where there is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(0, device=device).device


def default_dtype(device: torch.device | str | None, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`; None is bf16 on a GPU and fp32 on the CPU, where bf16 is slow."""
    return dtype or (torch.bfloat16 if default_device(device).type == "cuda" else torch.float32)


def require(*packages: str) -> None:
    """Raises ImportError where a package is missing; call it before importing transformers or diffsynth."""
    for package in packages:
        if find_spec(package) is None:
            raise missing_extra(package, "diffsynth" if package == "diffsynth" else "rewards")
    mend_torchvision()


def local_copy(name: str, source: str | os.PathLike, patterns: Iterable[str]) -> Path:
    """The file or folder `source`; a Hub id ("owner/name") is downloaded first, only the files of `patterns`.

    Honours HF_HUB_OFFLINE. Raises FileNotFoundError for what is neither here nor on the Hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"reward {name!r}: {source} is no file or folder, nor a Hub id")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns)))
    except OSError as error:  # the hub's own errors (offline, no network, unknown or gated) are all OSErrors
        raise FileNotFoundError(
            f"reward {name!r}: {source} is neither a local folder, nor in the Hugging Face cache, nor to be "
            f"downloaded now. Where there is a network, and HF_HUB_OFFLINE is not set, run "
            f'`hf download {source}` once, or pass a local copy: load_reward({name!r}, weights="folder").'
        ) from error


def modelscope_folder(folder: str) -> Path:
    """Where diffsynth keeps, or would keep, the folder of DiffSynth-Studio/ImageMetrics."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH", "models"), "DiffSynth-Studio", "ImageMetrics", folder)


def modelscope_copy(name: str, folder: str | None) -> Path:
    """The local folder of the copy of a reward that `diffsynth.metrics` uses, downloaded if needed.

    diffsynth's own settings (DIFFSYNTH_MODEL_BASE_PATH, DIFFSYNTH_SKIP_DOWNLOAD and so on) hold.
    """
    if folder is None:
        raise ValueError(f"reward {name!r} has no copy on ModelScope")
    require("diffsynth")
    from diffsynth.core import ModelConfig

    config = ModelConfig(model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern=f"{folder}/")
    try:
        config.download_if_necessary()
    except OSError as error:  # modelscope's own, of the network and of the hub
        raise FileNotFoundError(
            f"reward {name!r}: DiffSynth-Studio/ImageMetrics is neither in {modelscope_folder(folder).parent}, nor to "
            f"be downloaded now. Load it once where there is a network, or pass a local copy of its folder {folder}: "
            f'load_reward({name!r}, weights="folder"). DIFFSYNTH_SKIP_DOWNLOAD=true asks no network.'
        ) from error
    if not config.path:
        raise FileNotFoundError(
            f"reward {name!r}: no copy of DiffSynth-Studio/ImageMetrics in {config.local_model_path}"
        )
    return Path(config.path)
