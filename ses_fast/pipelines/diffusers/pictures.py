"""Images of diffusers as a reward takes them: at the 256 levels that the library's own pictures have.

diffusers rounds to 8 bits, and rewards truncate as DiffSynth does. So the rounding is done here, by the library's own
operations on its own numbers, and what a reward is given is at whole levels whichever way it takes them.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...rewards.pil import of_levels


def at_levels(
    images: Tensor,  # [..., 3, H, W] in [0, 1], as output_type="pt" gives them
) -> Tensor:  # [..., 3, H, W] fp32 in [-1, 1]
    """Images whose 8 bits are the picture that diffusers saves, exactly, in whatever dtype it decoded."""
    return of_levels((images.float() * 255).round())  # as VaeImageProcessor.pt_to_numpy and numpy_to_pil


def middle_frame(
    frames: Tensor,  # [n, F, 3, H, W]
) -> Tensor:  # [n, 3, H, W]
    """What a reward of images sees of a video."""
    return frames[:, frames.shape[1] // 2]


def of_output(output: Any, device: torch.device) -> Tensor:  # [1, 3, H, W] in [-1, 1]
    """The image, or a video's middle frame, of what a pipeline's call returned, whatever its `output_type`."""
    images = output[0]
    if isinstance(images, Tensor):
        made = images
    elif isinstance(images, np.ndarray):
        made = torch.from_numpy(images).movedim(-1, -3)
    else:
        pictures = images[0] if isinstance(images[0], list) else images
        made = torch.stack([torch.from_numpy(np.array(each.convert("RGB"))) for each in pictures]).movedim(-1, -3) / 255
        made = made[None] if isinstance(images[0], list) else made
    return at_levels(middle_frame(made) if made.ndim == 5 else made).to(device)
