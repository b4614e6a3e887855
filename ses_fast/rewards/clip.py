"""PickScore and CLIP: transformers' CLIPModel, scored as their authors score it, in one batch on the device.

score = exp(logit_scale) * cosine(image, prompt), which is `logits_per_image` of
`CLIPModel(**CLIPProcessor(images=..., text=...))` with the PIL image processor.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .. import ops
from .base import Reward, dropped_by
from .checkpoint import Checkpoint, require

# For weights without a config: PickScore and LAION's CLIP are ViT-H-14 with gelu, not OpenAI's quick_gelu.
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
PROCESSOR_FILES = ("*.json", "*.txt")
WEIGHT_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")


class CLIPReward(Reward):
    """`reward(images, prompt)`: exp(logit_scale) * cosine, [n] fp32; see `Reward.__call__`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **preprocessing: Any,
    ):
        # Read before the cast: in bf16 a scale of 100 is 98.9.
        self.scale = math.exp(model.logit_scale.item())
        super().__init__(model, device, dtype)
        self.tokenizer = tokenizer
        self.preprocessing = {"size": model.config.vision_config.image_size} | preprocessing

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        folder = checkpoint.folder(
            WEIGHT_FILES + PROCESSOR_FILES, ("model.safetensors", "model.safetensors.index.json")
        )
        # The published weights take their authors' processor; so do others that come without a tokenizer.
        published = checkpoint.weights == checkpoint.ids["weights"]
        own = not published and any((folder / file).is_file() for file in TOKENIZERS)
        processor = folder if own else checkpoint.folder(PROCESSOR_FILES, TOKENIZERS, checkpoint.ids["processor"])
        with checkpoint.reading(folder / "model.safetensors"):
            return cls.from_folder(folder, processor, device="cpu", dtype=dtype)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        processor: str | os.PathLike | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """From a folder as `CLIPModel.save_pretrained` writes it.

        processor: the folder of the tokenizer and, where it has one, the image processor (None: the same).
        A folder without `config.json` is taken for a ViT-H-14.
        Raises OSError for a missing file, ValueError for weights that do not fill the model.
        """
        require("transformers")
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder = Path(folder)
        processor = Path(processor or folder)
        config = folder / "config.json"
        model, info = cast(Any, CLIPModel).from_pretrained(
            folder,
            config=CLIPConfig.from_pretrained(folder) if config.is_file() else CLIPConfig(**VIT_H_14),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:  # transformers would fill them with random numbers and only log it
            raise ValueError(f"the weights in {folder} lack {sorted(info['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(processor, local_files_only=True, trust_remote_code=False)
        return cls(model, tokenizer, device=device, dtype=dtype, **read_preprocessing(processor))

    def encode(self, prompt: str) -> Tensor:  # [1, E] fp32
        tokens = self.tokenizer(prompt, truncation=True, max_length=self._limit, return_tensors="pt")
        text = self.model.get_text_features(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        )
        return text.pooler_output.float()

    def dropped(self, prompt: str) -> tuple[int, int, str]:
        return dropped_by(self.tokenizer, prompt, self._limit)

    @property
    def _limit(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: Tensor,  # [1, E] fp32
    ) -> Tensor:  # [n] fp32
        pixels = ops.resize_normalize(images, "crop", dtype=self.dtype, **self.preprocessing)
        features = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output.float()
        return self.scale * cosine_similarity(features, encoded)


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """size, mean and std of `ops.resize_normalize` from a folder's image processor; {} where it has none.

    Raises ValueError for a processor that does anything else than resize (bicubic), crop, normalise.
    """
    settings: dict[str, Any] = {}
    if (file := folder / "preprocessor_config.json").is_file():
        settings = json.loads(file.read_text())
    elif (file := folder / "processor_config.json").is_file():  # transformers 5 nests it here
        settings = json.loads(file.read_text()).get("image_processor", {})
    if not settings:
        return {}
    size, crop = settings.get("size", 224), settings.get("crop_size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if (
        crop != {"height": size, "width": size}
        or settings.get("resample", 3) != 3
        or not all(settings.get(step, True) for step in steps)
        or not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255)
    ):
        raise ValueError(f"{file} asks for another preprocessing than CLIP's: resize, crop, normalise")
    known = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    return {"size": size} | {key: tuple(value) for key, value in known.items() if value}
