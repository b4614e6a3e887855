"""Methods at equal cost: `ses-fast compare`.

Two passes. Rewards: for each prompt, task and seed what each method's answers are worth at each budget, in worker
processes of one thread each. Seconds: all methods in turns on a few prompts, in one process with all threads. Both are
kept line by line, so that a run that was stopped goes on where it was.

A budget's answer is the best of a search's first evaluations, since no strategy depends on the budget: one search of
the largest gives all. Where previews are the final image already it is not made again. Methods and tasks that look at
the same noises share their images (`pipelines.sharing`), which changes no score; the pass that measures seconds shares
nothing.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .answers import Search, answers, costs, documented, scaled
from .files import write_whole
from .methods import GROUPS, METHODS, REFERENCE, Method
from .pipelines.sharing import Kept, sharing
from .rewards.weighted import WeightedReward
from .studio import RewardFunction, Studio, score_of
from .summary import plotted, summarise
from .tables import markdown

WRITTEN = ("compare.md", "compare.json", "compare.png", "settings.json", "scores.jsonl", "times.jsonl")


@dataclass(frozen=True)
class Plan:
    """What is compared. Raises ValueError for impossible values, before anything is loaded."""

    prompts: tuple[str, ...]
    tasks: tuple[str, ...]  # names of Studio.rewards
    budgets: tuple[int, ...]
    seeds: int = 1
    methods: tuple[str, ...] = tuple(METHODS)
    own: Method | None = None  # one that is in no table; `methods` names it too
    about: Mapping[str, Any] = field(default_factory=dict)  # model, rewards, size, steps: what a stored score is of

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to compare on")
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must be rising whole numbers from 1 on, as 10,20,50; got {self.budgets}")
        if unknown := set(self.methods) - {*METHODS, *([self.own.name] if self.own else [])}:
            raise ValueError(
                f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}, and these for several: "
                f"{', '.join(GROUPS)}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What stored figures are of, as JSON."""
        plan = asdict(self) | {"methods": {name: asdict(self.method(name)) for name in self.methods}}
        return json.loads(json.dumps(plan))

    def method(self, name: str) -> Method:
        return self.own if self.own is not None and self.own.name == name else METHODS[name]

    def scored(self) -> list[Method]:
        """Those whose answers are their own."""
        return [method for method in map(self.method, self.methods) if method.scores_of is None]

    @property
    def order(self) -> list[int]:
        """The prompts' numbers as they are measured, shuffled: even and odd ones in turn, so that any first ones are a
        fair sample of both halves."""
        count = len(self.prompts)
        shuffled = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu").tolist()
        halves = [[number for number in shuffled if number % 2 == rest] for rest in (0, 1)]
        pairs = itertools.zip_longest(*halves)
        return [number for pair in pairs for number in pair if number is not None]


# ---------------------------------------------------------------- all of them on one prompt


def measured(
    studio: Studio, plan: Plan, refused: Collection[str], number: int, tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """The line of a prompt and each task: what each method's answers are worth, by seed and budget.

    Without the refused methods. What more than one of them renders is rendered once.
    """
    prompt, seeds = plan.prompts[number], range(plan.seeds)
    lines: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    pictures: list[dict[bytes, Any]] = [{} for _ in seeds]
    with sharing(Kept()):
        searches = {
            task: [Search(prompt, seed, scaled(studio, task, prompt, seed), plan.budgets) for seed in seeds]
            for task in tasks
        }
        # By method first: what the tasks have in common is then still kept.
        for method, task in itertools.product(plan.scored(), tasks):
            if method.name not in refused:
                found = [answers(studio, method, search, pictures[search.seed]) for search in searches[task]]
                rewards = [search.reward for search in searches[task]]
                lines[task][method.name] = _worth(studio, task, rewards, prompt, found)
    return [{"prompt": number, "task": task, "methods": line} for task, line in lines.items()]


def _worth(
    studio: Studio, task: str, rewards: Sequence[RewardFunction], prompt: str, found: Sequence[Sequence[Tensor]]
) -> dict[str, Any]:
    """What the images of each seed and budget are worth. rewards: each seed's, of the task."""

    def scores(*judges: Callable[[Tensor, str], Any]) -> list[list[float]]:
        return [_scores(judge, images, prompt) for judge, images in zip(judges, found, strict=True)]

    def by(reward: RewardFunction) -> list[list[float]]:
        return scores(*[functools.partial(score_of, reward)] * len(found))

    row: dict[str, Any] = {"reward": scores(*(functools.partial(score_of, reward) for reward in rewards))}
    for name, reward in studio.rewards.items():
        if name != task and not isinstance(reward, WeightedReward):
            row[f"by {name}"] = by(reward)
    if studio.held_out is not None:
        row["held_out"] = by(studio.held_out)
    if studio.judge is not None:
        row["oracle"] = scores(*[studio.judge] * len(found))
    if len(found) > 1:
        row["diversity"] = [[_apart(images) for images in zip(*found, strict=True)]]
    return row


def _scores(judge: Callable[[Tensor, str], Any], images: Sequence[Tensor], prompt: str) -> list[float]:
    """Of each budget's image; one that a larger budget did not change is judged once."""
    scores: list[float] = []
    for before, image in zip((None, *images), images, strict=False):
        same = before is not None and torch.equal(before, image)
        scores.append(scores[-1] if same else float(judge(image, prompt)))
    return scores


def _apart(images: Sequence[Tensor]) -> float:
    """The mean distance of two of the images: the root of the mean squared difference, of a range of 2."""
    pairs = itertools.combinations([image.float() for image in images], 2)
    distances = [(one - other).square().mean().sqrt().item() for one, other in pairs]
    return sum(distances) / len(distances)


_studio: Studio | None = None  # a worker's


def _open(load: Callable[[], Studio]) -> None:
    global _studio
    torch.set_num_threads(1)
    _studio = load()


def _measured_there(*job: Any) -> list[dict[str, Any]]:
    assert _studio is not None
    return measured(_studio, *job)


# ---------------------------------------------------------------- the whole comparison


class Lines:
    """A file of one JSON object a line. A last line that was torn when the run was killed is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            self.rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} is not what ses-fast wrote: {error}. Give another folder with --out") from error
        if len(whole) < len(text):
            path.write_bytes(whole)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def open_folder(out: Path, plan: Plan) -> tuple[Lines, Lines]:
    """(scores, times) of an earlier run of the same plan, or none. Raises ValueError where the folder has another's."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is not what ses-fast wrote: {error}. Give another folder with --out") from error
        changed = [name for name, value in plan.settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{out} has a comparison with other {', '.join(changed)}: give another folder with --out")
    else:
        write_whole(path, lambda file: file.write_text(json.dumps(plan.settings, indent=1) + "\n"))
    return Lines(out / "scores.jsonl"), Lines(out / "times.jsonl")


def usual_workers() -> int:
    """A process for each core; with a GPU only this one."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def run(
    load: Callable[[], Studio],  # to be pickled, where there are workers
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    rounds: int = 3,
    sample: int | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Compares, writes the files of WRITTEN, and returns the figures.

    workers: processes that measure rewards; 1: none but this one. rounds: prompts on which all methods are timed.
    sample: so many of the prompts are measured, drawn from both halves. minutes: no prompt is begun that would not end
    by then. A later run with more of either goes on. Raises ValueError as `open_folder`.
    """
    begin = time.perf_counter()
    scores, times = open_folder(out, plan)
    studio = load()
    _time_all(studio, plan, times, rounds)
    refused = {row["method"] for row in times.rows if "refused" in row}
    known = {(row["prompt"], row["task"]) for row in scores.rows}
    jobs = [(number, [task for task in plan.tasks if (number, task) not in known]) for number in plan.order[:sample]]
    jobs = [(number, tasks) for number, tasks in jobs if tasks]
    deadline = None if minutes is None else begin + 60 * minutes
    for rows in tqdm(
        _all(load, studio, (plan, refused), jobs, workers, deadline), total=len(jobs), desc="prompts", mininterval=5
    ):
        for row in rows:
            scores.add(row)
    machine = {
        "threads": _alike(times.rows, "threads") or torch.get_num_threads(),  # when the seconds were measured
        "workers": workers,
        "rounds": len({row["round"] for row in times.rows}),
        "device": str(studio.pipe.device),
    }
    figures = summarise(plan.settings | {"machine": machine}, scores.rows, times.rows)
    from . import report

    for name, text in (
        ("compare.json", json.dumps(figures, indent=1, allow_nan=False)),
        ("compare.md", markdown(figures)),
    ):
        write_whole(out / name, lambda file, text=text: file.write_text(text + "\n"))  # type: ignore[misc]
    write_whole(out / "compare.png", lambda file: report.draw_comparison(plotted(figures), file))
    return figures


def _alike(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """What all rows that say it have under the name; several, in words, where they differ; None where none says it."""
    found = sorted({row[name] for row in rows if name in row})
    return " or ".join(map(str, found)) if len(found) > 1 else found[0] if found else None


def _time_all(studio: Studio, plan: Plan, times: Lines, rounds: int) -> None:
    """The seconds and forwards of each method, in turns. One that this pipeline cannot do is noted, and left out."""
    known = {(row["round"], row["task"], row["method"]) for row in times.rows}
    turns = list(itertools.product(range(min(rounds, len(plan.prompts))), plan.tasks, plan.methods))
    turns = [turn for turn in turns if turn not in known]
    guided = studio.warm_up(plan.prompts[0], plan.tasks[0]) if turns else 1
    if turns and REFERENCE.name in plan.methods:
        first = Search(plan.prompts[0], 0, scaled(studio, plan.tasks[0], plan.prompts[0], 0), (2,))
        with contextlib.suppress(ValueError):  # a pipeline that it cannot drive is noted below
            documented(studio, first, final=True)
    for number, task, name in tqdm(turns, desc="seconds", mininterval=5):
        row: dict[str, Any] = {"round": number, "task": task, "method": name, "threads": torch.get_num_threads()}
        if any("refused" in each for each in times.rows if each["method"] == name):
            continue
        try:
            if guided == 1 and not plan.method(name).preview.cfg:
                raise ValueError("the pipeline's call has no guidance to leave out")
            prompt = plan.prompts[number]
            search = Search(prompt, 0, scaled(studio, task, prompt, 0), plan.budgets)
            row["costs"] = [each._asdict() for each in costs(studio, plan.method(name), search, guided)]
        except ValueError as error:
            row["refused"] = str(error)
        times.add(row)


def _all(
    load: Callable[[], Studio],
    studio: Studio,
    about: tuple[Plan, Collection[str]],  # and the refused methods
    jobs: Iterable[tuple[int, Sequence[str]]],  # a prompt and its tasks
    workers: int,
    deadline: float | None,  # by time.perf_counter
) -> Iterator[list[dict[str, Any]]]:
    """The lines of each job, as they are done; none is begun that would not end in time."""
    longest = 0.0

    def in_time() -> bool:
        return deadline is None or time.perf_counter() + longest <= deadline

    if workers == 1:
        for job in jobs:
            if not in_time():
                return
            begin = time.perf_counter()
            yield measured(studio, *about, *job)
            longest = max(longest, time.perf_counter() - begin)
        return
    left = iter(jobs)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_open, initargs=(load,)) as pool:
        running: dict[Future, float] = {}
        while True:
            while len(running) < workers and in_time() and (each := next(left, None)) is not None:
                running[pool.submit(_measured_there, *about, *each)] = time.perf_counter()
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                longest = max(longest, time.perf_counter() - running.pop(done))
                yield done.result()
