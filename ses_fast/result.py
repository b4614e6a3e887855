"""What a search has found, in memory and on disk."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import missing_extra
from .evolution import Leader, leaders
from .files import as_path, write_whole
from .state import TENSORS, SearchState

RESULT_FORMAT = 3  # raised when `SearchResult.load` would no longer read an old file
STOPPED = ("budget", "time_limit", "error", "running")  # "running": in on_generation
# A file may come from another device: its answer is built again here, and differs by the dtype's rounding.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One scored candidate; the score is minus infinity where the objective's was not finite."""

    generation: int
    index: int
    score: float
    members: dict[str, float] | None = None  # each one's raw score, where the objective combines several rewards
    steps: int | None = None  # after how many of a preview's steps it was made, where a race stopped it; None: final


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The scores that a reward outside the search gives to two images: without search, and the one returned."""

    base: float
    answer: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search has found so far; of one that was broken off, at `error.ses_result`."""

    latents: Tensor | None  # [1, ..., H, W], the best; None while no score is finite
    score: float | None  # the best
    base_score: float | None  # the base's own; None unless include_base
    best: Evaluation | None  # which candidate it was
    trace: list[Evaluation]  # every score, in order
    evaluations: int
    seed: int | None  # None with a generator
    seconds: dict[str, float]  # this call's, by stage; "total" is their sum; a GPU's work counts where it is waited for
    stopped: str  # one of STOPPED
    state: SearchState  # to save, or to continue from with evolve(..., state=)
    held_out: dict[str, HeldOut] = field(default_factory=dict)  # a pipeline's, by SESConfig(report_rewards=)
    refined: list[Evaluation] = field(
        default_factory=list
    )  # the best ones' scores as final images, by Preview(refine=)
    forwards: dict[str, int] = field(default_factory=dict)  # of a pipeline's denoiser in this call, "preview", "refine"

    def __repr__(self) -> str:
        best = self.best and (self.best.generation, self.best.index)
        held_out = f", held_out={self.held_out}" if self.held_out else ""
        return (
            f"SearchResult(score={_short(self.score)}, base_score={_short(self.base_score)}, best={best}, "
            f"evaluations={self.evaluations}, seed={self.seed}, stopped={self.stopped!r}, "
            f"seconds={self.seconds.get('total', 0.0):.3g}{held_out})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to one safetensors file, with what is no tensor as JSON in its header; `load` reads it.

        A file that is there is replaced once the new one is complete; a link's target is. Raises FileNotFoundError
        for a missing folder, IsADirectoryError for a folder, ImportError without safetensors.
        """
        path, safetensors = as_path("path", path), _safetensors()
        state = self.state.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if self.latents is not None:
            tensors["latents"] = self.latents.cpu().contiguous()
        facts = {
            "format": RESULT_FORMAT,
            "best": None if self.best is None else self._number(self.best),
            "seconds": self.seconds,
            "stopped": self.stopped,
            "held_out": {name: [one.base, one.answer] for name, one in self.held_out.items()},
            "refined": [[self._number(one), one.score, one.members] for one in self.refined],
            "forwards": self.forwards,
            "state": {name: value for name, value in state.items() if name not in tensors},
        }
        header = {"ses_fast": json.dumps(facts)}
        write_whole(path, lambda file: safetensors.torch.save_file(tensors, file, metadata=header))

    def _number(self, one: Evaluation) -> int:
        return one.generation * self.state.config.popsize + one.index

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "SearchResult":
        """What `save` wrote, on the CPU: the latents bit for bit, and a state to go on from. Runs nothing of the file.

        Raises ValueError for any other file and for one whose parts do not fit each other, FileNotFoundError for
        none, ImportError without safetensors.
        """
        path, safetensors = as_path("path", path), _safetensors()
        if path.is_dir():
            raise ValueError(f"{path} is no result that SearchResult.save wrote: it is a folder")
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("ses_fast", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:  # JSON's own is a ValueError
            raise ValueError(f"{path} is no result that SearchResult.save wrote: {error}") from error
        if not isinstance(facts, dict) or "format" not in facts:
            raise ValueError(f"{path} is no result that SearchResult.save wrote: it says nothing of a search")
        if facts["format"] != RESULT_FORMAT:
            raise ValueError(
                f"{path} is no search result of format {RESULT_FORMAT}, which this version of ses_fast reads: it is "
                f"of format {facts['format']!r}"
            )
        try:
            return _read(facts, tensors)
        except ValueError as error:
            raise ValueError(f"{path} is no result that can be trusted: {error}") from error


def result_of(
    state: SearchState,
    latents: Tensor | None,  # [1, ..., H, W], the best
    best: int | None,  # which score is theirs
    stopped: str,
    seconds: dict[str, float],
    held_out: dict[str, HeldOut] | None = None,
    refined: Sequence[tuple[int, float, dict[str, float] | None]] = (),  # number, score, members
    forwards: dict[str, int] | None = None,
) -> SearchResult:
    """The result of a search in `state`; its answer is the best of `refined`, where there are any. Waits for the
    device.
    """
    popsize, members = state.config.popsize, {name: scores.tolist() for name, scores in state.members.items()}
    trace = [
        Evaluation(
            *divmod(number, popsize),
            score,
            {name: each[number] for name, each in members.items()} if members else None,
            steps or None,
        )
        for number, (score, steps) in enumerate(zip(state.history, state.steps.tolist(), strict=True))
    ]
    again = {number: Evaluation(*divmod(number, popsize), score, each) for number, score, each in refined}
    judged = again or dict(enumerate(trace))
    base = judged.get(0) if state.include_base else None
    return SearchResult(
        latents=latents,
        score=None if best is None else judged[best].score,
        base_score=None if base is None else base.score,
        best=None if best is None else judged[best],
        trace=trace,
        evaluations=state.evaluations,
        seed=state.seed,
        seconds=seconds,
        stopped=stopped,
        state=state,
        held_out=held_out or {},
        refined=list(again.values()),
        forwards=forwards or {},
    )


def _read(facts: dict[str, Any], tensors: dict[str, Tensor]) -> SearchResult:
    """The result of a file's parts. Raises ValueError where one is missing, of another kind, or not the others'."""
    saved = _part(facts, "state", dict)
    latents = tensors.pop("latents", None)
    if unknown := tensors.keys() - TENSORS:
        raise ValueError(f"it holds tensors that no result has: {', '.join(sorted(unknown))}")
    state = SearchState.load_state_dict(saved | tensors)
    stopped, seconds = _part(facts, "stopped", str), _part(facts, "seconds", dict)
    if stopped not in STOPPED:
        raise ValueError(f"it stopped by {stopped!r}, which is none of {', '.join(STOPPED)}")
    if not all(_is_number(value) and 0 <= value < 1e12 for value in seconds.values()):
        raise ValueError("its seconds are not numbers")
    held_out = {}
    for name, two in _part(facts, "held_out", dict).items():
        if not isinstance(two, list) or len(two) != 2 or not all(map(_is_number, two)):
            raise ValueError(f"its held-out scores of {name!r} are not two numbers")
        held_out[name] = HeldOut(*two)
    forwards = _part(facts, "forwards", dict)
    if not all(type(value) is int and value >= 0 for value in forwards.values()):
        raise ValueError("its forwards are not whole numbers")
    best, refined = facts.get("best"), _read_refined(_part(facts, "refined", list), state)
    known = leaders(state, state.config.k_elites)
    if state.include_base and known and all(each.number for each in known):
        known.append(Leader(state.base, 0, state.history[0]))
    if not known:
        if best is not None or latents is not None:
            raise ValueError("it names a best candidate, and none of its scores is finite")
    else:
        number = max(refined, key=lambda one: one[1])[0] if refined else known[0].number
        expected = next((each.latents for each in known if each.number == number), None)
        if type(best) is not int or best != number:
            raise ValueError(f"it names candidate {best!r} as the best, and its scores say {number}")
        if expected is None or latents is None or latents.shape != expected.shape or latents.dtype != expected.dtype:
            raise ValueError("its latents are not of the base's shape and dtype")
        tolerance = TOLERANCE[latents.dtype]
        if not torch.allclose(latents.double(), expected.double(), rtol=tolerance, atol=tolerance):
            raise ValueError("its latents are not those of its best candidate")
    return result_of(state, latents, best, stopped, seconds, held_out, refined, forwards)


def _read_refined(given: list[Any], state: SearchState) -> list[tuple[int, float, dict[str, float] | None]]:
    refined = []
    for one in given:
        if not isinstance(one, list) or len(one) != 3 or type(one[0]) is not int or not _is_number(one[1]):
            raise ValueError("its refined scores are not (number, score, members)")
        number, score, members = one
        good = members is None or isinstance(members, dict) and all(map(_is_number, members.values()))
        if not 0 <= number < state.evaluations or not good:
            raise ValueError(f"its refined candidate {number} is none of the search's {state.evaluations}")
        refined.append((number, float(score), members))
    return refined


def _part(facts: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(facts.get(name), kind):
        raise ValueError(f"its {name} should be a {kind.__name__}, and is {type(facts.get(name)).__name__}")
    return facts[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _short(score: float | None) -> str:
    return "None" if score is None else f"{score:.6g}"


def _safetensors() -> Any:
    """The module, with its `torch` part. Raises ImportError, naming the extra, where it is missing."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing_extra("safetensors", "diffsynth") from error
    return safetensors
