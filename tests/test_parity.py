"""The same draws give the same search as the function this package replaces."""

import inspect

import pytest
import torch

import ses_fast

TOLERANCE = {"db1": 5e-6, "db2": 3e-5, "bior1.3": 3e-5, "sym4": 3e-5}  # fp32, absolute
PARAMETERS = 7  # shared with the reference

pytest.importorskip("pywt", reason="the reference needs PyWavelets")


@pytest.fixture(scope="module")
def ses_search():
    return pytest.importorskip("diffsynth.utils.ses", reason="the reference is diffsynth's").ses_search


class Recorder:
    """An objective every pixel counts in; keeps what it was given."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.target = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        self.seen: list[torch.Tensor] = []
        self.scores: list[float] = []

    def __call__(self, latents: torch.Tensor) -> float:
        self.seen.append(latents.clone())
        self.scores.append(float((latents.double() * self.target).mean()))
        return self.scores[-1]


def compare(ses_search, shape: tuple[int, ...], wavelet: str, level: int, **budget: int) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs, ours = Recorder(shape), Recorder(shape)
    torch.manual_seed(4)
    expected = ses_search(base, theirs, **budget, wavelet_name=wavelet, dwt_level=level)
    result = ses_fast.search(
        base,
        ours,
        **budget,
        wavelet_name=wavelet,
        dwt_level=level,
        generator=torch.Generator().manual_seed(4),
        progress=False,
    )
    tolerance = TOLERANCE[wavelet]
    assert len(ours.seen) == len(theirs.seen) == budget["total_eval_budget"]
    for i, (mine, its) in enumerate(zip(ours.seen, theirs.seen, strict=True)):
        difference = (mine - its).abs().max().item()
        assert mine.shape == its.shape and difference <= tolerance, f"candidate {i} is off by {difference}"
    assert (result - expected).abs().max() <= tolerance
    assert ours.scores.index(max(ours.scores)) == theirs.scores.index(max(theirs.scores))


@pytest.mark.filterwarnings("ignore:.*[Ll]evel")  # small sizes go above the useful level, as PyWavelets does
@pytest.mark.parametrize("wavelet", ["db1", "db2", "bior1.3", "sym4"])
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 16, 128, 128), id="FLUX.1 and Z-Image at 1024"),
        pytest.param((1, 16, 166, 166), id="Qwen-Image at 1328, odd at level 2"),
        pytest.param((1, 16, 167, 93), id="odd from the start"),
        pytest.param((1, 128, 64, 64), id="FLUX.2 at 1024"),
        pytest.param((1, 4, 64, 64), id="SD at 512"),
        pytest.param((1, 3, 17, 5), id="tiny, odd, prime"),
    ],
)
def test_candidates_order_and_result(ses_search, shape, level, wavelet) -> None:
    big = shape[1] * shape[2] * shape[3] > 100_000
    budget = (4, 2, 2) if big else (11, 4, 3)  # two full generations, and on small ones a short one
    compare(
        ses_search,
        shape,
        wavelet,
        level,
        **dict(zip(("total_eval_budget", "popsize", "k_elites"), budget, strict=True)),
    )


@pytest.mark.parametrize(
    "budget, popsize, k_elites",
    [
        (30, 10, 5),  # the defaults
        (50, 10, 5),  # the documented budget
        (23, 10, 5),  # ends within a generation
        (3, 10, 5),  # ends within the first
        (12, 3, 1),  # one elite: the variance stays
        (20, 4, 9),  # elites over more than a generation
        (6, 1, 2),  # one candidate a generation; its noise uses torch's path for few numbers
    ],
)
def test_budgets(ses_search, budget, popsize, k_elites) -> None:
    compare(ses_search, (1, 4, 16, 16), "db1", 2, total_eval_budget=budget, popsize=popsize, k_elites=k_elites)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end_only(ses_search, dtype) -> None:
    base = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs, ours = Recorder(tuple(base.shape)), Recorder(tuple(base.shape))
    torch.manual_seed(4)
    expected = ses_search(base, theirs, 12, 4, 2, "db1", 2)
    generator = torch.Generator().manual_seed(4)
    result = ses_fast.search(base, ours, 12, 4, 2, "db1", 2, generator=generator, progress=False)
    assert result.dtype == expected.dtype == dtype
    pairs = [*zip(ours.seen, theirs.seen, strict=True), (result, expected)]
    step = torch.finfo(dtype).eps
    for mine, its in pairs:  # one unit in the last place where 1e-6 lies across a rounding edge, nowhere else
        torch.testing.assert_close(mine.float(), its.float(), atol=1e-6, rtol=step)
        assert (mine == its).float().mean() > 0.99


def test_equal_scores_are_won_by_the_first(ses_search) -> None:
    base = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    expected = ses_search(base, lambda z: 0.0, 12, 4, 2, "db1", 2)
    generator = torch.Generator().manual_seed(4)
    result = ses_fast.search(base, lambda z: 0.0, 12, 4, 2, "db1", 2, generator=generator, progress=False)
    assert (result - expected).abs().max() <= TOLERANCE["db1"]


@pytest.mark.parametrize("function", [ses_fast.search, ses_fast.evolve])
def test_signature(ses_search, function) -> None:
    theirs = list(inspect.signature(ses_search).parameters.values())
    ours = list(inspect.signature(function).parameters.values())
    assert len(theirs) == PARAMETERS
    described = [[(p.name, p.default, p.kind) for p in each[:PARAMETERS]] for each in (ours, theirs)]
    assert described[0] == described[1]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[PARAMETERS:])
