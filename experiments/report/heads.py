"""Tables and figures of what heads do: statistics, share of distance, swaps."""

import math
from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from attn_jax.analysis import Fit
from experiments.analysing import Curve, Layer
from experiments.report.figures import SETTINGS, STYLES, Style, figure_of

_LOOKS = {
    "fitted kernels": STYLES["gaussian"],
    "shuffled kernels": STYLES["table"],
    "uniform": STYLES["uniform"],
    "zero": STYLES["self"],
}


def page(
    title: str, layers: Sequence[Layer], curve: Curve | None, metric: str, batches: int
) -> str:
    """Everything as Markdown."""
    parts = [f"# {title}", "", *_statistics(layers), "", *_explained(layers)]
    learned = [f"- {layer.path}: {line}" for layer in layers for line in layer.learned]
    if learned:
        parts += ["", "## What is trained of the rules", "", *learned]
    if curve is not None:
        parts += ["", *_swaps(curve, metric, batches)]
    return "\n".join(parts) + "\n"


def _statistics(layers: Sequence[Layer]) -> Iterator[str]:
    yield "## What heads look at"
    yield ""
    yield (
        "Means over queries of held-out text. Entropy and that of the mean over the allowed keys "
        "in nats; distance in positions; the others are weight: within 2 positions, at a relative "
        "position, on the first key that a query may see."
    )
    yield ""
    names = "entropy", "uniform", "distance", "within 2", "r = 0", "r = -1", "r = 1", "first"
    yield f"| attention | head | {' | '.join(names)} | kind |"
    yield f"| --- | ---: | {'---: | ' * len(names)}--- |"
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
        )
        for head, kinds in enumerate(layer.kinds):
            numbers = " | ".join(f"{float(column[head]):.2f}" for column in columns)
            yield f"| {layer.path} | {head} | {numbers} | {', '.join(kinds)} |"


def _explained(layers: Sequence[Layer]) -> Iterator[str]:
    yield "## Explained by position"
    yield ""
    yield (
        "The kernel of least squares, fitted on validation text, and on held-out text the share "
        "1 - sum (w - k)^2 / sum (w - u)^2, u the mean over the allowed keys, and the divergence "
        "in nats; without and with a part for the first token."
    )
    yield ""
    yield (
        "| attention | head | kernel | share | divergence | with the first token | share "
        "| divergence | free table |"
    )
    yield "| --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |"
    for layer in layers:
        for head, one in enumerate(layer.explained):
            fits = f"{_fit(one.plain)} | {_fit(one.with_first)}"
            yield f"| {layer.path} | {head} | {fits} | {_number(one.families['table'])} |"


def _fit(fit: Fit) -> str:
    return f"{fit} | {_number(fit.share)} | {_number(fit.divergence)}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return "infinite" if math.isinf(value) else f"{value:.3f}"


def _swaps(curve: Curve, metric: str, batches: int) -> Iterator[str]:
    yield "## Heads swapped for kernels, without retraining"
    yield ""
    yield (
        f"{metric} on the first {batches} batches of test after each head more is replaced by its "
        "kernel with the part for the first token; the order is greedy, by validation. Whatever "
        f"stands in has weights that sum to one. As trained: {curve.whole:.4f}."
    )
    yield ""
    names = list(curve.scores)
    yield f"| heads replaced | the last one | {' | '.join(names)} |"
    yield f"| ---: | --- | {'---: | ' * len(names)}".rstrip()
    for count, head in enumerate(curve.order):
        numbers = " | ".join(f"{curve.scores[name][count]:.4f}" for name in names)
        yield f"| {count + 1} | {head.path} {head.index} | {numbers} |"


def swaps(curve: Curve, metric: str) -> Figure:
    """The score by the number of heads made fixed, a line for each replacement."""
    with mpl.rc_context(SETTINGS):
        figure, axes = figure_of(3.2)
        count = range(len(curve.order) + 1)
        for name, values in curve.scores.items():
            axes.plot(count, [curve.whole, *values], **Style(*_LOOKS[name]).lined(), label=name)
        axes.set_xlabel("heads replaced, the cheapest first")
        axes.set_ylabel(metric)
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
