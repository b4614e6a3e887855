"""The command, around a pipeline of a few lines whose search is the real one."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ses_fast
from ses_fast import cli, job, models, pipelines, versions
from ses_fast import generate as generate_module

PROMPT = "two red squares left of three blue rings"


class ToyPipeline:
    """The image is the noise itself, squeezed into [-1, 1]; what the command needs of an enabled pipeline."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, *, seed, num_inference_steps, progress_bar_cmd, enable_ses, height=16, width=16, **ses):
        self.calls.append({"steps": num_inference_steps, "size": (height, width), "ses": enable_ses, **ses})
        latents = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
        if enable_ses:
            config, first = ses["ses_config"], 0

            def objective(candidates):
                nonlocal first
                images = candidates.tanh()
                scores = ses["ses_reward_model"](images, prompt)
                if config.on_preview is not None:
                    config.on_preview(images, scores, first // config.popsize, first % config.popsize)
                first += len(images)
                return scores

            self.ses_result = ses_fast.evolve(
                latents,
                objective,
                ses["ses_eval_budget"],
                config.popsize,
                config.k_elites,
                config.wavelet_name,
                1 if config.dwt_level == "auto" else config.dwt_level,
                strategy=config.strategy,
                seed=seed,
                include_base=True,
                time_limit=config.time_limit,
                progress=False,
            )
            latents = self.ses_result.latents
        return to_picture(latents.tanh()[0])


def to_picture(image):  # [3, H, W] in [-1, 1]
    return Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def redness(images, prompt):
    return images[:, 0].mean((1, 2)) * 100


@pytest.fixture
def toy(monkeypatch):
    pipe = ToyPipeline()
    monkeypatch.setitem(models.MODELS, "embedded", lambda: pipe)
    monkeypatch.setattr(job, "load_reward", lambda name, weights: redness)
    monkeypatch.setattr(pipelines, "enable", lambda pipe: pipe)
    return pipe


def generate(*options):
    cli.main(["generate", PROMPT, *map(str, options)])


def test_generate_writes_what_the_search_found(toy, tmp_path, capsys):
    out = tmp_path / "a" / "new folder"
    generate("--budget", 35, "--steps", 3, "--seed", 7, "--out", out)
    names = {"image.png", "base.png", "budgets.png", "curve.png", "result.json"}
    assert {path.name for path in out.iterdir()} == names

    found = toy.ses_result
    result = json.loads((out / "result.json").read_text())
    assert (result["base_score"], result["score"]) == (found.base_score, found.score)
    assert result["score"] > result["base_score"]
    assert (result["evaluations"], result["seed"]) == (35, 7)
    assert [tuple(score.values()) for score in result["scores"]] == [
        (each.generation, each.index, each.score, None) for each in found.trace
    ]
    assert result["refined"] == [] and result["forwards"] == found.forwards
    assert result["settings"]["prompt"] == PROMPT and result["settings"]["steps"] == 3
    assert result["settings"]["popsize"] == 10 and "search" not in result["settings"]
    assert result["versions"]["torch"] == torch.__version__ and result["seconds"]["total"] > 0

    base = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).tanh()
    assert np.array_equal(Image.open(out / "base.png"), to_picture(base[0]))
    assert np.array_equal(Image.open(out / "image.png"), to_picture(found.latents.tanh()[0]))

    printed = capsys.readouterr().out
    assert f"base score   {found.base_score:.2f}\nbest score   {found.score:.2f}\nevaluations  35\n" in printed


def test_the_documented_call_is_made(toy, tmp_path):
    generate("--budget", 2, "--steps", 9, "--preview-steps", 4, "--height", 8, "--width", 32, "--out", tmp_path)
    plain, searched = toy.calls
    assert plain == {"steps": 9, "size": (8, 32), "ses": False}
    config = searched.pop("ses_config")
    assert searched == {
        "steps": 9,
        "size": (8, 32),
        "ses": True,
        "ses_reward_model": redness,
        "ses_eval_budget": 2,
        "ses_inference_steps": 4,
    }
    assert (config.popsize, config.k_elites, config.wavelet_name, config.dwt_level) == (10, 5, "db1", "auto")


def test_search_options_reach_the_search(toy, tmp_path):
    options = ("--popsize", 4, "--elites", 2, "--wavelet", "db2", "--level", 2, "--budget", 6, "--batch-size", 3)
    generate(*options, "--out", tmp_path)
    config = toy.calls[1]["ses_config"]
    assert (config.popsize, config.k_elites, config.wavelet_name, config.dwt_level) == (4, 2, "db2", 2)
    assert config.batch_size == 3


def test_the_best_previews_at_each_budget(toy, tmp_path, monkeypatch):
    from ses_fast import report

    drawn = {}
    monkeypatch.setattr(report, "draw_budgets", lambda panels, path, title: drawn.update(panels))
    generate("--budget", 35, "--out", tmp_path)
    trace = [evaluation.score for evaluation in toy.ses_result.trace]
    assert {budget: score for budget, (score, _) in drawn.items()} == pytest.approx(
        {0: trace[0], 10: max(trace[:10]), 30: max(trace[:30]), 35: max(trace)}, rel=1e-6
    )
    assert torch.equal(drawn[35][1], toy.ses_result.latents.tanh()[0])
    for score, image in drawn.values():  # each picture is the one that has the score
        assert redness(image[None], PROMPT).item() == pytest.approx(score, rel=1e-6)


# (budget, the marks): the smallest, one at a mark, the documented one, a large one
@pytest.mark.parametrize(
    ("budget", "marks"),
    [(1, [0, 1]), (10, [0, 10]), (50, [0, 10, 30, 50]), (120, [0, 10, 30, 100, 120])],
)
def test_marks(budget, marks):
    previews = generate_module._BestPreviews()
    for i in range(budget):
        previews(torch.full((1, 3, 2, 2), float(i)), [math.sin(i)], 0, i)
    assert sorted(previews.best) == marks
    for mark, (score, image) in previews.best.items():
        best = max(range(max(mark, 1)), key=math.sin)
        assert (score, image[0, 0, 0]) == (math.sin(best), best)


@pytest.mark.parametrize("scores, best", [([1.0, math.inf, 2.0], 2), ([1.0, 3.0, 3.0, 2.0], 1), ([math.nan, 1.0], 1)])
def test_the_best_preview_is_the_first_of_the_finite_best(scores, best):
    """As the search counts: plus infinity is no score, and the first of equals wins."""
    previews = generate_module._BestPreviews()
    for i, score in enumerate(scores):
        previews(torch.full((1, 3, 2, 2), float(i)), [score], 0, i)
    assert previews.best[len(scores)][1][0, 0, 0] == best


def test_a_preview_that_a_race_stopped_is_never_the_best():
    previews = generate_module._BestPreviews()
    previews(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2), [1.0, 9.0, 2.0], 0, 0, torch.tensor([0, 2, 0]))
    assert previews.best[3][0] == 2.0 and previews.best[3][1][0, 0, 0] == 2.0


def test_a_score_that_is_not_finite_is_null_in_the_result(toy, tmp_path, monkeypatch):
    scores = iter([math.nan, 1.0, -math.inf, 3.0, 2.0])
    monkeypatch.setattr(job, "load_reward", lambda name, weights: lambda images, prompt: torch.tensor([next(scores)]))
    with pytest.warns(UserWarning):
        generate("--budget", 5, "--popsize", 5, "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [score["score"] for score in result["scores"]] == [None, 1.0, None, 3.0, 2.0]
    assert (result["base_score"], result["score"]) == (None, 3.0)


def test_the_defaults_are_those_of_the_documented_command(toy, tmp_path, capsys):
    generate("--out", tmp_path)
    searched = toy.calls[1]
    assert (searched["steps"], searched["ses_inference_steps"], searched["ses_eval_budget"]) == (8, 8, 50)
    assert re.search(r"^seconds      \d+\.\d$", capsys.readouterr().out, re.MULTILINE)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["reward"] == "embedded"


def test_another_models_reward_is_pick(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setitem(models.MODELS, "z-image-turbo", ToyPipeline)
    monkeypatch.setattr(pipelines, "enable", lambda pipe: pipe)
    monkeypatch.setattr(job, "load_reward", lambda name, weights: asked.append(name) or redness)
    generate("--model", "z-image-turbo", "--budget", 1, "--out", tmp_path)
    assert asked == ["pick"]


@pytest.fixture
def figures(monkeypatch):
    """What report draws, as matplotlib has it before it is written."""
    from matplotlib.figure import Figure

    drawn, savefig = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **k: (drawn.update({path.name: figure}), savefig(figure, path, **k))
    )
    return drawn


def test_the_pictures_show_what_was_found(toy, tmp_path, figures):
    generate("--budget", 12, "--out", tmp_path)
    scores = [each.score for each in toy.ses_result.trace]
    panels = figures["budgets.png"].axes
    best = [scores[0], max(scores[:10]), max(scores)]
    names = ["no search", "budget 10", "budget 12"]
    assert [panel.get_title() for panel in panels] == [f"{n}\nscore {s:.2f}" for n, s in zip(names, best, strict=True)]
    picture = np.asarray(to_picture(toy.ses_result.latents.tanh()[0]))
    assert np.array_equal(panels[2].images[0].get_array(), picture)
    (curve,) = figures["curve.png"].axes
    points, best_so_far, base = curve.collections[0].get_offsets(), *(line.get_ydata() for line in curve.lines)
    assert points.tolist() == [[i + 1.0, score] for i, score in enumerate(scores)]
    assert list(best_so_far) == [max(scores[: i + 1]) for i in range(12)] and set(base) == {scores[0]}
    for name in figures:
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_random_noises_beside_show_what_the_search_gained(toy, tmp_path, figures, capsys):
    generate("--budget", 12, "--popsize", 4, "--seed", 3, "--random-beside", "--out", tmp_path)
    random = ses_fast.evolve(
        toy.ses_result.state.base,
        lambda latents: redness(latents.tanh(), PROMPT),
        *(12, 4, 5, "db1", 1),
        strategy="random",
        seed=3,
        include_base=True,
        progress=False,
    )
    scores = [each.score for each in random.trace]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["random"]["scores"] == scores and result["random"]["score"] == random.score
    assert len(result["scores"]) == 12 and result["score"] != random.score
    assert result["random"]["scores"][0] == result["base_score"], "from the same noise"
    (curve,) = figures["curve.png"].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in curve.lines}
    assert lines["of random noises"] == [max(scores[: i + 1]) for i in range(12)]
    assert lines["best so far"][-1] == result["score"]
    assert f"random       best score {random.score:.2f} of as many" in capsys.readouterr().out


def test_a_search_may_have_seconds_in_place_of_a_budget(toy, tmp_path):
    generate("--budget", "none", "--time-limit", 0.5, "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["budget"] is None and result["settings"]["time_limit"] == 0.5
    assert result["evaluations"] == len(result["scores"]) > 10 and toy.ses_result.stopped == "time_limit"
    assert toy.calls[1]["ses_eval_budget"] is None


def test_a_batch_takes_seconds_too(tmp_path):
    options = ["batch", "prompts.txt", "--budget", "none", "--time-limit", "5", "--out", str(tmp_path)]
    given = job.Job.of(cli._parser().parse_args(options))
    assert given.budget is None and given.config.time_limit == 5 and given.settings["budget"] is None


def test_what_calibrate_writes_of_the_call_is_taken(toy, tmp_path):
    (tmp_path / "ses.json").write_text('{"popsize": 4, "call": {"num_inference_steps": 6, "ses_inference_steps": 3}}')
    options = ("--budget", 2, "--config", tmp_path / "ses.json", "--out", tmp_path / "out")
    for given, steps, previews in (
        ((), 6, 3),
        (("--steps", 6), 6, 3),
        (("--preview-steps", 5), 6, 5),
        (("--steps", 9, "--preview-steps", 4), 9, 4),
    ):
        generate(*options, *given)
        call = toy.calls[-1]
        assert (call["steps"], call["ses_inference_steps"], call["ses_config"].popsize) == (steps, previews, 4)
    (tmp_path / "ses.json").write_text('{"popsize": 4}')
    generate(*options, "--steps", 5)
    assert (toy.calls[-1]["steps"], toy.calls[-1]["ses_inference_steps"]) == (5, 5)


def test_steps_of_previews_of_another_image_are_refused(toy, tmp_path, capsys):
    (tmp_path / "ses.json").write_text('{"call": {"num_inference_steps": 6, "ses_inference_steps": 3}}')
    with pytest.raises(SystemExit, match="2"):
        generate("--config", tmp_path / "ses.json", "--steps", 9, "--out", tmp_path)
    assert "recommends 3 steps for previews of an image of 6: leave --steps 9 out" in capsys.readouterr().err


# arguments, and what the one line says
BAD = {
    "no budget and no time": (["generate", PROMPT, "--budget", "none"], "as long as --time-limit says"),
    "no time": (["generate", PROMPT, "--budget", "none", "--time-limit", "nan"], "time_limit"),
    "time as a word": (["generate", PROMPT, "--time-limit", "soon"], "--time-limit: invalid float"),
    "no command": ([], "command"),
    "unknown command": (["paint"], "invalid choice: 'paint'"),
    "no prompt": (["generate"], "required: prompt"),
    "empty prompt": (["generate", ""], "the prompt is empty"),
    "blank prompt": (["generate", " \n"], "the prompt is empty"),
    "201 words": (["generate", "red " * 201], "the embedded model reads up to 200 words, got 201"),
    "bytes that are no text": (["generate", os.fsdecode(b"\xff\xfe bad")], "the prompt is not valid UTF-8 text"),
    "unknown option": (["generate", PROMPT, "--bugdet", "3"], "--bugdet"),
    "budget 0": (["generate", PROMPT, "--budget", "0"], "--budget: must be at least 1, got 0"),
    "budget below 0": (["generate", PROMPT, "--budget", "-5"], "--budget: must be at least 1, got -5"),
    "budget not whole": (
        ["generate", PROMPT, "--budget", "2.5"],
        "--budget: needs a whole number, got '2.5'",
    ),
    "steps 0": (["generate", PROMPT, "--steps", "0"], "--steps: must be at least 1"),
    "preview steps 0": (["generate", PROMPT, "--preview-steps", "0"], "--preview-steps: must be at least 1"),
    "seed of 2^63": (["generate", PROMPT, "--seed", str(2**63)], "--seed: must be at most 9223372036854775807"),
    "embedded reward": (["generate", PROMPT, "--model", "z-image-turbo", "--reward", "embedded"], "name another"),
    "seed below 0": (["generate", PROMPT, "--seed", "-1"], "--seed: must be at least 0"),
    "too large": (["generate", PROMPT, "--height", "1040"], "draws up to 1024x1024"),
    "height 0": (["generate", PROMPT, "--height", "0"], "--height: must be at least 1"),
    "popsize 0": (["generate", PROMPT, "--popsize", "0"], "--popsize: must be at least 1"),
    "elites 0": (["generate", PROMPT, "--elites", "0"], "--elites: must be at least 1"),
    "level a word": (["generate", PROMPT, "--level", "deep"], "--level: needs a whole number or \"auto\", got 'deep'"),
    "level below 0": (["generate", PROMPT, "--level", "-1"], "--level: must be at least 0"),
    "unknown wavelet": (["generate", PROMPT, "--wavelet", "db999"], "db999"),
    "unknown model": (
        ["generate", PROMPT, "--model", "dalle"],
        "'dalle'; the known ones are embedded, z-image-turbo",
    ),
    "unknown reward": (
        ["generate", PROMPT, "--reward", "taste"],
        "unknown reward 'taste'. The known ones are ",
    ),
    "a reward's near name": (["generate", PROMPT, "--reward", "pickscore"], "did you mean 'pick'?"),
    "unknown report reward": (
        ["generate", PROMPT, "--report-reward", "taste"],
        "unknown reward 'taste'. The known ones are ",
    ),
    "weights of the embedded reward": (["generate", PROMPT, "--reward-weights", "x"], "has its own weights"),
    "a folder below a file": (
        ["generate", PROMPT, "--out", "file/out"],
        "cannot write to the folder file/out: Not a dir",
    ),
    "a file as folder": (
        ["generate", PROMPT, "--out", "file"],
        "cannot write to the folder file: File exists",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, toy, tmp_path, monkeypatch, capsys):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert toy.calls == []


def test_a_link_into_a_folder_that_is_not_there(toy, tmp_path, capsys):
    (tmp_path / "image.png").symlink_to(tmp_path / "missing" / "image.png")
    with pytest.raises(SystemExit, match="2"):
        generate("--out", tmp_path)
    assert "a link into a folder that is not there" in capsys.readouterr().err and toy.calls == []


def test_a_folder_that_cannot_be_written_to(toy, tmp_path, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(job.tempfile, "TemporaryFile", refuse)  # a mode would not stop root
    with pytest.raises(SystemExit, match="2"):
        generate("--out", tmp_path)
    assert capsys.readouterr().err.endswith(f"cannot write to the folder {tmp_path}: Permission denied\n")
    assert toy.calls == []


def test_weights_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        models.MODELS, "embedded", lambda: pytest.fail("the model was loaded before the reward was found")
    )
    with pytest.raises(SystemExit, match="2"):
        generate("--reward", "pick", "--reward-weights", tmp_path / "none", "--out", tmp_path)
    printed = capsys.readouterr().err
    assert str(tmp_path / "none") in printed and printed.count("\n") == 1


def test_a_missing_package_is_one_line_that_names_the_extra(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "ses_fast.report", raising=False)
    monkeypatch.delattr(ses_fast, "report", raising=False)
    with pytest.raises(SystemExit, match="2"):
        generate("--out", tmp_path)
    assert 'pip install "ses-fast[plots]"' in capsys.readouterr().err
    assert toy.calls == []


def test_an_error_in_the_search_is_not_swallowed(toy, tmp_path, monkeypatch):
    def broken(images, prompt):
        raise ValueError("a bug in a reward")

    monkeypatch.setattr(job, "load_reward", lambda name, weights: broken)
    with pytest.raises(ValueError, match="a bug in a reward"):
        generate("--out", tmp_path)


# What the reward does, the exit code, and the last line on standard error.
ENDS = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "a full disk": (OSError(28, "No space left on device"), 1, "ses-fast: error: [Errno 28] No space left on device"),
    "no finite score": (None, 1, "ses-fast: error: none of the objective's 3 scores is finite: no candidate is best"),
}


def test_ctrl_c_while_a_model_is_loaded_is_one_line(monkeypatch, tmp_path, capsys):
    def load():
        raise KeyboardInterrupt

    monkeypatch.setitem(models.MODELS, "embedded", load)
    with pytest.raises(SystemExit) as left:
        generate("--out", str(tmp_path))
    assert left.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "stopped"


@pytest.mark.parametrize("case", ENDS)
def test_a_search_that_cannot_end_is_one_line(case, toy, tmp_path, monkeypatch, capsys):
    error, code, line = ENDS[case]

    def reward(images, prompt):
        if error is not None:
            raise error
        return torch.full((len(images),), torch.nan)

    monkeypatch.setattr(job, "load_reward", lambda name, weights: reward)
    with pytest.raises(SystemExit) as left, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate("--out", str(tmp_path), "--budget", "3")
    said = capsys.readouterr().err
    assert left.value.code == code and said.splitlines()[-1].startswith(line) and "Traceback" not in said


def test_doctor(monkeypatch, capsys):
    monkeypatch.setitem(versions.PACKAGES, "no-such-package", "plots")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cli.main(["doctor"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["ses-fast"] == ses_fast.__version__ and lines["torch"] == torch.__version__
    assert lines["no-such-package"] == "not installed: needs the extra ses-fast[plots]"
    assert lines["device"].startswith("CPU")
    assert lines["backend"] == "torch (not triton: torch finds no CUDA device)"


def test_doctor_where_triton_would_run(monkeypatch, capsys):
    monkeypatch.setattr(ses_fast.ops, "why_not_triton", lambda: None)
    cli.main(["doctor"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["backend", "triton"]


def rewards(capsys):
    """The printed table: reward -> its cells."""
    cli.main(["rewards"])
    head, *lines = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["reward", "GB", "weights", "packages", "downloaded from"]
    return {name: cells for name, *cells in lines}


def test_rewards(monkeypatch, tmp_path, capsys):
    from ses_fast.rewards import REWARDS

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    table = rewards(capsys)
    assert table.keys() == {"embedded", "embedded_heldout", *REWARDS}
    assert table["embedded"][1] == "installed"
    assert table["hps"] == ["2.0", "not downloaded", "installed", "xswu/HPSv2/HPS_v2.1_compressed.pt"]
    assert table["aesthetic"][1:3] == ["not downloaded", "installed"]


def test_rewards_whose_weights_are_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ses_fast.cli.EMBEDDED", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    laion = cached_file(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json")
    pick = cached_file(tmp_path, "yuvalkirstain/PickScore_v1", "model.safetensors")
    cached_file(tmp_path, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    copy = tmp_path / "DiffSynth-Studio/ImageMetrics/Aesthetic/model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.touch()
    installed = {name for name, cells in rewards(capsys).items() if cells[1] == "installed"}
    assert installed == {"pick", "hps", "hps_v2.1", "aesthetic"}  # of clip there is but the tokenizer
    laion.unlink()
    assert pick.exists() and rewards(capsys)["pick"][1] == "not downloaded"  # which pick's weights need too


def cached_file(cache, repo, file):
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("0")
    (folder / "snapshots/0").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots/0" / file).touch()
    return folder / "snapshots/0" / file


def test_rewards_whose_packages_are_missing(monkeypatch, capsys):
    monkeypatch.setattr("ses_fast.rewards.find_spec", lambda name: None)
    table = rewards(capsys)
    assert table["pick"][2] == "transformers: needs ses-fast[rewards]"
    assert table["hps"][2] == "open_clip: needs ses-fast[rewards]"
    assert table["aesthetic"][2] == "transformers, diffsynth: needs ses-fast[diffsynth,rewards]"


def test_the_module_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "ses_fast", "--version"], capture_output=True, text=True)
    assert done.stdout == f"ses-fast {ses_fast.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "ses_fast", "generate", ""], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "ses-fast: error: the prompt is empty\n")


def test_the_embedded_model(tmp_path, capsys):
    """The real thing, small: model, reward, search and pictures."""
    held_out = ("--report-reward", "embedded_heldout", "--report-reward", "embedded")
    generate("--budget", 2, "--steps", 2, "--seed", 1, "--height", 128, *held_out, "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    held, other = result["held_out"]["embedded"], result["held_out"]["embedded_heldout"]
    assert [held["base"], held["answer"]] == pytest.approx([result["base_score"], result["score"]], abs=1e-3)
    assert other["base"] != pytest.approx(held["base"], abs=0.1)
    assert f"held out     embedded: base {held['base']:.2f}, best {held['answer']:.2f}\n" in capsys.readouterr().out
    assert result["evaluations"] == 2 and result["score"] == max(score["score"] for score in result["scores"])
    pictures = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("base", "image")}
    assert {picture.shape for picture in pictures.values()} == {(128, 256, 3)}
    improved = result["score"] > result["base_score"]
    assert improved != np.array_equal(pictures["base"], pictures["image"])
