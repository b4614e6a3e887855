"""The Haar kernels against reference.py (in fp64) and PyWavelets. Interpreted by test_kernels.py, or on a GPU."""

import itertools
import warnings

import pytest
import torch
from kernel_device import DEVICE, DTYPES, needs_gpu, noise, rows

from ses_fast import ops, reference

pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore:level .* is too high")]

# The kernels add in fp32 and round once, so half precision differs by a rounding where fp32 is next to a tie.
TOLERANCE = {
    torch.float32: dict(rtol=0, atol=5e-6),
    torch.float16: dict(rtol=2**-10, atol=5e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=5e-6),
}
CLOSE = TOLERANCE[torch.float32]

SHAPES = rows(
    [
        pytest.param((2, 32, 128), 4, id="2x32x128-whole-blocks"),
        pytest.param((2, 33, 50), 4, id="2x33x50-odd-height"),
        pytest.param((1, 1, 3, 17, 5), 1, id="1x1x3x17x5-prime"),
        pytest.param((1, 167, 93), 6, id="1x167x93-odd-both-ways-six-levels"),
        pytest.param((1, 1, 7), 2, id="1x1x7-one-row"),
        pytest.param((2, 1, 1), 6, id="2x1x1-one-pixel"),
        pytest.param((70, 30), 8, id="70x30-more-levels-than-a-launch-no-leading-dimension"),
        pytest.param((2, 6, 5), 0, id="2x6x5-level-0"),
    ],
    [
        pytest.param((1, 16, 128, 128), 4, id="1x16x128x128-z-image-flux1-at-1024"),
        pytest.param((1, 16, 166, 166), 4, id="1x16x166x166-qwen-at-1328"),
        pytest.param((1, 128, 64, 64), 4, id="1x128x64x64-flux2-at-1024"),
        pytest.param((1, 4, 64, 64), 4, id="1x4x64x64-sdxl-at-512"),
        pytest.param((1, 16, 21, 90, 160), 4, id="1x16x21x90x160-5d-video"),
        pytest.param((1, 4, 61, 67), 6, id="1x4x61x67-six-levels-prime"),
        pytest.param((1, 2, 300, 7), 8, id="1x2x300x7-block-of-more-than-a-tile"),
        pytest.param((1, 1, 1, 1), 0, id="1x1x1x1-one-number"),
        pytest.param((1, 1, 4096, 4096), 5, id="1x1x4096x4096"),
    ],
)


def flat(coeffs: list) -> list:
    return [coeffs[0], *itertools.chain.from_iterable(coeffs[1:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, level", SHAPES)
def test_all_ops(shape, level, dtype):
    x = noise(*shape, dtype=dtype)
    exact = x.double()
    coeffs = ops.haar_dwt2(x, level, backend="triton")
    assert len(coeffs) == level + 1
    for ours, want in zip(flat(coeffs), flat(reference.haar_dwt2(exact, level)), strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        torch.testing.assert_close(ours, want.float(), **CLOSE)

    back = ops.haar_idwt2(coeffs, shape[-2:], backend="triton")
    torch.testing.assert_close(back, x.float(), **CLOSE)
    rounded = [coeffs[0].to(dtype), *(tuple(band.to(dtype) for band in triple) for triple in coeffs[1:])]
    back = ops.haar_idwt2(rounded, shape[-2:], backend="triton")
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, reference.haar_idwt2(rounded, shape[-2:]), **CLOSE)

    low, residual = ops.split_low_band(x, level, backend="triton")
    want_low, want_residual = reference.split_low_band(exact, level)
    torch.testing.assert_close(low, want_low.float(), **CLOSE)
    torch.testing.assert_close(residual, want_residual.float(), **CLOSE)
    merged = ops.merge_low_band(residual, low, level, dtype=dtype, backend="triton")
    torch.testing.assert_close(merged, x, **TOLERANCE[dtype])
    merged = ops.merge_low_band(residual, low + 1, level, dtype=dtype, backend="triton")
    assert merged.equal(reference.merge_low_band(residual, low + 1, level, dtype=dtype))


@pytest.mark.parametrize("shape, level", SHAPES[:8])
def test_bands_are_pywavelets(shape, level):
    pywt = pytest.importorskip("pywt")
    x = noise(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pywt.wavedec2(x.double().cpu().numpy(), "db1", "symmetric", level)
    for ours, other in zip(flat(ops.haar_dwt2(x, level, backend="triton")), flat(theirs), strict=True):
        torch.testing.assert_close(ours.double().cpu(), torch.from_numpy(other), **CLOSE)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: noise(2, 24, 34).mT, id="2x34x24-transposed"),
        pytest.param(lambda: noise(1, 128, 8).mT.unflatten(2, (16, 8)), id="1x8x16x8-channels-last-as-flux2"),
        pytest.param(lambda: noise(3, 40, 90)[:, 1::2, ::3], id="3x20x30-strided"),
        pytest.param(lambda: noise(1, 33, 20).expand(3, 33, 20), id="3x33x20-expanded"),
    ],
)
def test_strides_do_not_matter(view):
    x = view()
    assert not x.is_contiguous()
    contiguous = x.contiguous()
    bands = ops.haar_dwt2(x, 2, backend="triton")
    for ours, want in zip(flat(bands), flat(ops.haar_dwt2(contiguous, 2, backend="triton")), strict=True):
        assert ours.equal(want)
    strided = [bands[0].mT.contiguous().mT, *bands[1:]]
    back = ops.haar_idwt2(strided, x.shape[-2:], backend="triton")
    assert back.equal(ops.haar_idwt2(bands, x.shape[-2:], backend="triton"))
    for ours, want in zip(ops.split_low_band(x, 2, backend="triton"), reference.split_low_band(x, 2), strict=True):
        torch.testing.assert_close(ours, want, **CLOSE)
    merged = ops.merge_low_band(x, bands[0], 2, backend="triton")
    assert merged.equal(ops.merge_low_band(contiguous, bands[0], 2, backend="triton"))


@pytest.mark.parametrize(
    "residual, low",
    [
        pytest.param((1, 3, 10, 12), (5, 3, 3, 3), id="1x3-5x3-a-population"),
        pytest.param((3, 10, 12), (5, 3, 3, 3), id="3-5x3-fewer-dimensions"),
        pytest.param((5, 3, 10, 12), (3, 3, 3), id="5x3-3-one-low-band-for-all"),
        pytest.param((5, 1, 10, 12), (1, 3, 3, 3), id="5x1-1x3-both-ways"),
        pytest.param((10, 12), (2, 5, 3, 3), id="none-2x5-one-plane"),
        pytest.param((1, 2, 1, 10, 12), (4, 2, 3, 3, 3), id="1x2x1-4x2x3-repeated-within"),
    ],
)
def test_merge_broadcasts(residual, low):
    residual, low = noise(*residual), noise(*low, seed=1)
    assert ops.merge_low_band(residual, low, 2, backend="triton").equal(reference.merge_low_band(residual, low, 2))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounds_to_the_nearest(dtype):
    """fp32 halfway points between neighbours, above even and above odd ones, and one step to each side of them."""
    bits = torch.arange(1, 2**15 - 1, 7, device=DEVICE, dtype=torch.int16)
    steps, following = bits.view(dtype).float(), (bits + 1).view(dtype).float()
    inside = following.isfinite() & (steps > 2.0**-10) & (steps < 2.0**10)
    steps, following, odd = steps[inside], following[inside], (bits & 1)[inside]
    half = steps + (following - steps) / 2
    assert (half - steps).equal(following - half) and 0.4 < odd.float().mean() < 0.6
    x = torch.cat([half, half.nextafter(steps), half.nextafter(following), -half])[None]
    assert ops.merge_low_band(x, torch.zeros_like(x), 0, dtype=dtype, backend="triton").equal(x.to(dtype))


def test_compile_sees_one_operator_each(monkeypatch):
    """Without a graph break; the operators' fakes agree with what they do."""
    from ses_fast.kernels import haar  # imports triton

    monkeypatch.undo()

    def all_four(x):
        coeffs = ops.haar_dwt2(x, 2, backend="triton")
        back = ops.haar_idwt2(coeffs, x.shape[-2:], backend="triton")
        low, residual = ops.split_low_band(back, 2, backend="triton")
        return ops.merge_low_band(residual, low * 2, 2, dtype=torch.float16, backend="triton"), flat(coeffs)

    x = noise(2, 18, 13)
    got, bands = torch.compile(all_four, fullgraph=True, backend="aot_eager")(x)
    want, plain = all_four(x)
    assert got.dtype == torch.float16 and got.equal(want)
    assert all(a.equal(b) for a, b in zip(bands, plain, strict=True))
    low, residual = noise(2, 5, 4), noise(2, 18, 13)
    torch.library.opcheck(
        haar.fill_split_low_band.operator, (x, low, residual, 2), test_utils=("test_schema", "test_faketensor")
    )
