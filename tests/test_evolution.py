"""The ask and tell pieces: the numbers of a generation, and what a state promises."""

import json
from dataclasses import replace

import pytest
import torch

from ses_fast import ops
from ses_fast.evolution import EvolutionConfig, SearchState, ask, leader, start, tell
from ses_fast.loop import evolve
from ses_fast.reference import philox_normal

TOLERANCE = {torch.float32: dict(atol=2e-6, rtol=0), torch.float64: dict(atol=1e-6, rtol=0)}
LOW = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]])  # [P, D]
SMALL = EvolutionConfig(popsize=3, k_elites=2, dwt_level=1)
INF, NAN = float("inf"), float("nan")


def base(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def two_numbers(config: EvolutionConfig = SMALL) -> SearchState:
    """A state whose lowest band is two numbers, so that a generation can be worked by hand."""
    return start(base(2, 2, 2), config, seed=0)


def told(state: SearchState, scores: list[float], low: torch.Tensor = LOW) -> SearchState:
    return tell(state, low, torch.tensor(scores))


def test_starts_from_zero_and_one_not_from_the_base() -> None:
    state = two_numbers()
    assert state.mean.tolist() == [0, 0] and state.variance.tolist() == [1, 1]
    assert (state.generation, state.index, state.evaluations) == (0, 0, 0)


@pytest.mark.parametrize("level", [0, 1])
def test_the_state_does_not_follow_the_base(level: int) -> None:
    x = base(2, 2, 2)
    state = start(x, replace(SMALL, dwt_level=level), seed=0, include_base=True)
    before = ask(state)[0]
    x.zero_()
    assert torch.equal(ask(state)[0], before) and state.base.any()


def test_elites_by_hand() -> None:
    state = told(two_numbers(), [1, 3, 2])
    assert state.elite_low.tolist() == [[3, 4], [5, 8]] and state.elite_scores.tolist() == [3, 2]
    assert state.mean.tolist() == [4, 6]
    torch.testing.assert_close(state.variance, torch.tensor([2 + 1e-7, 8 + 1e-7]), **TOLERANCE[torch.float32])
    assert (state.generation, state.index, state.evaluations) == (1, 0, 3)


def test_elites_are_the_best_of_everything_seen() -> None:
    state = told(told(two_numbers(), [1, 3, 2]), [0, 2.5, -1], LOW + 10)
    assert state.elite_scores.tolist() == [3, 2.5]
    assert state.elite_low.tolist() == [[3, 4], [13, 14]]
    assert state.mean.tolist() == [8, 9]
    torch.testing.assert_close(state.variance, torch.tensor([50.0, 50.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([7, 7, 7], [7, 7, 7], [[1, 0], [3, 4]]),  # all equal: the first two ever seen
        ([1, 7, 7], [7, 7, 7], [[3, 4], [5, 8]]),  # equal across generations: the older stay
        ([7, 1, 1], [7, 7, 1], [[1, 0], [11, 10]]),  # equal within the newer: its first
    ],
)
def test_earlier_wins_ties(first: list, second: list, expected: list) -> None:
    assert told(told(two_numbers(), first), second, LOW + 10).elite_low.tolist() == expected


def test_a_long_row_of_ties_keeps_its_order() -> None:
    # An unstable sort is often stable by accident on a few numbers, not on thousands.
    config = EvolutionConfig(popsize=5000, k_elites=3000, dwt_level=1)
    low = torch.arange(10_000.0).view(5000, 2)
    state = tell(two_numbers(config), low, torch.arange(5000) % 2)
    assert torch.equal(state.elite_low, torch.cat([low[1::2], low[0::2][:500]]))


@pytest.mark.parametrize(
    "scores, elites, mean, variance",
    [
        ([NAN, 3, 2], [3, 2], [4, 6], [2, 8]),  # NaN sorts above everything in torch: it must not
        ([INF, 3, 2], [3, 2], [4, 6], [2, 8]),  # plus infinity is no score either
        ([-INF, NAN, 2], [2], [5, 8], [1, 1]),  # one finite: its place, and the variance stays
        ([NAN, NAN, NAN], [], [0, 0], [1, 1]),  # none: nothing moves
    ],
)
def test_scores_that_are_not_finite_weigh_nothing(scores, elites, mean, variance) -> None:
    state = told(two_numbers(), scores)
    assert [s for s in state.elite_scores.tolist() if s > -INF] == elites
    assert state.mean.tolist() == mean
    torch.testing.assert_close(state.variance, torch.tensor(variance).float(), **TOLERANCE[torch.float32])
    # What comes next is as if the empty places had never been there.
    state = told(state, [9, NAN, 8])
    assert state.elite_scores.tolist() == [9, 8] and state.mean.tolist() == [3, 4]


def test_single_elite_keeps_the_variance() -> None:
    config = EvolutionConfig(popsize=3, k_elites=1, dwt_level=1)
    state = told(told(two_numbers(config), [1, 3, 2]), [4, 0, 0], LOW + 10)
    assert state.mean.tolist() == [11, 10] and state.variance.tolist() == [1, 1]


def test_more_elites_than_candidates_gather_over_generations() -> None:
    config = EvolutionConfig(popsize=3, k_elites=5, dwt_level=1)
    state = told(two_numbers(config), [1, 3, 2])
    assert state.mean.tolist() == [3, 4] and len(state.elite_low) == 3
    assert told(state, [6, 5, 4], LOW + 10).elite_scores.tolist() == [6, 5, 4, 3, 2]


def test_scores_can_come_in_pieces() -> None:
    whole = told(two_numbers(), [1, 3, 2])
    one = told(two_numbers(), [1])
    assert (one.generation, one.index, one.mean.tolist()) == (0, 1, [0, 0])  # nothing moves yet
    pieces = told(one, [3, 2])
    assert torch.equal(pieces.mean, whole.mean) and torch.equal(pieces.variance, whole.variance)
    assert pieces.history == whole.history == [1, 3, 2]


def test_tell_keeps_its_own_copy_of_the_scores() -> None:
    scores = torch.tensor([1.0], dtype=torch.float64)
    state = tell(two_numbers(), LOW, scores)
    scores.fill_(5)
    assert state.history == [1]


def test_the_elites_are_updated_by_the_backend_that_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match='"triton" cannot run here'):
        tell(two_numbers(), LOW, torch.tensor([1.0, 2.0, 3.0]), backend="triton")


def test_ask_raises_where_tell_would(monkeypatch) -> None:
    """Before a generation is scored that no kernel could rank."""
    pytest.importorskip("triton")
    state = start(base(2, 2, 2), EvolutionConfig(popsize=120, k_elites=9, dwt_level=1), seed=0)
    monkeypatch.setattr(ops, "why_not_triton", lambda *tensors: None)
    with pytest.raises(RuntimeError, match="at most 128 scores"):
        ask(state, backend="triton")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_objective_may_use_its_tensor_again(batch_size: int) -> None:
    scores, numbers = torch.zeros(3), iter(range(9))

    def objective(candidates: torch.Tensor) -> torch.Tensor:
        for i in range(len(candidates)):
            scores[i] = next(numbers)
        return scores[: len(candidates)]

    result = evolve(base(2, 2, 2), objective, 8, 3, 2, "db1", 1, seed=0, batch_size=batch_size, progress=False)
    assert [each.score for each in result.trace] == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_scores_are_kept_as_doubles(dtype: torch.dtype) -> None:
    scores = torch.tensor([0, 1, 1]).to(dtype)
    for pieces in ([3], [1, 2]):
        state = two_numbers()
        for piece in scores.split(pieces):
            state = tell(state, LOW, piece)
        assert state.scores.dtype == torch.float64 and state.history == [0, 1, 1]
        assert state.elite_low.tolist() == [[3, 4], [5, 8]]


def test_doubles_are_compared_as_doubles() -> None:
    state = tell(two_numbers(), LOW, torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64))
    assert state.elite_low.tolist() == [[3, 4], [1, 0]]  # as the reference compares Python floats


@pytest.mark.parametrize("scores", [[1, 2, 3, 4], [], [[1, 2, 3]]], ids=["too many", "none", "two dimensions"])
def test_tell_refuses_other_shapes(scores: list) -> None:
    with pytest.raises(ValueError, match="up to 3 scores"):
        told(two_numbers(), scores)


def test_tell_refuses_more_than_are_left() -> None:
    with pytest.raises(ValueError, match="up to 1 scores"):
        told(told(two_numbers(), [1, 2]), [3, 4])


def test_ask_replaces_the_lowest_band_and_only_that() -> None:
    x = base(4, 21, 32)
    state = start(x, EvolutionConfig(popsize=6, dwt_level=2), seed=5)
    candidates, low = ask(state)
    torch.testing.assert_close(low, philox_normal(5, 0, range(6), 4 * 6 * 8), **TOLERANCE[torch.float32])
    ours, theirs = ops.haar_dwt2(candidates, 2), ops.haar_dwt2(x, 2)
    # Where the size is odd the edge block repeats pixels, and its details are the base's too.
    torch.testing.assert_close(ours[0].flatten(1), low, atol=5e-6, rtol=0)
    for mine, its in zip(ours[1:], theirs[1:], strict=True):
        for band, other in zip(mine, its, strict=True):
            torch.testing.assert_close(band, other.expand_as(band), atol=5e-6, rtol=0)


def test_ask_moves_and_scales_the_noise() -> None:
    state = start(base(4, 16, 16), EvolutionConfig(popsize=3, dwt_level=2), seed=5)
    size = state.mean.numel()
    mean, variance = torch.linspace(-1, 1, size), torch.linspace(0, 4, size)
    _, low = ask(replace(state, mean=mean, variance=variance, evaluations=6))  # two generations of three
    expected = mean + variance.clamp(min=1e-9).sqrt() * philox_normal(5, 2, range(3), size)
    torch.testing.assert_close(low, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("source", ["seed", "generator"])
def test_ask_twice_gives_the_same(source: str) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = dict(seed=3) if source == "seed" else dict(generator=generator)
    state = start(base(4, 16, 16), EvolutionConfig(popsize=3, dwt_level=2), **noise)
    for _ in range(2):
        candidates, low = ask(state)
        candidates.clone(), candidates.zero_()  # what the caller does with the first answer is its own affair
        again, low_again = ask(state)
        assert torch.equal(low, low_again) and again.any()
        part = tell(state, low, torch.tensor([1.0]))
        assert torch.equal(ask(part)[0], again)  # nor does a waiting score change it
        state = tell(state, low, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("source", ["seed", "generator"])
@pytest.mark.parametrize("wavelet", ["db1", "db2"])
def test_ask_for_a_few_gives_the_first_of_the_whole_generation(wavelet: str, source: str) -> None:
    noise = dict(seed=3) if source == "seed" else dict(generator=torch.Generator().manual_seed(3))
    config = EvolutionConfig(popsize=7, wavelet_name=wavelet, dwt_level=1)
    state = start(base(4, 9, 12), config, include_base=True, **noise)
    for _ in range(2):
        whole, low = ask(state)
        for count in (1, 3, 7, 100):
            few, few_low = ask(state, count)
            assert torch.equal(few, whole[:count]) and torch.equal(few_low, low[:count])
        state = told(state, list(range(7)), low)


def test_only_what_the_budget_leaves_is_drawn(monkeypatch) -> None:
    """Also where a generation is under way, of which the scored candidates are drawn again."""
    asked, sample = [], ops.sample_population

    def count(*args, popsize: int, **settings):
        asked.append(popsize)
        return sample(*args, popsize=popsize, **settings)

    monkeypatch.setattr(ops, "sample_population", count)
    result = evolve(base(4, 8, 8), lambda z: z.mean().item(), 4, 10**9, 5, "db1", 2, seed=1, progress=False)
    assert result.evaluations == 4 and asked == [4]
    again = evolve(base(4, 8, 8), lambda z: z.mean().item(), 6, 10**9, 5, "db1", 2, state=result.state, progress=False)
    assert again.evaluations == 6 and asked == [4, 6]
    few = evolve(base(4, 8, 8), lambda z: z.mean().item(), 6, 6, 5, "db1", 2, seed=1, progress=False)
    assert again.state.history == few.state.history and torch.equal(again.latents, few.latents)
    asked.clear()
    evolve(base(4, 8, 8), lambda z: z.mean().item(), 6, 4, 2, "db1", 2, seed=1, progress=False)
    assert asked == [4, 2]


def test_a_leader_that_waits_is_drawn_without_the_rest_of_its_generation() -> None:
    config = EvolutionConfig(popsize=10**9, dwt_level=2)
    state = start(base(4, 8, 8), config, seed=1)
    candidates, low = ask(state, 3)
    state = told(state, [1, 3, 2], low)
    best = leader(state)
    assert best is not None and best.number == 1 and torch.equal(best.latents[0], candidates[1])


def test_a_generator_draws_once_a_generation_and_no_more() -> None:
    ours, expected = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    state = start(base(4, 16, 16), EvolutionConfig(popsize=3, dwt_level=2), generator=ours)
    for _ in range(2):
        _, low = ask(state)
        draws = torch.randn(3, 64, generator=expected)
        torch.testing.assert_close((low - state.mean) / state.variance.sqrt(), draws, atol=1e-4, rtol=1e-4)
        state = tell(state, low, torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(ours.get_state(), expected.get_state())


def test_an_old_state_is_asked_again_with_a_generator() -> None:
    first = start(base(4, 16, 16), SMALL, generator=torch.Generator())
    once = ask(first)
    second = tell(first, once[1], torch.ones(3))
    later = ask(second)
    assert all(torch.equal(a, b) for a, b in zip(once, ask(first), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(later, ask(second), strict=True))


def test_a_generator_s_state_is_that_of_the_save_whoever_draws_later() -> None:
    shared = torch.Generator().manual_seed(1)
    first = start(base(4, 16, 16), SMALL, generator=shared)
    candidates, low = ask(first)
    half = tell(first, low, torch.tensor([1.0, 2.0]))
    torch.randn(5, generator=shared)
    loaded = SearchState.load_state_dict(half.state_dict())
    assert torch.equal(ask(loaded)[0], candidates)
    whole = [tell(state, low, torch.tensor([3.0])) for state in (half, loaded)]
    assert torch.equal(whole[0].mean, whole[1].mean)


def test_include_base_takes_one_place_and_no_number() -> None:
    x = base(4, 16, 16).bfloat16()
    without, with_base = (start(x, SMALL, seed=2, include_base=b) for b in (False, True))
    plain, low = ask(without)
    candidates, low_with = ask(with_base)
    assert torch.equal(candidates[0], x[0]) and not torch.equal(plain[0], x[0])
    assert torch.equal(candidates[1:], plain[1:]) and torch.equal(low_with[1:], low[1:])
    torch.testing.assert_close(low_with[0], ops.haar_dwt2(x, 1)[0].flatten(), **TOLERANCE[torch.float32])
    later = tell(with_base, low_with, torch.tensor([3.0, 2.0, 1.0]))
    assert torch.equal(later.elite_low[0], low_with[0])  # elite with its own lowest band
    assert not torch.equal(ask(later)[0][0], x[0])  # and only in the first generation


@pytest.mark.parametrize(
    "scores, number",
    [
        ([1, 3, 2], 1),  # told: the first elite
        ([1, 3, 3, 3, 0], 1),  # an equal one that waits does not replace it
        ([1, 3, 2, 4, 4], 3),  # the first of two that wait
        ([NAN, INF, 2, NAN], 2),  # none but the finite
    ],
)
def test_leader_is_the_first_best(scores: list, number: int) -> None:
    state = start(base(4, 16, 16), SMALL, seed=2)
    seen: list[torch.Tensor] = []
    for i, score in enumerate(scores):
        candidates, low = ask(state)
        seen.append(candidates[i % 3])
        state = told(state, [score], low)
    best = leader(state)
    assert best is not None and (best.number, best.score) == (number, scores[number])
    assert torch.equal(best.latents[0], seen[number])


def test_a_leader_that_is_the_base_is_a_copy_of_it() -> None:
    state = start(base(4, 16, 16), SMALL, seed=2, include_base=True)
    state = told(state, [3, 2], ask(state)[1])
    best = leader(state)
    assert best is not None and best.number == 0 and torch.equal(best.latents, state.base)
    best.latents.zero_()  # the caller's own
    assert state.base.any() and torch.equal(leader(state).latents, base(4, 16, 16))


# ---------------------------------------------------------------- early scores


def test_an_early_score_ranks_and_never_leads() -> None:
    state = tell(two_numbers(), LOW, torch.tensor([9.0, 1.0]), steps=torch.tensor([4, 0]))
    assert leader(state, LOW).number == 1
    state = tell(state, LOW, torch.tensor([8.0]), steps=torch.tensor([2]))
    assert state.elite_scores.tolist() == [1, 9] and state.elite_low.tolist() == [[3, 4], [1, 0]]
    assert state.steps.tolist() == [4, 0, 2] and state.history == [9, 1, 8]
    assert leader(state).number == 1 and leader(state).score == 1
    # A final score of whatever size takes an early one's place, and not the other way round.
    state = tell(state, LOW + 10, torch.tensor([-5.0, 99.0, NAN]), steps=torch.tensor([0, 1, 0]))
    assert state.elite_scores.tolist() == [1, -5] and state.elite_low.tolist() == [[3, 4], [11, 10]]
    assert state.mean.tolist() == [7, 7] and leader(state).number == 1


def test_early_scores_alone_have_no_leader() -> None:
    state = tell(two_numbers(), LOW, torch.tensor([1.0, 3.0, 2.0]), steps=torch.tensor([4, 1, 4]))
    assert leader(state) is None and state.elite_scores.tolist() == [3, 2]
    assert leader(tell(two_numbers(), LOW, torch.tensor([NAN, 3.0]), steps=torch.tensor([0, 1]))) is None


def test_final_scores_said_or_not_are_the_same() -> None:
    one, two = two_numbers(), two_numbers()
    for scores in ([1.0, NAN, 2.0], [3.0, 1.0, 2.0]):
        one = tell(one, LOW, torch.tensor(scores))
        two = tell(two, LOW, torch.tensor(scores), steps=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(one.mean, two.mean) and torch.equal(one.variance, two.variance)
    assert one.steps.tolist() == two.steps.tolist() == [0] * 6


@pytest.mark.parametrize("seed", range(5))
def test_elites_of_a_race_are_those_of_a_sorted_list(seed: int) -> None:
    """Many ties, early scores and scores that are not finite, told in pieces, saved on the way."""
    generator = torch.Generator().manual_seed(seed)
    config = EvolutionConfig(popsize=6, k_elites=4, dwt_level=1)
    state, told_of = two_numbers(config), []
    for _ in range(4):
        low = torch.randn(6, 2, generator=generator)
        scores = torch.randint(-2, 3, (6,), generator=generator).double()
        scores = torch.where(torch.rand(6, generator=generator) < 0.2, NAN, scores)
        steps = torch.randint(0, 3, (6,), generator=generator)
        told_of += zip(low.tolist(), scores.tolist(), steps.tolist(), strict=True)
        for part, its_steps in zip(scores.split(4), steps.split(4), strict=True):
            state = SearchState.load_state_dict(tell(state, low, part, steps=its_steps).state_dict())
        finite = [each for each in told_of if each[1] == each[1]]
        best = sorted(finite, key=lambda each: (each[2] > 0, -each[1]))[:4]
        used = state.elite_scores > -INF
        assert state.elite_scores[used].tolist() == [each[1] for each in best]
        elites = torch.tensor([each[0] for each in best])
        assert torch.equal(state.elite_low[used], elites)
        torch.testing.assert_close(state.mean, elites.mean(0), **TOLERANCE[torch.float32])
        final = [number for number, each in enumerate(told_of) if each[2] == 0 and each[1] == each[1]]
        lead = leader(state)
        assert (lead and lead.number) == max(final, key=lambda number: told_of[number][1], default=None)


@pytest.mark.parametrize(
    "steps",
    [torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, -1, 0]), torch.zeros(3, 1).long()],
    ids=["too few", "floats", "below 0", "two dimensions"],
)
def test_tell_refuses_other_steps(steps: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="steps must be 3 numbers from 0 on, int64 on the CPU"):
        tell(two_numbers(), LOW, torch.tensor([1.0, 2.0, 3.0]), steps=steps)


def test_no_leader_without_a_finite_score() -> None:
    assert leader(two_numbers()) is None and leader(told(two_numbers(), [NAN, -INF])) is None


@pytest.mark.parametrize("source", ["seed", "generator"])
def test_state_dict_is_tensors_and_json(source: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    noise = dict(seed=3) if source == "seed" else dict(generator=torch.Generator().manual_seed(3))
    state = start(base(4, 16, 16).half(), SMALL, include_base=True, **noise)
    for scores in ([1, 5, 2], [NAN, 1, 2], [7]):
        state = told(state, scores, ask(state)[1])
    saved = state.state_dict()
    save_file({k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}, tmp_path / "s.safetensors")
    plain = json.loads(json.dumps({k: v for k, v in saved.items() if not isinstance(v, torch.Tensor)}))
    loaded = SearchState.load_state_dict({**load_file(tmp_path / "s.safetensors"), **plain})
    assert loaded.config == state.config and loaded.history == state.history == [1, 5, 2, -INF, 1, 2, 7]
    assert (loaded.seed, loaded.generation, loaded.index) == (state.seed, 2, 1)
    for _ in range(2):  # the generation under way, and one after it
        (candidates, low), (again, low_again) = ask(state), ask(loaded)
        assert torch.equal(candidates, again) and torch.equal(low, low_again)
        left = [float(i) for i in range(3 - state.index)]
        state, loaded = told(state, left, low), told(loaded, left, low)
