"""The documented call on Z-Image, through DiffSynth's own classes with tiny random weights."""

import inspect
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.pipelines.z_image import ZImagePipeline, model_fn_z_image
from tiny import BASE as ANY_BASE
from tiny import PHOTO, QUIET, SES, brightness, pixels, search, tiny_z_image
from torch import nn

import ses_fast
from ses_fast import SESConfig
from ses_fast.evolution import EvolutionConfig
from ses_fast.loop import evolve
from ses_fast.pipelines.diffsynth.unit import SESUnit

# Candidates together against one by one: absolute, on images in [-1, 1].
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}

BASE = {name: value for name, value in ANY_BASE.items() if name != "cfg_scale"}  # Z-Image's own default is 1
CALLS = [
    pytest.param({}, id="text-to-image"),
    pytest.param({"cfg_scale": 4.0, "negative_prompt": "blurry and dark"}, id="CFG: two forwards a step"),
    pytest.param({"height": 80, "width": 48}, id="not square: latents 10x6, 15 tokens padded to 32"),
    pytest.param({"input_image": PHOTO, "denoising_strength": 0.6}, id="image-to-image"),
    pytest.param({"sigma_shift": 7.0, "cfg_scale": 2.0}, id="a shift that reaches no unit"),
]


@pytest.fixture(scope="module")
def tiny():
    return tiny_z_image()


@pytest.fixture
def pipe(tiny):
    yield ses_fast.enable(tiny)
    ses_fast.disable(tiny)
    tiny.__dict__.pop("load_models_to_device", None)
    tiny.model_fn = model_fn_z_image
    tiny.vram_management_enabled = False


# ---------------------------------------------------------------- enable and disable


@pytest.mark.parametrize("call", CALLS)
def test_without_ses_bit_identical_to_the_stock_pipeline(tiny, call):
    stock = pixels(tiny(**BASE | call))
    ses_fast.enable(tiny)
    try:
        assert np.array_equal(pixels(tiny(**BASE | call)), stock)
        ignored = {"ses_reward_model": "clip", "ses_eval_budget": 0, "ses_config": SESConfig()}
        assert np.array_equal(pixels(tiny(**BASE | call, enable_ses=False, **ignored)), stock)
        assert tiny.ses_result is None
    finally:
        ses_fast.disable(tiny)


def test_enable_keeps_the_object_and_its_class_and_disable_restores_both():
    pipe = tiny_z_image()
    units, attributes, children = list(pipe.units), set(vars(pipe)), dict(pipe.named_children())

    assert ses_fast.enable(ses_fast.enable(pipe)) is pipe
    assert isinstance(pipe, ZImagePipeline) and type(pipe).__name__ == "ZImagePipeline"
    assert pipe.units[:-1] == units and isinstance(pipe.units[-1], SESUnit)
    search(pipe, budget=2)

    assert ses_fast.disable(pipe) is pipe
    assert type(pipe) is ZImagePipeline and pipe.units == units
    assert set(vars(pipe)) == attributes and dict(pipe.named_children()) == children
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert ses_fast.disable(pipe) is pipe  # and once more does nothing
    with pytest.raises(TypeError, match="enable_ses"):
        pipe(**BASE, enable_ses=True)


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(object(), id="no pipeline"),
        pytest.param(nn.Linear(1, 1), id="a module"),
        pytest.param(type("ZImagePipeline", (), {})(), id="diffusers has a class of that name"),
    ],
)
@pytest.mark.parametrize("function", [ses_fast.enable, ses_fast.disable])
def test_an_unsupported_object_gets_the_list_of_supported_ones(function, stranger):
    with pytest.raises(ValueError, match="supported pipelines .* ZImagePipeline"):
        function(stranger)


def test_the_signature_shows_stock_and_documented_parameters(tiny, pipe):
    parameters = inspect.signature(pipe.__call__).parameters
    stock = inspect.signature(ZImagePipeline.__call__).parameters
    assert list(parameters)[: len(stock) - 1] == list(stock)[1:]
    new = {name: p.default for name, p in parameters.items() if "ses" in name}
    assert new == {
        "enable_ses": False,
        "ses_reward_model": "pick",
        "ses_eval_budget": 50,
        "ses_inference_steps": 10,
        "ses_config": None,
    }


def test_a_subclass_keeps_its_own_defaults():
    class Small(ZImagePipeline):
        def __call__(self, *args, height=48, width=80, **kwargs):
            return super().__call__(*args, height=height, width=width, **kwargs)

    pipe = tiny_z_image()
    pipe.__class__ = Small
    ses_fast.enable(pipe)
    few = {"num_inference_steps": 2, "progress_bar_cmd": list}
    stock = pipe("a fox", seed=1, **few)
    found = pipe("a fox", seed=1, **few, **SES, ses_eval_budget=1, ses_config=SESConfig(progress=False))
    assert found.size == (80, 48) and np.array_equal(pixels(found), pixels(stock))
    assert pipe.ses_result.seed == 1 and pipe.ses_result.latents.shape == (1, 16, 6, 10)
    with pytest.raises(ValueError, match="one prompt"):
        pipe(["a fox"], **few, **SES)
    assert type(ses_fast.disable(pipe)) is Small


def test_training_reuses_the_units_as_they_were(tiny):
    def run():
        shared = {"height": 64, "width": 64, "seed": 1, "rand_device": "cpu", "cfg_scale": 1} | {"input_image": PHOTO}
        posi, nega = {"prompt": "a red fox"}, {}
        for unit in tiny.units:
            shared, posi, nega = tiny.unit_runner(unit, tiny, shared, posi, nega)
        return shared["noise"], shared["latents"], shared["input_latents"], posi["prompt_embeds"][0]

    def halves():  # what DiffSynth's training caches, and what it computes in each step
        return [tiny.split_pipeline_units([name]) for name in ("text_encoder", "vae_encoder", "dit")]

    tiny.scheduler.set_timesteps(1000, training=True)
    stock, stock_halves = run(), halves()
    ses_fast.enable(tiny)
    try:
        for a, b in zip(run(), stock, strict=True):
            assert torch.equal(a, b)
        for now, before in zip(halves(), stock_halves, strict=True):
            assert [[u for u in half if not isinstance(u, SESUnit)] for half in now] == list(before)
    finally:
        ses_fast.disable(tiny)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("call", CALLS)
def test_a_budget_of_one_is_the_stock_image(pipe, call, batch_size):
    stock = pixels(pipe(**BASE | call))
    image, result, _ = search(pipe, budget=1, call=call, batch_size=batch_size)
    assert np.array_equal(pixels(image), stock)
    assert result.evaluations == 1 and result.score == result.base_score


@pytest.mark.parametrize("call", CALLS)
def test_the_final_image_is_the_winners_preview(pipe, call):
    stock = pixels(pipe(**BASE | call))
    image, result, seen = search(pipe, budget=10, call=call)
    winner = seen.scores.index(max(seen.scores))
    assert winner > 0 and result.score == seen.scores[winner] > seen.scores[0] == result.base_score
    assert [e.score for e in result.trace] == seen.scores
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(seen.images[winner][None])))
    assert not np.array_equal(pixels(image), stock)


def test_the_final_image_has_its_own_steps(pipe):
    image, result, seen = search(pipe, call={"num_inference_steps": 5})
    preview = pipe.vae_output_to_image(seen.images[seen.scores.index(max(seen.scores))][None])
    assert not np.array_equal(pixels(image), pixels(preview))

    class Fixed(type(pipe.units[2])):  # the stock call from the noise that was found
        def process(self, pipe, **inputs):
            return {"noise": result.latents}

    stock = pipe.units[2]
    pipe.units[2] = Fixed()
    try:
        assert np.array_equal(pixels(pipe(**BASE | {"num_inference_steps": 5})), pixels(image))
    finally:
        pipe.units[2] = stock


@pytest.mark.parametrize("call", CALLS)
def test_together_equals_one_by_one(pipe, call):
    _, _, alone = search(pipe, budget=7, call=call, popsize=8)
    _, _, together = search(pipe, budget=7, call=call, popsize=8, batch_size=3)  # 3, 3, and one alone
    assert together.numbers == [(0, 0, 3), (0, 3, 3), (0, 6, 1)]
    a, b = torch.stack(alone.images), torch.stack(together.images)
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[torch.float32])
    assert (a[0] - a[1]).abs().max() > 0.1  # candidates do differ


def test_bf16():
    pipe = ses_fast.enable(tiny_z_image(torch.bfloat16))
    stock = pixels(pipe(**BASE, cfg_scale=3.0))
    assert np.array_equal(pixels(search(pipe, budget=1, call={"cfg_scale": 3.0})[0]), stock)
    _, result, alone = search(pipe, budget=4, call={"cfg_scale": 3.0})
    _, _, together = search(pipe, budget=4, call={"cfg_scale": 3.0}, batch_size=4)
    assert result.latents.dtype == alone.images[0].dtype == torch.bfloat16
    a, b = torch.stack(alone.images), torch.stack(together.images)
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_candidates_do_not_see_each_other(pipe):
    """Z-Image's own model_fn takes a batch for the frames of one sequence: there they do."""
    embeds = pipe.units[1].process(pipe, prompt="a red fox", edit_image=None)["prompt_embeds"]
    inputs = {"dit": pipe.dit, "timestep": torch.tensor([700.0]), "prompt_embeds": embeds}
    latents = torch.randn(3, 16, 10, 6, generator=torch.Generator().manual_seed(0))
    other = latents.clone()
    other[1] = other[1].flip(-1) * 3
    batched = pipe.units[-1].model_fn_together(pipe, {})
    for model_fn, apart in ((batched, True), (pipe.model_fn, False)):
        a, b = (model_fn(latents=x, **inputs) for x in (latents, other))
        assert not torch.equal(a[1], b[1])
        assert torch.equal(a[[0, 2]], b[[0, 2]]) is apart
    for i in range(3):
        alone = pipe.model_fn(latents=latents[i : i + 1], **inputs)
        batch = batched(latents=latents, **inputs)[i : i + 1]
        torch.testing.assert_close(batch, alone, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param({"control_context": torch.zeros(1)}, id="ControlNet"),
        pytest.param({"image_latents": [torch.zeros(1)]}, id="edit image, by the autoencoder"),
        pytest.param({"image_embeds": [torch.zeros(1)]}, id="edit image, by SigLIP"),
    ],
)
def test_no_batch_with_inputs_of_one_image(pipe, shared):
    assert pipe.units[-1].model_fn_together(pipe, dict.fromkeys(shared)) is not None
    assert pipe.units[-1].model_fn_together(pipe, shared) is None


def test_no_batch_for_the_omni_model(pipe, monkeypatch):
    monkeypatch.setattr(pipe.dit, "siglip_embedder", nn.Identity())
    assert pipe.units[-1].model_fn_together(pipe, {}) is None


def test_a_wrapped_model_fn_goes_one_by_one_and_says_so_once(pipe):
    _, _, alone = search(pipe)
    sizes = []

    def wrapped(*args, **kwargs):
        sizes.append(len(kwargs["latents"]))
        return model_fn_z_image(*args, **kwargs)

    pipe.model_fn = wrapped
    with pytest.warns(UserWarning, match="one by one") as caught:
        _, _, seen = search(pipe, batch_size=3)
    assert len(caught) == 1 and set(sizes) == {1}
    assert seen.numbers == [(0, 0, 3), (0, 3, 1), (1, 0, 2)]  # still decoded and scored together
    torch.testing.assert_close(
        torch.stack(seen.images), torch.stack(alone.images), rtol=0, atol=TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize(
    "call, arguments",
    [
        pytest.param({}, {}, id="defaults"),
        pytest.param({"sigma_shift": 7.0}, {"shift": 7.0}, id="the call's shift"),
        pytest.param(
            {"input_image": PHOTO, "denoising_strength": 0.6},
            {"denoising_strength": 0.6},
            id="the call's strength",
        ),
    ],
)
def test_previews_take_the_calls_schedule_in_fewer_steps(pipe, call, arguments):
    timesteps = []

    def noted(*args, **kwargs):
        timesteps.append(kwargs["timestep"].item())
        return model_fn_z_image(*args, **kwargs)

    pipe.model_fn = noted
    search(pipe, budget=2, call=call | {"num_inference_steps": 5})
    preview, final = FlowMatchScheduler("Z-Image"), FlowMatchScheduler("Z-Image")
    preview.set_timesteps(2, **arguments)
    final.set_timesteps(5, **arguments)
    assert timesteps == 2 * preview.timesteps.tolist() + final.timesteps.tolist()


def test_more_preview_steps_than_final_ones_warns_once(pipe):
    with pytest.warns(UserWarning, match="ses_inference_steps=2 is enough") as caught:
        pipe(**BASE | SES | {"ses_inference_steps": 3}, ses_eval_budget=3, ses_config=SESConfig(**QUIET))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(pipe, budget=1)


def test_the_pipeline_is_left_as_after_a_stock_call(pipe):
    def state():
        return {name: str(value) for name, value in vars(pipe.scheduler).items()}

    pipe(**BASE | {"num_inference_steps": 4, "sigma_shift": 5.0})
    after, units, scheduler = state(), list(pipe.units), pipe.scheduler
    pipe.scheduler.set_timesteps(9)
    search(pipe, call={"num_inference_steps": 4, "sigma_shift": 5.0})
    assert pipe.scheduler is scheduler and state() == after and pipe.units == units
    assert pipe.units[-1].call is None


def test_every_setting_reaches_the_search(pipe, capsys, monkeypatch):
    _, result, _ = search(pipe, budget=4, wavelet_name="db2", k_elites=3, popsize=4, dwt_level=1)
    assert result.state.config == EvolutionConfig(4, 3, "db2", 1)
    asked = []
    monkeypatch.setattr("ses_fast.pipelines.run.evolve", lambda *a, **k: asked.append(k) or evolve(*a, **k))
    search(pipe, budget=1, backend="torch", time_limit=5.0)
    assert (asked[0]["backend"], asked[0]["time_limit"], asked[0]["include_base"]) == ("torch", 5.0, True)
    assert "SES" not in capsys.readouterr().err
    pipe(**BASE | SES, ses_eval_budget=1)
    assert "SES" in capsys.readouterr().err  # a bar, unless told otherwise


# ---------------------------------------------------------------- a pipeline that others changed too


def test_a_callback_may_call_the_pipeline(pipe):
    image, result, _ = search(pipe, budget=8)
    other = {"num_inference_steps": 5, "sigma_shift": 6.0}

    def best_so_far(found):
        config = SESConfig(latents=found.latents)
        assert pipe(**BASE | other, enable_ses=True, ses_config=config).size == (64, 64)

    again, same, _ = search(pipe, budget=8, on_generation=best_so_far)
    assert np.array_equal(pixels(image), pixels(again)) and same.trace == result.trace


def test_a_scheduler_that_was_patched_is_refused_and_kept(pipe, monkeypatch):
    patched = lambda *args, **kwargs: type(pipe.scheduler).set_timesteps(pipe.scheduler, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", patched, raising=False)
    with pytest.raises(ValueError, match="in a subclass"):
        search(pipe)
    assert pipe.scheduler.set_timesteps is patched


def test_a_unit_added_after_ours_is_not_ignored(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "units", [*pipe.units, SimpleNamespace()])
    with pytest.raises(ValueError, match="not the last of pipe.units"):
        search(pipe)
    stranger = pipe.units[-1]
    ses_fast.enable(pipe)
    assert pipe.units[-2] is stranger and isinstance(pipe.units[-1], SESUnit)
    assert sum(isinstance(unit, SESUnit) for unit in pipe.units) == 1


@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder", "reward"])
def test_compile_seconds_are_in_no_other_stage_whoever_compiled(part):
    from torch._dynamo import reset

    def slow(module, inputs):  # dynamo's backend
        time.sleep(0.3)
        return module

    reset()
    pipe = ses_fast.enable(tiny_z_image())
    reward = brightness
    if part == "reward":
        reward = torch.compile(lambda images, prompt: images.mean((1, 2, 3)), backend=slow)
    else:
        getattr(pipe, part).compile(backend=slow)
    pipe(**BASE | SES | {"ses_reward_model": reward}, ses_eval_budget=3, ses_config=SESConfig(**QUIET))
    reset()
    seconds = dict(pipe.ses_result.seconds)
    total = seconds.pop("total")
    assert seconds["compile"] >= 0.3 and min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(total, rel=0.05)
    stage = {"text_encoder": "prompt", "vae_decoder": "decode", "reward": "reward"}[part]
    assert seconds[stage] < seconds["compile"]


# ---------------------------------------------------------------- seeds


def test_a_numpy_integer_is_a_seed(pipe):
    image, result, _ = search(pipe, budget=2, call={"seed": np.int64(3)})
    assert result.seed == 3 and np.array_equal(pixels(image), pixels(search(pipe, budget=2)[0]))


def test_a_seed_gives_the_image_again_and_leaves_the_global_state(pipe):
    state = torch.get_rng_state()
    first, result, _ = search(pipe)
    again, _, _ = search(pipe)
    other, _, _ = search(pipe, call={"seed": 4})
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(pixels(first), pixels(again)) and not np.array_equal(pixels(first), pixels(other))
    assert result.seed == 3


def test_without_a_seed_one_is_drawn_for_noise_and_search(pipe):
    first, result, _ = search(pipe, call={"seed": None})
    other, _, _ = search(pipe, call={"seed": None})
    again, _, _ = search(pipe, call={"seed": result.seed})
    assert np.array_equal(pixels(first), pixels(again)) and not np.array_equal(pixels(first), pixels(other))


def test_the_configs_seed_is_the_searchs_alone(pipe):
    _, plain, a = search(pipe)
    _, result, b = search(pipe, seed=8)
    assert result.seed == 8 and plain.seed == 3
    assert torch.equal(a.images[0], b.images[0]) and not torch.equal(a.images[1], b.images[1])


def test_a_generator_draws_as_the_reference_does(pipe):
    _, result, _ = search(pipe, generator=torch.Generator().manual_seed(5), include_base=False, dwt_level=2)
    base, (best, *_), level = result.state.base, sorted(result.trace, key=lambda e: -e.score), 2
    assert result.seed is None and result.base_score is None and best.generation == 0
    low = torch.randn(4, 16 * 2 * 2, generator=torch.Generator().manual_seed(5))[best.index].view(1, 16, 2, 2)
    blocks = base.unflatten(-1, (2, 4)).unflatten(-3, (2, 4)).mean((-3, -1)) * 2**level
    expected = base + ((low - blocks) / 2**level).repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(result.latents, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", [3, None])
def test_a_search_goes_on_from_its_state(pipe, seed):
    torch.manual_seed(0)
    _, half, _ = search(pipe, budget=5, call={"seed": seed})
    image, result, seen = search(pipe, budget=10, call={"seed": seed}, state=half.state)
    assert seen.numbers[0] == (1, 1, 1)
    whole_image, whole, _ = search(pipe, budget=10, call={"seed": half.seed})
    assert result.trace == whole.trace and np.array_equal(pixels(image), pixels(whole_image))
    with pytest.raises(ValueError, match="another search"):
        search(pipe, budget=10, call={"seed": 99}, state=half.state)


# ---------------------------------------------------------------- rewards, callbacks, times


def test_a_reward_gets_clamped_tensors_and_the_prompt(pipe):
    seen = []

    class Judge(nn.Module):
        def forward(self, images, prompt):
            seen.append((images, prompt))
            return images.mean((1, 2, 3)).tolist()

    children = set(dict(pipe.named_modules()))
    config = SESConfig(**QUIET | {"batch_size": 3})
    pipe(**BASE | SES | {"ses_reward_model": Judge()}, ses_eval_budget=5, ses_config=config)
    assert set(dict(pipe.named_modules())) == children  # no new child of the pipeline
    assert [(tuple(images.shape), prompt) for images, prompt in seen] == [
        ((n, 3, 64, 64), "a red fox") for n in (3, 1, 1)
    ]
    images = torch.cat([images for images, _ in seen])
    assert images.min() == -1 and images.max() == 1 and images.std() > 0.1 and images.dtype == torch.float32


def test_a_name_is_loaded_on_the_pipelines_device(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda name, device: asked.append((name, device)) or brightness)
    config = SESConfig(**QUIET)
    pipe(**BASE | SES | {"ses_reward_model": "clip"}, ses_eval_budget=2, ses_config=config)
    named = pipe.ses_result.score
    pipe(**BASE, enable_ses=True, ses_eval_budget=2, ses_inference_steps=2, ses_config=config)
    assert asked == [("clip", "cpu"), ("pick", "cpu")] and named == pipe.ses_result.score


def test_callbacks_count_as_the_search_does(pipe):
    so_far = []
    _, result, seen = search(
        pipe, budget=10, batch_size=3, on_generation=lambda r: so_far.append((r.evaluations, r.score))
    )
    assert seen.numbers == [(0, 0, 3), (0, 3, 1), (1, 0, 3), (1, 3, 1), (2, 0, 2)]
    assert so_far == [(4, max(seen.scores[:4])), (8, max(seen.scores[:8]))]
    assert [(e.generation, e.index) for e in result.trace] == [divmod(i, 4) for i in range(10)]


def test_a_time_limit_ends_the_search_and_not_the_image(pipe):
    image, result, _ = search(pipe, budget=50, time_limit=1e-9)
    assert result.evaluations == 1 and result.stopped == "time_limit"
    assert np.array_equal(pixels(image), pixels(pipe(**BASE)))


def test_seconds_by_stage_add_up(pipe):
    def slow(images, prompt):
        time.sleep(0.02)
        return brightness(images, prompt)

    config = SESConfig(**QUIET, on_preview=lambda *seen: time.sleep(0.01))
    pipe(**BASE | SES | {"ses_reward_model": slow}, ses_eval_budget=5, ses_config=config)
    seconds = dict(pipe.ses_result.seconds)
    total = seconds.pop("total")
    assert {"prompt", "ask", "denoise", "decode", "reward", "tell", "final"} <= set(seconds)
    assert seconds["reward"] >= 0.1 and seconds["other"] >= 0.05 and min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(total, rel=0.05)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("failure", [RuntimeError("no more"), KeyboardInterrupt()], ids=repr)
def test_a_failed_call_keeps_what_was_found_and_leaves_the_pipeline_clean(pipe, failure):
    whole, complete, _ = search(pipe)
    scheduler = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    calls, loaded = [], []
    pipe.load_models_to_device = loaded.append

    def failing(images, prompt):
        calls.append(prompt)
        if len(calls) == 6:
            raise failure
        return brightness(images, prompt)

    with pytest.raises(type(failure)) as caught:
        pipe(**BASE | SES | {"ses_reward_model": failing}, ses_eval_budget=9, ses_config=SESConfig(**QUIET))
    assert caught.value is failure and pipe.ses_result is failure.ses_result
    assert pipe.ses_result.trace == complete.trace[:5] and pipe.ses_result.stopped == "error"
    seconds = dict(pipe.ses_result.seconds)
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), rel=0.05)
    assert loaded[-1] == [] and pipe.units[-1].call is None
    assert {k: str(v) for k, v in vars(pipe.scheduler).items()} == scheduler
    assert np.array_equal(pixels(search(pipe)[0]), pixels(whole))


def test_a_call_that_fails_before_the_search_has_no_result(pipe, monkeypatch):
    search(pipe)
    monkeypatch.setattr(pipe, "vae_encoder", None)
    with pytest.raises(TypeError):
        search(pipe, call={"input_image": PHOTO})
    assert pipe.ses_result is None and pipe.units[-1].call is None
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_scores_that_are_never_finite_are_an_error(pipe):
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="finite"):
        nan = {"ses_reward_model": lambda images, prompt: float("nan")}
        pipe(**BASE | SES | nan, ses_eval_budget=5, ses_config=SESConfig(**QUIET))
    assert pipe.ses_result.latents is None and pipe.ses_result.evaluations == 5


def test_vram_management_denoises_a_generation_then_decodes_it(pipe):
    _, _, plain = search(pipe, budget=6)
    loaded = []
    pipe.load_models_to_device = loaded.append
    pipe.vram_management_enabled = True
    _, _, seen = search(pipe, budget=6)
    dit, vae = ("dit", "controlnet"), ["vae_decoder"]
    assert loaded[-7:] == [dit, vae, dit, vae, dit, vae, []]  # generations of 4 and 2, and the final image
    assert all(map(torch.equal, seen.images, plain.images))


def test_a_lora_in_the_call(pipe):
    """Hot-loaded: each forward has it once, in previews as in the final image."""
    hot = ses_fast.enable(tiny_z_image())
    stock = pixels(hot(**BASE))
    hot.dit = hot.enable_lora_hot_loading(hot.dit)
    generator = torch.Generator().manual_seed(0)
    name = "layers.0.feed_forward.w1"
    lora = {
        f"{name}.lora_A.default.weight": torch.randn(4, 48, generator=generator),
        f"{name}.lora_B.default.weight": torch.randn(128, 4, generator=generator),
    }
    call = {"lora": lora, "cfg_scale": 2.0}
    with_lora = pixels(hot(**BASE | call))
    assert not np.array_equal(with_lora, stock)
    assert np.array_equal(pixels(search(hot, budget=1, call=call)[0]), with_lora)
    _, _, alone = search(hot, budget=4, call=call)
    _, _, together = search(hot, budget=4, call=call, batch_size=4)
    torch.testing.assert_close(
        torch.stack(alone.images), torch.stack(together.images), rtol=0, atol=TOLERANCE[torch.float32]
    )


# ---------------------------------------------------------------- settings and bad input


@pytest.mark.parametrize(
    "height, width, level",
    [
        pytest.param(1024, 1024, 4, id="as documented"),
        pytest.param(2048, 2048, 4, id="and never more"),
        pytest.param(1328, 1328, 4, id="Qwen-Image's own size"),
        pytest.param(512, 512, 3, id="one less with each halving"),
        pytest.param(256, 256, 2, id="two"),
        pytest.param(128, 128, 1, id="three"),
        pytest.param(64, 64, 1, id="never below 1"),
        pytest.param(768, 768, 3, id="between two: the lower"),
        pytest.param(1024, 512, 3, id="the shorter side"),
        pytest.param(512, 1536, 3, id="either way"),
    ],
)
def test_the_automatic_level(height, width, level):
    assert SESConfig().evolution(height, width).dwt_level == level
    assert SESConfig(dwt_level=0).evolution(height, width).dwt_level == 0


def test_the_level_reaches_the_search(pipe):
    assert [search(pipe, budget=1, dwt_level=level)[1].state.mean.numel() for level in ("auto", 0, 2)] == [
        16 * 4 * 4,
        16 * 8 * 8,
        16 * 2 * 2,
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        pytest.param({"popsize": 0}, "popsize must be at least 1", id="no candidates"),
        pytest.param({"popsize": 2.5}, "popsize must be a whole number", id="half a candidate"),
        pytest.param({"k_elites": 0}, "k_elites must be at least 1", id="no elites"),
        pytest.param({"wavelet_name": "db99"}, "db99", id="unknown wavelet"),
        pytest.param({"dwt_level": -1}, "dwt_level must be at least 0", id="level below 0"),
        pytest.param({"dwt_level": "deep"}, '"auto"', id="a word for a level"),
        pytest.param({"batch_size": 0}, "batch_size must be at least 1", id="empty batches"),
        pytest.param({"batch_size": "many"}, 'batch_size must be a whole number or "auto"', id="a word for a size"),
        pytest.param({"include_base": "no"}, "include_base must be True or False", id="a truthy no"),
        pytest.param({"progress": 1}, "progress must be True or False", id="a number for a switch"),
        pytest.param({"seed": 1.5}, "seed must be a whole number", id="seed not whole"),
        pytest.param({"seed": 2**64}, "seed must be below", id="seed too large"),
        pytest.param({"seed": 1, "generator": torch.Generator()}, "not both", id="two sources of noise"),
        pytest.param({"generator": 7}, "generator must be a CPU torch.Generator", id="a seed as generator"),
        pytest.param({"time_limit": 0}, "seconds above 0", id="no time"),
        pytest.param({"time_limit": float("nan")}, "seconds above 0", id="time is not a number"),
        pytest.param({"on_generation": 3}, "on_generation must be callable", id="callback not callable"),
        pytest.param({"on_preview": "print"}, "on_preview must be callable", id="the name of a callback"),
        pytest.param({"latents": torch.zeros(2, 4, 8, 8)}, "one base", id="two noises to render"),
        pytest.param({"latents": "found.safetensors"}, "must be a torch.Tensor", id="a path for latents"),
        pytest.param({"time_limit": True}, "seconds above 0", id="a switch for seconds"),
        pytest.param({"state": {}}, "state must be a SearchState", id="a state's dict"),
        pytest.param({"backend": "cuda"}, "backend must be one of auto, triton, torch", id="unknown backend"),
    ],
)
def test_settings_check_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        SESConfig(**settings)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        pytest.param({"enable_ses": 1}, ValueError, "enable_ses must be True or False", id="a number"),
        pytest.param({"ses_eval_budget": -1}, ValueError, "ses_eval_budget must be at", id="a negative budget"),
        pytest.param({"prompt": "a \ud800 fox"}, ValueError, "not valid Unicode", id="half a character"),
        pytest.param({"ses_eval_budget": 9.5}, ValueError, "ses_eval_budget must be a", id="half a preview"),
        pytest.param({"ses_inference_steps": 0}, ValueError, "ses_inference_steps must be", id="no steps"),
        pytest.param({"ses_inference_steps": "8"}, ValueError, "ses_inference_steps must be", id="a string"),
        pytest.param({"ses_config": {"popsize": 3}}, ValueError, "ses_config must be", id="a dict"),
        pytest.param({"ses_reward_model": None}, ValueError, "ses_reward_model must be", id="no reward"),
        pytest.param({"ses_reward_model": "picke"}, ValueError, "picke.*clip.*pick", id="unknown reward"),
        pytest.param({"prompt": ["a fox", "a dog"]}, ValueError, "one prompt", id="several prompts"),
        pytest.param({"seed": "lucky"}, ValueError, "seed must be a whole number", id="seed not a number"),
        pytest.param({"seed": 2**64}, ValueError, "seed must be below", id="seed too large"),
        pytest.param({"lora": {}}, ValueError, "enable_lora_hot_loading", id="a LoRA that would pile up"),
        pytest.param({"ses_budget": 3}, TypeError, "ses_budget", id="an argument that is none"),
    ],
)
def test_bad_arguments_raise_before_any_work(pipe, monkeypatch, arguments, error, message):
    def work(*args, **kwargs):
        raise AssertionError("the pipeline was called")

    monkeypatch.setattr(pipe, "units", [SimpleNamespace(take_over=True, process=work), pipe.units[-1]])
    pipe.ses_result = "an earlier call's"
    with pytest.raises(error, match=message):
        pipe(**BASE | SES | arguments)
    assert pipe.ses_result == "an earlier call's"  # a call that was refused loses nothing


@pytest.mark.parametrize(
    "settings, message",
    [
        pytest.param({"popsize": 4}, "of another search", id="another popsize"),
        pytest.param({"k_elites": 3}, "of another search", id="other elites"),
        pytest.param({"wavelet_name": "db2"}, "of another search", id="another wavelet"),
        pytest.param({"dwt_level": 3}, "of another search", id="another level"),
        pytest.param({"include_base": False}, "of another search", id="without the base"),
        pytest.param({"seed": 5}, "its own seed or generator", id="another seed"),
        pytest.param({"generator": torch.Generator()}, "its own seed or generator", id="a generator"),
    ],
)
def test_a_state_of_another_search_is_refused_at_once(settings, message):
    state = ses_fast.evolve(
        torch.randn(1, 2, 8, 8), lambda z: z.mean().item(), 10, dwt_level=1, include_base=True, seed=1, progress=False
    ).state
    assert SESConfig(state=state).state is state
    with pytest.raises(ValueError, match=message):
        SESConfig(state=state, **settings)


def test_the_winner_is_put_in_place_as_noise_too(pipe, monkeypatch):
    """What ControlNets and image-to-image units read is `noise`."""
    unit, answers = pipe.units[-1], []
    process = type(unit).process

    def kept(self, *args, **kwargs):
        answers.append(process(self, *args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(type(unit), "process", kept)
    search(pipe, budget=6)
    assert torch.equal(answers[-1][0]["noise"], pipe.ses_result.latents)


def test_a_unit_that_was_lost_is_not_ignored(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "units", pipe.units[:-1])
    with pytest.raises(ValueError, match="enable"):
        search(pipe)
    ses_fast.enable(pipe)
    assert isinstance(pipe.units[-1], SESUnit) and search(pipe, budget=1)[1].evaluations == 1


@pytest.mark.parametrize(
    "scores, message",
    [
        pytest.param([1.0, 2.0, 3.0], "held-out reward 'odd' must return 1 scores", id="too many"),
        pytest.param("good", "held-out reward 'odd' must return 1 numbers", id="a word"),
    ],
)
def test_a_held_out_reward_of_the_wrong_shape_is_named_before_the_search_is_paid(pipe, scores, message):
    with pytest.raises(ValueError, match=message):
        search(pipe, budget=3, report_rewards={"odd": lambda images, prompt: scores})
    assert pipe.ses_result is None


def test_a_reward_of_one_float_serves_a_search_and_judges_it(pipe):
    """One number an image is a score everywhere, where images come one by one."""

    def one_float(images, prompt):
        return float(brightness(images, prompt))

    config = SESConfig(**QUIET, report_rewards={"float": one_float})
    pipe(**BASE | SES | {"ses_reward_model": one_float}, ses_eval_budget=3, ses_config=config)
    held = pipe.ses_result.held_out["float"]
    assert held.base == pytest.approx(pipe.ses_result.base_score, abs=0.01)  # of the picture, in 8 bits
    assert held.answer == pytest.approx(pipe.ses_result.score, abs=0.01)


def test_weighted_rewards_without_a_scale_cannot_be_held_out(pipe):
    from ses_fast.rewards.weighted import WeightedReward

    mixed = WeightedReward({"a": brightness}, {"a": 1.0})
    with pytest.raises(ValueError, match="'mix' is a sum of several"):
        search(pipe, budget=3, report_rewards={"mix": mixed})
    scaled = WeightedReward({"a": brightness}, {"a": 1.0}, scale={"a": (0.0, 1.0)})
    assert search(pipe, budget=3, report_rewards={"mix": scaled})[1].held_out.keys() == {"mix"}
