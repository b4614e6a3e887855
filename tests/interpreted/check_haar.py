"""The Haar kernels under the interpreter, against reference.py (itself held to PyWavelets) and PyWavelets.

Run by test_kernels.py, in a process with TRITON_INTERPRET=1: the launchers in `ses_fast.kernels` on CPU tensors.
"""

import warnings

import numpy as np
import pytest
import pywt
import torch

from ses_fast import ops, reference
from ses_fast.kernels import haar

TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-6}  # both compute in fp32

ROWS = [
    pytest.param((2, 32, 128), 4, torch.float32, id="whole-blocks"),
    pytest.param((2, 33, 50), 4, torch.float16, id="odd-height-fp16"),
    pytest.param((1, 1, 3, 17, 5), 1, torch.float32, id="5d-prime"),
    pytest.param((1, 167, 93), 6, torch.float32, id="odd-both-ways-six-levels"),
    pytest.param((1, 1, 7), 2, torch.float32, id="one-row"),
    pytest.param((2, 1, 1), 6, torch.float16, id="one-pixel"),
    pytest.param((70, 30), 8, torch.float32, id="more-levels-than-a-launch-no-leading-dimension"),
    pytest.param((2, 6, 5), 0, torch.float32, id="level-0"),
]


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def flat(coeffs: list) -> list:
    return [coeffs[0], *(band for triple in coeffs[1:] for band in triple)]


@pytest.mark.filterwarnings("ignore:level .* is too high")
@pytest.mark.parametrize("shape, level, dtype", ROWS)
def test_all_ops(shape, level, dtype):
    x, atol = latents(shape, dtype), TOLERANCE[dtype]
    coeffs = haar.haar_dwt2(x, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pywt.wavedec2(x.double().numpy(), "db1", "symmetric", level)
    assert len(coeffs) == len(theirs) == level + 1
    for ours, other, plain in zip(flat(coeffs), flat(theirs), flat(reference.haar_dwt2(x, level)), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == plain.shape and ours.is_contiguous()
        np.testing.assert_allclose(ours, other, rtol=0, atol=atol)

    back = haar.haar_idwt2(coeffs, shape[-2:])
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, x.float(), rtol=0, atol=atol)
    rounded = [coeffs[0].to(dtype), *(tuple(band.to(dtype) for band in triple) for triple in coeffs[1:])]
    back = haar.haar_idwt2(rounded, shape[-2:])
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, reference.haar_idwt2(rounded, shape[-2:]), rtol=0, atol=atol)

    low, residual = haar.split_low_band(x, level)
    want_low, want_residual = reference.split_low_band(x, level)
    torch.testing.assert_close(low, want_low, rtol=0, atol=atol)
    torch.testing.assert_close(residual, want_residual, rtol=0, atol=atol)

    merged = haar.merge_low_band(residual, low + 1, level, dtype=dtype)
    torch.testing.assert_close(merged, reference.merge_low_band(residual, low + 1, level, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: latents((2, 24, 34)).mT, id="transposed"),
        pytest.param(lambda: latents((16, 16, 8)).permute(2, 0, 1), id="channels-last-as-flux2"),
        pytest.param(lambda: latents((3, 40, 90))[:, 1::2, ::3], id="strided"),
        pytest.param(lambda: latents((1, 33, 20)).expand(3, 33, 20), id="expanded"),
    ],
)
def test_strides_do_not_matter(view):
    x = view()
    assert not x.is_contiguous()
    bands = haar.haar_dwt2(x, 2)
    for ours, plain in zip(flat(bands), flat(reference.haar_dwt2(x, 2)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=TOLERANCE[x.dtype])
    strided = [bands[0].mT.contiguous().mT, *bands[1:]]
    assert haar.haar_idwt2(strided, x.shape[-2:]).equal(haar.haar_idwt2(bands, x.shape[-2:]))
    for ours, plain in zip(haar.split_low_band(x, 2), reference.split_low_band(x, 2), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=TOLERANCE[x.dtype])
    low = bands[0]
    assert haar.merge_low_band(x, low, 2).equal(reference.merge_low_band(x, low, 2))


@pytest.mark.parametrize(
    "residual, low",
    [
        pytest.param((1, 3, 10, 12), (5, 3, 3, 3), id="a-population"),
        pytest.param((3, 10, 12), (5, 3, 3, 3), id="fewer-dimensions"),
        pytest.param((5, 3, 10, 12), (3, 3, 3), id="one-low-band-for-all"),
        pytest.param((5, 1, 10, 12), (1, 3, 3, 3), id="both-ways"),
    ],
)
def test_merge_broadcasts(residual, low):
    residual, low = latents(residual), latents(low)
    assert haar.merge_low_band(residual, low, 2).equal(reference.merge_low_band(residual, low, 2))


def test_checks_are_the_references():
    x = latents((4, 4))
    with pytest.raises(ValueError, match="level must be an int"):
        haar.haar_dwt2(x, -1)
    with pytest.raises(ValueError, match="4x6 transform"):
        haar.haar_idwt2(haar.haar_dwt2(x, 1), (4, 6))
    with pytest.raises(ValueError, match=r"must end in \(2, 2\)"):
        haar.merge_low_band(x, latents((3, 2)), 1)
    with pytest.warns(UserWarning, match="level 3 is too high"):
        haar.split_low_band(x, 3)


def test_compile_sees_one_operator_each(monkeypatch):
    """The dispatch that a CUDA tensor takes, without a graph break; the operators' fakes agree with what they do."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)

    def all_four(x):
        coeffs = ops.haar_dwt2(x, 2)
        low, residual = ops.split_low_band(ops.haar_idwt2(coeffs, x.shape[-2:]), 2)
        return ops.merge_low_band(residual, low * 2, 2, dtype=torch.float16), flat(coeffs)

    x = latents((2, 18, 13))
    got, bands = torch.compile(all_four, fullgraph=True, backend="aot_eager")(x)
    want, plain = all_four(x)
    assert got.dtype == torch.float16 and got.equal(want)
    assert all(a.equal(b) for a, b in zip(bands, plain, strict=True))
    torch.library.opcheck(haar._dwt2_op, (x, 2), test_utils=("test_schema", "test_faketensor"))
