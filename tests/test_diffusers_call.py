"""diffusers' own conventions on an enabled pipeline, its schedulers, and known traps."""

import copy
import functools
import itertools
import logging
from contextlib import contextmanager

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from peft import LoraConfig
from PIL import Image
from test_diffusers import close, drawn, first_noises, levels, packed, previews, rounded
from tiny_diffusers import brightness, first, make, search
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import ses_fast
from ses_fast import Preview, SearchResult, SESConfig, reference
from ses_fast.pipelines.diffusers import call as diffusers_call
from ses_fast.pipelines.diffusers.call import suited
from ses_fast.pipelines.diffusers.driver import Driver
from ses_fast.pipelines.diffusers.family import FAMILIES
from ses_fast.pipelines.diffusers.memory import Memory
from ses_fast.pipelines.diffusers.pictures import at_levels, of_output
from ses_fast.pipelines.diffusers.scheduler import foreseen, noise_levels, window_on
from ses_fast.rewards.pil import from_pil

_made = {}


def enabled(family):
    if family not in _made:
        _made[family] = make(family)
    ses_fast.enable(_made[family].pipe)
    return _made[family]


@pytest.fixture
def sdxl():
    tiny = enabled("SDXL")
    before = tiny.pipe.scheduler
    yield tiny
    tiny.pipe.scheduler = before


@pytest.fixture
def flux():
    tiny = enabled("FLUX.1")
    before = tiny.pipe.scheduler
    yield tiny
    tiny.pipe.scheduler = before


# --- schedulers


class KeepsItsSampler(diffusers.EulerAncestralDiscreteScheduler):
    """As DPMSolverSDEScheduler: a sampler of noise that is made of the first batch it sees."""

    noise_sampler = None

    def set_timesteps(self, *args, **kwargs):
        self.noise_sampler = None
        super().set_timesteps(*args, **kwargs)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if self.noise_sampler is None:
            self.noise_sampler = torch.randn(sample.shape)
        made = super().step(model_output, timestep, sample, generator=drawn(), return_dict=True)
        made.prev_sample = made.prev_sample + 0.1 * self.noise_sampler
        return made


SLOW = pytest.mark.slow
OF_SDXL = [
    pytest.param("EulerAncestralDiscreteScheduler", {}, id="ancestral"),
    pytest.param("LCMScheduler", {}, id="LCM"),
    pytest.param("DDPMScheduler", {}, id="DDPM, whose noise would depend on the batch"),
    pytest.param("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, id="a history of two steps"),
    pytest.param("HeunDiscreteScheduler", {}, id="two forwards a step"),
    pytest.param(KeepsItsSampler, {}, id="keeps a sampler of the first batch's size"),
    pytest.param("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, id="SDE", marks=SLOW),
    pytest.param("DPMSolverSinglestepScheduler", {}, id="single", marks=SLOW),
    pytest.param("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}, id="UniPC", marks=SLOW),
    pytest.param("DEISMultistepScheduler", {}, id="DEIS", marks=SLOW),
    pytest.param("KDPM2AncestralDiscreteScheduler", {}, id="KDPM2 ancestral", marks=SLOW),
    pytest.param("PNDMScheduler", {"skip_prk_steps": True}, id="PNDM", marks=SLOW),
    pytest.param("DDIMScheduler", {}, id="DDIM", marks=SLOW),
    pytest.param("TCDScheduler", {}, id="TCD", marks=SLOW),
    pytest.param("LMSDiscreteScheduler", {}, id="LMS", marks=SLOW),
    pytest.param("EDMEulerScheduler", {}, id="EDM", marks=SLOW),
]


@pytest.mark.parametrize(("scheduler", "settings"), OF_SDXL)
def test_every_kind_of_scheduler(sdxl, scheduler, settings):
    scheduler = getattr(diffusers, scheduler) if isinstance(scheduler, str) else scheduler
    sdxl.pipe.scheduler = scheduler.from_config(sdxl.pipe.scheduler.config, **settings)
    stays_exact(sdxl, {"eta": 0.7} if scheduler is diffusers.DDIMScheduler else {})


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        pytest.param("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, id="stochastic"),
        pytest.param("FlowMatchLCMScheduler", {}, id="LCM", marks=SLOW),
    ],
)
def test_every_kind_of_flow_scheduler(flux, scheduler, settings):
    """FLUX never gives its scheduler the call's generator: the global stream decides."""
    flux.pipe.scheduler = getattr(diffusers, scheduler).from_config(flux.pipe.scheduler.config, **settings)
    stays_exact(flux, {})


def stays_exact(tiny, call):
    """Budget one is the stock image; batches and survivors equal one by one; the last foreseen image is the image."""
    latents, clean = last_step(tiny, 5)  # some schedulers leave a last bit of noise
    assert (clean - latents).abs().max() < 0.02 * latents.abs().max()
    torch.manual_seed(5)
    stock = first(tiny(num_inference_steps=3, generator=drawn(), **call))
    left = torch.get_rng_state()
    torch.manual_seed(5)
    output, _ = search(tiny, 1, call={"generator": drawn(), **call})
    assert np.array_equal(first(output), stock) and torch.equal(torch.get_rng_state(), left)
    images = None
    for batch_size, preview in ((1, Preview()), (2, Preview(race=((0.9, 0.8), (0.7, 0.5))))):
        torch.manual_seed(5)
        call = {**call, "generator": drawn()}
        _, result, shown, steps = previews(tiny, 4, steps=4, batch_size=batch_size, preview=preview, call=call)
        if images is None:
            images, forwards = shown, result.forwards["preview"]
            assert images.std(0).mean() > 0.01
        if preview.race:
            assert result.forwards["preview"] < forwards and steps.any()
        assert close(shown[steps == 0], images[steps == 0])


def last_step(tiny, steps):
    """(what the schedule's last step makes, the image that its forward foresees)"""
    with torch.no_grad():
        driver = Driver(tiny.pipe, type(tiny.pipe)._ses_stock.__call__.__get__(tiny.pipe), tiny.call)
        setting, _ = driver.set_up(num_inference_steps=steps)
        window = window_on(tiny.pipe.scheduler, 0, setting.steps)
        driver.steps(1, window, noises=driver.base, num_inference_steps=steps)
    return window.latents, window.clean


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_foreseen_image_is_the_schedulers_own(name, predicts):
    clipped = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(prediction_type=predicts, **clipped)
    scheduler.set_timesteps(5)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=drawn())
    made = scheduler.step(output, scheduler.timesteps[0], sample)
    own = made.pred_original_sample if name == "DDIMScheduler" else scheduler.model_outputs[-1]
    clean = foreseen(scheduler, sample, output, noise_levels(scheduler)[0])
    assert torch.allclose(clean, own, rtol=1e-3, atol=1e-3 * own.abs().max().item())


# --- the noise


@pytest.mark.parametrize("family", ["SDXL", "FLUX.1"])
def test_the_base_is_the_pipelines_own_noise_in_every_dtype(family):
    """A seed may draw other noises in another dtype: the base is the pipeline's, the search's noise the same in all."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        tiny = make(family)
        ses_fast.enable(tiny.pipe.to(dtype))
        tiny.call = {name: _cast(value, dtype) for name, value in tiny.call.items()}
        stock = tiny(num_inference_steps=2, generator=drawn(), output_type="pil")
        output, result = search(tiny, 1, steps=2, call={"num_inference_steps": 2, "output_type": "pil"})
        assert np.array_equal(first(output), first(stock))
        assert result.state.base.dtype == dtype
        _, results[dtype] = search(tiny, 4, steps=1, call={"num_inference_steps": 1}, include_base=False, popsize=4)
    fp32, bf16 = (results[dtype].state for dtype in (torch.float32, torch.bfloat16))
    assert len(fp32.elite_low) >= 4 and sorted(fp32.elite_low.tolist()) == sorted(bf16.elite_low.tolist())


def _cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_init_noise_sigma_is_applied_once(sdxl):
    """It depends on the number of steps: 1.0, 4.2 and more. Candidates have unit variance."""
    _, result, images, _ = previews(sdxl, steps=1, batch_size=1)
    assert 0.8 < result.state.base.std() < 1.2
    stock = sdxl(num_inference_steps=1, latents=result.latents)
    assert np.array_equal(levels(images)[result.best.index], rounded(first(stock)))


@pytest.mark.parametrize("family", ["SDXL", "FLUX.1", "FLUX.2-klein", "Qwen-Image"])
def test_own_latents_are_the_base(family):
    """Packed where the pipeline takes them so."""
    tiny = enabled(family)
    _, result = search(tiny, 1)
    latents = packed(tiny.pipe, result.state.base)
    kept = latents.clone()
    stock = first(tiny(num_inference_steps=3, latents=latents))
    output, again = search(tiny, 1, seed=None, call={"latents": latents})
    assert np.array_equal(first(output), stock) and torch.equal(latents, kept)
    assert torch.equal(again.state.base, result.state.base)
    with pytest.raises(ValueError, match=r"latents= has shape \(1, 3, 3\)"):
        search(tiny, 1, call={"latents": latents[:, :3, ..., :3].reshape(-1)[:9].view(1, 3, 3)})


def test_without_a_generator_the_global_seed_decides(sdxl):
    torch.manual_seed(11)
    stock = first(sdxl(num_inference_steps=3))
    left = torch.get_rng_state()
    torch.manual_seed(11)
    output, result = search(sdxl, 1, seed=None)
    assert np.array_equal(first(output), stock) and torch.equal(torch.get_rng_state(), left)
    torch.manual_seed(11)
    _, again = search(sdxl, 4, seed=None)
    assert again.seed == result.seed
    _, other = search(sdxl, 4, seed=None)  # the stream went on
    assert other.seed != again.seed and not torch.equal(other.state.base, again.state.base)


def test_a_reward_that_draws_or_seeds_changes_nothing(sdxl):
    def seeds(images, prompt):
        torch.manual_seed(0)
        return brightness(images, prompt)

    _, plain = search(sdxl, 6)
    _, seeded = search(sdxl, 6, reward=seeds)
    assert [each.score for each in plain.trace] == [each.score for each in seeded.trace]


def test_a_seed_is_a_generator_of_that_seed(sdxl):
    stock = first(sdxl(num_inference_steps=3, generator=drawn(7)))
    assert np.array_equal(first(sdxl(num_inference_steps=3, seed=7)), stock)
    output, result = search(sdxl, 1, seed=None, call={"seed": 7})
    assert np.array_equal(first(output), stock) and result.seed == 7
    with pytest.raises(ValueError, match="not both"):
        search(sdxl, 1, call={"seed": 7})
    with pytest.raises(ValueError, match="seed"):
        sdxl(num_inference_steps=1, seed="seven")


def test_a_list_of_one_generator(sdxl):
    output, result = search(sdxl, 3)
    again, listed = search(sdxl, 3, call={"generator": [drawn()]})
    assert np.array_equal(first(output), first(again)) and result.seed == listed.seed


# --- the call's conventions


def test_outputs_are_the_pipelines_own(sdxl):
    output, result = search(sdxl, 3)
    assert type(output) is type(sdxl(num_inference_steps=1))
    pictures, _ = search(sdxl, 3, call={"output_type": "pil"})
    assert np.array_equal(np.array(pictures.images[0]), rounded(first(output)))
    tensors, _ = search(sdxl, 3, call={"output_type": "pt", "return_dict": False})
    assert isinstance(tensors, tuple) and np.array_equal(tensors[0][0].movedim(0, -1).numpy(), first(output))
    latents, _ = search(sdxl, 3, call={"output_type": "latent"})
    assert latents.images.shape == result.latents.shape


def test_the_callback_sees_the_final_image_alone(sdxl):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, len(tensors["latents"])))
        return tensors

    search(sdxl, 4, call={"callback_on_step_end": callback}, preview=Preview(refine=1))
    assert seen == [(0, 1), (1, 1), (2, 1)]


def test_the_pipeline_warns_once(caplog):
    qwen = enabled("Qwen-Image")
    with caplog.at_level(logging.WARNING):
        search(qwen, 3, preview=Preview(cfg=False), call={"guidance_scale": 2.0})
    said = [record.getMessage() for record in caplog.records if "qwenimage" in record.name]
    assert len(said) == 1 and "not guidance-distilled" in said[0]


def test_the_prompt_is_encoded_once(sdxl):
    """For one image and for two, which shows what the pipeline repeats; never for a batch, nor for the answer."""
    with counted(sdxl.pipe.text_encoder) as calls:
        search(sdxl, 8, batch_size=3, call={"prompt": "two dogs", "negative_prompt": "a fog"})
    assert len(calls) == 4
    with counted(sdxl.pipe.text_encoder) as calls:
        search(sdxl, 4, batch_size=1, preview=Preview(refine=1))
    assert len(calls) == 1  # SDXL's empty negative prompt is zeros


@contextmanager
def counted(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("call", "config", "message"),
    [
        ({"num_images_per_prompt": 2}, {}, "leave num_images_per_prompt=2 out"),
        ({"num_images_per_prompt": None}, {}, "leave num_images_per_prompt=None out"),
        ({"prompt": ["a cat"]}, {}, "one prompt, a string"),
        ({"prompt": None}, {}, "embeds"),
        ({"generator": [drawn(), drawn()]}, {}, "a list of 2"),
        ({"generator": "cpu"}, {}, "a torch.Generator or a list of one, got 'cpu'"),
        ({"latents": [0.0]}, {}, "latents= must be a tensor, got list"),
        ({"denoising_end": 0.8}, {}, "denoising_end"),
        ({"timesteps": [900, 500]}, {}, "ses_inference_steps=2"),
        ({"output_type": "latent"}, {"report_rewards": {"other": brightness}}, "output_type"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, {"latents": torch.zeros(1, 4, 16, 16)}, "not both"),
        ({}, {"latents": torch.zeros(1, 4, 8, 8)}, r"of shape \(1, 4, 16, 16\)"),
    ],
)
def test_what_is_refused(sdxl, call, config, message):
    if call.get("prompt", "") is None:
        call = {"prompt_embeds": torch.zeros(2, 5, 16), **call}
    before = dict(vars(sdxl.pipe))
    with pytest.raises(ValueError, match=message):
        search(sdxl, 3, call=call, **config)
    assert vars(sdxl.pipe)["scheduler"] is before["scheduler"] and "prepare_latents" not in vars(sdxl.pipe)


def test_a_reward_by_name_needs_the_prompts_text(flux):
    for rewards in ({"reward": "pick"}, {"report_rewards": ["hps"]}, {"reward": from_pil(brightness)}):
        with pytest.raises(ValueError, match="prompt_embeds= are no text"):
            search(flux, 3, **rewards)
    output, result = search(flux, 0, reward="pick")  # no reward is asked
    assert result is None and np.array_equal(first(output), first(flux(num_inference_steps=3, generator=drawn())))


# In the order of the mapping: each process of the tests is to collect the same.
@pytest.mark.parametrize("cls", dict.fromkeys(AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()), ids=lambda cls: cls.__name__)
def test_a_text_to_image_class_is_known_or_refused_by_name(cls):
    """Nothing but a line in FAMILIES makes a class known: a subclass of the library's own is another one."""
    pipe = cls.__new__(cls)
    if cls.__name__ in FAMILIES:
        assert ses_fast.enable(pipe) is pipe and ses_fast.disable(pipe) is pipe
    else:
        with pytest.raises(ValueError, match=f"does not know diffusers.*{cls.__name__}; the supported pipelines are"):
            ses_fast.enable(pipe)


def test_other_classes_are_refused():
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(make("SDXL").pipe)
    with pytest.raises(ValueError, match="does not know .*Img2Img.*diffusers's AuraFlowPipeline, .*ZImagePipeline"):
        ses_fast.enable(pipe)
    with pytest.raises(ValueError, match="no repeated blocks of SD3"):
        ses_fast.enable(make("SD3").pipe, compile=True)


@pytest.mark.parametrize(
    ("family", "call"),
    [
        pytest.param("Lumina2", {"cfg_trunc_ratio": 0.5}, marks=SLOW),
        ("SD3", {"skip_guidance_layers": [1]}),
        ("SDXL-ControlNet", {"control_guidance_end": 0.5}),
    ],
)
def test_a_race_is_refused_where_an_argument_counts_the_steps(family, call):
    tiny = enabled(family)
    with pytest.raises(ValueError, match=f"race.*{next(iter(call))}"):
        search(tiny, 3, call=call, preview=Preview(race="auto"))
    output, result = search(tiny, 1, call=call)
    assert np.array_equal(first(output), first(tiny(num_inference_steps=3, generator=drawn(), **call)))


def test_half_the_size_is_refused_where_its_noise_is_not_half(flux):
    with pytest.raises(ValueError, match=r"of 36x36 its noise is .*, of half that"):
        search(flux, 3, call={"height": 36, "width": 36}, preview=Preview(scale=2))


def test_a_call_that_draws_its_noise_twice_is_refused(sdxl, monkeypatch):
    own = sdxl.pipe.prepare_latents

    @functools.wraps(own)
    def twice(*args, **kwargs):
        own(*args, **kwargs)
        return own(*args, **kwargs)

    monkeypatch.setitem(vars(sdxl.pipe), "prepare_latents", twice)
    with pytest.raises(ValueError, match="XLPipeline's draws it otherwise"):
        search(sdxl, 3)
    assert vars(sdxl.pipe)["prepare_latents"] is twice


def test_an_earlier_calls_result_goes(sdxl):
    assert search(sdxl, 1)[1] is not None
    assert search(sdxl, 0)[1] is None


def test_an_answer_from_memory_is_the_pipelines_to_change():
    memory = Memory(lambda prompt: [torch.ones(1)])
    memory("a").append(torch.zeros(1))
    assert memory("a") == [torch.ones(1)]


def test_a_clean_up_that_fails_too_hides_no_error(sdxl, monkeypatch):
    def fails():
        raise RuntimeError("no device")

    monkeypatch.setitem(vars(sdxl.pipe), "maybe_free_model_hooks", fails)
    with pytest.raises(ZeroDivisionError) as caught:
        search(sdxl, 3, reward=lambda images, prompt: 1 / 0)
    assert any("clean-up" in note and "no device" in note for note in caught.value.__notes__)


def test_own_schedules_of_as_many_steps(flux):
    sigmas = [1.0, 0.7, 0.2]
    output, _ = search(flux, 1, call={"sigmas": sigmas})
    stock = flux(sigmas=sigmas, num_inference_steps=3, generator=drawn())
    assert np.array_equal(first(output), first(stock))


def test_an_exception_leaves_the_pipeline_as_it_was(sdxl):
    class Stop(Exception):
        pass

    def fails(images, prompt):
        if fails.calls:
            raise Stop
        fails.calls += 1
        return brightness(images, prompt)

    fails.calls = 0
    scheduler, config = sdxl.pipe.scheduler, dict(sdxl.pipe.config)
    generator = drawn()
    with pytest.raises(Stop) as caught:
        search(sdxl, 6, reward=fails, batch_size=2, call={"generator": generator})
    assert caught.value.ses_result is sdxl.pipe.ses_result and sdxl.pipe.ses_result.evaluations == 2
    assert sdxl.pipe.scheduler is scheduler and dict(sdxl.pipe.config) == config
    replaced = {"prepare_latents", "encode_prompt", "maybe_free_model_hooks"}
    assert not replaced & vars(sdxl.pipe).keys() and sdxl.pipe._progress_bar_config == {"disable": True}
    assert torch.equal(generator.get_state(), drawn().get_state())


def test_cpu_offload_stays_on_the_device_during_a_search_and_is_put_back(monkeypatch):
    """A CPU stands for the device."""
    tiny = make("SDXL")
    stock = first(tiny(num_inference_steps=3, generator=drawn()))
    ses_fast.enable(tiny.pipe).enable_model_cpu_offload(device="cpu")
    put_back = []
    own = tiny.pipe.enable_model_cpu_offload
    monkeypatch.setitem(vars(tiny.pipe), "enable_model_cpu_offload", lambda **device: put_back.append(own(**device)))
    output, result = search(tiny, 1, batch_size=1)
    assert np.array_equal(first(output), stock) and len(put_back) == 1
    hooks = tiny.pipe._all_hooks
    with pytest.raises(ZeroDivisionError):
        search(tiny, 4, reward=lambda images, prompt: 1 / 0)
    assert len(put_back) == 2 and tiny.pipe._all_hooks is not hooks


def offloaded(pipe):
    """The hooks by which accelerate loads each module's weights for its forward alone."""
    hooks = {name: module._hf_hook for name, module in pipe.unet.named_modules() if hasattr(module, "_hf_hook")}
    assert hooks and all(weight.device.type == "meta" for weight in pipe.unet.parameters())
    return hooks


def test_sequential_cpu_offload_stays_as_it_is(monkeypatch):
    """A CPU stands for the device: the weights lie on "meta" but for a module's own forward."""
    own = accelerate.cpu_offload  # it takes "cpu:0", as diffusers names the device, for another than "cpu"
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **how: own(model, device.type, **how))
    tiny = make("SDXL")
    ses_fast.enable(tiny.pipe)
    stock = first(tiny(num_inference_steps=3, generator=drawn()))
    _, _, images, _ = previews(tiny, 4, batch_size=2)
    tiny.pipe.enable_sequential_cpu_offload(device="cpu")
    hooks = offloaded(tiny.pipe)
    output, _ = search(tiny, 1, batch_size=1)
    assert np.array_equal(first(output), stock) and offloaded(tiny.pipe) == hooks
    _, result, again, _ = previews(tiny, 4, batch_size=2, preview=Preview(refine=1))
    assert torch.equal(again, images) and result.refined and offloaded(tiny.pipe) == hooks
    with pytest.raises(ZeroDivisionError):
        search(tiny, 4, reward=lambda images, prompt: 1 / 0)
    with pytest.raises(KeyboardInterrupt), stops_in_forward(tiny.pipe.unet, 3):
        search(tiny, 4, batch_size=2)
    assert offloaded(tiny.pipe) == hooks
    assert np.array_equal(first(tiny(num_inference_steps=3, generator=drawn())), stock)


@contextmanager
def stops_in_forward(model, times):
    """Inside, the user presses Ctrl-C in the model's forward of that number."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == times:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", None])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_generator_of_any_device_on_a_gpu(device, offload):
    tiny = make("FLUX.1")
    ses_fast.enable(tiny.pipe)
    tiny.pipe.to("cuda") if offload is None else getattr(tiny.pipe, offload)()
    stock = first(tiny(num_inference_steps=3, generator=torch.Generator(device).manual_seed(3)))
    output, result = search(tiny, 1, call={"generator": torch.Generator(device).manual_seed(3)}, batch_size=1)
    assert np.array_equal(first(output), stock) and result.state.base.device.type == "cuda"
    with pytest.raises(ZeroDivisionError):
        search(tiny, 4, reward=lambda images, prompt: 1 / 0)
    weights = {weight.device.type for weight in tiny.pipe.transformer.parameters()}
    assert weights == {
        {"enable_model_cpu_offload": "cpu", "enable_sequential_cpu_offload": "meta"}.get(offload, "cuda")
    }


@pytest.mark.parametrize(
    "cache",
    [
        diffusers.FirstBlockCacheConfig(threshold=1.0),
        diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ],
    ids=["first block", "TaylorSeer"],
)
def test_a_cache_does_not_leak_between_candidates(cache):
    """Each preview is the stock call's image of its noise, whatever was drawn before, or broke off in its middle."""
    tiny = make("FLUX.1")
    ses_fast.enable(tiny.pipe)
    plain = first(tiny(num_inference_steps=4, generator=drawn()))
    tiny.pipe.transformer.enable_cache(cache)
    stock = first(tiny(num_inference_steps=4, generator=drawn()))
    assert np.abs(stock - plain).max() > 0.01, "the cache does nothing"
    with pytest.raises(KeyboardInterrupt), stops_in_forward(tiny.pipe.transformer, 3):
        search(tiny, 4, steps=4)
    _, result, images, _ = previews(tiny, 4, steps=4, popsize=4)
    for noise, image in zip(first_noises(result, 4), images, strict=True):
        alone = tiny(num_inference_steps=4, latents=packed(tiny.pipe, noise))
        assert np.array_equal(levels(image[None])[0], rounded(first(alone)))
    assert np.array_equal(first(tiny(num_inference_steps=4, generator=drawn())), stock)


def test_adapters_are_the_stock_calls():
    """A LoRA and an IP-Adapter in the denoiser, with embeddings and with a picture, which is read once."""
    tiny = make("SDXL")
    ses_fast.enable(tiny.pipe)
    plain = first(tiny(num_inference_steps=3, generator=drawn()))
    tiny.pipe.unet._load_ip_adapter_weights([ip_adapter(tiny.pipe.unet)])
    tiny.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=8, **sizes)
    eye = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    tiny.pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(), feature_extractor=CLIPImageProcessor(**eye)
    )
    picture = Image.fromarray(rounded(plain))
    embeds = [torch.randn(2, 1, 8, generator=drawn())]
    stocks = [plain]
    for call in ({"ip_adapter_image_embeds": embeds}, {"ip_adapter_image": picture}):
        stocks.append(first(tiny(num_inference_steps=3, generator=drawn(), **call)))
        output, _ = search(tiny, 1, call=call)
        assert np.array_equal(first(output), stocks[-1])
        with counted(tiny.pipe.image_encoder) as reads:
            _, _, alone, _ = previews(tiny, 3, batch_size=1, call=call)
        assert len(reads) == ("ip_adapter_image" in call)
        _, _, together, _ = previews(tiny, 3, batch_size=3, call=call)
        assert close(alone, together)
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.combinations(stocks, 2))


def test_tiled_decoding_is_the_stock_calls(sdxl):
    """The autoencoder's tiles are of 32 pixels: an image of 64 has more than one."""
    size = {"height": 64, "width": 64}
    _, _, images, _ = previews(sdxl, 3, batch_size=1, call={"generator": drawn(), **size})
    sdxl.pipe.vae.enable_tiling()
    try:
        _, result, tiled, _ = previews(sdxl, 3, batch_size=1, call={"generator": drawn(), **size})
        _, _, together, _ = previews(sdxl, 3, batch_size=3, call={"generator": drawn(), **size})
        assert close(tiled, together)
        for noise, plain, image in zip(first_noises(result, 3), images, tiled, strict=True):
            stock = sdxl(num_inference_steps=3, latents=noise, **size)
            assert np.array_equal(levels(image[None])[0], rounded(first(stock)))
            assert (plain - image).abs().max() > 0.1, "the tiles do nothing"
    finally:
        sdxl.pipe.vae.disable_tiling()


def test_a_cache_sends_previews_one_by_one_and_refuses_a_race():
    """It decides by the mean over a batch."""
    tiny = make("FLUX.1")
    ses_fast.enable(tiny.pipe)
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1.0))
    stock = first(tiny(num_inference_steps=3, generator=drawn()))
    output, _ = search(tiny, 1)
    assert np.array_equal(first(output), stock)
    _, _, alone, _ = previews(tiny, 3, batch_size=1)
    with pytest.warns(UserWarning, match="one by one"):
        _, _, together, _ = previews(tiny, 3, batch_size=3)
    assert torch.equal(alone, together)
    with pytest.raises(ValueError, match="race"):
        search(tiny, 3, preview=Preview(race="auto"))


def ip_adapter(unet):
    """The weights of an IP-Adapter with one token of eight numbers a picture."""
    generator, weights = drawn(), {}
    for i, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        width, text = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for part in ("k", "v"):
            weights[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(width, text, generator=generator)
    project = {"proj.weight": torch.randn(4 * text, 8, generator=generator), "proj.bias": torch.zeros(4 * text)}
    norm = {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    return {"image_proj": project | norm, "ip_adapter": weights}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SDXL", "FLUX.1"])
@pytest.mark.parametrize("ours", [True, False], ids=["enable(compile=True)", "compile_repeated_blocks"])
def test_compiled_blocks(family, ours):
    tiny = make(family)
    stock = first(tiny(num_inference_steps=3, generator=drawn()))
    ses_fast.enable(tiny.pipe, compile=ours)
    denoiser = tiny.pipe.unet if family == "SDXL" else tiny.pipe.transformer
    if not ours:
        denoiser.compile_repeated_blocks(dynamic=False)
    _, result = search(tiny, 5, batch_size=2)
    assert result.seconds["compile"] > 1
    output, again = search(tiny, 5, batch_size=2)
    assert again.seconds["compile"] == 0 and again.score == result.score
    output, _ = search(tiny, 1, batch_size=1)
    assert np.abs(first(output) - stock).max() < 1e-4
    ses_fast.disable(tiny.pipe)
    assert ours == (not any(part._compiled_call_impl for part in denoiser.modules()))


def test_a_copy_and_a_saved_pipeline(sdxl, tmp_path):
    other = copy.deepcopy(sdxl.pipe)
    assert type(other) is type(sdxl.pipe)
    ses_fast.disable(other)
    assert type(other) is diffusers.StableDiffusionXLPipeline
    sdxl.pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.StableDiffusionXLPipeline
    image = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(sdxl.pipe)
    assert type(image) is diffusers.StableDiffusionXLImg2ImgPipeline


# --- what the common room gives


def test_a_search_goes_on(sdxl, tmp_path):
    _, whole = search(sdxl, 7, popsize=3, batch_size=1)
    _, part = search(sdxl, 4, popsize=3, batch_size=1)
    part.save(tmp_path / "part.safetensors")
    part = SearchResult.load(tmp_path / "part.safetensors")
    _, more = search(sdxl, 7, popsize=3, batch_size=1, state=part.state)
    assert [each.score for each in more.trace] == [each.score for each in whole.trace]
    torch.manual_seed(99)  # without a generator the base is the state's
    _, more = search(sdxl, 7, popsize=3, batch_size=1, state=part.state, seed=None)
    assert [each.score for each in more.trace] == [each.score for each in whole.trace]
    with pytest.raises(ValueError, match="guidance_scale was 5.0"):
        search(sdxl, 7, popsize=3, state=part.state, call={"guidance_scale": 6.0})
    sdxl.pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(sdxl.pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler was"):
        search(sdxl, 7, popsize=3, state=part.state)


def test_a_search_with_noise_inside_goes_on_with_the_same_generator_alone():
    turbo = enabled("SDXL-Turbo")
    _, part = search(turbo, 3, popsize=3)
    _, more = search(turbo, 6, popsize=3, state=part.state)
    assert more.evaluations == 6
    with pytest.raises(ValueError, match="its generator was"):
        search(turbo, 6, popsize=3, state=part.state, seed=None)


def test_the_searched_band_of_large_latents():
    """At 1024 pixels: 4 is the level of latents of 8 and 16 pixels, and 32x32 latents (Sana's) get 8x8 coefficients."""
    assert suited(SESConfig(), 128, 8).dwt_level == suited(SESConfig(), 64, 16).dwt_level == "auto"
    assert SESConfig().evolution(1024, 1024).dwt_level == 4
    assert suited(SESConfig(), 32, 32).dwt_level == 2
    assert suited(SESConfig(dwt_level=3), 32, 32).dwt_level == 3


def test_given_latents_are_rendered(flux):
    output, result = search(flux, 5)
    again, none = search(flux, 5, latents=result.latents)
    assert none is None and np.array_equal(first(again), first(output))


def test_held_out_rewards_judge_both_images(sdxl):
    stock = first(sdxl(num_inference_steps=3, generator=drawn()))
    output, result = search(sdxl, 5, report_rewards={"again": brightness}, call={"output_type": "pil"})
    base, answer = result.held_out["again"].base, result.held_out["again"].answer
    assert base == pytest.approx(2 * stock.mean() - 1, abs=0.01) and answer == pytest.approx(result.score, abs=1e-5)


def test_a_video_is_judged_by_all_frames_or_by_the_middle_one(monkeypatch):
    wan = enabled("Wan")
    shapes = []

    def sees(images, prompt):
        shapes.append(tuple(images.shape))
        return brightness(images, prompt)

    search(wan, 2, reward=sees, call={"prompt": None})
    assert shapes == [(2, 9, 3, 32, 32)]
    # A reward of the package sees the middle one, and reads a text.
    frames, seen = first(search(wan, 0)[0]), []
    monkeypatch.setattr(diffusers_call, "check_embeds", lambda given, rewards: None)
    search(
        wan, 1, reward=from_pil(lambda pictures, prompt: [float(seen.append(np.array(each)) or 0) for each in pictures])
    )
    assert frames.shape == (9, 32, 32, 3) and len(seen) == 1 and np.array_equal(seen[0], rounded(frames[4]))
    with pytest.raises(ValueError, match="leave num_videos_per_prompt=2 out"):
        search(wan, 2, call={"num_videos_per_prompt": 2})


def test_pictures_are_at_the_levels_that_diffusers_rounds_to():
    """All levels, all halves between them and the numbers beside those, as a decoder of each dtype can give them."""
    marks = torch.arange(511, dtype=torch.float64) / 510  # the 256 levels and the 255 halves
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        beside = [torch.nextafter(marks.to(dtype), torch.tensor(end, dtype=dtype)) for end in (0, 1)]
        values = torch.cat([marks.to(dtype), *beside, torch.rand(1000, generator=drawn()).to(dtype)])
        images = values[None, None, None].expand(1, 3, 1, -1)
        processor = diffusers.image_processor.VaeImageProcessor
        picture = processor.numpy_to_pil(processor.pt_to_numpy(images))
        expected = np.array(picture[0])[None]
        seen = []
        sees = from_pil(lambda image, prompt, seen=seen: seen.append(np.array(image)) or 0.0, batched=False)
        for shown in (at_levels(images), of_output((picture,), torch.device("cpu"))):
            assert shown.dtype == torch.float32 and shown.abs().max() <= 1
            for kept in (shown, shown.half()):  # a reward may go on in half precision
                assert np.array_equal(levels(kept), expected)
                for rounding in ("down", "nearest"):
                    pixels = reference.quantised(kept, rounding).movedim(1, -1)
                    assert np.array_equal(pixels.numpy(), expected), "a reward of the user's own may round"
            sees(shown, "")
            assert np.array_equal(seen[-1], expected[0])
            assert (shown.movedim(1, -1) - torch.from_numpy(expected) / 127.5 + 1).abs().max() < 0.3 / 127.5
