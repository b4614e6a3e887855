"""The models that a command can name, and what loads each: by a name of ours, or a library's by its files."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ._torchvision import declare_torchvision_ops
from .errors import missing_extra

MODEL_HELP = (
    "embedded, z-image-turbo, diffusers:SOURCE (a Hub id or a folder), or diffsynth:CLASS:FILES with the files of a "
    "class of DiffSynth as ID:PATTERN,PATTERN,... (an id or a folder), and its tokenizer's as tokenizer_config=PATTERN"
)


def model_of(name: str, height: int | None = None, width: int | None = None) -> Callable[[], Any]:
    """What loads the model of that name: it gives a stock pipeline.

    Raises ValueError for a name that is none, for a class that SES cannot search, and for a size that the embedded
    model cannot draw; ImportError where the library is not installed. Loads no weights.
    """
    if name in MODELS:
        if name == "embedded":
            from .embedded.pipeline import check_size

            check_size(height or 1, width or 1)
        return MODELS[name]
    library, _, rest = name.partition(":")
    if library in LIBRARIES and rest:
        return LIBRARIES[library](rest)
    raise ValueError(f"unknown model {name!r}; the known ones are {MODEL_HELP}")


def quiet(pipe: Any) -> dict[str, Any]:
    """The arguments of a call that shows no bar of its own."""
    return {"progress_bar_cmd": _no_bar} if "progress_bar_cmd" in inspect.signature(pipe.__call__).parameters else {}


def _no_bar(steps: Any) -> Any:
    return steps


# ---------------------------------------------------------------- by a name of ours


def _embedded_model() -> Any:
    from .embedded import load_pipeline

    return load_pipeline()


def _z_image_turbo() -> Any:
    parts = "transformer/*.safetensors,text_encoder/*.safetensors,vae/diffusion_pytorch_model.safetensors"
    return model_of(f"diffsynth:ZImagePipeline:Tongyi-MAI/Z-Image-Turbo:{parts}")()


MODELS: dict[str, Callable[[], Any]] = {"embedded": _embedded_model, "z-image-turbo": _z_image_turbo}


# ---------------------------------------------------------------- diffusers


def _diffusers(source: str) -> Callable[[], Any]:
    _check_installed("diffusers")
    return partial(_load_diffusers, source)


def _load_diffusers(source: str) -> Any:
    """Raises ValueError for a class that SES does not know or that makes no picture, before its weights are fetched."""
    declare_torchvision_ops()
    import diffusers

    from .pipelines.diffusers.family import FAMILIES

    name = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
    cls = getattr(diffusers, name, None)
    pictures = [each for each in FAMILIES if not _makes_videos(getattr(diffusers, each))]
    if name not in pictures:
        why = "makes videos" if cls is not None and _makes_videos(cls) else "is none that SES knows"
        raise ValueError(f"{source} is a {name}, which {why}; of diffusers a command takes {', '.join(pictures)}")
    gpu = torch.cuda.is_available()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        source, dtype=torch.bfloat16 if gpu else torch.float32, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if gpu else "cpu")


def _makes_videos(cls: type) -> bool:
    return "num_frames" in inspect.signature(cls.__call__).parameters


# ---------------------------------------------------------------- DiffSynth


# The models without which no class makes an image: DiffSynth loads what it finds, and says nothing of the rest.
PARTS = ("dit", "unet", "text_encoder", "text_encoder_1", "text_encoder_2", "vae", "vae_decoder")


@dataclass(frozen=True)
class Files:
    """One of DiffSynth's `ModelConfig`s: the files of a model or of a tokenizer."""

    source: str  # a folder, or the id of a model that DiffSynth downloads
    pattern: str  # of the files in it; one that ends in "/" is a folder

    def config(self) -> Any:
        """Raises ValueError for a folder that has no such file."""
        from diffsynth.core import ModelConfig

        if not Path(self.source).is_dir():
            return ModelConfig(model_id=self.source, origin_file_pattern=self.pattern)
        found = sorted(glob(str(Path(self.source) / self.pattern)))
        if not found:
            raise ValueError(f"no file in {self.source} is named {self.pattern}")
        return ModelConfig(path=found[0] if len(found) == 1 else found)


def _diffsynth(rest: str) -> Callable[[], Any]:
    class_name, _, files = rest.partition(":")
    models, others = _parsed(files)
    _check_installed("diffsynth")
    cls = _diffsynth_class(class_name)
    _check_arguments(cls, others)
    return partial(_load_diffsynth, cls, models, others)


def _parsed(text: str) -> tuple[list[Files], dict[str, Files]]:
    """(the models' files, those of from_pretrained's other arguments) of "SOURCE:PATTERN,PATTERN,NAME=PATTERN,..."."""
    models, others, source = [], {}, ""
    for part in text.split(","):
        name, equals, rest = part.rpartition("=")
        before, _, pattern = rest.rpartition(":")
        source = before or source
        if not source or not pattern or (equals and not name.isidentifier()):
            raise ValueError(
                f"{part!r} names no files of a model of DiffSynth: write ID:PATTERN with an id or a folder, which may "
                "be left out where it is the one before, or NAME=PATTERN for an argument of from_pretrained, as "
                "stabilityai/stable-diffusion-xl-base-1.0:unet/diffusion_pytorch_model.safetensors,"
                "tokenizer_config=tokenizer/"
            )
        if equals:
            others[name] = Files(source, pattern)
        else:
            models.append(Files(source, pattern))
    if not models:
        raise ValueError(f"{text!r} names no files of a model")
    return models, others


def _diffsynth_class(name: str) -> type:
    """The pipeline's class of that name. Raises ValueError where there is none, and where SES cannot search it."""
    declare_torchvision_ops()
    spec = find_spec("diffsynth")
    assert spec is not None and spec.submodule_search_locations
    classes = {}
    for path in sorted((Path(spec.submodule_search_locations[0]) / "pipelines").glob("*.py")):
        for each in re.findall(r"^class (\w+)\(BasePipeline\)", path.read_text(), re.MULTILINE):
            classes[each] = path.stem
    if name not in classes:
        raise ValueError(f"DiffSynth has no pipeline {name!r}; it has {', '.join(sorted(classes))}")
    from .pipelines.diffsynth import family_of

    cls = getattr(import_module(f"diffsynth.pipelines.{classes[name]}"), name)
    family_of(cls(device="cpu"))  # without weights
    return cls


def _check_arguments(cls: Any, given: Mapping[str, Files]) -> None:
    """Raises ValueError for arguments that its from_pretrained does not take, and where it is left without a tokenizer.

    Some classes name a tokenizer of their own, others leave it open: these fail at the first prompt without one.
    """
    takes = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.from_pretrained).parameters.items()
        if name.endswith("_config")
    }
    for name in given:
        if name not in takes:
            raise ValueError(f"{cls.__name__}.from_pretrained takes no {name}=, but {', '.join(sorted(takes))}")
    readers = [name for name in takes if name.startswith("tokenizer")] or ["processor_config"]
    for name in readers:
        if name in takes and takes[name] is None and name not in given:
            raise ValueError(f"{cls.__name__} reads prompts by files that it does not name itself: add {name}=PATTERN")


def _load_diffsynth(cls: Any, models: list[Files], others: Mapping[str, Files]) -> Any:
    configs = [each.config() for each in models]
    arguments = {name: files.config() for name, files in others.items()}
    try:
        pipe = cls.from_pretrained(model_configs=configs, **arguments)
    except OSError as error:
        ids = {config.model_id for config in configs if config.path is None}
        raise OSError(
            f"cannot load {', '.join(sorted(ids)) or cls.__name__}: no copy in ./models (or DIFFSYNTH_MODEL_BASE_PATH) "
            f"and none to be downloaded now ({type(error).__name__}). Download it once where there is a network"
        ) from error
    missing = [name for name in PARTS if getattr(pipe, name, pipe) is None]
    if missing == ["text_encoder"] and getattr(pipe, "text_encoder_qwen3", None) is not None:  # FLUX.2 klein's
        missing = []
    if missing:
        raise ValueError(f"none of the files named holds the {', '.join(missing)} of {cls.__name__}: name those too")
    return pipe


def _check_installed(package: str) -> None:
    if find_spec(package) is None:
        raise missing_extra(package, package)


LIBRARIES: dict[str, Callable[[str], Callable[[], Any]]] = {"diffsynth": _diffsynth, "diffusers": _diffusers}
