"""The tables of the READMEs, made of bench/results: `python -m bench.readme_tables [--check]`.

What stands between `<!-- bench:NAME -->` and `<!-- /bench -->` is made anew, for each line of SECTIONS.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import cpu, embedded
from bench.collect import stored
from bench.end_to_end import MODELS, ROWS
from bench.ops import RESULTS, result_path
from bench.table import lines_of

ROOT = Path(__file__).parents[1]
COLUMNS = ("model", "search", "batch", "measured on", "documented flow, s", "ses_fast, s", "x faster", "at most x")
NOTES = (
    "x faster: the median of the rounds' own ratios. "
    "At most x: the documented flow's own time over the floor, the bound that the model's arithmetic sets. "
    "The reward's own preprocessing counts as reward, not as overhead."
)
NOTHING = "Not measured yet.\n"
Results = list[dict[str, Any]]


def latest(results: Results) -> Results:
    """The last result of each kind of device."""
    by_device = {}
    for result in sorted(results, key=lambda each: each["environment"]["date"]):
        by_device[result["environment"]["device"], result["environment"]["cores"]] = result
    return list(by_device.values())


def part(result: dict[str, Any], name: str, inner: str) -> Any:
    """`inner` of a part of a result; empty where the part was not measured."""
    return (result[name] or {}).get(inner, {})


def performance(results: Results) -> str:
    """A line for each model, way to search and device; "not measured" where no result has it."""
    rows = []
    for name, model in MODELS.items():
        for way, row in ROWS.items():
            what = [f"{name}, {model.call['num_inference_steps']} steps", row.what]
            # A later result without this row hides nothing.
            having = [each for each in results if way in part(each, "searches", "models").get(name, {}).get("rows", {})]
            rows += [[*what, *_search(result, name, way)] for result in latest(having)]
            if not having:
                rows.append([*what, "", "not measured", *[""] * 6])
    return "\n".join([*lines_of((*COLUMNS, "overhead", "x floor"), rows), "", NOTES]) + "\n"


def _search(result: dict[str, Any], name: str, way: str) -> list[str]:
    figures = result["searches"]["models"][name]
    row, flow = figures["rows"][way], figures["rows"]["baseline"]["seconds"]["total"]
    threads = f", {result['searches']['threads']} threads" if MODELS[name].device == "cpu" else ""
    return [
        str(row["batch"]),
        f"{_place(result, threads)}, budget {figures['budget']}",
        f"{flow:.2f}",
        f"{row['seconds']['total']:.2f}",
        f"{row['x baseline']:.2f}",
        f"{flow / row['floor']['total']:.2f}",
        f"{row['overhead']:.1%}",
        f"{row['x floor']:.2f} ({row['x floor, attention at its own rate']:.2f})",
    ]


def _place(result: dict[str, Any], more: str = "") -> str:
    about = result["environment"]
    return f"[{about['device']}{more}](bench/results/{result_path(about, '-bench').with_suffix('.md').name})"


def operators(results: Results) -> str:
    """On a CPU the last comparison with what the ops replace; on GPUs the kernels beside a copy of as many bytes."""
    results = sorted(results, key=lambda each: each["environment"]["date"])
    blocks = []
    there = [each for each in results if each["cpu"]]
    for result in there[-1:]:
        threads = f", {result['cpu']['threads']} threads"
        blocks += [f"{_place(result, threads)}:", cpu.markdown(result["cpu"]["rows"])]
    if not there:
        blocks.append("On a CPU: not measured yet.")
    kernels = {}
    for result in results:
        rows = [row for row in part(result, "ops", "rows") if "graph_us" in row and row["row"].endswith("|triton")]
        if rows:
            kernels[result["environment"]["device"]] = (result, rows)
    for result, rows in kernels.values():
        cells = [[row["row"].split("|")[0], f"{row['graph_us']:.2f}", f"{row['graph_floor']:.2f}"] for row in rows]
        table = lines_of(("kernel", "in a CUDA graph, us", "x byte floor"), cells)
        blocks += [f"{_place(result)}:", "\n".join(table)]
    if not kernels:
        blocks.append("On a GPU: not measured yet.")
    return "\n\n".join(blocks) + "\n"


def measured(results: Results) -> dict[str, Any] | None:
    """The last run of bench.embedded."""
    return max(results, key=lambda each: each["environment"]["date"], default=None)


def gains(results: Results) -> str:
    """The table of searches."""
    figures = measured([each for each in results if "search" in each])
    return embedded.search_table(figures) + "\n" if figures else NOTHING


def gains_and_headroom(results: Results) -> str:
    """Both tables, and what they were measured on."""
    figures = measured(results)
    if not figures:
        return NOTHING
    about = figures["environment"]
    head = (
        f"{about['device']}, {about['date']}, commit {about['commit']}; {figures['captions']} captions, "
        f"{figures['seconds']:.0f} seconds."
    )
    return f"{head}\n\n{embedded.to_markdown(figures)}\n"


def runs_of_embedded() -> Results:
    """Every file that bench.embedded wrote to bench/results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-embedded.json"))]


# The file, the name in its marks, what is written there, of which results.
SECTIONS: list[tuple[str, str, Callable[[Results], str], Callable[[], Results]]] = [
    ("README.md", "performance", performance, stored),
    ("README.md", "operators", operators, stored),
    ("README.md", "embedded", gains, runs_of_embedded),
    ("ses_fast/embedded/README.md", "embedded", gains_and_headroom, runs_of_embedded),
]


def written(text: str, name: str, section: str) -> str:
    """The text with a section made anew. Raises ValueError where its marks are missing."""
    begin, end = f"<!-- bench:{name} -->\n", "<!-- /bench -->"
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no {begin.strip()} and {end}, each on its own line")
    return pattern.sub(lambda _: section, text, count=1)


def renewed(root: Path = ROOT) -> dict[Path, str]:
    """Every file of SECTIONS as it should be."""
    texts: dict[Path, str] = {}
    for file, name, make, results in SECTIONS:
        path = root / file
        texts[path] = written(texts.get(path) or path.read_text(), name, make(results()))
    return texts


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where one is out of date")
    arguments = parser.parse_args(argv)
    old = {path: text for path, text in renewed().items() if path.read_text() != text}
    if arguments.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in old)
        sys.exit(f"out of date: {names}; run `make readme-tables`" if old else 0)
    for path, text in old.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
