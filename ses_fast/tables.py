"""The report of a comparison in Markdown: what was found in words, then its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from .methods import CONTROLS, METHODS, MIX, NOTHING, PARTS, RANDOM, REFERENCE, SES
from .summary import HALVES, KINDS

CEM = CONTROLS[0].name  # of the whole noise
RACED = METHODS["best of N raced"].name
Found = Mapping[str, Any]  # a method's figures


def markdown(figures: Mapping[str, Any]) -> str:
    """The report."""
    settings = figures["settings"]
    machine, budgets = settings["machine"], settings["budgets"]
    about = ", ".join(f"{name} {value}" for name, value in {**settings["about"], **machine}.items())
    parts = [
        "# Methods at equal cost",
        f"{about}. Budgets {', '.join(map(str, budgets))}; {settings['seeds']} seed(s) a prompt; all methods start "
        "from the same noises. Rewards are of the final image at full fidelity. [..] holds the truth with 95 %, by a "
        "bootstrap over prompts, differences paired by prompt. Seconds are medians over the "
        f"{machine['rounds']} prompt(s) on which all methods took turns, in one process with all threads, each making "
        f"all of its images{_apart(figures)}; the intervals take them as measured. Rewards come from processes of one "
        "thread, whose methods share the images of equal noises. A half-size forward counts by its measured share of a "
        "full one.",
        f"Chosen on the even prompts, by the time to the reference's reward at budget {figures['target']} on the task "
        f"where that takes longest: **{_chosen(figures)}**.",
        *_bullets(findings(figures)),
    ]
    parts += [f"Not possible here: {name}. {why}." for name, why in figures["refused"].items()]
    for task, halves in figures["tasks"].items():
        for half in reversed(HALVES):
            methods, count = halves[half]["methods"], len(halves[half]["prompts"])
            words = "to report on" if half == "odd" else "to choose on"
            parts.append(f"## Task {task}, {half} prompts ({words}; {count})")
            parts += _tables(figures, methods) if methods else ["None measured yet."]
    return "\n\n".join([*parts, *_by_rewards(figures)])


def _chosen(figures: Mapping[str, Any]) -> str:
    timed = any(
        "share of the reference's time" in each
        for halves in figures["tasks"].values()
        for each in halves["even"]["methods"].values()
    )
    return figures["chosen"] or ("none reaches it on all tasks" if timed else "none, since the reference is not here")


def _apart(figures: Mapping[str, Any]) -> str:
    if figures["settings"]["machine"]["rounds"] < 2:
        return ""
    target = figures["settings"]["budgets"].index(figures["target"])
    methods = [each for halves in figures["tasks"].values() for each in halves["odd"]["methods"].values()]
    spreads = [each["budgets"][target].get("seconds apart") for each in methods]
    known = sorted(spread for spread in spreads if spread is not None)
    return f", which lie {known[len(known) // 2]:.0%} apart in the median of the methods" if known else ""


# ---------------------------------------------------------------- in words


def findings(figures: Mapping[str, Any]) -> list[str]:
    """What the prompts to report on say, a sentence for each question; none where none of these is measured."""
    tasks = {task: halves["odd"]["methods"] for task, halves in figures["tasks"].items()}
    tasks = {task: methods for task, methods in tasks.items() if methods}
    if not tasks:
        return []
    budgets, target, default, best = (
        *(figures["settings"]["budgets"], figures["target"]),
        *(figures["default"], figures["chosen"]),
    )
    at = budgets.index(target)
    told = [
        f"Is {SES.name} above random, and above CEM on the whole noise, at {target} evaluations (the paper's claim)? "
        + _each(tasks, lambda methods: _claim(methods, SES.name, (RANDOM.name, CEM), at))
    ]
    if default is not None:
        told.append(
            f"Is {default}, the call's own default, above random and above the reference at {target} evaluations? "
            + _each(tasks, lambda methods: _claim(methods, default, (RANDOM.name, REFERENCE.name), at))
        )
    names = dict.fromkeys(name for name in (default, best, RANDOM.name, RACED) if name is not None)
    told.append(
        f"In which share of its time is the reward reached that the reference reaches at budget {target}? "
        + _each(tasks, lambda methods: "; ".join(_in_time(methods, name) for name in names if name in methods))
    )
    told.append("Does plain best of N win? " + _each(tasks, lambda methods: _winner(methods, at)))
    return told


def _each(tasks: Mapping[str, Any], say: Any) -> str:
    return " ".join(f"**{task}**: {say(methods)}." for task, methods in tasks.items())


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["## What it says, on the prompts to report on", "\n".join(f"- {line}" for line in lines)] if lines else []


def _claim(methods: Mapping[str, Found], name: str, others: Sequence[str], at: int) -> str:
    """Whether a method's reward is above each of the others', with the differences."""
    words, signs = [], []
    if name not in methods:
        return f"not known ({name} was not compared)"
    for other in others:
        apart = beside(methods, name, other, at)
        signs.append(None if apart is None else sign_of(apart))
        words.append(f"{_figure(apart, signed=True)} beside {other}" if apart else f"{other} was not compared")
    verdict = "yes" if all(sign == 1 for sign in signs) else "not known" if None in signs else "not seen"
    return f"{'no' if -1 in signs else verdict} ({', '.join(words)})"


def beside(methods: Mapping[str, Found], one: str, other: str, at: int) -> list[float | None] | None:
    """The reward of one less the other's at the budget of that place, with its interval; None where it is unknown."""
    if one not in methods or other not in methods:
        return None
    apart = methods[one]["budgets"][at].get(f"reward to {other}")
    if apart is None and (turned := methods[other]["budgets"][at].get(f"reward to {one}")) is not None:
        apart = [None if each is None else -each for each in (turned[0], turned[2], turned[1])]
    return apart


def sign_of(apart: Sequence[float | None]) -> int:
    """1 where the whole interval is above 0, -1 where it is below, 0 where it holds 0 or is unknown."""
    _, low, high = apart
    return 0 if low is None or high is None else (low > 0) - (high < 0)


def _in_time(methods: Mapping[str, Found], name: str) -> str:
    """The share of the reference's time, and what the answers are then worth by the other judges."""
    reached = methods[name].get("reached") or {}
    kinds = [kind for kind in KINDS[1:] if kind in reached]
    judged = ", ".join(f"{kind.replace('_', '-')} {_figure(reached[kind], signed=True)}" for kind in kinds)
    return f"{name} {_share(methods[name])}{f' ({judged})' if judged else ''}"


def _winner(methods: Mapping[str, Found], at: int) -> str:
    plain = [name for name in (RANDOM.name, RACED) if name in methods]
    shares = {name: each["share of the reference's time"][0] for name, each in methods.items() if _reaches(each)}
    shares.pop(REFERENCE.name, None)
    quickest = min(shares, key=shares.__getitem__, default=None)
    highest = max(methods, key=lambda name: methods[name]["budgets"][at]["reward"][0])
    where = [
        *(["in time to that reward"] if quickest in plain else []),
        *(["in reward at equal evaluations"] if highest in plain else []),
    ]
    verdict = "not compared" if not plain else f"yes, {' and '.join(where)}" if where else "no"
    soonest = f"the quickest is {quickest}, " if quickest else ""
    return f"{verdict} ({soonest}the highest reward is {highest}'s)"


def _reaches(method: Found) -> bool:
    return (method.get("share of the reference's time") or [None])[0] is not None


# ---------------------------------------------------------------- tables


def _by_rewards(figures: Mapping[str, Any]) -> list[str]:
    """What a search with each reward, or with a sum, gains by all of them; of the half to report on."""
    tasks, budgets = figures["tasks"], figures["settings"]["budgets"]
    target = budgets.index(figures["target"])
    names = [*(task for task in tasks if "+" not in task), *KINDS[1:]]
    lines = []
    for method in (RANDOM.name, SES.name, METHODS["two_stage"].name, MIX.name):
        for task, halves in tasks.items():
            if method not in halves["odd"]["methods"] or NOTHING.name not in halves["odd"]["methods"]:
                continue
            row = halves["odd"]["methods"][method]["budgets"][target]
            kinds = ["reward" if name == task else name if name in KINDS else f"by {name}" for name in names]
            gains = [_figure(row.get(f"{kind} to {NOTHING.name}"), signed=True) for kind in kinds]
            lines.append([method, task, *gains])
    if not lines or len(tasks) < 2:
        return []
    return [
        "## By which reward to search",
        f"Gains over the image without a search at budget {figures['target']}, on the odd prompts. `a+b` is the sum of "
        "both, each standardised by ten whole noises of the prompt.",
        table(("method", "searched with", *(name.replace("_", "-") for name in names)), lines),
    ]


def _tables(figures: Mapping[str, Any], methods: Mapping[str, Any]) -> list[str]:
    budgets = figures["settings"]["budgets"]
    target = budgets.index(figures["target"])
    rows = {name: each["budgets"][target] for name, each in methods.items()}
    tables = [f"At budget {figures['target']}:", _equal(rows, figures["settings"]["methods"])]
    if any("reached" in method for method in methods.values()):
        words = (
            f"Time to the reward that the reference reaches at budget {figures['target']}, over the time it takes; and "
            "what the answers are worth then beside the reference's. Between two budgets all is taken as linear; where "
            "the first is above that reward already, the time is the first's:"
        )
        tables += [words, _reaching(methods)]
    tables.append("Reward by budget:")
    tables.append(
        table(
            ("method", *map(str, budgets)),
            [[name, *(_figure(each["reward"]) for each in method["budgets"])] for name, method in methods.items()],
        )
    )
    if MIX.name in methods:
        tables += [f"The parts of `{MIX.name}` ({MIX.what}), each left out:", _parts(methods, rows)]
    return tables


def _equal(rows: Mapping[str, Any], what: Mapping[str, Any]) -> str:
    columns = ["method", "forwards", "seconds", "reward"]
    columns += [f"to {REFERENCE.name}", f"to {RANDOM.name}"]
    kinds = [kind for kind in KINDS[1:] if any(kind in row for row in rows.values())]
    for kind in kinds:
        columns += [kind.replace("_", "-"), f"to {REFERENCE.name}"]
    diversity = any("diversity" in row for row in rows.values())
    lines = []
    for name, row in rows.items():
        line = [f"{name}: {what[name]['what']}", _number(row.get("forwards"), 0), _number(row.get("seconds"))]
        line.append(_figure(row.get("reward")))
        line += [_figure(row.get(f"reward to {other}"), signed=True) for other in (REFERENCE.name, RANDOM.name)]
        for kind in kinds:
            line += [_figure(row.get(kind)), _figure(row.get(f"{kind} to {REFERENCE.name}"), signed=True)]
        lines.append(line + ([_figure(row.get("diversity"))] if diversity else []))
    return table((*columns, *(["diversity"] if diversity else [])), lines)


def _reaching(methods: Mapping[str, Any]) -> str:
    kinds = [kind for kind in KINDS if any(kind in (each.get("reached") or {}) for each in methods.values())]
    lines = []
    for name, method in methods.items():
        reached = method.get("reached") or {}
        line = [name, _share(method), *(_number(reached.get(key), 1, "") for key in ("budget", "seconds"))]
        lines.append(line + [_figure(reached.get(kind), signed=True) for kind in kinds])
    named = [kind.replace("_", "-") for kind in kinds]
    return table(("method", "share of the reference's time", "evaluations", "seconds", *named), lines)


def _parts(methods: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    columns = ("left out", "seconds", "time to the reference's reward, of its time", "of the mix's time to it")
    left_out = {"nothing": MIX, **PARTS}
    lines = [
        [
            f"{part} ({method.what})" if part != "nothing" else part,
            _number(rows[method.name].get("seconds")),
            _share(methods[method.name]),
            _share(methods[method.name], "the mix's") if method != MIX else "",
            _figure(rows[method.name].get("reward")),
            _figure(rows[method.name].get(f"reward to {MIX.name}"), signed=True),
            _number(rows[method.name].get("forwards"), 0),
        ]
        for part, method in left_out.items()
        if method.name in rows
    ]
    return table((*columns, "reward", "to the mix's", "forwards"), lines)


def _share(method: Mapping[str, Any], whose: str = "the reference's") -> str:
    share = method.get(f"share of {whose} time")
    if share is None:
        return "not measured"
    if share[0] is None:
        return "not reached" if share[1] is None else f"not reached [{share[1]:.2f}, ...]"
    return _figure(share)


def _figure(interval: Sequence[float | None] | None, signed: bool = False) -> str:
    if interval is None or interval[0] is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (format(each, f"{sign}.2f") if each is not None else "..." for each in interval)
    return f"{value} [{low}, {high}]"


def _number(value: float | None, places: int = 2, missing: str = "not measured") -> str:
    return missing if value is None else f"{value:.{places}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
