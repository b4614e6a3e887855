"""Markers, the GPU rule, and settings that hold for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a download; read when huggingface_hub is imported
# One thread for each of xdist's workers and the processes that its tests start: every core has a worker. Without
# the name, since a pytest that a test starts is no worker (pytest-benchmark measures nothing in one).
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

from ses_fast._torchvision import declare_torchvision_ops

declare_torchvision_ops()  # before any test file imports diffsynth or transformers

# The models of the tests are tiny: on a machine with many cores, more threads cost more than they give.
torch.set_num_threads(min(2, torch.get_num_threads()))

# The same examples in every run, on every machine: a change is never blamed for what another has broken. A slow machine
# is no failure: what must not hang has a time limit of its own. The slow tests search at random.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="GPU tests fail, not skip, without a CUDA GPU")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("no CUDA GPU, and --require-gpu was given", pytrace=False)
    pytest.skip("no CUDA GPU")
