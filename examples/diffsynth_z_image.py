"""Z-Image-Turbo with DiffSynth-Studio: the best of 50 previews of 8 steps, judged by PickScore, in full.

Needs a GPU and the package: `pip install ".[diffsynth,rewards]"` in a clone.
The first run downloads the model and PickScore (3.9 GB).
"""

import torch
from diffsynth.pipelines.z_image import ModelConfig, ZImagePipeline

import ses_fast

model = "Tongyi-MAI/Z-Image-Turbo"
pipe = ZImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=model, origin_file_pattern="transformer/*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="text_encoder/*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id=model, origin_file_pattern="tokenizer/"),
)
ses_fast.enable(pipe)

prompt = "a red fox asleep in fresh snow, a yellow umbrella above it, soft morning light"
image = pipe(
    prompt,
    seed=42,
    enable_ses=True,
    ses_reward_model="pick",
    ses_eval_budget=50,
    ses_inference_steps=8,
)
image.save("z_image.png")
print(f"PickScore without search {pipe.ses_result.base_score:.2f}, with it {pipe.ses_result.score:.2f}")
