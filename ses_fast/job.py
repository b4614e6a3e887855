"""What a command that searches was asked to do, checked, and the models and rewards that it names."""

import argparse
import inspect
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
        model_of(args.model)
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
        if args.model == "embedded":
            from .embedded.pipeline import check_size

            check_size(args.height or 1, args.width or 1)
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


def _embedded_model() -> Any:
    from .embedded import load_pipeline

    return load_pipeline()


def _z_image_turbo() -> Any:
    from .errors import missing_extra

    try:
        from ._torchvision import declare_torchvision_ops

        declare_torchvision_ops()
        from diffsynth.pipelines.z_image import ModelConfig, ZImagePipeline
    except ModuleNotFoundError as error:
        raise missing_extra("diffsynth", "diffsynth") from error

    patterns = (
        "transformer/*.safetensors",
        "text_encoder/*.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    )
    configs = [ModelConfig(model_id="Tongyi-MAI/Z-Image-Turbo", origin_file_pattern=pattern) for pattern in patterns]
    try:
        return ZImagePipeline.from_pretrained(model_configs=configs)
    except OSError as error:
        raise OSError(
            "cannot load Tongyi-MAI/Z-Image-Turbo: no copy in ./models (or DIFFSYNTH_MODEL_BASE_PATH) and none to be "
            f"downloaded now ({type(error).__name__}). Download it once where there is a network"
        ) from error


def _diffusers_model(source: str) -> Any:
    from .errors import missing_extra

    try:
        from ._torchvision import declare_torchvision_ops

        declare_torchvision_ops()
        import diffusers
    except ModuleNotFoundError as error:
        raise missing_extra("diffusers", "diffusers") from error
    import torch

    gpu = torch.cuda.is_available()
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16 if gpu else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if gpu else "cpu")


MODELS: dict[str, Callable[[], Any]] = {"embedded": _embedded_model, "z-image-turbo": _z_image_turbo}
MODEL_HELP = f"one of {', '.join(MODELS)}, or diffusers:SOURCE, a Hub id or a folder"


def model_of(name: str) -> Callable[[], Any]:
    """What loads the model of that name. Raises ValueError for another."""
    library, _, source = name.partition(":")
    if library == "diffusers" and source:
        return partial(_diffusers_model, source)
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; the known ones are {', '.join(sorted(MODELS))}, and diffusers:SOURCE with a Hub "
            "id or a folder"
        )
    return MODELS[name]


def quiet(pipe: Any) -> dict[str, Any]:
    """The arguments of a call that shows no bar of its own."""
    names = inspect.signature(pipe.__call__).parameters
    return {"progress_bar_cmd": lambda steps: steps} if "progress_bar_cmd" in names else {}


def load_reward(name: str, weights: str | None) -> Any:
    """A reward by a name that the command takes."""
    if name in EMBEDDED:
        from .embedded import load_reward as load_embedded

        return load_embedded(heldout=EMBEDDED[name])
    from .rewards import load_reward

    return load_reward(name, weights=weights)


def known(kind: str, name: str, names: Collection[str]) -> None:
    """Raises ValueError for a name that is none of `names`."""
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; the known ones are {', '.join(sorted(names))}")


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
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if target.is_dir() or not target.parent.is_dir():
            reason = "it is a folder" if target.is_dir() else "it is a link into a folder that is not there"
            raise ValueError(f"cannot write {folder / name}: {reason}")
