"""Several rewards as one: a dict of weights, each reward standardised by the first generation of a search."""

import math
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


class WeightedReward:
    """`reward(images, prompt)`: sum of weight * (score - mean) / deviation over its members, [n] fp64.

    A member's mean and deviation (unbiased) are those of its finite scores on the first call: rewards of
    different units then count as their weights say, however far each spreads. So the first call must be a
    whole generation. The documented `enable_ses` call sees to it; around `evolve`, give batch_size=popsize.
    A member that gives all images of the first generation one score is left out of the search, with a warning.

    scale: name -> (mean, deviation; 0 for a member left out), None before the first call. A call with another
        prompt than that of the measured scale measures anew, and so does the first one after `restart()`: call it
        for another search with the same prompt. One that is set, to go on with a search that was saved, stays.
    members: name -> each raw score of the last call, [n] on the CPU.
    whole_generations: tells the search to score a generation in one call.
    """

    whole_generations = True

    def __init__(
        self,
        rewards: Mapping[str, Callable[[Tensor, str], Any]],
        weights: Mapping[str, float],
    ) -> None:
        check_weights(weights)
        self.rewards, self.weights = dict(rewards), {name: float(weight) for name, weight in weights.items()}
        self.restart()

    def restart(self) -> None:
        self.scale: dict[str, tuple[float, float]] | None = None
        self._measured: dict[str, tuple[float, float]] | None = None  # the scale, where it is not one that was set
        self._prompt = ""  # the measured scale's
        self.members: dict[str, Tensor] = {}

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        prompt: str,
    ) -> Tensor:  # [n] fp64, on the CPU
        """One score for each image; not finite where a member's is not. ValueError for a first call of one image."""
        if self.scale is self._measured and prompt != self._prompt:
            self.restart()
        if self.scale is None and len(images) < 2:
            raise ValueError(
                "rewards are standardised by the first generation: score it in one call, of 2 images or more "
                "(batch_size=popsize)"
            )
        self.members = {}
        for name, reward in self.rewards.items():
            scores = torch.as_tensor(reward(images, prompt)).detach().to("cpu", torch.float64)
            if scores.shape != (len(images),):
                raise ValueError(f"reward {name!r} gave scores of shape {tuple(scores.shape)} for {len(images)} images")
            self.members[name] = scores
        if self.scale is None:
            self.scale = {name: _mean_and_deviation(name, scores) for name, scores in self.members.items()}
            self._measured, self._prompt = self.scale, prompt
        total = torch.zeros(len(images), dtype=torch.float64)
        for name, scores in self.members.items():
            mean, deviation = self.scale[name]
            # times 0, not left out: a score that is not finite stays one
            total += self.weights[name] * (scores - mean) * (1 / deviation if deviation else 0.0)
        return total


def check_weights(weights: Any) -> None:
    """Raises ValueError for what is no dict of names to weights that a search can use."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f'rewards are weighed as in {{"pick": 1.0, "hps": 0.5}}, got {weights!r}')
    for name, weight in weights.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"the weight of reward {name!r} must be a finite number that is not 0, got {weight!r}")


def _mean_and_deviation(
    name: str,
    scores: Tensor,  # [n]
) -> tuple[float, float]:
    finite = scores[scores.isfinite()]
    if len(finite) > 1 and (finite != finite[0]).any():
        return finite.mean().item(), finite.std().item()
    warnings.warn(
        f"the reward {name!r} does not tell the images of the first generation apart: it takes no part in this search",
        stacklevel=4,
    )
    return 0.0, 0.0
