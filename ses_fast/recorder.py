"""What goes on beside a search: clocks, the bar, warnings, scores on their way to the state, and partial results."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from .distributed import Ranks
from .errors import warn
from .evolution import leader, tell
from .objective import Objective, Scored
from .result import SearchResult, result_of
from .state import SearchState
from .stopwatch import Stopwatch, device_clock

STAGES = ("start", "ask", "objective", "tell", "other")


class Recorder:
    """Keeps the books of one search. As a context: whatever is raised inside leaves with the result so far.

    state: of the search as it stands; the scores it has already are an earlier call's, which warned of them.
    stopwatch: runs since the call began.
    ranks: that search together: the first one's clock counts, and it alone shows, warns and calls `on_generation`.
    """

    def __init__(
        self,
        state: SearchState,
        objective: Objective,
        budget: int | None,  # None: until the time is over
        stopwatch: Stopwatch,
        *,
        progress: bool,
        time_limit: float | None,
        on_generation: Callable[[SearchResult], Any] | None,
        backend: str | None,
        ranks: Ranks,
    ) -> None:
        self.state, self.objective, self.budget = state, objective, budget
        self.stopwatch, self.backend, self.ranks = stopwatch, backend, ranks
        self.time_limit, self.progress = time_limit, progress and ranks.rank == 0
        self.on_generation = on_generation if ranks.rank == 0 else None
        self.begin = stopwatch.last
        self.stopped = "budget"
        self.low: Tensor | None = None  # [P, D] of the current generation
        self.reported: list[Scored] = []  # and not yet in the state
        self.counted = state.evaluations  # the reported ones included
        self.watch = _Watch(state.evaluations, state.config.popsize, silent=ranks.rank > 0)
        self.bar = tqdm(total=budget, initial=self.counted, desc="SES", unit="img", disable=not self.progress)

    def __enter__(self) -> Self:
        self.stopwatch.lap("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.bar.close()
            if error is not None:
                self._attach(error)
        except BaseException as failed:
            if error is None:
                raise
            error.add_note(f"the result so far is lost: {failed!r}")

    def goes_on(self) -> bool:
        """Whether there is budget and time for more."""
        paid = self.budget is not None and self.state.evaluations >= self.budget
        return not paid and self.stopped == "budget"

    def asked(self, low: Tensor) -> None:
        """A generation was drawn; `low` [P, D] are its lowest bands."""
        self.low = low
        self.stopwatch.lap("ask")

    def take(self, scored: Scored) -> bool:
        """Takes scores from the objective (its `Report`); False when the time is over."""
        if self.time_limit is not None:
            device_clock(scored.scores.device)  # the work that is waited for here is the objective's
        self.stopwatch.lap("objective")
        self.reported.append(scored)
        n = scored.scores.numel()
        self.counted += n
        self.bar.update(n)
        if scored.why_not_finite and not self.watch.why_not_finite:
            self.watch.why_not_finite = scored.why_not_finite
        if self.time_limit is not None and (self.budget is None or self.counted < self.budget):
            over = self.stopwatch.last - self.begin >= self.time_limit - self.objective.reserve
            if self.ranks.agree(over):
                self.stopped = "time_limit"
        return self.stopped == "budget"

    def scored(self) -> Scored:
        """What was taken and is not yet in the state, in order."""
        self.stopwatch.lap("objective")
        if not self.reported:
            raise ValueError("the objective reported no score for the candidates that it was given")
        return _joined(self.reported)

    def told(self, state: SearchState) -> None:
        """The state has learnt the scores: the books are brought up to date, and `on_generation` is called."""
        self.state, self.reported = state, []
        self.stopwatch.lap("tell")
        if state.index == 0:
            if self.progress or state.mean.device.type == "cpu":  # a look at the scores waits for the device
                self.watch.look(state.history)
            if self.progress:
                best = leader(state, self.low, backend=self.backend)
                self.bar.set_postfix(best="none" if best is None else f"{best.score:.4g}", refresh=False)
            if self.on_generation is not None:
                self.on_generation(self._result("running"))
        self.stopwatch.lap("other")

    def result(self) -> SearchResult:
        """The search's result, when it has ended. Raises RuntimeError where no score is finite."""
        self.watch.look(self.state.history, ended=True)
        result = self._result(self.stopped)
        if result.best is None:
            why = f"; {self.watch.why_not_finite}" if self.watch.why_not_finite else ""
            raise RuntimeError(
                f"none of the objective's {self.state.evaluations} scores is finite: no candidate is best{why}"
            )
        return result

    def _result(self, stopped: str) -> SearchResult:
        """Waits for the device."""
        best = leader(self.state, self.low, backend=self.backend)
        latents, number = (None, None) if best is None else (best.latents, best.number)
        result = result_of(self.state, latents, number, stopped, {})
        self.stopwatch.lap("other")
        seconds = self.stopwatch.seconds
        result.seconds.update(seconds, total=sum(seconds.values()))
        return result

    def _attach(self, error: BaseException) -> None:
        """Puts the result so far at error.ses_result."""
        if self.reported and self.low is not None:
            scored = self.scored()
            self.state = tell(
                self.state,
                self.low,
                scored.scores,
                steps=scored.steps,
                members=scored.members,
                fingerprint=self.objective.fingerprint,
                backend=self.backend,
            )
        # An exception may be a frozen dataclass, which refuses error.ses_result = ...
        object.__setattr__(error, "ses_result", self._result("error"))


def _joined(reported: list[Scored]) -> Scored:
    members = {name: torch.cat([each.members[name] for each in reported]) for name in reported[0].members}
    steps = [each.steps for each in reported if each.steps is not None]
    return Scored(torch.cat([each.scores for each in reported]), members, steps=torch.cat(steps) if steps else None)


class _Watch:
    """Warns of scores that are not finite, and of a flat first generation: once each."""

    def __init__(self, known: int, popsize: int, silent: bool) -> None:
        self.seen, self.popsize, self.silent = known, popsize, silent  # an earlier call warned of the known ones
        self.warned = False
        self.flat_looked_for = known >= popsize
        self.why_not_finite = ""

    def look(self, history: list[float], ended: bool = False) -> None:
        """Looks at the scores that came since the last look."""
        if self.silent:
            return
        new = history[self.seen :]
        if not self.warned and -torch.inf in new:
            self.warned = True
            generation, index = divmod(self.seen + new.index(-torch.inf), self.popsize)
            why = f" ({self.why_not_finite})" if self.why_not_finite else ""
            warn(
                f"the score of candidate {index} of generation {generation} is not finite{why}. Such scores count as "
                "minus infinity and never enter the elites; this is reported once a search",
            )
        self.seen = len(history)
        if not self.flat_looked_for and (ended or len(history) >= self.popsize):
            self.flat_looked_for = True
            first = [score for score in history[: self.popsize] if score != -torch.inf]
            if len(first) > 1 and len(set(first)) == 1:
                warn(
                    f"all {len(first)} candidates of the first generation have the same score, {first[0]:.6g}: the "
                    "search cannot work, because it has nothing to choose by. Look at the reward",
                )
