"""update_elites' kernel under the interpreter, against reference.py: the same elites to the bit.

Run by test_kernels.py, in a process with TRITON_INTERPRET=1: the launchers in `ses_fast.kernels` on CPU tensors.
"""

import pytest
import torch

from ses_fast import ops, reference
from ses_fast.kernels import elites

TOLERANCE = dict(rtol=0, atol=1e-6)  # mean and variance: the order of the sum
INF, NAN = float("inf"), float("nan")

ROWS = [
    pytest.param(10, 5, 1024, id="as-by-default"),
    pytest.param(10, 5, 77, id="odd"),
    pytest.param(50, 10, 300, id="of-50"),
    pytest.param(1, 1, 64, id="one-candidate-one-elite"),
    pytest.param(7, 1, 33, id="one-elite"),
    pytest.param(3, 5, 1, id="more-elites-than-candidates-one-coefficient"),
    pytest.param(1, 127, 5, id="as-many-elites-as-it-holds"),
    pytest.param(127, 1, 5, id="as-many-candidates"),
]


def searched(popsize: int, k_elites: int, size: int, generations: list[torch.Tensor]):
    """Both after each generation, from the reference's state before it."""
    noise = torch.Generator().manual_seed(0)
    state = torch.empty(0, size), torch.empty(0, dtype=torch.float64), torch.zeros(size), torch.ones(size)
    for scores in generations:
        low = torch.randn(popsize, size, generator=noise)
        low[0, 0] = -0.0
        got, want = (each.update_elites(low, scores, *state, k_elites=k_elites) for each in (elites, reference))
        state = want[:4]
        yield got, want


def same(got: reference.Elites, want: reference.Elites) -> None:
    assert got._fields == want._fields
    for name in ("low", "scores", "told"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
    assert got.low.signbit().equal(want.low.signbit())
    torch.testing.assert_close(got.mean, want.mean, **TOLERANCE)
    torch.testing.assert_close(got.variance, want.variance, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("popsize, k_elites, size", ROWS)
def test_many_ties(popsize, k_elites, size, dtype):
    noise = torch.Generator().manual_seed(1)
    generations = [torch.randint(4, (popsize,), generator=noise).to(dtype) for _ in range(3)]
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
    low, scores = torch.randn(9, 4).mT, torch.randn(8)[::2]
    state = torch.randn(9, 2).mT, torch.tensor([2.0, 0, 1], dtype=torch.float64)[::2], torch.ones(9), torch.ones(9)
    got, want = (each.update_elites(low, scores, *state, k_elites=3) for each in (elites, reference))
    same(got, want)


def test_more_scores_are_torchs(monkeypatch):
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)
    state = torch.empty(0, 4), torch.empty(0, dtype=torch.float64), torch.zeros(4), torch.ones(4)
    low, scores = torch.randn(125, 4), torch.randn(125)
    got, want = (each.update_elites(low, scores, *state, k_elites=4) for each in (ops, reference))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    with pytest.raises(RuntimeError, match=r"ranks at most 128 scores, and popsize \+ k_elites is 129"):
        ops.update_elites(low, scores, *state, k_elites=4, backend="triton")
    with pytest.raises(ValueError, match="at most 128"):
        elites.update_elites(low, scores, *state, k_elites=4)


def test_checks_are_the_references():
    state = torch.empty(0, 4), torch.empty(0, dtype=torch.float64), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"low must be torch.float32 \(3, 4\)"):
        elites.update_elites(torch.zeros(3, 5), torch.zeros(3), *state, k_elites=2)


def test_compile_sees_one_operator(monkeypatch):
    """The dispatch that a CUDA tensor takes, without a graph break."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)
    state = torch.randn(2, 6), torch.tensor([2.0, 1.0], dtype=torch.float64), torch.zeros(6), torch.ones(6)

    def update(low, scores):
        told = ops.update_elites(low, scores * 2, *state, k_elites=3)
        return told.mean + 1, told.scores

    low, scores = torch.randn(4, 6), torch.randn(4)
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(low, scores), update(low, scores), strict=True):
        assert got.equal(want)
    torch.library.opcheck(elites._op, (low, scores, *state, 3), test_utils=("test_schema", "test_faketensor"))
