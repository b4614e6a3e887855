"""One call with enable_ses=True on its way: what its arguments became, whatever the library."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_noise, whole_number
from ..digests import digest, digest_of_tensor
from ..distributed import ALONE, Ranks, ranks_of
from ..objective import check_fingerprint
from ..rewards import REWARDS, known_name
from ..rewards.base import Reward
from ..rewards.pil import PILReward
from ..rewards.vlm import VLMReward
from ..rewards.weighted import WeightedReward, check_weights
from .config import SESConfig

RewardFunction = Callable[[Tensor, str], Any]
MOST_STEPS = 10_000  # of a preview: more is a mistake, and schedules have a thousand


@dataclass
class Request:
    """What is searched for, and by what."""

    config: SESConfig
    prompt: str
    budget: int | None  # None: as many as the time allows
    steps: int  # of a preview
    reward: RewardFunction | None  # None: no search, because the budget is 0 or latents are given
    seed: int | None  # of the call's own noise
    search_seed: int | None
    fingerprint: dict[str, Any]  # what a preview's score depends on, as JSON
    held_out: dict[str, RewardFunction] = field(default_factory=dict)
    latents: Tensor | None = None  # [1, C, h, w], to be rendered in place of a search
    base: Tensor | None = None  # [1, C, h, w], to search from, where the call has no seed that makes it
    ranks: Ranks = ALONE  # that search together
    begun: bool = False  # whether the search has begun: an error from then on carries a result of this call
    answered: bool = False  # whether the best noise, or `latents`, was put in place


def make_request(
    *,
    reward: Any,
    budget: Any,
    steps: Any,
    config: Any,
    prompt: Any,
    seed: Any,
    has_own_noise: bool,
    fingerprint: Mapping[str, Any],
    device: Any,
) -> Request:
    """Checks the documented arguments, and loads the rewards that they name.

    has_own_noise: whether the call was given its initial noise.
    fingerprint: the pipeline's class and the call's other arguments, see `facts`.
    Raises ValueError for bad ones, before anything is loaded.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"SES needs one prompt, a string: search for each on its own; got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text: {error.reason} at {error.start}") from error
    config = SESConfig() if config is None else config
    if not isinstance(config, SESConfig):
        raise ValueError(f"ses_config must be a ses_fast.SESConfig, got {config!r}")
    reward = checked_reward(reward)
    if config.latents is not None and has_own_noise:
        raise ValueError("give initial_noise= or SESConfig(latents=), not both")
    if budget is None and config.time_limit is None:
        raise ValueError("ses_eval_budget=None searches for as long as SESConfig(time_limit=) says: give one of them")
    budget = None if budget is None else whole_number("ses_eval_budget", budget, 0)
    steps = whole_number("ses_inference_steps", steps, 1)
    if steps > MOST_STEPS:
        raise ValueError(f"ses_inference_steps must be at most {MOST_STEPS}, got {steps}")
    # Without a seed or a noise of its own the call's noise is not the one that the state was started from.
    from_state = config.state is not None and seed is None and not has_own_noise
    seed, search_seed = _seeds(seed, config)
    searches = config.latents is None and budget != 0
    base = config.state.base if config.state is not None and from_state else None
    request = Request(
        config=config,
        prompt=prompt,
        budget=budget,
        steps=steps,
        reward=None,
        seed=seed,
        search_seed=search_seed,
        fingerprint={**fingerprint, "prompt": prompt, "reward": reward_name(reward), "ses_inference_steps": steps}
        | {"preview": config.preview.facts},
        latents=base if config.latents is None and not searches else config.latents,
        base=base,
        ranks=ranks_of(config.process_group) if searches else ALONE,
    )
    if config.state is not None:
        check_fingerprint(config.state.fingerprint, request.fingerprint)
    if searches:
        request.reward = _loaded(reward, device)
        if isinstance(request.reward, WeightedReward):
            _check_first_generation(request.reward, config, budget)
        request.held_out = _held_out(config.report_rewards, device)
    return request


def checked_reward(reward: Any) -> Any:
    """`ses_reward_model`, its names as `REWARDS` has them. Raises ValueError for what is no reward."""
    if isinstance(reward, Mapping):
        check_weights(reward)
        return {known_name(name): weight for name, weight in reward.items()}
    if isinstance(reward, str):
        return known_name(reward)
    if not callable(reward):
        raise ValueError(
            "ses_reward_model must be the name of a reward, a dict of names to weights or a "
            f"callable(images, prompt), got {reward!r:.200}"
        )
    return reward


def facts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as JSON, so that a state can be compared with them: pictures and tensors by a digest."""
    return {name: _fact(value) for name, value in arguments.items() if not callable(value)}


def given_noise(
    given: Tensor,  # [1, C, h, w]
    base: Tensor,  # [1, C, h, w] of the call
) -> Tensor:  # [1, C, h, w] on the base's device
    """A noise that a config or a state brings. Raises ValueError where the call's own is of another kind."""
    if given.shape != base.shape or given.dtype != base.dtype:
        raise ValueError(
            f"the noise of this call is {base.dtype} of shape {tuple(base.shape)}, the given one "
            f"{given.dtype} of {tuple(given.shape)}: give the height, width and pipeline it was made for"
        )
    return given.to(base.device)


def reward_name(reward: Any) -> Any:
    """What a reward is called in a state: its name, names and weights, or the function's or class's own."""
    if isinstance(reward, WeightedReward):
        return {_member_name(name, reward.rewards[name]): weight for name, weight in reward.weights.items()}
    if isinstance(reward, Mapping):
        return {reward_name(name): float(weight) for name, weight in reward.items()}
    if isinstance(reward, Reward):
        return f"{reward_name(reward.name)} ({reward.weights})" if reward.weights else reward_name(reward.name)
    if isinstance(reward, PILReward):
        return f"from_pil({reward_name(reward.function)})"
    if isinstance(reward, VLMReward):
        return f"VLMReward({reward.name})"
    if isinstance(reward, functools.partial):
        return f"partial({reward_name(reward.func)}, {facts({'args': reward.args, **reward.keywords})})"
    if isinstance(reward, str):  # two names of one reward are the same
        source = REWARDS.get(reward)
        return next((name for name in REWARDS if REWARDS[name] is source), reward)
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def _member_name(name: str, reward: Any) -> str:
    """A member of a sum is called what the sum calls it; of a model on a server that does not say what was asked."""
    return f"{name}: {reward_name(reward)}" if isinstance(reward, VLMReward) else reward_name(name)


def _fact(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _fact(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_fact(each) for each in value]
    if isinstance(value, Tensor):
        return digest_of_tensor(value)
    if hasattr(value, "getbands"):  # a PIL picture, from a file or not
        return digest(value.mode, value.size, value.tobytes(), bytes(value.getpalette() or ()))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return digest(value.dtype, value.shape, value.tobytes())
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if is_dataclass(value):
        return {"class": kind} | {field.name: _fact(getattr(value, field.name)) for field in fields(value)}
    return kind


def _loaded(reward: Any, device: Any) -> RewardFunction:
    if not isinstance(reward, str | Mapping):
        return reward
    from ..rewards import load_reward

    return load_reward(reward, device=device)


def _check_first_generation(reward: WeightedReward, config: SESConfig, budget: int | None) -> None:
    """Raises ValueError where a sum of rewards has no first generation to be standardised by."""
    if config.state is None and reward.scale is None and min(config.popsize, budget or config.popsize) < 2:
        raise ValueError("a sum of rewards is scaled by the first generation: popsize and ses_eval_budget from 2 on")


def _held_out(rewards: Any, device: Any) -> dict[str, RewardFunction]:
    """`SESConfig.report_rewards`, loaded."""
    if not isinstance(rewards, Mapping):
        return {name: _loaded(name, device) for name in rewards}
    for name, reward in rewards.items():
        if isinstance(reward, WeightedReward) and reward.scale is None:
            raise ValueError(
                f"the held-out reward {name!r} is a sum of several, scaled by a first generation that it never sees: "
                "name each of them, or give it a scale (WeightedReward.with_scale)"
            )
    return dict(rewards)


def _seeds(seed: Any, config: SESConfig) -> tuple[int | None, int | None]:
    """The call's seed and the search's. One that is drawn serves both: result.seed gives the image again."""
    seed = check_noise(seed, None)
    if config.state is not None:  # without a seed the base is the state's, and any seed keeps torch's state as it is
        return 0 if seed is None else seed, config.seed
    if seed is None:  # the noise without a search is made from it more than once
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return seed, config.seed if config.seed is not None or config.generator is not None else seed
