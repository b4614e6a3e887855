"""DiffSynth's real `ZImagePipeline`, holding the embedded parts."""

import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._torchvision import declare_torchvision_ops
from ..errors import missing_extra

declare_torchvision_ops()
try:
    from diffsynth.pipelines.z_image import ZImagePipeline
    from safetensors.torch import load_file
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "diffsynth", "embedded") from error

from . import models, world  # noqa: E402  (after the declaration)

SIZE = 256  # and 128, for previews of half the size
LARGEST = 1024  # the positions that the denoiser knows, in pixels
MOST_WORDS = 200  # and in words; it was trained on captions of a dozen


class EmbeddedPipeline(ZImagePipeline):
    """`ZImagePipeline` whose call draws SIZE x SIZE pixels, a size the model was trained on, when none is named."""

    @functools.wraps(ZImagePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `ZImagePipeline.__call__`, but for the default height, width and sigma_shift (`models.sigma_shift` of the
        size). Warns of words it has never seen.

        Raises ValueError above LARGEST pixels or MOST_WORDS words.
        """
        call = inspect.signature(super().__call__).bind(*args, **kwargs)
        call.arguments = {"height": SIZE, "width": SIZE} | call.arguments
        check_size(call.arguments["height"], call.arguments["width"])
        if call.arguments.get("sigma_shift") is None:
            call.arguments["sigma_shift"] = models.sigma_shift(call.arguments["height"], call.arguments["width"])
        for text in (call.arguments.get("prompt"), call.arguments.get("negative_prompt")):
            if isinstance(text, str):
                check_words(text)
        prompt, known = call.arguments.get("prompt", ""), world.vocabulary()
        unknown = [word for word in prompt.split() if word not in known] if isinstance(prompt, str) else []
        if unknown:
            warnings.warn(
                f"the embedded model knows captions such as 'two red squares left of three blue rings' alone; "
                f"it reads nothing in {', '.join(map(repr, unknown))}",
                stacklevel=2,
            )
        return super().__call__(*call.args, **call.kwargs)


def check_words(text: str) -> None:
    """Raises ValueError for a prompt of more than MOST_WORDS words."""
    if (count := len(text.split())) > MOST_WORDS:
        raise ValueError(f"the embedded model reads up to {MOST_WORDS} words, got {count}")


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a size that the model cannot draw."""
    if max(height, width) > LARGEST:
        raise ValueError(
            f"the embedded model draws up to {LARGEST}x{LARGEST} pixels, and was trained on 256x256 and 128x128; "
            f"got {height}x{width}"
        )


def load(weights: Path, device: torch.device | str, torch_dtype: torch.dtype) -> EmbeddedPipeline:
    """The pipeline with its parts read from `weights`."""
    pipe = EmbeddedPipeline(device=device, torch_dtype=torch_dtype)
    with torch.random.fork_rng(devices=[]):  # initial weights, thrown away, are no reason to move the user's state
        parts = {
            "text_encoder": models.TextEncoder(),
            "dit": models.build_dit(),
            "vae_encoder": models.Encoder(),
            "vae_decoder": models.Decoder(),
        }
    for name, part in parts.items():
        setattr(pipe, name, _restore(part, weights / f"{name}.safetensors").to(device, torch_dtype))
    pipe.tokenizer = models.build_tokenizer()
    return pipe


def _restore(part: nn.Module, path: Path) -> nn.Module:
    part.load_state_dict(load_file(path))  # copied into fp32: the files are fp16 to be small
    return part.eval().requires_grad_(False)
