"""Qwen-Image with DiffSynth-Studio: a search by two rewards, and a third that only judges.

Needs a GPU and the package: `pip install ".[diffsynth,rewards]"` in a clone.
The first run downloads the model and the rewards (10 GB).
"""

import torch
from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline

import ses_fast

model = "Qwen/Qwen-Image"
pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=model, origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="text_encoder/model*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id=model, origin_file_pattern="tokenizer/"),
)
ses_fast.enable(pipe)

prompt = "springtime in the style of Paul Delvaux"
image = pipe(
    prompt,
    seed=42,
    num_inference_steps=40,
    enable_ses=True,
    ses_reward_model={"pick": 1.0, "hps": 1.0},
    ses_eval_budget=50,
    ses_inference_steps=10,
    # CFG doubles the cost of a preview. Whether previews without it rank alike, `ses-fast calibrate` says.
    ses_config=ses_fast.SESConfig(preview=ses_fast.Preview(cfg=False), report_rewards=["clip"]),
)
image.save("qwen_image.png")
judged = pipe.ses_result.held_out["clip"]
print(f"CLIP, which the search did not see: {judged.base:.2f} without search, {judged.answer:.2f} with it")
