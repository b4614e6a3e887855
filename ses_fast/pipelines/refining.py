"""The best candidates once more, as the final image will be: the answer is chosen, and kept, at full fidelity."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..evolution import Leader, leaders
from ..result import SearchResult, result_of
from .previews import Previews


def refine(
    result: SearchResult,
    full: Previews,  # of the final image's size and steps
    count: int,
    *,
    backend: str | None = None,
) -> tuple[SearchResult, Tensor]:
    """(the result whose answer is the best of `count` candidates and the base, its latents after all steps [1, ...]).

    Of equal ones that wins whose preview scored higher. Raises RuntimeError where no score is finite.
    """
    state = result.state
    best = leaders(state, count, backend=backend)
    if state.include_base and all(each.number for each in best):
        best.append(Leader(state.base, 0, state.history[0]))
    noises = torch.cat([each.latents for each in best])
    latents, scored = full.finished(noises)
    scores = scored.scores.cpu().double().nan_to_num(*[-math.inf] * 3).tolist()
    row = max(range(len(scores)), key=scores.__getitem__)
    if scores[row] == -math.inf:
        raise RuntimeError(f"none of the {len(scores)} best candidates has a finite score as a final image")
    members = [{name: raw[row].item() for name, raw in scored.members.items()} or None for row in range(len(best))]
    numbers = [each.number for each in best]
    refined = list(zip(numbers, scores, members, strict=True))
    answer = result_of(state, noises[row : row + 1], numbers[row], result.stopped, result.seconds, refined=refined)
    mine = full.ranks.share(len(noises))
    here = latents[row - mine.start][None] if mine.start <= row < mine.stop else None
    return replace(answer, forwards=result.forwards), full.ranks.send(here, noises.device)
