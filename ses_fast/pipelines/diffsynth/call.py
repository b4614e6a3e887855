"""The documented call: the class that an enabled pipeline of DiffSynth has before its own.

A pipeline's own call runs its units (prompt, noise, ...), denoises and decodes. `install` gives the pipeline a subclass
whose call leaves a `Request`, and appends a unit that answers it: it searches for a better noise and puts it in place.
So the prompt is encoded once, and the final image comes from the stock code. Imports no diffsynth.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...result import SearchResult
from ...rewards.pil import of_pil
from ..compiling import CompileClock, undo_compilation
from ..config import SESConfig
from ..enabled import Enabled, enabled_class, facts_of
from ..request import Request, make_request
from ..run import answer
from .unit import PER_CALL_LORAS, SESUnit

# Arguments of the call that no preview depends on, or that a state holds in another form.
NOT_OF_A_PREVIEW = frozenset(
    {"prompt", "seed", "rand_device", "initial_noise", "num_inference_steps", "progress_bar_cmd"}
)


class SESPipeline(Enabled):
    """The documented call; `install` puts this class before the pipeline's own."""

    def __call__(
        self: Any,
        *args: Any,
        enable_ses: bool = False,
        ses_reward_model: Any = "pick",
        ses_eval_budget: int | None = 50,
        ses_inference_steps: int = 10,
        ses_config: SESConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with enable_ses=True, from a noise that Spectral Evolution Search found.

        ses_reward_model: a name or a dict of weights for `load_reward`, a loaded reward, or any callable that
            takes images (n, 3, H, W) in [-1, 1] and the prompt, and returns n scores, higher for better.
        ses_eval_budget: how many previews are made and scored; with 0 the call is the stock one; None: as many as
            SESConfig(time_limit=) allows.
        ses_inference_steps: the steps of a preview. With as many as num_inference_steps the final image equals
            the best preview; more only cost time, and give a warning.
        ses_config: everything else. Without enable_ses=True these four do nothing.

        Afterwards `pipe.ses_result` is the SearchResult, with seconds for prompt, start, ask, denoise,
        decode, reward, tell, final, held_out where asked for, compile (counted in no other stage), other, and their
        total. An exception leaves as it came; `pipe.ses_result` is then what was found before it. Raises ValueError for
        bad input before any work.
        """
        if not isinstance(enable_ses, bool):
            raise ValueError(f"enable_ses must be True or False, got {enable_ses!r}")
        call = super().__call__  # type: ignore[misc]
        if not enable_ses:
            return call(*args, **kwargs)

        bound = inspect.signature(call).bind(*args, **kwargs)
        given = {**bound.arguments, **bound.kwargs}  # a subclass may take some of them as **kwargs
        unit = self.units[-1] if self.units else None
        if not isinstance(unit, SESUnit):
            raise ValueError("the unit that searches is not the last of pipe.units: call ses_fast.enable(pipe) again")
        unit.check(self, given)
        request = make_request(
            reward=ses_reward_model,
            budget=ses_eval_budget,
            steps=ses_inference_steps,
            config=ses_config,
            prompt=given.get("prompt", args[0] if args else ""),
            seed=given.get("seed"),
            has_own_noise=given.get("initial_noise") is not None,
            fingerprint={"pipeline": self._ses_stock.__name__, "arguments": facts_of(bound, NOT_OF_A_PREVIEW)},
            device=self.device,
        )
        if request.config.preview.scale != 1 and request.reward is not None:
            unit.check_scale(bound.signature.parameters.keys(), given)
        self.ses_result = None  # an earlier call's is not this one's, which is accepted
        bound = _with(bound, {"seed": request.seed})
        if request.reward is None and request.latents is None:
            return call(*bound.args, **bound.kwargs)

        with CompileClock(self.device) as clock:
            try:
                return self._ses_image(unit, request, clock, call, bound)
            except BaseException as error:
                if request.begun:
                    self.ses_result = getattr(error, "ses_result", self.ses_result)
                self._ses_tidy(error, given)
                raise

    def _ses_image(
        self: Any,
        unit: SESUnit,
        request: Request,
        clock: CompileClock,
        stock: Callable[..., Any],
        bound: inspect.BoundArguments,
    ) -> Any:
        """The image of the stock call with the request's noise; leaves the result at ses_result."""

        def call(**others: Any) -> Any:
            given = _with(bound, others)
            return stock(*given.args, **given.kwargs)

        def render(request: Request, begin: float) -> tuple[Any, SearchResult | None]:
            return unit.render(self, request, call, clock, begin)

        as_tensor = functools.partial(_as_tensor, device=self.device)
        image, self.ses_result = answer(request, clock, stock=call, render=render, as_tensor=as_tensor)
        return image

    def _ses_tidy(self: Any, error: BaseException, given: dict[str, Any]) -> None:
        """Puts away what a failed call left. Where that fails too, `error` says so and still is the one that leaves."""
        try:
            self.load_models_to_device([])  # what a failed preview left there
            if any(given.get(name) is not None for name in PER_CALL_LORAS):
                self.clear_lora(verbose=0)  # a forward that fails leaves it in the model
        except BaseException as failed:
            error.add_note(f"the clean-up after this error failed as well: {failed!r}")


def install(pipe: Any, family: type[SESUnit]) -> None:
    """Puts `SESPipeline` before the class of `pipe`, and one `family()` last in its units."""
    # A list of its own: a copy of the pipeline may share the old one.
    ours = next((unit for unit in pipe.units if isinstance(unit, SESUnit)), None) or family()
    units = type(pipe.units)([*_stock_units(pipe), ours])
    stock: Any = type(pipe)
    if not issubclass(stock, SESPipeline):
        pipe.__class__ = enabled_class(SESPipeline, stock)
    pipe.units = units


def remove(pipe: Any) -> None:
    """Undoes `install` and the compilation, and forgets the last result. Does nothing to a stock pipeline."""
    if not issubclass(type(pipe), SESPipeline):
        return
    units = type(pipe.units)(_stock_units(pipe))
    undo_compilation(pipe)
    pipe.units = units
    vars(pipe).pop("ses_result", None)
    pipe.__class__ = pipe._ses_stock


def _stock_units(pipe: Any) -> list[Any]:
    return [unit for unit in pipe.units if not isinstance(unit, SESUnit)]


def _with(bound: inspect.BoundArguments, others: Mapping[str, Any]) -> inspect.BoundArguments:
    """The same call with some arguments replaced, by name, or added."""
    named = {name: value for name, value in others.items() if name in bound.arguments}
    arguments: Any = {**bound.arguments, **named}
    given = inspect.BoundArguments(bound.signature, arguments)
    rest = {name: value for name, value in others.items() if name not in named}
    return bound.signature.bind(*given.args, **given.kwargs | rest)


def _as_tensor(image: Any, device: torch.device | str) -> Tensor:  # [1, 3, H, W] in [-1, 1]
    """A picture that the pipeline returned, for a reward."""
    if not hasattr(image, "convert"):
        raise ValueError(f"held-out rewards judge a picture, and the pipeline's call returns {type(image).__name__}")
    return of_pil(image, device)
