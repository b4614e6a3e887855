"""How a search's reward scores previews: by itself, or as a sum of several on a scale that the search keeps."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..objective import Scored
from ..rewards.weighted import WeightedReward
from ..scores import as_scores


class Scoring:
    """One reward and one prompt."""

    whole_generations = False  # whether a generation must be scored in one call

    def __init__(self, reward: Callable[[Tensor, str], Any], prompt: str) -> None:
        self.reward, self.prompt = reward, prompt

    def score(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1], the reward's to write on
    ) -> tuple[Any, Scored]:
        """(the scores as the reward gave them, the same as the search takes them, a copy)."""
        given = self.reward(images, self.prompt)
        return given, Scored(as_scores(given, len(images), "the reward", images.device))

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

    def __init__(self, reward: WeightedReward, prompt: str) -> None:
        super().__init__(reward, prompt)
        self.scale = reward.scale

    def score(self, images: Tensor) -> tuple[Any, Scored]:
        raw = self.reward.raw(images, self.prompt)
        if self.scale is None:
            self.scale = self.reward.measure(raw)
        scores = self.reward.combine(raw, self.scale)
        return scores.clone(), Scored(scores.to(images.device), raw)

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


def scoring_of(reward: Callable[[Tensor, str], Any], prompt: str) -> Scoring:
    """The scoring that suits the reward."""
    return WeightedScoring(reward, prompt) if isinstance(reward, WeightedReward) else Scoring(reward, prompt)
