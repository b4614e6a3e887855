"""Puts a report of `ses-fast compare` or `ses-fast calibrate` into bench/results: `python -m bench.keep
out/compare/compare.json out/ses.md`.

Such a report says what was compared; here it is also told on what, when and at which commit, and named after that:
<device>-<date>-compare.json, <device>-<date>-calibrate.md. The date is the file's own. To be run where it was measured.
"""

import argparse
import datetime
import json
import re
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.ops import RESULTS, result_path

TITLE = "# Previews against full fidelity\n"  # of calibrate's report
ABOUT = re.compile(r"^Measured on (?P<device>.+), (?P<date>\d{4}-\d\d-\d\d), commit (?P<commit>\S+)\.$", re.MULTILINE)


def about(report: str) -> dict[str, str]:
    """The device, date and commit that a kept calibration names; empty where it names none."""
    found = ABOUT.search(report)
    return found.groupdict() if found else {}


def kept(path: Path, commit: str | None = None) -> tuple[str, str]:
    """(the name, the text) of a report as it is kept; commit: that was measured, None: the one of today's tree.

    Raises ValueError for a file that neither command wrote.
    """
    text = path.read_text()
    figures = _comparison(path, text) if path.suffix == ".json" else None
    device = figures["settings"]["machine"]["device"] if figures else "cuda" if torch.cuda.is_available() else "cpu"
    place = environment(device) | {"date": datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()}
    place["commit"] = commit or place["commit"]
    if figures:
        name = result_path(place, "-compare").name
        return name, json.dumps({**figures, "environment": place}, indent=1, allow_nan=False) + "\n"
    if not text.startswith(TITLE):
        raise ValueError(f"{path} is no report of ses-fast calibrate: it does not begin with {TITLE.strip()!r}")
    line = f"Measured on {place['device']}, {place['date']}, commit {place['commit']}.\n\n"
    plain = ABOUT.sub("", text.removeprefix(TITLE)).lstrip("\n")
    return result_path(place, "-calibrate").with_suffix(".md").name, f"{TITLE}\n{line}{plain}"


def _comparison(path: Path, text: str) -> dict[str, Any]:
    try:
        figures = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(figures, dict) or not {"settings", "target", "tasks", "chosen"} <= figures.keys():
        raise ValueError(f"{path} is no compare.json of ses-fast compare")
    return figures


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="compare.json, and calibrate's .md")
    parser.add_argument("--commit", help="that was measured (default: the one of this tree)")
    parser.add_argument("--into", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    try:
        found = [kept(path, arguments.commit) for path in arguments.files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, text in found:
        (arguments.into / name).write_text(text)
        print(arguments.into / name)


if __name__ == "__main__":
    main()
