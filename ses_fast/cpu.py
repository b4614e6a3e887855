"""What makes previews on a CPU quick: linear layers by oneDNN, and freed memory that is used again."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Multiplications of a layer. Below, oneDNN's call, which is dearer than MKL's, costs more than it gains.
LEAST_WORK = 2**21


@contextmanager
def fast_linears(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Inside, oneDNN computes the fp32 `nn.Linear`s of `model` that lie on the CPU: the same, to fp32's rounding.

    torch gives them to MKL, which can be slower (`python -m bench.cpu`: by half on an AMD EPYC). Their weights stay as
    they are, and so do layers of other classes or with other weights (quantised, offloaded, with a LoRA), what is
    computed with gradients or under autocast, and products below `LEAST_WORK`, where the model is not compiled. Does
    nothing where torch lacks one of the two libraries, or oneDNN is turned off (`torch.backends.mkldnn.flags`).
    """
    layers = []
    if when and torch.backends.mkldnn.enabled and _both_libraries():
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _suits(layer)]
    try:
        for layer in layers:
            layer.__class__ = _Linear
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is not Tensor
            or not _on_cpu_in_fp32(input)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        if torch.compiler.is_compiling():  # whatever its size, which would be one more thing to compile for
            return torch.ops.ses_fast.linear(input, self.weight, self.bias)
        if input.numel() * self.out_features < LEAST_WORK:
            return super().forward(input)
        return _linear(input, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, of, *state = cast(tuple, super().__reduce_ex__(protocol))
        return make, (nn.Linear, *of[1:]), *state  # a copy made inside: nothing would turn it back later


def _suits(layer: nn.Linear) -> bool:
    """Whether its weights are plain ones: not sparse, nor of a class of their own (quantised, distributed)."""
    weights = [each for each in (layer.weight, layer.bias) if each is not None]
    return all(
        type(each) is nn.Parameter and each.layout == torch.strided and _on_cpu_in_fp32(each) for each in weights
    )


def _linear(
    input: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N]
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


@functools.cache
def _both_libraries() -> bool:
    """Whether torch has MKL and oneDNN. The first call then registers the operator `ses_fast::linear` too."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if both:  # torch.compile takes torch's own operator only with weights that it has packed itself
        torch.library.custom_op("ses_fast::linear", _linear, mutates_args=()).register_fake(nn.functional.linear)
    return both


def _on_cpu_in_fp32(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def keep_memory() -> None:
    """Lets the C library keep up to 64 MiB of freed memory for the tensors to come, as long as the process lasts.

    Above a threshold glibc gives what is freed back to the system, which then clears every page of it again: in
    small previews layer after layer. It raises the threshold to twice the largest block of up to 32 MiB that was
    ever freed (mallopt(3), M_MMAP_THRESHOLD). Other C libraries are left as they are.
    """
    # Just below 32 MiB with the block's own header. Never written to, it takes no memory.
    torch.empty((32 << 20) - 8192, dtype=torch.uint8, device="cpu")
