"""The Markdown table of an op bench's results: `python -m bench.table bench/results/<device>-<date>.json`."""

import json
import sys
from pathlib import Path

COLUMNS = ("what", "by", "ms", "GB/s", "x floor", "in a CUDA graph, us", "GB/s", "x floor")
GRAPH = (("graph_us", 2), ("graph_GB/s", 0), ("graph_floor", 2))


def table(result: dict) -> str:
    """One line a measurement: medians, the bytes' speed, and the ratio to a copy of as many bytes."""
    about = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    lines = [
        f"{about['device']}, {about['date']}, commit {about['commit']}; Python {about['python']}, {versions}. "
        f"A copy moves {result['copy_GB/s']:.0f} GB/s.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in result["rows"]:
        what, way = row["row"].split("|")
        cells = [what, way, f"{row['ms']:.3f}", f"{row['GB/s']:.1f}", f"{row['floor']:.2f}"]
        graph = [f"{row[name]:.{places}f}" for name, places in GRAPH if name in row] or ["", "", ""]
        lines.append("| " + " | ".join(cells + graph) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(json.loads(Path(name).read_text())) for name in sys.argv[1:]))
