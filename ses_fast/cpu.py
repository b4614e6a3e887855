"""What makes previews on a CPU quick: linear layers by oneDNN, and freed memory that is used again."""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Multiplications of a layer. Below, oneDNN's call, which costs more than MKL's, takes longer than it saves.
LEAST_WORK = 2**21


@contextmanager
def fast_linears(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Inside, oneDNN computes the fp32 `nn.Linear`s of `model` that lie on the CPU: as torch does, up to fp32 rounding.

    torch gives them to MKL, which can be slower (`python -m bench.cpu`: by half on an AMD EPYC). Layers of other
    classes or with other weights (quantised, offloaded, with a LoRA) stay as they are, and so does what is computed
    with gradients or under autocast, and a product below `LEAST_WORK` where the model is not compiled. Does nothing
    where torch lacks one of the two libraries, or oneDNN is turned off (`torch.backends.mkldnn.flags`).

    when: False computes with torch's own layers inside, even within another `fast_linears`.
    Holds for the calling thread alone: a thread that shares the layers computes as if nothing had happened. The
    layers are `nn.Linear` again once no thread is inside, whatever exception ends it.
    """
    user, before, layers = object(), _thread.fast, []
    if when and torch.backends.mkldnn.enabled and _both_libraries():
        layers = [layer for layer in model.modules() if _suits(layer)]
    try:
        _take(layers, user)
        _thread.fast = bool(layers)
        yield
    finally:
        # Twice, because an interrupt (Ctrl-C) may cut the first one short. The second one finds what is left to do.
        try:
            _give_back(layers, user)
            _thread.fast = before
        finally:
            _give_back(layers, user)
            _thread.fast = before


class _Thread(threading.local):
    fast = False  # whether the thread is inside of `fast_linears`


_thread = _Thread()
_users: dict[nn.Module, set[object]] = {}  # of each layer that is a `_Linear` now: one object for each `fast_linears`
_lock = threading.RLock()  # of `_users`; reentrant, because a `fast_linears` may end in the garbage collector


def _take(layers: Sequence[nn.Module], user: object) -> None:
    with _lock:
        for layer in layers:
            _users.setdefault(layer, set()).add(user)
            layer.__class__ = _Linear


def _give_back(layers: Sequence[nn.Module], user: object) -> None:
    with _lock:
        for layer in layers:
            users = _users.get(layer, set())
            users.discard(user)
            if not users:
                if type(layer) is _Linear:  # a class that it was given meanwhile stays
                    layer.__class__ = nn.Linear  # type: ignore[assignment]
                _users.pop(layer, None)


class _Linear(nn.Linear):
    """A `nn.Linear` that asks its thread which library to use.

    No super() in its methods: another thread may make the layer a `nn.Linear` again while they run.
    """

    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is Tensor
            and _on_cpu_in_fp32(input)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            if torch.compiler.is_compiling():  # whatever its size, which would be one more thing to compile for
                return torch.ops.ses_fast.linear(input, self.weight, self.bias)
            if _thread.fast and input.numel() * self.out_features >= LEAST_WORK:
                return _onednn_linear(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, of, *state = cast(tuple, object.__reduce_ex__(self, protocol))
        return make, (nn.Linear, *of[1:]), *state  # a copy made inside: nothing would turn it back later


def _suits(layer: nn.Module) -> bool:
    """Whether it is a `nn.Linear` with plain weights: not sparse, nor of a class of their own (quantised)."""
    if type(layer) not in (nn.Linear, _Linear):
        return False
    weights = [each for each in (layer.weight, layer.bias) if each is not None]
    return all(
        type(each) is nn.Parameter and each.layout == torch.strided and _on_cpu_in_fp32(each) for each in weights
    )


def _onednn_linear(
    input: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N]
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


def _compiled_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator in a compiled graph, which serves every thread: which library to use is asked when it runs."""
    return (_onednn_linear if _thread.fast else nn.functional.linear)(input, weight, bias)


def _both_libraries() -> bool:
    """Whether torch has MKL and oneDNN. The first call then registers the operator `ses_fast::linear` too."""
    with _lock:  # registered once, whichever thread comes first
        return _look_for_both()


@functools.cache
def _look_for_both() -> bool:
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if both:  # torch.compile takes torch's own operator only with weights that it has packed itself
        operator = torch.library.custom_op("ses_fast::linear", _compiled_linear, mutates_args=())
        operator.register_fake(nn.functional.linear)
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
