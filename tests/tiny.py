"""Tiny pipelines with random weights, of DiffSynth's own classes with their own forwards, and how tests call them."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ses_fast import SESConfig
from ses_fast._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffsynth.core import AutoWrappedLinear, enable_vram_management  # noqa: E402
from diffsynth.models.flux2_dit import Flux2DiT  # noqa: E402
from diffsynth.models.flux2_text_encoder import Flux2TextEncoder  # noqa: E402
from diffsynth.models.flux2_vae import Flux2VAE  # noqa: E402
from diffsynth.models.flux_dit import (  # noqa: E402
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.flux_text_encoder_clip import FluxTextEncoderClip  # noqa: E402
from diffsynth.models.flux_text_encoder_t5 import FluxTextEncoderT5  # noqa: E402
from diffsynth.models.flux_vae import (  # noqa: E402
    DownSampler,
    FluxVAEDecoder,
    FluxVAEEncoder,
    ResnetBlock,
    UpSampler,
    VAEAttentionBlock,
)
from diffsynth.models.general_modules import AdaLayerNorm, RMSNorm, TimestepEmbeddings  # noqa: E402
from diffsynth.models.qwen_image_dit import QwenEmbedRope, QwenImageDiT, QwenImageTransformerBlock  # noqa: E402
from diffsynth.models.qwen_image_text_encoder import QwenImageTextEncoder  # noqa: E402
from diffsynth.models.qwen_image_vae import QwenImageVAE  # noqa: E402
from diffsynth.models.z_image_dit import ZImageDiT  # noqa: E402
from diffsynth.models.z_image_text_encoder import ZImageTextEncoder  # noqa: E402
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline  # noqa: E402
from diffsynth.pipelines.flux_image import FluxImagePipeline  # noqa: E402
from diffsynth.pipelines.qwen_image import QwenImagePipeline  # noqa: E402
from diffsynth.pipelines.z_image import ZImagePipeline  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

TEXT_WIDTH = 32


def tiny_z_image(dtype: torch.dtype = torch.float32, seed: int = 0, siglip: int | None = None) -> ZImagePipeline:
    """siglip: the width of an edit image's features, for Z-Image-Omni."""
    pipe = ZImagePipeline(device="cpu", torch_dtype=dtype)
    pipe.tokenizer = byte_tokenizer("<{{ messages[0]['content'] }}>")
    pipe.text_encoder = TinyTextEncoder()
    pipe.dit = ZImageDiT(
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[640, 96, 96],  # up to 1536 pixels
        siglip_feat_dim=siglip,
    )
    # The real timestep embedder casts its input to bf16, whatever its weights are.
    pipe.dit.t_embedder.mlp.register_forward_pre_hook(lambda mlp, inputs: (inputs[0].to(mlp[0].weight.dtype),))
    pipe.vae_decoder, pipe.vae_encoder = TinyVAEDecoder(), TinyVAEEncoder()
    return _finished(pipe, pipe.vae_decoder.conv_out, dtype, seed)


def tiny_flux(dtype: torch.dtype = torch.float32, seed: int = 0) -> FluxImagePipeline:
    pipe = FluxImagePipeline(device="cpu", torch_dtype=dtype)
    pipe.tokenizer_1 = pipe.tokenizer_2 = byte_tokenizer("")
    sizes = {"vocab_size": 257, "max_position_embeddings": 77, "num_encoder_layers": 2}
    pipe.text_encoder_1 = FluxTextEncoderClip(embed_dim=768, encoder_intermediate_size=32, **sizes)
    pipe.text_encoder_2 = TinyT5()
    pipe.dit = TinyFluxDiT()
    pipe.vae_decoder, pipe.vae_encoder = TinyVAEDecoder(), TinyVAEEncoder()
    return _finished(pipe, pipe.vae_decoder.conv_out, dtype, seed)


def tiny_flux2(dtype: torch.dtype = torch.float32, seed: int = 0, klein: bool = False) -> Flux2ImagePipeline:
    """dev has a Mistral text encoder and embedded guidance, klein a Qwen3 and none."""
    pipe = Flux2ImagePipeline(device="cpu", torch_dtype=dtype)
    if klein:
        pipe.tokenizer = byte_tokenizer("<{{ messages[0]['content'] }}>")
        pipe.text_encoder_qwen3 = TinyTextEncoder(layers=28)  # layers 9, 18 and 27 are read
    else:
        pipe.tokenizer = byte_tokenizer("{% for m in messages %}<{{ m['content'][0]['text'] }}>{% endfor %}")
        pipe.text_encoder = TinyMistral()
    pipe.dit = Flux2DiT(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    pipe.vae = Flux2VAE(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    return _finished(pipe, pipe.vae.decoder.conv_out, dtype, seed)


def tiny_qwen_image(dtype: torch.dtype = torch.float32, seed: int = 0) -> QwenImagePipeline:
    pipe = QwenImagePipeline(device="cpu", torch_dtype=dtype)
    pipe.tokenizer = byte_tokenizer("")
    pipe.text_encoder = TinyQwenTextEncoder()
    pipe.dit = TinyQwenImageDiT()
    pipe.vae = QwenImageVAE(base_dim=8, num_res_blocks=1)
    return _finished(pipe, pipe.vae.decoder.conv_out, dtype, seed, contrast=4)


def _finished(pipe: nn.Module, last: nn.Module, dtype: torch.dtype, seed: int, contrast: float = 0.5) -> nn.Module:
    initialise(pipe, seed)
    last.weight.data *= contrast  # most pixels within [-1, 1], some beyond
    return pipe.to(dtype).eval().requires_grad_(False)


def initialise(module: nn.Module, seed: int) -> None:
    """Every parameter (some of DiffSynth's are torch.empty), so that each has a part in the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".bn." in name:
            continue  # FLUX.2's latent statistics: mean 0 and variance 1 as they are made
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5  # keeps the size of what goes through
        else:
            parameter.data = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise  # norms and biases


def byte_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: any text, no download."""
    vocabulary = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", chat_template=chat_template)


class TinyTextEncoder(ZImageTextEncoder):
    """The real forward; the real sizes are written into the real __init__."""

    def __init__(self, layers: int = 2) -> None:
        nn.Module.__init__(self)
        self.model = Qwen3Model(
            Qwen3Config(
                vocab_size=257,
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=512,
            )
        )


class TinyMistral(Flux2TextEncoder):
    def __init__(self) -> None:
        text = {
            "model_type": "mistral",
            "vocab_size": 257,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 30,  # layers 10, 20 and 30 are read
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
        }
        vision = {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        }
        Mistral3ForConditionalGeneration.__init__(
            self, Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
        )


class TinyQwenTextEncoder(QwenImageTextEncoder):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        text = {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 257,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]},
        }
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": TEXT_WIDTH}
        self.model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


class TinyT5(FluxTextEncoderT5):
    def __init__(self) -> None:
        sizes = {"d_model": TEXT_WIDTH, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 257}
        T5EncoderModel.__init__(self, T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes))

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


class TinyFluxDiT(FluxDiT):
    """The real forward and blocks; the real sizes are written into the real __init__."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        nn.Module.__init__(self)
        self.input_dim = 64
        self.pos_embedder = RoPEEmbedding(width, 10000, [4, 6, 6])
        self.time_embedder = TimestepEmbeddings(256, width)
        self.guidance_embedder = TimestepEmbeddings(256, width)
        self.pooled_text_embedder = nn.Sequential(nn.Linear(768, width), nn.SiLU(), nn.Linear(width, width))
        self.context_embedder = nn.Linear(TEXT_WIDTH, width)
        self.x_embedder = nn.Linear(64, width)
        self.blocks = nn.ModuleList([FluxJointTransformerBlock(width, heads)])
        self.single_blocks = nn.ModuleList([FluxSingleTransformerBlock(width, heads)])
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, 64)


class TinyQwenImageDiT(QwenImageDiT):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        nn.Module.__init__(self)
        self.pos_embed = QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
        self.time_text_embed = TimestepEmbeddings(
            256, width, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False
        )
        self.txt_norm = RMSNorm(TEXT_WIDTH, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(64, width), nn.Linear(TEXT_WIDTH, width)
        sizes = {"num_attention_heads": heads, "attention_head_dim": width // heads}
        self.transformer_blocks = nn.ModuleList([QwenImageTransformerBlock(dim=width, **sizes) for _ in range(2)])
        self.norm_out, self.proj_out = AdaLayerNorm(width, single=True), nn.Linear(width, 64)


def _ends(module: nn.Module, channels: tuple[int, int], width: int) -> None:
    """What stands before and after the blocks of a FLUX autoencoder half."""
    module.scaling_factor, module.shift_factor = 0.3611, 0.1159
    module.conv_in = nn.Conv2d(channels[0], width, 3, padding=1)
    module.conv_norm_out = nn.GroupNorm(32, width, eps=1e-6)
    module.conv_act = nn.SiLU()
    module.conv_out = nn.Conv2d(width, channels[1], 3, padding=1)


class TinyVAEDecoder(FluxVAEDecoder):
    def __init__(self, width: int = 32) -> None:  # a multiple of GroupNorm's 32 groups
        nn.Module.__init__(self)
        _ends(self, (16, 3), width)
        blocks: list[nn.Module] = [VAEAttentionBlock(1, width, width)]
        for _ in range(3):
            blocks += [ResnetBlock(width, width), UpSampler(width)]
        self.blocks = nn.ModuleList(blocks)


class TinyVAEEncoder(FluxVAEEncoder):
    def __init__(self, width: int = 32) -> None:
        nn.Module.__init__(self)
        _ends(self, (3, 32), width)
        blocks: list[nn.Module] = []
        for _ in range(3):
            blocks += [ResnetBlock(width, width), DownSampler(width, padding=0, extra_padding=True)]
        self.blocks = nn.ModuleList([*blocks, VAEAttentionBlock(1, width, width)])


def brightness(images: Tensor, prompt: str) -> Tensor:
    """A reward that needs no weights: [n]."""
    return images.float().mean(dim=(1, 2, 3))


# ---------------------------------------------------------------- how tests call them

MAKE = {
    "Z-Image": tiny_z_image,
    "FLUX.1": tiny_flux,
    "FLUX.2-dev": tiny_flux2,
    "FLUX.2-klein": lambda *args: tiny_flux2(*args, klein=True),
    "Qwen-Image": tiny_qwen_image,
}
BASE = {"prompt": "a red fox", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "cfg_scale": 1.0}
BASE["progress_bar_cmd"] = lambda steps: steps
GUIDED = {"cfg_scale": 3.0, "negative_prompt": "blurry and dark"}
SES = {"enable_ses": True, "ses_reward_model": brightness, "ses_inference_steps": 2}
QUIET = {"progress": False, "popsize": 4, "k_elites": 2, "batch_size": 1}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
HALF = Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, 0).astype(np.uint8)).convert("RGB")  # a mask: the right
# Candidates together against one by one: absolute, on images in [-1, 1].
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.15}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


class Seen:
    """Collects the previews of a search."""

    def __init__(self) -> None:
        self.images, self.scores, self.numbers = [], [], []

    def __call__(self, images: Tensor, scores: Tensor, generation: int, first: int) -> None:
        self.images += list(images)
        self.scores += scores.tolist()
        self.numbers.append((generation, first, len(images)))

    @property
    def winner(self) -> Tensor:  # [1, 3, H, W]
        return self.images[self.scores.index(max(self.scores))][None]


def search(pipe, budget: int = 6, call: dict | None = None, **config):
    """(image, result, what on_preview saw)"""
    seen = Seen()
    config = SESConfig(**QUIET | {"on_preview": seen} | config)
    image = pipe(**BASE | SES | (call or {}), ses_eval_budget=budget, ses_config=config)
    return image, pipe.ses_result, seen


def close(seen: Seen, others: Seen, dtype: torch.dtype = torch.float32) -> None:
    a, b = torch.stack(seen.images), torch.stack(others.images)
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])
    assert (a[0] - a[1]).abs().max() > 0.1  # candidates do differ


@contextmanager
def forward_sizes(pipe):
    """How many images each forward of the denoiser has from here on, in a list."""
    block = next(m for m in pipe.dit.modules() if type(m).__name__ in pipe.dit._repeated_blocks)
    sizes = []

    def note(module, args, kwargs):
        image = args[0] if args else next(kwargs[name] for name in ("image", "hidden_states", "x") if name in kwargs)
        sizes.append(len(image))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def lora_for(family: str, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of rank 4 on one layer, strong enough to be seen."""
    name, (inputs, outputs) = {
        "Z-Image": ("layers.0.feed_forward.w1", (48, 128)),
        "FLUX.2-dev": ("transformer_blocks.0.attn.to_q", (32, 32)),
        "FLUX.2-klein": ("transformer_blocks.0.attn.to_q", (32, 32)),
    }[family]
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_{side}.default.weight": torch.randn(*shape, generator=generator)
        for side, shape in (("A", (4, inputs)), ("B", (outputs, 4)))
    }


def manage_vram(pipe):
    """As `vram_limit` and offload devices in from_pretrained do, with every device the CPU; returns the pipe."""
    stages = ("offload", "onload", "preparing", "computation")
    settings = {f"{stage}_device": "cpu" for stage in stages} | {f"{stage}_dtype": torch.float32 for stage in stages}
    for name, model in list(pipe.named_children()):
        setattr(pipe, name, enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, settings))
    pipe.vram_management_enabled = pipe.check_vram_management_state()
    assert pipe.vram_management_enabled
    return pipe
