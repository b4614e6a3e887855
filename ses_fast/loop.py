"""The search: `evolve` returns all that it found, `search` takes the place of `ses_search`."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_options, check_truths, whole_number
from .cpu import keep_memory
from .digests import digest, digest_of_tensor, digests_of_weights
from .distributed import Ranks, ranks_of
from .evolution import EvolutionConfig, SearchState, ask, start, tell
from .objective import FunctionObjective, Objective
from .recorder import STAGES, Recorder
from .result import SearchResult
from .state import continued
from .stopwatch import Stopwatch


def search(
    base_latents: Tensor,  # [1, ..., H, W]
    objective_reward_fn: Callable[[Tensor], Any] | Objective,
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
    objective_reward_fn: Callable[[Tensor], Any] | Objective,
    total_eval_budget: int | None = 30,
    popsize: int = 10,
    k_elites: int = 5,
    wavelet_name: str = "db1",
    dwt_level: int = 4,
    *,
    strategy: str = "ses",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    include_base: bool = False,
    on_generation: Callable[[SearchResult], Any] | None = None,
    progress: bool = True,
    time_limit: float | None = None,
    state: SearchState | None = None,
    backend: str | None = None,
    process_group: Any = None,
) -> SearchResult:
    """Searches the lowest wavelet band of the base for the highest score (SES, arXiv 2602.03208).

    objective_reward_fn: gets (n, ..., H, W) latents in the base's dtype and on its device, n <= batch_size,
        all of one generation, and returns n scores: a float for one, a tensor or a sequence. One that is not
        finite counts as minus infinity, which is warned of once. So is a first generation of equal scores.
        An `Objective` gets the rest of a generation at once, whatever the batch_size.
    total_eval_budget: how many candidates to score, those of `state` included; None: as many as time_limit allows.
    strategy: how the next generation is drawn, a name of `strategies.STRATEGIES`; "ses" is the reference's way.
    seed: makes the noise a function of (seed, generation, candidate, coefficient), whatever the backend and
        the batch_size. None: drawn once from torch's global state, and reported.
    generator: instead of a seed, a CPU torch.Generator; each generation draws `torch.randn(popsize, D,
        generator=generator)`, D numbers in the band that the strategy searches (for one that moves the whole noise:
        all of it). With "ses" the search is then `diffsynth.utils.ses.ses_search`'s with the same draws.
    include_base: the base takes the place of candidate 0 of generation 0: the answer is never worse than it.
    on_generation: called with the SearchResult so far after each complete generation.
    progress: a tqdm bar.
    time_limit: seconds, looked at after each batch; `result.stopped` says whether it ended the search.
    state: `result.state` of an earlier search of the same base with the same settings, to be continued.
    backend: of the ops, as for `ses_fast.set_backend`.
    process_group: the processes that search together, each with the same arguments and a seed or generator: a group of
        torch.distributed, "auto" for its default group where that is initialised, or what `distributed.start` returned.
        Each calls the objective with its share of the candidates (up to batch_size at once), and learns the scores of
        all, so that every process returns the same result, which is also that of one process: bit for bit, where a
        candidate's score does not depend on the others in its batch. The first one's clock decides on time_limit; it
        alone shows progress, warns, and calls on_generation. What is raised in one leaves there as it is, and in the
        others as `distributed.RankFailed`. An `Objective` brings its own processes.

    Raises ValueError for bad arguments, before the objective is called, and for scores of a wrong shape;
    RuntimeError where no score at all is finite. Whatever leaves while the search runs, an exception of the
    objective too, leaves as it is and carries the SearchResult so far as `error.ses_result`.
    """
    stopwatch = Stopwatch(STAGES)
    ranks = objective_reward_fn.ranks if isinstance(objective_reward_fn, Objective) else ranks_of(process_group)
    with ranks.joined():
        config = EvolutionConfig(popsize, k_elites, wavelet_name, dwt_level, strategy)
        budget = None if total_eval_budget is None else whole_number("total_eval_budget", total_eval_budget, 1)
        if budget is None and time_limit is None:
            raise ValueError("total_eval_budget=None searches for as long as time_limit= says: give one of them")
        check_options(on_generation=on_generation, time_limit=time_limit)
        check_truths(include_base=include_base, progress=progress)
        batch_size = whole_number("batch_size", batch_size, 1)
        objective = _as_objective(objective_reward_fn, batch_size, process_group, ranks)
        if state is None:
            state = start(
                base_latents, config, seed=seed, generator=generator, include_base=include_base, backend=backend
            )
            state = replace(state, fingerprint=objective.fingerprint)
        else:
            state = continued(state, base_latents, config, seed, generator, include_base)
            objective.resume(state.fingerprint)
        if ranks.size > 1:
            ranks.compare({**_facts(state), "budget": budget, "time_limit": time_limit, **objective.facts})
            if isinstance(objective, FunctionObjective):  # another one says itself what it is
                ranks.compare(digests_of_weights(objective_reward_fn=objective.function), where_known=True)
        if base_latents.device.type == "cpu":
            keep_memory()  # previews free and take the same memory again and again

        recorder = Recorder(
            state,
            objective,
            budget,
            stopwatch,
            progress=progress,
            time_limit=time_limit,
            on_generation=on_generation,
            backend=backend,
            ranks=ranks,
        )
        with recorder:
            while recorder.goes_on():
                count = None if budget is None else state.index + budget - state.evaluations
                candidates, low = ask(state, count, backend=backend)
                recorder.asked(low)
                left = candidates[state.index :]
                objective.score(left, state.generation, state.index, recorder.take)
                del candidates, left  # the next generation may have their memory
                scored = recorder.scored()
                fingerprint = objective.fingerprint
                state = tell(
                    state,
                    low,
                    scored.scores,
                    steps=scored.steps,
                    members=scored.members,
                    fingerprint=fingerprint,
                    backend=backend,
                )
                recorder.told(state)
            ranks.agree(None)  # a callback of the first may have raised after the last score
            return recorder.result()


def _facts(state: SearchState) -> dict[str, Any]:
    """What makes a search what it is, as JSON: all ranks must have it alike."""
    drawn, scores = state.drawn, state.scores.cpu()
    return {
        "base": digest_of_tensor(state.base),
        "settings": asdict(state.config) | {"include_base": state.include_base},
        "seed": state.seed,
        "generator": None if drawn is None else digest_of_tensor(drawn.where(state.generation)),
        "state": digest(*map(digest_of_tensor, (scores, state.steps, state.mean, state.variance, state.elite_low))),
        **state.fingerprint,
    }


def _as_objective(given: Any, batch_size: int, process_group: Any, ranks: Ranks) -> Objective:
    if isinstance(given, Objective):
        if process_group is not None:
            raise ValueError("an Objective shares its candidates itself, by its `ranks`: leave process_group= out")
        return given
    if not callable(given):
        raise ValueError(f"objective_reward_fn must be callable, got {given!r}")
    return FunctionObjective(given, batch_size, ranks)
