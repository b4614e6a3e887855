"""What several GPUs are worth, on paper: `python -m bench.scaling [--budget 50] [--popsize 10] [--gpus 1,8,64]`.

From the least times of each stage on one H100 (`python -m bench.floor --device h100` counts them), not measured on
several GPUs: nothing reaches these floors. What travels between processes is left out, a few hundred bytes a
generation. Every preview takes the steps of the final image, and goes by itself.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.table import lines_of


@dataclass(frozen=True)
class Stages:
    """The least seconds of one candidate on one H100."""

    denoise: float
    decode: float
    reward: float = 0.42e-3  # CLIP ViT-H, bf16; its preprocessing and the wavelet take less than 0.01 ms

    @property
    def image(self) -> float:
        return self.denoise + self.decode

    @property
    def preview(self) -> float:
        return self.image + self.reward


MODELS = {
    "FLUX.2-klein-4B, 4 steps": Stages(0.176, 0.0133),
    "Z-Image-Turbo, 8 steps": Stages(0.573, 0.0133),
    "FLUX.1-dev, 30 steps": Stages(2.825, 0.0133),
    "Z-Image, CFG, 30 steps": Stages(4.297, 0.0133),
    "Qwen-Image 1328, CFG, 30 steps": Stages(10.001, 0.0255),
    "FLUX.2-dev, 30 steps": Stages(10.732, 0.0133),
}
MANY = 10_000  # prompts


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


def tables(budget: int, popsize: int, gpus: Sequence[int]) -> list[str]:
    """Markdown: one prompt, and many."""
    one, many = [], []
    for name, stages in MODELS.items():
        alone = by_population(stages, 1, 1, budget, popsize)
        times = [by_population(stages, 1, n, budget, popsize) for n in gpus]
        one.append([name, *(f"{each:.1f} ({alone / each:.1f}x)" for each in times)])
        hours = [(by_prompts(stages, MANY, n, budget), by_population(stages, MANY, n, budget, popsize)) for n in gpus]
        many.append([name, *(f"{a / 3600:.1f} / {b / 3600:.1f}" for a, b in hours)])
    count = [f"{n} GPU{'s' if n > 1 else ''}" for n in gpus]
    shared = ", ".join(f"{turns(budget, popsize, n)} on {n}" for n in gpus)
    return [
        f"One prompt, budget {budget} in generations of {popsize}, the population shared: seconds (times as fast as "
        f"one GPU). Previews that a GPU makes one after another: {shared}.",
        "",
        *lines_of(("model", *count), one),
        "",
        f"{MANY:,} prompts: hours, by `--shard prompts` / by `--shard population`.",
        "",
        *lines_of(("model", *count), many),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--popsize", type=int, default=10)
    parser.add_argument("--gpus", default="1,8,64", help="numbers of GPUs, with commas")
    args = parser.parse_args(arguments)
    print("\n".join(tables(args.budget, args.popsize, [int(n) for n in args.gpus.split(",")])))


if __name__ == "__main__":
    main()
