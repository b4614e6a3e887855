"""A small random CLIPModel with its tokenizer and image processor, in a folder as a published one."""

import math
from pathlib import Path

import torch

from ses_fast._torchvision import declare_torchvision_ops

declare_torchvision_ops()

import transformers  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

# The processor that goes through PIL: transformers 5.4 gave its name to the torchvision one.
PILImageProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def byte_tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer over bytes, without merges: any text, no download."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def tiny_clip(image_size: int = 64, seed: int = 0, **text: int) -> transformers.CLIPModel:
    """Weights wide enough for images to differ by points; a logit scale of 100, as trained models have."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        projection_dim=48,
        logit_scale_init_value=math.log(100),
        text_config=tower | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513} | text,
        vision_config=tower | {"image_size": image_size, "patch_size": 16},
    )
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):  # the others are not drawn
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
    return model


def save_tiny_clip(folder: Path, image_size: int = 64, seed: int = 0, **text: int) -> Path:
    tiny_clip(image_size, seed, **text).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    PILImageProcessor(size={"shortest_edge": image_size}, crop_size=image_size).save_pretrained(folder)
    return folder
