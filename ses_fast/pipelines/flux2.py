"""FLUX.2, dev and klein: how its packed latents are searched, and several of them go through the DiT at once."""

import inspect
from typing import Any

from torch import Tensor

from .._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffsynth.diffusion.base_pipeline import PipelineUnit  # noqa: E402
from diffsynth.pipelines.flux2_image import model_fn_flux2  # noqa: E402

from .base import SESUnit  # noqa: E402


class Flux2(SESUnit, PipelineUnit):
    """The search's unit for `Flux2ImagePipeline`."""

    decoder = "vae"
    model_fn = staticmethod(model_fn_flux2)
    takes = frozenset(inspect.signature(model_fn_flux2).parameters)
    text = ("prompt_embeds",)
    together = frozenset({"latents", "embedded_guidance", "text_ids", "image_ids", *text})

    def unpack(
        self,
        noise: Tensor,  # [1, h*w, 128]
        shared: dict[str, Any],
    ) -> Tensor:  # [1, 128, h, w]
        return noise.transpose(1, 2).unflatten(2, (shared["height"] // 16, shared["width"] // 16))

    def pack(
        self,
        noises: Tensor,  # [n, 128, h, w]
    ) -> Tensor:  # [n, h*w, 128], a view as the pipeline's own noise is: its strides have a part in the rounding
        return noises.flatten(2).transpose(1, 2)

    def forward_together(
        self,
        prompt_embeds: Tensor,  # [1, L, E], or CFG's two sides
        **inputs: Any,
    ) -> Tensor:
        rows = len(inputs["latents"]) // len(prompt_embeds)
        return model_fn_flux2(prompt_embeds=prompt_embeds.repeat_interleave(rows, dim=0), **inputs)

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, h*w, 128]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        return pipe.vae.decode(self.unpack(latents, shared))
