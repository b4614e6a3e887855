"""Many searches in one process: memory, threads and open files stay what they were."""

import ctypes
import functools
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BASE, QUIET, SES, tiny_z_image

import ses_fast
from ses_fast import Preview, SESConfig
from ses_fast.strategies import STRATEGIES

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")

PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory, after what can be given back was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def handles() -> tuple[int, int]:
    """(threads of Python and of libraries, open files)"""
    tasks, files = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
    assert tasks >= threading.active_count()
    return tasks, files


def plain(number: int, folder: Path) -> None:
    """One of every strategy in turn, whose results are saved, loaded and gone on with; every seventh one fails."""
    base = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(number))
    names = list(STRATEGIES)
    options = {"strategy": names[number % len(names)], "seed": number, "progress": False, "batch_size": 3}

    def objective(candidates: torch.Tensor) -> torch.Tensor:
        if number % 7 == 6 and candidates.shape[0] == 2:
            raise ArithmeticError("as a reward may")
        return candidates.mean((1, 2, 3))

    wavelet = ("db1", "db2", "sym3")[number % 3]
    try:
        found = ses_fast.evolve(base, objective, 15, 5, 3, wavelet, 2, **options)
    except ArithmeticError as error:
        found = error.ses_result  # type: ignore[attr-defined]
    found.save(folder / "search.safetensors")
    again = ses_fast.SearchResult.load(folder / "search.safetensors")
    ses_fast.evolve(
        base, lambda z: z.mean((1, 2, 3)), 20, 5, 3, wavelet, 2, state=again.state, **options | {"seed": None}
    )


def in_a_pipeline(number: int, folder: Path) -> None:
    """Every kind of preview in turn; every seventh reward fails. Prompts, seeds and sizes change."""
    previews = [Preview(), Preview(scale=2), Preview(race=[(0.9, 0.5)]), Preview(refine=1), Preview(cfg=False)]
    config = SESConfig(**QUIET | {"preview": previews[number % 5], "batch_size": (1, 2, "auto")[number % 3]})
    if number % 35 == 0:  # enabled and disabled again and again, too
        ses_fast.enable(ses_fast.disable(pipe()))

    def reward(images: torch.Tensor, prompt: str) -> torch.Tensor:
        if number % 7 == 6:
            raise ArithmeticError("as a reward may")
        return images.float().mean((1, 2, 3))

    own = {
        "prompt": f"a red fox {number}",
        "seed": number,
        "height": 64 + 32 * (number % 2),
        "ses_reward_model": reward,
    }
    try:
        pipe()(**BASE | SES | own, ses_eval_budget=6, ses_config=config)
    except ArithmeticError:
        assert number % 7 == 6


@functools.cache
def pipe() -> Any:
    return ses_fast.enable(tiny_z_image())


# (which, searches, the one from which nothing may grow, by how much): each kind of search comes before that one.
LONG = (300, 20, 0.02)


@pytest.mark.parametrize(
    "search, searches, settled, most",
    [
        pytest.param(plain, 60, 35, 0.01, id="plain-short"),
        pytest.param(in_a_pipeline, 30, 15, 0.01, id="pipeline-short"),
        pytest.param(plain, *LONG, id="plain-300", marks=pytest.mark.slow),
        pytest.param(in_a_pipeline, *LONG, id="pipeline-300", marks=pytest.mark.slow),
    ],
)
def test_nothing_grows(
    search: Callable[[int, Path], None],
    searches: int,
    settled: int,
    most: float,
    tmp_path: Path,
    record_property: Callable,
) -> None:
    before, held = 0, (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(searches):
            search(number, tmp_path)
            if number == settled - 1:
                before, held = resident(), handles()
    after = resident()
    record_property("growth", after / before - 1)
    print(f"{before / 2**20:.1f} MB after {settled} searches, {after / 2**20:.1f} MB after {searches}; {handles()}")
    assert handles() == held
    assert after < before * (1 + most), f"{(after - before) / 2**20:.1f} MB more than {before / 2**20:.0f} MB"
