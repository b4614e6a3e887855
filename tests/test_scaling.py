"""The figures of docs/scaling.md are those of bench/scaling.py."""

from pathlib import Path

import pytest

from bench import scaling
from bench.scaling import Stages

STAGES = Stages(denoise=2.0, decode=1.0, reward=0.5)  # an image 3 s, a preview 3.5


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


def test_the_document_holds_the_tables(capsys):
    scaling.main([])
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    assert capsys.readouterr().out.strip() in text
