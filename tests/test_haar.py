"""haar_dwt2, haar_idwt2, split_low_band and merge_low_band against hand-worked numbers and PyWavelets."""

import warnings

import numpy as np
import pytest
import pywt
import torch

from ses_fast import ops

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-6, torch.bfloat16: 5e-6}

SHAPES = [
    pytest.param((16, 128, 128), id="16x128x128-z-image-at-1024"),
    pytest.param((2, 166, 166), id="2x166x166-qwen-at-1328"),
    pytest.param((2, 167, 93), id="2x167x93-odd-both-ways"),
    pytest.param((1, 1, 3, 17, 5), id="5d-prime-sizes"),
    pytest.param((64, 48), id="no-leading-dimension"),
    pytest.param((1, 1, 7), id="one-row"),
    pytest.param((2, 1, 1), id="one-pixel"),
]


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def flat(coeffs: list) -> list:
    return [coeffs[0], *(band for triple in coeffs[1:] for band in triple)]


def quiet(function, *args):
    """The levels above the useful one warn; that is tested by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def wavedec2(x: torch.Tensor, level: int) -> list:
    return quiet(lambda: pywt.wavedec2(x.double().numpy(), "db1", "symmetric", level))


def test_two_by_three_by_hand():
    # The last column is repeated: blocks [[1, 2], [4, 8]] and [[3, 3], [6, 6]].
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 8.0, 6.0]])
    cA, (cH, cV, cD) = ops.haar_dwt2(x, 1)
    assert cA.tolist() == [[7.5, 9.0]]
    assert cH.tolist() == [[-4.5, -3.0]]
    assert cV.tolist() == [[-2.5, 0.0]]
    assert cD.tolist() == [[1.5, 0.0]]
    low, residual = ops.split_low_band(x, 1)
    assert low.tolist() == [[7.5, 9.0]]
    assert residual.tolist() == [[-2.75, -1.75, -1.5], [0.25, 4.25, 1.5]]


def test_odd_size_is_not_a_block_mean():
    # 3 -> 2 -> 1: [1, 2, 6] pairs to (1, 2), (6, 6), so 6 weighs as much as 1 and 2 together.
    low, _ = quiet(ops.split_low_band, torch.tensor([[1.0, 2.0, 6.0]]), 2)
    assert low.tolist() == [[15.0]]


@pytest.mark.parametrize("level", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_band_is_pywavelets(shape, level):
    x = latents(shape)
    ours, theirs = quiet(ops.haar_dwt2, x, level), wavedec2(x, level)
    assert len(ours) == len(theirs) == level + 1
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[x.dtype])
    back = ops.haar_idwt2(ours, shape[-2:])
    torch.testing.assert_close(back, x, rtol=0, atol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("level", [1, 4])
def test_low_precision_computes_in_fp32(dtype, level):
    x = latents((4, 33, 50), dtype)
    coeffs = ops.haar_dwt2(x, level)
    assert all(band.dtype == torch.promote_types(dtype, torch.float32) for band in flat(coeffs))
    for a, b in zip(flat(coeffs), flat(wavedec2(x, level)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype])
    back = ops.haar_idwt2(coeffs, (33, 50))
    assert back.dtype == coeffs[0].dtype
    torch.testing.assert_close(back, x.to(back.dtype), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 5, 40, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_new_low_band_is_pywavelets(shape, level):
    x = latents(shape)
    low, residual = quiet(ops.split_low_band, x, level)
    if level > 6:  # PyWavelets reaches one number and doubles it at each level from there
        torch.testing.assert_close(ops.merge_low_band(residual, low, level), x, rtol=1e-10, atol=1e-10)
        return
    coeffs = wavedec2(x, level)
    np.testing.assert_allclose(low, coeffs[0], rtol=0, atol=TOLERANCE[x.dtype])
    coeffs[0] = np.random.default_rng(1).standard_normal(coeffs[0].shape)
    want = pywt.waverec2(coeffs, "db1", "symmetric")[..., : shape[-2], : shape[-1]]
    got = ops.merge_low_band(residual, torch.from_numpy(coeffs[0]), level)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[x.dtype])
    # Nothing but the lowest band has changed.
    for a, b in zip(flat(quiet(ops.haar_dwt2, got, level))[1:], flat(coeffs)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[x.dtype])


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: latents((2, 48, 34)).mT, id="transposed"),
        pytest.param(lambda: latents((64, 64, 128)).permute(2, 0, 1), id="channels-last-as-flux2"),
        pytest.param(lambda: latents((3, 40, 90))[:, 1::2, ::3], id="strided"),
        pytest.param(lambda: latents((1, 33, 20)).expand(3, 33, 20), id="expanded"),
    ],
)
def test_strides_do_not_matter(view):
    x = view()
    assert not x.is_contiguous()
    for ours, theirs in zip(flat(ops.haar_dwt2(x, 3)), flat(ops.haar_dwt2(x.contiguous(), 3)), strict=True):
        assert ours.equal(theirs)
    low, residual = ops.split_low_band(x, 3)
    want_low, want_residual = ops.split_low_band(x.contiguous(), 3)
    assert low.equal(want_low) and residual.equal(want_residual)
    strided = residual.mT.contiguous().mT
    assert ops.merge_low_band(strided, low, 3).equal(ops.merge_low_band(residual, low, 3))


def test_merge_broadcasts_and_casts():
    x = latents((1, 3, 20, 12), torch.float32)
    low, residual = ops.split_low_band(x, 2)
    many = low + torch.arange(5.0)[:, None, None, None]
    got = ops.merge_low_band(residual, many, 2, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    for i in range(5):
        alone = ops.merge_low_band(residual, many[i : i + 1], 2)
        torch.testing.assert_close(alone, x + i / 4, rtol=0, atol=5e-6)
        assert got[i : i + 1].equal(alone.bfloat16())  # rounded once, to the nearest


def test_the_input_stays_as_it_was():
    x = latents((2, 9, 9), torch.float32).requires_grad_()
    before = x.detach().clone()
    low, residual = ops.split_low_band(x, 0)
    low.add_(1), residual.add_(1)
    assert x.detach().equal(before) and not residual.requires_grad


def test_energy_and_white_noise():
    x = latents((8, 64, 64))
    coeffs = flat(ops.haar_dwt2(x, 4))
    energy = sum(band.square().sum() for band in coeffs)
    torch.testing.assert_close(energy, x.square().sum())  # an orthonormal transform of an even size
    assert 0.9 < coeffs[-1].var() < 1.1


def test_half_resolution_preview_searches_the_same_coefficients():
    # LL1 of a candidate at level J is the candidate at level J - 1 built on LL1 of the base.
    x = latents((2, 64, 96))
    low, residual = ops.split_low_band(x, 4)
    half_low, half_residual = ops.split_low_band(ops.haar_dwt2(x, 1)[0], 3)
    torch.testing.assert_close(half_low, low)
    new = latents(tuple(low.shape)) + 1
    whole = ops.haar_dwt2(ops.merge_low_band(residual, new, 4), 1)[0]
    torch.testing.assert_close(whole, ops.merge_low_band(half_residual, new, 3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size, level", [((8, 8), 4), ((3, 100), 2), ((1, 1), 1)], ids=["8x8", "short-side", "pixel"])
def test_a_level_too_high_warns_as_pywavelets(size, level):
    x = latents(size)
    for transform in (ops.haar_dwt2, ops.split_low_band):
        with pytest.warns(UserWarning, match=f"level {level} is too high"):
            transform(x, level)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform(x, level - 1)
    with pytest.warns(UserWarning, match="too high"):
        pywt.wavedec2(x.numpy(), "db1", level=level)


BAD = [
    pytest.param(lambda: ops.haar_dwt2(latents((4, 4)), -1), "level must be an int, 0 or more", id="level"),
    pytest.param(lambda: ops.haar_dwt2(latents((4, 4)), 101), "level must be at most 100, got 101", id="too-deep"),
    pytest.param(lambda: ops.merge_low_band(latents((4, 4)), latents((1, 1)), 140), "at most 100", id="merge-too-deep"),
    pytest.param(lambda: ops.haar_dwt2(latents((4, 4)), 1.0), "level must be an int", id="float-level"),
    pytest.param(lambda: ops.haar_dwt2(latents((4,)), 1), r"must be \[..., H, W\]", id="1d"),
    pytest.param(lambda: ops.haar_dwt2(latents((0, 4, 4)), 1), "not empty", id="empty"),
    pytest.param(lambda: ops.haar_dwt2(torch.ones(4, 4, dtype=torch.int32), 1), "fp16, bf16", id="int"),
    pytest.param(lambda: ops.split_low_band(latents((4, 0)), 1), "not empty", id="split-empty"),
    pytest.param(lambda: ops.merge_low_band(latents((4, 4)), latents((3, 2)), 1), r"\(2, 2\)", id="low-size"),
    pytest.param(lambda: ops.merge_low_band(latents((4,)), latents((2, 2)), 1), r"be \[..., H, W\]", id="1d-base"),
    pytest.param(lambda: ops.merge_low_band(latents((4, 4)), latents((2, 2)), -1), "level", id="merge-level"),
    pytest.param(lambda: ops.haar_idwt2([latents((2, 2))], (4, 4)), "level 0", id="missing-bands"),
    pytest.param(lambda: ops.haar_idwt2(ops.haar_dwt2(latents((4, 4)), 1), (4, 6)), "4x6", id="another-size"),
    pytest.param(lambda: ops.haar_dwt2(latents((4, 4)), 1, backend="cuda"), "auto, triton, torch", id="backend"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cA, cH, cV, cD: [cA[0], (cH, cV, cD)], id="one-cA-for-two-latents"),
        pytest.param(lambda cA, cH, cV, cD: [cA, (cH, cV[:1], cD)], id="one-detail-broadcasts"),
        pytest.param(lambda cA, cH, cV, cD: [cA, (cH, cV, cD[..., :1])], id="a-narrow-detail"),
        pytest.param(lambda cA, cH, cV, cD: [cA, (cH, cV)], id="a-detail-is-missing"),
    ],
)
def test_bands_of_other_shapes(change):
    cA, details = ops.haar_dwt2(latents((2, 4, 6), torch.float32), 1)
    with pytest.raises(ValueError, match=r"4x6 transform at level 1 .* got"):
        ops.haar_idwt2(change(cA, *details), (4, 6))


def test_leading_dimensions_that_do_not_broadcast():
    with pytest.raises(ValueError, match="must broadcast"):
        ops.merge_low_band(torch.zeros(3, 4, 4), torch.zeros(2, 2, 2), 1)
