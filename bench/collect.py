"""One JSON and one Markdown file of a run: `python -m bench.collect out/ops.json out/cpu.json out/searches.json`.

Each is told by its name, and one that is not there is said to be not measured. Writes
bench/results/<device>-<date>-bench.json and .md.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.ops import RESULTS, result_path
from bench.table import table

# Imported when there is such a part: they need diffsynth.
PARTS = {
    "ops": ("Operators, beside a copy of as many bytes, and rewards", table),
    "cpu": (
        "Operators on the CPU, beside what they replace",
        lambda result: import_module("bench.cpu").markdown(result["rows"]),
    ),
    "searches": (
        "Whole searches, beside the documented flow",
        lambda result: import_module("bench.end_to_end").table(result),
    ),
}


def collected(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The parts in one, under what they were measured on; raises ValueError where there is none, or two devices."""
    if not parts:
        raise ValueError(f"nothing was measured: none of {', '.join(PARTS)}")
    places = [part["environment"] for part in parts.values()]
    if len({(place["device"], place["commit"]) for place in places}) > 1:
        raise ValueError(f"these are of different devices or commits: {', '.join(parts)}")
    return {"environment": places[-1], **{name: parts.get(name) for name in PARTS}}


def markdown(result: dict[str, Any]) -> str:
    """What was measured on what, and the tables."""
    about = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        f"{about['cores']} CPU cores; commit {about['commit']}; Python {about['python']}, {versions}.",
    ]
    for name, (title, text) in PARTS.items():
        lines += ["", f"## {title}", "", text(result[name]) if result[name] else "Not measured."]
    return "\n".join(lines) + "\n"


def stored() -> list[dict[str, Any]]:
    """Every file of bench/results that this module wrote."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-bench.json"))]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help=f"named {', '.join(PARTS)}.json")
    parser.add_argument("--into", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if unknown := {path.stem for path in arguments.files} - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    result = collected({path.stem: json.loads(path.read_text()) for path in arguments.files if path.is_file()})
    arguments.into.mkdir(parents=True, exist_ok=True)
    path = arguments.into / result_path(result["environment"], "-bench").name
    path.write_text(json.dumps(result, allow_nan=False, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(f"{path}\n{path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
