"""Runs the benches of ops and rewards where it is: `python -m bench.ops [--out FILE.json] [arguments of pytest]`.

Such as -k haar. Writes bench/results/<device>-<date>.json and prints the table of it. Of pytest-benchmark's own JSON
only the figures are kept, not the machine's name.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from bench.table import table

RESULTS = Path(__file__).parent / "results"
BENCHES = [Path(__file__).parent / name for name in ("test_bench_ops.py", "test_bench_rewards.py")]


def result_path(about: dict, suffix: str = "") -> Path:
    """bench/results/<device>-<date><suffix>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return RESULTS / f"{device}-{about['date']}{suffix}.json"


def compact(recorded: dict) -> dict:
    """pytest-benchmark's JSON as {environment, copy_GB/s, rows, rewards}.

    A row: {row, ms, spread, bytes, GB/s, floor, graph_*}; a reward's: {reward, ms, spread, images/s, times, bar, ...}.
    """
    rows, rewards, copy_speed = [], [], None
    for benchmark in recorded["benchmarks"]:
        row = benchmark["extra_info"]
        about = row.pop("environment")
        copy_speed = row.pop("copy_GB/s", copy_speed)
        stats = benchmark["stats"]
        timed = {"ms": stats["median"] * 1e3, "spread": stats["iqr"] / stats["median"]}
        (rewards if "reward" in row else rows).append(row | timed)
    return {"environment": about, "copy_GB/s": copy_speed, "rows": rows, "rewards": rewards}


def main(argv: list[str] | None = None) -> int:
    """The command; pytest's exit status. A red bench writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder, "recorded.json")
        status = pytest.main(["-q", *map(str, BENCHES), f"--benchmark-json={recorded}", *rest])
        if status:
            return int(status)
        result = compact(json.loads(recorded.read_text()))
    out = arguments.out or result_path(result["environment"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(f"\n{table(result)}\n\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
