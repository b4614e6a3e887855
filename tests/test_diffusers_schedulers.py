"""diffusers' schedulers, one call each: a candidate's latents are the stock call's, whatever goes beside it."""

import diffusers
import pytest
import torch
from test_diffusers import close, drawn, previews
from tiny_diffusers import BETAS, make, search

import ses_fast
from ses_fast import Preview
from ses_fast.pipelines.diffusers.driver import Driver
from ses_fast.pipelines.diffusers.family import family_of
from ses_fast.pipelines.diffusers.renderer import DiffusersRenderer
from ses_fast.pipelines.diffusers.scheduler import draws_noise, noise_levels, window_on

ROUNDING = 1e-5  # of the largest latent, fp32
STEPS = 4  # the fewest that PNDM makes with its Runge-Kutta steps


@pytest.fixture(scope="module")
def tiny():
    made = make("SD1.5")
    ses_fast.enable(made.pipe)
    return made


# The scheduler, its settings, the call's, whether it can race.
ROWS = [
    pytest.param("IPNDMScheduler", {}, {}, False, id="IPNDM, a history of four steps"),
    pytest.param("KDPM2DiscreteScheduler", {}, {}, True, id="KDPM2, two forwards a step"),
    pytest.param("KDPM2AncestralDiscreteScheduler", {}, {}, True, id="KDPM2 with noise inside"),
    pytest.param("LMSDiscreteScheduler", {}, {}, True, id="LMS, a history of four steps"),
    pytest.param("PNDMScheduler", {"skip_prk_steps": True}, {}, True, id="PNDM, its first step made twice"),
    pytest.param("PNDMScheduler", {"skip_prk_steps": False}, {}, True, id="PNDM, Runge-Kutta steps before"),
    pytest.param("SASolverScheduler", {}, {}, True, id="SASolver, that keeps its last noise"),
    pytest.param("SASolverScheduler", {"prediction_type": "v_prediction"}, {}, True, id="SASolver of velocities"),
    pytest.param("TCDScheduler", {}, {}, True, id="TCD without noise, as the call's eta is 0"),
    pytest.param("TCDScheduler", {}, {"eta": 0.7}, True, id="TCD with noise inside"),
    pytest.param("CMStochasticIterativeScheduler", {}, {}, False, id="consistency models"),
]


@pytest.mark.parametrize(("name", "settings", "call", "races"), ROWS)
def test_a_candidate_is_the_stock_calls_alone_together_and_in_parts(tiny, name, settings, call, races):
    pipe = tiny.pipe
    pipe.scheduler = getattr(diffusers, name).from_config({**BETAS, **settings})
    call = {**tiny.call, **call, "num_inference_steps": STEPS, "output_type": "latent"}
    with torch.no_grad():
        driver = Driver(pipe, type(pipe)._ses_stock.__call__.__get__(pipe), {**call, "generator": drawn()})
        renderer = DiffusersRenderer(driver, family_of(pipe))
        noises = torch.cat([driver.base, torch.randn(2, *driver.base.shape[1:], generator=drawn(9))])
        stock = []
        for noise in noises.split(1):
            generator = drawn()
            torch.randn(noise.shape, generator=generator)  # the call's own, in whose place latents= are given
            before = generator.get_state()
            stock.append(pipe(**call, latents=noise, generator=generator).images)
        assert torch.equal(stock[0], pipe(**call, generator=drawn()).images), "the base is not the call's own noise"
        assert draws_noise(pipe.scheduler, call.get("eta")) or torch.equal(generator.get_state(), before)

        alone = renderer.advance(renderer.begin(noises[:1]), renderer.steps)
        assert torch.equal(alone.latents, stock[0])
        stock = torch.cat(stock)
        allowed = ROUNDING * stock.abs().max()
        assert (stock[1:] - stock[:1]).abs().max() > 100 * allowed, "the noises hardly differ"
        together = renderer.advance(renderer.begin(noises), renderer.steps)
        assert (together.latents - stock).abs().max() < allowed
        # As a race goes: some are stopped, and the others stand in other places.
        first = renderer.advance(renderer.begin(noises), 1).rows(torch.tensor([2, 0]))
        second = renderer.advance(first, renderer.steps // 2).rows(torch.tensor([1, 0]))
        raced = renderer.advance(second, renderer.steps)
        assert (raced.latents - stock[[0, 2]]).abs().max() < allowed
        # A batch that did not fit is tried again; PNDM adds to what it keeps.
        assert torch.equal(renderer.advance(second, renderer.steps).latents, raced.latents)
        assert (renderer.sigmas is not None) == races
        assert (second.clean is not None) == races

    if not races:
        with pytest.raises(ValueError, match=f"race.* and {name} does not say which they are"):
            search(tiny, 3, call=call, preview=Preview(race="auto"))


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_a_scheduler_that_makes_noise_of_an_image_is_refused(tiny, name):
    tiny.pipe.scheduler = getattr(diffusers, name).from_config(BETAS)
    with pytest.raises(ValueError, match=f"{name} makes noise of an image"):
        search(tiny, 3)


def test_memory_that_runs_out_in_a_race_changes_no_preview(tiny, monkeypatch):
    """The eight that begin fit, of those that go on two: with noise inside, whose stream the failed try had moved."""
    tiny.pipe.scheduler = diffusers.TCDScheduler.from_config(BETAS)
    settings = {"steps": STEPS, "popsize": 8, "preview": Preview(race=((0.9, 0.5),)), "call": {"eta": 0.7}}
    _, _, images, stopped = previews(tiny, 8, batch_size=1, **settings)
    forward, tried = tiny.pipe.unet.forward, []

    def scarce(sample, *args, **inputs):
        tried.append(len(sample))
        if 4 < tried[-1] != 16:  # the two sides of guidance go together
            raise torch.OutOfMemoryError("no room")
        return forward(sample, *args, **inputs)

    monkeypatch.setattr(tiny.pipe.unet, "forward", scarce)
    _, _, others, again = previews(tiny, 8, batch_size="auto", **settings)
    assert set(tried) - {2} == {16, 8, 4} and 0 < stopped.count_nonzero() < 8
    assert torch.equal(stopped, again) and close(images, others)


@pytest.mark.parametrize("name", ["Heun", "KDPM2", "KDPM2Ancestral", "LMS"])
def test_a_steps_noise_level_is_what_its_forward_sees(name):
    """The scheduler divides what a forward sees by the length of (1, sigma)."""
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(**BETAS)
    scheduler.set_timesteps(5)
    kept, sample, one = scheduler.sigmas.clone(), torch.randn(1, 4, 8, 8, generator=drawn()), torch.ones(())
    levels = noise_levels(scheduler)
    assert torch.equal(scheduler.sigmas, kept) and len(levels) == len(scheduler.timesteps)
    for level, timestep in zip(levels, scheduler.timesteps, strict=True):
        sigma = ((1 / scheduler.scale_model_input(one, timestep)) ** 2 - 1).sqrt().item()
        assert level == pytest.approx(sigma / (1 + sigma), rel=1e-3)
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample


def test_a_schedule_that_begins_with_noise_alone_begins_at_one():
    scheduler = diffusers.TCDScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    levels = noise_levels(scheduler)
    assert levels[0] == 1 and levels == sorted(levels, reverse=True)


def test_a_window_leaves_the_pipelines_scheduler_alone():
    scheduler = diffusers.DDIMScheduler(**BETAS)
    scheduler.set_timesteps(3)
    kept = scheduler.timesteps.clone()
    window_on(scheduler, 0, 2).set_timesteps(5)
    assert torch.equal(scheduler.timesteps, kept)
