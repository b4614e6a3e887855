"""FLUX.2-klein with DiffSynth-Studio: its four steps are few enough for previews with all of them.

Needs a GPU and the package: `pip install ".[diffsynth,rewards]"` in a clone.
The first run downloads the model and PickScore (3.9 GB).
FLUX.2-dev is the same code with "black-forest-labs/FLUX.2-dev", 30 steps and previews of 10.
"""

import torch
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline, ModelConfig

import ses_fast

model = "black-forest-labs/FLUX.2-klein-4B"
pipe = Flux2ImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=model, origin_file_pattern="text_encoder/*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="transformer/*.safetensors"),
        ModelConfig(model_id=model, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id=model, origin_file_pattern="tokenizer/"),
)
ses_fast.enable(pipe)

prompt = "a hermit crab that wears a soda can as its shell, on a sunlit beach, macro photograph"
image = pipe(
    prompt,
    seed=42,
    num_inference_steps=4,
    enable_ses=True,
    ses_reward_model="pick",
    ses_eval_budget=50,
    ses_inference_steps=4,
)
image.save("flux2.png")
print(f"PickScore without search {pipe.ses_result.base_score:.2f}, with it {pipe.ses_result.score:.2f}")
