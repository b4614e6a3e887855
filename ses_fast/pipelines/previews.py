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
from ..digests import digest_of_weights
from ..distributed import ALONE, Ranks
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
    together: how many previews are scored together on each rank; None: a whole generation.
    ranks: that share the previews. Each renders its own; all learn all scores.
    fingerprint: what the scores depend on beside the noise, as JSON.
    on_preview: called on the first rank alone, with the previews that it made: the first ones of each batch.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.renderer, self.scoring = renderer, scoring
        self.denoising, self.decoding = denoising, decoding
        self.together, self.ranks = None if rungs else together, ranks
        self.on_preview = _with_steps(on_preview if ranks.rank == 0 else None)
        self.scale, self.rungs, self.include_base = scale, tuple(rungs), include_base
        self.stopwatch = Stopwatch(STAGES, clock)
        self.afterwards, self.longest = afterwards, 0.0  # seconds between two reports
        self.forwards = 0  # of the denoiser here, counted for each candidate
        self.looks = 0  # images decoded and scored
        self.looked_for_cause = False
        self._fingerprint = dict(fingerprint)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {**self._fingerprint, **self.scoring.fingerprint}

    @property
    def facts(self) -> Mapping[str, Any]:
        settings = {"batch_size": self.together, "rungs": self.rungs, "steps": self.renderer.steps}
        return settings | {"weights": digest_of_weights(self.renderer.model)}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        check_fingerprint(fingerprint, self._fingerprint)
        self.scoring.resume(fingerprint)

    @property
    def reserve(self) -> float:  # type: ignore[override]
        return 0.0 if self.afterwards is None else self.afterwards() + self.longest

    def score(self, candidates: Tensor, generation: int, first: int, report: Report) -> None:
        together = len(candidates) if self.together is None else self.together * self.ranks.size
        for noises in candidates.split(together):
            spent = sum(self.stopwatch.seconds.values())
            images, given, scored = self._score(noises, self.include_base and generation == first == 0)
            self.longest = max(self.longest, sum(self.stopwatch.seconds.values()) - spent)
            goes_on = report(scored)  # first: a callback may raise, and the scores are paid
            if self.on_preview is not None:
                steps = None if scored.steps is None else scored.steps[: len(images)]
                self.on_preview(images, given, generation, first, steps)
            if not goes_on:
                return
            first += len(noises)

    def _score(self, noises: Tensor, has_base: bool) -> tuple[Tensor, Any, Scored]:
        """(this rank's images, their scores as the reward gave them, all scores as the search takes them)"""
        self.stopwatch.restart()
        noises, started = self._of_the_renderer(noises), len(noises)
        mine = self.ranks.share(started)
        draft = self._advanced(noises[mine], self.rungs[0].step if self.rungs else self.renderer.steps)
        if not self.rungs:
            images, given, scored = self._looked_at(draft.latents)
        else:
            images, given, scored = self._raced(draft, started, mine, has_base)
        if self.ranks.rank == 0 and not self.looked_for_cause and not (finite := scored.scores.isfinite()).all():
            self.looked_for_cause = True
            index = int(finite.logical_not().nonzero()[0])
            try:
                why = self._why_not_finite(noises[index : index + 1], scored, index)
            except Exception as error:  # the search can go on without the answer
                why = f"which part gives it first could not be found: {error!r}"
            scored = scored._replace(why_not_finite=why)
        return images, given, scored

    def finished(self, noises: Tensor) -> tuple[Tensor, Scored]:  # [n, C, h, w]
        """(the latents after all steps of this rank's share, the scores of all); whatever the race."""
        self.stopwatch.restart()
        mine = self._of_the_renderer(noises)[self.ranks.share(len(noises))]
        latents = self._advanced(mine, self.renderer.steps).latents
        return latents, self._looked_at(latents)[2]

    def _of_the_renderer(self, noises: Tensor) -> Tensor:  # [n, C, h, w] -> [n, C, h, w] or half of it
        # The lowest band of white noise is white noise, and the candidates' are searched by the same numbers.
        return noises if self.scale == 1 else ops.split_low_band(noises, 1)[0].to(noises.dtype)

    def _advanced(self, start: Tensor | Draft, to: int) -> Draft:
        """The noises, or a draft, after `to` steps."""
        renderer = self.renderer
        if not len(start):  # fewer candidates than ranks, or none of this rank's goes on
            none = start.latents if isinstance(start, Draft) else start
            return Draft(none, to, clean=none)
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
        """(images [m, 3, H, W] in [-1, 1], their scores as the reward gave them, those of all ranks' images as the
        search takes them)
        """
        images = self._decoded(latents) if len(latents) else latents.new_empty(0, 3, 1, 1)
        self.stopwatch.lap("decode")
        shown = images if self.on_preview is None else images.clone()  # a reward may write on what it gets
        given, scored = self.scoring.score(shown, self.ranks)
        self.stopwatch.lap("reward")
        self.looks += len(images)
        return images, given, scored

    def _decoded(self, latents: Tensor) -> Tensor:
        self.renderer.prepare("decode")
        # A decoder leaves the range.
        return self.decoding.run(self.renderer.decode, latents, self.renderer.model).clamp(-1, 1)

    def _raced(
        self,
        draft: Draft,  # of m candidates, `mine` of those that started
        started: int,
        mine: slice,
        has_base: bool,
    ) -> tuple[Tensor, Any, Scored]:
        """As `_looked_at`, of drafts that stand at the first rung: who is stopped keeps its early image and score."""
        first = mine.start
        running = torch.arange(started, device="cpu")  # of all ranks; `mine` of these are here
        images, given, scored = self._looked_at(_clean(draft))
        steps = torch.full((started,), draft.step, dtype=torch.int64, device="cpu")
        last = scored.scores  # of those that are running
        for rung, to in zip(self.rungs, (*(rung.step for rung in self.rungs[1:]), self.renderer.steps), strict=True):
            stay = who_goes_on(last, rung.share, started, has_base).cpu()
            running, before = running[stay], int((stay < mine.start).sum())
            here = stay[(stay >= mine.start) & (stay < mine.stop)] - mine.start
            mine = slice(before, before + len(here))
            draft = self._advanced(draft.rows(here.to(draft.latents.device)), to)
            is_last = to == self.renderer.steps
            seen = self._looked_at(draft.latents if is_last else _clean(draft))
            if self.on_preview is not None and len(here):
                images = _put(images, running[mine] - first, seen[0])
            scored = _put_scores(scored, running, seen[2])
            steps[running] = 0 if is_last else to
            last = seen[2].scores
        shown = scored.scores[first : first + len(images)]
        given = shown.to(given.dtype, copy=True) if isinstance(given, Tensor) else shown.tolist()
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


def _put_scores(scored: Scored, rows: Tensor, news: Scored) -> Scored:
    """The scores of a whole generation, with newer ones of some of its candidates in their places."""
    members = {name: _put(raw, rows, news.members[name]) for name, raw in scored.members.items()}
    return Scored(_put(scored.scores, rows, news.scores), members)


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
