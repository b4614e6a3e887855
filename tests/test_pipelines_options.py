"""What else a family's call takes: with each option the search renders what the stock call renders.

The models are small, of DiffSynth's own classes with their own forwards; where a class cannot be had without a
download or another package, a stand-in says so.
"""

import warnings

import numpy as np
import pytest
import torch
from diffsynth.core import AutoWrappedLinear, enable_vram_management
from diffsynth.core.quant import backends as quant_backends
from diffsynth.core.quant.base import QUANT_BACKENDS, QuantBackend
from diffsynth.core.quant.config import QUANT_METHODS, QuantizeConfig, QuantMethodSpec
from diffsynth.core.vram.disk_map import DiskMap
from diffsynth.diffusion.base_pipeline import ControlNetInput
from diffsynth.models.flux_controlnet import FluxControlNet
from diffsynth.models.flux_dit import (
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.flux_infiniteyou import InfiniteYouImageProjector
from diffsynth.models.flux_ipadapter import FluxIpAdapter, MLPProjModel, SiglipVisionModelSO400M
from diffsynth.models.flux_lora_patcher import LoraMerger
from diffsynth.models.flux_redux import FluxReduxImageEncoder
from diffsynth.models.flux_value_control import MultiValueEncoder, SingleValueEncoder
from diffsynth.models.general_modules import TimestepEmbeddings
from diffsynth.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth.models.z_image_controlnet import ZImageControlNet, ZImageControlTransformerBlock
from diffsynth.pipelines.flux_image import MultiControlNet
from diffsynth.pipelines.qwen_image import QwenImageBlockwiseMultiControlNet
from safetensors.torch import save_file
from tiny import (
    BASE,
    GUIDED,
    HALF,
    MAKE,
    PHOTO,
    TEXT_WIDTH,
    close,
    forward_sizes,
    initialise,
    lora_for,
    pixels,
    search,
    tiny_z_image,
)
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import ses_fast

# ---------------------------------------------------------------- the options' models


def ready(model: nn.Module, seed: int = 1) -> nn.Module:
    initialise(model, seed)
    return model.eval().requires_grad_(False)


class TinyZImageControlNet(ZImageControlNet):
    """The real sizes are written into the real __init__."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

        def block(i: int) -> nn.Module:
            return ZImageControlTransformerBlock(layer_id=i, dim=48, n_heads=2, n_kv_heads=2, block_id=i)

        self.control_layers = nn.ModuleList([block(0), block(1)])
        self.control_layers_mapping = {0: 0, 1: 1}
        self.control_noise_refiner = nn.ModuleList([block(0)])
        self.control_all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(4 * 33, 48)})


class TinyFluxControlNet(FluxControlNet):
    def __init__(self, width: int = 32) -> None:
        nn.Module.__init__(self)
        self.pos_embedder = RoPEEmbedding(width, 10000, [4, 6, 6])
        self.time_embedder = TimestepEmbeddings(256, width)
        self.guidance_embedder = TimestepEmbeddings(256, width)
        self.pooled_text_embedder = nn.Sequential(nn.Linear(768, width), nn.SiLU(), nn.Linear(width, width))
        self.context_embedder = nn.Linear(TEXT_WIDTH, width)
        self.x_embedder, self.controlnet_x_embedder = nn.Linear(64, width), nn.Linear(64, width)
        self.controlnet_mode_embedder = None
        self.blocks = nn.ModuleList([FluxJointTransformerBlock(width, 2)])
        self.single_blocks = nn.ModuleList([FluxSingleTransformerBlock(width, 2)])
        self.controlnet_blocks = nn.ModuleList([nn.Linear(width, width)])
        self.controlnet_single_blocks = nn.ModuleList([nn.Linear(width, width)])


class TinySiglip(SiglipVisionModelSO400M):
    def __init__(self, width: int = 8) -> None:
        sizes = {"intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
        SiglipVisionModel.__init__(self, SiglipVisionConfig(hidden_size=width, image_size=384, patch_size=96, **sizes))


class Features(nn.Module):
    """Stand-in for an encoder of images: a fixed random map of the picture's mean colour and text, [1, n, width]."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.size, self.map = (n, width), torch.randn(4, n * width, generator=torch.Generator().manual_seed(0))

    def forward(self, image, text: str = "") -> Tensor:
        colour = torch.tensor(np.asarray(image, dtype=np.float32) / 255).mean(dim=(0, 1))
        return (torch.cat([colour, torch.tensor([len(text) / 10])]) @ self.map).view(1, *self.size)


def z_controlnet(pipe):
    pipe.controlnet = ready(TinyZImageControlNet())


def qwen_controlnet(pipe, extra=0):
    model = QwenImageBlockWiseControlNet(num_layers=2, in_dim=64, additional_in_dim=extra, dim=32)
    pipe.blockwise_controlnet = QwenImageBlockwiseMultiControlNet([ready(model)])


def qwen_inpaint_controlnet(pipe):
    qwen_controlnet(pipe, extra=4)


def qwen_edit(pipe):
    """The image's part in the prompt is a stand-in: the real processor is a download. Its latents are real."""
    unit = next(unit for unit in pipe.units if type(unit).__name__ == "QwenImageUnit_PromptEmbedder")
    features = Features(3, TEXT_WIDTH)

    def encode(pipe, prompt, images):
        seen = [features(image)[0] for image in (images if isinstance(images, list) else [images])]
        return [torch.cat([*seen, text]) for text in unit.encode_prompt(pipe, prompt)]

    unit.encode_prompt_edit = unit.encode_prompt_edit_multi = encode


def flux_controlnet(pipe):
    pipe.controlnet = MultiControlNet([ready(TinyFluxControlNet(), seed) for seed in (1, 2)])


def flux_ip_adapter(pipe):
    adapter = FluxIpAdapter(2, 16, cross_attention_dim=TEXT_WIDTH, num_tokens=2, num_blocks=2)
    adapter.image_proj = MLPProjModel(TEXT_WIDTH, 8, 2)
    pipe.ipadapter, pipe.ipadapter_image_encoder = ready(adapter), ready(TinySiglip())


def flux_value_control(pipe):
    encoders = [SingleValueEncoder(dim_out=TEXT_WIDTH, prefer_len=2) for _ in range(2)]
    pipe.value_controller = ready(MultiValueEncoder(encoders))


def flux_redux(pipe):
    """Its unit writes the real text's width, 4096, into the call."""

    class Either(nn.Linear):
        def forward(self, text: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(text, (0, 4096 - text.shape[-1])))

    pipe.dit.context_embedder = ready(Either(4096, 32))
    pipe.flux_redux_image_encoder = ready(TinySiglip())
    pipe.flux_redux_image_embedder = ready(FluxReduxImageEncoder(redux_dim=8))


def flux_infinite_you(pipe):
    """The finder of faces is a stand-in (it needs insightface); the projector and the ControlNet are real."""
    flux_controlnet(pipe)
    pipe.image_proj_model = ready(
        InfiniteYouImageProjector(dim=16, depth=1, dim_head=8, heads=2, num_queries=4, output_dim=TEXT_WIDTH)
    )
    face = Features(1, 512)
    pipe.infinityou_processor = nn.Module()
    pipe.infinityou_processor.prepare_infinite_you = lambda model, image, guidance, device: {
        "id_emb": model(face(image)),
        "infinityou_guidance": torch.tensor([guidance]),
    }


def flux_step1x(pipe):
    """Stand-ins for the language model and its connector."""
    features = Features(5, TEXT_WIDTH)

    class Connector(nn.Module):
        def forward(self, embedding: Tensor, timestep: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return embedding * (1 + timestep), embedding.mean(dim=1).repeat(1, 768 // TEXT_WIDTH)

    pipe.step1x_connector = Connector()
    pipe.qwenvl = lambda texts, images: (
        torch.cat([features(image, text) for image, text in zip(images, texts, strict=True)]),
        torch.ones(len(texts), 5),
    )


def flux_nexus(pipe):
    """A stand-in for the language model and its adapters."""
    features = Features(4, TEXT_WIDTH)

    def language_model(prompt: str, image=None):
        if image is None:
            return [features(PHOTO, prompt)[0]]
        return features(image, prompt)[0], features(image)[0], torch.tensor([[1, 4, 4], [1, 4, 4]])

    pipe.nexus_gen, pipe.nexus_gen_generation_adapter = language_model, lambda embedding: embedding
    pipe.nexus_gen_editing_adapter = lambda new, grid, old, old_grid: torch.cat([new, old], dim=1)


def flux_lora_encoder(pipe):
    """A stand-in for the encoder, which reads LoRAs of the real size."""
    unit = next(unit for unit in pipe.units if type(unit).__name__ == "FluxImageUnit_LoRAEncode")
    unit.lora_embedding = lambda pipe, inputs: Features(4, TEXT_WIDTH)(PHOTO, inputs)


def flux_of(channels):
    def prepare(pipe):
        pipe.dit.input_dim, pipe.dit.x_embedder = channels, ready(nn.Linear(channels, 32))

    return prepare


flux_fill, flux_flex = flux_of(384), flux_of(196)


def z_omni(pipe):
    """Z-Image-Omni: another forward, which takes edit images. A stand-in for SigLIP's features of them."""
    pipe.dit = tiny_z_image(siglip=8).dit
    features = Features(4, 8)
    pipe.image_encoder = lambda image, device: features(image).view(2, 2, 8)


# ---------------------------------------------------------------- the options

ALONE, TOGETHER, BOTH = 1, 3, 6  # images in a forward, where three may go together; BOTH: with the negative side


def option(family, name, option, images, *, model=None, setting=None, slow=None):
    slow = family == "FLUX.2-dev" if slow is None else slow  # whose options "klein" has too
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(family, model, option, setting or {}, images, id=f"{family}: {name}", marks=marks)


def options(family, name, call, images=ALONE, *, model=None):
    """Without CFG, which is one side of what the other one does, and with it."""
    return [
        option(family, name, call, images, model=model, slow=True),
        option(family, f"{name}, CFG", call, images, model=model, setting=GUIDED),
    ]


def control(**settings):
    return [ControlNetInput(image=PHOTO, **settings)]


def kv_cache(*blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {block: tuple(torch.randn(2, 1, 3, 2, 16, generator=generator)) for block in blocks}


NOISE = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(7))
ENTITY = {"eligen_entity_prompts": ["a fox"], "eligen_entity_masks": [PHOTO]}
INPAINT = {"input_image": PHOTO, "denoising_strength": 0.9, "inpaint_mask": HALF}
TILES = {"tiled": True, "tile_size": 8, "tile_stride": 4}
LARGE = {"height": 96, "width": 96}  # more than one tile
UNRESIZED = {"edit_image_auto_resize": False}
# FLUX.1's encoder takes these for pixels, with no less than 16; where whole tiles do not cover all of a size its
# autoencoder gives NaN.
ENCODER_TILES = {"tiled": True, "tile_size": 16, "tile_stride": 8, "height": 192, "width": 128}
LARGE_PHOTO = PHOTO.resize((128, 192))
OPTIONS = [
    # Z-Image
    *options("Z-Image", "ControlNet", {"controlnet_inputs": control()}, model=z_controlnet),
    option(
        "Z-Image",
        "ControlNet that inpaints",
        {"controlnet_inputs": control(inpaint_image=PHOTO, inpaint_mask=HALF)},
        ALONE,
        model=z_controlnet,
    ),
    option("Z-Image", "ControlNet loaded, not asked", {"sigma_shift": 7.0}, TOGETHER, model=z_controlnet),
    *options("Z-Image", "edit image (Omni)", {"edit_image": PHOTO, **UNRESIZED}, model=z_omni),
    option("Z-Image", "Omni without an image", {"prompt": "a blue dog"}, ALONE, model=z_omni),
    option("Z-Image", "a size rounded up to 80x64", {"height": 70, "width": 50}, TOGETHER),
    option("Z-Image", "a long prompt", {"prompt": "a fox " * 100}, TOGETHER, setting=GUIDED),
    # Qwen-Image
    *options("Qwen-Image", "ControlNet", {"blockwise_controlnet_inputs": control(scale=3.0)}, model=qwen_controlnet),
    option(
        "Qwen-Image",
        "ControlNet for the first steps",
        {"blockwise_controlnet_inputs": control(scale=3.0, end=0.6)},
        ALONE,
        model=qwen_controlnet,
    ),
    option(
        "Qwen-Image",
        "ControlNet that inpaints",
        {"blockwise_controlnet_inputs": control(inpaint_mask=HALF)},
        ALONE,
        model=qwen_inpaint_controlnet,
    ),
    option("Qwen-Image", "ControlNet loaded, not asked", {"prompt": "a blue dog"}, TOGETHER, model=qwen_controlnet),
    option(  # of two steps the first and the last are given
        "Qwen-Image",
        "exponential_shift_mu",
        {"exponential_shift_mu": 1.5},
        TOGETHER,
        setting={"num_inference_steps": 3, "ses_inference_steps": 3},
    ),
    *options("Qwen-Image", "edit image", {"edit_image": PHOTO, **UNRESIZED}, model=qwen_edit),
    option(
        "Qwen-Image",
        "two edit images, as Edit-2511",
        {"edit_image": [PHOTO, HALF], "zero_cond_t": True, "edit_rope_interpolation": True, **UNRESIZED},
        ALONE,
        model=qwen_edit,
        setting=GUIDED,
    ),
    option("Qwen-Image", "a negative prompt of its length", {"negative_prompt": "b red fox"}, BOTH, setting=GUIDED),
    option("Qwen-Image", "in-context control, CFG", {"context_image": PHOTO}, ALONE, setting=GUIDED),
    option(
        "Qwen-Image",
        "entities on the negative side",
        {**ENTITY, "eligen_enable_on_negative": True},
        ALONE,
        setting=GUIDED,
    ),
    option("Qwen-Image", "layer_input_image", {"layer_input_image": PHOTO}, ALONE),
    option("Qwen-Image", "kv_cache", {"kv_cache": kv_cache("block_0")}, ALONE),
    option("Qwen-Image", "negative_kv_cache", {"negative_kv_cache": kv_cache("block_1")}, ALONE, setting=GUIDED),
    option(
        "Qwen-Image", "inpainting, blurred", {**INPAINT, "inpaint_blur_size": 1, "inpaint_blur_sigma": 1.0}, TOGETHER
    ),
    # FLUX.1
    *options("FLUX.1", "ControlNet", {"controlnet_inputs": control(scale=0.5)}, model=flux_controlnet),
    option(
        "FLUX.1",
        "two ControlNets, one for the first steps",
        {"controlnet_inputs": control(end=0.6) + control(controlnet_id=1)},
        ALONE,
        model=flux_controlnet,
    ),
    option(
        "FLUX.1",
        "ControlNet and two Kontext images",
        {"controlnet_inputs": control(), "kontext_images": [PHOTO, PHOTO]},
        ALONE,
        model=flux_controlnet,
    ),
    option(
        "FLUX.1",
        "ControlNet and image-to-image in tiles",
        {
            "controlnet_inputs": [ControlNetInput(image=LARGE_PHOTO)],
            "input_image": LARGE_PHOTO,
            "denoising_strength": 0.6,
        },
        ALONE,
        model=flux_controlnet,
        setting=ENCODER_TILES,
    ),
    option("FLUX.1", "ControlNet loaded, not asked", {"sigma_shift": 5.0}, TOGETHER, model=flux_controlnet),
    option("FLUX.1", "in tiles, CFG", TILES, ALONE, setting=GUIDED | LARGE),
    *options("FLUX.1", "IP-Adapter", {"ipadapter_images": PHOTO}, model=flux_ip_adapter),
    option("FLUX.1", "EliGen", {**ENTITY, "t5_sequence_length": 64}, ALONE, setting={"t5_sequence_length": 64}),
    option(
        "FLUX.1",
        "EliGen on the negative side",
        {**ENTITY, "eligen_enable_on_negative": True},
        ALONE,
        setting=GUIDED | {"t5_sequence_length": 64},
    ),
    option("FLUX.1", "value control", {"value_controller_inputs": [0.3, 0.7]}, TOGETHER, model=flux_value_control),
    option(
        "FLUX.1", "value control, CFG", {"value_controller_inputs": 0.3}, BOTH, model=flux_value_control, setting=GUIDED
    ),
    *options("FLUX.1", "Step1x", {"step1x_reference_image": PHOTO}, model=flux_step1x),
    option("FLUX.1", "Redux", {"flux_redux_image": PHOTO}, TOGETHER, model=flux_redux),
    option("FLUX.1", "Redux, CFG", {"flux_redux_image": PHOTO}, BOTH, model=flux_redux, setting=GUIDED),
    option("FLUX.1", "LoRA encoder", {"lora_encoder_inputs": "a style"}, TOGETHER, model=flux_lora_encoder),
    # The positive side is longer then.
    option(
        "FLUX.1",
        "LoRA encoder, CFG",
        {"lora_encoder_inputs": "a style"},
        TOGETHER,
        model=flux_lora_encoder,
        setting=GUIDED,
    ),
    option("FLUX.1", "NexusGen", {"prompt": "a blue dog"}, TOGETHER, model=flux_nexus),
    option("FLUX.1", "NexusGen, CFG", {"nexus_gen_reference_image": PHOTO}, TOGETHER, model=flux_nexus, setting=GUIDED),
    option(
        "FLUX.1",
        "InfiniteYou",
        {"infinityou_id_image": PHOTO, "infinityou_guidance": 2.0},
        ALONE,
        model=flux_infinite_you,
        setting={"controlnet_inputs": control()},
    ),
    *options("FLUX.1", "Flex", {"flex_control_image": PHOTO}, model=flux_flex),
    option(
        "FLUX.1",
        "Flex that inpaints",
        {"flex_inpaint_image": PHOTO, "flex_inpaint_mask": HALF, "flex_control_image": PHOTO},
        ALONE,
        model=flux_flex,
    ),
    *options("FLUX.1", "Fill", {"flux_fill_image": PHOTO, "flux_fill_mask": HALF}, model=flux_fill),
    option("FLUX.1", "embedded guidance, CFG", {"embedded_guidance": 7.0}, BOTH, setting=GUIDED),
    # FLUX.2
    *(
        row
        for family in ("FLUX.2-dev", "FLUX.2-klein")
        for row in [
            option(family, "kv_cache", {"kv_cache": kv_cache("double_0", "single_0")}, ALONE),
            option(
                family,
                "kv_cache on both sides",
                {"kv_cache": kv_cache("double_0"), "negative_kv_cache": kv_cache("single_0", seed=1)},
                ALONE,
                setting=GUIDED,
            ),
            option(
                family,
                "extra text on both sides",
                {
                    "extra_text_embedding": torch.ones(1, 2, 3 * TEXT_WIDTH),
                    "negative_extra_text_embedding": -torch.ones(1, 3, 3 * TEXT_WIDTH),
                },
                ALONE,
                setting=GUIDED,
            ),
            option(family, "edit images, CFG", {"edit_image": [PHOTO, PHOTO], **UNRESIZED}, ALONE, setting=GUIDED),
            option(
                family,
                "inpainting, blurred, CFG",
                {**INPAINT, "inpaint_blur_size": 1, "inpaint_blur_sigma": 1.0},
                BOTH,
                setting=GUIDED,
            ),
            option(family, "initial_noise, CFG", {"initial_noise": NOISE}, BOTH, setting=GUIDED),
        ]
    ),
    option("FLUX.2-dev", "embedded guidance, CFG", {"embedded_guidance": 1.0}, BOTH, setting=GUIDED, slow=False),
]
_pipes = {}


def pipe_with(family, model):
    """Enabled, with the option's model; made once, as every test leaves it as it was."""
    if (family, model) not in _pipes:
        pipe = MAKE[family]()
        if model is not None:
            model(pipe)
        _pipes[family, model] = ses_fast.enable(pipe)
    return _pipes[family, model]


def judge(pipe, stock, call, images):
    """The search renders `stock` from the base, the same previews by any way, and leaves the stock call as it was."""
    assert np.array_equal(pixels(search(pipe, budget=1, call=call)[0]), stock)
    image, _, alone = search(pipe, budget=3, call=call)
    with forward_sizes(pipe) as sizes, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, together = search(pipe, budget=3, call=call, batch_size=3)
    close(alone, together)
    assert max(sizes) == images
    assert sum("one by one" in str(warning.message) for warning in caught) == (images == ALONE)
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(alone.winner)))
    assert np.array_equal(pixels(pipe(**BASE | call)), stock)


@pytest.mark.parametrize("family, model, option, setting, images", OPTIONS)
def test_an_option_has_the_same_part_in_previews_and_image(family, model, option, setting, images):
    pipe = pipe_with(family, model)
    without, stock = pixels(pipe(**BASE | setting)), pixels(pipe(**BASE | setting | option))
    assert without.shape != stock.shape or not np.array_equal(without, stock)
    judge(pipe, stock, setting | option, images)


@pytest.mark.parametrize(
    "family, model, name",
    [
        pytest.param("Qwen-Image", qwen_controlnet, "blockwise_controlnet_inputs", id="Qwen-Image"),
        pytest.param("FLUX.1", flux_controlnet, "controlnet_inputs", id="FLUX.1"),
    ],
)
def test_a_controlnets_share_of_the_steps_is_of_the_previews_own(family, model, name):
    """Where the final image has more of them the preview is still the stock image of its two."""
    pipe, call = pipe_with(family, model), {name: control(scale=3.0, end=0.6)}
    stock = pixels(pipe(**BASE | call))
    assert not np.array_equal(stock, pixels(pipe(**BASE | {name: control(scale=3.0)})))
    _, _, seen = search(pipe, budget=1, call=call | {"num_inference_steps": 4})
    assert np.array_equal(pixels(pipe.vae_output_to_image(seen.images[0][None])), stock)


@pytest.mark.parametrize("cfg", [{}, GUIDED], ids=["no CFG", "CFG"])
def test_flux1s_merged_loras(cfg):
    """Several hot-loaded LoRAs in a layer, put together by `LoraMerger`."""
    pipe = ses_fast.enable(MAKE["FLUX.1"]())
    pipe.dit = pipe.enable_lora_hot_loading(pipe.dit)
    without = pixels(pipe(**BASE | cfg))
    generator = torch.Generator().manual_seed(0)
    for name, layer in pipe.dit.named_modules():
        if isinstance(layer, AutoWrappedLinear) and "blocks" in name:
            for _ in range(2):
                layer.lora_A_weights.append(0.3 * torch.randn(4, layer.in_features, generator=generator))
                layer.lora_B_weights.append(0.3 * torch.randn(layer.out_features, 4, generator=generator))
            layer.lora_merger = ready(LoraMerger(layer.out_features))
    stock = pixels(pipe(**BASE | cfg))
    assert not np.array_equal(without, stock)
    judge(pipe, stock, cfg, BOTH if cfg else TOGETHER)


# ---------------------------------------------------------------- where the weights are

# FLUX.1's text encoders take no offload to the disk in DiffSynth itself.
OFFLOADED = {name: None if name != "FLUX.1" else ("dit", "vae_decoder", "vae_encoder") for name in MAKE}


@pytest.mark.parametrize("cfg", [{}, GUIDED], ids=["no CFG", "CFG"])
@pytest.mark.parametrize("family", MAKE)
def test_weights_on_the_disk(family, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # which DiffSynth calls
    image, result, _ = search(ses_fast.enable(MAKE[family]()), call=cfg)
    pipe = MAKE[family]()
    places = {"offload": "disk", "onload": "cpu", "preparing": "cpu", "computation": "cpu"}
    settings = {f"{stage}_device": place for stage, place in places.items()}
    settings |= {f"{stage}_dtype": "disk" if place == "disk" else torch.float32 for stage, place in places.items()}
    for name, model in list(pipe.named_children()):
        if OFFLOADED[family] is None or name in OFFLOADED[family]:
            file = str(tmp_path / f"{name}.safetensors")
            save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, file)
            disk = DiskMap(file, "cpu", torch.float32)
            setattr(pipe, name, enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, settings, disk_map=disk))
    layers = [module for module in pipe.modules() if isinstance(module, AutoWrappedLinear)]
    for layer in layers:
        layer.to("meta")

    def all_on_the_disk():
        return all(weight.is_meta for layer in layers for weight in layer.parameters())

    pipe.vram_management_enabled = pipe.check_vram_management_state()
    assert pipe.vram_management_enabled and all_on_the_disk()
    stock = pixels(pipe(**BASE | cfg))
    ses_fast.enable(pipe)
    assert np.array_equal(pixels(search(pipe, budget=1, call=cfg)[0]), stock)
    again, offloaded, _ = search(pipe, call=cfg)
    assert offloaded.trace == result.trace and np.array_equal(pixels(again), pixels(image)) and all_on_the_disk()

    def failing(images, prompt):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        search(pipe, call=cfg | {"ses_reward_model": failing})
    assert all_on_the_disk() and np.array_equal(pixels(pipe(**BASE | cfg)), stock)


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.abs().max() / 127
        self.register_buffer("numbers", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.clone())

    @property
    def weight(self) -> Tensor:
        return self.numbers * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Int8Backend(QuantBackend):
    """A stand-in: the real backends need a package of their own, and most a GPU."""

    name = "int8"

    def create_quantized_linear(self, linear, compute_device=None, model_device=None):
        return Int8Linear(linear)

    def is_quantized_linear(self, module):
        return isinstance(module, Int8Linear)


@pytest.fixture
def int8(monkeypatch):
    monkeypatch.setitem(QUANT_BACKENDS, "int8", Int8Backend)
    monkeypatch.setitem(QUANT_METHODS, "int8", QuantMethodSpec("int8", lambda settings: None))
    monkeypatch.setattr(quant_backends, "load_backend_for_method", lambda method: None)
    return QuantizeConfig(method="int8")


@pytest.mark.parametrize("cfg", [{}, GUIDED], ids=["no CFG", "CFG"])
@pytest.mark.parametrize("family", MAKE)
def test_quantised_weights(family, cfg, int8):
    pipe = MAKE[family]()
    without = pixels(pipe(**BASE | cfg))
    int8.quantize_model(pipe.dit)
    pipe.dit.quantize_config = int8
    stock = pixels(pipe(**BASE | cfg))
    assert not np.array_equal(without, stock)
    shares = cfg and family.startswith("FLUX")
    judge(ses_fast.enable(pipe), stock, cfg, BOTH if shares else TOGETHER)


@pytest.mark.parametrize("family", ["Z-Image", "FLUX.2-dev", "FLUX.2-klein"])
def test_a_lora_by_the_call_on_quantised_weights(family, int8):
    """They take it hot by themselves."""
    pipe = MAKE[family]()
    int8.quantize_model(pipe.dit)
    pipe.dit.quantize_config = int8
    call = GUIDED | {"lora": lora_for(family), "negative_lora": lora_for(family, seed=1)}
    without, stock = pixels(pipe(**BASE | GUIDED)), pixels(pipe(**BASE | call))
    assert not np.array_equal(without, stock)
    judge(ses_fast.enable(pipe), stock, call, TOGETHER)


# ---------------------------------------------------------------- the largest size


class Enlarge(nn.Module):
    """Stand-in for a decoder: the real ones take ten seconds an image here, and are tested at other sizes."""

    def forward(self, latents: Tensor, **others) -> Tensor:
        return latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3) / 3

    decode = forward


@pytest.mark.parametrize("family", ["Qwen-Image", "Z-Image"])
def test_1328_pixels_are_166_latents(family):
    """An odd size at every level but the first: 166, 83, 42, 21, 11."""
    pipe, call = MAKE[family](), {"height": 1328, "width": 1328}
    if family == "Z-Image":  # one step is enough; Qwen-Image has no schedule of one
        call["num_inference_steps"] = 1
    decoder = "vae" if family == "Qwen-Image" else "vae_decoder"
    setattr(pipe, decoder, Enlarge())
    stock = pixels(pipe(**BASE | call))
    ses_fast.enable(pipe)
    steps = {"ses_inference_steps": (BASE | call)["num_inference_steps"]}
    image, result, seen = search(pipe, budget=2, call=call | steps)
    assert result.latents.shape == (1, 16, 166, 166) and result.state.config.dwt_level == 4
    assert np.array_equal(pixels(pipe.vae_output_to_image(seen.images[0][None])), stock)
    assert np.array_equal(pixels(image), pixels(pipe.vae_output_to_image(seen.winner)))
    assert seen.scores[0] != seen.scores[1]
