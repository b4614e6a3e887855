"""Figures of scores that are paired by prompt: correlations within a prompt, bootstrap intervals, time to a reward.

Most of a score's variance lies between prompts: what is compared is compared within one, and prompts are resampled.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A figure, and where it lies with CONFIDENCE: from NaN to NaN where that is unknown, as of a single prompt."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], float],  # of the rows with these numbers, [rows] int64
    rows: int,
) -> Interval:
    """The statistic of all rows, with the percentiles of its values over resampled rows (Efron 1979).

    The same for the same rows: what is drawn depends on their number alone. NaN without rows.
    """
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    whole = statistic(torch.arange(rows, device="cpu"))
    return _interval(whole, [statistic(each) for each in _resamples(rows)] if rows > 1 else [])


def mean_of(values: Sequence[float]) -> Interval:
    """The mean over prompts, one value each; NaN values are left out."""
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64, device="cpu")
    if not len(known):
        return Interval(math.nan, math.nan, math.nan)
    return interval_of(resampled(known).tolist())


def resampled(
    values: Tensor,  # [rows, ...], one row or more
) -> Tensor:  # [1 + RESAMPLES, ...] fp64
    """The mean over the rows, then over resampled ones: the same ones for all tensors of as many rows, so that figures
    of several stay paired. A single row has no resamples, [1, ...].
    """
    values = values.double()
    whole = values.mean(0, keepdim=True)
    return torch.cat([whole, values[_resamples(len(values))].mean(1)]) if len(values) > 1 else whole


def interval_of(values: Sequence[float]) -> Interval:
    """The first value, that of all rows, with the percentiles of the others, those of resampled ones."""
    return _interval(values[0], list(values[1:]))


@functools.lru_cache(maxsize=8)
def _resamples(rows: int) -> Tensor:  # [RESAMPLES, rows] int64
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(rows, (RESAMPLES, rows), generator=generator, device="cpu")


def _interval(whole: float, values: list[float]) -> Interval:
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return Interval(whole, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2 * (len(known) - 1)  # the values themselves, since some may be infinite
    return Interval(whole, known[round(tail)], known[round(len(known) - 1 - tail)])


def ranks(
    scores: Sequence[float],
) -> Tensor:  # [n] fp64
    """From 1 for the lowest; equal ones share the mean of their places."""
    values = torch.tensor(scores, dtype=torch.float64, device="cpu")
    ordered = values.sort().values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) + 1) / 2


def pearson(one: Tensor, other: Tensor) -> float:  # [n] each
    """Pearson's correlation; NaN where one of the two does not vary."""
    a, b = one - one.mean(), other - other.mean()
    size = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / size if size > 0 else math.nan


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of the two does not vary."""
    return pearson(ranks(one), ranks(other))


def pooled_correlation(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Interval:
    """Pearson's of all prompts' scores together, each less its prompt's mean; NaN where nothing varies."""
    sums = moments(ones, others)
    return bootstrap(lambda prompts: pooled(sums[prompts]), len(sums))


def moments(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Tensor:  # [prompts, 3] fp64
    """Of each prompt's scores, less their mean: the sums of their products and of both squares."""
    sums = torch.zeros(len(ones), 3, dtype=torch.float64, device="cpu")  # of products and squares, by prompt
    for row, pair in zip(sums, zip(ones, others, strict=True), strict=True):
        a, b = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in pair)
        a, b = a - a.mean(), b - b.mean()
        row.copy_(torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]))
    return sums


def pooled(
    sums: Tensor,  # [prompts, 3] of `moments`
) -> float:
    """The correlation of these prompts together; NaN where nothing varies."""
    product, one, other = sums.sum(0).tolist()
    return product / math.sqrt(one * other) if one * other > 0 else math.nan


def best(scores: Sequence[float], count: int) -> list[int]:
    """The numbers of the `count` highest scores, the highest first; of equal ones the earlier."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def overlap(one: Sequence[float], other: Sequence[float], count: int) -> float:
    """The share of the best `count` by one that are among the best `count` by the other."""
    return len(set(best(one, count)) & set(best(other, count))) / min(count, len(one))


def best_of(scores: Sequence[float], count: float) -> float:
    """The expected highest of `count` scores drawn from these without replacement; linear between whole numbers."""
    low = min(max(1, math.floor(count)), len(scores))
    high, share = min(low + 1, len(scores)), min(max(count - low, 0.0), 1.0)
    return (1 - share) * _best_of_whole(scores, low) + share * _best_of_whole(scores, high)


def _best_of_whole(scores: Sequence[float], count: int) -> float:
    # The i-th lowest of n is the highest of `count` in C(i - 1, count - 1) of C(n, count) draws.
    n = len(scores)
    ways = [math.comb(i, count - 1) for i in range(n)]
    return sum(way * score for way, score in zip(ways, sorted(scores), strict=True)) / math.comb(n, count)


def worth(all_scores: Sequence[Sequence[float]], picks: Sequence[float]) -> float:
    """Of how many scores drawn at random the highest is, on the mean over prompts, as high as the picks.

    all_scores: each prompt's. picks: one for each prompt. Each counts in its prompt's own deviations.
    """
    means, deviations = zip(*((sum(s) / len(s), _deviation(s)) for s in all_scores), strict=True)
    level = sum((p - m) / d for p, m, d in zip(picks, means, deviations, strict=True))
    most = min(map(len, all_scores))

    def reached(count: float) -> float:
        return sum((best_of(s, count) - m) / d for s, m, d in zip(all_scores, means, deviations, strict=True))

    low, high = 1.0, float(most)
    if level <= reached(low):
        return low
    if level >= reached(high):
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < level else (low, middle)
    return (low + high) / 2


def _deviation(scores: Sequence[float]) -> float:
    deviation = torch.tensor(scores, dtype=torch.float64, device="cpu").std().item()
    return deviation if deviation > 0 else 1.0


def place_of(level: float, scores: Sequence[float]) -> float:
    """Where on the way from the first score, 0, to the last the level is first reached, linear between the scores.

    0 where the first is above the level already: the truth is earlier. Infinite where none reaches it.
    """
    if scores[0] >= level:
        return 0.0
    for before, (low, high) in enumerate(zip(scores, scores[1:], strict=False)):
        if high >= level:
            return before + (level - low) / (high - low)
    return math.inf


def value_at(place: float, values: Sequence[float]) -> float:
    """The value at a place between the first, 0, and the last, linear; infinite at an infinite place."""
    if math.isinf(place):
        return math.inf
    before = min(int(place), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    return values[before] + (place - before) * (values[after] - values[before])
