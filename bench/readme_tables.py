"""The README's performance table, made of bench/results: `python -m bench.readme_tables [--check]`."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.collect import stored
from bench.end_to_end import MODELS, ROWS
from bench.ops import result_path

README = Path(__file__).parents[1] / "README.md"
SECTION = re.compile(r"(?<=<!-- bench:performance -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
COLUMNS = ("model", "search", "measured on", "documented flow, s", "ses_fast, s", "x faster", "overhead", "x floor")


def latest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last result of each kind of device."""
    by_device = {}
    for result in sorted(results, key=lambda each: each["environment"]["date"]):
        by_device[result["environment"]["device"], result["environment"]["cores"]] = result
    return list(by_device.values())


def performance(results: list[dict[str, Any]]) -> str:
    """A line for each model, way to search and device; "not measured" where no result has it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, model in MODELS.items():
        for way, row in ROWS.items():
            what = [f"{name}, {model.call['num_inference_steps']} steps", row.what]
            cells = []
            for result in latest(results):
                figures = (result["searches"] or {"models": {}})["models"].get(name, {"rows": {}})
                if way in figures["rows"]:
                    cells.append([*what, *_cells(result, name, way)])
            for line in cells or [[*what, "not measured", *[""] * (len(COLUMNS) - 3)]]:
                lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _cells(result: dict[str, Any], name: str, way: str) -> list[str]:
    about, figures = result["environment"], result["searches"]["models"][name]
    row = figures["rows"][way]
    place = about["device"]
    if MODELS[name].device == "cpu":
        place += f", {result['searches']['threads']} threads"
    return [
        f"[{place}](bench/results/{result_path(about, '-bench').with_suffix('.md').name}), budget {figures['budget']}",
        f"{figures['rows']['baseline']['seconds']['total']:.2f}",
        f"{row['seconds']['total']:.2f}",
        f"{row['x baseline']:.2f}",
        f"{row['overhead']:.1%}",
        f"{row['x floor']:.2f} ({row['x floor, attention at its own rate']:.2f})",
    ]


def written(readme: str, results: list[dict[str, Any]]) -> str:
    """The README with its table made anew. Raises ValueError where the marks are missing."""
    if not SECTION.search(readme):
        raise ValueError("the README lacks <!-- bench:performance --> and <!-- /bench -->, each on its own line")
    return SECTION.sub(lambda _: performance(results), readme, count=1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where it is out of date")
    arguments = parser.parse_args()
    now = written(README.read_text(), stored())
    if arguments.check:
        sys.exit(now != README.read_text() and "the README's table is out of date: run `make readme-tables`")
    README.write_text(now)


if __name__ == "__main__":
    main()
