"""Every other image pipeline of DiffSynth: its own call makes each image, from a noise that the search gives it.

Such a call asks `pipe.generate_noise` for its noise in one of its units, does the steps that it hands to
`progress_bar_cmd`, and gives what it decoded to `pipe.vae_output_to_image`: there the noise is put in and the image
taken out. Of a class nothing has to be known but how its noise lies in the picture. Previews go one by one; a family
of its own is for batches and for what needs single steps.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from einops import EinopsError, rearrange, reduce
from torch import Tensor

from ...errors import warn
from ...result import SearchResult
from .. import run
from ..compiling import CompileClock
from ..renderer import Draft, Renderer
from ..request import Request, given_noise
from .remembered import RandomState, RememberedUnits
from .unit import SESUnit, check_loras

# How a class lays out its noise, where that is not "1 c h w", in einops' words.
LAYOUTS = {
    "Flux3ImagePipeline": "(h w) c",
    "Ideogram4Pipeline": "1 (h w) c",
    "JoyAIImagePipeline": "1 1 c 1 h w",
}
NEEDED = ("prompt", "seed", "height", "width", "num_inference_steps", "progress_bar_cmd")  # arguments of the call
SIDE = 8  # about as many coefficients has a side of the band that is searched in pixels


def misfit(pipe: Any) -> str | None:
    """Why the pipeline's own call cannot be searched, as far as its code shows; None where it can."""
    calls = [inspect.unwrap(vars(cls)["__call__"]) for cls in type(pipe).__mro__ if "__call__" in vars(cls)]
    takes = {name for call in calls for name in inspect.signature(call).parameters}
    for name in NEEDED:
        if name not in takes:
            return f"its call takes no {name}="
    if not any("vae_output_to_image" in call.__code__.co_names for call in calls if inspect.isfunction(call)):
        return "its call makes no picture by pipe.vae_output_to_image"
    for name in ("units", "scheduler"):
        if not hasattr(pipe, name):
            return f"it has no pipe.{name}"
    return None


class AnyImage(SESUnit, PipelineUnit):
    """The search's unit for an image pipeline without a family of its own. In the list of units it does nothing."""

    def check(self, pipe: Any, given: Mapping[str, Any]) -> None:
        check_loras(pipe, given)

    def render(
        self,
        pipe: Any,
        request: Request,
        call: Callable[..., Any],
        clock: CompileClock,
        begin: float,
    ) -> tuple[Any, SearchResult | None]:
        if request.latents is None and request.config.preview.rungs:
            raise ValueError(
                f"Preview(race=) cannot go with {type(pipe).__name__}: its own call makes each preview, and shows no "
                "image on its way. Leave race out"
            )
        own, finished = OwnCall(pipe, call), None
        scheduler = dict(vars(pipe.scheduler))
        try:
            with torch.no_grad():
                outline = own.outline()
                layout = Layout.of(pipe, outline)
                base = layout.unpack(outline.noise)
                if request.latents is not None:
                    best = given_noise(request.latents, base)
                else:
                    final = CallRenderer(own, layout, outline.steps)
                    pipe.ses_result, finished = _search(final, outline.size, request, base, clock, begin)
                    best = pipe.ses_result.latents
        finally:
            vars(pipe.scheduler).clear()
            vars(pipe.scheduler).update(scheduler)
        request.answered = True
        return own.picture(layout.pack(best)) if finished is None else own.as_picture(finished), pipe.ses_result


def _search(
    final: "CallRenderer",
    size: tuple[int, int],  # height and width of the image
    request: Request,
    base: Tensor,  # [1, c, h, w] of the call
    clock: CompileClock,
    begin: float,
) -> run.Found:
    """The search from `base`, or from the request's own."""
    if request.base is not None:
        base = given_noise(request.base, base)
    if final.layout.pixels < 8 and request.config.dwt_level == "auto" and request.config.state is None:
        level = max(1, (min(base.shape[-2:]) // SIDE).bit_length() - 1)
        request.config = replace(request.config, dwt_level=level)
    height, width = size
    previews = _of_previews(final, size, request)
    return run.search(previews, final, request, base, height=height, width=width, clock=clock, begin=begin)


def _of_previews(final: "CallRenderer", size: tuple[int, int], request: Request) -> "CallRenderer":
    """The renderer of previews: the call in fewer steps, and smaller or without guidance where the settings say so.

    Raises ValueError where the call makes no such images.
    """
    cheap, pipe = request.config.preview, final.own.pipe
    arguments: dict[str, Any] = {"num_inference_steps": request.steps}
    size = (size[0] // cheap.scale, size[1] // cheap.scale)
    if cheap.scale != 1:
        arguments |= {"height": size[0], "width": size[1]}
    if not cheap.cfg:
        arguments["cfg_scale"] = 1.0
    own = final.own.changed(**arguments)
    outline = own.outline()
    if outline.size != size:
        raise ValueError(
            "Preview(scale=2) needs a size whose half the pipeline draws too; of "
            f"{size[0]}x{size[1]} it makes {outline.size[0]}x{outline.size[1]}"
        )
    if not outline.exists:
        raise ValueError(f"this pipeline has no schedule of {request.steps} steps: give more ses_inference_steps")
    if outline.steps != request.steps:
        warn(
            f"the call's arguments make it a schedule of {outline.steps} steps, whatever number is asked for: "
            f"ses_inference_steps={request.steps} makes previews no cheaper"
        )
    return CallRenderer(own, Layout.of(pipe, outline), outline.steps)


class CallRenderer(Renderer):
    """Makes one image after another by the pipeline's own call."""

    largest_denoise = 1
    in_one_go = True

    def __init__(self, own: "OwnCall", layout: "Layout", steps: int) -> None:
        self.own, self.layout, self.steps = own, layout, steps
        self.model, self.device = own.pipe, own.pipe.device
        self.forwards_a_step = 1 if own.units.shared.get("cfg_scale", 1) == 1 else 2

    def begin(self, noises: Tensor) -> Draft:
        return Draft(noises, 0)

    def advance(self, draft: Draft, to: int) -> Draft:
        """What the decoder made: there is nothing between."""
        return Draft(torch.cat([self.own.output(self.layout.pack(noise[None])) for noise in draft.latents]), to)

    def decode(self, latents: Tensor) -> Tensor:
        """The picture that `vae_output_to_image` makes of the decoder's output, before its rounding, in [-1, 1].

        A fourth channel, for transparency, is left out, as PIL's convert("RGB") does.
        """
        low, high = self.own.range
        image = latents[:, :3]
        return image if (low, high) == (-1, 1) else (image - low) * (2 / (high - low)) - 1


@dataclass(frozen=True)
class Outline:
    """What a call shows before it denoises."""

    noise: Tensor  # as the pipeline has it
    steps: int
    exists: bool  # whether the schedule does: one of too few steps may be made of NaN
    size: tuple[int, int]  # height and width of the image


@dataclass(frozen=True)
class Layout:
    """Where a noise lies in the picture."""

    words: str  # einops'
    height: int
    width: int
    pixels: int  # a side of a latent

    @staticmethod
    def of(pipe: Any, outline: Outline) -> "Layout":
        """Raises ValueError for a noise that SES cannot lay out in the picture."""
        shape, (height, width) = outline.noise.shape, outline.size
        words = next((LAYOUTS[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in LAYOUTS), "1 c h w")
        if "(h" in words:
            pixels = math.isqrt(height * width // shape[words.split().index("(h")])
        else:
            pixels = height // shape[-2] if len(shape) > 1 else 1
        pixels = max(1, pixels)
        layout = Layout(words, height // pixels, width // pixels, pixels)
        try:
            layout.unpack(outline.noise)
        except EinopsError as error:
            raise _misfit(
                pipe,
                f"its noise has the shape {tuple(shape)}, and SES does not know where that lies in an image of "
                f"{height}x{width} pixels (LAYOUTS in ses_fast/pipelines/diffsynth/any.py says so for others)",
            ) from error
        return layout

    def unpack(self, noise: Tensor) -> Tensor:  # as the pipeline has it -> [1, c, h, w]
        return rearrange(noise, f"{self.words} -> 1 c h w", h=self.height, w=self.width)

    def pack(self, noise: Tensor) -> Tensor:  # [1, c, h, w] -> as the pipeline has it, with its strides
        return rearrange(noise, f"1 c h w -> {self.words}").contiguous()


class OwnCall:
    """A pipeline's own call as a function from a noise to an image; what its units make without the noise is made once.

    call: the stock call; takes arguments, by name, in place of those that the user gave.
    """

    def __init__(
        self,
        pipe: Any,
        call: Callable[..., Any],
        *,
        units: RememberedUnits | None = None,
        state: RandomState | None = None,
        **arguments: Any,
    ) -> None:
        self.pipe, self.call, self.arguments = pipe, call, arguments
        self.range: tuple[float, float] = (-1, 1)  # of the decoder's output, as the call says
        self.state = state or RandomState(pipe)
        self.units = units or RememberedUnits(pipe.unit_runner, self.state)

    def changed(self, **arguments: Any) -> "OwnCall":
        """The call with other arguments. Only the number of steps is none of what is remembered."""
        units = self.units if arguments.keys() <= {"num_inference_steps"} else None
        return OwnCall(self.pipe, self.call, units=units, state=self.state, **self.arguments | arguments)

    def outline(self) -> Outline:
        """Runs the call without its steps: the units, and the decoder on what they leave.

        Raises ValueError where the call is none that SES can go with.
        """
        schedules: list[list[Any]] = []

        def no_steps(timesteps: Iterable[Any], *_: Any, **__: Any) -> list[Any]:
            schedules.append(list(timesteps))
            return []

        noise, output = self._run(None, no_steps)
        if len(schedules) != 1:
            raise _misfit(self.pipe, f"its call counts its steps by progress_bar_cmd {len(schedules)} times, not once")
        exists = all(bool(step.isfinite().all()) for step in schedules[0] if isinstance(step, Tensor))
        return Outline(noise, len(schedules[0]), exists, (output.shape[-2], output.shape[-1]))

    def output(self, noise: Tensor) -> Tensor:  # as the pipeline has it -> [1, C, H, W] in `range`
        """What the call hands to `vae_output_to_image`."""
        return self._run(noise, lambda timesteps, *_, **__: timesteps)[1]

    def picture(self, noise: Tensor) -> Any:  # as the pipeline has it
        """What the call returns."""
        self.state.rewind()
        with self._replaced(generate_noise=lambda *_, **__: self.units.draw(noise), unit_runner=self.units):
            return self.call(**self.arguments)

    def as_picture(self, output: Tensor) -> Any:  # [1, C, H, W] in `range`
        """What the call would return for the last noise that was run; chance goes on as after that call."""
        self.state.go_on()
        return self.pipe.vae_output_to_image(output, min_value=self.range[0], max_value=self.range[1])

    def _run(self, noise: Tensor | None, progress_bar_cmd: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """(the noise, the decoder's output) of a call with that noise, or with its own."""
        pipe, generate_noise = self.pipe, self.pipe.generate_noise
        noises: list[Tensor] = []
        outputs: list[Tensor] = []

        def give_noise(*args: Any, **options: Any) -> Tensor:
            noises.append(generate_noise(*args, **options) if noise is None else noise)
            return self.units.draw(noises[-1])

        def take(output: Tensor, pattern: str = "B C H W", min_value: float = -1, max_value: float = 1) -> Tensor:
            self.range = (min_value, max_value)
            outputs.append(reduce(output, f"{pattern} -> C H W", "mean")[None])
            return outputs[-1]

        with (
            self.state.replayed(),
            self._replaced(generate_noise=give_noise, vae_output_to_image=take, unit_runner=self.units),
        ):
            returned = self.call(**self.arguments, progress_bar_cmd=progress_bar_cmd)
        if len(noises) != 1:
            raise _misfit(pipe, f"its call asks pipe.generate_noise for {len(noises)} noises, not one")
        if len(outputs) != 1 or returned is not outputs[0]:
            raise _misfit(pipe, "its call does not return the one picture that pipe.vae_output_to_image makes")
        return noises[0], outputs[0]

    @contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        """The pipeline has these attributes for one call alone: a reward's or callback's own calls are stock ones."""
        own = vars(self.pipe)
        before = {name: own[name] for name in attributes if name in own}
        own.update(attributes)
        self.units.begin()
        try:
            yield
        finally:
            for name in attributes:
                del own[name]
            own.update(before)


def _misfit(pipe: Any, why: str) -> ValueError:
    return ValueError(f"SES cannot search {type(pipe).__name__}: {why}")
