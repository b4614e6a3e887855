"""What a comparison found: figures of its stored lines, and their Markdown."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .methods import MIX, NOTHING, PARTS, RANDOM, REFERENCE, SES, STRATEGY
from .statistics import Interval, bootstrap, mean_of, seconds_to

HALVES = {"even": 0, "odd": 1}  # one chooses on the even prompts, and reports on the odd
TARGET = 50  # the budget whose reward by the reference is to be reached
KINDS = ("reward", "held_out", "oracle")
Rows = Sequence[Mapping[str, Any]]


def summarise(settings: Mapping[str, Any], scores: Rows, times: Rows) -> dict[str, Any]:
    """All figures as JSON: by task, half and method."""
    budgets = settings["budgets"]
    target = budgets.index(TARGET) if TARGET in budgets else len(budgets) - 1
    figures: dict[str, Any] = {"settings": dict(settings), "target": budgets[target], "tasks": {}}
    for task in settings["tasks"]:
        costs = costs_of(settings, [row for row in times if row["task"] == task])
        halves = {}
        for half, rest in HALVES.items():
            rows = sorted(
                (row for row in scores if row["task"] == task and row["prompt"] % 2 == rest), key=lambda r: r["prompt"]
            )
            halves[half] = {"prompts": [row["prompt"] for row in rows]} | (
                {"methods": _half(settings, rows, costs, target)} if rows else {"methods": {}}
            )
        figures["tasks"][task] = halves
    figures["chosen"] = chosen(figures)
    figures["refused"] = {row["method"]: row["refused"] for row in times if "refused" in row}
    return _plain(figures)


def costs_of(settings: Mapping[str, Any], times: Rows) -> dict[str, dict[str, list[float]]]:
    """Each method's seconds and forwards of the final image's size, by budget: medians over the rounds.

    A forward of half the size counts by its share of the seconds of a full one in a batch.
    """
    found: dict[str, dict[str, list[float]]] = {}
    medians = {}
    for name in settings["methods"]:
        rounds = [row["costs"] for row in times if row["method"] == name and "costs" in row]
        if rounds:
            medians[name] = [
                {key: median(costs[i][key] for costs in rounds) for key in rounds[0][i]}
                for i in range(len(settings["budgets"]))
            ]
    full = next((_seconds_a_forward(medians[name]) for name in (SES.name, RANDOM.name) if name in medians), math.nan)
    for name, each in medians.items():
        method = settings["methods"][name]
        batched = medians.get(method["scores_of"] or name, each)  # one by one each costs more, of either size
        share = _seconds_a_forward(batched) / full if method["preview"]["scale"] > 1 else 1.0
        found[name] = {
            "seconds": [cost["seconds"] for cost in each],
            "forwards": [share * cost["previews"] + cost["finals"] for cost in each],
            "a preview's forward": [share] * len(each),
        }
    return found


def _seconds_a_forward(costs: Sequence[Mapping[str, float]]) -> float:
    return costs[-1]["denoise"] / max(1, costs[-1]["previews"])


def _half(
    settings: Mapping[str, Any], rows: Rows, costs: Mapping[str, Mapping[str, list[float]]], target: int
) -> dict[str, Any]:
    """The figures of each method over the prompts of `rows`."""
    means = {name: _means(rows, method["scores_of"] or name) for name, method in settings["methods"].items()}
    found = {}
    for name, mine in means.items():
        if not mine:
            continue
        budgets = []
        for i, budget in enumerate(settings["budgets"]):
            figures: dict[str, Any] = {"budget": budget}
            figures |= {key: values[i] for key, values in costs.get(name, {}).items()}
            figures |= {kind: mean_of(values[:, i].tolist()) for kind, values in mine.items()}
            for other in (REFERENCE.name, RANDOM.name, SES.name):
                for kind in KINDS if other in means and other != name else ():
                    if kind in mine and kind in means[other]:
                        apart = mine[kind][:, i] - means[other][kind][:, i]
                        figures[f"{kind} to {other}"] = mean_of(apart.tolist())
            for kind, values in mine.items() if NOTHING.name in means and name != NOTHING.name else ():
                if kind != "diversity":
                    apart = values[:, i] - means[NOTHING.name][kind][:, i]
                    figures[f"{kind} to {NOTHING.name}"] = mean_of(apart.tolist())
            budgets.append(figures)
        summary: dict[str, Any] = {"budgets": budgets}
        if REFERENCE.name in means and name in costs and REFERENCE.name in costs:
            theirs, seconds = (
                {kind: means[REFERENCE.name][kind][:, target] for kind in mine if kind in KINDS},
                costs[name]["seconds"],
            )
            summary["share of the reference's time"] = time_share(
                mine["reward"], seconds, theirs["reward"], costs[REFERENCE.name]["seconds"][target]
            )
            summary["reached"] = _reached(settings["budgets"], mine, seconds, theirs)
        found[name] = summary
    return found


def _reached(
    budgets: Sequence[int], mine: Mapping[str, Tensor], seconds: Sequence[float], theirs: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The first budget whose mean reward is the reference's, and what its answers are worth beside the reference's."""
    for i, budget in enumerate(budgets):
        if mine["reward"][:, i].mean() >= theirs["reward"].mean():
            apart = {kind: mean_of((mine[kind][:, i] - values).tolist()) for kind, values in theirs.items()}
            return {"budget": budget, "seconds": seconds[i], **apart}
    return None


def _means(rows: Rows, name: str) -> dict[str, Tensor]:  # [prompts, budgets] each
    """A method's values, averaged over seeds."""
    if name not in rows[0]["methods"]:
        return {}
    return {
        kind: torch.tensor([row["methods"][name][kind] for row in rows], dtype=torch.float64, device="cpu").mean(1)
        for kind in rows[0]["methods"][name]
    }


def time_share(
    rewards: Tensor,  # [prompts, budgets]
    seconds: Sequence[float],  # of each budget
    level: Tensor,  # [prompts] that the reference reaches
    reference: float,  # its seconds
) -> Interval:
    """The time in which the mean reward is the reference's, over the reference's; over resampled prompts."""

    def share(rows: Tensor) -> float:
        reached = seconds_to(level[rows].mean().item(), seconds, rewards[rows].mean(0).tolist())
        return reached / reference

    return bootstrap(share, len(level))


def chosen(figures: Mapping[str, Any]) -> str | None:
    """The method that reaches the reference's reward soonest on the even prompts, by its slowest task."""
    shares: dict[str, float] = {}
    for halves in figures["tasks"].values():
        for name, each in halves["even"]["methods"].items():
            share = each.get("share of the reference's time")
            value = math.inf if share is None else share.value
            shares[name] = max(shares.get(name, 0.0), value)
    shares.pop(REFERENCE.name, None)
    name = min(shares, key=lambda each: shares[each], default=None)
    return None if name is None or math.isinf(shares[name]) else name


def _plain(value: Any) -> Any:
    """As JSON: no infinity and no NaN, but null."""
    if isinstance(value, Interval):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plotted(figures: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """What `report.draw_comparison` draws, of the odd prompts: rewards, seconds, forwards by task and method."""
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    for task, halves in figures["tasks"].items():
        half = halves["odd"] if halves["odd"]["methods"] else halves["even"]
        curves[task] = {
            name: {
                key: [each[key][0] if key == "reward" else each[key] for each in method["budgets"]]
                for key in ("seconds", "forwards", "reward")
            }
            for name, method in half["methods"].items()
            if "seconds" in method["budgets"][0]
        }
    return curves


# ---------------------------------------------------------------- Markdown


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
        "all of its images; rewards come from processes of one thread, whose methods share the images of equal noises. "
        "A half-size forward counts by its measured share of a full one.",
        f"Chosen on the even prompts, by the time to the reference's reward at budget {figures['target']} on the task "
        f"where that takes longest: **{figures['chosen'] or 'none reaches it on all tasks'}**.",
    ]
    parts += [f"Not possible here: {name}. {why}." for name, why in figures["refused"].items()]
    for task, halves in figures["tasks"].items():
        for half in reversed(HALVES):
            methods, count = halves[half]["methods"], len(halves[half]["prompts"])
            words = "to report on" if half == "odd" else "to choose on"
            parts.append(f"## Task {task}, {half} prompts ({words}; {count})")
            parts += _tables(figures, methods) if methods else ["None measured yet."]
    return "\n\n".join([*parts, *_by_rewards(figures)])


def _by_rewards(figures: Mapping[str, Any]) -> list[str]:
    """What a search with each reward, or with a sum, gains by all of them; of the half to report on."""
    tasks, budgets = figures["tasks"], figures["settings"]["budgets"]
    target = budgets.index(figures["target"])
    names = [*(task for task in tasks if "+" not in task), *KINDS[1:]]
    lines = []
    for method in (RANDOM.name, SES.name, STRATEGY.name, MIX.name):
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
            f"Time to the reward that the reference reaches at budget {figures['target']}, over the time it takes; and"
        )
        tables += [f"{words} what the first budget that reaches it gives, beside the reference's:", _reaching(methods)]
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
        line = [name, _share(method), str(reached.get("budget", "")), _number(reached.get("seconds"), missing="")]
        lines.append(line + [_figure(reached.get(kind), signed=True) for kind in kinds])
    named = [kind.replace("_", "-") for kind in kinds]
    return table(("method", "share of the reference's time", "budget", "seconds", *named), lines)


def _parts(methods: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    columns = ("left out", "seconds", "time to the reference's reward, of its time", "reward", "forwards")
    left_out = {"nothing": MIX, **PARTS}
    lines = [
        [
            f"{part} ({method.what})" if part != "nothing" else part,
            _number(rows[method.name].get("seconds")),
            _share(methods[method.name]),
            _figure(rows[method.name].get("reward")),
            _number(rows[method.name].get("forwards"), 0),
        ]
        for part, method in left_out.items()
        if method.name in rows
    ]
    return table(columns, lines)


def _share(method: Mapping[str, Any]) -> str:
    share = method.get("share of the reference's time")
    if share is None:
        return "not measured"
    if share[0] is None:
        return "never" if share[1] is None else f"never [{share[1]:.2f}, ...]"
    return f"{share[0]:.2f} [{share[1]:.2f}, {'...' if share[2] is None else format(share[2], '.2f')}]"


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
