"""The documented flow as users have it, built from installed parts: what ses_fast is compared with.

`diffsynth.utils.ses.ses_search` over previews that go one at a time through the pipeline's own units, scheduler, model
and VAE, then `vae_output_to_image` and a score of the PIL image. Nothing of ses_fast's search, previews or batches. No
handicap: prompts are encoded once and models stay loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffsynth.utils.ses.ses as stock
import torch
from diffsynth.diffusion.base_pipeline import PipelineUnit
from PIL import Image
from torch import Tensor

from ...stopwatch import device_clock

Score = Callable[[Image.Image], float]
STAGES = ("prompt", "denoise", "decode", "reward", "final")


class Flow:
    """One call of a stock pipeline, searched as the documentation says. `seconds` holds the time by stage."""

    def __init__(self, pipe: Any, prompt: str, **call: Any) -> None:
        """call: the pipeline's own arguments, with the preview's num_inference_steps."""
        self.pipe = pipe
        self.seconds = dict.fromkeys(STAGES, 0.0)
        with self.timed("prompt"):
            self.shared, self.posi, self.nega = prepared_inputs(pipe, prompt, **call)
        self.scores: list[float] = []
        self.candidates: list[Tensor] | None = None  # a list, to keep what the search gave to score,
        self.images: list[Image.Image] = []  # and what was scored
        self.pictures: dict[bytes, Image.Image] | None = None  # a dict, to render no noise again that is in it

    @property
    def base(self) -> Tensor:  # [1, C, h, w]
        """The noise of the call; FLUX.2 packs its own into tokens."""
        noise = self.shared["noise"]
        if noise.ndim == 3:
            height, width = self.shared["height"] // 16, self.shared["width"] // 16
            noise = noise.transpose(1, 2).reshape(1, -1, height, width)
        return noise

    def search(self, score: Score, budget: int, popsize: int = 10, k_elites: int = 5, level: int = 4) -> Tensor:
        """The best noise, [1, C, h, w]; draws from torch's global state, as `ses_search` does."""

        def objective(candidate: Tensor) -> float:
            image = self._picture(candidate)
            if self.candidates is not None:
                self.candidates.append(candidate.clone())
                self.images.append(image)
            with self.timed("reward"):
                self.scores.append(score(image))
            return self.scores[-1]

        return stock.ses_search(self.base, objective, budget, popsize, k_elites, "db1", level)

    def _picture(self, noise: Tensor) -> Image.Image:
        if self.pictures is None:
            return self.render(noise)
        key = noise.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if key not in self.pictures:
            self.pictures[key] = self.render(noise)
        return self.pictures[key]

    @torch.no_grad()
    def render(self, noise: Tensor) -> Image.Image:
        with self.timed("denoise"):
            latents = self.denoise(noise)
        with self.timed("decode"):
            return self.pipe.vae_output_to_image(self.decode(latents))

    def final(self, noise: Tensor) -> Image.Image:
        with self.timed("final"):
            return self.pipe.vae_output_to_image(self.decode(self.denoise(noise)))

    @torch.no_grad()
    def denoise(self, noise: Tensor, steps: int | None = None) -> Tensor:
        """As the pipelines' calls do it; only the first `steps`, where given."""
        pipe, shared = self.pipe, dict(self.shared)
        noise = noise if shared["noise"].ndim == 4 else noise.flatten(2).transpose(1, 2)
        shared |= {"noise": noise, "latents": noise}
        pipe.load_models_to_device(pipe.in_iteration_models)
        models = {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        for step, timestep in enumerate(pipe.scheduler.timesteps[:steps]):
            predicted = pipe.cfg_guided_model_fn(
                pipe.model_fn,
                shared["cfg_scale"],
                shared,
                self.posi,
                self.nega,
                **models,
                timestep=timestep[None].to(pipe.device, pipe.torch_dtype),
                progress_id=step,
            )
            shared["latents"] = pipe.step(pipe.scheduler, progress_id=step, noise_pred=predicted, **shared)
        return shared["latents"]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # [1, 3, H, W]
        pipe = self.pipe
        name = "vae_decoder" if hasattr(pipe, "vae_decoder") else "vae"
        pipe.load_models_to_device([name])
        if latents.ndim == 3:
            height, width = self.shared["height"] // 16, self.shared["width"] // 16
            latents = latents.transpose(1, 2).reshape(len(latents), -1, height, width)
        return pipe.vae_decoder(latents) if name == "vae_decoder" else pipe.vae.decode(latents)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = device_clock(self.pipe.device)
        yield
        self.seconds[stage] += device_clock(self.pipe.device) - begin


def prepared_inputs(pipe: Any, prompt: str, **call: Any) -> tuple[dict, dict, dict]:
    """What the pipeline's units make of a call: shared, positive and negative inputs. The scheduler keeps its steps."""
    stop = _Stop()
    pipe.units.append(stop)
    try:
        pipe(prompt, **call)
    except _Prepared as prepared:
        shared, posi, nega = prepared.inputs
        return shared, posi, nega
    finally:
        pipe.units.remove(stop)
    raise RuntimeError("the pipeline did not run its units")


class _Prepared(Exception):
    def __init__(self, *inputs: dict) -> None:
        self.inputs = inputs


class _Stop(PipelineUnit):
    """Ends the call where the units have done their work."""

    def __init__(self) -> None:
        super().__init__(take_over=True)

    def process(self, pipe: Any, inputs_shared: dict, inputs_posi: dict, inputs_nega: dict) -> dict:
        raise _Prepared(inputs_shared, inputs_posi, inputs_nega)
