"""Reward models by name: `load_reward`, `unload_rewards`; a scorer of PIL images as a reward: `from_pil`; a
vision-language model on a server: `VLMReward`.

A reward is called as `reward(images, prompt)` and returns one score for each image; a higher score is better.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import torch

from .base import Reward, default_device, default_dtype, torch_as_it_comes
from .checkpoint import Checkpoint, modelscope_copy, modelscope_folder, require, weight_files
from .pil import PILReward, from_pil
from .vlm import VLMReward
from .weighted import WeightedReward, check_weights

__all__ = ["PILReward", "VLMReward", "WeightedReward", "from_pil", "load_reward", "unload_rewards"]

_LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, eq=False)  # the cache's key is the object itself: one under two names is loaded once
class Source:
    """Where a reward's code and weights are."""

    module: str  # of ses_fast.rewards, imported when the reward is loaded
    cls: str
    ids: dict[str, str]  # its Hub ids, and the folder of its ModelScope copy
    gigabytes: float  # to download
    packages: tuple[str, ...] = ("transformers",)

    @property
    def default(self) -> str:
        """The weights where none are named."""
        return self.ids.get("weights", "modelscope")

    @property
    def origin(self) -> str:
        """What is downloaded where no weights are named."""
        if "weights" not in self.ids:
            return f"modelscope: DiffSynth-Studio/ImageMetrics/{self.ids['modelscope']}"
        return f"{self.ids['weights']}/{self.ids['file']}" if "file" in self.ids else self.ids["weights"]

    def missing_packages(self) -> list[str]:
        """Those to install before `load_reward` without weights, which for some are fetched by diffsynth."""
        packages = self.packages if "weights" in self.ids else (*self.packages, "diffsynth")
        return [package for package in dict.fromkeys(packages) if find_spec(package) is None]

    def cached(self) -> bool:
        """Whether `load_reward` without weights has nothing to download."""
        if "weights" not in self.ids:
            return bool(weight_files(modelscope_folder(self.ids["modelscope"])))
        if find_spec("huggingface_hub") is None:
            return False
        from huggingface_hub import try_to_load_from_cache

        files = [(self.ids["weights"], self.ids.get("file", "model.safetensors"))]
        if "processor" in self.ids:
            files.append((self.ids["processor"], "tokenizer.json"))
        return all(isinstance(try_to_load_from_cache(repo, file), str) for repo, file in files)


_HPS = Source(
    "hps",
    "HPSReward",
    {"weights": "xswu/HPSv2", "file": "HPS_v2.1_compressed.pt", "modelscope": "HPSv2"},
    1.97,
    ("open_clip",),
)
REWARDS = {
    "aesthetic": Source("aesthetic", "AestheticReward", {"modelscope": "Aesthetic"}, 1.2),
    "clip": Source(
        "clip",
        "CLIPReward",
        {"weights": _LAION, "processor": _LAION, "modelscope": "CLIP-ViT-H-14-laion2B-s32B-b79K"},
        3.9,
    ),
    "pick": Source(
        "clip",
        "CLIPReward",
        {"weights": "yuvalkirstain/PickScore_v1", "processor": _LAION, "modelscope": "PickScore"},
        3.9,
    ),
    "hps": _HPS,
    "hps_v2.0": Source(
        "hps", "HPSReward", {"weights": "xswu/HPSv2", "file": "HPS_v2_compressed.pt"}, 1.97, ("open_clip",)
    ),
    "hps_v2.1": _HPS,
    "image_reward": Source(
        "image_reward", "ImageRewardReward", {"modelscope": "ImageReward"}, 1.8, ("diffsynth", "transformers")
    ),
    "hps_v3": Source("qwen", "HPSv3Reward", {"modelscope": "HPSv3"}, 16.6, ("diffsynth", "transformers")),
    "unified_reward": Source(
        "qwen", "UnifiedReward", {"modelscope": "UnifiedReward-2.0-qwen35-9b"}, 18.8, ("diffsynth", "transformers")
    ),
}

# The published ids, and the names that people write: the Hub's and ModelScope's without their owner.
_HUB_IDS = {source.ids["weights"]: name for name, source in reversed(REWARDS.items()) if "weights" in source.ids}
_ALIASES = {
    alias.rpartition("/")[2].lower(): name
    for name, source in reversed(REWARDS.items())
    for alias in (name, source.ids.get("weights", name), source.ids.get("modelscope", name))
}

_loaded: dict[tuple, Reward] = {}
_loading = threading.RLock()  # of `_loaded`: threads that ask for one reward load it once


@overload
def load_reward(
    name: str,
    weights: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Reward: ...


@overload
def load_reward(
    name: Mapping[str, float],
    weights: Mapping[str, str | os.PathLike] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> WeightedReward: ...


def load_reward(name: Any, weights: Any = None, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """The reward `name`: an object called as `reward(images, prompt) -> Tensor [n]`.

    name: "pick" (PickScore v1), "clip" (LAION's CLIP ViT-H-14), "hps" or "hps_v2.1", "hps_v2.0" (HPSv2),
        "image_reward" (ImageReward v1), "aesthetic" (LAION's predictor v2, which does not read the prompt), "hps_v3"
        (HPSv3, 7 billion parameters), "unified_reward" (UnifiedReward 2.0, 9 billion, which writes its rating); or the
        Hub id of the published weights, "yuvalkirstain/PickScore_v1", "xswu/HPSv2" (v2.1).
        Or a dict of weights, {"pick": 1.0, "hps": 0.5}: a `WeightedReward` of these members, without a scale, which
        a search over previews measures; see there for use around `evolve`.
    weights: a local folder, a Hub id, or "modelscope" (the copy that diffsynth.metrics uses). None is the
        published one, cached or downloaded. For a dict: a dict, of the names that have others.
    device: None is the GPU, the CPU where there is none. dtype: None is bf16 on a GPU, fp32 on the CPU.
    Loaded once for each (name, weights, device, dtype), until `unload_rewards`; moved back to `device` where
    `to` has moved it. A folder counts by its real path, so files that are replaced in it are read after
    `unload_rewards`.
    Raises ValueError for an unknown name (with the nearest known one) and for weights that are broken or of another
    model, ImportError for a missing package, FileNotFoundError (an OSError) for weights that are neither here nor to
    be downloaded.
    """
    if isinstance(name, Mapping):
        check_weights(name)
        check_names(*name)
        sources = {} if weights is None else weights
        if not isinstance(sources, Mapping) or not sources.keys() <= name.keys():
            raise ValueError(f"weights= of several rewards is a dict of their names, got {weights!r}")
        return WeightedReward({each: load_reward(each, sources.get(each), device, dtype) for each in name}, name)
    name = known_name(name)
    if not isinstance(weights, str | os.PathLike | None):
        raise ValueError(f'weights must be a folder, a Hub id or "modelscope", got {weights!r:.200}')
    source = REWARDS[name]
    device, dtype = default_device(device), default_dtype(device, dtype)
    weights = source.default if weights is None else str(weights)
    place = _place(name, weights)
    key = (source, place, device, dtype)
    with _loading:
        if key not in _loaded:
            require(*source.packages)
            if weights == "modelscope":
                modelscope_copy(name, source.ids["modelscope"])
            reward_class: Any = getattr(import_module(f"{__name__}.{source.module}"), source.cls)
            with torch_as_it_comes(torch.device("cpu")):
                reward = reward_class.load(Checkpoint(name, place, source.ids), dtype)
            reward.name, reward.weights = name, "" if weights == source.default else Path(place).name
            _loaded[key] = reward
        return _loaded[key].to(device)


def _place(name: str, weights: str) -> str:
    """The real path of local weights, which stays the same wherever the process goes; a Hub id as it is."""
    path = Path(weights).expanduser()
    if weights == "modelscope":
        folder = REWARDS[name].ids.get("modelscope")
        if folder is None:
            raise ValueError(f"reward {name!r} has no copy on ModelScope")
        path = modelscope_folder(folder)
    return str(path.resolve()) if weights == "modelscope" or path.exists() else weights


def known_name(name: Any) -> str:
    """The name in `REWARDS` of a name or a published Hub id. Raises ValueError, with the nearest, for any other."""
    if isinstance(name, str):
        if name in REWARDS:
            return name
        if name in _HUB_IDS:
            return _HUB_IDS[name]
    nearest = get_close_matches(str(name).rpartition("/")[2].lower(), _ALIASES, 1)
    hint = f": did you mean {_ALIASES[nearest[0]]!r}?" if nearest else "."
    raise ValueError(f"unknown reward {name!r}{hint} The known ones are {', '.join(sorted(REWARDS))}")


def check_names(*names: Any) -> None:
    """Raises ValueError for a name that is no reward's."""
    for name in names:
        known_name(name)


def unload_rewards() -> None:
    """Forgets every loaded reward and frees its GPU memory; one that the caller still holds goes on, on the CPU."""
    with _loading:
        for reward in _loaded.values():
            reward.to("cpu")
        _loaded.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
