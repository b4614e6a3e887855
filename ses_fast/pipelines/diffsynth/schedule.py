"""What a pipeline's call gives its scheduler, and the previews' schedule made of it."""

import copy
from typing import Any, Self

from torch import Tensor


class Schedule:
    """As a context, notes the call's set_timesteps and add_noise and makes a scheduler of `steps` steps of them.

    Previews need the same arguments with other steps. They differ between families, and some of them (Z-Image's
    sigma_shift, FLUX.1's input image) reach no later unit. The pipeline sets its timesteps once, first of all, and
    noises its input image once; from then on the scheduler is as it was.

    makes_previews: False where the call renders given latents: then a schedule that does not exist is no error.
    """

    def __init__(self, scheduler: Any, steps: int, makes_previews: bool) -> None:
        self.scheduler, self.steps, self.makes_previews = scheduler, steps, makes_previews
        self.final_steps = 0  # what the call gave set_timesteps
        self.preview_scheduler: Any = None  # a scheduler
        self.all_timesteps: Tensor | None = None  # the scheduler's, where `skip_denoising` took them away
        self.input_latents: Tensor | None = None  # what it gave add_noise; FLUX.1 hands it to no later unit

    def __enter__(self) -> Self:
        self.scheduler.set_timesteps, self.scheduler.add_noise = self._set_timesteps, self._add_noise
        return self

    def __exit__(self, *_: object) -> None:
        vars(self.scheduler).pop("set_timesteps", None)
        self.forget_add_noise()
        if self.all_timesteps is not None:
            self.scheduler.timesteps = self.all_timesteps

    def forget_add_noise(self) -> None:
        """The scheduler's own add_noise again: it is called in the units before ours, or never."""
        vars(self.scheduler).pop("add_noise", None)

    def skip_denoising(self) -> None:
        """The call is left with no step to do, and decodes the latents that it has."""
        self.all_timesteps = self.scheduler.timesteps
        self.scheduler.timesteps = self.all_timesteps[:0]

    def _set_timesteps(self, num_inference_steps: int, **others: Any) -> None:
        del self.scheduler.set_timesteps
        self.final_steps, self.preview_scheduler = num_inference_steps, copy.copy(self.scheduler)
        vars(self.preview_scheduler).pop("add_noise", None)
        self.preview_scheduler.set_timesteps(self.steps, **others)
        if self.makes_previews and not self.preview_scheduler.sigmas.isfinite().all():
            raise ValueError(f"this pipeline has no schedule of {self.steps} steps: give more ses_inference_steps")
        self.scheduler.set_timesteps(num_inference_steps, **others)

    def _add_noise(self, original_samples: Tensor, *args: Any, **others: Any) -> Tensor:
        del self.scheduler.add_noise
        self.input_latents = original_samples
        return self.scheduler.add_noise(original_samples, *args, **others)
