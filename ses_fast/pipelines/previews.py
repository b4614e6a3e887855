"""The search's objective: from noises to previews to scores.

A preview is a candidate's image made cheaply: denoised in `ses_inference_steps` steps, and decoded.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..objective import Objective, Report, Scored, check_fingerprint
from ..stopwatch import Stopwatch
from .batching import Batches
from .renderer import Renderer
from .scoring import Scoring

STAGES = ("denoise", "decode", "reward")


class Previews(Objective):
    """Renders candidates and has them scored.

    together: how many previews are scored together; None: a whole generation.
    fingerprint: what the scores depend on beside the noise, as JSON.
    clock: seconds; a device's work is waited for.
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
        on_preview: Callable[[Tensor, Any, int, int], Any] | None,
        clock: Callable[[], float],
    ) -> None:
        self.renderer, self.scoring = renderer, scoring
        self.denoising, self.decoding, self.together = denoising, decoding, together
        self.on_preview = on_preview
        self.stopwatch = Stopwatch(STAGES, clock)
        self.looked_for_cause = False
        self._fingerprint = dict(fingerprint)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {**self._fingerprint, **self.scoring.fingerprint}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        check_fingerprint(fingerprint, self._fingerprint)
        self.scoring.resume(fingerprint)

    def score(self, candidates: Tensor, generation: int, first: int, report: Report) -> None:
        for noises in candidates.split(self.together or len(candidates)):
            images, given, scored = self._score(noises)
            goes_on = report(scored)  # first: a callback may raise, and the scores are paid
            if self.on_preview is not None:
                self.on_preview(images, given, generation, first)
            if not goes_on:
                return
            first += len(noises)

    def images(self, noises: Tensor) -> Tensor:  # [n, C, h, w] -> [n, 3, H, W] in [-1, 1]
        """The previews."""
        renderer, stopwatch = self.renderer, self.stopwatch
        renderer.prepare("denoise")
        latents = self.denoising.run(self._denoise, noises, renderer.model)
        stopwatch.lap("denoise")
        renderer.prepare("decode")
        images = self.decoding.run(renderer.decode, latents, renderer.model)
        stopwatch.lap("decode")
        return images.clamp(-1, 1)  # a decoder leaves the range

    def _denoise(self, noises: Tensor) -> Tensor:
        return self.renderer.advance(self.renderer.begin(noises), self.renderer.steps).latents

    def _score(self, noises: Tensor) -> tuple[Tensor, Any, Scored]:
        """(the images, the scores as the reward gave them, the same as the search takes them)"""
        self.stopwatch.restart()
        images = self.images(noises)
        shown = images if self.on_preview is None else images.clone()  # a reward may write on what it gets
        given, scored = self.scoring.score(shown)
        self.stopwatch.lap("reward")
        if not self.looked_for_cause and not (finite := scored.scores.isfinite()).all():
            self.looked_for_cause = True
            index = int(finite.logical_not().nonzero()[0])
            try:
                why = self._why_not_finite(noises[index : index + 1], scored, index)
            except Exception as error:  # the search can go on without the answer
                why = f"which part gives it first could not be found: {error!r}"
            scored = scored._replace(why_not_finite=why)
        return images, given, scored

    def _why_not_finite(self, noise: Tensor, scored: Scored, index: int) -> str:
        """Which part first gives a value that is not finite: one candidate is rendered again, step by step."""
        renderer = self.renderer
        renderer.prepare("denoise")
        draft = renderer.begin(noise)
        for step in range(1, renderer.steps + 1):
            draft = renderer.advance(draft, step)
            if not draft.latents.isfinite().all():
                return f"the first part to fail is the denoiser, in step {step} of {renderer.steps}"
        renderer.prepare("decode")
        if not renderer.decode(draft.latents).isfinite().all():
            return "the denoiser's latents are finite, and the decoder's image is not"
        members = [repr(name) for name, raw in scored.members.items() if not raw[index].isfinite()]
        which = f" {', '.join(members)}" if members else ""
        return f"the image is finite, and the score of the reward{which} is not"
