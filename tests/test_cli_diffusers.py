"""`ses-fast generate --model diffusers:SOURCE`, from the command line to the pictures."""

import json

import diffusers
import numpy as np
import pytest
from PIL import Image
from test_diffusers import drawn
from tiny_diffusers import brightness, first, make

from ses_fast import cli, job


def test_a_model_of_diffusers_by_its_source(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    asked, tiny = [], make("SDXL")
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda source, torch_dtype: asked.append(source) or tiny.pipe
    )
    monkeypatch.setattr(job, "load_reward", lambda name, weights: brightness)
    size = ["--height", "32", "--width", "32", "--level", "1"]
    steps = ["--steps", "3", "--preview-steps", "2", "--budget", "3", "--seed", "3"]
    cli.main(["generate", "a cat", "--model", "diffusers:some/folder", *size, *steps, "--out", str(tmp_path)])
    assert asked == ["some/folder"]
    stock = tiny.pipe("a cat", num_inference_steps=3, height=32, width=32, generator=drawn(), output_type="np")
    base = np.array(Image.open(tmp_path / "base.png"))
    assert np.array_equal(base, (first(stock) * 255).round().astype(np.uint8))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["evaluations"] == 3 and found["score"] >= found["base_score"]


def test_an_unknown_model_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["generate", "a cat", "--model", "diffusers:", "--out", str(tmp_path)])
    assert "embedded, z-image-turbo" in capsys.readouterr().err
