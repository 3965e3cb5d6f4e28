"""Figures by matplotlib: `figure.savefig("x.svg")`, or .pdf or .png; text stays text.

Colours are cividis and a purple-orange scale, which people with colour-blindness tell apart. Rows
are queries and columns keys, as in `attention_weights`.

Letters: T queries, S keys, N heads, L relative positions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure as AnyFigure
from matplotlib.patches import Rectangle

from attn_jax.analysis.fitting import Fit
from attn_jax.analysis.statistics import Profile
from attn_jax.analysis.steps import Steps

SETTINGS: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
}
HEAD, FITTED = "#0072b2", "#1a1a1a"
_INCH_A_TOKEN = 0.2
_MOST_LABELS = 60
_MOST_KEYS = 24


class Figure(AnyFigure):
    """A figure whose text stays text in SVG and PDF, wherever it is saved."""

    def savefig(self, *arguments: Any, **keywords: Any) -> None:
        """As of any figure."""
        with mpl.rc_context(SETTINGS):
            super().savefig(*arguments, **keywords)


def heatmap(
    weights: Float[Any, "T S"],
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    title: str = "",
    largest: float | None = None,
) -> Figure:
    """The weights of one head, with a word at each row and column.

    Args:
      weights: w; rows sum to one where the normaliser is softmax.
      queries: a word for each row.
      keys: a word for each column.
      title: of the figure.
      largest: the weight of the brightest colour; None: the largest there is.

    Raises:
      ValueError: words and weights do not fit.

    """
    weights = _checked(weights, queries, keys)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=_size(weights.shape))
        axes = figure.add_subplot()
        drawn = _matrix(axes, weights, queries, keys, largest)
        axes.set_title(title)
        figure.colorbar(drawn, ax=axes, label="weight", shrink=0.8)
        return figure


def alignment(
    weights: Float[Any, "T S"], source: Sequence[str], target: Sequence[str], *, title: str = ""
) -> Figure:
    """Which words of the source each word of a translation looked at.

    Args:
      weights: of cross-attention: rows are the target's words, columns the source's.
      source: words translated from.
      target: words translated to.
      title: of the figure.

    Raises:
      ValueError: words and weights do not fit.

    """
    figure = heatmap(weights, target, source, title=title, largest=1.0)
    axes = figure.axes[0]
    axes.set_xlabel("source")
    axes.set_ylabel("translation")
    return figure


def all_heads(
    weights: Mapping[str, Float[Any, "N T S"]], *, title: str = "", share_scale: bool = False
) -> Figure:
    """Every head of every layer: a row for each attention, a column for each head.

    Args:
      weights: by the attention's path, see `analysis.record`.
      title: of the figure.
      share_scale: whether the brightest colour is the same in all; else each has its own largest.

    """
    columns = max(len(some) for some in weights.values())
    largest = max(float(np.max(some)) for some in weights.values()) if share_scale else None
    first = next(iter(weights.values()))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(1.2 + 1.3 * columns, 0.6 + 1.35 * len(weights)))
        grid = figure.subplots(len(weights), columns, squeeze=False)
        for row, (path, some) in zip(grid, weights.items(), strict=True):
            for head, axes in enumerate(row):
                axes.set_xticks([])
                axes.set_yticks([])
                if head >= len(some):
                    axes.set_axis_off()
                    continue
                axes.imshow(np.asarray(some[head]), cmap="cividis", vmin=0, vmax=largest)
                axes.set_title("" if some is not first else f"head {head}", fontsize=8)
            row[0].set_ylabel(path.replace("/layers", ""), fontsize=7)
        figure.suptitle(title or "rows: queries, columns: keys", fontsize=9)
        return figure


def profile(
    curve: Profile,
    head: int,
    *,
    fit: Fit | None = None,
    reach: int | None = None,
    title: str = "",
) -> Figure:
    """The mean weight of keys by relative position, and the kernel fitted to the head over it.

    The kernel is drawn with its sum over the positions shown equal to the head's: away from the
    ends of a sequence, that is what it predicts.

    Args:
      curve: from `analysis.profile`.
      head: which.
      fit: from `analysis.explain_by_position`; None: the profile alone.
      reach: |r| up to which is drawn; None: all.
      title: of the figure.

    """
    r, weight = np.asarray(curve.relative), np.asarray(curve.weight[head])
    shown = np.isfinite(weight) & (abs(r) <= (np.inf if reach is None else reach))
    r, weight = r[shown], weight[shown]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(5.2, 2.8))
        axes = figure.add_subplot()
        axes.plot(r, weight, "o-", color=HEAD, markersize=3.5, label="head")
        if fit is not None:
            axes.plot(r, fit.over(r, weight), "--", color=FITTED, label=str(fit))
            axes.legend(frameon=False)
        axes.set_xlabel("relative position: key less query")
        axes.set_ylabel("mean weight")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        return figure


def compare(
    first: Float[Any, "T S"],
    second: Float[Any, "T S"],
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    names: tuple[str, str] = ("A", "B"),
) -> Figure:
    """Two rules side by side, and the first less the second.

    Args:
      first: weights of a head.
      second: of another rule or model, for the same words.
      queries: a word for each row.
      keys: a word for each column.
      names: of the two.

    Raises:
      ValueError: words and weights do not fit.

    """
    first, second = (_checked(one, queries, keys) for one in (first, second))
    largest = float(max(first.max(), second.max()))
    width, height = _size(first.shape)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2.6 * width, height))
        left, middle, right = figure.subplots(1, 3)
        for axes, weights, name in ((left, first, names[0]), (middle, second, names[1])):
            drawn = _matrix(axes, weights, queries, keys, largest)
            axes.set_title(name)
        figure.colorbar(drawn, ax=(left, middle), label="weight", shrink=0.7)
        difference = first - second
        most = float(abs(difference).max()) or 1.0
        shown = right.imshow(difference, cmap="PuOr", norm=TwoSlopeNorm(0, -most, most))
        _label(right, queries, keys)
        right.set_title(f"{names[0]} less {names[1]}")
        figure.colorbar(shown, ax=right, label="difference", shrink=0.7)
        return figure


def computation(
    taken: Steps, words: Sequence[str], query: int, *, head: int = 0, keys: Sequence[str] = ()
) -> Figure:
    """One query of one head, drawn step by step: scores, weights, weighted values, context.

    Of more than 24 keys those with the largest weights are drawn; the context is of all.

    Args:
      taken: from `analysis.steps`.
      words: of the queries.
      query: which.
      head: which.
      keys: words of the keys; none: those of the queries.

    """
    one, keys = taken.heads[head], list(keys) or list(words)
    shown = np.sort(np.argsort(-one.weights[query], kind="stable")[:_MOST_KEYS])
    names = [keys[i] for i in shown]
    rows: list[tuple[str, np.ndarray]] = []
    for number, rule in enumerate(one.rules, 1):
        of = f" {number}" if one.gate is not None else ""
        *terms, (name, logit) = rule.terms(query)
        rows += [(f"{term}{of}", values) for term, values in terms]
        rows.append((f"{name}{of}", np.where(rule.allowed[query], logit, np.nan)))
        if one.gate is not None:
            rows.append((f"weight{of}", rule.weights[query]))
    name = "weight" if one.gate is None else f"{one.gate:.2f} x 1 + {1 - one.gate:.2f} x 2"
    rows.append((name, one.weights[query]))
    with mpl.rc_context(SETTINGS):
        width = 1.8 + 0.62 * len(names)
        figure = Figure(figsize=(width, 1.2 + 0.42 * len(rows) + 0.22 * one.value.shape[1]))
        table, values = figure.subplots(2, 1, height_ratios=[len(rows) + 1, one.value.shape[1] / 2])
        _numbers(table, [(name, row[shown]) for name, row in rows], names)
        of = "every key" if len(shown) == len(keys) else f"{len(shown)} of {len(keys)} keys"
        table.set_title(f"head {head}: what {words[query]!r} makes of {of}")
        weighted = one.weights[query][:, None] * one.value
        _context(values, weighted[shown], one.context[query])
        return figure


def _numbers(axes: Axes, rows: Sequence[tuple[str, np.ndarray]], keys: Sequence[str]) -> None:
    """A table of numbers, the last row, which holds weights, shaded."""
    weights = rows[-1][1]
    axes.set_xlim(-0.5, len(keys) + 1.5)  # as wide as the pictures below, with their sum
    axes.set_ylim(len(rows) - 0.5, -0.5)
    shade = mpl.colormaps["cividis"]
    for y, (_, numbers) in enumerate(rows):
        for x, number in enumerate(numbers):
            last = y == len(rows) - 1
            face = shade(float(number) / max(float(weights.max()), 1e-9)) if last else "none"
            dark = last and number < 0.6 * weights.max()
            if last:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face))
            text = "masked" if math.isnan(number) else f"{number:.2f}"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xticks(range(len(keys)), keys, rotation=35, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _context(axes: Axes, weighted: np.ndarray, context: np.ndarray) -> None:
    """The values times their weights, and their sum beside them."""
    shown = np.concatenate([weighted, np.full((1, len(context)), np.nan), context[None]]).T
    most = float(np.nanmax(abs(shown))) or 1.0
    axes.imshow(shown, cmap="PuOr", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
    axes.set_yticks([])
    axes.set_ylabel("weight times value")
    labels = [*[""] * len(weighted), "", "context"]
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _checked(weights: Any, queries: Sequence[str], keys: Sequence[str]) -> np.ndarray:
    weights = np.asarray(weights, float)
    if weights.shape != (len(queries), len(keys)):
        raise ValueError(
            "weights must be [T, S] with a word for each query and key, got "
            f"{list(weights.shape)}, {len(queries)} queries and {len(keys)} keys"
        )
    return weights


def _size(shape: tuple[int, ...]) -> tuple[float, float]:
    height, width = (min(max(2.0, _INCH_A_TOKEN * size), 9.0) for size in shape)
    return width + 1.6, height + 0.9


def _matrix(
    axes: Axes,
    weights: np.ndarray,
    queries: Sequence[str],
    keys: Sequence[str],
    largest: float | None,
) -> Any:
    if weights.min() < 0:  # scores that no softmax made weights of
        most = float(abs(weights).max())
        drawn = axes.imshow(weights, cmap="PuOr", norm=TwoSlopeNorm(0, -most, most))
    else:
        drawn = axes.imshow(weights, cmap="cividis", vmin=0, vmax=largest or weights.max() or 1.0)
    _label(axes, queries, keys)
    return drawn


def _label(axes: Axes, queries: Sequence[str], keys: Sequence[str]) -> None:
    """Words at rows and columns, as many as there is room for."""
    for words, where, options in (
        (keys, axes.set_xticks, {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}),
        (queries, axes.set_yticks, {}),
    ):
        every = math.ceil(len(words) / _MOST_LABELS)
        chosen = list(range(0, len(words), every))
        where(chosen, [words[i] for i in chosen], **options)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
