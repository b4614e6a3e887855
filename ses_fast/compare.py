"""Methods at equal cost: `ses-fast compare`.

Two passes. Rewards: for each prompt, task and seed what each method's answers are worth at each budget, in worker
processes of one thread each. Seconds: all methods in turns on a few prompts, in one process with all threads. Both are
kept line by line, so that a run that was stopped goes on where it was.

A budget's answer is the best of a search's first evaluations, since no strategy depends on the budget: one search of
the largest gives all. Where previews are the final image already it is not made again.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .files import write_whole
from .methods import METHODS, REFERENCE, Method
from .pipelines import SESConfig, disable, enable
from .studio import Studio, score_of
from .tables import markdown, plotted, summarise

WRITTEN = ("compare.md", "compare.json", "compare.png", "settings.json", "scores.jsonl", "times.jsonl")


@dataclass(frozen=True)
class Plan:
    """What is compared. Raises ValueError for impossible values, before anything is loaded."""

    prompts: tuple[str, ...]
    tasks: tuple[str, ...]  # names of Studio.rewards
    budgets: tuple[int, ...]
    seeds: int = 1
    methods: tuple[str, ...] = tuple(METHODS)
    about: Mapping[str, Any] = field(default_factory=dict)  # model, rewards, size, steps: what a stored score is of

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt to compare on")
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must be rising whole numbers from 1 on, as 10,20,50; got {self.budgets}")
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What stored figures are of, as JSON."""
        plan = asdict(self) | {"methods": {name: asdict(METHODS[name]) for name in self.methods}}
        return json.loads(json.dumps(plan))

    def scored(self) -> list[Method]:
        """Those whose answers are their own."""
        return [METHODS[name] for name in self.methods if METHODS[name].scores_of is None]


class Cost(NamedTuple):
    """Of a call of one budget."""

    seconds: float
    previews: int  # forwards of the denoiser in previews
    finals: int  # and in images of full fidelity
    denoise: float  # seconds of `previews`


# ---------------------------------------------------------------- one method


def answers(studio: Studio, method: Method, prompt: str, seed: int, task: str, budgets: Sequence[int]) -> list[Tensor]:
    """The final image [1, 3, H, W] of each budget."""
    if method.strategy is None:
        return [studio.tensor(studio.call(prompt, seed))] * len(budgets)
    if method.documented:
        return _documented(studio, prompt, seed, task, budgets, final=False)[0]
    if method.shows_its_image(budgets):
        marks = _Marks(budgets)
        _search(studio, method, prompt, seed, task, budgets[-1], on_preview=marks)
        return marks.images
    return [image for image, _ in _searched(studio, method, prompt, seed, task, budgets)]


def costs(
    studio: Studio, method: Method, prompt: str, seed: int, task: str, budgets: Sequence[int], guided: int
) -> list[Cost]:
    """What a call of each budget costs; guided: forwards of a step."""
    image = studio.steps * guided
    if method.strategy is None:
        begin = studio.clock()
        studio.call(prompt, seed)
        return [Cost(studio.clock() - begin, 0, image, 0.0)] * len(budgets)
    if method.documented:
        seconds = _documented(studio, prompt, seed, task, budgets, final=True)[1]
        return [Cost(each, budget * image, image, 0.0) for each, budget in zip(seconds, budgets, strict=True)]
    return [
        cost._replace(finals=cost.finals or image) for _, cost in _searched(studio, method, prompt, seed, task, budgets)
    ]


def _searched(
    studio: Studio, method: Method, prompt: str, seed: int, task: str, budgets: Sequence[int]
) -> Iterator[tuple[Tensor, Cost]]:
    """(the final image [1, 3, H, W], its cost) of each budget; a larger one goes on from the smaller one's state."""
    state, spent, previews, denoise = None, 0.0, 0, 0.0
    for budget in budgets:
        if state is not None and state.index and method.preview.race is not None:
            state, spent, previews, denoise = None, 0.0, 0, 0.0  # a generation cut in two would be another race
        begin = studio.clock()
        picture, result = _search(studio, method, prompt, seed, task, budget, state=state)
        taken, seconds = studio.clock() - begin, result.seconds
        previews, denoise = previews + result.forwards["preview"], denoise + seconds["denoise"]
        yield studio.tensor(picture), Cost(spent + taken, previews, result.forwards.get("refine", 0), denoise)
        spent += taken - seconds["prompt"] - seconds["final"] - seconds.get("refine", 0.0)
        state = result.state


def _search(
    studio: Studio, method: Method, prompt: str, seed: int, task: str, budget: int, **config: Any
) -> tuple[Any, Any]:
    return studio.search(
        prompt,
        seed,
        studio.rewards[task],
        budget,
        max(1, round(method.steps * studio.steps)),
        strategy=method.strategy,
        dwt_level=method.level,
        popsize=method.popsize,
        batch_size=method.batch_size,
        preview=method.preview,
        **config,
    )


def _documented(
    studio: Studio, prompt: str, seed: int, task: str, budgets: Sequence[int], final: bool
) -> tuple[list[Tensor], list[float]]:
    """(the final image [1, 3, H, W], the seconds) of each budget of the installed `ses_search`.

    It draws from torch's global state, which is seeded. Its previews are the final images; final: one is made all the
    same, for its time.
    """
    from .pipelines.diffsynth import family_of

    if family_of(studio.pipe) is None:
        raise ValueError("the documented flow is of DiffSynth's families alone")
    from .pipelines.diffsynth.documented import Flow

    images: list[Tensor] = []
    seconds: list[float] = []
    reward, leader, count = studio.rewards[task], (-float("inf"), torch.empty(0)), 0
    begin = studio.clock()
    call = {"num_inference_steps": studio.steps, **studio.arguments}
    flow = Flow(disable(studio.pipe), prompt, seed=seed, **call)

    def score(picture: Any) -> float:
        nonlocal leader, count
        image, count = studio.tensor(picture), count + 1
        value = score_of(reward, image, prompt)
        leader = max(leader, (value, image), key=lambda each: each[0])  # the first among equals, as the search has it
        if count in budgets:
            images.append(leader[1])
            seconds.append(studio.clock() - begin)
        return value

    try:
        level = SESConfig().evolution(flow.shared["height"], flow.shared["width"]).dwt_level
        torch.manual_seed(seed)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            noise = flow.search(score, budgets[-1], level=level)
        searched = studio.clock()
        if final:
            flow.final(noise)
        return images, [each + studio.clock() - searched for each in seconds]
    finally:
        enable(studio.pipe)


class _Marks:
    """Collects the best preview after each budget, of those that were not stopped on their way."""

    def __init__(self, budgets: Sequence[int]) -> None:
        self.budgets = set(budgets)
        self.images: list[Tensor] = []
        self.leader: tuple[float, Tensor] = (-float("inf"), torch.empty(0))
        self.count = 0

    def __call__(self, images: Tensor, scores: Any, generation: int, first: int, steps: Tensor) -> None:
        for image, score, stopped in zip(images.split(1), map(float, scores), steps.tolist(), strict=True):
            self.count += 1
            if not stopped and (score > self.leader[0] or not self.leader[1].numel()):
                self.leader = (score, image)
            if self.count in self.budgets:
                self.images.append(self.leader[1])


# ---------------------------------------------------------------- all of them on one prompt


def measured(studio: Studio, plan: Plan, refused: Collection[str], number: int, task: str) -> dict[str, Any]:
    """The line of a prompt: what each method's answers are worth, by seed and budget; without the refused ones."""
    prompt = plan.prompts[number]
    rows = {}
    for method in plan.scored():
        if method.name in refused:
            continue
        found = [answers(studio, method, prompt, seed, task, plan.budgets) for seed in range(plan.seeds)]
        row = {"reward": [[score_of(studio.rewards[task], each, prompt) for each in images] for images in found]}
        if studio.held_out is not None:
            row["held_out"] = [[score_of(studio.held_out, each, prompt) for each in images] for images in found]
        if studio.judge is not None:
            row["oracle"] = [[float(studio.judge(each, prompt)) for each in images] for images in found]
        if plan.seeds > 1:
            row["diversity"] = [[_apart(images) for images in zip(*found, strict=True)]]
        rows[method.name] = row
    return {"prompt": number, "task": task, "methods": rows}


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


def _measured_there(*job: Any) -> dict[str, Any]:
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
    minutes: float | None = None,
) -> dict[str, Any]:
    """Compares, writes the files of WRITTEN, and returns the figures.

    workers: processes that measure rewards; 1: none but this one. rounds: prompts on which all methods are timed.
    minutes: no prompt is begun that would not end by then; a later run with more goes on. Raises ValueError as
    `open_folder`.
    """
    begin = time.perf_counter()
    scores, times = open_folder(out, plan)
    studio = load()
    _time_all(studio, plan, times, rounds)
    refused = {row["method"] for row in times.rows if "refused" in row}
    known = {(row["prompt"], row["task"]) for row in scores.rows}
    jobs = [each for each in itertools.product(range(len(plan.prompts)), plan.tasks) if each not in known]
    deadline = None if minutes is None else begin + 60 * minutes
    for row in tqdm(
        _all(load, studio, (plan, refused), jobs, workers, deadline), total=len(jobs), desc="prompts", mininterval=5
    ):
        scores.add(row)
    machine = {
        "threads": torch.get_num_threads(),
        "workers": workers,
        "rounds": rounds,
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


def _time_all(studio: Studio, plan: Plan, times: Lines, rounds: int) -> None:
    """The seconds and forwards of each method, in turns. One that this pipeline cannot do is noted, and left out."""
    known = {(row["round"], row["task"], row["method"]) for row in times.rows}
    turns = list(itertools.product(range(min(rounds, len(plan.prompts))), plan.tasks, plan.methods))
    turns = [turn for turn in turns if turn not in known]
    guided = studio.warm_up(plan.prompts[0], plan.tasks[0]) if turns else 1
    if turns and REFERENCE.name in plan.methods:
        with contextlib.suppress(ValueError):  # a pipeline that it cannot drive is noted below
            _documented(studio, plan.prompts[0], 0, plan.tasks[0], (2,), final=True)
    for number, task, name in tqdm(turns, desc="seconds", mininterval=5):
        row: dict[str, Any] = {"round": number, "task": task, "method": name}
        if any("refused" in each for each in times.rows if each["method"] == name):
            continue
        try:
            found = costs(studio, METHODS[name], plan.prompts[number], 0, task, plan.budgets, guided)
            row["costs"] = [each._asdict() for each in found]
        except ValueError as error:
            row["refused"] = str(error)
        times.add(row)


def _all(
    load: Callable[[], Studio],
    studio: Studio,
    about: tuple[Plan, Collection[str]],  # and the refused methods
    jobs: Iterable[tuple[int, str]],
    workers: int,
    deadline: float | None,  # by time.perf_counter
) -> Iterator[dict[str, Any]]:
    """The line of each job, as they are done; none is begun that would not end in time."""
    longest = 0.0

    def in_time() -> bool:
        return deadline is None or time.perf_counter() + longest <= deadline

    if workers == 1:
        for number, task in jobs:
            if not in_time():
                return
            begin = time.perf_counter()
            yield measured(studio, *about, number, task)
            longest = max(longest, time.perf_counter() - begin)
        return
    left = iter(jobs)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_open, initargs=(load,)) as pool:
        running: dict[Future, float] = {}
        while True:
            while len(running) < workers and in_time() and (job := next(left, None)) is not None:
                running[pool.submit(_measured_there, *about, *job)] = time.perf_counter()
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                longest = max(longest, time.perf_counter() - running.pop(done))
                yield done.result()
