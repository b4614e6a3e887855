"""The measurements: that what is compared is the same, and that what is counted is right."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_hps import checkpoint, img_score  # noqa: F401  fixtures
from test_rewards import make_images

from bench import collect, compare, end_to_end, floor, readme_tables
from bench.baseline import Flow, HPSScore
from bench.floor import Rates, Work
from bench.ops import result_path
from ses_fast import embedded
from ses_fast.rewards.hps import HPSReward

PROMPT = "two red squares left of three blue rings"
SHORT = end_to_end.Model({"num_inference_steps": 1}, level=1, device="cpu", dtype=torch.float32, budget=12, rounds=1)
TOLERANCE = {"counted": 0.02, "hps": 1e-5}


@pytest.mark.parametrize(
    ("family", "denoise_ms", "decode_ms"),
    [
        pytest.param("z-image-turbo", 573, 13.3, id="z-image-turbo"),
        pytest.param("flux.2-klein-4b", 176, 13.3, id="klein-its-latents-are-packed"),
    ],
)
def test_the_floor_of_the_real_modules(family, denoise_ms, decode_ms):
    """Figures that were counted independently, at 790 TFLOP/s and 3.0 TB/s."""
    works = floor.family_stages(family)
    found = {stage: 1e3 * work.seconds(floor.RATES["h100"]) for stage, work in works.items()}
    expected = {"denoise": denoise_ms, "decode": decode_ms, "reward": 0.42, "preprocess": 0.0022}
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
    apart = contest.check(rows)
    assert apart["eager"] < 0.05 * apart["spread"]
    times = contest.race(rows, 1)
    assert times.keys() == {"baseline", "eager"}
    figures = end_to_end.summarise(times["eager"], {"total": 1.0}, {"total": 0.5})
    assert 0 < figures["overhead"] < 0.5 and figures["x floor, attention at its own rate"] == 2 * figures["x floor"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param({"dwt_level": 2}, "not close", id="other-candidates"),
        pytest.param({"score": 0.1}, "scores differ", id="other-scores"),
    ],
)
def test_what_differs_is_not_timed(contest, monkeypatch, broken, message):
    rows = {"eager": end_to_end.ROWS["eager"]}
    if "score" in broken:
        stock = contest.reward
        monkeypatch.setattr(contest, "reward", lambda images, prompt: stock(images, prompt) + broken["score"])
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


def result_of(date="2026-01-01", device="Some CPU", speedup=(3.0, 3.1, 2.9), floor=2.0):
    """A result file of one op and one search."""
    middle = sorted(speedup)[len(speedup) // 2]
    row = {
        "seconds": dict.fromkeys(("total", "denoise", "decode", "reward", "final"), 6.0),
        "overhead": 0.004,
        "x floor": 1.5,
        "x floor, attention at its own rate": 1.4,
    }
    figures = {
        "budget": 50,
        "steps": 8,
        "rows": {"baseline": row, "eager": row | {"x baseline": middle, "x baseline, all": list(speedup)}},
        "rates": {"matrix": 1e12, "attention": 1e12, "memory": 1e12},
        "apart": {"eager": 0.001},
        "attention": "torch",
        "memory": None,
    }
    about = ABOUT | {"date": date, "device": device}
    op = {"row": "an op|torch", "ms": 1.0, "spread": 0.01, "floor": floor, "GB/s": 5.0}
    beside = {"what": "resize", "shape": [3, 8, 8], "ours": 1.0, "theirs": 2.0, "times": 2.0, "bar": 1.0}
    searches = {"threads": 2, "models": {"embedded": figures}, "failed": {"flux.1-dev": "no memory"}}
    parts = {"ops": {"copy_GB/s": 10.0, "rows": [op]}, "cpu": {"rows": [beside]}, "searches": searches}
    return collect.collected({name: {"environment": about, **part} for name, part in parts.items()})


def test_what_moved_is_beyond_the_noise():
    assert compare.moved(result_of(), result_of()) == []
    assert compare.moved(result_of(floor=2.0), result_of(floor=2.1)) == []
    assert compare.moved(result_of(floor=2.0), result_of(floor=3.0)) == ["slower x1.50 (noise x1.15): an op|torch"]
    assert compare.moved(result_of(floor=3.0), result_of(floor=2.0)) == ["faster x1.50 (noise x1.15): an op|torch"]
    steady, spread = result_of(speedup=(2.0, 2.0, 2.0)), result_of(speedup=(1.0, 1.5, 2.0))
    assert compare.moved(result_of(), spread) == []  # its rounds differ by as much
    assert compare.moved(result_of(), steady) == ["slower x1.50 (noise x1.15): search embedded|eager"]
    lost = result_of() | {"ops": None}
    assert compare.moved(result_of(), lost) == ["no longer measured: an op|torch"]
    assert compare.moved(lost, result_of()) == ["not measured before: an op|torch"]


def test_only_what_is_committed_on_such_a_device_is_compared_with(tmp_path, monkeypatch):
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
        "FAILED: flux.1-dev",
    ):
        assert part in text
    only_ops = collect.collected({"ops": result["ops"]})
    assert collect.markdown(only_ops).count("Not measured.") == 2
    with pytest.raises(ValueError, match="nothing was measured"):
        collect.collected({})
    with pytest.raises(ValueError, match="different devices"):
        collect.collected({"ops": result_of(device="Other")["ops"], "cpu": result["cpu"]})


def test_the_readmes_table_says_what_was_not_measured():
    old, new = result_of("2026-01-01", speedup=(9.0,)), result_of("2026-01-02", speedup=(3.0,))
    lines = readme_tables.performance([new, old]).splitlines()
    assert len([line for line in lines if "Some CPU" in line]) == 1 and "| 3.00 |" in lines[2]
    assert all("not measured" in line for line in lines[3:])
    assert len(lines) == 2 + len(end_to_end.MODELS) * len(end_to_end.ROWS)
    with pytest.raises(ValueError, match="lacks"):
        readme_tables.written("no marks", [])


def test_the_readme_is_up_to_date():
    """`make readme-tables` has been run after the last result."""
    readme = readme_tables.README.read_text()
    assert readme_tables.written(readme, collect.stored()) == readme


def test_every_result_says_what_it_was_measured_on():
    for path in collect.RESULTS.glob("*-bench.json"):
        result = json.loads(path.read_text())
        assert result["environment"].keys() >= {"device", "cores", "versions", "date", "commit"}, path.name
        assert path.name == result_path(result["environment"], "-bench").name
        assert path.with_suffix(".md").read_text() == collect.markdown(result)


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
