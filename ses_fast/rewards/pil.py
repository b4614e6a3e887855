"""Rewards that take PIL images, as most published scorers do."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_truths
from ..errors import missing_extra
from ..scores import as_scores
from .base import check_images

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PILReward:
    """What `from_pil` returns; two of one function are equal."""

    function: Callable[..., Any]
    batched: bool

    @property
    def name(self) -> str:
        """The function's own name, its class's where it has none."""
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        prompt: str,
    ) -> Tensor:  # [n] fp64, on the CPU
        """One score for each image. Raises ValueError for other images or scores, and whatever the function raises."""
        check_images(images, prompt)
        pictures = to_pil(images)
        if self.batched:
            return as_scores(self.function(pictures, prompt), len(pictures), f"reward {self.name!r}")
        return torch.cat([as_scores(self.function(each, prompt), 1, f"reward {self.name!r}") for each in pictures])


def from_pil(function: Callable[..., Any], batched: bool = True) -> PILReward:
    """A reward of `function`, which scores PIL images: `from_pil(score)` goes where a reward goes.

    function: called as function(pictures, prompt) with a list of n `PIL.Image.Image` (RGB); returns n numbers, a
        higher score is better. With batched=False it is called as function(picture, prompt) for one after the other
        and returns a number each.
    The pictures are those that DiffSynth's pipeline returns of the same images (`BasePipeline.vae_output_to_image`):
    cut to whole grey levels, not rounded, in the images' own dtype. Raises ImportError without Pillow.
    """
    if not callable(function):
        raise ValueError(f"from_pil takes a function of PIL images and a prompt, got {function!r}")
    if find_spec("PIL") is None:
        raise missing_extra("pillow", "rewards")
    check_truths(batched=batched)
    return PILReward(function, batched)


def to_pil(
    images: Tensor,  # [n, 3, H, W] in [-1, 1]
) -> "list[Image]":  # n, RGB, of W x H
    """The pictures as DiffSynth's pipeline makes them (`vae_output_to_image`): levels are cut, not rounded."""
    from PIL import Image

    levels = ((images.detach() + 1) * 127.5).clip(0, 255).to(device="cpu", dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in levels.permute(0, 2, 3, 1).contiguous()]


def of_pil(
    picture: "Image",
    device: torch.device | str = "cpu",
) -> Tensor:  # [1, 3, H, W] fp32 in [-1, 1]
    """An image whose `to_pil` is the picture; see `of_levels`."""
    import numpy as np

    levels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    return of_levels(levels.float()).to(device)


def of_levels(
    levels: Tensor,  # whole numbers 0 ... 255 in fp32
) -> Tensor:  # in [-1, 1]
    """An image that is, saved as a picture, at just these levels, whether they are cut to whole numbers or rounded.

    A quarter of a level up: far from where either rule takes another level, more than fp32 and fp16 are off by.
    """
    return ((levels + 0.25) / 127.5 - 1).clamp(max=1)
