"""A ComfyUI node: noise that Spectral Evolution Search has found, for SamplerCustomAdvanced.

Copy this file into ComfyUI's folder custom_nodes/, and run `pip install ".[rewards]"` in a clone with ComfyUI's Python.
Put the node "SES noise" (sampling/custom_sampling/noise) between RandomNoise and SamplerCustomAdvanced:

    RandomNoise -> SES noise -> SamplerCustomAdvanced -> VAE Decode

Guider and VAE are those of the image; sampler and sigmas are the previews', for which a BasicScheduler of 8 or 10 steps
will do. The search runs when SamplerCustomAdvanced asks for its noise, with the latent that it has made ready. So the
node uses nothing of ComfyUI but what it is handed: `noise.generate_noise(latent)`, `guider.sample(...)` and
`vae.decode(samples)`. Scores are logged. The seed's own noise is the first candidate: the answer never scores lower.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ses_fast
from ses_fast.rewards import REWARDS
from ses_fast.strategies import STRATEGIES


class SearchedNoise:
    """A NOISE of ComfyUI: the best noise for one prompt, searched when it is first asked for."""

    def __init__(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, vae: Any, score: Any, **options: Any
    ) -> None:
        self.seed = noise.seed  # of what the sampler draws in its steps: the same for every candidate
        self.noise, self.guider, self.sampler, self.sigmas, self.vae = noise, guider, sampler, sigmas, vae
        self.score, self.options = score, options
        self.result: ses_fast.SearchResult | None = None
        self.searched: list[Tensor | None] = []  # what the result is of: base, latent image, mask

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """The noise for a LATENT, whose "samples" are (1, C, ..., h, w). Raises ValueError for several images."""
        base = self.noise.generate_noise(input_latent)
        if len(base) != 1:
            raise ValueError(f"SES searches for one image: set the latent's batch_size to 1, it has {len(base)}")
        asked = [base, input_latent["samples"], input_latent.get("noise_mask")]
        if self.result is None or not all(map(_same, asked, self.searched)):

            def objective(noises: Tensor) -> Any:  # [n, C, ..., h, w] -> n scores
                return self.score(self.preview(noises, input_latent))

            seed = self.seed % 2**63  # ComfyUI's go up to 2^64
            self.result = ses_fast.evolve(base, objective, seed=seed, include_base=True, **self.options)
            self.searched = [None if tensor is None else tensor.clone() for tensor in asked]
            logging.info("SES: score %.4f without search, %.4f with it", self.result.base_score, self.result.score)
        return self.result.latents.clone()

    def preview(self, noises: Tensor, input_latent: dict[str, Any]) -> Tensor:  # [n, C, ..., h, w] -> [n, 3, H, W]
        """The noises' images in [-1, 1]; of a video its middle frame."""
        images = input_latent["samples"].repeat(len(noises), *[1] * (noises.ndim - 1))
        samples = self.guider.sample(
            noises,
            images,
            self.sampler,
            self.sigmas,
            denoise_mask=input_latent.get("noise_mask"),
            callback=None,
            disable_pbar=True,
            seed=self.seed,
        )
        pixels = self.vae.decode(samples)  # [n, H, W, 3] in [0, 1], or [n, frames, H, W, 3]
        if pixels.ndim == 5:
            pixels = pixels[:, pixels.shape[1] // 2]
        return (pixels[..., :3].movedim(-1, 1) * 2 - 1).clamp(-1, 1)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


class SESNoise:
    """The node."""

    CATEGORY = "sampling/custom_sampling/noise"
    DESCRIPTION = "Searches the noise whose image a reward model likes best. Feed it to SamplerCustomAdvanced."
    FUNCTION = "get_noise"
    RETURN_TYPES = ("NOISE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "noise": ("NOISE",),
                "guider": ("GUIDER",),
                "sampler": ("SAMPLER", {"tooltip": "of the previews"}),
                "sigmas": ("SIGMAS", {"tooltip": "of the previews: fewer steps make them cheaper"}),
                "vae": ("VAE",),
                "prompt": ("STRING", {"multiline": True, "tooltip": "what the reward reads"}),
                "reward": (list(REWARDS), {"default": "pick"}),
                "budget": ("INT", {"default": 50, "min": 1, "max": 10000, "tooltip": "how many previews are scored"}),
                "popsize": ("INT", {"default": 10, "min": 1, "max": 1000}),
                "k_elites": ("INT", {"default": 5, "min": 1, "max": 1000}),
                "dwt_level": (
                    "INT",
                    {"default": 4, "min": 0, "max": 10, "tooltip": "4 for 1024 pixels, one less with each halving"},
                ),
                "strategy": (list(STRATEGIES), {"default": "ses"}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 1000, "tooltip": "previews at a time"}),
            },
            "optional": {"weights": ("STRING", {"default": "", "tooltip": "a folder with the reward's weights"})},
        }

    def get_noise(
        self,
        noise: Any,
        guider: Any,
        sampler: Any,
        sigmas: Tensor,
        vae: Any,
        prompt: str,
        reward: str,
        budget: int,
        weights: str = "",
        **options: Any,
    ) -> tuple[SearchedNoise]:
        if not prompt.strip():
            raise ValueError("SES needs the prompt in words: the reward compares the image with it")
        judge = ses_fast.load_reward(reward, weights or None)
        score = partial(judge, prompt=prompt)
        return (SearchedNoise(noise, guider, sampler, sigmas, vae, score, total_eval_budget=budget, **options),)


NODE_CLASS_MAPPINGS = {"SESNoise": SESNoise}
NODE_DISPLAY_NAME_MAPPINGS = {"SESNoise": "SES noise"}
