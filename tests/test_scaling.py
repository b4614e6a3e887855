"""The figures of docs/scaling.md are those of bench/scaling.py."""

from pathlib import Path

import pytest

from bench import scaling
from bench.scaling import Stages

STAGES = Stages(preview=3.5, image=3.0)


# (budget, popsize, GPUs) -> how many previews one makes, counted by hand
@pytest.mark.parametrize(
    "budget, popsize, gpus, expected",
    [(50, 10, 1, 50), (50, 10, 8, 10), (50, 10, 64, 5), (50, 10, 10, 5), (23, 10, 4, 3 + 3 + 1), (3, 10, 2, 2)],
)
def test_turns(budget, popsize, gpus, expected):
    assert scaling.turns(budget, popsize, gpus) == expected


def test_seconds():
    assert scaling.by_population(STAGES, 2, 4, 20, 10) == 2 * (6 * 3.5 + 6)
    assert scaling.by_prompts(STAGES, 9, 4, 20) == 3 * (20 * 3.5 + 6)
    assert scaling.by_prompts(STAGES, 9, 1, 20) == scaling.by_population(STAGES, 9, 1, 20, 10)


def test_least_times():
    assert scaling.least(2.0, 1.0, 0.5) == STAGES


def result(date, device="CPU", budget=10, **models):
    rows = {"baseline": {"seconds": dict.fromkeys(("denoise", "decode", "reward", "final"), 99.0)}}
    eager = {"denoise": 20.0, "decode": 10.0, "reward": 5.0, "final": 3.0, "total": 38.0, "prompt": 1.0}
    found = {
        name: {"budget": budget, "steps": 8, "rows": rows | ({"eager": {"seconds": eager}} if measured else {})}
        for name, measured in models.items()
    }
    environment = {"device": device, "date": date, "commit": "abc"}
    return {"environment": environment, "searches": {"threads": 2, "models": found} if models else None}


def test_measured_stages():
    """The last run of each model and device; a run without it hides nothing."""
    results = [
        result("2026-01-02", budget=20, a=True),
        result("2026-01-01", a=True, b=True),
        result("2026-01-03", a=False),
        result("2026-01-04"),
        result("2026-01-01", device="GPU", a=True),
    ]
    assert scaling.measured(results) == {
        "a, 8 steps: measured, CPU, 2 threads, 2026-01-02, commit abc": Stages(preview=35 / 20, image=3.0),
        "b, 8 steps: measured, CPU, 2 threads, 2026-01-01, commit abc": STAGES,
        "a, 8 steps: measured, GPU, 2 threads, 2026-01-01, commit abc": STAGES,
    }


def test_the_command_prints_what_the_document_holds(capsys):
    scaling.main([])
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    assert capsys.readouterr().out.strip() in text and "embedded, 8 steps: measured, AMD EPYC, 2 threads" in text
