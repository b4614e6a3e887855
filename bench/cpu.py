"""The torch path on the CPU beside what it replaces: `python -m bench.cpu [--threads 2] [--out FILE.json]`.

Prints a table and writes bench/results/<device>-<date>-cpu.json.

Four measures, each against its bar. Before any timing both sides gave the same. They take turns in one process; a
ratio is that of their medians, its spread the interquartile range of the rounds' own ratios.

population: `sample_population` with given draws, P=10, against ten calls of `pywt.waverec2`.
search: a whole search of 50 evaluations with a trivial objective, `ses_fast.search` against `diffsynth`'s
    `ses_search`, called alike: one latent at a time, a progress bar (written to nowhere); with a seed and a generator.
linear: a layer of a batch of previews, by oneDNN, against torch's own; the embedded model's width and FLUX's.
resize: `resize_normalize` of one picture, PIL-exact, against tensor -> PIL -> CLIPImageProcessor; always one thread.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pywt
import torch
from torch.testing import assert_close

import ses_fast
from bench.environment import environment
from bench.ops import result_path
from ses_fast import ops
from ses_fast._torchvision import declare_torchvision_ops
from ses_fast.cpu import fast_linears

LEVEL, POPSIZE, BUDGET = 4, 10, 50
LAYERS = ((2880, 192, 512), (512, 3072, 3072))  # tokens, inputs, outputs
LATENTS = ((16, 128, 128), (16, 166, 166), (16, 167, 93), (128, 64, 64), (4, 64, 64))
# Of candidates and answers: the contract's. Of pixels, up to 2.7: a few bits of fp32.
# Of products of N(0, 1) inputs with weights below 1/sqrt(width): the same.
TOLERANCE = {"latents": 5e-6, "pixels": 2e-6, "products": 2e-5}
BARS = {"population": 5.0, "search with a seed": 4.0, "search with a generator": 4.0, "linear": 1.0, "resize": 1.0}


def in_turns(rounds: int, **sides: Callable[[], object]) -> dict[str, list[float]]:
    """The milliseconds of each side in each round; one round first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: each[1:] for name, each in times.items()}


def row(what: str, shape: tuple[int, ...], ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The figures of one measure; ours and theirs: milliseconds, round by round."""
    fast, slow = statistics.median(ours), statistics.median(theirs)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else [0.0, 0.0, 0.0]
    times = {"ours": fast, "theirs": slow, "times": slow / fast, "spread": (quartiles[2] - quartiles[0]) * fast / slow}
    return {"what": what, "shape": shape, **times, "bar": BARS[what]}


def population(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    base = torch.randn(1, *shape)
    low, residual = ops.split_low_band(base, LEVEL, backend="torch")
    mean, std = torch.zeros(low.numel()), torch.ones(low.numel())
    draws = torch.randn(POPSIZE, low.numel())
    _, *details = pywt.wavedec2(base[0].numpy(), "db1", level=LEVEL)
    lows = draws.view(POPSIZE, *low.shape[1:]).numpy()

    def ours() -> torch.Tensor:
        return ops.sample_population(residual, mean, std, LEVEL, popsize=POPSIZE, draws=draws, backend="torch")[0]

    def theirs() -> None:
        for candidate in lows:
            pywt.waverec2([candidate, *details], "db1")

    for found, low in zip(ours(), lows, strict=True):
        expected = torch.from_numpy(pywt.waverec2([low, *details], "db1"))[:, : shape[1], : shape[2]]
        assert_close(found, expected, atol=TOLERANCE["latents"], rtol=0)
    return {"population": in_turns(rounds, ours=ours, theirs=theirs)}


def search(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    from diffsynth.utils.ses import ses_search

    base = torch.randn(1, *shape)
    settings = {"total_eval_budget": BUDGET, "popsize": POPSIZE, "dwt_level": LEVEL}

    scores = itertools.cycle(torch.rand(BUDGET).tolist())
    seeds = itertools.count()  # a new one each time: noise once drawn may be kept

    def objective(latents: torch.Tensor) -> float:
        return next(scores)

    def ours(**noise: Any) -> torch.Tensor:
        return ses_fast.search(base, objective, backend="torch", **noise, **settings)

    sides = {
        "with a seed": lambda: ours(seed=next(seeds)),
        "with a generator": lambda: ours(generator=torch.Generator().manual_seed(0)),
        "theirs": lambda: ses_search(base, objective, **settings),
    }
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        torch.manual_seed(0)
        expected = sides["theirs"]()
        assert_close(sides["with a generator"](), expected, atol=TOLERANCE["latents"], rtol=0)
        times = in_turns(rounds, **sides)
    return {
        f"search {name}": {"ours": times[name], "theirs": times["theirs"]}
        for name in ("with a seed", "with a generator")
    }


def linear(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    tokens, width, features = shape
    layer, inputs = torch.nn.Linear(width, features), torch.randn(tokens, width)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        with fast_linears(layer):
            return layer(inputs)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return layer(inputs)

    assert_close(ours(), theirs(), atol=TOLERANCE["products"], rtol=0)
    return {"linear": in_turns(rounds, ours=ours, theirs=theirs)}


def resize(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, list[float]]]:
    from PIL import Image

    from bench.clip import PILProcessor

    image = torch.rand(1, *shape) * 2 - 1
    processor = PILProcessor()

    def ours() -> torch.Tensor:
        return ops.resize_normalize(image, backend="torch")

    def theirs() -> torch.Tensor:
        grey = ((image[0].permute(1, 2, 0) + 1) * 127.5).clip(0, 255).to(torch.uint8)
        return processor(images=Image.fromarray(grey.numpy()), return_tensors="pt").pixel_values

    assert_close(ours(), theirs(), atol=TOLERANCE["pixels"], rtol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"resize": in_turns(rounds, ours=ours, theirs=theirs)}
    finally:
        torch.set_num_threads(threads)


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = ["| what | shape | ours, ms | theirs, ms | times | bar |", "|---|---|---|---|---|---|"]
    for each in rows:
        shape = " x ".join(map(str, each["shape"]))
        lines.append(
            f"| {each['what']} | {shape} | {each['ours']:.2f} | {each['theirs']:.2f} "
            f"| {each['times']:.1f} | {each['bar']:.0f}{'' if each['times'] >= each['bar'] else ', missed'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    declare_torchvision_ops()
    rows = []
    jobs: list[tuple[Callable, tuple[int, ...]]] = [(each, shape) for each in (population, search) for shape in LATENTS]
    jobs += [(linear, shape) for shape in LAYERS] + [(resize, (3, 1024, 1024))]
    for measure, shape in jobs:
        print(measure.__name__, shape, file=sys.stderr)
        for what, times in measure(shape, arguments.rounds).items():
            rows.append(row(what, shape, **times))
    print(markdown(rows))
    result = {"environment": environment(), "threads": arguments.threads, "rounds": arguments.rounds, "rows": rows}
    out = arguments.out or result_path(result["environment"], "-cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
