"""The strategies: what each promises whatever it draws, and that the improved ones improve."""

import json

import pytest
import torch

import ses_fast
from ses_fast import ops, spectral
from ses_fast.evolution import EvolutionConfig, SearchState, ask, leader, start, tell
from ses_fast.reference import philox_normal
from ses_fast.strategies import LEAST_STEP, STRATEGIES, held, step, weighted

NAMES = list(STRATEGIES)
IMPROVED = [name for name in NAMES if name not in ("ses", "high_band", "random")]
DRIFTING = ("ses", "high_band")  # the reference, and its control
NOISES = {"seed": lambda: dict(seed=6), "generator": lambda: dict(generator=torch.Generator().manual_seed(6))}
INF = float("inf")


def base(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def score(candidates: torch.Tensor) -> torch.Tensor:
    """Of single pixels, so that it cannot depend on the batch."""
    flat = candidates.double().flatten(1)
    return flat[:, 0] + flat[:, 77] - 2 * flat[:, 33] ** 2


def searched(name: str, generations: int, x=None, config=(4, 3, "db1", 1), scored=score, **options) -> SearchState:
    options = options or dict(seed=0)
    state = start(base(4, 8, 8) if x is None else x, EvolutionConfig(*config, name), **options)
    for _ in range(generations):
        candidates, low = ask(state)
        state = tell(state, low, scored(candidates))
    return state


# ---------------------------------------------------------------- what every strategy promises


@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize(
    "shape, wavelet, level",
    [
        pytest.param((4, 8, 8), "db1", 1, id="even"),
        pytest.param((2, 3, 9, 13), "db1", 2, id="frames, odd sides"),
        pytest.param((3, 10, 12), "db2", 1, id="db2"),
        pytest.param((7, 6), "haar", 1, id="no channels"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_generation_is_a_function_of_the_state(name, shape, wavelet, level, source) -> None:
    """Asked twice it is the same, in part it is a beginning of the whole, and it holds the numbers that it names."""
    x = base(*shape)
    state = start(x, EvolutionConfig(7, 3, wavelet, level, name), include_base=True, **NOISES[source]())
    for generation in range(3):
        whole, low = ask(state)
        assert whole.shape == (7, *shape) and low.dtype == torch.float32 and whole.isfinite().all()
        assert len({tuple(row) for row in low.tolist()}) == 7  # no candidate is another's
        for count in (1, 2, 5, 7, 100):
            few, few_low = ask(state, count)
            assert torch.equal(few, whole[:count]) and torch.equal(few_low, low[:count])
        assert torch.equal(whole[0], x[0]) == (generation == 0)
        state = tell(state, low, whole.flatten(1)[:, 3])
        best = leader(state)
        number = max(range(len(state.history)), key=state.history.__getitem__)
        assert best.number == number
        if number >= 7 * generation:
            torch.testing.assert_close(best.latents[0], whole[number - 7 * generation], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_dtype_of_the_base(name, dtype) -> None:
    """The numbers are fp32 whatever the base, so the scores alone can tell the searches apart."""
    x = base(4, 8, 8).to(dtype)
    states = [start(z, EvolutionConfig(4, 3, "db1", 1, name), seed=0, include_base=True) for z in (x, x.float())]
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-5}[dtype]
    for _ in range(3):
        (narrow, low), (plain, expected) = map(ask, states)
        assert narrow.dtype == dtype
        torch.testing.assert_close(low, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(narrow.float(), plain, rtol=0, atol=tolerance)
        states = [tell(state, numbers, score(plain)) for state, numbers in zip(states, (low, expected), strict=True)]
    assert leader(states[0]).latents.dtype == dtype


@pytest.mark.filterwarnings("ignore:the score of candidate")
@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_continued_is_bit_equal_to_one_go(name, source) -> None:
    """25 then 50, within a generation, with scores that are not finite, whatever the batch."""
    seen: list = [[], []]

    def objective(keep: list):
        def scores(z: torch.Tensor) -> torch.Tensor:
            keep.extend(z.clone())
            return torch.where(z[:, 0, 0, 0] * 50 % 1 > 0.85, -INF, score(z))

        return scores

    options = dict(dwt_level=1, strategy=name, progress=False, include_base=True)
    x = base(4, 8, 8)
    whole = ses_fast.evolve(x, objective(seen[0]), 50, batch_size=1, **options, **NOISES[source]())
    assert 1 < whole.state.history.count(-INF) < 20
    part = ses_fast.evolve(x, objective(seen[1]), 25, batch_size=7, **options, **NOISES[source]())
    saved = part.state.state_dict()
    plain = json.loads(json.dumps({k: v for k, v in saved.items() if not isinstance(v, torch.Tensor)}))
    loaded = SearchState.load_state_dict({**{k: v for k, v in saved.items() if k not in plain}, **plain})
    assert loaded.config.strategy == name
    rest = ses_fast.evolve(x, objective(seen[1]), 50, batch_size=4, **options, state=loaded)
    assert rest.trace == whole.trace and torch.equal(rest.latents, whole.latents)
    assert all(map(torch.equal, *seen)) and len(seen[1]) == 50
    for field in ("mean", "variance", "elite_low", "elite_scores"):
        assert torch.equal(getattr(rest.state, field), getattr(whole.state, field))


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_one_candidate_and_can_win(name) -> None:
    x = base(4, 8, 8).bfloat16()
    best = [9.0, 1.0, 2.0, 3.0]
    state = searched(name, 1, x, scored=lambda z: torch.tensor(best), seed=3, include_base=True)
    state = tell(state, ask(state)[1], torch.zeros(4))
    assert leader(state).number == 0 and torch.equal(leader(state).latents, x)
    plain, with_base = (
        ask(start(x, EvolutionConfig(4, 3, "db1", 1, name), seed=3, include_base=b))[0] for b in (False, True)
    )
    assert torch.equal(with_base[1:], plain[1:]) and torch.equal(with_base[0], x[0])


@pytest.mark.parametrize("finite", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_without_a_finite_score_moves_nothing(name, finite) -> None:
    scores = torch.tensor([float(i) if i < finite else -INF for i in range(4)])
    state = start(base(4, 8, 8), EvolutionConfig(4, 4, "db1", 1, name), seed=0)
    _, low = ask(state)
    other = torch.cat([low[:finite], 1e6 * low[finite:]])
    one, two = (ask(tell(state, told, scores))[0] for told in (low, other))
    assert torch.equal(one, two)
    assert finite or one.square().mean() < 1.3  # noise again


@pytest.mark.parametrize("name", NAMES)
def test_early_scores_rank_and_never_lead(name) -> None:
    state = start(base(4, 8, 8), EvolutionConfig(4, 3, "db1", 1, name), seed=0)
    steps = torch.tensor([0, 4, 0, 2])
    state = tell(state, ask(state)[1], torch.tensor([1.0, 9.0, 2.0, 8.0]), steps=steps)
    assert leader(state).number == 2 and state.elite_scores.tolist() == [2, 1, 9]
    loaded = SearchState.load_state_dict(state.state_dict())
    assert torch.equal(ask(loaded)[0], ask(state)[0]) and loaded.steps.tolist() == steps.tolist()
    # The distribution is that of the candidates' order, whatever the early scores' size.
    plain = start(base(4, 8, 8), EvolutionConfig(4, 3, "db1", 1, name), seed=0)
    plain = tell(plain, ask(plain)[1], torch.tensor([1.0, 0.0, 2.0, -1.0]))
    assert torch.equal(ask(plain)[0], ask(state)[0])


# ---------------------------------------------------------------- what each of them draws


def test_the_reference_is_one_formula() -> None:
    state = searched("ses", 2)
    _, low = ask(state)
    noise = philox_normal(0, 2, range(4), state.mean.numel())
    torch.testing.assert_close(low, state.mean + state.variance.sqrt() * noise, rtol=0, atol=2e-6)


def test_random_draws_whole_noises_and_learns_nothing() -> None:
    state = searched("random", 2)
    candidates, low = ask(state)
    expected = philox_normal(0, 2, range(4), 4 * 8 * 8)
    torch.testing.assert_close(low, expected, rtol=0, atol=2e-6)
    assert torch.equal(candidates.flatten(1), low)


def test_a_generator_draws_one_row_a_candidate() -> None:
    ours, expected = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    config = EvolutionConfig(5, 3, "db1", 1, "ranked_whole")
    state = start(base(4, 8, 8), config, generator=ours)
    _, low = ask(state)
    assert torch.equal(low, torch.randn(5, 256, generator=expected))
    _, low = ask(tell(state, low, torch.arange(5)))
    rows = torch.randn(5, 256, generator=expected)[:2]  # each for a candidate and its mirror image
    std = (low[0] - low[1]).square().mean().sqrt() / rows[0].square().mean().sqrt() / 2
    torch.testing.assert_close((low[0] - low[1]) / 2, std * rows[0], rtol=0, atol=1e-5)
    torch.testing.assert_close((low[2] - low[3]) / 2, std * rows[1], rtol=0, atol=1e-5)
    assert torch.equal(ours.get_state(), expected.get_state())


@pytest.mark.parametrize("name, b", [("zero_order", 0.3122499), ("pcn", 0.72), ("pcn_low", 0.72)])
def test_steps_are_taken_around_the_best(name, b) -> None:
    state = searched(name, 2)
    noise = philox_normal(0, 2, range(4), state.mean.numel())
    x = (ask(state)[1] - b * noise) / (1 - b**2) ** 0.5
    torch.testing.assert_close(x, x[:1].expand_as(x), rtol=0, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(x[0], state.elite_low[0], dim=0)
    assert cosine > 0.999 and x.square().mean().sub(1).abs() < 0.01


@pytest.mark.parametrize("name", ["mirrored", "ranked", "ranked_whole", "best_two", "two_stage"])
def test_pairs_are_mirrored_at_one_mean(name) -> None:
    low = ask(searched(name, 2, config=(5, 3, "db1", 1)))[1]
    torch.testing.assert_close(low[0] + low[1], low[2] + low[3], rtol=0, atol=1e-5)
    assert not torch.equal(low[0], low[1])


@pytest.mark.parametrize("shape", [(4, 16, 16), (2, 12, 20)])
def test_the_high_band_of_haar_is_the_coarsest_diagonal(shape) -> None:
    x = base(*shape)
    candidates, low = ask(start(x, EvolutionConfig(3, 2, "db1", 2, "high_band"), seed=0))
    ours, theirs = ops.haar_dwt2(candidates, 2), ops.haar_dwt2(x, 2)
    torch.testing.assert_close(ours[1][2].flatten(1), low, rtol=0, atol=5e-6)
    for mine, its in ((ours[0], theirs[0]), (ours[1][0], theirs[1][0]), (ours[2][1], theirs[2][1])):
        torch.testing.assert_close(mine, its.expand_as(mine), rtol=0, atol=5e-6)


def test_two_stages_keep_the_leader_s_high_bands() -> None:
    state = searched("two_stage", 3)
    leads = ops.split_low_band(leader(state).latents, 1)[1]
    candidates, _ = ask(state)
    torch.testing.assert_close(ops.split_low_band(candidates, 1)[1], leads.expand(4, -1, -1, -1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["pcn_both", "ranked_both", "best_both"])
def test_both_bands_are_moved_in_turn(name) -> None:
    state = searched(name, 2, config=(6, 4, "db1", 1))
    candidates, _ = ask(state)
    rest = ops.split_low_band(candidates, 1)[1]
    best = ops.split_low_band(state.elite_low.view(-1, 4, 8, 8), 1)[1]
    cosines = torch.nn.functional.cosine_similarity(rest.flatten(1)[:, None], best.flatten(1)[None], dim=-1)
    assert (cosines.max(1).values > 0.9999).tolist() == [False, False, True, True, False, False]


def test_weights_of_elites_by_hand() -> None:
    elites = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    scores = torch.tensor([3.0, 2.0, -INF]).double()
    first, second = (torch.tensor(3.5).log() - torch.tensor(i).log() for i in (1.0, 2.0))
    expected = torch.stack([first, second]) / (first + second)
    torch.testing.assert_close(weighted(elites, scores), expected)
    assert weighted(elites, scores.fill_(-INF)).tolist() == [0, 0]


@pytest.mark.parametrize("energy", [0.0, 0.4, 0.91, 0.97, 4.0])
def test_held_energy_by_hand(energy) -> None:
    mean, std = held(torch.full((6,), energy**0.5))
    torch.testing.assert_close(mean.square() + std.square(), torch.ones(6))
    torch.testing.assert_close(std, torch.full((6,), max(1 - energy, LEAST_STEP**2) ** 0.5))


def test_steps_fall_by_generation() -> None:
    assert [round(step(g), 3) for g in (1, 2, 3, 5, 6, 100)] == [0.9, 0.72, 0.576, 0.369, 0.3, 0.3]


# ---------------------------------------------------------------- N(0, 1), and the gain


def energies(name: str, scored, generations: int) -> torch.Tensor:
    """[generations, 3]: the low band's and the whole's mean square, and the pixels' variance, of 200 candidates."""
    rows = torch.zeros(generations, 3)
    for seed in range(10):
        state = start(base(4, 16, 16, seed=seed), EvolutionConfig(20, 5, "db1", 1, name), seed=seed)
        for generation in range(generations):
            candidates, low = ask(state)
            band = spectral.split(candidates, "db1", 1)[0] if name != "high_band" else low
            pixels = candidates.flatten(1)
            found = [band.square().mean(), pixels.square().mean(), pixels.var(1).mean()]
            rows[generation] += torch.stack(found) / 10
            state = tell(state, low, scored(candidates))
    return rows


def linear(candidates: torch.Tensor) -> torch.Tensor:
    target = base(4, 8, 8, seed=9).repeat_interleave(2, 2).repeat_interleave(2, 3) / 2
    return (candidates * target).flatten(1).sum(1) / target.norm()


def quadratic(candidates: torch.Tensor) -> torch.Tensor:
    """Likes a strong low band, and a strong latent: what a search without a hold goes after."""
    low = spectral.split(candidates, "db1", 1)[0]
    return linear(candidates) + 20 * low.square().mean((1, 2, 3)) + 20 * candidates.square().mean((1, 2, 3))


@pytest.mark.parametrize("scored", [linear, quadratic])
@pytest.mark.parametrize("name", NAMES)
def test_a_long_search_stays_on_the_norm(name, scored) -> None:
    low, whole, pixels = energies(name, scored, 20).T
    if name in DRIFTING:
        assert low[0].sub(1).abs() < 0.03 and low[9] > {"ses": 2.5, "high_band": 1.25}[name], low
        return
    assert low.sub(1).abs().max() < 0.03, low
    assert whole.sub(1).abs().max() < 0.03, whole
    assert pixels.sub(1).abs().max() < 0.03, pixels


def penalised(candidates: torch.Tensor) -> torch.Tensor:
    """`linear` for those that stay on the norm, as large models ask of their noise."""
    low = spectral.split(candidates, "db1", 1)[0]
    return linear(candidates) - 20 * (low.square().mean((1, 2, 3)) - 1).square()


@pytest.fixture(scope="module")
def best_of_50():
    """The mean best score over twelve searches, of each strategy once."""
    known: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in known:
            options = dict(batch_size=10, dwt_level=1, progress=False, include_base=True, strategy=name)
            found = [ses_fast.evolve(base(4, 16, 16, seed=s), penalised, 50, seed=s, **options) for s in range(12)]
            known[name] = sum(result.score for result in found) / len(found)
        return known[name]

    return of


@pytest.mark.parametrize("name", IMPROVED)
def test_better_than_the_reference_and_than_random(name, best_of_50) -> None:
    assert best_of_50(name) > max(best_of_50("ses"), best_of_50("random"), best_of_50("high_band")) + 0.2
