"""What a call draws at random: the noise it begins with, the noise inside its steps, and the streams of both.

All of it comes from `torch.randn`, which a `TorchFunctionMode` sees, for the thread that is inside it alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Drawn(TorchFunctionMode):
    """Inside, what `torch.randn` draws is kept in `noises`."""

    def __init__(self) -> None:
        super().__init__()
        self.noises: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.noises.append(made)
        return made


class Given(TorchFunctionMode):
    """Inside, `torch.randn` gives the next rows of `noises`; zeros, where there are none."""

    def __init__(
        self,
        noises: Tensor | None,  # [n, ...]
    ) -> None:
        super().__init__()
        self.noises = noises

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = _shape(args, kwargs)
        if self.noises is None:
            return torch.zeros(shape, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        rows, self.noises = self.noises[: shape[0]], self.noises[shape[0] :]
        if rows.shape != shape:
            raise ValueError(f"the call draws noise of shape {tuple(shape)}, and {tuple(rows.shape)} was to be given")
        return rows


class OneForAll(TorchFunctionMode):
    """Inside, a noise for `n` candidates is drawn for one of them and is the same for all.

    So a candidate's own steps do not depend on its neighbours, and the stream goes on as with one candidate.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and (shape := _shape(args, kwargs))[0] == self.n:
            kwargs = {name: value for name, value in kwargs.items() if name != "size"}
            return torch.randn((1, *shape[1:]), **kwargs).expand(shape).contiguous()
        if func is torch.randn_like and len(args[0]) == self.n:
            return torch.randn_like(args[0][:1], *args[1:], **kwargs).expand(args[0].shape).contiguous()
        return func(*args, **kwargs)


class Streams:
    """The random streams that a call may draw from: its generator, and torch's own on CPU and on the device.

    Raises ValueError for a call without a generator on a device whose own stream torch does not show.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generators = [torch.default_generator]
        if device.type != "cpu":
            module = torch.get_device_module(device.type)
            if hasattr(module, "default_generators"):
                current = module.current_device()  # also makes them, the first time
                self.generators.append(module.default_generators[current if device.index is None else device.index])
            elif generator is None:
                raise ValueError(f"torch shows no random stream of {device.type}: give generator=torch.Generator()")
        self.first = generator or self.generators[-1]  # what the call's own noise is drawn from
        if generator is not None:
            self.generators.append(generator)

    def states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def put(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    @contextmanager
    def at(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the streams go on from `states`; afterwards they stand where they stood."""
        before = self.states()
        self.put(states)
        try:
            yield
        finally:
            self.put(before)

    def seed(self) -> int:
        """A number that the streams' states decide, and that costs them nothing."""
        with self.at(self.states()):
            device = self.first.device
            return int(torch.randint(2**63 - 1, (), generator=self.first, device=device))


def _shape(args: Any, kwargs: Any) -> torch.Size:
    size = kwargs.get("size", args)
    return torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
