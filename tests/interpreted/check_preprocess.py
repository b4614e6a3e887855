"""resize_normalize's kernel under the interpreter, against Pillow and reference.py (itself held to Pillow and torch).

Run by test_kernels.py, in a process with TRITON_INTERPRET=1: the launchers in `ses_fast.kernels` on CPU tensors.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from ses_fast import ops, reference
from ses_fast.kernels import preprocess

TOLERANCE = {"grid": 1e-3, "crop": 1e-6, "pad": 4e-6}  # grid: grey levels, so that the nearest is Pillow's

SIZES = [
    pytest.param(64, 64, 24, id="square"),
    pytest.param(70, 41, 24, id="portrait-odd-cut"),
    pytest.param(33, 90, 24, id="landscape"),
    pytest.param(24, 24, 24, id="no-pass"),
    pytest.param(24, 37, 24, id="one-pass-less"),
    pytest.param(13, 17, 24, id="upscale-primes"),
    pytest.param(200, 150, 7, id="more-samples-than-a-step"),
    pytest.param(3, 40, 5, id="thin"),
    pytest.param(5, 1, 3, id="one-column"),
]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.float16)]


def pictures(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise past both ends in one, hard edges in the other: what Pillow clamps and rounds after each pass."""
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, generator=noise) * 2.4 - 1.2
    edges = torch.where(torch.rand(3, height // 5 + 1, width // 5 + 1, generator=noise) < 0.5, -1.0, 1.0)
    images[1] = edges.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    return images.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", ["floor", "round"])
@pytest.mark.parametrize("height, width, size", SIZES)
def test_crop(height, width, size, centre, dtype):
    images = pictures(height, width, dtype)
    settings = dict(size=size, centre=centre, dtype=torch.float32)
    grid = preprocess.resize_normalize(images, mean=(0, 0, 0), std=(1, 1, 1), **settings) * 255
    tall = size if height <= width else int(size * height / width)
    wide = size if width <= height else int(size * width / height)
    # round() takes a half to the even number.
    left, top = (round((n - size) / 2) if centre == "round" else (n - size) // 2 for n in (wide, tall))
    for got, image in zip(grid, images, strict=True):
        grey = ((image.permute(1, 2, 0) + 1) * 127.5).clip(0, 255).to(torch.uint8)
        picture = Image.fromarray(grey.numpy()).resize((wide, tall), Image.Resampling.BICUBIC)
        want = np.asarray(picture)[top : top + size, left : left + size].transpose(2, 0, 1)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["grid"])
    got, want = (each.resize_normalize(images, **settings) for each in (preprocess, reference))
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["crop"])


def test_the_centres_differ():
    """43 to 24 leaves 19: floor cuts 9 before, half to even 10. The first rows then differ."""
    images = pictures(43, 24)
    floor, even = (preprocess.resize_normalize(images, size=24, centre=centre) for centre in ("floor", "round"))
    assert floor[..., 1:, :].equal(even[..., :-1, :]) and not floor.equal(even)


# torch's antialiased bicubic repeats the first row of a picture one column wide: no oracle for "one-column".
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height, width, size", SIZES[:-1])
def test_pad(height, width, size, dtype):
    images = pictures(height, width, dtype)
    got, want = (
        each.resize_normalize(images, "pad", size=size, dtype=torch.float32) for each in (preprocess, reference)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["pad"])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_strides_batches_and_dtypes(rule):
    images = pictures(30, 40)
    want = preprocess.resize_normalize(images, rule, size=16)
    last = images.to(memory_format=torch.channels_last)
    assert not last.is_contiguous() and preprocess.resize_normalize(last, rule, size=16).equal(want)
    assert preprocess.resize_normalize(images[1:], rule, size=16).equal(want[1:])
    assert preprocess.resize_normalize(images[:0], rule, size=16).shape == (0, 3, 16, 16)
    half = preprocess.resize_normalize(images, rule, size=16, dtype=torch.float16)
    assert half.equal(want.half())


def test_the_default_dtype_does_not_matter():
    images = pictures(40, 60)
    want = preprocess.resize_normalize(images, "pad", size=24)
    preprocess._axis.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert preprocess.resize_normalize(images, "pad", size=24).equal(want)
    finally:
        torch.set_default_dtype(torch.float32)
        preprocess._axis.cache_clear()


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_broken_picture_does_not_pass_for_a_black_one(rule):
    images = pictures(40, 40)
    images[0, 1, 20, 20] = torch.nan
    got = preprocess.resize_normalize(images, rule, size=32)
    assert got[0].isnan().any() and got[1].isfinite().all()


@pytest.mark.parametrize("height, width", [(64, 160), (160, 64)], ids=["columns", "rows"])
def test_what_the_crop_cuts_off_does_not_matter(height, width):
    images = pictures(height, width)
    want = preprocess.resize_normalize(images, size=24)
    (top, bottom), (left, right) = (each.window() for each in reference.crop_resizes(height, width, 24, "floor"))
    broken = torch.full_like(images, torch.nan)
    broken[..., top:bottom, left:right] = images[..., top:bottom, left:right]
    assert preprocess.resize_normalize(broken, size=24).equal(want)


def test_the_greatest_reduction():
    """The sums are whole numbers below 2^24: the pixels are Pillow's to the bit. At 252 a pass reduces 31.5 times."""
    images = pictures(248, 248)
    got, want = (each.resize_normalize(images, size=8) for each in (preprocess, reference))
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["crop"])
    assert preprocess.unfit(248, 248, "crop", 8) is None and preprocess.unfit(248, 252, "pad", 8) is None
    assert preprocess.unfit(249, 700, "crop", 8) and preprocess.unfit(252, 248, "crop", 8)


def test_a_greater_reduction_is_torchs(monkeypatch):
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)
    images = pictures(64 * 8, 64 * 9)
    assert ops.resize_normalize(images, size=8).equal(reference.resize_normalize(images, size=8))
    with pytest.raises(RuntimeError, match="reduces at most 31 times, and this is 512x576 to 8 pixels"):
        ops.resize_normalize(images, size=8, backend="triton")
    with pytest.raises(ValueError, match="at most 31 times"):
        preprocess.resize_normalize(images, size=8)
    assert ops.resize_normalize(images, "pad", size=8, backend="triton").isfinite().all()
    compiled = torch.compile(lambda images: ops.resize_normalize(images, size=8), fullgraph=True, backend="aot_eager")
    assert compiled(images).equal(reference.resize_normalize(images, size=8))


def test_checks_are_the_references():
    with pytest.raises(ValueError, match='"crop" or "pad"'):
        preprocess.resize_normalize(torch.zeros(1, 3, 8, 8), "stretch")


def test_compile_sees_one_operator(monkeypatch):
    """The dispatch that a CUDA tensor takes, without a graph break."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)

    def prepare(images):
        return ops.resize_normalize(images, size=16, dtype=torch.float16) * 2

    images = pictures(20, 30)
    got = torch.compile(prepare, fullgraph=True, backend="aot_eager")(images)
    assert got.dtype == torch.float16 and got.equal(prepare(images))
