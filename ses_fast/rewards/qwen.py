"""Rewards that are vision-language models: HPSv3, whose head gives a number, and UnifiedReward 2.0, which writes it.

Both run diffsynth's own prompts and preprocessing (`diffsynth.models.hpsv3`, `.unified_reward_2`) on transformers'
networks. The authors' package hpsv3 1.0 cannot be imported beside transformers 5.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .base import Reward
from .checkpoint import Checkpoint, require, weight_files
from .pil import to_pil

FILES = ("*.json", "*.txt", "*.jinja", "model*.safetensors")


class QwenReward(Reward):
    """A model of diffsynth's that takes a prompt and PIL images, `model.model` its network."""

    exact: tuple[str, ...] = ()  # the network's parts that keep their own dtype, by the ends of their names

    def __init__(self, model: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        kept = {name: copy.deepcopy(part) for name, part in model.named_modules() if name.endswith(self.exact)}
        super().__init__(model, device, dtype)
        for name, part in kept.items():
            self.model.set_submodule(name, part.to(self.device).eval().requires_grad_(False))

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Self:
        require("diffsynth", "transformers")
        folder = checkpoint.folder(FILES, ("model.safetensors", "model-*.safetensors"))
        with checkpoint.reading(folder / "model*.safetensors"):
            files = weight_files(folder)
            if not files:
                raise ValueError("a part is missing")
            return cls(cls.build(folder, files, dtype or torch.float32), device="cpu", dtype=dtype)

    @classmethod
    def build(cls, folder: Path, files: list[Path], dtype: torch.dtype) -> Any:
        """diffsynth's model, with these weights and the processor in the folder, on the CPU."""
        raise NotImplementedError

    def encode(self, prompt: str) -> str:
        """The prompt itself, which the model's own processor reads with each image."""
        for sign in self.model.processor.tokenizer.get_added_vocab():
            if sign in prompt:
                raise ValueError(
                    f"the reward {self.name!r} takes {sign!r} for a sign of its own: leave it out of prompts"
                )
        return prompt


class HPSv3Reward(QwenReward):
    """`reward(images, prompt)`: the mean of HPSv3's rating (not its deviation), [n] fp32; see `Reward.__call__`.

    A Qwen2-VL-7B and a head. As its authors have it, the head stays in fp32, and all else is in dtype, the
    frequencies of the positions too.
    """

    exact = ("rm_head",)

    @classmethod
    def build(cls, folder: Path, files: list[Path], dtype: torch.dtype) -> Any:
        from diffsynth.models.hpsv3 import HPSv3Model, HPSv3Qwen2VLRewardModel
        from diffsynth.utils.state_dict_converters.image_metrics import ImageMetricsHPSv3StateDictConverter
        from transformers import AutoProcessor, Qwen2VLConfig

        state = ImageMetricsHPSv3StateDictConverter(read(files))
        config = configuration("image_metrics_hpsv3", files, Qwen2VLConfig, HPSv3Qwen2VLRewardModel.default_config)
        network = fill(HPSv3Qwen2VLRewardModel, config, state, dtype)
        head = {key.removeprefix("rm_head."): value for key, value in state.items() if key.startswith("rm_head.")}
        network.rm_head.float().load_state_dict(head)  # again, because it was rounded to dtype
        processor = AutoProcessor.from_pretrained(
            folder, padding_side="right", local_files_only=True, trust_remote_code=False
        )
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        network.special_token_ids = processor.tokenizer.convert_tokens_to_ids(["<|Reward|>"])
        network.reward_token = "special"
        network.config.pad_token_id = processor.tokenizer.pad_token_id
        return HPSv3Model(network, processor)

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: str,
    ) -> Tensor:  # [n] fp32
        return self.model(encoded, to_pil(images))


class UnifiedReward(QwenReward):
    """`reward(images, prompt)`: the mean of alignment, coherence and style, 1 to 5 each, [n] fp32.

    UnifiedReward 2.0, a Qwen3.5-9B that writes its three scores. An answer without all three is NaN, which no search
    follows: a mean of fewer would be no rating of the same thing. Images are read one by one.
    """

    exact = ("rotary_emb", "rotary_pos_emb")  # whose frequencies transformers keeps in fp32
    max_new_tokens = 1024

    @classmethod
    def build(cls, folder: Path, files: list[Path], dtype: torch.dtype) -> Any:
        from diffsynth.models.unified_reward_2 import UnifiedReward2Model, UnifiedReward2Qwen35ForConditionalGeneration
        from transformers import AutoProcessor, Qwen3_5Config, Qwen3_5ForConditionalGeneration

        def published() -> Any:
            with torch.device("meta"):  # the sizes are written into its __init__
                return UnifiedReward2Qwen35ForConditionalGeneration().model.config

        config = configuration("image_metrics_unified_reward_2", files, Qwen3_5Config, published)
        network = fill(Qwen3_5ForConditionalGeneration, config, read(files), dtype)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return UnifiedReward2Model(network, processor, max_new_tokens=cls.max_new_tokens)

    def score(
        self,
        images: Tensor,  # [n, 3, H, W]
        encoded: str,
    ) -> Tensor:  # [n] fp32
        ratings = self.model(encoded, to_pil(images))
        whole = [all(each[axis] is not None for axis in ("alignment", "coherence", "style")) for each in ratings]
        scores = [each["score"] if all_three else math.nan for each, all_three in zip(ratings, whole, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=self.device)


def read(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of all files by name."""
    from safetensors.torch import load_file

    return {name: value for file in files for name, value in load_file(file).items()}


def configuration(name: str, files: list[Path], own: Any, published: Callable[[], Any]) -> Any:
    """`published()` where the names and shapes are those that diffsynth knows as `name`, else the folder's own."""
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader import hash_model_file

    digest = hash_model_file([str(file) for file in files])
    if any(known["model_name"] == name and known["model_hash"] == digest for known in MODEL_CONFIGS):
        return published()
    if not (files[0].parent / "config.json").is_file():  # transformers would take the published sizes
        raise FileNotFoundError("these are not the published weights, and there is no config.json")
    return own.from_pretrained(files[0].parent)


def fill(network: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The network with these weights. Raises ValueError where they do not fill it, before anything is allocated."""
    with torch.device("meta"):
        places = network(config).state_dict()
    lacking = sorted(name for name in places if name not in state or state[name].shape != places[name].shape)
    if lacking:  # transformers would fill them with random numbers and only log it
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(f"the weights lack {lacking[:3]}{more}, or have them in other sizes")
    return network.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
