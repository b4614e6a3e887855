"""How many previews go through a stage together, and what happens when memory runs out."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cpu import fast_linears
from .renderer import Draft

Rows = TypeVar("Rows", bound=Tensor | Draft)  # of n candidates

PIXELS_ON_CPU = 2**20  # that are decoded together on a CPU, with "auto"
SHARE_OF_FREE_MEMORY = 0.8  # that a batch may take


class Batches:
    """Cuts the inputs of one stage into batches.

    size: of a batch; None: the first input runs alone and shows how many fit into the GPU's free memory.
    most: the largest batch that can ever be needed.
    automatic: whether the size may be halved when memory runs out.
    filled: whether a short batch of two or more is filled up with copies, which are dropped again, because a compiled
        model would compile anew for another size.
    save_memory: called first when memory runs out; see `Renderer.save_memory`.
    """

    def __init__(
        self,
        size: int | None,
        *,
        most: int,
        device: torch.device | str,
        automatic: bool = False,
        filled: bool = False,
        save_memory: Callable[[], bool] = lambda: False,
    ) -> None:
        self.size, self.most, self.device = size, most, device
        self.automatic, self.filled, self.save_memory = automatic, filled, save_memory

    def run(
        self,
        stage: Callable[[Any], Rows],
        inputs: Tensor | Draft,  # of n candidates
        model: torch.nn.Module,  # whose linear layers the stage runs
        fill_to: int | None = None,  # how many rows a short batch is filled up to, at most
    ) -> Rows:
        """`stage` of all inputs, batch after batch. Raises torch.OutOfMemoryError where no smaller batch is left."""
        done: list[Rows] = []
        while len(inputs):
            n = min(self.size or 1, len(inputs))
            rows = self._rows(n, fill_to or self.most)
            measured = self.size is None and on_gpu(self.device)
            if measured:
                torch.cuda.reset_peak_memory_stats(self.device)
                held = torch.cuda.memory_allocated(self.device)
            try:
                # A single preview takes the final image's path, so the two are bit-identical.
                with fast_linears(model, when=n > 1 and not on_gpu(self.device)):
                    part = _rows(stage(_filled_up(_rows(inputs, slice(n)), rows)), slice(n))
            except torch.OutOfMemoryError:
                if n > 1 and self.save_memory():
                    part = None
                elif self.automatic and n > 1:
                    self.size, part = rows // 2, None
                else:
                    raise
            if part is None:  # outside of the except, whose traceback holds the tensors that were too many
                if on_gpu(self.device):
                    torch.cuda.empty_cache()
                continue
            if measured:
                one = max(1, torch.cuda.max_memory_allocated(self.device) - held)
                fitting = int(SHARE_OF_FREE_MEMORY * _free_memory(self.device)) // one
                self.size = min(self.most, max(1, fitting))
            done.append(part)
            inputs = _rows(inputs, slice(n, None))
        return _joined(done)

    def _rows(self, n: int, fill_to: int) -> int:
        """How many go through the stage for n inputs."""
        if not self.filled or n == 1:
            return n
        return max(n, min(self.size or 1, self.most, fill_to))


def first_size(size: int | str, most: int, device: torch.device | str, pixels: int) -> int | None:
    """The size of the first batch for SESConfig's `batch_size`; None: the first preview runs alone and
    shows how many fit."""
    if isinstance(size, int):
        return size
    return None if on_gpu(device) else min(most, max(1, PIXELS_ON_CPU // pixels))


def on_gpu(device: torch.device | str) -> bool:
    """Whether the device has memory of its own that a batch may exhaust."""
    return torch.device(device).type == "cuda"


def _rows(inputs: Any, which: slice | Tensor) -> Any:
    return inputs.rows(which) if isinstance(inputs, Draft) else inputs[which]


def _joined(parts: list[Any]) -> Any:
    return Draft.joined(parts) if isinstance(parts[0], Draft) else torch.cat(parts)


def _filled_up(inputs: Rows, rows: int) -> Rows:
    if rows <= len(inputs):
        return inputs
    return _rows(inputs, torch.arange(rows).clamp(max=len(inputs) - 1))


def _free_memory(device: torch.device | str) -> int:
    """Bytes that a CUDA device can still give, those that torch keeps for itself included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
