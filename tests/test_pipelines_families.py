"""The documented call on every family, through DiffSynth's own classes with tiny random weights."""

import warnings

import numpy as np
import pytest
import torch
from diffsynth.utils.ses import ses_search
from tiny import (
    BASE,
    GUIDED,
    HALF,
    MAKE,
    PHOTO,
    brightness,
    close,
    forward_sizes,
    lora_for,
    manage_vram,
    pixels,
    search,
)

import ses_fast
from ses_fast.pipelines.batching import first_size
from ses_fast.pipelines.diffsynth.unit import SESUnit

FAMILIES = [pytest.param(name, id=name) for name in MAKE]
PIXELS = {"Z-Image": 8, "FLUX.1": 8, "FLUX.2-dev": 16, "FLUX.2-klein": 16, "Qwen-Image": 8}  # a side of a latent
# FLUX's text has one length whatever the prompt is, so CFG's two sides can share a batch.
SHARES = ("FLUX.1", "FLUX.2-dev", "FLUX.2-klein")
CFG = [pytest.param({}, id="no CFG"), pytest.param(GUIDED, id="CFG")]

_pipes = {}


@pytest.fixture
def tiny(family):
    """The stock pipeline; made once, as every test leaves it as it was."""
    if family not in _pipes:
        _pipes[family] = MAKE[family]()
    return _pipes[family]


@pytest.fixture
def pipe(tiny):
    yield ses_fast.enable(tiny)
    ses_fast.disable(tiny)


def forwards(pipe, call, **config):
    """How many images each forward of the denoiser had, in a search of four previews of two steps."""
    with forward_sizes(pipe) as sizes:
        search(pipe, budget=4, call=call, **config)
    return sizes


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_ses_the_stock_image_and_with_a_budget_of_one_too(tiny, cfg):
    stock_class, units = type(tiny), list(tiny.units)
    stock = pixels(tiny(**BASE | cfg))
    ses_fast.enable(tiny)
    try:
        assert isinstance(tiny, stock_class) and isinstance(tiny.units[-1], SESUnit)
        assert np.array_equal(pixels(tiny(**BASE | cfg)), stock)
        for batch_size in (1, 4):
            image, result, _ = search(tiny, budget=1, call=cfg, batch_size=batch_size)
            assert np.array_equal(pixels(image), stock)
            assert result.evaluations == 1 and result.score == result.base_score
    finally:
        ses_fast.disable(tiny)
    assert type(tiny) is stock_class and tiny.units == units and "ses_result" not in vars(tiny)
    assert not {"set_timesteps", "add_noise"} & vars(tiny.scheduler).keys()
    assert np.array_equal(pixels(tiny(**BASE | cfg)), stock)


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_image_is_the_winners_preview(pipe, family, cfg):
    stock = pixels(pipe(**BASE | cfg))
    image, result, seen = search(pipe, budget=10, call=cfg)
    winner = seen.scores.index(max(seen.scores))
    assert winner > 0 and result.score == seen.scores[winner] > seen.scores[0] == result.base_score
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(seen.winner)))
    assert not np.array_equal(pixels(image), stock)
    side = 64 // PIXELS[family]
    assert result.latents.shape == (1, 16 * PIXELS[family] ** 2 // 64 * (2 if side == 4 else 1), side, side)
    again, _, _ = search(pipe, budget=10, call=cfg)
    assert np.array_equal(pixels(again), pixels(image))


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="square"),
        pytest.param({"height": 80, "width": 48}, id="odd: 5x3 patches"),
        pytest.param({"input_image": PHOTO, "denoising_strength": 0.6}, id="image-to-image"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_together_equals_one_by_one(pipe, family, call, cfg):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "previews go one by one"
        _, _, alone = search(pipe, budget=5, call=call | cfg)
        _, _, together = search(pipe, budget=5, call=call | cfg, batch_size=3)
    close(alone, together)


@pytest.mark.parametrize("family", [f if f == "Z-Image" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_together_in_bf16(family):
    pipe = ses_fast.enable(MAKE[family](torch.bfloat16))
    stock = pixels(pipe(**BASE | GUIDED))
    assert np.array_equal(pixels(search(pipe, budget=1, call=GUIDED)[0]), stock)
    _, result, alone = search(pipe, budget=4, call=GUIDED)
    _, _, together = search(pipe, budget=4, call=GUIDED, batch_size=4)
    assert result.latents.dtype == alone.images[0].dtype == torch.bfloat16
    close(alone, together, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_many_images_a_forward_has(pipe, family):
    final, cfg = [1, 1], {"cfg_scale": 3.0}
    assert forwards(pipe, {}, batch_size=4) == [4, 4] + final
    assert forwards(pipe, {}, batch_size=3) == [3, 3, 1, 1] + final
    both = [8, 8] if family in SHARES else [4, 4, 4, 4]
    assert forwards(pipe, cfg, batch_size=4) == both + final * 2


@pytest.mark.parametrize("family", ["Z-Image", "FLUX.2-klein"])
def test_the_automatic_batch_halves_where_memory_ends_and_changes_no_result(pipe, family, monkeypatch):
    """Room for 5 images in a forward and 3 in the decoder. FLUX.2 shares a batch between CFG's sides: 2 candidates."""
    call, unit = {"cfg_scale": 3.0}, pipe.units[-1]
    _, alone, seen = search(pipe, budget=16, call=call, popsize=8)
    forward, decode, sizes = unit.forward_together, unit.decode, []

    def small_forward(*args, **inputs):
        sizes.append(len(inputs["latents"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **inputs)

    def small_decode(pipe, latents, shared):
        if len(latents) > 3:
            raise torch.OutOfMemoryError("no room")
        return decode(pipe, latents, shared)

    monkeypatch.setattr(unit, "forward_together", small_forward)
    monkeypatch.setattr(unit, "decode", small_decode)
    _, result, others = search(pipe, budget=16, call=call, popsize=8, batch_size="auto")
    close(seen, others)
    assert (result.best.generation, result.best.index) == (alone.best.generation, alone.best.index)
    tried = [16, 8] if family in SHARES else [8]
    assert sizes[: len(tried)] == tried and set(sizes[len(tried) :]) == {4}
    with pytest.raises(torch.OutOfMemoryError):  # a size that was asked for is not changed
        search(pipe, budget=8, call=call, popsize=8, batch_size=8)


@pytest.mark.parametrize("family", ["FLUX.2-dev"])
def test_a_batch_size_that_fits_without_the_negative_side_runs_as_two_forwards(pipe, monkeypatch):
    unit, sizes = pipe.units[-1], []
    _, _, alone = search(pipe, budget=8, call=GUIDED)
    forward = unit.forward_together

    def small_forward(*args, **inputs):
        sizes.append(len(inputs["latents"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **inputs)

    monkeypatch.setattr(unit, "forward_together", small_forward)
    _, _, together = search(pipe, budget=8, call=GUIDED, batch_size=4)
    close(alone, together)
    assert sizes == [8] + [4] * 8  # tried once; then two sides, two steps, two generations


@pytest.mark.parametrize("family", ["FLUX.2-dev"])
def test_the_users_own_guidance_is_not_bypassed(pipe, monkeypatch):
    plain, guided = pixels(pipe(**BASE | GUIDED)), pipe.cfg_guided_model_fn
    monkeypatch.setattr(pipe, "cfg_guided_model_fn", lambda *args, **inputs: 0.5 * guided(*args, **inputs), False)
    stock = pixels(pipe(**BASE | GUIDED))
    assert not np.array_equal(stock, plain)
    assert np.array_equal(pixels(search(pipe, budget=1, call=GUIDED)[0]), stock)
    _, _, alone = search(pipe, budget=4, call=GUIDED)
    _, _, together = search(pipe, budget=4, call=GUIDED, batch_size=4)
    close(alone, together)
    assert forwards(pipe, GUIDED, batch_size=4) == [4, 4, 4, 4, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "height, width, popsize, together",
    [
        pytest.param(1024, 1024, 10, 1, id="one at a million"),
        pytest.param(1328, 1328, 10, 1, id="never none"),
        pytest.param(512, 512, 10, 4, id="four at a quarter"),
        pytest.param(512, 768, 10, 2, id="rounded down"),
        pytest.param(128, 128, 10, 10, id="never more than a generation"),
    ],
)
def test_the_automatic_batch_on_a_cpu_is_up_to_a_million_pixels(height, width, popsize, together):
    assert first_size("auto", popsize, "cpu", height * width) == together
    assert first_size("auto", popsize, "cuda:1", height * width) is None  # one alone shows what fits
    assert first_size(3, popsize, "cpu", height * width) == 3


@pytest.mark.parametrize("family", ["Z-Image"])
def test_the_automatic_batch_on_a_gpu_is_what_one_alone_shows_to_fit(pipe, monkeypatch):
    """Counted on a CPU with a GPU's numbers: 100 bytes a candidate, 350 that are free."""
    numbers = {
        "memory_allocated": 1000,
        "memory_reserved": 1050,
        "max_memory_allocated": 1100,
        "mem_get_info": (300, 0),
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("ses_fast.pipelines.batching.on_gpu", lambda device: True)
    steps = {"num_inference_steps": 1, "ses_inference_steps": 1}
    assert forwards(pipe, steps, popsize=6, batch_size="auto") == [1, 2, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image(pipe):
    call = {"input_image": PHOTO, "denoising_strength": 0.6}
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, pixels(pipe(**BASE)))
    assert np.array_equal(pixels(search(pipe, budget=1, call=call)[0]), stock)
    image, _, seen = search(pipe, budget=6, call=call)
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(seen.winner)))
    assert np.array_equal(pixels(pipe(**BASE | call)), stock)


@pytest.mark.parametrize("family", ["FLUX.2-dev", "FLUX.2-klein", "Qwen-Image"])
def test_inpainting(pipe, family):
    call = {"input_image": PHOTO, "denoising_strength": 0.9, "inpaint_mask": HALF}
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, pixels(pipe(**BASE | call | {"inpaint_mask": None})))
    assert np.array_equal(pixels(search(pipe, budget=1, call=call)[0]), stock)
    _, _, alone = search(pipe, budget=4, call=call)
    _, _, together = search(pipe, budget=4, call=call, batch_size=4)
    close(alone, together)


@pytest.mark.parametrize(
    "family, call",
    [
        pytest.param("FLUX.1", {"kontext_images": PHOTO}, id="FLUX.1 Kontext"),
        pytest.param(
            "FLUX.1",
            {"tiled": True, "tile_size": 8, "tile_stride": 4, "height": 96, "width": 96},
            id="FLUX.1 in tiles",
        ),
        pytest.param("FLUX.2-dev", {"edit_image": PHOTO, "edit_image_auto_resize": False}, id="FLUX.2 edit image"),
        pytest.param(
            "FLUX.2-klein", {"extra_text_embedding": torch.ones(1, 2, 96), "cfg_scale": 1.0}, id="FLUX.2 extra text"
        ),
        pytest.param("Qwen-Image", {"context_image": PHOTO}, id="Qwen-Image in-context control"),
        pytest.param(
            "Qwen-Image",
            {"eligen_entity_prompts": ["a fox"], "eligen_entity_masks": [PHOTO]},
            id="Qwen-Image entities",
        ),
    ],
)
def test_inputs_made_for_one_image_go_one_by_one_and_say_so_once(pipe, call):
    stock = pixels(pipe(**BASE | call))
    assert stock.shape != (64, 64, 3) or not np.array_equal(stock, pixels(pipe(**BASE)))
    assert np.array_equal(pixels(search(pipe, budget=1, call=call)[0]), stock)
    with pytest.warns(UserWarning, match="one by one") as caught:
        sizes = forwards(pipe, call, batch_size=4)
    assert len(caught) == 1 and set(sizes) == {1}


def test_qwens_vae_in_tiles_still_denoises_together():
    pipe = ses_fast.enable(MAKE["Qwen-Image"]())
    call = {"tiled": True, "tile_size": 6, "tile_stride": 4}
    _, _, alone = search(pipe, budget=4, call=call)
    _, _, together = search(pipe, budget=4, call=call, batch_size=4)
    close(alone, together)
    assert forwards(pipe, call, batch_size=4) == [4, 4, 1, 1]


@pytest.mark.parametrize("family", ["FLUX.1"])
def test_tea_cache_is_for_the_final_image_alone(pipe):
    steps = {"num_inference_steps": 8}
    cached = steps | {"tea_cache_l1_thresh": 5.0}
    plain, stock = pixels(pipe(**BASE | steps)), pixels(pipe(**BASE | cached))
    assert not np.array_equal(plain, stock)
    image, _, seen = search(pipe, budget=1, call=cached | {"ses_inference_steps": 8})
    assert np.array_equal(pixels(image), stock)
    assert np.array_equal(pixels(pipe.vae_output_to_image(seen.images[0][None])), plain)


@pytest.mark.parametrize(
    "family, call",
    [
        pytest.param("Qwen-Image", {"layer_num": 3}, id="layered: several images of one noise"),
        pytest.param("FLUX.1", {"insert_anything_source_image": PHOTO}, id="pasted back after the decoding"),
        pytest.param("FLUX.2-dev", {"lora": {}}, id="a LoRA that would pile up"),
        pytest.param("FLUX.2-klein", {"negative_lora": {}}, id="and one for the negative side"),
    ],
)
def test_what_cannot_go_with_ses_raises_before_any_work(pipe, monkeypatch, call):
    monkeypatch.setattr(pipe, "unit_runner", None)
    with pytest.raises(ValueError, match=next(iter(call))):
        search(pipe, call=call)


WITH_LORA = ["Z-Image", "FLUX.2-dev", "FLUX.2-klein"]  # whose call takes one


@pytest.fixture
def hot(family):
    """A pipeline of its own that takes LoRAs by the call."""
    pipe = ses_fast.enable(MAKE[family]())
    pipe.dit = pipe.enable_lora_hot_loading(pipe.dit)
    return pipe


@pytest.mark.parametrize("sides", [("lora",), ("negative_lora",), ("lora", "negative_lora")], ids=" and ".join)
@pytest.mark.parametrize("family", WITH_LORA)
def test_a_lora_of_one_side_is_not_shared_with_the_other(hot, family, sides):
    loras = {side: lora_for(family, seed) for seed, side in enumerate(sides)}
    plain, stock = pixels(hot(**BASE | GUIDED)), pixels(hot(**BASE | GUIDED | loras))
    assert not np.array_equal(stock, plain)
    assert np.array_equal(pixels(search(hot, budget=1, call=GUIDED | loras)[0]), stock)
    _, _, alone = search(hot, budget=4, call=GUIDED | loras)
    _, _, together = search(hot, budget=4, call=GUIDED | loras, batch_size=4)
    close(alone, together)
    assert forwards(hot, GUIDED | loras, batch_size=4) == [4, 4, 4, 4, 1, 1, 1, 1]
    assert np.array_equal(pixels(hot(**BASE | GUIDED)), plain)


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("family", WITH_LORA)
def test_running_out_of_memory_with_a_lora_changes_no_result(hot, family, cfg, monkeypatch):
    """DiffSynth loads it before the forward and clears it after: the retry would have it twice."""
    call, unit = cfg | {"lora": lora_for(family)}, hot.units[-1]
    _, _, alone = search(hot, budget=8, call=call, popsize=8)
    forward, sizes = unit.forward_together, []

    def small_forward(*args, **inputs):
        sizes.append(len(inputs["latents"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **inputs)

    monkeypatch.setattr(unit, "forward_together", small_forward)
    _, _, others = search(hot, budget=8, call=call, popsize=8, batch_size="auto")
    close(alone, others)
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}


@pytest.mark.parametrize("family", WITH_LORA)
def test_an_interrupt_in_a_forward_leaves_no_lora(hot, family):
    call, calls = {"lora": lora_for(family)}, []
    plain, stock = pixels(hot(**BASE)), pixels(hot(**BASE | call))

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    block = next(m for m in hot.dit.modules() if type(m).__name__ in hot.dit._repeated_blocks)
    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(hot, call=call)
    handle.remove()
    assert not np.array_equal(plain, stock)
    assert np.array_equal(pixels(hot(**BASE)), plain)
    assert np.array_equal(pixels(hot(**BASE | call)), stock)
    assert np.array_equal(pixels(search(hot, budget=1, call=call)[0]), stock)


@pytest.mark.parametrize("argument", ["lora", "negative_lora"])
@pytest.mark.parametrize("family", WITH_LORA)
def test_a_lora_by_the_call_beside_one_that_is_loaded_is_refused(hot, family, argument, monkeypatch):
    hot.load_lora(hot.dit, state_dict=lora_for(family, seed=5), hotload=True, verbose=0)
    stock = pixels(hot(**BASE))
    assert np.array_equal(pixels(search(hot, budget=1)[0]), stock)  # alone it may stay
    with monkeypatch.context() as patch:
        patch.setattr(hot, "unit_runner", None)
        with pytest.raises(ValueError, match=rf"{argument}= cannot go with a LoRA that is loaded"):
            search(hot, call={argument: lora_for(family)})
    assert np.array_equal(pixels(hot(**BASE)), stock)


@pytest.mark.parametrize("family", ["Qwen-Image"])
def test_too_few_steps_for_a_schedule_are_refused_before_any_preview(pipe, family):
    stock, scored = pixels(pipe(**BASE)), []

    def reward(images, prompt):
        scored.append(images)
        return brightness(images, prompt)

    with pytest.raises(ValueError, match="ses_inference_steps"):
        search(pipe, call={"ses_inference_steps": 1, "ses_reward_model": reward})
    assert scored == [] and pipe.ses_result is None
    assert np.array_equal(pixels(pipe(**BASE)), stock)
    assert np.array_equal(pixels(search(pipe, budget=1)[0]), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_call_leaves_the_pipeline_as_clean_as_the_first(pipe):
    image, complete, _ = search(pipe)
    scheduler = {name: str(value) for name, value in vars(pipe.scheduler).items()}
    failure = RuntimeError("no more")

    def failing(images, prompt, calls=[]):  # noqa: B006
        calls.append(prompt)
        if len(calls) == 3:
            raise failure
        return brightness(images, prompt)

    with pytest.raises(RuntimeError) as caught:
        search(pipe, call={"ses_reward_model": failing})
    assert caught.value is failure and pipe.ses_result.trace == complete.trace[:2]
    assert {name: str(value) for name, value in vars(pipe.scheduler).items()} == scheduler
    assert np.array_equal(pixels(search(pipe)[0]), pixels(image))


@pytest.mark.parametrize("cfg", CFG)
@pytest.mark.parametrize("family", FAMILIES)
def test_vram_management_loads_each_model_once_a_generation(family, cfg, monkeypatch):
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # which DiffSynth calls
    plain = search(ses_fast.enable(MAKE[family]()), call=cfg)
    pipe = ses_fast.enable(manage_vram(MAKE[family]()))
    stock = pixels(pipe(**BASE | cfg))
    assert np.array_equal(pixels(search(pipe, budget=1, call=cfg)[0]), stock)
    loaded, load = [], pipe.load_models_to_device
    pipe.load_models_to_device = lambda names: (loaded.append(list(names)), load(names))
    image, result, seen = search(pipe, call=cfg)
    dit, vae = list(pipe.in_iteration_models), [pipe.units[-1].decoder]
    assert loaded[-7:] == [dit, vae, dit, vae, dit, vae, []]  # generations of 4 and 2, and the final image
    assert result.trace == plain[1].trace and np.array_equal(pixels(image), pixels(plain[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_that_were_saved_are_rendered_without_a_search(pipe, family, tmp_path):
    image, result, _ = search(pipe)
    result.save(tmp_path / "found")
    latents = ses_fast.SearchResult.load(tmp_path / "found").latents
    reward = {"ses_reward_model": "pick"}  # not loaded
    again, nothing, seen = search(pipe, call=reward, latents=latents)
    assert np.array_equal(pixels(again), pixels(image)) and nothing is None and seen.images == []
    more, _, _ = search(pipe, call=reward | {"num_inference_steps": 4, "seed": 99}, latents=latents)
    same, _, _ = search(pipe, call=reward | {"num_inference_steps": 4, "seed": None}, latents=latents)
    assert np.array_equal(pixels(more), pixels(same)) and not np.array_equal(pixels(more), pixels(again))
    with pytest.raises(ValueError, match="height, width"):
        search(pipe, call={"height": 80}, latents=latents)
    with pytest.raises(ValueError, match="height, width"):
        search(pipe, latents=latents.to(torch.bfloat16))


@pytest.mark.parametrize("family", ["Z-Image", "FLUX.2-klein"])
@pytest.mark.parametrize(
    "settings", [{"seed": 8}, {"generator": torch.Generator().manual_seed(2)}], ids=["seed", "generator"]
)
def test_a_state_without_the_calls_seed_goes_on_from_its_own_base(pipe, settings):
    random = torch.get_rng_state()
    _, half, _ = search(pipe, budget=5, **settings)
    image, result, _ = search(pipe, budget=10, call={"seed": None}, state=half.state)
    assert torch.equal(result.state.base, half.state.base) and result.trace[:5] == half.trace
    assert torch.equal(torch.get_rng_state(), random)
    again, _, _ = search(pipe, call={"seed": None}, latents=result.latents)
    assert np.array_equal(pixels(image), pixels(again))


@pytest.mark.parametrize("family", ["FLUX.2-dev"])
def test_flux2_searches_initial_noise_in_its_spatial_layout(pipe):
    noise = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(7))
    stock = pixels(pipe(**BASE, initial_noise=noise))
    image, result, _ = search(pipe, budget=1, call={"initial_noise": noise})
    assert np.array_equal(pixels(image), stock) and torch.equal(result.state.base, noise)
    found = search(pipe, budget=6, call={"initial_noise": noise})
    again = pipe(**BASE, initial_noise=found[1].latents)
    assert np.array_equal(pixels(again), pixels(found[0]))


@pytest.mark.parametrize("family", ["FLUX.2-dev"])
def test_given_latents_and_an_initial_noise_are_refused_together(pipe, monkeypatch):
    noise = torch.zeros(1, 128, 4, 4)
    monkeypatch.setattr(pipe, "unit_runner", None)
    with pytest.raises(ValueError, match="initial_noise= or SESConfig"):
        search(pipe, call={"initial_noise": noise}, latents=noise)


@pytest.mark.parametrize("family", ["FLUX.2-dev"])
def test_the_tutorials_use_of_ses_search_works_with_search_in_its_place(tiny):
    def objective(latents):
        image = tiny(**BASE, initial_noise=latents)
        return float(np.asarray(image).mean())

    base = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(11)
    shipped = ses_search(base, objective, total_eval_budget=6, popsize=4, k_elites=2, dwt_level=1)
    ours = ses_fast.search(
        base,
        objective,
        total_eval_budget=6,
        popsize=4,
        k_elites=2,
        dwt_level=1,
        generator=torch.Generator().manual_seed(11),
        progress=False,
    )
    torch.testing.assert_close(ours, shipped, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_quick_start(pipe):
    image = pipe(
        "a red fox",
        seed=42,
        height=64,
        width=64,
        num_inference_steps=8,
        enable_ses=True,
        ses_reward_model=brightness,
        ses_eval_budget=12,
        ses_inference_steps=2,
    )
    assert image.size == (64, 64) and pipe.ses_result.evaluations == 12
    assert pipe.ses_result.score >= pipe.ses_result.base_score
    assert {"prompt", "ask", "denoise", "decode", "reward", "tell", "final"} <= pipe.ses_result.seconds.keys()
