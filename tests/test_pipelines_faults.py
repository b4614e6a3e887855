"""What once went wrong in silence, in a search through a pipeline: states, subclasses, clean-ups, copies."""

import copy
import dataclasses
import functools
import pickle
import threading

import numpy as np
import pytest
import torch
from diffsynth.pipelines.z_image import ZImagePipeline
from diffsynth.utils.controlnet import ControlNetInput
from PIL import Image
from tiny import BASE as ANY_BASE
from tiny import PHOTO, QUIET, SES, brightness, pixels, search, tiny_flux2, tiny_z_image
from tiny_clip import save_tiny_clip

import ses_fast
from ses_fast import SESConfig
from ses_fast.pipelines.request import facts, reward_name
from ses_fast.rewards import from_pil
from ses_fast.rewards.weighted import WeightedReward

BASE = {name: value for name, value in ANY_BASE.items() if name != "cfg_scale"}


@pytest.fixture(scope="module")
def pipe():
    return ses_fast.enable(tiny_z_image())


def call(pipe, budget=6, reward=brightness, config=None, **arguments):
    config = SESConfig(**QUIET | (config or {}))
    return pipe(**BASE | SES | {"ses_reward_model": reward} | arguments, ses_eval_budget=budget, ses_config=config)


def contrast(images, prompt):
    return images.float().std((1, 2, 3))


def dark(images, prompt):
    return -brightness(images, prompt)


# ---------------------------------------------------------------- a state knows its search


def of_a_pipeline(other, **changed):
    def run(pipe, state):
        call(other or pipe, 8, config={"state": state}, **changed)

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param({"reward": dark}, "its reward was '.*brightness', this call's is '.*dark'", id="another reward"),
        pytest.param({"prompt": "zebra"}, "its prompt was 'a red fox', this call's is 'zebra'", id="another prompt"),
        pytest.param({"ses_inference_steps": 1}, "ses_inference_steps was 2, this call's is 1", id="fewer steps"),
        pytest.param({"cfg_scale": 2.0}, "its cfg_scale was 1.0, this call's is 2.0", id="another guidance"),
        pytest.param({"negative_prompt": "dark"}, "its negative_prompt was '', this call's is 'dark'", id="negative"),
        pytest.param({"sigma_shift": 7.0}, "its sigma_shift was None, this call's is 7.0", id="another schedule"),
        pytest.param({"input_image": PHOTO}, "its input_image was None, this call's is 'sha256:", id="a picture"),
        pytest.param(
            {"controlnet_inputs": [ControlNetInput(image=PHOTO, scale=0.5)]}, "controlnet_inputs was None", id="control"
        ),
    ],
)
def test_a_state_of_another_search_is_refused_by_name(pipe, arguments, message):
    call(pipe, 3)
    state = pipe.ses_result.state
    with pytest.raises(ValueError, match=f"the state is of another search: .*{message}"):
        call(pipe, 8, config={"state": state}, **arguments)
    call(pipe, 8, config={"state": state}, num_inference_steps=4, cfg_scale=1.0)  # the final image's steps may differ
    assert pipe.ses_result.evaluations == 8


@pytest.mark.parametrize(
    "one, other",
    [
        pytest.param(torch.zeros(2, 3), torch.ones(2, 3), id="tensors of one shape"),
        pytest.param(np.zeros((2, 3)), np.zeros((3, 2)), id="arrays of one size"),
        pytest.param(np.zeros(2, np.float32), np.zeros(2, np.int32), id="arrays of other dtypes"),
        pytest.param(PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_180), id="pictures of one size"),
        pytest.param(PHOTO.convert("L"), PHOTO.convert("L").convert("P"), id="pictures of other modes"),
        pytest.param(
            [ControlNetInput(image=PHOTO, scale=1.0)], [ControlNetInput(image=PHOTO, scale=0.2)], id="other scales"
        ),
        pytest.param([ControlNetInput(image=PHOTO)], [ControlNetInput(image=PHOTO.convert("L"))], id="other controls"),
        pytest.param({"a": 1}, {"a": 2}, id="dicts"),
    ],
)
def test_arguments_that_differ_have_other_facts(one, other):
    assert facts({"x": one}) != facts({"x": other})
    assert facts({"x": one}) == facts({"x": copy.deepcopy(one)})


def test_one_value_in_two_guises_is_one_fact(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    assert facts({"x": Image.open(tmp_path / "photo.png")}) == facts({"x": PHOTO})
    assert facts({"x": np.float64(3.0)}) == facts({"x": 3.0}) and facts({"x": torch.tensor(2)})


def test_what_a_reward_is_called_in_a_state():
    assert reward_name("hps") == reward_name("hps_v2.1") == "hps"
    assert reward_name({"hps_v2.1": 1}) == {"hps": 1.0}
    one, other = (functools.partial(brightness, prompt=prompt) for prompt in ("a", "b"))
    assert reward_name(one) != reward_name(other)
    assert reward_name(from_pil(contrast)) != reward_name(from_pil(dark)) != reward_name(dark)


def test_a_state_of_another_pipeline_is_refused():
    z_image, flux = ses_fast.enable(tiny_z_image()), ses_fast.enable(tiny_flux2(klein=True))
    call(z_image, 3)
    state = z_image.ses_result.state
    with pytest.raises(ValueError, match="of another search: its .*, this call's is"):
        call(flux, 6, config={"state": state}, seed=None)


def test_a_refused_call_keeps_the_result_that_it_was_to_go_on_from(pipe):
    call(pipe, 3)
    result = pipe.ses_result
    for wrong in ({"prompt": "a red foxx"}, {"ses_inference_steps": "2"}):
        with pytest.raises(ValueError):
            call(pipe, 8, config={"state": result.state}, **wrong)
        assert pipe.ses_result is result


def test_an_error_that_another_call_left_brings_no_result_of_it(pipe):
    stale = RuntimeError("the scorer's own, raised each time")

    def breaks(images, prompt):
        raise stale

    with pytest.raises(RuntimeError):
        call(pipe, 3, breaks)
    assert stale.ses_result is pipe.ses_result
    with pytest.raises(RuntimeError):
        call(pipe, 3, config={"report_rewards": {"breaks": breaks}}, prompt="zebra")
    assert pipe.ses_result is None


def test_a_sum_of_rewards_with_a_scale_needs_no_first_generation(pipe):
    call(pipe, 1, WeightedReward({"b": brightness}, {"b": 2.0}, {"b": (1.0, 0.5)}))
    (only,) = pipe.ses_result.trace
    assert only.score == pytest.approx(2 * (only.members["b"] - 1) / 0.5)


@pytest.mark.parametrize("scale", [5, {"b": [1, 2, 3]}, {"other": [0, 1]}, {"b": [float("nan"), 1]}], ids=str)
def test_a_state_with_a_scale_of_no_search_is_refused(pipe, scale):
    seen = []
    reward = WeightedReward({"b": lambda images, prompt: seen.append(1) or brightness(images, prompt)}, {"b": 1.0})
    call(pipe, 4, reward)
    state = dataclasses.replace(
        pipe.ses_result.state, fingerprint={**pipe.ses_result.state.fingerprint, "scale": scale}
    )
    seen.clear()
    with pytest.raises(ValueError, match="scale"):
        call(pipe, 8, reward, {"state": state})
    assert not seen  # before a preview is paid


def test_a_search_that_was_interrupted_before_its_first_score_goes_on(pipe):
    def interrupted(images, prompt):
        raise KeyboardInterrupt

    interrupted.__qualname__, interrupted.__module__ = brightness.__qualname__, brightness.__module__
    with pytest.raises(KeyboardInterrupt):
        call(pipe, 4, interrupted)
    assert pipe.ses_result.evaluations == 0
    call(pipe, 4, config={"state": pipe.ses_result.state})
    assert pipe.ses_result.evaluations == 4


def test_no_budget_with_a_state_is_the_image_of_its_noise(pipe):
    torch.manual_seed(3)
    call(pipe, 3, seed=None)
    result = pipe.ses_result
    image = call(pipe, 0, config={"state": result.state}, seed=None)
    assert np.array_equal(pixels(image), pixels(pipe(**BASE | {"seed": result.seed}))) and pipe.ses_result is None


def test_a_state_that_does_not_say_what_it_scored_is_refused(pipe):
    call(pipe, 1)
    base = pipe.ses_result.state.base
    state = ses_fast.evolve(
        base, lambda z: z.mean().item(), 3, 4, 2, dwt_level=1, include_base=True, seed=3, progress=False
    ).state
    with pytest.raises(ValueError, match="does not say what its scores are of"):
        call(pipe, 6, config={"state": state})


def test_a_pipelines_state_is_no_plain_searchs(pipe):
    call(pipe, 3)
    state = pipe.ses_result.state
    settings = {"popsize": 4, "k_elites": 2, "dwt_level": 1, "include_base": True, "progress": False}
    with pytest.raises(ValueError, match="comes? from a pipeline's call .*a red fox"):
        ses_fast.evolve(state.base, lambda z: 0.0, 6, **settings, state=state)


def test_the_same_kind_of_reward_with_other_weights_is_another_reward(pipe, tmp_path):
    rewards = [ses_fast.load_reward("clip", save_tiny_clip(tmp_path / name, seed=1), "cpu") for name in ("a", "b")]
    call(pipe, 3, rewards[0])
    state = pipe.ses_result.state
    call(pipe, 4, rewards[0], {"state": state})
    with pytest.raises(ValueError, match=r"its reward was 'clip \(a\)', this call's is 'clip \(b\)'"):
        call(pipe, 6, rewards[1], {"state": state})
    ses_fast.unload_rewards()


def test_the_scale_of_a_sum_of_rewards_belongs_to_the_state(pipe, tmp_path):
    reward = WeightedReward({"b": brightness, "c": contrast}, {"b": 1.0, "c": 1.0})
    call(pipe, 12, reward)
    whole = pipe.ses_result
    call(pipe, 6, reward)
    pipe.ses_result.save(tmp_path / "half")
    call(pipe, 6, reward, prompt="zebra")  # the same loaded reward, for another search
    state = ses_fast.SearchResult.load(tmp_path / "half").state
    other = WeightedReward({"b": brightness, "c": contrast}, {"b": 1.0, "c": 1.0})
    call(pipe, 12, other, {"state": state})
    assert pipe.ses_result.trace == whole.trace  # the members' raw scores too
    assert set(whole.trace[0].members) == set(whole.trace[-1].members) == {"b", "c"}
    heavier = WeightedReward({"b": brightness, "c": contrast}, {"b": 1.0, "c": 2.0})
    with pytest.raises(ValueError, match="its reward.c was 1.0, this call's is 2.0"):
        call(pipe, 12, heavier, {"state": state})


def test_a_search_that_broke_in_its_first_generation_goes_on(pipe):
    call(pipe, 6)
    whole, calls = pipe.ses_result, []

    def breaks(images, prompt):
        calls.append(prompt)
        if len(calls) == 3:
            raise RuntimeError("lost")
        return brightness(images, prompt)

    breaks.__qualname__, breaks.__module__ = brightness.__qualname__, brightness.__module__
    with pytest.raises(RuntimeError, match="lost") as caught:
        call(pipe, 6, breaks)
    call(pipe, 6, config={"state": caught.value.ses_result.state})
    assert pipe.ses_result.trace == whole.trace
    with pytest.raises(ValueError, match="its prompt was"):
        call(pipe, 6, config={"state": caught.value.ses_result.state}, prompt="zebra")


def test_a_state_gives_the_base_only_where_the_call_has_no_noise_of_its_own():
    """A given initial noise is the call's own: the state's base must not take its place in silence."""
    pipe = ses_fast.enable(tiny_flux2(klein=True))
    call(pipe, 3, seed=None)
    state = pipe.ses_result.state
    noise = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(5)).to(state.base.dtype)
    with pytest.raises(ValueError, match="base latents are not these"):
        call(pipe, 6, config={"state": state}, seed=None, initial_noise=noise)


# ---------------------------------------------------------------- what is handed out


@pytest.mark.parametrize("order", [("writes", "b"), ("b", "writes")])
def test_a_reward_that_writes_on_its_images_spoils_no_other(pipe, order):
    def writes(images, prompt):
        scores = brightness(images, prompt)
        images.zero_()
        return scores

    rewards = {"writes": writes, "b": brightness}
    seen = []
    call(
        pipe,
        4,
        WeightedReward({name: rewards[name] for name in order}, dict.fromkeys(order, 1.0)),
        {"report_rewards": {name: rewards[name] for name in order}, "on_preview": lambda *given: seen.append(given[0])},
    )
    result = pipe.ses_result
    assert all(each.members["writes"] == each.members["b"] for each in result.trace)
    assert result.held_out["writes"] == result.held_out["b"] and result.held_out["b"].answer != 0
    assert all(images.std() > 0.1 for images in seen)


def test_a_plain_reward_that_writes_on_its_images_spoils_no_callback(pipe):
    seen = []

    def writes(images, prompt):
        scores = brightness(images, prompt)
        images.zero_()
        return scores

    call(pipe, 4, writes, {"on_preview": lambda *given: seen.append(given[0])})
    assert len(seen) == 4 and all(images.std() > 0.1 for images in seen)


@pytest.mark.parametrize("reward", [brightness, WeightedReward({"b": brightness}, {"b": 1.0})], ids=["plain", "sum"])
def test_a_callback_that_writes_on_what_it_gets_changes_nothing(pipe, reward):
    call(pipe, 8, reward)
    clean = pipe.ses_result

    def vandal(images, scores, generation, first):
        images.zero_()
        scores.fill_(99.0)

    call(pipe, 8, reward, {"on_preview": vandal})
    assert pipe.ses_result.trace == clean.trace


def test_a_callback_that_fails_loses_no_score(pipe):
    def full(images, scores, generation, first):
        if generation == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        call(pipe, 12, config={"on_preview": full, "batch_size": "auto"})
    assert pipe.ses_result.evaluations == 8


def test_a_callback_may_make_a_stock_image(pipe):
    stock, images = pixels(pipe(**BASE)), []
    image = call(pipe, 8, config={"on_generation": lambda result: images.append(pipe(**BASE))})
    assert len(images) == 2 and all(np.array_equal(pixels(each), stock) for each in images)
    assert pipe.ses_result.evaluations == 8 and np.array_equal(pixels(image), pixels(call(pipe, 8)))


# ---------------------------------------------------------------- asked for and not done


def test_a_call_that_does_not_run_the_units_is_an_error():
    class Cached(ZImagePipeline):
        def __call__(self, prompt="", seed=None, **kwargs):
            return PHOTO

    pipe = tiny_z_image()
    pipe.__class__ = Cached
    ses_fast.enable(pipe)
    assert pipe("a fox") is PHOTO
    with pytest.raises(ValueError, match="Cached does not run pipe.units, so SES has searched nothing"):
        call(pipe)


def test_a_call_that_runs_the_stock_one_twice_is_an_error():
    class Twice(ZImagePipeline):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    pipe = tiny_z_image()
    pipe.__class__ = Twice
    ses_fast.enable(pipe)
    with pytest.raises(ValueError, match="Twice runs its units more than once") as caught:
        call(pipe)
    assert pipe.ses_result.evaluations == 6 and caught.value.__traceback__ is not None
    assert pipe.units[-1].call is None
    pipe(**BASE)  # and without SES it does as before


# ---------------------------------------------------------------- an error hides no error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the user's")], ids=repr)
def test_a_clean_up_that_fails_does_not_replace_the_error(error):
    pipe = ses_fast.enable(tiny_z_image())

    def reward(images, prompt):
        def lost(names):
            raise RuntimeError("CUDA error: device-side assert triggered")

        pipe.load_models_to_device = lost
        raise error

    with pytest.raises(type(error)) as caught:
        call(pipe, reward=reward)
    assert caught.value is error and error.ses_result is pipe.ses_result
    assert "device-side assert" in error.__notes__[0]


@pytest.mark.parametrize("step, expected", [(1, "the denoiser, in step 1 of 2"), (2, "the denoiser, in step 2 of 2")])
def test_the_part_that_fails_first_is_named_the_denoiser(step, expected):
    pipe, calls = ses_fast.enable(tiny_z_image()), []
    stock = pipe.scheduler.step

    def nan_from(predicted, timestep, sample, **others):
        calls.append(None)
        latents = stock(predicted, timestep, sample, **others)
        return latents * float("nan") if (len(calls) - 1) % 2 + 1 >= step else latents

    pipe.scheduler.step = nan_from
    with pytest.warns(UserWarning, match=expected), pytest.raises(RuntimeError, match=expected):
        call(pipe, 3)


def test_the_part_that_fails_first_is_named_the_decoder():
    pipe = ses_fast.enable(tiny_z_image())
    pipe.vae_decoder.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    expected = "the denoiser's latents are finite, and the decoder's image is not"
    with pytest.warns(UserWarning, match=expected), pytest.raises(RuntimeError, match=expected):
        call(pipe, 3)


def test_a_diagnosis_that_fails_does_not_end_the_search(pipe, monkeypatch):
    scores = iter([1.0, float("nan"), 2.0, 3.0])
    monkeypatch.setattr("ses_fast.pipelines.previews.Previews._why_not_finite", lambda *given: 1 / 0)
    with pytest.warns(UserWarning, match="could not be found: ZeroDivisionError"):
        call(pipe, 4, lambda images, prompt: next(scores))
    assert pipe.ses_result.evaluations == 4 and pipe.ses_result.score == 3.0


def test_the_part_that_fails_first_is_named_the_reward(pipe):
    expected = "the image is finite, and the score of the reward is not"
    with pytest.warns(UserWarning, match=expected), pytest.raises(RuntimeError, match=expected):
        call(pipe, 3, lambda images, prompt: float("nan"))
    reward = WeightedReward({"good": brightness, "bad": lambda i, p: [float("nan")] * len(i)}, {"good": 1, "bad": 1})
    with pytest.warns(UserWarning, match="the score of the reward 'bad' is not"), pytest.raises(RuntimeError):
        call(pipe, 3, reward)


# ---------------------------------------------------------------- enable changes only the call


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_enabled_pipeline_pickles_as_the_stock_one(protocol):
    pipe = tiny_flux2(klein=True)  # before its first call: transformers then hooks functions into it
    stock = pickle.dumps(pipe, protocol)
    ses_fast.enable(pipe)
    again = pickle.loads(pickle.dumps(pipe, protocol))
    assert type(again) is type(pipe) and isinstance(again, type(pipe)._ses_stock)
    assert np.array_equal(pixels(call(again, 3)), pixels(call(pipe, 3)))
    ses_fast.disable(again)
    assert type(again) is type(pickle.loads(stock)) and not hasattr(again, "ses_result")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_and_its_original_are_disabled_apart(copied):
    pipe = ses_fast.enable(tiny_flux2(klein=True))
    stock = pixels(pipe(**BASE))
    other = copied(pipe)
    ses_fast.disable(other)
    assert np.array_equal(pixels(other(**BASE)), stock)
    call(pipe, 3)
    assert pipe.ses_result.evaluations == 3
    ses_fast.disable(pipe)
    with pytest.raises(TypeError, match="enable_ses"):
        pipe(**BASE, enable_ses=True)


def test_enabling_a_copy_leaves_the_original_alone():
    stock = tiny_flux2(klein=True)
    units, other = list(stock.units), copy.copy(stock)
    ses_fast.enable(other)
    assert stock.units == units and len(other.units) == len(units) + 1


def test_a_copy_of_a_compiled_pipeline_does_not_undo_the_originals_blocks():
    pipe = tiny_z_image()
    ses_fast.enable(pipe, compile=True)
    compiled = [module for module in pipe.modules() if module._compiled_call_impl is not None]
    other = copy.copy(pipe)
    assert compiled and "_ses_compiled" in vars(pipe) and "_ses_compiled" not in vars(other)
    ses_fast.disable(other)
    assert all(module._compiled_call_impl is not None for module in compiled)
    ses_fast.disable(pipe)
    assert all(module._compiled_call_impl is None for module in compiled)


def test_units_in_a_tuple_stay_a_tuple():
    pipe = tiny_z_image()
    pipe.units = tuple(pipe.units)
    units = pipe.units
    ses_fast.enable(pipe)
    call(pipe, 3)
    assert pipe.ses_result.evaluations == 3 and isinstance(pipe.units, tuple)
    ses_fast.disable(pipe)
    assert pipe.units == units and type(pipe) is ZImagePipeline


# ---------------------------------------------------------------- no budget, and small things


def test_a_budget_of_none_is_the_stock_image_and_loads_nothing(pipe, monkeypatch):
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda *given, **named: pytest.fail("loaded"))
    stock = pixels(pipe(**BASE))
    image = pipe(**BASE, enable_ses=True, ses_eval_budget=0, ses_config=SESConfig(report_rewards=["hps"]))
    assert np.array_equal(pixels(image), stock) and pipe.ses_result is None


def test_the_seconds_are_the_wall_clocks(pipe):
    import time

    begin = time.perf_counter()
    call(pipe, 6, config={"report_rewards": {"dark": dark}})
    wall = time.perf_counter() - begin
    seconds = dict(pipe.ses_result.seconds)
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values())) == pytest.approx(wall, rel=0.02, abs=0.005)
    assert seconds["held_out"] > 0 and min(seconds.values()) >= 0


def test_a_held_out_reward_judges_the_images_that_a_user_gets(pipe):
    judged = []

    def held_out(images, prompt):
        judged.append(images.clone())
        return brightness(images, prompt)

    steps = {"num_inference_steps": 5}
    image = call(pipe, 6, config={"report_rewards": {"held": held_out}, "batch_size": 3}, **steps)
    base = pipe(**BASE | steps)
    assert pipe.ses_result.best.generation + pipe.ses_result.best.index > 0
    shown = [pixels(pipe.vae_output_to_image(each)) for each in judged]
    assert np.array_equal(shown[0], pixels(base)) and np.array_equal(shown[1], pixels(image)) and len(shown) == 2
    judged.clear()
    call(pipe, 1, config={"report_rewards": {"held": held_out}})
    assert len(judged) == 1  # the answer is the base
    held = pipe.ses_result.held_out["held"]
    assert held.base == held.answer


@pytest.mark.parametrize(
    "noise", [{"seed": 5}, {"generator": torch.Generator().manual_seed(5)}], ids=["seed", "generator"]
)
def test_the_base_is_judged_where_the_search_alone_has_a_seed(pipe, noise):
    call(pipe, 1, config={"report_rewards": {"b": brightness}} | noise, seed=None)
    held = pipe.ses_result.held_out["b"]
    assert held.base == held.answer == pytest.approx(pipe.ses_result.base_score, abs=1 / 127.5)


def test_the_base_of_a_state_is_judged_too(pipe):
    torch.manual_seed(0)
    call(pipe, 3, seed=None)
    state, seed = pipe.ses_result.state, pipe.ses_result.seed
    call(pipe, 6, config={"state": state, "report_rewards": {"dark": dark}}, seed=None)
    from_state = pipe.ses_result.held_out
    call(pipe, 6, config={"report_rewards": {"dark": dark}}, seed=seed)
    assert from_state == pipe.ses_result.held_out


def test_settings_compare_and_print_without_harm(pipe):
    latents = torch.zeros(1, 16, 8, 8)
    call(pipe, 3)
    state = pipe.ses_result.state
    assert SESConfig() == SESConfig() and SESConfig(seed=1) != SESConfig(seed=2)
    assert SESConfig(latents=latents) == SESConfig(latents=latents) != SESConfig(latents=latents.clone())
    assert hash(SESConfig(seed=1)) == hash(SESConfig(seed=1)) and SESConfig() != 3
    config = SESConfig(popsize=4, k_elites=2, dwt_level=1, state=state, on_preview=print, report_rewards=["hps"])
    expected = "popsize=4, k_elites=2, dwt_level=1, on_preview=<builtin_function_or_method>, state=<SearchState>"
    assert repr(config) == f"SESConfig({expected}, report_rewards=['hps'])"
    assert repr(SESConfig()) == "SESConfig()"


def test_two_threads_with_pipelines_of_their_own_and_one_reward():
    reward = WeightedReward({"b": brightness, "c": contrast}, {"b": 1.0, "c": 1.0})
    pipes = [ses_fast.enable(tiny_z_image()) for _ in range(2)]
    prompts = ["a red fox", "zebra"]
    alone = []
    for one, prompt in zip(pipes, prompts, strict=True):
        call(one, 8, reward, prompt=prompt)
        alone.append(one.ses_result.trace)
    threads = [
        threading.Thread(target=call, args=(one, 8, reward), kwargs={"prompt": prompt})
        for one, prompt in zip(pipes, prompts, strict=True)
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert [one.ses_result.trace for one in pipes] == alone


def test_sides_that_differ_beside_the_text_do_not_share_a_batch():
    """CFG's two sides share a batch only where everything but their texts is equal."""
    pipe = ses_fast.enable(tiny_flux2(klein=True))
    unit = pipe.units[-1]

    sizes, forward = [], unit.forward_together
    stock = unit.process

    def process(pipe, inputs_shared, inputs_posi, inputs_nega):
        inputs_nega["text_ids"] = inputs_posi["text_ids"].clone() + 1
        return stock(pipe, inputs_shared, inputs_posi, inputs_nega)

    unit.process = process
    unit.forward_together = lambda *args, **inputs: sizes.append(len(inputs["latents"])) or forward(*args, **inputs)
    search(pipe, budget=4, call={"cfg_scale": 3.0, "negative_prompt": "dark"}, batch_size=4)
    assert set(sizes) == {4}  # not 8: the sides go apart
