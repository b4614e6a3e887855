"""The documented call on DiffSynth-Studio's pipelines: `enable`, `disable` and `SESConfig`.

A family is one file here and one line in `FAMILIES`.
"""

from importlib import import_module
from typing import Any

from .base import SESConfig, SESPipeline, SESUnit, install, remove

__all__ = ["SESConfig", "disable", "enable"]

# DiffSynth's class -> module:class of what is the family's own, imported when such a pipeline is enabled.
FAMILIES = {
    "ZImagePipeline": "z_image:ZImage",
}


def enable(pipe: Any) -> Any:
    """Gives a DiffSynth pipeline the documented call, and returns the same object:

        pipe(prompt, enable_ses=True, ses_reward_model="pick", ses_eval_budget=50, ses_inference_steps=8)

    Until `enable_ses=True` is given nothing changes: isinstance holds, and the images are bit for bit the
    stock pipeline's. Enabling twice does nothing. Raises ValueError for what is no supported pipeline.
    """
    install(pipe, _family(pipe))
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
