"""SDXL with diffusers: any scheduler, LoRA and offloading, as without a search.

Needs a GPU and the package: `pip install ".[diffusers,rewards]"` in a clone.
The first run downloads the model and PickScore (3.9 GB).
"""

import diffusers
import torch

import ses_fast

source = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(source, torch_dtype=torch.float16, variant="fp16")
pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
ses_fast.enable(pipe.to("cuda"))

prompt = "a photo of an astronaut riding a horse on mars"
output = pipe(
    prompt,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(42),
    enable_ses=True,
    ses_reward_model="pick",
    ses_eval_budget=50,
    ses_inference_steps=10,
)
output.images[0].save("sdxl.png")
print(f"PickScore without search {pipe.ses_result.base_score:.2f}, with it {pipe.ses_result.score:.2f}")
