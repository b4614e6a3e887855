"""The rewards against the code that their authors publish."""

import copy
import json
import math
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from scipy.stats import spearmanr
from tiny_clip import PILImageProcessor, byte_tokenizer, save_tiny_clip, tiny_clip, transformers

import ses_fast
from ses_fast.rewards import REWARDS, known_name
from ses_fast.rewards.clip import VIT_H_14, CLIPReward, read_preprocessing
from ses_fast.rewards.pil import of_pil, to_pil

TOLERANCE = {"stock": 1e-4, "batch": 1e-4}
PROMPT = "two red squares left of three blue rings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folder_224(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip_224"), image_size=224, eos_token_id=2)


@pytest.fixture(autouse=True)
def unload():
    yield
    ses_fast.unload_rewards()


def make_images(height, width, dtype=torch.float32):
    """Noise, a smooth ramp, hard edges of one pixel and of many: [4, 3, height, width]."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    checks = ((rows + columns) % 2 * 2.0 - 1).expand(3, -1, -1)
    blocks = torch.stack([(rows // a + columns // b) % 2 for a, b in ((9, 7), (5, 9999), (9999, 3))])
    noise = torch.rand(3, height, width, generator=generator) * 2 - 1
    return torch.stack([noise, torch.stack([x, y, x * y]), checks, blocks * 2.0 - 1]).to(dtype)


def stock_scores(folder, images, prompt):
    """logits_per_image of CLIPModel on what CLIPProcessor makes of PIL images."""
    pixels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    processor = transformers.CLIPProcessor(
        image_processor=PILImageProcessor.from_pretrained(folder),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
    )
    inputs = processor(
        text=[prompt],
        images=[Image.fromarray(image) for image in pixels],
        padding=True,
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**inputs).logits_per_image[:, 0]


def assert_stock(scores, folder, images, prompt):
    torch.testing.assert_close(scores, stock_scores(folder, images, prompt), atol=TOLERANCE["stock"], rtol=0)


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
@pytest.mark.parametrize("name", ["clip", "pick"])
def test_equals_the_stock_path(folder, name, height, width):
    images = make_images(height, width)
    scores = ses_fast.load_reward(name, folder, "cpu")(images, PROMPT)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    assert scores.std() > 1  # else nothing is compared
    assert_stock(scores, folder, images, PROMPT)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(256, 256, id="square"),
        pytest.param(240, 333, id="wide-odd"),
        pytest.param(128, 100, id="smaller-than-the-model's"),
    ],
)
def test_equals_the_stock_path_at_224(folder_224, height, width):
    images = make_images(height, width)
    scores = ses_fast.load_reward("clip", folder_224, "cpu")(images, PROMPT)
    assert_stock(scores, folder_224, images, PROMPT)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("", id="empty"),
        pytest.param("a cat", id="short"),
        pytest.param("A  Cat\n IN the Rain, 3.5mm!", id="case-and-spaces"),
        pytest.param("many words " * 40, id="over-77-tokens"),
        pytest.param("Ein Bär im Schnee, 雪の中の熊 🐻", id="non-english"),
        pytest.param("the end <|endoftext|> goes on", id="end-token-inside"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "folder_224"])  # the end token by its id; by being the largest
def test_equals_the_stock_path_for_prompts(request, kind, prompt):
    folder = request.getfixturevalue(kind)
    images = make_images(72, 72)
    assert_stock(ses_fast.load_reward("pick", folder, "cpu")(images, prompt), folder, images, prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_any_float_dtype_are_quantised_as_the_pipeline_does(folder, dtype):
    images = make_images(96, 96, dtype)
    scores = ses_fast.load_reward("clip", folder, "cpu")(images, PROMPT)
    assert_stock(scores, folder, images, PROMPT)


def test_a_batch_scores_as_one_by_one(folder):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(96, 96)
    alone = torch.cat([reward(image[None], PROMPT) for image in images])
    torch.testing.assert_close(reward(images, PROMPT), alone, atol=TOLERANCE["batch"], rtol=0)


def test_bf16_ranks_as_fp32_does(folder):
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([make_images(64 + i, 64 + i)[:, :, :64, :64] for i in range(13)])[:50]
    images = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    full = ses_fast.load_reward("clip", folder, "cpu")(images, PROMPT)
    half = ses_fast.load_reward("clip", folder, "cpu", torch.bfloat16)(images, PROMPT)
    assert half.dtype == torch.float32
    assert len(half.unique()) > 45  # the cosine is not rounded to bf16
    assert spearmanr(full, half).statistic >= 0.98


def test_bf16_keeps_the_logit_scale(folder):
    reward = ses_fast.load_reward("clip", folder, "cpu", torch.bfloat16)
    assert reward.scale == pytest.approx(100, rel=1e-6)  # bf16(log 100) would make it 98.9


def test_the_prompt_is_encoded_once_until_it_changes(folder):
    reward, images, calls = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64), []
    handle = reward.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    first = [reward(images, PROMPT) for _ in range(3)]
    other = reward(images, "a cat")
    again = reward(images, PROMPT)
    handle.remove()
    assert len(calls) == 3
    assert torch.equal(first[0], first[2]) and torch.equal(first[0], again)
    assert not torch.equal(first[0], other)


def test_no_gradient_is_recorded(folder):
    scores = ses_fast.load_reward("clip", folder, "cpu")(make_images(64, 64).requires_grad_(), PROMPT)
    assert not scores.requires_grad


def test_the_user_s_images_are_left_alone(folder):
    images = make_images(64, 64)
    before = images.clone()
    ses_fast.load_reward("clip", folder, "cpu")(images, PROMPT)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        pytest.param(torch.zeros(3, 8, 8), "x", r"shape \(n, 3, H, W\)", id="no-batch"),
        pytest.param(torch.zeros(1, 4, 8, 8), "x", r"shape \(n, 3, H, W\)", id="four-channels"),
        pytest.param(torch.zeros(1, 3, 1, 8, 8), "x", r"shape \(n, 3, H, W\)", id="video"),
        pytest.param(torch.zeros(0, 3, 8, 8), "x", "n > 0", id="empty-batch"),
        pytest.param(torch.zeros(1, 3, 0, 8), "x", r"shape \(n, 3, H, W\)", id="no-rows"),
        pytest.param(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "x", "float tensor.*uint8", id="uint8"),
        pytest.param([Image.new("RGB", (8, 8))], "x", "float tensor.*list", id="pil"),
        pytest.param(torch.zeros(1, 3, 8, 8), ["x"], "one prompt.*list", id="list-of-prompts"),
        pytest.param(torch.zeros(1, 3, 8, 8), None, "one prompt.*NoneType", id="no-prompt"),
    ],
)
def test_bad_input_is_one_clear_error(folder, images, prompt, message):
    with pytest.raises(ValueError, match=message):
        ses_fast.load_reward("clip", folder, "cpu")(images, prompt)


@pytest.mark.parametrize("name", ["pickscore", "", None, 3])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown reward.*clip.*pick"):
        ses_fast.load_reward(name)


@pytest.mark.parametrize("name", ["clip", "pick", "hps", "hps_v2.0", "hps_v2.1"])
def test_without_weights_and_network_the_error_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        ses_fast.load_reward(name, device="cpu")
    for part in (name, REWARDS[name].ids["weights"], "hf download", "HF_HUB_OFFLINE", "weights="):
        assert part in str(caught.value)


def keep_in_cache(monkeypatch, cache, files):
    """A Hugging Face cache of `files`, Hub id -> the folder that was downloaded; nothing else can be."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for repo, folder in files.items():
        kept = cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, kept / "snapshots/0")
        (kept / "refs").mkdir()
        (kept / "refs/main").write_text("0")


@pytest.mark.parametrize("name", ["clip", "pick", "hps", "hps_v2.0"])
def test_a_partial_download_says_what_to_do(monkeypatch, tmp_path, name):
    repo = REWARDS[name].ids["weights"]
    (tmp_path / "partial").mkdir()
    keep_in_cache(monkeypatch, tmp_path / "cache", {repo: tmp_path / "partial"})
    with pytest.raises(FileNotFoundError) as caught:
        ses_fast.load_reward(name, device="cpu")
    for part in (repr(name), f"`hf download {repo}`", "HF_HUB_OFFLINE", "weights="):
        assert part in str(caught.value)


def test_weights_without_a_tokenizer_take_the_published_one(folder, monkeypatch, tmp_path):
    """As the cached weights of `pick` are, named by their Hub id or as a folder."""
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "weights")
    ids = REWARDS["pick"].ids
    keep_in_cache(monkeypatch, tmp_path / "cache", {ids["weights"]: tmp_path / "weights", ids["processor"]: folder})
    images, load = make_images(64, 64), ses_fast.load_reward
    reward = load("pick", ids["weights"], "cpu")
    assert_stock(reward(images, PROMPT), folder, images, PROMPT)
    assert load("pick", None, "cpu") is reward
    assert torch.equal(load("pick", tmp_path / "weights", "cpu")(images, PROMPT), reward(images, PROMPT))


def test_clip_is_cached_when_its_tokenizer_is_too(folder, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "partial")
    (tmp_path / "partial/tokenizer.json").unlink()
    for source, complete in ((tmp_path / "partial", False), (folder, True)):
        keep_in_cache(monkeypatch, tmp_path / str(complete), {REWARDS["clip"].ids["weights"]: source})
        assert REWARDS["clip"].cached() == complete


@pytest.fixture
def offline(monkeypatch):
    """diffsynth reaches no network."""

    def fail(config):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pytest.importorskip("diffsynth.core").ModelConfig, "download_if_necessary", fail)


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        pytest.param("pick", "PickScore", id="pick"),
        pytest.param("clip", "CLIP-ViT-H-14-laion2B-s32B-b79K", id="clip"),
    ],
)
def test_a_modelscope_copy_on_the_disk_needs_no_network(offline, monkeypatch, tmp_path, name, copy):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    folder = save_tiny_clip(tmp_path / "DiffSynth-Studio/ImageMetrics" / copy)
    images = make_images(64, 64)
    assert_stock(ses_fast.load_reward(name, "modelscope", "cpu")(images, PROMPT), folder, images, PROMPT)


def test_no_modelscope_copy_and_no_download_says_what_to_do(monkeypatch, tmp_path):
    pytest.importorskip("diffsynth")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        ses_fast.load_reward("pick", "modelscope", "cpu")
    for part in ("'pick'", "DiffSynth-Studio/ImageMetrics", str(tmp_path), "weights=", "DIFFSYNTH_SKIP_DOWNLOAD"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        pytest.param("pick", "modelscope", id="asked-for"),
        pytest.param("aesthetic", None, id="the-default"),
        pytest.param("image_reward", None, id="the-default-of-image-reward"),
    ],
)
def test_a_modelscope_copy_without_network_says_what_to_do(offline, monkeypatch, tmp_path, name, weights):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        ses_fast.load_reward(name, weights, "cpu")
    for part in (name, "DiffSynth-Studio/ImageMetrics", str(tmp_path), "weights=", "DIFFSYNTH_SKIP_DOWNLOAD"):
        assert part in str(caught.value)


# ---- a score is a function of its arguments


def test_a_relative_folder_counts_by_its_real_path(monkeypatch, tmp_path):
    images = make_images(64, 64)
    load = ses_fast.load_reward
    for seed, place in enumerate("xy"):
        save_tiny_clip(tmp_path / place / "w", seed=seed)
    (tmp_path / "link").symlink_to(tmp_path / "x/w")
    monkeypatch.chdir(tmp_path / "x")
    first = load("clip", "w", "cpu")
    monkeypatch.chdir(tmp_path / "y")
    assert_stock(load("clip", "w", "cpu")(images, PROMPT), tmp_path / "y/w", images, PROMPT)
    assert load("clip", "../x/w", "cpu") is load("clip", tmp_path / "link", "cpu") is first
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("clip", "~/x/w", "cpu") is first


def test_a_modelscope_copy_counts_by_its_real_path(offline, monkeypatch, tmp_path):
    images = make_images(64, 64)
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    for seed, place in enumerate("xy"):
        folder = save_tiny_clip(tmp_path / place / "models/DiffSynth-Studio/ImageMetrics/PickScore", seed=seed)
        monkeypatch.chdir(tmp_path / place)
        assert_stock(ses_fast.load_reward("pick", "modelscope", "cpu")(images, PROMPT), folder, images, PROMPT)


@pytest.mark.parametrize("when", ["the prompt is first read", "it scores"])
def test_autocast_changes_no_score(folder, when):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64)
    expected = reward(images, PROMPT)
    reward(images, "another")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reward(images, PROMPT)
    assert torch.equal(reward(images, PROMPT) if when == "the prompt is first read" else found, expected)
    assert found.dtype == torch.float32


def test_autocast_changes_no_encoding(folder):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward(images, PROMPT)
    kept = reward._encoded[1]
    reward(images, "another"), reward(images, PROMPT)
    assert torch.equal(reward._encoded[1], kept)


@pytest.mark.parametrize("change", ["device", "dtype"])
@pytest.mark.parametrize("when", ["loaded", "scored"])
def test_torch_s_defaults_change_no_score(folder, change, when):
    images, load = make_images(64, 64), lambda: ses_fast.load_reward("clip", folder, "cpu")
    expected = load()(images, PROMPT)
    if when == "loaded":
        ses_fast.unload_rewards()
    reward = load() if when == "scored" else None
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if change == "device" else torch.set_default_dtype(torch.float64)
        found = [(reward or load())(images, prompt) for prompt in ("another", PROMPT)][1]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_threads_with_one_reward_get_their_own_prompts(folder):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64)
    prompts = [f"prompt number {i}" for i in range(4)]
    expected = [reward(images, prompt) for prompt in prompts]
    start = threading.Barrier(4)

    def go(i):
        start.wait()
        return all(torch.equal(reward(images, prompts[i]), expected[i]) for _ in range(15))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(go, range(4))) == [True] * 4
    finally:
        sys.setswitchinterval(before)


def test_a_move_waits_until_nothing_is_scored(folder):
    reward, images = CLIPReward.from_folder(folder, device="cpu"), make_images(64, 64)
    expected, score = reward(images, PROMPT), reward.score
    scoring, order = threading.Event(), []

    def slow(*given):
        scoring.set()
        threading.Event().wait(0.2)
        order.append("scored")
        return score(*given)

    reward.score = slow
    with ThreadPoolExecutor(1) as other:
        found = other.submit(reward, images, PROMPT)
        scoring.wait()
        reward.to("meta")
        order.append("moved")
    assert order == ["scored", "moved"] and torch.equal(found.result(), expected)


def test_threads_load_a_reward_once(folder, monkeypatch):
    start, calls, load = threading.Barrier(3), [], CLIPReward.load.__func__
    monkeypatch.setattr(CLIPReward, "load", classmethod(lambda *given: calls.append(1) or load(*given)))

    def go(_):
        start.wait()
        return ses_fast.load_reward("clip", folder, "cpu")

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(go, range(3)))) == len(calls) == 1


def test_a_copy_scores_alike(folder):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64)
    # Not bit for bit: where a copy lies in memory may change how its matrices are cut.
    torch.testing.assert_close(copy.deepcopy(reward)(images, PROMPT), reward(images, PROMPT), rtol=1e-5, atol=1e-5)


def test_published_weights_take_their_authors_processor(folder, monkeypatch, tmp_path):
    """PickScore's repository may hold a tokenizer and an image processor of its own: they are not what scores it."""
    own = save_tiny_clip(tmp_path / "weights")
    settings = {"size": 64, "crop_size": 64, "image_mean": [0.1] * 3, "image_std": [0.9] * 3}
    for file in own.glob("*processor*"):
        file.unlink()
    (own / "preprocessor_config.json").write_text(json.dumps(settings))
    ids, images = REWARDS["pick"].ids, make_images(64, 64)
    keep_in_cache(monkeypatch, tmp_path / "cache", {ids["weights"]: own, ids["processor"]: folder})
    published = ses_fast.load_reward("pick", device="cpu")(images, PROMPT)
    assert_stock(published, folder, images, PROMPT)
    local = ses_fast.load_reward("pick", own, "cpu")(images, PROMPT)  # a folder with its own has its own
    assert (local - published).abs().max() > 0.1


# ---- prompts that are cut


def test_a_prompt_that_is_cut_is_warned_of_once(folder):
    reward, images = ses_fast.load_reward("clip", folder, "cpu"), make_images(64, 64)
    prompt = "a red fox " * 10 + "IN the Snow, and then: nothing."  # a token a letter
    with pytest.warns(UserWarning) as caught:
        for each in (prompt, "a cat", prompt):
            reward(images, each)
    (message,) = [str(warning.message) for warning in caught]
    assert caught[0].filename == __file__
    length = len(reward.tokenizer(prompt).input_ids)
    assert f"'clip' reads 77 tokens and the prompt has {length}" in message
    assert message.endswith("it ignores 'Snow, and then: nothing.'")
    with pytest.warns(UserWarning, match=r"it ignores '.{50} \.\.\. .{25}'"):  # of a long one both ends
        reward(images, "many words " * 60)


@pytest.mark.parametrize("letters", [75, 76])
def test_a_prompt_of_the_last_length_that_is_read_is_not_warned_of(folder, letters):
    reward = ses_fast.load_reward("clip", folder, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reward(make_images(64, 64), "x" * letters)
    assert [str(each.message).endswith("it ignores 'x'") for each in caught] == [True] * (letters == 76)


# ---- names


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("pickscore", "pick"), ("PickScore_v1", "pick"), ("Pick", "pick"), ("HPSv2", "hps"), ("HPSv2.1", "hps_v2.1"),
        ("hpsv2.0", "hps_v2.0"), ("ImageReward", "image_reward"), ("THUDM/ImageReward", "image_reward"),
        ("CLIP-ViT-H-14-laion2B", "clip"), ("asthetic", "aesthetic"), ("HPSv3", "hps_v3"), ("MizzenAI/HPSv3", "hps_v3"),
        ("UnifiedReward-2.0-qwen35-9b", "unified_reward"), ("UnifiedReward", "unified_reward"),
    ],
)  # fmt: skip
def test_an_unknown_name_suggests_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=f"unknown reward '{given}': did you mean '{nearest}'.*The known ones are"):
        ses_fast.load_reward(given)


def test_a_name_like_no_other_suggests_none():
    with pytest.raises(ValueError, match="unknown reward 'zzz'. The known ones"):
        ses_fast.load_reward("zzz")


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("yuvalkirstain/PickScore_v1", "pick"), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip"),
    ],
)  # fmt: skip
def test_a_published_id_is_a_name(folder, hub_id, name):
    assert ses_fast.load_reward(hub_id, folder, "cpu") is ses_fast.load_reward(name, folder, "cpu")
    mixed = ses_fast.load_reward({hub_id: 1.0}, {hub_id: folder}, "cpu")
    assert mixed.rewards == {hub_id: ses_fast.load_reward(name, folder, "cpu")}
    assert ses_fast.load_reward(name, folder, "cpu").name == name


def test_hps_s_id_is_its_version_2_1():
    assert known_name("xswu/HPSv2") == "hps" and REWARDS["hps"] is REWARDS["hps_v2.1"]


# ---- scorers of PIL images


def grey_levels(pictures, prompt):
    return [float(np.asarray(each, dtype=np.float64).mean()) + len(prompt) for each in pictures]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pil_makes_the_pipeline_s_own_pictures(dtype):
    base_pipeline = pytest.importorskip("diffsynth.diffusion.base_pipeline")
    images, seen = make_images(20, 30, dtype), []
    ses_fast.rewards.from_pil(lambda pictures, prompt: seen.extend(pictures) or [0.0] * len(pictures))(images, "")
    for image, picture in zip(images, seen, strict=True):
        expected = base_pipeline.BasePipeline.vae_output_to_image(None, image[None])
        assert picture.mode == "RGB" and picture.size == (30, 20)
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_from_pil_scores_together_or_one_by_one():
    images = make_images(20, 30)
    together = ses_fast.rewards.from_pil(grey_levels)
    alone = ses_fast.rewards.from_pil(lambda picture, prompt: grey_levels([picture], prompt)[0], batched=False)
    assert together(images, "abc").shape == (4,) and together.name == "grey_levels"
    assert torch.equal(together(images, "abc"), alone(images, "abc"))
    assert together == ses_fast.rewards.from_pil(grey_levels) != alone


@pytest.mark.parametrize("batched", [True, False])
def test_from_pil_names_the_function_that_returns_something_else(batched):
    def odd(pictures, prompt):
        return [1.0, 2.0, 3.0]

    with pytest.raises(ValueError, match="odd.*must return"):
        ses_fast.rewards.from_pil(odd, batched)(make_images(8, 8), "")
    with pytest.raises(ValueError, match="a function of PIL images"):
        ses_fast.rewards.from_pil("pick")
    with pytest.raises(ValueError, match=r"shape \(n, 3, H, W\)"):
        ses_fast.rewards.from_pil(grey_levels)(torch.zeros(3, 8, 8), "")


def test_from_pil_without_pillow_names_the_extra(monkeypatch):
    monkeypatch.setattr("ses_fast.rewards.pil.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pillow.*ses-fast\[rewards\]"):
        ses_fast.rewards.from_pil(grey_levels)


# ---- files that are missing or broken


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        ses_fast.load_reward("clip", tmp_path / "nothing", "cpu")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        pytest.param("model.safetensors", "'clip' needs model.safetensors.*has none.*weights=", id="weights"),
        pytest.param("tokenizer.json", "'clip' needs tokenizer.json.*neither.*hf download.*weights=", id="tokenizer"),
    ],
)
def test_an_incomplete_folder_names_what_it_lacks(monkeypatch, tmp_path, missing, message):
    keep_in_cache(monkeypatch, tmp_path / "cache", {})
    (save_tiny_clip(tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        ses_fast.load_reward("clip", tmp_path, "cpu")


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_named_with_what_to_do(tmp_path, broken):
    (save_tiny_clip(tmp_path) / broken).write_bytes(b"xx")
    with pytest.raises(ValueError) as caught:
        ses_fast.load_reward("clip", tmp_path, "cpu")
    for part in ("'clip'", str(tmp_path), f"`hf download {REWARDS['clip'].ids['weights']}", "weights="):
        assert part in str(caught.value)


def test_weights_that_do_not_fill_the_model_are_refused(folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="visual_projection.weight"):
        ses_fast.load_reward("clip", tmp_path, "cpu")


def test_loaded_once_for_each_name_weights_device_and_dtype(folder, folder_224):
    load = ses_fast.load_reward
    reward = load("clip", folder, "cpu")
    assert load("clip", str(folder), torch.device("cpu"), torch.float32) is reward
    assert load("pick", folder, "cpu") is not reward
    assert load("clip", folder_224, "cpu") is not reward
    assert load("clip", folder, "cpu", torch.bfloat16) is not reward
    images = make_images(64, 64)
    before = reward(images, PROMPT)
    ses_fast.unload_rewards()
    assert load("clip", folder, "cpu") is not reward
    assert torch.equal(reward(images, PROMPT), before)  # one still held goes on


def test_a_loaded_reward_that_was_moved_is_moved_back(folder):
    reward = ses_fast.load_reward("clip", folder, "cpu")
    images, before = make_images(64, 64), reward(make_images(64, 64), PROMPT)
    reward.device = torch.device("meta")  # as `to` leaves it, but with its weights
    assert ses_fast.load_reward("clip", folder, "cpu") is reward and reward.device.type == "cpu"
    assert torch.equal(reward(images, PROMPT), before)


def test_default_dtype_on_the_cpu_is_fp32(folder):
    reward = ses_fast.load_reward("clip", folder, "cpu")
    assert {p.dtype for p in reward.model.parameters()} == {torch.float32}


def test_half_precision_files_compute_in_fp32(folder, tmp_path):
    """As the embedded reward is shipped: fp16 weights, its image processor's settings in their own file."""
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = {"size": 64, "crop_size": 64, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = make_images(128, 128)
    scores = CLIPReward.from_folder(tmp_path, dtype=torch.float32)(images, PROMPT)
    assert_stock(scores, tmp_path, images, PROMPT)
    assert (scores - stock_scores(folder, images, PROMPT)).abs().max() > 0.1  # the mean and the std were read


def test_without_an_image_processor_file_the_size_is_the_model_s(folder, tmp_path):
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    images = make_images(128, 96)
    scores = ses_fast.load_reward("clip", tmp_path, "cpu")(images, PROMPT)
    assert_stock(scores, folder, images, PROMPT)


def test_a_tokenizer_of_another_kind(folder, tmp_path):
    """A word-level one, 16 tokens at most, as a small model has: its own files name its class."""
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "red", "cat", "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 5)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    model = tiny_clip(eos_token_id=5, max_position_embeddings=16)
    model.save_pretrained(tmp_path)
    reward, images = CLIPReward.from_folder(tmp_path, device="cpu"), make_images(64, 64)
    for prompt, ids in [("a red cat", [2, 3, 4, 5]), ("red " * 40, [3] * 15 + [5])]:
        expected = model.get_text_features(torch.tensor([ids])).pooler_output
        reward(images, prompt)
        torch.testing.assert_close(reward.encode(prompt), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"size": {"height": 64, "width": 64}, "crop_size": 64}, id="squashed-to-a-square"),
        pytest.param({"size": 72, "crop_size": 64}, id="crops-more-than-it-resizes"),
        pytest.param({"size": 64, "crop_size": 64, "resample": 2}, id="bilinear"),
        pytest.param({"size": 64, "crop_size": 64, "do_center_crop": False}, id="no-crop"),
        pytest.param({"size": 64, "crop_size": 64, "rescale_factor": 1 / 127.5}, id="another-scale"),
    ],
)
def test_another_preprocessing_is_refused_not_approximated(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="another preprocessing"):
        read_preprocessing(tmp_path)


def test_weights_without_a_config_are_a_vit_h_14_with_gelu():
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**VIT_H_14))
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # open_clip's ViT-H-14
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "gelu"


def test_both_defaults_name_their_processor():
    assert REWARDS["pick"].ids["weights"] == "yuvalkirstain/PickScore_v1"
    assert REWARDS["pick"].ids["processor"] == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert REWARDS["clip"].ids["weights"] == REWARDS["clip"].ids["processor"]


def test_importing_the_rewards_loads_no_transformers():
    code = "import sys, ses_fast.rewards, ses_fast.rewards.clip; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setattr("ses_fast.rewards.checkpoint.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"transformers.*ses-fast\[rewards\]"):
        ses_fast.load_reward("clip", device="cpu")


def test_the_scale_is_the_exponential_of_the_model_s(folder):
    reward = ses_fast.load_reward("clip", folder, "cpu")
    assert reward.scale == pytest.approx(math.exp(reward.model.logit_scale.item()))
    assert reward(make_images(64, 64), PROMPT).abs().max() <= reward.scale


@pytest.mark.slow  # 986 M parameters: 4 GB on the disk, 8 GB of memory
def test_the_whole_vit_h_14_equals_the_stock_path(tmp_path):
    transformers.CLIPModel(transformers.CLIPConfig(**VIT_H_14)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    PILImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "aside.json")
    images = make_images(300, 260)[:2]
    scores = ses_fast.load_reward("pick", tmp_path, "cpu")(images, PROMPT)
    ses_fast.unload_rewards()
    (tmp_path / "aside.json").rename(tmp_path / "config.json")
    assert_stock(scores, tmp_path, images, PROMPT)


def test_a_picture_and_its_image_are_each_others():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    picture = to_pil(levels.float() / 127.5 - 1 + 1e-3)[0]
    assert torch.equal(of_pil(picture), of_pil(to_pil(of_pil(picture))[0]))
    assert torch.equal(((of_pil(picture) + 1) * 127.5).to(torch.uint8), levels)
