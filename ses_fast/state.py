"""What a search is between two generations: its settings, its distribution, its scores; saved, loaded, compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import spectral, strategies
from .checks import check_base, check_dense, check_drawn, check_noise, check_sizes

STATE_FORMAT = 3  # raised when an old state_dict would no longer continue bit for bit


@dataclass(frozen=True)
class EvolutionConfig:
    """How a search is made. Raises ValueError for a size below 1 or above 2^32, a level below 0 or above 24, an unknown
    wavelet, and an unknown strategy (the names are those of `strategies.STRATEGIES`).
    """

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int = 4
    strategy: str = "ses"

    def __post_init__(self) -> None:
        sizes = check_sizes(self.popsize, self.k_elites, self.dwt_level)
        for name, size in zip(("popsize", "k_elites", "dwt_level"), sizes, strict=True):
            object.__setattr__(self, name, size)
        spectral.check_wavelet(self.wavelet_name)
        strategies.check_strategy(self.strategy, self.dwt_level)

    @property
    def band(self) -> spectral.Band:
        """The numbers that the strategy searches."""
        return strategies.band_of(self.strategy, self.wavelet_name, self.dwt_level)

    def split(
        self,
        base: Tensor,  # [1, ..., H, W]
        *,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`band.split`. Raises ValueError where the strategy cannot search a base of this size."""
        strategies.check_room(self.strategy, self.wavelet_name, self.dwt_level, base)
        return self.band.split(base, backend=backend)


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
    base_low: Tensor  # [1, ..., h, w] fp32 (fp64 for an fp64 base), its D numbers in the band that is searched
    residual: Tensor  # [1, ..., H, W] as base_low, the rest, which stays
    include_base: bool
    seed: int | None  # None with a generator
    drawn: Drawn | None  # None with a seed
    mean: Tensor  # [D] fp32
    variance: Tensor  # [D] fp32
    elite_low: Tensor  # [K, D] fp32, the best first, K <= k_elites
    elite_scores: Tensor  # [K] fp64; -inf marks an unused slot, ignored in mean and variance
    complete: tuple[Tensor, ...]  # [P] fp64 each: the complete generations' scores, -inf for one not finite
    partial: tuple[Tensor, ...]  # [n] fp64 each: the scores of the generation under way
    evaluations: int  # how many scores there are in all
    early: tuple[Tensor, ...] = ()  # `steps` in parts; none while all scores are final
    members: Mapping[str, Tensor] = field(default_factory=dict)  # [evaluations] fp64 each, raw, of combined rewards
    fingerprint: Mapping[str, Any] = field(
        default_factory=dict
    )  # `Objective.fingerprint`: what the scores depend on, as JSON

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
        return torch.cat([nothing, *self.complete, *self.partial])

    @property
    def steps(self) -> Tensor:
        """After how many of a preview's steps each score was made, 0 if it is final: [evaluations] int64 on the CPU."""
        return torch.cat(self.early) if self.early else torch.zeros(self.evaluations, dtype=torch.int64, device="cpu")

    @cached_property
    def history(self) -> list[float]:
        """The scores as numbers. Waits for the device, once."""
        return self.scores.tolist()

    def to(self, device: torch.device | str) -> "SearchState":
        """The same state on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        for name in ("complete", "partial"):
            moved[name] = tuple(scores.to(device) for scores in getattr(self, name))
        return replace(self, **moved)

    def state_dict(self) -> dict[str, Any]:
        """CPU tensors, plain numbers, strings and None: for safetensors beside JSON, or for `torch.save`."""
        state = {f.name: getattr(self.config, f.name) for f in fields(EvolutionConfig)}
        state |= {"format": STATE_FORMAT, "include_base": self.include_base, "seed": self.seed}
        state |= {name: getattr(self, name).cpu().contiguous() for name in (*_SAVED, "scores", "steps")}
        state |= {"fingerprint": dict(self.fingerprint), "members": list(self.members)}
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
        if type(state["format"]) is not int or state["format"] != STATE_FORMAT:
            raise ValueError(
                f"not a search state of format {STATE_FORMAT}, which this version of ses_fast goes on with: its format "
                f"is {state['format']!r}. Search again, or go on with the version that saved it"
            )
        others = ("scores", "steps", "include_base", "seed", "fingerprint", "members")
        if missing := {*settings, *_SAVED, *others} - state.keys():
            raise ValueError(f"the search state lacks {', '.join(sorted(missing))}")
        config = EvolutionConfig(**{name: state[name] for name in settings})
        check_base(state["base"])
        base_low, residual = config.split(state["base"], backend=backend)
        generator = _check_saved(state, config.popsize, config.k_elites, base_low.numel())
        drawn = None if generator is None else Drawn(generator, config.popsize, base_low.numel())
        generations = state["scores"].split(config.popsize)
        whole = len(state["scores"]) // config.popsize
        return SearchState(
            config=config,
            base_low=base_low,
            residual=residual,
            include_base=state["include_base"],
            seed=state["seed"],
            drawn=drawn,
            complete=generations[:whole],
            partial=generations[whole:],
            evaluations=len(state["scores"]),
            early=(state["steps"],) if state["steps"].any() else (),
            members=_check_members(state),
            fingerprint=state["fingerprint"],
            **{name: state[name] for name in _SAVED},
        )


_SAVED = ("base", "mean", "variance", "elite_low", "elite_scores")
TENSORS = {*_SAVED, "scores", "steps", "member_scores", "generator_state"}
_TENSORS = (*_SAVED, "base_low", "residual")


def ranking(
    scores: Tensor,  # [n] fp64
    steps: Tensor,  # [n] int64, as `SearchState.steps`, on any device
) -> Tensor:
    """[n] int64, the best first: final scores before early ones, by score, earlier first; -inf last of all."""
    best = scores.sort(descending=True, stable=True).indices
    early = (steps > 0).to(scores.device, torch.int8, non_blocking=True)
    rank = torch.where(scores == -torch.inf, 2, early)
    return best[rank[best].sort(stable=True).indices]


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


def _check_saved(
    state: Mapping[str, Any],
    popsize: int,
    k_elites: int,
    size: int,  # D
) -> torch.Generator | None:
    """The saved generator, where there is one. ValueError for entries that no search of `size` coefficients has."""
    check_dense("the search state's scores", state["scores"])
    scores, count = state["scores"], state["scores"].numel()
    elites = min(k_elites, count // popsize * popsize)
    shapes: dict[str, tuple[int, ...]] = {"scores": (count,), "mean": (size,), "variance": (size,)}
    shapes |= {"elite_low": (elites, size), "elite_scores": (elites,), "steps": (count,)}
    for name, shape in shapes.items():
        value = state[name]
        check_dense(f"the search state's {name}", value)
        dtype = torch.int64 if name == "steps" else torch.float64 if "scores" in name else torch.float32
        if value.dtype != dtype or value.shape != shape:
            got = f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"the search state's {name} must be {dtype} of shape {shape}; got {got}")
        possible = ~value.isnan() if "scores" in name else value.isfinite()
        if not possible.all() or (name in ("variance", "steps") and (value < 0).any()):
            raise ValueError(f"the search state's {name} holds what no search makes")
    complete = scores[: count // popsize * popsize]
    if not torch.equal(state["elite_scores"], complete[ranking(complete, state["steps"][: len(complete)])][:elites]):
        raise ValueError("the search state's elite_scores are not the best of its scores")
    found = state["elite_low"][state["elite_scores"] > -torch.inf]
    if len(found) and not torch.allclose(state["mean"], found.mean(0), rtol=1e-4, atol=1e-4):
        raise ValueError("the search state's mean is not its elites'")
    if len(found) > 1 and not torch.allclose(state["variance"], found.var(0), rtol=1e-3, atol=1e-4):
        raise ValueError("the search state's variance is not its elites'")
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
    """The raw scores of combined rewards. ValueError where they do not fit the scores, or `fingerprint` is no dict."""
    names, count = state["members"], len(state["scores"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"the search state's members must be a list of different names, got {names!r}")
    if not isinstance(state["fingerprint"], Mapping):
        raise ValueError(f"the search state's fingerprint must be a dict, got {type(state['fingerprint']).__name__}")
    scores = state.get("member_scores")
    if not names and scores is None:
        return {}
    check_dense("the search state's member_scores", scores)
    assert isinstance(scores, Tensor)  # for the type checker
    if scores.dtype != torch.float64 or scores.shape != (len(names), count):
        raise ValueError(f"the search state's member_scores must be torch.float64 of shape {(len(names), count)}")
    return dict(zip(names, scores, strict=True))
