"""resize_normalize against Pillow itself, transformers' CLIPProcessor and torch's antialiased bicubic."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ses_fast import ops
from ses_fast.reference import CLIP_MEAN, CLIP_STD

TOLERANCE = {"grid": 0, "normalised": 1e-6}

SIZES = [
    pytest.param(1024, 1024, 224, id="1024"),
    pytest.param(1328, 1328, 224, id="1328-qwen"),
    pytest.param(1024, 768, 224, id="portrait"),
    pytest.param(928, 1664, 224, id="wide-qwen"),
    pytest.param(1536, 640, 224, id="tall-as-pillow-12"),  # 13 would go down first
    pytest.param(1000, 999, 224, id="nearly-square"),
    pytest.param(64, 64, 64, id="64-to-64-no-pass"),
    pytest.param(64, 96, 64, id="64x96-to-64-one-pass-less"),
    pytest.param(256, 256, 96, id="embedded-model"),
    pytest.param(128, 128, 96, id="embedded-model-at-half-size"),
    pytest.param(50, 100, 64, id="upscale-50x100"),
    pytest.param(31, 17, 224, id="upscale-primes"),
    pytest.param(3, 400, 16, id="thin"),
    pytest.param(5, 1, 7, id="one-column"),
]


def pictures(height: int, width: int, n: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise past both ends in one, hard edges in the other: what Pillow clamps and rounds after each pass."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, height, width, generator=noise) * 2.4 - 1.2
    edges = torch.where(torch.rand(3, height // 7 + 1, width // 7 + 1, generator=noise) < 0.5, -1.0, 1.0)
    images[-1] = edges.repeat_interleave(7, 1).repeat_interleave(7, 2)[:, :height, :width]
    return images


def to_pil(image: torch.Tensor) -> Image.Image:
    """A decoder's (3, H, W) as a picture, as the pipelines save it."""
    grey = ((image.permute(1, 2, 0) + 1) * 127.5).clip(0, 255).to(torch.uint8)
    return Image.fromarray(grey.numpy())


@lru_cache
def clip_processor(size: int):
    from tiny_clip import PILImageProcessor

    return PILImageProcessor(size={"shortest_edge": size}, crop_size=size)


def grid(images: torch.Tensor, **settings) -> torch.Tensor:
    """The 0 ... 255 numbers behind the normalised ones."""
    return ops.resize_normalize(images, mean=(0, 0, 0), std=(1, 1, 1), **settings).double() * 255


@pytest.mark.parametrize("height, width, size", SIZES)
def test_crop_is_pillow_bit_for_bit(height, width, size):
    images = pictures(height, width)
    got = grid(images, size=size)
    tall = size if height <= width else int(size * height / width)
    wide = size if width <= height else int(size * width / height)
    left, top = (wide - size) // 2, (tall - size) // 2
    for i, image in enumerate(images):
        # First across, then down: in one call Pillow 13 goes down first where a picture is tall.
        across = to_pil(image).resize((wide, height), Image.Resampling.BICUBIC)
        resized = across.resize((wide, tall), Image.Resampling.BICUBIC)
        want = np.asarray(resized)[top : top + size, left : left + size].transpose(2, 0, 1)
        assert np.abs(got[i].round().numpy() - want).max() == TOLERANCE["grid"]
        assert (got[i] - got[i].round()).abs().max() < 1e-4  # whole grey levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("height, width, size", [(256, 256, 224), (100, 300, 64), (30, 40, 64)])
def test_crop_is_the_clip_processor(height, width, size, dtype):
    images = pictures(height, width).to(dtype)
    got = ops.resize_normalize(images, size=size, dtype=torch.float32)
    want = torch.cat([clip_processor(size)(images=to_pil(i), return_tensors="pt").pixel_values for i in images])
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["normalised"])


@pytest.mark.parametrize(
    "height, width, tall, wide",
    [
        pytest.param(512, 512, 224, 224, id="square"),
        pytest.param(300, 200, 224, 149, id="portrait-odd-padding"),
        pytest.param(101, 400, 224 * 101 // 400 + 1, 224, id="wide-rounded-up"),
        pytest.param(40, 30, 224, 168, id="upscale"),
        pytest.param(1, 900, 1, 224, id="a-line-keeps-a-row"),
    ],
)
def test_pad_is_the_antialiased_bicubic(height, width, tall, wide):
    images = pictures(height, width)
    got = ops.resize_normalize(images, "pad")
    grey = torch.stack([torch.from_numpy(np.array(to_pil(i))).permute(2, 0, 1) for i in images]) / 255
    resized = F.interpolate(grey, (tall, wide), mode="bicubic", antialias=True, align_corners=False)
    want = torch.zeros(2, 3, 224, 224)
    top, left = (224 - tall) // 2, (224 - wide) // 2
    want[..., top : top + tall, left : left + wide] = resized
    want = (want - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["normalised"])


def test_one_pixel_by_hand():
    # 0.5 -> trunc(1.5 * 127.5) = 191; constant images stay constant through any resize.
    images = torch.full((1, 3, 9, 5), 0.5)
    for rule in ("crop", "pad"):
        got = ops.resize_normalize(images, rule, size=3, mean=(0.5, 0.25, 0), std=(0.5, 1, 2))
        want = torch.tensor([(191 / 255 - 0.5) / 0.5, 191 / 255 - 0.25, 191 / 255 / 2])
        torch.testing.assert_close(got[0, :, 1, 1], want)


def test_quantised_in_the_images_dtype():
    # bf16 keeps 8 bits: v + 1 and the product are rounded before the truncation, fp32 gives other greys.
    images = torch.linspace(-1.1, 1.1, 8 * 8 * 3).view(1, 3, 8, 8).bfloat16()
    want = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).double()
    assert grid(images, size=8, dtype=torch.float32).round().equal(want)
    assert not grid(images.float(), size=8).round().equal(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounding", ["down", "nearest"])
def test_every_level_and_beside_every_half_as_each_library_saves_it(rounding, dtype):
    """diffusers' own image processor is the oracle of "nearest", DiffSynth's own pipeline that of "down"."""
    levels = torch.arange(-2, 515, dtype=torch.float64) / 255 - 1  # two to a level
    beside = [torch.nextafter(levels.to(dtype), torch.tensor(end, dtype=dtype)) for end in (-9, 9)]
    values = torch.cat([levels.to(dtype), *beside, (levels + 1e-3).to(dtype), (levels - 1e-3).to(dtype)])
    images = values[torch.arange(3 * 48 * 48) % len(values)].view(1, 3, 48, 48)
    if rounding == "nearest":
        processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
        (picture,) = processor.postprocess(images, output_type="pil")
    else:
        pipeline = pytest.importorskip("diffsynth.diffusion.base_pipeline").BasePipeline
        picture = pipeline.vae_output_to_image(None, images)
    want = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    got = grid(images, size=48, rounding=rounding, dtype=torch.float32)[0]
    assert torch.equal(got.round(), want.double()) and len(want.unique()) >= 250
    small = grid(images, size=24, rounding=rounding, dtype=torch.float32)[0]
    shrunk = np.array(picture.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(small.round().numpy(), shrunk.transpose(2, 0, 1))


def test_not_touched_by_autocast_or_matmul_precision():
    images = pictures(90, 70)
    want = ops.resize_normalize(images, size=32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.resize_normalize(images, size=32).equal(want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_strides_batches_and_dtypes():
    images = pictures(60, 80, n=3)
    before = images.clone()
    for rule in ("crop", "pad"):
        want = ops.resize_normalize(images, rule, size=32)
        last = images.to(memory_format=torch.channels_last)
        assert ops.resize_normalize(last, rule, size=32).equal(want)
        alone = torch.cat([ops.resize_normalize(image[None], rule, size=32) for image in images])
        assert alone.equal(want)
        assert ops.resize_normalize(images[:0], rule, size=32).shape == (0, 3, 32, 32)
        assert ops.resize_normalize(images, rule, size=32, dtype=torch.bfloat16).equal(want.bfloat16())
        assert ops.resize_normalize(images.half(), rule, size=32).dtype == torch.float16
    assert images.equal(before)


def test_a_broken_picture_does_not_pass_for_a_black_one():
    images = pictures(40, 40)
    images[0, 1, 20, 20] = torch.nan
    for rule, rounding in itertools.product(("crop", "pad"), ("down", "nearest")):
        got = ops.resize_normalize(images, rule, size=32, rounding=rounding)
        assert got[0].isnan().any() and got[1].isfinite().all()


BAD = [
    pytest.param(dict(rule="stretch"), '"crop" or "pad"', id="rule"),
    pytest.param(dict(images=torch.zeros(3, 8, 8)), r"\(n, 3, H, W\)", id="no-batch"),
    pytest.param(dict(images=torch.zeros(1, 4, 8, 8)), r"\(n, 3, H, W\)", id="four-channels"),
    pytest.param(dict(images=torch.zeros(1, 3, 0, 8)), r"\(n, 3, H, W\)", id="empty"),
    pytest.param(dict(images=torch.zeros(1, 3, 8, 8).byte()), "floating", id="uint8"),
    pytest.param(dict(size=0), "size must be", id="size"),
    pytest.param(dict(rounding="up"), '"down" or "nearest"', id="rounding"),
    pytest.param(dict(mean=(0.5,)), "three numbers", id="mean"),
    pytest.param(dict(std=(0.5, 0, 0.5)), "std not 0", id="std"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_input_says_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.resize_normalize(**(dict(images=torch.zeros(1, 3, 8, 8)) | changes))
