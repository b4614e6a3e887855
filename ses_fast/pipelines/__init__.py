"""The documented call on a library's pipelines: `enable`, `disable`, `SESConfig` and `Preview`."""

from importlib import import_module
from typing import Any

from .config import Preview, SESConfig

__all__ = ["Preview", "SESConfig", "disable", "enable", "noise_levels"]

# A library that SES knows -> the module here that adapts it: `FAMILIES`, `family_of`, `enable`, `disable`,
# `noise_levels`.
ADAPTERS = {"DiffSynth-Studio": "diffsynth", "diffusers": "diffusers"}


def enable(pipe: Any, *, compile: bool | str = False) -> Any:
    """Gives a pipeline of DiffSynth or diffusers the documented call, and returns the same object:

        pipe(prompt, enable_ses=True, ses_reward_model="pick", ses_eval_budget=50, ses_inference_steps=8)

    Until `enable_ses=True` is given nothing changes: isinstance holds, and the images are bit for bit the
    stock pipeline's. Enabling twice does nothing; with another `compile` it compiles, but only `disable` undoes it.

    compile: True compiles the repeated blocks of the user's own model with torch.compile, for previews and final
        images, with SES and without; "max-autotune" searches longer for fast kernels. The images then differ
        by rounding, as after `pipe.compile_pipeline()`. The first call compiles; so does the first with another
        image size or number of previews together, and with CFG, but not with another prompt (of a pipeline without a
        family of its own: only with one of another length, where it does not pad them).

    Raises ValueError for what is no supported pipeline, and for another `compile`.
    """
    _adapter(pipe).enable(pipe, compile)
    return pipe


def disable(pipe: Any) -> Any:
    """Makes an enabled pipeline the stock one again, and returns the same object. Raises as `enable` does."""
    _adapter(pipe).disable(pipe)
    return pipe


def noise_levels(pipe: Any) -> list[float]:
    """The noise level of each step of its last image, as `Preview(race=)` names it; [] where its scheduler has none.

    Raises as `enable` does.
    """
    return _adapter(pipe).noise_levels(pipe)


def _adapter(pipe: Any) -> Any:
    known = {}
    for library, name in ADAPTERS.items():
        adapter = import_module(f"{__name__}.{name}")
        if adapter.family_of(pipe) is not None:
            return adapter
        known[library] = adapter.FAMILIES
    raise ValueError(
        f"SES does not know {type(pipe).__module__}.{type(pipe).__qualname__}; the supported pipelines are "
        + "; ".join(f"{library}'s {', '.join(sorted(families))}" for library, families in known.items())
    )
