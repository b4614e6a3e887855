"""ImageReward and the aesthetic predictor against diffsynth's own metrics, one PIL image after the other."""

import copy

import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy.stats import spearmanr
from test_rewards import make_images
from tiny_clip import PILImageProcessor, transformers

import ses_fast
from ses_fast.rewards.aesthetic import VIT_L_14, AestheticReward
from ses_fast.rewards.image_reward import ImageRewardReward

pytest.importorskip("diffsynth")

from diffsynth.metrics import AestheticMetric, ImageRewardMetric
from diffsynth.models.aesthetic import AestheticMLP, AestheticModel
from diffsynth.models.image_reward import ImageRewardModel

TOLERANCE = {"stock": 1e-4}
PROMPT = "two red squares left of three blue rings"
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = [
    pytest.param("", id="empty"),
    pytest.param("a red ring", id="short"),
    pytest.param("blue squares " * 40, id="over-35-tokens"),
    pytest.param("Ein Bär im Schnee, 雪の中の熊", id="non-english"),
]


def spread(model):
    """Random weights wide enough that images differ in their scores."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        wide = parameter.ndim > 1
        scale = parameter[0].numel() ** -0.5 if wide else 0.1
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model.eval()


def bert_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.split(), "a", "ring", "bar", "im", ","]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def as_published(metric):
    """The weights under the names of the file that diffsynth downloads, its stray buffer included."""
    if isinstance(metric, AestheticMetric):
        state = {
            key.replace("vision_model.vision_model", "vision_model"): value
            for key, value in metric.model.state_dict().items()
        }
        patches = state["vision_model.embeddings.position_embedding.weight"].shape[0]
        return state | {"vision_model.embeddings.position_ids": torch.arange(patches)[None]}
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "encoder.layers.": "blocks.",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn.": "attn.",
        "post_layernorm.": "norm.",
        "vision_model.": "visual_encoder.",
    }
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for key, value in metric.model.state_dict().items():
        if key.startswith("blip.vision_model."):
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
        if "itm_head" not in key:
            state[key] = value
    return state


def save(metric, folder):
    state = {key: value.contiguous() for key, value in as_published(metric).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")


def aesthetic(folder, **vision):
    config = transformers.CLIPVisionConfig(**vision)
    metric = AestheticMetric(
        AestheticModel(
            AestheticMLP(config.projection_dim),
            transformers.CLIPVisionModel(config),
            torch.nn.Linear(config.hidden_size, config.projection_dim, bias=False),
            PILImageProcessor(size={"shortest_edge": config.image_size}, crop_size=config.image_size),
        )
    )
    spread(metric.model)
    save(metric, folder)
    config.save_pretrained(folder)
    metric.model.processor.save_pretrained(folder)
    return metric


def image_reward(folder):
    blip = transformers.BlipForImageTextRetrieval(
        transformers.BlipConfig(
            vision_config=TOWER | {"image_size": 64, "patch_size": 16},
            text_config=TOWER | {"vocab_size": 32, "encoder_hidden_size": 64, "is_decoder": True},
        )
    )
    return ImageRewardMetric(spread(ImageRewardModel(blip, bert_tokenizer(folder), image_size=64)))


@pytest.fixture(params=["aesthetic", "image_reward"])
def metric_and_load(request, tmp_path):
    """diffsynth's metric, and a function of the dtype that loads the same weights as a reward."""
    if request.param == "image_reward":
        metric = image_reward(tmp_path)
        return metric, lambda dtype=None: ImageRewardReward(copy.deepcopy(metric.model), device="cpu", dtype=dtype)
    metric = aesthetic(tmp_path, **TOWER, image_size=64, patch_size=16, projection_dim=32)
    return metric, lambda dtype=None: ses_fast.load_reward("aesthetic", tmp_path, "cpu", dtype)


def stock_scores(metric, images, prompt):
    pixels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(image) for image in pixels]
    if isinstance(metric, AestheticMetric):
        return torch.tensor([metric.score(picture)[0] for picture in pictures])
    return torch.tensor([metric.score(prompt, picture)[0] for picture in pictures])


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(128, 128, id="square"),
        pytest.param(96, 160, id="wide"),
        pytest.param(167, 93, id="tall-odd"),
        pytest.param(40, 50, id="smaller-than-the-model's"),
        pytest.param(64, 67, id="odd-cut"),  # by 3: torchvision, as image_reward, crops at 2, transformers at 1
    ],
)
def test_equals_the_metric(metric_and_load, height, width):
    metric, load = metric_and_load
    images = make_images(height, width)
    expected = stock_scores(metric, images, PROMPT)
    assert expected.std() > 100 * TOLERANCE["stock"]  # else nothing is compared
    scores = load()(images, PROMPT)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE["stock"], rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_the_metric_for_prompts(metric_and_load, prompt):
    metric, load = metric_and_load
    images = make_images(72, 72)
    expected = stock_scores(metric, images, prompt)
    scores = load()(images, prompt)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE["stock"], rtol=0)


def test_bf16_ranks_as_fp32_does(metric_and_load):
    metric, load = metric_and_load
    images = torch.cat([make_images(64 + i, 64 + i)[:, :, :64, :64] for i in range(13)])[:50]
    images = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    full = load()(images, PROMPT)
    half = load(torch.bfloat16)(images, PROMPT)
    assert half.dtype == torch.float32 and len(half.unique()) > 45
    assert spearmanr(full, half).statistic >= 0.98


def test_a_prompt_matters_to_image_reward_alone(metric_and_load):
    metric, load = metric_and_load
    reward, images = load(), make_images(64, 64)
    assert torch.equal(reward(images, PROMPT), reward(images, "a ring")) == isinstance(reward, AestheticReward)


def test_a_prompt_that_is_cut_is_warned_of(tmp_path):
    reward = ImageRewardReward(image_reward(tmp_path).model, device="cpu")
    with pytest.warns(UserWarning, match="reads 35 tokens and the prompt has 42: it ignores ', red RINGS, red RINGS,'"):
        reward(make_images(64, 64), "red " * 31 + "red RINGS, " * 3)
    assert reward.dropped("red " * 33) == (35, 35, "")


def test_aesthetic_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    metric = aesthetic(tmp_path, **TOWER, image_size=64, patch_size=16, projection_dim=32)
    state = {key: value for key, value in as_published(metric).items() if key != "layers.4.bias"}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lack.*4.bias"):
        ses_fast.load_reward("aesthetic", tmp_path, "cpu")


@pytest.mark.parametrize("name", ["aesthetic", "image_reward"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"xx", "SafetensorError", id="cut-off"),
        pytest.param(safetensors.torch.save({"a": torch.zeros(1)}), "ValueError", id="of-another-model"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(monkeypatch, tmp_path, name, content, reason):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    bert_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ses_fast.load_reward(name, tmp_path, "cpu")
    for part in (repr(name), str(tmp_path / "model.safetensors"), reason, str(tmp_path / "models"), "weights="):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["aesthetic", "image_reward"])
def test_a_folder_without_weights_says_what_to_do(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"'{name}' needs model.safetensors: .*{tmp_path.name}.*weights="):
        ses_fast.load_reward(name, tmp_path, "cpu")


@pytest.mark.slow  # the whole networks: 1.2 and 1.8 GB of random weights
@pytest.mark.parametrize("name", ["aesthetic", "image_reward"])
def test_loads_a_folder_as_diffsynth_publishes_it(tmp_path, name):
    if name == "aesthetic":
        metric = aesthetic(tmp_path, **VIT_L_14)
        (tmp_path / "config.json").unlink()
    else:
        metric = ImageRewardMetric(spread(ImageRewardModel(tokenizer=bert_tokenizer(tmp_path))))
        save(metric, tmp_path)
    images = make_images(256, 300)[:2]
    scores = ses_fast.load_reward(name, tmp_path, "cpu")(images, PROMPT)
    assert scores.std() > 10 * TOLERANCE["stock"]  # else nothing is compared
    torch.testing.assert_close(scores, stock_scores(metric, images, PROMPT), atol=TOLERANCE["stock"], rtol=0)
