"""What a command that searches was asked to do, checked, and the models and rewards that it names."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .files import make_folder
from .models import model_of

EMBEDDED = {"embedded": False, "embedded_heldout": True}  # the embedded model's rewards -> heldout=
# An option of the command -> the setting of SESConfig that it takes the place of.
SEARCH = {
    "popsize": "popsize",
    "elites": "k_elites",
    "wavelet": "wavelet_name",
    "level": "dwt_level",
    "batch_size": "batch_size",
    "time_limit": "time_limit",
}
STEPS = 8  # of the image, where neither --steps nor the file of --config says


@dataclass(frozen=True)
class Job:
    """What every prompt of a command has in common."""

    model: str
    reward: str
    reward_weights: str | None
    report_rewards: tuple[str, ...]
    seed: int
    steps: int
    preview_steps: int
    budget: int | None  # None: as many as the time allows
    size: dict[str, Any]  # height and width, where given
    config: Any  # the SESConfig, as yet without report_rewards
    out: Path

    @staticmethod
    def of(args: argparse.Namespace) -> "Job":
        """Raises ValueError for bad arguments, and OSError for a file that is not there, before anything is loaded."""
        model_of(args.model, args.height, args.width)
        reward = args.reward or ("embedded" if args.model == "embedded" else "pick")
        report = tuple(args.report_reward or ())
        from .rewards import known_name

        for name in (reward, *report):
            if name not in EMBEDDED:
                known_name(name)
            if name in EMBEDDED and args.model != "embedded":
                raise ValueError(
                    f"the reward {name!r} knows only the embedded model's captions: name another, for example pick"
                )
        if reward in EMBEDDED and args.reward_weights:
            raise ValueError("--reward-weights: the embedded reward has its own weights")
        config, (steps, preview_steps) = _config(args), steps_of(args)
        if args.budget is None and config.time_limit is None:
            raise ValueError("--budget none searches for as long as --time-limit says: give one of them")
        return Job(
            model=args.model,
            reward=reward,
            reward_weights=args.reward_weights,
            report_rewards=report,
            seed=args.seed,
            steps=steps,
            preview_steps=preview_steps,
            budget=args.budget,
            size={name: getattr(args, name) for name in ("height", "width") if getattr(args, name)},
            config=config,
            out=args.out,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, without the folder."""
        names = ("model", "reward", "reward_weights", "report_rewards", "seed", "steps", "preview_steps", "budget")
        return self.config.settings() | {name: getattr(self, name) for name in names} | self.size

    def load(self) -> tuple[Any, Any, Any]:
        """(the enabled pipeline, the reward, the SESConfig with the rewards to report)."""
        from . import pipelines

        reward = load_reward(self.reward, self.reward_weights)
        held_out = {name: load_reward(name, None) for name in self.report_rewards}
        return pipelines.enable(model_of(self.model)()), reward, replace(self.config, report_rewards=held_out)


def _config(args: argparse.Namespace) -> Any:
    """The settings of --config, with those of the command's own options in their place."""
    from .pipelines import SESConfig

    config = SESConfig.from_file(args.config) if args.config else SESConfig()
    given = {name: getattr(args, option) for option, name in SEARCH.items() if getattr(args, option) is not None}
    return replace(config, **given)


def steps_of(args: argparse.Namespace) -> tuple[int, int]:
    """(the steps of the image, those of a preview), by the options and the file of --config.

    Raises ValueError where the file's steps of a preview are of an image of other steps.
    """
    from .pipelines import SESConfig

    call = SESConfig.call_from_file(args.config) if args.config else {}
    steps = args.steps or call.get("num_inference_steps", STEPS)
    given = getattr(args, "preview_steps", None)
    measured = call.get("num_inference_steps", steps)
    if not given and "ses_inference_steps" in call and steps != measured:
        raise ValueError(
            f"{args.config} recommends {call['ses_inference_steps']} steps for previews of an image of {measured}: "
            f"leave --steps {steps} out, calibrate with it, or give --preview-steps"
        )
    return steps, given or call.get("ses_inference_steps", steps)


def load_reward(name: str, weights: str | None) -> Any:
    """A reward by a name that the command takes."""
    if name in EMBEDDED:
        from .embedded import load_reward as load_embedded

        return load_embedded(heldout=EMBEDDED[name])
    from .rewards import load_reward

    return load_reward(name, weights=weights)


def checked_prompt(prompt: str) -> str:
    """The prompt. Raises ValueError for an empty one, and for bytes that are no text."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8 text") from None
    return prompt


def check_writable(folder: Path, names: Sequence[str] = ()) -> None:
    """Raises ValueError where the folder cannot be made or written to, or holds a folder of one of the names."""
    try:
        make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if target.is_dir() or not target.parent.is_dir():
            reason = "it is a folder" if target.is_dir() else "it is a link into a folder that is not there"
            raise ValueError(f"cannot write {folder / name}: {reason}")
