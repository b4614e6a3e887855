"""A search result on disk: what comes back, and what is no result."""

import json
import math
import pickle
from dataclasses import fields

import pytest
import torch
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
