"""Tables and figures of what heads do: statistics, share of distance, swaps."""

import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from attn_jax.analysis import Fit
from experiments import tabular
from experiments.analysing import Analysis, Layer
from experiments.report.figures import SETTINGS, STYLES, Style, figure_of, in_percent
from experiments.report.statistics import between_seeds, ratio, seeds_alone
from experiments.report.tables import column, interval_text, score
from experiments.swaps import Curve
from experiments.tasks.metric import Metric

_LOOKS = {
    "fitted kernels": STYLES["gaussian"],
    "shuffled kernels": STYLES["table"],
    "uniform": STYLES["uniform"],
    "zero": STYLES["self"],
}


def page(title: str, found: Analysis, batches: int) -> str:
    """Everything as Markdown."""
    layers, curve = found.layers, found.curve
    parts = [f"# {title}", "", *_statistics(layers), "", *_explained(layers)]
    learned = [f"- {layer.path}: {line}" for layer in layers for line in layer.learned]
    if learned:
        parts += ["", "## What is trained of the rules", "", *learned]
    if curve is not None:
        parts += ["", *_swaps(curve, found.metric, batches)]
    return "\n".join(parts) + "\n"


def _statistics(layers: Sequence[Layer]) -> Iterator[str]:
    yield "## What heads look at"
    yield ""
    yield (
        "Means over queries of held-out text. Entropy and that of the mean over the allowed keys "
        "in nats; distance in positions; then weight: within 2 positions, at a relative position, "
        "on the first key that a query may see; then shares of queries: whose largest weight lies "
        "at the head's most frequent place, and whose largest weight is on the rarest token."
    )
    yield ""
    names = "entropy", "uniform", "distance", "within 2", "r = 0", "r = -1", "r = 1", "first"
    names += "one place", "rarest"
    rows: list[Sequence[str]] = [("attention", "head", *names, "kind")]
    for layer in layers:
        one = layer.statistics
        columns = (
            one.entropy,
            one.uniform_entropy,
            one.distance,
            one.window,
            one.itself,
            one.previous,
            one.next,
            one.first,
            one.positional,
            np.full(len(layer.kinds), np.nan) if layer.rarest is None else layer.rarest,
        )
        for head, kinds in enumerate(layer.kinds):
            numbers = (_number(float(column[head]), 2) for column in columns)
            rows.append((layer.path, str(head), *numbers, ", ".join(kinds)))
    yield tabular.markdown(rows, ("attention", "kind"))


def _explained(layers: Sequence[Layer]) -> Iterator[str]:
    yield "## Explained by position"
    yield ""
    yield (
        "The kernel of least squares, fitted on validation text, and on held-out text the share "
        "1 - sum (w - k)^2 / sum (w - u)^2, u the mean over the allowed keys, and the divergence "
        "in nats; without and with a part for the first token."
    )
    yield ""
    measures = "share", "divergence"
    words = "attention", "kernel", "with the first token"
    rows: list[Sequence[str]] = [
        ("attention", "head", "kernel", *measures, words[2], *measures, "free table")
    ]
    for layer in layers:
        for head, one in enumerate(layer.explained):
            fits = *_fit(one.plain), *_fit(one.with_first)
            rows.append((layer.path, str(head), *fits, _number(one.families["table"])))
    yield tabular.markdown(rows, words)


def _fit(fit: Fit) -> tuple[str, str, str]:
    return str(fit), _number(fit.share), _number(fit.divergence)


def _number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "undefined"
    return "infinite" if math.isinf(value) else f"{value:.{digits}f}"


def _swaps(curve: Curve, metric: Metric, batches: int) -> Iterator[str]:
    yield "## Heads swapped for kernels, without retraining"
    yield ""
    yield (
        f"{column(metric.name, metric.unit)} on the first {batches} batches of test after each "
        "head more is replaced by its kernel with the part for the first token; the order is "
        "greedy, by validation. Kernels and means have weights that sum to one. As trained: "
        f"{score(curve.whole, metric.unit)}."
    )
    yield ""
    names = list(curve.scores)
    rows: list[Sequence[str]] = [("heads replaced", "the last one", *names)]
    for count, head in enumerate(curve.order):
        numbers = (score(curve.scores[name][count], metric.unit) for name in names)
        rows.append((str(count + 1), f"{head.path} {head.index}", *numbers))
    yield tabular.markdown(rows, ["the last one"])


def over_seeds(title: str, found: Mapping[int, Analysis]) -> str:
    """What the analyses of several seeds say together, as Markdown."""
    learned = [
        f"- seed {seed}, {layer.path}: {line}"
        for seed, one in found.items()
        for layer in one.layers
        for line in layer.learned
    ]
    analyses = list(found.values())
    parts = [f"# {title}, seeds {', '.join(map(str, found))}", "", *_shares_over_seeds(analyses)]
    if learned:
        parts += ["", "## What is trained of the rules", "", *learned]
    curves = [one.curve for one in analyses if one.curve is not None]
    if curves:
        parts += ["", *_swaps_over_seeds(curves, analyses[0].metric)]
    return "\n".join(parts) + "\n"


def _shares_over_seeds(found: Sequence[Analysis]) -> Iterator[str]:
    yield "## Explained by position"
    yield ""
    yield (
        "The share of weights that kernels explain on held-out text, mean over the heads of an "
        "attention and over seeds with its 95 % interval over seeds; heads of which it is "
        "undefined are left out."
    )
    yield ""
    rows: list[Sequence[str]] = [
        ("attention", "share", "with the first token", "least and most of a head")
    ]
    for index, layer in enumerate(found[0].layers):
        of_seeds = [one.layers[index].explained for one in found]
        plain = np.array([[head.plain.share for head in heads] for heads in of_seeds])
        first = np.array([[head.with_first.share for head in heads] for heads in of_seeds])
        if np.isnan(plain).all(1).any():
            rows.append((layer.path, "undefined", "undefined", "-"))
            continue
        extent = f"{np.nanmin(plain):.2f} to {np.nanmax(plain):.2f}"
        means = (_interval(np.nanmean(x, 1)) for x in (plain, first))
        rows.append((layer.path, *means, extent))
    yield tabular.markdown(rows, ["attention"])


def _swaps_over_seeds(curves: Sequence[Curve], metric: Metric) -> Iterator[str]:
    yield "## Heads swapped for kernels, without retraining"
    yield ""
    name = column(metric.name, metric.unit)
    yield f"{name} on test, mean over seeds with its 95 % interval over seeds."
    yield ""
    total = len(curves[0].order)
    counts = sorted({1, total // 4, total // 2, 3 * total // 4, total} - {0})
    names = list(curves[0].scores)
    rows: list[Sequence[str]] = [(f"heads replaced of {total}", *names)]
    whole = _interval([curve.whole for curve in curves], metric.unit)
    rows.append(("0", *[whole] * len(names)))
    for count in counts:
        cells = (
            _interval([curve.scores[name][count - 1] for curve in curves], metric.unit)
            for name in names
        )
        rows.append((str(count), *cells))
    for floor, words in (("zero", "nothing"), ("uniform", "the mean")):
        rows.append((f"kept of what heads add to {words}, all replaced", *_kept(curves, floor)))
    yield tabular.markdown(rows)


def _kept(curves: Sequence[Curve], floor: str) -> Iterator[str]:
    """(score - floor) / (whole - floor) with all heads replaced, by Fieller over seeds."""
    whole = np.array([curve.whole for curve in curves])
    last = {name: np.array([some.scores[name][-1] for some in curves]) for name in curves[0].scores}
    added = seeds_alone(whole - last[floor])
    for name, scores in last.items():
        kept = None if name == floor else ratio(seeds_alone(scores - last[floor]), added)
        yield "-" if kept is None else f"{kept.value:.3f} ({kept.low:.3f} to {kept.high:.3f})"


def _interval(values: Sequence[float], unit: str = "") -> str:
    found = between_seeds(np.asarray(values))
    return f"{score(found.mean, unit)} ({interval_text((found.low, found.high), unit)})"


def swaps(curves: Sequence[Curve], metric: Metric) -> Figure:
    """The score by the number of heads made fixed, a line for each replacement.

    It is the mean over the curves of several seeds, in a band from the worst to the best.
    """
    with mpl.rc_context(SETTINGS):
        figure, axes = figure_of(3.2)
        count = range(len(curves[0].order) + 1)
        for name in curves[0].scores:
            values = np.array([[curve.whole, *curve.scores[name]] for curve in curves])
            look = Style(*_LOOKS[name])
            axes.plot(count, values.mean(0), **look.lined(), label=name)
            axes.fill_between(count, values.min(0), values.max(0), color=look.color, alpha=0.15)
        axes.set_xlabel("heads replaced, the cheapest first")
        in_percent(axes.yaxis, metric.unit)
        better = "higher" if metric.higher_is_better else "lower"
        axes.set_ylabel(f"{column(metric.name, metric.unit)}, {better} is better")
        axes.legend(loc="best")
    return figure


def profiles(layers: Sequence[Layer], reach: int = 12) -> Figure:
    """Mean weight by relative position of every head, with its kernel over it."""
    columns = max(len(layer.explained) for layer in layers)
    with mpl.rc_context(SETTINGS | {"figure.constrained_layout.use": True}):
        figure = Figure(figsize=(0.8 + 1.9 * columns, 0.4 + 1.6 * len(layers)))
        grid = figure.subplots(len(layers), columns, squeeze=False, sharex=True)
        for row, layer in zip(grid, layers, strict=True):
            r = np.asarray(layer.profile.relative)
            near = abs(r) <= reach
            for head, axes in enumerate(row):
                if head >= len(layer.explained):
                    axes.set_axis_off()
                    continue
                weight = np.asarray(layer.profile.weight[head])[near]
                fit = layer.explained[head].plain
                axes.plot(r[near], weight, color=STYLES["learned"][0], marker=".", linewidth=1)
                axes.plot(r[near], fit.over(r[near], weight), color=STYLES["gaussian"][0], ls="--")
                axes.set_ylim(bottom=0)
                axes.set_title(f"{head}: {fit.family}, {_number(fit.share)}", fontsize=7)
                axes.tick_params(labelsize=6)
            row[0].set_ylabel(layer.path.replace("/layers", ""), fontsize=7)
        figure.supxlabel(
            "relative position; dashed: the kernel, scaled to the sum shown", fontsize=8
        )
    return figure
