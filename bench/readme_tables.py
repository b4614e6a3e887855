"""The tables of the READMEs and of the site: `python -m bench.readme_tables [--check]`.

What stands between `<!-- bench:NAME -->` and `<!-- /bench -->` is made anew, for each line of SECTIONS. Figures come
from bench/results, and where there is no file the section says that it is not measured.
"""

import argparse
import json
import posixpath
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import cpu, embedded, floor, keep, reference_tables, scaling
from bench.collect import stored
from bench.end_to_end import MODELS, ROWS
from bench.ops import RESULTS, result_path
from bench.table import lines_of
from ses_fast import summary, tables
from ses_fast.embedded import weights_digest
from ses_fast.methods import NOTHING as UNSEARCHED
from ses_fast.methods import RANDOM, REFERENCE

ROOT = Path(__file__).parents[1]
COLUMNS = ("model", "search", "batch", "measured on", "documented flow, s", "ses_fast, s", "x faster", "at most x")
NOTES = (
    "x faster: the median of the rounds' own ratios. "
    "At most x: the documented flow's own time over the floor, the bound that the model's arithmetic sets. "
    "The reward's own preprocessing counts as reward, not as overhead."
)
NOTHING = "Not measured yet.\n"
PLOT = "docs/compare.png"  # of the last comparison
FACTS = ("device", "date", "commit")
# What a file of bench/results is called after -> what it holds.
KINDS = {
    "bench": "operators, and whole searches beside the documented flow",
    "embedded": "the embedded model: what a noise alone is worth, and a search",
    "compare": "methods at equal cost (`ses-fast compare`)",
    "calibrate": "previews against full quality (`ses-fast calibrate`)",
    "floor": "the least times: counted, not measured",
}
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


def of_other_weights(about: Mapping[str, Any]) -> str:
    """A warning where figures of the embedded model are not of the weights in the package; empty for other models."""
    if about.get("model", "embedded") != "embedded" or about.get("weights") == weights_digest():
        return ""
    return " **Measured with earlier weights of the small model**, not with those in the package."


def gains_and_headroom(results: Results) -> str:
    """Both tables, and what they were measured on."""
    figures = measured(results)
    if not figures:
        return NOTHING
    about = figures["environment"]
    head = (
        f"{about['device']}, {about['date']}, commit {about['commit']}; {figures['captions']} captions, "
        f"{figures['seconds']:.0f} seconds.{of_other_weights(figures)}"
    )
    return f"{head}\n\n{embedded.to_markdown(figures)}\n"


def equal_cost(comparisons: Results, calibrations: Sequence[str] = ()) -> str:
    """Few methods of the last comparison, on the prompts to report on, what it says, and what the last calibration
    recommends; the whole is on the site. In few lines: the README has room for no more.
    """
    figures = last_comparison(comparisons)
    if figures is None:
        return NOTHING
    settings, at = figures["settings"], figures["settings"]["budgets"].index(figures["target"])
    tasks = {task: halves["odd"]["methods"] for task, halves in figures["tasks"].items() if halves["odd"]["methods"]}
    columns = ["noise found by", f"seconds ({' / '.join(tasks)})"]
    for task in tasks:
        columns += [f"{task} reward", "beside random", "time to `ses_search`'s"]
    rows = []
    for name in shown(figures):
        cells = [title(name), _seconds(tasks, name, at)]
        for methods in tasks.values():
            row, share = methods[name]["budgets"][at], methods[name].get("share of the reference's time")
            cells += [interval(row["reward"]), beside(row.get(f"reward to {RANDOM.name}"))]
            cells.append("" if share is None else "not reached" if share[0] is None else f"{share[0]:.2f} of its time")
        rows.append(cells)
    about, place = settings["about"], figures.get("environment", {})
    counts = dict.fromkeys(str(len(halves["odd"]["prompts"])) for halves in figures["tasks"].values())
    words = (
        f"{place.get('device', '')}, {place.get('date', '')}: model {about['model']}, {about.get('steps', '?')} steps, "
        f"{figures['target']} evaluations; means over {' and '.join(counts)} prompts, [..] holds the truth with 95 %."
        f"{of_other_weights(about)}"
    )
    said = [words, *in_words(figures, at), *map(recommended, calibrations[-1:])]
    plot = f"![reward over time]({PLOT})"
    return "\n".join([*lines_of(columns, rows), "", *(f"- {each}" for each in said), "", plot]) + "\n"


def in_words(figures: Mapping[str, Any], at: int) -> list[str]:
    """A sentence a reward: how the documented call's default stands beside random noises and the reference."""
    default, said = figures["default"], []
    verdicts = {1: "above", 0: "not told apart from", -1: "below"}
    names = {RANDOM.name: "random noises", REFERENCE.name: "`ses_search`"}
    for task, halves in figures["tasks"].items():
        methods = halves["odd"]["methods"]
        if default not in methods:
            continue
        apart = {words: tables.beside(methods, default, name, at) for name, words in names.items()}
        stands = [f"{verdicts[tables.sign_of(x)]} {words} ({interval(x, True)})" for words, x in apart.items() if x]
        if not stands:
            continue
        mine, theirs = (methods.get(name, {}).get("budgets") for name in (default, REFERENCE.name))
        seconds = [each[at].get("seconds") for each in (mine, theirs) if each]
        time = ""
        if len(seconds) == 2 and all(seconds):
            time = f", in {seconds[0] / seconds[1]:.2f} of the time of `ses_search`"
        said.append(f"Searched with {task}, the default, `{default}`, is {' and '.join(stands)}{time}.")
    return said


def recommended(report: str) -> str:
    """The last sentences of a report of `ses-fast calibrate`, after its last table."""
    return f"`ses-fast calibrate` on it: {' '.join(report.rpartition('|')[2].split())}"


def _seconds(tasks: Mapping[str, Any], name: str, at: int) -> str:
    found = [methods[name]["budgets"][at].get("seconds") for methods in tasks.values()]
    return " / ".join("" if each is None else f"{each:.1f}" for each in found)


def shown(figures: Mapping[str, Any]) -> list[str]:
    """The few methods that the README has room for."""
    names = (UNSEARCHED.name, REFERENCE.name, RANDOM.name, tables.RACED, figures["default"], figures["chosen"])
    known = [name for halves in figures["tasks"].values() for name in halves["odd"]["methods"]]
    return [name for name in dict.fromkeys(names) if name in known]


def title(name: str) -> str:
    """Of a method, for who knows DiffSynth's function and not our names."""
    return f"`ses_search` ({name})" if name == REFERENCE.name else name


def by_others(comparisons: Results) -> str:
    """What the same methods gain by their own reward, and by those that took no part."""
    figures = last_comparison(comparisons)
    if figures is None:
        return NOTHING
    warning = of_other_weights(figures["settings"]["about"]).strip()
    columns = ("searched with", "noise found by", "gain by that reward", "by a held-out one", "right images")
    at, rows = figures["settings"]["budgets"].index(figures["target"]), []
    for task, halves in figures["tasks"].items():
        for name in (name for name in shown(figures) if name != UNSEARCHED.name and name in halves["odd"]["methods"]):
            row = halves["odd"]["methods"][name]["budgets"][at]
            gains = [beside(row.get(f"{kind} to {UNSEARCHED.name}"), none="maybe none") for kind in summary.KINDS]
            rows.append([task, title(name), *gains])
    return "\n".join([*lines_of(columns, rows), *(["", warning] if warning else [])]) + "\n"


def interval(figures: Sequence[float | None], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return "{} [{}, {}]".format(*("..." if each is None else format(each, f"{sign}.2f") for each in figures))


def beside(apart: Sequence[float | None] | None, none: str = "as good") -> str:
    """The difference, and with `none` a mark where it may be none."""
    if apart is None:
        return ""
    _, low, high = apart
    mark = f": {none}" if low is not None and high is not None and low <= 0 <= high else ""
    return interval(apart, signed=True) + mark


def whole_comparison(comparisons: Results) -> str:
    """The report of the last comparison."""
    figures = last_comparison(comparisons)
    if figures is None:
        return NOTHING
    place = figures.get("environment", {})
    head = ", ".join(str(place[fact]) for fact in ("device", "date") if place.get(fact))
    report = demoted(tables.markdown(figures).partition("\n\n")[2])  # without its title, which the page has
    head += f", commit {place.get('commit')}.{of_other_weights(figures['settings']['about'])}"
    return f"{head}\n\n{report}\n\n![reward over time]({PLOT})\n"


def last_comparison(comparisons: Results) -> dict[str, Any] | None:
    return max(comparisons, key=lambda each: each.get("environment", {}).get("date", ""), default=None)


def reports(texts: Sequence[str]) -> str:
    """Reports of `ses-fast calibrate`, as it wrote them."""
    return "\n\n".join(demoted(text.strip()) for text in texts) + "\n" if texts else NOTHING


def demoted(markdown: str) -> str:
    """With its headings one level lower."""
    return re.sub(r"^#", "##", markdown, flags=re.MULTILINE)


def floors(results: Results) -> str:
    """The least times, of each device that they were counted for."""
    parts = []
    for result in results:
        rates = floor.Rates(**result["rates"])
        works = {
            name: {stage: floor.Work(**work) for stage, work in stages.items()}
            for name, stages in result["families"].items()
        }
        head = f"{result['device'].upper()}: {rates.matrix / 1e12:.4g} TFLOP/s and {rates.memory / 1e12:.4g} TB/s."
        parts.append(f"{head}\n\n{floor.table(works, rates, result['batch'], 50)}")
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def inventory(files: Mapping[str, dict[str, Any] | None]) -> str:
    """What was measured, and what never was. files: name -> its JSON, None of a page beside one."""
    rows, known = [], set()
    for name, content in files.items():
        kind = next((each for each in KINDS if f"-{each}." in name), None)
        if kind is None or content is None:
            continue
        known.add(kind)
        about = content.get("environment", {})
        facts = ["" if kind == "floor" and fact == "device" else str(about.get(fact) or "") for fact in FACTS]
        rows.append([f"[{name}](bench/results/{name})", KINDS[kind], *facts])
        known |= {"gpu"} if "NVIDIA" in facts[0] else set()
    missing = [words for kind, words in KINDS.items() if kind not in known]
    missing += [] if "gpu" in known else ["anything on a GPU"]
    table = lines_of(("file", "what", "measured on", "date", "commit"), rows)
    return "\n".join([*table, "", f"Never measured: {'; '.join(missing) or 'nothing of these'}."]) + "\n"


def every_file() -> dict[str, dict[str, Any] | None]:
    """Every file of bench/results by its name, and of a calibration's report what it says of itself."""
    files: dict[str, dict[str, Any] | None] = {}
    for path in sorted(RESULTS.iterdir()):
        report = {"environment": keep.about(path.read_text())} if path.stem.endswith("-calibrate") else None
        files[path.name] = json.loads(path.read_text()) if path.suffix == ".json" else report
    return files


def json_of(pattern: str) -> Callable[[], Results]:
    """Every file of bench/results with such a name, by their names."""
    return lambda: [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def texts_of(pattern: str) -> Callable[[], list[str]]:
    return lambda: [path.read_text() for path in sorted(RESULTS.glob(pattern))]


comparisons = json_of("*-compare.json")  # compare.json of `ses-fast compare`, by bench.keep
calibrations = texts_of("*-calibrate.md")
runs_of_embedded = json_of("*-embedded.json")

# The file, the name in its marks, what is written there, of what.
SECTIONS: list[tuple[str, str, Callable[[Any], str], Callable[[], Any]]] = [
    ("README.md", "gains", lambda found: equal_cost(*found), lambda: (comparisons(), calibrations())),
    ("docs/results/comparison.md", "comparison", whole_comparison, comparisons),
    ("docs/guides/limits.md", "others", by_others, comparisons),
    ("docs/results/comparison.md", "embedded", gains_and_headroom, runs_of_embedded),
    ("docs/results/calibration.md", "calibration", reports, calibrations),
    ("docs/results/speed.md", "performance", performance, stored),
    ("docs/results/speed.md", "operators", operators, stored),
    ("docs/results/floors.md", "floors", floors, json_of("*-floor.json")),
    ("docs/scaling.md", "scaling", scaling.section, stored),
    ("docs/how/strategies.md", "strategies", reference_tables.strategies, reference_tables.known_strategies),
    ("docs/how/kernels.md", "kernels", reference_tables.kernels, reference_tables.kernel_files),
    ("docs/results/index.md", "inventory", inventory, every_file),
    ("docs/reference/command.md", "command", reference_tables.commands, reference_tables.parsers),
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
    """Every file of SECTIONS as it should be. Links, which sections give from the repository's root, lead from it."""
    texts: dict[Path, str] = {}
    for file, name, make, source in SECTIONS:
        path = root / file
        here = posixpath.relpath(".", posixpath.dirname(file) or ".")
        section = re.sub(r"\]\((?=bench/results/|docs/)", f"]({'' if here == '.' else here + '/'}", make(source()))
        texts[path] = written(texts.get(path) or path.read_text(), name, section)
    return texts


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """The plot of a comparison."""
    from ses_fast.report import draw_comparison

    draw_comparison(summary.plotted(figures), path)


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
    if (figures := last_comparison(comparisons())) is not None:
        draw(figures, ROOT / PLOT)


if __name__ == "__main__":
    main()
