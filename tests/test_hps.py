"""HPSv2 against its authors' own package, `hpsv2.img_score.score`, on the same small random checkpoint."""

import copy
import importlib.util
import json
import pickle
import shutil
import traceback
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import spearmanr
from test_rewards import make_images

import ses_fast
from ses_fast.rewards.hps import HPSReward

open_clip = pytest.importorskip("open_clip")

TOLERANCE = {"stock": 1e-5}
PROMPT = "two red squares left of three blue rings"
SMALL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    (folder / "hps-small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder / "hps-small.json")
    torch.manual_seed(0)
    model = open_clip.create_model("hps-small")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def img_score(tmp_path_factory):
    """hpsv2's scorer with a small model of its own. Its wheel lacks the vocabulary, which open_clip has."""
    spec = importlib.util.find_spec("hpsv2")
    if spec is None or importlib.util.find_spec("clint") is None:
        pytest.skip("needs pip install --no-deps hpsv2==1.2.0, and clint")
    folder = tmp_path_factory.mktemp("hpsv2")
    shutil.copytree(Path(spec.origin).parent, folder / "hpsv2")
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(Path(open_clip.__file__).parent / vocabulary, folder / "hpsv2/src/open_clip" / vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("HPS_ROOT", str(folder / "root"))
        from hpsv2 import img_score
        from hpsv2.src.open_clip import model, transform

        preprocess = transform.image_transform(64, is_train=False, resize_longest_max=True)
        img_score.model_dict = {"model": model.CLIP(**SMALL, output_dict=True), "preprocess_val": preprocess}
        img_score.device = "cpu"
        yield img_score


def stock_scores(img_score, checkpoint, images, prompt):
    pixels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    scores = img_score.score([Image.fromarray(image) for image in pixels], prompt, str(checkpoint), "v2.1")
    return torch.tensor([float(score) for score in scores])


@pytest.mark.filterwarnings("ignore")  # of torch.cuda.amp, in hpsv2
@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(128, 128, id="square"),
        pytest.param(96, 160, id="wide"),
        pytest.param(167, 93, id="tall-odd"),
        pytest.param(64, 64, id="already-the-model's-size"),
        pytest.param(40, 50, id="smaller-than-the-model's"),
    ],
)
def test_equals_the_authors_package(img_score, checkpoint, height, width):
    images = make_images(height, width)
    scores = HPSReward.from_file(checkpoint, "hps-small", device="cpu")(images, PROMPT)
    assert scores.std() > 100 * TOLERANCE["stock"]  # else nothing is compared
    expected = stock_scores(img_score, checkpoint, images, PROMPT)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE["stock"], rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("", id="empty"),
        pytest.param("a cat", id="short"),
        pytest.param("A  Cat\n IN the Rain &amp; 3.5mm\u2019s!", id="case-spaces-and-entities"),
        pytest.param("many words " * 60, id="over-77-tokens"),
        pytest.param("Ein Bär im Schnee, 雪の中の熊 🐻", id="non-english"),
    ],
)
def test_equals_the_authors_package_for_prompts(img_score, checkpoint, prompt):
    images = make_images(72, 72)
    scores = HPSReward.from_file(checkpoint, "hps-small", device="cpu")(images, prompt)
    expected = stock_scores(img_score, checkpoint, images, prompt)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE["stock"], rtol=0)


def test_a_prompt_that_is_cut_is_warned_of(checkpoint):
    reward = HPSReward.from_file(checkpoint, "hps-small", device="cpu")
    with pytest.warns(UserWarning, match="reads 77 tokens and the prompt has 80: it ignores 'cat cat dog'"):
        reward(make_images(64, 64), "cat " * 77 + "dog")
    assert reward.dropped("cat " * 75) == (77, 77, "")


def test_safetensors_score_as_the_checkpoint_does(checkpoint, tmp_path):
    """The copy on ModelScope has the same keys in a safetensors file."""
    save_file(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "model.safetensors")
    images = make_images(64, 64)
    a, b = (HPSReward.from_file(f, "hps-small", device="cpu") for f in (checkpoint, tmp_path / "model.safetensors"))
    assert torch.equal(a(images, PROMPT), b(images, PROMPT))


def test_bf16_ranks_as_fp32_does(checkpoint):
    images = torch.cat([make_images(64 + i, 64 + i)[:, :, :64, :64] for i in range(13)])[:50]
    images = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    full, half = (
        HPSReward.from_file(checkpoint, "hps-small", device="cpu", dtype=dtype)(images, PROMPT)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and len(half.unique()) > 45  # the cosine is not rounded to bf16
    assert spearmanr(full, half).statistic >= 0.98


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param("hps", "HPS_v2.1_compressed.pt", id="2.1-is-the-default"),
        pytest.param("hps_v2.1", "HPS_v2.1_compressed.pt", id="2.1"),
        pytest.param("hps_v2.0", "HPS_v2_compressed.pt", id="2.0"),
        pytest.param("hps", "model.safetensors", id="modelscope"),
    ],
)
def test_each_name_finds_its_own_file_in_a_folder(monkeypatch, tmp_path, name, file):
    found = []
    monkeypatch.setattr(HPSReward, "from_file", lambda path, **_: found.append(path) or torch.nn.Identity())
    for other in ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt", "model.safetensors"):
        if other == file or file != "model.safetensors":
            (tmp_path / other).touch()
    ses_fast.load_reward(name, tmp_path, "cpu")
    assert found == [tmp_path / file]


@pytest.fixture
def small_vit_h_14(monkeypatch, tmp_path_factory):
    """The network that open_clip knows as ViT-H-14 is a small one: the rewards load by name, as a user's."""
    for registry in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):  # put back afterwards
        monkeypatch.setattr(open_clip.factory, registry, copy.copy(getattr(open_clip.factory, registry)))
    folder = tmp_path_factory.mktemp("small")
    (folder / "ViT-H-14.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder / "ViT-H-14.json")
    yield
    ses_fast.unload_rewards()


@pytest.mark.parametrize("name", ["hps", "hps_v2.1", "hps_v2.0"])
def test_loads_a_local_folder_or_file(small_vit_h_14, checkpoint, tmp_path, name):
    file = tmp_path / ("HPS_v2_compressed.pt" if name == "hps_v2.0" else "HPS_v2.1_compressed.pt")
    shutil.copy(checkpoint, file)
    images = make_images(80, 64)
    expected = HPSReward.from_file(checkpoint, "hps-small", device="cpu")(images, PROMPT)
    for weights in (tmp_path, file):
        assert torch.equal(ses_fast.load_reward(name, weights, "cpu")(images, PROMPT), expected)


def test_two_names_of_one_checkpoint_are_loaded_once(small_vit_h_14, checkpoint):
    reward = ses_fast.load_reward("hps", checkpoint, "cpu")
    assert ses_fast.load_reward("hps_v2.1", checkpoint, "cpu") is reward
    assert ses_fast.load_reward("hps_v2.0", checkpoint, "cpu") is not reward


@pytest.mark.parametrize("name", ["hps", "hps_v2.1"])
def test_loads_the_modelscope_copy(small_vit_h_14, monkeypatch, checkpoint, tmp_path, name):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    folder = tmp_path / "DiffSynth-Studio/ImageMetrics/HPSv2"
    folder.mkdir(parents=True)
    save_file(torch.load(checkpoint, weights_only=True)["state_dict"], folder / "model.safetensors")
    images = make_images(64, 64)
    expected = HPSReward.from_file(checkpoint, "hps-small", device="cpu")(images, PROMPT)
    assert torch.equal(ses_fast.load_reward(name, "modelscope", "cpu")(images, PROMPT), expected)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ses_fast.load_reward("hps", tmp_path, "cpu")
    for part in ("'hps' needs HPS_v2.1_compressed.pt", str(tmp_path), "weights="):
        assert part in str(caught.value)


def with_code(file):
    torch.save({"state_dict": {}, "code": types.SimpleNamespace()}, file)


def cut_off(file):
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        pytest.param("HPS.pt", lambda file: file.write_bytes(b"zz"), "UnpicklingError", id="no-checkpoint"),
        pytest.param("HPS.pt", lambda file: file.write_text("abc"), "IndexError", id="a-text"),
        pytest.param("HPS.pt", lambda file: torch.save({}, file), "StopIteration", id="empty"),
        pytest.param("HPS.pt", cut_off, "RuntimeError", id="cut-off"),
        pytest.param("HPS.pt", with_code, "UnpicklingError: not tensors alone", id="with-code"),
        pytest.param("HPS.safetensors", lambda file: file.write_bytes(b"xx"), "SafetensorError", id="safetensors"),
    ],
)
def test_a_broken_checkpoint_is_named_with_what_to_do(small_vit_h_14, tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as caught:
        ses_fast.load_reward("hps", tmp_path / name, "cpu")
    for part in ("'hps'", str(tmp_path / name), "`hf download xswu/HPSv2 --force-download`", "weights="):
        assert part in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert "Re-running" not in shown  # torch advises to run the code in the file


def test_weights_of_another_model_are_refused(tmp_path, checkpoint):
    torch.save({"state_dict": {"logit_scale": torch.ones([])}}, tmp_path / "HPS.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        HPSReward.from_file(tmp_path / "HPS.pt", "hps-small", device="cpu")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": {}, "code": types.SimpleNamespace()}, tmp_path / "HPS.pt")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        HPSReward.from_file(tmp_path / "HPS.pt", "hps-small", device="cpu")
