"""The unit that an enabled pipeline of DiffSynth has last: it answers the call's request with a better noise."""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...result import SearchResult
from .. import run
from ..compiling import CompileClock
from ..request import Request, given_noise
from .family import Family
from .renderer import PipelineRenderer, first_latents
from .schedule import Schedule

PER_CALL_LORAS = ("lora", "positive_only_lora", "negative_lora")  # arguments of the call


# How the names of arguments begin that hold pictures, masks, noise or tiles of the whole image's size.
WHOLE_SIZE = (
    *("input_image", "inpaint_", "initial_noise", "controlnet_", "blockwise_controlnet_", "flex_", "infinityou_"),
    *("step1x_", "layer_input_image", "context_image", "tiled"),
)


@dataclass
class Call:
    """A call with enable_ses=True, while the pipeline's units run."""

    request: Request
    schedule: Schedule
    clock: CompileClock
    begin: float  # when it began, by the clock
    again: Callable[..., Any]  # the stock call, with another height and width


class _UnitsDone(BaseException):  # not an Exception: a user's own call may catch those
    """Ends a call whose units were all that was wanted."""

    def __init__(self, *inputs: dict[str, Any]) -> None:
        super().__init__("the units are done")
        self.inputs = inputs


class SESUnit(Family):
    """The last unit of an enabled pipeline. A family's class is `class Name(SESUnit, PipelineUnit)`.

    Without a request it does nothing, because training runs the pipeline's units too.
    """

    call: Call | None = None
    stops: bool = False  # whether the call that runs is ended here, by _UnitsDone

    def __init__(self) -> None:
        super().__init__(  # type: ignore[call-arg]
            take_over=True,
            input_params=("height", "width", "cfg_scale", "noise", "latents", "input_latents"),
            input_params_posi={"prompt": "prompt"},
            output_params=("noise", "latents"),
        )

    def check(self, pipe: Any, given: dict[str, Any]) -> None:
        """Raises ValueError for what a call with SES cannot have, before any work."""
        for name, why in self.refused.items():
            if given.get(name) is not None:
                raise ValueError(f"SES cannot go with {name}=: {why}")
        if {"set_timesteps", "add_noise"} & vars(pipe.scheduler).keys():
            raise ValueError(
                "SES needs the scheduler's own set_timesteps and add_noise: replace them in a subclass, "
                "not on pipe.scheduler itself"
            )
        check_loras(pipe, given)

    def check_scale(self, takes: Collection[str], given: Mapping[str, Any]) -> None:
        """Raises ValueError where the call cannot be made again at half its size.

        takes: the names of its arguments.
        """
        if "height" not in takes or "width" not in takes:
            raise ValueError("Preview(scale=2) needs a call that takes height= and width=: leave it out")
        whole = [name for name, value in given.items() if name.startswith(WHOLE_SIZE) and value not in (None, False)]
        if whole:
            raise ValueError(
                f"Preview(scale=2) halves the size, and {whole[0]}= is made for all of it: leave one of them out"
            )

    def render(
        self,
        pipe: Any,
        request: Request,
        call: Callable[..., Any],
        clock: CompileClock,
        begin: float,
    ) -> tuple[Any, SearchResult | None]:
        """The call's image with the noise that the request asks for, and the search that found it, if there was one.

        call: the stock call; takes arguments, by name, in place of those that the user gave. begin: see `run.answer`.
        """
        schedule = Schedule(pipe.scheduler, request.steps, makes_previews=request.latents is None)
        with self.asked(Call(request, schedule, clock, begin, call)), schedule:
            image = call()
        if not request.answered:
            raise ValueError(
                f"the call of {type(pipe).__name__} does not run pipe.units, so SES has searched nothing: enable a "
                "pipeline whose call makes its image as DiffSynth's own does"
            )
        return image, pipe.ses_result

    @contextmanager
    def asked(self, call: Call) -> Iterator[None]:
        """Holds the call whose units run inside, and forgets it afterwards whatever happens."""
        self.call = call
        try:
            yield
        finally:
            self.call = None

    def process(
        self,
        pipe: Any,
        inputs_shared: dict[str, Any],
        inputs_posi: dict[str, Any],
        inputs_nega: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Answers the request, if there is one: puts the best noise and its latents in place."""
        if self.stops:
            raise _UnitsDone(inputs_shared, inputs_posi, inputs_nega)
        call = self.call
        if call is None:
            return inputs_shared, inputs_posi, inputs_nega
        request, schedule = call.request, call.schedule
        if request.answered:
            raise ValueError(
                f"{type(pipe).__name__} runs its units more than once in one call: SES cannot say which image the call "
                "returns. Enable a pipeline whose call makes one image"
            )
        schedule.forget_add_noise()
        finished: Tensor | None = None
        base = self.unpack(inputs_shared["noise"], inputs_shared)
        if request.latents is not None:
            best = given_noise(request.latents, base)
        else:
            if request.base is not None:
                base = given_noise(request.base, base)
            sides = (inputs_posi, inputs_nega)
            before = dict(vars(pipe.scheduler))
            self.call = None  # a callback may call the pipeline, and its calls are not this one
            try:
                # A copy: previews of another size, and a callback's calls, set the pipeline's own anew.
                scheduler = copy.copy(pipe.scheduler)
                final = PipelineRenderer(self, pipe, scheduler, inputs_shared, *sides, schedule.input_latents)
                renderer = self._of_previews(pipe, call, inputs_shared, *sides)
                found = run.search(
                    renderer,
                    final,
                    request,
                    base,
                    height=inputs_shared["height"],
                    width=inputs_shared["width"],
                    clock=call.clock,
                    begin=call.begin,
                )
            finally:
                vars(pipe.scheduler).clear()
                vars(pipe.scheduler).update(before)
                self.call = call
            pipe.ses_result, finished = found
            assert found.result.latents is not None  # the search raises where no score is finite
            best = found.result.latents
        request.answered = True
        noise = self.pack(best)
        if finished is not None:
            schedule.skip_denoising()
        latents = first_latents(pipe.scheduler, noise, schedule.input_latents) if finished is None else finished
        inputs_shared |= {"noise": noise, "latents": latents}
        return inputs_shared, inputs_posi, inputs_nega

    def _of_previews(
        self,
        pipe: Any,
        call: Call,
        shared: dict[str, Any],
        posi: dict[str, Any],
        nega: dict[str, Any],
    ) -> PipelineRenderer:
        """The renderer of previews; where they are smaller, by what the pipeline's own units make for that size."""
        schedule, cheap = call.schedule, call.request.config.preview
        if cheap.scale != 1:
            schedule = Schedule(pipe.scheduler, call.request.steps, makes_previews=True)
            height, width = (shared[name] // cheap.scale for name in ("height", "width"))
            shared, posi, nega = self._units_alone(
                pipe, schedule, functools.partial(call.again, height=height, width=width)
            )
            if (shared["height"], shared["width"]) != (height, width):
                raise ValueError(
                    f"Preview(scale=2) needs a size whose half the pipeline draws too; it makes {height}x{width} "
                    f"{shared['height']}x{shared['width']}"
                )
        shared = self.for_previews(shared) | ({} if cheap.cfg else {"cfg_scale": 1})
        return PipelineRenderer(self, pipe, schedule.preview_scheduler, shared, posi, nega, schedule.input_latents)

    def _units_alone(self, pipe: Any, schedule: Schedule, stock: Callable[[], Any]) -> tuple[dict[str, Any], ...]:
        """What the units before this one make of a stock call, which then ends."""
        self.stops = True
        try:
            with schedule:
                stock()
        except _UnitsDone as done:
            return done.inputs
        finally:
            self.stops = False
        raise ValueError(f"the call of {type(pipe).__name__} does not run pipe.units: leave Preview(scale=) out")


def check_loras(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raises ValueError for a LoRA of the call that a search would add to the weights again and again."""
    dit: Any = getattr(pipe, "dit", None)
    hot = getattr(dit, "vram_management_enabled", False) or getattr(dit, "quantize_config", None)
    for name in PER_CALL_LORAS:
        if given.get(name) is None:
            continue
        if not hot:
            raise ValueError(
                f"with SES, {name}= needs pipe.dit = pipe.enable_lora_hot_loading(pipe.dit) first: otherwise "
                "DiffSynth adds the LoRA to the weights again in every step of every preview"
            )
        if any(getattr(module, "lora_A_weights", None) for module in dit.modules()):
            raise ValueError(
                f"with SES, {name}= cannot go with a LoRA that is loaded already: DiffSynth clears both after the "
                "first forward. Call pipe.clear_lora(), or load both and leave the argument out"
            )
