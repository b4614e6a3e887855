"""The cross-entropy method on the lowest wavelet band (arXiv 2602.03208; `diffsynth.utils.ses.ses_search`).

State in, state out; nothing here calls an objective:

    state = start(base_latents, EvolutionConfig(), seed=0)
    while state.evaluations < 50:
        candidates, low = ask(state)  # [P, ..., H, W], [P, D]
        state = tell(state, low, score(candidates))  # [P]
    latents, number, score = leader(state)
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, spectral

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_FORMAT = 2  # raised when an old state_dict would no longer continue bit for bit


@dataclass(frozen=True)
class EvolutionConfig:
    """Raises ValueError for a size below 1, a level below 0 and an unknown wavelet."""

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int = 4

    def __post_init__(self) -> None:
        for name, least in (("popsize", 1), ("k_elites", 1), ("dwt_level", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        spectral.check_wavelet(self.wavelet_name)


class Drawn:
    """Noise from a user's generator, drawn as the reference does: `randn(P, D)` when a generation is first asked for.

    The generator's state before each draw is kept, so that asking again for a generation, or going on from an older
    state, gives the same noise. Other code may draw from the generator between two generations.
    """

    def __init__(self, generator: torch.Generator, popsize: int, size: int) -> None:
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
    elite_scores: Tensor  # [K] fp64; minus infinity marks an empty place, which weighs nothing
    told: tuple[Tensor, ...]  # [P] fp64 each: the complete generations' scores, minus infinity if not finite
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
        """All scores in order, [evaluations] fp64; minus infinity for one that was not finite."""
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
        generator = _check_saved(state, config, base_low.numel())
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
            members=_check_members(state),
            about=state["about"],
            **{name: state[name] for name in _SAVED},
        )


def _check_saved(state: Mapping[str, Any], config: EvolutionConfig, size: int) -> torch.Generator | None:
    """The saved generator, where there is one. ValueError for entries that no search of `size` coefficients has."""
    scores = state["scores"]
    count = scores.numel() if isinstance(scores, Tensor) else 0
    elites = min(config.k_elites, count // config.popsize * config.popsize)
    shapes: dict[str, tuple[int, ...]] = {"scores": (count,), "mean": (size,), "variance": (size,)}
    shapes |= {"elite_low": (elites, size), "elite_scores": (elites,)}
    for name, shape in shapes.items():
        value, dtype = state[name], torch.float64 if "scores" in name else torch.float32
        if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the search state's {name} must be {dtype} of shape {shape}; got {got}")
        possible = ~value.isnan() if "scores" in name else value.isfinite()
        if not possible.all() or (name == "variance" and (value < 0).any()):
            raise ValueError(f"the search state's {name} holds what no search makes")
    if not isinstance(state["include_base"], bool):
        raise ValueError(f"the search state's include_base must be True or False, got {state['include_base']!r}")
    if (state["seed"] is None) != ("generator_state" in state):
        raise ValueError("the search state must have either a seed or a generator_state")
    if state["seed"] is not None:
        check_noise(state["seed"], None)
        return None
    generator = torch.Generator("cpu")
    try:
        generator.set_state(state["generator_state"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the search state's generator_state is none of a torch.Generator: {error}") from error
    return generator


def _check_members(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The raw scores of combined rewards. ValueError where they do not fit the scores, or `about` is no dict."""
    names, count = state["members"], len(state["scores"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"the search state's members must be a list of different names, got {names!r}")
    if not isinstance(state["about"], Mapping):
        raise ValueError(f"the search state's about must be a dict, got {type(state['about']).__name__}")
    scores = state.get("member_scores")
    if not names and scores is None:
        return {}
    if not isinstance(scores, Tensor) or scores.dtype != torch.float64 or scores.shape != (len(names), count):
        raise ValueError(f"the search state's member_scores must be torch.float64 of shape {(len(names), count)}")
    return dict(zip(names, scores, strict=True))


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


@torch.no_grad()
def ask(
    state: SearchState,
    *,
    seed: ops.Seed | None = None,
    generation: ops.Seed | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The current generation: (candidates [P, ..., H, W] in the base's dtype, lowest bands [P, D] fp32).

    low = mean + sqrt(max(variance, 1e-9)) * eps takes the place of the base's. A second call gives the same.
    It is always the whole generation, so that no candidate depends on how many are wanted.

    seed, generation: instead of the state's; for CUDA graphs, as 0-d int64 tensors on the base's device, which
    can change between two replays where the state's are numbers. Raises ValueError with a generator, whose
    draws are made on the host; RuntimeError where `backend` cannot run this, or the `tell` that follows.
    """
    if state.drawn is not None and (seed is not None or generation is not None):
        raise ValueError("the state draws from a generator: leave out seed= and generation=")
    ops.check_update_elites(state.mean, state.config.popsize, state.config.k_elites, backend=backend)
    number = state.generation if generation is None else generation
    candidates, low = spectral.sample_population(
        state.residual,
        state.mean,
        state.variance.clamp(min=1e-9).sqrt(),
        state.config.wavelet_name,
        state.config.dwt_level,
        popsize=state.config.popsize,
        seed=state.seed if seed is None else seed,
        generation=number,
        draws=None if state.drawn is None else state.drawn(state.generation).to(state.base.device),
        dtype=state.base.dtype,
        backend=backend,
    )
    if state.include_base and isinstance(number, Tensor):  # only the device knows which generation it is
        candidates[0] = state.base[0].where(number == 0, candidates[0])
        low[0] = state.base_low.flatten().where(number == 0, low[0])
    elif state.include_base and number == 0:
        candidates[0], low[0] = state.base[0], state.base_low.flatten()
    return candidates, low


@torch.no_grad()
def tell(
    state: SearchState,
    low: Tensor,  # [P, D] from `ask`
    scores: Tensor,  # [n] on any device, of the generation's next n candidates
    *,
    members: Mapping[str, Tensor] | None = None,  # [n] each: the raw scores that `scores` combines
    backend: str | None = None,
) -> SearchState:
    """The state with n more scores. They wait until their generation is complete, which moves the mean.

    A score that is not finite becomes minus infinity. Does not wait for the device. Raises ValueError for
    scores of another shape, and for more than there are candidates left. `backend`: of `ops.update_elites`.
    """
    left = state.config.popsize - state.index
    if scores.ndim != 1 or not 1 <= scores.numel() <= left:
        raise ValueError(f"expected up to {left} scores in one dimension, got shape {tuple(scores.shape)}")
    if members or state.members:
        state = replace(state, members=_more_members(state, members or {}))
    evaluations = state.evaluations + scores.numel()
    if scores.numel() < left:
        # A copy: the objective may use its tensor again.
        waiting = (*state.waiting, scores.to(state.mean.device, torch.float64, copy=True))
        return replace(state, waiting=waiting, evaluations=evaluations)

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
        told=(*state.told, elites.told),
        waiting=(),
        evaluations=evaluations,
        elite_low=elites.low,
        elite_scores=elites.scores,
        mean=elites.mean,
        variance=elites.variance,
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
    low: Tensor | None = None,  # [P, D] of the current generation, where it is at hand
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
    told = state.evaluations - state.index
    # The first elite is the best of all that were told; one that still waits is drawn again.
    if number < told:
        best = state.elite_low[0]
    else:
        best = (ask(state, backend=backend)[1] if low is None else low)[number - told]
    config, dtype = state.config, state.base.dtype
    best = best.view(state.base_low.shape)
    latents = spectral.merge(state.residual, best, config.wavelet_name, config.dwt_level, dtype=dtype, backend=backend)
    return Leader(latents, number, scores[number])


def _finite(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def check_noise(seed: Any, generator: Any) -> int | None:
    """The seed as an int. Raises ValueError unless it is an int64 or None, `generator` a CPU one or None, not both."""
    if generator is not None:
        if seed is not None:
            raise ValueError("give seed= or generator=, not both")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError(f"generator must be a CPU torch.Generator, on every device; got {generator!r}")
    if seed is None:
        return None
    seed = whole_number("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    return seed


def check_base(base: Tensor) -> None:
    """Raises ValueError unless the base is one finite floating (1, ..., H, W)."""
    if not isinstance(base, Tensor):
        raise ValueError(f"base_latents must be a torch.Tensor, got {type(base).__name__}")
    if base.ndim < 3 or base.shape[0] != 1 or base.numel() == 0:
        shape = tuple(base.shape)
        raise ValueError(f"base_latents must be one base (1, ..., H, W), not empty; got {shape}: search one by one")
    if base.dtype not in DTYPES:
        raise ValueError(f"base_latents must be float16, bfloat16, float32 or float64; convert it from {base.dtype}")
    # NaN passes through both: a quarter of the time of base.isfinite().all(), and one copy from the device.
    if not all(map(math.isfinite, torch.stack(base.aminmax()).tolist())):
        raise ValueError("base_latents has values that are not finite: check how the noise was made")


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises ValueError for a bool, a float or another type, and below `least`."""
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)
