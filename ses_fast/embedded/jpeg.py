"""Compressibility as a reward, as in DDPO (arXiv 2305.13301): how small a JPEG becomes. It has no ceiling near by."""

import io

import torch
from torch import Tensor

from ..errors import missing_extra

QUALITY = 95


class JPEGReward:
    """Minus the kilobytes (of 1,000 bytes) of each image as Pillow's JPEG at quality 95; no prompt changes it.

    Exact: the pixels are quantised as DiffSynth does it for the final image, so a preview with as many steps has the
    score of the picture that the pipeline returns.
    """

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]; values outside are clamped
        prompt: str = "",
    ) -> Tensor:  # [n] fp32
        """Raises ValueError for other shapes; ImportError, naming the extra, without Pillow."""
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise missing_extra("pillow", "embedded") from error
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (n, 3, H, W), got {tuple(images.shape)}")
        pixels = ((images.detach().float() + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
        sizes = []
        for picture in pixels.numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
            sizes.append(-file.tell() / 1000)
        return torch.tensor(sizes, device=images.device)
