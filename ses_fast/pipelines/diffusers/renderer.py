"""Previews, and images in the final size, through a diffusers pipeline's own call."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..renderer import Draft, Renderer
from ..request import Request
from .driver import Driver
from .family import Family, denoisers_of
from .pictures import at_levels, middle_frame
from .scheduler import has_clean, is_inverse, window_on


class Mark(NamedTuple):
    """What later steps need beside a draft, the same for all candidates."""

    memory: dict[str, Any]  # the scheduler's
    states: list[Tensor]  # the random streams'


class DiffusersRenderer(Renderer):
    """The renderer of a call, with some other arguments: its steps, its size, its guidance.

    A stretch of steps is one call with a part of the schedule, and so is the decoding, with no step at all.

    all_frames: whether the images of a video are all its frames, [n, F, 3, H, W], not the middle one.
    """

    def __init__(self, driver: Driver, family: Family, *, all_frames: bool = False, **others: Any) -> None:
        self.driver, self.others, self.all_frames = driver, others, all_frames
        pipe, arguments = driver.pipe, driver.arguments | others
        self.setting, _ = driver.set_up(**others)
        self.steps = self.setting.steps
        self.device = pipe._execution_device
        self.model = nn.ModuleList(part for part in pipe.components.values() if isinstance(part, nn.Module))
        self.marks: dict[int, Mark] = {}
        denoisers = denoisers_of(pipe)
        cached = any(getattr(denoiser, "is_cache_enabled", False) for denoiser in denoisers)
        self.static_shapes = any(map(_is_compiled, denoisers))
        self.forwards_a_step = 2 if family.guided(pipe, arguments) else 1
        self.models_take_turns = bool(getattr(pipe, "_all_hooks", None))
        # A cache decides by the mean over the batch, and a sampler that a scheduler keeps has the first batch's shape.
        alone = cached or not family.together or hasattr(pipe.scheduler, "noise_sampler")
        self.largest_denoise = 1 if alone else None
        self.largest_decode = 1 if getattr(getattr(pipe, "vae", None), "use_tiling", False) else self.largest_denoise
        in_parts = not cached and family.whole_calls_only(arguments) is None and has_clean(pipe.scheduler)
        self.sigmas = self.setting.levels if in_parts else None

    def begin(self, noises: Tensor) -> Draft:
        return Draft(noises, 0)

    def advance(self, draft: Draft, to: int) -> Draft:
        if to == draft.step:
            return draft
        driver, start = self.driver, draft.step
        mark = self.marks.get(start)
        memory = () if mark is None else (mark.memory, draft.history)
        window = window_on(driver.pipe.scheduler, start, to, *memory)
        given = {"noises": draft.latents} if start == 0 else {"latents": draft.latents}
        with driver.streams.at(driver.after_base if mark is None else mark.states):
            driver.steps(len(draft), window, **given, **self.others)
            states = driver.streams.states()
        if window.latents is None or window.done != to:
            raise ValueError(
                f"{type(driver.pipe).__name__}'s call made {window.done - start} steps of {to - start}: SES needs one "
                "scheduler.step for each of the scheduler's timesteps"
            )
        if to == self.steps:
            return Draft(window.latents, to)
        kept, history = window.state()
        self.marks[to] = Mark(kept, states)
        return Draft(window.latents, to, history, window.clean)

    def decode(self, latents: Tensor) -> Tensor:
        driver = self.driver
        others = self.others | {"output_type": "pt"}
        with driver.streams.at(driver.after_base):
            window = window_on(driver.pipe.scheduler, 0, 0)
            images = driver.steps(len(latents), window, latents=latents, **others)
        if images.ndim == 5 and not self.all_frames:
            images = middle_frame(images)
        return at_levels(images)


def renderers(
    driver: Driver, family: Family, request: Request, *, all_frames: bool
) -> tuple[DiffusersRenderer, DiffusersRenderer]:
    """(the renderer of previews, that of the final image). Raises ValueError for previews that the call cannot make."""
    cheap, setting = request.config.preview, driver.setting
    argument = family.whole_calls_only(driver.arguments)
    if cheap.race is not None and argument is not None:
        raise ValueError(
            f"Preview(race=) runs a preview's steps in more than one call, and {argument}= counts them from the call's "
            "first: leave one of the two out"
        )
    scheduler = driver.pipe.scheduler
    if is_inverse(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} makes noise of an image, and a search needs one that makes an image of noise: "
            "take another scheduler"
        )
    if cheap.race is not None and not has_clean(scheduler):
        raise ValueError(
            f"Preview(race=) looks at images on their way, and {type(scheduler).__name__} does not say which they are: "
            "leave race out, or take another scheduler"
        )
    others: dict[str, Any] = {"num_inference_steps": request.steps}
    if not cheap.cfg:
        others |= family.without_guidance()
    if cheap.scale != 1:
        others |= {"height": setting.height // cheap.scale, "width": setting.width // cheap.scale}
    final = DiffusersRenderer(driver, family, all_frames=all_frames)
    previews = DiffusersRenderer(driver, family, all_frames=all_frames, **others)
    *channels, height, width = setting.noise.shape
    small = (*channels, height // cheap.scale, width // cheap.scale)
    if tuple(previews.setting.noise.shape) != small:
        raise ValueError(
            f"Preview(scale=2) needs a size whose half the pipeline draws too; of {setting.height}x{setting.width} its "
            f"noise is {tuple(setting.noise.shape)}, of half that {tuple(previews.setting.noise.shape)}"
        )
    return previews, final


def _is_compiled(denoiser: nn.Module) -> bool:
    compiled = any(module._compiled_call_impl is not None for module in denoiser.modules())
    return compiled or hasattr(denoiser, "_orig_mod")
