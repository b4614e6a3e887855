"""The ComfyUI node, between stand-ins of the three interfaces that it uses, and ComfyUI's own classes.

ComfyUI is on no package index. Its own classes are used where its checkout is importable:
`PYTHONPATH=/path/to/ComfyUI pytest tests/test_comfyui.py` (and `pip install torchsde`); else those tests are skipped.
"""

import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import save_tiny_clip

import ses_fast

NODE = Path(__file__).parents[1] / "examples" / "comfyui_ses.py"
PROMPT = "a red fox in the snow"
BUDGET = {"budget": 5, "popsize": 3, "k_elites": 2, "dwt_level": 1, "strategy": "ses", "batch_size": 1}


@pytest.fixture(scope="module")
def node():
    """The file as ComfyUI loads it: from its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location("custom_nodes.comfyui_ses", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["SESNoise"]()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


@dataclass
class World:
    """What a workflow hands to the node, and ComfyUI's sampling node."""

    guider: Any
    sampler: Any
    sigmas: Any  # function of the number of steps
    vae: Any
    random_noise: Any  # function of a seed
    sample: Any  # SamplerCustomAdvanced: (noise, guider, sampler, sigmas, latent) -> LATENT
    latent: Any  # function of the batch size -> LATENT


# ---------------------------------------------------------------- stand-ins


class Noise:
    def __init__(self, seed):
        self.seed = seed

    def generate_noise(self, input_latent):
        return torch.randn(input_latent["samples"].shape, generator=torch.manual_seed(self.seed))


class Guider:
    """Draws the noise's own shapes, sharper with each step, with the signature of ComfyUI's CFGGuider.sample."""

    def __init__(self):
        self.batches = []

    def sample(
        self,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
    ):
        assert noise.shape == latent_image.shape and seed == 7
        self.batches.append(len(noise))
        return (noise + latent_image) * (1 - 1 / len(sigmas))


class VAE:
    def decode(self, samples):
        pixels = samples[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return (pixels.movedim(1, -1) / 4 + 0.5).clamp(0, 1)


def sample(noise, guider, sampler, sigmas, latent_image):
    latent = latent_image | {"samples": latent_image["samples"].repeat(1, 4, 1, 1)}  # the channels of the model
    samples = guider.sample(noise.generate_noise(latent), latent["samples"], sampler, sigmas, seed=noise.seed)
    return latent | {"samples": samples}


def stand_ins() -> World:
    latent = {"samples": torch.zeros(1, 1, 8, 8)}
    return World(
        Guider(),
        object(),
        lambda steps: torch.linspace(1, 0, steps + 1),
        VAE(),
        Noise,
        sample,
        lambda count: {"samples": latent["samples"].repeat(count, 1, 1, 1)},
    )


# ---------------------------------------------------------------- ComfyUI's own


def comfyui() -> World:
    """SD 1.5's UNet with few channels, TAESD, the Euler sampler: random weights, ComfyUI's code."""
    pytest.importorskip("comfy.cli_args", reason="no checkout of ComfyUI on the path").args.cpu = True
    import comfy.model_base
    import comfy.model_patcher
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models
    from comfy.taesd.taesd import TAESD
    from comfy_extras import nodes_custom_sampler as custom

    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        unet = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1]}
        unet |= {"channel_mult": [1, 2], "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True}
        unet |= {"transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1]}
        unet |= {"context_dim": 16, "use_linear_in_transformer": False, "legacy": False, "dtype": torch.float32}
        unet |= {"adm_in_channels": None, "use_temporal_attention": False}
        config = comfy.supported_models.SD15(unet)
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(config, device=torch.device("cpu")).eval()
        autoencoder = TAESD(latent_channels=4)
        for part in (model.diffusion_model, autoencoder):  # ComfyUI's layers are made without values
            for name, weight in part.named_parameters():
                if weight.ndim > 1:
                    weight.data = torch.randn(weight.shape) * weight[0].numel() ** -0.5
                elif weight.ndim == 1:
                    weight.data = torch.full(weight.shape, float(name.endswith("weight")))
        vae = comfy.sd.VAE(sd=autoencoder.state_dict(), device=torch.device("cpu"))
    cpu = torch.device("cpu")
    guider = comfy.samplers.CFGGuider(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))
    guider.set_conds([[torch.randn(1, 8, 16), {}]], [[torch.randn(1, 8, 16), {}]])
    guider.set_cfg(3.0)
    guider.batches, stock = [], guider.sample

    def counted(noise, *args, **kwargs):
        guider.batches.append(len(noise))
        return stock(noise, *args, **kwargs)

    guider.sample = counted
    return World(
        guider,
        comfy.samplers.sampler_object("euler"),
        lambda steps: comfy.samplers.calculate_sigmas(model.model_sampling, "normal", steps),
        vae,
        custom.Noise_RandomNoise,
        lambda *args: custom.SamplerCustomAdvanced().sample(*args)[0],
        lambda count: {"samples": torch.zeros(count, 4, 8, 8)},
    )


@pytest.fixture(params=[stand_ins, comfyui], ids=["stand-ins", "ComfyUI's own"])
def world(request) -> World:
    return request.param()


# ---------------------------------------------------------------- what it does


def found(node, world, weights, seed=7, steps=2, **options):
    given = (world.random_noise(seed), world.guider, world.sampler, world.sigmas(steps), world.vae, PROMPT, "clip")
    (noise,) = node.get_noise(*given, **BUDGET | options, weights=weights)
    return noise


def scored(world, latent, weights) -> float:
    images = world.vae.decode(latent["samples"]).movedim(-1, 1) * 2 - 1
    return ses_fast.load_reward("clip", weights)(images, PROMPT).item()


def test_the_image_is_the_best_preview_and_the_base_is_the_stock_image(node, world, weights):
    noise = found(node, world, weights)
    assert noise.result is None and not world.guider.batches  # nothing is searched before it is asked for
    answer = world.sample(noise, world.guider, world.sampler, world.sigmas(2), world.latent(1))
    assert world.guider.batches == [1] * (BUDGET["budget"] + 1)
    assert noise.result.evaluations == BUDGET["budget"] and noise.result.score > noise.result.base_score
    stock = world.sample(world.random_noise(7), world.guider, world.sampler, world.sigmas(2), world.latent(1))
    assert scored(world, answer, weights) == pytest.approx(noise.result.score, abs=1e-3)
    assert scored(world, stock, weights) == pytest.approx(noise.result.base_score, abs=1e-3)


def test_the_found_noise_is_kept_for_another_sampling(node, world, weights):
    noise = found(node, world, weights)
    few = world.sample(noise, world.guider, world.sampler, world.sigmas(2), world.latent(1))
    many = world.sample(noise, world.guider, world.sampler, world.sigmas(4), world.latent(1))
    assert len(world.guider.batches) == BUDGET["budget"] + 2
    assert not torch.equal(few["samples"], many["samples"])
    other = world.latent(1)
    other["samples"] = other["samples"] + 0.1  # another picture to start from: another search
    world.sample(noise, world.guider, world.sampler, world.sigmas(2), other)
    assert len(world.guider.batches) == 2 * BUDGET["budget"] + 3


def test_previews_together_are_previews_one_by_one(node, world, weights):
    latent = world.latent(1)
    latent = {"samples": torch.zeros(1, 4, 8, 8)} | {name: latent[name] for name in latent if name != "samples"}
    alone, together = found(node, world, weights), found(node, world, weights, batch_size=3)
    one, other = alone.generate_noise(latent), together.generate_noise(latent)
    assert world.guider.batches[-2:] == [3, 2]
    scores = [[evaluation.score for evaluation in noise.result.trace] for noise in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2) and torch.allclose(one, other, atol=1e-5)


def test_a_seed_of_comfyui_may_have_64_bits(node, world, weights):
    world.guider.sample = lambda noise, *args, **kwargs: noise
    noise = found(node, world, weights, seed=2**64 - 1)
    noise.generate_noise({"samples": torch.zeros(1, 4, 8, 8)})
    assert noise.seed == 2**64 - 1 and noise.result.evaluations == BUDGET["budget"]


def test_several_images_and_no_prompt_are_refused(node, world, weights):
    with pytest.raises(ValueError, match="batch_size to 1, it has 2"):
        found(node, world, weights).generate_noise(world.latent(2))
    with pytest.raises(ValueError, match="prompt in words"):
        node.get_noise(world.random_noise(7), world.guider, world.sampler, world.sigmas(2), world.vae, " ", "clip", 5)
    assert not world.guider.batches


def test_the_mask_goes_to_the_previews_and_an_exception_leaves_as_it_is(node, weights):
    world, mask = stand_ins(), torch.ones(1, 1, 8, 8)
    masks = []

    def sample(noise, latent_image, sampler, sigmas, denoise_mask=None, **kwargs):
        masks.append(denoise_mask)
        if len(masks) == 3:
            raise InterruptedError("the user pressed cancel")
        return noise

    world.guider.sample = sample
    with pytest.raises(InterruptedError, match="cancel"):
        found(node, world, weights).generate_noise({"samples": torch.zeros(1, 4, 8, 8), "noise_mask": mask})
    assert len(masks) == 3 and all(each is mask for each in masks)


def test_of_a_video_the_middle_frame_is_scored(node, weights):
    world = stand_ins()
    world.vae.decode = lambda samples: samples[:, :3].movedim(1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = found(node, world, weights)
    latents = torch.zeros(2, 4, 5, 8, 8)
    latents[:, :, 2] = 0.5
    images = noise.preview(latents, {"samples": torch.zeros(1, 4, 5, 8, 8)})
    assert images.shape == (2, 3, 64, 64) and images.unique().numel() == 1 and images.max() < 0


def test_every_input_is_an_option_of_the_search(node):
    inputs = node.INPUT_TYPES()
    names = {**inputs["required"], **inputs["optional"]}
    takes = {*inspect.signature(node.get_noise).parameters} - {"options"}
    options = inspect.signature(ses_fast.evolve).parameters
    assert takes <= names.keys() and names.keys() - takes <= options.keys()
    defaults = {name: given[1]["default"] for name, given in names.items() if name in options and len(given) > 1}
    assert defaults == {name: options[name].default for name in defaults} and len(defaults) == 5
