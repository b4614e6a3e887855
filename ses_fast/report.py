"""Pictures of a search. The only file that imports matplotlib, and never its global state."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from textwrap import shorten

from torch import Tensor

from .errors import missing_extra

try:
    from matplotlib.figure import Figure  # draws with Agg: no window, no pyplot
    from matplotlib.ticker import LogLocator, NullFormatter
except ModuleNotFoundError as error:
    raise missing_extra("matplotlib", "plots") from error


def draw_budgets(panels: Mapping[int, tuple[float, Tensor]], path: Path, title: str = "") -> None:
    """Writes the best image after each number of evaluations, side by side, to `path`.

    panels: evaluations -> (score, image (3, H, W) in [-1, 1]); 0 evaluations is the image without search.
    """
    figure = Figure(figsize=(2.8 * len(panels), 3.7), layout="constrained")
    title = shorten(title, 30 * len(panels), placeholder=" ...")
    figure.suptitle(title + "\n", fontsize=11, parse_math=False)  # a prompt may hold a dollar sign
    for axes, (evaluations, (score, image)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], sorted(panels.items()), strict=True
    ):
        pixels = ((image.detach().float().cpu() + 1) * 127.5).clamp(0, 255).byte()  # as the pipeline makes its picture
        axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(f"{f'budget {evaluations}' if evaluations else 'no search'}\nscore {score:.2f}", fontsize=11)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def draw_curve(
    scores: Sequence[float],
    generations: Sequence[int],
    path: Path,
    base_score: float | None = None,
    random: Sequence[float] | None = None,
) -> None:
    """Writes the score of each evaluation, in order, and the best so far to `path`.

    generations: the generation of each score. base_score: drawn as a line where given. random: scores of noises drawn
    without a search, whose best so far is drawn where they are given. Scores that are not finite are left out.
    """
    numbers = range(1, len(scores) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(numbers, _finite(scores), c=generations, cmap="viridis", s=18)
    axes.plot(
        numbers,
        _finite(list(accumulate(scores, max))),
        drawstyle="steps-post",
        color="tab:red",
        label="best so far",
    )
    if random is not None:
        axes.plot(
            range(1, len(random) + 1),
            _finite(list(accumulate(random, max))),
            drawstyle="steps-post",
            color="black",
            linestyle=":",
            label="of random noises",
        )
    if base_score is not None and math.isfinite(base_score):
        axes.axhline(base_score, color="grey", linestyle="--", label="without search")
    axes.set(xlabel="evaluation (coloured by generation)", ylabel="score")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_comparison(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: Path) -> None:
    """Writes the reward of methods over seconds and over forwards to `path`, a row of two plots for each task.

    curves: task -> method -> "seconds", "forwards", "reward", one value for each budget.
    """
    figure = Figure(figsize=(13, 4.2 * len(curves)), layout="constrained")
    plots = figure.subplots(len(curves), 2, squeeze=False)
    for row, (task, methods) in zip(plots, curves.items(), strict=True):
        for axes, cost in zip(row, ("seconds", "forwards"), strict=True):
            for number, (name, points) in enumerate(methods.items()):
                style = {"marker": "osv^Dxp*"[number // 10 % 8], "color": f"C{number % 10}"}
                axes.plot(points[cost], points["reward"], label=name, markersize=4, linewidth=1, **style)
            axes.set(xlabel=cost, ylabel=f"reward of the final image ({task})", xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
    handles = {
        label: line for axes in plots.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _finite(scores: Sequence[float]) -> list[float]:
    return [score if math.isfinite(score) else math.nan for score in scores]
