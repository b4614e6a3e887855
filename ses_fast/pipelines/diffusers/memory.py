"""What a pipeline makes of a prompt, made once for all images of a search."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The pipelines' methods that are answered from memory, and what they call the number of images.
REMEMBERED = ("encode_prompt", "prepare_ip_adapter_image_embeds")
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")


class Memory:
    """Answers of one method of a pipeline: the first time it is asked, then from memory, for any number of images.

    A method repeats what it made for one image, in an order and for a part of its outputs that are its own. So it is
    asked for two images, once, before the answer for one is repeated as it does itself.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.signature = method, inspect.signature(method)
        self.count = next((name for name in COUNTS if name in self.signature.parameters), None)
        self.answers: dict[Any, Any] = {}
        self.asked: list[Any] = []  # keeps the arguments alive, whose ids are keys

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        n = 1 if self.count is None else int(bound.arguments.pop(self.count))
        key = tuple((name, _key(value)) for name, value in bound.arguments.items())
        if (key, n) not in self.answers:
            self.asked.append(bound)
            self.answers[key, n] = self._asked(bound, key, n)
        return _copy(self.answers[key, n])

    def _asked(self, bound: inspect.BoundArguments, key: Any, n: int) -> Any:
        if n > 1:
            for each in (1, 2):
                if (key, each) not in self.answers:
                    self.answers[key, each] = self._of_the_method(bound, each)
            one, two = self.answers[key, 1], self.answers[key, 2]
            if _equal(_repeated(one, two, 2), two):
                return _repeated(one, two, n)
        return self._of_the_method(bound, n)

    def _of_the_method(self, bound: inspect.BoundArguments, n: int) -> Any:
        count = {} if self.count is None else {self.count: n}
        arguments = {name: {**bound.arguments, **count}[name] for name in self.signature.parameters}
        given = inspect.BoundArguments(self.signature, arguments)
        return self.method(*given.args, **given.kwargs)


def _key(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float | torch.device | torch.dtype):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return id(value)


def _repeated(one: Any, two: Any, n: int) -> Any:
    """The answer for `n` images, of those for one and for two."""
    if isinstance(one, list | tuple):
        if len(two) == 2 * len(one) > 0:
            return type(one)(each for each in one for _ in range(n))
        return type(one)(_repeated(a, b, n) for a, b in zip(one, two, strict=False))
    if isinstance(one, Tensor) and one.ndim and two.shape == (2 * len(one), *one.shape[1:]):
        return one.repeat_interleave(n, dim=0)
    return one


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _copy(answer: Any) -> Any:
    """The same tensors in lists of their own, which a pipeline may change."""
    return type(answer)(map(_copy, answer)) if isinstance(answer, list | tuple) else answer
