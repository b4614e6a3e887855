"""What `ses-fast generate` was asked to do, checked, and the work: one prompt's image, with and without search."""

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from . import __version__
from .files import write_whole
from .job import Job, check_writable, checked_prompt
from .models import quiet
from .versions import versions

WRITTEN = ("image.png", "base.png", "budgets.png", "curve.png", "result.json")
MARKS = (10, 30, 100, 300, 1000)  # evaluations whose best image is shown, beside none and all


def prepare_generate(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments of `generate` and loads what they name."""
    prompt, job = checked_prompt(args.prompt), Job.of(args)
    if job.model == "embedded":
        from .embedded.pipeline import check_words

        check_words(prompt)
    check_writable(job.out, WRITTEN)
    from . import report  # here, so that a missing package is said before anything is loaded

    previews = _BestPreviews()
    pipe, reward, config = job.load()
    config, beside = replace(config, on_preview=previews), bool(args.random_beside)
    return partial(_search, prompt, job, pipe, reward, config, previews, report, beside)


def _search(
    prompt: str,
    job: Job,
    pipe: Any,
    reward: Any,
    config: Any,
    previews: "_BestPreviews",
    report: Any,
    beside: bool,  # whether as many random noises are scored, to be shown beside
) -> None:
    from .pipelines.enabled import picture

    call = partial(
        pipe,
        prompt,
        seed=job.seed,
        num_inference_steps=job.steps,
        **quiet(pipe),
        **job.size,
    )
    picture(call(enable_ses=False)).save(job.out / "base.png")
    search = partial(call, enable_ses=True, ses_reward_model=reward, ses_inference_steps=job.preview_steps)
    output = search(ses_eval_budget=job.budget, ses_config=config)
    picture(output).save(job.out / "image.png")

    result = pipe.ses_result
    random = _random(pipe, search, config, result) if beside else None
    generations = [evaluation.generation for evaluation in result.trace]
    report.draw_budgets(previews.best, job.out / "budgets.png", prompt)
    report.draw_curve(_final(result), generations, job.out / "curve.png", result.base_score, random and _final(random))
    summary = {
        "base_score": _number(result.base_score),
        "score": result.score,
        "held_out": {
            name: {"base": _number(held.base), "answer": _number(held.answer)} for name, held in result.held_out.items()
        },
        "evaluations": result.evaluations,
        "seed": result.seed,
        "settings": {"prompt": prompt, **job.settings},
        "versions": {"ses-fast": __version__, "python": platform.python_version(), **versions()},
        "scores": [
            {"generation": each.generation, "index": each.index, "score": _number(each.score), "steps": each.steps}
            for each in result.trace
        ],
        "refined": [
            {"generation": each.generation, "index": each.index, "score": _number(each.score)}
            for each in result.refined
        ],
        "forwards": result.forwards,
        "seconds": result.seconds,
    }
    if random is not None:
        summary["random"] = {"score": random.score, "forwards": random.forwards, "seconds": random.seconds} | {
            "scores": [_number(score) for score in _final(random)]
        }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_whole(job.out / "result.json", lambda file: file.write_text(text))
    print(f"base score   {result.base_score:.2f}")
    print(f"best score   {result.score:.2f}")
    for name, held in result.held_out.items():
        print(f"held out     {name}: base {held.base:.2f}, best {held.answer:.2f}")
    if random is not None:
        print(f"random       best score {random.score:.2f} of as many noises without a search")
    print(f"evaluations  {result.evaluations}")
    print(f"seconds      {result.seconds['total']:.1f}")
    print(f"written to   {job.out}: {' '.join(WRITTEN)}")


def _random(pipe: Any, search: Callable[..., Any], config: Any, result: Any) -> Any:
    """The result for as many random noises, the base among them, by the same previews; the search's was `result`."""
    plain = replace(config, strategy="random", on_preview=None, report_rewards=(), time_limit=None)
    search(ses_eval_budget=result.evaluations, ses_config=plain)
    return pipe.ses_result


def _final(result: Any) -> list[float]:
    """The scores in order; minus infinity for one that a race stopped on its way."""
    return [-math.inf if evaluation.steps else evaluation.score for evaluation in result.trace]


class _BestPreviews:
    """The best preview and its score after 0 (the base, scored first), 10, 30, ... and all evaluations.

    One that a race stopped on its way is never the best.
    """

    def __init__(self) -> None:
        self._at: dict[int, tuple[float, Any]] = {}
        self._count = 0
        self._leader: tuple[float, Any] = (-math.inf, None)

    def __call__(self, images: Any, scores: Any, generation: int, first_index: int, steps: Any = None) -> None:
        early = [0] * len(images) if steps is None else steps.tolist()
        for image, score, stopped in zip(images, map(float, scores), early, strict=True):
            score = score if math.isfinite(score) and not stopped else -math.inf  # as the search counts it
            self._count += 1
            if self._leader[1] is None or score > self._leader[0]:
                self._leader = (score, image.detach().cpu())
            if self._count == 1:
                self._at[0] = self._leader
            if self._count in MARKS:
                self._at[self._count] = self._leader

    @property
    def best(self) -> dict[int, tuple[float, Any]]:
        """Evaluations -> (score, image [3, H, W])."""
        return self._at | ({self._count: self._leader} if self._count else {})


def _number(score: float | None) -> float | None:
    """JSON has no infinity: null stands for a score that was not finite."""
    return score if score is not None and math.isfinite(score) else None
