"""DiffSynth's real `ZImagePipeline`, holding the embedded parts."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._torchvision import mend_torchvision
from ..errors import missing_extra

mend_torchvision()
try:
    from diffsynth.pipelines.z_image import ZImagePipeline
    from safetensors.torch import load_file
except ModuleNotFoundError as error:
    raise missing_extra("diffsynth", "embedded") from error

from . import models, world  # noqa: E402  (after the mend)

SIZE = 128


class EmbeddedPipeline(ZImagePipeline):
    """`ZImagePipeline` whose call draws SIZE x SIZE pixels, a size the model was trained on, when none is named."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `ZImagePipeline.__call__`, but for the default height and width. Warns of words it has never seen."""
        call = inspect.signature(super().__call__).bind(*args, **kwargs)
        call.arguments = {"height": SIZE, "width": SIZE} | call.arguments
        prompt, known = call.arguments.get("prompt", ""), world.vocabulary()
        unknown = [word for word in prompt.split() if word not in known] if isinstance(prompt, str) else []
        if unknown:
            warnings.warn(
                f"the embedded model knows captions such as 'two red squares left of three blue rings' alone; "
                f"it reads nothing in {', '.join(map(repr, unknown))}",
                stacklevel=2,
            )
        return super().__call__(*call.args, **call.kwargs)


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
