"""What the families share: the settings, the documented call, and the unit that searches for the noise.

A pipeline's own call runs its units (prompt, noise, ...), denoises and decodes. `install` gives the pipeline
a subclass whose call leaves a `Request`, and appends a unit that answers it: it searches for a better noise
and puts it in place. So the prompt is encoded once, and the final image comes from the stock code; the
search's cheap previews go through the pipeline's own functions too. Imports no diffsynth.
"""

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..evolution import EvolutionConfig, SearchState, start, whole_number
from ..loop import HeldOut, SearchResult, evolve


@dataclass(frozen=True)
class SESConfig:
    """What the documented arguments do not say about a search. Raises ValueError for what cannot be.

    popsize, k_elites, wavelet_name: as in `evolve`.
    dwt_level: a number, or "auto": 4 from 1024 pixels on the shorter side, one less with each halving,
        never below 1.
    batch_size: previews denoised together; it changes them by rounding only. One by one, with a warning,
        where the call's inputs allow no batch.
    include_base: the seed's own noise is the first candidate: the answer is never worse than it.
    seed: the search's; None: the call's `seed`. Where that is None too, one is drawn and used for both.
    generator: a CPU torch.Generator to draw from instead, as in `evolve`.
    progress, time_limit, on_generation, backend: as in `evolve`.
    on_preview: called as on_preview(images, scores, generation, first) with each batch: images (n, 3, H, W)
        in [-1, 1], the scores as the reward gave them, the first one's number within its generation.
    state: `pipe.ses_result.state`, or a saved one, to go on from in the same call; ses_eval_budget is then
        the total.
    report_rewards: rewards that take no part in the search, by name (or a dict of names to loaded ones). Each
        scores two previews, made again after the search: the base's and the answer's, into result.held_out.
        An answer that its own reward likes and the others do not has been searched too hard.
    """

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int | str = "auto"
    batch_size: int = 1
    include_base: bool = True
    seed: int | None = None
    generator: torch.Generator | None = None
    progress: bool = True
    time_limit: float | None = None
    on_generation: Callable[[SearchResult], Any] | None = None
    on_preview: Callable[[Tensor, Any, int, int], Any] | None = None
    state: SearchState | None = None
    backend: str | None = None
    report_rewards: Sequence[str] | Mapping[str, Callable[[Tensor, str], Any]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.dwt_level, str) and self.dwt_level != "auto":
            raise ValueError(f'dwt_level must be a whole number or "auto", got {self.dwt_level!r}')
        self.evolution(1024, 1024)
        object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, 1))
        if self.seed is not None or self.generator is not None:
            check_seed(self.seed, self.generator)
        for name in ("include_base", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("on_generation", "on_preview"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} must be callable, got {getattr(self, name)!r}")
        limit = self.time_limit
        if limit is not None and (not isinstance(limit, Real) or isinstance(limit, bool) or not limit > 0):
            raise ValueError(f"time_limit must be seconds above 0, got {limit!r}")
        if self.state is not None and not isinstance(self.state, SearchState):
            raise ValueError(f"state must be a SearchState, as result.state, got {type(self.state).__name__}")
        if self.state is not None:
            _check_state(self, self.state)
        names = self.report_rewards
        if isinstance(names, Mapping):
            if not all(isinstance(name, str) and callable(reward) for name, reward in names.items()):
                raise ValueError(f"report_rewards must be names, or a dict of names to rewards; got {names!r}")
        elif isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f'report_rewards must be a list of names, as ["hps"], or a dict; got {names!r}')
        elif names:
            from ..rewards import check_names

            check_names(*names)
        if self.backend is not None and self.backend not in ops.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {self.backend!r}")

    def evolution(self, height: int, width: int) -> EvolutionConfig:
        """The search's own settings for an image of height x width pixels."""
        level = self.dwt_level
        if isinstance(level, str):
            level = min(4, max(1, (min(height, width) // 64).bit_length() - 1))
        return EvolutionConfig(self.popsize, self.k_elites, self.wavelet_name, level)


def _check_state(config: SESConfig, state: SearchState) -> None:
    """Raises ValueError where `state` was started with other settings; only its base is for `evolve` to compare."""
    if config.generator is not None or config.seed not in (None, state.seed):
        raise ValueError("the state goes on with its own seed or generator: leave out seed= and generator=")
    for name in ("popsize", "k_elites", "wavelet_name"):
        was, now = getattr(state.config, name), getattr(config, name)
        if was != now:
            raise ValueError(f"the state is of another search: it was started with {name}={was!r}, not {now!r}")
    if config.dwt_level not in ("auto", state.config.dwt_level):
        raise ValueError(f"the state is of another search: it was started with dwt_level={state.config.dwt_level}")
    if config.include_base != state.include_base:
        raise ValueError(f"the state is of another search: it was started with include_base={state.include_base}")


def check_seed(seed: int | None, generator: torch.Generator | None = None) -> None:
    """Raises what a search would raise at its start, before any work."""
    start(torch.zeros(1, 1, 1), EvolutionConfig(dwt_level=0), seed=seed, generator=generator)


@dataclass
class Request:
    """One call with enable_ses=True, on its way to the unit."""

    config: SESConfig
    reward: Callable[[Tensor, str], Any]
    budget: int
    steps: int
    seed: int | None  # of the search
    held_out: dict[str, Callable[[Tensor, str], Any]] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)  # what the call gave scheduler.set_timesteps
    begin: float = 0.0
    found: float = 0.0  # when the search had ended


class SESPipeline:
    """The documented call; `install` puts this class before the pipeline's own."""

    ses_result: SearchResult | None = None
    _ses_stock: type  # the pipeline's own class

    def __call__(
        self: Any,
        *args: Any,
        enable_ses: bool = False,
        ses_reward_model: Any = "pick",
        ses_eval_budget: int = 50,
        ses_inference_steps: int = 10,
        ses_config: SESConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with enable_ses=True, from a noise that Spectral Evolution Search found.

        ses_reward_model: a name or a dict of weights for `load_reward`, a loaded reward, or any callable that
            takes images (n, 3, H, W) in [-1, 1] and the prompt, and returns n scores, higher for better.
        ses_eval_budget: how many previews are made and scored.
        ses_inference_steps: the steps of a preview. With num_inference_steps of them the final image is the
            best preview itself; more are a waste, which is warned of.
        ses_config: everything else. Without enable_ses=True these four do nothing.

        Afterwards `pipe.ses_result` is the SearchResult, with seconds for prompt, ask, denoise, decode,
        reward, tell and final (and held_out). An exception leaves as it came; `pipe.ses_result` is then what was found
        before it. Raises ValueError for bad input before any work.
        """
        if not isinstance(enable_ses, bool):
            raise ValueError(f"enable_ses must be True or False, got {enable_ses!r}")
        call = super().__call__  # type: ignore[misc]
        if not enable_ses:
            return call(*args, **kwargs)

        bound = inspect.signature(call).bind(*args, **kwargs)
        given = {**bound.arguments, **bound.kwargs}  # a subclass may take some of them as **kwargs
        prompt = given.get("prompt", args[0] if args else "")
        if not isinstance(prompt, str):
            raise ValueError(f"SES needs one prompt, a string: search for each on its own; got {prompt!r}")
        config = SESConfig() if ses_config is None else ses_config
        if not isinstance(config, SESConfig):
            raise ValueError(f"ses_config must be a ses_fast.SESConfig, got {config!r}")
        if not isinstance(ses_reward_model, str | Mapping) and not callable(ses_reward_model):
            raise ValueError(
                "ses_reward_model must be the name of a reward, a dict of names to weights or a "
                f"callable(images, prompt), got {ses_reward_model!r}"
            )
        budget = whole_number("ses_eval_budget", ses_eval_budget, 1)
        steps = whole_number("ses_inference_steps", ses_inference_steps, 1)
        _check_lora(self, given)
        seed, search_seed = _seeds(given.get("seed"), config)
        unit = next((unit for unit in self.units if isinstance(unit, SESUnit)), None)
        if unit is None:
            raise ValueError("pipe.units has lost the unit that searches: call ses_fast.enable(pipe) again")
        if isinstance(ses_reward_model, str | Mapping):
            from ..rewards import load_reward

            ses_reward_model = load_reward(ses_reward_model, device=self.device)
        if getattr(ses_reward_model, "whole_generations", False):
            _start_weighing(ses_reward_model, config, budget)

        if "seed" in bound.arguments:
            bound.arguments["seed"] = seed
            args, kwargs = bound.args, bound.kwargs
        else:
            kwargs["seed"] = seed
        request = Request(config, ses_reward_model, budget, steps, search_seed, begin=_clock(self.device))
        request.held_out = _held_out(config.report_rewards, self.device)
        self.ses_result = None
        try:
            with unit.asked(request), _noted(self.scheduler, request.schedule):
                image = call(*args, **kwargs)
        except BaseException:
            self.load_models_to_device([])  # what a failed preview left there
            raise
        seconds = self.ses_result.seconds
        seconds["final"] = _clock(self.device) - request.found
        seconds["total"] = _clock(self.device) - request.begin
        return image


class SESUnit:
    """The last unit of an enabled pipeline. A family's class is `class Family(SESUnit, PipelineUnit)`.

    Without a request it does nothing: training runs the pipeline's units too.
    """

    decoder = "vae_decoder"  # the pipeline's attribute
    request: Request | None = None

    def __init__(self) -> None:
        super().__init__(  # type: ignore[call-arg]
            take_over=True,
            input_params=("height", "width", "cfg_scale", "noise", "latents", "input_latents"),
            input_params_posi={"prompt": "prompt"},
            output_params=("noise", "latents"),
        )

    # ---- a family's own

    def batched_model_fn(self, pipe: Any, shared: dict[str, Any]) -> Callable[..., Tensor] | None:
        """A function with the arguments of `pipe.model_fn` that takes n candidates as `latents` and predicts
        for each what `pipe.model_fn` does for it alone. None where inputs or a wrapped model_fn forbid it.
        """
        raise NotImplementedError

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, C, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        """The decoder's output, as the pipeline's own call decodes."""
        raise NotImplementedError

    # ---- what all share

    @contextmanager
    def asked(self, request: Request) -> Iterator[None]:
        """Holds `request` for the next `process`, and forgets it afterwards whatever happens."""
        self.request = request
        try:
            yield
        finally:
            self.request = None

    def process(
        self,
        pipe: Any,
        inputs_shared: dict[str, Any],
        inputs_posi: dict[str, Any],
        inputs_nega: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Answers the request, if there is one: searches, and puts the best noise and its latents in place."""
        request, self.request = self.request, None  # answered once
        if request is not None:
            previews = Previews(self, pipe, request, inputs_shared, inputs_posi, inputs_nega)
            noise = _search(pipe, request, inputs_shared, previews)
            inputs_shared |= {
                "noise": noise,
                "latents": _first_latents(pipe.scheduler, noise, inputs_shared),
            }
        return inputs_shared, inputs_posi, inputs_nega


class Previews:
    """The search's objective: from noises to cheap images to scores, with what the earlier units prepared."""

    def __init__(
        self,
        unit: SESUnit,
        pipe: Any,
        request: Request,
        shared: dict[str, Any],
        posi: dict[str, Any],
        nega: dict[str, Any],
    ) -> None:
        self.unit, self.pipe, self.request = unit, pipe, request
        self.shared, self.posi, self.nega = shared, posi, nega
        self.seconds = dict.fromkeys(("denoise", "decode", "reward"), 0.0)
        self.done = request.config.state.evaluations if request.config.state is not None else 0

        final = request.schedule["num_inference_steps"]
        if request.steps > final:
            warnings.warn(
                f"ses_inference_steps={request.steps} makes a preview dearer than the final image with its "
                f"{final} steps: ses_inference_steps={final} is enough",
                stacklevel=2,
            )
        self.scheduler = copy.copy(pipe.scheduler)
        self.scheduler.set_timesteps(**request.schedule | {"num_inference_steps": request.steps})

        self.whole_generations = getattr(request.reward, "whole_generations", False)  # `evolve` looks for it
        self.batch_size = request.config.batch_size
        self.model_fn = unit.batched_model_fn(pipe, shared) if self.batch_size > 1 else None
        self.together = 1 if self.model_fn is None else self.batch_size
        if self.together < self.batch_size:
            warnings.warn(
                "the call's inputs or the pipeline's model_fn allow no batch: previews go one by one",
                stacklevel=2,
            )

    @property
    def members(self) -> Any:
        """The raw scores behind the last ones, where the reward weighs several; `evolve` looks for it."""
        return getattr(self.request.reward, "members", None)

    def __call__(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Any:
        """n scores, as the reward gave them."""
        lap = _Laps(self.seconds, self.pipe.device)
        images = self.images(noises, lap)
        scores = self.request.reward(images, self.posi["prompt"])
        lap("reward")
        config = self.request.config
        if config.on_preview is not None:
            config.on_preview(images, scores, *divmod(self.done, config.popsize))
        self.done += len(noises)
        return scores

    def images(
        self,
        noises: Tensor,  # [n, C, h, w]
        lap: Callable[[str], None],
    ) -> Tensor:  # [n, 3, H, W]
        pipe = self.pipe
        pipe.load_models_to_device(pipe.in_iteration_models)
        latents = torch.cat([self.denoise(part) for part in noises.split(self.together)])
        lap("denoise")
        pipe.load_models_to_device([self.unit.decoder])
        parts = [self.unit.decode(pipe, part, self.shared) for part in latents.split(self.batch_size)]
        images = torch.cat(parts).clamp(-1, 1)  # a decoder leaves the range
        lap("decode")
        return images

    def held_out(
        self,
        base: Tensor,  # [1, C, h, w]
        answer: Tensor,  # [1, C, h, w]
    ) -> dict[str, HeldOut]:
        """What each reward of the request that took no part in the search says of both."""
        images = self.images(torch.cat([base, answer]), lambda stage: None)
        scores = {
            name: [float(score) for score in reward(images, self.posi["prompt"])]
            for name, reward in self.request.held_out.items()
        }
        return {name: HeldOut(*two) for name, two in scores.items()}

    def denoise(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Tensor:  # [n, C, h, w]
        """What the pipeline's own call does between its units and its decoder."""
        pipe = self.pipe
        # One alone goes the final image's way, to be equal bit for bit.
        model_fn = pipe.model_fn if len(noises) == 1 else self.model_fn
        models = {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        inputs = {**self.shared, "noise": noises}
        inputs["latents"] = _first_latents(self.scheduler, noises, self.shared)
        for step, timestep in enumerate(self.scheduler.timesteps):
            predicted = pipe.cfg_guided_model_fn(
                model_fn,
                inputs["cfg_scale"],
                inputs,
                self.posi,
                self.nega,
                timestep=timestep[None].to(pipe.device, pipe.torch_dtype),
                progress_id=step,
                **models,
            )
            inputs["latents"] = pipe.step(self.scheduler, progress_id=step, noise_pred=predicted, **inputs)
        return inputs["latents"]


def install(pipe: Any, family: type[SESUnit]) -> None:
    """Puts `SESPipeline` before the class of `pipe`, and a `family()` last in its units; not twice."""
    if not isinstance(pipe, SESPipeline):
        stock = type(pipe)
        names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
        pipe.__class__ = type(
            stock.__name__,
            (SESPipeline, stock),
            names | {"_ses_stock": stock, "__call__": _documented(stock.__call__)},
        )
    if not any(isinstance(unit, SESUnit) for unit in pipe.units):
        pipe.units.append(family())


def remove(pipe: Any) -> None:
    """Undoes `install`, and forgets the last result."""
    pipe.__class__ = pipe._ses_stock
    pipe.units[:] = [unit for unit in pipe.units if not isinstance(unit, SESUnit)]
    vars(pipe).pop("ses_result", None)


def _documented(stock_call: Callable) -> Callable:
    """`SESPipeline.__call__` under a signature that shows the stock parameters and the new ones."""

    @functools.wraps(SESPipeline.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SESPipeline.__call__(self, *args, **kwargs)

    own = inspect.signature(SESPipeline.__call__).parameters.values()
    stock = list(inspect.signature(stock_call).parameters.values())
    rest = [stock.pop()] if stock[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    new = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    signature = inspect.Signature([*stock, *new, *rest])
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    return __call__


def _check_lora(pipe: Any, given: dict[str, Any]) -> None:
    for name in ("lora", "positive_only_lora", "negative_lora"):
        if given.get(name) is not None and not getattr(pipe.dit, "vram_management_enabled", False):
            raise ValueError(
                f"with SES, {name}= needs pipe.dit = pipe.enable_lora_hot_loading(pipe.dit) first: otherwise "
                "DiffSynth adds the LoRA to the weights again in every step of every preview"
            )


def _start_weighing(reward: Any, config: SESConfig, budget: int) -> None:
    """Raises ValueError where weighed rewards have no first generation to be standardised by."""
    if config.state is None:
        reward.restart()
        if min(config.popsize, budget) < 2:
            raise ValueError("rewards are weighed by the first generation: popsize and ses_eval_budget from 2 on")
    elif reward.scale is None:
        raise ValueError(
            "weighed rewards go on with the scale of the first generation: give ses_reward_model= the same loaded "
            "reward, or a loaded one with its reward.scale set to the first one's"
        )


def _held_out(rewards: Any, device: Any) -> dict[str, Callable[[Tensor, str], Any]]:
    """`SESConfig.report_rewards`, loaded."""
    if isinstance(rewards, Mapping):
        return dict(rewards)
    from ..rewards import load_reward

    return {name: load_reward(name, device=device) for name in rewards}


def _seeds(seed: int | None, config: SESConfig) -> tuple[int | None, int | None]:
    """The call's seed and the search's. One that is drawn serves both: result.seed gives the image again."""
    if seed is not None:
        check_seed(seed)
    if config.state is not None:
        return config.state.seed if seed is None else seed, config.seed
    if config.seed is not None or config.generator is not None:
        return seed, config.seed
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return seed, seed


def _search(pipe: Any, request: Request, shared: dict[str, Any], previews: Previews) -> Tensor:
    """The best noise [1, C, h, w]; leaves the result, a partial one too, at pipe.ses_result."""
    config = request.config
    evolution = config.evolution(shared["height"], shared["width"])
    prompt = _clock(pipe.device) - request.begin
    try:
        pipe.ses_result = evolve(
            shared["noise"],
            previews,
            request.budget,
            evolution.popsize,
            evolution.k_elites,
            evolution.wavelet_name,
            evolution.dwt_level,
            seed=request.seed,
            generator=config.generator,
            # Under VRAM management the models take turns on the device: once a generation, not once a batch.
            # A reward that needs whole generations has them anyway: `evolve` asks `previews`.
            batch_size=evolution.popsize if pipe.vram_management_enabled else config.batch_size,
            include_base=config.include_base,
            on_generation=config.on_generation,
            progress=config.progress,
            time_limit=config.time_limit,
            state=config.state,
            backend=config.backend,
        )
    except BaseException as error:
        pipe.ses_result = getattr(error, "ses_result", None)
        raise
    finally:
        if pipe.ses_result is not None:
            seconds = pipe.ses_result.seconds
            seconds["other"] += seconds.pop("objective") - sum(previews.seconds.values())  # on_preview's
            seconds.update(prompt=prompt, **previews.seconds)
    found = _clock(pipe.device)
    if request.held_out:
        held_out = previews.held_out(shared["noise"], pipe.ses_result.latents)
        pipe.ses_result = replace(pipe.ses_result, held_out=held_out)
        seconds["held_out"] = _clock(pipe.device) - found
    request.found = _clock(pipe.device)
    return pipe.ses_result.latents


def _first_latents(
    scheduler: Any,
    noise: Tensor,  # [n, C, h, w]
    shared: dict[str, Any],
) -> Tensor:  # [n, C, h, w]
    """Where the denoising begins: the noise, or the input image noised to the first timestep."""
    if shared.get("input_latents") is None:
        return noise
    return scheduler.add_noise(shared["input_latents"], noise, timestep=scheduler.timesteps[0])


@contextmanager
def _noted(scheduler: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Notes in `arguments` what the pipeline's call gives its scheduler.

    Previews need the same with other steps. It differs between families, and some of it (Z-Image's
    sigma_shift) reaches no unit. The pipeline sets its timesteps once, first of all; then the scheduler is as
    it was.
    """

    def set_timesteps(num_inference_steps: int, **others: Any) -> None:
        del scheduler.set_timesteps
        arguments.update(others, num_inference_steps=num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, **others)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        vars(scheduler).pop("set_timesteps", None)


class _Laps:
    """Adds the time since the last lap to a stage."""

    def __init__(self, seconds: dict[str, float], device: torch.device | str) -> None:
        self.seconds, self.device = seconds, device
        self.last = _clock(device)

    def __call__(self, stage: str) -> None:
        now = _clock(self.device)
        self.seconds[stage] += now - self.last
        self.last = now


def _clock(device: torch.device | str) -> float:
    """Seconds, when the device has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
