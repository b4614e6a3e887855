"""Ask and tell: a search of the initial noise by one of the `strategies`, at first the cross-entropy method on the
lowest wavelet band (arXiv 2602.03208; `diffsynth.utils.ses.ses_search`).

State in, state out; nothing here calls an objective:

    state = start(base_latents, EvolutionConfig(), seed=0)
    while state.evaluations < 50:
        candidates, low = ask(state)  # [P, ..., H, W], [P, D]
        state = tell(state, low, score(candidates))  # [P]
    latents, number, score = leader(state)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_base, check_dense, check_noise, check_truths, whole_number
from .reference import Elites
from .spectral import Band
from .state import Drawn, EvolutionConfig, SearchState, ranking
from .strategies import STRATEGIES, Generation

__all__ = ["EvolutionConfig", "Leader", "SearchState", "ask", "leader", "leaders", "start", "tell"]


class Leader(NamedTuple):
    """The best candidate so far, by a final score."""

    latents: Tensor  # [1, ..., H, W] in the base's dtype
    number: int  # generation * popsize + index
    score: float


def start(
    base_latents: Tensor,  # [1, ..., H, W]
    config: EvolutionConfig | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    include_base: bool = False,
    backend: str | None = None,
) -> SearchState:
    """The state before the first generation: mean 0 and variance 1, whatever the base's own numbers are.

    With neither `seed` nor `generator` the seed is drawn once from torch's global state. With `include_base`
    the base takes the place of candidate 0 of generation 0. Raises ValueError unless the base is one finite
    floating (1, ..., H, W), the seed an int64, the generator a CPU torch.Generator; and for both of these.
    """
    config = EvolutionConfig() if config is None else config
    if not isinstance(config, EvolutionConfig):
        raise ValueError(f"config must be an EvolutionConfig, got {config!r:.200}")
    check_base(base_latents)
    check_truths(include_base=include_base)
    seed = check_noise(seed, generator)
    if seed is None and generator is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))

    base = base_latents.detach().clone()
    base_low, residual = config.split(base, backend=backend)
    size, device = base_low.numel(), base.device
    return SearchState(
        config=config,
        base=base,
        base_low=base_low,
        residual=residual,
        include_base=include_base,
        seed=seed,
        drawn=None if generator is None else Drawn(generator, config.popsize, size),
        mean=torch.zeros(size, dtype=torch.float32, device=device),
        variance=torch.ones(size, dtype=torch.float32, device=device),
        elite_low=torch.empty(0, size, dtype=torch.float32, device=device),
        elite_scores=torch.empty(0, dtype=torch.float64, device=device),
        complete=(),
        partial=(),
        evaluations=0,
    )


@torch.no_grad()
def ask(
    state: SearchState,
    count: int | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The current generation: (candidates [P, ..., H, W] in the base's dtype, their numbers in the band [P, D] fp32).

    They are drawn as the strategy says and take the place of the base's. A second call gives the same.

    count: only the first `count` candidates, [count, ...], where the budget ends before the generation does; they
    are those of the whole one. Raises RuntimeError where `backend` cannot run this, or the `tell` that follows.
    """
    config, generation = state.config, state.generation
    ops.check_update_elites(state.mean, config.popsize, config.k_elites, backend=backend)
    popsize = config.popsize if count is None else min(whole_number("count", count, 1), config.popsize)
    candidates, low = STRATEGIES[config.strategy].draw(
        Generation(
            number=generation,
            popsize=popsize,
            residual=state.residual,
            shape=tuple(state.base_low.shape[1:]),
            mean=state.mean,
            variance=state.variance,
            elites=state.elite_low,
            scores=state.elite_scores,
            band=config.band,
            lowest=Band(config.wavelet_name, config.dwt_level),
            seed=state.seed,
            draws=None if state.drawn is None else state.drawn(generation)[:popsize].to(state.base.device),
            dtype=state.base.dtype,
            backend=backend,
        )
    )
    if state.include_base and generation == 0:
        candidates[0], low[0] = state.base[0], state.base_low.flatten()
    return candidates, low


@torch.no_grad()
def tell(
    state: SearchState,
    low: Tensor,  # [P, D] from `ask`; looked at when the generation is complete
    scores: Tensor,  # [n] on any device, of the generation's next n candidates
    *,
    steps: Tensor | None = None,  # [n] int64 on the CPU, as `SearchState.steps`; None: all are final
    members: Mapping[str, Tensor] | None = None,  # [n] each: the raw scores that `scores` combines
    fingerprint: Mapping[str, Any] | None = None,  # see `Objective.fingerprint`; None: as it was
    backend: str | None = None,
) -> SearchState:
    """The state with n more scores. They wait until their generation is complete, which moves the mean.

    The elites are the best final scores, and early ones only in places that no final one takes.
    A score that is not finite becomes -inf. Does not wait for the device. Raises ValueError for
    scores and steps of another shape, and for more than there are candidates left. `backend`: of `ops.update_elites`.
    """
    left = state.config.popsize - state.index
    check_dense("scores", scores)
    if scores.ndim != 1 or not 1 <= scores.numel() <= left or scores.is_complex():
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"expected up to {left} scores, real and in one dimension, got {got}")
    if not isinstance(fingerprint, Mapping | None):
        raise ValueError(f"fingerprint must be a dict, got {fingerprint!r:.200}")
    news: dict[str, Any] = {
        "evaluations": state.evaluations + scores.numel(),
        "early": _more_steps(state, steps, scores.numel()),
        "members": _more_members(state, {} if members is None else members, scores.numel()),
        "fingerprint": state.fingerprint if fingerprint is None else fingerprint,
    }
    if scores.numel() < left:
        # A copy, because the objective may use its tensor again.
        finite = scores.to(state.mean.device, torch.float64).nan_to_num(*[-torch.inf] * 3)
        partial = (*state.partial, finite)
        return replace(state, partial=partial, **news)

    if state.partial:
        scores = torch.cat([*state.partial, scores.to(state.mean.device, torch.float64)])
    scores = scores.to(state.mean.device)
    if news["early"]:
        elites = _update_raced(state, low, scores, torch.cat(news["early"]), backend)
    else:
        elites = _update(state, low, scores, state.elite_scores, backend)
    return replace(
        state,
        complete=(*state.complete, elites.scores),
        partial=(),
        elite_low=elites.elite_low,
        elite_scores=elites.elite_scores,
        mean=elites.mean,
        variance=elites.variance,
        **news,
    )


def _update(state: SearchState, low: Tensor, scores: Tensor, elite_scores: Tensor, backend: str | None) -> Elites:
    given = (low, scores, state.elite_low, elite_scores, state.mean, state.variance)
    return ops.update_elites(*given, k_elites=state.config.k_elites, backend=backend)


def _update_raced(state: SearchState, low: Tensor, scores: Tensor, steps: Tensor, backend: str | None) -> Elites:
    """The elites where some scores are early: the op, which compares numbers, is given places in place of scores."""
    scores = scores.double().nan_to_num(*[-torch.inf] * 3)
    known = torch.cat([*state.complete, scores])  # [n], in order
    best = ranking(known, steps)
    places = torch.empty_like(known)
    places[best] = -torch.arange(len(known), dtype=known.dtype, device=known.device)
    places = places.where(known > -torch.inf, -torch.inf)
    before, now = places.split([len(known) - len(scores), len(scores)])
    before = before.sort(descending=True, stable=True).values[: len(state.elite_scores)]
    elites = _update(state, low, now, before, backend)
    return elites._replace(elite_scores=known[best[: len(elites.elite_scores)]], scores=scores)


def _more_steps(state: SearchState, steps: Tensor | None, count: int) -> tuple[Tensor, ...]:
    """`SearchState.early` with those of `count` more scores."""
    if steps is None:
        steps = torch.zeros(count, dtype=torch.int64, device="cpu") if state.early else None
    else:
        check_dense("steps", steps)
        whole = steps.dtype == torch.int64 and steps.device.type == "cpu"
        if not whole or steps.shape != (count,) or (steps < 0).any():
            raise ValueError(
                f"steps must be {count} numbers from 0 on, int64 on the CPU; got {tuple(steps.shape)}, {steps.dtype} "
                f"on {steps.device}"
            )
    if steps is None or not (state.early or steps.any()):
        return ()
    return (*(state.early or (state.steps,)), steps.clone())


def _more_members(state: SearchState, members: Mapping[str, Tensor], count: int) -> Mapping[str, Tensor]:
    if not isinstance(members, Mapping) or not all(isinstance(name, str) for name in members):
        raise ValueError(f"members must be a dict of names to scores, got {members!r:.200}")
    if not members and not state.members:
        return state.members
    for name, scores in members.items():
        check_dense(f"members[{name!r}]", scores)
        if scores.shape != (count,) or scores.is_complex():
            got = f"{scores.dtype} of shape {tuple(scores.shape)}"
            raise ValueError(f"members[{name!r}] must be {count} real scores, as scores are; got {got}")
    if state.evaluations and members.keys() != state.members.keys():
        raise ValueError(f"the scores combine {sorted(members)}, those before {sorted(state.members)}")
    before = torch.empty(0, dtype=torch.float64, device="cpu")
    return {
        name: torch.cat([state.members.get(name, before), new.detach().to("cpu", torch.float64)])
        for name, new in members.items()
    }


def leader(
    state: SearchState,
    low: Tensor | None = None,  # [n, D] of the current generation's scored candidates, where they are at hand
    *,
    backend: str | None = None,
) -> Leader | None:
    """The candidate with the best final score, the first among equals; None where no final score is finite.

    Built again from its numbers in the band; the base itself, bit for bit, where that won. Waits for the device.
    """
    return next(iter(leaders(state, 1, low, backend=backend)), None)


@torch.no_grad()
def leaders(
    state: SearchState,
    count: int,
    low: Tensor | None = None,  # as in `leader`
    *,
    backend: str | None = None,
) -> list[Leader]:
    """The `count` candidates with the best final scores, in order; fewer where fewer are finite.

    Raises ValueError for more than k_elites: a state does not know the numbers of the others any more.
    """
    config, scores = state.config, state.history
    if count > config.k_elites:
        raise ValueError(f"a search keeps its {config.k_elites} best candidates: {count} cannot be built again")
    final = [number for number, steps in enumerate(state.steps.tolist()) if steps == 0 and scores[number] > -torch.inf]
    best = sorted(final, key=lambda number: -scores[number])[:count]
    under_way = state.generation * config.popsize  # its first candidate; those before are elites, in the same order
    if low is None and any(number >= under_way for number in best):
        low = ask(state, max(best) - under_way + 1, backend=backend)[1]
    elites, found = iter(state.elite_low), []
    for number in best:
        numbers = next(elites) if number < under_way or low is None else low[number - under_way]
        if state.include_base and number == 0:
            latents = state.base.clone()
        else:
            numbers = numbers.view(state.base_low.shape)
            latents = config.band.merge(state.residual, numbers, dtype=state.base.dtype, backend=backend)
        found.append(Leader(latents, number, scores[number]))
    return found
