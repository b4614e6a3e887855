"""HPSv2 and HPSv2.1: open_clip's ViT-H-14 with the authors' weights; the cosine; images padded, not cropped.

What `hpsv2.img_score.score` computes with the same checkpoint, for a whole batch and without PIL.
"""

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .. import ops
from .base import Reward
from .checkpoint import Checkpoint, require


class HPSReward(Reward):
    """`reward(images, prompt)`: the cosine, [n] fp32; see `Reward.__call__`."""

    def __init__(
        self,
        model: Any,  # open_clip's CLIP
        tokenizer: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, device, dtype)
        self.tokenizer = tokenizer
        self.size = model.visual.image_size[0]

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        file = Path(checkpoint.weights)
        if not file.is_file():
            names = (checkpoint.ids["file"], "model.safetensors")
            folder = checkpoint.folder(names, names)
            file = next(folder / each for each in names if (folder / each).is_file())
        with checkpoint.reading(file):
            return cls.from_file(file, device="cpu", dtype=dtype)

    @classmethod
    def from_file(
        cls,
        file: str | os.PathLike,
        architecture: str = "ViT-H-14",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """From a checkpoint with open_clip's keys: .safetensors, or the authors' .pt (only tensors are read).

        Raises RuntimeError where there is none, and for weights that do not fit.
        """
        require("open_clip")
        import open_clip

        model = open_clip.create_model(architecture, pretrained=str(file), weights_only=True)
        return cls(model, open_clip.get_tokenizer(architecture), device=device, dtype=dtype)

    def encode(self, prompt: str) -> Tensor:  # [1, E] fp32
        return self.model.encode_text(self.tokenizer([prompt]).to(self.device)).float()

    def dropped(self, prompt: str) -> tuple[int, int, str]:
        tokens, limit = self.tokenizer.encode(prompt), self.tokenizer.context_length
        return len(tokens) + 2, limit, self.tokenizer.decode(tokens[limit - 2 :])  # 2: the start and the end

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: Tensor,  # [1, E] fp32
    ) -> Tensor:  # [n] fp32
        pixels = ops.resize_normalize(images, "pad", size=self.size, dtype=self.dtype)
        return cosine_similarity(self.model.encode_image(pixels.to(self.device)).float(), encoded)
