"""What the embedded model draws, on one sheet: `python -m bench.sheet [--out docs/embedded.png]`."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from ses_fast import embedded

COLUMNS, ROWS = 6, 2
STEPS = 8


def draw_sheet(path: Path) -> None:
    """One noise for each of the first held-out captions, with the oracle's word."""
    pipe = embedded.load_pipeline()
    figure = Figure(figsize=(2.2 * COLUMNS, 2.5 * ROWS), dpi=80, layout="constrained")
    for seed, (caption, axes) in enumerate(
        zip(embedded.captions()[: COLUMNS * ROWS], figure.subplots(ROWS, COLUMNS).flat, strict=True)
    ):
        image = pipe(caption, seed=seed, num_inference_steps=STEPS, progress_bar_cmd=lambda steps: steps)
        first, last = caption.split(maxsplit=3)[:3], caption.split(maxsplit=3)[3]
        verdict = "right" if embedded.judge(image, caption)["all"] else "wrong"
        axes.imshow(image)
        axes.set_title(f"{' '.join(first)}\n{last}\n{verdict}", fontsize=8)
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/embedded.png"))
    draw_sheet(parser.parse_args().out)


if __name__ == "__main__":
    main()
