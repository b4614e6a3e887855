"""The drawings of docs/how, made by the operators that they explain: `python docs/drawings.py [folder]`."""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ses_fast import ops
from ses_fast.reference import philox_normal

SIDE, LEVEL = 8, 2  # an image of 8x8 numbers, and the band of 2x2 below it
STRONGER = 3  # than noise is, so that the other band can be seen
OUT = Path(__file__).parent / "how"


def noise(candidate: int, side: int) -> Tensor:  # [1, 1, side, side]
    """A candidate's noise, as a search with seed 0 draws it."""
    return philox_normal(0, 0, torch.tensor([candidate]), side * side).view(1, 1, side, side)


def show(axes: Any, values: Tensor, title: str, block: int = 1) -> None:
    """Numbers as colours, blue below zero and red above; lines around each block of them."""
    grid = values.reshape(values.shape[-2:]).numpy()
    axes.pcolormesh(grid, cmap="RdBu_r", vmin=-2.5, vmax=2.5, edgecolors="white", linewidth=0.4)
    for line in range(0, len(grid) + 1, block):
        axes.axhline(line, color="black", linewidth=0.8)
        axes.axvline(line, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_axis_off()


def sign(axes: Any, text: str, size: int = 18) -> None:
    """A sign between two pictures, such as a plus."""
    axes.text(0.5, 0.5, text, fontsize=size, ha="center", va="center")
    axes.set_axis_off()


def draw_candidate(path: Path) -> None:
    """A candidate is what stays of the base, and another band repeated: no inverse transform."""
    base, other = noise(0, SIDE), STRONGER * noise(1, SIDE >> LEVEL)
    residual = ops.split_low_band(base, LEVEL)[1]
    candidate = ops.merge_low_band(residual, other, LEVEL)
    block = 1 << LEVEL
    repeated = other.repeat_interleave(block, -1).repeat_interleave(block, -2) / block
    torch.testing.assert_close(candidate, residual + repeated)
    torch.testing.assert_close(ops.split_low_band(candidate, LEVEL)[0], other)

    figure = Figure(figsize=(10, 5), layout="constrained")
    rows = figure.subplots(2, 5, width_ratios=(3, 0.6, 3, 0.6, 3))
    show(rows[0, 0], base, "the base noise", block)
    sign(rows[0, 1], "=")
    show(rows[0, 2], residual, "what stays of it", block)
    sign(rows[0, 3], "+")
    show(rows[0, 4], base - residual, "its lowest band, repeated", block)
    show(rows[1, 0], candidate, "a candidate", block)
    sign(rows[1, 1], "=")
    show(rows[1, 2], residual, "the same", block)
    sign(rows[1, 3], "+")
    show(rows[1, 4], repeated, "another band, repeated", block)
    save(figure, path)


def draw_half_size(path: Path) -> None:
    """Half the size of a candidate is the candidate of half the size, with the same band one level up."""
    base, other = noise(0, SIDE), STRONGER * noise(1, SIDE >> LEVEL)
    candidate = ops.merge_low_band(ops.split_low_band(base, LEVEL)[1], other, LEVEL)
    half_of_candidate = ops.split_low_band(candidate, 1)[0]
    half_base = ops.split_low_band(base, 1)[0]
    candidate_of_half = ops.merge_low_band(ops.split_low_band(half_base, LEVEL - 1)[1], other, LEVEL - 1)
    torch.testing.assert_close(half_of_candidate, candidate_of_half)

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    rows = figure.subplots(2, 5, width_ratios=(3, 1.3, 3, 1.3, 3))
    show(rows[0, 0], base, "the base noise", 4)
    sign(rows[0, 1], "another band\nat level 2\n→", 9)
    show(rows[0, 2], candidate, "a candidate", 4)
    sign(rows[0, 3], "half the size\n→", 9)
    show(rows[0, 4], half_of_candidate, "its half", 2)
    show(rows[1, 0], base, "the base noise", 4)
    sign(rows[1, 1], "half the size\n→", 9)
    show(rows[1, 2], half_base, "the base's half", 2)
    sign(rows[1, 3], "the same band\nat level 1\n→", 9)
    show(rows[1, 4], candidate_of_half, "the same numbers", 2)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """As SVG, the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "ses_fast", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


DRAWINGS = {"candidate.svg": draw_candidate, "half-size.svg": draw_half_size}


def main(folder: Path = OUT) -> None:
    """Draws all of them into the folder."""
    for name, draw in DRAWINGS.items():
        draw(folder / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
