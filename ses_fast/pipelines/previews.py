"""The search's objective: from noises to previews to scores.

A preview is a candidate's image made cheaply: denoised in `ses_inference_steps` steps, and decoded; smaller, or
stopped on its way, where the settings say so.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..objective import Objective, Report, Scored, check_fingerprint
from ..stopwatch import Stopwatch
from .batching import Batches
from .race import Rung, who_goes_on
from .renderer import Draft, Renderer
from .scoring import Scoring

STAGES = ("denoise", "decode", "reward")


class Previews(Objective):
    """Renders candidates and has them scored.

    scale: 2 where the renderer's images are half as high and wide as the candidates'.
    rungs: where a race stops candidates; then a whole generation is scored together.
    include_base: whether the very first candidate is the base, which no race stops: the answer is never worse.
    together: how many previews are scored together; None: a whole generation.
    fingerprint: what the scores depend on beside the noise, as JSON.
    clock: seconds; a device's work is waited for.
    afterwards: how many seconds the call needs after the search, where they are taken off its time.
    """

    def __init__(
        self,
        renderer: Renderer,
        scoring: Scoring,
        *,
        denoising: Batches,
        decoding: Batches,
        together: int | None,
        fingerprint: Mapping[str, Any],
        on_preview: Callable[..., Any] | None = None,
        clock: Callable[[], float],
        scale: int = 1,
        rungs: Sequence[Rung] = (),
        include_base: bool = False,
        afterwards: Callable[[], float] | None = None,
    ) -> None:
        self.renderer, self.scoring = renderer, scoring
        self.denoising, self.decoding = denoising, decoding
        self.together = None if rungs else together
        self.on_preview = _with_steps(on_preview)
        self.scale, self.rungs, self.include_base = scale, tuple(rungs), include_base
        self.stopwatch = Stopwatch(STAGES, clock)
        self.afterwards, self.longest = afterwards, 0.0  # seconds between two reports
        self.forwards = 0  # of the denoiser, counted for each candidate
        self.looks = 0  # images decoded and scored
        self.looked_for_cause = False
        self._fingerprint = dict(fingerprint)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {**self._fingerprint, **self.scoring.fingerprint}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        check_fingerprint(fingerprint, self._fingerprint)
        self.scoring.resume(fingerprint)

    @property
    def reserve(self) -> float:  # type: ignore[override]
        return 0.0 if self.afterwards is None else self.afterwards() + self.longest

    def score(self, candidates: Tensor, generation: int, first: int, report: Report) -> None:
        for noises in candidates.split(self.together or len(candidates)):
            spent = sum(self.stopwatch.seconds.values())
            images, given, scored = self._score(noises, self.include_base and generation == first == 0)
            self.longest = max(self.longest, sum(self.stopwatch.seconds.values()) - spent)
            goes_on = report(scored)  # first: a callback may raise, and the scores are paid
            if self.on_preview is not None:
                self.on_preview(images, given, generation, first, scored.steps)
            if not goes_on:
                return
            first += len(noises)

    def _score(self, noises: Tensor, has_base: bool) -> tuple[Tensor, Any, Scored]:
        """(the images, the scores as the reward gave them, the same as the search takes them)"""
        self.stopwatch.restart()
        noises = self._of_the_renderer(noises)
        draft = self._advanced(noises, self.rungs[0].step if self.rungs else self.renderer.steps)
        if not self.rungs:
            images, given, scored = self._looked_at(draft.latents)
        else:
            images, given, scored = self._raced(draft, has_base)
        if not self.looked_for_cause and not (finite := scored.scores.isfinite()).all():
            self.looked_for_cause = True
            index = int(finite.logical_not().nonzero()[0])
            try:
                why = self._why_not_finite(noises[index : index + 1], scored, index)
            except Exception as error:  # the search can go on without the answer
                why = f"which part gives it first could not be found: {error!r}"
            scored = scored._replace(why_not_finite=why)
        return images, given, scored

    def finished(self, noises: Tensor) -> tuple[Tensor, Tensor, Scored]:  # [n, C, h, w]
        """(the latents after all steps, the images, the scores); whatever the race."""
        self.stopwatch.restart()
        latents = self._advanced(self._of_the_renderer(noises), self.renderer.steps).latents
        images, _, scored = self._looked_at(latents)
        return latents, images, scored

    def _of_the_renderer(self, noises: Tensor) -> Tensor:  # [n, C, h, w] -> [n, C, h, w] or half of it
        # The lowest band of white noise is white noise, and the candidates' are searched by the same numbers.
        return noises if self.scale == 1 else ops.split_low_band(noises, 1)[0].to(noises.dtype)

    def _advanced(self, start: Tensor | Draft, to: int) -> Draft:
        """The noises, or a draft, after `to` steps."""
        renderer = self.renderer
        renderer.prepare("denoise")

        def advance(rows: Tensor | Draft) -> Draft:
            return renderer.advance(rows if isinstance(rows, Draft) else renderer.begin(rows), to)

        done = start.step if isinstance(start, Draft) else 0
        # Survivors are not filled up to a whole generation again, but to a power of two: few sizes to compile for.
        fill_to = 1 << (len(start) - 1).bit_length() if done else None
        draft = self.denoising.run(advance, start, renderer.model, fill_to)
        self.forwards += len(draft) * (to - done) * renderer.forwards_a_step
        self.stopwatch.lap("denoise")
        return draft

    def _looked_at(self, latents: Tensor) -> tuple[Tensor, Any, Scored]:
        """(images [n, 3, H, W] in [-1, 1], the scores as the reward gave them, the same as the search takes them)"""
        self.renderer.prepare("decode")
        # A decoder leaves the range.
        images = self.decoding.run(self.renderer.decode, latents, self.renderer.model).clamp(-1, 1)
        self.stopwatch.lap("decode")
        shown = images if self.on_preview is None else images.clone()  # a reward may write on what it gets
        given, scored = self.scoring.score(shown)
        self.stopwatch.lap("reward")
        self.looks += len(images)
        return images, given, scored

    def _raced(self, draft: Draft, has_base: bool) -> tuple[Tensor, Any, Scored]:
        """As `_looked_at`, of a draft that stands at the first rung: who is stopped keeps its early image and score."""
        started = len(draft)
        running = torch.arange(started, device=draft.latents.device)
        images, given, scored = self._looked_at(_clean(draft))
        steps = torch.full((started,), draft.step, dtype=torch.int64, device="cpu")
        last = scored.scores  # of those that are running
        for rung, to in zip(self.rungs, (*(rung.step for rung in self.rungs[1:]), self.renderer.steps), strict=True):
            stay = who_goes_on(last, rung.share, started, has_base)
            running, draft = running[stay.to(running.device)], draft.rows(stay.to(running.device))
            draft = self._advanced(draft, to)
            is_last = to == self.renderer.steps
            seen = self._looked_at(draft.latents if is_last else _clean(draft))
            if self.on_preview is not None:
                images = _put(images, running, seen[0])
            given, scored = _put_scores(given, scored, running, seen[2])
            steps[running.cpu()] = 0 if is_last else to
            last = seen[2].scores
        return images, given, scored._replace(steps=steps)

    def _why_not_finite(self, noise: Tensor, scored: Scored, index: int) -> str:
        """Which part first gives a value that is not finite: one candidate is rendered again, step by step."""
        renderer = self.renderer
        renderer.prepare("denoise")
        draft = renderer.begin(noise)
        for step in [renderer.steps] if renderer.in_one_go else range(1, renderer.steps + 1):
            draft = renderer.advance(draft, step)
            if not draft.latents.isfinite().all() and renderer.in_one_go:
                return "the image that the pipeline's own call makes is not finite"
            if not draft.latents.isfinite().all():
                return f"the first part to fail is the denoiser, in step {step} of {renderer.steps}"
        renderer.prepare("decode")
        if not renderer.decode(draft.latents).isfinite().all():
            return "the denoiser's latents are finite, and the decoder's image is not"
        members = [repr(name) for name, raw in scored.members.items() if not raw[index].isfinite()]
        which = f" {', '.join(members)}" if members else ""
        return f"the image is finite, and the score of the reward{which} is not"


def _clean(draft: Draft) -> Tensor:
    assert draft.clean is not None  # a renderer with sigmas makes it
    return draft.clean


def _put(whole: Tensor, rows: Tensor, news: Tensor) -> Tensor:
    return whole.index_copy(0, rows.to(whole.device), news.to(whole.dtype))


def _put_scores(given: Any, scored: Scored, rows: Tensor, news: Scored) -> tuple[Any, Scored]:
    """The scores of a whole generation, with newer ones of some of its candidates in their places."""
    members = {name: _put(raw, rows, news.members[name]) for name, raw in scored.members.items()}
    scored = Scored(_put(scored.scores, rows, news.scores), members)
    return (scored.scores.to(given.dtype, copy=True) if isinstance(given, Tensor) else scored.scores.tolist()), scored


def _with_steps(callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """`callback` as one of five arguments: the last, `steps`, is for those that have such a parameter."""
    if callback is None:
        return None
    try:
        takes_steps = "steps" in inspect.signature(callback).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        takes_steps = False

    def call(images: Tensor, scores: Any, generation: int, first: int, steps: Tensor | None) -> Any:
        if not takes_steps:
            return callback(images, scores, generation, first)
        none = torch.zeros(len(images), dtype=torch.int64, device="cpu")
        return callback(images, scores, generation, first, steps=none if steps is None else steps.clone())

    return call
