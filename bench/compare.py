"""What moved since the last committed run on the same kind of device: `python -m bench.compare [result.json]`.

Compares ratios to a reference of the same run (of an op to a copy of as many bytes, of a search to the documented
flow), never times: another day's clock, or neighbours, move both. A ratio has moved when it is further off than both
runs' own spread explains.
"""

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ops import RESULTS

LEAST = 0.15  # a change below this is never called one
SPREADS = 2.0  # nor one below so many of the runs' spreads


@dataclass(frozen=True)
class Ratio:
    """Lower is better; `spread` is relative."""

    value: float
    spread: float


def ratios(result: dict[str, Any]) -> dict[str, Ratio]:
    """Every ratio of a result file by its name."""
    found = {}
    for row in (result["ops"] or {"rows": []})["rows"]:
        found[row["row"]] = Ratio(row.get("graph_floor", row["floor"]), row["spread"])
    for row in (result["ops"] or {}).get("rewards", []):
        found[f"reward: {row['reward']}|stock"] = Ratio(1 / row["times"], row["spread"])
    for row in (result["cpu"] or {"rows": []})["rows"]:
        found[f"{row['what']} {tuple(row['shape'])}|beside what it replaces"] = Ratio(1 / row["times"], row["spread"])
    for name, figures in (result["searches"] or {"models": {}})["models"].items():
        for way, row in figures["rows"].items():
            if way != "baseline":
                each = row["x baseline, all"]
                found[f"search {name}|{way}"] = Ratio(
                    1 / row["x baseline"], (max(each) - min(each)) / row["x baseline"]
                )
    return found


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each ratio that changed beyond the noise, the worst first; one for each that is gone or new."""
    before, after = ratios(old), ratios(new)
    changes = []
    for name in before.keys() & after.keys():
        change = after[name].value / before[name].value
        noise = max(LEAST, SPREADS * (before[name].spread + after[name].spread))
        if not 1 / (1 + noise) <= change <= 1 + noise:
            changes.append((change, noise, name))
    lines = [
        f"{'slower' if change > 1 else 'faster'} x{max(change, 1 / change):.2f} (noise x{1 + noise:.2f}): {name}"
        for change, noise, name in sorted(changes, reverse=True)
    ]
    lines += [f"no longer measured: {name}" for name in sorted(before.keys() - after.keys())]
    return lines + [f"not measured before: {name}" for name in sorted(after.keys() - before.keys())]


def committed(like: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The last committed result of the same kind of device, and its name; `like` itself is not one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout

    found = []
    for path in git("ls-tree", "-r", "--name-only", "--full-tree", "HEAD", "bench/results").splitlines():
        if path.endswith("-bench.json"):
            commits = git("log", "--format=%H", "--diff-filter=AM", "--", f":/{path}").split()  # the newest first
            versions = (json.loads(git("show", f"{commit}:{path}")) for commit in commits)
            result = next((version for version in versions if version != like), None)
            if result and all(result["environment"][key] == like["environment"][key] for key in ("device", "cores")):
                found.append((result["environment"]["date"], path, result))
    return max(found, key=lambda each: each[:2])[1:] if found else None


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="the newest file of bench/results when not given")
    parser.add_argument("--against", type=Path, help="a file, instead of the last committed one")
    arguments = parser.parse_args(argv)
    files = [arguments.result] if arguments.result else RESULTS.glob("*-bench.json")
    results = {path: json.loads(path.read_text()) for path in files}
    if not results:
        parser.error("there is no result yet: run `make bench`")
    path, new = max(results.items(), key=lambda each: (each[1]["environment"]["date"], each[0].stat().st_mtime))
    if arguments.against:
        name, old = str(arguments.against), json.loads(arguments.against.read_text())
    elif last := committed(new):
        name, old = last
    else:
        print(f"{path}: no committed run on {new['environment']['device']}, {new['environment']['cores']} cores")
        return
    print(f"{path} against {name} (commit {old['environment']['commit']}):")
    print("\n".join(moved(old, new)) or "nothing moved beyond the noise")


if __name__ == "__main__":
    main()
