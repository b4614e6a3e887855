"""A batch: what it makes, how it goes on, and what no kill, full disk or edited file may do to it."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_batch import Forks, ToyPipeline, redness, to_picture

import ses_fast
from ses_fast import SESConfig, batch, cli, folder, job, models, pipelines
from ses_fast.distributed import RankFailed
from ses_fast.folder import CannotWrite, Folder, Result

PROMPTS = ["a red fox", "two grey cats in the snow", "a castle on a hill above the sea"]
SMALL = SESConfig(popsize=4, k_elites=2, batch_size=1)
CALL = {"ses_reward_model": redness, "ses_eval_budget": 10, "ses_config": SMALL, "progress": False}


def run(prompts, out, pipe=None, **call):
    """(the results, the pipeline that made them)"""
    pipe = pipe or ToyPipeline()
    return list(batch.run(pipe, prompts, out, **CALL | call)), pipe


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def pictures(out):
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


def leftovers(out):
    """Temporary files, and searches under way."""
    return [path for path in out.rglob("*") if path.suffix in (".part", ".safetensors")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a batch that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(PROMPTS, out)
    return out


# ---------------------------------------------------------------- what it makes


def test_each_prompt_has_images_and_a_line(tmp_path):
    prompts = [
        {"prompt": "a red fox", "seed": 5, "Category": "Animals"},
        {"prompt": "a cat", "id": "c-7", "width": 16, "negative_prompt": "blurry"},
    ]
    results, pipe = run(prompts, tmp_path, seed=3, height=12)
    assert [(each.id, each.seed, each.width, each.columns) for each in results[1:]] == [("c-7", 3, 16, {})]
    assert results[0].columns == {"Category": "Animals"} and results[0].seed == 5
    assert [(call["seed"], call["size"], call["ses"]) for call in pipe.calls] == [
        (5, (12, 8), False),
        (5, (12, 8), True),
        (3, (12, 16), False),
        (3, (12, 16), True),
    ]
    found, last = pipe.ses_result, results[1]
    assert (last.score, last.base_score) == (found.score, found.base_score) and last.gain > 0
    assert last.scores == [each.score for each in found.trace] and last.evaluations == 10
    assert last.seconds["total"] == pytest.approx(sum(last.seconds.values()) - last.seconds["total"])
    assert (last.image, last.base_image) == ("images/c-7-a-cat.png", "images/c-7-a-cat.base.png")
    assert np.array_equal(Image.open(tmp_path / last.image), to_picture(found.latents.tanh()[0]))
    stock = ToyPipeline()("a cat", seed=3, width=16, height=12, negative_prompt="blurry")
    assert np.array_equal(Image.open(tmp_path / last.base_image), stock)
    assert [Result.from_json(line) for line in lines(tmp_path)] == results


def test_the_summary(tmp_path):
    results, _ = run(PROMPTS, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["prompts"], summary["done"], summary["failed"], summary["improved"]) == (3, 3, 0, 3)
    assert summary["search"]["gain"] == pytest.approx(sum(each.gain for each in results) / 3)
    assert summary["search"]["base"] == pytest.approx(sum(each.base_score for each in results) / 3)
    assert summary["seconds"]["total"] == pytest.approx(sum(each.seconds["total"] for each in results))
    assert summary["settings"]["ses_config"]["popsize"] == 4 and summary["failures"] == []


def test_means_leave_out_what_is_not_finite():
    made = {"prompt": "a", "status": "done", "seed": 0}
    held = {"pick": {"base": 1.0, "answer": 3.0}}
    results = [
        Result(id="1", score=3.0, base_score=1.0, held_out=held, **made),
        Result(id="2", score=5.0, base_score=None, held_out={"pick": {"base": None, "answer": 3.0}}, **made),
        Result(id="3", score=2.0, base_score=4.0, **made),
        Result(id="4", **made | {"status": "failed"}, error="ValueError: no"),
    ]
    summary = batch.summarised(results)
    assert summary["search"] == {"count": 2, "base": 2.5, "answer": 2.5, "gain": 0.0} and summary["improved"] == 1
    assert summary["held_out"] == {"pick": {"count": 1, "base": 1.0, "answer": 3.0, "gain": 2.0}}
    assert summary["failures"] == [{"id": "4", "prompt": "a", "error": "ValueError: no"}]
    assert batch.summarised(results[3:])["search"] == {"count": 0, "base": None, "answer": None, "gain": None}


def test_results_come_one_by_one(tmp_path):
    pipe = ToyPipeline()
    results = batch.run(pipe, PROMPTS, tmp_path, **CALL)
    assert pipe.calls == []
    next(results)
    assert len(pipe.calls) == 2 and len(lines(tmp_path)) == 1
    results.close()  # whoever stops may go on later
    assert len(run(PROMPTS, tmp_path)[0]) == 3


def test_a_user_may_watch(tmp_path):
    seen = []
    config = replace(SMALL, on_generation=lambda found: seen.append(found.evaluations))
    run(PROMPTS[:1], tmp_path, ses_config=config)
    assert seen == [4, 8]


class ToyOfDiffusers(ToyPipeline):
    """Takes a generator in place of a seed, and returns an object with the pictures."""

    def __call__(self, prompt, *, generator, **call):
        image = super().__call__(prompt, seed=generator.initial_seed(), **call)
        torch.randn(9, generator=generator)  # as the noise is drawn: the next call needs a new one
        assert not torch.equal(
            generator.get_state(), torch.Generator().manual_seed(generator.initial_seed()).get_state()
        )
        return SimpleNamespace(images=[image])


def test_a_pipeline_that_takes_a_generator(tmp_path, whole):
    _, pipe = run(PROMPTS, tmp_path, ToyOfDiffusers())
    assert pictures(tmp_path) == pictures(whole) and len(pipe.calls) == 6


def test_a_time_in_place_of_a_budget(tmp_path):
    results, _ = run(PROMPTS[:1], tmp_path, ses_eval_budget=None, ses_config=replace(SMALL, time_limit=0.2))
    assert results[0].status == "done" and results[0].evaluations > 4


# ---------------------------------------------------------------- how it goes on


def test_a_finished_prompt_is_not_redone_and_an_added_one_is_done(tmp_path):
    first, _ = run(PROMPTS[1:], tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    results, pipe = run(PROMPTS, tmp_path)  # the new one stands first
    assert {call["prompt"] for call in pipe.calls} == {PROMPTS[0]}
    assert sorted(each.prompt for each in results) == sorted(PROMPTS) and results[:2] == first
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    summary, page = (tmp_path / name for name in ("summary.json", "index.html"))
    assert json.loads(summary.read_text())["prompts"] == 3
    text = page.read_text()
    assert text.index(PROMPTS[0]) < text.index(PROMPTS[1]) < text.index(PROMPTS[2])
    when = page.stat().st_mtime_ns
    assert run(PROMPTS, tmp_path)[1].calls == [] and page.stat().st_mtime_ns == when
    page.unlink()
    run(PROMPTS, tmp_path)
    assert page.read_text() == text


def test_columns_are_those_of_the_file_that_came_last(tmp_path):
    first, _ = run([{"prompt": "a fox", "note": "x"}, {"prompt": "a fox", "note": "y"}], tmp_path)
    rows = [{"prompt": "a fox", "note": note} for note in "zxy"]
    results, pipe = run(rows, tmp_path)
    assert [each.columns["note"] for each in results] == ["z", "x", "y"] and len(pipe.calls) == 2
    assert len({each.id for each in results}) == 3 and {each.score for each in results} == {first[0].score}
    assert run(rows, tmp_path)[0] == results and json.loads((tmp_path / "summary.json").read_text())["done"] == 3


def test_a_page_that_a_kill_has_prevented_is_made_later(tmp_path, monkeypatch):
    run(PROMPTS[:2], tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(batch, "write_page", lambda *_: (_ for _ in ()).throw(Stop))
        run(PROMPTS, tmp_path)
    assert PROMPTS[2] not in (tmp_path / "index.html").read_text()
    assert run(PROMPTS, tmp_path)[1].calls == [] and PROMPTS[2] in (tmp_path / "index.html").read_text()
    (tmp_path / "summary.json").write_text("{")
    run(PROMPTS, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["done"] == 3


def test_prompts_do_no_harm(tmp_path):
    prompts = [
        "very " * 20_000,
        "\x1b[2J\x07\x00",
        "<script>alert(1)</script>",
        "../../../../tmp/x",
        "=cmd|'/C calc'!A0",
        "\u202e" * 9,
    ]
    ids = ["/etc/passwd", "..", "CON", "a\nb", "x" * 100_000, "<b>"]
    given = [{"prompt": prompt, "id": id, "note": prompt} for prompt, id in zip(prompts, ids, strict=True)]
    results, _ = run(given, tmp_path / "out")
    assert [each.prompt for each in results] == prompts and {each.status for each in results} == {"done"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert len(names) == 12 and all(re.fullmatch(r"[a-z0-9_-]{1,90}(\.base)?\.png", name) for name in names)
    assert "<script>alert" not in (tmp_path / "out" / "index.html").read_text()
    assert run(given, tmp_path / "out")[1].calls == []


def test_a_lost_image_is_made_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    name = lines(whole)[1]["image"]
    (tmp_path / name).unlink()
    _, pipe = run(PROMPTS, tmp_path)
    assert {call["prompt"] for call in pipe.calls} == {PROMPTS[1]} and pictures(tmp_path) == pictures(whole)


class Stop(BaseException):
    """As Ctrl-C."""


def stopping(after):
    """The reward, which ends the process's work when it has given so many scores."""
    count = 0

    def reward(images, prompt):
        nonlocal count
        count += len(images)
        if count > after:
            raise Stop
        return redness(images, prompt)

    reward.__module__, reward.__qualname__ = redness.__module__, redness.__qualname__  # a state knows it by its name
    return reward


# Where the first run stops, in scores, and how many the second still makes: of 3 prompts with 10 each, in generations
# of 4. What a generation was half-way through is made again.
@pytest.mark.parametrize("after, left", [(0, 30), (3, 30), (4, 26), (7, 26), (9, 22), (10, 20), (19, 12), (29, 2)])
def test_it_goes_on_in_the_middle_of_a_search(tmp_path, whole, after, left):
    with pytest.raises(Stop):
        run(PROMPTS, tmp_path, ses_reward_model=stopping(after))
    count = 0

    def counting(images, prompt):
        nonlocal count
        count += len(images)
        return redness(images, prompt)

    counting.__module__, counting.__qualname__ = redness.__module__, redness.__qualname__
    results, _ = run(PROMPTS, tmp_path, ses_reward_model=counting)
    assert count == left
    assert pictures(tmp_path) == pictures(whole) and not leftovers(tmp_path)
    assert [each.scores for each in results] == [line["scores"] for line in lines(whole)]


def test_restart_begins_anew(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    results, pipe = run(PROMPTS[:1], tmp_path, restart=True, ses_eval_budget=4)
    assert len(pipe.calls) == 2 and len(results) == 1 and len(lines(tmp_path)) == 1
    assert len(pictures(tmp_path)) == 2 and (tmp_path / "notes.txt").exists()


# What is given otherwise than before, and what the error says.
OTHER = {
    "budget": ({"ses_eval_budget": 12}, "ses_eval_budget was 10, and now is 12"),
    "preview steps": ({"ses_inference_steps": 3}, "ses_inference_steps was 10, and now is 3"),
    "reward": ({"ses_reward_model": {"pick": 1.0}}, "ses_reward_model"),
    "seed": ({"seed": 1}, "seed was 0, and now is 1"),
    "model": ({"model": "v2"}, "model was None, and now is 'v2'"),
    "an argument of the call": ({"height": 12}, "arguments.height was None, and now is 12"),
    "a setting": ({"ses_config": replace(SMALL, popsize=5)}, "ses_config.popsize was 4, and now is 5"),
    "held-out rewards": ({"ses_config": replace(SMALL, report_rewards={"r": redness})}, "report_rewards.r was None"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_an_error_that_says_which(case, tmp_path, whole):
    other, message = OTHER[case]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="other settings") as error:
        run(PROMPTS, tmp_path, **other)
    assert message in str(error.value) and "--restart" in str(error.value)
    run(PROMPTS, tmp_path)  # the lock was given back


def test_how_it_runs_may_change(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert run(PROMPTS, tmp_path, ses_config=replace(SMALL, batch_size=2, backend="torch"))[1].calls == []


def test_an_id_of_another_prompt(tmp_path):
    run([{"id": "1", "prompt": "a fox"}], tmp_path)
    with pytest.raises(ValueError, match="line 2: the id '1' is in .*with another prompt"):
        run([{"id": "2", "prompt": "a cat"}, {"id": "1", "prompt": "a dog"}], tmp_path)
    results, pipe = run([{"id": "2", "prompt": "a cat"}], tmp_path)
    assert len(results) == 1 and len(lines(tmp_path)) == 2
    assert json.loads((tmp_path / "summary.json").read_text())["prompts"] == 2  # all that the folder holds


# ---------------------------------------------------------------- what fails


def test_a_failing_prompt_is_recorded_and_the_rest_go_on(tmp_path, whole):
    def fragile(images, prompt):
        if prompt == PROMPTS[1]:
            raise torch.OutOfMemoryError("CUDA out of memory \ud800")
        return redness(images, prompt)

    fragile.__module__, fragile.__qualname__ = redness.__module__, redness.__qualname__
    results, _ = run(PROMPTS, tmp_path, ses_reward_model=fragile)
    assert [each.status for each in results] == ["done", "failed", "done"]
    assert results[1].error == "OutOfMemoryError: CUDA out of memory ?" and "fragile" in results[1].traceback
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["done"], summary["failed"]) == (2, 1) and summary["failures"][0]["error"] == results[1].error
    assert "CUDA out of memory" in (tmp_path / "index.html").read_text()

    results, pipe = run(PROMPTS, tmp_path)  # the next run tries again
    assert {call["prompt"] for call in pipe.calls} == {PROMPTS[1]} and results[-1].status == "done"
    assert pictures(tmp_path) == pictures(whole) and not leftovers(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == 0


def test_scores_that_are_not_finite_are_null(tmp_path):
    def odd(images, prompt):
        return torch.full((len(images),), torch.nan if torch.equal(images[0], base) else 1.0)

    base = None
    pipe = ToyPipeline()
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[:, 0] += len(PROMPTS[0]) / 100
    base = latents.tanh()[0]
    with pytest.warns(UserWarning):
        results, _ = run(PROMPTS[:1], tmp_path, pipe, ses_reward_model=odd)
    assert results[0].base_score is None and results[0].scores[0] is None and results[0].gain is None
    assert lines(tmp_path)[0]["base_score"] is None


# What is given, and what the error says; before any work.
BAD = {
    "a pipeline that is not enabled": ({"pipe": object()}, "ses_fast.enable"),
    "no prompt": ({"prompts": []}, "no prompt"),
    "an empty prompt": ({"prompts": ["a", " "]}, "line 2: the prompt is empty"),
    "one string, which is no file": ({"prompts": "a red fox"}, "a red fox"),
    "prompt=": ({"prompt": "a"}, "prompt"),
    "enable_ses=": ({"enable_ses": True}, "enable_ses"),
    "generator=": ({"generator": None}, "generator"),
    "budget 0": ({"ses_eval_budget": 0}, "ses_eval_budget"),
    "no budget and no time": ({"ses_eval_budget": None}, "time_limit"),
    "steps 0": ({"ses_inference_steps": 0}, "ses_inference_steps"),
    "seed -1": ({"seed": -1}, "seed"),
    "no SESConfig": ({"ses_config": {"popsize": 3}}, "SESConfig"),
    "a generator": ({"ses_config": SESConfig(generator=torch.Generator())}, "generator"),
    "latents": ({"ses_config": SESConfig(latents=torch.zeros(1, 3, 8, 8))}, "latents"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_work(case, tmp_path):
    given, message = BAD[case]
    given = {"pipe": ToyPipeline(), "prompts": PROMPTS, **given}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(out=tmp_path / "out", **given)
    assert getattr(given["pipe"], "calls", []) == [] and not (tmp_path / "out").exists()


def test_two_runs_cannot_share_a_folder(tmp_path):
    results = batch.run(ToyPipeline(), PROMPTS, tmp_path, **CALL)
    for _ in range(2):
        with pytest.raises(ValueError, match="another process works in"):
            run(PROMPTS, tmp_path)
        next(results)
    del results  # an iterator that nobody holds any more gives it back
    assert len(run(PROMPTS, tmp_path)[0]) == 3
    batch.run(ToyPipeline(), PROMPTS, tmp_path, **CALL)  # nor does one that was never begun keep it
    assert len(run(PROMPTS, tmp_path)[0]) == 3


# ---------------------------------------------------------------- what is found in the folder


def edited(change):
    """Changes the second line of results.jsonl, which it gets as a dict; what is returned stands in its place."""

    def edit(out):
        path = out / "results.jsonl"
        all_lines = path.read_text().splitlines()
        value = json.loads(all_lines[1])
        changed = change(value)
        all_lines[1] = json.dumps(value) if changed is None else changed
        path.write_text("\n".join(all_lines) + "\n")

    return edit


def without_seed(value):
    return json.dumps({name: value[name] for name in value if name != "seed"})


def cut(name, keep):
    def edit(out):
        path = next(out.glob(name))
        path.write_bytes(path.read_bytes()[:keep] if keep >= 0 else path.read_bytes() + b"\n" * -keep)

    return edit


def other_version(out):
    """A kept search as a later version of ses_fast would write it."""
    path = next((out / "searches").iterdir())
    path.write_bytes(re.sub(rb'\\"format\\": \d', rb'\\"format\\": 9', path.read_bytes()))


def other_search(out):
    """A kept search of another base."""
    path = next((out / "searches").iterdir())
    ses_fast.evolve(torch.ones(1, 3, 8, 8), lambda z: [z.mean()], 4, 4, 2, "db1", 1, seed=0, progress=False).save(path)


# What happens to a folder that holds one finished prompt, one under way and none of a third; then what the same
# command says. None: it finishes, and all is as if nothing had happened.
FOUND = {
    "nothing": (lambda out: None, None),
    "a cut last line": (lambda out: (out / "results.jsonl").open("a").write('{"id": "x", "pro'), None),
    "a last line cut inside a letter": (lambda out: (out / "results.jsonl").open("ab").write(b'{"id": "\xc3'), None),
    "a last line without its end": (
        lambda out: (out / "results.jsonl").write_text((out / "results.jsonl").read_text().rstrip("\n")),
        None,
    ),
    "all results cut": (cut("results.jsonl", 30), None),
    "an empty results file": (cut("results.jsonl", 0), None),
    "blank lines": (cut("results.jsonl", -3), None),
    "a byte-order mark and CRLF": (
        lambda out: (out / "results.jsonl").write_bytes(
            b"\xef\xbb\xbf" + (out / "results.jsonl").read_bytes().replace(b"\n", b"\r\n")
        ),
        None,
    ),
    "a kept search that was cut": (cut("searches/*", 700), None),
    "a kept search that is empty": (cut("searches/*", 0), None),
    "a kept search of another version": (other_version, None),
    "a kept search of another base": (other_search, None),
    "temporary files": (lambda out: [(out / d / ".x1.part").touch() for d in ("", "images", "searches")], None),
    "no images": (lambda out: shutil.rmtree(out / "images"), None),
    "an image that is no picture": (lambda out: next((out / "images").glob("*.base.png")).write_text("no"), None),
    "a line that is no JSON": (edited(lambda value: "{"), "results.jsonl, line 2"),
    "a line that is a list": (edited(lambda value: "[1]"), "line 2, is no result of a batch: it is no object"),
    "a score that is a word": (edited(lambda value: value.update(score="high")), "line 2.*its score is 'high'"),
    "a score that is no number": (edited(lambda value: value.update(score=float("nan"))), "line 2.*its score is nan"),
    "a huge score": (edited(lambda value: value.update(score=10**400)), "line 2.*its score is 1000"),
    "a field less": (
        edited(lambda value: json.dumps({name: value[name] for name in value if name != "seed"})),
        "line 2.*it lacks seed",
    ),
    "a field more": (edited(lambda value: value.update(note="mine")), "line 2.*it has note, which no result has"),
    "another status": (edited(lambda value: value.update(status="good")), "line 2.*its status is 'good'"),
    "an image elsewhere": (edited(lambda value: value.update(image="../../x.png")), "line 2.*its images are not"),
    "another prompt": (edited(lambda value: value.update(prompt="a red foxes")), "line 2.*its images are not"),
    "another seed": (edited(lambda value: value.update(seed=9)), "the id '.*' is in .* already, with another"),
    "settings that are no JSON": (cut("batch.json", 9), "batch.json is no batch's"),
    "settings of another format": (
        lambda out: (out / "batch.json").write_text(
            (out / "batch.json").read_text().replace('"format": 1', '"format": 2')
        ),
        "format was 2, and now is 1",
    ),
    "no settings": (lambda out: (out / "batch.json").unlink(), "batch.json is not: give another folder"),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a batch that was stopped in its second prompt, after a failure of the first that was mended."""
    out = tmp_path_factory.mktemp("half")
    with pytest.raises(Stop):
        run(PROMPTS, out, ses_reward_model=stopping(15))
    failed = lines(out)[0] | {"status": "failed", "image": None, "base_image": None, "error": "ValueError: no"}
    done = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(json.dumps(failed) + "\n" + done)
    return out


@pytest.mark.filterwarnings("ignore:the search that was kept")
@pytest.mark.parametrize("case", FOUND)
def test_what_is_found_in_the_folder(case, half, whole, tmp_path):
    happen, message = FOUND[case]
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    happen(tmp_path)
    if message is not None:
        before = (tmp_path / "results.jsonl").read_bytes()
        with pytest.raises(ValueError, match=message):
            run(PROMPTS, tmp_path)
        assert (tmp_path / "results.jsonl").read_bytes() == before
        return
    results, _ = run(PROMPTS, tmp_path)
    assert [each.scores for each in results] == [line["scores"] for line in lines(whole)]
    if case == "an image that is no picture":
        assert "the picture cannot be read" in (tmp_path / "index.html").read_text()
    else:
        assert pictures(tmp_path) == pictures(whole)
    assert not leftovers(tmp_path)
    assert run(PROMPTS, tmp_path)[1].calls == []  # every line that was written can be read


def test_a_kept_search_that_cannot_be_gone_on_with_is_said(half, tmp_path):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    other_version(tmp_path)
    with pytest.warns(UserWarning, match="the search that was kept in .* begins anew: .*it is of format 9"):
        run(PROMPTS, tmp_path)


def test_ten_thousand_rows(tmp_path):
    """All but one done by an earlier run: read, compared, gone on with and shown."""
    prompts = [{"prompt": f"prompt {i}", "id": f"{i}", "row": i} for i in range(10_000)]
    run(prompts[:1], tmp_path)
    first = lines(tmp_path)[0]
    with (tmp_path / "results.jsonl").open("a") as file:
        for i in range(1, 9_999):
            stem = folder.file_stem(f"{i}", f"prompt {i}")
            names = {"image": f"images/{stem}.png", "base_image": f"images/{stem}.base.png"}
            file.write(
                json.dumps(first | names | {"id": f"{i}", "prompt": f"prompt {i}", "columns": {"row": i}}) + "\n"
            )
            for name, path in names.items():
                os.link(tmp_path / first[name], tmp_path / path)
    results, pipe = run(prompts, tmp_path)
    assert len(results) == len(lines(tmp_path)) == 10_000
    assert {call["prompt"] for call in pipe.calls} == {"prompt 9999"} and results[-1].columns == {"row": 9_999}
    text = (tmp_path / "index.html").read_text()
    assert text.count("<article") == 10_000 and text.count("data:image/jpeg") == 20_000 and len(text) < 50e6
    assert json.loads((tmp_path / "summary.json").read_text())["done"] == 10_000


# ---------------------------------------------------------------- what the disk refuses


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="file/out: Not a directory"):
        run(PROMPTS, tmp_path / "file" / "out")


@pytest.mark.parametrize("at", [*range(1, 20), 22, 36])  # of files and of folders: settings, a prompt, a line, the page
def test_a_write_that_fails_ends_the_run_and_not_the_prompt(at, tmp_path, whole, monkeypatch):
    """No line says that a prompt failed, nothing half-written stays, and the same command goes on."""
    count, fsync = 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        run(PROMPTS, tmp_path)
    record = tmp_path / "results.jsonl"
    assert not record.exists() or all(line["status"] == "done" for line in lines(tmp_path))
    results, _ = run(PROMPTS, tmp_path)
    assert pictures(tmp_path) == pictures(whole) and not leftovers(tmp_path)
    assert [each.scores for each in results] == [line["scores"] for line in lines(whole)]


def test_a_full_disk(tmp_path, whole):
    """A real one, of 40 kB; then it is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(CannotWrite, match="No space left on device"):
            run(PROMPTS, disk / "out")
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run(PROMPTS, disk / "out")
        assert pictures(disk / "out") == pictures(whole) and not leftovers(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


def command(file, out, *options):
    small = ("--budget", 10, "--popsize", 4, "--elites", 2, "--batch-size", 1)
    return file, "--out", out, *small, *options


def toy_command(file, out, *options):
    return command(file, out, "--model", "toy", *options)


def check_whole(out, reference, ids):
    """Every prompt is done once, as an uninterrupted run does it, and nothing else is left."""
    assert [line["id"] for line in lines(out)] == ids and {line["status"] for line in lines(out)} == {"done"}
    assert pictures(out) == pictures(reference) and not leftovers(out)
    scores = [[line["scores"] for line in lines(folder)] for folder in (out, reference)]
    assert scores[0] == scores[1]
    assert json.loads((out / "summary.json").read_text())["done"] == len(ids)
    names = {"batch.json", "results.jsonl", "summary.json", "index.html", "images", "searches", ".lock"}
    assert {path.name for path in out.iterdir()} <= names


@pytest.mark.parametrize("prompts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_kill_at_any_write(forks, tmp_path, prompts):
    """One after another: before each fsync, rename and removal of a run."""
    file, reference = tmp_path / "prompts.txt", tmp_path / "reference"
    file.write_text("\n".join(PROMPTS[:prompts]))
    assert forks.run(*toy_command(file, reference)) == 0
    ids = [line["id"] for line in lines(reference)]
    writes = 0
    while True:
        out = tmp_path / f"out{writes}"
        code = forks.run(*toy_command(file, out), die_at=writes + 1)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        writes += 1
        assert forks.run(*toy_command(file, out)) == 0
        check_whole(out, reference, ids)
    # Two folders, settings, page, summary and the name of the results; two states, two images, a line, a removal.
    assert writes >= 2 + 3 * 3 + 1 + (3 * 4 + 2) * prompts


def test_kills_during_a_restart(forks, tmp_path):
    """The folder is then empty or begins anew; it never mixes two batches."""
    file, reference = tmp_path / "prompts.txt", tmp_path / "reference"
    file.write_text("\n".join(PROMPTS[:2]))
    assert forks.run(*toy_command(file, reference, "--seed", 1)) == 0
    ids = [line["id"] for line in lines(reference)]
    assert forks.run(*toy_command(file, tmp_path / "old")) == 0
    # Removed are two results' files, the page, four images; then the folders are synced, and the settings go last.
    for number in (1, 2, 4, 6, 8, 11, 12, 13):
        out = tmp_path / f"out{number}"
        shutil.copytree(tmp_path / "old", out)
        assert forks.run(*toy_command(file, out, "--seed", 1, "--restart"), die_at=number) == -signal.SIGKILL
        assert forks.run(*toy_command(file, out, "--seed", 1, "--restart")) == 0
        check_whole(out, reference, ids)


def test_another_process_holds_the_folder_until_it_is_killed(forks, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(3000)))
    pid = forks.start(*toy_command(tmp_path / "prompts.txt", tmp_path / "out"))
    until(lambda: (tmp_path / "out" / "results.jsonl").exists())
    with pytest.raises(ValueError, match="another process works in"):
        run(PROMPTS, tmp_path / "out")
    os.kill(pid, signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="other settings"):  # no longer another process
        run(PROMPTS, tmp_path / "out")


def until(happens, seconds=60):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_at_random(forks, file, tmp_path, options, kills, seed):
    """Kills a batch `kills` times at random moments, each followed by the same command."""
    begin = time.monotonic()
    assert forks.run(*command(file, tmp_path / "reference", *options)) == 0
    seconds = time.monotonic() - begin
    ids = [line["id"] for line in lines(tmp_path / "reference")]
    rng, killed, batches = random.Random(seed), 0, 0
    while killed < kills:
        out = tmp_path / f"out{batches}"
        pid = forks.start(*command(file, out, *options))
        time.sleep(rng.uniform(0, 2 * seconds / kills))
        os.kill(pid, signal.SIGKILL)
        if forks.wait() == 0:
            check_whole(out, tmp_path / "reference", ids)
            batches += 1
        else:
            killed += 1
    assert forks.run(*command(file, out, *options)) == 0
    check_whole(out, tmp_path / "reference", ids)


EMBEDDED = ("--steps", 2, "--width", 128, "--height", 128, "--batch-size", "auto")


def test_kills_at_random_moments(forks, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(ses_fast.embedded.captions()[:3]))
    kill_at_random(forks, tmp_path / "prompts.txt", tmp_path, EMBEDDED, kills=3, seed=0)


@pytest.mark.slow
def test_thirty_kills_at_random_moments(forks, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(ses_fast.embedded.captions()[:20]))
    kill_at_random(forks, tmp_path / "prompts.txt", tmp_path, EMBEDDED, kills=30, seed=1)
    reference = tmp_path / "reference"
    assert len(lines(reference)) == 20 and json.loads((reference / "batch.json").read_text())["model"] == "embedded"


# ---------------------------------------------------------------- the command


@pytest.fixture
def toy(monkeypatch):
    pipe = ToyPipeline()
    monkeypatch.setitem(models.MODELS, "embedded", lambda: pipe)
    monkeypatch.setattr(job, "load_reward", lambda name, weights: redness)
    monkeypatch.setattr(pipelines, "enable", lambda pipe: pipe)
    return pipe


def ses_fast_batch(*arguments):
    """The exit code."""
    try:
        cli.main(["batch", *map(str, arguments)])
    except SystemExit as left:
        return left.code
    return 0


def test_the_command(toy, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("Prompt,seed\na red fox,4\n")
    (tmp_path / "ses.json").write_text('{"popsize": 5, "k_elites": 3}')
    options = ("--config", tmp_path / "ses.json", "--elites", 2, "--budget", 6, "--steps", 3, "--width", 16)
    assert ses_fast_batch(tmp_path / "p.csv", "--out", tmp_path / "out", *options) == 0
    settings = json.loads((tmp_path / "out" / "batch.json").read_text())
    assert (settings["ses_config"]["popsize"], settings["ses_config"]["k_elites"]) == (5, 2)
    assert settings["arguments"] == {"num_inference_steps": 3, "width": 16} and settings["ses_inference_steps"] == 3
    (line,) = lines(tmp_path / "out")
    printed, bar = capsys.readouterr()
    assert re.search(r"1/1 prompts, 0 failed: 100%.* 6/6 \[\d\d:\d\d<00:00", bar)
    assert "prompts      1, 0 failed\n" in printed
    assert f"without search {line['base_score']:.2f}, with {line['score']:.2f}" in printed
    assert line["evaluations"] == 6 and toy.calls[0]["size"] == (8, 16)


def test_standard_input(toy, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a red fox\r\na cat\n")))
    assert ses_fast_batch("-", "--out", tmp_path / "out", "--budget", 2) == 0
    assert [line["prompt"] for line in lines(tmp_path / "out")] == ["a red fox", "a cat"]


def test_exit_code_1_where_a_prompt_failed(toy, tmp_path, monkeypatch, capsys):
    def fragile(images, prompt):
        raise ValueError("no\x1b[2J\nmore")

    monkeypatch.setattr(job, "load_reward", lambda name, weights: fragile)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(12)))
    assert ses_fast_batch(tmp_path / "p.txt", "--out", tmp_path / "out", "--budget", 2) == 1
    printed = capsys.readouterr().out
    assert printed.count("-prompt-") == 10 and "and 2 more" in printed and "12, 12 failed" in printed
    assert "ValueError: no\ufffd[2J more\n" in printed and "\x1b" not in printed


def test_ctrl_c(toy, tmp_path, monkeypatch, capsys, whole):
    """It ends within the preview that is under way, and the same command goes on."""
    count = 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it

    def interrupted(images, prompt):
        nonlocal count
        count += 1
        if count == 15:
            signal.raise_signal(signal.SIGINT)
        return redness(images, prompt)

    interrupted.__module__, interrupted.__qualname__ = redness.__module__, redness.__qualname__
    monkeypatch.setattr(job, "load_reward", lambda name, weights: interrupted)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    options = command(tmp_path / "p.txt", tmp_path / "out", "--preview-steps", 10)
    assert ses_fast_batch(*options) == 130 and count == 15
    assert "the same command goes on" in capsys.readouterr().err
    assert ses_fast_batch(*options) == 0 and count == 15 + 6 + 10  # one generation of the second prompt was kept
    assert pictures(tmp_path / "out") == pictures(whole)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "kind, code, says",
    [("KeyboardInterrupt", 130, "stopped: the same command"), ("ValueError", 1, "error: rank 1: ValueError: no. The")],
)
def test_what_another_process_has_stopped(kind, code, says, toy, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise RankFailed(1, kind, "no", kind == "KeyboardInterrupt")
        yield

    monkeypatch.setattr(batch, "run", stopped)
    (tmp_path / "p.txt").write_text("a red fox")
    assert ses_fast_batch(tmp_path / "p.txt", "--out", tmp_path / "out") == code
    assert says in capsys.readouterr().err


def test_a_disk_that_fills_up_is_one_line(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a red fox")
    monkeypatch.setattr(Folder, "add", lambda *_: (_ for _ in ()).throw(CannotWrite("cannot write x: it is full")))
    assert ses_fast_batch(tmp_path / "p.txt", "--out", tmp_path / "out", "--budget", 2) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "ses-fast: error: cannot write x: it is full. The same command goes on from here"


# arguments after `batch`, and what the one line says
BAD_COMMANDS = {
    "no file": (["missing.csv"], "missing.csv"),
    "a folder": (["."], "Is a directory"),
    "no prompt column": (["a.csv"], "a.csv: line 1: no column is called prompt"),
    "an empty file": (["empty.txt"], "empty.txt: there is no prompt in it"),
    "a bad number": (["b.csv"], "b.csv: line 3: the seed must be a whole number, got 'x'"),
    "an unknown format": (["p.txt", "--format", "xls"], "--format"),
    "no config": (["p.txt", "--config", "none.json"], "none.json"),
    "a bad config": (["p.txt", "--config", "bad.json"], "bad.json: unknown settings popsiez"),
    "an unknown wavelet": (["p.txt", "--wavelet", "db999"], "db999"),
    "a file as folder": (["p.txt", "--out", "p.txt"], "cannot write to the folder p.txt: File exists"),
    "other settings": (["p.txt", "--out", "old"], "ses_eval_budget was 10, and now is 50"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_one_line_and_exit_code_2(case, toy, tmp_path, whole, monkeypatch, capsys):
    arguments, message = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    files = {"a.csv": "text\na", "empty.txt": "\n", "b.csv": "prompt,seed\na,1\nb,x", "p.txt": "a"}
    for name, text in (files | {"bad.json": '{"popsiez": 3}'}).items():
        (tmp_path / name).write_text(text)
    if case == "other settings":
        shutil.copytree(whole, tmp_path / "old")
    assert ses_fast_batch(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == "" and toy.calls == []


def test_a_race_and_refined_answers(tmp_path):
    """A preview may be an object in the settings' file; what a race stopped early is marked as such."""
    caption = ses_fast.embedded.captions()[0]
    (tmp_path / "p.txt").write_text(caption)
    preview = {"race": [[0.9, 0.5]], "refine": 2, "scale": 2}
    (tmp_path / "ses.json").write_text(json.dumps({"preview": preview, "strategy": "random"}))
    options = command(tmp_path / "p.txt", tmp_path / "out", "--config", tmp_path / "ses.json", "--steps", 4)
    assert ses_fast_batch(*options) == 0
    (line,) = lines(tmp_path / "out")
    assert line["early"] and len(line["scores"]) == 10 and line["status"] == "done"
    settings = json.loads((tmp_path / "out" / "batch.json").read_text())["ses_config"]
    assert settings["preview"] == preview | {"cfg": True} and settings["strategy"] == "random"
    assert "stopped early" in (tmp_path / "out" / "index.html").read_text()


def test_the_embedded_model_by_the_command(tmp_path):
    """The real thing, small: each image is that of its own call."""
    caption = ses_fast.embedded.captions()[0]
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": caption, "seed": 3}) + "\n")
    assert ses_fast_batch(*command(tmp_path / "p.jsonl", tmp_path / "out", *EMBEDDED)) == 0
    (line,) = lines(tmp_path / "out")
    pipe = ses_fast.enable(ses_fast.embedded.load_pipeline())
    call = {"seed": 3, "num_inference_steps": 2, "height": 128, "width": 128}
    assert np.array_equal(Image.open(tmp_path / "out" / line["base_image"]), pipe(caption, **call))
    image = pipe(
        caption,
        enable_ses=True,
        ses_reward_model=ses_fast.embedded.load_reward(),
        ses_eval_budget=10,
        ses_inference_steps=2,
        ses_config=replace(SMALL, batch_size="auto", progress=False),
        **call,
    )
    assert np.array_equal(Image.open(tmp_path / "out" / line["image"]), image)
    assert line["scores"] == [each.score for each in pipe.ses_result.trace]
