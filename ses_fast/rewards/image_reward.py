"""ImageReward v1: BLIP's text encoder looks at the image, a small head scores. Runs diffsynth's model.

The authors' package, image-reward 1.5, cannot be imported beside transformers 5, which no longer has what it takes
from there ("cannot import name 'apply_chunking_to_forward' from 'transformers.modeling_utils'").
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor

from .. import ops
from .base import Reward, dropped_by
from .checkpoint import Checkpoint, require


class ImageRewardReward(Reward):
    """`reward(images, prompt)`: standardised over ImageReward's own data, [n] fp32; see `Reward.__call__`."""

    def __init__(
        self,
        model: Any,  # diffsynth's ImageRewardModel with its tokenizer
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        head = copy.deepcopy(model.mlp).float()  # it stays in fp32, and so do the mean and the deviation
        self.mean, self.std = model.score_mean.item(), model.score_std.item()
        super().__init__(model, device, dtype)
        self.model.mlp = head.to(self.device).requires_grad_(False).eval()

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        folder = checkpoint.folder(["*.json", "*.txt", "model.safetensors"], ["model.safetensors"])
        require("diffsynth", "transformers")
        from diffsynth.core import ModelConfig
        from diffsynth.metrics import ImageRewardMetric

        with checkpoint.reading(folder / "model.safetensors"):
            metric = ImageRewardMetric.from_pretrained(
                ModelConfig(path=str(folder / "model.safetensors")),
                ModelConfig(path=str(folder)),
                torch_dtype=torch.float32,
                device="cpu",
            )
            return cls(metric.model, device="cpu", dtype=dtype)

    def encode(self, prompt: str) -> Any:
        return self.model.tokenizer(
            [prompt],
            padding="max_length",
            truncation=True,
            max_length=self.model.max_length,
            return_tensors="pt",
        ).to(self.device)

    def dropped(self, prompt: str) -> tuple[int, int, str]:
        return dropped_by(self.model.tokenizer, prompt, self.model.max_length)

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: Any,
    ) -> Tensor:  # [n] fp32
        blip, n = self.model.blip, len(images)
        size = blip.config.vision_config.image_size
        # Its authors crop with torchvision.
        pixels = ops.resize_normalize(images, "crop", size=size, dtype=self.dtype, centre="round").to(self.device)
        patches = blip.vision_model(pixel_values=pixels).last_hidden_state  # [n, patches, d]
        text = blip.text_encoder(
            input_ids=encoded.input_ids.expand(n, -1),
            attention_mask=encoded.attention_mask.expand(n, -1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self.device),
        )
        return (self.model.mlp(text.last_hidden_state[:, 0].float()).squeeze(-1) - self.mean) / self.std
