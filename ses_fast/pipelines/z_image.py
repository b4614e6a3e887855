"""Z-Image and Z-Image-Turbo: how several candidates go through the DiT at once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffsynth.diffusion.base_pipeline import PipelineUnit  # noqa: E402
from diffsynth.pipelines.z_image import model_fn_z_image, model_fn_z_image_turbo  # noqa: E402

from .base import SESUnit  # noqa: E402


def forward_together(
    dit: Any,
    latents: Tensor,  # [n, C, h, w], candidates for one prompt
    timestep: Tensor,  # [1], 1000 is noise
    prompt_embeds: Any,  # [L, E], or a list that holds it
    **others: Any,
) -> Tensor:  # [n, C, h, w], the velocity
    """What `pipe.model_fn` predicts for each candidate alone; it would take a batch for frames of one video.

    The candidates share size and text: positions, padding and modulation are those of one.
    """
    while isinstance(prompt_embeds, list):
        prompt_embeds = prompt_embeds[0]
    n, channels = latents.shape[:2]
    (patches,), (text,), sequence = dit.patchify_and_embed(
        [latents.flatten(0, 1)[:, None]],  # [n * C, 1, h, w]: as one image, for it makes positions for each
        [prompt_embeds],
    )
    patches = patches.unflatten(1, (-1, n, channels)).permute(2, 0, 1, 3).flatten(2)  # [n, S, 4 * C]
    modulation = dit.t_embedder(1000 - timestep)  # [1, E]

    def positions_and_padding(kind: str) -> tuple[Tensor, Tensor]:
        # [1, S, E] to broadcast over the batch, and [S]
        return dit.rope_embedder(sequence[f"{kind}_pos_ids"][0])[None], sequence[f"{kind}_pad_mask"][0]

    positions, padding = positions_and_padding("x")
    image = dit.all_x_embedder["2-1"](patches)  # [n, S, E]
    image[:, padding] = dit.x_pad_token.to(image)
    for block in dit.noise_refiner:
        image = block(image, attn_mask=None, freqs_cis=positions, adaln_input=modulation)

    text_positions, padding = positions_and_padding("cap")
    text = dit.cap_embedder(text)  # [L, E]
    text[padding] = dit.cap_pad_token.to(text)
    text = text[None]  # [1, L, E]: no candidate has touched it yet
    for block in dit.context_refiner:
        text = block(text, attn_mask=None, freqs_cis=text_positions)

    tokens = torch.cat([image, text.expand(n, -1, -1)], dim=1)  # [n, S + L, E]
    positions = torch.cat([positions, text_positions], dim=1)
    for block in dit.layers:
        tokens = block(tokens, attn_mask=None, freqs_cis=positions, adaln_input=modulation)
    tokens = dit.all_final_layer["2-1"](tokens, modulation)
    frames = dit.unpatchify(list(tokens), sequence["x_size"] * n)  # n of [C, 1, h, w]; drops padding and text
    return -torch.cat(frames, dim=1).transpose(0, 1)


class ZImage(SESUnit, PipelineUnit):
    """The search's unit for `ZImagePipeline`."""

    forward_together = staticmethod(forward_together)
    model_fn = staticmethod(model_fn_z_image)
    takes = frozenset(inspect.signature(model_fn_z_image_turbo).parameters)  # model_fn hands it what it does not name
    together = frozenset({"latents", "prompt_embeds"})

    def model_fn_together(self, pipe: Any, inputs: dict[str, Any]) -> Callable[..., Tensor] | None:
        omni = pipe.dit.siglip_embedder is not None  # another forward
        return None if omni else super().model_fn_together(pipe, inputs)

    @staticmethod
    def grows_with_prompt(block_inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor | None, int]]:
        # image and prompt are one sequence: [n, S + L, ...]
        return [(block_inputs.get(name), 1) for name in ("x", "freqs_cis", "attn_mask", "noise_mask")]

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, C, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        return pipe.vae_decoder(latents)
