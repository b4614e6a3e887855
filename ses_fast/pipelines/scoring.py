"""How a search's reward scores previews: by itself, or as a sum of several on a scale that the search keeps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import ALONE, Ranks
from ..objective import Scored
from ..rewards.weighted import WeightedReward
from ..scores import as_scores


class Scoring:
    """One reward and one prompt. at_once: how many images the reward gets in one call; None: as many as there are."""

    whole_generations = False  # whether a generation must be scored in one call

    def __init__(self, reward: Callable[[Tensor, str], Any], prompt: str, at_once: int | None = None) -> None:
        self.reward, self.prompt, self.at_once = reward, prompt, at_once

    def score(
        self,
        images: Tensor,  # [m, 3, H, W] in [-1, 1], the reward's to write on; m may be 0
        ranks: Ranks = ALONE,
    ) -> tuple[Any, Scored]:  # of m, of n
        """(the scores as the reward gave them, those of all ranks' images as the search takes them, a copy)."""
        parts = self._parts(images)
        given = [self.reward(part, self.prompt) for part in parts]
        scores = [
            as_scores(each, len(part), "the reward", images.device) for each, part in zip(given, parts, strict=True)
        ]
        if len(given) == 1:
            return given[0], Scored(ranks.gather(scores[0]))
        mine = torch.cat([_none(images.device), *scores])
        shown = mine.to(given[0].dtype) if given and isinstance(given[0], Tensor) else mine.tolist()
        return shown, Scored(ranks.gather(mine))

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        """What the reward gets at once."""
        return images.split(self.at_once or len(images)) if len(images) else []

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What the scores depend on beside reward and prompt, as JSON."""
        return {}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        """Takes up a search whose state has `fingerprint`. Raises ValueError where that is of other scores."""


class WeightedScoring(Scoring):
    """A sum of rewards, each standardised by the first generation, or by the scale that the sum was given."""

    whole_generations = True
    reward: WeightedReward

    def __init__(self, reward: WeightedReward, prompt: str, at_once: int | None = None) -> None:
        super().__init__(reward, prompt, at_once)
        self.scale = reward.scale

    def score(self, images: Tensor, ranks: Ranks = ALONE) -> tuple[Any, Scored]:
        given = [self.reward.raw(part, self.prompt) for part in self._parts(images)]
        mine = {name: torch.cat([_none("cpu"), *(each[name] for each in given)]) for name in self.reward.rewards}
        raw = {name: ranks.gather(scores) for name, scores in mine.items()}
        if self.scale is None:
            self.scale = self.reward.measure(raw)
        scores = self.reward.combine(raw, self.scale)
        return self.reward.combine(mine, self.scale), Scored(scores.to(images.device), raw)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        if self.scale is None:
            return {}
        return {"scale": {name: list(pair) for name, pair in self.scale.items()}}

    def resume(self, fingerprint: Mapping[str, Any]) -> None:
        if "scale" not in fingerprint:  # it has no score yet
            return
        scale = self.reward.with_scale(fingerprint["scale"]).scale  # checked
        if self.scale is not None and self.scale != scale:
            raise ValueError(f"the state is of another search: its scale was {scale!r}, this call's is {self.scale!r}")
        self.scale = scale


def scoring_of(reward: Callable[[Tensor, str], Any], prompt: str, at_once: int | None = None) -> Scoring:
    """The scoring that suits the reward."""
    kind = WeightedScoring if isinstance(reward, WeightedReward) else Scoring
    return kind(reward, prompt, at_once)  # type: ignore[arg-type]


def _none(device: torch.device | str) -> Tensor:  # [0]
    return torch.empty(0, dtype=torch.float64, device=device)
