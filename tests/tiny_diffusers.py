"""Tiny pipelines with random weights, of diffusers' own classes, and how tests call them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ses_fast import SESConfig
from ses_fast._torchvision import declare_torchvision_ops

declare_torchvision_ops()

from diffusers import (  # noqa: E402
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
)

SIZE = 32  # pixels
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass
class Tiny:
    """A pipeline, and the arguments of its call."""

    pipe: object
    call: dict = field(default_factory=dict)

    def __call__(self, **others):
        return self.pipe(**{"output_type": "np"} | self.call | others)


def random_tensor(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(*shape: int, **others) -> dict:
    """Embeddings of a prompt and of a negative one."""
    both = {"prompt_embeds": random_tensor(*shape), "negative_prompt_embeds": random_tensor(*shape, seed=8)}
    return {"height": SIZE, "width": SIZE, **both, **others}


def pooled(*shape: int) -> dict:
    return {
        "pooled_prompt_embeds": random_tensor(*shape, seed=9),
        "negative_pooled_prompt_embeds": random_tensor(*shape, seed=10),
    }


def masks(length: int, dtype: torch.dtype = torch.long) -> dict:
    mask = torch.ones(1, length, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


NO_PROMPT = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}


def no_text(count: int = 1) -> dict:
    names = [f"{part}{'' if i == 0 else f'_{i + 1}'}" for i in range(count) for part in ("text_encoder", "tokenizer")]
    return dict.fromkeys(names)


def flow(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def vae(channels: int = 4, **settings) -> AutoencoderKL:
    """2 pixels a latent."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    )


def unet(text: int, **settings) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=text,
        attention_head_dim=4,
        **settings,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = letters | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=16
    )


def clip_text(width: int, projected: int | None = None) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projected or width,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    return CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)


def sd15() -> Tiny:
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(16),
        tokenizer=clip_tokenizer(),
        unet=unet(16),
        scheduler=PNDMScheduler(skip_prk_steps=True, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Tiny(pipe, {"prompt": "a cat", "guidance_scale": 5.0, "height": SIZE, "width": SIZE})


def sdxl() -> Tiny:
    """Two text encoders, classifier-free guidance, a scheduler that scales the noise."""
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(8, projected=16),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
        add_watermarker=False,
    )
    return Tiny(pipe, {"prompt": "a cat", "guidance_scale": 5.0, "height": SIZE, "width": SIZE})


def sdxl_turbo() -> Tiny:
    """SDXL-Turbo's settings: an ancestral scheduler, no guidance."""
    made = sdxl()
    made.pipe.scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS)
    return Tiny(made.pipe, made.call | {"guidance_scale": 0.0})


def sdxl_controlnet() -> Tiny:
    """SDXL with a picture that says where things are."""
    base = sdxl()
    controlnet = ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(8, 8))
    pipe = StableDiffusionXLControlNetPipeline(**base.pipe.components, controlnet=controlnet, add_watermarker=False)
    return Tiny(pipe, base.call | {"image": random_tensor(1, 3, SIZE, SIZE).sigmoid()})


def sd3() -> Tiny:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=vae(shift_factor=0.06), **no_text(3)
    )
    return Tiny(pipe, prompts(1, 5, 32, guidance_scale=5.0, **pooled(1, 16)))


def flux() -> Tiny:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    decoder = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = flow(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, vae=decoder, transformer=transformer, **no_text(2))
    return Tiny(pipe, prompts(1, 5, 32, guidance_scale=3.5, true_cfg_scale=2.0, **pooled(1, 16)))


def flux2_parts(**settings) -> dict:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **settings,
    )
    decoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    return {"scheduler": flow(use_dynamic_shifting=True), "vae": decoder, "transformer": transformer, **no_text()}


def flux2() -> Tiny:
    """Guidance is a number that the model takes: there is no negative prompt."""
    call = prompts(1, 5, 16, guidance_scale=4.0)
    del call["negative_prompt_embeds"]
    return Tiny(Flux2Pipeline(**flux2_parts(guidance_embeds=True)), call)


def flux2_klein() -> Tiny:
    pipe = Flux2KleinPipeline(**flux2_parts(guidance_embeds=False), is_distilled=False)
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=4.0))


def qwen_image() -> Tiny:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    pipe = QwenImagePipeline(scheduler=scheduler, vae=decoder, transformer=transformer, **no_text())
    mask = torch.ones(1, 5, dtype=torch.long)
    both = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return Tiny(pipe, prompts(1, 5, 16, true_cfg_scale=4.0, **both))


def z_image() -> Tiny:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipe = ZImagePipeline(
        scheduler=flow(shift=3.0), vae=vae(16, shift_factor=0.1), transformer=transformer, **no_text()
    )
    call = prompts(1, 5, 16, guidance_scale=4.0)
    return Tiny(pipe, call | {name: [call[name][0]] for name in ("prompt_embeds", "negative_prompt_embeds")})


def pixart_sigma(kind: type = PixArtSigmaPipeline) -> Tiny:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    pipe = kind(vae=vae(), transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **no_text())
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=4.0, **masks(5), **NO_PROMPT))


def sana() -> Tiny:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaPipeline(vae=decoder, transformer=transformer, scheduler=scheduler, **no_text())
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=4.0, **masks(5), **NO_PROMPT))


def lumina2() -> Tiny:
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=16,
    )
    pipe = Lumina2Pipeline(transformer=transformer, scheduler=flow(shift=6.0), vae=vae(shift_factor=0.1), **no_text())
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=4.0, **masks(5)) | {"height": 128, "width": 128})


def wan() -> Tiny:
    """Nine frames, three in the latents."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    decoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(vae=decoder, transformer=transformer, scheduler=scheduler, **no_text())
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=4.0, num_frames=9))


def cogview4() -> Tiny:
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    settings = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256}
    scheduler = flow(use_dynamic_shifting=True, time_shift_type="linear", **settings)
    pipe = CogView4Pipeline(vae=vae(), transformer=transformer, scheduler=scheduler, **no_text())
    return Tiny(pipe, prompts(1, 16, 16, guidance_scale=4.0))


def chroma() -> Tiny:
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    decoder = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    pipe = ChromaPipeline(scheduler=flow(), vae=decoder, transformer=transformer, **no_text())
    return Tiny(pipe, prompts(1, 5, 32, guidance_scale=4.0, **masks(5, torch.bool)))


def aura_flow() -> Tiny:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    pipe = AuraFlowPipeline(vae=vae(), transformer=transformer, scheduler=flow(shift=1.73), **no_text())
    return Tiny(pipe, prompts(1, 5, 16, guidance_scale=3.5, **masks(5)))


MAKE = {
    "SDXL": sdxl,
    "SDXL-Turbo": sdxl_turbo,
    "FLUX.1": flux,
    "Z-Image": z_image,
    "Qwen-Image": qwen_image,
    "SD3": sd3,
    "SD1.5": sd15,
    "FLUX.2-klein": flux2_klein,
    "PixArt-Sigma": pixart_sigma,
    "Sana": sana,
    "Lumina2": lumina2,
    "Wan": wan,
    "CogView4": cogview4,
    "Chroma": chroma,
    "SDXL-ControlNet": sdxl_controlnet,
    "FLUX.2": flux2,
    "PixArt-Alpha": lambda: pixart_sigma(PixArtAlphaPipeline),
    "AuraFlow": aura_flow,
}


def make(name: str) -> Tiny:
    """The pipeline with weights that do something, in evaluation, without progress bars."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = MAKE[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    for part in tiny.pipe.components.values():
        if not isinstance(part, nn.Module):
            continue
        part.eval()
        for weight in part.parameters():
            if weight.ndim > 1:
                scale = weight[0].numel() ** -0.5
                weight.data = torch.randn(weight.shape, generator=generator) * scale
    return tiny


def brightness(images: Tensor, prompt: str) -> Tensor:
    """A reward. Of a video it sees all frames."""
    return images.float().flatten(1).mean(1)


def search(tiny: Tiny, budget: int, *, steps: int = 3, reward=brightness, seed: int | None = 3, call=None, **config):
    """(output, result) of a call that searches."""
    generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    output = tiny(
        **{"num_inference_steps": 3} | generator | (call or {}),
        enable_ses=True,
        ses_reward_model=reward,
        ses_eval_budget=budget,
        ses_inference_steps=steps,
        ses_config=SESConfig(progress=False, dwt_level=1, **config),
    )
    return output, tiny.pipe.ses_result


def first(output) -> np.ndarray:
    """The image or video of what a call returned."""
    return np.asarray(output[0][0])
