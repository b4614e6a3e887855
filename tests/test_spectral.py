"""split, merge and sample_population for any wavelet, against PyWavelets."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import pywt
import torch

from ses_fast import ops, spectral
from ses_fast.reference import philox_normal

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-5}
INVERTIBLE = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]  # dmey is a cut-off filter

CASES = [
    pytest.param("db2", (1, 16, 32, 32), 2, id="db2-even"),
    pytest.param("bior1.3", (1, 3, 41, 23), 2, id="bior1.3-odd"),
    pytest.param("sym4", (1, 3, 17, 5), 2, id="sym4-shorter-than-the-filter"),
    pytest.param("coif1", (1, 2, 3, 20, 9), 1, id="coif1-5d"),
    pytest.param("db3", (6, 8), 0, id="level-0"),
    pytest.param("rbio2.2", (1, 1, 1), 1, id="one-number"),
    pytest.param("haar", (1, 4, 19, 14), 3, id="haar"),
    pytest.param("DB2", (1, 2, 16, 12), 1, id="any-case-as-pywavelets"),
]


def latents(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def quiet(function, *args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **settings)


def check_against_pywavelets(wavelet, x, level):
    low, residual = quiet(spectral.split, x, wavelet, level)
    coeffs = quiet(pywt.wavedec2, x.double().numpy(), wavelet, "symmetric", level)
    wide = torch.promote_types(x.dtype, torch.float32)
    assert low.dtype == residual.dtype == wide
    scale = max(1.0, np.abs(coeffs[0]).max())
    np.testing.assert_allclose(low, coeffs[0], rtol=0, atol=TOLERANCE[x.dtype] * scale)
    torch.testing.assert_close(
        spectral.merge(residual, low, wavelet, level), x.to(wide), rtol=0, atol=TOLERANCE[x.dtype] * scale
    )
    coeffs[0] = np.random.default_rng(0).standard_normal(coeffs[0].shape)
    want = pywt.waverec2(coeffs, wavelet, "symmetric")[..., : x.shape[-2], : x.shape[-1]]
    got = spectral.merge(residual, torch.from_numpy(coeffs[0]).to(wide), wavelet, level)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[x.dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wavelet, shape, level", CASES)
def test_split_and_merge_are_pywavelets(wavelet, shape, level, dtype):
    check_against_pywavelets(wavelet, latents(shape, dtype), level)


def test_every_wavelet_of_pywavelets():
    for wavelet in INVERTIBLE:
        check_against_pywavelets(wavelet, latents((2, 20, 13)), 2)


def test_haar_is_the_op():
    x = latents((1, 3, 21, 10), torch.float32)
    for ours, theirs in zip(spectral.split(x, "db1", 2), ops.split_low_band(x, 2), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "bior1.3", "sym4"])
def test_population_is_pywavelets(wavelet):
    x = latents((1, 4, 27, 34), torch.float32)
    low, residual = quiet(spectral.split, x, wavelet, 2)
    mean, std = torch.linspace(-1, 1, low.numel()), torch.linspace(0.5, 2, low.numel())
    draws = torch.randn(3, low.numel(), generator=torch.Generator().manual_seed(1))
    candidates, lows = spectral.sample_population(residual, mean, std, wavelet, 2, popsize=3, draws=draws)
    torch.testing.assert_close(lows, mean + std * draws, rtol=0, atol=0)
    coeffs = quiet(pywt.wavedec2, x[0].numpy(), wavelet, "symmetric", 2)
    for i in range(3):
        coeffs[0] = lows[i].view(low.shape[1:]).numpy()
        want = pywt.waverec2(coeffs, wavelet, "symmetric")[..., :27, :34]
        np.testing.assert_allclose(candidates[i], want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("wavelet", ["db1", "db2"])
def test_a_seed_is_the_same_for_every_share_and_wavelet(wavelet):
    x = latents((1, 4, 24, 24), torch.float32)
    low, residual = spectral.split(x, wavelet, 2)
    mean, std = torch.zeros(low.numel()), torch.ones(low.numel())
    settings = dict(seed=7, generation=2, dtype=torch.bfloat16)
    whole, lows = spectral.sample_population(residual, mean, std, wavelet, 2, popsize=6, **settings)
    part, part_lows = spectral.sample_population(residual, mean, std, wavelet, 2, popsize=2, first=3, **settings)
    assert whole.dtype == torch.bfloat16 and part.equal(whole[3:5]) and part_lows.equal(lows[3:5])
    assert lows.equal(philox_normal(7, 2, range(6), low.numel()))


def test_not_touched_by_autocast():
    x = latents((1, 4, 24, 24), torch.float32)
    want = spectral.split(x, "db2", 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = spectral.split(x, "db2", 2)
    assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_a_level_too_high_warns_every_time():
    x = latents((8, 40))
    for _ in range(2):
        with pytest.warns(UserWarning, match="level 2 is too high"):
            spectral.split(x, "db2", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral.split(x, "db2", 1)
        spectral.merge(*reversed(spectral.split(x, "db2", 1)), "db2", 1)
    with pytest.warns(UserWarning, match="too high"):
        pywt.wavedec2(x.numpy(), "db2", level=2)


BAD = [
    pytest.param(lambda x: spectral.split(x, "db99", 1), "close names are db9", id="unknown"),
    pytest.param(lambda x: spectral.split(x, "symlet4", 1), "sym4", id="nearly"),
    pytest.param(lambda x: spectral.split(x, "morl", 1), "families: haar, db, sym", id="continuous"),
    pytest.param(lambda x: spectral.split(x, 4, 1), "unknown wavelet 4", id="not-a-name"),
    pytest.param(lambda x: spectral.split(x, "db2", -1), "level must be", id="level"),
    pytest.param(lambda x: spectral.split(x, "db2", 140), "level must be at most 100", id="level-too-deep"),
    pytest.param(lambda x: spectral.merge(x, x, "db2", 140), "level must be at most 100", id="merge-too-deep"),
    pytest.param(lambda x: spectral.split(x.long(), "db2", 1), "fp16, bf16", id="int"),
    pytest.param(lambda x: spectral.split(x[:, :0], "db2", 1), "not empty", id="empty"),
    pytest.param(lambda x: spectral.merge(x, x, "db2", 1), r"must end in \(5, 5\)", id="low-size"),
    pytest.param(
        lambda x: spectral.sample_population(x[None].float(), x[0, 0], x[0, 0], "db2", 1, popsize=1, seed=0),
        r"mean must be \(50,\)",
        id="mean-size",
    ),
    pytest.param(
        lambda x: spectral.sample_population(x.float(), x[0, 0], x[0, 0], "db2", 1, popsize=1, seed=0),
        r"one latent \(1, ..., H, W\)",
        id="two-latents",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(latents((2, 8, 8)))


def test_haar_needs_no_pywavelets_and_the_rest_say_how_to_get_it():
    script = """
import sys
sys.modules["pywt"] = None  # as if it were not installed
import torch
from ses_fast import spectral
low, residual = spectral.split(torch.ones(1, 4, 8, 8), "haar", 2)
assert low.eq(4).all() and residual.eq(0).all()
try:
    spectral.split(torch.ones(1, 4, 8, 8), "db2", 2)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install "ses-fast[wavelets]"' in done.stdout


def test_a_backend_asked_for_by_name_reaches_every_op(monkeypatch):
    """From the first split to the last merge: on a CPU "triton" by name must raise, wherever it is asked for."""
    from ses_fast import evolution

    asked = []
    real = ops._module
    monkeypatch.setattr(
        ops, "_module", lambda name, backend, *tensors, **sizes: asked.append(backend) or real(name, backend)
    )
    monkeypatch.setattr(ops, "_backend", "triton")  # what a call that forgets its backend would get
    state = evolution.start(latents((1, 2, 8, 8)), evolution.EvolutionConfig(3, 2, "db1", 1), seed=0, backend="torch")
    _, low = evolution.ask(state, backend="torch")
    state = evolution.tell(state, low, torch.arange(3.0), backend="torch")
    assert evolution.leader(state, backend="torch").number == 2
    evolution.SearchState.load_state_dict(state.state_dict(), backend="torch")
    assert asked == ["torch"] * 6
    with pytest.raises(RuntimeError, match="cannot run here"):
        evolution.start(latents((1, 2, 8, 8)), seed=0)
