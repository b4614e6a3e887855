"""What the families share: the settings, the documented call, and the unit that searches for the noise.

A pipeline's own call runs its units (prompt, noise, ...), denoises and decodes. `install` gives the pipeline
a subclass whose call leaves a `Request`, and appends a unit that answers it: it searches for a better noise
and puts it in place. So the prompt is encoded once, and the final image comes from the stock code; the
search's cheap previews go through the pipeline's own functions too. Imports no diffsynth.
"""

import copy
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cpu import fast_linears
from ..errors import warn
from ..evolution import EvolutionConfig, SearchState, check_base, check_noise, whole_number
from ..loop import HeldOut, SearchResult, check_options, check_state, evolve


@dataclass(frozen=True)
class SESConfig:
    """What the documented arguments do not say about a search. Raises ValueError for what cannot be.

    popsize, k_elites, wavelet_name: as in `evolve`.
    dwt_level: a number, or "auto": 4 from 1024 pixels on the shorter side, one less with each halving,
        never below 1; with `state` the state's.
    batch_size: how many previews are denoised together; they change by rounding only. Where the call's inputs
        allow no batch they go one by one, with a warning. "auto": on a GPU what fits in its free memory, halved
        if that runs out; on a CPU up to a million pixels. With "auto", and under VRAM management, scoring,
        on_preview and time_limit come once a generation.
    include_base: the seed's own noise is the first candidate: the answer is never worse than it.
    seed: the search's; None: the call's `seed`. Where that is None too, one is drawn and used for both.
    generator: a CPU torch.Generator to draw from instead, as in `evolve`.
    progress, time_limit, on_generation, backend: as in `evolve`; the time to compile counts too.
    on_preview: called as on_preview(images, scores, generation, first) with each batch: images (n, 3, H, W)
        in [-1, 1], the scores as the reward gave them, the first one's number within its generation.
    state: `pipe.ses_result.state`, or a saved one, to go on from in the same call; ses_eval_budget is then
        the total. Without the call's seed its base noise is the state's own.
    latents: `pipe.ses_result.latents`, or others of that shape, to render in full (with more steps, another
        LoRA) without a search; then `pipe.ses_result` is None.
    report_rewards: rewards that take no part in the search, by name (or a dict of names to loaded ones). Each
        scores two previews, made again after the search: the base's and the answer's, into result.held_out.
        An answer that its own reward likes and the others do not has been searched too hard.
    """

    popsize: int = 10
    k_elites: int = 5
    wavelet_name: str = "db1"
    dwt_level: int | str = "auto"
    batch_size: int | str = 1
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

    def __post_init__(self) -> None:
        if isinstance(self.dwt_level, str) and self.dwt_level != "auto":
            raise ValueError(f'dwt_level must be a whole number or "auto", got {self.dwt_level!r}')
        self.evolution(1024, 1024)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'batch_size must be a whole number or "auto", got {self.batch_size!r}')
        if not isinstance(self.batch_size, str):
            object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, 1))
        check_noise(self.seed, self.generator)
        for name in ("include_base", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_options(on_generation=self.on_generation, on_preview=self.on_preview, time_limit=self.time_limit)
        if self.state is not None:
            check_state(self.state, self.evolution(1024, 1024), self.seed, self.generator, self.include_base)
        if self.latents is not None:
            check_base(self.latents)
            if self.state is not None:
                raise ValueError("give latents= to render them or state= to go on with a search, not both")
            if self.report_rewards:
                raise ValueError("report_rewards judge what a search found: leave it out with latents=")
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
        if isinstance(level, str) and isinstance(self.state, SearchState):
            level = self.state.config.dwt_level
        if isinstance(level, str):
            level = min(4, max(1, (min(height, width) // 64).bit_length() - 1))
        return EvolutionConfig(self.popsize, self.k_elites, self.wavelet_name, level)


PER_CALL_LORAS = ("lora", "positive_only_lora", "negative_lora")  # arguments of the call
ONE_SIDED_LORAS = ("positive_only_lora", "negative_only_lora")  # what the units make of them
# What `enable` takes for compile -> torch.compile's mode. CUDA graphs would hold one graph's memory per shape.
COMPILE_MODES: dict[bool | str, str] = {
    True: "default",
    "default": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
# A block has a graph for every image size and number of candidates, and each of these again for every state that VRAM
# management and hot-loaded LoRAs give it. Past dynamo's recompile_limit, 8, it would run uncompiled. At 256 there is
# dynamo's accumulated_recompile_limit: more would be of no use.
MOST_GRAPHS = 256


@dataclass
class Request:
    """One call with enable_ses=True, on its way to the unit."""

    config: SESConfig
    reward: Callable[[Tensor, str], Any]
    budget: int
    steps: int
    seed: int | None  # of the search
    held_out: dict[str, Callable[[Tensor, str], Any]] = field(default_factory=dict)
    from_state: bool = False  # the base is the state's: the call has no seed that makes it
    final_steps: int = 0  # what the call gave scheduler.set_timesteps
    scheduler: Any = None  # the previews': the same in their own number of steps
    input_latents: Tensor | None = None  # what it gave scheduler.add_noise; FLUX.1 hands it to no later unit
    begin: float = 0.0
    found: float = 0.0  # when the search had ended
    compiling: float = 0.0  # seconds so far

    def clock(self, device: torch.device | str) -> float:
        """Seconds, when the device has done what it was given; it stands still while dynamo compiles."""
        return _clock(device) - self.compiling


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
        ses_inference_steps: the steps of a preview. With as many as num_inference_steps the final image equals
            the best preview; more only cost time, and give a warning.
        ses_config: everything else. Without enable_ses=True these four do nothing.

        Afterwards `pipe.ses_result` is the SearchResult, with seconds for prompt, ask, denoise, decode,
        reward, tell, final, held_out where asked for, and compile (counted in no other stage). An exception
        leaves as it came; `pipe.ses_result` is then what was found before it. Raises ValueError for bad input
        before any work.
        """
        if not isinstance(enable_ses, bool):
            raise ValueError(f"enable_ses must be True or False, got {enable_ses!r}")
        call = super().__call__  # type: ignore[misc]
        if not enable_ses:
            return call(*args, **kwargs)

        self.ses_result = None  # an earlier call's is not this one's
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
        if config.latents is not None and given.get("initial_noise") is not None:
            raise ValueError("give initial_noise= or SESConfig(latents=), not both")
        budget = whole_number("ses_eval_budget", ses_eval_budget, 1)
        steps = whole_number("ses_inference_steps", ses_inference_steps, 1)
        unit = self.units[-1] if self.units else None
        if not isinstance(unit, SESUnit):
            raise ValueError("the unit that searches is not the last of pipe.units: call ses_fast.enable(pipe) again")
        unit.check(self, given)
        seed, search_seed = _seeds(given.get("seed"), config)
        if isinstance(ses_reward_model, str | Mapping) and config.latents is None:
            from ..rewards import load_reward

            ses_reward_model = load_reward(ses_reward_model, device=self.device)
        if config.latents is None and getattr(ses_reward_model, "whole_generations", False):
            _start_weighing(ses_reward_model, config, budget)

        if "seed" in bound.arguments:
            bound.arguments["seed"] = seed
            args, kwargs = bound.args, bound.kwargs
        else:
            kwargs["seed"] = seed
        from_state = config.state is not None and given.get("seed") is None and given.get("initial_noise") is None
        request = Request(config, ses_reward_model, budget, steps, search_seed, from_state=from_state)
        request.held_out = _held_out(config.report_rewards, self.device)
        request.begin = request.clock(self.device)
        try:
            with unit.asked(request), _noted(self.scheduler, request), _compile_clock(request):
                image = call(*args, **kwargs)
        except BaseException:
            self.load_models_to_device([])  # what a failed preview left there
            if any(given.get(name) is not None for name in PER_CALL_LORAS):
                self.clear_lora(verbose=0)  # a forward that fails leaves it in the model
            raise
        if self.ses_result is None:  # given latents
            return image
        now, seconds = request.clock(self.device), self.ses_result.seconds
        seconds |= {"final": now - request.found, "compile": request.compiling}
        seconds["total"] = now - request.begin + request.compiling
        return image


class SESUnit:
    """The last unit of an enabled pipeline. A family's class is `class Family(SESUnit, PipelineUnit)`.

    Without a request it does nothing: training runs the pipeline's units too.
    """

    decoder = "vae_decoder"  # the pipeline's attribute
    model_fn: Callable[..., Tensor]  # the stock `pipe.model_fn`
    takes: frozenset[str]  # its inputs
    together: frozenset[str]  # those that may be given where several candidates go at once
    text: tuple[str, ...] = ()  # those of `together` that CFG's two sides can share a batch by: [1, ...] each
    refused: dict[str, str] = {}  # arguments of the call that SES cannot go with, and why
    # What of a compiled block's inputs (by name) grows with the prompt: each tensor (None where it is not given) with
    # the dimension that grows. None for all: every prompt is padded to one length.
    grows_with_prompt: Callable[[Mapping[str, Any]], Sequence[tuple[Tensor | None, int]]] | None = None
    request: Request | None = None

    def __init__(self) -> None:
        super().__init__(  # type: ignore[call-arg]
            take_over=True,
            input_params=("height", "width", "cfg_scale", "noise", "latents", "input_latents"),
            input_params_posi={"prompt": "prompt"},
            output_params=("noise", "latents"),
        )

    # ---- a family's own

    def forward_together(self, *args: Any, **inputs: Any) -> Tensor:
        """Predicts for n candidates as `latents` what `pipe.model_fn` does for each alone."""
        raise NotImplementedError

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, C, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        """The decoder's output, as the pipeline's own call decodes."""
        raise NotImplementedError

    def unpack(
        self,
        noise: Tensor,  # [1, ...] as the pipeline has it
        shared: dict[str, Any],
    ) -> Tensor:  # [1, C, h, w], to search in
        return noise

    def pack(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Tensor:  # [n, ...] as the pipeline has them
        return noises

    def for_previews(self, shared: dict[str, Any]) -> dict[str, Any]:
        """The call's inputs, without what only the final image may have."""
        return shared

    # ---- what all share

    def check(self, pipe: Any, given: dict[str, Any]) -> None:
        """Raises ValueError for what a call with SES cannot have, before any work."""
        for name, why in self.refused.items():
            if given.get(name) is not None:
                raise ValueError(f"SES cannot go with {name}=: {why}")
        if {"set_timesteps", "add_noise"} & vars(pipe.scheduler).keys():
            raise ValueError(
                "SES needs the scheduler's own set_timesteps and add_noise: replace them in a subclass, "
                "not on pipe.scheduler itself"
            )
        hot = getattr(pipe.dit, "vram_management_enabled", False) or getattr(pipe.dit, "quantize_config", None)
        for name in PER_CALL_LORAS:
            if given.get(name) is None:
                continue
            if not hot:
                raise ValueError(
                    f"with SES, {name}= needs pipe.dit = pipe.enable_lora_hot_loading(pipe.dit) first: otherwise "
                    "DiffSynth adds the LoRA to the weights again in every step of every preview"
                )
            if any(getattr(module, "lora_A_weights", None) for module in pipe.dit.modules()):
                raise ValueError(
                    f"with SES, {name}= cannot go with a LoRA that is loaded already: DiffSynth clears both after the "
                    "first forward. Call pipe.clear_lora(), or load both and leave the argument out"
                )

    def model_fn_together(self, pipe: Any, inputs: dict[str, Any]) -> Callable[..., Tensor] | None:
        """`forward_together`; None where model_fn is wrapped or takes an input that is made for one image."""
        given = {name for name in self.takes if inputs.get(name) is not None and inputs[name] is not False}
        stock = pipe.model_fn is self.model_fn
        return self.forward_together if stock and given <= self.together else None

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
            vars(pipe.scheduler).pop("add_noise", None)  # noted, if it was called at all
            base = self.unpack(inputs_shared["noise"], inputs_shared)
            if request.config.latents is not None:
                best = _given_noise(request.config.latents, base)
            else:
                previews = Previews(self, pipe, request, inputs_shared, inputs_posi, inputs_nega)
                schedule = dict(vars(pipe.scheduler))
                try:
                    best = _search(pipe, request, base, inputs_shared, previews)
                finally:  # a callback may have called the pipeline
                    vars(pipe.scheduler).clear()
                    vars(pipe.scheduler).update(schedule)
            noise = self.pack(best)
            inputs_shared |= {
                "noise": noise,
                "latents": _first_latents(pipe.scheduler, noise, request.input_latents),
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
        # A ControlNet's start and end are shares of the steps.
        self.shared = unit.for_previews(shared) | {"num_inference_steps": request.steps}
        self.posi, self.nega = posi, nega
        self.seconds = dict.fromkeys(("denoise", "decode", "reward"), 0.0)
        self.done = request.config.state.evaluations if request.config.state is not None else 0

        final = request.final_steps
        if request.steps > final:
            warn(
                f"ses_inference_steps={request.steps} makes a preview dearer than the final image with its "
                f"{final} steps: ses_inference_steps={final} is enough",
            )
        self.scheduler = request.scheduler

        self.whole_generations = getattr(request.reward, "whole_generations", False)  # `evolve` looks for it
        config = request.config
        given = [part.items() for part in (self.shared, posi, nega)]
        inputs = {name: value for items in given for name, value in items if value is not None}
        self.model_fn = unit.model_fn_together(pipe, inputs)
        self.compiled = _compilation(pipe) is not None
        self.both = None if self.model_fn is None else self.both_sides()
        self.automatic = config.batch_size == "auto"
        n = _first_batch_size(config, pipe.device, shared["height"], shared["width"])
        alone = 1 if self.model_fn is None else n
        # How many go together; None where one alone is to show what fits. Tiles are for want of memory.
        self.together: dict[str, int | None] = {"denoise": alone, "decode": 1 if shared.get("tiled") else n}
        if alone != n:
            warn(
                "the call's inputs or the pipeline's model_fn allow no batch: previews go one by one",
            )

    def both_sides(self) -> dict[str, Tensor] | None:
        """What the model takes of the prompt and of the negative one, joined: [2, ...]. None where they go apart."""
        if not self.unit.text or self.shared["cfg_scale"] == 1 or any(map(self.shared.get, ONE_SIDED_LORAS)):
            return None
        if self.compiled and self.unit.grows_with_prompt is not None:
            return None  # a prompt as long as the negative one would be compiled for twice as many rows
        if getattr(self.pipe.cfg_guided_model_fn, "__qualname__", "") != "BasePipeline.cfg_guided_model_fn":
            return None  # the user's own: it may guide otherwise
        both = {}
        for name in self.unit.takes & self.posi.keys() & self.nega.keys():
            a, b = self.posi[name], self.nega[name]
            if a is None or b is None:
                if a is b:
                    continue
                return None
            if a.shape != b.shape or a.dtype != b.dtype or (name not in self.unit.text and not torch.equal(a, b)):
                return None
            both[name] = torch.cat([a, b]) if name in self.unit.text else a
        return both

    @property
    def members(self) -> Any:
        """The raw scores behind the last ones, where the reward weighs several; `evolve` looks for it."""
        return getattr(self.request.reward, "members", None)

    def __call__(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Any:
        """n scores, as the reward gave them."""
        lap = _Laps(self.seconds, lambda: self.request.clock(self.pipe.device))
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
        latents = self.in_batches("denoise", self.denoise, noises)
        lap("denoise")
        pipe.load_models_to_device([self.unit.decoder])
        images = self.in_batches("decode", lambda part: self.unit.decode(pipe, part, self.shared), latents)
        lap("decode")
        return images.clamp(-1, 1)  # a decoder leaves the range

    def held_out(
        self,
        base: Tensor,  # [1, C, h, w]
        answer: Tensor,  # [1, C, h, w]
    ) -> dict[str, HeldOut]:
        """What each reward of the request that took no part in the search says of both."""
        self.together["denoise"] = 1  # as the final image: where blocks are compiled two would be filled up
        images = self.images(torch.cat([base, answer]), lambda stage: None)
        found = {}
        for name, reward in self.request.held_out.items():
            scores = torch.as_tensor(reward(images, self.posi["prompt"]))
            if scores.shape != (2,):
                raise ValueError(f"held-out reward {name!r} gave scores of shape {tuple(scores.shape)} for 2 images")
            if not scores.isfinite().all():
                warn(f"the held-out reward {name!r} gave a score that is not finite")
            found[name] = HeldOut(*scores.tolist())
        return found

    def in_batches(
        self,
        stage: str,
        run: Callable[[Tensor], Tensor],
        inputs: Tensor,  # [n, ...]
    ) -> Tensor:  # [n, ...]
        """`run` on all of them, as many at once as the stage may have; with "auto" fewer when memory runs out.

        CFG's two sides then no longer share a batch, whoever chose its size.
        """
        done: list[Tensor] = []
        device = self.pipe.device
        while len(inputs):
            n = min(self.together[stage] or 1, len(inputs))
            to_be_measured = self.together[stage] is None
            if to_be_measured:
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            try:
                # One alone goes the final image's way, to be equal bit for bit.
                with fast_linears(self.pipe, when=n > 1 and not _on_gpu(device)):
                    part = run(inputs[:n])
            except torch.OutOfMemoryError:
                shared = stage == "denoise" and n > 1 and self.both is not None
                if not shared and (not self.automatic or n == 1):
                    raise
                part = None
            if part is None:  # outside of the except, whose traceback holds the tensors that were too many
                if shared:
                    self.both = None
                else:
                    self.together[stage] = (self.rows(n) if stage == "denoise" else n) // 2
                if _on_gpu(device):
                    torch.cuda.empty_cache()
                continue
            if to_be_measured:
                one = max(1, torch.cuda.max_memory_allocated(device) - held)
                self.together[stage] = min(self.request.config.popsize, max(1, int(0.8 * _free_memory(device)) // one))
            done.append(part)
            inputs = inputs[n:]
        return torch.cat(done)

    def rows(self, n: int) -> int:
        """How many are denoised for n previews: a short batch would be compiled for itself, so it is filled up."""
        if not self.compiled or n == 1:
            return n
        return max(n, min(self.together["denoise"] or 1, self.request.config.popsize, self.request.budget))

    def denoise(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Tensor:  # [n, C, h, w]
        """What the pipeline's own call does between its units and its decoder."""
        pipe, n = self.pipe, len(noises)
        if (more := self.rows(n) - n) > 0:
            noises = torch.cat([noises, noises[-1:].expand(more, *noises.shape[1:])])
        inputs = {**self.shared, "noise": self.unit.pack(noises)}
        inputs["latents"] = _first_latents(self.scheduler, inputs["noise"], self.request.input_latents)
        for step, timestep in enumerate(self.scheduler.timesteps):
            timestep = timestep[None].to(pipe.device, pipe.torch_dtype)
            predicted = self.predict(inputs, timestep=timestep, progress_id=step)
            inputs["latents"] = pipe.step(self.scheduler, progress_id=step, noise_pred=predicted, **inputs)
        return inputs["latents"][:n]

    def predict(self, inputs: dict[str, Any], **others: Any) -> Tensor:
        """The velocity of all of inputs["latents"], with CFG."""
        pipe, latents, scale = self.pipe, inputs["latents"], inputs["cfg_scale"]
        others |= {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        # One alone goes the final image's way, to be equal bit for bit.
        if len(latents) == 1 or self.both is None:
            model_fn = pipe.model_fn if len(latents) == 1 else self.model_fn
            try:
                return pipe.cfg_guided_model_fn(model_fn, scale, inputs, self.posi, self.nega, **others)
            except torch.OutOfMemoryError:  # to be tried again: without what this forward left in the model
                if any(inputs.get(lora) is not None for lora in ONE_SIDED_LORAS):
                    pipe.clear_lora(verbose=0)
                raise
        assert self.model_fn is not None
        twice = {**self.posi, **inputs, **self.both, **others, "latents": torch.cat([latents, latents])}
        posi, nega = self.model_fn(**twice).chunk(2)
        return nega + scale * (posi - nega)


def install(pipe: Any, family: type[SESUnit]) -> None:
    """Puts `SESPipeline` before the class of `pipe`, and one `family()` last in its units."""
    if not isinstance(pipe, SESPipeline):
        stock = type(pipe)
        names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
        pipe.__class__ = type(
            stock.__name__,
            (SESPipeline, stock),
            names | {"_ses_stock": stock, "__call__": _documented(stock.__call__)},
        )
    ours = [unit for unit in pipe.units if isinstance(unit, SESUnit)] or [family()]
    pipe.units[:] = [unit for unit in pipe.units if unit not in ours] + ours[:1]


def remove(pipe: Any) -> None:
    """Undoes `install` and `compile_blocks`, and forgets the last result."""
    pipe.__class__ = pipe._ses_stock
    _undo_compilation(pipe)
    pipe.units[:] = [unit for unit in pipe.units if not isinstance(unit, SESUnit)]
    vars(pipe).pop("ses_result", None)


def compile_mode(compile: bool | str) -> str | None:
    """What torch.compile calls it; None for no compilation. Raises ValueError for what is none of `COMPILE_MODES`."""
    if compile is False:
        return None
    if isinstance(compile, bool | str) and compile in COMPILE_MODES:
        return COMPILE_MODES[compile]
    modes = ", ".join(map(repr, [False, *COMPILE_MODES]))
    raise ValueError(f"compile must be one of {modes}; got {compile!r}")


def compile_blocks(pipe: Any, family: type[SESUnit], mode: str) -> None:
    """Compiles the repeated blocks of the pipeline's models in place, as `pipe.compile_pipeline()` does.

    Shapes are static but for the prompt's length: another size, and another number of previews together (with CFG it
    may be twice as many), is compiled anew, another prompt is not. Z-Image's blocks get image and prompt as one
    sequence: there a size is not either. Does nothing where it was done; another mode, or a model that was replaced,
    is compiled anew. Raises ValueError where there is nothing to compile.
    """
    models = [getattr(pipe, name, None) for name in getattr(pipe, "compilable_models", ())]
    done = _compilation(pipe)
    if done is not None and done.mode == mode and all(a is b for a, b in zip(done.models, models, strict=True)):
        return
    _undo_compilation(pipe)
    before = [(module, module._compiled_call_impl) for module in pipe.modules()]
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    else:  # torch 2.11 has one for the whole process; it stays raised after `disable`
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    pipe.compile_pipeline(mode=mode, dynamic=False, **limit)
    changed = [(module, was) for module, was in before if module._compiled_call_impl is not was]
    if not changed:
        raise ValueError("the pipeline has no model to compile: load its dit first, or leave compile out")
    if family.grows_with_prompt is not None:
        for block, _ in changed:
            block._compiled_call_impl = _for_any_prompt(block, family.grows_with_prompt)
    pipe._ses_compiled = Compiled(mode, models, changed)


def _for_any_prompt(block: Any, grows_with_prompt: Callable) -> Callable[..., Any]:
    """What `block` was compiled to, with the prompt's length marked as one that changes."""
    compiled = block._compiled_call_impl
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor, dimension in grows_with_prompt({**dict(zip(names, args, strict=False)), **kwargs}):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        return compiled(*args, **kwargs)

    return call


@dataclass
class Compiled:
    """What `compile_blocks` did to a pipeline."""

    mode: str
    models: list[Any]
    changed: list[tuple[Any, Any]]  # each block, and what it was compiled to before


def _compilation(pipe: Any) -> Compiled | None:
    """What `compile_blocks` left, if it still holds: a copy of the pipeline has the note, but no compiled blocks."""
    done: Compiled | None = vars(pipe).get("_ses_compiled")
    return done if done and all(module._compiled_call_impl is not None for module, _ in done.changed) else None


def _undo_compilation(pipe: Any) -> None:
    done = _compilation(pipe)  # a copy's note is of the original's blocks
    vars(pipe).pop("_ses_compiled", None)
    for module, before in done.changed if done else ():
        module._compiled_call_impl = before


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
        for name, reward in rewards.items():
            if getattr(reward, "whole_generations", False) and reward.scale is None:
                raise ValueError(
                    f"the held-out reward {name!r} weighs several by a first generation that it never sees: "
                    "name each of them, or set its scale"
                )
        return dict(rewards)
    from ..rewards import load_reward

    return {name: load_reward(name, device=device) for name in rewards}


def _seeds(seed: int | None, config: SESConfig) -> tuple[int | None, int | None]:
    """The call's seed and the search's. One that is drawn serves both: result.seed gives the image again."""
    seed = check_noise(seed, None)
    if config.state is not None:  # without a seed the base is the state's, and any seed keeps torch's state as it is
        return 0 if seed is None else seed, config.seed
    if config.seed is not None or config.generator is not None:
        return seed, config.seed
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return seed, seed


def _search(
    pipe: Any,
    request: Request,
    base: Tensor,  # [1, C, h, w]
    shared: dict[str, Any],
    previews: Previews,
) -> Tensor:  # [1, C, h, w]
    """The best noise; leaves the result, a partial one too, at pipe.ses_result."""
    config = request.config
    if request.from_state:
        base = _given_noise(config.state.base, base)  # type: ignore[union-attr]
    evolution = config.evolution(shared["height"], shared["width"])
    prompt, compiled = request.clock(pipe.device) - request.begin, request.compiling
    try:
        pipe.ses_result = evolve(
            base,
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
            batch_size=config.batch_size
            if isinstance(config.batch_size, int) and not pipe.vram_management_enabled
            else evolution.popsize,
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
            # on_preview's; evolve's clock goes on while dynamo compiles
            seconds["other"] += seconds.pop("objective") - sum(previews.seconds.values())
            seconds["other"] -= request.compiling - compiled
            seconds.update(prompt=prompt, compile=request.compiling, **previews.seconds)
            seconds["total"] += prompt + compiled
    if request.held_out:
        found = request.clock(pipe.device)
        try:
            held_out = previews.held_out(base, pipe.ses_result.latents)
        except BaseException as error:
            object.__setattr__(error, "ses_result", pipe.ses_result)
            raise
        pipe.ses_result = replace(pipe.ses_result, held_out=held_out)
        seconds["held_out"] = request.clock(pipe.device) - found
    request.found = request.clock(pipe.device)
    return pipe.ses_result.latents


def _given_noise(
    given: Tensor,  # [1, C, h, w]
    base: Tensor,  # [1, C, h, w] of the call
) -> Tensor:  # [1, C, h, w] on the base's device
    if given.shape != base.shape or given.dtype != base.dtype:
        raise ValueError(
            f"the noise of this call is {base.dtype} of shape {tuple(base.shape)}, the given one "
            f"{given.dtype} of {tuple(given.shape)}: give the height, width and pipeline it was made for"
        )
    return given.to(base.device)


def _first_latents(
    scheduler: Any,
    noise: Tensor,  # [n, ...]
    input_latents: Tensor | None,  # [1, ...]
) -> Tensor:  # [n, ...]
    """Where the denoising begins: the noise, or the input image noised to the first timestep."""
    if input_latents is None:
        return noise
    return scheduler.add_noise(input_latents, noise, timestep=scheduler.timesteps[0])


@contextmanager
def _noted(scheduler: Any, request: Request) -> Iterator[None]:
    """Notes in `request` what the pipeline's call gives its scheduler, and makes the previews' of it.

    Previews need the same with other steps. It differs between families, and some of it (Z-Image's
    sigma_shift, FLUX.1's input image) reaches no later unit. The pipeline sets its timesteps once, first of
    all, and noises its input image once; then the scheduler is as it was.
    """

    def set_timesteps(num_inference_steps: int, **others: Any) -> None:
        del scheduler.set_timesteps
        request.final_steps, request.scheduler = num_inference_steps, copy.copy(scheduler)
        vars(request.scheduler).pop("add_noise", None)
        request.scheduler.set_timesteps(request.steps, **others)
        if request.config.latents is None and not request.scheduler.sigmas.isfinite().all():
            raise ValueError(f"this pipeline has no schedule of {request.steps} steps: give more ses_inference_steps")
        scheduler.set_timesteps(num_inference_steps, **others)

    def add_noise(original_samples: Tensor, *args: Any, **others: Any) -> Tensor:
        del scheduler.add_noise
        request.input_latents = original_samples
        return scheduler.add_noise(original_samples, *args, **others)

    scheduler.set_timesteps, scheduler.add_noise = set_timesteps, add_noise
    try:
        yield
    finally:
        for name in ("set_timesteps", "add_noise"):
            vars(scheduler).pop(name, None)


@contextmanager
def _compile_clock(request: Request) -> Iterator[None]:
    """Adds what dynamo's compilations take to `request.compiling`. Where dynamo is not loaded nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch._dynamo.callback import callback_handler

    begin = 0.0

    def start(args: Any) -> None:
        nonlocal begin
        begin = time.perf_counter()

    def end(args: Any) -> None:
        request.compiling += time.perf_counter() - begin

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


def _first_batch_size(config: SESConfig, device: torch.device | str, height: int, width: int) -> int | None:
    """How many previews of height x width pixels go together; None where one alone is to show what fits."""
    if isinstance(config.batch_size, int):
        return config.batch_size
    return None if _on_gpu(device) else min(config.popsize, max(1, 2**20 // (height * width)))


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _free_memory(device: torch.device | str) -> int:
    """Bytes that a CUDA device can still give, those that torch keeps for itself included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class _Laps:
    """Adds the time since the last lap to a stage."""

    def __init__(self, seconds: dict[str, float], clock: Callable[[], float]) -> None:
        self.seconds, self.clock = seconds, clock
        self.last = clock()

    def __call__(self, stage: str) -> None:
        now = self.clock()
        self.seconds[stage] += now - self.last
        self.last = now


def _clock(device: torch.device | str) -> float:
    """Seconds, when the device has done what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
