"""One search over previews, and the rewards that judge what it found: the same for every library."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..digests import digests_of_weights
from ..errors import warn
from ..loop import evolve
from ..result import HeldOut, SearchResult
from ..scores import as_scores
from .batching import Batches, first_size
from .compiling import CompileClock
from .config import Preview
from .previews import Previews
from .race import Rung, rungs_of
from .refining import refine
from .renderer import Renderer
from .request import Request
from .scoring import Scoring, scoring_of
from .sharing import shared


class Found(NamedTuple):
    """What a search found."""

    result: SearchResult
    finished: Tensor | None  # [1, ...]: the answer's latents after the final image's steps, where it was refined


def search(
    renderer: Renderer,
    final: Renderer,
    request: Request,
    base: Tensor,  # [1, C, h, w]
    *,
    height: int,
    width: int,
    clock: CompileClock,
    begin: float,
) -> Found:
    """Searches from `base` for the noise whose preview the request's reward scores highest.

    renderer, final: of previews, half as large where the settings say so, and of the final image. height, width: the
    final image's, in pixels. begin: when the call began, by `clock`. Whatever is raised carries the result so far as
    `error.ses_result`.
    """
    config, cheap = request.config, request.config.preview
    assert request.reward is not None
    renderer, final = shared(renderer, request, "preview"), shared(final, request, "final")
    if request.steps > final.steps:
        warn(
            f"ses_inference_steps={request.steps} makes a preview cost more than the final image with its "
            f"{final.steps} steps: ses_inference_steps={final.steps} is enough"
        )
    if renderer.largest_denoise == 1 and config.batch_size not in (1, "auto"):
        warn("the call's inputs or the pipeline's model_fn allow no batch: previews go one by one")
    if cheap.scale == 2 and any(side % 2 for side in base.shape[-2:]):
        raise ValueError(f"Preview(scale=2) needs even latents, this call's are {tuple(base.shape)}: give another size")
    evolution = config.evolution(height, width)
    if cheap.rungs and request.budget is not None and request.budget % evolution.popsize:
        warn(
            f"ses_eval_budget={request.budget} ends inside a generation of {evolution.popsize}, and a race is of those "
            "that are scored together: a search that goes on from this one stops others than an uninterrupted one"
        )
    if cheap.scale == 2 and evolution.strategy == "high_band" and evolution.dwt_level == 1:
        raise ValueError("previews of half the size do not show the high band of level 1: give dwt_level 2 or more")
    at_once = config.batch_size if isinstance(config.batch_size, int) else None
    scoring = scoring_of(request.reward, request.prompt, at_once)
    pixels = height * width
    previews = _previews(
        renderer,
        request,
        scoring,
        most=evolution.popsize if request.budget is None else min(evolution.popsize, request.budget),
        pixels=pixels // cheap.scale**2,
        clock=clock,
        on_preview=config.on_preview,
        scale=cheap.scale,
        rungs=_rungs(renderer, cheap),
        include_base=config.include_base,
    )
    full = _previews(
        renderer=final, request=request, scoring=scoring, most=cheap.refine + 1, pixels=pixels, clock=clock
    )
    prompt_seconds, compiled_before = clock() - begin, clock.compiling
    if request.budget is None:
        previews.afterwards = lambda: prompt_seconds + _final_seconds(previews, final, cheap.refine)
    result, counts, request.begun = None, None, True
    try:
        request.ranks.compare({"refine": cheap.refine, "image": [final.steps, height, width]})
        result = evolve(
            base,
            previews,
            request.budget,
            evolution.popsize,
            evolution.k_elites,
            evolution.wavelet_name,
            evolution.dwt_level,
            strategy=evolution.strategy,
            seed=request.search_seed,
            generator=config.generator,
            include_base=config.include_base,
            on_generation=config.on_generation,
            progress=config.progress,
            time_limit=config.time_limit,
            state=config.state,
            backend=config.backend,
        )
        finished = None
        if cheap.refine:
            result, finished = refine(result, full, cheap.refine, backend=config.backend)
        counts = request.ranks.gather(torch.tensor([previews.forwards, full.forwards])).view(-1, 2).sum(0).tolist()
        return Found(result, finished)
    except BaseException as error:
        if result is not None:  # it was found, and refining it failed
            object.__setattr__(error, "ses_result", result)
        result = getattr(error, "ses_result", None)
        raise
    finally:
        if result is not None:
            seconds, spent = result.seconds, previews.stopwatch.seconds
            # The objective's other time is on_preview's; evolve's clock goes on while dynamo compiles.
            rest = seconds.pop("objective") - sum(spent.values()) - (clock.compiling - compiled_before)
            seconds["other"] += rest
            seconds.update(prompt=prompt_seconds, compile=clock.compiling, **spent)
            forwards = map(int, counts or (previews.forwards, full.forwards))  # of all ranks, where all have ended
            result.forwards["preview"] = next(forwards)
            if cheap.refine:
                seconds["refine"], result.forwards["refine"] = sum(full.stopwatch.seconds.values()), next(forwards)
            seconds["total"] = sum(value for name, value in seconds.items() if name != "total")


def _previews(
    renderer: Renderer,
    request: Request,
    scoring: Scoring,
    *,
    most: int,
    pixels: int,
    clock: CompileClock,
    **settings: Any,
) -> Previews:
    """The images of `renderer`, of so many `pixels`; at most `most` of a generation, shared among the ranks."""
    most = -(-most // request.ranks.size)
    size = first_size(request.config.batch_size, most, renderer.device, pixels)
    automatic = request.config.batch_size == "auto"
    batches = functools.partial(Batches, most=most, device=renderer.device, automatic=automatic)
    whole = automatic or renderer.models_take_turns or scoring.whole_generations
    return Previews(
        renderer,
        scoring,
        denoising=batches(
            renderer.largest_denoise or size, filled=renderer.static_shapes, save_memory=renderer.save_memory
        ),
        decoding=batches(renderer.largest_decode or size),
        together=None if whole else int(request.config.batch_size),
        fingerprint=request.fingerprint,
        clock=clock,
        ranks=request.ranks,
        **settings,
    )


def _rungs(renderer: Renderer, cheap: Preview) -> list[Rung]:
    if not cheap.rungs:
        return []
    if renderer.sigmas is None:
        raise ValueError(
            "Preview(race=) looks at images on their way, and this pipeline or its scheduler shows none: leave race out"
        )
    return rungs_of(cheap.rungs, renderer.sigmas)


def _final_seconds(previews: Previews, final: Renderer, refine: int) -> float:
    """How long the final image will take, with those of `refine`, judged by what the previews took."""
    seconds, images = previews.stopwatch.seconds, refine + 1
    forwards = images * final.steps * final.forwards_a_step
    larger = previews.scale**2
    denoise = forwards * seconds["denoise"] / max(1, previews.forwards)
    looks = max(1, previews.looks)
    scored_again = images * seconds["reward"] / looks if refine else 0.0  # whatever its size
    return larger * (denoise + images * seconds["decode"] / looks) + scored_again


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
    with request.ranks.joined():
        begin = clock()
        if request.ranks.size > 1:
            rewards = {"ses_reward_model": request.reward, "report_rewards": request.held_out}
            request.ranks.compare(digests_of_weights(**rewards), where_known=True)
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
