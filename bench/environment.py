"""What a result was measured on, for the head of every result file; and the clock."""

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "diffsynth", "transformers", "PyWavelets", "numpy")


def environment(device: torch.device | str = "cpu") -> dict:
    """The device measured, cores, versions, date and commit ("-dirty" when the tree differs from it)."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Where there is no git, what the variable COMMIT says."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # no such program
        described = ""
    return described or os.environ.get("COMMIT") or None


def clock(device: torch.device | str) -> float:
    """Seconds, when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
