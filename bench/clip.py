"""CLIP as its users have it, with random weights: model, tokenizer, the processor that goes through PIL, and the score.

Needs transformers, not diffsynth.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ses_fast._torchvision import declare_torchvision_ops
from ses_fast.rewards.clip import VIT_H_14

declare_torchvision_ops()

import transformers  # noqa: E402


def clip_h(device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """transformers' CLIPModel at the size of PickScore and LAION's CLIP, ViT-H-14, with random weights."""
    with torch.device(device):
        model = transformers.CLIPModel(transformers.CLIPConfig(**VIT_H_14))
    return filled(model, device, dtype, seed)


def filled(model: nn.Module, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model with random weights that keep the size of what goes through, made on the device; `meta` too."""
    generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if parameter.ndim > 1:
            value.normal_(0, max(1, parameter[0].numel()) ** -0.5, generator=generator)
        elif name == "logit_scale":
            value.fill_(math.log(100))
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)
    return model.to(device).eval()


def clip_tokenizer() -> Any:
    """CLIP's tokenizer over bytes, without merges: any text, no download."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[])


# transformers 5.4 gave the name of the processor that goes through PIL to torchvision's.
PILProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


class CLIPScore:
    """PickScore and CLIP: exp(logit_scale) * cosine, of transformers' CLIPModel on the PIL image processor's pixels."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, prompt: str) -> None:
        """tokenizer and image_processor: what CLIPProcessor puts together. The prompt is encoded once."""
        self.model = model
        self.processor = transformers.CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
        tokens = self.processor(
            text=prompt,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            self.text = unit(model.get_text_features(**tokens).pooler_output.float())
        self.scale = model.logit_scale.float().exp().item()

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> float:
        pixels = self.processor(images=image, return_tensors="pt").pixel_values
        features = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return (self.scale * unit(features.pooler_output.float()) @ self.text.T).item()


def unit(features: Tensor) -> Tensor:
    """Each row of length 1."""
    return features / features.norm(dim=-1, keepdim=True)


# Scores are 40 to 100 times a cosine. A candidate that differs by the last bits moves a few of the image's pixels by
# one grey level; in bf16 the models' own rounding is larger: see IMAGES_APART in end_to_end.
SCORES_APART = {torch.float32: 0.01, torch.bfloat16: 2.0}


def check_scores(ours: list[float], theirs: list[float], dtype: torch.dtype, what: str) -> float:
    """The largest difference of two lists of scores.

    Raises AssertionError where it is beyond rounding, or not small beside how far the scores themselves are apart:
    scores that are all alike say nothing of the images.
    """
    assert len(ours) == len(theirs), f"{what}: {len(ours)} scores against {len(theirs)}"
    found, stock = torch.tensor(ours), torch.tensor(theirs)
    largest, spread = (found - stock).abs().max().item(), (stock.max() - stock.min()).item()
    rounding = torch.finfo(dtype).eps * stock.abs().max().item()
    assert spread > 4 * rounding, f"{what}: scores spread by {spread}, no more than rounding: they tell nothing apart"
    limit = min(SCORES_APART[dtype], spread / 4)
    # Not `largest > limit`: no comparison holds for a NaN.
    assert largest <= limit, f"{what}: scores differ by {largest}, more than {limit} (they spread by {spread})"
    return largest
