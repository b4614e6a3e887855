"""Seconds by stage."""

import time
from collections.abc import Callable, Iterable

import torch


class Stopwatch:
    """Adds the time since the last lap to a stage; `seconds` holds the sums.

    clock: seconds that only grow; `time.perf_counter` where none is given.
    """

    def __init__(self, stages: Iterable[str], clock: Callable[[], float] | None = None) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self.clock = clock or time.perf_counter
        self.restart()

    def restart(self) -> None:
        """Begins a lap here: the time since the last one belongs to no stage."""
        self.last = self.clock()

    def lap(self, stage: str) -> None:
        """Gives the time since the last lap to `stage`."""
        now = self.clock()
        self.seconds[stage] += now - self.last
        self.last = now


def device_clock(device: torch.device | str) -> float:
    """`time.perf_counter()` once the device has done the work it was given."""
    if torch.device(device).type not in ("cpu", "meta"):  # no kernel runs on either
        torch.accelerator.synchronize(device)
    return time.perf_counter()
