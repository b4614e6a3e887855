"""Whole searches, the documented flow against ses_fast: `python -m bench.end_to_end [model ...]`.

Both in one process on the same models, with the same draws, in turns; medians. Before any timing the two must have
given the same candidates and the same scores. A model is one line of MODELS, a way to search one line of ROWS.
Times with --threads CPU threads; on a GPU the clock is read when it has done its work.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ses_fast
from bench.baseline import CLIPScore, Flow, clock
from bench.environment import environment
from bench.families import FAMILIES, build, clip_h, clip_tokenizer
from bench.floor import Rates, Work, family_stages, measured
from ses_fast import embedded
from ses_fast.rewards.clip import CLIPReward

PROMPT = "two red squares left of three blue rings"
SEED, DRAWS = 0, 7  # of the base noise, of the search
POPSIZE, ELITES = 10, 5
# Of candidates: the contract's. Of scores, 100 x the cosine: a candidate that differs by the last bits moves a few of
# the image's pixels by one grey level; in bf16 the models' own rounding is larger than that.
TOLERANCE = {"candidate": 5e-6, torch.float32: 0.01, torch.bfloat16: 0.5}


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


# A search of one generation on a GPU: every candidate costs the same, and all models fit into ten minutes.
_GPU: dict[str, Any] = {"level": 4, "budget": POPSIZE, "batch_size": 1, "rounds": 3}
MODELS = {
    "embedded": Model({"num_inference_steps": 8}, level=1, device="cpu", dtype=torch.float32),
    "flux.2-klein-4b": Model(FAMILIES["flux.2-klein-4b"].call, **_GPU),
    "z-image-turbo": Model(FAMILIES["z-image-turbo"].call, **_GPU),
    "flux.1-dev": Model(FAMILIES["flux.1-dev"].call | {"num_inference_steps": 10}, **_GPU),
}
ROWS = {
    "eager": Row("(a) same candidates, same fidelity"),
    "compile": Row("(b) the same, compiled", enable={"compile": True}),
}


class Contest:
    """One model, loaded once, and both ways to search with it."""

    def __init__(self, name: str, model: Model) -> None:
        import transformers

        # transformers 5.4 gave the name of the processor that goes through PIL to torchvision's.
        pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        self.name, self.model = name, model
        if name == "embedded":
            self.pipe = embedded.load_pipeline(model.device, model.dtype)
            self.reward = embedded.load_reward(device=model.device, dtype=model.dtype)
            image_processor = pil.from_pretrained(embedded.WEIGHTS / "reward")
        else:
            self.pipe = build(FAMILIES[name], model.device, model.dtype)
            clip = clip_h(model.device, model.dtype)
            self.reward = CLIPReward(clip, clip_tokenizer(), device=model.device, dtype=model.dtype)
            image_processor = pil()
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
            ses_inference_steps=self.model.call["num_inference_steps"],
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

    def check(self, rows: dict[str, Row]) -> dict[str, float]:
        """Raises AssertionError where a row's candidates or scores are not the baseline's; says how far apart they are.

        Two generations. The search is told the baseline's scores, so that rounding cannot change which are the elites.
        """
        budget = POPSIZE + 1
        flow, _ = self.baseline(budget, keep=True)
        assert flow.candidates is not None
        told = torch.tensor(flow.scores)
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
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE["candidate"], rtol=step)
        apart = {"spread": (told.max() - told.min()).item()}
        for name, row in rows.items():
            scored: list[float] = []

            def both(images: Tensor, prompt: str, scored: list[float] = scored) -> Tensor:
                scored.extend(self.reward(images, prompt).tolist())
                return told[len(scored) - len(images) : len(scored)]

            self.ours(row, budget, both)
            apart[name] = self.same(scored, flow.scores, name)
        return apart

    def same(self, ours: list[float], theirs: list[float], name: str) -> float:
        """The largest difference of two lists of scores. Raises AssertionError where it is beyond rounding."""
        assert len(ours) == len(theirs), f"{self.name}, {name}: {len(ours)} scores against {len(theirs)}"
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        limit = TOLERANCE[self.model.dtype]
        assert largest <= limit, f"{self.name}, {name}: scores differ by {largest}, more than {limit}: no times"
        return largest

    def race(self, rows: dict[str, Row], rounds: int) -> dict[str, list[dict[str, float]]]:
        """Seconds by stage of each round, the baseline and each row in turns."""
        times: dict[str, list[dict[str, float]]] = {name: [] for name in ("baseline", *rows)}
        for _ in range(rounds):
            flow, seconds = self.baseline(self.model.budget)
            times["baseline"].append(seconds)
            for name, row in rows.items():
                result = self.ours(row, self.model.budget)
                if self.model.dtype == torch.float32:  # elsewhere rounding may choose other elites
                    self.same([each.score for each in result.trace], flow.scores, name)
                times[name].append(dict(result.seconds))
        return times

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


def least(works: dict[str, Work], model: Model, rates: Rates, batch: int) -> dict[str, float]:
    """Seconds that the search and its final image take at least, by stage."""
    floor = {stage: model.budget * work.seconds(rates, batch) for stage, work in works.items()}
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
    """The figures of one model; raises AssertionError, before any timing, where the results differ."""
    contest = Contest(name, model)
    memory = contest.memory()  # before the rows have pipelines of their own
    apart = contest.check(rows)
    sizes = ("height", "width", "num_inference_steps")
    works = family_stages(name, **{key: value for key, value in model.call.items() if key in sizes})
    rates = measured(model.device)
    plain = Rates(rates.matrix, rates.memory)
    times = contest.race(rows, model.rounds)
    figures: dict[str, Any] = {"budget": model.budget, "steps": model.call["num_inference_steps"], "rows": {}}
    for way, each in times.items():
        batch = 1 if way == "baseline" else rows[way].config.get("batch_size", model.batch_size)
        floors = [least(works, model, rate, batch) for rate in (plain, rates)]
        figures["rows"][way] = summarise(each, *floors) | {"batch": batch, "floor": floors[0]}
    pairs = zip(times["baseline"], *(times[way] for way in rows), strict=True)
    ratios = [[pair[0]["total"] / each["total"] for each in pair[1:]] for pair in pairs]
    for way, ratio in zip(rows, zip(*ratios, strict=True), strict=True):
        figures["rows"][way] |= {"x baseline": statistics.median(ratio), "x baseline, all": ratio}
    return figures | {
        "apart": apart,
        "rates": vars(rates),
        "attention": attention_backend(),
        "memory": memory,
    }


def attention_backend() -> str:
    """What DiffSynth takes for attention."""
    from diffsynth.core.attention import attention

    return attention.ATTENTION_IMPLEMENTATION


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result file."""
    lines = [
        "| model | search | s | x faster | denoise s | decode s | reward s | final s | overhead | x floor |",
        "|---" * 10 + "|",
    ]
    for name, figures in result["models"].items():
        for way, row in figures["rows"].items():
            seconds = row["seconds"]
            what = "documented flow" if way == "baseline" else ROWS[way].what
            cells = [f"{name}, budget {figures['budget']}, {figures['steps']} steps", what, f"{seconds['total']:.2f}"]
            cells.append("1" if way == "baseline" else f"{row['x baseline']:.2f}")
            cells += [f"{seconds[stage]:.2f}" for stage in ("denoise", "decode", "reward", "final")]
            floor = f"{row['x floor']:.2f} ({row['x floor, attention at its own rate']:.2f})"
            lines.append("| " + " | ".join([*cells, f"{row['overhead']:.1%}", floor]) + " |")
    lines += [
        "",
        "x floor: over the least time at this machine's own matrix and memory rates; in brackets with attention at its "
        "own measured rate. For the documented flow it bounds what any search with the same candidates can gain here. "
        "Overhead: all that is not denoising, decoding, reward model or final image.",
    ]
    for name, figures in result["models"].items():
        rates = figures["rates"]
        lines.append(
            f"{name}: attention by {figures['attention']}; {rates['matrix'] / 1e12:.3g} TFLOP/s, attention "
            f"{rates['attention'] / 1e12:.3g}, {rates['memory'] / 1e12:.3g} TB/s; scores apart by at most "
            + ", ".join(f"{figures['apart'][way]:.2g}" for way in figures["rows"] if way != "baseline")
            + (f"; peak memory {figures['memory']:.3f} of the plain call's." if figures["memory"] else ".")
        )
    lines += [f"FAILED: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines)


def main() -> None:
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
    arguments = parser.parse_args()
    for given, known in ((arguments.models, MODELS), (arguments.rows, ROWS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    torch.set_num_threads(arguments.threads)
    changes = {"rounds": arguments.rounds, "budget": arguments.budget, "batch_size": arguments.batch}
    changes = {key: value for key, value in changes.items() if value is not None}
    names = arguments.models or here
    device = "cuda" if any(MODELS[name].device == "cuda" for name in names) else "cpu"
    result: dict[str, Any] = {"environment": environment(device), "threads": arguments.threads}
    result |= {"models": {}, "failed": {}}
    for name in names:
        print(f"{name} ...", flush=True)
        try:
            model = replace(MODELS[name], **changes)
            result["models"][name] = measure(name, model, {way: ROWS[way] for way in arguments.rows})
        except (AssertionError, RuntimeError) as error:
            traceback.print_exc()
            result["failed"][name] = str(error).strip().partition("\n")[0]
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.out:  # what is measured stays, whatever becomes of the next
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(result))
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
