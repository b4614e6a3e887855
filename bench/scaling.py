"""What several GPUs are worth, on paper: `python -m bench.scaling [--budget 50] [--popsize 10] [--gpus 1,8,64]`.

By the seconds of each stage on one device: those that `python -m bench.end_to_end` has measured and bench/results
holds (the rows that name their device), and for models that nothing has measured the least times on one H100, which
`python -m bench.floor --device h100` counts and nothing reaches. Never measured on several GPUs. What travels between
processes is left out, a few hundred bytes a generation. Every preview takes the steps of the final image; a floor's
goes by itself, a measured one in the batches of its run.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.collect import stored
from bench.table import lines_of


@dataclass(frozen=True)
class Stages:
    """Seconds on one device."""

    preview: float  # of one candidate, with its score
    image: float  # without search, and the answer too


def least(denoise: float, decode: float, reward: float = 0.42e-3) -> Stages:
    """Of the least seconds of each stage. reward: CLIP ViT-H in bf16; preprocessing and wavelet take under 0.01 ms."""
    return Stages(denoise + decode + reward, denoise + decode)


FLOORS = {
    "FLUX.2-klein-4B, 4 steps": least(0.176, 0.0133),
    "Z-Image-Turbo, 8 steps": least(0.573, 0.0133),
    "FLUX.1-dev, 30 steps": least(2.825, 0.0133),
    "Z-Image, CFG, 30 steps": least(4.297, 0.0133),
    "Qwen-Image 1328, CFG, 30 steps": least(10.001, 0.0255),
    "FLUX.2-dev, 30 steps": least(10.732, 0.0133),
}
MANY = 10_000  # prompts


def measured(results: Sequence[Mapping[str, Any]]) -> dict[str, Stages]:
    """The last measurement of each model on each device, of the files of bench/results; by a name that says so."""
    found = {}
    for result in sorted(results, key=lambda each: each["environment"]["date"]):
        about, searches = result["environment"], result["searches"] or {}
        for model, figures in searches.get("models", {}).items():
            if "eager" in figures.get("rows", {}):
                found[model, about["device"]] = (about, searches["threads"], figures)
    return {_name(model, *which): _stages(which[2]) for (model, _), which in found.items()}


def _name(model: str, about: Mapping[str, Any], threads: int, figures: Mapping[str, Any]) -> str:
    where = f"{about['device']}, {threads} threads, {about['date']}, commit {about['commit']}"
    return f"{model}, {figures['steps']} steps: measured, {where}"


def _stages(figures: Mapping[str, Any]) -> Stages:
    seconds = figures["rows"]["eager"]["seconds"]
    return Stages(
        sum(seconds[stage] for stage in ("denoise", "decode", "reward")) / figures["budget"], seconds["final"]
    )


def turns(budget: int, popsize: int, gpus: int) -> int:
    """How many previews each GPU makes, one after another, where they share each generation."""
    whole, rest = divmod(budget, popsize)
    return whole * -(-popsize // gpus) + -(-rest // gpus)


def by_population(stages: Stages, prompts: int, gpus: int, budget: int, popsize: int) -> float:
    """Seconds, where all GPUs share the previews of one prompt; the image without search and the answer go after."""
    return prompts * (turns(budget, popsize, gpus) * stages.preview + 2 * stages.image)


def by_prompts(stages: Stages, prompts: int, gpus: int, budget: int) -> float:
    """Seconds, where each GPU takes the next prompt that is left."""
    return -(-prompts // gpus) * (budget * stages.preview + 2 * stages.image)


def tables(models: Mapping[str, Stages], budget: int = 50, popsize: int = 10, gpus: Sequence[int] = (1, 8, 64)) -> str:
    """Markdown: one prompt, and many."""
    one, many = [], []
    for name, stages in models.items():
        alone = by_population(stages, 1, 1, budget, popsize)
        times = [by_population(stages, 1, n, budget, popsize) for n in gpus]
        one.append([name, *(f"{each:.1f} ({alone / each:.1f}x)" for each in times)])
        hours = [(by_prompts(stages, MANY, n, budget), by_population(stages, MANY, n, budget, popsize)) for n in gpus]
        many.append([name, *(" / ".join(map(_hours, both)) for both in hours)])
    count = [f"{n} GPU{'s' if n > 1 else ''}" for n in gpus]
    shared = ", ".join(f"{turns(budget, popsize, n)} on {n}" for n in gpus)
    lines = [
        f"One prompt, budget {budget} in generations of {popsize}, the population shared: seconds (times as fast as "
        f"one GPU). Previews that a GPU makes one after another: {shared}.",
        "",
        *lines_of(("model", *count), one),
        "",
        f"{MANY:,} prompts: hours, by `--shard prompts` / by `--shard population`.",
        "",
        *lines_of(("model", *count), many),
    ]
    return "\n".join(lines) + "\n"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2f}"


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of docs/scaling.md."""
    return tables(FLOORS | measured(results))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--popsize", type=int, default=10)
    parser.add_argument("--gpus", default="1,8,64", help="numbers of GPUs, with commas")
    args = parser.parse_args(arguments)
    print(tables(FLOORS | measured(stored()), args.budget, args.popsize, [int(n) for n in args.gpus.split(",")]))


if __name__ == "__main__":
    main()
