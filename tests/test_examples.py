"""The files of examples/, run as they are shown: with small models standing in, smaller images and fewer previews."""

import base64
import importlib
import io
import re
from pathlib import Path

import diffusers
import nbformat
import pytest
import tiny_diffusers
import torch
from nbclient import NotebookClient
from PIL import Image
from tiny import MAKE, brightness
from tiny_any import make as make_any

EXAMPLES = Path(__file__).parents[1] / "examples"
LISTED = importlib.import_module("diffsynth.configs.model_configs").__file__

# script -> (module, class, the small one that stands in)
DIFFSYNTH = {
    "diffsynth_z_image": ("z_image", "ZImagePipeline", MAKE["Z-Image"]),
    "diffsynth_flux": ("flux_image", "FluxImagePipeline", MAKE["FLUX.1"]),
    "diffsynth_flux2": ("flux2_image", "Flux2ImagePipeline", MAKE["FLUX.2-klein"]),
    "diffsynth_qwen_image": ("qwen_image", "QwenImagePipeline", MAKE["Qwen-Image"]),
    "diffsynth_sdxl": (
        "stable_diffusion_xl",
        "StableDiffusionXLPipeline",
        lambda: make_any("stable_diffusion_xl"),
    ),
}
FILES = {  # that DiffSynth's own list does not name, or names otherwise; as its documentation has them
    ("Tongyi-MAI/Z-Image-Turbo", "vae/diffusion_pytorch_model.safetensors"),
    ("black-forest-labs/FLUX.2-klein-4B", "text_encoder/*.safetensors"),
    ("black-forest-labs/FLUX.2-klein-4B", "vae/diffusion_pytorch_model.safetensors"),
}


def small(name: str, *changes: tuple[str, str]) -> str:
    """The script with each text replaced by another; all of them must stand there."""
    code = (EXAMPLES / f"{name}.py").read_text()
    for shown, other in changes:
        assert code.count(shown) == 1, f"{name}.py has no single {shown!r}"
        code = code.replace(shown, other)
    return code


def run(name: str, code: str, monkeypatch, tmp_path) -> dict:
    """The script's names after it has run in an empty folder, where it left one picture."""
    monkeypatch.setattr("ses_fast.rewards.load_reward", load_reward)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), names := {"__name__": "__main__"})
    (picture,) = tmp_path.glob("*.png")
    assert f'"{picture.name}"' in code
    return names


def load_reward(name, *args, **kwargs):
    from ses_fast.rewards import WeightedReward

    if isinstance(name, dict):
        return WeightedReward({each: brightness for each in name}, name)
    return brightness


def test_every_script_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("diff*.py")} == {*DIFFSYNTH, "diffusers_sdxl"}


@pytest.mark.parametrize("name", DIFFSYNTH)
def test_a_script_of_diffsynth_runs(name, monkeypatch, tmp_path, capsys):
    module, cls, make = DIFFSYNTH[name]
    steps = re.findall(r"num_inference_steps=(\d+)", (EXAMPLES / f"{name}.py").read_text())
    previews = {"diffsynth_z_image": 8, "diffsynth_flux2": 4}.get(name, 10)
    code = small(
        name,
        ("    seed=42,\n", "    seed=42,\n    height=64,\n    width=64,\n"),
        ("ses_eval_budget=50", "ses_eval_budget=3"),
        (f"ses_inference_steps={previews}", "ses_inference_steps=2"),
        *((f"    num_inference_steps={count}", "    num_inference_steps=3") for count in steps),
    )
    asked = []

    def from_pretrained(**given):
        asked.append(given)
        return make()

    pipeline = getattr(importlib.import_module(f"diffsynth.pipelines.{module}"), cls)
    monkeypatch.setattr(pipeline, "from_pretrained", from_pretrained)
    names = run(name, code, monkeypatch, tmp_path)
    assert names["pipe"].ses_result.evaluations == 3 and "with it" in capsys.readouterr().out
    (given,) = asked
    assert given["device"] == "cuda"
    listed = Path(LISTED).read_text()
    for config in given["model_configs"]:
        file = config.model_id, config.origin_file_pattern
        assert file in FILES or f'model_id="{file[0]}", origin_file_pattern="{file[1]}"' in listed


def test_the_script_of_diffusers_runs(monkeypatch, tmp_path, capsys):
    code = small(
        "diffusers_sdxl",
        ("num_inference_steps=30", "num_inference_steps=3"),
        ("ses_eval_budget=50", "ses_eval_budget=3"),
        ("ses_inference_steps=10", "ses_inference_steps=2"),
        ('.to("cuda")', ""),
    )
    asked = []

    def from_pretrained(source, **given):
        asked.append((source, given))
        return tiny_diffusers.make("SDXL").pipe

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", from_pretrained)
    names = run("diffusers_sdxl", code, monkeypatch, tmp_path)
    assert asked == [("stabilityai/stable-diffusion-xl-base-1.0", {"torch_dtype": torch.float16, "variant": "fp16"})]
    assert names["pipe"].ses_result.evaluations == 3 and "with it" in capsys.readouterr().out


def test_the_notebook_runs_and_shows_its_pictures(tmp_path):
    """In a kernel of its own, with fewer previews and steps."""
    notebook = nbformat.read(EXAMPLES / "embedded.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear the outputs before a commit"
    changes = {"ses_eval_budget=50": "ses_eval_budget=4", '"ses_eval_budget": 20': '"ses_eval_budget": 3'}
    changes |= {
        "ses_inference_steps=8": "ses_inference_steps=1",
        '"ses_inference_steps": 8': '"ses_inference_steps": 1',
    }
    for shown, other in changes.items():
        (cell,) = [cell for cell in cells if shown in cell.source]
        cell.source = cell.source.replace(shown, other)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    base, answer, plot = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert base.size == answer.size == (256, 256) != plot.size
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    found = re.search(r"reward without search (-?[\d.]+), with it (-?[\d.]+), after 4 previews", text)
    assert found and float(found[2]) >= float(found[1])
    assert re.search(r"with it \{.*'all': (True|False)", text)
    assert "HeldOut(base=" in outputs[-1].data["text/plain"]
