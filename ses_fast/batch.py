"""Many prompts into one folder: gone on with where it stopped, whole after a kill, and one failure stops nothing.

for result in ses_fast.batch.run(pipe, "prompts.csv", "out", ses_reward_model="pick", num_inference_steps=8):
    print(result.id, result.base_score, result.score)

Several processes share the prompts (each takes the next one that is left), or the population of each search.
"""

import functools
import inspect
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from . import __version__
from .checks import check_truths, whole_number
from .digests import digest, digests_of_weights
from .distributed import ALONE, LostRank, RankFailed, Ranks, ranks_of
from .errors import warn
from .files import as_path
from .folder import DONE, FAILED, CannotWrite, Folder, Result
from .page import write_page
from .pipelines.config import SESConfig
from .pipelines.enabled import picture
from .pipelines.request import checked_reward, facts, reward_name
from .prompts import Prompt, as_prompts, read_prompts
from .result import SearchResult

HOW = ("batch_size", "backend", "progress")  # settings that change how a batch runs, not what it makes
SHARDS = ("prompts", "population")  # what several processes share
MOST_CHARACTERS = 4_000  # of an error's traceback that are kept


def run(
    pipe: Any,
    prompts: str | os.PathLike[str] | Iterable[str | Mapping[str, Any] | Prompt],
    out: str | os.PathLike[str],
    *,
    ses_reward_model: Any = "pick",
    ses_eval_budget: int | None = 50,
    ses_inference_steps: int = 10,
    ses_config: SESConfig | None = None,
    seed: int = 0,
    model: str | None = None,
    restart: bool = False,
    progress: bool = True,
    shard: str | None = None,
    process_group: Any = "auto",
    **call: Any,
) -> Iterator[Result]:
    """Makes the image of each prompt, with and without search, in the folder `out`; see `folder` for what is there.

    pipe: an enabled pipeline. prompts: a file that `read_prompts` reads, or a list of strings or dicts. The ses_
    arguments and `call` are the documented call's, for every prompt. seed: of a prompt that has none of its own.
    model: what the pipeline's weights are called, so that a folder is not gone on with by others.

    The same arguments go on where an earlier run stopped, in the middle of a search too: finished prompts are not done
    again, failed ones are. `restart` removes what an earlier run made. The settings must be those of the earlier run,
    but for SESConfig's batch_size, backend and progress.

    process_group: the processes that work together, as in `evolve`: each calls `run` with the same arguments, and works
    in the same folder. shard: what they share. "prompts": each searches alone, and takes the next prompt that is left.
    "population": all search for the same prompt, and share its previews. None: the prompts, unless they are so few
    that the other is quicker. The images are those of one process, as said in `evolve`.

    Yields the results of finished prompts first, then each prompt's as it ends; the first process those of the others
    at the end, and the others only their own. A prompt that raises is a result with an `error`, and the rest go on. At
    the end summary.json and index.html are written. The first process shows the bar; callbacks are those of the process
    that searches, and of the first where all do.

    Raises ValueError for bad input, before any work; CannotWrite (an OSError) where the folder takes no more;
    `distributed.RankFailed` where another process ends the batch, `distributed.LostRank` where one is gone.
    """
    ranks = ranks_of(process_group)
    with ranks.joined():
        if shard is not None and shard not in SHARDS:
            raise ValueError(f"shard must be one of {', '.join(SHARDS)}, or None; got {shard!r}")
        if not hasattr(type(pipe), "ses_result"):
            raise ValueError(f"{type(pipe).__name__} has no documented call: ses_fast.enable(pipe) first")
        config = _checked_config(ses_config)
        if own := call.keys() & {"prompt", "enable_ses", "generator"}:
            raise ValueError(f"{', '.join(sorted(own))}: these are given to each call by the batch")
        check_truths(restart=restart, progress=progress)
        ses_reward_model, out = checked_reward(ses_reward_model), as_path("out", out)
        if not isinstance(model, str | None):
            raise ValueError(f"model must be what the weights are called, a str; got {model!r:.200}")
        if ses_eval_budget is not None:
            ses_eval_budget = whole_number("ses_eval_budget", ses_eval_budget, 1)
        elif config.time_limit is None:
            raise ValueError("ses_eval_budget=None needs a SESConfig(time_limit=): how many seconds a search may take")
        ses_inference_steps = whole_number("ses_inference_steps", ses_inference_steps, 1)
        seed = whole_number("seed", seed, 0)
        is_file = isinstance(prompts, str | os.PathLike)
        wanted = read_prompts(as_path("prompts", prompts)) if is_file else as_prompts(prompts)  # type: ignore[arg-type]

        settings = {
            "pipeline": getattr(pipe, "_ses_stock", type(pipe)).__name__,
            "model": model,
            "ses_reward_model": reward_name(ses_reward_model),
            "ses_eval_budget": ses_eval_budget,
            "ses_inference_steps": ses_inference_steps,
            "seed": seed,
            "arguments": facts(call),
            "report_rewards": _names(config.report_rewards),
            "ses_config": {name: value for name, value in config.settings().items() if name not in HOW},
        }
        ses = {
            "ses_reward_model": ses_reward_model,
            "ses_eval_budget": ses_eval_budget,
            "ses_inference_steps": ses_inference_steps,
        }
        if ranks.size > 1:
            ranks.compare(settings | {"prompts": digest(wanted), "shard": shard, "restart": restart})
            rewards = {"ses_reward_model": ses_reward_model, "report_rewards": config.report_rewards}
            ranks.compare(digests_of_weights(pipe=pipe, **rewards), where_known=True)
        folder, left = _opened(out, settings, restart, ranks, wanted, seed)
    if shard is None:
        shard = "prompts" if _prompts_are_quicker(config.popsize, ranks.size, len(left)) else "population"
    together = ranks if shard == "population" else ALONE
    if together.size > 1:
        config = replace(config, process_group=ranks)
    work = _Work(pipe, folder, config, seed, call, ses, together, ranks)
    return _results(work, wanted, left, settings, progress)


def _opened(
    out: str | os.PathLike[str],
    settings: Mapping[str, Any],
    restart: bool,
    ranks: Ranks,
    wanted: Sequence[Prompt],
    seed: int,
) -> tuple[Folder, list[Prompt]]:
    """(the folder, the prompts that are left): the first rank looks after it, and then the others work in it too."""
    folder, numbers = None, []
    try:
        if ranks.rank == 0:
            folder = Folder(out, settings, restart=restart)
            numbers = [i for i, prompt in enumerate(wanted) if not folder.finished(prompt, _seed(prompt, seed))]
        numbers = ranks.agree(numbers)
        if folder is None:
            folder = Folder(out, settings, rank=ranks.rank)
        ranks.agree(None)  # another may be kept out of it
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    return folder, [wanted[i] for i in numbers]


def _prompts_are_quicker(popsize: int, size: int, prompts: int) -> bool:
    """Whether `size` processes are done sooner, or as soon, where each searches alone.

    With fewer prompts than processes all are done in the time of one search; together a search takes
    ceil(popsize / size) / popsize of that. With as many prompts as processes this always holds.
    """
    return prompts * -(-popsize // size) >= popsize


def _said_of_population(popsize: int, size: int, prompts: int) -> str:
    """What limits the speed where `size` processes share the population."""
    turns = -(-popsize // size)
    better = f"; popsize {turns * size} would use all of them" if popsize % size else ""
    instead = (
        f'. There are {prompts} prompts: shard "prompts" is done sooner'
        if _prompts_are_quicker(popsize, size, prompts)
        else ""
    )
    return (
        f"{size} processes share generations of {popsize}: {turns} turns each, at most {popsize / turns:.3g} times as "
        f"fast as one{better}{instead}"
    )


def _checked_config(config: SESConfig | None) -> SESConfig:
    config = SESConfig() if config is None else config
    if not isinstance(config, SESConfig):
        raise ValueError(f"ses_config must be a ses_fast.SESConfig, got {config!r}")
    for name in ("state", "latents", "generator"):
        if getattr(config, name) is not None:
            raise ValueError(f"SESConfig({name}=) is of one call, and a batch makes many: leave it out")
    if config.process_group is not None:
        raise ValueError("SESConfig(process_group=) is of one call: give process_group= to the batch itself")
    return replace(config, progress=False)  # the batch has a bar of its own


def _names(rewards: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    return {name: reward_name(rewards[name] if isinstance(rewards, Mapping) else name) for name in rewards}


def _results(
    work: "_Work",
    wanted: Sequence[Prompt],
    left: Sequence[Prompt],  # not yet finished
    settings: Mapping[str, Any],
    progress: bool,
) -> Iterator[Result]:
    folder, ranks = work.folder, work.all
    with folder, ranks.joined():
        if ranks.rank == 0 and work.together.size > 1 and left:
            warn(_said_of_population(work.config.popsize, ranks.size, len(left)))
        todo = {prompt.id for prompt in left}
        finished = [prompt for prompt in wanted if prompt.id not in todo]
        if ranks.rank == 0:
            for prompt in finished:
                if folder.results[prompt.id].columns != prompt.columns:  # the file says more than it did
                    folder.add(replace(folder.results[prompt.id], columns=dict(prompt.columns)))
                yield folder.results[prompt.id]
        each = work.ses["ses_eval_budget"] or 1  # of the bar's steps
        failed, own = 0, set()
        with tqdm(
            total=len(wanted) * each,
            initial=len(finished) * each,
            unit="preview",
            disable=not progress or ranks.rank > 0,
            smoothing=0.1,
        ) as bar:
            for number in work.turns(len(left)):
                count = len(finished) + max(0, number - (ranks.size - work.together.size))  # the others' are under way
                bar.set_description(f"{count}/{len(wanted)} prompts, {failed} failed")
                prompt = left[number]
                result = work.result(prompt, functools.partial(_advance, bar, count * each, each))
                if work.writes:
                    folder.add(result)
                    if result.status == DONE:
                        folder.remove(folder.search(result.stem))
                    own.add(prompt.id)
                failed += result.status == FAILED
                _advance(bar, (count + 1) * each, each, 0)
                yield result
            ranks.agree(None)  # all have written what they did
            if ranks.rank:
                return
            folder.take_in()
            others = [folder.results[prompt.id] for prompt in left if prompt.id not in own]
            failed += sum(result.status == FAILED for result in others)
            _advance(bar, len(wanted) * each, each, 0)
            bar.set_description(f"{len(wanted)}/{len(wanted)} prompts, {failed} failed")
        yield from others
        if not folder.is_summarised():
            results = _in_order(folder.results, wanted)
            summary = summarised(results) | {"settings": settings, "versions": _versions()}
            folder.write(folder.page, lambda path: write_page(path, folder.path, results, summary))
            folder.summarise(summary)


def _advance(bar: Any, before: int, most: int, evaluations: int) -> None:
    bar.update(before + min(evaluations, most) - bar.n)


@dataclass(frozen=True)
class _Work:
    """What is done for one prompt."""

    pipe: Any
    folder: Folder
    config: SESConfig
    seed: int
    call: Mapping[str, Any]
    ses: Mapping[str, Any]  # the documented arguments
    together: Ranks  # that search for the prompt together
    all: Ranks  # of the batch

    @property
    def writes(self) -> bool:
        """Whether what is found is this process's to write."""
        return self.together.rank == 0

    def turns(self, count: int) -> Iterator[int]:
        """Which of `count` prompts are this process's, one after another: all, where the processes work together."""
        return iter(range(count)) if self.together is self.all else self.all.take(count)

    def result(self, prompt: Prompt, advance: Callable[[int], Any]) -> Result:
        """Whatever the prompt raises is in the result. What the folder cannot take, and Ctrl-C, leave."""
        result = Result(
            id=prompt.id,
            prompt=prompt.text,
            status=FAILED,
            seed=_seed(prompt, self.seed),
            negative_prompt=prompt.negative_prompt,
            width=prompt.width,
            height=prompt.height,
            columns=dict(prompt.columns),
        )
        try:
            with self.together.joined():
                return self._done(prompt, result, advance)
        except (CannotWrite, LostRank):
            raise
        except Exception as error:
            if isinstance(error, RankFailed) and (error.stopped or error.kind == CannotWrite.__name__):
                raise
            result = replace(
                result,
                error=_utf8(f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]),
                traceback=_utf8("".join(traceback.format_exception(error))[-MOST_CHARACTERS:]),
            )
        if torch.cuda.is_available():  # here, where the error no longer holds the tensors that may have been too many
            torch.cuda.empty_cache()
        return result

    def _done(self, prompt: Prompt, result: Result, advance: Callable[[int], Any]) -> Result:
        own = {name: getattr(prompt, name) for name in ("negative_prompt", "width", "height")}
        arguments = {**self.call, **{name: value for name, value in own.items() if value is not None}}

        def call(**ses: Any) -> Any:
            return self.pipe(prompt.text, **_seeded(self.pipe, result.seed), **arguments, **ses)

        begin = time.perf_counter()
        base = picture(call(enable_ses=False)) if self.writes else None
        base_seconds = time.perf_counter() - begin
        answer = picture(self._searched(call, result.stem, advance))
        found = self.pipe.ses_result
        for image, is_base in ((base, True), (answer, False)):
            if image is not None and self.writes:
                path = self.folder.image(result.stem, base=is_base)
                self.folder.write(path, functools.partial(image.save, format="PNG"))
        seconds = {"base": base_seconds, **found.seconds}
        seconds["total"] += base_seconds
        return replace(
            result,
            status=DONE,
            image=f"images/{result.stem}.png",
            base_image=f"images/{result.stem}.base.png",
            score=found.score,
            base_score=_number(found.base_score),
            held_out={
                name: {"base": _number(held.base), "answer": _number(held.answer)}
                for name, held in found.held_out.items()
            },
            evaluations=found.evaluations,
            scores=[_number(evaluation.score) for evaluation in found.trace],
            early=[number for number, evaluation in enumerate(found.trace) if evaluation.steps is not None],
            seconds=seconds,
        )

    def _searched(self, call: Callable[..., Any], stem: str, advance: Callable[[int], Any]) -> Any:
        """The call's answer, from the state that an earlier run has left."""

        def on_generation(found: SearchResult) -> None:
            self.folder.save_search(stem, found)
            self.all.in_touch()
            advance(found.evaluations)
            if self.config.on_generation is not None:
                self.config.on_generation(found)

        config = replace(self.config, on_generation=on_generation)
        try:
            saved = self.folder.saved_search(stem)
            if saved is not None:
                return call(enable_ses=True, ses_config=replace(config, state=saved.state), **self.ses)
        except ValueError as error:
            if hasattr(error, "ses_result"):  # the search went on, and then failed
                raise
            warn(f"the search that was kept in {self.folder.search(stem).name} begins anew: {error}")
        return call(enable_ses=True, ses_config=config, **self.ses)


def summarised(results: Sequence[Result]) -> dict[str, Any]:
    """What a batch has come to, as JSON: means over the prompts with finite scores, seconds, failures."""
    done = [result for result in results if result.status == DONE]
    held_out = {}
    for name in sorted({name for result in done for name in result.held_out}):
        held_out[name] = _means([result.held_out[name] for result in done if name in result.held_out])
    stages: dict[str, float] = {}
    for result in done:
        for stage, seconds in result.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return {
        "prompts": len(results),
        "done": len(done),
        "failed": len(results) - len(done),
        "search": _means([{"base": result.base_score, "answer": result.score} for result in done]),
        "improved": sum(result.gain is not None and result.gain > 0 for result in done),
        "held_out": held_out,
        "seconds": stages,
        "failures": [
            {"id": result.id, "prompt": result.prompt, "error": result.error}
            for result in results
            if result.status == FAILED
        ],
    }


def _means(pairs: Sequence[Mapping[str, float | None]]) -> dict[str, float | int | None]:
    """Of the prompts whose two scores are finite: how many they are, their means, and the mean gain."""
    both = [(two["base"], two["answer"]) for two in pairs if None not in two.values()]
    n = len(both)
    base, answer = (math.fsum(two[i] for two in both) / n if n else None for i in (0, 1))  # type: ignore[misc]
    gain = None if base is None or answer is None else answer - base
    return {"count": n, "base": base, "answer": answer, "gain": gain}


def _in_order(results: Mapping[str, Result], wanted: Sequence[Prompt]) -> list[Result]:
    """All that the folder holds: the wanted ones in their order, then those of earlier files."""
    ids = dict.fromkeys([prompt.id for prompt in wanted if prompt.id in results] + list(results))
    return [results[id] for id in ids]


def _seeded(pipe: Any, seed: int) -> dict[str, Any]:
    """What gives a call the noise of a seed: DiffSynth takes the number, diffusers a generator, new for each call."""
    if "seed" in inspect.signature(type(pipe).__call__).parameters:
        return {"seed": seed}
    return {"generator": torch.Generator("cpu").manual_seed(seed)}


def _seed(prompt: Prompt, default: int) -> int:
    return default if prompt.seed is None else prompt.seed


def _number(score: float | None) -> float | None:
    """JSON has no infinity: null stands for a score that was not finite."""
    return score if score is not None and math.isfinite(score) else None


def _utf8(text: str) -> str:
    """An error's text may hold anything."""
    return text.encode("utf-8", "replace").decode()


def _versions() -> dict[str, str]:
    return {"ses-fast": __version__, "torch": torch.__version__}
