"""What every reward shares: the checks, the prompt encoded once, and where its files come from."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .._torchvision import mend_torchvision
from ..cpu import fast_linears
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
        weights: str | os.PathLike,
        ids: dict[str, str],
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The reward `name`, on the CPU, from `weights`: a local path or a Hub id. `ids` are its published ones."""
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
        # One alone is scored as the model's own layers do.
        with fast_linears(self.model, when=len(images) > 1 and self.device.type == "cpu"):
            return self.score(images, self._encoded).float()

    def to(self, device: torch.device | str) -> Self:
        """Moves the reward, as `Module.to`; its dtype stays."""
        device = default_device(device)
        if device != self.device:
            self.model.to(device)
            self.device, self._prompt, self._encoded = device, None, None
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


def local_copy(name: str, source: str | os.PathLike, patterns: Sequence[str], needs: Sequence[str]) -> Path:
    """The folder `source`; a Hub id ("owner/name") is downloaded first, only the files of `patterns`.

    needs: files of which it must have one.
    Honours HF_HUB_OFFLINE. Raises FileNotFoundError for what is neither here nor on the Hub.
    """
    lacking = f"reward {name!r} needs {' or '.join(needs)}"
    advice = f'pass a complete local copy: load_reward({name!r}, weights="folder")'
    folder = Path(source).expanduser()
    if not folder.exists():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
            raise FileNotFoundError(f"{lacking}: {source} is no file or folder, nor a Hub id")
        import huggingface_hub

        advice = (
            f"where there is a network, and HF_HUB_OFFLINE is not set, run `hf download {source}` once, or {advice}"
        )
        try:
            folder = Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns)))
        except OSError as error:  # the hub's own errors (offline, no network, unknown or gated) are all OSErrors
            raise FileNotFoundError(
                f"{lacking}: {source} is neither a local folder, nor in the Hugging Face cache, nor to be downloaded "
                f"now; {advice}"
            ) from error
    if not any((folder / file).is_file() for file in needs):  # offline, the hub gives a cached folder as it is
        raise FileNotFoundError(f"{lacking}: {folder} has none; {advice}")
    return folder


def modelscope_folder(folder: str) -> Path:
    """Where diffsynth keeps, or would keep, the folder of DiffSynth-Studio/ImageMetrics."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH", "models"), "DiffSynth-Studio", "ImageMetrics", folder)


def modelscope_copy(name: str, folder: str | None) -> Path:
    """The local folder of the copy of a reward that `diffsynth.metrics` uses, downloaded if needed.

    diffsynth's own settings (DIFFSYNTH_MODEL_BASE_PATH, DIFFSYNTH_SKIP_DOWNLOAD and so on) hold.
    """
    if folder is None:
        raise ValueError(f"reward {name!r} has no copy on ModelScope")
    path, failure = modelscope_folder(folder), None
    if not (path / "model.safetensors").is_file():  # diffsynth asks the network even for files that are here
        require("diffsynth")
        from diffsynth.core import ModelConfig

        try:
            ModelConfig(
                model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern=f"{folder}/"
            ).download_if_necessary()
        except OSError as error:  # modelscope's own, of the network and of the hub
            failure = error
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"reward {name!r} needs {path}/model.safetensors, which cannot be downloaded now; load it once where "
                "there is a network, and DIFFSYNTH_SKIP_DOWNLOAD is not set, or pass a local copy of the folder "
                f'{folder} of DiffSynth-Studio/ImageMetrics: load_reward({name!r}, weights="folder")'
            ) from failure
    return path


@contextmanager
def reading(name: str, file: Path, ids: dict[str, str]) -> Iterator[None]:
    """Makes of every error inside one ValueError (OSError of an OSError) that says which files to replace, and how.

    Each format has errors of its own: safetensors' name no file, torch's advise to run the code in a broken one.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        unsafe = "weights_only" in str(error)
        reason = f"{type(error).__name__}: {'not tensors alone' if unsafe else str(error).strip()[:300]}"
        fetch = (
            f"`hf download {ids['weights']} --force-download` replaces the published copy in the Hugging Face cache"
            if "weights" in ids
            else f"delete {modelscope_folder(ids['modelscope'])} to have the published copy downloaded again"
        )
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"reward {name!r}: {file}, or a file beside it, is missing, broken or of another model ({reason}); "
            f'{fetch}, load_reward({name!r}, weights="folder") takes a local one'
        ) from (None if unsafe else error)
