"""What a comparison found: figures of its stored lines, as JSON."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .methods import MIX, NOTHING, RANDOM, REFERENCE, SES, is_default
from .statistics import Interval, interval_of, mean_of, place_of, resampled, value_at

HALVES = {"even": 0, "odd": 1}  # one chooses on the even prompts, and reports on the odd
TARGET = 50  # the budget whose reward by the reference is to be reached
KINDS = ("reward", "held_out", "oracle")
YARDSTICKS = (REFERENCE.name, RANDOM.name, SES.name, MIX.name)  # what each method is set beside
Rows = Sequence[Mapping[str, Any]]


def summarise(settings: Mapping[str, Any], scores: Rows, times: Rows) -> dict[str, Any]:
    """All figures as JSON: by task, half and method."""
    budgets = settings["budgets"]
    target = budgets.index(TARGET) if TARGET in budgets else len(budgets) - 1
    figures: dict[str, Any] = {"settings": dict(settings), "target": budgets[target], "tasks": {}}
    shares = shares_of(settings, times)
    for task in settings["tasks"]:
        costs = costs_of(settings, [row for row in times if row["task"] == task], shares)
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
    figures["default"] = next((name for name, each in settings["methods"].items() if is_default(each)), None)
    figures["refused"] = {row["method"]: row["refused"] for row in times if "refused" in row}
    return _plain(figures)


def costs_of(
    settings: Mapping[str, Any], times: Rows, shares: Mapping[str, float]
) -> dict[str, dict[str, list[float]]]:
    """Each method's seconds and forwards of the final image's size, by budget: medians over the rounds.

    shares: of a full forward, that a preview's counts for.
    """
    found: dict[str, dict[str, list[float]]] = {}
    medians, apart = {}, {}
    for name in settings["methods"]:
        rounds = [row["costs"] for row in times if row["method"] == name and "costs" in row]
        if rounds:
            medians[name] = [
                {key: median(costs[i][key] for costs in rounds) for key in rounds[0][i]}
                for i in range(len(settings["budgets"]))
            ]
            by_budget = [[costs[i]["seconds"] for costs in rounds] for i in range(len(settings["budgets"]))]
            apart[name] = [(max(each) - min(each)) / max(median(each), 1e-9) for each in by_budget]
    for name, each in medians.items():
        share = shares[name]
        found[name] = {
            "seconds": [cost["seconds"] for cost in each],
            "seconds apart": apart[name],
            "forwards": [share * cost["previews"] + cost["finals"] for cost in each],
            "a preview's forward": [share] * len(each),
        }
    return found


def shares_of(settings: Mapping[str, Any], times: Rows) -> dict[str, float]:
    """By method: the share of a full forward's seconds, in a batch, that a preview's takes; 1 where it is of full size.

    The median over rounds and tasks, which it does not depend on, of two methods that were timed in one turn.
    """
    known = {
        (row["round"], row["task"], row["method"]): _seconds_a_forward(row["costs"]) for row in times if "costs" in row
    }
    turns = dict.fromkeys((number, task) for number, task, _ in known)
    plain = _of_full_size(settings)
    full = {turn: next((known[*turn, name] for name in plain if (*turn, name) in known), math.nan) for turn in turns}
    found = {}
    for name, method in settings["methods"].items():
        batched = method["scores_of"] or name  # one by one each costs more, of either size
        here = [known[*turn, batched] / full[turn] for turn in turns if (*turn, batched) in known]
        here = [share for share in here if math.isfinite(share)]
        half = method["preview"]["scale"] > 1
        found[name] = 1.0 if not half else median(here) if here else math.nan
    return found


def _of_full_size(settings: Mapping[str, Any]) -> list[str]:
    """Methods of whose forwards one of half the size is a share: batched as it is, the plain ones first."""
    others = [
        name
        for name, method in settings["methods"].items()
        if method["strategy"] and method["preview"]["scale"] == 1 and method["batch_size"] == "auto"
        if not method["documented"]
    ]
    return [SES.name, RANDOM.name, *others]


def _seconds_a_forward(costs: Sequence[Mapping[str, float]]) -> float:
    return costs[-1]["denoise"] / max(1, costs[-1]["previews"])


def _half(
    settings: Mapping[str, Any], rows: Rows, costs: Mapping[str, Mapping[str, list[float]]], target: int
) -> dict[str, Any]:
    """The figures of each method over the prompts of `rows`."""
    means = {name: _means(rows, method["scores_of"] or name) for name, method in settings["methods"].items()}
    means = {name: mine for name, mine in means.items() if mine}
    found: dict[str, dict[str, Any]] = {}
    for name, mine in means.items():
        budgets = []
        for i, budget in enumerate(settings["budgets"]):
            figures: dict[str, Any] = {"budget": budget}
            figures |= {key: values[i] for key, values in costs.get(name, {}).items()}
            figures |= {kind: mean_of(values[:, i].tolist()) for kind, values in mine.items()}
            for other in YARDSTICKS:
                for kind in KINDS if other in means and other != name else ():
                    if kind in mine and kind in means[other]:
                        apart = mine[kind][:, i] - means[other][kind][:, i]
                        figures[f"{kind} to {other}"] = mean_of(apart.tolist())
            for kind, values in mine.items() if NOTHING.name in means and name != NOTHING.name else ():
                if kind != "diversity":
                    apart = values[:, i] - means[NOTHING.name][kind][:, i]
                    figures[f"{kind} to {NOTHING.name}"] = mean_of(apart.tolist())
            budgets.append(figures)
        found[name] = {"budgets": budgets}
    if REFERENCE.name in means and REFERENCE.name in costs:
        theirs = {kind: values[:, target] for kind, values in means[REFERENCE.name].items() if kind in KINDS}
        limit = costs[REFERENCE.name]["seconds"][target]
        times = {name: times_to(theirs["reward"], means[name], costs[name]) for name in means if name in costs}
        for name, (places, seconds) in times.items():
            found[name]["share of the reference's time"] = interval_of([each / limit for each in seconds])
            if MIX.name in times and name != MIX.name:
                pairs = zip(seconds, times[MIX.name][1], strict=True)
                found[name]["share of the mix's time"] = interval_of([_ratio(*pair) for pair in pairs])
            if not math.isinf(places[0]):
                reached = {"budget": value_at(places[0], settings["budgets"]), "seconds": seconds[0]}
                found[name]["reached"] = reached | _worth_there(places, means[name], theirs)
            else:
                found[name]["reached"] = None
    return found


def times_to(
    level: Tensor,  # [prompts]
    mine: Mapping[str, Tensor],  # "reward": [prompts, budgets]
    costs: Mapping[str, Sequence[float]],  # "seconds" of each budget
) -> tuple[list[float], list[float]]:
    """Where among its budgets (see `place_of`), and in which seconds, a method's mean reward is the level's: over all
    prompts, then over resampled ones. Its seconds are taken as they were measured.
    """
    pairs = zip(resampled(level).tolist(), resampled(mine["reward"]).tolist(), strict=True)
    places = [place_of(*pair) for pair in pairs]
    return places, [value_at(place, costs["seconds"]) for place in places]


def _worth_there(
    places: Sequence[float], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, Interval]:
    """What the answers at those places are worth beside `theirs`; of resampled prompts on which the level is never
    reached those of the last budget.
    """
    found = {}
    for kind, values in theirs.items():
        rows = zip(places, resampled(mine[kind]).tolist(), resampled(values).tolist(), strict=True)
        found[kind] = interval_of([value_at(min(place, len(row) - 1), row) - their for place, row, their in rows])
    return found


def _ratio(one: float, other: float) -> float:
    return math.nan if math.isinf(one) and math.isinf(other) else one / other


def _means(rows: Rows, name: str) -> dict[str, Tensor]:  # [prompts, budgets] each
    """A method's values, averaged over seeds."""
    if name not in rows[0]["methods"]:
        return {}
    return {
        kind: torch.tensor([row["methods"][name][kind] for row in rows], dtype=torch.float64, device="cpu").mean(1)
        for kind in rows[0]["methods"][name]
    }


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
