"""Cheap previews: a race, half the size, no guidance, and the best ones scored again in full."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    BASE,
    GUIDED,
    MAKE,
    PHOTO,
    QUIET,
    SES,
    Seen,
    brightness,
    forward_sizes,
    pixels,
    search,
    tiny_flux,
    tiny_z_image,
)

import ses_fast
from ses_fast import Preview, SearchResult, SESConfig
from ses_fast.evolution import ask, start
from ses_fast.pipelines import run
from ses_fast.pipelines.batching import Batches
from ses_fast.pipelines.config import DEFAULT_RACE
from ses_fast.pipelines.race import Rung, rungs_of, who_goes_on

FOUR = {"num_inference_steps": 4, "ses_inference_steps": 4}
RACE = Preview(race=((0.95, 0.5), (0.7, 0.25)))
CHEAP = {
    "a race": RACE,
    "half the size": Preview(scale=2),
    "refined": Preview(refine=2),
    "all": Preview(scale=2, race=RACE.race, cfg=False, refine=2),
}


@pytest.fixture(scope="module", params=MAKE)
def family(request):
    return ses_fast.enable(MAKE[request.param]())


@pytest.fixture(scope="module")
def pipe():
    return ses_fast.enable(tiny_z_image())


def stock_image(pipe, latents, **call):
    """The enabled pipeline's image of a noise, without a search."""
    config = SESConfig(latents=latents, progress=False)
    return pipe(**BASE | SES | call, ses_config=config)


def generation(pipe, strategy="ses", **config):
    """A search's first candidates."""
    seen = []
    search(pipe, 4, FOUR, strategy=strategy, on_preview=lambda images, *_: seen.extend(images), **config)
    return seen


# ---------------------------------------------------------------- a race


def test_rungs_are_the_first_steps_at_their_sigma():
    sigmas = [1.0, 0.9, 0.75, 0.5]
    assert rungs_of(((0.9, 0.5), (0.6, 0.25)), sigmas) == [Rung(2, 0.5)]  # the last step is the image itself
    assert rungs_of(((0.8, 0.5), (0.75, 0.3)), sigmas) == [Rung(3, 0.3)]  # of two at one step the stricter
    assert rungs_of(((0.4, 0.5),), sigmas) == []
    twenty = torch.linspace(1, 1 / 20, 20)
    flux = (1.878 * twenty / (1 + 0.878 * twenty)).tolist()  # FLUX.1 at 512 pixels
    assert [rung.step for rung in rungs_of(DEFAULT_RACE, flux)] == [7, 9, 12]


def test_the_better_share_goes_on_and_the_earlier_of_equals():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([1.0, nan, 3.0, 3.0, -inf, 2.0])
    assert who_goes_on(scores, 0.5, 6).tolist() == [2, 3, 5]
    assert who_goes_on(scores, 1 / 6, 6).tolist() == [2]
    assert who_goes_on(scores, 0.01, 6).tolist() == [2]  # never none
    assert who_goes_on(scores, 0.5, 6, keep_first=True).tolist() == [0, 2, 3, 5]
    assert who_goes_on(torch.zeros(10), 0.7, 10).tolist() == list(range(7))  # not 8, as 0.7 * 10 in floats might say


def test_a_race_stops_the_worse_and_keeps_the_survivors_exact(family):
    _, plain, every = search(family, 4, FOUR)
    _, result, seen = search(family, 4, FOUR, preview=RACE)
    stopped = [one.steps for one in result.trace]
    assert 1 <= stopped.count(None) < 4 and stopped[0] is None  # some, and always the base
    for one, same, image, other in zip(result.trace, plain.trace, seen.images, every.images, strict=True):
        if one.steps is None:
            assert one.score == same.score and torch.equal(image, other)
        else:
            assert one.score != same.score and not torch.equal(image, other)
    assert result.forwards["preview"] < plain.forwards["preview"] == 16
    assert result.best.steps is None


def test_an_early_image_is_what_the_denoiser_foresees(pipe):
    """Of a straight path every early image is the final one: x0 = x - sigma v is exact there."""
    search(pipe, 4, FOUR)
    finals, stock = pipe.ses_result, pipe.model_fn
    target = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))

    def straight(latents, timestep, **_):
        return (latents - target) / (timestep / 1000)

    try:
        pipe.model_fn = straight
        _, result, seen = search(pipe, 4, FOUR, preview=RACE)
    finally:
        pipe.model_fn = stock
    assert {one.steps for one in result.trace} != {None} and finals is not result
    for image in seen.images:
        torch.testing.assert_close(image, seen.images[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fits", [0, 8], ids=["from the start", "for those that go on alone"])
def test_memory_that_runs_out_on_the_way_changes_no_race(pipe, fits, monkeypatch):
    """Room for three in a forward and two in the decoder: of smaller previews that are raced and scored again.

    fits: a batch that does all the same, as where others took memory later.
    """
    settings = {"preview": dataclasses.replace(RACE, scale=2, refine=2), "dwt_level": 1, "popsize": 8, "k_elites": 3}
    _, alone, _ = search(pipe, 16, FOUR, **settings)
    unit, tried = pipe.units[-1], []

    def scarce(function, room, rows):
        def limited(*args, **inputs):
            tried.append(rows(args, inputs))
            if room < tried[-1] != fits:
                raise torch.OutOfMemoryError("no room")
            return function(*args, **inputs)

        return limited

    forward = scarce(unit.forward_together, 3, lambda args, inputs: len(inputs["latents"]))
    monkeypatch.setattr(unit, "forward_together", forward)
    monkeypatch.setattr(unit, "decode", scarce(unit.decode, 2, lambda args, inputs: len(args[1])))
    _, result, _ = search(pipe, 16, FOUR, batch_size="auto", **settings)
    assert {8, 4, 2} <= set(tried)
    assert [one.steps for one in result.trace] == [one.steps for one in alone.trace]
    assert result.best.index == alone.best.index and result.best.generation == alone.best.generation
    torch.testing.assert_close(result.state.scores, alone.state.scores, rtol=0, atol=1e-5)
    assert [one.score for one in result.refined] == pytest.approx([one.score for one in alone.refined], abs=1e-5)


def test_shares_are_of_those_that_started_and_survivors_go_on_together(pipe):
    race = Preview(race=((0.95, 0.5), (0.8, 0.25)))
    with forward_sizes(pipe) as sizes:
        _, result, _ = search(pipe, 8, FOUR, popsize=8, include_base=False, batch_size=8, preview=race)
    left = [sum(one.steps is None or one.steps > step for one in result.trace) for step in range(4)]
    assert left[0] == 8 and left[-1] == 2 and 4 in left
    assert [size for size, _ in itertools.groupby(sizes)][:3] == [8, 4, 2]


@pytest.mark.parametrize("batch_size", [2, 3, "auto"])
def test_no_batch_changes_who_is_stopped(pipe, batch_size):
    _, one, _ = search(pipe, 11, FOUR, preview=RACE)
    _, many, _ = search(pipe, 11, FOUR, preview=RACE, batch_size=batch_size)
    assert [e.steps for e in one.trace] == [e.steps for e in many.trace]
    torch.testing.assert_close(many.state.scores, one.state.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(many.latents, one.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CHEAP)
def test_a_search_of_cheap_previews_goes_on_from_its_state(pipe, name, tmp_path):
    call = FOUR | (GUIDED if not CHEAP[name].cfg else {})
    whole, result, _ = search(pipe, 8, call, preview=CHEAP[name], dwt_level=1)
    search(pipe, 4, call, preview=CHEAP[name], dwt_level=1)
    pipe.ses_result.save(tmp_path / "half")
    state = SearchResult.load(tmp_path / "half").state
    image, again, _ = search(pipe, 8, call, preview=CHEAP[name], dwt_level=1, state=state)
    assert again.trace == result.trace and again.refined == result.refined
    assert torch.equal(again.latents, result.latents) and (pixels(image) == pixels(whole)).all()
    again.save(tmp_path / "whole")
    kept = SearchResult.load(tmp_path / "whole")
    assert kept.trace == result.trace and kept.refined == result.refined and kept.best == result.best
    assert kept.score == result.score and kept.base_score == result.base_score and kept.forwards == again.forwards
    race = None if CHEAP[name].race else RACE.race
    for other in ({"scale": 3 - CHEAP[name].scale}, {"race": race}, {"cfg": not CHEAP[name].cfg}):
        with pytest.raises(ValueError, match=f"its preview.{next(iter(other))} was"):
            search(pipe, 12, call, preview=dataclasses.replace(CHEAP[name], **other), dwt_level=1, state=state)


def test_a_callback_is_told_how_far_each_candidate_came(pipe):
    told = []
    search(pipe, 4, FOUR, preview=RACE, on_preview=lambda images, scores, generation, first, steps: told.append(steps))
    search(pipe, 4, FOUR, on_preview=lambda *given, steps=None: told.append(steps))
    assert told[0].tolist() == [one.steps or 0 for one in pipe_trace(told, pipe)] and len(told[0]) == 4
    assert [steps.tolist() for steps in told[1:]] == [[0]] * 4


def pipe_trace(told, pipe):
    _, result, _ = search(pipe, 4, FOUR, preview=RACE)
    return result.trace


def test_a_weighed_race_ranks_by_the_sum(pipe):
    from ses_fast.rewards.weighted import WeightedReward

    contrast = lambda images, prompt: images.float().std((1, 2, 3))  # noqa: E731
    reward = WeightedReward({"light": brightness, "contrast": contrast}, {"light": 1.0, "contrast": 0.5})
    _, result, _ = search(pipe, 8, FOUR | {"ses_reward_model": reward}, preview=RACE)
    assert {one.steps for one in result.trace} > {None}
    assert all(set(one.members) == {"light", "contrast"} for one in result.trace)


def test_a_race_needs_a_scheduler_of_the_librarys_own(pipe):
    stock = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **others: stock(*args, **others)
    try:
        with pytest.raises(ValueError, match="leave race out"):
            search(pipe, 4, FOUR, preview=RACE)
    finally:
        del pipe.scheduler.step


# ---------------------------------------------------------------- half the size


def test_half_the_size_draws_the_candidates_own_low_band(family):
    _, plain, _ = search(family, 3, FOUR, dwt_level=1, popsize=3)
    _, result, seen = search(family, 3, FOUR, dwt_level=1, popsize=3, preview=Preview(scale=2))
    assert [tuple(image.shape[-2:]) for image in seen.images] == [(32, 32)] * 3
    state = result.state
    candidates, _ = ask(start(state.base, state.config, seed=state.seed, include_base=True))
    half = ses_fast.ops.split_low_band(candidates, 1)[0]
    call = BASE | {"height": 32, "width": 32} | FOUR
    for noise, image in zip(half.split(1), seen.images, strict=True):
        expected = family(**call | SES, ses_config=SESConfig(latents=noise.to(state.base.dtype), progress=False))
        got = ((image + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        assert abs(pixels(expected) - got.astype(int)).max() <= 1
    assert plain.latents.shape == result.latents.shape


@pytest.mark.parametrize(
    "config, message",
    [
        ({"wavelet_name": "db2"}, "lowest Haar band"),
        ({"dwt_level": 0}, "lowest Haar band"),
    ],
)
def test_half_the_size_needs_haar(config, message):
    with pytest.raises(ValueError, match=message):
        SESConfig(preview=Preview(scale=2), **config)


def test_half_the_size_leaves_the_pipeline_as_it_was(pipe):
    scheduler = {**vars(pipe.scheduler)}
    before = pipe(**BASE)
    search(pipe, 4, FOUR, dwt_level=1, preview=Preview(scale=2, refine=1))
    assert (pixels(pipe(**BASE)) == pixels(before)).all()
    assert vars(pipe.scheduler).keys() == scheduler.keys()


# ---------------------------------------------------------------- refined


def test_the_answer_is_the_best_final_image_and_not_made_twice(family):
    call = {"num_inference_steps": 4, "ses_inference_steps": 2}
    image, result, _ = search(family, 6, call, preview=Preview(refine=2))
    assert len(result.refined) in (2, 3) and (0, 0) in [(one.generation, one.index) for one in result.refined]
    assert result.score == max(one.score for one in result.refined) and result.forwards["refine"] == 4 * len(
        result.refined
    )
    assert result.score >= result.base_score
    again = stock_image(family, result.latents, num_inference_steps=4)
    assert (pixels(again) == pixels(image)).all()
    full = (torch.from_numpy(pixels(image)).float() + 0.5) / 127.5 - 1
    assert abs(full.mean().item() - result.score) < 0.01


def test_the_best_are_scored_again_by_the_calls_own_schedule(pipe):
    """Whatever sets the pipeline's scheduler meanwhile: a callback's call, or previews of a size with another shift."""

    def busy(*_):
        pipe(**BASE | {"num_inference_steps": 4, "sigma_shift": 9.0})

    quiet, disturbed = (
        search(pipe, 4, FOUR, preview=Preview(refine=2), **each)[1] for each in ({}, {"on_preview": busy})
    )
    assert disturbed.refined == quiet.refined


def test_no_forward_is_made_twice(pipe):
    stock, calls = pipe.model_fn, []
    try:
        pipe.model_fn = lambda *args, **inputs: calls.append(1) or stock(*args, **inputs)
        _, result, _ = search(pipe, 4, FOUR, preview=Preview(refine=2))
    finally:
        pipe.model_fn = stock
    assert len(calls) == sum(result.forwards.values()) == 16 + 4 * len(result.refined)


def test_refine_cannot_be_more_than_the_elites():
    with pytest.raises(ValueError, match="k_elites is 2"):
        SESConfig(k_elites=2, preview=Preview(refine=3))


def test_a_refinement_that_fails_keeps_the_search(pipe):
    calls = itertools.count()

    def fails(images, prompt):
        if next(calls) >= 4:
            raise ArithmeticError("no more")
        return brightness(images, prompt)

    with pytest.raises(ArithmeticError) as caught:
        search(pipe, 4, FOUR | {"ses_reward_model": fails}, preview=Preview(refine=1))
    assert caught.value.ses_result.evaluations == pipe.ses_result.evaluations == 4
    assert (pixels(pipe(**BASE)) == pixels(pipe(**BASE))).all() and len(pipe.scheduler.timesteps) == 2


# ---------------------------------------------------------------- guidance, caches, time


def test_previews_without_guidance_cost_half(pipe):
    _, guided, _ = search(pipe, 4, FOUR | GUIDED)
    _, free, seen = search(pipe, 4, FOUR | GUIDED, preview=Preview(cfg=False))
    _, plain, unguided = search(pipe, 4, FOUR)
    assert guided.forwards["preview"] == 2 * free.forwards["preview"]
    assert all(torch.equal(a, b) for a, b in zip(seen.images, unguided.images, strict=True))


@pytest.mark.parametrize("preview", [Preview(refine=2), dataclasses.replace(RACE, refine=2)])
def test_a_cache_that_the_user_turned_on_leaks_into_no_candidate(preview):
    pipe = ses_fast.enable(tiny_flux())
    cached = {"num_inference_steps": 4, "ses_inference_steps": 4, "tea_cache_l1_thresh": 0.5}
    image, result, _ = search(pipe, 6, cached, preview=preview)
    alone = stock_image(pipe, result.latents, num_inference_steps=4, tea_cache_l1_thresh=0.5)
    assert (pixels(alone) == pixels(image)).all()
    _, plain, _ = search(pipe, 6, FOUR, preview=dataclasses.replace(preview, refine=0))
    assert [one.score for one in plain.trace] == [one.score for one in result.trace]


def test_a_search_may_be_given_time_in_place_of_a_budget(pipe):
    _, result, _ = search(pipe, None, FOUR, time_limit=0.5)
    assert result.stopped == "time_limit" and result.evaluations >= 4 and result.seconds["total"] < 30
    _, again, _ = search(pipe, result.evaluations, FOUR)
    assert again.trace == result.trace and torch.equal(again.latents, result.latents)
    with pytest.raises(ValueError, match="give one of them"):
        search(pipe, None, FOUR)


def test_time_is_left_for_the_final_image(pipe):
    previews = 0.4
    _, short, _ = search(pipe, None, FOUR | {"num_inference_steps": 200}, time_limit=previews)
    _, long, _ = search(pipe, None, FOUR, time_limit=previews)
    assert short.evaluations < long.evaluations


@pytest.mark.parametrize(("refine", "seconds"), [(0, 8 * 0.5 + 0.25), (2, 3 * (8 * 0.5 + 0.25 + 2.0))])
def test_the_time_that_is_left_holds_the_rewards_of_those_scored_again(refine, seconds):
    """Ten previews of 4 forwards took 20 s to denoise, 2.5 to decode and 20 to score: a slow reward."""
    spent = SimpleNamespace(seconds={"denoise": 20.0, "decode": 2.5, "reward": 20.0})
    previews = SimpleNamespace(stopwatch=spent, forwards=40, looks=10, scale=1)
    final = SimpleNamespace(steps=8, forwards_a_step=1)
    assert run._final_seconds(previews, final, refine) == pytest.approx(seconds)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scale": 4}, "must be 1, or 2"),
        ({"scale": True}, "must be 1, or 2"),
        ({"scale": 2.0}, "must be 1, or 2"),
        ({"race": "fast"}, "both falling"),
        ({"race": ((0.5, 0.5), (0.7, 0.3))}, "both falling"),
        ({"race": ((0.7, 0.3), (0.5, 0.5))}, "both falling"),
        ({"race": ((1.0, 0.3),)}, "both falling"),
        ({"race": ()}, "both falling"),
        ({"race": 3}, "both falling"),
        ({"cfg": 1}, "must be True or False"),
        ({"refine": -1}, "refine"),
        ({"refine": 1.5}, "refine"),
    ],
)
def test_impossible_previews_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preview(**settings)


def test_the_documented_call_batches_by_itself(pipe):
    seen = Seen()
    config = SESConfig(progress=False, popsize=4, k_elites=2, on_preview=seen)
    pipe(**BASE | SES | FOUR, ses_eval_budget=4, ses_config=config)
    assert config.batch_size == "auto" and seen.numbers == [(0, 0, 4)]
    assert QUIET["batch_size"] == 1  # what the other tests look at


# ---------------------------------------------------------------- what an attack found


def test_a_callback_that_writes_on_the_steps_makes_no_early_score_final(pipe):
    _, result, _ = search(pipe, 4, FOUR, preview=RACE)
    vandal = lambda images, scores, generation, first, steps: steps.zero_()  # noqa: E731
    _, spoilt, _ = search(pipe, 4, FOUR, preview=RACE, on_preview=vandal)
    assert spoilt.trace == result.trace and spoilt.best == result.best


def test_a_base_that_wins_in_full_alone_is_saved_and_loaded(pipe, tmp_path):
    calls = itertools.count()

    def reward(images, prompt):
        scores = brightness(images, prompt)
        if next(calls) == 0:
            scores[0] = float("nan")  # the base's preview, and no other
        return torch.where(torch.arange(len(scores)) == len(scores) - 1, 9.0, scores) if len(scores) != 4 else scores

    with pytest.warns(UserWarning, match="not finite"):
        _, result, _ = search(
            pipe, 4, FOUR | {"ses_reward_model": reward}, preview=Preview(refine=2), batch_size="auto"
        )
    assert (result.best.generation, result.best.index) == (0, 0) and result.score == 9.0
    result.save(tmp_path / "found")
    assert SearchResult.load(tmp_path / "found").best == result.best


@pytest.mark.parametrize("name", ["input_image", "controlnet_inputs"])
def test_half_the_size_refuses_what_is_made_for_all_of_it(pipe, name):
    given = {"input_image": PHOTO, "controlnet_inputs": [object()]}[name]
    with pytest.raises(ValueError, match=f"{name}= is made for all of it"):
        search(pipe, 4, FOUR | {name: given}, dwt_level=1, preview=Preview(scale=2))


def test_half_the_size_needs_a_call_that_takes_a_size():
    class Fixed(type(tiny_z_image())):
        def __call__(self, prompt, *, seed=None, side=64, **others):
            return super().__call__(prompt, seed=seed, height=side, width=side, **others)

    pipe = tiny_z_image()
    pipe.__class__ = Fixed
    pipe = ses_fast.enable(pipe)
    call = {name: value for name, value in (BASE | SES | FOUR).items() if name not in ("height", "width")}
    with pytest.raises(ValueError, match="takes height= and width="):
        pipe(**call, ses_config=SESConfig(**QUIET, dwt_level=1, preview=Preview(scale=2)))


def test_half_the_size_does_not_search_what_it_cannot_show(pipe):
    with pytest.raises(ValueError, match="dwt_level 2 or more"):
        search(pipe, 4, FOUR, dwt_level=1, strategy="high_band", preview=Preview(scale=2))


def test_survivors_are_not_filled_up_to_a_generation():
    sizes = []
    batches = Batches(10, most=10, device="cpu", filled=True)
    model = torch.nn.Linear(1, 1)
    run = lambda n, fill_to: batches.run(lambda x: sizes.append(len(x)) or x, torch.zeros(n, 2), model, fill_to)  # noqa: E731
    for n, fill_to in ((10, None), (7, 8), (3, 4), (3, None), (1, 1)):
        assert len(run(n, fill_to)) == n
    assert sizes == [10, 8, 4, 10, 1]


def test_a_race_that_ends_inside_a_generation_is_warned_of(pipe):
    with pytest.warns(UserWarning, match="ends inside a generation of 4"):
        search(pipe, 6, FOUR, preview=RACE)


def test_scores_are_handed_over_in_the_rewards_dtype(pipe):
    given = []
    search(pipe, 4, FOUR, preview=RACE, on_preview=lambda images, scores, *_: given.append(scores.dtype))
    search(pipe, 4, FOUR, on_preview=lambda images, scores, *_: given.append(scores.dtype))
    assert set(given) == {torch.float32}


def test_survivors_of_a_compiled_pipeline_go_on_in_a_smaller_batch(pipe, monkeypatch):
    monkeypatch.setattr("ses_fast.pipelines.diffsynth.renderer.compilation", lambda pipe: object())
    race = Preview(race=((0.95, 0.4), (0.8, 0.2)))
    with forward_sizes(pipe) as sizes:
        search(pipe, 8, FOUR, popsize=8, include_base=False, batch_size=8, preview=race)
    # Four of eight go on, then two; at 0.4 and 0.2 of eight.
    assert [size for size, _ in itertools.groupby(sizes)][:3] == [8, 4, 2]
