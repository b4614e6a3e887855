"""What a family of diffusers' pipelines has of its own: one line in `FAMILIES`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a search must know of a pipeline's call, beside what the call itself shows.

    guidance, unguided: the argument of classifier-free guidance, and the largest value that leaves it out. None: the
        call has none, so leaving it out changes nothing.
    needs_negative: whether guidance needs a negative prompt too.
    together: whether several candidates may go through the call at once.
    counts_steps: arguments that a share of the steps depends on, counted from the call's first, and the values with
        which none does: a race runs the steps in several calls.
    """

    guidance: str | None = "guidance_scale"
    unguided: float = 1.0
    needs_negative: bool = False
    together: bool = True
    counts_steps: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def guided(self, pipe: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments guides, which takes two forwards a step."""
        scale = None if self.guidance is None else arguments.get(self.guidance)
        if scale is None or scale <= self.unguided or getattr(pipe.config, "is_distilled", False):
            return False
        negative = (arguments.get("negative_prompt"), arguments.get("negative_prompt_embeds"))
        return not self.needs_negative or any(each is not None for each in negative)

    def without_guidance(self) -> dict[str, Any]:
        """The argument by which a call leaves guidance out."""
        return {} if self.guidance is None else {self.guidance: self.unguided}

    def whole_calls_only(self, arguments: Mapping[str, Any]) -> str | None:
        """The first argument whose effect depends on a step's number."""
        return next((name for name, none in self.counts_steps.items() if arguments.get(name) not in none), None)


# diffusers' class -> what is its own.
FAMILIES = {
    "AuraFlowPipeline": Family(),
    "ChromaPipeline": Family(),
    "CogView4Pipeline": Family(),
    "Flux2KleinPipeline": Family(),
    "Flux2Pipeline": Family(guidance=None),
    "FluxPipeline": Family(guidance="true_cfg_scale", needs_negative=True),
    "Lumina2Pipeline": Family(counts_steps={"cfg_trunc_ratio": (1.0,)}),
    "PixArtAlphaPipeline": Family(),
    "PixArtSigmaPipeline": Family(),
    "QwenImagePipeline": Family(guidance="true_cfg_scale", needs_negative=True),
    "SanaPipeline": Family(),
    "StableDiffusion3Pipeline": Family(counts_steps={"skip_guidance_layers": (None,)}),
    "StableDiffusionPipeline": Family(),
    "StableDiffusionXLControlNetPipeline": Family(
        counts_steps={"control_guidance_start": (0.0,), "control_guidance_end": (1.0,)}
    ),
    "StableDiffusionXLPipeline": Family(),
    "WanPipeline": Family(together=False),
    "ZImagePipeline": Family(unguided=0.0),
}


def family_of(pipe: Any) -> Any:
    """What is the pipeline's own; None where SES does not know it."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.partition(".")[0] == "diffusers":
            return FAMILIES[cls.__name__]
    return None


def denoisers_of(pipe: Any) -> list[Any]:
    """The pipeline's models that denoise; Wan 2.2 has two."""
    named = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [model for model in named if model is not None]
