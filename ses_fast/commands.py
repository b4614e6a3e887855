"""What `ses-fast compare` and `ses-fast calibrate` were asked to do, checked, and the work itself."""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__
from .job import EMBEDDED, STEPS, check_writable, checked_prompt, load_reward, steps_of
from .models import model_of, quiet
from .prompts import read_prompts
from .studio import Studio

HELDOUT = "heldout"  # in place of a file: all captions that the embedded model was never trained on
TASKS = {"clip": "clip", "embedded": "clip", "jpeg": "jpeg"}  # of the embedded model -> what its own reward is called
# What is asked for where an option is left out: without --quick, and with it.
USUAL: dict[str, Any] = {"budgets": "10,20,30,50", "seeds": 1, "rounds": 3, "minutes": 60.0, "methods": "usual,parts"}
QUICK: dict[str, Any] = {"budgets": "10,20", "seeds": 1, "rounds": 1, "minutes": 3.5, "methods": "quick"}


def prepare_compare(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments of `compare`. The models are loaded by the work, in each of its processes."""
    model = args.model
    model_of(model, args.height, args.width)
    tasks = tuple((args.tasks or args.reward or ("clip,jpeg" if model == "embedded" else "pick")).split(","))
    held_out = args.report_reward or ("embedded_heldout" if model == "embedded" else None)
    for task in tasks:
        for name in members(task):
            _known_reward(model, name)
    if held_out is not None:
        _known_reward(model, held_out)
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks names one twice: {', '.join(tasks)}")
    from . import compare, report  # noqa: F401  (report: so that a missing package is said before any work)
    from .methods import named

    prompts = _prompts(args.prompts, model)
    if model == "embedded":
        from .embedded.world import parse

        for prompt in prompts:
            parse(prompt)  # else the oracle could not judge its images
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes:g}")
    given = vars(args) | {
        name: usual if getattr(args, name) is None else getattr(args, name)
        for name, usual in (QUICK if args.quick else USUAL).items()
    }
    size, own, steps = _size(args), _own_method(args), steps_of(args)[0]
    plan = compare.Plan(
        prompts=prompts,
        tasks=tasks,
        budgets=_numbers(given["budgets"]),
        seeds=given["seeds"],
        methods=named(given["methods"].split(",")) + (() if own is None else (own.name,)),
        own=own,
        about=_about(model, steps, size) | {"held-out": held_out or "none"},
    )
    check_writable(args.out, compare.WRITTEN)
    compare.open_folder(args.out, plan)  # another comparison's folder is refused before anything is loaded
    workers = args.workers or compare.usual_workers()
    load = partial(open_studio, model, tasks, held_out, steps, size)
    how = {"workers": workers, "rounds": given["rounds"], "sample": args.sample, "minutes": given["minutes"]}
    return partial(_compare, load, plan, args.out, how)


def _compare(load: Callable[[], Studio], plan: Any, out: Path, how: dict[str, Any]) -> None:
    from . import compare, tables

    figures = compare.run(load, plan, out, **how)
    print(tables.markdown(figures))
    print(f"\nwritten to {out}: {' '.join(compare.WRITTEN)}")
    done = sum(len(half["prompts"]) for halves in figures["tasks"].values() for half in halves.values())
    wanted = len(plan.order[: how["sample"]])
    if done < wanted * len(plan.tasks):
        print(
            f"{done} of {wanted} x {len(plan.tasks)} prompts and tasks are done; {how['minutes']:g} minutes allowed no "
            "more: the same command goes on from here",
            file=sys.stderr,
        )


def _own_method(args: argparse.Namespace) -> Any:
    """The method of --config, or none. Raises ValueError for settings that no comparison has."""
    if args.config is None:
        return None
    from .methods import Method
    from .pipelines import SESConfig

    steps, previews = steps_of(args)
    config = SESConfig.from_file(args.config)
    return Method.of(config, previews / steps, "own", f"the settings of {args.config.name}")


def prepare_calibrate(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments of `calibrate` and loads what they name."""
    model = args.model
    model_of(model, args.height, args.width)
    reward = args.reward or ("embedded" if model == "embedded" else "pick")
    _known_reward(model, reward)
    prompts, size, steps = _prompts(args.prompts, model), _size(args), args.steps or STEPS
    if args.out.suffix == ".md":
        raise ValueError("--out is the JSON file of settings; the report is written beside it as .md")
    check_writable(args.out.parent, (args.out.name, args.out.with_suffix(".md").name))
    studio = open_studio(model, (reward,), None, steps, size)
    about = _about(model, steps, size) | {"reward": reward}
    return partial(_calibrate, studio, reward, prompts, args.noises, about, args.out)


def _calibrate(
    studio: Studio, reward: str, prompts: Sequence[str], noises: int, about: Mapping[str, Any], out: Path
) -> None:
    from . import calibrate

    found = calibrate.measure(studio, studio.rewards[reward], prompts, noises)
    told = calibrate.advice(found, studio.steps)
    report = calibrate.markdown(found, told, about)
    calibrate.write(told, report, out)
    print(report)
    print(f"\nwritten to {out} (--config, SESConfig.from_file and call_from_file read it) and {out.with_suffix('.md')}")


def open_studio(model: str, tasks: Sequence[str], held_out: str | None, steps: int, size: Mapping[str, int]) -> Studio:
    """The model and the rewards that are named, loaded."""
    from . import embedded, pipelines
    from .rewards.weighted import WeightedReward

    @functools.cache
    def loaded(name: str) -> Any:
        if len(parts := members(name)) > 1:
            return WeightedReward({part: loaded(part) for part in parts}, dict.fromkeys(parts, 1.0))
        if model == "embedded" and name in TASKS:
            return embedded.load_reward(TASKS[name])
        return load_reward(name, None)

    pipe = pipelines.enable(model_of(model)())
    return Studio(
        pipe=pipe,
        rewards={name: loaded(name) for name in tasks},
        steps=steps,
        held_out=None if held_out is None else loaded(held_out),
        judge=(lambda image, prompt: embedded.judge(image, prompt)["all"]) if model == "embedded" else None,
        arguments={**quiet(pipe), **size},
    )


def members(task: str) -> tuple[str, ...]:
    """The rewards that a task searches with: one, or the members of a sum, "a+b". Raises ValueError for one twice."""
    names = tuple(task.split("+"))
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks: the sum {task} has one reward twice")
    return names


def _known_reward(model: str, name: str) -> None:
    from .rewards import known_name

    if model == "embedded" and (name in TASKS or name in EMBEDDED):
        return
    if name in EMBEDDED:
        raise ValueError(
            f"the reward {name!r} knows only the embedded model's captions: name another, for example pick"
        )
    known_name(name)


def _prompts(source: str, model: str) -> tuple[str, ...]:
    """Those of a file, or held-out captions of the embedded model: all, or so many of the first."""
    if source != HELDOUT and not source.isdecimal():
        return tuple(checked_prompt(each.text) for each in read_prompts(source))
    if model != "embedded":
        raise ValueError(f"{source!r} names captions of the embedded model: give a file of prompts for {model}")
    from .embedded import captions

    all_captions = captions()
    count = len(all_captions) if source == HELDOUT else int(source)
    if not 1 <= count <= len(all_captions):
        raise ValueError(f"there are 1 to {len(all_captions)} held-out captions, not {count}")
    return tuple(all_captions[:count])


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise ValueError(f"--budgets must be whole numbers, as 10,20,50; got {text!r}") from None


def _size(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in ("height", "width") if getattr(args, name)}


def _about(model: str, steps: int, size: Mapping[str, int]) -> dict[str, Any]:
    """What figures are of. The embedded model's weights are told apart, since they are trained anew."""
    about = {"model": model, "steps": steps, **size, "ses-fast": __version__}
    if model == "embedded":
        from .embedded import weights_digest

        about["weights"] = weights_digest()
    return about
