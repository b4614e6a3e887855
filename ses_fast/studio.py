"""A pipeline with its rewards, as `compare` and `calibrate` use them: the documented call, and scores of images."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .pipelines import Preview, SESConfig
from .pipelines.enabled import picture
from .result import SearchResult
from .rewards.pil import of_pil
from .scores import as_scores
from .stopwatch import device_clock

RewardFunction = Callable[[Tensor, str], Any]


@dataclass(frozen=True)
class Studio:
    """What one process has loaded.

    pipe: enabled. rewards: by the name of the task that searches with it. held_out: takes part in no search. judge:
    whether an image is right, where there is an oracle. steps: of an image. arguments: others of the pipeline's call.
    """

    pipe: Any
    rewards: Mapping[str, RewardFunction]
    steps: int
    held_out: RewardFunction | None = None
    judge: Callable[[Tensor, str], bool] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def clock(self) -> float:
        return device_clock(self.pipe.device)

    def call(self, prompt: str, seed: int, **others: Any) -> Any:
        """The picture of a call."""
        return picture(self.pipe(prompt, seed=seed, **{"num_inference_steps": self.steps, **self.arguments, **others}))

    def search(
        self,
        prompt: str,
        seed: int,
        reward: RewardFunction,
        budget: int,
        preview_steps: int | None = None,
        **config: Any,
    ) -> tuple[Any, SearchResult]:
        """(the picture, the result) of a documented call; config: SESConfig's."""
        found = self.call(
            prompt,
            seed,
            enable_ses=True,
            ses_reward_model=reward,
            ses_eval_budget=budget,
            ses_inference_steps=preview_steps or self.steps,
            ses_config=SESConfig(progress=False, **config),
        )
        return found, self.pipe.ses_result

    def tensor(self, found: Any) -> Tensor:  # [1, 3, H, W] in [-1, 1]
        """A picture that the pipeline returned, for a reward."""
        return of_pil(found, self.pipe.device)

    def warm_up(self, prompt: str, task: str) -> int:
        """A first search, which costs more than others. Returns the denoiser's forwards of a step: 2 with guidance."""
        result = self.search(prompt, 0, self.rewards[task], 2, popsize=2, k_elites=1, preview=Preview())[1]
        return result.forwards["preview"] // (2 * self.steps)


def score_of(reward: RewardFunction, image: Tensor, prompt: str) -> float:  # [1, 3, H, W]
    """What the reward says of an image. Raises ValueError where that is no finite number."""
    score = as_scores(reward(image.clone(), prompt), 1, "the reward").item()
    if not math.isfinite(score):
        raise ValueError(f"the reward gave {score} for an image of {prompt!r}: it cannot be compared by")
    return score
