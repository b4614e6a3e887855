"""The best candidates once more, as the final image will be: the answer is chosen, and kept, at full fidelity."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..evolution import Leader, leaders
from ..result import Evaluation, SearchResult
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
    noises = torch.cat([each.latents for each in best])
    if state.include_base and all(each.number for each in best):
        best.append(Leader(state.base, 0, state.history[0]))
        noises = torch.cat([noises, state.base])
    latents, _, scored = full.finished(noises)
    scores = scored.scores.cpu().double().nan_to_num(*[-math.inf] * 3).tolist()
    refined = [
        Evaluation(
            *divmod(each.number, state.config.popsize),
            score,
            {name: raw[row].item() for name, raw in scored.members.items()} or None,
        )
        for row, (each, score) in enumerate(zip(best, scores, strict=True))
    ]
    row = max(range(len(scores)), key=scores.__getitem__)
    if scores[row] == -math.inf:
        raise RuntimeError(
            f"none of the {len(scores)} best candidates has a finite score as a final image: see the reward"
        )
    base = next((each.score for each in refined if (each.generation, each.index) == (0, 0)), None)
    return replace(
        result,
        latents=noises[row : row + 1],
        score=scores[row],
        base_score=base if state.include_base else None,
        best=refined[row],
        refined=refined,
    ), latents[row : row + 1]
