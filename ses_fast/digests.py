"""Short digests of tensors, weights and other values, by which two processes or two days can be compared."""

import ctypes
import hashlib
from typing import Any

from torch import Tensor, nn

SAMPLES = 16  # numbers of a parameter that are looked at


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
    """Of the names, shapes and a few numbers of each parameter: cheap, and another one for other weights.

    What holds no plain numbers here (offloaded, quantised) counts by its name and shape. Waits for the device.
    """
    parts: list[Any] = []
    for name, parameter in model.named_parameters():
        parts += [name, tuple(parameter.shape)]
        if type(parameter.data) is Tensor and parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            parts.append(_bytes(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]))
    return digest(*parts)


def _bytes(tensor: Tensor) -> bytes:
    """Its numbers in memory's order, without NumPy, which the core does not need."""
    on_host = tensor.detach().to("cpu").contiguous()
    return ctypes.string_at(on_host.data_ptr(), on_host.nbytes) if on_host.numel() else b""
