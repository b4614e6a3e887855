"""Comparison and calibration on a tiny FLUX.1 pipeline with random weights, and their figures on made-up lines."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from tiny import brightness, forward_sizes, tiny_flux

import ses_fast
from ses_fast import answers, calibrate, cli, commands, compare, models, summary, tables
from ses_fast.answers import Search
from ses_fast.methods import METHODS, MIX, PARTS, Method, named
from ses_fast.pipelines import Preview, SESConfig
from ses_fast.pipelines.diffsynth.documented import Flow
from ses_fast.rewards.weighted import WeightedReward
from ses_fast.strategies import STRATEGIES
from ses_fast.studio import Studio, score_of

PROMPT = "a red fox"
SIZE = {"height": 64, "width": 64, "progress_bar_cmd": list}


def redness(images, prompt):
    return images[:, 0].float().mean((1, 2)) - images[:, 2].float().mean((1, 2))


def load():
    """By its name in a worker too."""
    pipe = ses_fast.enable(tiny_flux())
    return Studio(pipe, {"brightness": brightness}, steps=4, held_out=redness, arguments=SIZE)


@pytest.fixture(scope="module")
def studio():
    return load()


@pytest.fixture
def plan():
    methods = ("no search", "reference", "random", "mix", "mix - batches")
    return compare.Plan((PROMPT, "a blue owl"), ("brightness",), (2, 3), seeds=2, methods=methods)


# ---------------------------------------------------------------- one method


@pytest.mark.parametrize("name", ["random", "best of N raced"])
def test_previews_that_are_final_images_are_taken_as_the_answers(studio, name):
    method, budgets = METHODS[name], (10, 20)
    assert method.shows_its_image(budgets)
    shown = answers.answers(studio, method, Search(PROMPT, 0, brightness, budgets))
    rendered = [image for image, _ in answers.searched(studio, method, Search(PROMPT, 0, brightness, budgets))]
    for one, other in zip(shown, rendered, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)  # a picture has whole grey levels
    alone = studio.search(PROMPT, 0, brightness, 10, strategy=method.strategy, preview=method.preview)[0]
    torch.testing.assert_close(rendered[0], studio.tensor(alone), rtol=0, atol=0)


def test_a_score_that_is_not_finite_leads_no_marks():
    """As in the search: the first image counts only while there is no other."""
    marks = answers._Marks((1, 2, 4))
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    marks(images, [math.nan, 2.0, math.inf, 1.0], 0, 0, torch.zeros(4, dtype=torch.int64))
    assert [image.mean().item() for image in marks.images] == [0, 1, 1]


def test_what_makes_its_image_anew_says_so():
    assert not METHODS["best of N raced"].shows_its_image((4, 10)), "a generation that is cut short is another race"
    assert METHODS["ses"].shows_its_image((4, 10))
    assert not any(METHODS[name].shows_its_image((10,)) for name in ("best of N drafts", "+ scale", "+ refine", "mix"))


def test_the_reference_is_the_installed_search(studio):
    images, seconds = answers.documented(studio, Search(PROMPT, 5, brightness, (2, 4)), final=True)
    flow = Flow(tiny_flux(), PROMPT, seed=5, num_inference_steps=4, **SIZE)
    torch.manual_seed(5)
    noise = flow.search(lambda picture: score_of(brightness, studio.tensor(picture), PROMPT), 4, level=1)
    assert torch.equal(images[1], studio.tensor(flow.final(noise)))
    assert score_of(brightness, images[0], PROMPT) == max(flow.scores[:2])
    assert 0 < seconds[0] < seconds[1]
    assert type(studio.pipe) is not type(tiny_flux()), "it is enabled again"


def test_the_costs_of_a_larger_budget_hold_those_of_the_smaller(studio):
    drafts = METHODS["best of N drafts"]
    small, large = answers.costs(studio, drafts, Search(PROMPT, 0, brightness, (2, 4)), guided=1)
    assert (small.previews, large.previews) == (2 * 2, 4 * 2), "half of four steps each"
    assert small.finals == 2 * 4 and large.finals in (3 * 4, 4 * 4), "the best three, and the base where it is none"
    assert 0 < small.denoise < large.denoise and 0 < small.seconds < large.seconds
    plain = answers.costs(studio, METHODS["no search"], Search(PROMPT, 0, brightness, (2, 4)), guided=1)
    assert [each.finals for each in plain] == [4, 4] and plain[0].previews == 0


def test_the_distance_of_answers_is_the_mean_over_pairs():
    images = [torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)]
    assert compare._apart(images) == pytest.approx((1 + 1 + 2) / 3)


# ---------------------------------------------------------------- a whole comparison


def test_a_comparison_goes_on_where_it_stopped(studio, plan, tmp_path, monkeypatch):
    figures = compare.run(lambda: studio, plan, tmp_path, rounds=1)
    assert {path.name for path in tmp_path.iterdir()} == set(compare.WRITTEN)
    assert json.loads((tmp_path / "compare.json").read_text()) == figures
    half = figures["tasks"]["brightness"]["even"]
    assert half["prompts"] == [0] and figures["tasks"]["brightness"]["odd"]["prompts"] == [1]
    assert list(half["methods"]) == list(plan.methods)
    text = (tmp_path / "compare.md").read_text()
    assert all(f"| {name}: {METHODS[name].what} |" in text for name in plan.methods)
    assert "| strategy |" not in text and "| batches and linears (one by one) |" in text

    # Killed while it wrote the last line: that prompt alone is done again, to the same figures.
    path = tmp_path / "scores.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    done = []
    real = compare.measured
    monkeypatch.setattr(compare, "measured", lambda *args: done.append(args[3:]) or real(*args))
    again = compare.run(lambda: studio, plan, tmp_path, rounds=1)
    assert done == [(1, ["brightness"])]
    assert again == figures


def test_what_methods_and_tasks_share_changes_no_figure(studio, monkeypatch):
    both = Studio(studio.pipe, {"brightness": brightness, "redness": redness}, steps=3, arguments=SIZE)
    methods = ("no search", "reference", "random", "ses", "+ race", "mix")
    plan = compare.Plan((PROMPT,), ("brightness", "redness"), (10, 12), methods=methods)
    with forward_sizes(both.pipe) as shared:
        lines = compare.measured(both, plan, (), 0, plan.tasks)
    monkeypatch.setattr(compare, "sharing", lambda kept: contextlib.nullcontext())
    monkeypatch.setattr(
        compare, "answers", lambda studio, method, search, pictures: answers.answers(studio, method, search)
    )
    with forward_sizes(both.pipe) as apart:
        assert compare.measured(both, plan, (), 0, plan.tasks) == lines
    assert sum(shared) < 0.75 * sum(apart), (sum(shared), sum(apart))
    assert [(line["prompt"], line["task"], list(line["methods"])) for line in lines] == [
        (0, "brightness", list(methods)),
        (0, "redness", list(methods)),
    ]
    plain = [line["methods"]["no search"] for line in lines]
    assert plain[0]["by redness"] == plain[1]["reward"] and plain[0]["reward"] == plain[1]["by brightness"]


def test_prompts_are_measured_in_an_order_of_which_any_first_ones_are_fair(studio, tmp_path):
    order = compare.Plan(tuple("abcdefghi"), ("brightness",), (2,)).order
    assert sorted(order) == list(range(9)) and [number % 2 for number in order] == [0, 1] * 4 + [0]
    assert order[::2] != sorted(order[::2])
    plan = compare.Plan(("a", "b", "c", "d", "e"), ("brightness",), (2,), methods=("no search",))
    for sample in (2, 4, 3):
        figures = compare.run(lambda: studio, plan, tmp_path, rounds=1, sample=sample)
    done = [json.loads(line)["prompt"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert done == plan.order[:4], "each once, and a smaller sample takes nothing away"
    halves = figures["tasks"]["brightness"]
    assert len(halves["even"]["prompts"]) == len(halves["odd"]["prompts"]) == 2


def test_a_sum_of_rewards_is_a_task_with_one_scale_for_all_methods(studio, tmp_path):
    both = WeightedReward({"brightness": brightness, "redness": redness}, {"brightness": 1.0, "redness": 1.0})
    rewards = {"brightness": brightness, "redness": redness, "brightness+redness": both}
    summed = Studio(studio.pipe, rewards, steps=2, arguments=SIZE)
    plan = compare.Plan((PROMPT, "a blue owl"), tuple(rewards), (3,), methods=("no search", "reference", "random"))
    figures = compare.run(lambda: summed, plan, tmp_path, rounds=1)
    found = summed.search(PROMPT, 0, both, 10, strategy="random")[1]
    scale = answers.scaled(summed, "brightness+redness", PROMPT, 0).scale
    assert scale == both.with_scale(found.state.fingerprint["scale"]).scale
    rows = figures["tasks"]["brightness+redness"]["even"]["methods"]
    for method in ("no search", "reference", "random"):
        row = rows[method]["budgets"][0]
        worth = sum((row[f"by {name}"][0] - mean) / deviation for name, (mean, deviation) in scale.items())
        assert row["reward"][0] == pytest.approx(worth, abs=1e-4)
    assert rows["random"]["budgets"][0]["reward to no search"][0] >= 0
    text = (tmp_path / "compare.md").read_text()
    table = text.split("## By which reward to search")[1]
    assert "| method | searched with | brightness | redness |" in table
    assert "| random | brightness+redness |" in table and "| random | redness |" in table


def test_previews_without_guidance_are_compared_where_the_call_guides(studio, tmp_path):
    guided = Studio(
        studio.pipe, studio.rewards, steps=2, arguments=SIZE | {"cfg_scale": 3.0, "negative_prompt": "dark"}
    )
    plan = compare.Plan((PROMPT,), ("brightness",), (10,), methods=("ses", "+ no guidance"))
    figures = compare.run(lambda: guided, plan, tmp_path / "guided", rounds=1)
    methods = figures["tasks"]["brightness"]["even"]["methods"]
    assert methods["ses"]["budgets"][0]["forwards"] == 10 * 2 * 2 + 2 * 2
    assert methods["+ no guidance"]["budgets"][0]["forwards"] == 10 * 2 + 2 * 2
    figures = compare.run(lambda: studio, plan, tmp_path / "plain", rounds=1)
    assert list(figures["tasks"]["brightness"]["even"]["methods"]) == ["ses"]
    assert "no guidance to leave out" in figures["refused"]["+ no guidance"]


def test_groups_of_methods_go_by_a_name():
    assert named(["quick", "pcn", "random"])[0] == "no search" and named(["quick", "pcn"]).count("random") == 1
    assert set(named(["quick", "pcn"])) == set(named(["quick"])) | {"pcn"}
    assert {method.name for method in PARTS.values()} < set(named(["parts"]))
    assert named(["all"]) == tuple(METHODS) and named(["ses", "magic"]) == ("ses", "magic")
    usual = named(["usual"])
    assert {"random", "zero-order", "reference", "ses", "cem whole noise", "cem high band"} < set(usual)
    assert {"best of N drafts", "best of N raced", "two_stage", "best_both", "pcn", "mix"} < set(usual)
    assert {METHODS[name].strategy for name in named(["strategies"])} - {None} == set(STRATEGIES)


def test_own_settings_are_a_method(studio, tmp_path):
    config = SESConfig(popsize=4, k_elites=3, strategy="ranked", dwt_level=2, preview=Preview(refine=1))
    own = Method.of(config, 0.5, "own", "mine")
    plan = compare.Plan((PROMPT,), ("brightness",), (4, 8), methods=("random", "own"), own=own)
    figures = compare.run(lambda: studio, plan, tmp_path, rounds=1)
    found = figures["tasks"]["brightness"]["even"]["methods"]["own"]["budgets"][1]
    settings = {"popsize": 4, "k_elites": 3, "strategy": "ranked", "dwt_level": 2, "preview": config.preview}
    result = studio.search(PROMPT, 0, brightness, 8, 2, **settings)[1]
    assert found["reward"][0] == pytest.approx(result.score, abs=0.01), "a picture has whole grey levels"
    assert "| own: mine |" in (tmp_path / "compare.md").read_text()
    for changed in ({"seed": 3}, {"time_limit": 5}, {"include_base": False}):
        with pytest.raises(ValueError, match=f"has its own {next(iter(changed))}"):
            Method.of(dataclasses.replace(config, **changed), 1, "own", "")


def test_workers_measure_the_same(studio, tmp_path):
    plan = compare.Plan((PROMPT, "a blue owl"), ("brightness",), (2,), methods=("no search", "random"))
    figures = compare.run(load, plan, tmp_path, rounds=1, workers=2)
    for half, number in (("even", 0), ("odd", 1)):
        methods = figures["tasks"]["brightness"][half]["methods"]
        line = compare.measured(studio, plan, (), number, ["brightness"])[0]["methods"]
        for name, each in line.items():
            assert methods[name]["budgets"][0]["reward"][0] == pytest.approx(each["reward"][0][0], abs=1e-4)


def test_a_folder_of_another_comparison_is_refused(studio, plan, tmp_path):
    compare.open_folder(tmp_path, plan)
    other = compare.Plan(plan.prompts, plan.tasks, (2, 6), plan.seeds, plan.methods)
    with pytest.raises(ValueError, match="other budgets: give another folder"):
        compare.run(lambda: pytest.fail("loaded"), other, tmp_path)
    (tmp_path / "scores.jsonl").write_text('{"prompt": 0\n{}\n')
    with pytest.raises(ValueError, match="is not what ses-fast wrote"):
        compare.run(lambda: pytest.fail("loaded"), plan, tmp_path)


def test_what_a_pipeline_cannot_do_is_left_out_by_name(studio, tmp_path):
    odd = Studio(studio.pipe, studio.rewards, steps=2, arguments=SIZE | {"height": 80})  # 10 latents, whose half is 5
    plan = compare.Plan((PROMPT,), ("brightness",), (2,), methods=("random", "+ scale"))
    figures = compare.run(lambda: odd, plan, tmp_path, rounds=1)
    assert list(figures["tasks"]["brightness"]["even"]["methods"]) == ["random"]
    assert "half" in figures["refused"]["+ scale"]
    assert "Not possible here: + scale. " in (tmp_path / "compare.md").read_text()


def test_no_prompt_is_begun_that_would_not_end_in_time(studio, tmp_path):
    plan = compare.Plan((PROMPT, "a blue owl"), ("brightness",), (2,), methods=("no search", "random"))
    figures = compare.run(lambda: studio, plan, tmp_path, rounds=1, minutes=0)
    assert not any(half["prompts"] for half in figures["tasks"]["brightness"].values())
    assert (tmp_path / "compare.md").read_text().count("None measured yet.") == 2
    assert compare.run(lambda: studio, plan, tmp_path, rounds=1, minutes=9)["tasks"]["brightness"]["odd"]["prompts"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompts": ()}, "no prompt"),
        ({"budgets": (10, 10)}, "rising whole numbers"),
        ({"budgets": (0, 10)}, "from 1 on"),
        ({"methods": ("ses", "magic")}, "unknown method magic"),
    ],
)
def test_an_impossible_plan_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        compare.Plan(**{"prompts": (PROMPT,), "tasks": ("brightness",), "budgets": (2,), **changes})


# ---------------------------------------------------------------- figures of made-up lines


def made_up(**rewards):
    """The figures of two even prompts and budgets 10 and 50; seconds are 2 and 10, of the reference 20 and 100."""
    methods = [name.replace("_", " ") for name in rewards]
    settings = {"budgets": [10, 50], "tasks": ["clip"], "seeds": 1, "about": {"model": "m"}}
    settings["methods"] = {name: dataclasses.asdict(METHODS[name]) for name in methods}
    settings["machine"] = {"rounds": 3, "threads": 1}
    rows = [
        {
            "prompt": number,
            "task": "clip",
            "methods": {m: {"reward": [each[i]]} for m, each in zip(methods, rewards.values(), strict=True)},
        }
        for i, number in enumerate((0, 2))
    ]
    times = []
    for name in methods:
        slower = 10 if name == "reference" else 1
        half = METHODS[name].preview.scale > 1
        for shift in (-1, 0, 5):  # of which the median is 0
            costs = [
                {"seconds": slower * evaluations / 5 + shift, "previews": 8 * evaluations, "finals": 8}
                | {"denoise": evaluations * (0.25 if half else 1.0)}
                for evaluations in (10, 50)
            ]
            times.append({"round": shift, "task": "clip", "method": name, "costs": costs})
    return summary.summarise(settings, rows, times)


def test_differences_are_paired_and_times_are_shares():
    figures = made_up(
        reference=[[1.0, 3.0], [11.0, 13.0]], random=[[2.0, 2.5], [12.0, 12.5]], ses=[[2.0, 4.0], [12.0, 14.0]]
    )
    methods = figures["tasks"]["clip"]["even"]["methods"]
    ses = methods["ses"]["budgets"][1]
    assert ses["reward"][0] == 9 and ses["reward to reference"] == [1, 1, 1] and ses["reward to random"] == [1.5] * 3
    assert (ses["seconds"], ses["forwards"]) == (10, 408)
    # The reference reaches 8 in 100 s; this one half way from 2 to 10 s.
    assert methods["ses"]["share of the reference's time"] == [0.06, 0.06, 0.06]
    assert methods["random"]["share of the reference's time"] == [None, None, None], "it never does"
    assert methods["reference"]["share of the reference's time"][0] == 1
    assert methods["ses"]["reached"] == {"budget": 30, "seconds": 6, "reward": [0, 0, 0]}
    assert methods["random"]["reached"] is None
    assert figures["chosen"] == "ses"
    assert "**ses**" in tables.markdown(figures) and "not reached" in tables.markdown(figures)
    assert figures["tasks"]["clip"]["odd"] == {"prompts": [], "methods": {}}


def test_answers_are_judged_at_the_moment_that_the_time_is_of():
    """Half way from the first budget to the second, by the other judge too; where the first is enough, there."""
    lines = {"reference": ([0.0, 8.0], [4.0, 5.0]), "ses": ([7.0, 9.0], [1.0, 3.0]), "random": ([8.5, 9.0], [6.0, 7.0])}
    methods = {name: {"reward": [one], "held_out": [other]} for name, (one, other) in lines.items()}
    settings = {"budgets": [10, 50], "tasks": ["clip"], "methods": {m: dataclasses.asdict(METHODS[m]) for m in lines}}
    cost = {"previews": 80, "finals": 8, "denoise": 1.0}
    times = [
        {"round": 0, "task": "clip", "method": m, "costs": [cost | {"seconds": 2.0}, cost | {"seconds": 10.0}]}
        for m in lines
    ]
    rows = [{"prompt": number, "task": "clip", "methods": methods} for number in (1, 3)]
    figures = summary.summarise(settings, rows, times)
    found = figures["tasks"]["clip"]["odd"]["methods"]
    assert found["ses"]["reached"] == {"budget": 30, "seconds": 6, "reward": [0, 0, 0], "held_out": [-3, -3, -3]}
    assert found["random"]["reached"] == {"budget": 10, "seconds": 2, "reward": [0.5] * 3, "held_out": [1, 1, 1]}
    assert found["random"]["share of the reference's time"] == [0.2, 0.2, 0.2]


def test_shares_are_paired_over_prompts():
    """Every prompt by itself says one half of the time, however far they lie apart."""
    rewards = [[float(i), i + 4.0] for i in (0, 50)]
    figures = made_up(reference=rewards, ses=[[low, high + 4] for low, high in rewards])
    share = figures["tasks"]["clip"]["even"]["methods"]["ses"]["share of the reference's time"]
    assert share == [0.06, 0.06, 0.06], "half way from 2 to 10 s, of 100"
    figures = made_up(reference=rewards, mix=[[0.0, 4.0], [50.0, 58.0]])
    low, high = figures["tasks"]["clip"]["even"]["methods"]["mix"]["share of the reference's time"][1:]
    assert (low, high) == (0.06, 0.1), "either prompt may be drawn twice"


def test_a_half_size_forward_counts_by_its_share():
    figures = made_up(reference=[[1.0, 3.0]] * 2, ses=[[2.0, 4.0]] * 2, mix=[[2.0, 4.0]] * 2)
    mix = figures["tasks"]["clip"]["even"]["methods"]["mix"]["budgets"][1]
    assert mix["a preview's forward"] == 0.25 and mix["forwards"] == 400 / 4 + 8


def test_that_share_is_of_all_turns_and_of_one_turn_each():
    """A machine that was four times slower in one turn, for both, and busy with the half size in another."""
    settings = {"methods": {name: dataclasses.asdict(METHODS[name]) for name in ("ses", "mix", "mix - batches")}}
    turns = {(0, "clip"): (8.0, 2.0), (0, "jpeg"): (32.0, 8.0), (1, "clip"): (8.0, 6.0)}
    times = [
        {"round": number, "task": task, "method": name, "costs": [{"denoise": seconds, "previews": 10}]}
        for (number, task), pair in turns.items()
        for name, seconds in zip(settings["methods"], (*pair, 40.0), strict=True)
    ]
    assert summary.shares_of(settings, times) == {"ses": 1.0, "mix": 0.25, "mix - batches": 0.25}
    assert math.isnan(summary.shares_of(settings, times[1:2])["mix"]), "nothing of full size"


def test_a_method_that_is_another_ones_but_for_its_time_has_its_rewards():
    shared = {"reference": [[1.0, 3.0]] * 2, "ses": [[1.0, 3.0]] * 2}
    figures = made_up(**shared, mix=[[2.0, 4.0]] * 2, **{"mix - batches": [[0.0, 0.0]] * 2})
    methods = figures["tasks"]["clip"]["even"]["methods"]
    assert methods["mix - batches"]["budgets"][1]["reward"][0] == 4
    assert methods["mix - batches"]["budgets"][1]["forwards"] == methods["mix"]["budgets"][1]["forwards"]
    assert "| batches and linears (one by one) |" in tables.markdown(figures)


def test_what_a_part_gives_is_a_share_of_the_mixs_time_and_a_difference():
    shared = {"reference": [[1.0, 3.0]] * 2, "mix": [[2.0, 4.0]] * 2}
    figures = made_up(**shared, **{"mix - race": [[2.5, 3.5]] * 2, "mix - refine": [[1.0, 2.0]] * 2})
    found = figures["tasks"]["clip"]["even"]["methods"]
    assert found["mix - race"]["share of the mix's time"] == [1, 1, 1], "both are half way from 2 to 10 s"
    assert found["mix - refine"]["share of the mix's time"] == [None, None, None]
    text = tables.markdown(figures)
    assert "| race (no race) | 10.00 | 0.06 [0.06, 0.06] | 1.00 [1.00, 1.00] | 3.50 [3.50, 3.50] | -0.50" in text
    assert "| refine (no refinement) | 10.00 | not reached | not reached | 2.00" in text


def said(**rewards):
    """`findings` where each method has these rewards on the odd prompts: of each prompt at budget 10 and 50."""
    methods = {name: dataclasses.asdict(METHODS[name.replace("_", " ")]) for name in rewards}
    settings = {"budgets": [10, 50], "tasks": ["clip"], "seeds": 1, "about": {"model": "m"}}
    settings["methods"] = {each["name"]: each for each in methods.values()}
    rows = [
        {
            "prompt": 2 * i + 1,
            "task": "clip",
            "methods": {
                methods[name]["name"]: {"reward": [each[i]], "oracle": [[0.0, float(i % 2)]]}
                for name, each in rewards.items()
            },
        }
        for i in range(len(next(iter(rewards.values()))))
    ]
    cost = {"previews": 80, "finals": 8, "denoise": 1.0}
    times = [
        {"round": 0, "task": "clip", "method": each["name"], "costs": [cost | {"seconds": s * t} for t in (2.0, 10.0)]}
        for each in methods.values()
        for s in [10 if each["documented"] else 1]
    ]
    return tables.findings(summary.summarise(settings, rows, times))


LEVELS = [0.0, 7.0, -3.0, 20.0, 4.0]


def around(low, high, wobble=0.0):
    """Rewards of prompts of very different levels; wobble: how far prompts differ in what the method is worth."""
    return [[level + low, level + high + wobble * (-1) ** i] for i, level in enumerate(LEVELS)]


def test_the_report_answers_in_words():
    claim, default, time, plain = said(
        reference=around(0, 1),
        random=around(0, 1),
        ses=around(0, 2),
        cem_whole_noise=around(0, 1.9, 3),
        best_of_N_raced=around(0, 1.5),
    )
    assert "(the paper's claim)? **clip**: not seen (+1.00 [+1.00, +1.00] beside random, " in claim
    assert "beside cem whole noise)" in claim and "-" in claim.split("random")[-1]
    assert default.startswith("Is ses, the call's own default, above random and above the reference at 50")
    assert "**clip**: yes (+1.00 [+1.00, +1.00] beside random, +1.00 [+1.00, +1.00] beside reference)" in default
    assert "ses 0.06 [0.06, 0.06] (oracle -0.20" in time and "; random 0.10 [0.10, 0.10] (oracle" in time
    assert "best of N raced 0.07" in time
    assert "**clip**: no (the quickest is cem whole noise, the highest reward is cem whole noise's)" in plain


@pytest.mark.parametrize(
    ("ses", "cem", "verdict"),
    [
        (around(0, 2), around(0, 1), "yes (+1.00"),
        (around(0, 0.5), around(0, 0), "no (-0.50"),
        (around(0, 2, 3), around(0, 1), "not seen (+1"),
        (around(0, 2), None, "not known (+1.00 [+1.00, +1.00] beside random, cem whole noise was not compared)"),
        (around(0, 0.5), None, "no (-0.50"),
    ],
)
def test_the_paper_s_claim_needs_both_and_an_interval(ses, cem, verdict):
    methods = {"random": around(0, 1), "ses": ses} | ({} if cem is None else {"cem_whole_noise": cem})
    assert f"(the paper's claim)? **clip**: {verdict}" in said(**methods)[0]


def test_plain_best_of_n_wins_where_it_does():
    assert (
        "yes, in time to that reward and in reward at equal evaluations (the quickest is random, "
        in said(reference=around(0, 1), random=around(0, 3), ses=around(0, 2))[-1]
    )
    assert (
        "yes, in reward at equal evaluations (the highest reward is random's)"
        in said(random=around(0, 3), ses=around(0, 2))[-1]
    ), "without the reference there is no time to its reward"
    assert "not compared" in said(reference=around(0, 1), ses=around(0, 2))[-1]
    assert "**clip**: not known (ses was not compared)." in said(random=around(0, 1), mix=around(0, 2))[0]


def test_of_one_prompt_no_interval_is_known():
    claim, default, time, _ = said(reference=[[0.0, 1.0]], random=[[0.0, 2.0]], ses=[[0.0, 3.0]])
    assert "not known (+1.00 [..., ...] beside random, " in claim
    assert "not seen (+1.00 [..., ...] beside random, +2.00 [..., ...] beside reference)" in default
    assert "ses 0.05 [..., ...] (oracle +0.00 [..., ...])" in time


def test_without_the_reference_nothing_is_chosen_and_the_report_says_why():
    text = tables.markdown(made_up(random=[[2.0, 2.5]] * 2, ses=[[2.0, 4.0]] * 2))
    assert "**none, since the reference is not here**" in text and "What it says" not in text
    assert "**none reaches it on all tasks**" in tables.markdown(made_up(reference=[[1.0, 3.0]] * 2, ses=[[0, 1]] * 2))


def test_every_part_of_the_mix_is_left_out_once():
    parts = dict(PARTS)
    assert parts["batches and linears"].batch_size == 1 and parts["batches and linears"].preview == MIX.preview
    assert parts["strategy"].strategy != MIX.strategy and parts["strategy"].preview == MIX.preview
    for name, usual in {"race": None, "scale": 1, "refine": 0}.items():
        changed = {
            key
            for key in ("scale", "race", "refine", "cfg")
            if getattr(parts[name].preview, key) != getattr(MIX.preview, key)
        }
        assert changed == {name} and getattr(parts[name].preview, name) == usual


# ---------------------------------------------------------------- calibration


def look(scores, seconds=1.0):
    found = calibrate.Look()
    for each in scores:
        found.add(each, seconds)
    return found


FULL = [[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 4.0, 2.0, 3.0]]
FULL_STEPS = {"num_inference_steps": 4, "ses_inference_steps": 4}
TURNED = [[-score for score in each] for each in FULL]


def test_the_cheapest_setting_that_ranks_well_enough_is_recommended():
    measured = calibrate.Measured(full=look(FULL))
    good, better = calibrate.Setting("3 steps", 3), calibrate.Setting("half the size", 4, Preview(scale=2))
    measured.settings = {
        calibrate.Setting("2 steps", 2): look(TURNED, 0.1),
        good: look([[2.0, 1.0, 3.0, 4.0, 5.0], FULL[1]], 0.25),
        better: look(FULL, 0.5),
    }
    told = calibrate.advice(measured, 4)
    assert told.setting == good and told.race is None and told.level is None
    assert told.refine == 0 and told.setting_time == pytest.approx((5 * 0.25 + 1) / 6, abs=1e-3)
    assert told.settings["call"] == {"num_inference_steps": 4, "ses_inference_steps": 3}
    measured.settings.pop(good)
    assert calibrate.advice(measured, 4).settings["preview"]["scale"] == 2
    measured.settings.pop(better)
    told = calibrate.advice(measured, 4)
    assert told.setting is None and told.settings == {
        "preview": {"scale": 1, "cfg": True, "refine": 0},
        "call": FULL_STEPS,
    }
    assert "No cheaper setting" in calibrate.markdown(measured, told, {})


def test_the_time_to_equal_reward_counts_the_images_that_are_made_again():
    full, same, useless = look(FULL), look(FULL, 0.1), look(TURNED, 0.1)
    assert calibrate.time_share(full, full, 0) == pytest.approx(1, abs=1e-3)
    assert calibrate.time_share(same, full, 0) == pytest.approx((5 * 0.1 + 1) / 6, abs=1e-3)
    assert calibrate.time_share(useless, full, 0) == pytest.approx((5 * 0.1 + 1) / 2, abs=1e-3), "worth one image"
    assert calibrate.time_share(useless, full, 5) == pytest.approx((5 * 0.1 + 6) / 6, abs=1e-3)


def test_a_race_is_worth_what_its_pick_is_over_what_it_costs():
    measured = calibrate.Measured(full=look(FULL, 4.0), forward=[1.0, 1.0])  # four steps, and looks that cost nothing
    measured.early = {(2, 0.5): look(FULL, 2.0)}
    races = {rungs: rest for rungs, *rest in calibrate.races(measured)}
    # Three of five go on, half of each and the other half of three; of the first prompt the base too, which is worst.
    half = 5 * 0.5 + (4 + 3) / 2 * 0.5
    assert races[((0.5, 0.5),)][0] == pytest.approx(5 / half, abs=1e-3)
    told = calibrate.advice(measured, 4)
    assert told.race == ((0.5, 0.3),) and told.settings == {
        "preview": {"race": [[0.5, 0.3]]},
        "call": FULL_STEPS,
    }
    assert told.race_time == pytest.approx((5 * 0.5 + (3 + 2) / 2 * 0.5 + 1) / 6, abs=1e-3), "and the final image"
    measured.settings = {calibrate.Setting("2 steps", 2): look(FULL, 0.4)}
    told = calibrate.advice(measured, 4)
    assert told.setting_time == pytest.approx((0.5 + 1) / 6, abs=1e-3) and not told.races
    assert "Written is the setting" in calibrate.markdown(measured, told, {})
    measured.early = {(2, 0.5): look(TURNED, 2.0)}
    assert calibrate.advice(measured, 4).race is None


def test_candidates_race_in_generations_as_a_search_has_them():
    """Of 20 noises the best two are in the second generation: half of each goes on, not the better half of all."""
    scores = [[*map(float, range(20))]] * 2
    measured = calibrate.Measured(full=look(scores, 4.0), forward=[1.0, 1.0])
    measured.early = {(2, 0.5): look(scores, 2.0)}
    cost, picks = calibrate._raced(measured, [(2, 0.5)], (0.3,))
    assert cost == pytest.approx(20 * 0.5 + (3 + 1 + 3) * 0.5), "three of each ten, and the base"
    assert picks == [19.0, 19.0]
    reverse = calibrate.Measured(full=look(scores, 4.0), forward=[1.0, 1.0])
    reverse.early = {(2, 0.5): look([[-score for score in each] for each in scores], 2.0)}
    assert calibrate._raced(reverse, [(2, 0.5)], (0.3,))[1] == [12.0, 12.0], "the worst three of the second ten"


def test_previews_that_tell_nothing_apart_do_not_rank_well():
    same = [1.0] * 5
    assert calibrate.correlation(look([same, FULL[1]]), look(FULL)).value == 0.5
    assert calibrate.correlation(look(FULL), look([same, FULL[1]])).value == 1, "nothing to rank in the first"
    with pytest.raises(ValueError, match="the reward gave nan for 1 of 2 previews"):
        look([[1.0, math.nan]])


def test_a_setting_that_saves_no_time_is_not_written():
    measured = calibrate.Measured(full=look(FULL))
    slow = calibrate.Setting("3 steps", 3)
    measured.settings = {slow: look([[1.0, 2.0, 3.0, 5.0, 4.0], FULL[1]], 0.99)}
    told = calibrate.advice(measured, 4)
    assert told.setting == slow and told.setting_time > 1 and not told.cheaper
    assert told.settings == {"preview": {"scale": 1, "cfg": True, "refine": 0}, "call": FULL_STEPS}
    assert "saves no time" in calibrate.markdown(measured, told, {})


def test_the_low_band_decides_where_its_share_is_the_larger():
    rows = {"itself": FULL, "kept": FULL, "anew": TURNED}
    assert calibrate.decides(rows) == "no", "the opposite is as much"
    rows["anew"] = [[1.0, 1.0, 2.0, 1.0, 1.0]] * 2
    assert calibrate.decides(rows) == "yes"
    assert calibrate.decides({name: each[:1] for name, each in rows.items()}) == "unclear", "one prompt says nothing"
    rows["kept"] = [FULL[0], TURNED[1]]
    assert calibrate.decides(rows) == "unclear", "one says yes, the other no"
    rows = {"itself": FULL, "kept": FULL, "anew": TURNED}
    kept, anew = calibrate.band_correlations(rows)
    assert kept.value == pytest.approx(1) and anew.value == pytest.approx(-1)


def test_a_pipeline_is_calibrated(studio, tmp_path):
    prompts = (PROMPT, "a blue owl")
    found = calibrate.measure(studio, brightness, prompts, 4)
    assert [step for step, _ in sorted(found.early)] == [2, 3], "the first forward is of noise alone"
    names = [setting.name for setting in found.settings]
    assert names == ["1 steps of 4", "2 steps of 4", "3 steps of 4", "half the size", "half the size, 2 steps"]
    assert not found.refused and set(found.bands) == {1, 2}
    # What was measured is what the documented call does.
    result = studio.search(prompts[0], 0, brightness, 4, strategy="random", popsize=4)[1]
    assert found.full.scores[0] == pytest.approx([each.score for each in result.trace], abs=1e-5)
    half = next(each for each in found.settings if each.name == "2 steps of 4")
    fewer = studio.search(prompts[0], 0, brightness, 4, 2, strategy="random", popsize=4)[1]
    assert found.settings[half].scores[0] == pytest.approx([each.score for each in fewer.trace], abs=1e-5)
    assert all(each.cost(found.full) > 0 for each in found.settings.values())
    calibrate.write(
        told := calibrate.advice(found, 4), calibrate.markdown(found, told, {"model": "tiny"}), tmp_path / "s.json"
    )
    config = SESConfig.from_file(tmp_path / "s.json")
    assert SESConfig(preview=Preview(**told.settings["preview"])).preview == config.preview
    assert SESConfig.call_from_file(tmp_path / "s.json") == told.settings["call"]
    assert "| half the size |" in (tmp_path / "s.md").read_text()


def test_previews_without_guidance_are_calibrated_where_the_call_guides(studio):
    guided = Studio(
        studio.pipe, studio.rewards, steps=2, arguments=SIZE | {"cfg_scale": 3.0, "negative_prompt": "dark"}
    )
    found = calibrate.measure(guided, brightness, [PROMPT], 3)
    (setting,) = [each for each in found.settings if each.name == "without guidance"]
    result = guided.search(PROMPT, 0, brightness, 3, strategy="random", popsize=3, preview=Preview(cfg=False))[1]
    assert found.settings[setting].scores[0] == pytest.approx([each.score for each in result.trace], abs=1e-5)
    assert found.settings[setting].scores[0] != pytest.approx(found.full.scores[0], abs=1e-5)


def test_a_noise_with_its_low_band_kept_is_told_from_one_with_it_anew(studio):
    """A reward that sees the low band alone: of the noise of the picture itself."""
    found = calibrate.Measured(full=look([[0.0] * 4]))
    result = studio.search(PROMPT, 0, brightness, 4, strategy="random", popsize=4, k_elites=1)[1]
    seen = []
    pictures = lambda *args, latents, **others: seen.append(latents) or (None, None)  # noqa: E731
    recording = type(
        "Recording", (), {"search": staticmethod(pictures), "tensor": staticmethod(lambda p: torch.zeros(1, 3, 8, 8))}
    )
    calibrate._bands(recording, brightness, PROMPT, 0, result, found)
    noises = calibrate._noises(result.state, result.state.seed, 4, include_base=True)
    kept, anew = torch.cat(seen[:4]), torch.cat(seen[4:8])
    low = lambda x: torch.nn.functional.avg_pool2d(x, 2)  # noqa: E731
    torch.testing.assert_close(low(kept), low(noises))
    torch.testing.assert_close(anew - up(low(anew)), noises - up(low(noises)), atol=1e-5, rtol=0)
    assert (low(anew) - low(noises)).abs().mean() > 0.1 and (kept - noises).abs().mean() > 0.1


def up(x):
    return torch.nn.functional.interpolate(x, scale_factor=2)


def test_a_preview_of_a_file_has_known_fields(tmp_path):
    (tmp_path / "ses.json").write_text('{"dwt_level": 2, "preview": {"scale": 2, "race": [[0.8, 0.5]], "refine": 1}}')
    config = SESConfig.from_file(tmp_path / "ses.json")
    assert config == SESConfig(dwt_level=2, preview=Preview(scale=2, race=((0.8, 0.5),), refine=1))
    (tmp_path / "ses.json").write_text('{"preview": {"sacle": 2}}')
    with pytest.raises(ValueError, match="preview has no sacle; it has scale, race, cfg, refine"):
        SESConfig.from_file(tmp_path / "ses.json")


def test_too_few_noises_are_refused(studio):
    with pytest.raises(ValueError, match="at least 2"):
        calibrate.measure(studio, brightness, [PROMPT], 1)


# ---------------------------------------------------------------- the commands


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", tiny_flux)
    monkeypatch.setattr(commands, "load_reward", lambda name, weights: {"pick": brightness, "clip": redness}[name])


OPTIONS = ["--model", "tiny", "--steps", "2", "--height", "64", "--width", "64"]


def test_the_command_compares(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox\n\na blue owl\n")
    arguments = ["compare", str(tmp_path / "prompts.txt"), *OPTIONS, "--tasks", "pick,clip", "--report-reward", "clip"]
    arguments += [
        "--methods",
        "reference,random,ses",
        "--budgets",
        "2,3",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--rounds",
        "1",
    ]
    cli.main([*arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "## Task pick, odd prompts (to report on; 1)" in printed and "## Task clip, even prompts" in printed
    figures = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert figures["settings"]["prompts"] == ["a red fox", "a blue owl"] and figures["target"] == 3
    assert "held_out" in figures["tasks"]["pick"]["odd"]["methods"]["ses"]["budgets"][0]


def test_the_command_calibrates(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox")
    out = tmp_path / "ses.json"
    cli.main(["calibrate", str(tmp_path / "prompts.txt"), *OPTIONS, "--noises", "3", "--out", str(out)])
    assert "# Previews against full fidelity" in capsys.readouterr().out
    assert SESConfig.call_from_file(out)["num_inference_steps"] == 2
    arguments = ["compare", str(tmp_path / "prompts.txt"), *OPTIONS[:2], *OPTIONS[4:], "--methods", "random,ses"]
    arguments += ["--budgets", "3", "--workers", "1", "--rounds", "1", "--config", str(out), "--sample", "1"]
    cli.main([*arguments, "--out", str(tmp_path / "compared")])
    assert f"| own: the settings of {out.name} |" in capsys.readouterr().out
    settings = json.loads((tmp_path / "compared" / "settings.json").read_text())
    assert settings["about"]["steps"] == 2, "as the file says"
    assert settings["own"]["steps"] * 2 == SESConfig.call_from_file(out)["ses_inference_steps"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "5", *OPTIONS], "names captions of the embedded model"),
        (["compare", "201"], "1 to 200 held-out captions"),
        (["compare", "2", "--tasks", "jpeg,jpeg"], "names one twice"),
        (["compare", "2", "--tasks", "beauty"], "beauty"),
        (["compare", "2", "--tasks", "clip+clip"], "one reward twice"),
        (["compare", "2", "--tasks", "clip+beauty"], "beauty"),
        (["compare", "2", "--budgets", "ten"], "must be whole numbers"),
        (["compare", "2", "--sample", "0"], "at least 1"),
        (["compare", "2", "--config", "timed.json"], "a comparison has its own time_limit"),
        (["compare", "2", "--config", "steps.json", "--steps", "9"], "leave --steps 9 out"),
        (["compare", "2", "--methods", "magic"], "unknown method magic"),
        (["compare", "2", "--minutes", "nan"], "must be above 0"),
        (["compare", "foxes.txt"], "a red fox"),
        (["calibrate", "nowhere.txt"], "nowhere.txt"),
        (["calibrate", "2", "--out", "ses.md"], "JSON file of settings"),
        (["calibrate", "2", "--reward", "embedded", *OPTIONS], "embedded model's captions"),
    ],
)
def test_bad_arguments_end_in_one_line(tiny, arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foxes.txt").write_text("a red fox")
    (tmp_path / "timed.json").write_text('{"time_limit": 5}')
    (tmp_path / "steps.json").write_text('{"call": {"num_inference_steps": 8, "ses_inference_steps": 4}}')
    monkeypatch.setitem(models.MODELS, "embedded", lambda: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_embedded_model_is_compared_by_workers(tmp_path):
    arguments = [
        "compare",
        "2",
        "--budgets",
        "4,8",
        "--seeds",
        "2",
        "--rounds",
        "1",
        "--workers",
        "2",
        "--minutes",
        "30",
    ]
    cli.main([*arguments, "--methods", "no search,reference,random,ses,mix", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "compare.json").read_text())
    for task in ("clip", "jpeg"):
        methods = figures["tasks"][task]["odd"]["methods"]
        plain, *searched = (methods[name]["budgets"][-1] for name in ("no search", "random", "ses"))
        assert all(each["reward"][0] >= plain["reward"][0] for each in searched), "the base is among the candidates"
        assert all(0 <= each["oracle"][0] <= 1 and math.isfinite(each["held_out"][0]) for each in searched)
        assert 0 < methods["mix"]["budgets"][-1]["a preview's forward"] < 0.6
