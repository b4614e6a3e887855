"""The documented call on diffusers' pipelines. A family is one line in `family.FAMILIES`, and a row of the tests."""

import functools
from typing import Any

from ..._torchvision import declare_torchvision_ops
from .family import FAMILIES, denoisers_of, family_of

__all__ = ["FAMILIES", "disable", "enable", "family_of"]

declare_torchvision_ops()  # before any of diffusers' modules is imported


def enable(pipe: Any, compile: bool | str) -> None:
    """See `ses_fast.enable`."""
    from ..compiling import compile_mode, compile_models
    from ..enabled import enabled_class
    from .call import SESPipeline

    mode = compile_mode(compile)
    if mode is not None:
        denoisers = denoisers_of(pipe)
        compile_models(pipe, denoisers, functools.partial(_compile, denoisers), None, mode)
    if not issubclass(type(pipe), SESPipeline):
        stock: Any = type(pipe)
        pipe.__class__ = enabled_class(SESPipeline, stock)


def disable(pipe: Any) -> None:
    """See `ses_fast.disable`."""
    from ..compiling import undo_compilation
    from .call import SESPipeline

    if issubclass(type(pipe), SESPipeline):
        undo_compilation(pipe)
        vars(pipe).pop("ses_result", None)
        pipe.__class__ = pipe._ses_stock


def noise_levels(pipe: Any) -> list[float]:
    """See `ses_fast.pipelines.noise_levels`."""
    from . import scheduler

    return scheduler.noise_levels(pipe.scheduler) or []


def _compile(denoisers: list[Any], **settings: Any) -> None:
    """The blocks that diffusers says its models repeat. Raises ValueError where it names none."""
    for denoiser in denoisers:
        if not getattr(denoiser, "_repeated_blocks", None):
            raise ValueError(f"diffusers names no repeated blocks of {type(denoiser).__name__}: leave compile out")
    for denoiser in denoisers:
        denoiser.compile_repeated_blocks(**settings)
