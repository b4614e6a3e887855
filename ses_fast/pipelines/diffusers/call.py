"""The documented call on diffusers' pipelines: the class that an enabled pipeline has before its own.

The stock call makes every image: its own for the answer, and a `Driver`'s runs of it for the previews.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...checks import check_noise
from ...result import SearchResult
from ..compiling import CompileClock
from ..config import SESConfig
from ..enabled import Enabled, arguments_of
from ..request import Request, facts, given_noise, make_request
from ..run import answer, search
from .driver import Driver, is_tensors, one_generator
from .family import family_of
from .memory import COUNTS
from .noise import Streams
from .pictures import of_output
from .renderer import renderers
from .scheduler import draws_noise

# Arguments of the call that no preview depends on, or that a state holds in another form.
NOT_OF_A_PREVIEW = frozenset({"prompt", "generator", "latents", "num_inference_steps", "output_type", "return_dict"})
REFUSED = {
    "caption_upsample_temperature": "it writes another prompt in every call, by chance: give the longer prompt itself",
    "denoising_end": "its image is not finished, so no reward can judge it",
    "denoising_start": "it goes on from an image, so no noise is searched",
}


class SESPipeline(Enabled):
    """The documented call; `enable` puts this class before the pipeline's own."""

    def __call__(
        self: Any,
        *args: Any,
        seed: int | None = None,
        enable_ses: bool = False,
        ses_reward_model: Any = "pick",
        ses_eval_budget: int | None = 50,
        ses_inference_steps: int = 10,
        ses_config: SESConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with enable_ses=True, from a noise that Spectral Evolution Search found.

        seed: as generator=torch.Generator().manual_seed(seed), and the search's own seed. With or without a search.
        ses_reward_model: a name or a dict of weights for `load_reward`, a loaded reward, or any callable that
            takes images (n, 3, H, W) in [-1, 1] and the prompt, and returns n scores, higher for better. Of a video
            a callable gets all frames, (n, F, 3, H, W), and a reward of this package the middle one.
        ses_eval_budget: how many previews are made and scored; with 0 the call is the stock one. None: as many as
            SESConfig(time_limit=) allows.
        ses_inference_steps: the steps of a preview. With as many as num_inference_steps the final image equals
            the best preview; more only cost time, and give a warning.
        ses_config: everything else. Without enable_ses=True these four do nothing.

        `generator` and `latents` say what the base noise is, as they do without a search, and the search's own seed
        comes from the generator's state. callback_on_step_end sees the final image alone. Afterwards `pipe.ses_result`
        is the SearchResult. An exception leaves as it came; `pipe.ses_result` is then what was found before it. Raises
        ValueError for bad input before any work.
        """
        if not isinstance(enable_ses, bool):
            raise ValueError(f"enable_ses must be True or False, got {enable_ses!r}")
        call = super().__call__  # type: ignore[misc]
        if seed is not None:
            if kwargs.get("generator") is not None:
                raise ValueError("give seed= or generator=, not both")
            check_noise(seed, None)
            kwargs["generator"] = torch.Generator().manual_seed(int(seed))
        if not enable_ses:
            return call(*args, **kwargs)

        given = arguments_of(inspect.signature(call).bind(*args, **kwargs))
        check(given, ses_inference_steps, ses_config)
        if ses_eval_budget != 0 and getattr(ses_config, "latents", None) is None:
            held_out = getattr(ses_config, "report_rewards", ())
            check_embeds(given, [ses_reward_model, *(held_out.values() if isinstance(held_out, Mapping) else held_out)])
        with torch.no_grad():
            documented = (ses_reward_model, ses_eval_budget, ses_inference_steps, ses_config)
            return self._ses_call(call, given, seed, *documented)

    def _ses_call(
        self: Any,
        call: Callable[..., Any],
        given: Mapping[str, Any],
        seed: int | None,
        reward: Any,
        budget: Any,
        steps: Any,
        config: Any,
    ) -> Any:
        device = torch.device(self._execution_device)
        has_own = given.get("generator") is not None or given.get("latents") is not None
        from_state = getattr(config, "state", None) is not None and not has_own
        state_of_streams = Streams(one_generator(given.get("generator")), device).seed()
        # What stands for the noise inside the steps, which is the same for all candidates.
        inside = {"generator": state_of_streams} if draws_noise(self.scheduler, given.get("eta")) else {}
        request = make_request(
            reward=reward,
            budget=budget,
            steps=steps,
            config=config,
            prompt=given.get("prompt") if given.get("prompt") is not None else "",
            seed=None if from_state else state_of_streams if seed is None else seed,
            has_own_noise=given.get("latents") is not None,
            fingerprint={
                "pipeline": self._ses_stock.__name__,
                "scheduler": type(self.scheduler).__name__,
                "arguments": facts({name: each for name, each in given.items() if name not in NOT_OF_A_PREVIEW})
                | {"scheduler": facts(public(self.scheduler.config)), **inside},
            },
            device=device,
        )
        self.ses_result = None  # an earlier call's is not this one's, which is accepted
        if request.reward is None and request.latents is None:
            return call(**given)
        with CompileClock(device) as clock:
            try:
                driver = Driver(self, call, given)
                render = functools.partial(self._ses_image, driver)
                output, self.ses_result = answer(
                    request,
                    clock,
                    stock=driver.stock_image,
                    render=lambda request, begin: render(request, clock, begin),
                    as_tensor=functools.partial(of_output, device=device),
                )
                return output
            except BaseException as error:
                if request.begun:
                    self.ses_result = getattr(error, "ses_result", self.ses_result)
                self._ses_tidy(error)
                raise

    def _ses_image(
        self: Any, driver: Driver, request: Request, clock: CompileClock, begin: float
    ) -> tuple[Any, SearchResult | None]:
        """(the stock call's output with the request's noise, the result of its search)."""
        if request.latents is not None:
            return driver.final(given_noise(request.latents, driver.base)), None
        base = driver.base if request.base is None else given_noise(request.base, driver.base)
        all_frames = not is_of_this_package(request.reward)
        previews, final = renderers(driver, family_of(self), request, all_frames=all_frames)
        setting = driver.setting
        request.config = suited(request.config, min(base.shape[-2:]), setting.height // base.shape[-2])
        size = {"height": setting.height, "width": setting.width}
        found = search(previews, final, request, base, **size, clock=clock, begin=begin)
        self.ses_result = found.result
        assert found.result.latents is not None  # a search without a finite score is an error
        finished = None if driver.has_callback else found.finished
        return driver.final(found.result.latents, finished), self.ses_result

    def _ses_tidy(self: Any, error: BaseException) -> None:
        """Takes the models off the device. Where that fails too, `error` says so and still is the one that leaves."""
        try:
            self.maybe_free_model_hooks()
        except BaseException as failed:
            error.add_note(f"the clean-up after this error failed as well: {failed!r}")


def suited(config: SESConfig, side: int, pixels: int) -> SESConfig:
    """The settings, with the level of the band where it is open and a latent has more pixels than usual (Sana's 32).

    side: of the latents. With 8 pixels a latent "auto" makes a band of about 8x8; so it does here.
    """
    if pixels <= 16 or config.dwt_level != "auto" or config.state is not None:
        return config
    return replace(config, dwt_level=max(1, (side // 8).bit_length() - 1))


def check(given: Mapping[str, Any], steps: Any, config: Any) -> None:
    """Raises ValueError for what a call with SES cannot have, before any work."""
    for name in COUNTS:
        if name in given and (type(given[name]) is not int or given[name] != 1):
            raise ValueError(f"SES makes one image a call, the best it finds: leave {name}={given[name]!r} out")
    for name, why in REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"SES cannot go with {name}=: {why}")
    for name in ("timesteps", "sigmas"):
        if isinstance(given.get(name), Sized) and len(given[name]) != steps:
            raise ValueError(
                f"{name}= is a schedule of {len(given[name])} steps, and previews have {steps}: give "
                f"ses_inference_steps={len(given[name])}, or leave {name} out"
            )
    for name, value in given.items():
        rows = value if is_tensors(value) or isinstance(value, Tensor) else [None]
        if "prompt" in name and len(rows) != 1:
            raise ValueError(f"SES needs one prompt: {name}= is of {len(rows)}")
    generator = given.get("generator")
    if isinstance(generator, list) and len(generator) != 1:
        raise ValueError(f"SES makes one image a call: generator= is a list of {len(generator)}")
    if not isinstance(one_generator(generator), torch.Generator | None):
        raise ValueError(f"generator= must be a torch.Generator or a list of one, got {generator!r:.200}")
    if not isinstance(given.get("latents"), Tensor | None):
        raise ValueError(f"latents= must be a tensor, got {type(given['latents']).__name__}")
    if given.get("output_type") == "latent" and config is not None and getattr(config, "report_rewards", ()):
        raise ValueError('report_rewards judge pictures: leave output_type="latent" out')
    if given.get("latents") is not None and getattr(config, "latents", None) is not None:
        raise ValueError("give latents= or SESConfig(latents=), not both")


def check_embeds(given: Mapping[str, Any], rewards: Sequence[Any]) -> None:
    """Raises ValueError where one of the rewards reads the prompt, and the call has its embeddings alone."""
    embeds = given.get("prompt") is None and given.get("prompt_embeds") is not None
    if embeds and any(isinstance(each, str | Mapping) or is_of_this_package(each) for each in rewards):
        raise ValueError(
            "the reward reads the prompt, and prompt_embeds= are no text: give prompt=, or a callable(images, prompt) "
            "of your own, which then gets an empty prompt"
        )


def is_of_this_package(reward: Any) -> bool:
    """Whether a reward is one of this package, which reads the prompt and takes images, no videos."""
    return any(cls.__module__.partition(".")[0] == "ses_fast" for cls in type(reward).__mro__)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings, without what diffusers notes of its own."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
