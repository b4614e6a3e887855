"""Tiny pipelines of DiffSynth's other classes with random weights, through their own units, models and forwards."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
import torch
from PIL import Image
from tiny import TEXT_WIDTH, TinyTextEncoder, TinyVAEDecoder, TinyVAEEncoder, _finished, byte_tokenizer
from torch import nn
from transformers import (
    Ministral3Config,
    Ministral3Model,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

CHAT = "<|im_start|>{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|boi_token|>", "<|tms_token|>", "<img>", "</img>", "<IMG_CONTEXT>", "</think>"),
]
WORDS = 257 + len(SPECIAL)


def model(name: str) -> type:
    """A class of diffsynth.models, as "file.Class"."""
    file, cls = name.split(".")
    return getattr(import_module(f"diffsynth.models.{file}"), cls)


def pipeline(name: str, dtype: torch.dtype) -> nn.Module:
    """A pipeline of diffsynth without its models, as "file.Class"."""
    file, cls = name.split(".")
    return getattr(import_module(f"diffsynth.pipelines.{file}"), cls)(device="cpu", torch_dtype=dtype)


def special_tokenizer():
    tokenizer = byte_tokenizer(CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


class TinyProcessor:
    """A tokenizer in a processor's place; of pictures it reads nothing."""

    image_processor = None

    def __init__(self) -> None:
        self.tokenizer = special_tokenizer()

    def __call__(self, text, images=None, **options):
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages, tokenize=True, return_dict=False, **options):
        options = {name: options[name] for name in ("return_tensors",) if name in options}
        if isinstance(messages[0], list):
            messages = messages[0]
        return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=return_dict, **options)


def text_sizes(layers: int) -> dict:
    return {
        "vocab_size": WORDS,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
    }


def qwen3_vl(layers: int) -> Qwen3VLConfig:
    """layers: the pipelines read hidden states by number."""
    text = text_sizes(layers) | {
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
            "rope_theta": 1e4,
        }
    }
    vision = {
        "deepstack_visual_indexes": [0],
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "num_position_embeddings": 16,
        "out_hidden_size": TEXT_WIDTH,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=WORDS - 1, video_token_id=WORDS - 1)


def text_encoder(name: str, language_model: nn.Module) -> nn.Module:
    """The class's own forward around a small model; the real sizes are written into its __init__."""
    cls = model(name)

    class Tiny(cls):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model, self.config = language_model, language_model.config
            self._fp32_buffers = {}

    return Tiny()


def clip(projection: bool) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": WORDS,
    }
    if projection:
        return model("stable_diffusion_xl_text_encoder.SDXLTextEncoder2")(projection_dim=32, **sizes)
    return model("stable_diffusion_text_encoder.SDTextEncoder")(**sizes)


def clip_tokenizer():
    tokenizer = byte_tokenizer("")
    tokenizer.model_max_length = 77
    return tokenizer


def flux2_vae() -> nn.Module:
    return model("flux2_vae.Flux2VAE")(block_out_channels=(32, 32, 32, 32), layers_per_block=1)


def wan_vae() -> nn.Module:
    file = import_module("diffsynth.models.wan_video_vae")

    class TinyWanVAE(file.WanVideoVAE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.mean, self.std = torch.zeros(16), torch.ones(16)
            self.scale = [self.mean, 1 / self.std]
            self.model = file.VideoVAE_(dim=8, z_dim=16, num_res_blocks=1)
            self.upsampling_factor, self.z_dim = 8, 16

    return TinyWanVAE()


def stable_diffusion_xl(dtype):
    pipe = pipeline("stable_diffusion_xl.StableDiffusionXLPipeline", dtype)
    pipe.tokenizer = pipe.tokenizer_2 = clip_tokenizer()
    pipe.text_encoder, pipe.text_encoder_2 = clip(False), clip(True)
    pipe.unet = model("stable_diffusion_xl_unet.SDXLUNet2DConditionModel")(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=[2, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    pipe.vae = model("stable_diffusion_vae.StableDiffusionVAE")(block_out_channels=(32,) * 4, layers_per_block=1)
    return pipe, pipe.vae.decoder.conv_out


def stable_diffusion(dtype):
    pipe = pipeline("stable_diffusion.StableDiffusionPipeline", dtype)
    pipe.tokenizer, pipe.text_encoder = clip_tokenizer(), clip(False)
    pipe.unet = model("stable_diffusion_unet.UNet2DConditionModel")(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    pipe.vae = model("stable_diffusion_vae.StableDiffusionVAE")(block_out_channels=(32,) * 4, layers_per_block=1)
    return pipe, pipe.vae.decoder.conv_out


def flux3(dtype):
    file = import_module("diffsynth.models.flux3_dit")

    class TinyFlux3DiT(file.Flux3DiT):
        def __init__(self, width: int = 128) -> None:  # a head has 128: 32 for each of four axes
            nn.Module.__init__(self)
            self.flow_map = False
            kinds = ("image", "image_cond")
            self.emb_in = nn.ModuleDict({kind: nn.Linear(128, width, bias=False) for kind in kinds})
            self.txt_in = nn.Linear(8 * TEXT_WIDTH, width, bias=False)
            self.time_in = file.MLPEmbedder(256, width)

            def modulations():
                return nn.ModuleDict({kind: file.ModeModulation(width) for kind in (*kinds, "txt")})

            def blocks(count: int):
                return nn.ModuleList([file.Block(width, 1, 1.0) for _ in range(count)])

            self.early_stream_modulations, self.single_stream_modulations = modulations(), modulations()
            self.content_mode_blocks = nn.ModuleDict({kind: blocks(5) for kind in kinds})
            self.txt_mode_blocks, self.single_blocks = blocks(5), blocks(1)
            self.final_layer = nn.ModuleDict({"image": file.LastLayer(width, 128)})

    pipe = pipeline("flux3_image.Flux3ImagePipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.text_encoder = text_encoder(
        "krea2_text_encoder.Krea2TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=32))
    )
    pipe.dit, pipe.vae = TinyFlux3DiT(), flux2_vae()
    return pipe, pipe.vae.decoder.conv_out


def krea2(dtype):
    # Its attention asks for cuDNN's kernel alone, which no CPU has.
    import_module("diffsynth.models.krea2_dit").sdpa_kernel = lambda backend: nullcontext()
    pipe = pipeline("krea2.Krea2Pipeline", dtype)
    pipe.tokenizer = special_tokenizer()
    pipe.text_encoder = text_encoder(
        "krea2_text_encoder.Krea2TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=35))
    )
    sizes = {
        "features": 32,
        "tdim": 32,
        "heads": 2,
        "kvheads": 1,
        "multiplier": 1,
        "layers": 1,
        "patch": 2,
        "channels": 16,
    }
    text = {"txtdim": TEXT_WIDTH, "txtheads": 2, "txtkvheads": 2, "txtlayers": 12}
    pipe.dit = model("krea2_dit.SingleStreamDiT")(config=sizes | text)
    pipe.vae = model("qwen_image_vae.QwenImageVAE")(base_dim=8, num_res_blocks=1)
    return pipe, pipe.vae.decoder.conv_out


def ernie_image(dtype):
    pipe = pipeline("ernie_image.ErnieImagePipeline", dtype)
    pipe.tokenizer = byte_tokenizer("")
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 1024,
    }
    pipe.text_encoder = text_encoder(
        "ernie_image_text_encoder.ErnieImageTextEncoder",
        Ministral3Model(Ministral3Config(**text_sizes(layers=2), rope_parameters=rope)),
    )
    pipe.dit = model("ernie_image_dit.ErnieImageDiT")(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    pipe.vae = flux2_vae()
    return pipe, pipe.vae.decoder.conv_out


def qwen_image_21(dtype):
    pipe = pipeline("qwen_image_21.QwenImage21Pipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.text_encoder = text_encoder(
        "qwen_image_21_text_encoder.QwenImage21TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=2))
    )
    pipe.dit = model("qwen_image_21_dit.QwenImage21DiT")(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    pipe.vae = model("qwen_image_21_vae.QwenImage21VAE")(base_dim=8, decoder_base_dim=8, num_res_blocks=1)
    return pipe, pipe.vae.decoder.conv_out


def sensenova_u1(dtype):
    pipe = pipeline("sensenova_u1_image.SenseNovaU1ImagePipeline", dtype)
    pipe.tokenizer = special_tokenizer()
    pipe.dit = model("sensenova_u1_dit.SenseNovaU1DiT")(
        vocab_size=WORDS,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        max_position_embeddings_hw=64,
        vision_hidden_size=32,
        max_position_embeddings_vision=64,
    )
    return pipe, pipe.dit.fm_modules["fm_head"].conv2


def hidream_o1(dtype):
    file = import_module("diffsynth.models.hidream_o1_image_dit")
    text = text_sizes(layers=1) | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    vision = qwen3_vl(1).vision_config.to_dict()
    vision = {name: vision[name] for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size")}
    config = file.Qwen3VLConfig(
        text_config=text,
        vision_config=vision
        | {"out_hidden_size": TEXT_WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=WORDS - 1,
        video_token_id=WORDS - 2,
        vision_start_token_id=WORDS - 3,
    )

    class TinyHiDream(file.HiDreamO1ImageModel):
        def __init__(self) -> None:
            file.Qwen3VLPreTrainedModel.__init__(self, config)
            self.model = file.Qwen3VLModel(config)
            self.lm_head = nn.Linear(TEXT_WIDTH, WORDS, bias=False)

    pipe = pipeline("hidream_o1_image.HiDreamO1ImagePipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.dit = TinyHiDream()
    pipe.dit.model.tms_token_id = pipe.processor.tokenizer.convert_tokens_to_ids("<|tms_token|>")
    return pipe, pipe.dit.model.final_layer2.linear


class Features(nn.Module):
    """In the place of Ideogram 4's text encoder, which calls a transformers later than the one that FLUX.2 needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 13 * TEXT_WIDTH)

    def forward(self, token_ids, attention_mask, text_position_ids):
        return self.embed(token_ids) * attention_mask[..., None]


def ideogram4(dtype):
    pipe = pipeline("ideogram4.Ideogram4Pipeline", dtype)
    pipe.tokenizer = byte_tokenizer("{{ messages[0]['content'][0]['text'] }}")
    pipe.text_encoder = Features()
    pipe.dit, pipe.dit_uncond = (
        model("ideogram4_dit.Ideogram4DiT")(
            {
                "emb_dim": 32,
                "num_layers": 1,
                "num_heads": 2,
                "intermediate_size": 32,
                "adanln_dim": 16,
                "llm_features_dim": 13 * TEXT_WIDTH,
                "mrope_section": (4, 2, 2),
            }
        )
        for _ in range(2)
    )
    pipe.vae = flux2_vae()
    return pipe, pipe.vae.decoder.conv_out


def anima(dtype):
    file = import_module("diffsynth.models.anima_dit")
    sizes = {"max_img_h": 240, "max_img_w": 240, "max_frames": 8, "patch_spatial": 2, "patch_temporal": 1}
    sizes |= {"in_channels": 16, "out_channels": 16, "model_channels": 32, "num_blocks": 1, "num_heads": 1}
    sizes |= {"crossattn_emb_channels": TEXT_WIDTH, "pos_emb_cls": "rope3d", "pos_emb_learnable": True}
    sizes |= {"use_adaln_lora": True, "adaln_lora_dim": 8, "rope_enable_fps_modulation": False, "operations": nn}

    class TinyAnima(file.AnimaDiT):
        def __init__(self) -> None:
            file.MiniTrainDIT.__init__(self, **sizes, dtype=dtype)
            widths = {"source_dim": TEXT_WIDTH, "target_dim": TEXT_WIDTH, "model_dim": TEXT_WIDTH}
            self.llm_adapter = file.LLMAdapter(**widths, num_layers=1, num_heads=2, dtype=dtype, operations=nn)

    pipe = pipeline("anima_image.AnimaImagePipeline", dtype)
    pipe.tokenizer = pipe.tokenizer_t5xxl = byte_tokenizer("")
    pipe.text_encoder, pipe.dit, pipe.vae = TinyTextEncoder(), TinyAnima(), wan_vae()
    return pipe, pipe.vae.model.decoder.head[-1]


def fibo(dtype):
    pipe = pipeline("fibo.FiboPipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.text_encoder = text_encoder(
        "krea2_text_encoder.Krea2TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=35))
    )
    pipe.dit = model("fibo_dit.FiboDiT")(
        dim=48,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * TEXT_WIDTH,
        injection_layer_ids=(0, 1, 2, 3, 4),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        axes_dims=(8, 8, 8),
        axes_lens=(64, 96, 96),
    )
    pipe.vae = flux2_vae()
    return pipe, pipe.vae.decoder.conv_out


def moss(dtype):
    config = text_sizes(layers=4) | {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 1.0,
            "rope_theta": 1e4,
            "rope_type": "default",
        },
    }
    pipe = pipeline("moss_image.MOSSImagePipeline", dtype)
    pipe.tokenizer = special_tokenizer()
    pipe.text_encoder = text_encoder(
        "moss_image_text_encoder.MOSSImageTextEncoder", Qwen3_5TextModel(Qwen3_5TextConfig(**config))
    )
    pipe.dit = model("moss_image_dit.MOSSImageDiT")(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=TEXT_WIDTH, freq_dim=32
    )
    pipe.vae = flux2_vae()
    return pipe, pipe.vae.decoder.conv_out


def boogu(dtype):
    pipe = pipeline("boogu_image.BooguImagePipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.text_encoder = text_encoder(
        "qwen_image_21_text_encoder.QwenImage21TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=2))
    )
    pipe.dit = model("boogu_image_dit.BooguImageDiT")(
        hidden_size=120,  # one head: 40 for each of three axes, as the pipeline's own unit has it
        num_layers=2,
        num_double_stream_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=8,
        instruction_feature_configs={
            "instruction_feat_dim": TEXT_WIDTH,
            "num_instruction_feature_layers": 1,
            "reduce_type": "mean",
        },
    )
    pipe.vae_encoder, pipe.vae_decoder = TinyVAEEncoder(), TinyVAEDecoder()
    return pipe, pipe.vae_decoder.conv_out


def joyai(dtype):
    pipe = pipeline("joyai_image.JoyAIImagePipeline", dtype)
    pipe.processor = TinyProcessor()
    pipe.text_encoder = text_encoder(
        "qwen_image_21_text_encoder.QwenImage21TextEncoder", Qwen3VLForConditionalGeneration(qwen3_vl(layers=2))
    )
    pipe.dit = model("joyai_image_dit.JoyAIImageDiT")(
        hidden_size=32, heads_num=2, text_states_dim=TEXT_WIDTH, mm_double_blocks_depth=1, rope_dim_list=[4, 6, 6]
    )
    pipe.vae = wan_vae()
    return pipe, pipe.vae.model.decoder.head[-1]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Kind:
    """How a class is built small, and called."""

    build: Callable
    call: dict = field(default_factory=dict)  # beside tiny.BASE
    noise: tuple[int, int] = (16, 8)  # channels of the searched noise, and a latent's side in pixels
    contrast: float = 0.5
    guided: dict = field(default_factory=lambda: {"cfg_scale": 3.0, "negative_prompt": "blurry and dark"})


ALONE = {"cfg_scale": 3.0}  # CFG without a negative prompt
KINDS = {
    "stable_diffusion_xl": Kind(stable_diffusion_xl, noise=(4, 8)),
    "stable_diffusion": Kind(stable_diffusion, noise=(4, 8)),
    "flux3": Kind(flux3, noise=(128, 16)),
    "qwen_image_21": Kind(qwen_image_21, noise=(64, 16)),
    "krea2": Kind(krea2),
    "ernie_image": Kind(ernie_image, {"rand_device": "cpu"}, noise=(128, 16)),
    "sensenova_u1": Kind(sensenova_u1, {"rand_device": "cpu"}, noise=(3, 1), guided=ALONE),
    "hidream_o1": Kind(hidream_o1, {"noise_scale": 1.0}, noise=(3, 1)),
    "ideogram4": Kind(ideogram4, noise=(128, 16)),
    "anima": Kind(anima),
    "fibo": Kind(fibo, noise=(32, 8)),
    "moss": Kind(moss, {"uncond_skip_layers": (1,)}, noise=(128, 16)),
    "boogu": Kind(boogu),
    "joyai": Kind(joyai, {"edit_image": PICTURE}),
}


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    pipe, last = KINDS[kind].build(dtype)
    return _finished(pipe, last, dtype, seed, KINDS[kind].contrast)
