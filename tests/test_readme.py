"""What the README says of DiffSynth's pipelines: its table, which this file prints where it is run, and its example."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import torch
from tiny import brightness
from tiny_any import KINDS, make

from ses_fast.pipelines.diffsynth import FAMILIES, family_of
from ses_fast.pipelines.diffsynth.any import AnyImage
from ses_fast.pipelines.diffsynth.unit import PER_CALL_LORAS

README = Path(__file__).parents[1] / "README.md"
HEAD = ("DiffSynth's class", "previews", "race", "half size", "compiled", "searched in", "refused by name", "tests")
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
    return {type(make(kind)).__name__: KINDS[kind].noise[1] for kind in KINDS}


def rows() -> list[tuple[str, ...]]:
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
            (
                f"`{name}`",
                "one by one" if alone else "together",
                "no" if alone else "yes",
                "yes",
                "yes" if getattr(pipe, "compilable_models", None) else "no",
                "pixels" if side == 1 else f"latents of {side}x{side} pixels",
                ", ".join((["a race"] if alone else []) + refused) or "-",
                SPECIAL.get(name, "small random weights"),
            )
        )
    return table


def lines() -> list[str]:
    bar = ["---"] * len(HEAD)
    return [f"| {' | '.join(row)} |" for row in (HEAD, bar, *rows())]


def test_the_readme_has_a_row_for_every_image_pipeline_of_the_installed_diffsynth():
    assert "\n".join(lines()) in README.read_text(), "run this file, and put what it prints into README.md"


def test_the_example_runs_as_it_is_shown(monkeypatch, tmp_path):
    """With small weights in place of SDXL's, a smaller image and fewer previews."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example = next(code for code in examples if "diffsynth.pipelines.stable_diffusion_xl" in code)
    for shown, small in (("1024", "64"), ("30", "3"), ("50", "3"), ("10)", "2)")):
        assert shown in example
        example = example.replace(shown, small)
    cls = importlib.import_module("diffsynth.pipelines.stable_diffusion_xl").StableDiffusionXLPipeline
    asked = []
    monkeypatch.setattr(cls, "from_pretrained", lambda *parts: asked.append(parts) or make("stable_diffusion_xl"))
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda *names, **options: brightness)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), names := {})
    dtype, device, weights, *tokenizers = asked[0]
    assert (dtype, device) == (torch.float16, "cuda") and len(weights) == 4
    assert [config.origin_file_pattern for config in tokenizers] == ["tokenizer/", "tokenizer_2/"]
    assert {config.model_id for config in (*weights, *tokenizers)} == {"stabilityai/stable-diffusion-xl-base-1.0"}
    assert names["pipe"].ses_result.evaluations == 3 and Path("fox.png").exists()


if __name__ == "__main__":
    print("\n".join(lines()))
