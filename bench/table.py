"""The Markdown tables of an op bench's results: `python -m bench.table bench/results/<device>-<date>.json`."""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("what", "by", "ms", "GB/s", "x floor", "in a CUDA graph, us", "GB/s", "x floor")
GRAPH = (("graph_us", 2), ("graph_GB/s", 0), ("graph_floor", 2))
REWARDS = ("reward", "images/s", "stock images/s", "times faster", "bar", "ms an image", "x floor", "bar")


def lines_of(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def bar(words: str, met: bool) -> str:
    """What was to be reached, and whether it was."""
    return words if met else f"{words}, missed"


def table(result: dict[str, Any]) -> str:
    """One line a measurement: medians, the bytes' speed, and the ratio to a copy of as many bytes; then the rewards."""
    about = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    lines = [
        f"{about['device']}, {about['date']}, commit {about['commit']}; Python {about['python']}, {versions}.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        graph = [f"{row[name]:.{places}f}" for name, places in GRAPH if name in row] or ["", "", ""]
        rows.append([*row["row"].split("|"), f"{row['ms']:.3f}", f"{row['GB/s']:.1f}", f"{row['floor']:.2f}", *graph])
    if rows:
        lines += [f"A copy moves {result['copy_GB/s']:.0f} GB/s.", "", *lines_of(COLUMNS, rows), ""]
    if rewards := result.get("rewards"):
        lines += [
            "Rewards, a generation of ten pictures; stock: one by one through PIL. x floor: over the least time of the "
            "network's arithmetic and memory.",
            "",
            *lines_of(REWARDS, [_reward(row) for row in rewards]),
        ]
    return "\n".join(lines).strip()


def _reward(row: dict[str, Any]) -> list[str]:
    cells = [row["reward"], f"{row['images/s']:.1f}", f"{row['stock images/s']:.1f}", f"{row['times']:.2f}"]
    cells.append("" if row["bar"] is None else bar(f"at least {row['bar']:.0f}", row["times"] >= row["bar"]))
    if "x floor" not in row:
        return [*cells, "", "", ""]
    most = bar(f"at most {row['floor bar']:.0f}", row["x floor"] <= row["floor bar"])
    return [*cells, f"{row['ms an image']:.3f}", f"{row['x floor']:.2f}", most]


if __name__ == "__main__":
    print("\n\n".join(table(json.loads(Path(name).read_text())) for name in sys.argv[1:]))
