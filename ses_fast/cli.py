"""The command `ses-fast`: `generate` makes an image with and without search, `rewards` lists the reward models,
`doctor` says what would run.

Each command is a function that checks its arguments, loads what they name and returns the work. Bad input
ends in one line and exit code 2, before the work.
"""

import argparse
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .files import write_whole

# an optional package -> the extra that installs it
PACKAGES = {
    "triton": "triton",
    "diffsynth": "diffsynth",
    "torchvision": "diffsynth",
    "transformers": "rewards",
    "open_clip_torch": "rewards",
    "openai": "vlm",
    "PyWavelets": "wavelets",
    "matplotlib": "plots",
}
EMBEDDED = {"embedded": False, "embedded_heldout": True}  # the embedded model's rewards -> heldout=
WRITTEN = ("image.png", "base.png", "budgets.png", "curve.png", "result.json")
MARKS = (10, 30, 100, 300, 1000)  # evaluations whose best image is shown, beside none and all


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exits with code 2 and one line on stderr for bad input, before any work starts."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        work = args.prepare(args)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    work()


@dataclass(frozen=True)
class Job:
    """What `generate` was asked to do, checked."""

    prompt: str
    model: str
    reward: str
    reward_weights: str | None
    report_rewards: tuple[str, ...]
    seed: int
    steps: int
    preview_steps: int
    budget: int
    size: dict[str, int]  # height and width, where given
    search: dict[str, Any]  # SESConfig's settings
    out: Path

    @staticmethod
    def of(args: argparse.Namespace) -> "Job":
        """Raises ValueError for bad arguments, before anything is loaded."""
        prompt = _checked_prompt(args.prompt)
        _known("model", args.model, MODELS)
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
            from .embedded.pipeline import check_size, check_words

            check_words(prompt)
            check_size(args.height or 1, args.width or 1)
        return Job(
            prompt=prompt,
            model=args.model,
            reward=reward,
            reward_weights=args.reward_weights,
            report_rewards=report,
            seed=args.seed,
            steps=args.steps,
            preview_steps=args.preview_steps or args.steps,
            budget=args.budget,
            size={name: getattr(args, name) for name in ("height", "width") if getattr(args, name)},
            search={
                "popsize": args.popsize,
                "k_elites": args.elites,
                "wavelet_name": args.wavelet,
                "dwt_level": args.level,
                "batch_size": args.batch_size,
            },
            out=args.out,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, without the folder."""
        apart = ("out", "size", "search")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart} | (
            self.size | self.search
        )


def _generate(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments of `generate` and loads what they name."""
    job = Job.of(args)
    _check_writable(job.out)
    from . import pipelines, report  # here, so that a missing package is said before anything is loaded

    previews = _BestPreviews(job.budget)
    # Without the rewards at first, so that bad settings are refused before anything is loaded.
    config = pipelines.SESConfig(**job.search, on_preview=previews)
    reward = _load_reward(job.reward, job.reward_weights)
    config = replace(config, report_rewards={name: _load_reward(name, None) for name in job.report_rewards})
    pipe = pipelines.enable(MODELS[job.model]())
    return partial(_search, job, pipe, reward, config, previews, report)


def _search(job: Job, pipe: Any, reward: Any, config: Any, previews: "_BestPreviews", report: Any) -> None:
    call = partial(
        pipe,
        job.prompt,
        seed=job.seed,
        num_inference_steps=job.steps,
        progress_bar_cmd=lambda steps: steps,
        **job.size,
    )
    call(enable_ses=False).save(job.out / "base.png")
    image = call(
        enable_ses=True,
        ses_reward_model=reward,
        ses_eval_budget=job.budget,
        ses_inference_steps=job.preview_steps,
        ses_config=config,
    )
    image.save(job.out / "image.png")

    result = pipe.ses_result
    scores = [evaluation.score for evaluation in result.trace]
    generations = [evaluation.generation for evaluation in result.trace]
    report.draw_budgets(previews.best, job.out / "budgets.png", job.prompt)
    report.draw_curve(scores, generations, job.out / "curve.png", result.base_score)
    summary = {
        "base_score": _number(result.base_score),
        "score": result.score,
        "held_out": {
            name: {"base": _number(held.base), "answer": _number(held.answer)} for name, held in result.held_out.items()
        },
        "evaluations": result.evaluations,
        "seed": result.seed,
        "settings": job.settings,
        "versions": {"ses-fast": __version__, "python": platform.python_version(), **_versions()},
        "scores": [
            {"generation": each.generation, "index": each.index, "score": _number(each.score)} for each in result.trace
        ],
        "seconds": result.seconds,
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_whole(job.out / "result.json", lambda file: file.write_text(text))
    print(f"base score   {result.base_score:.2f}")
    print(f"best score   {result.score:.2f}")
    for name, held in result.held_out.items():
        print(f"held out     {name}: base {held.base:.2f}, best {held.answer:.2f}")
    print(f"evaluations  {result.evaluations}")
    print(f"seconds      {result.seconds['total']:.1f}")
    print(f"written to   {job.out}: {' '.join(WRITTEN)}")


class _BestPreviews:
    """The best preview and its score after 0 (the base, scored first), 10, 30, ... and all evaluations."""

    def __init__(self, budget: int) -> None:
        self.marks = {*(mark for mark in MARKS if mark < budget), budget}
        self.best: dict[int, tuple[float, Any]] = {}
        self._count = 0
        self._leader: tuple[float, Any] = (-math.inf, None)

    def __call__(self, images: Any, scores: Any, generation: int, first_index: int) -> None:
        for image, score in zip(images, map(float, scores), strict=True):
            score = score if math.isfinite(score) else -math.inf  # as the search counts it
            self._count += 1
            if self._leader[1] is None or score > self._leader[0]:
                self._leader = (score, image.detach().cpu())
            if self._count == 1:
                self.best[0] = self._leader
            if self._count in self.marks:
                self.best[self._count] = self._leader


def _rewards(args: argparse.Namespace) -> Callable[[], None]:
    from .rewards import REWARDS

    def work() -> None:
        print(f"{'reward':17} {'GB':>4}  {'weights':15} {'packages':55}  downloaded from")
        for name in EMBEDDED:
            missing = [package for package in ("transformers",) if find_spec(package) is None]
            print(f"{name:17} {0:4.1f}  {'installed':15} {_packages(missing):55}  nowhere: part of ses-fast")
        for name, source in sorted(REWARDS.items()):
            weights = "installed" if source.cached() else "not downloaded"
            packages = _packages(source.missing_packages())
            print(f"{name:17} {source.gigabytes:4.1f}  {weights:15} {packages:55}  {source.origin}")

    return work


def _packages(missing: list[str]) -> str:
    extras = {"diffsynth" if package == "diffsynth" else "rewards" for package in missing}
    return f"{', '.join(missing)}: needs ses-fast[{','.join(sorted(extras))}]" if missing else "installed"


def _doctor(args: argparse.Namespace) -> Callable[[], None]:
    def work() -> None:
        import torch

        from . import ops

        print(f"{'ses-fast':13} {__version__}")
        print(f"{'python':13} {platform.python_version()} ({platform.platform()})")
        for name, version in _versions().items():
            print(f"{name:13} {version or f'not installed: needs the extra ses-fast[{PACKAGES[name]}]'}")
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        for gpu in gpus:
            print(f"{'device':13} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        if not gpus:
            print(f"{'device':13} CPU, {torch.get_num_threads()} threads")
        reason = ops.why_not_triton()
        print(f"{'backend':13} {f'torch (not triton: {reason})' if reason else 'triton'}")

    return work


def _versions() -> dict[str, str | None]:
    """The installed version of each package; torch's says for which CUDA, the others are not imported."""
    import torch

    versions: dict[str, str | None] = {"torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


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


MODELS: dict[str, Callable[[], Any]] = {"embedded": _embedded_model, "z-image-turbo": _z_image_turbo}


def _load_reward(name: str, weights: str | None) -> Any:
    if name in EMBEDDED:
        from .embedded import load_reward as load_embedded

        return load_embedded(heldout=EMBEDDED[name])
    from .rewards import load_reward

    return load_reward(name, weights=weights)


def _known(kind: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; the known ones are {', '.join(sorted(names))}")


def _checked_prompt(prompt: str) -> str:
    """The prompt. Raises ValueError for an empty one, and for bytes that are no text."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8 text") from None
    return prompt


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error
    for name in WRITTEN:
        target = Path(os.path.realpath(folder / name))
        if target.is_dir() or not target.parent.is_dir():
            reason = "it is a folder" if target.is_dir() else "it is a link into a folder that is not there"
            raise ValueError(f"cannot write {folder / name}: {reason}")


def _number(score: float | None) -> float | None:
    """JSON has no infinity: null stands for a score that was not finite."""
    return score if score is not None and math.isfinite(score) else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:  # "(default: None)" would say nothing
        return action.help if action.default is None else super()._get_help_string(action)


def _at_least(least: int, most: int | None = None, or_auto: bool = False) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            number = 'a whole number or "auto"' if or_auto else "a whole number"
            raise argparse.ArgumentTypeError(f"needs {number}, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return whole


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ses-fast", description="Spectral Evolution Search for text-to-image models.")
    parser.add_argument("--version", action="version", version=f"ses-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser(
        "generate",
        help="turn a prompt into an image, with and without search",
        formatter_class=_Formatter,
    )
    add, at_least_one = generate.add_argument, _at_least(1)
    add("prompt", help="what to draw")
    add("--budget", type=at_least_one, default=50, help="images to score, the one without search among them")
    add("--steps", type=at_least_one, default=8, help="denoising steps of the image")
    add(
        "--preview-steps",
        type=at_least_one,
        help="denoising steps of the scored previews (default: those of --steps)",
    )
    add("--seed", type=_at_least(0, 2**63 - 1), default=0, help="seed of the noise and of the search")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and result.json")
    add("--model", default="embedded", help=f"one of {', '.join(MODELS)}")
    add("--reward", help="one that `ses-fast rewards` lists (default: embedded for the embedded model, else pick)")
    add("--reward-weights", help="local folder or Hub id of the reward's weights (default: the published ones)")
    add(
        "--report-reward",
        action="append",
        metavar="NAME",
        help="a reward that takes no part in the search and scores the image with and without; may be given again",
    )
    add("--height", type=at_least_one, help="pixels (default: the model's own)")
    add("--width", type=at_least_one, help="pixels (default: the model's own)")
    add("--popsize", type=at_least_one, default=10, help="candidates of a generation")
    add("--batch-size", type=_or_auto(1), default=1, help='previews denoised together, a number or "auto"')
    add("--elites", type=at_least_one, default=5, help="best candidates that make the next distribution")
    add("--wavelet", default="db1", help="any wavelet of PyWavelets")
    add("--level", type=_or_auto(0), default="auto", help='level of the searched band, a number or "auto"')
    generate.set_defaults(prepare=_generate)

    rewards = commands.add_parser("rewards", help="list the rewards: size, source, what is installed, what is missing")
    rewards.set_defaults(prepare=_rewards)

    doctor = commands.add_parser("doctor", help="print versions, devices and the backend that would run")
    doctor.set_defaults(prepare=_doctor)
    return parser


def _or_auto(least: int) -> Callable[[str], int | str]:
    return lambda text: text if text == "auto" else _at_least(least, or_auto=True)(text)
