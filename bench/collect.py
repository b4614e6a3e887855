"""One JSON and one Markdown file of a run: `python -m bench.collect --ops ops.json --end-to-end end.json`.

Keeps of pytest-benchmark's JSON what its table and bench.compare read. Either part may be missing, and is then said to
be.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench import end_to_end
from bench import table as ops

RESULTS = Path(__file__).parent / "results"
STATS = ("median", "iqr", "min", "rounds")


def collected(of_ops: dict[str, Any] | None, of_searches: dict[str, Any] | None) -> dict[str, Any]:
    """The two in one; raises ValueError where both are missing."""
    benchmarks = [
        {"stats": {name: each["stats"][name] for name in STATS}, "extra_info": each["extra_info"]}
        for each in (of_ops or {}).get("benchmarks", [])
        if "row" in each["extra_info"]  # of one that failed
    ]
    if not benchmarks and of_searches is None:
        raise ValueError("nothing was measured: neither ops nor searches")
    about = of_searches["environment"] if of_searches else benchmarks[0]["extra_info"]["environment"]
    searches = of_searches or {"threads": None, "models": {}, "left_out": [], "failed": {}}
    return {"environment": about, **searches, "benchmarks": benchmarks}


def markdown(result: dict[str, Any]) -> str:
    """What was measured on what, and both tables."""
    about = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    threads = f", {result['threads']} CPU threads for the searches" if result["threads"] else ""
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        f"{about['cores']} CPU cores{threads}; commit {about['commit']}; Python {about['python']}, {versions}.",
        "",
        "## Searches",
        "",
        end_to_end.table(result) if result["models"] or result["left_out"] else "Not measured.",
        "",
        "## Operators",
        "",
        ops.table(result) if result["benchmarks"] else "Not measured.",
    ]
    return "\n".join(lines) + "\n"


def name_of(about: dict[str, Any]) -> str:
    """device-date, as the files are called."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    cores = "" if "nvidia" in device else f"-{about['cores']}-cores"
    return f"{device}{cores}-{about['date']}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--end-to-end", type=Path, help="bench.end_to_end's JSON")
    parser.add_argument("--into", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    parts = [
        json.loads(path.read_text()) if path and path.is_file() else None
        for path in (arguments.ops, arguments.end_to_end)
    ]
    result = collected(*parts)
    arguments.into.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, allow_nan=False, indent=1) + "\n"), (".md", markdown(result))):
        path = arguments.into / (name_of(result["environment"]) + suffix)
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
