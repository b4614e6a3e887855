"""The documented call on DiffSynth-Studio's pipelines. A family is one file here and one line in `FAMILIES`."""

from importlib import import_module
from typing import Any

from ..._torchvision import declare_torchvision_ops

declare_torchvision_ops()  # before any of DiffSynth's modules is imported, here or in a family's file

# DiffSynth's class -> module:class of what is the family's own, imported when such a pipeline is enabled.
FAMILIES = {
    "Flux2ImagePipeline": "flux2:Flux2",
    "FluxImagePipeline": "flux:Flux",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
}


BASE = "diffsynth.diffusion.base_pipeline.BasePipeline"


def family_of(pipe: Any) -> Any:
    """The unit's class of the pipeline's family; None for what is no pipeline of DiffSynth.

    Raises ValueError for one that makes no picture, or whose call is another than DiffSynth's are.
    """
    for cls in type(pipe).__mro__:
        # diffusers has classes of the same names
        if cls.__name__ in FAMILIES and cls.__module__.partition(".")[0] == "diffsynth":
            module, name = FAMILIES[cls.__name__].split(":")
            return getattr(import_module(f"{__name__}.{module}"), name)
    if BASE not in {f"{cls.__module__}.{cls.__name__}" for cls in type(pipe).__mro__}:
        return None
    from .any import AnyImage, misfit

    if (why := misfit(pipe)) is not None:
        raise ValueError(f"SES cannot search {type(pipe).__module__}.{type(pipe).__qualname__}: {why}")
    return AnyImage


def enable(pipe: Any, compile: bool | str) -> None:
    """See `ses_fast.enable`."""
    from ..compiling import compile_blocks, compile_mode
    from .call import install

    family, mode = family_of(pipe), compile_mode(compile)
    if mode is not None:
        compile_blocks(pipe, family.grows_with_prompt, mode)
    install(pipe, family)


def disable(pipe: Any) -> None:
    """See `ses_fast.disable`."""
    from .call import remove

    remove(pipe)


def noise_levels(pipe: Any) -> list[float]:
    """See `ses_fast.pipelines.noise_levels`."""
    sigmas, timesteps = (getattr(pipe.scheduler, name, ()) for name in ("sigmas", "timesteps"))
    return [float(sigma) for sigma in sigmas[: len(timesteps)]]
