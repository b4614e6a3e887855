"""What makes previews on a CPU quick: linear layers by oneDNN, and freed memory that is used again."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WORTH = 2**21  # multiplications, from which on oneDNN gains more than its call costs (12 us; MKL's 3)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Within it the fp32 `nn.Linear`s of `model` that lie on the CPU are oneDNN's: the same, to fp32's rounding.

    torch gives them to MKL, which on an AMD processor reaches half of oneDNN's rate. Their weights stay as they are,
    and so do layers of other classes (quantised, offloaded, with a LoRA). Does nothing where gradients or autocast
    are on, or where torch lacks one of the two libraries.
    """
    layers = []
    if _both_libraries() and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _on_cpu_in_fp32(layer.weight)]
    try:
        for layer in layers:
            layer.__class__ = _Linear
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or not _on_cpu_in_fp32(input):
            return super().forward(input)
        if torch.compiler.is_compiling():
            return torch.ops.ses_fast.linear(input, self.weight, self.bias)
        if input.numel() * self.out_features < WORTH:
            return super().forward(input)
        return _linear(input, self.weight, self.bias)


def _linear(
    input: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N]
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


@functools.cache
def _both_libraries() -> bool:
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if both:  # torch.compile takes torch's own operator only with weights that it has packed itself
        torch.library.custom_op("ses_fast::linear", _linear, mutates_args=()).register_fake(nn.functional.linear)
    return both


def _on_cpu_in_fp32(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def keep_memory() -> None:
    """Lets the C library keep up to 64 MiB of freed memory for the tensors to come.

    Above a threshold glibc gives what is freed back to the system, which then clears every page of it again: that was a
    fifth of the time of small previews. It raises the threshold to twice the largest block that was ever freed, of up
    to 32 MiB.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8, device="cpu")  # never written to: it takes no memory
