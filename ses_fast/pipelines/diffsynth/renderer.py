"""Previews through a DiffSynth pipeline's own functions, from what its units made of the call."""

import copy
import functools
from typing import Any

import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from torch import Tensor

from ..compiling import compilation
from ..renderer import Draft, Renderer
from .family import Family

ONE_SIDED_LORAS = ("positive_only_lora", "negative_only_lora")  # what the units make of a call's LoRAs


class PipelineRenderer(Renderer):
    """The renderer of a call: `shared`, `posi` and `nega` are what the units before it made.

    scheduler: with its timesteps set. input_latents: of an input image, to be noised.
    """

    def __init__(
        self,
        family: Family,
        pipe: Any,
        scheduler: Any,
        shared: dict[str, Any],
        posi: dict[str, Any],
        nega: dict[str, Any],
        input_latents: Tensor | None = None,
    ) -> None:
        self.family, self.pipe, self.steps = family, pipe, len(scheduler.timesteps)
        self.model, self.device, self.models_take_turns = pipe, pipe.device, pipe.vram_management_enabled
        self.scheduler, self.input_latents = scheduler, input_latents
        self.to_clean = _to_clean(scheduler)
        self.sigmas = None if self.to_clean is None else scheduler.sigmas[: self.steps].tolist()
        self.shared = shared | {"num_inference_steps": self.steps}  # a ControlNet's start and end are shares of them
        self.posi, self.nega = posi, nega
        self.forwards_a_step = 1 if shared["cfg_scale"] == 1 else 2
        given = [part.items() for part in (self.shared, posi, nega)]
        inputs = {name: value for items in given for name, value in items if value is not None}
        self.model_fn = family.model_fn_together(pipe, inputs)
        self.static_shapes = compilation(pipe) is not None
        self.both = None if self.model_fn is None else self._both_sides()
        self.largest_denoise = 1 if self.model_fn is None else None
        self.repeatable = shared.get("tea_cache") is None  # which counts the steps that it sees
        self.largest_decode = 1 if shared.get("tiled") else None  # tiled decoding is chosen where memory is short

    def prepare(self, stage: str) -> None:
        pipe = self.pipe
        pipe.load_models_to_device(pipe.in_iteration_models if stage == "denoise" else [self.family.decoder])

    def save_memory(self) -> bool:
        """CFG's two sides no longer share a batch."""
        had_both, self.both = self.both is not None, None
        return had_both

    def begin(self, noises: Tensor) -> Draft:
        self.shared = self.family.begun(self.shared)
        noise = self.family.pack(noises)
        return Draft(first_latents(self.scheduler, noise, self.input_latents), 0, (noise,))

    def advance(self, draft: Draft, to: int) -> Draft:
        pipe = self.pipe
        (noise,) = draft.history
        inputs, clean = {**self.shared, "noise": noise, "latents": draft.latents}, None
        for step in range(draft.step, to):
            timestep = self.scheduler.timesteps[step][None].to(pipe.device, pipe.torch_dtype)
            predicted = self._predict(inputs, timestep=timestep, progress_id=step)
            if step + 1 == to < self.steps and self.to_clean is not None:
                clean = pipe.step(self.to_clean, progress_id=step, noise_pred=predicted, **inputs)
            inputs["latents"] = pipe.step(self.scheduler, progress_id=step, noise_pred=predicted, **inputs)
        return Draft(inputs["latents"], to, draft.history, clean)

    def decode(self, latents: Tensor) -> Tensor:
        return self.family.decode(self.pipe, latents, self.shared)

    def _both_sides(self) -> dict[str, Tensor] | None:
        """What the model takes of the prompt and of the negative one, joined: [2, ...]. None where they go apart."""
        if not self.family.text or self.shared["cfg_scale"] == 1 or any(map(self.shared.get, ONE_SIDED_LORAS)):
            return None
        if self.static_shapes and self.family.grows_with_prompt is not None:
            return None  # a prompt as long as the negative one would be compiled for twice as many rows
        if getattr(self.pipe.cfg_guided_model_fn, "__qualname__", "") != "BasePipeline.cfg_guided_model_fn":
            return None  # the user's own: it may guide otherwise
        both = {}
        for name in self.family.takes & self.posi.keys() & self.nega.keys():
            a, b = self.posi[name], self.nega[name]
            if a is None or b is None:
                if a is b:
                    continue
                return None
            if a.shape != b.shape or a.dtype != b.dtype or (name not in self.family.text and not torch.equal(a, b)):
                return None
            both[name] = torch.cat([a, b]) if name in self.family.text else a
        return both

    def _predict(self, inputs: dict[str, Any], **others: Any) -> Tensor:
        """The velocity of all of inputs["latents"], with CFG."""
        pipe, latents, scale = self.pipe, inputs["latents"], inputs["cfg_scale"]
        others |= {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        # A single preview takes the final image's path, so the two are bit-identical.
        if len(latents) == 1 or self.both is None:
            model_fn = pipe.model_fn if len(latents) == 1 else self.model_fn
            try:
                return pipe.cfg_guided_model_fn(model_fn, scale, inputs, self.posi, self.nega, **others)
            except torch.OutOfMemoryError:  # to be tried again: without what this forward left in the model
                if any(inputs.get(lora) is not None for lora in ONE_SIDED_LORAS):
                    pipe.clear_lora(verbose=0)
                raise
        assert self.model_fn is not None
        twice = {**self.posi, **inputs, **self.both, **others, "latents": torch.cat([latents, latents])}
        posi, nega = self.model_fn(**twice).chunk(2)
        return nega + scale * (posi - nega)


def _to_clean(scheduler: Any) -> Any:
    """A scheduler whose step goes all the way to the clean image; None where this one has no such step of its own."""
    if type(scheduler) is not FlowMatchScheduler or "step" in vars(scheduler):
        return None
    clean = copy.copy(scheduler)
    clean.step = functools.partial(scheduler.step, to_final=True)
    return clean


def first_latents(
    scheduler: Any,
    noise: Tensor,  # [n, ...]
    input_latents: Tensor | None,  # [1, ...]
) -> Tensor:  # [n, ...]
    """Where the denoising begins: the noise, or the input image noised to the first timestep."""
    if input_latents is None:
        return noise
    return scheduler.add_noise(input_latents, noise, timestep=scheduler.timesteps[0])
