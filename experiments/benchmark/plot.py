"""The figure of a report: every ratio with its rounds, beside its target."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.benchmark import tables
from experiments.report.figures import INK, MUTED, SETTINGS, to_svg

MET, MISSED = "#0072b2", "#d55e00"
_STYLES = {"met": (MET, "o"), "missed": (MISSED, "D")}
_OTHER = (MUTED, "s")
_GAP = 0.4


def svg(report: Mapping[str, Any]) -> str:
    """The ratios of a report as SVG, one line each, grouped by case."""
    with mpl.rc_context(SETTINGS):
        figure = _figure(_groups(report))
    return to_svg(figure)


def _groups(report: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Cases and their ratios that have a value."""
    pairs = [
        (case["name"], [t for t in case["targets"] if t["to"] is not None and t["value"]])
        for case in report["cases"]
    ]
    return [(name, targets) for name, targets in pairs if targets]


def _figure(groups: list[tuple[str, list[Mapping[str, Any]]]]) -> Figure:
    lines = sum(1 + _GAP + len(targets) for _, targets in groups)
    figure = Figure(figsize=(8.4, 1.1 + 0.22 * max(lines, 2)), layout="constrained")
    axes = figure.add_subplot()
    place, ticks, labels = 0.0, [], []
    for name, targets in groups:
        axes.annotate(
            name, (0, place), (-6, 0), xycoords=("axes fraction", "data"), annotation_clip=False,
            textcoords="offset points", ha="right", va="center", weight="bold",
        )  # fmt: skip
        ticks.append(place)
        labels.append("")
        place -= 1
        for target in targets:
            _line(axes, place, target)
            ticks.append(place)
            labels.append(tables.compared(target))
            place -= 1
        place -= _GAP
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place, 1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ratio (log scale): median, and least to most of the rounds")
    figure.legend(handles=_legend(), loc="outside upper left", ncols=5)
    return figure


def _line(axes: Any, place: float, target: Mapping[str, Any]) -> None:
    """A ratio: its range, its median with the number, and a bracket that opens to what is good."""
    color, marker = _STYLES.get(target["verdict"], _OTHER)
    value = target["value"]
    axes.plot([value["least"], value["most"]], [place, place], color=color, linewidth=2)
    axes.plot(value["median"], place, marker, color=color)
    for limit, bracket in ((target["at_least"], "$[$"), (target["at_most"], "$]$")):
        if limit is not None:
            axes.plot(limit, place, marker=bracket, color=INK, markersize=8, linestyle="none")
    axes.annotate(
        tables.digits(value["median"]), (1, place), (4, 0), xycoords=("axes fraction", "data"),
        textcoords="offset points", va="center", annotation_clip=False,
    )  # fmt: skip


def _legend() -> list[Line2D]:
    def one(color: str, marker: str, label: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)

    return [
        one(MET, "o", "met"),
        one(MISSED, "D", "missed"),
        one(MUTED, "s", "no target, or no verdict"),
        one(INK, "$[$", "target: at least"),
        one(INK, "$]$", "target: at most"),
    ]
