"""A race: candidates are looked at on their way, and those that fall behind are stopped.

What is looked at is the image as the denoiser foresees it (x0), after the steps that `rungs_of` names. Who stops is
decided once for a whole generation and by scores alone: no batch size changes it, and no clock.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Race


class Rung(NamedTuple):
    """After `step` steps the better `share` of a generation go on."""

    step: int
    share: float


def rungs_of(
    race: Race,
    sigmas: Sequence[float],  # the noise level of each step's forward, falling
) -> list[Rung]:
    """The race's rungs in a schedule: the first step whose forward is made at the rung's sigma or below.

    A rung that falls together with the next one, or with the last step, is left out: it would save nothing.
    """
    rungs: list[Rung] = []
    for sigma, share in race:
        step = next((done for done, level in enumerate(sigmas, start=1) if level <= sigma + 1e-6), len(sigmas))
        if rungs and rungs[-1].step == step:
            rungs.pop()
        if step < len(sigmas):
            rungs.append(Rung(step, share))
    return rungs


def who_goes_on(
    scores: Tensor,  # [m] of those that are still in the race
    share: float,
    started: int,  # how many there were at the start
    keep_first: bool = False,
) -> Tensor:  # [k], ascending
    """The best `share` of those that started, by score; of equal ones the earlier. At least one; with `keep_first`
    the first one too, whatever its score.
    """
    most = max(1, math.ceil(share * started - 1e-9))
    # On the host: a stable order, which not every device's sort gives.
    known = scores.cpu().double().nan_to_num(*[-math.inf] * 3)
    goes_on = torch.zeros(len(known), dtype=torch.bool, device="cpu")
    goes_on[known.sort(descending=True, stable=True).indices[:most]] = True
    goes_on[:1] |= keep_first
    return goes_on.nonzero().flatten().to(scores.device)
