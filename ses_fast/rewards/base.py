"""What every reward shares: its checks, the prompt encoded once, and a score that depends on its arguments alone."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from ..checks import check_dtype
from ..cpu import fast_linears
from ..errors import warn
from .checkpoint import Checkpoint


class Reward:
    """Scores images against a prompt; a subclass gives `load`, `encode`, `score` and `dropped`.

    `model` is the network that `to` moves; `dtype` is what it computes in; `name` is what it was loaded as, and
    `weights` the name of their folder or file ("" for the published ones).
    Safe to use from several threads: they take turns.
    """

    def __init__(self, model: Any, device: torch.device | str | None, dtype: torch.dtype | None):
        self.name, self.weights = type(self).__name__, ""
        self.device, self.dtype = default_device(device), default_dtype(device, dtype)
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self._encoded: tuple[str, Any] | None = None  # the last prompt, and what `encode` made of it
        self._cut: set[str] = set()  # the prompts that were warned of
        self._lock = threading.RLock()

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        """The reward of these weights, on the CPU. Raises as `ses_fast.load_reward`."""
        raise NotImplementedError

    def encode(self, prompt: str) -> Any:
        """What `score` needs of the prompt; called once for each new prompt."""
        raise NotImplementedError

    def score(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        encoded: Any,
    ) -> Tensor:  # [n]
        raise NotImplementedError

    def dropped(self, prompt: str) -> tuple[int, int, str]:
        """The prompt's length and the most that the reward reads, in tokens, and the text beyond it ("": none)."""
        return 0, 0, ""

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1], any float dtype and device
        prompt: str,
    ) -> Tensor:  # [n] fp32, on the reward's device
        """One score for each image, higher is better.

        The same whatever was scored before, in whichever thread, and under any autocast or default device. Warns once
        of a prompt that is longer than the reward reads. Raises ValueError for any other shape, dtype or prompt.
        """
        check_images(images, prompt)
        with self._lock, torch.no_grad(), torch_as_it_comes(self.device, images.device):
            if self._encoded is None or self._encoded[0] != prompt:
                self._encoded = prompt, self.encode(prompt)
                self._warn_if_cut(prompt)
            # A single image is scored by the model's own layers, as its authors do.
            with fast_linears(self.model, when=len(images) > 1 and self.device.type == "cpu"):
                return self.score(images, self._encoded[1]).float()

    def to(self, device: torch.device | str) -> Self:
        """Moves the reward, as `Module.to`, once no thread is scoring; its dtype stays."""
        device = default_device(device)
        with self._lock:
            if device != self.device:
                self.model.to(device)
                self.device, self._encoded = device, None
        return self

    def _warn_if_cut(self, prompt: str) -> None:
        length, limit, text = self.dropped(prompt)
        text = text.strip()
        if text and prompt not in self._cut:
            self._cut.add(prompt)
            shown = text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"
            warn(f"the reward {self.name!r} reads {limit} tokens and the prompt has {length}: it ignores {shown!r}")

    def __getstate__(self) -> dict[str, Any]:  # a copy has a lock of its own
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())


@contextmanager
def torch_as_it_comes(*devices: torch.device) -> Iterator[None]:
    """Inside, no autocast is on for the devices, and torch's default device is the CPU, as where none is set."""
    with ExitStack() as settings:
        for kind in {device.type for device in devices}:
            settings.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        yield


def check_images(images: Any, prompt: Any) -> None:
    """Raises ValueError for what no reward scores: images must be [n, 3, H, W], n > 0, of a float dtype."""
    if not isinstance(prompt, str):
        raise ValueError(f"a reward needs one prompt, a string; got {type(prompt).__name__}")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"a reward needs a float tensor of images in [-1, 1]; got {got}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"a reward needs images of shape (n, 3, H, W), n > 0; got {tuple(images.shape)}")


def dropped_by(tokenizer: Any, prompt: str, limit: int) -> tuple[int, int, str]:
    """`Reward.dropped` for a tokenizer of transformers that keeps `limit` tokens, its special ones included."""
    length = len(tokenizer(prompt, verbose=False).input_ids)  # it would log the length that is warned of here
    if length <= limit:
        return length, limit, ""
    fast = tokenizer.is_fast
    words = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    kept = limit - (length - len(words.input_ids))
    if fast:  # which knows where in the prompt each token starts
        return length, limit, prompt[words.offset_mapping[kept][0] :]
    return length, limit, tokenizer.decode(words.input_ids[kept:])


def default_device(device: torch.device | str | None) -> torch.device:
    """`device` with its index; None is the current GPU, the CPU where there is none. ValueError for one that is not."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"there is no device {device!r:.100} here: {str(error).splitlines()[0]}") from error


def default_dtype(device: torch.device | str | None, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`; None is bf16 on a GPU and fp32 on the CPU, where bf16 is slow."""
    check_dtype(dtype)
    return dtype or (torch.bfloat16 if default_device(device).type == "cuda" else torch.float32)
