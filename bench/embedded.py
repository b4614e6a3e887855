"""What search gains on the embedded model: `python -m bench.embedded [headroom] [search]`.

headroom: 24 noises for each held-out caption, no search. How often one noise is right, how often one of 24 is (by the
    oracle, by the reward's choice), and how well each reward tells right from wrong images of one caption.
search: budget 50 for each held-out caption: no search, the best of 50 random noises, SES.

Prints Markdown tables and writes their figures to bench/results/<device>-<date>-embedded.json.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ses_fast
from bench.environment import environment
from bench.ops import result_path
from bench.table import lines_of
from ses_fast import embedded

STEPS = 8
NOISES = 24
BUDGET = 50
SEARCHES = {
    # One generation that replaces the whole latent is a set of independent noises.
    f"best of {BUDGET} random": {"popsize": BUDGET, "dwt_level": 0},
    "SES": {},
}


class Studio:
    """The pipeline and both rewards, loaded once in each worker process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pipe = ses_fast.enable(embedded.load_pipeline())
        self.reward, self.heldout = embedded.load_reward(), embedded.load_reward(heldout=True)

    def search(self, caption: str, seed: int, budget: int, on_preview=None, **config) -> Image.Image:
        """One documented call; the SearchResult is at `self.pipe.ses_result`."""
        settings = ses_fast.SESConfig(batch_size=10, progress=False, on_preview=on_preview, **config)
        return self.pipe(
            caption,
            seed=seed,
            num_inference_steps=STEPS,
            enable_ses=True,
            ses_reward_model=self.reward,
            ses_eval_budget=budget,
            ses_inference_steps=STEPS,
            ses_config=settings,
            progress_bar_cmd=lambda steps: steps,
        )


_studio: Studio | None = None


def _open_studio() -> None:
    global _studio
    _studio = Studio()


def headroom_of(job: tuple[int, str]) -> dict:
    """Oracle and both rewards for NOISES noises of one caption."""
    assert _studio is not None
    seed, caption = job
    right: list[bool] = []
    held: list[float] = []

    def look(images: torch.Tensor, scores: torch.Tensor, generation: int, first: int) -> None:
        right.extend(embedded.judge(image, caption)["all"] for image in images)
        held.extend(_studio.heldout(images, caption).tolist())

    _studio.search(caption, seed, NOISES, look, popsize=NOISES, dwt_level=0)
    scores = [e.score for e in _studio.pipe.ses_result.trace]
    return {"caption": caption, "right": right, "score": scores, "heldout": held}


def search_of(job: tuple[int, str]) -> dict:
    """Reward, held-out reward and oracle for one caption: without search, and for each of SEARCHES."""
    assert _studio is not None
    seed, caption = job

    def facts(image: Image.Image, score: float) -> dict:
        # Half a level up, so that the reward's truncation gives back the very levels of the picture.
        tensor = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] + 0.5) / 127.5 - 1
        return {
            "score": score,
            "heldout": _studio.heldout(tensor, caption).item(),
            "right": embedded.judge(image, caption)["all"],
        }

    base = _studio.search(caption, seed, 1)
    row = {"caption": caption, "no search": facts(base, _studio.pipe.ses_result.score)}
    for name, config in SEARCHES.items():
        image = _studio.search(caption, seed, BUDGET, **config)
        row[name] = facts(image, _studio.pipe.ses_result.score)
    return row


def auc_within(rows: list[dict], key: str) -> float:
    """The mean over captions of the chance that a right image outscores a wrong one of the same caption."""
    areas = []
    for row in rows:
        scores, right = np.array(row[key]), np.array(row["right"])
        if right.any() and not right.all():
            gap = scores[right][:, None] - scores[~right][None]
            areas.append(((gap > 0) + 0.5 * (gap == 0)).mean())
    return float(np.mean(areas)) if areas else 0.5  # nothing to tell apart


def summarise_headroom(rows: list[dict]) -> dict[str, float]:
    """The figures of the table, each over all captions."""
    first = [row["right"][0] for row in rows]
    picked = [row["right"][int(np.argmax(row["score"]))] for row in rows]
    return {
        "one noise right": float(np.mean(first)),
        f"{NOISES} noises, right on the mean": float(np.mean([right for row in rows for right in row["right"]])),
        f"best of {NOISES} by the oracle": float(np.mean([any(row["right"]) for row in rows])),
        f"best of {NOISES} by the reward": float(np.mean(picked)),
        "AUC of the reward within a caption": auc_within(rows, "score"),
        "AUC of the held-out reward within a caption": auc_within(rows, "heldout"),
    }


def summarise_search(rows: list[dict]) -> dict[str, dict[str, float]]:
    """For each way of choosing the noise: mean reward, mean held-out reward, accuracy, and captions raised."""
    table = {}
    for name in ("no search", *SEARCHES):
        ways = [row[name] for row in rows]
        table[name] = {
            "reward": float(np.mean([way["score"] for way in ways])),
            "held-out reward": float(np.mean([way["heldout"] for way in ways])),
            "all facts right": float(np.mean([way["right"] for way in ways])),
            "reward raised": float(np.mean([row[name]["score"] > row["no search"]["score"] for row in rows])),
        }
    return table


def headroom_table(figures: dict) -> str:
    """What the noise alone is worth."""
    return "\n".join(lines_of(("measure", "value"), [[k, f"{v:.3f}"] for k, v in figures["headroom"].items()]))


def search_table(figures: dict) -> str:
    """What a search is worth."""
    columns = list(figures["search"]["SES"])
    rows = [[name, *(f"{way[column]:.3f}" for column in columns)] for name, way in figures["search"].items()]
    return "\n".join(lines_of(("noise", *columns), rows))


def to_markdown(figures: dict) -> str:
    """The tables of embedded/README.md."""
    tables = {"headroom": headroom_table, "search": search_table}
    return "\n\n".join(make(figures) for name, make in tables.items() if name in figures)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="both when none is named")
    parser.add_argument("--captions", type=int, default=200, help="how many of the held-out captions")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {"headroom", "search"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are headroom and search")
    jobs = list(enumerate(embedded.captions()[: arguments.captions]))
    figures: dict = {"environment": environment(), "captions": len(jobs), "steps": STEPS}
    begin = time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, initializer=_open_studio) as pool:
        show = partial(tqdm, total=len(jobs), mininterval=5)
        if not arguments.parts or "headroom" in arguments.parts:
            figures["headroom"] = summarise_headroom(list(show(pool.map(headroom_of, jobs), desc="headroom")))
        if not arguments.parts or "search" in arguments.parts:
            figures["search"] = summarise_search(list(show(pool.map(search_of, jobs), desc="search")))
    figures["seconds"] = time.perf_counter() - begin
    print(to_markdown(figures))
    out = arguments.out or result_path(figures["environment"], "-embedded")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
