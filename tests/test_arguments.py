"""Any arguments at all: an answer of the right shape or one clear error of the package's own, and never a hang.

A target is a function and a strategy of its arguments as they should be. One or two of them are replaced by odd ones.
What is then raised has its last frame in ses_fast, is a ValueError or TypeError, and names one of the odd arguments.
"""

import functools
import math
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_z_image
from torch import Tensor
from toy_batch import ToyPipeline, redness

import ses_fast
from ses_fast import Preview, SESConfig, batch, distributed, embedded, evolution, ops, rewards, spectral
from ses_fast.evolution import EvolutionConfig, SearchState
from ses_fast.prompts import read_prompts
from ses_fast.reference import band_size

PACKAGE = Path(ses_fast.__file__).parent
EXAMPLES = 40  # of a target in `make test`
MANY = 30  # times as many in the long test
SECONDS = 60  # that no call takes


# ---------------------------------------------------------------- odd values

TENSORS = {
    "a number": lambda: torch.tensor(1.0),
    "a whole number": lambda: torch.tensor(1),
    "empty": lambda: torch.zeros(0),
    "one pixel": lambda: torch.zeros(1, 1, 1, 1),
    "one dimension": lambda: torch.zeros(3),
    "two bases": lambda: torch.zeros(2, 4, 8, 8),
    "no height": lambda: torch.zeros(1, 4, 0, 8),
    "integers": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.int64),
    "truths": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.bool),
    "complex": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.complex64),
    "fp8": lambda: torch.zeros(1, 4, 8, 8).to(torch.float8_e4m3fn),
    "fp16": lambda: torch.zeros(1, 4, 8, 8, dtype=torch.float16),
    "sparse": lambda: torch.zeros(1, 4, 8, 8).to_sparse(),
    "sparse rows": lambda: torch.eye(8).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged),
    "without storage": lambda: torch.zeros(1, 4, 8, 8, device="meta"),
    "with a graph": lambda: torch.zeros(1, 4, 8, 8, requires_grad=True) + 1,
    "not contiguous": lambda: torch.zeros(1, 8, 8, 4).permute(0, 3, 1, 2),
    "expanded": lambda: torch.zeros(1, 1, 1, 1).expand(1, 4, 8, 8),
    "not finite": lambda: torch.full((1, 4, 8, 8), math.nan),
    "many dimensions": lambda: torch.zeros(1, 1, 2, 1, 2, 1, 8, 8),
    "images": lambda: torch.zeros(2, 3, 9, 7),
    "an array": lambda: np.zeros((1, 4, 8, 8)),
    "an array of nothing": lambda: np.array(1.0),
    "a list of lists": lambda: [[0.0] * 8] * 8,
}
THINGS = {
    repr(thing): thing
    for thing in (
        *(None, True, False, -1, 0, 1, 2, 2**63, 2**64, -(2**63) - 1, 10**400, -(10**400), 0.5, 1e-300, -0.0),
        *(math.nan, math.inf, -math.inf, 1j, "", "x", "db1", "db2", "dmey", "auto", "torch", "triton", "crop", b"db1"),
        *("\ud800", "a\0b", [], [1], [None, None], (), (1, 2), (0.5, 0.5, 0.5), (0.5, "x", 0.5), [0, 0, 0], {}),
        *({"pick": 1.0}, {"pick": "x"}, {1: 2}, {"jpg"}, range(3), object(), Ellipsis, Decimal("0.5"), Fraction(1)),
        *(np.int64(3), np.float32(math.nan), np.bool_(True), torch.float32, torch.int8, torch.float8_e5m2),
        *(torch.device("cpu"), Path("nowhere"), [(0.8, 0.5)], [(0.8, 0.5), (0.9, 0.4)], [(10**400, 0.5)]),
    )
}  # fmt: skip
ODD = st.sampled_from([*TENSORS, *THINGS])


def odd(name: str) -> Any:
    return TENSORS[name]() if name in TENSORS else THINGS[name]


# ---------------------------------------------------------------- what a call may do


@contextmanager
def within(seconds: int):
    """Raises AssertionError inside when the time is over."""

    def over(*_: object) -> None:
        raise AssertionError(f"it hangs: {seconds} seconds are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Target:
    call: Callable[..., Any]
    arguments: st.SearchStrategy[dict[str, Any]]  # good ones
    fits: Callable[[Any, dict[str, Any]], Any]  # asserts that what the call returned has the shape it should have
    words: Mapping[str, str] = field(
        default_factory=dict
    )  # an argument -> what a message may call it, or one that it disagrees with
    odd: tuple[str, ...] = ()  # the arguments that are replaced; none: all


def check_error(error: Exception, replaced: Mapping[str, Any], words: Mapping[str, str]) -> None:
    if isinstance(error, FileNotFoundError | IsADirectoryError):  # said by Python, with the file's name
        return
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert Path(last.filename).is_relative_to(PACKAGE), f"raised outside: {last}"
    if isinstance(replaced.get("backend"), str) and type(error) is RuntimeError:
        assert "cannot run here" in str(error)
        return
    assert isinstance(error, ValueError | TypeError) and not isinstance(error, UnicodeError), repr(error)
    named = "|".join(words.get(name, name) for name in replaced)
    assert re.search(rf"\b({named})\b", str(error)), f"it does not say {named}: {error}"


def hold(target: Target, data: st.DataObject) -> None:
    good = data.draw(target.arguments)
    which = st.sampled_from(target.odd or sorted(good))
    replaced = {name: odd(data.draw(ODD)) for name in data.draw(st.lists(which, max_size=2, unique=True))}
    arguments = good | replaced
    try:
        with within(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = target.call(**arguments)
    except AssertionError:
        raise
    except Exception as error:
        assert replaced, f"good arguments are refused: {error!r}"
        check_error(error, replaced, target.words)
    else:
        target.fits(answer, arguments)


# ---------------------------------------------------------------- good arguments

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
WIDE = st.sampled_from([torch.float32, torch.float64])
BACKEND = st.sampled_from([None, "auto", "torch"])
SIDE = st.integers(1, 9)
LEVEL = st.integers(0, 3)
WAVELET = st.sampled_from(["db1", "haar", "db2", "sym3", "bior2.2", "dmey"])


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@st.composite
def latents(draw: Any, dtypes: Any = FLOATS, lead: Any = None) -> Tensor:
    lead = draw(st.lists(st.integers(1, 3), max_size=3)) if lead is None else lead
    return noise(*lead, draw(SIDE), draw(SIDE), dtype=draw(dtypes))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fits_dwt(bands: Any, a: dict[str, Any]) -> None:
    x, level = a["x"], a["level"]
    sizes = [band_size(x.shape[-2:], j) for j in range(level, 0, -1)]
    lead = x.shape[:-2]
    assert bands[0].shape == (*lead, *band_size(x.shape[-2:], level)) and len(bands) == level + 1
    for triple, size in zip(bands[1:], sizes, strict=True):
        assert [band.shape for band in triple] == [(*lead, *size)] * 3
        assert {band.dtype for band in triple} == {wide(x.dtype)}


@st.composite
def coefficients(draw: Any) -> dict[str, Any]:
    x = draw(latents())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"coeffs": ops.haar_dwt2(x, draw(LEVEL)), "size": tuple(x.shape[-2:]), "backend": draw(BACKEND)}


def fits_idwt(x: Any, a: dict[str, Any]) -> None:
    assert x.shape == (*a["coeffs"][0].shape[:-2], *a["size"]) and x.dtype == a["coeffs"][0].dtype


def fits_split(two: Any, a: dict[str, Any]) -> None:
    (low, residual), x = two, a["x"]
    assert residual.shape == x.shape and low.dtype == residual.dtype == wide(x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = spectral.merge(residual, low, a.get("wavelet", "db1"), a["level"], dtype=x.dtype)
    if not x.is_meta and x.isfinite().all():
        torch.testing.assert_close(again, x, rtol=2e-2, atol=2e-2)


@st.composite
def parts(draw: Any, wavelet: bool = False) -> dict[str, Any]:
    """What `merge` takes."""
    name, level = draw(WAVELET) if wavelet else "db1", draw(LEVEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, residual = spectral.split(draw(latents()), name, level)
    more = {"dtype": draw(st.none() | FLOATS), "backend": draw(BACKEND)}
    return {"residual": residual, "low": low, "level": level} | ({"wavelet": name} if wavelet else {}) | more


def fits_merge(x: Any, a: dict[str, Any]) -> None:
    lead = torch.broadcast_shapes(a["residual"].shape[:-2], a["low"].shape[:-2])
    assert x.shape == (*lead, *a["residual"].shape[-2:]) and x.dtype == (a["dtype"] or a["residual"].dtype)


@st.composite
def population(draw: Any) -> dict[str, Any]:
    residual, level = draw(latents(WIDE, lead=(1, 2))), draw(LEVEL)
    size, popsize = 2 * math.prod(band_size(residual.shape[-2:], level)), draw(st.integers(1, 5))
    seeded = draw(st.booleans())
    return {
        "residual": residual,
        "mean": noise(size),
        "std": noise(size).abs(),
        "level": level,
        "popsize": popsize,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)) if seeded else None,
        "generation": draw(st.integers(0, 2**32 - 1)),
        "first": draw(st.integers(0, 2**32 - 5)),
        "draws": None if seeded else noise(popsize, size),
        "dtype": draw(st.none() | FLOATS),
        "backend": draw(BACKEND),
    }


def fits_population(two: Any, a: dict[str, Any]) -> None:
    candidates, low = two
    assert candidates.shape == (a["popsize"], *a["residual"].shape[1:]) and low.shape == (a["popsize"], len(a["mean"]))
    assert candidates.dtype == (a["dtype"] or a["residual"].dtype)


@st.composite
def elites(draw: Any) -> dict[str, Any]:
    popsize, size, k = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    before = draw(st.integers(0, k))
    return {
        "low": noise(popsize, size),
        "scores": noise(popsize, dtype=draw(FLOATS)),
        "elite_low": noise(before, size),
        "elite_scores": noise(before, dtype=torch.float64).sort(descending=True).values,
        "mean": noise(size),
        "variance": noise(size).abs(),
        "k_elites": k,
        "backend": draw(BACKEND),
    }


def fits_elites(found: Any, a: dict[str, Any]) -> None:
    k, size = min(a["k_elites"], len(a["elite_low"]) + len(a["low"])), len(a["mean"])
    shapes = [(k, size), (k,), (size,), (size,), (len(a["scores"]),)]
    assert [each.shape for each in found] == shapes
    assert found.elite_scores.sort(descending=True).values.equal(found.elite_scores)


IMAGES = st.fixed_dictionaries(
    {
        "images": st.builds(lambda n, h, w, kind: noise(n, 3, h, w, dtype=kind), st.integers(0, 2), SIDE, SIDE, FLOATS),
        "rule": st.sampled_from(["crop", "pad"]),
        "size": st.integers(1, 12),
        "mean": st.just((0.5, 0.4, 0.3)),
        "std": st.just([0.5, 0.4, 0.3]),
        "dtype": st.none() | FLOATS,
        "centre": st.sampled_from(["floor", "round"]),
        "backend": BACKEND,
    }
)  # fmt: skip


def fits_images(x: Any, a: dict[str, Any]) -> None:
    assert x.shape == (len(a["images"]), 3, a["size"], a["size"]) and x.dtype == (a["dtype"] or a["images"].dtype)


def objective(candidates: Tensor) -> Tensor:
    return candidates.double().flatten(1).mean(1)


SIDES = st.integers(6, 12)
SHORT = st.sampled_from(["db1", "haar", "db2"])  # wavelets for a base as small as these
SEARCH = st.fixed_dictionaries(
    {
        "base_latents": st.builds(lambda h, w, dtype: noise(1, 2, h, w, dtype=dtype), SIDES, SIDES, FLOATS),
        "objective_reward_fn": st.just(objective),
        "total_eval_budget": st.integers(1, 12),
        "popsize": st.integers(1, 5),
        "k_elites": st.integers(1, 4),
        "wavelet_name": SHORT,
        "dwt_level": st.integers(1, 3),
        "strategy": st.sampled_from(sorted(ses_fast.strategies.STRATEGIES)),
        "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
        "generator": st.none(),
        "batch_size": st.integers(1, 20),
        "include_base": st.booleans(),
        "on_generation": st.none(),
        "progress": st.just(False),
        "time_limit": st.just(0.5),
        "state": st.none(),
        "backend": BACKEND,
        "process_group": st.none() | st.just("auto"),
    }
)


def fits_search(found: Any, a: dict[str, Any]) -> None:
    base = a["base_latents"]
    best = found if isinstance(found, Tensor) else found.latents
    assert (best.shape, best.dtype, best.device) == (base.shape, base.dtype, base.device)
    if not isinstance(found, Tensor):
        assert found.evaluations == len(found.trace) and found.score == max(each.score for each in found.trace)


CONFIG = st.fixed_dictionaries(
    {
        "popsize": st.integers(1, 50),
        "k_elites": st.integers(4, 9),
        "wavelet_name": WAVELET,
        "dwt_level": st.integers(1, 5) | st.just("auto"),
        "strategy": st.sampled_from(sorted(ses_fast.strategies.STRATEGIES)),
        "preview": st.builds(Preview, refine=st.integers(0, 4), cfg=st.booleans()),
        "batch_size": st.integers(1, 9) | st.just("auto"),
        "include_base": st.booleans(),
        "seed": st.none() | st.integers(0, 9),
        "generator": st.none(),
        "progress": st.booleans(),
        "time_limit": st.none() | st.floats(1, 9),
        "on_generation": st.none(),
        "on_preview": st.none(),
        "state": st.none(),
        "latents": st.none(),
        "backend": BACKEND,
        "report_rewards": st.sampled_from([(), ["pick"], {"mine": objective}]),
        "process_group": st.none() | st.just("auto"),
    }
)


def fits_config(config: Any, a: dict[str, Any]) -> None:
    assert config.evolution(512, 512) and repr(config) and hash(config) is not None and config == config


PREVIEW = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([1, 2]),
        "race": st.sampled_from([None, "auto", [(0.9, 0.5)], ((0.9, 0.5), (0.5, 0.2))]),
        "cfg": st.booleans(),
        "refine": st.integers(0, 9),
    }
)

# ---------------------------------------------------------------- states, rewards, folders, pipelines

STARTED = evolution.start(noise(1, 2, 8, 8), EvolutionConfig(4, 2, dwt_level=2), seed=0)
START = st.fixed_dictionaries(
    {
        "base_latents": st.just(noise(1, 2, 8, 8)),
        "config": st.none() | st.just(EvolutionConfig(3, 2, dwt_level=1)),
        "seed": st.integers(0, 9),
        "generator": st.none(),
        "include_base": st.booleans(),
        "backend": BACKEND,
    }
)


def asked_and_told(count: Any, low: Any, scores: Any, steps: Any, members: Any, fingerprint: Any) -> SearchState:
    candidates, drawn = evolution.ask(STARTED, count)
    assert candidates.shape == (4 if count is None else min(count, 4), 2, 8, 8)
    low = drawn if low is None else low
    return evolution.tell(STARTED, low, scores, steps=steps, members=members, fingerprint=fingerprint)


TELL = st.fixed_dictionaries(
    {
        "count": st.none(),
        "low": st.none(),
        "scores": st.integers(1, 4).map(lambda n: torch.arange(n)),
        "steps": st.none(),
        "members": st.none(),
        "fingerprint": st.none() | st.just({"a": 1}),
    }
)


def fits_tell(state: SearchState, a: dict[str, Any]) -> None:
    assert state.evaluations == len(a["scores"]) and state.scores.isfinite().all()
    evolution.ask(SearchState.load_state_dict(state.state_dict()))


def loaded(name: Any, weights: Any, device: Any, dtype: Any) -> Any:
    """A reward, or None where its weights are not on this machine: every argument has been looked at by then."""
    try:
        return rewards.load_reward(name, weights, device, dtype)
    except OSError as error:
        assert re.search("reward|weights|processor", str(error))
        return None


REWARD = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["pick", "clip", {"pick": 1.0, "clip": -0.5}]),
        "weights": st.none(),
        "device": st.none() | st.just("cpu") | st.just(torch.device("cpu")),
        "dtype": st.none() | FLOATS,
    }
)
WEIGHTED = st.fixed_dictionaries(
    {
        "rewards": st.just({"a": objective, "b": objective}),
        "weights": st.just({"a": 1.0, "b": -2}),
        "scale": st.none() | st.just({"a": (0.0, 1.0), "b": [1, 0]}),
    }
)


def batch_run(**arguments: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = (
            Path(folder) / "out"
            if isinstance(arguments["out"], str) and arguments["out"] == "out"
            else arguments["out"]
        )
        return list(batch.run(ToyPipeline(), **{**arguments, "out": out}))


BATCH = st.fixed_dictionaries(
    {
        "prompts": st.just(["a red fox"]),
        "out": st.just("out"),
        "ses_reward_model": st.just(redness),
        "ses_eval_budget": st.integers(1, 3),
        "ses_inference_steps": st.integers(1, 3),
        "ses_config": st.just(SESConfig(popsize=2, k_elites=1, time_limit=0.5)),
        "seed": st.integers(0, 9),
        "model": st.none() | st.just("mine"),
        "restart": st.booleans(),
        "progress": st.just(False),
        "shard": st.sampled_from([None, "prompts", "population"]),
        "process_group": st.none() | st.just("auto"),
    }
)


def fits_batch(results: list[Any], a: dict[str, Any]) -> None:
    assert len(results) == len(a["prompts"])


PATH = st.fixed_dictionaries({"path": st.just(Path(__file__).parent)})  # a folder, which none of them reads


def reading(read: Callable[[Any], Any]) -> Callable[..., None]:
    def call(path: Any) -> None:
        if isinstance(path, Path) and path == Path(__file__).parent:
            with pytest.raises((ValueError, OSError), match="tests"):
                read(path)
        else:
            read(path)

    return call


tiny = functools.cache(lambda: ses_fast.enable(tiny_z_image()))


def called(**arguments: Any) -> Any:
    own = {"height": 32, "width": 32, "num_inference_steps": 1, "cfg_scale": 1.0, "progress_bar_cmd": iter}
    return tiny()(**own | arguments)


CALL = st.fixed_dictionaries(
    {
        "prompt": st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
        "seed": st.none() | st.integers(0, 9),
        "enable_ses": st.just(True),
        "ses_reward_model": st.just(lambda images, prompt: images.mean((1, 2, 3))),
        "ses_eval_budget": st.integers(0, 3),
        "ses_inference_steps": st.just(1),
        "ses_config": st.just(SESConfig(popsize=2, k_elites=1, time_limit=0.5, progress=False)),
    }
)


def fits_call(image: Any, a: dict[str, Any]) -> None:
    assert image.size == (32, 32)
    if a["enable_ses"] and a["ses_eval_budget"]:
        assert 1 <= tiny().ses_result.evaluations <= a["ses_eval_budget"]


def backend_set(name: Any) -> None:
    ses_fast.set_backend(name)
    ses_fast.set_backend("auto")


stock = functools.cache(tiny_z_image)
PIPE = {"pipe": "pipelines"}


def enabled_and_disabled(pipe: Any, compile: Any) -> Any:
    return ses_fast.disable(
        ses_fast.enable(stock() if isinstance(pipe, str) and pipe == "tiny" else pipe, compile=compile)
    )


def scored_by_pictures(function: Any, batched: Any) -> Tensor:
    return rewards.from_pil(function, batched)(noise(2, 3, 5, 4), "a fox")


def brightness(pictures: Any, prompt: str) -> Any:
    means = [np.asarray(each).mean() for each in (pictures if isinstance(pictures, list) else [pictures])]
    return means if isinstance(pictures, list) else means[0]


VLM = st.fixed_dictionaries(
    {
        "model": st.just("m"),
        "base_url": st.just("http://localhost:1/v1"),
        "question": st.just("{prompt}?"),
        "api_key": st.none() | st.just("k"),
        "low": st.just(0),
        "high": st.just(10.0),
        "attempts": st.integers(1, 3),
        "max_retries": st.integers(0, 3),
        "timeout": st.floats(0.1, 9),
        "concurrency": st.integers(1, 9),
        "cache_size": st.integers(0, 9),
        "options": st.just({}) | st.just({"temperature": None}),
    }
)
DEVICE = st.sampled_from(["cpu", torch.device("cpu")])


@functools.cache
def found() -> ses_fast.SearchResult:
    return ses_fast.evolve(noise(1, 2, 8, 8), objective, 2, 2, 1, "db1", 1, seed=0, progress=False)


# ---------------------------------------------------------------- the table

RESIDUAL = {"residual": "residual|low"}
TARGETS = {
    "haar_dwt2": Target(
        ops.haar_dwt2,
        st.fixed_dictionaries({"x": latents(), "level": LEVEL, "backend": BACKEND}),
        fits_dwt,
        {"x": "latents"},
    ),
    "haar_idwt2": Target(ops.haar_idwt2, coefficients(), fits_idwt, {"coeffs": "bands", "size": "size|transform"}),
    "split_low_band": Target(
        ops.split_low_band,
        st.fixed_dictionaries({"x": latents(), "level": LEVEL, "backend": BACKEND}),
        fits_split,
        {"x": "latents"},
    ),
    "merge_low_band": Target(ops.merge_low_band, parts(), fits_merge, RESIDUAL),
    "sample_population": Target(
        ops.sample_population, population(), fits_population, {"residual": "residual|mean", "popsize": "popsize|draws"}
    ),
    "update_elites": Target(
        ops.update_elites,
        elites(),
        fits_elites,
        {"scores": "scores|low", "elite_scores": "elite_scores|elite_low", "mean": "mean|low"},
    ),
    "resize_normalize": Target(ops.resize_normalize, IMAGES, fits_images),
    "spectral.split": Target(
        spectral.split,
        st.fixed_dictionaries({"x": latents(), "wavelet": WAVELET, "level": LEVEL, "backend": BACKEND}),
        fits_split,
        {"x": "latents"},
    ),
    "spectral.merge": Target(spectral.merge, parts(wavelet=True), fits_merge, RESIDUAL | {"wavelet": "wavelet|low"}),
    "search": Target(ses_fast.search, SEARCH, fits_search, {"wavelet_name": "wavelet"}),
    "evolve": Target(ses_fast.evolve, SEARCH, fits_search, {"wavelet_name": "wavelet"}),
    "SESConfig": Target(
        SESConfig,
        CONFIG,
        fits_config,
        {"wavelet_name": "wavelet", "latents": "base_latents|latents", "k_elites": "k_elites|refine"},
    ),
    "Preview": Target(Preview, PREVIEW, lambda preview, a: preview.facts),
    "EvolutionConfig": Target(
        EvolutionConfig,
        st.fixed_dictionaries(
            {
                "popsize": st.integers(1, 9),
                "k_elites": st.integers(1, 9),
                "wavelet_name": WAVELET,
                "dwt_level": st.integers(1, 9),
                "strategy": st.just("ses"),
            }
        ),
        lambda config, a: config.band,
        {"wavelet_name": "wavelet"},
    ),
    "start": Target(evolution.start, START, lambda state, a: evolution.ask(state)),
    "ask and tell": Target(asked_and_told, TELL, fits_tell, {"count": "count|low"}),
    "load_reward": Target(loaded, REWARD, lambda reward, a: None, {"name": "reward|rewards"}),
    "WeightedReward": Target(
        rewards.WeightedReward,
        WEIGHTED,
        lambda reward, a: None,
        {"rewards": "rewards", "weights": "weight|weights|weighted"},
    ),
    "batch.run": Target(
        batch_run,
        BATCH,
        fits_batch,
        {
            "out": "folder|out",
            "prompts": "prompts|prompt|line|source",
            "ses_reward_model": "ses_reward_model|reward|rewards",
        },
    ),
    "SearchResult.load": Target(
        reading(ses_fast.SearchResult.load), PATH, lambda found, a: None, {"path": "path|is no result"}
    ),
    "SESConfig.from_file": Target(reading(SESConfig.from_file), PATH, lambda found, a: None),
    "read_prompts": Target(reading(read_prompts), PATH, lambda found, a: None, {"path": "source"}),
    "SESConfig.call_from_file": Target(reading(SESConfig.call_from_file), PATH, lambda found, a: None),
    "SearchResult.save": Target(
        lambda path: found().save(path),
        st.fixed_dictionaries({"path": st.just("found.safetensors")}),
        lambda nothing, a: ses_fast.SearchResult.load(a["path"]),
    ),
    "set_backend": Target(
        backend_set,
        st.fixed_dictionaries({"name": st.sampled_from(["auto", "torch"])}),
        lambda x, a: None,
        {"name": "backend"},
    ),
    "enable and disable": Target(
        enabled_and_disabled,
        st.fixed_dictionaries({"pipe": st.just("tiny"), "compile": st.booleans()}),
        lambda pipe, a: None,
        PIPE,
    ),
    "disable": Target(
        ses_fast.disable,
        st.fixed_dictionaries({"pipe": st.builds(lambda: ses_fast.enable(stock()))}),  # not the one of other targets
        lambda pipe, a: None,
        PIPE,
    ),
    "from_pil": Target(
        scored_by_pictures,
        st.fixed_dictionaries({"function": st.just(brightness), "batched": st.booleans()}),
        lambda scores, a: scores.shape == (2,),
    ),
    "VLMReward": Target(rewards.VLMReward, VLM, lambda reward, a: reward.name, {"options": "options|fields"}),
    "distributed.start": Target(
        distributed.start,
        st.fixed_dictionaries({"timeout": st.timedeltas(timedelta(seconds=1))}),
        lambda ranks, a: ranks.size,
    ),
    "ranks_of": Target(
        distributed.ranks_of,
        st.fixed_dictionaries({"process_group": st.none() | st.just("auto")}),
        lambda ranks, a: ranks.size,
    ),
    "embedded.captions": Target(
        embedded.captions, st.fixed_dictionaries({"heldout": st.just(True)}), lambda captions, a: captions[0]
    ),
    "embedded.judge": Target(
        embedded.judge,
        st.fixed_dictionaries(
            {
                "image": st.just(noise(3, 32, 32)) | st.just(noise(1, 3, 16, 24)),
                "caption": st.just("two red squares left of three blue rings"),
            }
        ),
        lambda facts, a: facts["all"],
    ),
    "embedded.load_reward": Target(
        embedded.load_reward,
        st.fixed_dictionaries(
            {"name": st.just("jpeg"), "heldout": st.just(False), "device": DEVICE, "dtype": WIDE},
        ),
        lambda reward, a: reward(noise(1, 3, 16, 16).clamp(-1, 1), "two red squares left of three blue rings"),
        {"name": "reward|rewards", "heldout": "heldout|held-out"},
        ("name", "heldout"),
    ),
    "embedded.load_pipeline": Target(
        embedded.load_pipeline,
        st.fixed_dictionaries({"device": DEVICE, "torch_dtype": WIDE}),
        lambda pipe, a: pipe.dit,
        {"torch_dtype": "dtype"},
    ),
    "a pipeline's call": Target(called, CALL, fits_call, {"ses_reward_model": "ses_reward_model|reward|rewards"}),
}


def search_for_faults(name: str, **options: Any) -> None:
    @settings(**options)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        hold(TARGETS[name], data)

    run()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd path is one in a folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_any_arguments(name: str) -> None:
    search_for_faults(name, max_examples=EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_more_arguments(name: str) -> None:
    """Others each time: what it finds, it prints as a call that shows the fault again."""
    search_for_faults(name, max_examples=EXAMPLES * MANY, derandomize=False)
