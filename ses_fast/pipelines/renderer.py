"""What a search needs of a library's pipeline, and nothing more."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Draft(NamedTuple):
    """Candidates on their way to images."""

    latents: Tensor  # [n, ...] in the pipeline's own layout
    step: int  # how many steps are done
    history: tuple[Tensor, ...] = ()  # [n, ...] each: what later steps need beside the latents


class Renderer(ABC):
    """Makes images of noises, for one prompt, size and schedule. It knows no reward and no search.

    A batch of noises gives the images that each noise gives alone, up to rounding. A single noise gives, bit for bit,
    the image of the pipeline's own call in `steps` steps.
    """

    steps: int
    model: nn.Module  # holds the layers that it runs
    device: torch.device | str

    @abstractmethod
    def begin(self, noises: Tensor) -> Draft:  # [n, C, h, w] of unit variance
        """The noises before the first step."""

    @abstractmethod
    def advance(self, draft: Draft, to: int) -> Draft:
        """The draft after `to` of the `steps` steps."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:  # [n, ...] -> [n, 3, H, W]
        """The decoder's output, which may leave [-1, 1]."""

    # Optional: the defaults suit a library without these limits.

    largest_denoise: int | None = None  # how many may be denoised together; None: as many as memory holds
    largest_decode: int | None = None
    static_shapes: bool = False  # whether a batch of another size costs a compilation
    models_take_turns: bool = False  # whether denoiser and decoder share the device's memory by turns

    def prepare(self, stage: str) -> None:  # noqa: B027
        """Called before a generation is brought through a stage, "denoise" or "decode": loads its models."""

    def save_memory(self) -> bool:
        """Called when a batch did not fit. True where it can do with less from now on: then it is tried again."""
        return False
