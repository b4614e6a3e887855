"""LAION's aesthetic predictor v2: how good an image looks, whatever the prompt.

CLIP ViT-L-14's image embedding, normalised, through five linear layers: what diffsynth's `AestheticMetric`
computes, in transformers' own class, whose names are those of the published file.
"""

import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import ops
from .base import Reward
from .checkpoint import Checkpoint, require
from .clip import PROCESSOR_FILES, WEIGHT_FILES, read_preprocessing

VIT_L_14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


class AestheticReward(Reward):
    """`reward(images, prompt)`: about 1 to 10, [n] fp32, whatever the prompt; see `Reward.__call__`."""

    def __init__(
        self,
        model: Any,  # CLIPVisionModelWithProjection
        head: nn.Module,  # [n, E] -> [n, 1]; kept in fp32
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **preprocessing: Any,
    ):
        super().__init__(model, device, dtype)
        self.model.head = head.to(self.device, torch.float32).eval().requires_grad_(False)
        self.preprocessing = {"size": model.config.image_size} | preprocessing

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        folder = checkpoint.folder(WEIGHT_FILES + PROCESSOR_FILES, ["model.safetensors"])
        with checkpoint.reading(folder / "model.safetensors"):
            return cls.from_folder(folder, device="cpu", dtype=dtype)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """From `model.safetensors` (and `config.json`, where it is not a ViT-L-14).

        Raises OSError where there is none, ValueError for weights that do not fill the model.
        """
        require("transformers", "safetensors")
        from safetensors.torch import load_file
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        folder = Path(folder)
        config = folder / "config.json"
        model, info = cast(Any, CLIPVisionModelWithProjection).from_pretrained(
            folder,
            config=CLIPVisionConfig.from_pretrained(folder) if config.is_file() else CLIPVisionConfig(**VIT_L_14),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        state = load_file(folder / "model.safetensors")
        layers = {key.removeprefix("layers."): value for key, value in state.items() if key.startswith("layers.")}
        head = predictor(model.config.projection_dim)
        if missing := sorted(info["missing_keys"]) + sorted(head.state_dict().keys() - layers):
            raise ValueError(f"the weights in {folder} lack {missing}")
        head.load_state_dict(layers)
        return cls(model, head, device=device, dtype=dtype, **read_preprocessing(folder))

    def encode(self, prompt: str) -> None:
        return None

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: None,
    ) -> Tensor:  # [n] fp32
        pixels = ops.resize_normalize(images, "crop", dtype=self.dtype, **self.preprocessing).to(self.device)
        features = self.model(pixel_values=pixels).image_embeds.float()
        return self.model.head(normalize(features, dim=-1)).squeeze(-1)


def predictor(size: int) -> nn.Sequential:
    """LAION's head, numbered as in the published file: between the layers stand dropouts, no activations."""
    sizes = {0: (size, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    return nn.Sequential(*(nn.Linear(*sizes[i]) if i in sizes else nn.Identity() for i in range(8)))
