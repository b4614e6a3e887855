"""update_elites' kernel against reference.py: the same elites to the bit.

Interpreted by test_kernels.py, or on a GPU.
"""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, needs_gpu, noise

from ses_fast import ops, reference

pytestmark = needs_gpu

TOLERANCE = dict(rtol=1e-6, atol=1e-6)  # mean and variance: the order of the sum
INF, NAN = float("inf"), float("nan")
SCORES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
if INTERPRETED:
    SCORES.remove(torch.bfloat16)

ROWS = [
    pytest.param(10, 5, 1024, id="10x1024-k5-as-by-default"),
    pytest.param(10, 5, 77, id="10x77-k5-odd"),
    pytest.param(50, 10, 300 if INTERPRETED else 20160, id="50-k10-video"),
    pytest.param(1, 1, 64, id="1x64-k1-one-candidate-one-elite"),
    pytest.param(7, 1, 33, id="7x33-k1-one-elite"),
    pytest.param(3, 5, 1, id="3x1-k5-more-elites-than-candidates-one-coefficient"),
    pytest.param(1, 127, 5, id="1x5-k127-as-many-elites-as-it-holds"),
    pytest.param(127, 1, 5, id="127x5-k1-as-many-candidates"),
]


def empty(size: int) -> tuple[torch.Tensor, ...]:
    """Elites, their scores, mean and variance before the first generation."""
    zeros = torch.zeros(size, device=DEVICE)
    return zeros.expand(0, size), torch.zeros(0, dtype=torch.float64, device=DEVICE), zeros, torch.ones_like(zeros)


def both(*given, k_elites: int) -> tuple[reference.Elites, reference.Elites]:
    return ops.update_elites(*given, k_elites=k_elites, backend="triton"), reference.update_elites(
        *given, k_elites=k_elites
    )


def searched(popsize: int, k_elites: int, size: int, generations: list[torch.Tensor]):
    """Both after each generation, from the reference's state before it."""
    state = empty(size)
    for number, scores in enumerate(generations):
        low = noise(popsize, size, seed=number)
        low[0, 0] = -0.0
        got, want = both(low, scores.to(DEVICE), *state, k_elites=k_elites)
        state = want[:4]
        yield got, want


def same(got: reference.Elites, want: reference.Elites) -> None:
    for name in ("elite_low", "elite_scores", "scores"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
    assert got.elite_low.signbit().equal(want.elite_low.signbit())
    torch.testing.assert_close(got.mean, want.mean, **TOLERANCE)
    torch.testing.assert_close(got.variance, want.variance, **TOLERANCE)


@pytest.mark.parametrize("dtype", SCORES, ids=str)
@pytest.mark.parametrize("popsize, k_elites, size", ROWS)
def test_many_ties(popsize, k_elites, size, dtype):
    numbers = torch.Generator().manual_seed(1)
    generations = [torch.randint(4, (popsize,), generator=numbers).to(dtype) for _ in range(3)]
    if dtype.is_floating_point:  # before them: none is finite, then some are
        bad = torch.tensor([NAN, INF, -INF], dtype=dtype)[torch.arange(popsize) % 3]
        generations = [bad, generations[0].where(torch.arange(popsize) % 2 == 0, bad), *generations[1:]]
    for got, want in searched(popsize, k_elites, size, generations):
        same(got, want)


@pytest.mark.parametrize(
    "generations",
    [
        pytest.param([[NAN, 3, 2, INF], [1, -INF, NAN, 5]], id="some"),
        pytest.param([[NAN, NAN, INF, -INF], [NAN, NAN, NAN, 1], [2, NAN, 3, NAN]], id="none-then-one-then-two"),
        pytest.param([[-0.0, 0.0, 0.0, -0.0], [0.0, -0.0, 1e-300, -1e-300]], id="both-zeros-are-equal"),
        pytest.param([[1, 1 + 1e-15, 1 - 1e-15, 1e300]], id="as-doubles"),
    ],
)
@pytest.mark.parametrize("k_elites", [1, 3, 6])
def test_scores(generations, k_elites):
    generations = [torch.tensor(scores, dtype=torch.float64) for scores in generations]
    for got, want in searched(4, k_elites, 37, generations):
        same(got, want)


def test_strides_do_not_matter():
    low, scores = noise(9, 4).mT, noise(8)[::2]
    elite_scores = torch.tensor([2.0, 0, 1], dtype=torch.float64, device=DEVICE)[::2]
    same(*both(low, scores, noise(9, 2, seed=1).mT, elite_scores, *empty(9)[2:], k_elites=3))


def test_more_scores_are_torchs():
    from ses_fast.kernels import elites  # imports triton

    given = noise(125, 4), noise(125, seed=1), *empty(4)
    got, want = ops.update_elites(*given, k_elites=4), ops.update_elites(*given, k_elites=4, backend="torch")
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    with pytest.raises(RuntimeError, match=r"ranks at most 128 scores, and popsize \+ k_elites is 129"):
        ops.update_elites(*given, k_elites=4, backend="triton")
    with pytest.raises(ValueError, match="at most 128"):
        elites.update_elites(*given, k_elites=4)


def test_checks_come_before_the_kernel():
    with pytest.raises(ValueError, match=r"low must be torch.float32 \(3, 4\)"):
        ops.update_elites(noise(3, 5), noise(3), *empty(4), k_elites=2, backend="triton")


def test_compile_sees_one_operator(monkeypatch):
    """Without a graph break; the operator's fake agrees with what it does."""
    from ses_fast.kernels import elites  # imports triton

    monkeypatch.undo()
    best = torch.tensor([2.0, 1.0], dtype=torch.float64, device=DEVICE)
    state = noise(2, 6), best, *empty(6)[2:]

    def update(low, scores):
        after = ops.update_elites(low, scores * 2, *state, k_elites=3, backend="triton")
        return after.mean + 1, after.elite_scores

    low, scores = noise(4, 6), noise(4, seed=1)
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(low, scores), update(low, scores), strict=True):
        assert got.equal(want)
    out = list(ops.update_elites(low, scores, *state, k_elites=3, backend="triton"))
    torch.library.opcheck(
        elites.fill_elites.operator, (low, scores, *state, out, 3), test_utils=("test_schema", "test_faketensor")
    )
