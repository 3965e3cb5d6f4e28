"""How far answers reach: the distance at which a score is halfway from its ceiling to chance.

With a(d) the mean score of items at distance d, made non-increasing by least squares (isotonic
regression), d50 is where a falls below (1 + chance) / 2, 1 being the ceiling. It lies between two
distances that occur, and is their geometric mean. Below the least distance or beyond the greatest
it is not known, and takes no part in lines.

Each seed of the arms gives a d50 an arm and a line through them. Intervals are of Student's t over
seeds; what other test items would vary is left out.
"""

import dataclasses
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Float64
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from experiments import tabular
from experiments.report.figures import INK, SETTINGS, STYLES, figure_of
from experiments.report.load import Arm
from experiments.report.statistics import Estimate, between_seeds
from experiments.report.tables import NONE, column, score


@dataclasses.dataclass(frozen=True)
class Local:
    """An arm whose attention sees so many positions to each side.

    Attributes:
      arm: its scores.
      reach: positions, in one layer.
      layers: of the model.

    """

    arm: Arm
    reach: float
    layers: int

    @property
    def whole(self) -> float:
        """Layers times reach: as far as anything can come."""
        return self.reach * self.layers


@dataclasses.dataclass(frozen=True)
class Found:
    """What is said of arms that differ in reach and in layers.

    Attributes:
      arms: as given, by layers times reach.
      halfway: d50 of each seed and arm; -inf or inf where it is outside of the distances that
        occur.
      least: distance of any item.
      greatest: distance of any item.
      slope: of d50 against layers times reach, a straight line by least squares.
      intercept: of the same line.
      of_reach: b of d50 = c reach^b layers^e.
      of_layers: e of the same.

    """

    arms: Sequence[Local]
    halfway: Float64[np.ndarray, "seeds arms"]
    least: float
    greatest: float
    slope: Estimate
    intercept: Estimate
    of_reach: Estimate
    of_layers: Estimate


def halfway(
    distance: Float[np.ndarray, " items"],
    scores: Float[np.ndarray, " items"],
    weights: Float[np.ndarray, " items"],
    chance: float,
) -> float:
    """d50 of one seed; -inf where the score is below half from the start, inf where it never is.

    Items without a distance (NaN) are left out.
    """
    known = ~np.isnan(distance)
    distance, scores, weights = distance[known], scores[known], weights[known]
    places, index = np.unique(distance, return_inverse=True)
    count = np.bincount(index, weights)
    seen = count > 0
    mean = np.bincount(index, weights * scores)[seen] / count[seen]
    level = isotonic_regression(mean, weights=count[seen], increasing=False).x
    above = int((level >= (1 + chance) / 2).sum())
    ends = np.concatenate([[0.0], places[seen], [np.inf]])
    if above in (0, len(level)):
        return -np.inf if above == 0 else np.inf
    return float(np.sqrt(ends[above] * ends[above + 1]))


def find(arms: Sequence[Local]) -> Found:
    """d50 of every arm, and how it goes with reach and layers.

    Raises:
      ValueError: arms have not the same seeds, or in a seed fewer than three arms have a d50 within
        the distances of the items, or all of those have one reach or one number of layers.

    """
    arms = sorted(arms, key=lambda one: (one.whole, one.layers))
    if len({tuple(one.arm.seeds) for one in arms}) > 1:
        kept = "; ".join(f"{one.layers} x {one.reach:g}: {list(one.arm.seeds)}" for one in arms)
        raise ValueError(f"arms must have the same seeds, got {kept}: run those that are missing")
    value = np.array([_by_seed(one) for one in arms]).T
    lines = [line for of_seed in value if (line := _lines(arms, of_seed)) is not None]
    if not lines or len(lines) < len(value):
        raise ValueError(
            "a line needs three arms or more that fall halfway within the distances of the items "
            "in every seed, and among them two reaches and two numbers of layers"
        )
    first = arms[0].arm
    known = first.distance[(first.shown > 0) & ~np.isnan(first.distance)]
    of_lines = (between_seeds(many) for many in np.array(lines).T)
    return Found(arms, value, float(known.min()), float(known.max()), *of_lines)


def _by_seed(one: Local) -> list[float]:
    arm = one.arm
    return [
        halfway(arm.distance, scores, arm.shown, arm.metric.chance or 0.0)
        for scores in arm.of(arm.seeds)
    ]


def _lines(
    arms: Sequence[Local], value: Float64[np.ndarray, " arms"]
) -> tuple[float, float, float, float] | None:
    """Slope and intercept against layers times reach, and the powers of reach and of layers."""
    inside = np.isfinite(value)
    if inside.sum() < 3:
        return None
    reach, layers, whole = (
        np.array([getattr(one, name) for one in arms], float)[inside]
        for name in ("reach", "layers", "whole")
    )
    ones = np.ones(len(whole))
    powers = np.stack([np.log(reach), np.log(layers), ones], 1)
    if np.linalg.matrix_rank(powers) < 3 or len(set(whole)) < 2:
        return None
    line = np.linalg.lstsq(np.stack([whole, ones], 1), value[inside], rcond=None)[0]
    power = np.linalg.lstsq(powers, np.log(value[inside]), rcond=None)[0]
    return float(line[0]), float(line[1]), float(power[0]), float(power[1])


def page(title: str, found: Found) -> str:
    """As Markdown."""
    metric = found.arms[0].arm.metric
    name = column(metric.name, metric.unit)
    header = ("layers", "reach", "layers x reach", "d50 by seed", "mean, 95 % interval", name)
    rows: list[Sequence[str]] = [header]
    for one, halves in zip(found.arms, found.halfway.T, strict=True):
        estimate = one.arm.estimate()
        mean = score(estimate.mean if estimate else None, one.arm.metric.unit)
        by_seed = ", ".join(_distance(half, found) for half in halves)
        whole = _text(between_seeds(halves), 1) if np.isfinite(halves).all() else NONE
        rows.append((f"{one.layers}", f"{one.reach:g}", f"{one.whole:g}", by_seed, whole, mean))
    outside = int((~np.isfinite(found.halfway)).sum())
    lines = [
        f"d50 = {_text(found.intercept)} + {_text(found.slope)} x layers x reach",
        f"d50 goes with reach to the power {_text(found.of_reach)} and with the number of layers "
        f"to the power {_text(found.of_layers)}",
    ]
    if outside:
        lines.append(
            f"{outside} of {found.halfway.size} d50 lie outside of the distances of the items and "
            "take no part in lines"
        )
    return "\n".join(
        [f"# {title}", "", tabular.markdown(rows), "", *(f"- {line}" for line in lines), ""]
    )


def _distance(value: float, found: Found) -> str:
    if value == -np.inf:
        return f"below {found.least:g}"
    return f"beyond {found.greatest:g}" if value == np.inf else f"{value:.1f}"


def _text(one: Estimate, digits: int = 2) -> str:
    """With its interval, where there is more than one seed."""
    if one.seeds < 2:
        return f"{one.mean:.{digits}f}"
    return f"{one.mean:.{digits}f} ({one.low:.{digits}f} to {one.high:.{digits}f})"


def figure(found: Found) -> Figure:
    """d50 against layers times reach, a marker for each seed, and the line."""
    with mpl.rc_context(SETTINGS):
        drawing, axes = figure_of(3.4)
        looks = [STYLES[name] for name in ("gaussian", "uniform", "table", "raw", "exponential")]
        depths = sorted({one.layers for one in found.arms})
        for layers, (color, marker, _) in zip(depths, looks * len(depths), strict=False):
            places = [i for i, one in enumerate(found.arms) if one.layers == layers]
            x = np.repeat([found.arms[i].whole for i in places], len(found.halfway))
            y = found.halfway[:, places].T.ravel()
            inside = np.isfinite(y)
            name = f"{layers} layer{'s' if layers > 1 else ''}"
            axes.plot(x[inside], y[inside], color=color, marker=marker, ls="", label=name)
        span = np.array([0, max(one.whole for one in found.arms)])
        line = found.intercept.mean + found.slope.mean * span
        axes.plot(span, line, color=INK, linewidth=1, label="by least squares")
        axes.plot(span, span, color=INK, linewidth=1, linestyle=":", label="layers x reach")
        axes.set_ylim(0, found.greatest + 2)
        axes.set_xlabel("layers x reach")
        axes.set_ylabel("d50 (positions)")
        axes.legend(loc="best")
    return drawing
