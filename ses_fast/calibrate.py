"""Which previews can be trusted on a model that nobody has measured: `ses-fast calibrate`.

The same noises at full fidelity and at each cheaper setting. What ranks them nearly alike, and costs less, is worth
searching with. A race is judged by its own estimates, x0 after each step; a level by whether the low band decides what
an image is worth.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import evolution, ops
from .files import write_whole
from .pipelines import Preview, SESConfig, noise_levels
from .pipelines.race import who_goes_on
from .result import SearchResult
from .scores import as_scores
from .statistics import (
    Interval,
    best,
    bootstrap,
    mean_of,
    moments,
    overlap,
    pooled,
    pooled_correlation,
    spearman,
    worth,
)
from .studio import Studio, score_of
from .tables import table

ENOUGH = 0.8  # the rank correlation of a preview that is recommended
WORTHWHILE = 1.1  # a race that is worth less is not
GENERATION = SESConfig().popsize  # so many race together
SHARES = ((0.5,), (0.3,), (0.5, 0.2), (0.5, 0.3))  # of races that are tried on the measured scores
FEWER = (0.25, 0.375, 0.5, 0.75)  # of the image's steps
LEVELS = 4
RELATIVES = 6  # noises a prompt whose bands are changed
REFINED = range(6)
EARLY = "x0 on the way"


@dataclass(frozen=True)
class Setting:
    """A way to make previews."""

    name: str
    steps: int
    preview: Preview = Preview()


@dataclass
class Look:
    """What a setting, or x0 on the way, says of the noises: scores of each prompt, and seconds of an image."""

    scores: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, scores: Sequence[float], seconds: float) -> None:
        """Raises ValueError for scores that rank nothing."""
        if bad := [score for score in scores if not math.isfinite(score)]:
            raise ValueError(f"the reward gave {bad[0]} for {len(bad)} of {len(scores)} previews: it cannot rank them")
        self.scores.append(list(scores))
        self.seconds.append(seconds)

    def cost(self, full: "Look") -> float:
        """Over that of a preview of full fidelity."""
        return sum(self.seconds) / sum(full.seconds)


@dataclass
class Measured:
    """All looks at the noises of the prompts."""

    full: Look = field(default_factory=Look)
    settings: dict[Setting, Look] = field(default_factory=dict)
    early: dict[tuple[int, float], Look] = field(default_factory=dict)  # (step, sigma) -> x0 after that step
    forward: list[float] = field(default_factory=list)  # seconds of a forward of one image
    bands: dict[int, dict[str, list[list[float]]]] = field(default_factory=dict)  # level -> see `_bands`
    refused: dict[str, str] = field(default_factory=dict)  # what this pipeline cannot do, and why


def measure(studio: Studio, reward: Callable[[Tensor, str], Any], prompts: Sequence[str], noises: int) -> Measured:
    """Raises ValueError for fewer than two noises."""
    if noises < 2:
        raise ValueError(f"noises of a prompt are compared with each other: at least 2, got {noises}")
    found = Measured()
    studio.search(prompts[0], 0, reward, 2, popsize=2, k_elites=1)  # a first search costs more than others
    sigmas = noise_levels(studio.pipe)
    for seed, prompt in enumerate(tqdm(prompts, desc="prompts")):
        result = _full(studio, reward, prompt, seed, noises, sigmas, found)
        guided = result.forwards["preview"] >= 2 * noises * (len(sigmas) or studio.steps)
        for setting in settings_of(studio.steps, guided):
            if setting.name in found.refused:
                continue
            try:
                cheap = _search(studio, reward, prompt, seed, noises, setting)
            except ValueError as error:
                if seed:
                    raise
                found.refused[setting.name] = str(error)
                continue
            look = found.settings.setdefault(setting, Look())
            look.add([each.score for each in cheap.trace], _spent(cheap) / noises)
        _bands(studio, reward, prompt, seed, result, found)
    return found


def settings_of(steps: int, guided: bool) -> list[Setting]:
    """The cheaper settings that are tried."""
    fewer = sorted({max(1, round(share * steps)) for share in FEWER} - {steps})
    found = [Setting(f"{count} steps of {steps}", count) for count in fewer]
    found.append(Setting("half the size", steps, Preview(scale=2)))
    if steps > 1:
        found.append(Setting(f"half the size, {max(1, steps // 2)} steps", max(1, steps // 2), Preview(scale=2)))
    if guided:
        found.append(Setting("without guidance", steps, Preview(cfg=False)))
    return found


def _search(
    studio: Studio, reward: Callable[[Tensor, str], Any], prompt: str, seed: int, noises: int, setting: Setting
) -> SearchResult:
    """One generation of whole noises; the same for every setting."""
    return studio.search(
        prompt,
        seed,
        reward,
        noises,
        setting.steps,
        strategy="random",
        popsize=noises,
        k_elites=1,
        preview=setting.preview,
    )[1]


def _spent(result: SearchResult) -> float:
    return sum(result.seconds[stage] for stage in ("denoise", "decode", "reward"))


def _full(
    studio: Studio,
    reward: Callable[[Tensor, str], Any],
    prompt: str,
    seed: int,
    noises: int,
    sigmas: Sequence[float],
    found: Measured,
) -> SearchResult:
    """Full fidelity, and x0 after each step by a race that stops nobody."""
    # A second-order scheduler has more steps than studio.steps, and two of a level: a rung is the first of them.
    falls = [sigma < before - 1e-6 for before, sigma in zip((math.inf, *sigmas), sigmas, strict=False)]
    steps = [i + 1 for i, sigma in enumerate(sigmas[:-1]) if 0 < sigma < 1 and falls[i]]
    all_steps = len(sigmas) or studio.steps
    race = [(sigmas[step - 1], 1 - 1e-6 * place) for place, step in enumerate(steps, start=1)]
    if EARLY in found.refused:
        steps, race = [], []
    record = _Record(reward)
    try:
        result = _search(studio, record, prompt, seed, noises, Setting("", studio.steps, Preview(race=race or None)))
    except ValueError as error:
        if seed or not race:
            raise
        found.refused[EARLY] = str(error)
        return _full(studio, reward, prompt, seed, noises, sigmas, found)
    *early, full = record.scores
    assert len(early) == len(steps) and all(len(each) == noises for each in record.scores)
    forward = result.seconds["denoise"] / noises / all_steps
    look = (result.seconds["decode"] + result.seconds["reward"]) / noises / len(record.scores)
    for step, scores in zip(steps, early, strict=True):
        found.early.setdefault((step, sigmas[step - 1]), Look()).add(scores, step * forward + look)
    found.full.add(full, all_steps * forward + look)
    found.forward.append(forward)
    return result


class _Record:
    """A reward that keeps what it says, in order."""

    def __init__(self, reward: Callable[[Tensor, str], Any]) -> None:
        self.reward = reward
        self.scores: list[list[float]] = []

    def __call__(self, images: Tensor, prompt: str) -> Tensor:
        scores = as_scores(self.reward(images, prompt), len(images), "the reward")
        self.scores.append(scores.tolist())
        return scores


def _bands(
    studio: Studio,
    reward: Callable[[Tensor, str], Any],
    prompt: str,
    seed: int,
    result: SearchResult,
    found: Measured,
) -> None:
    """Scores of noises ("itself"), with the same low band and all else anew ("kept"), and with it alone anew."""
    state, few = result.state, min(RELATIVES, len(result.trace))
    noises = _noises(state, state.seed, few, include_base=True)
    others = _noises(state, seed + 2**32, few, include_base=False)

    def scores(candidates: Tensor) -> list[float]:  # [n, C, h, w]
        pictures = [studio.search(prompt, seed, reward, 1, latents=each)[0] for each in candidates.split(1)]
        return [score_of(reward, studio.tensor(picture), prompt) for picture in pictures]

    for level in range(1, LEVELS + 1):
        if min(noises.shape[-2:]) >> level < 2:
            break
        low, rest = ops.split_low_band(noises, level)
        other_low, other_rest = ops.split_low_band(others, level)
        rows = found.bands.setdefault(level, {"itself": [], "kept": [], "anew": []})
        rows["itself"].append(found.full.scores[-1][:few])
        rows["kept"].append(scores(ops.merge_low_band(other_rest, low, level).to(noises.dtype)))
        rows["anew"].append(scores(ops.merge_low_band(rest, other_low, level).to(noises.dtype)))


def _noises(state: evolution.SearchState, seed: int | None, count: int, include_base: bool) -> Tensor:
    begun = evolution.start(state.base, state.config, seed=seed, include_base=include_base)
    return evolution.ask(begun, count)[0]


# ---------------------------------------------------------------- what follows


@dataclass(frozen=True)
class Advice:
    """What to search with."""

    setting: Setting | None  # the cheapest that ranks well enough
    refine: int  # with it
    setting_time: float  # to equal reward, over that at full fidelity
    race: tuple[tuple[float, float], ...] | None  # (sigma, share) of each rung, at full size and steps
    race_time: float  # with it, as setting_time
    level: int | None
    steps: int  # of the image

    @property
    def races(self) -> bool:
        """Whether the race is the quicker of the two: both together are not measured."""
        return self.race is not None and self.race_time < min(self.setting_time, 1)

    @property
    def cheaper(self) -> bool:
        """Whether the setting is the quicker one, and than full fidelity too."""
        return self.setting is not None and not self.races and self.setting_time < 1

    @property
    def settings(self) -> dict[str, Any]:
        """The quicker of the two, as `SESConfig.from_file` and `SESConfig.call_from_file` read it."""
        level = {} if self.level is None else {"dwt_level": self.level}
        setting = self.setting if self.setting is not None and self.cheaper else Setting("", self.steps)
        preview: dict[str, Any] = {"race": [list(rung) for rung in self.race or ()]}
        if not self.races:
            refine = self.refine if self.cheaper else 0
            preview = {"scale": setting.preview.scale, "cfg": setting.preview.cfg, "refine": refine}
        call = {"num_inference_steps": self.steps, "ses_inference_steps": setting.steps}
        return {**level, "preview": preview, "call": call}


def advice(found: Measured, steps: int) -> Advice:
    """By the measured scores and seconds; steps: of the image."""
    enough = [
        setting
        for setting, look in found.settings.items()
        if correlation(look, found.full).value >= ENOUGH and look.cost(found.full) < 1
    ]
    setting = min(enough, key=lambda each: found.settings[each].cost(found.full), default=None)
    time, refine = math.inf, 0
    if setting is not None:
        time, refine = min((time_share(found.settings[setting], found.full, count), count) for count in REFINED)
    race = min((each for each in races(found) if each.worth >= WORTHWHILE), key=lambda each: each.time, default=None)
    level = max((level for level, rows in found.bands.items() if decides(rows) == "yes"), default=None)
    return Advice(setting, refine, time, race and race.rungs, race.time if race else math.inf, level, steps)


def correlation(look: Look, full: Look) -> Interval:
    """Spearman's with full fidelity, within a prompt: 0 where the previews tell nothing apart that full ones do."""
    found = []
    for cheap, true in zip(look.scores, full.scores, strict=True):
        alike, differ = len(set(cheap)) == 1, len(set(true)) > 1
        found.append(0.0 if alike and differ else spearman(cheap, true))
    return mean_of(found)


def time_share(look: Look, full: Look, refine: int) -> float:
    """The predicted time to equal reward, over that of a random search at full fidelity.

    refine: so many of the best, and the base, are rendered in full again.
    """
    noises = len(full.scores[0])
    picks = []
    for cheap, true in zip(look.scores, full.scores, strict=True):
        again = {*best(cheap, refine), 0} if refine else best(cheap, 1)
        picks.append(max(true[i] for i in again))
    finals = refine + 1 if refine else 1
    return (noises * look.cost(full) + finals) / (worth(full.scores, picks) + 1)


class Raced(NamedTuple):
    """What a race is worth."""

    rungs: tuple[tuple[float, float], ...]  # (sigma, share)
    worth: float  # full images whose best is as good, over those that its cost buys
    time: float  # as `time_share`


def races(found: Measured) -> list[Raced]:
    """All that are tried, as a search runs them: generation by generation, the base always to the end."""
    tried = []
    for shares in SHARES:
        for steps in itertools.combinations(sorted(found.early), len(shares)):
            rungs = tuple((sigma, share) for (_, sigma), share in zip(steps, shares, strict=True))
            cost, picks = _raced(found, steps, shares)
            images = worth(found.full.scores, picks)
            tried.append(Raced(rungs, images / cost, (cost + 1) / (images + 1)))
    return tried


def _raced(found: Measured, steps: Sequence[tuple[int, float]], shares: Sequence[float]) -> tuple[float, list[float]]:
    """(the race's cost for a prompt, in full images; each prompt's best score at full fidelity of those that finish)"""
    full = found.full
    forward = sum(found.forward) / sum(full.seconds)
    look = found.early[steps[0]].cost(full) - steps[0][0] * forward
    last, cost, picks = round((1 - look) / forward), 0.0, []
    for prompt, true in enumerate(full.scores):
        finished: list[int] = []
        for first in range(0, len(true), GENERATION):
            running, done = list(range(first, min(first + GENERATION, len(true)))), 0
            started = len(running)
            for (step, sigma), share in zip(steps, shares, strict=True):
                cost += len(running) * ((step - done) * forward + look)
                early = found.early[step, sigma].scores[prompt]
                scores = torch.tensor([early[i] for i in running], dtype=torch.float64, device="cpu")
                running = [running[i] for i in who_goes_on(scores, share, started, first == 0).tolist()]
                done = step
            cost += len(running) * ((last - done) * forward + look)
            finished += running
        picks.append(max(true[i] for i in finished))
    return cost / len(full.scores), picks


def band_correlations(rows: Mapping[str, list[list[float]]]) -> tuple[Interval, Interval]:
    """(of noises that share the low band alone, of those that share all else), within a prompt."""

    kept, anew = (pooled_correlation(rows["itself"], rows[which]) for which in ("kept", "anew"))
    return kept, anew


def decides(rows: Mapping[str, list[list[float]]]) -> str:
    """Whether the low band says more of an image's reward than all the rest: "yes", "no", or "unclear" where the
    interval of the difference holds 0, or is unknown.
    """
    kept, anew = (moments(rows["itself"], rows[which]) for which in ("kept", "anew"))
    more = bootstrap(lambda prompts: pooled(kept[prompts]) - abs(pooled(anew[prompts])), len(kept))
    return "yes" if more.low > 0 else "no" if more.high <= 0 else "unclear"


def markdown(found: Measured, told: Advice, about: Mapping[str, Any]) -> str:
    """The report."""
    full, noises = found.full, len(found.full.scores[0])
    top = max(1, noises // 5)
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    parts = [
        "# Previews against full fidelity",
        f"{words}; {len(full.scores)} prompts, {noises} noises each. Spearman's correlation is the mean within a "
        "prompt; [..] holds it with 95 %. Time: predicted, to the reward of a random search at full fidelity, over its "
        "time, with so many of the best rendered in full again.",
    ]
    columns = ("preview", "cost", "Spearman's correlation", f"of the best {top} kept", "time")
    looks = [(setting.name, look) for setting, look in found.settings.items()]
    looks += [(f"x0 after step {step}, sigma {sigma:.3f}", look) for (step, sigma), look in sorted(found.early.items())]
    rows = []
    for name, look in looks:
        refine = min(REFINED, key=lambda count, look=look: time_share(look, full, count))  # type: ignore[misc]
        kept = mean_of([overlap(true, cheap, top) for cheap, true in zip(look.scores, full.scores, strict=True)])
        time = f"{time_share(look, full, refine):.2f} (refine={refine})"
        rows.append([name, f"{look.cost(full):.2f}", _interval(correlation(look, full)), _interval(kept), time])
    parts.append(table(columns, rows))
    parts += [f"Not possible here: {name}. {why}." for name, why in found.refused.items()]
    if tried := sorted(races(found), key=lambda each: each.time):
        lines = [
            [", ".join(f"{sigma:.3f}: {share:g}" for sigma, share in rungs), f"{x:.2f}", f"{time:.2f}"]
            for rungs, x, time in tried[:3]
        ]
        words = f"The best of {len(tried)} races in generations of {GENERATION}; few prompts flatter what is chosen:"
        parts += [words, table(("sigma: share", "worth", "time"), lines)]
    if found.bands:
        bands = [
            [str(level), *map(_interval, band_correlations(each)), decides(each)] for level, each in found.bands.items()
        ]
        kinds = ("level", "the same low band, all else anew", "the low band alone anew", "it decides")
        parts += ["Correlation of an image's reward with that of one with", table(kinds, bands)]
    return "\n\n".join([*parts, *_sentences(told)])


def _sentences(told: Advice) -> list[str]:
    lines = []
    if told.setting is None:
        lines.append(f"No cheaper setting ranks with a correlation of {ENOUGH}: keep previews at full fidelity.")
    elif told.setting_time >= 1:
        lines.append(
            f"The cheapest setting that ranks with a correlation of {ENOUGH}, {told.setting.name}, saves no time "
            f"({told.setting_time:.2f}): keep previews at full fidelity."
        )
    else:
        lines.append(
            f"Recommended previews: {told.setting.name}, refine={told.refine}, in a call with "
            f"ses_inference_steps={told.setting.steps}: predicted time {told.setting_time:.2f}."
        )
    if told.race:
        lines.append(
            f"Recommended race, of full size and steps: {list(told.race)}: predicted time {told.race_time:.2f}."
        )
    else:
        lines.append("No race is worth its looks.")
    if told.race and told.setting:
        lines.append(f"Written is the {'race' if told.races else 'setting'}: both together are not measured.")
    if told.level is None:
        lines.append(
            "At no level is the low band seen to decide: compare a strategy of the whole noise, or measure more "
            "prompts where it is unclear."
        )
    else:
        lines.append(f"Recommended dwt_level: {told.level}, the coarsest whose low band decides.")
    return lines


def _interval(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "unknown"
    return "{:.2f} [{}, {}]".format(interval.value, *("..." if math.isnan(x) else f"{x:.2f}" for x in interval[1:]))


def write(told: Advice, report: str, out: Path) -> None:
    """The settings to `out`, and the report beside it."""
    write_whole(out, lambda file: file.write_text(json.dumps(told.settings, indent=1) + "\n"))
    write_whole(out.with_suffix(".md"), lambda file: file.write_text(report + "\n"))
