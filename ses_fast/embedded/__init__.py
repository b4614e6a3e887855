"""A small trained text-to-image model with its rewards and its oracle, so that everything here runs on a bare machine.

See README.md beside this file for its world, and for what was measured of it.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks import check_dtype, check_truths

if TYPE_CHECKING:
    from .pipeline import EmbeddedPipeline

__all__ = ["captions", "judge", "load_pipeline", "load_reward"]

WEIGHTS = Path(__file__).parent / "weights"


def weights_digest() -> str:
    """Twelve digits by which a figure says which weights it is of: they are trained anew now and then."""
    digest = hashlib.sha256()
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def captions(heldout: bool = True) -> list[str]:
    """The 200 captions never trained on, or the 16,882 that were; always in the same order.

    Raises ValueError for another `heldout` than True and False.
    """
    from .world import split_scenes

    check_truths(heldout=heldout)
    train, held_out = split_scenes()
    return [str(scene) for scene in (held_out if heldout else train)]


def judge(image: Any, caption: str) -> dict[str, bool]:
    """The oracle: which facts of `caption` hold in `image`, and "all".

    image: a PIL image, or a (3, H, W) or (1, 3, H, W) tensor in [-1, 1] (values outside are clamped).
    Raises ValueError when the caption is not of this world or the image is neither; ImportError, naming the extra,
    without numpy and scipy.
    """
    from .world import judge as read

    return read(image, caption)


def load_pipeline(device: torch.device | str = "cpu", torch_dtype: torch.dtype = torch.float32) -> "EmbeddedPipeline":
    """The trained `ZImagePipeline`, ready for `ses_fast.enable`. It draws 256x256 when no size is named; 128x128 was
    trained too. Raises ValueError for a device that is not here and for another dtype than the ops compute in;
    ImportError, naming the extra, where diffsynth is missing.
    """
    from ..rewards.base import default_device
    from .pipeline import load

    default_device("cpu" if device is None else device)
    check_dtype(torch_dtype)
    return load(WEIGHTS, device, torch_dtype)


def load_reward(
    name: str = "clip", heldout: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A reward to search with: callable(images, prompt) -> scores.

    name: "clip", how well the image fits its caption; `heldout`, one trained on other pictures from another seed, to
        judge with. Or "jpeg", minus the image's size as a JPEG in kilobytes: it knows no caption and has no ceiling.
    device, dtype: of "clip".

    Raises ValueError for another name, for heldout=True with "jpeg", and for what is no `heldout`, device or dtype;
    ImportError, naming the extra, where a package is missing.
    """
    check_truths(heldout=heldout)
    if isinstance(name, str) and name == "jpeg":
        if heldout:
            raise ValueError('the reward "jpeg" is not trained: there is no held-out one')
        from .jpeg import JPEGReward

        return JPEGReward()
    if not isinstance(name, str) or name != "clip":
        raise ValueError(f"the embedded model's rewards are 'clip' and 'jpeg', got {name!r:.200}")
    from ..rewards import load_reward as load

    return load("clip", WEIGHTS / ("heldout" if heldout else "reward"), device=device, dtype=dtype)
