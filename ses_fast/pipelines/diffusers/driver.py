"""A diffusers pipeline's own call, run with other noise, with some of its steps, or on given latents.

What is replaced lies in the pipeline's `vars` while the call runs, and is taken away after it, whatever ends it.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import COUNTS, REMEMBERED, Memory
from .noise import Drawn, Given, Streams
from .scheduler import Window, WindowedScheduler, window_on

# Arguments that only the final image's call gets.
FINAL_ALONE = ("callback_on_step_end", "callback", "callback_steps", "output_type", "return_dict")


@dataclass(frozen=True)
class Setting:
    """What a call does before its first step."""

    noise: Tensor  # [1, ...] as it draws it, before the scheduler scales it and the pipeline packs it
    height: int  # of the image, in pixels
    width: int
    steps: int  # of its schedule: a second-order scheduler has more than num_inference_steps
    levels: list[float] | None  # the noise level of each step, see `noise_levels`


class Driver:
    """One call of `pipe`, which runs many times.

    stock: the pipeline's own call. arguments: its own, by name. The noise inside the steps is for every candidate what
    the call's random streams give once they have drawn the call's own noise.
    """

    def __init__(self, pipe: Any, stock: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.pipe, self.stock = pipe, stock
        self.arguments = {name: value for name, value in arguments.items() if name != "latents"}
        self.count = next((name for name in COUNTS if name in inspect.signature(stock).parameters), None)
        self.generator = one_generator(arguments.get("generator"))
        self.streams = Streams(self.generator, torch.device(pipe._execution_device))
        self.before = self.streams.states()
        self.memories = {name: Memory(getattr(pipe, name)) for name in REMEMBERED if hasattr(pipe, name)}
        self.tiled: dict[int, dict[str, Any]] = {}
        given = arguments.get("latents")
        self.setting, self.after_base = self.set_up(given is None)
        self.base = self.setting.noise if given is None else self._as_drawn(given)

    def set_up(self, draws: bool = True, **others: Any) -> tuple[Setting, list[Tensor]]:
        """What the call does before its first step, with some other arguments; and the streams' states then.

        draws: False for a call that is given its noise. Raises ValueError for a call that draws it in no way known.
        """
        drawn = Drawn()
        prepares, window = self._set_up(drawn, others)
        name = type(self.pipe).__name__
        if prepares.times != 1 or len(drawn.noises) != 1 or len(drawn.noises[0]) != 1:
            raise ValueError(f"SES searches the one noise that prepare_latents draws, and {name}'s draws it otherwise")
        if window.all_steps == 0:
            raise ValueError(f"{name}'s call sets no timesteps of its scheduler, so SES cannot make its previews")
        setting = Setting(drawn.noises[0].to(prepares.made.device), *prepares.size, window.all_steps, window.levels)
        return setting, prepares.states if draws else self.before

    def _set_up(self, mode: Drawn | Given, others: Mapping[str, Any]) -> tuple["Prepares", Window]:
        window = window_on(self.pipe.scheduler, 0, 0)
        prepares = Prepares(self.pipe.prepare_latents, mode, self.streams)
        with self.streams.at(self.before):
            self._run(prepares, window, self._arguments(1, others))
        return prepares, window

    def _as_drawn(self, latents: Tensor) -> Tensor:
        """The call's own `latents=`, which may be packed, as the pipeline draws them."""
        noise = self.setting.noise
        if latents.shape != noise.shape:  # packing puts the numbers in another order: here it is
            places = torch.arange(noise.numel(), dtype=torch.float64, device=noise.device).view(noise.shape)
            order = self._set_up(Given(places), {})[0].made
            if latents.shape != order.shape or not torch.equal(order.flatten().sort().values, places.flatten()):
                raise ValueError(
                    f"latents= has shape {tuple(latents.shape)}; this call's noise has {tuple(noise.shape)}, "
                    f"or {tuple(order.shape)} as the pipeline packs it"
                )
            flat = torch.empty_like(latents.flatten())
            flat[order.flatten().long().to(flat.device)] = latents.flatten()
            latents = flat.view(noise.shape)
        return latents.to(noise)

    def steps(
        self,
        n: int,
        window: Window,
        *,
        noises: Tensor | None = None,  # [n, ...] as the call draws them
        latents: Tensor | None = None,  # [n, ...] as its loop has them, in the place of noises
        **others: Any,
    ) -> Any:
        """Runs the window's steps for n candidates, and returns the first of what the call does."""
        prepares = Prepares(self.pipe.prepare_latents, Given(noises), self.streams, latents)
        return self._run(prepares, window, self._arguments(n, others))[0]

    def final(
        self,
        noise: Tensor,  # [1, ...] as the call draws it
        finished: Tensor | None = None,  # [1, ...]: its latents after all steps, where they are known
    ) -> Any:
        """The stock call with `noise` in the place of its own. The streams stand as they would after it."""
        pipe = self.pipe
        prepares = Prepares(pipe.prepare_latents, Given(noise), self.streams, finished)
        parts = {"prepare_latents": prepares, **self.memories}
        if finished is not None:
            parts["scheduler"] = WindowedScheduler(window_on(pipe.scheduler, 0, 0))
        self.streams.put(self.after_base)
        with _replaced(pipe, parts):
            return self.stock(**self.arguments)

    def stock_image(self) -> Any:
        """What the call returns without a search; the streams stay where they are."""
        with self.streams.at(self.before):
            return self.final(self.base)

    @property
    def has_callback(self) -> bool:
        """Whether the final image's steps are watched."""
        return any(self.arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))

    def _run(self, prepares: "Prepares", window: Window, arguments: Mapping[str, Any]) -> Any:
        pipe = self.pipe
        parts = {
            "prepare_latents": prepares,
            "scheduler": WindowedScheduler(window),
            "maybe_free_model_hooks": functools.partial(_reset_caches, pipe),
            "_progress_bar_config": {"disable": True},
            **self.memories,
        }
        with _replaced(pipe, parts), _silent(pipe):  # the final image's call says it once
            return self.stock(**arguments)

    def _arguments(self, n: int, others: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in self.arguments.items() if name not in FINAL_ALONE}
        own |= {"output_type": "latent", "return_dict": False, "generator": self.generator}
        if n > 1:
            if n not in self.tiled:  # the same objects every time: the memories know them by identity
                self.tiled[n] = _tiled(own, n)
            own |= self.tiled[n] or {str(self.count): n}
        return own | dict(others)


class Prepares:
    """Stands for `prepare_latents` during one call.

    mode: what its noise is. latents: what the loop begins with in the place of what is prepared. Afterwards `made` is
    what it prepared, `size` the image's height and width, `states` the streams' once the noise was drawn.
    """

    def __init__(
        self, method: Callable[..., Any], mode: Drawn | Given, streams: Streams, latents: Tensor | None = None
    ) -> None:
        self.method, self.mode, self.streams, self.latents = method, mode, streams, latents
        self.times = 0
        self.made: Tensor
        self.states: list[Tensor]
        self.size = (0, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            made = self.method(*args, **kwargs)
        self.times, self.states = self.times + 1, self.streams.states()
        given = inspect.signature(self.method).bind(*args, **kwargs).arguments
        self.size = (int(given["height"]), int(given["width"]))
        self.made = made[0] if isinstance(made, tuple) else made
        if self.latents is None:
            return made
        return (self.latents, *made[1:]) if isinstance(made, tuple) else self.latents


def _tiled(arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The prompt's embeddings and masks, and what else says it, for n images. Empty where no embeddings are given.

    With embeddings some families do not repeat the masks and pooled ones themselves.
    """
    texts = {name: value for name, value in arguments.items() if "prompt" in name and value is not None}
    if not any(isinstance(value, Tensor) or is_tensors(value) for value in texts.values()):
        return {}
    tiled: dict[str, Any] = {}
    for name, value in texts.items():
        if isinstance(value, Tensor):
            tiled[name] = value.repeat(n, *[1] * (value.ndim - 1))
        elif is_tensors(value):
            tiled[name] = [*value] * n
        elif isinstance(value, str):
            tiled[name] = [value] * n
    return tiled


def is_tensors(value: Any) -> bool:
    """Whether it is a list of tensors, as some pipelines take a prompt's embeddings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def one_generator(generator: Any) -> torch.Generator | None:
    """A call's `generator=`, which may be a list of one."""
    return generator[0] if isinstance(generator, list) else generator


@contextmanager
def _replaced(pipe: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the pipeline's attributes are these. Its `__setattr__` would write some of them into its config."""
    attributes = vars(pipe)
    before = {name: attributes[name] for name in parts if name in attributes}
    attributes.update(parts)
    try:
        yield
    finally:
        for name in parts:
            attributes.pop(name, None)
        attributes.update(before)


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline's module logs nothing."""
    modules = {cls.__module__ for cls in type(pipe).__mro__}
    loggers = [logging.getLogger(name) for name in modules if name.startswith("diffusers.pipelines.")]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _reset_caches(pipe: Any) -> None:
    """What `maybe_free_model_hooks` does beside taking the models off the device, which a search does at its end."""
    for component in pipe.components.values():
        if hasattr(component, "_reset_stateful_cache"):
            component._reset_stateful_cache()
