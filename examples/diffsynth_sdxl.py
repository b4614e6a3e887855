"""SDXL with DiffSynth-Studio, whose own call makes the previews, one candidate at a time.

Needs a GPU and the package: `pip install ".[diffsynth,rewards]"` in a clone.
The first run downloads the model and PickScore (3.9 GB).
"""

import torch
from diffsynth.pipelines.stable_diffusion_xl import ModelConfig, StableDiffusionXLPipeline

import ses_fast

model = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = StableDiffusionXLPipeline.from_pretrained(
    torch_dtype=torch.float16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=model, origin_file_pattern="text_encoder/model.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="text_encoder_2/model.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="unet/diffusion_pytorch_model.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id=model, origin_file_pattern="tokenizer/"),
    tokenizer_2_config=ModelConfig(model_id=model, origin_file_pattern="tokenizer_2/"),
)
ses_fast.enable(pipe)

prompt = "a photo of an astronaut riding a horse on mars"
image = pipe(
    prompt,
    cfg_scale=5.0,
    seed=42,
    num_inference_steps=30,
    enable_ses=True,
    ses_reward_model="pick",
    ses_eval_budget=50,
    ses_inference_steps=10,
)
image.save("sdxl.png")
print(f"PickScore without search {pipe.ses_result.base_score:.2f}, with it {pipe.ses_result.score:.2f}")
