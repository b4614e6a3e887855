"""Several rewards as one: a dict of weights, each reward standardised by the first generation of a search."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import warn
from ..scores import as_scores


@dataclass(frozen=True, eq=False)
class WeightedReward:
    """`reward(images, prompt)`: sum of weight * (score - mean) / deviation over its members, [n] fp64 on the CPU.

    rewards: name -> callable(images, prompt) -> n scores. weights: name -> its weight, finite and not 0.
    scale: name -> (mean, deviation), of each member's scores in the first generation of a search: rewards of
        different units then count as their weights say, however far each spreads. Deviation 0 leaves a member out.

    Nothing here changes. A search over previews measures the scale and keeps it in its state. Around `evolve`:

        reward = load_reward({"pick": 1.0, "hps": 0.5})
        raw = reward.raw(render(noises), prompt)          # noises: some ten, as a first generation has
        reward = reward.with_scale(reward.measure(raw))
        result = evolve(base, lambda latents: reward(render(latents), prompt))

    Raises ValueError for weights or a scale of other names than the rewards', or that are no such numbers.
    """

    rewards: Mapping[str, Callable[[Tensor, str], Any]]
    weights: Mapping[str, float]
    scale: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not isinstance(self.rewards, Mapping) or not all(map(callable, self.rewards.values())):
            raise ValueError(f"rewards must be a dict of names to callables, got {self.rewards!r:.200}")
        self._check_names("the weights", self.weights)
        # Copies: the caller's dicts may change.
        object.__setattr__(self, "rewards", dict(self.rewards))
        object.__setattr__(self, "weights", {name: float(weight) for name, weight in self.weights.items()})
        if self.scale is not None:
            object.__setattr__(self, "scale", self._checked(self.scale))

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        prompt: str,
    ) -> Tensor:  # [n] fp64, on the CPU
        """One score for each image; not finite where a member's is not. Raises ValueError without a scale."""
        if self.scale is None:
            raise ValueError(
                "weighted rewards have no scale yet: a search standardises them by its first generation. To score "
                "without a search, measure one, reward.with_scale(reward.measure(reward.raw(images, prompt))), or "
                "score with the members, reward.rewards"
            )
        return self.combine(self.raw(images, prompt), self.scale)

    def raw(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1]
        prompt: str,
    ) -> dict[str, Tensor]:  # name -> [n] fp64, on the CPU
        """Each member's own scores. Each gets a copy of the images, which it may write on.

        Raises ValueError, which names the member, for anything but n scores.
        """
        return {
            name: as_scores(reward(images.clone(), prompt), len(images), f"reward {name!r}")
            for name, reward in self.rewards.items()
        }

    def measure(
        self,
        raw: Mapping[str, Tensor],  # name -> [n]
    ) -> dict[str, tuple[float, float]]:
        """Mean and unbiased deviation of each member's finite scores, of `raw` of a whole generation.

        Warns of a member that gives them all one score, or fewer than two: its deviation is 0, it is left out.
        Raises ValueError for other members than the rewards, and for fewer than two images.
        """
        self._check_names("the scores", raw)
        if any(len(scores) < 2 for scores in raw.values()):
            raise ValueError("weighted rewards are standardised by the scores of 2 images or more")
        return {name: _mean_and_deviation(name, scores) for name, scores in raw.items()}

    def combine(
        self,
        raw: Mapping[str, Tensor],  # name -> [n]
        scale: Mapping[str, tuple[float, float]],
    ) -> Tensor:  # [n] fp64
        """The weighted sum of the standardised scores; not finite where a member's is not. ValueError as `measure`."""
        self._check_names("the scores", raw)
        scale = self._checked(scale)
        total = torch.zeros(len(next(iter(raw.values()))), dtype=torch.float64, device="cpu")
        for name, weight in self.weights.items():
            mean, deviation = scale[name]
            # Times 0 where a member is left out, because a score that is not finite must stay so.
            total += weight * (raw[name].double() - mean) * (1 / deviation if deviation else 0.0)
        return total

    def with_scale(self, scale: Mapping[str, tuple[float, float]]) -> Self:
        """The same rewards and weights with this scale."""
        return replace(self, scale=scale)

    def _check_names(self, what: str, given: Mapping[str, Any]) -> None:
        if given.keys() != self.rewards.keys():
            raise ValueError(f"{what} must be of the rewards {list(self.rewards)}, got {list(given)}")

    def _checked(self, scale: Any) -> dict[str, tuple[float, float]]:
        if not isinstance(scale, Mapping):
            raise ValueError(f"a scale is a dict of names to (mean, deviation), got {scale!r}")
        self._check_names("the scale", scale)
        pairs = {}
        for name, pair in scale.items():
            try:
                mean, deviation = map(float, pair)
            except (TypeError, ValueError):
                mean = deviation = math.nan
            if not (math.isfinite(mean) and math.isfinite(deviation) and deviation >= 0):
                raise ValueError(f"the scale of reward {name!r} must be (mean, deviation >= 0), finite; got {pair!r}")
            pairs[name] = mean, deviation
        return pairs


def check_weights(weights: Any) -> None:
    """Raises ValueError for what is no dict of names to weights that a search can use."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f'rewards are weighted as in {{"pick": 1.0, "hps": 0.5}}, got {weights!r}')
    for name, weight in weights.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"the weight of reward {name!r} must be a finite number that is not 0, got {weight!r}")


def _mean_and_deviation(
    name: str,
    scores: Tensor,  # [n]
) -> tuple[float, float]:
    finite = scores[scores.isfinite()].double()
    if len(finite) > 1 and (finite != finite[0]).any():
        return finite.mean().item(), finite.std().item()
    warn(f"the reward {name!r} does not tell the images of the first generation apart: it takes no part in this search")
    return 0.0, 0.0
