"""From base latents to the best: `evolve` says everything, `search` is the drop-in for `ses_search`."""

import json
import os
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cpu import keep_memory
from .errors import missing_extra, warn
from .evolution import EvolutionConfig, SearchState, ask, check_base, leader, start, tell, whole_number

Objective = Callable[[Tensor], Any]
RESULT_FORMAT = 1  # raised when `SearchResult.load` would no longer read an old file
STAGES = ("start", "ask", "objective", "tell", "other")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One scored candidate; the score is minus infinity where the objective's was not finite."""

    generation: int
    index: int
    score: float
    members: dict[str, float] | None = None  # each one's raw score, where the objective weighs several rewards


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The scores that a reward outside the search gives to the previews of the base and of the answer."""

    base: float
    answer: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search has found so far; of one that was broken off, at `error.ses_result`."""

    latents: Tensor | None = field(repr=False)  # [1, ..., H, W], the best; None while no score is finite
    score: float | None  # the best
    base_score: float | None  # the base's own; None unless include_base
    best: Evaluation | None  # which candidate it was
    trace: list[Evaluation] = field(repr=False)  # every score, in order
    evaluations: int
    seed: int | None  # None with a generator
    seconds: dict[str, float]  # this call's, by STAGES and in "total"; a GPU's work counts where it is waited for
    stopped: str  # "budget", "time_limit", "error"; "running" in on_generation
    state: SearchState = field(repr=False)  # to save, or to continue from with evolve(..., state=)
    held_out: dict[str, HeldOut] = field(default_factory=dict)  # a pipeline's, by SESConfig(report_rewards=)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one safetensors file, with what is no tensor as JSON in its header; `load` reads it.

        A file that is there is replaced when the new one is complete. Raises ImportError without safetensors.
        """
        safetensors = _safetensors()
        state = self.state.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if self.latents is not None:
            tensors["latents"] = self.latents.cpu().contiguous()
        facts = {
            "format": RESULT_FORMAT,
            "best": None if self.best is None else self.trace.index(self.best),
            "seconds": self.seconds,
            "stopped": self.stopped,
            "members": {i: one.members for i, one in enumerate(self.trace) if one.members is not None},
            "held_out": {name: [one.base, one.answer] for name, one in self.held_out.items()},
            "state": {name: value for name, value in state.items() if name not in tensors},
        }
        written = f"{os.fspath(path)}.part"
        safetensors.torch.save_file(tensors, written, metadata={"ses_fast": json.dumps(facts)})
        os.replace(written, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "SearchResult":
        """What `save` wrote, on the CPU: the latents bit for bit, and a state to go on from. Runs nothing of the file.

        Raises ValueError for any other file, FileNotFoundError for none, ImportError without safetensors.
        """
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("ses_fast", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result that SearchResult.save wrote: {error}") from error
        if facts.get("format") != RESULT_FORMAT:
            raise ValueError(f"{path} is no search result of format {RESULT_FORMAT}: format {facts.get('format')!r}")
        latents = tensors.pop("latents", None)
        state = SearchState.load_state_dict(facts["state"] | tensors)
        raw = {int(number): members for number, members in facts["members"].items()}
        held_out = {name: HeldOut(*two) for name, two in facts["held_out"].items()}
        return _told(state, latents, facts["best"], facts["stopped"], facts["seconds"], raw, held_out)


def search(
    base_latents: Tensor,  # [1, ..., H, W]
    objective_reward_fn: Objective,
    total_eval_budget: int = 30,
    popsize: int = 10,
    k_elites: int = 5,
    wavelet_name: str = "db1",
    dwt_level: int = 4,
    **options: Any,
) -> Tensor:
    """The best latents, in the base's shape, dtype and device: `evolve(...).latents`, with the same options.

    Takes the arguments of `diffsynth.utils.ses.ses_search`, which it replaces.
    """
    positional = (total_eval_budget, popsize, k_elites, wavelet_name, dwt_level)
    latents = evolve(base_latents, objective_reward_fn, *positional, **options).latents
    assert latents is not None  # evolve raises where no score was finite
    return latents


def evolve(
    base_latents: Tensor,  # [1, ..., H, W]
    objective_reward_fn: Objective,
    total_eval_budget: int = 30,
    popsize: int = 10,
    k_elites: int = 5,
    wavelet_name: str = "db1",
    dwt_level: int = 4,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    include_base: bool = False,
    on_generation: Callable[[SearchResult], Any] | None = None,
    progress: bool = True,
    time_limit: float | None = None,
    state: SearchState | None = None,
    backend: str | None = None,
) -> SearchResult:
    """Searches the lowest wavelet band of the base for the highest score (SES, arXiv 2602.03208).

    objective_reward_fn: gets (n, ..., H, W) latents in the base's dtype and on its device, n <= batch_size,
        all of one generation, and returns n scores: a float for one, a tensor or a sequence. One that is not
        finite counts as minus infinity, which is warned of once. So is a first generation of equal scores.
        With an attribute whole_generations=True it gets a generation at once, whatever the batch_size. If it
        has an attribute `members` after a call, a dict of names to n raw scores, these go into the trace
        (see WeightedReward).
    total_eval_budget: how many candidates to score, those of `state` included.
    seed: makes the noise a function of (seed, generation, candidate, coefficient), whatever the backend and
        the batch_size. None: drawn once from torch's global state, and reported.
    generator: instead of a seed, a CPU torch.Generator; each generation draws `torch.randn(popsize, D,
        generator=generator)`: then the search is `diffsynth.utils.ses.ses_search`'s with the same draws.
    include_base: the base takes the place of candidate 0 of generation 0: the answer is never worse than it.
    on_generation: called with the SearchResult so far after each complete generation.
    progress: a tqdm bar.
    time_limit: seconds, looked at after each batch; `result.stopped` says whether it ended the search.
    state: `result.state` of an earlier search of the same base with the same settings, to be continued.
    backend: of the ops, as for `ses_fast.set_backend`.

    Raises ValueError for bad arguments, before the objective is called, and for scores of a wrong shape;
    RuntimeError where no score at all is finite. Whatever leaves while the search runs, an exception of the
    objective too, leaves as it is and carries the SearchResult so far as `error.ses_result`.
    """
    begin = mark = time.perf_counter()
    config = EvolutionConfig(popsize, k_elites, wavelet_name, dwt_level)
    popsize = config.popsize
    budget = whole_number("total_eval_budget", total_eval_budget, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    if not callable(objective_reward_fn):
        raise ValueError(f"objective_reward_fn must be callable, got {objective_reward_fn!r}")
    check_options(on_generation=on_generation, time_limit=time_limit)
    if state is None:
        state = start(base_latents, config, seed=seed, generator=generator, include_base=include_base, backend=backend)
    else:
        state = _continued(state, base_latents, config, seed, generator, include_base)

    if getattr(objective_reward_fn, "whole_generations", False):
        batch_size = popsize
    seconds = dict.fromkeys(STAGES, 0.0)

    def lap(stage: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        seconds[stage] += now - mark
        mark = now

    on_cpu = base_latents.device.type == "cpu"
    if on_cpu:
        keep_memory()
    known = evaluations = state.evaluations  # `known`: an earlier call's, which warned of them
    raw: dict[int, dict[str, float]] = {}  # number -> each member's score
    warned = flat_looked_for = False
    candidates = batch = low = None
    waiting: list[Tensor] = []  # scores that `state` has not been told; telling once a generation costs less
    stopped = "budget"
    bar = tqdm(total=budget, initial=known, desc="SES", unit="img", disable=not progress)
    lap("start")
    try:
        while evaluations < budget:
            if candidates is None or low is None:
                candidates, low = ask(state, state.index + budget - evaluations, backend=backend)
                lap("ask")
            index = evaluations % popsize
            n = min(batch_size, popsize - index, budget - evaluations)
            batch = candidates[index : index + n]
            scores = objective_reward_fn(batch)
            lap("objective")
            members = getattr(objective_reward_fn, "members", None) or {}
            if members:
                each = ({name: float(one[i]) for name, one in members.items()} for i in range(n))
                raw.update(enumerate(each, start=evaluations))
            evaluations += n
            told = index + n == popsize or evaluations == budget or time_limit is not None
            waiting.append(_scores(scores, n, state, copy=not told))
            bar.update(n)
            if told:
                state, waiting = tell(state, low, _joined(waiting), backend=backend), []
            lap("tell")
            if index + n == popsize:
                candidates = batch = None  # the next generation may have their memory
                if on_cpu or progress:  # elsewhere a look at the scores waits for the device
                    first = max(known, evaluations - popsize)
                    scores_of_generation = state.told[-1].tolist()[first - evaluations :]
                    warned = warned or _warn_non_finite(scores_of_generation, first, popsize)
                    flat_looked_for = flat_looked_for or _warn_flat(state, known)
                if progress:
                    bar.set_postfix(best=f"{state.elite_scores[0].item():.4g}", refresh=False)
                if on_generation is not None:
                    on_generation(_result(state, low, "running", seconds, backend, raw))
                lap("other")
            if time_limit is not None:
                _ = state.history  # the clock must see the device's work
                if time.perf_counter() - begin >= time_limit and evaluations < budget:
                    stopped = "time_limit"
                    break
        warned = warned or _warn_non_finite(state.history[known:], known, popsize)
        flat_looked_for = flat_looked_for or _warn_flat(state, known)
        result = _result(state, low, stopped, seconds, backend, raw)
        if result.best is None:
            raise RuntimeError(f"none of the objective's {state.evaluations} scores is finite: no candidate is best")
        return result
    except BaseException as error:  # KeyboardInterrupt too
        lap("other")
        _attach(error, state, low, waiting, seconds, backend, raw)
        raise
    finally:
        bar.close()


def check_options(*, time_limit: Any = None, **callbacks: Any) -> None:
    """Raises ValueError for a time_limit that is not above 0, and a callback that is neither None nor callable."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be callable, got {callback!r}")
    if time_limit is not None:
        if not isinstance(time_limit, Real) or isinstance(time_limit, bool) or not float(time_limit) > 0:
            raise ValueError(f"time_limit must be seconds above 0, got {time_limit!r}")


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


def _continued(
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


def _scores(value: Any, n: int, state: SearchState, *, copy: bool) -> Tensor:
    """What the objective returned for n candidates: [n] on the state's device, which is not waited for.

    copy: of a tensor, in fp64, for the objective may use its own again before the state is told.
    """
    scores = value
    if not isinstance(value, Tensor):
        numbers = [value] if isinstance(value, float) else _numbers(value, n)  # most are one float: no time is lost
        scores = torch.tensor(numbers, dtype=torch.float64, device=state.mean.device)
    if scores.is_complex() or not (scores.shape == (n,) or scores.numel() == n == 1):
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"the objective must return {n} scores, shape ({n},), for {n} candidates; got {got}")
    if scores is not value:
        return scores
    scores = scores.detach().reshape(n)
    return scores.to(state.mean.device, torch.float64, copy=True) if copy else scores.to(state.mean.device)


def _numbers(value: Any, n: int) -> list[float]:
    try:
        # The last is a NumPy array of no dimensions.
        values = [value] if isinstance(value, Real) or getattr(value, "ndim", None) == 0 else value
        if isinstance(values, str | bytes | Mapping | Set):  # float() would take them, or their parts, for numbers
            raise TypeError(f"no scores: {value!r}")
        values = list(values)
        if any(isinstance(each, str | bytes) for each in values):
            raise TypeError(f"no scores: {value!r}")
        return [float(each) for each in values]
    except (TypeError, ValueError, OverflowError) as error:
        what = type(value).__name__
        raise ValueError(f"the objective must return {n} numbers, as a tensor or a sequence; got {what}") from error


def _joined(waiting: list[Tensor]) -> Tensor:  # [n] of [n1], [n2], ...
    return waiting[0] if len(waiting) == 1 else torch.cat(waiting)


def _result(
    state: SearchState,
    low: Tensor | None,  # [P, D] of the current generation, None where it was not asked for
    stopped: str,
    seconds: dict[str, float],
    backend: str | None,
    raw: dict[int, dict[str, float]],
) -> SearchResult:
    """Waits for the device."""
    best = leader(state, low, backend=backend)
    latents, number = (None, None) if best is None else (best.latents, best.number)
    return _told(state, latents, number, stopped, {**seconds, "total": sum(seconds.values())}, raw, {})


def _told(
    state: SearchState,
    latents: Tensor | None,  # [1, ..., H, W]
    best: int | None,  # which score is theirs
    stopped: str,
    seconds: dict[str, float],
    raw: dict[int, dict[str, float]],  # number -> each member's score
    held_out: dict[str, HeldOut],
) -> SearchResult:
    trace = [Evaluation(*divmod(i, state.config.popsize), score, raw.get(i)) for i, score in enumerate(state.history)]
    return SearchResult(
        latents=latents,
        score=None if best is None else trace[best].score,
        base_score=trace[0].score if state.include_base and trace else None,
        best=None if best is None else trace[best],
        trace=trace,
        evaluations=state.evaluations,
        seed=state.seed,
        seconds=seconds,
        stopped=stopped,
        state=state,
        held_out=held_out,
    )


def _safetensors() -> Any:
    """The module, with its `torch` part. Raises ImportError, naming the extra, where it is missing."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing_extra("safetensors", "diffsynth") from error
    return safetensors


def _attach(
    error: BaseException,
    state: SearchState,
    low: Tensor | None,
    waiting: list[Tensor],
    seconds: dict[str, float],
    backend: str | None,
    raw: dict[int, dict[str, float]],
) -> None:
    """Puts the result so far at error.ses_result. Where that fails too (a lost device), the error says so."""
    try:
        if waiting and low is not None:
            state = tell(state, low, _joined(waiting), backend=backend)
        # An exception may be a frozen dataclass, which refuses error.ses_result = ...
        object.__setattr__(error, "ses_result", _result(state, low, "error", seconds, backend, raw))
    except Exception as failed:
        error.add_note(f"the result so far is lost: {failed!r}")


def _warn_non_finite(scores: list[float], first: int, popsize: int) -> bool:
    """Warns of the first of the scores, numbered from `first` on, that was not finite; says whether there is one."""
    if -torch.inf not in scores:
        return False
    generation, index = divmod(first + scores.index(-torch.inf), popsize)
    warn(
        f"the score of candidate {index} of generation {generation} is not finite. Such scores count "
        "as minus infinity and never enter the elites; this is reported once a search",
    )
    return True


def _warn_flat(state: SearchState, known: int) -> bool:
    """Warns where the whole first generation, if it is this call's, has one finite score. True: looked at."""
    first = [score for score in state.history[: state.config.popsize] if score != -torch.inf]
    if known < state.config.popsize and len(first) > 1 and len(set(first)) == 1:
        warn(
            f"all {len(first)} candidates of the first generation have the same score, {first[0]:.6g}: the search "
            "cannot work, it has nothing to choose by. Look at the reward",
        )
    return True
