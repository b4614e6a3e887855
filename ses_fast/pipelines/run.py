"""One search over previews, and the rewards that judge what it found: the same for every library."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import warn
from ..loop import evolve
from ..result import HeldOut, SearchResult
from ..scores import as_scores
from .batching import Batches, first_size
from .compiling import CompileClock
from .previews import Previews
from .renderer import Renderer
from .request import Request
from .scoring import scoring_of


def search(
    renderer: Renderer,
    request: Request,
    base: Tensor,  # [1, C, h, w]
    *,
    height: int,
    width: int,
    final_steps: int,
    clock: CompileClock,
    begin: float,
) -> SearchResult:
    """Searches from `base` for the noise whose preview the request's reward scores highest.

    height, width: the image's, in pixels. begin: when the call began, by `clock`. Whatever is raised carries the result
    so far as `error.ses_result`.
    """
    config = request.config
    assert request.reward is not None
    if request.steps > final_steps:
        warn(
            f"ses_inference_steps={request.steps} makes a preview cost more than the final image with its "
            f"{final_steps} steps: ses_inference_steps={final_steps} is enough"
        )
    evolution = config.evolution(height, width)
    most = min(evolution.popsize, request.budget)
    size = first_size(config.batch_size, most, renderer.device, height, width)
    if renderer.largest_denoise == 1 and size != 1:
        warn("the call's inputs or the pipeline's model_fn allow no batch: previews go one by one")
    batches = functools.partial(Batches, most=most, device=renderer.device, automatic=config.batch_size == "auto")
    scoring = scoring_of(request.reward, request.prompt)
    whole = config.batch_size == "auto" or renderer.models_take_turns or scoring.whole_generations
    previews = Previews(
        renderer,
        scoring,
        denoising=batches(
            renderer.largest_denoise or size, filled=renderer.static_shapes, save_memory=renderer.save_memory
        ),
        decoding=batches(renderer.largest_decode or size),
        together=None if whole else int(config.batch_size),
        fingerprint=request.fingerprint,
        on_preview=config.on_preview,
        clock=clock,
    )
    prompt_seconds, compiled_before = clock() - begin, clock.compiling
    result, request.begun = None, True
    try:
        result = evolve(
            base,
            previews,
            request.budget,
            evolution.popsize,
            evolution.k_elites,
            evolution.wavelet_name,
            evolution.dwt_level,
            seed=request.search_seed,
            generator=config.generator,
            include_base=config.include_base,
            on_generation=config.on_generation,
            progress=config.progress,
            time_limit=config.time_limit,
            state=config.state,
            backend=config.backend,
        )
        return result
    except BaseException as error:
        result = getattr(error, "ses_result", None)
        raise
    finally:
        if result is not None:
            seconds, spent = result.seconds, previews.stopwatch.seconds
            # The objective's other time is on_preview's; evolve's clock goes on while dynamo compiles.
            rest = seconds.pop("objective") - sum(spent.values()) - (clock.compiling - compiled_before)
            seconds["other"] += rest
            seconds.update(prompt=prompt_seconds, compile=clock.compiling, **spent)
            seconds["total"] = sum(value for name, value in seconds.items() if name != "total")


def answer(
    request: Request,
    clock: CompileClock,
    *,
    stock: Callable[[], Any],
    render: Callable[[Request, float], tuple[Any, SearchResult | None]],
    as_tensor: Callable[[Any], Tensor],
) -> tuple[Any, SearchResult | None]:
    """(the call's image, the result of its search; None where the request's latents were rendered without one).

    stock: makes the image without a search. render: makes the request's image; it gets the time, by `clock`, when
    that began. as_tensor: an image of the library as [1, 3, H, W] in [-1, 1], for the held-out rewards.
    """
    begin = clock()
    base_scores: dict[str, float] = {}
    if request.held_out:  # first, so that a reward that fails does so before the search is paid
        base = stock() if request.base is None else render(replace(request, latents=request.base), begin)[0]
        base_scores = judge(request.held_out, as_tensor(base), request.prompt)
    judged = clock()
    image, result = render(request, judged)
    rendered = clock()
    if result is None:
        return image, None
    seconds = result.seconds
    seconds["final"] = rendered - judged - (seconds["total"] - seconds["compile"])
    if request.held_out:
        answer_scores = base_scores
        if result.latents is None or not torch.equal(result.latents, result.state.base):
            try:
                answer_scores = judge(request.held_out, as_tensor(image), request.prompt)
            except BaseException as error:
                object.__setattr__(error, "ses_result", result)
                raise
        result = replace(
            result, held_out={name: HeldOut(base_scores[name], answer_scores[name]) for name in request.held_out}
        )
        seconds["held_out"] = judged - begin + clock() - rendered
    seconds["compile"] = clock.compiling
    seconds["total"] = sum(value for name, value in seconds.items() if name != "total")
    return image, result


def judge(
    rewards: Mapping[str, Callable[[Tensor, str], Any]],
    image: Tensor,  # [1, 3, H, W] in [-1, 1]
    prompt: str,
) -> dict[str, float]:
    """What each held-out reward says of an image. Raises ValueError for a reward that gives no single number."""
    scores = {}
    for name, reward in rewards.items():
        score = as_scores(reward(image.clone(), prompt), 1, f"held-out reward {name!r}").item()
        if not math.isfinite(score):
            warn(f"the held-out reward {name!r} gave a score that is not finite")
        scores[name] = score
    return scores
