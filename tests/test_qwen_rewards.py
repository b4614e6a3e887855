"""HPSv3 and UnifiedReward against diffsynth's own metrics, loaded by both from the same files of small weights."""

import copy
import hashlib
import math
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy.stats import spearmanr
from test_rewards import make_images
from tiny_clip import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ses_fast
from ses_fast.rewards import REWARDS
from ses_fast.rewards.checkpoint import weight_files
from ses_fast.rewards.qwen import UnifiedReward

pytest.importorskip("diffsynth")

from diffsynth.configs import MODEL_CONFIGS
from diffsynth.core import ModelConfig
from diffsynth.core.loader import hash_model_file
from diffsynth.core.loader.file import convert_keys_dict_to_single_str
from diffsynth.metrics import HPSv3Metric, UnifiedReward2Metric
from diffsynth.models.hpsv3 import HPSV3_INSTRUCTION, HPSv3Qwen2VLRewardModel
from diffsynth.models.unified_reward_2 import UnifiedReward2Qwen35ForConditionalGeneration

TOLERANCE = {"stock": 1e-5}
PROMPT = "two red squares left of three blue rings"
SIGNS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
NAMES = ["hps_v3", "unified_reward"]
# What a small model may write: each word is a token. With these three lines an answer is a rating.
AXES = ("Alignment", "Coherence", "Style")
WORDS = [f"{axis} Score (1-5): {score}\n" for axis in AXES for score in (1, 2.5, 3, 4.25)]


def processor(folder, kind, words):
    """A byte-level one, with the family's signs and `words` as tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=letters, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([HPSV3_INSTRUCTION] * 2, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_tokens([*SIGNS, *words], special_tokens=False)
    image, video = transformers.Qwen2VLImageProcessor(), getattr(transformers, f"{kind}VideoProcessor")()
    getattr(transformers, f"{kind}Processor")(image, fast, video, chat_template=TEMPLATE).save_pretrained(folder)
    return fast


def spread(model, seed):
    """Random weights wide enough that images differ in their scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.5 * parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def signs(tokenizer):
    places = dict(zip(SIGNS, tokenizer.convert_tokens_to_ids(list(SIGNS)), strict=True))
    return {
        "image_token_id": places["<|image_pad|>"],
        "video_token_id": places["<|video_pad|>"],
        "vision_start_token_id": places["<|vision_start|>"],
        "vision_end_token_id": places["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def published_name(key):
    """HPSv3's file has the names of older transformers."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def hps_v3(folder):
    tokenizer = processor(folder, "Qwen2VL", [])
    text = {"vocab_size": len(tokenizer) + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=VISION, **signs(tokenizer))
    model = spread(HPSv3Qwen2VLRewardModel(config), seed=0)
    state = {published_name(key): value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config.save_pretrained(folder)
    return config


def unified_reward(folder):
    tokenizer = processor(folder, "Qwen3VL", WORDS)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "linear_num_value_heads": 2}
    text |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [], "patch_size": 14}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **signs(tokenizer))
    model = spread(transformers.Qwen3_5ForConditionalGeneration(config), seed=2)  # of 0, 1, 2 the one that looks
    writes = torch.zeros(len(tokenizer), dtype=torch.bool)
    writes[tokenizer.convert_tokens_to_ids(WORDS)] = True
    model.lm_head.weight.data[~writes] = 0  # so that it writes WORDS alone
    for layer in model.model.language_model.layers[:3]:
        layer.linear_attn.A_log.data.fill_(-8)  # so that the image is not forgotten before the text's end
    model.save_pretrained(folder, max_shard_size="150KB")
    (folder / "model.safetensors.index.json").unlink()  # the parts' own names say how many there are
    return config


MAKE = {"hps_v3": hps_v3, "unified_reward": unified_reward}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    return {name: (folder, MAKE[name](folder)) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(UnifiedReward, "max_new_tokens", 8)
    yield
    ses_fast.unload_rewards()


def entry(name):
    """What diffsynth knows of the published weights."""
    known_as = {"hps_v3": "image_metrics_hpsv3", "unified_reward": "image_metrics_unified_reward_2"}[name]
    (known,) = (each for each in MODEL_CONFIGS if each["model_name"] == known_as)
    return known


class KeepsItsLayers(transformers.Qwen3_5TextConfig):
    """diffsynth's class sets the kinds of its 32 layers after it has made the configuration."""

    def __setattr__(self, name, value):
        if name != "layer_types":
            super().__setattr__(name, value)


def take_for_published(patch, name, folder, config):
    """Has diffsynth take the small files for the published ones, and their sizes for its classes' own."""
    patch.setitem(entry(name), "model_hash", hash_model_file([str(file) for file in weight_files(folder)]))
    if name == "hps_v3":
        patch.setattr(HPSv3Qwen2VLRewardModel, "default_config", staticmethod(lambda *_: copy.deepcopy(config)))
    else:
        small = copy.deepcopy(config)
        small.text_config.__class__ = KeepsItsLayers
        patch.setattr("transformers.Qwen3_5Config", lambda **_: small)


def diffsynth_metric(name, folder):
    """What diffsynth's own loader makes of the files."""
    weights, files = ModelConfig(path=[str(file) for file in weight_files(folder)]), ModelConfig(path=str(folder))
    settings = {"torch_dtype": torch.float32, "device": "cpu"}
    if name == "hps_v3":
        return HPSv3Metric.from_pretrained(weights, files, **settings)
    return UnifiedReward2Metric.from_pretrained(weights, files, max_new_tokens=8, **settings)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def metric(made, name, monkeypatch):
    with monkeypatch.context() as patch:
        take_for_published(patch, name, *made[name])
        return diffsynth_metric(name, made[name][0])


def stock_scores(metric, images, prompt):
    """One image after the other. Of UnifiedReward's ratings those alone that have all three scores."""
    pixels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(each) for each in pixels]
    if isinstance(metric, HPSv3Metric):
        return torch.tensor([metric.score(prompt, picture)[0] for picture in pictures])
    ratings = [metric.evaluate(prompt, picture)[0] for picture in pictures]
    return torch.tensor([math.nan if None in rating.values() else rating["score"] for rating in ratings])


def assert_stock(scores, metric, images, prompt):
    assert scores.dtype == torch.float32
    expected = stock_scores(metric, images, prompt)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE["stock"], rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(64, 64, id="square"),
        pytest.param(167, 93, id="tall-odd"),
        pytest.param(470, 500, id="larger-than-hpsv3-reads"),
    ],
)
def test_equals_the_metric(made, metric, name, height, width):
    images = make_images(height, width)[:3]
    scores = ses_fast.load_reward(name, made[name][0], "cpu")(images, PROMPT)
    assert len(scores.unique()) > 1  # else nothing is compared
    assert_stock(scores, metric, images, PROMPT)


@pytest.mark.parametrize("prompt", ["", "a {cat}", "Ein Bär im Schnee, 雪の中の熊", "many words " * 40])
def test_equals_the_metric_for_prompts(made, metric, name, prompt):
    images = make_images(64, 64)[:2]
    reward = ses_fast.load_reward(name, made[name][0], "cpu")
    scores = reward(images, prompt)
    assert_stock(scores, metric, images, prompt)
    assert not torch.equal(scores, reward(images, PROMPT))


def test_an_answer_without_all_three_scores_is_no_rating(made, monkeypatch):
    monkeypatch.setattr(UnifiedReward, "max_new_tokens", 4)
    images = make_images(64, 64)
    scores = ses_fast.load_reward("unified_reward", made["unified_reward"][0], "cpu")(images, PROMPT)
    assert 0 < scores.isnan().sum() < 4


def test_bf16_ranks_as_fp32_does(made):
    folder, _ = made["hps_v3"]
    images = torch.cat([make_images(64 + i, 64 + i)[:, :, :64, :64] for i in range(2)])
    full = ses_fast.load_reward("hps_v3", folder, "cpu")(images, PROMPT)
    reward = ses_fast.load_reward("hps_v3", folder, "cpu", torch.bfloat16)
    assert spearmanr(full, reward(images, PROMPT)).statistic >= 0.9
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    head = reward.model.model.rm_head.state_dict()
    assert head and all(torch.equal(value, weights[f"rm_head.{key}"]) for key, value in head.items())


def test_bf16_leaves_the_positions_frequencies_in_fp32(made):
    folder, _ = made["unified_reward"]
    full, half = (ses_fast.load_reward("unified_reward", folder, "cpu", dtype) for dtype in (None, torch.bfloat16))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    exact = {key: value for key, value in full.model.named_buffers() if "inv_freq" in key}
    assert len(exact) == 3
    for key, value in half.model.named_buffers():
        assert key not in exact or torch.equal(value, exact[key])
    assert half(make_images(64, 64)[:1], PROMPT).shape == (1,)


def test_a_sign_of_the_model_s_own_in_a_prompt_is_refused(made, name):
    reward = ses_fast.load_reward(name, made[name][0], "cpu")
    sign = "<|image_pad|>" if name == "unified_reward" else "<|Reward|>"
    with pytest.raises(ValueError, match=rf"'{name}' takes '{re.escape(sign)}' for a sign of its own"):
        reward(make_images(64, 64)[:1], f"a {sign} cat")


# ---- files


def copy_of(made, name, folder):
    return Path(shutil.copytree(made[name][0], folder, dirs_exist_ok=True))


def test_the_published_names_and_shapes_are_those_that_are_read():
    """By diffsynth's own fingerprint of the published files, which no test can download."""
    with torch.device("meta"):
        hps = HPSv3Qwen2VLRewardModel(vocab_size=151658)
        unified = UnifiedReward2Qwen35ForConditionalGeneration().model
    for name, model, as_published in (("hps_v3", hps, published_name), ("unified_reward", unified, str)):
        shapes = {as_published(key): list(value.shape) for key, value in model.state_dict().items()}
        digest = hashlib.md5(convert_keys_dict_to_single_str(shapes).encode()).hexdigest()
        assert digest == entry(name)["model_hash"]
        gigabytes = sum(value.numel() for value in model.state_dict().values()) * 2 / 1e9
        assert REWARDS[name].gigabytes == pytest.approx(gigabytes, abs=0.05)


def test_published_weights_need_no_configuration(made, name, monkeypatch, tmp_path):
    folder, images = copy_of(made, name, tmp_path), make_images(64, 64)[:2]
    expected = ses_fast.load_reward(name, made[name][0], "cpu")(images, PROMPT)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=f"'{name}': .*is missing.*there is no config.json"):
        ses_fast.load_reward(name, folder, "cpu")
    take_for_published(monkeypatch, *(name, folder, made[name][1]))
    assert torch.equal(ses_fast.load_reward(name, folder, "cpu")(images, PROMPT), expected)


def test_a_modelscope_copy_on_the_disk_needs_no_network(made, name, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    place = tmp_path / "DiffSynth-Studio/ImageMetrics" / REWARDS[name].ids["modelscope"]
    with pytest.raises(FileNotFoundError, match=f"'{name}' needs the weights {place}/model"):
        ses_fast.load_reward(name, device="cpu")
    folder, images = copy_of(made, name, place), make_images(64, 64)[:1]
    assert REWARDS[name].cached()
    expected = ses_fast.load_reward(name, made[name][0], "cpu")(images, PROMPT)
    assert torch.equal(ses_fast.load_reward(name, device="cpu")(images, PROMPT), expected)
    weight_files(folder)[-1].unlink()
    assert not REWARDS[name].cached()


def test_a_part_that_is_missing_is_said(made, tmp_path):
    folder = copy_of(made, "unified_reward", tmp_path)
    parts = weight_files(folder)
    assert len(parts) > 1
    parts[0].unlink()
    with pytest.raises(ValueError, match="'unified_reward'.*is missing, broken.*a part is missing.*weights="):
        ses_fast.load_reward("unified_reward", folder, "cpu")


@pytest.mark.parametrize("key", ["rm_head.5.bias", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_do_not_fill_the_model_are_refused(made, tmp_path, key):
    folder = copy_of(made, "hps_v3", tmp_path)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state[key]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"'hps_v3'.*lack.*{key.rpartition('layers')[2]}"):
        ses_fast.load_reward("hps_v3", folder, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"xx", id="cut-off"),
        pytest.param(safetensors.torch.save({"a": torch.zeros(1)}), id="of-another-model"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(made, name, monkeypatch, tmp_path, content):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    folder = copy_of(made, name, tmp_path / "copy")
    for file in weight_files(folder):
        file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ses_fast.load_reward(name, folder, "cpu")
    for part in (repr(name), str(folder), str(tmp_path / "models"), "weights="):
        assert part in str(caught.value)
