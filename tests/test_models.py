"""The models that a command names: of diffusers by their folder, of DiffSynth by their class and files."""

import inspect
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffsynth.pipelines.z_image import ZImagePipeline
from PIL import Image
from test_diffusers import drawn
from tiny_any import make as tiny_diffsynth
from tiny_diffusers import brightness, first, make

from ses_fast import SESConfig, cli, commands, job, models

SDXL = "diffsynth:StableDiffusionXLPipeline:stabilityai/stable-diffusion-xl-base-1.0"
TOKENIZERS = "tokenizer_config=tokenizer/,tokenizer_2_config=tokenizer_2/"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors,vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def asked(monkeypatch):
    """What StableDiffusionXLPipeline.from_pretrained is called with; it gives a tiny one."""
    calls = []
    own = StableDiffusionXLPipeline.from_pretrained

    def from_pretrained(model_configs, tokenizer_config=None, tokenizer_2_config=None):
        calls.append(SimpleNamespace(models=model_configs, tokenizer=tokenizer_config, tokenizer_2=tokenizer_2_config))
        return tiny_diffsynth("stable_diffusion_xl")

    from_pretrained.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", staticmethod(from_pretrained))
    return calls


def named(config):
    return config.path or (config.model_id, config.origin_file_pattern)


# ---------------------------------------------------------------- DiffSynth


def test_files_of_one_or_several_ids(asked):
    models.model_of(f"{SDXL}:unet/a.safetensors,vae/b.safetensors,some/other:c*.safetensors,d.bin,{TOKENIZERS}")()
    ids = ["stabilityai/stable-diffusion-xl-base-1.0"] * 2 + ["some/other"] * 2
    patterns = ["unet/a.safetensors", "vae/b.safetensors", "c*.safetensors", "d.bin"]
    assert [named(config) for config in asked[0].models] == list(zip(ids, patterns, strict=True))
    assert named(asked[0].tokenizer) == ("some/other", "tokenizer/")
    assert named(asked[0].tokenizer_2) == ("some/other", "tokenizer_2/")
    models.model_of(f"{SDXL}:u,tokenizer_config=other/id:t/,tokenizer_2_config=u/")()
    assert named(asked[1].tokenizer) == ("other/id", "t/") and named(asked[1].tokenizer_2) == ("other/id", "u/")


def test_files_of_a_folder(asked, tmp_path):
    names = (
        "unet/1.safetensors",
        "unet/2.safetensors",
        "vae/v.safetensors",
        "tokenizer/vocab.json",
        "tokenizer_2/v.json",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    models.model_of(f"diffsynth:StableDiffusionXLPipeline:{tmp_path}:unet/*.safetensors,vae/*,{TOKENIZERS}")()
    unet, vae = (config.path for config in asked[0].models)
    assert unet == [f"{tmp_path}/unet/1.safetensors", f"{tmp_path}/unet/2.safetensors"]
    assert vae == f"{tmp_path}/vae/v.safetensors" and asked[0].tokenizer.path == f"{tmp_path}/tokenizer"
    load = models.model_of(f"diffsynth:StableDiffusionXLPipeline:{tmp_path}:unet/*.bin,{TOKENIZERS}")
    with pytest.raises(ValueError, match=r"no file in .* is named unet/\*\.bin"):
        load()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffsynth:", "unknown model"),
        ("sdxl", "diffusers:SOURCE"),
        ("diffsynth:StableDiffusionXLPipeline", "names no files"),
        ("diffsynth:StableDiffusionXLPipeline:stabilityai/sdxl", "ID:PATTERN"),
        (f"{SDXL}:unet/a.safetensors,,{TOKENIZERS}", "names no files"),
        (f"{SDXL}:{TOKENIZERS}", "names no files of a model"),
        (f"diffsynth:StableDiffusionXXL:id:{WEIGHTS}", "no pipeline 'StableDiffusionXXL'.*StableDiffusionXLPipeline"),
        (f"diffsynth:WanVideoPipeline:id:{WEIGHTS}", "WanVideoPipeline: its call makes no picture"),
        (f"{SDXL}:{WEIGHTS},{TOKENIZERS},processor_config=p/", "takes no processor_config=, but tokenizer_2_config"),
        (f"{SDXL}:{WEIGHTS},tokenizer_config=tokenizer/", "add tokenizer_2_config=PATTERN"),
        (f"diffsynth:BooguImagePipeline:id:{WEIGHTS}", "add processor_config=PATTERN"),
    ],
)
def test_what_names_no_model_is_refused_before_anything_is_loaded(name, words):
    with pytest.raises(ValueError, match=words):
        models.model_of(name)


def test_a_model_that_was_not_named_is_missed(monkeypatch):
    pipe = tiny_diffsynth("stable_diffusion_xl")
    pipe.vae = None  # as from_pretrained leaves it
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", staticmethod(lambda **configs: pipe))
    load = models.model_of(f"{SDXL}:unet/a.safetensors")
    with pytest.raises(ValueError, match="holds the vae of StableDiffusionXLPipeline"):
        load()
    klein = SimpleNamespace(dit=1, vae=1, text_encoder=None, text_encoder_qwen3=1)
    monkeypatch.setattr(Flux2ImagePipeline, "from_pretrained", staticmethod(lambda **configs: klein))
    assert models.model_of("diffsynth:Flux2ImagePipeline:id:a")() is klein


def test_a_model_that_cannot_be_downloaded(monkeypatch):
    def offline(**configs):
        raise ConnectionError("no network")

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", staticmethod(offline))
    with pytest.raises(OSError, match=r"cannot load Tongyi-MAI/Z-Image-Turbo: no copy in \./models"):
        models.model_of("z-image-turbo")()


def test_z_image_turbo_is_loaded_from_its_published_files(monkeypatch):
    calls = []

    def from_pretrained(model_configs):
        calls.append(model_configs)
        return SimpleNamespace()

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", staticmethod(from_pretrained))
    models.model_of("z-image-turbo")()
    assert [named(config) for config in calls[0]] == [
        ("Tongyi-MAI/Z-Image-Turbo", "transformer/*.safetensors"),
        ("Tongyi-MAI/Z-Image-Turbo", "text_encoder/*.safetensors"),
        ("Tongyi-MAI/Z-Image-Turbo", "vae/diffusion_pytorch_model.safetensors"),
    ]


# ---------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl")
    make("SDXL").pipe.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WanPipeline", "some/model is a WanPipeline, which makes videos"),
        ("StableDiffusionUpscalePipeline", "is none that SES knows; .*StableDiffusionXLPipeline"),
        ("NoSuchPipeline", "is none that SES knows"),
    ],
)
def test_another_class_is_refused_before_its_weights_are_fetched(name, words, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda source: {"_class_name": name})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=words):
        models.model_of("diffusers:some/model")()


def test_a_folder_without_a_pipeline(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(job, "load_reward", lambda name, weights: brightness)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "a cat", "--model", f"diffusers:{tmp_path}", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "model_index.json" in error and error.count("\n") == 1


# ---------------------------------------------------------------- the commands

OPTIONS = ["--steps", "3", "--height", "32", "--width", "32"]


@pytest.fixture(params=["diffusers", "diffsynth"])
def model(request, folder, asked, monkeypatch):
    for module in (job, commands):
        monkeypatch.setattr(module, "load_reward", lambda name, weights: brightness)
    return f"diffusers:{folder}" if request.param == "diffusers" else f"{SDXL}:{WEIGHTS},{TOKENIZERS}"


def test_generate(model, folder, tmp_path):
    pytest.importorskip("matplotlib")
    search = ["--preview-steps", "2", "--budget", "3", "--seed", "3", "--level", "1"]
    cli.main(["generate", "a cat", "--model", model, *OPTIONS, *search, "--out", str(tmp_path)])
    base = np.array(Image.open(tmp_path / "base.png"))
    if model.startswith("diffusers"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        stock = pipe("a cat", num_inference_steps=3, height=32, width=32, generator=drawn(), output_type="np")
        assert np.array_equal(base, (first(stock) * 255).round().astype(np.uint8))
    else:
        pipe = tiny_diffsynth("stable_diffusion_xl")
        assert np.array_equal(base, np.array(pipe("a cat", num_inference_steps=3, height=32, width=32, seed=3)))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["evaluations"] == 3 and found["score"] >= found["base_score"]
    assert found["settings"]["model"] == model


def test_batch(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\na blue owl\n")
    search = ["--preview-steps", "2", "--budget", "2", "--level", "1"]
    prompts, out = str(tmp_path / "prompts.txt"), tmp_path / "out"
    cli.main(["batch", prompts, "--model", model, *OPTIONS, *search, "--out", str(out)])
    assert json.loads((out / "summary.json").read_text())["search"]["count"] == 2


def test_compare(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox\na blue owl\n")
    study = ["--methods", "reference,random,ses,best of N raced", "--budgets", "2,4", "--seeds", "1"]
    study += ["--workers", "1", "--rounds", "1"]
    prompts, out = str(tmp_path / "prompts.txt"), tmp_path / "out"
    cli.main(["compare", prompts, "--model", model, *OPTIONS, *study, "--out", str(out)])
    times = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
    refused = {row["method"] for row in times if "refused" in row}
    assert refused == {"reference"} if model.startswith("diffusers") else refused == {"best of N raced"}
    figures = json.loads((out / "compare.json").read_text())
    assert {"random", "ses"} <= figures["tasks"]["pick"]["odd"]["methods"].keys()


def test_calibrate(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox")
    prompts, out = str(tmp_path / "prompts.txt"), tmp_path / "ses.json"
    cli.main(["calibrate", prompts, "--model", model, *OPTIONS, "--noises", "3", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "# Previews against full fidelity" in printed and "without guidance" in printed
    SESConfig.from_file(out)
    assert ("x0 after" in printed) == model.startswith("diffusers")
