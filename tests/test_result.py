"""A search result on disk: what comes back, and what is no result."""

import json
import math
import os
import pickle
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ses_fast
from ses_fast import SearchResult

BASE = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = {"popsize": 4, "k_elites": 2, "dwt_level": 1, "progress": False}


def score(latents):
    return -(latents.float() - 0.3).square().mean().item()


def without_state(result):
    return {f.name: getattr(result, f.name) for f in fields(SearchResult) if f.name not in ("latents", "state")}


@pytest.mark.parametrize(
    "dtype, options",
    [
        pytest.param(torch.float32, {"seed": 3}, id="a seed"),
        pytest.param(torch.bfloat16, {"seed": 2**63 - 1, "include_base": True}, id="bf16, the base, the largest seed"),
        pytest.param(torch.float32, {"generator": torch.Generator().manual_seed(1)}, id="a generator"),
    ],
)
@pytest.mark.parametrize("budget", [8, 6], ids=["complete generations", "within a generation"])
def test_what_was_saved_comes_back_and_goes_on(tmp_path, dtype, options, budget):
    options = dict(options)
    if "generator" in options:
        options["generator"] = options["generator"].clone_state()
    base = BASE.to(dtype)
    result = ses_fast.evolve(base, score, budget, **OPTIONS, **options)
    path = tmp_path / "found.safetensors"
    path.write_text("an older file")
    result.save(path)
    loaded = SearchResult.load(str(path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(loaded.latents, result.latents) and loaded.latents.dtype == dtype
    assert without_state(loaded) == without_state(result)
    again = {key: value for key, value in options.items() if key == "include_base"}
    on, whole = (ses_fast.evolve(base, score, 12, **OPTIONS, **again, state=r.state) for r in (loaded, result))
    assert on.trace == whole.trace and torch.equal(on.latents, whole.latents)


def test_a_search_that_was_broken_off_before_any_finite_score(tmp_path):
    scores = iter([math.nan, -math.inf])
    with pytest.raises(StopIteration) as caught:
        ses_fast.evolve(BASE, lambda latents: next(scores), 8, **OPTIONS, seed=1, include_base=True)
    result = caught.value.ses_result
    result.save(tmp_path / "nothing")
    loaded = SearchResult.load(tmp_path / "nothing")
    assert loaded.latents is None and loaded.best is None and loaded.stopped == "error"
    assert without_state(loaded) == without_state(result) and loaded.base_score == -math.inf


def _pickle(path):
    path.write_bytes(pickle.dumps({"latents": BASE}))


def _others(path):
    save_file({"latents": BASE}, path)


def _later(path):
    save_file({"latents": BASE}, path, metadata={"ses_fast": json.dumps({"format": 99})})


@pytest.mark.parametrize("write", [_pickle, _others, _later])
def test_another_file_is_one_clear_error(tmp_path, write):
    write(tmp_path / "file")
    with pytest.raises(ValueError, match="file is no"):
        SearchResult.load(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        SearchResult.load(tmp_path / "none")


def test_a_result_is_printed_in_a_line_without_its_tensors():
    result = ses_fast.evolve(torch.zeros(1, 2, 16, 16), lambda z: 1.5, 2, 2, 1, dwt_level=1, progress=False, seed=0)
    text = repr(result)
    assert "score=1.5" in text and "evaluations=2" in text and "tensor(" not in text and "\n" not in text


# ---------------------------------------------------------------- files from elsewhere


@pytest.fixture
def saved(tmp_path):
    """(facts, tensors, load): what a result's file holds, and how to load one that was changed."""
    result = ses_fast.evolve(BASE, score, 12, **OPTIONS, seed=1, include_base=True)
    result.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", "pt") as file:
        facts = json.loads(file.metadata()["ses_fast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}

    def load(facts, tensors):
        text = facts if isinstance(facts, str) else json.dumps(facts)
        save_file(tensors, tmp_path / "changed", metadata={"ses_fast": text})
        return SearchResult.load(tmp_path / "changed")

    assert load(facts, tensors).trace == result.trace
    return facts, tensors, load


def without(facts, name):
    return {key: value for key, value in facts.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda f: "[]", "says nothing of a search", id="a list"),
        pytest.param(lambda f: "null", "says nothing of a search", id="null"),
        pytest.param(lambda f: "[" * 200_000, "is no result", id="nested too deep"),
        pytest.param(lambda f: "{", "is no result", id="torn"),
        pytest.param(lambda f: f | {"format": 1}, "is of format 1", id="an older version's"),
        pytest.param(lambda f: without(f, "state"), "its state should be a dict", id="no state"),
        pytest.param(lambda f: f | {"state": []}, "its state should be a dict", id="a list for a state"),
        pytest.param(lambda f: f | {"state": without(f["state"], "seed")}, "lacks seed", id="half a state"),
        pytest.param(
            lambda f: f | {"state": f["state"] | {"fingerprint": 3}},
            "fingerprint must be a dict",
            id="fingerprint a number",
        ),
        pytest.param(lambda f: f | {"state": f["state"] | {"members": "ab"}}, "members must be a list", id="a name"),
        pytest.param(lambda f: f | {"state": f["state"] | {"popsize": "4"}}, "popsize must be a whole", id="a word"),
        pytest.param(lambda f: f | {"state": f["state"] | {"wavelet_name": []}}, "wavelet", id="a list for a wavelet"),
        pytest.param(lambda f: without(f, "best"), "names candidate None as the best", id="no best"),
        pytest.param(lambda f: f | {"best": 99}, "names candidate 99 as the best", id="a best that is not there"),
        pytest.param(lambda f: f | {"best": "a"}, "names candidate 'a' as the best", id="a word for the best"),
        pytest.param(lambda f: f | {"best": float(f["best"])}, "as the best", id="a float for the best"),
        pytest.param(lambda f: f | {"seconds": {"total": 10**400}}, "seconds are not numbers", id="endless seconds"),
        pytest.param(lambda f: f | {"best": True}, "names candidate True as the best", id="a switch for the best"),
        pytest.param(lambda f: f | {"best": (f["best"] + 1) % 12}, "and its scores say", id="a best that is not"),
        pytest.param(lambda f: f | {"best": f["best"] - 12}, "and its scores say", id="counted from the end"),
        pytest.param(lambda f: f | {"held_out": 3}, "its held_out should be a dict", id="a number for held-out"),
        pytest.param(lambda f: f | {"held_out": {"a": [1]}}, "are not two numbers", id="one held-out score"),
        pytest.param(lambda f: f | {"seconds": {"total": "1"}}, "seconds are not numbers", id="seconds in words"),
        pytest.param(lambda f: without(f, "stopped"), "its stopped should be a str", id="not stopped"),
        pytest.param(lambda f: f | {"stopped": "never"}, "stopped by 'never'", id="stopped by what"),
    ],
)
def test_a_changed_header_is_one_clear_error(saved, change, message):
    facts, tensors, load = saved
    with pytest.raises(ValueError, match=f"changed .*{message}"):
        load(change(facts), tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"latents": torch.zeros(3)}, "not of the base's shape", id="another shape"),
        pytest.param({"latents": BASE.double()}, "not of the base's shape and dtype", id="another dtype"),
        pytest.param({"latents": BASE + 1}, "latents are not those of its best candidate", id="other latents"),
        pytest.param({"scores": torch.zeros(3, dtype=torch.float64)}, "must be torch.float", id="fewer scores"),
        pytest.param({"member_scores": torch.zeros(2, 12)}, "member_scores must be", id="scores of no member"),
        pytest.param({"base": torch.zeros(2, 3)}, "one base", id="no base"),
        pytest.param({"format": torch.zeros(2)}, "tensors that no result has: format", id="a tensor for a setting"),
        pytest.param({"mean": torch.full((48,), 100.0)}, "mean is not its elites'", id="another mean"),
        pytest.param({"variance": torch.full((48,), 3e38)}, "variance is not its elites'", id="another variance"),
        pytest.param(
            {"elite_scores": torch.tensor([9.0, 9.0]).double()},
            "not the best of its scores",
            id="other elites",
        ),
    ],
)
def test_changed_tensors_are_one_clear_error(saved, change, message):
    facts, tensors, load = saved
    with pytest.raises(ValueError, match=message):
        load(facts, tensors | change)


def test_a_folder_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="it is a folder"):
        SearchResult.load(tmp_path)


def test_saving_fails_clearly_and_leaves_nothing(tmp_path):
    result = ses_fast.evolve(BASE, score, 4, **OPTIONS, seed=1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        result.save(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing"):
        result.save(tmp_path / "missing" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    result = ses_fast.evolve(BASE, score, 4, **OPTIONS, seed=1)
    path = tmp_path / "file"
    path.write_text("old")

    def full(tensors, file, metadata):
        open(file, "w").write("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        result.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_long_names_and_other_things_than_files(tmp_path):
    result = ses_fast.evolve(BASE, score, 4, **OPTIONS, seed=1)
    name = "語" * 80 + ".safetensors"  # 252 bytes of the 255 that a name may have
    result.save(tmp_path / name)
    assert SearchResult.load(tmp_path / name).trace == result.trace
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        result.save(tmp_path / "pipe")


def test_saving_destroys_nothing_beside_it(tmp_path):
    result = ses_fast.evolve(BASE, score, 4, **OPTIONS, seed=1)
    result.save(tmp_path / "a.part")
    result.save(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.part"]
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    result.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and SearchResult.load(tmp_path / "real").trace == result.trace
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    (tmp_path / "usual").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
