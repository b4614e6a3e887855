"""Qwen-Image: how several candidates go through the DiT at once; its own model_fn has one image written into it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffsynth.diffusion.base_pipeline import PipelineUnit  # noqa: E402
from diffsynth.pipelines.qwen_image import model_fn_qwen_image  # noqa: E402

from .base import SESUnit  # noqa: E402


def forward_together(
    dit: Any,
    latents: Tensor,  # [n, 16, h, w], candidates for one prompt; with CFG's two sides first its, then the negative's
    timestep: Tensor,  # [1], 1000 is noise
    prompt_emb: Tensor,  # [1 or 2, L, E]
    prompt_emb_mask: Tensor,  # [1 or 2, L]
    **others: Any,
) -> Tensor:  # [n, 16, h, w], the velocity
    """What `pipe.model_fn` predicts for each candidate alone, through the same blocks."""
    n, _, height, width = latents.shape
    shape = (1, height // 2, width // 2)  # in patches of 2 x 2
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [n, 16, h/2, 2, w/2, 2]
    image = dit.img_in(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # [n, S, D]
    kind = torch.zeros(1, dtype=torch.long, device=image.device) if dit.time_text_embed.use_additional_t_cond else None
    modulation = dit.time_text_embed(timestep / 1000, image.dtype, addition_t_cond=kind)  # [1, D]
    text = dit.txt_in(dit.txt_norm(prompt_emb)).repeat_interleave(n // len(prompt_emb), dim=0)  # [n, L, D]
    positions = dit.pos_embed([shape], prompt_emb_mask.sum(dim=1).tolist(), device=latents.device)
    for block in dit.transformer_blocks:
        text, image = block(image=image, text=text, temb=modulation, image_rotary_emb=positions)
    image = dit.proj_out(dit.norm_out(image, modulation))  # [n, S, 64]
    patches = image.unflatten(2, (-1, 2, 2)).unflatten(1, shape[1:])  # [n, h/2, w/2, 16, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class QwenImage(SESUnit, PipelineUnit):
    """The search's unit for `QwenImagePipeline`."""

    decoder = "vae"
    forward_together = staticmethod(forward_together)
    model_fn = staticmethod(model_fn_qwen_image)
    takes = frozenset(inspect.signature(model_fn_qwen_image).parameters)
    text = ("prompt_emb", "prompt_emb_mask")
    together = frozenset({"latents", "height", "width", "num_inference_steps", *text})
    refused = {"layer_num": "it makes several images of one noise, and a search scores one"}

    @staticmethod
    def grows_with_prompt(block_inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor | None, int]]:
        _, positions = block_inputs.get("image_rotary_emb") or (None, None)  # of the image, of the prompt
        mask = block_inputs.get("attention_mask")  # [1, 1, L + S, L + S]
        return [(block_inputs.get("text"), 1), (positions, 0), (mask, 2), (mask, 3)]

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, 16, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        tiles = {name: shared[name] for name in ("tiled", "tile_size", "tile_stride")}
        return pipe.vae.decode(latents, device=pipe.device, **tiles)
