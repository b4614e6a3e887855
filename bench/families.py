"""The image families at their published sizes, as data: built with random weights, on any device, `meta` too.

The weights decide no time. Text encoders are left out: a prompt is encoded once a search, and its place is taken by
embeddings of the same shape.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.clip import filled
from ses_fast._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffsynth.core.vram.initialization import skip_model_initialization  # noqa: E402
from diffsynth.diffusion.base_pipeline import PipelineUnit  # noqa: E402


@dataclass(frozen=True)
class Family:
    """One published model. Sizes that are not named are the defaults of diffsynth's classes."""

    pipeline: str  # module:class, as for all classes here, within diffsynth
    models: dict[str, tuple[str, dict[str, Any]]]  # the pipeline's attribute -> class and arguments
    prompt: dict[str, tuple[int, ...]]  # what the prompt's units make, and its shapes
    call: dict[str, Any]  # the pipeline's own defaults, said aloud
    constant: dict[str, int] = field(default_factory=dict)  # of `prompt`: masks and positions, and their one value
    listed: bool = False  # each of `prompt` comes in a list


_FLUX_DECODER: tuple[str, dict[str, Any]] = ("models.flux_vae:FluxVAEDecoder", {})
_Z_DECODER: tuple[str, dict[str, Any]] = ("models.flux_vae:FluxVAEDecoder", {"use_conv_attention": False})
_KLEIN = {"guidance_embeds": False, "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5}
_TEXT = 128  # tokens of a long prompt, where the model pads no further


def _z_image(**call: Any) -> Family:
    return Family(
        "pipelines.z_image:ZImagePipeline",
        {"dit": ("models.z_image_dit:ZImageDiT", {}), "vae_decoder": _Z_DECODER},
        {"prompt_embeds": (_TEXT, 2560)},
        {"height": 1024, "width": 1024, **call},
        listed=True,
    )


def _flux2(text: int, dit: dict[str, Any], **call: Any) -> Family:
    return Family(
        "pipelines.flux2_image:Flux2ImagePipeline",
        {"dit": ("models.flux2_dit:Flux2DiT", dit), "vae": ("models.flux2_vae:Flux2VAE", {})},
        {"prompt_embeds": (1, 512, text), "text_ids": (1, 512, 4)},
        {"height": 1024, "width": 1024, **call},
        constant={"text_ids": 0},
    )


FAMILIES = {
    "z-image-turbo": _z_image(num_inference_steps=8),
    "z-image": _z_image(num_inference_steps=30, cfg_scale=4.0),
    "flux.1-dev": Family(
        "pipelines.flux_image:FluxImagePipeline",
        {"dit": ("models.flux_dit:FluxDiT", {}), "vae_decoder": _FLUX_DECODER},
        {"prompt_emb": (1, 512, 4096), "pooled_prompt_emb": (1, 768), "text_ids": (1, 512, 3)},
        {"height": 1024, "width": 1024, "num_inference_steps": 30},
        constant={"text_ids": 0},
    ),
    "qwen-image": Family(
        "pipelines.qwen_image:QwenImagePipeline",
        {"dit": ("models.qwen_image_dit:QwenImageDiT", {}), "vae": ("models.qwen_image_vae:QwenImageVAE", {})},
        {"prompt_emb": (1, _TEXT, 3584), "prompt_emb_mask": (1, _TEXT)},
        {"height": 1328, "width": 1328, "num_inference_steps": 30, "cfg_scale": 4.0},
        constant={"prompt_emb_mask": 1},
    ),
    "flux.2-dev": _flux2(15360, {}, num_inference_steps=30),
    "flux.2-klein-4b": _flux2(7680, {**_KLEIN, "num_single_layers": 20}, num_inference_steps=4),
}


def build(family: Family, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """The family's stock pipeline, ready for a call with any prompt; on `meta`, to be counted."""
    pipe = find(family.pipeline)(device=device, torch_dtype=dtype)
    for name, (cls, arguments) in family.models.items():
        with skip_model_initialization():  # the weights on no device yet
            model = find(cls)(**arguments)
        setattr(pipe, name, filled(model, device, dtype, seed))
    prompt: dict[str, Any] = {}
    for name, shape in family.prompt.items():
        if name in family.constant:
            prompt[name] = torch.full(shape, family.constant[name], device="cpu" if name.endswith("mask") else device)
        else:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
            prompt[name] = [noise] if family.listed else noise
    pipe.units = [unit for unit in pipe.units if "PromptEmbedder" not in type(unit).__name__]
    pipe.units.insert(1, GivenPrompt(prompt))
    return pipe


class GivenPrompt(PipelineUnit):
    """Stands where a prompt is encoded, and gives the same embeddings for each."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        super().__init__(seperate_cfg=True, input_params_posi={"prompt": "prompt"}, output_params=tuple(prompt))
        self.input_params_nega = {"prompt": "negative_prompt"}
        self.prompt = prompt

    def process(self, pipe: Any, prompt: str) -> dict[str, Tensor]:
        return dict(self.prompt)


def find(name: str) -> type:
    module, _, cls = name.partition(":")
    return getattr(import_module(f"diffsynth.{module}"), cls)
