"""FLUX.1-dev with DiffSynth-Studio: previews of 10 steps for an image of 30, judged by HPSv2, in a race.

Needs a GPU and the package: `pip install ".[diffsynth,rewards]"` in a clone.
The first run downloads the model and HPSv2 (2 GB).
"""

import torch
from diffsynth.pipelines.flux_image import FluxImagePipeline, ModelConfig

import ses_fast

model = "black-forest-labs/FLUX.1-dev"
pipe = FluxImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=model, origin_file_pattern="flux1-dev.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="text_encoder/model.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="text_encoder_2/*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="ae.safetensors"),
    ],
)
ses_fast.enable(pipe)

prompt = "a masterful painting of a young woman in the style of Diego Velázquez"
image = pipe(
    prompt,
    seed=42,
    num_inference_steps=30,
    enable_ses=True,
    ses_reward_model="hps",
    ses_eval_budget=50,
    ses_inference_steps=10,
    # Scores each candidate's foreseen image on its way, and goes on with the better ones alone.
    ses_config=ses_fast.SESConfig(preview=ses_fast.Preview(race="auto")),
)
image.save("flux.png")
print(f"HPSv2 without search {pipe.ses_result.base_score:.4f}, with it {pipe.ses_result.score:.4f}")
