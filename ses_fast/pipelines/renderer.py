"""What a search needs of a library's pipeline, and nothing more."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Draft:
    """Candidates on their way to images."""

    latents: Tensor  # [n, ...] in the pipeline's own layout
    step: int  # how many steps are done
    history: tuple[Tensor, ...] = ()  # [n, ...] each: what later steps need beside the latents
    clean: Tensor | None = None  # [n, ...]: the image's latents as the last step's forward saw them (x0)

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, which: slice | Tensor) -> "Draft":
        """Some of the candidates, in the order named; each keeps its own history."""
        clean = None if self.clean is None else self.clean[which]
        return Draft(self.latents[which], self.step, tuple(part[which] for part in self.history), clean)

    @staticmethod
    def joined(drafts: Sequence["Draft"]) -> "Draft":
        """The candidates of all, in order; all stand at the same step."""
        if len(drafts) == 1:
            return drafts[0]
        parts = zip(*(draft.history for draft in drafts), strict=True)
        clean = [draft.clean for draft in drafts if draft.clean is not None]
        return Draft(
            torch.cat([draft.latents for draft in drafts]),
            drafts[0].step,
            tuple(torch.cat(part) for part in parts),
            torch.cat(clean) if clean else None,
        )


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
        """The draft after `to` of the `steps` steps; with `clean`, where that is before the last one."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:  # [n, ...] -> [n, 3, H, W]
        """The decoder's output, which may leave [-1, 1]."""

    # Optional: the defaults suit a library without these limits.

    sigmas: Sequence[float] | None = None  # [steps], the noise level of each step's forward; None: it makes no x0
    in_one_go: bool = False  # whether `advance` makes the images themselves, after all steps, and nothing before
    forwards_a_step: int = 1  # of the denoiser for one candidate: 2 with classifier-free guidance
    largest_denoise: int | None = None  # how many may be denoised together; None: as many as memory holds
    largest_decode: int | None = None
    static_shapes: bool = False  # whether a batch of another size costs a compilation
    models_take_turns: bool = False  # whether denoiser and decoder share the device's memory by turns
    repeatable: bool = False  # whether `advance` and `decode` depend on their arguments alone, and may be left out

    def prepare(self, stage: str) -> None:  # noqa: B027
        """Called before a generation is brought through a stage, "denoise" or "decode": loads its models."""

    def save_memory(self) -> bool:
        """Called when a batch did not fit. True where it can do with less from now on: then it is tried again."""
        return False
