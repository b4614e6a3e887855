"""A scheduler that runs some of its steps, keeps what the later ones need, and foresees the image."""

import copy
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .noise import OneForAll

_ROWS = object()  # stands in a memory for a tensor of the candidates


class Window:
    """The steps [start, end) of a schedule, which one call of a pipeline runs.

    memory, history: what the steps before `start` left, see `state`. Afterwards `latents` is what the last step made,
    `clean` the image's latents as its forward saw them, `levels` the noise level of each of the schedule's steps.
    """

    def __init__(
        self,
        scheduler: Any,
        start: int,
        end: int,
        memory: dict[str, Any] | None = None,
        history: tuple[Tensor, ...] = (),
    ) -> None:
        self.scheduler, self.start, self.end, self.memory, self.history = scheduler, start, end, memory, history
        self.done = start
        self.levels: list[float] | None = None
        self.all_steps = 0  # of the whole schedule
        self.latents: Tensor | None = None
        self.clean: Tensor | None = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        scheduler = self.scheduler
        scheduler.set_timesteps(*args, **kwargs)
        self.all_steps, self.levels = len(scheduler.timesteps), noise_levels(scheduler)
        if self.memory is not None:
            rows = iter([part.clone() for part in self.history])  # a solver may write on its own
            vars(scheduler).update({name: _put(value, rows) for name, value in self.memory.items()})

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.scheduler.set_begin_index(begin_index + self.start)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self.scheduler
        bound = inspect.signature(scheduler.step).bind(*args, **kwargs)
        given = bound.arguments
        returns_dict = given.get("return_dict", True)
        given["return_dict"] = True
        sample, output = given["sample"], given["model_output"]
        with OneForAll(len(sample)):
            made = scheduler.step(*bound.args, **bound.kwargs)
        self.latents = made.prev_sample
        if self.done == self.end - 1 and self.levels is not None and has_clean(scheduler):
            clean = getattr(made, "pred_original_sample", None)
            if clean is None:
                clean = foreseen(scheduler, sample, output, self.levels[self.done])
            self.clean = clean.to(self.latents.dtype)
        self.done += 1
        return made if returns_dict else made.to_tuple()

    def state(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """(what the scheduler remembers, the same for all candidates; [n, ...] each: what it remembers of them)."""
        assert self.latents is not None
        rows: list[Tensor] = []
        kept = {
            name: _take(value, self.latents.shape, rows)
            for name, value in vars(self.scheduler).items()
            if name != "_internal_dict"  # the config
        }
        return kept, tuple(rows)


class WindowedScheduler:
    """Stands for a scheduler during one call, and shows it a `Window` of its steps; all else is the scheduler's own."""

    def __init__(self, window: Window) -> None:
        object.__setattr__(self, "_window", window)

    def __getattribute__(self, name: str) -> Any:
        window: Window = object.__getattribute__(self, "_window")
        own = getattr(window.scheduler, name)
        if name == "timesteps":
            return own[window.start : window.end]
        if name in ("set_timesteps", "set_begin_index", "step"):
            return functools.wraps(own)(functools.partial(getattr(window, name)))
        return own

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_window").scheduler, name, value)


def window_on(scheduler: Any, start: int, end: int, *state: Any) -> Window:
    """A window on a copy of the scheduler: the pipeline's own stays as it is."""
    return Window(copy.deepcopy(scheduler), start, end, *state)


def is_flow(scheduler: Any) -> bool:
    """Whether a sample at sigma is (1 - sigma) image + sigma noise."""
    config = scheduler.config
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or any(name.startswith("FlowMatch") for name in _names(scheduler))


def noise_levels(scheduler: Any) -> list[float] | None:
    """The share of noise in what each step's forward sees, from 1 (noise) to 0, as flow matching names it.

    A sample that is image + s noise (or that, scaled) counts as s / (1 + s). None: the schedule does not say.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is None and hasattr(scheduler, "alphas_cumprod"):
        kept = scheduler.alphas_cumprod[timesteps.long().cpu()].double()
        sigmas = ((1 - kept) / kept) ** 0.5
    if sigmas is None or len(sigmas) < len(timesteps):
        return None
    sigmas = torch.as_tensor(sigmas)[: len(timesteps)].to("cpu", torch.float64, copy=True)
    if any(name.startswith(MIDWAY) for name in _names(scheduler)):
        sigmas[1::2] = _sigmas_at(scheduler, timesteps[1::2])
    return (sigmas if is_flow(scheduler) else 1 / (1 + 1 / sigmas)).tolist()  # noise alone has an infinite sigma


# Every second of their forwards lies between two of their sigmas, and only its timestep says where.
MIDWAY = ("KDPM2", "DPMSolverSDE")


def _sigmas_at(
    scheduler: Any,
    timesteps: Tensor,  # [steps], which may lie between two of the training's
) -> Tensor:  # [steps] fp64
    """The sigmas that such a scheduler made the timesteps of."""
    kept = scheduler.alphas_cumprod.double().cpu().numpy()
    logs = np.log((1 - kept) / kept) / 2
    return torch.from_numpy(np.exp(np.interp(timesteps.double().cpu(), np.arange(len(logs)), logs)))


def _names(scheduler: Any) -> list[str]:
    """Its class's name, and those that it derives from."""
    return [cls.__name__ for cls in type(scheduler).__mro__]


def is_inverse(scheduler: Any) -> bool:
    """Whether its steps add noise in place of taking it away."""
    return any("Inverse" in name for name in _names(scheduler))


# Their steps say which image they foresee, or it follows from what the model predicts.
FORESEE = tuple("Euler Heun KDPM2 LMS DDIM DDPM DPMSolver SASolver UniPC DEIS PNDM LCM TCD EDM".split())


def has_clean(scheduler: Any) -> bool:
    """Whether the image's latents can be told from a step."""
    known = any(name.removeprefix("FlowMatch").startswith(FORESEE) for name in _names(scheduler))
    return known and (is_flow(scheduler) or scheduler.config.get("prediction_type") in PREDICTED)


# What the model predicts of a sample = a image + b noise with a^2 + b^2 = 1 -> the image.
PREDICTED = {
    "epsilon": lambda sample, output, a, b: (sample - b * output) / a,
    "v_prediction": lambda sample, output, a, b: a * sample - b * output,
    "sample": lambda sample, output, a, b: output,
}


NOISY = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "SASolver", "CMStochastic", "CosineDPM", "SCM")


def draws_noise(scheduler: Any, eta: float | None = None) -> bool:
    """Whether its steps add noise of their own. eta: the pipeline's argument for DDIM."""
    config = scheduler.config
    chosen = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    return bool(chosen or eta) or any(part in name for name in _names(scheduler) for part in NOISY)


def foreseen(
    scheduler: Any,
    sample: Tensor,  # [n, ...]
    output: Tensor,  # [n, ...], the model's
    level: float,
) -> Tensor:  # [n, ...]
    """The image's latents, by what the model says of a sample at that level of noise."""
    sample, output = sample.float(), output.float()
    if is_flow(scheduler):
        return sample - level * output
    norm = math.hypot(1 - level, level)
    return PREDICTED[scheduler.config.prediction_type](sample, output, (1 - level) / norm, level / norm)


def _take(value: Any, shape: torch.Size, rows: list[Tensor]) -> Any:
    """`value` with the candidates' tensors moved to `rows`."""
    if isinstance(value, Tensor) and value.shape == shape:
        rows.append(value)
        return _ROWS
    if isinstance(value, list | tuple):
        return type(value)(_take(each, shape, rows) for each in value)
    return value


def _put(value: Any, rows: Iterator[Tensor]) -> Any:
    """Undoes `_take`."""
    if value is _ROWS:
        return next(rows)
    if isinstance(value, list | tuple):
        return type(value)(_put(each, rows) for each in value)
    return value
