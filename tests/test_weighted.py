"""Several rewards in one search, the held-out ones that judge it, and a reward that says nothing."""

import warnings

import pytest
import torch
from test_rewards import PROMPT, make_images
from tiny_clip import save_tiny_clip

import ses_fast
from ses_fast import SESConfig
from ses_fast.objective import Objective, Scored
from ses_fast.rewards import load_reward
from ses_fast.rewards.weighted import WeightedReward


def first_pixel(images, prompt):
    return images[:, 0, 0, 0]


def red(images, prompt):
    return images[:, 0].mean((1, 2))


def far_blue(images, prompt):  # another unit: 1000 times as wide, far from 0
    return images[:, 2].mean((1, 2)) * 1000 - 5000


def flat(images, prompt):
    return torch.full((len(images),), 2.5)


def weigh(**weights):
    return WeightedReward({name: globals()[name] for name in weights}, weights)


def pixels(*scores):  # images of which `first_pixel` reads these scores
    return torch.tensor(scores)[:, None, None, None].expand(-1, 3, 2, 2)


def scaled(reward, images, prompt=""):
    """The reward with the scale of these images, as a search's first generation."""
    return reward.with_scale(reward.measure(reward.raw(images, prompt)))


def test_by_hand():
    """Scores 1, 2, 3, 6: mean 3, deviation sqrt(14 / 3). Weight 2 doubles the distance from the mean."""
    reward = weigh(first_pixel=2.0)
    raw = reward.raw(pixels(1.0, 2.0, 3.0, 6.0), "")
    assert raw["first_pixel"].tolist() == [1, 2, 3, 6] and raw["first_pixel"].dtype == torch.float64
    scale = reward.measure(raw)
    assert scale == {"first_pixel": (3.0, pytest.approx((14 / 3) ** 0.5))}
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64) * 2 / (14 / 3) ** 0.5
    torch.testing.assert_close(reward.combine(raw, scale), expected)
    torch.testing.assert_close(reward.with_scale(scale)(pixels(6.0), "any"), expected[3:])


def test_the_unit_of_a_reward_does_not_matter():
    images = make_images(16, 16)
    there = scaled(weigh(red=1.0, far_blue=0.5), images)(images, "")
    near = WeightedReward({"a": red, "b": lambda i, p: i[:, 2].mean((1, 2))}, {"a": 1.0, "b": 0.5})
    torch.testing.assert_close(there, scaled(near, images)(images, ""), atol=1e-3, rtol=0)


def test_nothing_changes_after_construction():
    given = {"first_pixel": first_pixel}, {"first_pixel": 1.0}, {"first_pixel": (1.0, 0.5)}
    reward = WeightedReward(*given)
    for each in given:
        each.clear()
    for images in (pixels(2.0), pixels(5.0, 7.0), pixels(2.0)):
        reward(images, "")
        other = reward.with_scale(reward.measure(reward.raw(pixels(10.0, 20.0), "another")))
    assert other.scale["first_pixel"][0] == 15 and other.rewards == reward.rewards and other.weights == reward.weights
    assert reward.scale == {"first_pixel": (1.0, 0.5)}
    assert [reward(pixels(2.0), prompt).item() for prompt in ("a cat", "a dog")] == [2, 2]
    with pytest.raises(AttributeError):
        reward.scale = None


def test_without_a_scale_the_error_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"first generation.*with_scale\(reward.measure\(.*reward.rewards"):
        weigh(red=1.0)(pixels(1.0, 2.0), "")


def test_a_score_that_is_not_finite_leaves_the_scale_alone():
    reward = weigh(first_pixel=1.0)
    raw = reward.raw(pixels(1.0, float("nan"), 3.0, float("inf")), "")
    assert reward.measure(raw) == {"first_pixel": (2.0, pytest.approx(2**0.5))}
    assert reward.combine(raw, reward.measure(raw)).isfinite().tolist() == [True, False, True, False]
    assert reward.combine(raw, {"first_pixel": (2.0, 0.0)}).isfinite().tolist() == [True, False, True, False]


def test_a_reward_that_tells_nothing_apart_is_left_out_with_a_warning():
    reward, images = weigh(red=1.0, flat=5.0), make_images(16, 16)
    with pytest.warns(UserWarning, match="'flat' does not tell the images") as caught:
        reward = scaled(reward, images)
    assert caught[0].filename == __file__
    assert reward.scale["flat"] == (0.0, 0.0)
    torch.testing.assert_close(reward(images, ""), scaled(weigh(red=1.0), images)(images, ""))


def test_a_scale_needs_two_images():
    reward = weigh(red=1.0)
    with pytest.raises(ValueError, match="2 images or more"):
        reward.measure(reward.raw(pixels(1.0), ""))


def test_each_member_has_images_of_its_own():
    def writes(images, prompt):
        scores = red(images, prompt)
        images.zero_()
        return scores

    images = make_images(16, 16)
    before = images.clone()
    for names in (("a", "b"), ("b", "a")):
        members = {"a": writes, "b": red}
        raw = WeightedReward({name: members[name] for name in names}, dict.fromkeys(names, 1.0)).raw(images, "")
        assert torch.equal(raw["a"], raw["b"]) and torch.equal(raw["b"], red(before, "").double())
    WeightedReward({"a": writes}, {"a": 1.0}).raw(images, "")
    assert torch.equal(images, before)


def test_members_may_return_a_list():
    reward = WeightedReward({"list": lambda images, prompt: first_pixel(images, prompt).tolist()}, {"list": 1.0})
    assert reward.raw(pixels(1.0, 2.0), "")["list"].tolist() == [1, 2]


def test_scores_of_another_shape_name_the_reward():
    reward = WeightedReward({"odd": lambda images, prompt: torch.zeros(len(images), 1)}, {"odd": 1.0})
    with pytest.raises(ValueError, match=r"'odd'.*\(2, 1\)"):
        reward.raw(pixels(1.0, 2.0), "")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        pytest.param(lambda r: WeightedReward({"a": red}, {"b": 1.0}), "weights must be of", id="weights"),
        pytest.param(lambda r: r.with_scale({"blue": (0.0, 1.0)}), "scale must be of", id="another-name"),
        pytest.param(lambda r: r.with_scale({"red": (0.0, -1.0)}), "'red' must be", id="negative"),
        pytest.param(lambda r: r.with_scale({"red": (float("nan"), 1.0)}), "'red' must be", id="nan"),
        pytest.param(lambda r: r.with_scale({"red": 3}), "'red' must be", id="no-pair"),
        pytest.param(lambda r: r.with_scale([1]), "dict of names", id="no-dict"),
        pytest.param(lambda r: r.measure({}), "scores must be of", id="no-scores"),
        pytest.param(lambda r: r.combine({"blue": torch.ones(2)}, {"red": (0.0, 1.0)}), "scores must", id="others"),
    ],
)
def test_what_belongs_to_other_rewards_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use(weigh(red=1.0))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        pytest.param({}, None, "weighted as in", id="empty"),
        pytest.param({"pick": "1"}, None, "'pick' must be a finite number", id="text"),
        pytest.param({"pick": 0}, None, "'pick' must be a finite number", id="zero"),
        pytest.param({"pick": float("nan")}, None, "'pick' must be a finite number", id="nan"),
        pytest.param({"pick": True}, None, "'pick' must be a finite number", id="bool"),
        pytest.param({"pick": 1.0, "hsp": 1.0}, None, "unknown reward 'hsp'.*pick", id="unknown"),
        pytest.param({"pick": 1.0}, "folder", "dict of their names", id="one-folder-for-all"),
        pytest.param({"pick": 1.0}, {"clip": "folder"}, "dict of their names", id="weights-of-another"),
    ],
)
def test_bad_weights_raise_before_anything_is_loaded(monkeypatch, name, weights, message):
    monkeypatch.setattr("ses_fast.rewards.import_module", lambda name: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        load_reward(name, weights, "cpu")


def test_a_dict_of_names_loads_its_members_once(tmp_path):
    folders = {"clip": save_tiny_clip(tmp_path / "a"), "pick": save_tiny_clip(tmp_path / "b", seed=1)}
    reward = load_reward({"clip": 1.0, "pick": 0.5}, folders, "cpu")
    assert reward.rewards == {name: load_reward(name, folder, "cpu") for name, folder in folders.items()}
    images = make_images(64, 64)
    clip, pick = (load_reward(name, folder, "cpu")(images, PROMPT).double() for name, folder in folders.items())
    expected = (clip - clip.mean()) / clip.std() + 0.5 * (pick - pick.mean()) / pick.std()
    torch.testing.assert_close(reward.combine(raw := reward.raw(images, PROMPT), reward.measure(raw)), expected)
    ses_fast.unload_rewards()


# ---- in a search


class Raw(Objective):
    """Scores latents as images by several rewards, batch after batch, and gives the raw scores with the sum."""

    def __init__(self, reward, sizes=None, broken_at=None):
        self.reward, self.sizes, self.broken_at = reward, [] if sizes is None else sizes, broken_at

    def score(self, candidates, generation, first, report):
        for batch in candidates.split(3):
            if len(self.sizes) == self.broken_at:
                raise RuntimeError("lost")
            self.sizes.append(len(batch))
            raw = self.reward.raw(batch, "")
            if not report(Scored(self.reward.combine(raw, self.reward.scale), raw)):
                return


def with_fixed_scale():
    return weigh(red=1.0, far_blue=0.5).with_scale({"red": (0.0, 0.5), "far_blue": (-5000.0, 400.0)})


def test_an_objective_gets_generations_and_its_raw_scores_are_kept():
    reward, sizes, seen = with_fixed_scale(), [], []
    base = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"progress": False, "on_generation": lambda result: seen.append(result.trace[-1].members)}
    result = ses_fast.evolve(base, Raw(reward, sizes), 14, 4, 2, "db1", 1, seed=0, **options)
    assert sizes == [3, 1, 3, 1, 3, 1, 2]
    assert [set(each.members) for each in result.trace] == [{"red", "far_blue"}] * 14
    for each in result.trace:
        parts = [
            w * (each.members[name] - reward.scale[name][0]) / reward.scale[name][1]
            for name, w in reward.weights.items()
        ]
        assert each.score == pytest.approx(float(sum(parts)), abs=1e-4)
    assert seen == [result.trace[i].members for i in (3, 7, 11)]
    parts = ses_fast.evolve(base, Raw(reward), 6, 4, 2, "db1", 1, seed=0, progress=False)
    assert (
        ses_fast.evolve(base, Raw(reward), 14, 4, 2, "db1", 1, progress=False, state=parts.state).trace == result.trace
    )


def test_around_evolve_as_the_docstring_shows():
    base, unscaled = torch.randn(1, 3, 16, 16), weigh(red=1.0, far_blue=0.5)
    reward = scaled(unscaled, torch.randn(10, 3, 16, 16))
    result = ses_fast.evolve(
        base, lambda latents: reward(latents, ""), 14, 4, 2, "db1", 1, batch_size=3, progress=False, seed=0
    )
    assert result.score == pytest.approx(reward(result.latents, "").item(), abs=1e-5)
    again = ses_fast.evolve(  # with another search in between, and one by one
        base, lambda latents: reward(latents, ""), 14, 4, 2, "db1", 1, progress=False, seed=0
    )
    assert [each.score for each in again.trace] == pytest.approx([each.score for each in result.trace], abs=1e-5)


def test_a_broken_search_keeps_the_raw_scores():
    with pytest.raises(RuntimeError, match="lost") as caught:
        ses_fast.evolve(
            torch.randn(1, 3, 16, 16), Raw(with_fixed_scale(), broken_at=2), 12, 4, 2, "db1", 1, progress=False, seed=0
        )
    trace = caught.value.ses_result.trace
    assert len(trace) == 4 and all(each.members.keys() == {"red", "far_blue"} for each in trace)


def run(objective, budget=8, **options):
    return ses_fast.evolve(
        torch.randn(1, 1, 16, 16), objective, budget, 4, 2, "db1", 1, seed=0, **{"progress": False} | options
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_equal_scores_in_the_first_generation_are_warned_of_once(batch_size):
    with pytest.warns(UserWarning) as caught:
        run(lambda latents: [2.5] * len(latents), 12, batch_size=batch_size)
    (message,) = [str(warning.message) for warning in caught]
    assert "all 4 candidates of the first generation have the same score, 2.5" in message
    assert "the search cannot work" in message


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([1, 1, 1, 2], id="one-differs"),
        pytest.param([1], id="one-candidate"),
        pytest.param([1, 2, 1, 1, 3, 3, 3, 3], id="equal-in-a-later-generation"),
    ],
)
def test_no_warning_otherwise(scores):
    left = iter(scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda latents: next(left), len(scores))


def test_a_search_that_goes_on_does_not_warn_again():
    with pytest.warns(UserWarning, match="cannot work"):
        state = run(lambda latents: 1.0, 4).state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ses_fast.evolve(state.base, lambda latents: 1.0, 8, 4, 2, "db1", 1, progress=False, state=state)


# ---- in a pipeline

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "progress_bar_cmd": lambda steps: steps}


@pytest.fixture(scope="module")
def pipe():
    pytest.importorskip("diffsynth")
    from tiny import tiny_z_image

    return ses_fast.enable(tiny_z_image())


def search(pipe, reward, budget=6, **config):
    pipe(
        "a red fox", **CALL, enable_ses=True, ses_reward_model=reward, ses_eval_budget=budget, ses_inference_steps=2,
        ses_config=SESConfig(**{"progress": False, "popsize": 4, "k_elites": 2} | config),
    )  # fmt: skip
    return pipe.ses_result


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_scores_whole_generations(pipe, batch_size):
    reward, sizes = weigh(red=1.0, far_blue=0.5), []
    result = search(pipe, reward, batch_size=batch_size, on_preview=lambda images, *_: sizes.append(len(images)))
    assert sizes == [4, 2]
    alone = search(pipe, red, batch_size=batch_size)
    assert [each.members["red"] for each in result.trace[:4]] == pytest.approx(
        [each.score for each in alone.trace[:4]], abs=1e-5
    )
    assert alone.trace[0].members is None
    assert sum(each.score for each in result.trace[:4]) == pytest.approx(0, abs=1e-6)


def test_each_search_of_a_pipeline_measures_its_scale_and_a_continued_one_keeps_it(pipe):
    reward = weigh(red=1.0, far_blue=0.5)
    whole = search(pipe, reward, 8)
    first = search(pipe, reward, 4)
    went_on = search(pipe, weigh(red=1.0, far_blue=0.5), 8, state=first.state)  # the scale is the state's
    assert went_on.trace == whole.trace
    given = {"red": (9.0, 9.0), "far_blue": (9.0, 9.0)}
    with pytest.raises(ValueError, match="its scale was .*, this call's is"):
        search(pipe, reward.with_scale(given), 8, state=first.state)
    assert search(pipe, reward.with_scale(given), 4).trace[0].score != whole.trace[0].score  # one that is given stays


def test_a_search_that_goes_on_keeps_its_scale_whatever_was_scored_in_between(pipe):
    reward = weigh(red=1.0, far_blue=0.5)
    whole = search(pipe, reward, 8)
    assert [each.score for each in search(pipe, reward, 8).trace] == [each.score for each in whole.trace]
    first = search(pipe, reward, 4)
    pipe("a blue owl", **CALL, enable_ses=True, ses_reward_model=reward, ses_eval_budget=4, ses_inference_steps=2)
    for same in (reward, weigh(red=1.0, far_blue=0.5)):
        went_on = search(pipe, same, 8, state=first.state)
        assert [each.score for each in went_on.trace] == [each.score for each in whole.trace]


@pytest.mark.parametrize(("popsize", "budget"), [(1, 6), (4, 1)])
def test_no_first_generation_to_weigh_by(pipe, popsize, budget):
    with pytest.raises(ValueError, match="popsize and ses_eval_budget from 2 on"):
        search(pipe, weigh(red=1.0), budget, popsize=popsize, k_elites=1)


def test_the_documented_call_takes_a_dict(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda name, device: asked.append(name) or weigh(red=1.0))
    assert search(pipe, {"pick": 1.0, "hps": 0.5}).trace[0].members.keys() == {"red"}
    assert asked == [{"pick": 1.0, "hps": 0.5}]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_held_out_reward_scores_the_base_and_the_answer_alone(pipe, batch_size):
    calls = []

    def held_out(images, prompt):
        calls.append((len(images), prompt))
        return far_blue(images, prompt)

    previews = []
    result = search(
        pipe, red, report_rewards={"blue": held_out, "red": red}, batch_size=batch_size,
        on_preview=lambda images, *_: previews.extend(images),
    )  # fmt: skip
    assert calls == [(1, "a red fox")] * 2
    best = previews[4 * result.best.generation + result.best.index]
    blue = far_blue(torch.stack([previews[0], best]), "").tolist()
    held = result.held_out
    # In 8 bits: the pictures are judged, the search's own reward judged the decoder's output.
    assert [held["blue"].base, held["blue"].answer] == pytest.approx(blue, abs=1000 / 127.5)
    assert [held["red"].base, held["red"].answer] == pytest.approx([result.base_score, result.score], abs=1 / 127.5)
    assert held["red"].answer > held["red"].base
    assert result.seconds["held_out"] > 0
    assert search(pipe, red).held_out == {}


def test_held_out_rewards_change_nothing_of_the_search(pipe):
    assert search(pipe, red).trace == search(pipe, red, report_rewards={"blue": far_blue}).trace


def test_held_out_rewards_are_loaded_by_name_before_the_search(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("ses_fast.rewards.load_reward", lambda name, device: asked.append(name) or far_blue)
    assert search(
        pipe, lambda *given: asked.append("search") or red(*given), report_rewards=["hps"]
    ).held_out.keys() == {"hps"}
    assert asked[0] == "hps"


def test_a_held_out_reward_that_fails_at_once_costs_no_search(pipe):
    def broken(images, prompt):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        search(pipe, red, report_rewards={"broken": broken})
    assert pipe.ses_result is None


def test_one_that_fails_on_the_answer_keeps_what_was_found(pipe):
    calls = []

    def breaks(images, prompt):
        calls.append(prompt)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return red(images, prompt)

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        search(pipe, red, report_rewards={"breaks": breaks})
    assert pipe.ses_result.evaluations == 6 and caught.value.ses_result is pipe.ses_result


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        pytest.param("hps", "list of names", id="a-text"),
        pytest.param(["hsp"], "unknown reward 'hsp'", id="unknown"),
        pytest.param([red], "unknown reward", id="no-name"),
        pytest.param({"red": 1.0}, "dict of names to rewards", id="weights"),
        pytest.param(3, "list of names", id="a-number"),
    ],
)
def test_bad_report_rewards(rewards, message):
    with pytest.raises(ValueError, match=message):
        SESConfig(report_rewards=rewards)
