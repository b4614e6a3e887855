"""The settings of a search that the documented arguments do not say."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import check_base, check_noise, check_options, check_truths, whole_number
from ..distributed import check_process_group
from ..files import as_path
from ..result import SearchResult
from ..spectral import is_haar
from ..state import EvolutionConfig, SearchState, check_state

Race = Sequence[tuple[float, float]]  # (sigma, share) of each rung, both falling
# Chosen on the scores of FLUX.1-dev's previews that TTSnap's authors published (arXiv 2511.22242; 512 pixels, 20
# steps), 100 prompts of 200. On the others a budget of 50 in generations of 10 is worth some 1.2 (HPSv2), 1.4
# (ImageReward) and 1.3 (PickScore) times its cost, where a decode and a score cost 0.15 forward.
DEFAULT_RACE: Race = ((0.84, 0.7), (0.77, 0.5), (0.65, 0.25))

# What a file may say of the call itself, in its object "call".
CALL = ("num_inference_steps", "ses_inference_steps")

# Fields that belong to one call: compared by identity, and printed in a word.
CARRIED = ("generator", "on_generation", "on_preview", "state", "latents", "report_rewards", "process_group")


@dataclass(frozen=True)
class Preview:
    """What makes a preview cheap, beside its number of steps. Raises ValueError for impossible values.

    scale: 2 makes previews of half the height and width. Their noise is the candidate's own lowest band of level 1, so
        that they are searched by the same numbers. Haar, from dwt_level 1 on, even latents.
    race: stops candidates on their way. (sigma, share) for each rung: at the first step whose forward is made at that
        noise level or a lower one, the foreseen image (x0) is scored and the best `share` of the generation go on. A
        stopped one keeps its early score, which is never the best. A sum of rewards is then standardised by the first
        rung's images; a budget that ends inside a generation makes another race of it.
        "auto": DEFAULT_RACE. None: none is stopped.
    cfg: False leaves classifier-free guidance out of previews, which halves their cost where the call uses it.
    refine: after the search so many of the best candidates (up to k_elites), and the base, are rendered and scored
        again as the final image will be, in its steps and size. The answer is the best of these.

    All but `refine` change which candidate wins: `ses-fast calibrate` measures by how much.
    """

    scale: int = 1
    race: Race | str | None = None
    cfg: bool = True
    refine: int = 0

    def __post_init__(self) -> None:
        if type(self.scale) is not int or self.scale not in (1, 2):
            raise ValueError(f"Preview(scale=) must be 1, or 2 for half the height and width; got {self.scale!r}")
        if not isinstance(self.cfg, bool):
            raise ValueError(f"Preview(cfg=) must be True or False, got {self.cfg!r}")
        object.__setattr__(self, "refine", whole_number("Preview(refine=)", self.refine, 0))
        if self.race is not None and not (isinstance(self.race, str) and self.race == "auto"):
            object.__setattr__(self, "race", _checked_race(self.race))

    @property
    def rungs(self) -> Race:
        """The race's (sigma, share) pairs; none without a race."""
        return DEFAULT_RACE if isinstance(self.race, str) else self.race or ()

    @property
    def facts(self) -> dict[str, Any]:
        """What a preview's score depends on, as JSON."""
        return {"scale": self.scale, "race": [list(rung) for rung in self.rungs], "cfg": self.cfg}


def _checked_race(race: Any) -> tuple[tuple[float, float], ...]:
    try:
        rungs = tuple((float(sigma), float(share)) for sigma, share in race)
        good = all(0 < sigma < 1 and 0 < share < 1 for sigma, share in rungs)
        falls = all(a > b and p > q for (a, p), (b, q) in zip(rungs, rungs[1:], strict=False))
    except (TypeError, ValueError, OverflowError):
        rungs, good, falls = (), False, False
    if not (rungs and good and falls):
        raise ValueError(
            'Preview(race=) must be "auto" or (sigma, share) pairs between 0 and 1, both falling, as '
            f"{DEFAULT_RACE}; got {race!r}"
        )
    return rungs


@dataclass(frozen=True, eq=False, repr=False)
class SESConfig:
    """What the documented arguments do not say about a search. Raises ValueError for impossible values.

    popsize, k_elites, wavelet_name: as in `evolve`.
    dwt_level: a number, or "auto": 4 from 1024 pixels on the shorter side, one less with each halving,
        never below 1; about 8x8 coefficients where the noise is of pixels; with `state` the state's.
    strategy: how the next generation is drawn, as in `evolve`.
    preview: a `Preview`: what makes previews cheap, and whether the best are scored again in full.
    batch_size: how many previews are denoised, decoded and scored together; they change by rounding only, and with 1
        the best preview is the final image bit for bit where their steps agree. Where the call's inputs allow no batch
        they go one by one. "auto": on a GPU what fits in its free memory, halved if that runs out; on a CPU up to a
        million pixels. With "auto", a race, a sum of rewards, and under VRAM management, on_preview and time_limit
        come once a generation, and an exception loses the generation that it comes in.
    include_base: the seed's own noise is the first candidate: the answer is never worse than it.
    seed: the search's; None: the call's `seed`. Where that is None too, one is drawn and used for both.
    generator: a CPU torch.Generator to draw from instead, as in `evolve`.
    progress, on_generation, backend: as in `evolve`; the time to compile counts too.
    time_limit: in seconds; with ses_eval_budget=None the search takes so long that the whole call ends by then;
        the time of held-out rewards and of callbacks comes on top.
    on_preview: called as on_preview(images, scores, generation, first) with each batch: images (n, 3, H, W)
        in [-1, 1], the scores as the reward gave them, the first one's number within its generation. A callback
        with a parameter `steps` gets it too: after how many steps each score was made, 0 where it is final.
    state: `pipe.ses_result.state`, or a saved one, to go on from in the same call; ses_eval_budget is then
        the total. Without the call's seed the base noise comes from the state. A state of another prompt, reward,
        preview or class of pipeline is refused. Own functions are told apart by their names, and the pipeline's
        weights are not compared.
    latents: `pipe.ses_result.latents`, or others of that shape, to render in full (with more steps, another
        LoRA) without a search; then `pipe.ses_result` is None.
    report_rewards: rewards that take no part in the search, by name (or a dict of names to loaded ones). Each
        scores two images, into result.held_out: the one that the call returns, and the one that it would return
        without a search. That one is rendered in full first, one image more. An answer that its own reward likes
        and the others do not has been searched too hard.
    process_group: the processes that search together, as in `evolve`: each with the same pipeline, call and seed. They
        share the previews of a generation, and those of `refine`, and all return the image of one process, bit for
        bit with batch_size=1. What a race leaves of one's candidates is gone on with there. on_preview is called on
        the first alone, with its own previews: the first ones of each batch.
    """

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int | str = "auto"
    strategy: str = "ses"
    preview: Preview = Preview()
    batch_size: int | str = "auto"
    include_base: bool = True
    seed: int | None = None
    generator: torch.Generator | None = None
    progress: bool = True
    time_limit: float | None = None
    on_generation: Callable[[SearchResult], Any] | None = None
    on_preview: Callable[[Tensor, Any, int, int], Any] | None = None
    state: SearchState | None = None
    latents: Tensor | None = None  # [1, C, h, w]
    backend: str | None = None
    report_rewards: Sequence[str] | Mapping[str, Callable[[Tensor, str], Any]] = ()
    process_group: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.dwt_level, str) and self.dwt_level != "auto":
            raise ValueError(f'dwt_level must be a whole number or "auto", got {self.dwt_level!r}')
        self.evolution(1024, 1024)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'batch_size must be a whole number or "auto", got {self.batch_size!r}')
        if not isinstance(self.batch_size, str):
            object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, 1))
        if not isinstance(self.preview, Preview):
            raise ValueError(f"preview must be a ses_fast.Preview, got {self.preview!r}")
        if self.preview.refine > self.k_elites:
            raise ValueError(f"Preview(refine={self.preview.refine}) scores elites again: k_elites is {self.k_elites}")
        if self.preview.scale == 2 and (not is_haar(self.wavelet_name) or self.dwt_level == 0):
            raise ValueError(
                "Preview(scale=2) is the candidate's lowest Haar band: wavelet_name db1, dwt_level 1 or more"
            )
        check_noise(self.seed, self.generator)
        check_process_group(self.process_group)
        check_truths(include_base=self.include_base, progress=self.progress)
        check_options(on_generation=self.on_generation, on_preview=self.on_preview, time_limit=self.time_limit)
        if self.state is not None:
            check_state(self.state, self.evolution(1024, 1024), self.seed, self.generator, self.include_base)
        if self.latents is not None:
            check_base(self.latents)
            if self.state is not None:
                raise ValueError("give latents= to render them or state= to go on with a search, not both")
            if self.report_rewards:
                raise ValueError("report_rewards judge what a search found: leave it out with latents=")
        _check_report_rewards(self.report_rewards)
        if self.backend is not None:
            ops.known_backend(self.backend)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "SESConfig":
        """The settings in a JSON file, such as {"popsize": 20, "time_limit": 60}; others keep their defaults.

        Its object "call" holds arguments of the call, which are no settings: see `call_from_file`.

        Raises ValueError for what is no such object, and for an unknown name or an impossible value; OSError for no
        such file.
        """
        with _named(path):
            given, _ = _read(path)
            if carried := given.keys() & set(CARRIED):
                raise ValueError(f"{', '.join(sorted(carried))}: of one call, no settings; give them in the call")
            known = [f.name for f in fields(cls) if f.name not in CARRIED]
            if unknown := given.keys() - set(known):
                raise ValueError(
                    f"unknown settings {', '.join(sorted(unknown))}; the known ones are {', '.join(known)}"
                )
            return cls(**{name: _from_json(name, value) for name, value in given.items()})

    @staticmethod
    def call_from_file(path: str | os.PathLike[str]) -> dict[str, int]:
        """The arguments of the call in such a file, in its object "call"; none where there is none.

        `ses-fast calibrate` writes the steps that it recommends there:
        `pipe(prompt, enable_ses=True, ses_config=SESConfig.from_file(path), **SESConfig.call_from_file(path))`.
        Raises as `from_file`.
        """
        with _named(path):
            call = _read(path)[1]
            if unknown := call.keys() - set(CALL):
                raise ValueError(f"call has no {', '.join(sorted(unknown))}; it has {', '.join(CALL)}")
            return {name: whole_number(f"call: {name}", value, 1) for name, value in call.items()}

    def settings(self) -> dict[str, Any]:
        """What `from_file` reads, as JSON: without what belongs to one call."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in CARRIED}
        return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]

    def evolution(self, height: int, width: int) -> EvolutionConfig:
        """The search's own settings for an image of height x width pixels."""
        level = self.dwt_level
        if isinstance(level, str) and isinstance(self.state, SearchState):
            level = self.state.config.dwt_level
        if isinstance(level, str):
            level = min(4, max(1, (min(height, width) // 64).bit_length() - 1))
        return EvolutionConfig(self.popsize, self.k_elites, self.wavelet_name, level, self.strategy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SESConfig):
            return NotImplemented
        return all(
            getattr(self, f.name) is getattr(other, f.name)
            or (f.name not in CARRIED and getattr(self, f.name) == getattr(other, f.name))
            for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self) if f.name not in CARRIED))

    def __repr__(self) -> str:
        given = ((f, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not f.default)
        return f"SESConfig({', '.join(f'{f.name}={_in_a_word(f.name, value)}' for f, value in given)})"


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the settings, the call's arguments) in a file, as they stand there."""
    given = json.loads(as_path("path", path).read_bytes())
    if not isinstance(given, dict):
        raise ValueError("it is no JSON object of settings")
    call = given.pop("call", {})
    if not isinstance(call, dict):
        raise ValueError(f"call must be an object of arguments, got {call!r}")
    return given, call


# A setting that is a dataclass -> its class: in a file it is an object with that one's fields.
NESTED: dict[str, type] = {"preview": Preview}


def _from_json(name: str, value: Any) -> Any:
    """The value of a setting in a file. Raises ValueError for an object with unknown fields."""
    kind = NESTED.get(name)
    if kind is None or not isinstance(value, dict):
        return value
    known = [f.name for f in fields(kind)]
    if unknown := value.keys() - set(known):
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return kind(**value)


def _in_a_word(name: str, value: Any) -> str:
    if name == "report_rewards":
        return repr(list(value))
    return f"<{type(value).__name__}>" if name in CARRIED else repr(value)


def _check_report_rewards(rewards: Any) -> None:
    if isinstance(rewards, Mapping):
        if not all(isinstance(name, str) and callable(reward) for name, reward in rewards.items()):
            raise ValueError(f"report_rewards must be names, or a dict of names to rewards; got {rewards!r}")
    elif isinstance(rewards, str | bytes) or not isinstance(rewards, Sequence):
        raise ValueError(f'report_rewards must be a list of names, as ["hps"], or a dict; got {rewards!r}')
    elif rewards:
        from ..rewards import check_names

        try:
            check_names(*rewards)
        except ValueError as error:
            raise ValueError(f"report_rewards: {error}") from error
