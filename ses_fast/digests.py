"""Short digests of tensors, weights and other values, by which two processes or two days can be compared."""

import ctypes
import functools
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

SAMPLES = 16  # numbers of a parameter or buffer that are looked at
DEPTH = 6  # how far within another value a model is looked for
PLAIN = (str, bytes, int, float, complex, Tensor, type, ModuleType, type(None))  # no model is within


def digest(*parts: Any) -> str:
    """Of bytes as they are, of anything else by its repr."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else repr(part).encode())
    return f"sha256:{sha.hexdigest()[:16]}"


def digest_of_tensor(tensor: Tensor) -> str:
    """Of every bit, and of dtype and shape."""
    return digest(tensor.dtype, tuple(tensor.shape), _bytes(tensor))


def digest_of_weights(model: nn.Module) -> str:
    """Of the names, shapes and a few numbers of each parameter and buffer: cheap, and another one for other weights.

    What holds no plain numbers here (offloaded, quantised) counts by its name and shape. Waits for the device.
    """
    parts: list[Any] = []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        parts += [name, tuple(tensor.shape)]
        if type(tensor.data) is Tensor and tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            parts.append(_bytes(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]))
    return digest(*parts)


def digests_of_weights(**values: Any) -> dict[str, str]:
    """ "weights of NAME.PLACE" -> the digest of each model within the values: pipelines, rewards, functions of them.

    A model is looked for in attributes, lists and dicts, in what a function has bound, and among the globals that it
    names. One that is loaded when it is first called is not there before.
    """
    models = chain.from_iterable(_models(name, value) for name, value in values.items())
    return {f"weights of {place}": digest_of_weights(model) for place, model in models}


def _models(name: str, value: Any) -> Iterator[tuple[str, nn.Module]]:
    """(where it is, the model), each once, the nearest first."""
    seen: dict[int, Any] = {}  # by id; held, so that no other value gets the id
    level = [(name, value)]
    for _ in range(DEPTH):
        below: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, PLAIN) or id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, nn.Module):
                yield place, value
            else:
                below += [(f"{place}.{name}", part) for name, part in _parts(value).items()]
        level = below


def _parts(value: Any) -> dict[Any, Any]:
    """What a value is made of, by name."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, functools.partial):
        return {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    if inspect.ismethod(value):
        return {"__self__": value.__self__, "__func__": value.__func__}
    if isinstance(value, FunctionType):
        return _bound(value)
    return getattr(value, "__dict__", {})


def _bound(function: FunctionType) -> dict[Any, Any]:
    """What a function has of the scope that it was made in, and the globals that it names.

    Without the functions among the globals: these lead to what each process has loaded so far, of other things too.
    """
    code, everything = function.__code__, function.__globals__
    parts: dict[Any, Any] = {name: everything[name] for name in code.co_names if name in everything}
    parts = {name: value for name, value in parts.items() if not inspect.isroutine(value)}
    cells: tuple[CellType, ...] = function.__closure__ or ()
    for name, cell in zip(code.co_freevars, cells, strict=True):
        with suppress(ValueError):  # a cell may not be filled yet
            parts[name] = cell.cell_contents
    return parts | dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})


def _bytes(tensor: Tensor) -> bytes:
    """Its numbers in memory's order, without NumPy, which the core does not need."""
    on_host = tensor.detach().to("cpu").contiguous()
    return ctypes.string_at(on_host.data_ptr(), on_host.nbytes) if on_host.numel() else b""
