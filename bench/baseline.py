"""What ses_fast is measured against: the documented flow (`Flow`), and HPSv2 as its authors score a picture."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from bench.clip import unit
from ses_fast.pipelines.diffsynth.documented import Flow, prepared_inputs

__all__ = ["Flow", "HPSScore", "prepared_inputs"]


class HPSScore:
    """HPSv2: the cosine, of open_clip's model on a PIL image through `preprocess`, hpsv2's own `image_transform`."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Callable, prompt: str) -> None:
        self.model, self.preprocess = model, preprocess
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        with torch.no_grad():
            self.text = unit(model.encode_text(tokenizer([prompt]).to(self.device)).float())

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> float:
        pixels = self.preprocess(image)[None].to(self.device, self.dtype)
        return (unit(self.model.encode_image(pixels).float()) @ self.text.T).item()
