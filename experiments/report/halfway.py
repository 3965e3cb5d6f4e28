"""How far answers reach: the distance at which a score is halfway from its ceiling to chance.

With a(d) the mean score of items at distance d, made non-increasing by least squares (isotonic
regression), d50 is where a falls below (1 + chance) / 2, 1 being the ceiling. It lies between two
distances that occur, and is their geometric mean. Below the least distance or beyond the greatest
it is not known, and an arm of that kind takes no part in lines.

Intervals are percentiles of a bootstrap that draws seeds of each arm and clusters of items, the
same clusters for all arms. With few seeds they are on the narrow side.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Float64, Int
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from experiments import tabular
from experiments.report.figures import INK, SETTINGS, STYLES, figure_of
from experiments.report.load import Arm
from experiments.report.tables import column, score
from experiments.tasks.synthetic import stream

DRAWS = 1000
PERCENTILES = (2.5, 97.5)


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
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: Float[np.ndarray, " draws"]) -> "Interval":
        """By percentiles of a bootstrap."""
        # no interpolation, which infinities would make NaN
        low, high = np.percentile(drawn, PERCENTILES, method="inverted_cdf")
        return cls(value, float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Found:
    """What is said of arms that differ in reach and in layers.

    Attributes:
      arms: as given, by layers times reach.
      halfway: d50 of each; -inf or inf where it is outside of the distances that occur.
      least: distance of any item.
      greatest: distance of any item.
      slope: of d50 against layers times reach, a straight line by least squares.
      intercept: of the same line.
      of_reach: b of d50 = c reach^b layers^e.
      of_layers: e of the same.

    """

    arms: Sequence[Local]
    halfway: Sequence[Interval]
    least: float
    greatest: float
    slope: Interval
    intercept: Interval
    of_reach: Interval
    of_layers: Interval


def halfway(
    distance: Float[np.ndarray, " items"],
    scores: Float[np.ndarray, " items"],
    weights: Float[np.ndarray, " items"],
    chance: float,
) -> float:
    """d50 of one arm; -inf where the score is below half from the start, inf where it never is."""
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


def find(arms: Sequence[Local], draws: int = DRAWS) -> Found:
    """d50 of every arm, and how it goes with reach and layers.

    Raises:
      ValueError: fewer than three arms have a d50 within the distances of the items, or all of
        those have one reach or one number of layers.

    """
    arms = sorted(arms, key=lambda one: (one.whole, one.layers))
    value = _of_all(arms, [np.arange(len(one.arm.seeds)) for one in arms], 1)
    lines = _lines(arms, value)
    if lines is None:
        raise ValueError(
            "a line needs three arms or more that fall halfway within the distances of the items, "
            "and among them two reaches and two numbers of layers"
        )
    drawn = [_of_all(arms, *draw) for draw in _draws(arms, draws)]
    fitted = [line for one in drawn if (line := _lines(arms, one)) is not None]
    by_line = np.array(fitted).T
    slope, intercept, of_reach, of_layers = (
        Interval.of(float(one), many) for one, many in zip(lines, by_line, strict=True)
    )
    known = arms[0].arm.distance[arms[0].arm.shown > 0]
    return Found(
        arms,
        [Interval.of(float(v), many) for v, many in zip(value, np.array(drawn).T, strict=True)],
        float(known.min()),
        float(known.max()),
        slope,
        intercept,
        of_reach,
        of_layers,
    )


def _draws(
    arms: Sequence[Local], count: int
) -> Iterator[tuple[Sequence[np.ndarray], Int[np.ndarray, " items"]]]:
    """Seeds of each arm, and how many times each item's cluster is drawn."""
    generator = stream("halfway", "bootstrap")
    index = np.unique(arms[0].arm.cluster, return_inverse=True)[1]
    clusters = int(index.max()) + 1
    for _ in range(count):
        seeds = [generator.integers(n, size=n) for n in (len(one.arm.seeds) for one in arms)]
        times = np.bincount(generator.integers(clusters, size=clusters), minlength=clusters)
        yield seeds, times[index]


def _of_all(
    arms: Sequence[Local], seeds: Sequence[np.ndarray], times: Any
) -> Float64[np.ndarray, " arms"]:
    """D50 of each arm, of some of its seeds and with each item so many times."""
    return np.array(
        [
            halfway(
                one.arm.distance,
                one.arm.of(one.arm.seeds)[chosen].mean(0),
                one.arm.shown * times,
                one.arm.metric.chance or 0.0,
            )
            for one, chosen in zip(arms, seeds, strict=True)
        ]
    )


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
    parts = [f"# {title}", ""]
    metric = found.arms[0].arm.metric
    name = column(metric.name, metric.unit)
    rows: list[Sequence[str]] = [
        ("layers", "reach", "layers x reach", "d50", "95 % interval", name)
    ]
    for one, half in zip(found.arms, found.halfway, strict=True):
        estimate = one.arm.estimate()
        mean = score(estimate.mean if estimate else None, one.arm.metric.unit)
        ends = f"{_distance(half.low, found)} to {_distance(half.high, found)}"
        d50 = _distance(half.value, found)
        rows.append((f"{one.layers}", f"{one.reach:g}", f"{one.whole:g}", d50, ends, mean))
    parts += [
        tabular.markdown(rows),
        "",
        f"- d50 = {_text(found.intercept)} + {_text(found.slope)} x layers x reach, with 95 % "
        "intervals",
        f"- d50 goes with reach to the power {_text(found.of_reach)} and with the number of layers "
        f"to the power {_text(found.of_layers)}",
    ]
    return "\n".join(parts) + "\n"


def _distance(value: float, found: Found) -> str:
    if value == -np.inf:
        return f"below {found.least:g}"
    return f"beyond {found.greatest:g}" if value == np.inf else f"{value:.1f}"


def _text(one: Interval) -> str:
    return f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"


def figure(found: Found) -> Figure:
    """d50 against layers times reach, a marker for each number of layers, and the line."""
    with mpl.rc_context(SETTINGS):
        drawing, axes = figure_of(3.4)
        looks = [STYLES[name] for name in ("gaussian", "uniform", "table", "raw", "exponential")]
        depths = sorted({one.layers for one in found.arms})
        for layers, (color, marker, _) in zip(depths, looks * len(depths), strict=False):
            of = [
                (one.whole, half)
                for one, half in zip(found.arms, found.halfway, strict=True)
                if one.layers == layers and np.isfinite(half.value)
            ]
            if not of:
                continue
            x, y = [w for w, _ in of], np.array([half.value for _, half in of])
            ends = np.clip([[h.low, h.high] for _, h in of], found.least, found.greatest).T
            error = np.abs(ends - y)
            axes.errorbar(
                x,
                y,
                error,
                color=color,
                marker=marker,
                linestyle="",
                capsize=2,
                label=f"{layers} layer{'s' if layers > 1 else ''}",
            )
        span = np.array([0, max(one.whole for one in found.arms)])
        line = found.intercept.value + found.slope.value * span
        axes.plot(span, line, color=INK, linewidth=1, label="by least squares")
        axes.plot(span, span, color=INK, linewidth=1, linestyle=":", label="layers x reach")
        axes.set_ylim(0, found.greatest + 2)
        axes.set_xlabel("layers x reach")
        axes.set_ylabel("d50 (positions)")
        axes.legend(loc="best")
    return drawing
