"""One method on one prompt: what it answers at each budget, and what that costs."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .methods import Method
from .pipelines import SESConfig, disable, enable
from .rewards.weighted import WeightedReward
from .studio import RewardFunction, Studio, score_of


class Cost(NamedTuple):
    """Of a call of one budget."""

    seconds: float
    previews: int  # forwards of the denoiser in previews
    finals: int  # and in images of full fidelity
    denoise: float  # seconds of `previews`


class Search(NamedTuple):
    """What is searched for, from which noise."""

    prompt: str
    seed: int
    reward: RewardFunction
    budgets: Sequence[int]


def scaled(studio: Studio, task: str, prompt: str, seed: int) -> RewardFunction:
    """The reward of a task. A sum gets the scale of one generation of whole noises, the same for all methods."""
    reward = studio.rewards[task]
    if not isinstance(reward, WeightedReward) or reward.scale is not None:
        return reward
    result = studio.search(prompt, seed, reward, SESConfig().popsize, strategy="random")[1]
    return reward.with_scale(result.state.fingerprint["scale"])


def answers(studio: Studio, method: Method, search: Search, pictures: dict[bytes, Any] | None = None) -> list[Tensor]:
    """The final image [1, 3, H, W] of each budget. pictures: what the documented flow rendered of this prompt."""
    if method.strategy is None:
        return [studio.tensor(studio.call(search.prompt, search.seed))] * len(search.budgets)
    if method.documented:
        return documented(studio, search, final=False, pictures=pictures)[0]
    if method.shows_its_image(search.budgets):
        marks = _Marks(search.budgets)
        _call(studio, method, search, search.budgets[-1], on_preview=marks)
        return marks.images
    return [image for image, _ in searched(studio, method, search)]


def costs(studio: Studio, method: Method, search: Search, guided: int) -> list[Cost]:
    """What a call of each budget costs; guided: forwards of a step."""
    image = studio.steps * guided
    if method.strategy is None:
        begin = studio.clock()
        studio.call(search.prompt, search.seed)
        return [Cost(studio.clock() - begin, 0, image, 0.0)] * len(search.budgets)
    if method.documented:
        seconds = documented(studio, search, final=True)[1]
        return [Cost(each, budget * image, image, 0.0) for each, budget in zip(seconds, search.budgets, strict=True)]
    return [cost._replace(finals=cost.finals or image) for _, cost in searched(studio, method, search)]


def searched(studio: Studio, method: Method, search: Search) -> Iterator[tuple[Tensor, Cost]]:
    """(the final image [1, 3, H, W], its cost) of each budget; a larger one goes on from the smaller one's state."""
    state, spent, previews, denoise = None, 0.0, 0, 0.0
    for budget in search.budgets:
        if state is not None and state.index and method.preview.race is not None:
            state, spent, previews, denoise = None, 0.0, 0, 0.0  # a generation cut in two would be another race
        begin = studio.clock()
        picture, result = _call(studio, method, search, budget, state=state)
        taken, seconds = studio.clock() - begin, result.seconds
        previews, denoise = previews + result.forwards["preview"], denoise + seconds["denoise"]
        yield studio.tensor(picture), Cost(spent + taken, previews, result.forwards.get("refine", 0), denoise)
        spent += taken - seconds["prompt"] - seconds["final"] - seconds.get("refine", 0.0)
        state = result.state


def _call(studio: Studio, method: Method, search: Search, budget: int, **config: Any) -> tuple[Any, Any]:
    return studio.search(
        search.prompt,
        search.seed,
        search.reward,
        budget,
        max(1, round(method.steps * studio.steps)),
        strategy=method.strategy,
        dwt_level=method.level,
        wavelet_name=method.wavelet,
        popsize=method.popsize,
        k_elites=method.k_elites,
        batch_size=method.batch_size,
        preview=method.preview,
        **config,
    )


def documented(
    studio: Studio, search: Search, *, final: bool, pictures: dict[bytes, Any] | None = None
) -> tuple[list[Tensor], list[float]]:
    """(the final image [1, 3, H, W], the seconds) of each budget of the installed `ses_search`.

    It draws from torch's global state, which is seeded. Its previews are the final images; final: one is made all the
    same, for its time. pictures: those that it has rendered of this prompt, by their noise.
    """
    from .pipelines.diffsynth import family_of

    if family_of(studio.pipe) is None:
        raise ValueError("the documented flow is of DiffSynth's families alone")
    from .pipelines.diffsynth.documented import Flow

    images: list[Tensor] = []
    seconds: list[float] = []
    leader, count = (-float("inf"), torch.empty(0)), 0
    begin = studio.clock()
    call = {"num_inference_steps": studio.steps, **studio.arguments}
    flow = Flow(disable(studio.pipe), search.prompt, seed=search.seed, **call)
    flow.pictures = pictures

    def score(picture: Any) -> float:
        nonlocal leader, count
        image, count = studio.tensor(picture), count + 1
        value = score_of(search.reward, image, search.prompt)
        leader = max(leader, (value, image), key=lambda each: each[0])  # the first among equals, as the search has it
        if count in search.budgets:
            images.append(leader[1])
            seconds.append(studio.clock() - begin)
        return value

    try:
        level = SESConfig().evolution(flow.shared["height"], flow.shared["width"]).dwt_level
        torch.manual_seed(search.seed)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            noise = flow.search(score, search.budgets[-1], level=level)
        done = studio.clock()
        if final:
            flow.final(noise)
        return images, [each + studio.clock() - done for each in seconds]
    finally:
        enable(studio.pipe)


class _Marks:
    """Collects the best preview after each budget, of those that were not stopped on their way."""

    def __init__(self, budgets: Sequence[int]) -> None:
        self.budgets = set(budgets)
        self.images: list[Tensor] = []
        self.leader: tuple[float, Tensor] = (-float("inf"), torch.empty(0))
        self.count = 0

    def __call__(self, images: Tensor, scores: Any, generation: int, first: int, steps: Tensor) -> None:
        for image, score, stopped in zip(images.split(1), map(float, scores), steps.tolist(), strict=True):
            self.count += 1
            score = score if math.isfinite(score) else -math.inf  # as the search takes it
            if not stopped and (score > self.leader[0] or not self.leader[1].numel()):
                self.leader = (score, image)
            if self.count in self.budgets:
                self.images.append(self.leader[1])
