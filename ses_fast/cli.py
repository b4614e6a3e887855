"""The command `ses-fast`: `generate` makes an image with and without search, `batch` those of a file of prompts,
`compare` sets methods against each other at equal cost, `calibrate` says which previews can be trusted, `rewards` lists
the reward models, `doctor` says what would run.

Each command is a function that checks its arguments, loads what they name and returns the work. Bad input
ends in one line and exit code 2, before the work.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .commands import HELDOUT, prepare_calibrate, prepare_compare
from .generate import prepare_generate
from .job import EMBEDDED, STEPS, Job, check_writable
from .models import MODEL_HELP, quiet
from .prompts import FORMATS, Prompt, read_prompts
from .versions import PACKAGES, versions

MOST_FAILURES = 10  # that are printed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exits with code 2 and one line on stderr for bad input, before any work starts; with 1 and one
    line for what the work itself refuses, a disk that takes no more and a process that is gone; with 130 after Ctrl-C.
    Any other exception of the work leaves as it is: a fault of ours, or of a reward.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        try:
            work = args.prepare(args)
        except (ValueError, ImportError, OSError) as error:
            parser.error(str(error))
        except RuntimeError as error:
            from .distributed import RankFailed

            if isinstance(error, RankFailed):  # which says it there
                raise SystemExit(2) from error
            raise
        work()
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    except (ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not _is_refusal(error):
            raise
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from error


def _is_refusal(error: BaseException) -> bool:
    """Whether the package itself raised it, and so wrote its message for the user."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__", "").startswith("ses_fast.")


def _batch(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments of `batch` and its prompts, and loads what they name."""
    from . import distributed

    ranks = distributed.start(timedelta(minutes=args.timeout))
    with ranks.joined():
        job = Job.of(args)
        # One process reads them: of standard input each would get a part.
        found = ranks.agree(
            [asdict(each) for each in read_prompts(args.prompts, args.format)] if not ranks.rank else None
        )
        check_writable(job.out)
        from . import batch  # here, so that a missing package is said before anything is loaded

        pipe, reward, config = job.load()
    results = batch.run(
        pipe,
        [Prompt(**each) for each in found],
        job.out,
        ses_reward_model=reward,
        ses_eval_budget=job.budget,
        ses_inference_steps=job.preview_steps,
        ses_config=config,
        seed=job.seed,
        model=job.model,
        restart=bool(args.restart),
        shard=args.shard,
        process_group=ranks,
        num_inference_steps=job.steps,
        **quiet(pipe),
        **job.size,
    )
    return partial(_work_through, results, job.out, ranks.rank)


def _work_through(results: Iterable[Any], out: Path, rank: int) -> None:
    """Exits with code 1 where a prompt failed, the folder takes no more or a process is gone; with 130 after Ctrl-C,
    here or in another process: torchrun hands it to all, and one may hear of another's first.

    Of several processes the first one alone says what was done, and that a prompt failed: when one has an exit code,
    torchrun ends the others.
    """
    from .distributed import LostRank, RankFailed, stop
    from .folder import CannotWrite
    from .page import shown

    try:
        done = list(results)
    except (KeyboardInterrupt, CannotWrite, LostRank, RankFailed) as error:
        if KeyboardInterrupt.__name__ in (type(error).__name__, getattr(error, "kind", None)):
            print("\nstopped: the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
        print(f"ses-fast: error: {error}. The same command goes on from here", file=sys.stderr)
        raise SystemExit(1) from error
    stop()
    if rank:
        return
    failed = [result for result in done if result.error]
    for result in failed[:MOST_FAILURES]:
        print(f"failed       {result.stem}: {' '.join(shown(result.error, 200).split())}")
    if len(failed) > MOST_FAILURES:
        print(f"failed       and {len(failed) - MOST_FAILURES} more")
    summary = json.loads((out / "summary.json").read_text())
    print(f"prompts      {len(done)}, {len(failed)} failed")
    for name, means in {"mean score": summary["search"], **summary["held_out"]}.items():
        if means["count"]:
            print(f"{name:12} without search {means['base']:.2f}, with {means['answer']:.2f}: {means['gain']:+.2f}")
    print(f"written to   {out}: index.html results.jsonl summary.json images/")
    if failed:
        raise SystemExit(1)


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
        for name, version in versions().items():
            print(f"{name:13} {version or f'not installed: needs the extra ses-fast[{PACKAGES[name]}]'}")
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        for gpu in gpus:
            print(f"{'device':13} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        if not gpus:
            print(f"{'device':13} CPU, {torch.get_num_threads()} threads")
        reason = ops.why_not_triton()
        print(f"{'backend':13} {f'torch (not triton: {reason})' if reason else 'triton'}")

    return work


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
    generate.add_argument("prompt", help="what to draw")
    _add_search_options(generate, "folder for the pictures and result.json")
    generate.add_argument(
        "--random-beside",
        action="store_true",
        default=None,
        help="score as many random noises too, for curve.png to show what the search gained; twice the time",
    )
    generate.set_defaults(prepare=prepare_generate)

    batch = commands.add_parser(
        "batch",
        help="the same for a file of prompts; the same command again goes on where it stopped",
        formatter_class=_Formatter,
    )
    batch.add_argument(
        "prompts",
        help="CSV or TSV with a column prompt, JSON lines, a JSON list, or a prompt a line; - for standard input. "
        "seed, negative_prompt, width, height and id are read too",
    )
    batch.add_argument("--format", choices=FORMATS, help="of the file (default: by its suffix, or what it looks like)")
    batch.add_argument("--restart", action="store_true", default=None, help="begin anew: remove what is in the folder")
    batch.add_argument(
        "--shard",
        choices=("prompts", "population"),
        help="what the processes of torchrun share (default: whichever is done sooner)",
    )
    batch.add_argument(
        "--timeout", type=_at_least(1), default=60, help="minutes that one process of torchrun waits for the others"
    )
    _add_search_options(batch, "folder for the images, results.jsonl, summary.json and index.html")
    batch.set_defaults(prepare=_batch)

    compare = commands.add_parser(
        "compare", help="search methods at equal cost, by evidence", formatter_class=_Formatter
    )
    _add_study_options(compare, Path("out/compare"), "folder for the report, its figures and plot")
    add = compare.add_argument
    add(
        "--tasks",
        help="rewards to search with, with commas, each by itself, a+b as a sum of both, standardised (default: "
        "clip,jpeg, or --reward)",
    )
    add("--report-reward", metavar="NAME", help="a reward that takes no part in a search (default: embedded_heldout)")
    add("--budgets", help="evaluations, with commas (default: 10,20,30,50)")
    add(
        "--seeds",
        type=_at_least(1),
        help="searches of a prompt, each from its own noise; from 2 on their diversity is shown (default: 1)",
    )
    add("--methods", help="names with commas, or of groups: usual, parts, strategies, all (default: usual,parts)")
    add("--config", type=Path, help="JSON file of settings, as calibrate writes it: one more method, own")
    add("--quick", action="store_true", help="few methods, small budgets, 4 minutes on two cores")
    add(
        "--sample",
        type=_at_least(1),
        help="so many of the prompts, drawn from all; a larger one goes on (default: all)",
    )
    add("--minutes", type=float, help="no prompt is begun that would not end by then (default: 60); run again to go on")
    add("--workers", type=_at_least(1), help="processes of one thread (default: the cores, 1 with a GPU)")
    add("--rounds", type=_at_least(1), help="prompts on which the seconds are measured (default: 3)")
    compare.set_defaults(prepare=prepare_compare)

    calibrate = commands.add_parser(
        "calibrate",
        help="which previews, race and level a model and a reward can be searched with",
        formatter_class=_Formatter,
    )
    _add_study_options(
        calibrate, Path("out/ses.json"), "JSON of settings that --config takes; the report goes beside it"
    )
    calibrate.add_argument("--noises", type=_at_least(2), default=24, help="of each prompt")
    calibrate.set_defaults(prepare=prepare_calibrate)

    rewards = commands.add_parser("rewards", help="list the rewards: size, source, what is installed, what is missing")
    rewards.set_defaults(prepare=_rewards)

    doctor = commands.add_parser("doctor", help="print versions, devices and the backend that would run")
    doctor.set_defaults(prepare=_doctor)
    return parser


def _add_study_options(parser: argparse.ArgumentParser, out: Path, what: str) -> None:
    """What `compare` and `calibrate` have in common."""
    add, at_least_one = parser.add_argument, _at_least(1)
    add("prompts", help=f'file of prompts as for batch; of the embedded model "{HELDOUT}" or a number of its captions')
    add("--model", default="embedded", help=MODEL_HELP)
    add("--reward", help="one that `ses-fast rewards` lists (default: embedded for the embedded model, else pick)")
    add("--steps", type=at_least_one, help=f"denoising steps of the image (default: {STEPS})")
    add("--height", type=at_least_one, help="pixels (default: the model's own)")
    add("--width", type=at_least_one, help="pixels (default: the model's own)")
    add("--out", type=Path, default=out, help=what)


def _add_search_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What `generate` and `batch` have in common: see `Job`."""
    add, at_least_one = parser.add_argument, _at_least(1)
    add(
        "--budget",
        type=_or_none(1),
        default=50,
        help='images to score, the one without search among them; "none": as many as --time-limit allows',
    )
    add("--time-limit", type=float, metavar="S", help="seconds that a search may take (default: no limit)")
    add("--steps", type=at_least_one, help=f"denoising steps of the image (default: --config's, or {STEPS})")
    add(
        "--preview-steps",
        type=at_least_one,
        help="denoising steps of the scored previews (default: --config's, or those of --steps)",
    )
    add("--seed", type=_at_least(0, 2**63 - 1), default=0, help="seed of the noise and of the search")
    add("--out", type=Path, default=Path("out"), help=out)
    add("--model", default="embedded", help=MODEL_HELP)
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
    add("--config", type=Path, help="JSON file with settings of ses_fast.SESConfig; the options below go before it")
    add("--popsize", type=at_least_one, help="candidates of a generation (default: 10)")
    add("--batch-size", type=_or_auto(1), help='previews denoised together, a number or "auto" (default: auto)')
    add("--elites", type=at_least_one, help="best candidates that make the next distribution (default: 5)")
    add("--wavelet", help="any wavelet of PyWavelets (default: db1)")
    add("--level", type=_or_auto(0), help='level of the searched band, a number or "auto" (default: auto)')


def _or_auto(least: int) -> Callable[[str], int | str]:
    return lambda text: text if text == "auto" else _at_least(least, or_auto=True)(text)


def _or_none(least: int) -> Callable[[str], int | None]:
    return lambda text: None if text.lower() == "none" else _at_least(least)(text)
