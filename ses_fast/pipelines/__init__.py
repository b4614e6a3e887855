"""The documented call on DiffSynth-Studio's pipelines: `enable`, `disable` and `SESConfig`.

A family is one file here and one line in `FAMILIES`.
"""

from importlib import import_module
from typing import Any

from .base import SESConfig, SESPipeline, SESUnit, compile_blocks, compile_mode, install, remove

__all__ = ["SESConfig", "disable", "enable"]

# DiffSynth's class -> module:class of what is the family's own, imported when such a pipeline is enabled.
FAMILIES = {
    "Flux2ImagePipeline": "flux2:Flux2",
    "FluxImagePipeline": "flux:Flux",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
}


def enable(pipe: Any, *, compile: bool | str = False) -> Any:
    """Gives a DiffSynth pipeline the documented call, and returns the same object:

        pipe(prompt, enable_ses=True, ses_reward_model="pick", ses_eval_budget=50, ses_inference_steps=8)

    Until `enable_ses=True` is given nothing changes: isinstance holds, and the images are bit for bit the
    stock pipeline's. Enabling twice does nothing; with another `compile` it compiles, but only `disable` undoes it.

    compile: True compiles the repeated blocks of the user's own model with torch.compile, for previews and final
        images, with SES and without; "max-autotune" searches longer for fast kernels. The images then differ
        by rounding, as after `pipe.compile_pipeline()`. The first call compiles; so does the first with another
        image size or number of previews together, and with CFG, but not with another prompt.

    Raises ValueError for what is no supported pipeline, and for another `compile`.
    """
    family, mode = _family(pipe), compile_mode(compile)
    if mode is not None:
        compile_blocks(pipe, family, mode)
    install(pipe, family)
    return pipe


def disable(pipe: Any) -> Any:
    """Makes an enabled pipeline the stock one again, and returns the same object. Raises as `enable` does."""
    _family(pipe)
    if isinstance(pipe, SESPipeline):
        remove(pipe)
    return pipe


def _family(pipe: Any) -> type[SESUnit]:
    for cls in type(pipe).__mro__:
        # diffusers has classes of the same names
        if cls.__name__ in FAMILIES and cls.__module__.partition(".")[0] == "diffsynth":
            module, name = FAMILIES[cls.__name__].split(":")
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise ValueError(
        f"SES does not know {type(pipe).__module__}.{type(pipe).__qualname__}; "
        f"the supported pipelines are DiffSynth-Studio's {', '.join(sorted(FAMILIES))}"
    )
