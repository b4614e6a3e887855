"""resize_normalize's kernel against Pillow and reference.py (itself held to Pillow and torch).

Interpreted by test_kernels.py, or on a GPU.
"""

import pytest
import torch
from kernel_device import DEVICE, DTYPES, needs_gpu, rows

from ses_fast import ops, reference

pytestmark = needs_gpu

TOLERANCE = {"grid": 1e-3, "crop": 1e-6, "pad": 4e-6}  # grid: grey levels, so that the nearest is Pillow's

SIZES = rows(
    [
        pytest.param(64, 64, 24, id="64x64-to-24"),
        pytest.param(70, 41, 24, id="70x41-to-24-portrait-odd-cut"),
        pytest.param(33, 90, 24, id="33x90-to-24-landscape"),
        pytest.param(24, 24, 24, id="24x24-to-24-no-pass"),
        pytest.param(24, 37, 24, id="24x37-to-24-one-pass-less"),
        pytest.param(13, 17, 24, id="13x17-to-24-upscale-primes"),
        pytest.param(200, 150, 7, id="200x150-to-7-more-samples-than-a-step"),
        pytest.param(3, 40, 5, id="3x40-to-5-thin"),
    ],
    [
        pytest.param(1024, 1024, 224, id="1024x1024"),
        pytest.param(1328, 1328, 224, id="1328x1328-qwen"),
        pytest.param(928, 1664, 224, id="928x1664-qwen"),
        pytest.param(1001, 999, 224, id="1001x999-odd-both-ways"),
        pytest.param(1024, 1029, 224, id="1024x1029-odd-cut-225-to-224"),
        pytest.param(130, 100, 224, id="130x100-upscale"),
        pytest.param(224, 224, 224, id="224x224-no-pass"),
        pytest.param(4096, 4096, 224, id="4096x4096"),
    ],
)
ONE_COLUMN = pytest.param(5, 1, 3, id="5x1-to-3-one-column")


def kernel(images: torch.Tensor, *args, **settings) -> torch.Tensor:
    """The op on the device, of CPU images; back on the CPU."""
    return ops.resize_normalize(images.to(DEVICE), *args, backend="triton", **settings).cpu()


def pictures(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise past both ends in one, hard edges in the other: what Pillow clamps and rounds after each pass."""
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, generator=noise) * 2.4 - 1.2
    edges = torch.where(torch.rand(3, height // 5 + 1, width // 5 + 1, generator=noise) < 0.5, -1.0, 1.0)
    images[1] = edges.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    return images.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", ["floor", "round"])
@pytest.mark.parametrize("height, width, size", [*SIZES, ONE_COLUMN])
def test_crop_is_pillow_bit_for_bit(height, width, size, centre, dtype):
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    images = pictures(height, width, dtype)
    settings = dict(size=size, centre=centre, dtype=torch.float32)
    grid = kernel(images, mean=(0, 0, 0), std=(1, 1, 1), **settings) * 255
    tall = size if height <= width else int(size * height / width)
    wide = size if width <= height else int(size * width / height)
    # round() takes a half to the even number.
    left, top = (round((n - size) / 2) if centre == "round" else (n - size) // 2 for n in (wide, tall))
    for got, each in zip(grid, images, strict=True):
        grey = ((each.permute(1, 2, 0) + 1) * 127.5).clip(0, 255).to(torch.uint8)  # in the images' dtype
        picture = image.fromarray(grey.numpy())
        for shape in [(wide, height), (wide, tall)]:  # across first; in one call Pillow 13 may go down first
            picture = picture.resize(shape, image.Resampling.BICUBIC)
        want = np.asarray(picture)[top : top + size, left : left + size].transpose(2, 0, 1)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["grid"])
    got, want = kernel(images, **settings), reference.resize_normalize(images, **settings)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["crop"])


def beside_the_halves(dtype: torch.dtype) -> torch.Tensor:
    """[1, 3, 48, 48]: all 256 levels, the halves between them, and what is just beside both; past both ends too."""
    levels = torch.arange(-2, 515, dtype=torch.float64) / 255 - 1  # two to a level
    near = torch.cat(
        [levels.to(dtype).float(), *(torch.nextafter(levels.float(), torch.tensor(end)) for end in (-9, 9))]
    )
    values = torch.cat([near, near + 1e-3, near - 1e-3])
    return values[torch.arange(3 * 48 * 48) % len(values)].view(1, 3, 48, 48).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["down", "nearest"])
def test_every_level_is_the_saved_pictures(rounding, dtype):
    """No pass: 48 pixels to 48. The oracles are each library's own lines, in its own dtypes."""
    images = beside_the_halves(dtype)
    got = kernel(images, size=48, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32, rounding=rounding) * 255
    if rounding == "down":
        want = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8)
    else:
        want = torch.from_numpy(((images * 0.5 + 0.5).clamp(0, 1).float().numpy() * 255).round().astype("uint8"))
    assert len(want.unique()) == 256 or dtype == torch.bfloat16
    torch.testing.assert_close(got, want.float(), rtol=0, atol=TOLERANCE["grid"])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_the_nearest_level(rule):
    images = pictures(70, 41)
    settings = dict(size=24, rounding="nearest")
    got, want = kernel(images, rule, **settings), reference.resize_normalize(images, rule, **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[rule])
    assert not torch.allclose(got, kernel(images, rule, size=24), atol=1e-3)


def test_the_centres_differ():
    """43 to 24 leaves 19: floor cuts 9 before, half to even 10. The first rows then differ."""
    images = pictures(43, 24)
    floor, even = (kernel(images, size=24, centre=centre) for centre in ("floor", "round"))
    assert floor[..., 1:, :].equal(even[..., :-1, :]) and not floor.equal(even)


# torch's antialiased bicubic repeats the first row of a picture one column wide: no oracle for ONE_COLUMN.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height, width, size", SIZES)
def test_pad_is_the_antialiased_bicubic(height, width, size, dtype):
    images = pictures(height, width, dtype)
    settings = dict(size=size, dtype=torch.float32)
    got, want = kernel(images, "pad", **settings), reference.resize_normalize(images, "pad", **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["pad"])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_strides_batches_and_dtypes(rule):
    images = pictures(30, 40)
    want = kernel(images, rule, size=16)
    last = images.to(memory_format=torch.channels_last)
    assert not last.is_contiguous() and kernel(last, rule, size=16).equal(want)
    assert kernel(images[1:], rule, size=16).equal(want[1:])
    assert kernel(images[:0], rule, size=16).shape == (0, 3, 16, 16)
    for dtype in (each.values[0] for each in DTYPES):
        assert kernel(images, rule, size=16, dtype=dtype).equal(want.to(dtype))


def test_the_default_dtype_does_not_matter():
    images = pictures(41, 59)  # a size of no other test: the weights of a size are made once
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = kernel(images, "pad", size=23)
    finally:
        torch.set_default_dtype(torch.float32)
    want = reference.resize_normalize(images, "pad", size=23)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["pad"])


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_broken_picture_does_not_pass_for_a_black_one(rule):
    images = pictures(40, 40)
    images[0, 1, 20, 20] = torch.nan
    for rounding in ("down", "nearest"):
        got = kernel(images, rule, size=32, rounding=rounding)
        assert got[0].isnan().any() and got[1].isfinite().all()


@pytest.mark.parametrize("height, width", [(64, 160), (160, 64)], ids=["columns", "rows"])
def test_what_the_crop_cuts_off_does_not_matter(height, width):
    images = pictures(height, width)
    want = kernel(images, size=24)
    (top, bottom), (left, right) = (each.window() for each in reference.crop_resizes(height, width, 24, "floor"))
    broken = torch.full_like(images, torch.nan)
    broken[..., top:bottom, left:right] = images[..., top:bottom, left:right]
    assert kernel(broken, size=24).equal(want)


def test_the_greatest_reduction():
    """The sums are whole numbers below 2^24: the pixels are Pillow's to the bit. At 252 a pass reduces 31.5 times."""
    images = pictures(248, 248)
    from ses_fast.kernels import preprocess  # imports triton

    got, want = kernel(images, size=8), reference.resize_normalize(images, size=8)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE["crop"])
    assert preprocess.unfit(248, 248, "crop", 8) is None and preprocess.unfit(248, 252, "pad", 8) is None
    assert preprocess.unfit(249, 700, "crop", 8) and preprocess.unfit(252, 248, "crop", 8)


def test_a_greater_reduction_is_torchs(monkeypatch):
    from ses_fast.kernels import preprocess  # imports triton

    monkeypatch.undo()
    images = pictures(64 * 8, 64 * 9).to(DEVICE)
    want = ops.resize_normalize(images, size=8, backend="torch")
    assert ops.resize_normalize(images, size=8).equal(want)
    with pytest.raises(RuntimeError, match="reduces at most 31 times, and this is 512x576 to 8 pixels"):
        ops.resize_normalize(images, size=8, backend="triton")
    with pytest.raises(ValueError, match="at most 31 times"):
        preprocess.resize_normalize(images, size=8)
    assert ops.resize_normalize(images, "pad", size=8, backend="triton").isfinite().all()
    compiled = torch.compile(lambda images: ops.resize_normalize(images, size=8), fullgraph=True, backend="aot_eager")
    assert compiled(images).equal(want)


def test_checks_come_before_the_kernel():
    with pytest.raises(ValueError, match='"crop" or "pad"'):
        kernel(torch.zeros(1, 3, 8, 8), "stretch")


def test_compile_sees_one_operator(monkeypatch):
    """Without a graph break; the operator's fake agrees with what it does."""
    from ses_fast.kernels import preprocess  # imports triton

    monkeypatch.undo()

    def prepare(images):
        return ops.resize_normalize(images, size=16, dtype=torch.float16, backend="triton") * 2

    images = pictures(20, 30).to(DEVICE)
    got = torch.compile(prepare, fullgraph=True, backend="aot_eager")(images)
    assert got.dtype == torch.float16 and got.equal(prepare(images))
    given = images, prepare(images).float(), "crop", [0.0] * 3, [1.0] * 3, "floor", "down"
    torch.library.opcheck(
        preprocess.fill_resize_normalize.operator, given, test_utils=("test_schema", "test_faketensor")
    )
