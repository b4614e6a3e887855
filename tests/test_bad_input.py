"""Bad input is one clear ValueError before any work, and a wrong score one after it."""

import re

import pytest
import torch

import ses_fast
from ses_fast.evolution import EvolutionConfig, SearchState, start
from ses_fast.ops import set_backend

NAN = float("nan")
BASE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
NOT_CPU = "generator must be a CPU torch.Generator"


def evolve(objective=None, **arguments):
    options = dict(
        base_latents=BASE,
        objective_reward_fn=objective or (lambda z: pytest.fail("the objective was called")),
        total_eval_budget=8,
        popsize=4,
        k_elites=2,
        dwt_level=2,
        progress=False,
    )
    return ses_fast.evolve(**{**options, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        # the base
        (dict(base_latents=BASE.numpy()), "must be a torch.Tensor, got ndarray"),
        (dict(base_latents=None), "must be a torch.Tensor, got NoneType"),
        (
            dict(base_latents=BASE.repeat(2, 1, 1, 1)),
            "one base (1, ..., H, W), not empty; got (2, 4, 16, 16)",
        ),
        (dict(base_latents=BASE[:0]), "got (0, 4, 16, 16)"),
        (dict(base_latents=BASE[..., :0]), "got (1, 4, 16, 0)"),
        (dict(base_latents=BASE[0, 0]), "got (16, 16)"),
        (dict(base_latents=torch.zeros(1, 16)), "got (1, 16)"),
        (dict(base_latents=BASE.int()), "convert it from torch.int32"),
        (dict(base_latents=BASE > 0), "convert it from torch.bool"),
        (dict(base_latents=BASE.to(torch.complex64)), "convert it from torch.complex64"),
        (dict(base_latents=BASE.to(torch.float8_e4m3fn)), "convert it from torch.float8_e4m3fn"),
        (dict(base_latents=BASE / 0), "not finite"),
        (dict(base_latents=BASE.masked_fill(BASE > 2, float("nan"))), "not finite"),
        # the objective
        (dict(objective_reward_fn=3.0), "objective_reward_fn must be callable, got 3.0"),
        # the budget
        (dict(total_eval_budget=0), "total_eval_budget must be at least 1, got 0"),
        (dict(total_eval_budget=-3), "total_eval_budget must be at least 1, got -3"),
        (dict(total_eval_budget=8.0), "total_eval_budget must be a whole number, got 8.0"),
        (dict(total_eval_budget=True), "total_eval_budget must be a whole number, got True"),
        (dict(total_eval_budget="8"), "total_eval_budget must be a whole number, got '8'"),
        # the distribution
        (dict(popsize=0), "popsize must be at least 1, got 0"),
        (dict(popsize=2.5), "popsize must be a whole number, got 2.5"),
        (dict(popsize=torch.tensor(4)), "popsize must be a whole number"),
        (dict(popsize=2**32 + 1), "popsize must be at most 2^32, got 4294967297"),
        (
            dict(popsize=10**9, generator=torch.Generator()),
            "popsize=1000000000 needs 64000000000 numbers in each generation, and a generator draws them whole",
        ),
        (dict(k_elites=0), "k_elites must be at least 1, got 0"),
        (dict(k_elites=None), "k_elites must be a whole number, got None"),
        # the wavelet
        (dict(dwt_level=-1), "dwt_level must be at least 0, got -1"),
        (dict(dwt_level=25), "dwt_level must be at most 24, got 25: N(0, 1) / 2^25 moves no fp32 sample"),
        (dict(dwt_level=140), "dwt_level must be at most 24, got 140"),
        (dict(dwt_level=10**9, wavelet_name="db2"), "dwt_level must be at most 24, got 1000000000"),
        (dict(dwt_level=True), "dwt_level must be a whole number, got True"),
        (dict(dwt_level="auto"), "dwt_level must be a whole number, got 'auto'"),
        (dict(wavelet_name="db99"), "unknown wavelet 'db99': close names are db9"),
        (dict(wavelet_name="harr"), "haar"),
        (dict(wavelet_name="morl"), "unknown wavelet 'morl'"),  # continuous: has no lowest band
        (dict(wavelet_name=1), "unknown wavelet 1"),
        # the strategy
        (dict(strategy="cma"), "unknown strategy 'cma': known are ses, high_band, random"),
        (dict(strategy="mirored"), "did you mean 'mirrored'?"),
        (dict(strategy=None), "unknown strategy None: known are ses"),
        (dict(strategy="high_band", dwt_level=0), "'high_band' searches a high band, and there is none at dwt_level=0"),
        (
            dict(strategy="random", popsize=10**7, generator=torch.Generator()),
            "popsize=10000000 needs 10240000000 numbers in each generation",
        ),
        # the noise
        (dict(seed=1.5), "seed must be a whole number, got 1.5"),
        (dict(seed=False), "seed must be a whole number, got False"),
        (dict(seed="0"), "seed must be a whole number, got '0'"),
        (dict(seed=2**63), "seed must be below 2^63"),
        (dict(seed=-(2**63) - 1), "seed must be at least"),
        (dict(seed=0, generator=torch.Generator()), "seed= or generator=, not both"),
        (dict(generator=0), NOT_CPU),
        (dict(generator=torch.default_generator.get_state()), NOT_CPU),
        # the loop
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=2.0), "batch_size must be a whole number, got 2.0"),
        (dict(time_limit=0), "time_limit must be seconds above 0, got 0"),
        (dict(time_limit=-1.0), "time_limit must be seconds above 0, got -1.0"),
        (dict(time_limit=float("nan")), "time_limit must be seconds above 0, got nan"),
        (dict(time_limit="1"), "time_limit must be seconds above 0, got '1'"),
        (dict(on_generation=1), "on_generation must be callable, got 1"),
        (dict(backend="cuda"), "backend must be one of auto, triton, torch, got 'cuda'"),
        (dict(state={}), "state must be a SearchState"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_a_search(arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evolve(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(popsize=5), "popsize=4"),
        (dict(k_elites=3), "k_elites=2"),
        (dict(dwt_level=1), "dwt_level=2"),
        (dict(wavelet_name="db2"), "wavelet_name='db1'"),
        (dict(strategy="random"), "strategy='ses'"),
        (dict(include_base=True), "include_base=False"),
        (dict(seed=4), "leave out seed= and generator="),
        (dict(generator=torch.Generator()), "leave out seed= and generator="),
        (dict(base_latents=BASE + 1e-3), "its base latents are not these"),
        (dict(base_latents=BASE[..., :8]), "its base latents are not these"),
        (dict(base_latents=BASE.double()), "its base latents are not these"),
        (dict(base_latents=BASE[0]), "must be one base"),
    ],
)
def test_a_state_of_another_search(arguments, message) -> None:
    state = evolve(lambda z: 1.0, seed=3, total_eval_budget=5).state
    with pytest.raises(ValueError, match=re.escape(message)):
        evolve(state=state, **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda d: d.clear(), "not a search state", id="empty"),
        pytest.param(lambda d: d.pop("steps"), "lacks steps", id="steps are missing"),
        pytest.param(lambda d: d.pop("strategy"), "lacks strategy", id="the strategy is missing"),
        pytest.param(lambda d: d.update(strategy="x"), "unknown strategy 'x'", id="another version's strategy"),
        pytest.param(lambda d: d.update(steps=torch.zeros(1)), "steps must be torch.int64", id="steps in floats"),
        pytest.param(lambda d: d.update(format=2), "of format 3", id="an older format"),
        pytest.param(lambda d: d.update(format=0), "not a search state", id="another format"),
        pytest.param(lambda d: d.pop("mean"), "lacks mean", id="a tensor is missing"),
        pytest.param(lambda d: d.pop("seed"), "lacks seed", id="a setting is missing"),
        pytest.param(lambda d: d.update(base=None), "base_latents must be a torch.Tensor", id="no base"),
        pytest.param(lambda d: d.update(base=torch.cat([BASE, BASE])), "must be one base", id="two bases"),
        pytest.param(
            lambda d: d.update(scores=[1.0]), "scores must be a torch.Tensor, got list", id="scores in a list"
        ),
        pytest.param(
            lambda d: d.update(scores=torch.zeros(6, 1)), "scores must be torch.float64", id="scores in two dimensions"
        ),
        pytest.param(lambda d: d["mean"].fill_(NAN), "mean holds what no search makes", id="a mean that is no number"),
        pytest.param(lambda d: d["variance"].fill_(-1), "variance holds what no search makes", id="variance below 0"),
        pytest.param(lambda d: d.update(mean=d["mean"].half()), "mean must be torch.float32", id="a mean in fp16"),
        pytest.param(
            lambda d: d.update(mean=torch.zeros(3)), "mean must be torch.float32", id="a mean of another size"
        ),
        pytest.param(
            lambda d: d.update(elite_low=torch.zeros(2, 3)), "elite_low must be torch.float32", id="strange elites"
        ),
        pytest.param(
            lambda d: d.update(include_base=None), "include_base must be True or False", id="include_base None"
        ),
        pytest.param(lambda d: d.update(dwt_level=140), "dwt_level must be at most 24", id="a level too deep"),
        pytest.param(lambda d: d.update(seed="x"), "seed must be a whole number", id="a seed of letters"),
        pytest.param(
            lambda d: d.update(seed=None), "either a seed or a generator_state", id="neither seed nor generator"
        ),
        pytest.param(
            lambda d: d.update(generator_state=torch.Generator().get_state()),
            "either a seed or a generator_state",
            id="seed and generator",
        ),
        pytest.param(
            lambda d: d.update(seed=None, generator_state=torch.zeros(3, dtype=torch.uint8)),
            "generator_state is none of a torch.Generator",
            id="a broken generator",
        ),
    ],
)
def test_a_dict_that_is_no_state(change, message) -> None:
    saved = start(BASE, EvolutionConfig(dwt_level=2), seed=0).state_dict()
    change(saved)
    with pytest.raises(ValueError, match=message):
        SearchState.load_state_dict(saved)


@pytest.mark.parametrize("state", [None, []])
def test_a_state_that_is_no_dict(state) -> None:
    with pytest.raises(ValueError, match="not a search state"):
        SearchState.load_state_dict(state)


@pytest.mark.parametrize(
    "value, message",
    [
        ([1.0, 2.0], "must return 3 scores, shape (3,), for 3 candidates; got torch.float64 of shape (2,)"),
        (torch.zeros(4), "got torch.float32 of shape (4,)"),
        (torch.zeros(3, 1), "of shape (3, 1)"),  # which dimension counts the candidates?
        (torch.zeros(1, 3), "of shape (1, 3)"),
        (1.0, "of shape (1,)"),
        (torch.tensor(1.0), "of shape ()"),
        ([], "of shape (0,)"),
        (torch.zeros(3, dtype=torch.complex64), "got torch.complex64"),
        (None, "must return 3 numbers, as a tensor or a sequence; got NoneType"),
        ("123", "must return 3 numbers, as a tensor or a sequence; got str"),  # not the numbers 1, 2 and 3
        ({1: 0, 2: 0, 3: 0}, "got dict"),
        ([10**400, 1, 2], "got list"),  # beyond a float
        ("abc", "got str"),
        ([1.0, None, 2.0], "got list"),
        ([[1.0], [2.0], [3.0]], "got list"),
    ],
    ids=str,
)
def test_wrong_scores(value, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evolve(lambda z: value, batch_size=3, seed=0)


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        evolve(backend="triton", seed=0)


def test_an_unknown_backend_for_all() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'numpy'"):
        set_backend("numpy")
