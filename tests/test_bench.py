"""The measurements: that what is compared is the same, and that what is counted is right."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_hps import checkpoint, img_score  # noqa: F401  fixtures
from test_rewards import make_images

import ses_fast
from bench import collect, compare, cpu, end_to_end, floor, keep, readme_tables, reference_tables
from bench import ops as op_benches
from bench.baseline import Flow, HPSScore
from bench.clip import check_scores
from bench.environment import environment
from bench.floor import Rates, Work
from bench.ops import result_path
from ses_fast import embedded, summary
from ses_fast.methods import METHODS
from ses_fast.rewards.hps import HPSReward
from ses_fast.strategies import Strategy

PROMPT = "two red squares left of three blue rings"
SMALL = {"num_inference_steps": 1, "height": 128, "width": 128}  # half the size that the model draws by itself
SHORT = end_to_end.Model(SMALL, level=1, device="cpu", dtype=torch.float32, budget=12, rounds=1)
TOLERANCE = {"counted": 0.02, "hps": 1e-5}


@pytest.mark.parametrize(
    ("family", "denoise_ms", "decode_ms", "preprocess_us"),
    [
        pytest.param("z-image-turbo", 573, 13.3, 2.2, id="z-image-turbo"),
        pytest.param("z-image", 4297, 13.3, 2.2, id="z-image-with-cfg"),
        pytest.param("flux.1-dev", 2825, 13.3, 2.2, id="flux.1-dev"),
        pytest.param("qwen-image", 10001, 25.5, 3.63, id="qwen-image-with-cfg-at-1328"),
        pytest.param("flux.2-dev", 10732, 13.3, 2.2, id="flux.2-dev"),
        pytest.param("flux.2-klein-4b", 176, 13.3, 2.2, id="klein-its-latents-are-packed"),
    ],
)
def test_the_floor_of_the_real_modules(family, denoise_ms, decode_ms, preprocess_us):
    """Figures that were counted independently, at 790 TFLOP/s and 3.0 TB/s."""
    works = floor.family_stages(family)
    found = {stage: 1e3 * work.seconds(floor.RATES["h100"]) for stage, work in works.items()}
    expected = {"denoise": denoise_ms, "decode": decode_ms, "reward": 0.42, "preprocess": preprocess_us / 1e3}
    for stage, value in expected.items():
        assert found[stage] == pytest.approx(value, rel=TOLERANCE["counted"]), stage


def test_count_by_hand():
    linear = torch.nn.Linear(64, 32, device="meta", dtype=torch.bfloat16)
    x = torch.empty(10, 64, device="meta", dtype=torch.bfloat16)
    query, key = (torch.empty(2, 4, n, 16, device="meta") for n in (10, 7))
    work = floor.count(lambda: (linear(x), F.scaled_dot_product_attention(query, key, key)), traffic=5)
    attention = 2 * 2 * (2 * 4 * 10 * 7 * 16)  # two products, two operations each
    assert work == Work(2 * 10 * 64 * 32 + attention, attention, 2 * (64 * 32 + 32), 5)


def test_a_stage_takes_the_longer_of_its_bounds():
    work = Work(operations=100, attention=40, weights=30, traffic=10)
    assert work.seconds(Rates(matrix=10, memory=100)) == 10
    assert work.seconds(Rates(matrix=10, memory=100, attention=4)) == 16
    assert work.seconds(Rates(matrix=1e9, memory=1)) == 40
    assert work.seconds(Rates(matrix=1e9, memory=1), batch=3) == 20  # weights are read once a batch


def test_the_flow_is_the_stock_call():
    pipe = embedded.load_pipeline()
    call = {"seed": 3, "num_inference_steps": 2, "height": 128, "width": 64, "progress_bar_cmd": list}
    flow = Flow(pipe, PROMPT, **call)
    assert flow.render(flow.base).tobytes() == pipe(PROMPT, **call).tobytes()
    other = flow.render(torch.randn(flow.base.shape, generator=torch.Generator().manual_seed(0)))
    assert other.tobytes() != pipe(PROMPT, **call).tobytes()
    assert all(flow.seconds[stage] > 0 for stage in ("prompt", "denoise", "decode"))


def test_flux2s_packed_noise_is_searched_as_an_image():
    noise = torch.randn(1, 128, 8, 4)
    flow = Flow.__new__(Flow)
    flow.shared = {"noise": noise.reshape(1, 128, 32).permute(0, 2, 1), "height": 128, "width": 64}  # as its unit does
    assert torch.equal(flow.base, noise)


@pytest.mark.filterwarnings("ignore")  # of torch.cuda.amp, in hpsv2
def test_the_baselines_hps_is_the_rewards(img_score, checkpoint):  # noqa: F811
    """hpsv2's own preprocessing and cosine."""
    from PIL import Image

    reward = HPSReward.from_file(checkpoint, "hps-small", device="cpu")
    images = make_images(96, 160)
    pixels = ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    score = HPSScore(reward.model, reward.tokenizer, img_score.model_dict["preprocess_val"], PROMPT)
    found = torch.tensor([score(Image.fromarray(image)) for image in pixels])
    torch.testing.assert_close(found, reward(images, PROMPT), atol=TOLERANCE["hps"], rtol=0)


@pytest.fixture(scope="module")
def contest():
    return end_to_end.Contest("embedded", SHORT)


def test_both_ways_see_the_same(contest):
    rows = {"eager": end_to_end.ROWS["eager"]}
    apart, failed = contest.check(rows)
    assert apart["eager"]["scores"] < 0.05 * apart["spread"] and apart["eager"]["images"] < 0.01 and not failed
    times = contest.race(rows, 1, failed)
    assert not failed and times.keys() == {"baseline", "eager"}
    figures = end_to_end.summarise(times["eager"], {"total": 1.0}, {"total": 0.5})
    assert 0 < figures["overhead"] < 0.5 and figures["x floor, attention at its own rate"] == 2 * figures["x floor"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param({"dwt_level": 2}, "not close", id="other-candidates"),
        pytest.param({"score": 0.1}, "scores differ", id="other-scores"),
        pytest.param({"score": float("nan")}, "scores differ by nan", id="no-scores"),
        pytest.param({"darker": 3}, "images differ", id="other-images"),
    ],
)
def test_what_differs_is_not_timed(contest, monkeypatch, broken, message):
    rows = {"eager": end_to_end.ROWS["eager"]}
    if "score" in broken:
        stock = contest.reward
        monkeypatch.setattr(contest, "reward", lambda images, prompt: stock(images, prompt) + broken["score"])
    elif "darker" in broken:
        render = Flow.render
        monkeypatch.setattr(Flow, "render", lambda *a: render(*a).point(lambda grey: max(0, grey - broken["darker"])))
    else:
        evolve = end_to_end.ses_fast.evolve
        monkeypatch.setattr(end_to_end.ses_fast, "evolve", lambda *a, **k: evolve(*a, **(k | broken)))
    monkeypatch.setattr(contest, "race", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(end_to_end, "Contest", lambda *_: contest)
    with pytest.raises(AssertionError, match=message):
        end_to_end.measure("embedded", SHORT, rows)


ABOUT = {
    "device": "Some CPU",
    "cores": 2,
    "python": "3.11",
    "versions": {"torch": "2"},
    "date": "2026-01-01",
    "commit": "abc",
}


def result_of(date="2026-01-01", device="Some CPU", speedup=(3.0, 3.1, 2.9), floor=2.0, times=2.0, spread=0.01):
    """A result file of one op and one search."""
    middle = sorted(speedup)[len(speedup) // 2]
    row = {
        "seconds": dict.fromkeys(("total", "denoise", "decode", "reward", "final"), 6.0),
        "batch": 10,
        "floor": {"total": 1.25},
        "overhead": 0.004,
        "x floor": 1.5,
        "x floor, attention at its own rate": 1.4,
    }
    figures = {
        "budget": 50,
        "steps": 8,
        "rows": {"baseline": row, "eager": row | {"x baseline": middle, "x baseline, all": list(speedup)}},
        "rates": {"matrix": 1e12, "attention": 1e12, "memory": 1e12},
        "apart": {"spread": 10.0, "eager": {"scores": 0.001, "images": 0.002}},
        "together": {"mean": 0.5, "largest": 20.0, "limit": 0.01},
        "attention": "torch",
        "memory": None,
        "failed": {},
    }
    about = ABOUT | {"date": date, "device": device}
    op = {"row": "an op|torch", "ms": 1.0, "spread": 0.01, "floor": floor, "GB/s": 5.0}
    reward = {"reward": "a CLIP", "spread": 0.01, "images/s": 50.0, "stock images/s": 25.0, "times": 2.0, "bar": 3.0}
    beside = {"what": "resize", "shape": [3, 8, 8], "ours": 1.0, "theirs": 2.0, "times": times, "bar": 1.0}
    searches = {"threads": 2, "models": {"embedded": figures}, "failed": {"flux.1-dev": "no memory"}}
    searches |= {"asked": {"models": ["embedded", "flux.1-dev", "z-image-turbo"], "rows": ["eager"]}}
    ops = {"copy_GB/s": 10.0, "rows": [op], "rewards": [reward]}
    parts = {"ops": ops, "cpu": {"threads": 2, "rows": [beside | {"spread": spread}]}, "searches": searches}
    return collect.collected({name: {"environment": about, **part} for name, part in parts.items()})


def test_what_moved_is_beyond_the_noise():
    assert compare.moved(result_of(), result_of()) == []
    assert compare.moved(result_of(floor=2.0), result_of(floor=2.1)) == []
    assert compare.moved(result_of(floor=2.0), result_of(floor=3.0)) == ["slower x1.50 (noise x1.15): an op|torch"]
    assert compare.moved(result_of(floor=3.0), result_of(floor=2.0)) == ["faster x1.50 (noise x1.15): an op|torch"]
    steady, spread = result_of(speedup=(2.0, 2.0, 2.0)), result_of(speedup=(1.0, 1.5, 2.0))
    assert compare.moved(result_of(), spread) == []  # its rounds differ by as much
    assert compare.moved(result_of(), steady) == ["slower x1.50 (noise x1.15): search embedded|eager"]
    slower = ["slower x1.54 (noise x1.15): resize (3, 8, 8)|beside what it replaces"]
    assert compare.moved(result_of(), result_of(times=1.3)) == slower
    assert compare.moved(result_of(), result_of(times=1.3, spread=0.4)) == []
    lost = result_of() | {"ops": None}
    names = ["an op|torch", "reward: a CLIP|stock"]
    assert compare.moved(result_of(), lost) == [f"no longer measured: {name}" for name in names]
    assert compare.moved(lost, result_of()) == [f"not measured before: {name}" for name in names]


def test_only_what_is_committed_on_such_a_device_is_compared_with(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(compare, "RESULTS", folder)

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name, result in {
        "a": result_of("2026-01-01"),
        "b": result_of("2026-01-03"),
        "c": result_of("2026-01-04", device="Other"),
    }.items():
        (folder / f"{name}-bench.json").write_text(json.dumps(result))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "results")
    (folder / "d-bench.json").write_text(json.dumps(result_of("2026-01-09")))
    assert compare.committed(result_of())[0] == "bench/results/b-bench.json"
    assert compare.committed(result_of(device="Third")) is None
    assert compare.committed(result_of("2026-01-03"))[0] == "bench/results/a-bench.json"  # not with itself
    again = result_of("2026-01-03", times=5.0)
    (folder / "b-bench.json").write_text(json.dumps(again))
    git("commit", "-qam", "again on the same day")
    assert compare.committed(again) == ("bench/results/b-bench.json", result_of("2026-01-03"))
    os.utime(folder / "a-bench.json", (2e9, 2e9))  # the newest is the one whose date is
    compare.main([])
    assert str(folder / "d-bench.json") in capsys.readouterr().out


def test_one_file_holds_the_run(tmp_path):
    result = result_of()
    text = collect.markdown(result)
    for part in (
        "Some CPU",
        "commit abc",
        "| 3.00 |",
        "1.50 (1.40)",
        "an op",
        "resize",
        "| a CLIP | 50.0 | 25.0 | 2.00 | at least 3, missed |",
        "not measured: flux.1-dev, same candidates, same steps (FAILED: no memory)",
        "not measured: z-image-turbo, same candidates, same steps\n",
        "0.5 of 255 on the mean (at most 0.01, missed)",
        "peak memory: not measured",
    ):
        assert part in text
    only_ops = collect.collected({"ops": result["ops"]})
    assert collect.markdown(only_ops).count("Not measured.") == 2
    with pytest.raises(ValueError, match="nothing was measured"):
        collect.collected({})
    with pytest.raises(ValueError, match="different devices"):
        collect.collected({"ops": result_of(device="Other")["ops"], "cpu": result["cpu"]})


def test_the_memory_bar_is_shown():
    result = result_of()["searches"]
    result["models"]["embedded"]["memory"] = 1.04
    assert "peak memory: 1.040 of the plain call's (at most 1.05)" in end_to_end.table(result)
    result["models"]["embedded"] |= {"memory": 1.06, "failed": {"2 together": "no room"}}
    assert "FAILED: embedded, 2 together: no room" in end_to_end.table(result)
    assert "peak memory: 1.060 of the plain call's (at most 1.05, missed)" in end_to_end.table(result)


def test_the_readmes_table_says_what_was_not_measured():
    old, new = result_of("2026-01-01", speedup=(9.0,)), result_of("2026-01-02", speedup=(3.0,))
    newest = result_of("2026-01-03") | {"searches": None}  # hides nothing
    lines = readme_tables.performance([newest, new, old]).splitlines()
    assert len([line for line in lines if "Some CPU" in line]) == 1
    for cell in ("| 10 |", "| 3.00 |", f"| {6 / 1.25:.2f} |"):  # batch, times faster, at most
        assert cell in lines[2]
    rows = len(end_to_end.MODELS) * len(end_to_end.ROWS)
    assert all("not measured" in line for line in lines[3 : 2 + rows])
    assert "preprocessing counts as reward" in lines[-1] and len(lines) == 4 + rows
    with pytest.raises(ValueError, match="there is no"):
        readme_tables.written("no marks", "performance", "")


def test_the_readmes_operators():
    result = result_of()
    text = readme_tables.operators([result_of("2026-01-02") | {"cpu": None}, result])
    assert "| resize | 3 x 8 x 8 | 1.00 | 2.00 | 2.0 | 1 |" in text and "Some CPU, 2 threads" in text
    assert "On a GPU: not measured yet." in text
    gpu = result_of(device="Some GPU") | {"cpu": None}
    graph = {"row": "population P=50|triton", "graph_us": 12.345, "graph_floor": 1.678}
    gpu["ops"]["rows"] = [graph, graph | {"row": "population P=50|torch"}]
    text = readme_tables.operators([result, gpu])
    assert text.count("population P=50") == 1 and "| population P=50 | 12.35 | 1.68 |" in text
    assert "not measured" not in text and "not measured" in readme_tables.operators([])


FIGURES = {
    "environment": ABOUT,
    "captions": 200,
    "seconds": 1017.6,
    "headroom": {"one noise right": 0.35},
    "search": {
        "no search": {"reward": 32.03, "all facts right": 0.35},
        "SES": {"reward": 40.5, "all facts right": 0.89},
    },
}


def test_the_embedded_models_measures_by_hand():
    from bench import embedded as measures

    rows = [
        {"score": [1.0, 2.0, 3.0, 4.0], "other": [2.0, 4.0, 6.0, 8.0], "right": [False, False, True, True]},
        {"score": [5.0, 3.0, 4.0, 2.0], "other": [-5.0, -3.0, -4.0, -2.0], "right": [True, False, True, False]},
    ]
    assert measures.auc_within(rows, "score") == 1 and measures.auc_within(rows, "other") == 0.5
    # around their means the first's products are 10, the second's -5; the squares are 5 + 5 and 20 + 5
    assert measures.correlation_within(rows, "score", "other") == pytest.approx(5 / 250**0.5)
    assert measures.rank_correlation_within(rows, "score", "other") == pytest.approx(0)
    scores = [0.0] * 10 + [1.0] * 10
    gain = measures.gain_of_more([{"score": scores}])
    assert gain == pytest.approx(0.5 / np.std(scores, ddof=1))


def test_what_ses_has_over_random_noises():
    from bench import embedded as measures

    blank = [0.0] * (measures.BUDGET - 1)
    headroom = [
        {"score": [*blank, best], "heldout": [*blank, best], "right": [False] * measures.BUDGET}
        for best in (1.0, 2.0, 4.0)
    ]
    searched = [
        {"score": row["score"][-1] + more, "heldout": 1.0, "right": True}
        for row, more in zip(headroom, (1, 2, 3), strict=True)
    ]
    found = measures.summarise_search(headroom, searched)
    less = found[f"SES less the {measures.RANDOM}"]
    assert less["reward"] == pytest.approx((2.0, 1.0, 3.0)) and less["all facts right"] == (1.0, 1.0, 1.0)
    assert less["held-out reward"][0] == pytest.approx(1 - 7 / 3)
    text = measures.search_table({"search": json.loads(json.dumps(found))})
    assert "| SES less the best of 50 random | +2.000 [+1.000, +3.000] |" in text and text.endswith("|  |")


def test_the_embedded_models_figures():
    old = FIGURES | {"environment": ABOUT | {"date": "2025-01-01"}, "seconds": 1.0}
    text = readme_tables.gains_and_headroom([FIGURES, old])
    for part in (
        "Some CPU, 2026-01-01, commit abc; 200 captions, 1018 seconds",
        "| one noise right | 0.350 | at least 0.05, at most 0.25 | no |",
        "| SES |",
    ):
        assert part in text


FOUND = {"no search": 0.5, "reference": 1.0, "random": 1.5, "ses": 2.0, "mix": 1.5}


def comparison(tasks=("clip",)):
    """Of four prompts of a hundred, two in each half, where ses finds better ones than random, and mix does not."""
    methods = {name: asdict(METHODS[name]) for name in FOUND}
    settings = {"budgets": [10, 50], "methods": methods, "tasks": list(tasks), "seeds": 1, "prompts": ["a"] * 100}
    settings |= {"about": {"model": "m", "steps": 8}, "machine": {"device": "cpu", "rounds": 1, "threads": 1}}

    def worth(value, task):
        return {"reward": [[0.5, value]], "held_out": [[0.2, value if task == "clip" else 0.2]], "oracle": [[0.0, 1.0]]}

    scores = [
        {"prompt": i, "task": task, "methods": {name: worth(value, task) for name, value in FOUND.items()}}
        for i in range(4)
        for task in tasks
    ]
    cost = {"previews": 80, "finals": 8, "denoise": 1.0}
    times = [
        {"round": 0, "task": task, "method": name, "costs": [cost | {"seconds": 2.0}, cost | {"seconds": seconds}]}
        for name, seconds in {"no search": 0.1, "reference": 20.0, "random": 5.0, "ses": 5.0, "mix": 4.0}.items()
        for task in tasks
    ]
    return summary.summarise(settings, scores, times)


@pytest.fixture
def compared():
    return comparison() | {"environment": ABOUT}


def test_figures_of_earlier_weights_say_so(compared):
    from ses_fast.embedded import weights_digest

    warning = "Measured with earlier weights"
    tables = (readme_tables.equal_cost, readme_tables.whole_comparison, readme_tables.by_others)
    for digest, warned in ((weights_digest(), False), ("0123456789ab", True), (None, True)):
        compared["settings"]["about"] |= {"model": "embedded", "weights": digest}
        assert [warning in table([compared]) for table in tables] == [warned] * 3
    compared["settings"]["about"]["model"] = "z-image-turbo"
    assert not any(warning in table([compared]) for table in tables)


def test_the_readmes_gains(compared):
    text = readme_tables.equal_cost([compared])
    assert "| `ses_search` (reference) | 20.0 | 1.00 [1.00, 1.00] | -0.50 [-0.50, -0.50] | 1.00 of its time |" in text
    assert "| ses | 5.0 | 2.00 [2.00, 2.00] | +0.50 [+0.50, +0.50] | 0.15 of its time |" in text
    assert "| random | 5.0 | 1.50 [1.50, 1.50] |  | 0.17 of its time |" in text
    assert "| no search | 0.1 | 0.50 [0.50, 0.50] | -1.00 [-1.00, -1.00] | not reached |" in text
    assert "Some CPU, 2026-01-01: model m, 8 steps, 50 evaluations; means over 2 prompts" in text
    assert f"\n![reward over time]({readme_tables.PLOT})\n" in text
    assert (
        "\n- Searched with clip, the default, `ses`, is above random noises (+0.50 [+0.50, +0.50]) and above "
        "`ses_search` (+1.00 [+1.00, +1.00]), in 0.25 of the time of `ses_search`.\n"
    ) in text
    empty = {readme_tables.equal_cost([]), readme_tables.whole_comparison([]), readme_tables.by_others([])}
    assert empty == {readme_tables.NOTHING}
    whole = readme_tables.whole_comparison([compared])
    assert "Methods at equal cost" not in whole and "### Task clip, odd prompts" in whole and "\n# " not in whole
    assert whole.startswith("Some CPU, 2026-01-01, commit abc.\n\nmodel m") and readme_tables.PLOT in whole
    older = compared | {"environment": ABOUT | {"date": "2025-12-31", "device": "Z"}}
    assert "Some CPU" in readme_tables.equal_cost([compared, older])


def test_what_others_say_of_the_gains():
    rows = readme_tables.by_others([comparison(("clip", "jpeg"))]).splitlines()
    gain, none = "+1.50 [+1.50, +1.50]", "+0.00 [+0.00, +0.00]: maybe none"
    assert f"| clip | ses | {gain} | {gain} | {none} |" in rows and f"| jpeg | ses | {gain} | {none} | {none} |" in rows
    assert len(rows) == 2 + 2 * 3 and not any("no search" in row for row in rows)


def test_what_is_not_told_apart_is_not_called_equal(compared):
    row = compared["tasks"]["clip"]["odd"]["methods"]["ses"]["budgets"][-1]
    row["reward to random"], row["reward to reference"] = [0.1, -0.2, 0.3], [1.0, None, None]
    (said,) = readme_tables.in_words(compared, 1)
    assert "is not told apart from random noises (+0.10 [-0.20, +0.30]) and not told apart from `ses_search`" in said
    assert readme_tables.in_words(compared | {"default": None}, 1) == []


def test_the_readme_has_room_for_a_comparison(compared):
    """As the test of its length asks, whatever is chosen: with both tasks, all methods that it shows, a calibration."""
    figures = json.loads(json.dumps(compared))
    found = figures["tasks"]["clip"]["odd"]["methods"]
    found |= dict.fromkeys(("no search", "best of N raced"), found["random"])
    figures |= {"chosen": "mix", "tasks": {"clip": figures["tasks"]["clip"], "jpeg": figures["tasks"]["clip"]}}
    text = readme_tables.equal_cost([figures], ["| a |\n|---|\n| b |\n\nRecommended: a.\n\nNo race.\n"])
    assert text.count("\n| ") == 6 and "| seconds (clip / jpeg) |" in text and "| 5.0 / 5.0 |" in text
    assert "\n- `ses-fast calibrate` on it: Recommended: a. No race.\n" in text
    readme = readme_tables.written((readme_tables.ROOT / "README.md").read_text(), "gains", text)
    assert len(readme.splitlines()) <= 130


def test_the_mark_of_what_random_does_as_well():
    assert readme_tables.beside([0.1, -0.2, 0.4]) == "+0.10 [-0.20, +0.40]: as good"
    assert "as good" not in readme_tables.beside([0.3, 0.1, 0.4]) + readme_tables.beside([-0.3, -0.4, -0.1])


def test_the_inventory_says_what_was_never_measured(compared):
    about = {"environment": ABOUT}
    text = readme_tables.inventory(
        {"some-cpu-1-bench.json": about, "some-cpu-1-bench.md": None, "h100-floor.json": about}
    )
    assert text.count("some-cpu-1-bench") == 2 and "| Some CPU | 2026-01-01 | abc |" in text
    floor_row = next(line for line in text.splitlines() if "h100-floor" in line)
    assert "Some CPU" not in floor_row
    missing = text.splitlines()[-1]
    assert (
        "`ses-fast compare`" in missing
        and "calibrate" in missing
        and "on a GPU" in missing
        and "operators" not in missing
    )
    gpu = about | {"environment": ABOUT | {"device": "NVIDIA H100"}}
    more = readme_tables.inventory({"h100-2-bench.json": gpu, "a-compare.json": compared, "a-calibrate.md": about})
    assert "on a GPU" not in more and "compare`" not in more.splitlines()[-1] and "| Some CPU |" in more


def test_the_inventory_is_of_every_kept_file(tmp_path, monkeypatch):
    (tmp_path / "a-bench.json").write_text('{"environment": {}}')
    (tmp_path / "a-bench.md").write_text("its page")
    (tmp_path / "b-calibrate.md").write_text("# Title\n\nMeasured on Some CPU, 2026-01-01, commit abc.\n\ntext\n")
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    place = {"device": "Some CPU", "date": "2026-01-01", "commit": "abc"}
    expected = {"a-bench.json": {"environment": {}}, "a-bench.md": None, "b-calibrate.md": {"environment": place}}
    assert readme_tables.every_file() == expected


def test_reports_and_floors():
    assert readme_tables.reports(["# A\n\ntext\n"]) == "## A\n\ntext\n" and "Not measured" in readme_tables.reports([])
    assert readme_tables.floors([]) == readme_tables.NOTHING
    work = vars(Work(790e9, 0, 0, 0))
    result = {"device": "h100", "rates": vars(floor.RATES["h100"]), "batch": 1}
    result["families"] = {"some-model": {stage: work for stage in floor.STAGES}}
    text = readme_tables.floors([result])
    assert "H100: 790 TFLOP/s and 3 TB/s" in text and "| some-model | 1 | 1 | 1 | 1000 | 1000 | 0% | 0.25 |" in text


def test_the_reference_tables():
    def draw(g):
        """x' = |m| n (arXiv 2602.03208)."""

    known = {"one": Strategy(draw, "whole")}
    assert reference_tables.strategies(known).splitlines()[2] == (
        "| `one` | the whole noise | x' = ‖m‖ n ([arXiv 2602.03208](https://arxiv.org/abs/2602.03208)). |"
    )
    text = reference_tables.commands(reference_tables.parsers())
    assert "## ses-fast generate" in text and "| `--seed` | `0` |" in text and "| `prompt` |  |" in text
    moved = reference_tables.kernels({"a.py": "Adds: fast.\n\nMore. Bytes: the image\nonce."})
    assert moved.splitlines()[2] == "| `a.py` | Adds. | the image once. |"
    assert {"haar.py", "population.py", "elites.py", "preprocess.py"} <= set(reference_tables.kernel_files())


def test_the_plot_is_drawn_of_a_comparison(compared, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "renewed", dict)
    monkeypatch.setattr(readme_tables, "comparisons", lambda: [])
    readme_tables.main([])
    assert not (tmp_path / readme_tables.PLOT).exists()
    monkeypatch.setattr(readme_tables, "comparisons", lambda: [compared])
    readme_tables.main([])
    assert (tmp_path / readme_tables.PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_plot_is_there_where_a_comparison_is():
    assert not readme_tables.comparisons() or (readme_tables.ROOT / readme_tables.PLOT).exists()


def test_the_readmes_are_up_to_date():
    """`make readme-tables` has been run after the last result."""
    for path, text in readme_tables.renewed().items():
        assert path.read_text() == text, path


@pytest.mark.parametrize(("file", "name"), [section[:2] for section in readme_tables.SECTIONS])
def test_every_section_is_checked(tmp_path, monkeypatch, file, name):
    for each in {section[0] for section in readme_tables.SECTIONS}:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text((readme_tables.ROOT / each).read_text())
    monkeypatch.setattr(readme_tables, "renewed", functools.partial(readme_tables.renewed, tmp_path))
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    readme_tables.main([])
    path = tmp_path / file
    right = path.read_text()
    path.write_text(right.replace(f"<!-- bench:{name} -->\n", f"<!-- bench:{name} -->\nby hand\n"))
    with pytest.raises(SystemExit, match=f"out of date: {file}"):
        readme_tables.main(["--check"])
    readme_tables.main([])
    assert path.read_text() == right


def faults(folder):
    """What is wrong with a folder of results."""
    found = []
    for path in sorted(folder.glob("*")):
        kind = next((kind for kind in readme_tables.KINDS if path.stem.endswith(f"-{kind}")), None)
        result = json.loads(path.read_text()) if path.suffix == ".json" else {}
        if kind is None:
            found.append(f"{path.name} is of no kind that is known")
            continue
        if kind == "calibrate":
            result = {"environment": keep.about(path.read_text())}
        elif path.suffix == ".md":
            if not path.with_suffix(".json").is_file():
                found.append(f"{path.name} is of no result")
            continue
        facts = {"device", "date", "commit"} | ({"cores", "versions"} if kind != "calibrate" else set())
        if not result.get("environment", {}).keys() >= facts:
            found.append(f"{path.name} does not say what it was measured on")
            continue
        floor = f"{result.get('device')}-floor"  # counted, of a device that need not be this one
        if path.stem != (floor if kind == "floor" else result_path(result["environment"], f"-{kind}").stem):
            found.append(f"{path.name} is not named after what it was measured on")
        page = path.with_suffix(".md")
        if kind == "bench" and not (page.is_file() and page.read_text() == collect.markdown(result)):
            found.append(f"{page.name} is missing or old")
    return found


def test_every_result_has_its_page(tmp_path):
    assert faults(collect.RESULTS) == []
    result = result_of()
    path = tmp_path / "some-cpu-2026-01-01-bench.json"
    path.write_text(json.dumps(result))
    assert faults(tmp_path) == ["some-cpu-2026-01-01-bench.md is missing or old"]
    path.with_suffix(".md").write_text(collect.markdown(result))
    assert faults(tmp_path) == []
    path.rename(tmp_path / "other-bench.json")
    assert len(faults(tmp_path)) == 3


def test_reports_say_what_they_were_measured_on(tmp_path):
    """As the commands write them they are refused in bench/results."""
    plain = {"some-cpu-2026-01-01-compare.json": json.dumps(comparison()), "a-2026-01-01-calibrate.md": keep.TITLE}
    for name, text in plain.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").touch()
    assert faults(tmp_path) == [
        "a-2026-01-01-calibrate.md does not say what it was measured on",
        "notes.md is of no kind that is known",
        "some-cpu-2026-01-01-compare.json does not say what it was measured on",
    ]


REPORT = f"{keep.TITLE}\nmodel m; 2 prompts.\n\nNo race is worth its looks.\n"


@pytest.fixture
def reports(tmp_path):
    """compare.json and ses.md, as the commands leave them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "compare.json").write_text(json.dumps(comparison(("clip", "jpeg"))))
    (out / "ses.md").write_text(REPORT)
    return [str(out / "compare.json"), str(out / "ses.md")]


def test_kept_reports_fill_every_page(reports, tmp_path, monkeypatch):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    keep.main([*reports, "--commit", "abc", "--into", str(results)])
    assert faults(results) == []
    calibrated, compared = sorted(results.iterdir())
    keep.main([str(calibrated), str(compared), "--into", str(results)])  # anew: the same names, today's commit
    assert sorted(results.iterdir()) == [calibrated, compared] and faults(results) == []
    assert calibrated.read_text().count("Measured on") == 1
    keep.main([*reports, "--commit", "abc", "--into", str(results)])

    for each in {section[0] for section in readme_tables.SECTIONS}:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text((readme_tables.ROOT / each).read_text())
    monkeypatch.setattr(readme_tables, "RESULTS", results)
    monkeypatch.setattr(readme_tables, "renewed", functools.partial(readme_tables.renewed, tmp_path))
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    readme_tables.main([])
    with pytest.raises(SystemExit, match="^0$"):
        readme_tables.main(["--check"])
    readme, comparison_page, calibration, limits, index = (
        (tmp_path / name).read_text()
        for name in (
            *("README.md", "docs/results/comparison.md", "docs/results/calibration.md"),
            *("docs/guides/limits.md", "docs/results/index.md"),
        )
    )
    assert len(readme.splitlines()) <= 130 and "](docs/compare.png)" in readme and "jpeg reward" in readme
    assert "### Task jpeg, odd prompts" in comparison_page and "](../../docs/compare.png)" in comparison_page
    assert "## Previews against full fidelity\n\nMeasured on " in calibration and "No race" in calibration
    assert "maybe none" in limits
    assert all(f"[{path.name}](../../bench/results/{path.name})" in index for path in (calibrated, compared))
    assert index.count("| abc |") == 2 and "`ses-fast compare`" not in index.splitlines()[-1]
    assert (tmp_path / readme_tables.PLOT).is_file()


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        pytest.param("{", "compare.json", "Expecting", id="no-json"),
        pytest.param('{"settings": {}}', "compare.json", "no compare.json of ses-fast", id="another-json"),
        pytest.param("# Something", "ses.md", "no report of ses-fast calibrate", id="another-report"),
    ],
)
def test_what_neither_command_wrote_is_not_kept(tmp_path, capsys, text, name, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        keep.main([str(tmp_path / name), "--into", str(tmp_path)])
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == [name]


def test_compiled_blocks_are_not_the_baselines(contest, monkeypatch):
    """A row whose `enable` changes the models has a pipeline of its own, made once."""
    given = []

    def enable(pipe, **options):
        if options:
            given.append(pipe)
        return stock(pipe)

    stock = end_to_end.ses_fast.enable
    monkeypatch.setattr(end_to_end.ses_fast, "enable", enable)
    for _ in range(2):
        assert contest.ours(end_to_end.ROWS["compile"], 1).evaluations == 1
    assert given[0] is given[1] and given[0].dit is not contest.pipe.dit
    assert torch.equal(given[0].dit.x_pad_token, contest.pipe.dit.x_pad_token)


@pytest.mark.parametrize("broken", [pytest.param(False, id="right"), pytest.param(True, id="wrong")])
def test_a_wrong_op_gives_no_result(tmp_path, monkeypatch, broken):
    stock = ses_fast.ops.sample_population

    def sample_population(*arguments, **options):
        candidates, low = stock(*arguments, **options)
        return candidates + 1e-3 * broken, low

    monkeypatch.setattr(ses_fast.ops, "sample_population", sample_population)
    out = tmp_path / "ops.json"
    chosen = ["-k", "sample_population and 4x64x64-10-torch", "-p", "no:cacheprovider"]
    assert bool(op_benches.main(["--out", str(out), *chosen])) == broken
    assert out.exists() != broken


@pytest.mark.parametrize("what", [cpu.population, cpu.search, cpu.resize])
def test_what_is_wrong_on_the_cpu_is_not_timed(monkeypatch, what):
    def wrong(stock, *arguments, **options):
        found = stock(*arguments, **options)
        return (found[0] + 1e-3, found[1] + 1e-3) if isinstance(found, tuple) else found + 1e-3

    for op in ("sample_population", "resize_normalize"):
        monkeypatch.setattr(ses_fast.ops, op, functools.partial(wrong, getattr(ses_fast.ops, op)))
    monkeypatch.setattr(cpu, "in_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="not close"):
        what((3, 256, 256) if what is cpu.resize else (4, 64, 64), 1)


def test_a_cpu_row_has_its_spread():
    row = cpu.row("resize", (3, 8, 8), ours=[1.0, 2.0, 1.0], theirs=[2.0, 2.0, 3.0])  # 2, 1 and 3 times
    assert row["times"] == 2 and row["spread"] == pytest.approx(1 / 2)
    assert cpu.row("resize", (3, 8, 8), ours=[1.0], theirs=[2.0])["spread"] == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        pytest.param([1.0, float("nan")], [1.0, 2.0], "differ by nan", id="nan"),
        pytest.param([1.0, 2.02], [1.0, 2.0], "more than 0.01", id="beyond-the-tolerance"),
        pytest.param([1.0, 1.009], [1.0, 1.01], None, id="within"),
        pytest.param([1.0, 1.016], [1.0, 1.008], "spread by", id="within-the-tolerance-but-not-beside-the-spread"),
        pytest.param([1.0, 1.0], [1.0, 1.0], "rounding", id="all-alike"),
        pytest.param([1.0], [1.0, 2.0], "1 scores against 2", id="too-few"),
    ],
)
def test_when_scores_are_the_same(ours, theirs, message):
    if message is None:
        assert check_scores(ours, theirs, torch.float32, "a row") == pytest.approx(0.001, rel=1e-3)
    else:
        with pytest.raises(AssertionError, match=message):
            check_scores(ours, theirs, torch.float32, "a row")


def test_a_row_of_cheaper_previews_is_data(contest, monkeypatch):
    rows = {"eager": end_to_end.ROWS["eager"], "cheap": end_to_end.Row("half the steps", steps=1, same=False)}
    model = replace(SHORT, call={"num_inference_steps": 2})
    monkeypatch.setattr(contest, "model", model)
    monkeypatch.setattr(end_to_end, "Contest", lambda *_: contest)
    monkeypatch.setitem(end_to_end.ROWS, "cheap", rows["cheap"])
    figures = end_to_end.measure("embedded", model, rows)
    found = figures["rows"]
    assert found.keys() == {"baseline", "eager", "cheap"} and not figures["failed"] and found["cheap"]["x baseline"] > 0
    assert found["cheap"]["floor"]["denoise"] == pytest.approx(found["eager"]["floor"]["denoise"] / 2)
    assert found["cheap"]["floor"]["final"] == found["eager"]["floor"]["final"]
    assert figures["apart"]["cheap"] is None and figures["together"]["mean"] < 0.01
    asked = {"models": ["embedded"], "rows": list(rows)}
    text = end_to_end.table({"models": {"embedded": figures}, "failed": {}, "asked": asked})
    assert "| half the steps | 10 |" in text and "not measured: embedded" not in text
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("when", ["check", "race"])
def test_a_row_that_fails_leaves_the_others(contest, monkeypatch, when):
    stock, calls = contest.ours, []

    def ours(row, *arguments, **options):
        calls.append(row)
        if row.what == "broken" and (when == "check" or calls.count(row) > 1):
            raise KeyError("some compiler's own error")
        return stock(row, *arguments, **options)

    monkeypatch.setattr(contest, "ours", ours)
    monkeypatch.setattr(end_to_end, "Contest", lambda *_: contest)
    rows = {"broken": end_to_end.Row("broken"), "eager": end_to_end.ROWS["eager"]}
    figures = end_to_end.measure("embedded", replace(SHORT, rounds=2), rows)
    assert figures["rows"].keys() == {"baseline", "eager"} and "compiler" in figures["failed"]["broken"]
    assert len(figures["rows"]["eager"]["all"]) == 2


def test_a_model_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def measure(name, model, rows):
        if name == "other":
            raise KeyError("no such weights")
        return result_of()["searches"]["models"]["embedded"]

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setitem(end_to_end.MODELS, "other", SHORT)
    out = tmp_path / "searches.json"
    with pytest.raises(SystemExit) as stopped:
        end_to_end.main(["other", "embedded", "--rows", "eager", "--out", str(out), "--threads", "1"])
    result = json.loads(out.read_text())
    assert stopped.value.code == 1 and result["models"].keys() == {"embedded"} and "other" in result["failed"]
    assert "not measured: other, same candidates, same steps (FAILED: 'no such weights')" in capsys.readouterr().out


def test_no_git_ends_no_bench(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("COMMIT", raising=False)
    assert environment()["commit"] is None
    monkeypatch.setenv("COMMIT", "abc")
    assert environment()["commit"] == "abc"


def test_the_floors_file_makes_its_folder(tmp_path):
    out = tmp_path / "new" / "floor.json"
    floor.main(["embedded", "--steps", "1", "--out", str(out)])
    assert json.loads(out.read_text())["families"]["embedded"]["denoise"]["operations"] > 0


def test_without_any_wheel_the_ops_are_measured(tmp_path):
    """In a process of its own, where diffsynth, PyWavelets and ptwt cannot be imported."""
    out = tmp_path / "ops.json"
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["diffsynth", "pywt", "ptwt"]))
from bench import collect, ops
status = ops.main(["--out", {str(out)!r}, "-k", "4x64x64-10 or ten and 128x128", "-p", "no:cacheprovider"])
collect.main([{str(out)!r}, {str(tmp_path / "searches.json")!r}, "--into", {str(tmp_path)!r}])
sys.exit(status)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=readme_tables.ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (page,) = tmp_path.glob("*-bench.md")
    assert "| sample_population P=10 (4, 64, 64) | torch |" in page.read_text()
    assert "a small CLIP" in page.read_text() and "Not measured." in page.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_bench_collects_what_there_is_and_then_fails(tmp_path):
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "ready"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "[$CUDA_VISIBLE_DEVICES] $*" >> log\ntest "$2" != bench.ops\n')
    python.chmod(0o755)
    made = ["make", "-f", str(readme_tables.ROOT / "Makefile"), "bench", f"RUN={tmp_path}", "READY=ready"]
    ran = subprocess.run(made, cwd=tmp_path, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    log = (tmp_path / "log").read_text().splitlines()
    assert ran.returncode and [line.split()[2] for line in log] == [
        "bench.ops",
        "bench.cpu",
        "bench.end_to_end",
        "bench.collect",
    ]
    assert all(line.startswith("[] ") for line in log)
