"""Several processes find what one finds, bit for bit, and none is left waiting when another fails."""

import functools
import math
import os
import signal
import time

import pytest
import tiny
import torch
from ranks import returned, together

import ses_fast
from ses_fast import Preview, SESConfig, distributed
from ses_fast.digests import digest_of_tensor
from ses_fast.distributed import ALONE, LostRank, RankFailed
from ses_fast.objective import Objective

SEARCH = {"total_eval_budget": 23, "popsize": 7, "k_elites": 3, "dwt_level": 2, "seed": 5, "progress": False}


def base(seed=0):
    return torch.randn(1, 3, 12, 20, generator=torch.Generator().manual_seed(seed))


def bumpy(candidates):  # [n, 3, 12, 20] -> [n]; each by itself, and some not finite
    scores = [(each.sin().sum() - each.square().mean()).item() for each in candidates]
    return [math.nan if math.floor(score * 100) % 11 == 0 else score for score in scores]


def facts(result):
    """All that a search has found, to the last bit."""
    trace = [(each.generation, each.index, each.score.hex(), each.steps, each.members) for each in result.trace]
    refined = [(each.generation, each.index, each.score.hex()) for each in result.refined]
    state = result.state
    return {
        "latents": None if result.latents is None else digest_of_tensor(result.latents),
        "score": result.score,
        "trace": trace,
        "refined": refined,
        "state": [digest_of_tensor(each) for each in (state.mean, state.variance, state.elite_low)],
        "scale": state.fingerprint.get("scale"),
        "forwards": result.forwards,
        "stopped": result.stopped,
    }


class Broken(Exception):
    pass


# ---------------------------------------------------------------- what the ranks are


def test_alone_is_one_rank_of_one():
    assert (ALONE.rank, ALONE.size, ALONE.share(5), list(ALONE.take(3))) == (0, 1, slice(0, 5), [0, 1, 2])
    numbers = torch.tensor([1.0])
    assert ALONE.gather(numbers) is numbers and ALONE.agree("x") == "x" and ALONE.send(numbers, "cpu") is numbers
    assert distributed.ranks_of(None) is distributed.ranks_of("auto") is distributed.ranks_of(ALONE) is ALONE


@pytest.mark.parametrize("given", ["all", 3, True, object()])
def test_what_is_no_process_group(given):
    for work in (lambda: SESConfig(process_group=given), lambda: ses_fast.evolve(base(), bumpy, process_group=given)):
        with pytest.raises(ValueError, match='process_group must be None, "auto" or a group of torch.distributed'):
            work()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in distributed.STARTED_BY:
        monkeypatch.delenv(name, raising=False)
    assert distributed.start() is ALONE
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun sets these"):
        distributed.start()


def every_op(ranks):
    numbers = torch.arange(10, dtype=torch.float64) / 7
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.1])
    sent = torch.full((2, 3), 1 / 3, dtype=torch.bfloat16) if ranks.rank == ranks.size - 1 else None
    return {
        "share": [numbers[ranks.share(n)].tolist() for n in (0, 1, 2, 10)],
        "gathered": [ranks.gather(numbers[ranks.share(n)]).tolist() for n in (0, 1, 2, 10)],
        "odd": [repr(each) for each in ranks.gather(odd[ranks.share(4)]).tolist()],
        "agreed": ranks.agree({"of": ranks.rank, "text": "\u00e9"}),
        "sent": ranks.send(sent, "cpu").tolist(),
        "taken": list(ranks.take(20)),
        "again": list(ranks.take(3)),
        "end": ranks.agree(None),  # the store is rank 0's, and others may still take from it
    }


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_disjoint_and_whole_and_what_travels_arrives(size):
    said = returned(together(every_op, size))
    numbers = (torch.arange(10, dtype=torch.float64) / 7).tolist()
    for i, n in enumerate((0, 1, 2, 10)):
        shares = [each["share"][i] for each in said]
        assert sum(shares, []) == numbers[:n] and len(shares[0]) == max(map(len, shares))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(each["gathered"][i] == numbers[:n] for each in said)
    for each in said:
        assert each["odd"] == ["nan", "inf", "-inf", repr(torch.tensor(0.1).double().item())]
        assert each["agreed"] == {"of": 0, "text": "\u00e9"}
        assert each["sent"] == torch.full((2, 3), 1 / 3, dtype=torch.bfloat16).tolist()
    for name, count in (("taken", 20), ("again", 3)):
        assert sorted(sum((each[name] for each in said), [])) == list(range(count))


# ---------------------------------------------------------------- a function of latents


def searched(ranks, options):
    calls = []

    def counted(candidates):
        calls.append(len(candidates))
        return bumpy(candidates)

    generator = options.pop("generator", None)
    noise = {} if generator is None else {"seed": None, "generator": torch.Generator().manual_seed(generator)}
    result = ses_fast.evolve(base(), counted, **SEARCH | options | noise, process_group=ranks)
    return facts(result), calls


def continued(ranks):
    half = ses_fast.evolve(base(), bumpy, **SEARCH | {"total_eval_budget": 10}, process_group=ranks)
    return facts(ses_fast.evolve(base(), bumpy, **SEARCH | {"seed": None}, state=half.state, process_group=ranks)), []


# Each with its reason.
OPTIONS = {
    "one by one": {},
    "fewer candidates than ranks": {"popsize": 2, "total_eval_budget": 5},
    "batches": {"batch_size": 2},
    "the base, and a generator": {"include_base": True, "generator": 3},
    "another strategy": {"strategy": "pcn"},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.filterwarnings("ignore:the score of candidate")
def test_a_function_is_shared(case, size):
    alone, _ = searched(ALONE, dict(OPTIONS[case]))
    said = returned(together(searched, size, OPTIONS[case]))
    assert all(found == alone for found, _ in said)
    assert sum(sum(calls) for _, calls in said) == len(alone["trace"])  # each candidate is scored once
    assert max(max(calls, default=0) for _, calls in said) <= OPTIONS[case].get("batch_size", 1)
    assert any(score[2] == "-inf" for score in alone["trace"]) or case != "one by one"


@pytest.mark.filterwarnings("ignore:the score of candidate")
def test_a_search_goes_on_with_several_ranks():
    whole, _ = continued(ALONE)
    assert all(found == whole for found, _ in returned(together(continued, 2)))


def skewed(ranks):
    """Rank 1's clock runs a thousand times as fast, rank 0's as it does."""
    from ses_fast import stopwatch

    clock = time.perf_counter
    if ranks.rank:
        stopwatch.time = type("", (), {"perf_counter": staticmethod(lambda: clock() * 1000)})
    options = SEARCH | {"total_eval_budget": None, "time_limit": 0.5}
    result = ses_fast.evolve(base(), bumpy, **options, process_group=ranks)
    return result.stopped, len(result.trace), result.seconds["total"]


@pytest.mark.filterwarnings("ignore:the score of candidate")
def test_the_first_rank_decides_when_the_time_is_over():
    (stopped, count, seconds), other = returned(together(skewed, 2))
    assert (stopped, count) == other[:2] and stopped == "time_limit" and seconds >= 0.5 and count > 4


def watched(ranks):
    seen = []
    ses_fast.evolve(base(), bumpy, **SEARCH, on_generation=lambda so_far: seen.append(1), process_group=ranks)
    return len(seen)


@pytest.mark.filterwarnings("ignore:the score of candidate")
def test_callbacks_are_the_first_ranks():
    assert returned(together(watched, 3)) == [3, 0, 0]


class Own(Objective):
    def score(self, candidates, generation, first, report): ...


def test_an_objective_brings_its_ranks():
    with pytest.raises(ValueError, match="leave process_group= out"):
        ses_fast.evolve(base(), Own(), process_group="auto")


# ---------------------------------------------------------------- a pipeline's previews


def hue(images, prompt):  # another one than brightness
    return (images[:, 0] - images[:, 2]).mean((1, 2))


class Judge:
    """A reward with weights, of a checkpoint's number."""

    def __init__(self, checkpoint):
        self.model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, checkpoint)

    def __call__(self, images, prompt):
        return self.model(images.mean((2, 3)))[:, 0]


def of_pipeline(ranks, config, call, fault=""):
    """(the facts, what on_preview saw, a digest of the image, how many images the reward got at once)"""
    pipe = ses_fast.enable(tiny.tiny_z_image())
    seen, sizes = [], []

    def reward(images, prompt):
        sizes.append(len(images))
        if fault == "a reward" and ranks.rank == 1 and len(sizes) == 2:
            raise Broken("no")
        return tiny.brightness(images, prompt)

    def on_preview(images, scores, generation, first, steps):
        seen.extend((generation, first + i, float(score).hex()) for i, score in enumerate(scores))
        assert len(images) == len(scores) == len(steps)

    if fault == "weights" and ranks.rank == 1:
        with torch.no_grad():
            pipe.dit.layers[0].feed_forward.w1.weight += 1
    pipe.dit.register_buffer("shift", torch.full((3,), 1.0 if fault == "buffers" and ranks.rank == 1 else 0.0))
    if fault == "memory" and ranks.rank == 1:
        decode, pipe.vae_decoder.forward = pipe.vae_decoder.forward, None

        def little(latents, *args, **kwargs):
            if len(latents) > 1:
                raise torch.OutOfMemoryError("too many")
            return decode(latents, *args, **kwargs)

        pipe.vae_decoder.forward = little
    prompt = tiny.BASE["prompt"] + (" and a hen" if fault == "prompt" and ranks.rank == 1 else "")
    rewards = {"ses_reward_model": reward}
    if call.pop("sum", False):
        rewards = {"ses_reward_model": ses_fast.rewards.WeightedReward({"a": reward, "b": hue}, {"a": 1.0, "b": 0.5})}
    if fault == "checkpoint":
        rewards = {"ses_reward_model": Judge(ranks.rank)}
    if fault == "held-out checkpoint":
        config = config | {"report_rewards": {"judge": Judge(ranks.rank)}}
    config = SESConfig(**tiny.QUIET | config, on_preview=on_preview, process_group=ranks)
    given = tiny.BASE | {"prompt": prompt, "enable_ses": True, "ses_inference_steps": 4, "num_inference_steps": 4}
    try:
        image = pipe(**given | rewards | {"ses_eval_budget": 10} | call, ses_config=config)
    except (Broken, RankFailed) as error:
        return f"{type(error).__name__}: {error}", len(pipe.ses_result.trace)
    return facts(pipe.ses_result), seen, tiny.pixels(image).tolist(), sizes


RACE = Preview(race=((0.9, 0.75), (0.7, 0.5)))
PIPELINE = {
    "one by one": ({}, {}),
    "a race": ({"preview": RACE}, {}),
    "a race of fewer than ranks, and refined": ({"preview": Preview(race=((0.8, 0.3),), refine=1), "popsize": 2}, {}),
    "refined, half size": ({"preview": Preview(scale=2, refine=2)}, {}),
    "a race, a sum of rewards, refined": ({"preview": Preview(race=RACE.race, refine=2)}, {"sum": True}),
    "a held-out reward": ({"report_rewards": {"hue": hue}}, {}),
}


@pytest.mark.parametrize("case", PIPELINE)
@pytest.mark.parametrize("size", [2, 3])
def test_previews_are_shared_and_nothing_changes(case, size):
    config, call = PIPELINE[case]
    found, seen, image, sizes = of_pipeline(ALONE, dict(config), dict(call))
    said = returned(together(of_pipeline, size, config, call))
    for each in said:
        assert each[0] == found and each[2] == image
    assert {size for each in said for size in each[3]} == {1} == set(sizes)  # a rank may have none
    assert sum(sum(each[3]) for each in said) == sum(sizes)  # no image is scored twice
    own = said[0][1]  # what the first rank's callback saw: its own, and they are those of one process
    assert own and set(own) < set(seen) and not any(each[1] for each in said[1:])
    if "race" in case:
        assert any(steps for *_, steps, _ in found["trace"]) and sum(sizes) > 10


@pytest.mark.parametrize("fault", ["", "memory"])
def test_batches_and_memory_change_scores_by_rounding_alone(fault):
    config = {"batch_size": "auto", "popsize": 5}
    found, *_ = of_pipeline(ALONE, dict(config), {})
    said = returned(together(of_pipeline, 2, config, {}, fault))
    assert said[0][0] == said[1][0]
    for here, there in zip(found["trace"], said[0][0]["trace"], strict=True):
        assert here[:2] == there[:2] and float.fromhex(here[2]) == pytest.approx(float.fromhex(there[2]), abs=1e-5)
    assert max(said[0][3]) > 1


def test_a_reward_that_raises_on_one_rank_ends_the_call_on_both():
    first, other = returned(together(of_pipeline, 2, {}, {}, "a reward"))
    assert first == ("RankFailed: rank 1: Broken: no", 2) and other == ("Broken: no", 2)


# What rank 1 has otherwise -> what the error calls it.
FAULTS = {
    "weights": "weights",
    "buffers": "weights",
    "prompt": "prompt",
    "checkpoint": "weights of ses_reward_model.model",
    "held-out checkpoint": "weights of report_rewards.judge.model",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_pipeline_prompt_or_reward_is_named(fault):
    for kind, name, text in together(of_pipeline, 2, {}, {}, fault):
        assert (kind, name) == ("raised", "ValueError") and f"rank 1 has {FAULTS[fault]} '" in text


def loads_late(ranks):
    """A reward that loads its weights when it is first called, which the last of three ranks never does."""

    class Late(Judge):
        def __init__(self):
            self.calls = 0

        def __call__(self, images, prompt):
            if not self.calls:
                super().__init__(1)
            self.calls += 1
            return super().__call__(images, prompt)

    judge, found = Late(), []
    for seed in (0, 1):
        objective = functools.partial(judge, prompt="")
        options = SEARCH | {"popsize": 2, "total_eval_budget": 4, "seed": seed}
        found.append(facts(ses_fast.evolve(base(), objective, **options, process_group=ranks)))
    return found, judge.calls


def test_weights_that_a_rank_has_not_loaded_yet_are_no_others():
    alone, _ = loads_late(ALONE)
    said = returned(together(loads_late, 3))
    assert [found for found, _ in said] == [alone] * 3 and [calls for _, calls in said] == [4, 4, 0]


# ---------------------------------------------------------------- what goes wrong


def failing(ranks, who, where):
    """(what left the search, whether it was the original, how many scores it carries)"""
    original, count = KeyboardInterrupt("stop") if where == "ctrl-c" else Broken("no \ud800"), 0

    def objective(candidates):
        nonlocal count
        count += 1
        if ranks.rank == who and where in ("objective", "ctrl-c") and count == 3:
            raise original
        return bumpy(candidates)

    def on_generation(so_far):
        if len(so_far.trace) == {"first": 7, "last": 14}.get(where):
            raise original

    options = SEARCH | {"total_eval_budget": 14, "on_generation": on_generation}
    try:
        ses_fast.evolve(base(), objective, **options, process_group=ranks)
    except BaseException as error:
        words = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
        # The group goes on: what was told once is not told again.
        return words, error is original, len(error.ses_result.trace), ranks.agree("well")


# (the rank that fails, where, how many scores were gathered before)
FAILS = {
    "the objective of rank 1": (1, "objective", 4),
    "the objective of rank 0": (0, "objective", 4),
    "Ctrl-C on rank 1": (1, "ctrl-c", 4),
    "a callback, after the first generation": (0, "first", 7),
    "a callback, when no score is left to gather": (0, "last", 14),
}


@pytest.mark.parametrize("case", FAILS)
@pytest.mark.filterwarnings("ignore:the score of candidate")
def test_an_error_of_one_rank_ends_the_search_on_all(case):
    who, where, count = FAILS[case]
    said = returned(together(failing, 2, who, where))
    name = "KeyboardInterrupt: stop" if where == "ctrl-c" else "Broken: no ?"
    assert said[who] == (name, True, count, "well")
    assert said[1 - who] == (f"RankFailed: rank {who}: {name}", False, count, "well")


def others_search(ranks, other):
    options = dict(SEARCH)
    start = base()
    judge = Judge(ranks.rank if other == "weights" else 0)
    if ranks.rank == 1:
        options |= other if isinstance(other, dict) else {}
        start = base(1) if other == "base" else start
    ses_fast.evolve(start, lambda candidates: judge(candidates, ""), **options, process_group=ranks)


# What rank 1 has otherwise -> what is said on both ranks.
OTHERS = {
    "base": "rank 1 has base 'sha256:",
    "weights": "rank 1 has weights of objective_reward_fn.judge.model 'sha256:",
    "seed": ({"seed": 6}, "rank 1 has seed 6, rank 0 5"),
    "popsize": ({"popsize": 8}, "rank 1 has settings.popsize 8, rank 0 7"),
    "budget": ({"total_eval_budget": 9}, "rank 1 has budget 9, rank 0 23"),
    "batch size": ({"batch_size": 2}, "rank 1 has batch_size 2, rank 0 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_rank_with_another_search_is_named_before_work(case):
    other, message = OTHERS[case] if isinstance(OTHERS[case], tuple) else (case, OTHERS[case])
    for kind, name, text in together(others_search, 2, other):
        assert (kind, name) == ("raised", "ValueError") and message in text and "and a seed" in text


def test_bad_arguments_on_one_rank_reach_the_other():
    first, other = together(others_search, 2, {"popsize": 0})
    assert other[:2] == ("raised", "ValueError") and first[:2] == ("raised", "RankFailed")
    assert first[2] == f"rank 1: ValueError: {other[2]}"


def interrupted_half_way(ranks):
    """Ctrl-C comes to rank 1 between the two parts of an exchange."""
    if ranks.rank == 1:
        gather, count = distributed.dist.all_gather, 0

        def interrupted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == 2:
                raise KeyboardInterrupt
            return gather(*args, **kwargs)

        distributed.dist.all_gather = interrupted
    with ranks.joined():
        ranks.agree("a value")


def test_ctrl_c_half_way_through_an_exchange_begins_no_other():
    first, other = together(interrupted_half_way, 2, timeout=20)
    assert first[:2] == ("raised", "LostRank") and other[:2] == ("raised", "KeyboardInterrupt")


def dying(ranks, how):
    def objective(candidates):
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(12)
        return bumpy(candidates)

    begin = time.monotonic()
    try:
        ses_fast.evolve(base(), objective, **SEARCH, process_group=ranks)
    except LostRank as error:
        return str(error), len(error.ses_result.trace), time.monotonic() - begin


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_rank_is_an_error_and_no_hang(how):
    said = together(dying, 3, how, timeout=60 if how == "killed" else 4)
    words, count, seconds = returned(said[:1])[0]
    assert "another process is gone, or did not answer in time" in words and count == 0 and seconds < 10
    assert said[1] == ("died", -signal.SIGKILL) or how == "hangs"
