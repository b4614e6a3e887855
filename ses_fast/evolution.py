"""The cross-entropy method on the lowest wavelet band (arXiv 2602.03208; `diffsynth.utils.ses.ses_search`).

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

from . import ops, spectral
from .checks import check_base, check_noise
from .state import Drawn, EvolutionConfig, SearchState

__all__ = ["EvolutionConfig", "Leader", "SearchState", "ask", "leader", "start", "tell"]


class Leader(NamedTuple):
    """The best candidate so far."""

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
    """The state before the first generation: mean 0 and variance 1, whatever the base's own lowest band is.

    With neither `seed` nor `generator` the seed is drawn once from torch's global state. With `include_base`
    the base takes the place of candidate 0 of generation 0. Raises ValueError unless the base is one finite
    floating (1, ..., H, W), the seed an int64, the generator a CPU torch.Generator; and for both of these.
    """
    config = config or EvolutionConfig()
    check_base(base_latents)
    seed = check_noise(seed, generator)
    if seed is None and generator is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))

    base = base_latents.detach().clone()
    base_low, residual = spectral.split(base, config.wavelet_name, config.dwt_level, backend=backend)
    size, device = base_low.numel(), base.device
    return SearchState(
        config=config,
        base=base,
        base_low=base_low,
        residual=residual,
        include_base=bool(include_base),
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
    """The current generation: (candidates [P, ..., H, W] in the base's dtype, lowest bands [P, D] fp32).

    low = mean + sqrt(max(variance, 1e-9)) * eps takes the place of the base's. A second call gives the same.

    count: only the first `count` candidates, [count, ...], where the budget ends before the generation does; they
    are those of the whole one. Raises RuntimeError where `backend` cannot run this, or the `tell` that follows.
    """
    config, generation = state.config, state.generation
    ops.check_update_elites(state.mean, config.popsize, config.k_elites, backend=backend)
    popsize = config.popsize if count is None else min(count, config.popsize)
    candidates, low = spectral.sample_population(
        state.residual,
        state.mean,
        state.variance.clamp(min=1e-9).sqrt(),
        config.wavelet_name,
        config.dwt_level,
        popsize=popsize,
        seed=state.seed,
        generation=generation,
        draws=None if state.drawn is None else state.drawn(generation)[:popsize].to(state.base.device),
        dtype=state.base.dtype,
        backend=backend,
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
    steps: Tensor | None = None,
    members: Mapping[str, Tensor] | None = None,  # [n] each: the raw scores that `scores` combines
    fingerprint: Mapping[str, Any] | None = None,  # see `Objective.fingerprint`; None: as it was
    backend: str | None = None,
) -> SearchState:
    """The state with n more scores. They wait until their generation is complete, which moves the mean.

    A score that is not finite becomes -inf. Does not wait for the device. Raises ValueError for
    scores of another shape, and for more than there are candidates left. `backend`: of `ops.update_elites`.
    """
    left = state.config.popsize - state.index
    if scores.ndim != 1 or not 1 <= scores.numel() <= left:
        raise ValueError(f"expected up to {left} scores in one dimension, got shape {tuple(scores.shape)}")
    news: dict[str, Any] = {
        "evaluations": state.evaluations + scores.numel(),
        "steps": torch.cat([state.steps, torch.zeros(scores.numel(), dtype=torch.int64) if steps is None else steps]),
        "members": _more_members(state, members or {}) if members or state.members else state.members,
        "fingerprint": state.fingerprint if fingerprint is None else fingerprint,
    }
    if scores.numel() < left:
        # A copy, because the objective may use its tensor again.
        finite = scores.to(state.mean.device, torch.float64).nan_to_num(*[-torch.inf] * 3)
        partial = (*state.partial, finite)
        return replace(state, partial=partial, **news)

    if state.partial:
        scores = torch.cat([*state.partial, scores.to(state.mean.device, torch.float64)])
    elites = ops.update_elites(
        low,
        scores.to(state.mean.device),
        state.elite_low,
        state.elite_scores,
        state.mean,
        state.variance,
        k_elites=state.config.k_elites,
        backend=backend,
    )
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


def _more_members(state: SearchState, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if state.evaluations and members.keys() != state.members.keys():
        raise ValueError(f"the scores combine {sorted(members)}, those before {sorted(state.members)}")
    before = torch.empty(0, dtype=torch.float64, device="cpu")
    return {
        name: torch.cat([state.members.get(name, before), new.detach().to("cpu", torch.float64)])
        for name, new in members.items()
    }


@torch.no_grad()
def leader(
    state: SearchState,
    low: Tensor | None = None,  # [n, D] of the current generation's scored candidates, where they are at hand
    *,
    backend: str | None = None,
) -> Leader | None:
    """The best candidate ever scored, the first among equals; None where no score is finite.

    Built again from its lowest band; the base itself, bit for bit, where that won. Waits for the device.
    """
    scores = state.history
    number = max(range(len(scores)), key=scores.__getitem__, default=0)
    if not scores or scores[number] == -torch.inf:
        return None
    if state.include_base and number == 0:
        return Leader(state.base.clone(), number, scores[number])
    index = number - state.generation * state.config.popsize
    # The first elite is the best of all complete generations; one of the generation under way is drawn again.
    if index < 0:
        best = state.elite_low[0]
    else:
        best = (ask(state, index + 1, backend=backend)[1] if low is None else low)[index]
    config, dtype = state.config, state.base.dtype
    best = best.view(state.base_low.shape)
    latents = spectral.merge(state.residual, best, config.wavelet_name, config.dwt_level, dtype=dtype, backend=backend)
    return Leader(latents, number, scores[number])


def leaders(state: SearchState, count: int, *, backend: str | None = None) -> list[Leader]:
    """WIP: the best."""
    best = leader(state, backend=backend)
    return [] if best is None else [best]
