"""What a search scores its candidates by: the protocol, and how a plain function takes part in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .checks import differences
from .distributed import ALONE, Ranks
from .scores import as_scores


class Scored(NamedTuple):
    """Scores of the next candidates of a generation, in their order."""

    scores: Tensor  # [n] fp64, higher is better
    members: Mapping[str, Tensor] = {}  # [n] fp64 each: the raw scores of several rewards, where `scores` combines them
    steps: Tensor | None = (
        None  # [n] int64 on the CPU: after how many steps each was made, 0 where it is final; all are
    )
    why_not_finite: str = ""  # which part first gave a value that is not finite, where that was looked for


Report = Callable[[Scored], bool]  # takes scores as they come; False: no more are wanted, the time is over


class Objective(ABC):
    """Scores a generation, in as many batches as it likes."""

    reserve = 0.0  # seconds that the caller needs after the search: a time limit ends so much earlier
    ranks: Ranks = ALONE  # that share the candidates: each scores its own, and reports the scores of all

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What the scores depend on beside the candidates, as JSON: kept in the search's state."""
        return {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What all ranks must have alike beside that, as JSON."""
        return {}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        """Takes up a search whose state has `fingerprint`. Raises ValueError where its scores are of another search."""
        if fingerprint:
            words = ", ".join(f"{name} {value!r}" for name, value in fingerprint.items() if isinstance(value, str))
            raise ValueError(
                f"the state is of another search: its scores come from a pipeline's call ({words}), and this objective "
                "does not say what it scores. Go on with it by that call"
            )

    @abstractmethod
    def score(
        self,
        candidates: Tensor,  # [n, ..., H, W], all of one generation
        generation: int,
        first: int,  # the first one's index within the generation
        report: Report,
    ) -> None:
        """Reports the scores of all n, batch after batch. What was reported survives an exception."""


class FunctionObjective(Objective):
    """A function of latents as `evolve` takes it, called with up to `batch_size` candidates on each rank."""

    def __init__(self, function: Callable[[Tensor], Any], batch_size: int = 1, ranks: Ranks = ALONE) -> None:
        self.function, self.batch_size, self.ranks = function, batch_size, ranks

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"batch_size": self.batch_size}

    def score(self, candidates: Tensor, generation: int, first: int, report: Report) -> None:
        for batch in candidates.split(min(self.batch_size * self.ranks.size, len(candidates))):
            mine = batch[self.ranks.share(len(batch))]
            given = self.function(mine) if len(mine) else []
            scores = as_scores(given, len(mine), "the objective", mine.device)
            if not report(Scored(self.ranks.gather(scores))):
                return


def check_fingerprint(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, with the outermost difference, for a state whose scores depend on what the call's do not."""
    if not was:
        raise ValueError("the state is of another search: it does not say what its scores are of")
    was, now = ({name: value for name, value in each.items() if name != "scale"} for each in (was, now))
    # The outermost first: another scheduler says more than one of its settings.
    for name, before, here in sorted(differences(was, now), key=lambda difference: difference[0].count(".")):
        name = name.removeprefix("arguments.")
        raise ValueError(f"the state is of another search: its {name} was {before!r}, this call's is {here!r}")
