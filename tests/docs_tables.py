"""The tables of docs/guides that are made of the pipelines themselves; `make readme-tables` writes them there."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import tiny_any
import tiny_diffusers

from bench.readme_tables import written
from bench.table import lines_of
from ses_fast.pipelines.diffsynth import FAMILIES, family_of
from ses_fast.pipelines.diffsynth.any import AnyImage
from ses_fast.pipelines.diffsynth.unit import PER_CALL_LORAS
from ses_fast.pipelines.diffusers.call import REFUSED, check
from ses_fast.pipelines.diffusers.family import FAMILIES as DIFFUSERS
from ses_fast.pipelines.diffusers.family import Family, denoisers_of
from ses_fast.pipelines.diffusers.memory import COUNTS

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
OF_DIFFSYNTH = (
    *("DiffSynth's class", "previews", "race", "half size"),
    *("compiled", "searched in", "refused by name", "tests"),
)
OF_DIFFUSERS = (
    *("diffusers' class", "previews", "race", "half size"),
    *("compiled", "`Preview(cfg=False)` sets", "refused by name"),
)
LATENT = {"FluxImagePipeline": 8, "Flux2ImagePipeline": 16, "QwenImagePipeline": 8, "ZImagePipeline": 8}
SPECIAL = {
    "Ideogram4Pipeline": "without its own text encoder, which wants a later transformers",
    "JoyAIImagePipeline": "with an `edit_image`, which it needs",
    "Krea2Pipeline": "with another attention kernel than its own, which runs on GPUs alone",
}


def image_pipelines() -> dict[str, type]:
    """The classes of the installed diffsynth whose call makes a picture."""
    found, base = {}, importlib.import_module("diffsynth.diffusion.base_pipeline").BasePipeline
    folder = Path(importlib.import_module("diffsynth.pipelines").__path__[0])
    for module in pkgutil.iter_modules([str(folder)]):
        path = folder / f"{module.name}.py"
        if "vae_output_to_image" not in path.read_text():  # some of the others want packages that are not here
            continue
        names = vars(importlib.import_module(f"diffsynth.pipelines.{module.name}"))
        for name, cls in names.items():
            if inspect.isclass(cls) and issubclass(cls, base) and cls.__module__.endswith(module.name):
                found[name] = cls
    return found


def sides() -> dict[str, int]:
    """The classes without a family of their own that tests search -> a latent's side in pixels."""
    return {type(tiny_any.make(kind)).__name__: tiny_any.KINDS[kind].noise[1] for kind in tiny_any.KINDS}


def diffsynth_classes() -> list[list[str]]:
    others, table = sides(), []
    for name, cls in sorted(image_pipelines().items(), key=lambda each: (each[0] not in FAMILIES, each[0])):
        pipe = cls(device="cpu")
        family = family_of(pipe)
        alone = family is AnyImage
        side = others[name] if alone else LATENT[name]
        refused = [f"`{argument}`" for argument in family.refused]
        if set(PER_CALL_LORAS) & inspect.signature(cls.__call__).parameters.keys():
            refused.append("a LoRA of the call that is not hot-loaded")
        table.append(
            [
                f"`{name}`",
                "one by one" if alone else "together",
                "no" if alone else "yes",
                "yes",
                "yes" if getattr(pipe, "compilable_models", None) else "no",
                "pixels" if side == 1 else f"latents of {side}x{side} pixels",
                ", ".join((["a race"] if alone else []) + refused) or "-",
                SPECIAL.get(name, "small random weights"),
            ]
        )
    return table


def refused_of_diffusers(pipe, family: Family) -> str:
    """What `check` refuses of the arguments that the pipeline's call has, and what a race is refused with."""
    takes = inspect.signature(pipe.__call__).parameters
    refused = []
    for argument, value, words in [*((name, 2, " above 1") for name in COUNTS), *((name, 0.5, "") for name in REFUSED)]:
        if argument not in takes:
            continue
        try:
            check({argument: value}, 1, None)
        except ValueError as error:
            assert argument in str(error)
            refused.append(f"`{argument}`{words}")
    counted = [f"`{name}={none!r}`" for name, (none,) in family.counts_steps.items()]
    refused += [f"a race without {' and '.join(counted)}"] if counted else []
    return ", ".join(refused + ([] if compiles(pipe) else ["`compile=True`"]))


def compiles(pipe) -> bool:
    return all(getattr(denoiser, "_repeated_blocks", None) for denoiser in denoisers_of(pipe))


def diffusers_classes() -> list[list[str]]:
    pipes = {type(pipe).__name__: pipe for pipe in (tiny_diffusers.make(name).pipe for name in tiny_diffusers.MAKE)}
    rows = []
    for name, family in sorted(DIFFUSERS.items()):
        rows.append(
            [
                f"`{name}`",
                "together" if family.together else "one by one",
                "yes",
                "yes",
                "yes" if compiles(pipes[name]) else "no",
                ", ".join(f"`{argument}={value}`" for argument, value in family.without_guidance().items()) or "-",
                refused_of_diffusers(pipes[name], family),
            ]
        )
    return rows


TABLES = {
    "diffsynth.md": lambda: lines_of(OF_DIFFSYNTH, diffsynth_classes()),
    "diffusers.md": lambda: lines_of(OF_DIFFUSERS, diffusers_classes()),
}


def renewed(name: str) -> str:
    """The guide as it should be."""
    return written((GUIDES / name).read_text(), "classes", "\n".join(TABLES[name]()) + "\n")


if __name__ == "__main__":
    for guide in TABLES:
        (GUIDES / guide).write_text(renewed(guide))
