"""Images a second of a CLIP reward against the stock path, in the same run; `python -m bench.ops` runs it.

The stock path is what a search without this package does: for each image alone, the host copy, PIL, CLIPProcessor and
CLIPModel. Both encode the prompt once. On a CPU a small CLIP with random weights, the embedded model's size; on a GPU a
ViT-H-14 in bf16, whose floor is that of its counted work at this GPU's own measured rates.
The scores must agree; a speed below its bar is recorded, as any other. On a CPU large images are ruled by the bicubic
filter, which Pillow's C does faster than torch: those rows have no bar.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from bench.clip import (  # noqa: E402
    CLIPScore,
    PILProcessor,
    check_scores,
    clip_h,
    clip_tokenizer,
    filled,
    transformers,
)
from bench.environment import clock, environment  # noqa: E402
from bench.floor import measured, reward_work  # noqa: E402
from ses_fast.rewards.clip import CLIPReward  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PROMPT = "two red squares left of three blue rings"
BATCH = 10
SIZES = [
    pytest.param(128, id="10x128x128: the embedded model's half-size previews"),
    pytest.param(512, id="10x512x512: half-size previews"),
    pytest.param(1024, id="10x1024x1024: full-size previews"),
]
BAR, FLOOR_BAR = 3.0, 2.0  # times faster than the stock path; at most times the floor
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
SMALL = {
    "projection_dim": 128,
    "text_config": SMALL_TOWER,
    "vision_config": SMALL_TOWER | {"image_size": 64, "patch_size": 8},
}


@pytest.fixture(scope="module")
def clip():
    """A CLIPModel with random weights."""
    if CUDA:
        return clip_h(DEVICE, DTYPE)
    return filled(transformers.CLIPModel(transformers.CLIPConfig(**SMALL)), DEVICE, DTYPE)


@pytest.fixture(scope="module")
def floor_ms(clip) -> float | None:
    """An image among BATCH, of the network alone; None on a CPU."""
    if not CUDA:
        return None
    # A network has little attention, and at no large size: its rate is the matrix products'.
    return 1e3 * reward_work(clip)[0].seconds(replace(measured(DEVICE), attention=None), BATCH)


def through_pil(images: Tensor, score: CLIPScore) -> list[float]:
    pictures = [((image + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(1, 2, 0) for image in images]
    return [score(Image.fromarray(picture.cpu().numpy())) for picture in pictures]


def seconds(call: Callable, rounds: int = 5) -> float:
    """The median of `rounds` calls."""
    times = []
    for _ in range(rounds):
        begin = clock(DEVICE)
        call()
        times.append(clock(DEVICE) - begin)
    return statistics.median(times)


@pytest.mark.parametrize("size", SIZES)
def test_a_generation_of_ten(benchmark, clip, floor_ms, size):
    coarse = torch.rand(BATCH, 3, 8, 8, device=DEVICE) * 2 - 1  # pictures that a resize does not make alike
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1).to(DTYPE)
    reward = CLIPReward(clip, clip_tokenizer(), device=DEVICE, dtype=DTYPE)
    edge = clip.config.vision_config.image_size
    score = CLIPScore(clip, reward.tokenizer, PILProcessor(size={"shortest_edge": edge}, crop_size=edge), PROMPT)
    # Warms up, too: no speed is reported of another function.
    check_scores(reward(images, PROMPT).tolist(), through_pil(images, score), DTYPE, f"{size} pixels")

    slow = seconds(lambda: through_pil(images, score))
    # The scores on the host, as the search needs them.
    benchmark.pedantic(lambda: reward(images, PROMPT).tolist(), rounds=30 if CUDA else 15, warmup_rounds=2)
    fast = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "environment": environment(DEVICE),
        "reward": f"{'ViT-H-14, bf16' if CUDA else 'a small CLIP'}, {BATCH} of {size}x{size}",
        "images/s": BATCH / fast,
        "stock images/s": BATCH / slow,
        "times": slow / fast,
        "bar": BAR if CUDA or size == 128 else None,
    }
    if floor_ms:
        ms = 1e3 * fast / BATCH
        benchmark.extra_info |= {"ms an image": ms, "x floor": ms / floor_ms, "floor bar": FLOOR_BAR}
