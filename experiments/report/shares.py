"""Score against the share of the training data, and where content overtakes distance.

A family is a task and its variants that train on shares of the same data; the test items are the
same for all.
"""

import fractions
from collections.abc import Mapping, Sequence

import matplotlib as mpl

from experiments.report.build import REFERENCE, Report, Row, is_content
from experiments.report.figures import (
    SETTINGS,
    Picture,
    figure_of,
    finish,
    styles,
)
from experiments.report.tables import Table, cell

TITLE = "Score against the share of the training data"


def families(report: Report) -> Mapping[str, Sequence[Row]]:
    """Tasks by the name that their variants share, smallest share first, where there are several.

    A variant's name stands in brackets behind the task's.
    """
    found: dict[str, list[Row]] = {}
    for facts in report.tasks:
        if facts["share_of_train"] is not None:
            found.setdefault(facts["task"].partition(" (")[0], []).append(facts)
    ordered = {name: sorted(one, key=_share) for name, one in found.items()}
    return {name: one for name, one in ordered.items() if len({*map(_share, one)}) > 1}


def _share(facts: Row) -> float:
    return facts["share_of_train"]


def _name(share: float) -> str:
    return str(fractions.Fraction(share).limit_denominator(1000))


def _rows(report: Report, family: Sequence[Row]) -> Mapping[str, list[Row | None]]:
    """By arm, its row at every share, None where it has no score."""
    at = [{row["name"]: row for row in report.of(facts["task"])[0]} for facts in family]
    names = dict.fromkeys(name for rows in at for name in rows)
    scored = {
        name: [
            rows.get(name) if rows.get(name, {}).get("mean") is not None else None for rows in at
        ]
        for name in names
    }
    return {name: rows for name, rows in scored.items() if any(rows)}


def table(report: Report, family: Sequence[Row]) -> Table:
    """Arms against shares."""
    rows = [[name, *map(cell, rows)] for name, rows in _rows(report, family).items()]
    return Table(["rule", *(f"{_name(_share(facts))} of train" for facts in family)], rows)


def sentences(report: Report, family: Sequence[Row]) -> list[str]:
    """For every rule without content, the share from which on learned attention is ahead."""
    found = []
    for name in _rows(report, family):
        if is_content(name):
            continue
        pairs = [_pair(report, facts["task"], name) for facts in family]
        if all(pairs):
            ahead = [pair["verdict"] == "b better" for pair in pairs if pair]
            behind = [pair["verdict"] == "a better" for pair in pairs if pair]
            found.append(_crossover(name, [*map(_share, family)], ahead, behind))
    return found


def _pair(report: Report, task: str, name: str) -> Row | None:
    _, verdicts = report.of(task)
    return next((v for v in verdicts if (v["a"], v["b"]) == (name, REFERENCE)), None)


def _crossover(
    name: str, shares: Sequence[float], ahead: Sequence[bool], behind: Sequence[bool]
) -> str:
    """Where `REFERENCE` is better than a rule at all larger shares and was not below."""
    first = len(shares)
    while first and ahead[first - 1]:
        first -= 1
    if first == len(shares):
        return (
            f"{REFERENCE} against {name}: no crossover seen, it is not ahead at the largest share."
        )
    if first == 0:
        return f"{REFERENCE} against {name}: ahead at every share, no crossover seen."
    before = "behind" if behind[first - 1] else "not ahead"
    return (
        f"{REFERENCE} overtakes {name} between {_name(shares[first - 1])} of train, where it is "
        f"{before}, and {_name(shares[first])}."
    )


def picture(report: Report, name: str, family: Sequence[Row]) -> Picture:
    """A line an arm over the shares."""
    look = styles(report.rows)
    by_arm = _rows(report, family)
    with mpl.rc_context(SETTINGS):
        figure, axes = figure_of(3.5)
        for arm, rows in by_arm.items():
            drawn = [
                (share, row) for share, row in zip(map(_share, family), rows, strict=True) if row
            ]
            places = [share for share, _ in drawn]
            axes.plot(places, [row["mean"] for _, row in drawn], **look[arm].lined(), label=arm)
            for place, row in drawn:
                if row["ci95"]:
                    axes.plot([place] * 2, row["ci95"], color=look[arm].color, linewidth=1.0)
        axes.set_xscale("log", base=2)
        shares = [*map(_share, family)]
        axes.set_xticks(shares, [*map(_name, shares)])
        axes.set_xlabel("share of the training data")
        scored = [row for rows in by_arm.values() for row in rows if row]
        finish(figure, axes, scored[0], scored)
    caption = "Mean over seeds with its 95 % interval; all arms take the same steps at every share."
    return Picture(name, "shares", TITLE, caption, figure)
