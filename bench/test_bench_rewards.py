"""Images a second of a CLIP reward against the stock path, in the same run:

    python -m pytest bench/test_bench_rewards.py --benchmark-json bench/results/rewards-<device>-<date>.json

The stock path is what a search without this package does: for each image alone, the host copy, PIL,
CLIPProcessor and CLIPModel, which encode the prompt each time. On a CPU a small CLIP with random weights, the
embedded model's size; on a GPU a ViT-H-14 in bf16, whose floor is that of its FLOPs.
On a CPU large images are ruled by the bicubic filter, which Pillow's C does faster than torch: those rows are
printed and held to nothing.
"""

import time

import pytest
import torch
from PIL import Image

from bench.environment import environment
from ses_fast._torchvision import mend_torchvision
from ses_fast.rewards.clip import VIT_H_14, CLIPReward

mend_torchvision()
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PROMPT = "two red squares left of three blue rings"
FLOOR_MS = 0.42  # an image of ViT-H-14: 334 GFLOP at 790 TFLOP/s, as measured on an H100
SIZES = [
    pytest.param(128, id="10x128x128: the embedded model's"),
    pytest.param(512, id="10x512x512: half-size previews"),
    pytest.param(1024, id="10x1024x1024: full-size previews"),
]
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
SMALL = {
    "projection_dim": 128,
    "text_config": SMALL_TOWER | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513},
    "vision_config": SMALL_TOWER | {"image_size": 64, "patch_size": 8},
}


@pytest.fixture(scope="module")
def stock():
    """(CLIPModel, CLIPProcessor) with the PIL backend and a tokenizer over bytes."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**(VIT_H_14 if CUDA else SMALL))
    model = transformers.CLIPModel(config).to(DEVICE, DTYPE).eval().requires_grad_(False)
    size = config.vision_config.image_size
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return model, transformers.CLIPProcessor(
        image_processor=pil(size={"shortest_edge": size}, crop_size=size), tokenizer=tokenizer
    )


def stock_scores(model, processor, images):
    scores = []
    for image in images:
        pixels = ((image + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        inputs = processor(text=[PROMPT], images=[Image.fromarray(pixels)], padding=True, return_tensors="pt")
        inputs = {
            name: value.to(DEVICE, DTYPE if value.is_floating_point() else None) for name, value in inputs.items()
        }
        with torch.no_grad():
            scores.append(model(**inputs).logits_per_image.item())
    return torch.tensor(scores)


def seconds(call, rounds):
    """The median of `rounds` calls, each waited for."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call().tolist()  # the scores on the host, as the search needs them
        times.append(time.perf_counter() - begin)
    return sorted(times)[rounds // 2]


@pytest.mark.parametrize("size", SIZES)
def test_a_generation_of_ten(benchmark, stock, size):
    model, processor = stock
    images = (torch.rand(10, 3, size, size, device=DEVICE) * 2 - 1).to(DTYPE)
    reward = CLIPReward(model, processor.tokenizer, device=DEVICE, dtype=DTYPE)
    expected = stock_scores(model, processor, images)  # warms up; no speed is reported of another function
    tolerance = 1.0 if CUDA else 1e-3  # bf16 logits of 100 times a cosine, in the stock path
    torch.testing.assert_close(reward(images, PROMPT).cpu(), expected, atol=tolerance, rtol=0)

    slow = seconds(lambda: stock_scores(model, processor, images), 5)
    benchmark.pedantic(lambda: reward(images, PROMPT).tolist(), rounds=15, warmup_rounds=2)
    fast = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "environment": environment(DEVICE),
        "images_per_second": 10 / fast,
        "stock_images_per_second": 10 / slow,
        "times_faster": slow / fast,
    }
    print(f"\n{size}: {10 / fast:.1f} images/s, stock {10 / slow:.1f}, {slow / fast:.2f} times faster")
    if CUDA or size == 128:
        assert slow / fast >= 3


@pytest.mark.skipif(not CUDA, reason="the floor is a GPU's")
def test_vit_h_14_in_bf16_is_near_its_floor(benchmark, stock):
    """The network and its preprocessing, at most twice the time of the network's FLOPs."""
    model, processor = stock
    images = (torch.rand(10, 3, 1024, 1024, device=DEVICE) * 2 - 1).to(DTYPE)
    reward = CLIPReward(model, processor.tokenizer, device=DEVICE, dtype=DTYPE)
    benchmark.pedantic(lambda: reward(images, PROMPT).tolist(), rounds=30, warmup_rounds=5)
    ms = benchmark.stats.stats.median * 1e3 / 10
    benchmark.extra_info |= {"environment": environment(DEVICE), "ms_per_image": ms, "floors": ms / FLOOR_MS}
    assert ms <= 2 * FLOOR_MS
