"""The cross-entropy method on the lowest wavelet band (arXiv 2602.03208; `diffsynth.utils.ses.ses_search`).

State in, state out; nothing here calls an objective:

    state = start(base_latents, EvolutionConfig(), seed=0)
    while state.evaluations < 50:
        candidates, low = ask(state)  # [P, ..., H, W], [P, D]
        state = tell(state, low, score(candidates))  # [P]
    latents, number, score = leader(state)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, spectral
from .checks import check_base, check_drawn, check_members, check_noise, check_saved, check_sizes

__all__ = [
    "Drawn",
    "EvolutionConfig",
    "Leader",
    "SearchState",
    "ask",
    "check_state",
    "continued",
    "leader",
    "start",
    "tell",
]
STATE_FORMAT = 2  # raised when an old state_dict would no longer continue bit for bit


@dataclass(frozen=True)
class EvolutionConfig:
    """Raises ValueError for a size below 1 or above 2^32, a level below 0 or above 24, and an unknown wavelet."""

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int = 4

    def __post_init__(self) -> None:
        sizes = check_sizes(self.popsize, self.k_elites, self.dwt_level)
        for name, size in zip(("popsize", "k_elites", "dwt_level"), sizes, strict=True):
            object.__setattr__(self, name, size)
        spectral.check_wavelet(self.wavelet_name)


class Drawn:
    """Noise from a user's generator, drawn as the reference does: `randn(P, D)` when a generation is first asked for.

    The generator's state before each draw is kept, so that asking again for a generation, or going on from an older
    state, gives the same noise. Other code may draw from the generator between two generations. Raises ValueError for
    a generation of more than 2^28 numbers: they are drawn whole, however few are scored.
    """

    def __init__(self, generator: torch.Generator, popsize: int, size: int) -> None:
        check_drawn(popsize, size)
        self.generator = generator
        self.shape = (popsize, size)
        self.before: dict[int, Tensor] = {}  # generation -> the generator's state when it was drawn

    def __call__(self, generation: int) -> Tensor:  # [P, D] on the CPU
        generator = self.generator
        if generation in self.before:
            generator = torch.Generator("cpu")
            generator.set_state(self.before[generation])
        else:
            self.before[generation] = generator.get_state()
        return torch.randn(*self.shape, generator=generator, dtype=torch.float32, device="cpu")

    def where(self, generation: int) -> Tensor:
        """The generator's state from which `generation` is, or will be, drawn."""
        return self.before.get(generation, self.generator.get_state())


@dataclass(frozen=True, eq=False)
class SearchState:
    """A search between two calls, on the base's device. Made by `start`, `tell` and `load_state_dict`."""

    config: EvolutionConfig
    base: Tensor  # [1, ..., H, W] as given
    base_low: Tensor  # [1, ..., h, w] fp32 (fp64 for an fp64 base), its lowest band of D numbers
    residual: Tensor  # [1, ..., H, W] as base_low, the rest, which stays
    include_base: bool
    seed: int | None  # None with a generator
    drawn: Drawn | None  # None with a seed
    mean: Tensor  # [D] fp32
    variance: Tensor  # [D] fp32
    elite_low: Tensor  # [K, D] fp32, the best first, K <= k_elites
    elite_scores: Tensor  # [K] fp64; -inf marks an unused slot, ignored in mean and variance
    told: tuple[Tensor, ...]  # [P] fp64 each: the complete generations' scores, -inf for one not finite
    waiting: tuple[Tensor, ...]  # [n] fp64 each, as they came: the scores of the generation under way
    evaluations: int  # how many scores there are in all
    members: Mapping[str, Tensor] = field(default_factory=dict)  # [evaluations] fp64 each, raw, of combined rewards
    about: Mapping[str, Any] = field(default_factory=dict)  # `Objective.about`: what the scores depend on, as JSON

    @property
    def generation(self) -> int:
        """The generation that `ask` gives."""
        return self.evaluations // self.config.popsize

    @property
    def index(self) -> int:
        """How many of that generation's candidates have a score already."""
        return self.evaluations % self.config.popsize

    @property
    def scores(self) -> Tensor:
        """All scores in order, [evaluations] fp64; -inf for one that was not finite."""
        nothing = self.mean.new_empty(0, dtype=torch.float64)
        return torch.cat([nothing, *self.told, *map(_finite, self.waiting)])

    @cached_property
    def history(self) -> list[float]:
        """The scores as numbers. Waits for the device, once."""
        return self.scores.tolist()

    def to(self, device: torch.device | str) -> "SearchState":
        """The same state on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        for name in ("told", "waiting"):
            moved[name] = tuple(scores.to(device) for scores in getattr(self, name))
        return replace(self, **moved)

    def state_dict(self) -> dict[str, Any]:
        """CPU tensors, plain numbers, strings and None: for safetensors beside JSON, or for `torch.save`."""
        state = {f.name: getattr(self.config, f.name) for f in fields(EvolutionConfig)}
        state |= {"format": STATE_FORMAT, "include_base": self.include_base, "seed": self.seed}
        state |= {name: getattr(self, name).cpu().contiguous() for name in (*_SAVED, "scores")}
        state |= {"about": dict(self.about), "members": list(self.members)}
        if self.members:
            state["member_scores"] = torch.stack(list(self.members.values()))  # [M, evaluations]
        if self.drawn is not None:
            state["generator_state"] = self.drawn.where(self.generation)
        return state

    @staticmethod
    def load_state_dict(state: Mapping[str, Any], *, backend: str | None = None) -> "SearchState":
        """The state that `state_dict` wrote; continues bit for bit. Raises ValueError for any other dict."""
        settings = [f.name for f in fields(EvolutionConfig)]
        if not isinstance(state, Mapping) or "format" not in state:
            raise ValueError("not a search state: a dict as state_dict() makes it")
        if state["format"] != STATE_FORMAT:
            raise ValueError(
                f"not a search state of format {STATE_FORMAT}, which this version of ses_fast goes on with: its format "
                f"is {state['format']!r}. Search again, or go on with the version that saved it"
            )
        if missing := {*settings, *_SAVED, "scores", "include_base", "seed", "about", "members"} - state.keys():
            raise ValueError(f"the search state lacks {', '.join(sorted(missing))}")
        config = EvolutionConfig(**{name: state[name] for name in settings})
        check_base(state["base"])
        base_low, residual = spectral.split(state["base"], config.wavelet_name, config.dwt_level, backend=backend)
        generator = check_saved(state, config.popsize, config.k_elites, base_low.numel())
        drawn = None if generator is None else Drawn(generator, config.popsize, base_low.numel())
        generations = state["scores"].split(config.popsize)
        complete = len(state["scores"]) // config.popsize
        return SearchState(
            config=config,
            base_low=base_low,
            residual=residual,
            include_base=state["include_base"],
            seed=state["seed"],
            drawn=drawn,
            told=generations[:complete],
            waiting=generations[complete:],
            evaluations=len(state["scores"]),
            members=check_members(state),
            about=state["about"],
            **{name: state[name] for name in _SAVED},
        )


_SAVED = ("base", "mean", "variance", "elite_low", "elite_scores")
_TENSORS = (*_SAVED, "base_low", "residual")


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
        told=(),
        waiting=(),
        evaluations=0,
    )


def continued(
    state: SearchState,
    base_latents: Tensor,
    config: EvolutionConfig,
    seed: int | None,
    generator: torch.Generator | None,
    include_base: bool,
) -> SearchState:
    """`state` on the base's device. Raises ValueError where it was started with other arguments."""
    check_base(base_latents)
    check_state(state, config, seed, generator, include_base)
    state = state.to(base_latents.device)
    if base_latents.dtype != state.base.dtype or not torch.equal(state.base, base_latents):
        raise ValueError("the state is of another search: its base latents are not these")
    return state


def check_state(
    state: Any,
    config: EvolutionConfig,
    seed: int | None,
    generator: torch.Generator | None,
    include_base: bool,
) -> None:
    """Raises ValueError unless `state` is a SearchState that was started with these. Does not compare the base."""
    if not isinstance(state, SearchState):
        raise ValueError(f"state must be a SearchState, see SearchState.load_state_dict; got {type(state).__name__}")
    was, now = (f"{c}, include_base={b}" for c, b in ((state.config, state.include_base), (config, include_base)))
    if was != now:
        raise ValueError(f"the state is of another search: it was started with {was}, this call has {now}")
    if generator is not None or seed not in (None, state.seed):
        raise ValueError("the state goes on with its own seed or generator: leave out seed= and generator=")


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
    members: Mapping[str, Tensor] | None = None,  # [n] each: the raw scores that `scores` combines
    about: Mapping[str, Any] | None = None,  # see `Objective.about`; None: as it was
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
        "members": _more_members(state, members or {}) if members or state.members else state.members,
        "about": state.about if about is None else about,
    }
    if scores.numel() < left:
        # A copy: the objective may use its tensor again.
        waiting = (*state.waiting, scores.to(state.mean.device, torch.float64, copy=True))
        return replace(state, waiting=waiting, **news)

    if state.waiting:
        scores = torch.cat([*state.waiting, scores.to(state.mean.device, torch.float64)])
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
        told=(*state.told, elites.scores),
        waiting=(),
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


def _finite(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
