"""Whole searches, the documented flow against ses_fast: `python -m bench.end_to_end [model ...]`.

Both in one process on the same models, with the same draws, in turns; medians. Before any timing the two must have
given the same candidates, images and scores. A model is one line of MODELS, a way to search one line of ROWS; one that
fails is named and left out, the others go on.
Times with --threads CPU threads; on a GPU the clock is read when it has done its work.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ses_fast
from bench.baseline import Flow
from bench.clip import CLIPScore, PILProcessor, check_scores, clip_h, clip_tokenizer
from bench.environment import clock, environment
from bench.families import FAMILIES, build
from bench.floor import Rates, Work, family_stages, measured
from bench.table import bar, lines_of
from ses_fast import embedded
from ses_fast.rewards.clip import CLIPReward

PROMPT = "two red squares left of three blue rings"
SEED, DRAWS = 0, 7  # of the base noise, of the search
POPSIZE, ELITES = 10, 5
CANDIDATES_APART = 5e-6  # the contract's
# On the mean over an image, of 255 grey levels. In bf16 one bit of one candidate's value, which either side may round
# its own way, has moved an image of the embedded model by 1.8 (and its score by 1.3), compiling by 0.7 (1.7); the
# images of its two most alike candidates are 8.6 apart.
IMAGES_APART = {torch.float32: 0.01, torch.bfloat16: 4.0}
MEMORY_BAR = 1.05  # at most, of the plain call with the reward in memory


@dataclass(frozen=True)
class Model:
    """What is searched, and how long."""

    call: dict[str, Any]  # the pipeline's arguments; previews take as many steps as the image
    level: int
    budget: int = 50
    batch_size: int = 10  # previews that ses_fast denoises together
    rounds: int = 5
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """A way to search; None stands for the documented flow."""

    what: str
    enable: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None  # of a preview; None: as many as the image
    same: bool = True  # the previews are the documented flow's, so the scores must be its scores


# A search of one generation on a GPU: every candidate costs the same, and all models fit into ten minutes.
_GPU: dict[str, Any] = {"level": 4, "budget": POPSIZE, "batch_size": 1, "rounds": 3}
MODELS = {
    "embedded": Model({"num_inference_steps": 8}, level=2, device="cpu", dtype=torch.float32),
    "flux.2-klein-4b": Model(FAMILIES["flux.2-klein-4b"].call, **_GPU),
    "z-image-turbo": Model(FAMILIES["z-image-turbo"].call, **_GPU),
    "flux.1-dev": Model(FAMILIES["flux.1-dev"].call | {"num_inference_steps": 10}, **_GPU),
}
ROWS = {
    "eager": Row("same candidates, same steps"),
    "compile": Row("the same, compiled", enable={"compile": True}),
}


class Contest:
    """One model, loaded once, and both ways to search with it."""

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model = name, model
        if name == "embedded":
            self.pipe = embedded.load_pipeline(model.device, model.dtype)
            self.reward = embedded.load_reward(device=model.device, dtype=model.dtype)
            image_processor = PILProcessor.from_pretrained(embedded.WEIGHTS / "reward")
        else:
            self.pipe = build(FAMILIES[name], model.device, model.dtype)
            clip = clip_h(model.device, model.dtype)
            self.reward = CLIPReward(clip, clip_tokenizer(), device=model.device, dtype=model.dtype)
            image_processor = PILProcessor()
        self.changed: dict[str, Any] = {}  # a pipeline of its own for each row whose `enable` changes the models
        self.score = CLIPScore(self.reward.model, self.reward.tokenizer, image_processor, PROMPT)

    def baseline(self, budget: int, keep: bool = False) -> tuple[Flow, dict[str, float]]:
        """The flow with its scores (and candidates), and seconds by stage."""
        ses_fast.disable(self.pipe)
        begin = clock(self.model.device)
        flow = Flow(self.pipe, PROMPT, seed=SEED, progress_bar_cmd=list, **self.model.call)
        flow.candidates = [] if keep else None
        torch.manual_seed(DRAWS)
        flow.final(flow.search(self.score, budget, POPSIZE, ELITES, self.model.level))
        return flow, {**flow.seconds, "total": clock(self.model.device) - begin}

    def ours(self, row: Row, budget: int, reward: Callable | None = None, **config: Any) -> Any:
        """The SearchResult of one documented call."""
        pipe = self.pipe
        if row.enable:  # compiled blocks would be the baseline's too
            if row.what not in self.changed:
                self.changed[row.what] = copy.deepcopy(ses_fast.disable(self.pipe))
            pipe = self.changed[row.what]
        ses_fast.enable(pipe, **row.enable)
        settings = {"batch_size": self.model.batch_size, **row.config, **config}
        pipe(
            PROMPT,
            seed=SEED,
            progress_bar_cmd=list,
            enable_ses=True,
            ses_reward_model=reward or self.reward,
            ses_eval_budget=budget,
            ses_inference_steps=row.steps or self.model.call["num_inference_steps"],
            ses_config=ses_fast.SESConfig(
                popsize=POPSIZE,
                k_elites=ELITES,
                dwt_level=self.model.level,
                include_base=False,
                generator=torch.Generator().manual_seed(DRAWS),
                progress=False,
                **settings,
            ),
            **self.model.call,
        )
        return pipe.ses_result

    def check(self, rows: dict[str, Row]) -> tuple[dict[str, Any], dict[str, str]]:
        """How far each row's images and scores are from the baseline's, and why others must not be timed.

        Raises AssertionError where the candidates are not the baseline's. Two generations. The search is told the
        baseline's scores, so that rounding cannot change which are the elites.
        """
        budget = POPSIZE + 1
        flow, _ = self.baseline(budget, keep=True)
        assert flow.candidates is not None
        found: list[Tensor] = []

        def replay(candidate: Tensor) -> float:
            found.append(candidate.clone())
            return flow.scores[len(found) - 1]

        ses_fast.evolve(
            flow.base,
            replay,
            budget,
            POPSIZE,
            ELITES,
            dwt_level=self.model.level,
            generator=torch.Generator().manual_seed(DRAWS),
            progress=False,
        )
        # In a narrower dtype the last bit of fp32 may decide which way a value is rounded.
        step = torch.finfo(flow.base.dtype).eps
        for ours, theirs in zip(found, flow.candidates, strict=True):
            torch.testing.assert_close(ours, theirs, atol=CANDIDATES_APART, rtol=step)
        apart: dict[str, Any] = {"spread": max(flow.scores) - min(flow.scores)}
        failed: dict[str, str] = {}
        for name, row in rows.items():
            with noted(failed, name):
                apart[name] = self.compare(row, flow, name) if row.same else None
        return apart, failed

    def compare(self, row: Row, flow: Flow, name: str) -> dict[str, float]:
        """The largest differences of a row's images and scores; AssertionError where they are beyond rounding."""
        scored: list[float] = []
        images: list[float] = []
        told = torch.tensor(flow.scores)

        def both(pictures: Tensor, prompt: str) -> Tensor:
            first = len(scored)
            scored.extend(self.reward(pictures, prompt).tolist())
            images.extend(grey_apart(a, b) for a, b in zip(pictures, flow.images[first:], strict=False))
            return told[first : len(scored)]

        self.ours(row, len(flow.scores), both)
        limit = IMAGES_APART[self.model.dtype]
        assert max(images) <= limit, f"{name}: images differ by {max(images)} grey levels, more than {limit}: no times"
        return {"images": max(images), "scores": check_scores(scored, flow.scores, self.model.dtype, name)}

    def race(self, rows: dict[str, Row], rounds: int, failed: dict[str, str]) -> dict[str, list[dict[str, float]]]:
        """Seconds by stage of each round, the baseline and each row in turns; one that fails is noted and left out."""
        times: dict[str, list[dict[str, float]]] = {name: [] for name in ("baseline", *rows)}
        for _ in range(rounds):
            flow, seconds = self.baseline(self.model.budget)
            times["baseline"].append(seconds)
            for name, row in rows.items():
                if name in failed:
                    continue
                with noted(failed, name):
                    result = self.ours(row, self.model.budget)
                    if row.same and self.model.dtype == torch.float32:  # elsewhere rounding may choose other elites
                        scores = [each.score for each in result.trace]
                        check_scores(scores, flow.scores, self.model.dtype, name)
                    times[name].append(dict(result.seconds))
        return {name: each for name, each in times.items() if name not in failed}

    def together(self) -> dict[str, float]:
        """How far two previews made together are from the same made alone, in grey levels: on the mean, and at most."""
        images: dict[int, list[Tensor]] = {1: [], 2: []}
        for batch, kept in images.items():

            def keep(pictures: Tensor, prompt: str, kept: list[Tensor] = kept) -> Tensor:
                kept.extend(pictures.float().cpu())
                return torch.arange(len(kept) - len(pictures), len(kept), dtype=torch.float32)  # any, not alike

            self.ours(ROWS["eager"], 2, keep, batch_size=batch)
        apart = (127.5 * (torch.stack(images[2]) - torch.stack(images[1]))).abs()
        limit = IMAGES_APART[self.model.dtype]
        return {"mean": apart.mean().item(), "largest": apart.max().item(), "limit": limit}

    def memory(self) -> float | None:
        """The peak of a search, one preview at a time, over that of the plain call with the reward in memory."""
        if torch.device(self.model.device).type != "cuda":
            return None
        peaks = []
        for search in (False, True):
            ses_fast.disable(self.pipe)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if search:
                self.ours(ROWS["eager"], 2, batch_size=1)
            else:
                self.pipe(PROMPT, seed=SEED, progress_bar_cmd=list, **self.model.call)
            peaks.append(torch.cuda.max_memory_allocated())
        return peaks[1] / peaks[0]


def grey_apart(image: Tensor, picture: Image.Image) -> float:
    """The mean difference of a preview (3, H, W) in [-1, 1], cut to grey levels as the pipelines do, and a picture."""
    levels = ((image + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(1, 2, 0).float().cpu()
    return (levels - torch.from_numpy(np.array(picture)).float()).abs().mean().item()


@contextmanager
def noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """Whatever fails inside is printed, and named in `failed`."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failed[name] = str(error).strip().partition("\n")[0] or type(error).__name__


def least(
    works: dict[str, Work], model: Model, rates: Rates, batch: int = 1, steps: int | None = None
) -> dict[str, float]:
    """Seconds that the search, its previews of `steps`, and its final image take at least, by stage."""
    floor = {stage: model.budget * work.seconds(rates, batch) for stage, work in works.items()}
    floor["denoise"] *= (steps or model.call["num_inference_steps"]) / model.call["num_inference_steps"]
    floor["final"] = works["denoise"].seconds(rates) + works["decode"].seconds(rates)
    return {**floor, "total": sum(floor.values())}


def summarise(times: list[dict[str, float]], floor: dict[str, float], own: dict[str, float]) -> dict[str, Any]:
    """Medians by stage; overhead is the share of all that is not denoise, decode, reward or final image."""
    median = {stage: statistics.median(each[stage] for each in times) for stage in times[0]}
    work = ("denoise", "decode", "reward", "final")
    return {
        "seconds": median,
        "all": [each["total"] for each in times],
        "overhead": statistics.median(1 - sum(each[stage] for stage in work) / each["total"] for each in times),
        "x floor": median["total"] / floor["total"],
        "x floor, attention at its own rate": median["total"] / own["total"],
    }


def measure(name: str, model: Model, rows: dict[str, Row]) -> dict[str, Any]:
    """The figures of one model; raises AssertionError, before any timing, where no row's results are the baseline's."""
    contest = Contest(name, model)
    memory = contest.memory()  # before the rows have pipelines of their own
    apart, failed = contest.check(rows)
    together: dict[str, float] | None = None
    with noted(failed, "2 together"):
        together = contest.together()
    if all(way in failed for way in rows):
        raise AssertionError("; ".join(failed.values()))
    sizes = ("height", "width", "num_inference_steps")
    works = family_stages(name, **{key: value for key, value in model.call.items() if key in sizes})
    rates = measured(model.device)
    plain = Rates(rates.matrix, rates.memory)
    times = contest.race(rows, model.rounds, failed)
    figures: dict[str, Any] = {"budget": model.budget, "steps": model.call["num_inference_steps"], "rows": {}}
    for way, each in times.items():
        row = rows.get(way, Row("", config={"batch_size": 1}))  # the baseline's previews go one by one
        batch = row.config.get("batch_size", model.batch_size)
        floors = [least(works, model, rate, batch, row.steps) for rate in (plain, rates)]
        figures["rows"][way] = summarise(each, *floors) | {"batch": batch, "floor": floors[0]}
        if way != "baseline":
            ratios = [a["total"] / b["total"] for a, b in zip(times["baseline"], each, strict=True)]
            figures["rows"][way] |= {"x baseline": statistics.median(ratios), "x baseline, all": ratios}
    return figures | {
        "apart": apart,
        "together": together,
        "rates": vars(rates),
        "attention": attention_backend(),
        "memory": memory,
        "failed": failed,
    }


def attention_backend() -> str:
    """What DiffSynth takes for attention."""
    from diffsynth.core.attention import attention

    return attention.ATTENTION_IMPLEMENTATION


COLUMNS = ("model", "search", "batch", "s", "x faster", "denoise s", "decode s", "reward s", "final s")
NOTES = (
    "x floor: over the least time at this machine's own matrix and memory rates; in brackets with attention at its own "
    "measured rate. For the documented flow it bounds what any search with the same candidates can gain here. "
    "Overhead: all that is not denoising, decoding, reward or final image; the reward's own preprocessing is in reward."
)


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result file."""
    rows = []
    for name, figures in result["models"].items():
        for way, row in figures["rows"].items():
            what = "documented flow" if way == "baseline" else ROWS[way].what
            faster = "1" if way == "baseline" else f"{row['x baseline']:.2f}"
            cells = [f"{name}, budget {figures['budget']}, {figures['steps']} steps", what, str(row["batch"])]
            seconds = [f"{row['seconds'][stage]:.2f}" for stage in ("total", "denoise", "decode", "reward", "final")]
            floor = f"{row['x floor']:.2f} ({row['x floor, attention at its own rate']:.2f})"
            rows.append([*cells, seconds[0], faster, *seconds[1:], f"{row['overhead']:.1%}", floor])
    lines = [*lines_of((*COLUMNS, "overhead", "x floor"), rows), "", NOTES, ""]
    for name, figures in result["models"].items():
        lines.append(f"- {name}: {'; '.join(_facts(figures))}.")
    for name in result["asked"]["models"]:
        figures = result["models"].get(name, {"rows": {}, "failed": {}})
        for way in result["asked"]["rows"]:
            if way not in figures["rows"]:
                why = figures["failed"].get(way) or result["failed"].get(name)
                lines.append(f"- not measured: {name}, {ROWS[way].what}" + (f" (FAILED: {why})" if why else ""))
        lines += [f"- FAILED: {name}, {what}: {why}" for what, why in figures["failed"].items() if what not in ROWS]
    return "\n".join(lines)


def _facts(figures: dict[str, Any]) -> list[str]:
    rates, memory, together = figures["rates"], figures["memory"], figures["together"]
    facts = [
        f"attention by {figures['attention']}; {rates['matrix'] / 1e12:.3g} TFLOP/s, attention "
        f"{rates['attention'] / 1e12:.3g}, {rates['memory'] / 1e12:.3g} TB/s"
    ]
    for way in figures["rows"]:
        if apart := figures["apart"].get(way):
            facts.append(
                f"{ROWS[way].what}: scores apart by at most {apart['scores']:.2g} (they spread by "
                f"{figures['apart']['spread']:.2g}), images by {apart['images']:.2g} of 255 on the mean"
            )
    if together:
        most = bar(f"at most {together['limit']:g}", together["mean"] <= together["limit"])
        facts.append(
            f"two previews together against alone: {together['mean']:.2g} of 255 on the mean ({most}), "
            f"{together['largest']:.3g} at one place"
        )
    words = bar(f"at most {MEMORY_BAR}", memory is None or memory <= MEMORY_BAR)
    facts.append(f"peak memory: {memory:.3f} of the plain call's ({words})" if memory else "peak memory: not measured")
    return facts


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [name for name, model in MODELS.items() if model.device == "cpu" or torch.cuda.is_available()]
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; those that this machine can run when none")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}; all when none")
    parser.add_argument("--rounds", type=int, help="instead of the model's own")
    parser.add_argument("--budget", type=int, help="instead of the model's own")
    parser.add_argument("--batch", type=int, help="previews together, instead of the model's own")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    for given, known in ((arguments.models, MODELS), (arguments.rows, ROWS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    torch.set_num_threads(arguments.threads)
    changes = {"rounds": arguments.rounds, "budget": arguments.budget, "batch_size": arguments.batch}
    changes = {key: value for key, value in changes.items() if value is not None}
    names = arguments.models or here
    device = "cuda" if any(MODELS[name].device == "cuda" for name in names) else "cpu"
    result: dict[str, Any] = {"environment": environment(device), "threads": arguments.threads}
    result |= {"asked": {"models": names, "rows": arguments.rows}, "models": {}, "failed": {}}
    for name in names:
        print(f"{name} ...", flush=True)
        with noted(result["failed"], name):
            model = replace(MODELS[name], **changes)
            result["models"][name] = measure(name, model, {way: ROWS[way] for way in arguments.rows})
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.out:  # what is measured stays, whatever becomes of the next
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(result))
    sys.exit(bool(result["failed"] or any(figures["failed"] for figures in result["models"].values())))


if __name__ == "__main__":
    main()
