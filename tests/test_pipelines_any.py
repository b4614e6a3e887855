"""The documented call on DiffSynth's other image pipelines, each driven by its own call, with tiny random weights."""

import functools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffsynth.diffusion.base_pipeline import BasePipeline, PipelineUnit
from diffsynth.diffusion.flow_match import AncestralFlowMatchScheduler, HiDreamO1FlashScheduler
from diffsynth.pipelines.ernie_image import ErnieImagePipeline
from tiny import BASE, QUIET, SES, Seen, brightness, manage_vram, pixels, search
from tiny_any import KINDS, PICTURE, make, pipeline

import ses_fast
from ses_fast import Preview, SESConfig, evolve
from ses_fast.pipelines.diffsynth.any import CallRenderer

QUICK = ("stable_diffusion_xl", "flux3", "qwen_image_21", "krea2", "ernie_image", "sensenova_u1")
WITH_IMAGE = ("flux3", "ideogram4", "anima", "boogu")  # whose call takes an input image
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]

_pipes = {}


@pytest.fixture
def tiny(kind):
    """The stock pipeline; made once, as every test leaves it as it was."""
    if kind not in _pipes:
        _pipes[kind] = make(kind)
    return _pipes[kind]


@pytest.fixture
def pipe(tiny):
    yield ses_fast.enable(tiny)
    ses_fast.disable(tiny)


@pytest.fixture
def call(kind):
    return KINDS[kind].call


def stock_image(pipe, noise, **call):
    """The stock call's picture of that noise, as the pipeline has noise; `pipe` is not enabled."""
    pipe.generate_noise = lambda *args, **options: noise.clone()
    try:
        return pixels(pipe(**BASE | call))
    finally:
        del pipe.generate_noise


def own_layout(kind, noise):  # [1, c, h, w] -> as the pipeline has it
    return {
        "flux3": lambda: noise[0].flatten(1).T.contiguous(),
        "ideogram4": lambda: noise.flatten(2).transpose(1, 2).contiguous(),
        "joyai": lambda: noise[:, None, :, None],
    }.get(kind, lambda: noise)()


@pytest.mark.parametrize("kind", EVERY)
def test_without_ses_the_stock_image_and_with_a_budget_of_one_too(tiny, kind, call):
    stock_class, units, own = type(tiny), list(tiny.units), set(vars(tiny))
    for cfg in ({}, KINDS[kind].guided):
        stock = pixels(tiny(**BASE | call | cfg))
        scheduler = dict(vars(tiny.scheduler))
        ses_fast.enable(tiny)
        try:
            assert isinstance(tiny, stock_class)
            assert np.array_equal(pixels(tiny(**BASE | call | cfg)), stock)
            image, result, _ = search(tiny, budget=1, call=call | cfg)
            assert np.array_equal(pixels(image), stock)
            assert result.evaluations == 1 and result.score == result.base_score
        finally:
            ses_fast.disable(tiny)
        assert type(tiny) is stock_class and tiny.units == units and set(vars(tiny)) == own
        assert vars(tiny.scheduler).keys() == scheduler.keys()
        assert np.array_equal(pixels(tiny(**BASE | call | cfg)), stock)


@pytest.mark.parametrize("kind", EVERY)
def test_a_preview_is_the_stock_image_of_its_noise_and_the_final_image_the_winners(tiny, kind, call):
    call = call | KINDS[kind].guided | {"num_inference_steps": 3}
    stock = pixels(tiny(**BASE | call))
    ses_fast.enable(tiny)
    image, result, seen = search(tiny, budget=4, call=call)  # previews of two steps
    again, _, _ = search(tiny, budget=4, call=call)
    ses_fast.disable(tiny)
    channels, side = KINDS[kind].noise
    base = result.state.base
    assert base.shape == (1, channels, 64 // side, 64 // side)
    noises = first_generation(result)
    assert torch.equal(noises[0], base) and len(seen.images) == len(noises) == 4
    for noise, preview in zip(noises, seen.images, strict=True):
        expected = stock_image(tiny, own_layout(kind, noise), **call | {"num_inference_steps": 2})
        assert np.array_equal(pixels(tiny.vae_output_to_image(preview[None])), expected[..., :3])
    assert (seen.images[0] - seen.images[1]).abs().max() > 0.05  # candidates do differ
    winner = seen.scores.index(max(seen.scores))
    assert torch.equal(result.latents, noises[winner])
    final = stock_image(tiny, own_layout(kind, result.latents), **call)
    assert np.array_equal(pixels(image), final) and np.array_equal(pixels(again), final)
    assert np.array_equal(final, stock) == (winner == 0)


def first_generation(result):
    """The noises of a search's first generation, drawn anew."""
    noises, config = [], result.state.config
    sizes = {"popsize": config.popsize, "k_elites": config.k_elites, "dwt_level": config.dwt_level}
    options = {"seed": 3, "progress": False, "include_base": True}
    evolve(
        result.state.base, lambda noise: noises.append(noise.clone()) or len(noises), config.popsize, **sizes, **options
    )
    return noises


@contextmanager
def counted(module):
    """How often a model runs, in a list."""
    runs = []
    handle = module.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        handle.remove()


@pytest.mark.parametrize("cfg", [False, True], ids=["no CFG", "CFG"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_units_make_of_the_prompt_is_made_once(pipe, kind, call, cfg):
    call = call | (KINDS[kind].guided if cfg else {})
    with read(pipe, kind) as once:
        pipe(**BASE | call)
    with read(pipe, kind) as runs:
        search(pipe, budget=3, call=call | {"num_inference_steps": 3})
    assert len(runs) == len(once) > 0


@contextmanager
def read(pipe, kind):
    """How often the prompt is read, in a list."""
    if kind == "hidream_o1":  # by no model but the denoiser: its tokens are made once
        with pytest.MonkeyPatch.context() as patch:
            runs, own = [], pipe.processor.apply_chat_template
            patch.setattr(pipe.processor, "apply_chat_template", lambda *args, **kw: runs.append(1) or own(*args, **kw))
            yield runs
        return
    reader = pipe.dit.language_model.model.embed_tokens if kind == "sensenova_u1" else pipe.text_encoder
    reader = getattr(reader, "model", reader)  # some forwards go around the wrapper
    reader = getattr(reader, "model", reader) if kind == "boogu" else reader
    with counted(reader) as runs:
        yield runs


@pytest.mark.parametrize("kind", ["ernie_image"])
def test_a_model_that_writes_on_what_the_units_made_writes_on_a_copy(pipe, call, monkeypatch):
    plain = pixels(pipe(**BASE | call))

    def model_fn(*args, prompt_embeds, model_fn=pipe.model_fn, **inputs):
        prompt_embeds.add_(1.0)
        return model_fn(*args, prompt_embeds=prompt_embeds, **inputs)

    monkeypatch.setattr(pipe, "model_fn", model_fn)
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, plain)
    _, _, seen = search(pipe, budget=4, call=call, popsize=1, k_elites=1)
    assert np.array_equal(pixels(pipe.vae_output_to_image(seen.images[0][None])), stock)
    image, _, _ = search(pipe, budget=1, call=call)
    assert np.array_equal(pixels(image), stock)


class Dice(PipelineUnit):
    """Changes the prompt by chance."""

    def __init__(self):
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt_embeds": "prompt_embeds"},
            input_params_nega={"prompt_embeds": "prompt_embeds"},
        )

    def process(self, pipe, prompt_embeds):
        return {"prompt_embeds": prompt_embeds + torch.randn_like(prompt_embeds)}


@pytest.mark.parametrize("kind", ["ernie_image"])
def test_a_unit_that_draws_by_chance_draws_the_same_for_every_candidate(kind, call):
    pipe, plain = make(kind), pixels(make(kind)(**BASE | call))
    pipe.units.insert(2, Dice())
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda velocity, timestep, sample: step(velocity, timestep, sample + torch.randn(()))
    torch.manual_seed(5)
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, plain)
    ses_fast.enable(pipe)
    torch.manual_seed(5)
    image, _, seen = search(pipe, budget=1, call=call)
    assert np.array_equal(pixels(image), stock)
    assert np.array_equal(pixels(pipe.vae_output_to_image(seen.images[0][None])), stock)


@pytest.mark.parametrize("kind", ["sensenova_u1", "hidream_o1"])
def test_in_pixels_about_eight_by_eight_coefficients_are_searched(pipe, call):
    _, result, _ = search(pipe, budget=2, call=call)
    assert result.state.config.dwt_level == 3  # 64 pixels
    _, result, _ = search(pipe, budget=2, call=call | {"height": 128, "width": 256})
    assert result.state.config.dwt_level == 4
    assert search(pipe, budget=3, call=call | {"height": 128, "width": 256}, state=result.state)[1].evaluations == 3
    _, result, _ = search(pipe, budget=2, call=call, dwt_level=2)
    assert result.state.config.dwt_level == 2


@pytest.mark.parametrize("kind", ["ernie_image"])
def test_a_level_in_latents_is_that_of_the_families(pipe, call):
    _, result, _ = search(pipe, budget=1, call=call | {"height": 256, "width": 256, "num_inference_steps": 1})
    assert result.state.config.dwt_level == 2


@pytest.mark.parametrize(
    "kind", [name if name in QUICK[:2] else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_half_size_previews_and_those_without_guidance(tiny, kind, call):
    call = call | KINDS[kind].guided | {"height": 128, "width": 128}
    ses_fast.enable(tiny)
    image, result, seen = search(tiny, budget=2, call=call, preview=Preview(scale=2, cfg=False))
    ses_fast.disable(tiny)
    low = ses_fast.ops.split_low_band(result.state.base, 1)[0]
    small = call | {"height": 64, "width": 64, "cfg_scale": 1.0}
    expected = stock_image(tiny, own_layout(kind, low), **small)
    assert np.array_equal(pixels(tiny.vae_output_to_image(seen.images[0][None])), expected[..., :3])
    assert np.array_equal(pixels(image), stock_image(tiny, own_layout(kind, result.latents), **call))
    assert result.forwards["preview"] == 2 * 2  # two previews of two steps, one forward each


@pytest.mark.parametrize("kind", ["stable_diffusion_xl", "qwen_image_21"])
def test_the_best_are_refined_by_the_final_call_and_the_answer_is_not_made_again(tiny, kind, call):
    call = call | KINDS[kind].guided | {"num_inference_steps": 3}
    with counted(denoiser := getattr(tiny, "unet", None) or tiny.dit) as a_call:
        tiny(**BASE | call)
    ses_fast.enable(tiny)
    with counted(denoiser) as runs:
        image, result, seen = search(tiny, budget=6, call=call, preview=Preview(refine=2))
    ses_fast.disable(tiny)
    assert np.array_equal(pixels(image), stock_image(tiny, own_layout(kind, result.latents), **call))
    assert len(result.refined) in (2, 3) and result.score == max(each.score for each in result.refined)
    assert result.forwards == {"preview": 6 * 2 * 2, "refine": len(result.refined) * 3 * 2}
    assert len(runs) == sum(result.forwards.values()) and len(a_call) == 3 * 2


# ---------------------------------------------------------------- chance


def with_flash(pipe):
    """HiDream-O1-Dev's scheduler: noise in each of its 28 steps, from torch's global generator."""
    pipe.scheduler = HiDreamO1FlashScheduler()
    return pipe


def with_ancestral(pipe):
    """Noise in each step, from a generator of the scheduler's own."""
    pipe.scheduler = AncestralFlowMatchScheduler("ERNIE-Image")
    return pipe


@pytest.mark.filterwarnings("ignore:the call's arguments make it a schedule of 28")
@pytest.mark.parametrize("kind, scheduler", [("hidream_o1", with_flash), ("ernie_image", with_ancestral)])
def test_noise_inside_a_scheduler_is_the_same_for_every_candidate(kind, scheduler, call):
    def fresh():
        torch.manual_seed(5)
        return scheduler(make(kind))

    stock = fresh()
    first, second, after = pixels(stock(**BASE | call)), pixels(stock(**BASE | call)), torch.rand(1)
    assert not np.array_equal(first, second)  # it does draw
    pipe, drawn = ses_fast.enable(fresh()), []

    def on_preview(images, scores, generation, first):
        drawn.append(torch.rand(1).item())
        seen(images, scores, generation, first)

    image, _, seen = search(pipe, budget=1, call=call)
    assert np.array_equal(pixels(image), first)
    assert np.array_equal(pixels(pipe(**BASE | call)), second) and torch.equal(torch.rand(1), after)
    pipe, seen = ses_fast.enable(fresh()), Seen()
    _, result, _ = search(pipe, budget=3, call=call, on_preview=on_preview, batch_size=1)
    for noise, preview in zip(first_generation(result)[:3], seen.images, strict=True):
        expected = stock_image(fresh(), own_layout(kind, noise), **call)
        assert np.array_equal(pixels(pipe.vae_output_to_image(preview[None])), expected)
    assert len(set(drawn)) == len(drawn) == 3  # what a callback draws is its own
    pipe = ses_fast.enable(fresh())
    image, result, _ = search(pipe, budget=2, call=call, preview=Preview(refine=1))
    assert np.array_equal(pixels(image), stock_image(fresh(), own_layout(kind, result.latents), **call))
    pipe(**BASE | call)
    assert torch.equal(torch.rand(1), after)  # as after two stock calls


# ---------------------------------------------------------------- the documented call's other sides


@pytest.mark.parametrize("kind", ["flux3"])
def test_found_noise_is_rendered_and_a_search_goes_on(pipe, call):
    image, result, _ = search(pipe, budget=6, call=call)
    again, none, _ = search(pipe, budget=6, call=call, latents=result.latents, on_preview=None)
    assert none is None and np.array_equal(pixels(again), pixels(image))
    _, part, _ = search(pipe, budget=3, call=call)
    image, whole, _ = search(pipe, budget=6, call=call | {"seed": None}, state=part.state)
    assert np.array_equal(pixels(image), pixels(again)) and whole.score == result.score
    with pytest.raises(ValueError, match="of shape"):
        search(pipe, call=call | {"height": 96}, latents=result.latents, on_preview=None)


@pytest.mark.parametrize("kind", ["krea2"])
def test_a_prompt_may_be_given_by_place_and_height_and_width_are_rounded_once(pipe, call, capsys):
    rest = {name: value for name, value in BASE.items() if name != "prompt"} | call | {"height": 60}
    stock = pixels(pipe(BASE["prompt"], **rest))
    capsys.readouterr()
    image = pipe(BASE["prompt"], **rest | SES, ses_eval_budget=1, ses_config=SESConfig(**QUIET))
    assert np.array_equal(pixels(image), stock) and stock.shape[:2] == (64, 64)
    assert capsys.readouterr().out.count("round it up") == 1


class Mine(ErnieImagePipeline):
    """A user's own, whose call names no arguments and counts its steps in numbers."""

    def __call__(self, *args, progress_bar_cmd, **options):
        steps = progress_bar_cmd(range(len(args[0].split())))
        return super().__call__(*args, progress_bar_cmd=lambda timesteps: timesteps[: len(steps)], **options)


def test_a_class_of_ones_own_that_fits_is_searched():
    pipe = make("ernie_image")
    pipe.__class__ = Mine
    call = BASE | {"rand_device": "cpu", "num_inference_steps": 4}
    prompt = call.pop("prompt")  # three words
    stock = pixels(pipe(prompt, **call))
    ses_fast.enable(pipe)
    with pytest.warns(UserWarning, match="a schedule of 3 steps"):
        image = pipe(prompt, **call | SES, ses_eval_budget=1, ses_config=SESConfig(**QUIET))
    assert np.array_equal(pixels(image), stock) and isinstance(pipe, Mine)
    assert pipe.ses_result.forwards["preview"] == 3


@pytest.mark.parametrize("kind", ["sensenova_u1"])
def test_a_batch_that_is_asked_for_goes_one_by_one_and_says_so(pipe, call):
    _, alone, _ = search(pipe, budget=4, call=call, batch_size=1)
    with pytest.warns(UserWarning, match="previews go one by one") as caught:
        _, together, _ = search(pipe, budget=4, call=call, batch_size=4)
    assert len(caught) == 1
    assert [each.score for each in together.trace] == [each.score for each in alone.trace]


@pytest.mark.parametrize("kind", ["stable_diffusion_xl"])
def test_rewards_and_callbacks_may_call_the_pipeline(pipe, kind):
    stock = pixels(pipe(**BASE))
    _, alone, _ = search(pipe, budget=3)
    inner = []

    def reward(images, prompt):
        assert not torch.is_grad_enabled()
        inner.append(pixels(pipe(**BASE)))
        return brightness(images, prompt)

    _, result, _ = search(pipe, budget=3, call={"ses_reward_model": reward})
    assert [each.score for each in result.trace] == [each.score for each in alone.trace]
    assert inner and all(np.array_equal(each, stock) for each in inner)


@pytest.mark.parametrize("kind", ["stable_diffusion_xl"])
def test_a_failing_reward_leaves_the_pipeline_as_it_was_and_the_search_so_far(pipe):
    own, units = set(vars(pipe)), list(pipe.units)
    scheduler = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    stop, scored = RuntimeError("no more"), []

    def reward(images, prompt):
        scored.append(1)
        if len(scored) > 4:
            raise stop
        return brightness(images, prompt)

    with pytest.raises(RuntimeError) as caught:
        search(pipe, budget=8, call={"ses_reward_model": reward, "ses_inference_steps": 3}, batch_size=1)
    assert caught.value is stop and pipe.ses_result.evaluations == 4
    assert set(vars(pipe)) - {"ses_result"} == own - {"ses_result"} and pipe.units == units
    assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == scheduler


@pytest.mark.parametrize("kind", ["ernie_image"])
def test_held_out_rewards_judge_the_stock_image_and_the_answer(pipe, call):
    def judge(images, prompt):
        return images.float().std(dim=(1, 2, 3))

    image, result, _ = search(pipe, budget=4, call=call, report_rewards={"contrast": judge})
    levels = [pixels(each).astype(float) / 127.5 for each in (pipe(**BASE | call), image)]
    assert result.held_out["contrast"].base == pytest.approx(levels[0].std(), abs=0.01)
    assert result.held_out["contrast"].answer == pytest.approx(levels[1].std(), abs=0.01)


@pytest.mark.parametrize("kind", ["flux3", *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_IMAGE[1:])])
def test_image_to_image(pipe, call):
    call = call | {"input_image": PICTURE, "denoising_strength": 0.6}
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, pixels(pipe(**BASE)))
    image, _, _ = search(pipe, budget=1, call=call)
    assert np.array_equal(pixels(image), stock)
    image, _, seen = search(pipe, budget=4, call=call)
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(seen.winner)))
    assert (seen.images[0] - seen.images[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "kind", [name if name == "qwen_image_21" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_in_bf16_and_under_vram_management(kind, call, monkeypatch):
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    guided = KINDS[kind].guided
    for pipe in (make(kind, torch.bfloat16), manage_vram(make(kind))):
        stock = pixels(pipe(**BASE | call | guided))
        ses_fast.enable(pipe)
        image, result, _ = search(pipe, budget=1, call=call | guided)
        assert np.array_equal(pixels(image), stock)
        assert result.latents.dtype == (torch.float32 if kind == "moss" else pipe.torch_dtype)  # as its noise is
        image, _, seen = search(pipe, budget=4, call=call | guided)
        assert np.array_equal(pixels(image)[..., :3], pixels(pipe.vae_output_to_image(seen.winner)))


@pytest.mark.parametrize("kind", ["qwen_image_21"])
def test_a_schedule_that_the_call_fixes_is_said_and_one_that_does_not_exist_refused(pipe, call):
    with pytest.warns(UserWarning, match="schedule of 2 steps"):
        search(pipe, budget=1, call=call | {"sigmas": [1.0, 0.5], "ses_inference_steps": 1})
    with counted(pipe.dit) as runs, pytest.raises(ValueError, match="no schedule of 1 steps"):
        search(pipe, call=call | {"ses_inference_steps": 1})
    assert not runs


def test_a_score_that_is_not_finite_is_laid_to_the_call():
    pipe = ses_fast.enable(make("ernie_image"))
    pipe.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the image that the pipeline's own call makes is not finite"):
        search(pipe, budget=1, call=KINDS["ernie_image"].call)


# ---------------------------------------------------------------- what is refused, and before any work


def refused(pipe, match, **config):
    """A search is refused before the denoiser has run."""
    with counted(pipe.dit) as runs, pytest.raises(ValueError, match=match):
        search(pipe, call={"rand_device": "cpu"}, **config)
    assert not runs


@pytest.mark.parametrize("kind", ["ernie_image"])
def test_a_race_is_refused_by_name(pipe):
    refused(pipe, r"Preview\(race=\) cannot go with ErnieImagePipeline", preview=Preview(race="auto"))


@pytest.mark.parametrize("name", ["wan_video.WanVideoPipeline", "ace_step.AceStepPipeline"])
def test_what_makes_no_picture_is_refused(name):
    pipe = pipeline(name, torch.float32)
    with pytest.raises(ValueError, match=f"cannot search diffsynth.pipelines.{name}: its call"):
        ses_fast.enable(pipe)


class NoSeed(BasePipeline):
    def __call__(self, prompt, height, width, num_inference_steps, progress_bar_cmd):
        return self.vae_output_to_image(prompt)


class NoPicture(BasePipeline):
    def __call__(self, prompt, seed, height, width, num_inference_steps, progress_bar_cmd):
        return self.generate_noise((1, 3, height, width))


@pytest.mark.parametrize("cls, why", [(NoSeed, "takes no seed="), (NoPicture, "makes no picture")])
def test_an_unknown_call_that_does_not_fit_is_refused_when_it_is_enabled(cls, why):
    with pytest.raises(ValueError, match=f"{cls.__name__}: its call {why}"):
        ses_fast.enable(cls(device="cpu"))


class Pair(ErnieImagePipeline):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options), "a caption"


class Twice(ErnieImagePipeline):
    def __call__(self, *args, **options):
        super().__call__(*args, **options)
        return super().__call__(*args, **options)


class Silent(ErnieImagePipeline):
    def __call__(self, *args, progress_bar_cmd, **options):
        return super().__call__(*args, progress_bar_cmd=lambda steps: steps[:0], **options)


@pytest.mark.parametrize(
    "cls, why",
    [
        pytest.param(Pair, "does not return the one picture", id="a picture and more"),
        pytest.param(Twice, "asks pipe.generate_noise for 2 noises, not one", id="two pictures"),
        pytest.param(Silent, "counts its steps by progress_bar_cmd 0 times", id="steps that do not show"),
    ],
)
def test_one_whose_call_shows_it_later_is_refused_before_the_denoiser_runs(cls, why):
    pipe = make("ernie_image")
    pipe.__class__ = cls
    refused(ses_fast.enable(pipe), f"cannot search {cls.__name__}.*{why}")


def test_noise_that_lies_in_an_unknown_layout_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("ses_fast.pipelines.diffsynth.any.LAYOUTS", {})
    pipe = ses_fast.enable(make("flux3"))
    refused(pipe, r"cannot search Flux3ImagePipeline: its noise has the shape \(16, 128\)")


@pytest.mark.parametrize(
    "kind",
    [
        name if name == "ernie_image" else pytest.param(name, marks=pytest.mark.slow)
        for name in KINDS
        if name not in ("hidream_o1", "ideogram4")
    ],
)
def test_compiled_images_differ_by_rounding_and_disable_undoes_it(kind, call):
    pipe = make(kind)
    stock = pixels(pipe(**BASE | call))
    # Without a code generator: dynamo's graphs are the same, and quick.
    pipe.compile_pipeline = functools.partial(pipe.compile_pipeline, backend="eager")
    ses_fast.enable(pipe, compile=True)
    assert any(module._compiled_call_impl is not None for module in pipe.modules())
    image, result, _ = search(pipe, budget=2, call=call)
    assert result.seconds["compile"] > 0
    image, _, _ = search(pipe, budget=1, call=call)
    assert np.abs(pixels(image) - stock).max() <= 1
    ses_fast.disable(pipe)
    assert all(module._compiled_call_impl is None for module in pipe.modules())


@pytest.mark.parametrize("kind", ["hidream_o1", "ideogram4"])
def test_a_class_without_blocks_to_compile_says_so(kind):
    with pytest.raises(ValueError, match="no model to compile"):
        ses_fast.enable(make(kind), compile=True)


def test_a_reward_sees_every_range_as_minus_one_to_one_and_no_transparency():
    output = torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 4, 1, 1)
    seen = CallRenderer.decode(SimpleNamespace(own=SimpleNamespace(range=(0, 1))), output)
    assert seen.flatten().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["joyai"])
def test_what_the_call_itself_refuses_leaves_as_it_is(pipe):
    with counted(pipe.dit) as runs, pytest.raises(NotImplementedError, match="provide edit_image"):
        search(pipe)
    assert not runs


@pytest.mark.parametrize("kind", ["hidream_o1"])
def test_a_lora_that_would_pile_up_is_refused(pipe, call):
    with pytest.raises(ValueError, match="lora= needs pipe.dit"):
        search(pipe, call=call | {"lora": {}})
