"""Which packages are installed, and in which version."""

from importlib import metadata

# an optional package -> the extra that installs it
PACKAGES = {
    "triton": "triton",
    "diffsynth": "diffsynth",
    "diffusers": "diffusers",
    "torchvision": "diffsynth",
    "transformers": "rewards",
    "open_clip_torch": "rewards",
    "openai": "vlm",
    "PyWavelets": "wavelets",
    "matplotlib": "plots",
}


def versions() -> dict[str, str | None]:
    """The installed version of each package; torch's says for which CUDA, the others are not imported."""
    import torch

    found: dict[str, str | None] = {"torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
