"""FLUX.1: how several candidates go through the DiT at once, and what only the final image may have."""

import copy
import inspect
from typing import Any

from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.pipelines.flux_image import model_fn_flux_image
from torch import Tensor

from .unit import SESUnit


class Flux(SESUnit, PipelineUnit):
    """The search's unit for `FluxImagePipeline`."""

    model_fn = staticmethod(model_fn_flux_image)
    takes = frozenset(inspect.signature(model_fn_flux_image).parameters)
    text = ("prompt_emb", "pooled_prompt_emb")
    together = frozenset(
        {"latents", "text_ids", "image_ids", "guidance", *text}
        | {"num_inference_steps", "tile_size", "tile_stride", "infinityou_guidance"}  # always there, used with others
    )
    refused = {
        "insert_anything_source_image": "its image is pasted back after the decoding, so a preview would not show it",
    }

    def for_previews(self, shared: dict[str, Any]) -> dict[str, Any]:
        return shared | {"tea_cache": None}  # it counts the steps of one image, and skips some

    def begun(self, shared: dict[str, Any]) -> dict[str, Any]:
        return shared | {"tea_cache": copy.deepcopy(shared.get("tea_cache"))}

    def forward_together(
        self,
        prompt_emb: Tensor,  # [1 or 2, L, E]
        **inputs: Any,
    ) -> Tensor:
        # The rest is [1, ...] or, of CFG's two sides, [2, ...].
        n = len(inputs["latents"])
        inputs["pooled_prompt_emb"] = _rows(inputs["pooled_prompt_emb"], n)
        return model_fn_flux_image(prompt_emb=_rows(prompt_emb, n), **inputs)

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, 16, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        tiles = {name: shared[name] for name in ("tiled", "tile_size", "tile_stride")}
        return pipe.vae_decoder(latents, device=pipe.device, **tiles)


def _rows(
    text: Tensor,  # [1 or 2, ...]
    n: int,
) -> Tensor:  # [n, ...]
    return text.repeat_interleave(n // len(text), dim=0)
