"""What the embedded model is worth to a search: `python -m bench.embedded [headroom] [bands] [search] [speed]`.

headroom: 50 noises for each held-out caption, no search. How often one noise is right by the oracle, how often one of
    24 is, how well each reward tells right from wrong images of one caption, what the best of 50 has over that of 10.
bands: 6 noises for each caption. How an image's reward goes with that of an image from the same low band of level 2
    and everything else drawn anew; from the same noise but for that band; and, at half the size, from the noise's LL1.
search: budget 50 for each caption: no search, the best of 50 random noises (those of the headroom), SES; and what SES
    has over the random noises, with 95 % intervals from resampled captions.
speed: one documented call of budget 50, with a thread for each core.

All at 8 steps and 256x256 pixels. Prints Markdown tables and writes their figures to
bench/results/<device>-<date>-embedded.json.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ses_fast
from bench.environment import environment
from bench.ops import result_path
from bench.table import lines_of
from ses_fast import embedded, ops, statistics
from ses_fast.rewards.pil import of_pil

STEPS = 8
SIZE, HALF, CHANNELS = 256, 128, 16  # pixels, the latents are an eighth; and their channels
NOISES = 50
FEWER = 24  # of them, for the best of 24
SAMPLE = 10  # what the best of all noises is compared with: the best of so few
RELATIVES = 6  # noises a caption in `bands`
LEVEL = 2  # its low band has a sixteenth of the numbers
BUDGET = 50
RANDOM = f"best of {BUDGET} random"
PARTS = ("headroom", "bands", "search", "speed")
# What each measure is to be: at least the first and at most the second number.
BARS: dict[str, tuple[float | None, float | None]] = {
    "one noise right": (0.05, 0.25),
    "best of 24 by the oracle": (0.60, None),
    "one noise right at 128 pixels": (0.15, None),
    "AUC of the reward within a caption": (0.85, None),
    "AUC of the held-out reward within a caption": (0.80, None),
    "best of 50 minus best of 10, in deviations within a caption": (0.35, None),
    "correlation, the same low band": (0.40, None),
    "correlation, the same low band, less twice the size of that of another one": (0.0, None),
    "rank correlation of half the size": (0.35, None),
    "seconds of a call of budget 50": (None, 15.0),
}


class Studio:
    """The pipeline and both rewards, loaded once in each process."""

    def __init__(self, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.pipe = ses_fast.enable(embedded.load_pipeline())
        self.reward, self.heldout = embedded.load_reward(), embedded.load_reward(heldout=True)

    def search(self, caption: str, seed: int, budget: int, on_preview=None, size: int = SIZE, **config) -> Image.Image:
        """One documented call; the SearchResult is at `self.pipe.ses_result`."""
        settings = ses_fast.SESConfig(batch_size=10, progress=False, on_preview=on_preview, **config)
        return self.pipe(
            caption,
            seed=seed,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            enable_ses=True,
            ses_reward_model=self.reward,
            ses_eval_budget=budget,
            ses_inference_steps=STEPS,
            ses_config=settings,
            progress_bar_cmd=lambda steps: steps,
        )

    def look(
        self,
        caption: str,
        noises: torch.Tensor,  # [n, 16, h, w]
    ) -> dict[str, list]:
        """Reward and oracle for the image of each noise."""
        seen: dict[str, list] = {"score": [], "right": []}
        for noise in noises:
            image = self.search(caption, 0, 1, size=8 * noise.shape[-1], latents=noise[None])
            seen["score"].append(self.reward(of_pil(image), caption).item())
            seen["right"].append(embedded.judge(image, caption)["all"])
        return seen


_studio: Studio | None = None


def _open_studio() -> None:
    global _studio
    _studio = Studio()


def headroom_of(job: tuple[int, str]) -> dict:
    """Oracle and both rewards for NOISES noises of one caption; the first is the seed's own."""
    assert _studio is not None
    seed, caption = job
    right: list[bool] = []
    held: list[float] = []

    def look(images: torch.Tensor, scores: torch.Tensor, generation: int, first: int) -> None:
        right.extend(embedded.judge(image, caption)["all"] for image in images)
        held.extend(_studio.heldout(images, caption).tolist())

    # One generation that replaces the whole latent is a set of independent noises.
    _studio.search(caption, seed, NOISES, look, popsize=NOISES, dwt_level=0)
    scores = [e.score for e in _studio.pipe.ses_result.trace]
    return {"caption": caption, "right": right, "score": scores, "heldout": held}


def bands_of(job: tuple[int, str]) -> dict:
    """Rewards of RELATIVES noises of one caption and of their relatives, and the oracle at half the size."""
    assert _studio is not None
    seed, caption = job
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    shape = (2, RELATIVES, CHANNELS, SIZE // 8, SIZE // 8)
    noises, others = torch.randn(shape, generator=generator)
    low, rest = ops.split_low_band(noises, LEVEL)
    other_low, other_rest = ops.split_low_band(others, LEVEL)
    half = _studio.look(caption, ops.split_low_band(noises, 1)[0])
    return {
        "caption": caption,
        "itself": _studio.look(caption, noises)["score"],
        "same low band": _studio.look(caption, ops.merge_low_band(other_rest, low, LEVEL))["score"],
        "another low band": _studio.look(caption, ops.merge_low_band(rest, other_low, LEVEL))["score"],
        "half": half["score"],
        "half right": half["right"],
    }


def search_of(job: tuple[int, str]) -> dict:
    """Reward, held-out reward and oracle for what SES finds for one caption."""
    assert _studio is not None
    seed, caption = job
    image = _studio.search(caption, seed, BUDGET)
    heldout = _studio.heldout(of_pil(image), caption).item()
    score, right = _studio.pipe.ses_result.score, embedded.judge(image, caption)["all"]
    return {"caption": caption, "score": score, "heldout": heldout, "right": right}


def auc_within(rows: list[dict], key: str) -> float:
    """The mean over captions of the chance that a right image outscores a wrong one of the same caption."""
    areas = []
    for row in rows:
        scores, right = np.array(row[key]), np.array(row["right"])
        if right.any() and not right.all():
            gap = scores[right][:, None] - scores[~right][None]
            areas.append(((gap > 0) + 0.5 * (gap == 0)).mean())
    return float(np.mean(areas)) if areas else 0.5  # nothing to tell apart


def gain_of_more(rows: list[dict]) -> float:
    """The best of all noises minus the mean best of SAMPLE of them, over the deviation, averaged over captions."""
    gains = []
    for row in rows:
        scores = np.array(row["score"])
        fewer = scores[: len(scores) // SAMPLE * SAMPLE].reshape(-1, SAMPLE).max(1).mean()
        gains.append((scores.max() - fewer) / max(scores.std(ddof=1), 1e-9))
    return float(np.mean(gains))


def correlation_within(rows: list[dict], one: str, other: str) -> float:
    """Pearson's, of all captions' scores together, each less its caption's mean."""
    return statistics.pooled_correlation(*([row[key] for row in rows] for key in (one, other))).value


def rank_correlation_within(rows: list[dict], one: str, other: str) -> float:
    """Spearman's, the mean over captions."""
    return float(np.mean([statistics.spearman(row[one], row[other]) for row in rows]))


def summarise_headroom(rows: list[dict]) -> dict[str, float]:
    """The figures of the table, each over all captions."""
    picked = [row["right"][int(np.argmax(row["score"][:FEWER]))] for row in rows]
    return {
        "one noise right": float(np.mean([row["right"] for row in rows])),
        f"best of {FEWER} by the oracle": float(np.mean([any(row["right"][:FEWER]) for row in rows])),
        f"best of {FEWER} by the reward": float(np.mean(picked)),
        f"best of {NOISES} by the oracle": float(np.mean([any(row["right"]) for row in rows])),
        "AUC of the reward within a caption": auc_within(rows, "score"),
        "AUC of the held-out reward within a caption": auc_within(rows, "heldout"),
        f"best of {NOISES} minus best of {SAMPLE}, in deviations within a caption": gain_of_more(rows),
        "deviation of the reward within a caption": float(np.mean([np.std(row["score"], ddof=1) for row in rows])),
    }


def summarise_bands(rows: list[dict]) -> dict[str, float]:
    """Whether the low band decides, and whether half the size shows it."""
    same, another = (correlation_within(rows, "itself", key) for key in ("same low band", "another low band"))
    return {
        f"one noise right at {HALF} pixels": float(np.mean([row["half right"] for row in rows])),
        "correlation, the same low band": same,
        "correlation, another low band": another,
        # Of its size: a correlation below 0 is no reason to call the other one large.
        "correlation, the same low band, less twice the size of that of another one": same - 2 * abs(another),
        "rank correlation of half the size": rank_correlation_within(rows, "itself", "half"),
    }


def summarise_search(headroom: list[dict], searched: list[dict]) -> dict[str, dict[str, Any]]:
    """For each way of choosing the noise: mean reward, mean held-out reward, accuracy, captions raised. And what SES
    has over the best random noise: (value, low, high) each.
    """

    def chosen(row: dict, index: int) -> dict:
        return {key: row[key][index] for key in ("score", "heldout", "right")}

    base = [chosen(row, 0) for row in headroom]
    best = [chosen(row, int(np.argmax(row["score"][:BUDGET]))) for row in headroom]
    return {
        name: {
            "reward": float(np.mean([row["score"] for row in rows])),
            "held-out reward": float(np.mean([row["heldout"] for row in rows])),
            "all facts right": float(np.mean([row["right"] for row in rows])),
            "reward raised": float(np.mean([a["score"] > b["score"] for a, b in zip(rows, base, strict=True)])),
        }
        for name, rows in {"no search": base, RANDOM: best, "SES": searched}.items()
    } | {f"SES less the {RANDOM}": _less(searched, best)}


def _less(rows: list[dict], others: list[dict]) -> dict[str, tuple[float, float, float]]:
    """The mean of the captions' differences, with its bootstrap interval."""
    names = {"score": "reward", "heldout": "held-out reward", "right": "all facts right"}
    return {
        name: tuple(statistics.mean_of([float(a[key]) - float(b[key]) for a, b in zip(rows, others, strict=True)]))
        for key, name in names.items()
    }


def measure_speed(caption: str) -> dict[str, float]:
    """Seconds of the documented call, the second one of two, with a thread for each core."""
    studio = Studio(os.cpu_count() or 1)
    for _ in range(2):
        begin = time.perf_counter()
        studio.search(caption, 0, BUDGET)
        seconds = time.perf_counter() - begin
    return {f"seconds of a call of budget {BUDGET}": seconds}


def bars_table(figures: dict) -> str:
    """What the noise alone is worth, beside what was asked for."""
    found = {name: value for part in PARTS if part != "search" for name, value in figures.get(part, {}).items()}
    rows = []
    for name, value in found.items():
        least, most = BARS.get(name, (None, None))
        met = (least is None or value >= least) and (most is None or value <= most)
        limits = {"at least": least, "at most": most}
        words = [f"{which} {limit:g}" for which, limit in limits.items() if limit is not None]
        rows.append([name, f"{value:.3f}", ", ".join(words), "" if not words else "yes" if met else "no"])
    return "\n".join(lines_of(("measure", "value", "bar", "met"), rows))


def search_table(figures: dict) -> str:
    """What a search is worth."""
    columns = list(figures["search"]["SES"])

    def cell(value: float | list[float] | None) -> str:
        if isinstance(value, Sequence):
            return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*value)
        return "" if value is None else f"{value:.3f}"

    rows = [[name, *(cell(way.get(column)) for column in columns)] for name, way in figures["search"].items()]
    return "\n".join(lines_of(("noise", *columns), rows))


def to_markdown(figures: dict) -> str:
    """The tables of embedded/README.md."""
    tables = [bars_table(figures)] if figures.keys() & {"headroom", "bands", "speed"} else []
    return "\n\n".join(tables + ([search_table(figures)] if "search" in figures else []))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all when none is named; search measures the headroom too")
    parser.add_argument("--captions", type=int, default=200, help="how many of the held-out captions")
    parser.add_argument("--skip", type=int, default=0, help="how many of them to leave out first")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts = set(arguments.parts or PARTS)
    jobs = list(enumerate(embedded.captions()))[arguments.skip :][: arguments.captions]
    figures: dict = {"environment": environment(), "captions": len(jobs), "steps": STEPS, "size": SIZE}
    figures["weights"] = embedded.weights_digest()
    begin = time.perf_counter()
    if "speed" in parts:
        figures["speed"] = measure_speed(jobs[0][1])
    with ProcessPoolExecutor(arguments.workers, initializer=_open_studio) as pool:

        def each(part: str, measure: Callable[[tuple[int, str]], dict]) -> list[dict]:
            return list(tqdm(pool.map(measure, jobs), total=len(jobs), mininterval=5, desc=part))

        if parts & {"headroom", "search"}:
            headroom = each("headroom", headroom_of)
            figures["headroom"] = summarise_headroom(headroom)
        if "bands" in parts:
            figures["bands"] = summarise_bands(each("bands", bands_of))
        if "search" in parts:
            figures["search"] = summarise_search(headroom, each("search", search_of))
    figures["seconds"] = time.perf_counter() - begin
    out = arguments.out or result_path(figures["environment"], "-embedded")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(to_markdown(figures))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
