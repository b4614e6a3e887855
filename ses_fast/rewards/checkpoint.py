"""Where a reward's files come from: a local folder, the Hub, or ModelScope; and what is said when they do not come."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .._torchvision import declare_torchvision_ops
from ..errors import missing_extra


@dataclass(frozen=True)
class Checkpoint:
    """The weights that a reward is loaded from."""

    name: str  # the reward's, for messages
    weights: str  # a local path or a Hub id
    ids: Mapping[str, str]  # the published ones: see `ses_fast.rewards.Source`

    def folder(self, patterns: Sequence[str], needs: Sequence[str], source: str | None = None) -> Path:
        """The local folder of `source`, which is a path or a Hub id (None: the weights).

        patterns: the files to download of a Hub id ("owner/name"). needs: files, or patterns of names, of which the
        folder must have one.
        Honours HF_HUB_OFFLINE. Raises FileNotFoundError for what is neither here nor on the Hub.
        """
        source = self.weights if source is None else source
        lacking = f"reward {self.name!r} needs {' or '.join(needs)}"
        advice = f'pass a complete local copy: load_reward({self.name!r}, weights="folder")'
        folder = Path(source).expanduser()
        if not folder.exists():
            if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
                raise FileNotFoundError(f"{lacking}: {source} is no file or folder, nor a Hub id")
            import huggingface_hub

            advice = (
                f"where there is a network, and HF_HUB_OFFLINE is not set, run `hf download {source}` once, or {advice}"
            )
            try:
                folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(patterns)))
            except OSError as error:  # the hub's own errors (offline, no network, unknown or gated) are all OSErrors
                raise FileNotFoundError(
                    f"{lacking}: {source} is neither a local folder, nor in the Hugging Face cache, nor to be "
                    f"downloaded now; {advice}"
                ) from error
        if not any(
            file.is_file() for name in needs for file in folder.glob(name)
        ):  # offline, the hub gives a cached folder as it is
            raise FileNotFoundError(f"{lacking}: {folder} has none; {advice}")
        return folder

    @contextmanager
    def reading(self, file: Path) -> Iterator[None]:
        """Turns an error inside into a ValueError (an OSError into an OSError) that says which files to replace, how.

        Each format has errors of its own: safetensors' name no file, torch's advise to run the code in a broken one.
        """
        try:
            yield
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            unsafe = "weights_only" in str(error)
            reason = f"{type(error).__name__}: {'not tensors alone' if unsafe else str(error).strip()[:300]}"
            fetch = (
                f"`hf download {self.ids['weights']} --force-download` replaces the published copy in the Hugging "
                "Face cache"
                if "weights" in self.ids
                else f"delete {modelscope_folder(self.ids['modelscope'])} to have the published copy downloaded again"
            )
            raise (OSError if isinstance(error, OSError) else ValueError)(
                f"reward {self.name!r}: {file}, or a file beside it, is missing, broken or of another model "
                f'({reason}); {fetch}, load_reward({self.name!r}, weights="folder") takes a local one'
            ) from (None if unsafe else error)


def require(*packages: str) -> None:
    """Raises ImportError where a package is missing; call it before importing transformers or diffsynth."""
    for package in packages:
        if find_spec(package) is None:
            raise missing_extra(package, "diffsynth" if package == "diffsynth" else "rewards")
    declare_torchvision_ops()


def modelscope_folder(folder: str) -> Path:
    """Where diffsynth keeps, or would keep, the folder of DiffSynth-Studio/ImageMetrics."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH", "models"), "DiffSynth-Studio", "ImageMetrics", folder)


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or all of its parts `model-00001-of-00004.safetensors` ...; none where one is missing."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    parts = sorted(folder.glob("model-*-of-*.safetensors"))
    return parts if parts and len(parts) == int(parts[0].stem.rpartition("-")[2]) else []


def modelscope_copy(name: str, folder: str) -> Path:
    """The local folder of the copy of a reward that `diffsynth.metrics` uses, downloaded if needed.

    diffsynth's own settings (DIFFSYNTH_MODEL_BASE_PATH, DIFFSYNTH_SKIP_DOWNLOAD and so on) hold. Raises
    FileNotFoundError where it is not here and cannot be downloaded.
    """
    path, failure = modelscope_folder(folder), None
    if not weight_files(path):  # diffsynth asks the network even for files that are here
        require("diffsynth")
        from diffsynth.core import ModelConfig

        try:
            ModelConfig(
                model_id="DiffSynth-Studio/ImageMetrics", origin_file_pattern=f"{folder}/"
            ).download_if_necessary()
        except OSError as error:  # modelscope's own, of the network and of the hub
            failure = error
        if not weight_files(path):
            raise FileNotFoundError(
                f"reward {name!r} needs the weights {path}/model*.safetensors, which cannot be downloaded now; load it "
                "once where there is a network, and DIFFSYNTH_SKIP_DOWNLOAD is not set, or pass a local copy of the "
                f'folder {folder} of DiffSynth-Studio/ImageMetrics: load_reward({name!r}, weights="folder")'
            ) from failure
    return path
