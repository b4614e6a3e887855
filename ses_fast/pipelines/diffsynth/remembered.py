"""What a pipeline's own call does again for every candidate, and need not: its units, and what it draws by chance."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


class RememberedUnits:
    """Runs the units of a call, in place of `pipe.unit_runner`. What does not depend on the noise is made once.

    Of a unit that names its inputs these decide: with the noise, what units made of it, or the number of steps among
    them it is run again. One that takes everything over is run again where the noise is already drawn, and one that
    draws by chance always. A copy of what was made is given to each call, for a model may write on it.
    """

    def __init__(self, runner: Callable[..., Any], state: "RandomState") -> None:
        self.runner, self.state = runner, state
        self.made: dict[tuple[int, int], tuple[Inputs, ...]] = {}  # (the unit's place in the call, its id) -> outputs
        self.shared: Inputs = {}  # of the last call
        self.begin()

    def begin(self) -> None:
        """A new call."""
        self.place = 0
        self.drawn = False
        self.depends = {"num_inference_steps"}  # the names of inputs that are not remembered

    def draw(self, noise: Tensor) -> Tensor:
        """The noise, for a call to write on."""
        self.drawn = True
        return noise.clone()

    def __call__(self, unit: Any, pipe: Any, shared: Inputs, posi: Inputs, nega: Inputs) -> tuple[Inputs, ...]:
        key = (self.place, id(unit))
        self.place += 1
        if key in self.made:
            for inputs, outputs in zip((shared, posi, nega), copy.deepcopy(self.made[key]), strict=True):
                inputs |= outputs
            self.shared = shared
            return shared, posi, nega
        before = [dict(inputs) for inputs in (shared, posi, nega)]
        drawn, chance = self.drawn, self.state.now()
        after = self.runner(unit, pipe, shared, posi, nega)
        made = tuple(map(_news, before, after))
        if unit.take_over:
            depends = drawn
        else:
            depends = not self.depends.isdisjoint(unit.fetch_input_params())
        if depends or self.drawn != drawn or not all(map(torch.equal, chance, self.state.now())):
            self.depends = self.depends.union(*made)
        else:
            self.made[key] = copy.deepcopy(made)
        self.shared = after[0]
        return after


def _news(before: Inputs, after: Inputs) -> Inputs:
    """What a unit added or replaced."""
    return {name: value for name, value in after.items() if name not in before or before[name] is not value}


class RandomState:
    """Where chance stood when a call began: torch's own generators, and those that the scheduler holds.

    A scheduler that adds noise in its steps draws the same for every candidate, and for the final image.
    """

    def __init__(self, pipe: Any) -> None:
        device = torch.device(pipe.device)
        self.devices = [device] if device.type == "cuda" else []
        self.own = [value for value in vars(pipe.scheduler).values() if isinstance(value, torch.Generator)]
        self.began = self.ended = self.now()

    def rewind(self) -> None:
        self._set(self.began)

    def go_on(self) -> None:
        """As after the last call that was replayed."""
        self._set(self.ended)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Everything inside is drawn from that state; afterwards chance stands where it stood before."""
        before = self.now()
        self.rewind()
        try:
            yield
        finally:
            self.ended = self.now()
            self._set(before)

    def now(self) -> list[Tensor]:
        return [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in self.devices),
            *(generator.get_state() for generator in self.own),
        ]

    def _set(self, states: list[Tensor]) -> None:
        cpu, *others = states
        torch.set_rng_state(cpu)
        for device, state in zip(self.devices, others, strict=False):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self.own, others[len(self.devices) :], strict=True):
            generator.set_state(state)
