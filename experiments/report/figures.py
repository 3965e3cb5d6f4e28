"""Figures of a report: every rule keeps its colour, marker and line through all of them.

An SVG is deterministic and keeps its text as text. Colours are Okabe and Ito's, which people
with colour-blindness tell apart; markers and lines differ as well.
"""

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

from experiments.report.build import Report, Row
from experiments.report.load import Arm
from experiments.report.tables import PERCENT, bucket, column, score
from experiments.tasks.bleu import Score

INK, MUTED, GRID, PAPER = "#1a1a1a", "#6e6e6e", "#dddddd", "#ffffff"
STYLES = {
    "self": ("#8c8c8c", "s", ":"),
    "uniform": ("#e69f00", "<", ":"),
    "gaussian": ("#0072b2", "^", "-"),
    "exponential": ("#56b4e9", "v", "-."),
    "table": ("#009e73", "X", "-"),
    "raw": ("#d55e00", "D", "--"),
    "learned": (INK, "o", "-"),
    "learned * gaussian": ("#cc79a7", "P", "--"),
    "learned * table": ("#882255", "*", "-."),
    "mix(learned, gaussian)": ("#a08c00", "p", "-."),
}
OTHERS = [style for name, style in STYLES.items() if name != "learned"]
ON_DARK = {
    INK: "#ececec",
    MUTED: "#a3a3a3",
    GRID: "#3c4046",
    PAPER: "#16181c",
    "#0072b2": "#3d9bdc",
    "#882255": "#d0669a",
    "#009e73": "#22b78d",
}
BASELINE_LINES = (
    (0, (1, 1.5)),
    (0, (4, 2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attn_jax",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
}
WIDTH = 6.4
LINE, HANDLE = 84, 8
"""Letters of a legend that fit the width, and those that a handle takes."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a rule looks in every figure."""

    color: str
    marker: str
    line: Any
    hollow: bool = False

    def marked(self) -> dict[str, Any]:
        """Keyword arguments of a marker alone."""
        face = PAPER if self.hollow else self.color
        return {"color": self.color, "marker": self.marker, "markerfacecolor": face}

    def lined(self) -> dict[str, Any]:
        """Keyword arguments of a line with markers."""
        return {**self.marked(), "linestyle": self.line}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a task: its short name, what it shows in a sentence, and the figure."""

    task: str
    kind: str
    title: str
    caption: str
    figure: Figure

    @property
    def file(self) -> str:
        """The name of its SVG file."""
        return re.sub(r"[^a-z0-9]+", "_", f"{self.task} {self.kind}".lower()).strip("_") + ".svg"


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every arm: a known rule's own, an enlarged arm's hollow, others in turn."""
    others = iter(OTHERS * (1 + len(rows) // len(OTHERS)))
    known: dict[str, Style] = {}
    for row in rows:
        if row["rule"] not in known:
            known[row["rule"]] = Style(*STYLES.get(row["rule"]) or next(others))
        base = known[row["rule"]]
        if row["match"]:
            known[row["name"]] = Style(base.color, base.marker, (0, (2, 1)), hollow=True)
    return known


def pictures(report: Report, arms: Sequence[Arm], task: str) -> Iterator[Picture]:
    """The figures of one task, those left out for which there is nothing to draw."""
    rows = [row for row in report.of(task)[0] if row["mean"] is not None]
    if not rows:
        return
    facts = next(one for one in report.tasks if one["task"] == task)
    look = styles(report.rows)
    with mpl.rc_context(SETTINGS):
        yield _scores(task, rows, look)
        if rows[0]["by_distance"]:
            yield _by_distance(task, rows, facts, look)
        if any(arm.validation for arm in arms):
            yield _learning(task, arms, rows[0], look)
        yield _cost(task, rows, look)
        if len(rows[0]["by_group"]) > 1:
            yield _by_group(task, rows, look)


def to_svg(figure: Figure) -> str:
    """A figure as SVG, the same text for the same figure."""
    text = io.StringIO()
    with mpl.rc_context(SETTINGS):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()


def scores_by_step(found: Mapping[int, Sequence[Score]], split: str) -> Figure:
    """Scores of a corpus at every checkpoint of a run, a line each."""
    with mpl.rc_context(SETTINGS):
        figure, axes = figure_of(3.0)
        looks = (STYLES["learned"], STYLES["gaussian"])
        for look, scores in zip(looks, zip(*found.values(), strict=True), strict=False):
            values = [score.value for score in scores]
            axes.plot([*found], values, **Style(*look).lined(), label=scores[0].name)
        axes.set_xlabel("step")
        axes.set_ylabel(f"score of the {split} split, higher is better")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _legend(figure, axes)
    return figure


def _scores(task: str, rows: Sequence[Row], look: dict[str, Style]) -> Picture:
    """One line a rule: mean, interval and seeds; chance and baselines cross them."""
    references = _references(rows[0])
    rows = rows[::-1]
    figure, axes = figure_of(0.8 + 0.3 * len(rows))
    left, right = _limits(rows[0], [v for row in rows for v in row["per_seed"]], 0.1)
    for place, row in enumerate(rows):
        style = look[row["name"]]
        if row["ci95"]:
            axes.plot(row["ci95"], [place, place], color=style.color, linewidth=2.2)
        axes.plot(row["per_seed"], [place + 0.24] * len(row["per_seed"]), "|", color=style.color)
        axes.plot(row["mean"], place, **style.marked(), linestyle="none", markersize=7)
    wanted = [end for row in rows for end in row["ci95"] or []]
    left, right = _widened(left, right, [*wanted, *(value for _, value in references)], 1.0)
    for index, (name, value) in enumerate(references):
        off = "" if left <= value <= right else ", off the axis"
        label = f"{name}: {score(value, rows[0]['unit'])}{off}"
        line = BASELINE_LINES[index % len(BASELINE_LINES)]
        axes.axvline(value, color=MUTED, linestyle=line, linewidth=1.3, label=label)
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.grid(axis="y", visible=False)
    _score_axis(axes, rows[0], "x")
    _legend(figure, axes)
    caption = (
        "Mean over seeds with its 95 % interval; small ticks are seeds. Intervals that leave the "
        "axis are cut."
    )
    return Picture(task, "scores", "Score of each rule", caption, figure)


def _references(row: Row) -> list[tuple[str, float]]:
    """Chance and the baselines that exist on all items: another set of items is another score."""
    chance = [("chance", row["chance"])] if row["chance"] is not None else []
    full = [one for one in row["baselines"] if one["n"] == one["of"]]
    return chance + [(one["name"], one["mean"]) for one in full]


def _limits(row: Row, values: Sequence[float], pad: float) -> tuple[float, float]:
    """Ends of an axis around values, wide enough that noise does not fill it.

    A percentage has at least ten points and stays in 0..1, another score a tenth of itself.
    """
    low, high = float(np.min(values)), float(np.max(values))
    percent = row["unit"] == PERCENT
    least = 0.1 if percent else 0.1 * max(abs(low), abs(high))
    room = max(pad * (high - low), (least - (high - low)) / 2) or 0.5
    low, high = low - room, high + room
    return (max(low, -0.03), min(high, 1.03)) if percent else (low, high)


def _widened(
    left: float, right: float, wanted: Sequence[float], reach: float
) -> tuple[float, float]:
    """The axis with those values that are near: a far one would press all others together."""
    width = right - left
    near = [value for value in wanted if left - reach * width <= value <= right + reach * width]
    inner = 0.02 * width
    return min([left, *(v - inner for v in near)]), max([right, *(v + inner for v in near)])


def _by_distance(task: str, rows: Sequence[Row], facts: Row, look: dict[str, Style]) -> Picture:
    figure, axes = figure_of(3.5)
    buckets = rows[0]["by_distance"]
    names = [f"{bucket(one, facts['whole_distances'])}\nn = {one['n']:,}" for one in buckets]
    _dodged(axes, rows, "by_distance", look, joined=True)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(facts["distance_name"])
    _chance(axes, rows[0])
    finish(figure, axes, rows[0], [one for row in rows for one in row["by_distance"]])
    caption = (
        "Mean over seeds with its 95 % interval in each bucket of distance; n counts items. "
        "Intervals that leave the axis are cut."
    )
    return Picture(task, "distance", "Score by distance", caption, figure)


def _by_group(task: str, rows: Sequence[Row], look: dict[str, Style]) -> Picture:
    figure, axes = figure_of(3.5)
    groups = rows[0]["by_group"]
    _dodged(axes, rows, "by_group", look, joined=False)
    names = [one["group"] for one in groups]
    for index, baseline in enumerate(rows[0]["baselines"]):
        line = BASELINE_LINES[index % len(BASELINE_LINES)]
        for number, one in enumerate(baseline["by_group"]):
            place, label = names.index(one["group"]), baseline["name"] if number == 0 else None
            ends = (place - 0.45, place + 0.45)
            axes.plot(ends, [one["mean"]] * 2, color=MUTED, linestyle=line, label=label, lw=1.2)
    axes.set_xticks(range(len(groups)), [f"{one['group']}\nn = {one['n']:,}" for one in groups])
    axes.grid(axis="x", visible=False)
    parts = [one for row in [*rows, *rows[0]["baselines"]] for one in row["by_group"]]
    finish(figure, axes, rows[0], parts)
    caption = (
        "Mean over seeds with its 95 % interval in each group; lines are baselines, which may "
        "exist for some groups only."
    )
    return Picture(task, "groups", "Score by group", caption, figure)


def _dodged(
    axes: Axes, rows: Sequence[Row], key: str, look: dict[str, Style], *, joined: bool
) -> None:
    """Means with intervals at 0, 1, ..., the rules side by side so that none hides another."""
    half = min(0.32, 0.05 * (len(rows) - 1))
    shifts = np.linspace(-half, half, len(rows))
    for shift, row in zip(shifts, rows, strict=True):
        style, parts = look[row["name"]], row[key]
        places = np.arange(len(parts)) + shift
        line = style.lined() if joined else {**style.marked(), "linestyle": "none"}
        axes.plot(places, [one["mean"] for one in parts], **line, label=row["name"])
        for place, one in zip(places, parts, strict=True):
            if one["ci95"]:
                axes.plot([place, place], one["ci95"], color=style.color, linewidth=1.0)


def _chance(axes: Axes, row: Row) -> None:
    if row["chance"] is not None:
        axes.axhline(row["chance"], color=MUTED, linestyle=BASELINE_LINES[0], label="chance")


def _learning(task: str, arms: Sequence[Arm], row: Row, look: dict[str, Style]) -> Picture:
    figure, axes = figure_of(3.0)
    shown: list[Row] = []
    # Runs are validated by what selects among them, which need not be the score that is reported.
    metric = arms[0].selects
    row = row | {
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "chance": metric.chance,
    }
    for arm in arms:
        steps, curves = _curves(arm)
        if not len(steps):
            continue
        style, mean = look[arm.name], curves.mean(0)
        if len(curves) > 1:
            ends = curves.min(0), curves.max(0)
            axes.fill_between(steps, *ends, color=style.color, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, **style.lined(), label=arm.name)
        shown.extend({"mean": float(value)} for value in curves.ravel())
    _chance(axes, row)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    finish(figure, axes, row, shown)
    caption = "Validation score during training: mean over seeds, the band from worst to best seed."
    return Picture(task, "learning", "Learning curves", caption, figure)


def _curves(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all counted seeds have, and their scores [seeds, steps]."""
    curves = [dict(arm.validation[seed]) for seed in arm.seeds if arm.validation.get(seed)]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def _cost(task: str, rows: Sequence[Row], look: dict[str, Style]) -> Picture:
    axes_of = [("flops_per_example", "FLOPs per example, forward")]
    if any(row["examples_per_second"] for row in rows):
        axes_of.append(("examples_per_second", "training examples per second"))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
    for axes, (key, label) in zip(panels, axes_of, strict=True):
        drawn = [row for row in rows if row[key]]
        for row in drawn:
            style = look[row["name"]]
            if row["ci95"]:
                axes.plot([row[key]] * 2, row["ci95"], color=style.color, linewidth=1.2)
            axes.plot(row[key], row["mean"], **style.marked(), linestyle="none", label=row["name"])
        _log_axis(axes, [row[key] for row in drawn])
        axes.set_xlabel(label)
    _score_axis(panels[0], rows[0], "y")
    panels[0].set_ylim(*_around(rows[0], rows, 0.1))
    _legend(figure, panels[0])
    caption = "Score against cost: fewer FLOPs are further left, faster training is further right."
    return Picture(task, "cost", "Quality against cost", caption, figure)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis at least a factor of 3 wide, with a few round ticks however narrow it is."""
    middle = float(np.sqrt(min(values) * max(values)))
    half = max(np.sqrt(max(values) / min(values)) * 1.15, 3**0.5)
    axes.set_xscale("log")
    axes.set_xlim(middle / half, middle * half)
    axes.set_xticks(_round_ticks(middle / half, middle * half))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_locator(NullLocator())


def _round_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, of the finest series that has no more than five."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 5:
            break
    return ticks


def figure_of(height: float) -> tuple[Figure, Axes]:
    """A figure of this height in inches and one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def finish(figure: Figure, axes: Axes, row: Row, parts: Sequence[Row]) -> None:
    """The score axis around what is drawn, and a legend that covers nothing."""
    _score_axis(axes, row, "y")
    axes.set_ylim(*_around(row, parts, 0.12))
    _legend(figure, axes)


def _around(row: Row, parts: Sequence[Row], pad: float) -> tuple[float, float]:
    """Ends of a score axis around means, chance and the intervals that do not reach far."""
    chance = [] if row["chance"] is None else [row["chance"]]
    low, high = _limits(row, [*chance, *(one["mean"] for one in parts)], pad)
    return _widened(low, high, [end for one in parts for end in one.get("ci95") or []], 0.35)


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, as wide as the figure allows; the figure grows by its height."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = _columns(labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _columns(labels: Sequence[str]) -> int:
    """The most columns, up to 4, whose widest labels together fit."""
    for columns in (4, 3, 2):
        length = math.ceil(len(labels) / columns)
        widest = [
            max(map(len, labels[start : start + length])) for start in range(0, len(labels), length)
        ]
        if sum(widest) + HANDLE * len(widest) <= LINE:
            return columns
    return 1


# Characters that fit beside the lowest figure.
_LONG_LABEL = 32


def _score_axis(axes: Axes, row: Row, which: str) -> None:
    better = "higher" if row["higher_is_better"] else "lower"
    label = f"{column(row['metric'], row['unit'])}, {better} is better"
    if which == "y" and len(label) > _LONG_LABEL:
        label = label.replace(", ", ",\n")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(label)
    in_percent(axis, row["unit"])


def in_percent(axis: Axis, unit: str) -> None:
    """Ticks in percent where the unit is that: such scores are stored as fractions."""
    if unit == PERCENT:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
