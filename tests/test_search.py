"""`evolve` and `search`: what the objective sees, what a seed means, and that nothing is lost."""

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import ses_fast
from ses_fast import spectral
from ses_fast.evolution import EvolutionConfig, SearchState, ask, start
from ses_fast.objective import Objective as ProtocolObjective
from ses_fast.recorder import STAGES
from ses_fast.result import Evaluation

# Longer wavelets on 16 pixels, which is enough here, have but one useful level.
pytestmark = pytest.mark.filterwarnings("ignore:level 2 is too high")
TOLERANCE = {"db1": 0.0, "db2": 1e-6, "sym4": 1e-6}  # the answer is built again from its lowest band, in fp32
BASE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
INF, NAN = float("inf"), float("nan")


class Objective:
    """Scores by a few single pixels, so that a score cannot depend on the batch; keeps what it was given."""

    def __init__(self, scores: list[float] | None = None) -> None:
        self.scores = scores
        self.seen: list[torch.Tensor] = []
        self.sizes: list[int] = []

    def __call__(self, latents: torch.Tensor) -> list[float]:
        at = len(self.seen)
        self.seen += list(latents.clone())
        self.sizes.append(len(latents))
        if self.scores is not None:
            return self.scores[at : at + len(latents)]
        return [float(z[..., 0, 0].sum() + z[..., 7, 9].sum() - 2 * z[..., 12, 3].sum()) for z in latents]


def evolve(objective=None, budget=12, base=BASE, popsize=4, k_elites=2, wavelet="db1", level=2, **options):
    if "generator" not in options and "state" not in options:
        options.setdefault("seed", 0)
    options.setdefault("progress", False)
    objective = Objective() if objective is None else objective
    return ses_fast.evolve(base, objective, budget, popsize, k_elites, wavelet, level, **options)


def noise(source: str) -> dict:
    return dict(seed=6) if source == "seed" else dict(generator=torch.Generator().manual_seed(6))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ---------------------------------------------------------------- what the objective sees


@pytest.mark.parametrize(
    "batch_size, sizes",
    [
        (1, [1] * 23),  # as the reference calls it
        (3, [3, 3, 3, 1, 3, 3, 3, 1, 3]),  # a batch ends with its generation, and with the budget
        (10, [10, 10, 3]),  # a whole generation
        (64, [10, 10, 3]),  # more than there is
    ],
)
@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("source", ["seed", "generator"])
@pytest.mark.parametrize("wavelet", ["db1", "sym4"])
def test_the_batch_size_changes_nothing(batch_size, sizes, include_base, source, wavelet) -> None:
    options = dict(budget=23, popsize=10, k_elites=5, wavelet=wavelet, include_base=include_base)
    one, many = Objective(), Objective()
    alone = evolve(one, **options, **noise(source))
    result = evolve(many, **options, **noise(source), batch_size=batch_size)
    assert many.sizes == sizes
    assert same(many.seen, one.seen)
    assert result.trace == alone.trace and torch.equal(result.latents, alone.latents)


def test_generation_0_is_the_same_whatever_the_scores() -> None:
    one, other = Objective(), Objective([float(i) for i in range(12)])
    evolve(one), evolve(other, batch_size=3)
    assert same(one.seen[:4], other.seen[:4]) and not torch.equal(one.seen[4], other.seen[4])


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(BASE.half(), id="fp16"),
        pytest.param(BASE.bfloat16(), id="bf16"),
        pytest.param(BASE.double(), id="fp64"),
        pytest.param(torch.randn(1, 4, 3, 16, 16), id="frames"),
        pytest.param(torch.randn(1, 16, 16), id="no channels"),
        pytest.param(torch.randn(1, 16, 16, 4).movedim(-1, 1), id="non-contiguous"),
        pytest.param(torch.randn(1, 64, 24)[..., ::2], id="packed, strided"),
        pytest.param(BASE.clone().requires_grad_(), id="requires grad"),
    ],
)
def test_candidates_and_answer_are_like_the_base(base) -> None:
    kinds = []

    def objective(z: torch.Tensor) -> torch.Tensor:
        kinds.append((tuple(z.shape), z.dtype, z.device, z.requires_grad, torch.is_grad_enabled()))
        return z[..., 0, 0].reshape(len(z), -1).sum(1)

    result = evolve(objective, base=base, batch_size=4, include_base=True)
    assert set(kinds) == {((4, *base.shape[1:]), base.dtype, base.device, False, True)}
    assert result.latents.shape == base.shape and result.latents.dtype == base.dtype
    assert not result.latents.requires_grad
    assert result.score > result.base_score == pytest.approx(base.detach()[..., 0, 0].sum().item(), rel=1e-2)


def test_the_objective_may_write_on_what_it_gets() -> None:
    clean = evolve(include_base=True)

    def vandal(z: torch.Tensor) -> list[float]:
        scores = Objective()(z)
        z.fill_(NAN)
        return scores

    base = BASE.clone()
    result = evolve(vandal, base=base, include_base=True)
    assert result.trace == clean.trace and torch.equal(result.latents, clean.latents)
    assert torch.equal(base, BASE)


def test_the_objective_may_use_its_output_again() -> None:
    out = torch.empty(2)

    def objective(z: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.tensor(Objective()(z)))

    assert [e.score for e in evolve(objective, batch_size=2).trace] == [pytest.approx(e.score) for e in evolve().trace]


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda s: s[0], id="float"),
        pytest.param(lambda s: np.float32(s[0]), id="numpy scalar"),
        pytest.param(lambda s: np.array(s), id="numpy array"),
        pytest.param(lambda s: torch.tensor(s[0]), id="0-d tensor"),
        pytest.param(lambda s: torch.tensor([s]), id="tensor of one, two dimensions"),
        pytest.param(lambda s: torch.tensor(s, requires_grad=True) * 1, id="with a graph"),
        pytest.param(tuple, id="tuple"),
        pytest.param(lambda s: [torch.tensor(v) for v in s], id="list of tensors"),
        pytest.param(lambda s: (v for v in s), id="generator"),
    ],
)
def test_kinds_of_scores(convert) -> None:
    objective = Objective()
    result = evolve(lambda z: convert(objective(z)))
    assert [e.score for e in result.trace] == pytest.approx([e.score for e in evolve().trace], rel=1e-6)


def test_whole_numbers_are_scores() -> None:
    assert [e.score for e in evolve(Objective([3, 1, True]), 3).trace] == [3, 1, 1]


# ---------------------------------------------------------------- the answer


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym4"])
@pytest.mark.parametrize("budget", [1, 7, 12], ids=["one", "within a generation", "whole generations"])
def test_the_answer_is_the_best_candidate_seen(wavelet, budget) -> None:
    objective = Objective()
    result = evolve(objective, budget, wavelet=wavelet)
    scores = [e.score for e in result.trace]
    number = scores.index(max(scores))
    assert result.score == max(scores) and result.best == result.trace[number]
    assert result.evaluations == len(result.trace) == len(objective.seen) == budget
    assert [(e.generation, e.index) for e in result.trace] == [divmod(i, 4) for i in range(budget)]
    assert (result.latents[0] - objective.seen[number]).abs().max() <= TOLERANCE[wavelet]
    assert result.base_score is None and result.stopped == "budget"


@pytest.mark.parametrize(
    "scores, winner",
    [
        ([5, 1, 2, 3, 4, 0], 0),  # the base itself
        ([5, 1, 5, 5, 5, 5], 0),  # the base, the first among equals
        ([5, 1, 6, 3, 6, 0], 2),  # better than the base
        ([NAN, 1, 2, 3, 4, 0], 4),  # a base without a score
    ],
)
def test_never_worse_than_the_base(scores, winner) -> None:
    objective = Objective([float(s) for s in scores])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evolve(objective, budget=6, base=BASE.bfloat16(), include_base=True)
    assert torch.equal(objective.seen[0], BASE.bfloat16()[0])
    assert result.best == Evaluation(*divmod(winner, 4), scores[winner])
    assert torch.equal(result.latents[0], objective.seen[winner])
    assert result.base_score == (scores[0] if scores[0] == 5 else -INF)


def test_search_is_the_latents_of_evolve() -> None:
    arguments = (BASE, Objective(), 12, 4, 2, "db1", 2)
    options = dict(seed=3, batch_size=2, include_base=True, progress=False)
    assert torch.equal(ses_fast.search(*arguments, **options), ses_fast.evolve(*arguments, **options).latents)


def test_it_searches() -> None:
    """On a linear objective: better than the base, its own first generation, and as many random draws."""
    target = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(8)).repeat_interleave(4, 1)
    target = target.repeat_interleave(4, 2) / 8  # in the lowest band, and one standard deviation is 1

    def objective(z: torch.Tensor) -> torch.Tensor:
        return (z * target).flatten(1).sum(1) / 2

    searched, random = [], []
    for seed in range(10):
        result = evolve(objective, 50, popsize=10, k_elites=5, seed=seed, batch_size=10, include_base=True)
        means = [np.mean([e.score for e in result.trace[i : i + 10]]) for i in (0, 40)]
        assert result.score > result.base_score and means[1] > means[0] + 0.5
        searched.append(result.score)
        draws = evolve(objective, 50, popsize=50, seed=seed, batch_size=50, include_base=True)
        random.append(draws.score)
    assert np.mean(searched) > np.mean(random)


# ---------------------------------------------------------------- what a seed means


def test_a_seed_is_the_whole_search() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = Objective(), Objective(), Objective()
    a = evolve(one, seed=11)
    assert torch.equal(torch.get_rng_state(), before)  # torch's global state is not touched
    torch.rand(5)
    b = evolve(two, seed=11)
    evolve(other, seed=12)
    assert a.seed == b.seed == 11 and a.trace == b.trace and same(one.seen, two.seen)
    assert not torch.equal(one.seen[0], other.seen[0])


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), np.int64(5)])
def test_any_int64_is_a_seed(seed) -> None:
    result = evolve(seed=seed)
    assert result.seed == int(seed) and type(result.seed) is int
    assert result.trace == evolve(seed=int(seed)).trace


def test_without_a_seed_one_is_drawn_from_torch_and_reported() -> None:
    torch.manual_seed(5)
    first, second = evolve(seed=None), evolve(seed=None)
    torch.manual_seed(5)
    again = evolve(seed=None)
    assert first.seed != second.seed and first.seed == again.seed
    assert first.trace == again.trace == evolve(seed=first.seed).trace


def test_a_generator_goes_on_from_search_to_search() -> None:
    generator, expected = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    first, second = (evolve(generator=generator, budget=10) for _ in range(2))
    for _ in range(6):  # three generations each, the short one drawn in full
        torch.randn(4, 64, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    assert first.seed is None and first.trace != second.trace


# ---------------------------------------------------------------- saved and continued


def through_json(state: SearchState) -> SearchState:
    saved = state.state_dict()
    plain = json.loads(json.dumps({k: v for k, v in saved.items() if not isinstance(v, torch.Tensor)}))
    tensors = {k: torch.from_numpy(v.numpy().copy()) for k, v in saved.items() if isinstance(v, torch.Tensor)}
    return SearchState.load_state_dict({**tensors, **plain})


@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("source", ["seed", "generator"])
@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("stops", [(23,), (10,), (5, 23, 24, 40)], ids=["23", "a whole generation", "four times"])
def test_continued_is_bit_equal_to_one_go(batch_size, source, include_base, stops) -> None:
    options = dict(popsize=10, k_elites=5, include_base=include_base, batch_size=batch_size)
    whole, parts = Objective(), Objective()
    expected = evolve(whole, 50, **options, **noise(source))
    result = evolve(parts, stops[0], **options, **noise(source))
    for budget in (*stops[1:], 50):
        result = evolve(parts, budget, **options, state=through_json(result.state))
    assert result.trace == expected.trace and result.evaluations == 50
    assert same(parts.seen, whole.seen)
    assert torch.equal(result.latents, expected.latents) and result.best == expected.best
    assert (result.seed, result.base_score) == (expected.seed, expected.base_score)
    for name in ("mean", "variance", "elite_low", "elite_scores"):
        assert torch.equal(getattr(result.state, name), getattr(expected.state, name)), name


def test_continued_without_saving() -> None:
    generator = torch.Generator().manual_seed(6)
    state = evolve(budget=7, generator=generator).state
    expected = evolve(budget=12, generator=torch.Generator().manual_seed(6))
    assert evolve(budget=12, state=state).trace == expected.trace


@pytest.mark.parametrize("budget", [7, 3])
def test_a_spent_budget_returns_at_once(budget) -> None:
    first = evolve(budget=7)
    again = evolve(lambda z: pytest.fail("called"), budget, state=through_json(first.state))
    assert again.trace == first.trace and torch.equal(again.latents, first.latents)


# ---------------------------------------------------------------- scores that are not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_score_that_is_not_finite_counts_as_the_worst_and_is_reported_once(bad, as_tensor) -> None:
    scores = [1.0, 2.0, bad, 0.5, bad, 3.0, bad, 2.5, 1.0, bad, 1.0, 1.0]
    objective = Objective(scores)
    with pytest.warns(UserWarning, match="candidate 2 of generation 0 is not finite") as caught:
        result = evolve(lambda z: torch.tensor(objective(z)) if as_tensor else objective(z))
    assert len(caught) == 1
    assert [e.score for e in result.trace] == [s if s != bad and s == s else -INF for s in scores]
    assert result.score == 3 and torch.equal(result.latents[0], objective.seen[5])
    assert result.state.elite_scores.tolist() == [3, 2.5]
    assert result.state.mean.isfinite().all() and result.state.variance.isfinite().all()


def test_a_continued_search_does_not_report_again() -> None:
    with pytest.warns(UserWarning, match="candidate 1 of generation 0"):
        state = evolve(Objective([1.0, NAN, 2.0]), 3).state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evolve(Objective(), state=state)


def test_generations_without_a_finite_score_leave_the_distribution() -> None:
    with pytest.warns(UserWarning, match="not finite"):
        result = evolve(Objective([NAN] * 8 + [1.0, 2.0, 3.0, NAN]))
    seen = ask(start(BASE, EvolutionConfig(4, 2, "db1", 2), seed=0))[0]
    assert result.score == 3 and seen.isfinite().all()
    assert result.state.elite_scores.tolist() == [3, 2]


@pytest.mark.parametrize("budget", [3, 4, 10])
def test_no_finite_score_at_all_is_an_error(budget) -> None:
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(RuntimeError, match=f"none of the objective's {budget} scores is finite") as caught,
    ):
        evolve(lambda z: NAN, budget, include_base=True)
    partial = caught.value.ses_result
    assert partial.latents is None and partial.score is None and partial.best is None
    assert partial.evaluations == budget and partial.base_score == -INF


# ---------------------------------------------------------------- nothing is lost


@dataclass(frozen=True)
class Frozen(Exception):
    """An exception that takes no attributes."""

    reason: str


def raiser(error: BaseException, after: int, objective=None):
    """An objective that raises in place of its call number `after`."""
    calls = iter(range(after))

    def breaks(*arguments, **options):
        if next(calls, None) is None:
            raise error
        return (objective or Objective())(*arguments)

    return breaks


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), StopIteration()])
@pytest.mark.parametrize("after, best", [(0, None), (2, 1), (4, 1), (7, 6)])
def test_an_exception_carries_what_was_found(error, after, best) -> None:
    scores = [1.0, 5.0, 2.0, 3.0, 4.0, 4.5, 9.0]
    objective = Objective(scores)
    with pytest.raises(type(error)) as caught:
        evolve(raiser(error, after, objective))
    assert caught.value is error
    partial = error.ses_result
    assert partial.evaluations == after and partial.stopped == "error"
    assert [e.score for e in partial.trace] == scores[:after]
    if best is None:
        assert partial.latents is None
    else:
        assert torch.equal(partial.latents[0], objective.seen[best])
    assert evolve(state=partial.state, budget=after + 1).evaluations == after + 1  # and goes on


def test_a_wrong_score_carries_what_was_found_too() -> None:
    answers = iter([1.0, 2.0, None])
    with pytest.raises(ValueError, match="must return 1 numbers") as caught:
        evolve(lambda z: next(answers))
    assert [e.score for e in caught.value.ses_result.trace] == [1, 2]


def test_an_exception_that_takes_no_attribute_carries_it_all_the_same() -> None:
    error = Frozen("why")
    with pytest.raises(Frozen) as caught:
        evolve(raiser(error, after=3))
    assert caught.value is error and error.ses_result.evaluations == 3


def test_a_result_that_cannot_be_built_does_not_hide_the_exception(monkeypatch) -> None:
    error = RuntimeError("device lost")
    monkeypatch.setattr("ses_fast.recorder.leader", raiser(MemoryError("no memory"), after=0))
    with pytest.raises(RuntimeError) as caught:
        evolve(raiser(error, after=3))
    assert caught.value is error
    assert error.__notes__ == ["the result so far is lost: MemoryError('no memory')"]


def test_an_exception_in_the_callback_carries_the_result() -> None:
    def stop(result) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        evolve(on_generation=stop)
    assert caught.value.ses_result.evaluations == 4


# ---------------------------------------------------------------- while it runs


def test_on_generation_gets_the_result_so_far() -> None:
    results = []
    final = evolve(budget=10, on_generation=results.append, include_base=True, batch_size=3)
    assert [r.evaluations for r in results] == [4, 8]  # not after the generation that the budget cuts short
    for r in results:
        assert r.trace == final.trace[: r.evaluations] and r.stopped == "running"
        assert r.score == max(e.score for e in r.trace)
    again = evolve(budget=8, include_base=True)
    assert torch.equal(results[1].latents, again.latents)


def test_seconds_by_stage() -> None:
    result = evolve()
    assert set(result.seconds) == {*STAGES, "total"}
    assert result.seconds["total"] == pytest.approx(sum(result.seconds[s] for s in STAGES))
    assert all(result.seconds[s] > 0 for s in STAGES)


def test_time_limit_ends_between_batches(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("ses_fast.stopwatch.time.perf_counter", lambda: clock[0])
    plain = Objective()

    def slow(z: torch.Tensor) -> list[float]:
        clock[0] += 1.0
        return plain(z)

    result = evolve(slow, batch_size=2, time_limit=2.5)
    assert result.evaluations == 6 and result.stopped == "time_limit" and result.seconds["objective"] == 3
    assert result.trace == evolve(budget=6).trace
    done = evolve(slow, batch_size=4, time_limit=3)  # the time and the budget end together
    assert done.evaluations == 12 and done.stopped == "budget"


def test_progress_bar(capsys) -> None:
    evolve(budget=10, progress=True)
    bar = capsys.readouterr().err
    assert "10/10" in bar and "SES" in bar and "best=" in bar
    evolve()
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_is_the_default(capsys) -> None:
    ses_fast.evolve(BASE, Objective(), 2, dwt_level=2, seed=0)
    assert "SES" in capsys.readouterr().err


# ---------------------------------------------------------------- torch's global settings


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("source", ["seed", "generator"])
def test_the_default_dtype_changes_nothing(dtype, source) -> None:
    plain, objective = evolve(**noise(source)), Objective()
    torch.set_default_dtype(dtype)
    try:
        other = evolve(objective, **noise(source))
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.trace == plain.trace and torch.equal(other.latents, plain.latents)
    assert other.state.mean.dtype == other.state.elite_low.dtype == torch.float32


@pytest.mark.parametrize("wavelet", ["db1", "db2"])
@pytest.mark.parametrize("source", ["seed", "generator"])
def test_the_default_device_changes_nothing(source, wavelet) -> None:
    base = torch.randn(1, 16, 32, 32)  # more numbers than are drawn ahead
    plain = evolve(base=base, level=1, wavelet=wavelet, **noise(source))
    spectral._matrices.cache_clear()
    with torch.device("meta"):
        other = evolve(base=base, level=1, wavelet=wavelet, **noise(source))
        loaded = SearchState.load_state_dict(other.state.state_dict())
    assert other.trace == plain.trace and torch.equal(other.latents, plain.latents)
    assert loaded.mean.device.type == "cpu"


def test_a_warning_points_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            options = dict(dwt_level=1, seed=1, progress=False, popsize=4)
            ses_fast.search(BASE, Objective([NAN, 1, 2, 3]), 4, **options)
    assert [warning.filename for warning in caught] == [__file__]


def test_equal_scores_beside_one_that_is_not_finite_are_warned_of_too() -> None:
    with pytest.warns(UserWarning) as caught:
        evolve(Objective([NAN, 1, 1, 1]), 4)
    assert len([warning for warning in caught if "all 3 candidates" in str(warning.message)]) == 1
    with pytest.warns(UserWarning, match="not finite") as caught:
        evolve(Objective([NAN, 1, 1, 2]), 4)
    assert len(caught) == 1


# ---------------------------------------------------------------- the objective's protocol


class Silent(ProtocolObjective):
    """Reports nothing."""

    def score(self, candidates, generation, first, report) -> None:
        return


def test_an_objective_that_reports_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="reported no score") as caught:
        evolve(Silent())
    assert caught.value.ses_result.evaluations == 0
