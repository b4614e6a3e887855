"""How the next generation is drawn: each strategy a small function, all in one table by name.

A strategy is a function of the elites so far, the generation's number and its noise, and of nothing else: no budget,
no clock. The noise is one row of standard normals a candidate, so any of them can be drawn from a generator too.
Vectors of numbers below are the band's that the strategy searches; x' are candidates, m a mean of elites, n noise.

Each but the reference and its control keeps N(0, 1): a generation's numbers have a mean square of one.
"""

import difflib
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .spectral import Band, is_haar

LEAST_STEP = 0.3  # no generation's noise has a smaller deviation


class Generation(NamedTuple):
    """What a strategy draws from, and the ways to draw."""

    number: int  # 0 for the first
    popsize: int  # how many candidates n are wanted, from the first on
    residual: Tensor  # [1, ..., H, W] what the band leaves
    shape: tuple[int, ...]  # one candidate's numbers, (..., h, w), D in all
    mean: Tensor  # [D] the elites'; 0 before there are any
    variance: Tensor  # [D] the elites'; 1 before there are two
    elites: Tensor  # [K, D] the best first
    scores: Tensor  # [K] fp64; -inf marks an unused slot
    band: Band  # that is searched
    lowest: Band  # the settings' lowest band, where that is another
    seed: int | None
    draws: Tensor | None  # [n, D] in place of a seed
    dtype: torch.dtype  # of candidates
    backend: str | None

    def sampled(self, mean: Tensor, std: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x' = mean + std n, (candidates [n, ..., H, W], numbers [n, D]); n: the generation's, or `draws` [n, D]."""
        draws = self.draws if draws is None else draws
        noise: dict[str, Any] = {"draws": draws, "seed": self.seed if draws is None else None}
        options: dict[str, Any] = {"dtype": self.dtype, "backend": self.backend, **noise}
        return self.band.sample(self.residual, mean, std, popsize=self.popsize, generation=self.number, **options)

    def placed(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(candidates [n, ..., H, W], numbers [n, D]) of given numbers."""
        bands = numbers.view(len(numbers), *self.shape)
        return self.band.merge(self.residual, bands, dtype=self.dtype, backend=self.backend), numbers

    def noise(self, count: int | None = None) -> Tensor:
        """Standard normals [count, D], a row for each of the first candidates; None: all."""
        count, size = self.popsize if count is None else count, self.mean.numel()
        if self.draws is not None:
            return self.draws[:count]
        # At level 0 the lowest band of a latent is all of it.
        zeros, ones = self.mean.new_zeros(size), self.mean.new_ones(size)
        normal: dict[str, Any] = {"seed": self.seed, "generation": self.number, "backend": self.backend}
        return ops.sample_population(zeros.view(1, 1, size), zeros, ones, 0, popsize=count, **normal)[1]

    def mirrored(self) -> Tensor:
        """Antithetic pairs [n, D]: candidates 2i and 2i + 1 have the noise of row i and its negative.

        Not in the first generation, which has nothing to mirror at: its noises may as well be all different.
        """
        if self.number == 0:
            return self.noise()
        noise = self.noise((self.popsize + 1) // 2)
        return torch.stack([noise, -noise], 1).flatten(0, 1)[: self.popsize]

    def if_scored(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """The numbers [n, D]; the noise [n, D] where no candidate has a finite score. Does not wait for the device."""
        return torch.where(self.scores[0] > -torch.inf, numbers, noise)

    def apart(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest bands [n, ..., h, w] and the rest [n, ..., H, W] of whole noises [n, D]."""
        return self.lowest.split(numbers.view(-1, *self.shape), backend=self.backend)

    def joined(self, low: Tensor, rest: Tensor) -> Tensor:
        """`apart`'s inverse, [n, D]; the rest may be one for all."""
        return self.lowest.merge(rest, low, backend=self.backend).flatten(1)


class Strategy(NamedTuple):
    """How candidates are drawn, and in which numbers."""

    draw: Callable[[Generation], tuple[Tensor, Tensor]]  # (candidates [n, ..., H, W], numbers [n, D])
    moves: str = "lowest"  # the band that is searched: "lowest", "high" or "whole"
    both: bool = False  # moves the lowest band by itself too, by as many numbers of a candidate's noise as it has


# ---------------------------------------------------------------- one strategy each


def cem(g: Generation) -> tuple[Tensor, Tensor]:
    """x' = m + s n with the elites' mean m and deviation s: the cross-entropy method, SES's own (arXiv 2602.03208)."""
    return g.sampled(g.mean, g.variance.clamp(min=1e-9).sqrt())


def random(g: Generation) -> tuple[Tensor, Tensor]:
    """x' = n: the best of N noises."""
    return g.placed(g.noise())


def zero_order(g: Generation) -> tuple[Tensor, Tensor]:
    """x' = 0.95 x + sqrt(1 - 0.95^2) n: neighbours of the best so far at one step (Ma et al., arXiv 2501.09732)."""
    if g.number == 0:
        return random(g)
    return g.placed(stepped(g, parents(g, 1), math.sqrt(1 - 0.95**2), g.noise()))


def mirrored(g: Generation) -> tuple[Tensor, Tensor]:
    """x' = m +- s n in pairs with the elites' mean m, and s^2 = 1 - |m|^2 / D, which holds the energy at one."""
    return g.sampled(*held(g.mean), g.mirrored())


def ranked(g: Generation) -> tuple[Tensor, Tensor]:
    """`mirrored` with m = sum of w_i x_i, w_i ~ ln(K + 1/2) - ln i: the weights of CMA-ES (arXiv 1604.00772)."""
    return g.sampled(*held(evened(g, weighted(g.elites, g.scores))), g.mirrored())


def best_two(g: Generation) -> tuple[Tensor, Tensor]:
    """`ranked` with the best two elites alone: their mean is longer, so a rugged score is searched in shorter steps."""
    return ranked(g._replace(elites=g.elites[:2], scores=g.scores[:2]))


def two_stage(g: Generation) -> tuple[Tensor, Tensor]:
    """First whole noises x' = n; then the leader's high bands stay, and `ranked` searches the lowest band."""
    if g.number == 0:
        return random(g)
    return g.placed(_low_of_leader(g, g.mirrored()))


def ranked_both(g: Generation) -> tuple[Tensor, Tensor]:
    """First whole noises; then one pair as `ranked` draws whole noises, the next as `two_stage` draws lowest bands."""
    return _both(g, len(g.elites))


def best_both(g: Generation) -> tuple[Tensor, Tensor]:
    """`ranked_both` with the whole noises of `best_two`."""
    return _both(g, 2)


def _both(g: Generation, elites: int) -> tuple[Tensor, Tensor]:
    if g.number == 0:
        return random(g)
    mean, std = held(evened(g, weighted(g.elites[:elites], g.scores[:elites])))
    n = g.mirrored()
    return g.placed(in_turn(mean + std * n, _low_of_leader(g, n)))


def _low_of_leader(g: Generation, noise: Tensor) -> Tensor:  # [n, D]
    low, rest = g.apart(g.elites)
    mean, std = held(weighted(low.flatten(1), g.scores))
    numbers = mean + std * noise[:, : mean.numel()]
    return g.if_scored(g.joined(numbers.view(-1, *low.shape[1:]), rest[:1]), noise)


def pcn(g: Generation) -> tuple[Tensor, Tensor]:
    """x' = sqrt(1 - b^2) x + b n around the best x (preconditioned Crank-Nicolson, Cotter et al., arXiv 1202.0709)."""
    if g.number == 0:
        return random(g)
    return g.placed(stepped(g, parents(g, 1), step(g.number), g.noise()))


def pcn_both(g: Generation) -> tuple[Tensor, Tensor]:
    """`pcn` around the best two in turn, one pair of steps in the whole noise, the next in the lowest band alone."""
    if g.number == 0:
        return random(g)
    x, b, n = parents(g, 2), step(g.number), g.noise()
    low, rest = g.apart(x)
    moved = stepped(g, low.flatten(1), b, n[:, : low[0].numel()])
    in_low = g.if_scored(g.joined(moved.view(low.shape), rest), n)
    return g.placed(in_turn(stepped(g, x, b, n), in_low))


# ---------------------------------------------------------------- what they share


def weighted(
    elites: Tensor,  # [K, D] the best first
    scores: Tensor,  # [K] fp64; -inf marks an unused slot
) -> Tensor:  # [D]
    """The elites' mean with the weights of CMA-ES; 0 where there are none."""
    places = torch.arange(1, len(scores) + 1, dtype=torch.float32, device=scores.device)
    weights = (math.log(len(scores) + 0.5) - places.log()) * (scores > -torch.inf)
    return (weights[:, None] * elites).sum(0) / weights.sum().clamp(min=1e-12)


def held(
    mean: Tensor,  # [D]
) -> tuple[Tensor, Tensor]:
    """(mean, std), [D] each, of energy |mean|^2 / D + std^2 = 1. std is LEAST_STEP at least: a longer mean is cut."""
    energy, most = mean.square().mean(), 1 - LEAST_STEP**2
    std = (1 - energy.clamp(max=most)).sqrt()
    return mean * (most / energy).clamp(max=1).sqrt(), std.expand_as(mean)


def step(generation: int) -> float:
    """The deviation b of a step: 0.9 in generation 1, then 0.72, 0.58, ... down to LEAST_STEP."""
    return max(LEAST_STEP, 0.9 * 0.8 ** (generation - 1))


def parents(g: Generation, count: int) -> Tensor:  # [n, D]; [1, D] for one
    """The best `count` so far, in turn, with an energy of one, and so their lowest bands."""
    best = torch.where(g.scores[:count, None] > -torch.inf, g.elites[:count], g.elites[:1])
    x = unit(evened(g, best))
    return x[torch.arange(g.popsize, device=x.device) % len(x)] if count > 1 else x


def evened(
    g: Generation,
    x: Tensor,  # [..., D]
) -> Tensor:  # [..., D]
    """x with the mean square of all its numbers in its lowest band too, where a score may like more, or less."""
    if g.band == g.lowest:
        return x
    low, rest = g.apart(x)
    all_, in_low, in_rest, lows_share = map(mean_square, (x.view(rest.shape), low, rest, x.view(rest.shape) - rest))
    of_low = all_ / in_low
    of_rest = (all_ - of_low * lows_share).clamp(min=0) / in_rest  # so that all together keep theirs
    return g.joined(low * of_low.sqrt(), rest * of_rest.sqrt()).view(x.shape)


def mean_square(x: Tensor) -> Tensor:  # [n, 1, ...] of [n, ...]
    """Each one's, above 0."""
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).clamp(min=1e-12)


def unit(x: Tensor) -> Tensor:  # [n, D]
    """x with a mean square of one."""
    return x / mean_square(x).sqrt()


def stepped(
    g: Generation,
    x: Tensor,  # [n, D] or [1, D]
    b: float,
    noise: Tensor,  # [n, D]
) -> Tensor:  # [n, D]
    """sqrt(1 - b^2) x + b noise, which keeps N(0, 1); the noise where no candidate has a finite score."""
    return g.if_scored(math.sqrt(1 - b**2) * x + b * noise, noise)


def in_turn(
    these: Tensor,  # [n, D]
    those: Tensor,  # [n, D]
) -> Tensor:  # [n, D]
    """Two of these, two of those, two of these, ..."""
    return torch.where(torch.arange(len(these), device=these.device)[:, None] // 2 % 2 == 0, these, those)


# ---------------------------------------------------------------- by name


STRATEGIES = {
    "ses": Strategy(cem),
    "high_band": Strategy(cem, "high"),
    "random": Strategy(random, "whole"),
    "zero_order": Strategy(zero_order, "whole"),
    "mirrored": Strategy(mirrored),
    "ranked": Strategy(ranked),
    "ranked_whole": Strategy(ranked, "whole"),
    "best_two": Strategy(best_two, "whole"),
    "ranked_both": Strategy(ranked_both, "whole", both=True),
    "best_both": Strategy(best_both, "whole", both=True),
    "two_stage": Strategy(two_stage, "whole", both=True),
    "pcn_low": Strategy(pcn),
    "pcn": Strategy(pcn, "whole"),
    "pcn_both": Strategy(pcn_both, "whole", both=True),
}


@cache
def band_of(strategy: str, wavelet: str, level: int) -> Band:
    """The band that the strategy searches."""
    bands = {"lowest": Band(wavelet, level), "high": Band(wavelet, level, high=True), "whole": Band("db1", 0)}
    return bands[STRATEGIES[strategy].moves]


def check_strategy(name: Any, level: int) -> None:
    """Raises ValueError, with the known names, for an unknown strategy, and for one that needs another level."""
    if not isinstance(name, str) or name not in STRATEGIES:
        close = difflib.get_close_matches(str(name), STRATEGIES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown strategy {name!r:.100}: known are {', '.join(STRATEGIES)}{hint}")
    if STRATEGIES[name].moves == "high" and level == 0:
        raise ValueError(f"the strategy {name!r} searches a high band, and there is none at dwt_level=0")


def check_room(strategy: str, wavelet: str, level: int, base: Tensor) -> None:
    """Raises ValueError where the lowest band has more numbers than the noise [1, ..., H, W], and the strategy moves it
    by those of the noise: a wavelet that is long for so small a noise keeps more of each edge than there is.
    """
    if not STRATEGIES[strategy].both or is_haar(wavelet):
        return
    low = Band(wavelet, level).split(base)[0].numel()
    if low > base.numel():
        raise ValueError(
            f"the lowest band has {low} numbers with wavelet_name={wavelet!r} and dwt_level={level}, more than the "
            f"{base.numel()} of base_latents {tuple(base.shape)}: strategy={strategy!r} needs a shorter wavelet, as db1"
        )
