"""Intervals, tests and verdicts of the protocol, for scores of seeds on the same test items.

With seeds s = 1..n, items i in clusters c = 1..m, weights w_i and W = sum_i w_i,

    M_s = sum_i w_i x_si / W                            the score of a seed, a ratio estimator
    T_s = f(M_s)                                        the headline, f a `Statistic`
    u_c = mean_s f'(M_s) sum_{i in c} w_i (x_si - M_s) / W   influence of a cluster; sum_c u_c = 0
    SE^2 = s^2(T_s) / n + s^2(m u_c) / m                s^2 the variance over n - 1 or m - 1

and an interval is mean_s T_s -+ t SE, Student t with n - 1 degrees of freedom. A contrast of
arms puts the contrast of their T_s, seed by seed, and of their u_c in the same formula. Where items
have several scores each, as BLEU has counts, M_s is a vector and f' a gradient.

The interval errs on the wide side. The cluster term is known much better than n - 1 degrees of
freedom say, and an interaction of seeds and clusters is counted in both terms. Coverage is near
95 % where seeds carry most of the variance and above 98 % where clusters do.

With one seed the seed term is unknown: it is left out, the degrees of freedom are m - 1 and
`Estimate.seeds` is 1. Such an interval is too narrow and supports no claim, so `equivalent` and
`verdict` make none. With one cluster the standard error is infinite.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy import special

from experiments.tasks.metric import IDENTITY, Statistic, weighted_mean

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval.

    Attributes:
      mean: mean over seeds of the headline.
      standard_error: of `mean`, over seeds and clusters.
      low: lower end of the interval.
      high: upper end of the interval.
      seeds: number of seeds; at 1 the interval leaves out what seeds would vary.
      df: degrees of freedom of Student's t.

    """

    mean: float
    standard_error: float
    low: float
    high: float
    seeds: int
    df: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The paired difference a - b and its two-sided p-value for no difference."""

    estimate: Estimate
    p: float


@dataclasses.dataclass(frozen=True)
class Retention:
    """The share of the gain over `self` that a rule keeps, with its 95 % Fieller interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Parts:
    """What varies over seeds and over clusters; contrasts of arms subtract part by part.

    Attributes:
      headlines: T_s.
      influences: u_c.

    """

    headlines: Float64[np.ndarray, " seeds"]
    influences: Float64[np.ndarray, " clusters"]

    def __sub__(self, other: "Parts") -> "Parts":
        return Parts(self.headlines - other.headlines, self.influences - other.influences)


def parts(
    values: Float[np.ndarray, "seeds items *K"],
    weights: Float[np.ndarray, " items"],
    cluster: Int[np.ndarray, " items"],
    statistic: Statistic = IDENTITY,
) -> Parts:
    """Headlines T_s and influences u_c; items of weight 0 are left out.

    Raises:
      ValueError: shapes differ, a weight is negative, no item has weight, or a score is not
        finite (leave diverged seeds out first).

    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if weights.shape != values.shape[1:2] or cluster.shape != weights.shape:
        shapes = values.shape, weights.shape, cluster.shape
        raise ValueError("values, weights and cluster have shapes {}, {}, {}".format(*shapes))
    if not (weights >= 0).all():
        raise ValueError("a weight is negative or not a number")
    kept = weights > 0
    values, weights = values[:, kept], weights[kept]
    if not values.size:
        raise ValueError("no seed has an item of positive weight")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite: leave diverged seeds out of intervals")
    mean = weighted_mean(values, weights, 1)
    scale = statistic.derivative(mean) / weights.sum()
    influence = np.expand_dims(scale, 1) * (values - np.expand_dims(mean, 1))
    per_item = weights * influence.reshape(*values.shape[:2], -1).sum(-1).mean(0)
    index = np.unique(cluster[kept], return_inverse=True)[1]
    return Parts(statistic.value(mean), np.bincount(index, weights=per_item))


def interval(
    values: Float[np.ndarray, "seeds items"],
    weights: Float[np.ndarray, " items"],
    cluster: Int[np.ndarray, " items"],
    statistic: Statistic = IDENTITY,
) -> Estimate:
    """The headline of an arm: mean_s T_s -+ t SE, see the module's equations."""
    return _estimate(parts(values, weights, cluster, statistic))


def seeds_alone(values: Float[np.ndarray, " seeds"]) -> Parts:
    """One number a seed, two or more, of which nothing is known by clusters."""
    return Parts(np.asarray(values, np.float64), np.zeros(2))


def between_seeds(values: Float[np.ndarray, " seeds"]) -> Estimate:
    """The mean of one number a seed, two or more, with an interval of what seeds vary alone."""
    return _estimate(seeds_alone(values))


def paired(
    a: Float[np.ndarray, "seeds items"],
    b: Float[np.ndarray, "seeds items"],
    weights: Float[np.ndarray, " items"],
    cluster: Int[np.ndarray, " items"],
    statistic: Statistic = IDENTITY,
) -> Difference:
    """The difference f(M^a_s) - f(M^b_s), seed by seed; row s of both arms is the same seed.

    p = P(|t_df| >= |mean| / SE); 1 where mean and SE are both 0.
    """
    _same_shape(a, b)
    contrast = parts(a, weights, cluster, statistic) - parts(b, weights, cluster, statistic)
    estimate = _estimate(contrast)
    return Difference(estimate, _two_sided(estimate))


def holm(p_values: Float[np.ndarray, " pairs"] | Sequence[float]) -> Float64[np.ndarray, " pairs"]:
    """Holm's adjusted p-values in the given order: max_{j <= k} min(1, (K - j + 1) p_(j))."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = np.arange(len(p), 0, -1) * p[order]
    adjusted[order] = np.maximum.accumulate(np.minimum(1, steps))
    return adjusted


def equivalent(difference: Estimate, margin: float) -> bool:
    """Two one-sided t tests at 5 %: the 90 % interval lies inside (-margin, margin).

    A `margin` in the stored unit of the metric. One seed is never enough.
    """
    if difference.seeds < 2:
        return False
    half = _half_width(difference.standard_error, difference.df, 2 * LEVEL)
    return abs(difference.mean) + half < margin


def retention(
    rule: Float[np.ndarray, "seeds items"],
    self_: Float[np.ndarray, "seeds items"],
    best: Float[np.ndarray, "seeds items"],
    weights: Float[np.ndarray, " items"],
    cluster: Int[np.ndarray, " items"],
    statistic: Statistic = IDENTITY,
) -> Retention | None:
    """N / D = (rule - self) / (best - self) with Fieller's interval.

    The interval holds every r with (N - r D)^2 <= t^2 (V_NN - 2 r V_ND + r^2 V_DD), V the joint
    covariance over seeds and clusters. None where the 95 % interval of D holds 0.
    """
    _same_shape(rule, self_, best)
    floor = parts(self_, weights, cluster, statistic)
    return ratio(*(parts(arm, weights, cluster, statistic) - floor for arm in (rule, best)))


def ratio(above: Parts, below: Parts) -> Retention | None:
    """N / D of two means with Fieller's interval, see `retention`."""
    top, bottom = (float(gain.headlines.mean()) for gain in (above, below))
    covariance, df = _covariance([above, below])
    if abs(bottom) <= _half_width(math.sqrt(covariance[1, 1]), df):
        return None
    t2 = special.stdtrit(df, LEVEL / 2) ** 2
    square = bottom**2 - t2 * covariance[1, 1]
    cross = top * bottom - t2 * covariance[0, 1]
    constant = top**2 - t2 * covariance[0, 0]
    spread = math.sqrt(max(0.0, cross**2 - square * constant))
    return Retention(top / bottom, (cross - spread) / square, (cross + spread) / square)


def verdict(difference: Estimate, p_holm: float, margin: float, higher_is_better: bool) -> str:
    """The verdict on a - b: significance first, then equivalence.

    Returns:
      "a better" or "b better" where `p_holm` < 0.05, else "equivalent" where the difference is
      inside the margin, else "no difference at this n"; always the last with one seed.

    """
    if difference.seeds >= 2 and p_holm < LEVEL:
        return "a better" if (difference.mean > 0) == higher_is_better else "b better"
    return "equivalent" if equivalent(difference, margin) else "no difference at this n"


def by_bucket(
    values: Float[np.ndarray, "seeds items"],
    weights: Float[np.ndarray, " items"],
    cluster: Int[np.ndarray, " items"],
    distance: Float[np.ndarray, " items"],
    edges: Sequence[float],
    statistic: Statistic = IDENTITY,
    *,
    never: bool = False,
) -> list[dict[str, Any]]:
    """The headline in each bucket lo <= distance < hi, ready for JSON.

    Args:
      values: scores.
      weights: weights of items.
      cluster: clusters of items.
      distance: distances of items, NaN where an item has none.
      edges: ascending edges, one more than there are buckets.
      statistic: the headline.
      never: items without a distance make a last bucket, whose lo and hi are None.

    Returns:
      {lo, hi, n, mean, ci95} for each bucket with items: n counts items of positive weight,
      ci95 is [low, high], or None where the bucket has one cluster. An infinite edge is None.

    Raises:
      ValueError: edges do not ascend, or a distance is outside of them.

    """
    rows = []
    for lo, hi, inside in _buckets(distance, edges, never):
        inside = inside & (weights > 0)
        if inside.any():
            estimate = interval(values[:, inside], weights[inside], cluster[inside], statistic)
            ci95 = [estimate.low, estimate.high] if math.isfinite(estimate.low) else None
            n = int(inside.sum())
            rows.append({"lo": lo, "hi": hi, "n": n, "mean": estimate.mean, "ci95": ci95})
    return rows


def _buckets(
    distance: Float[np.ndarray, " items"], edges: Sequence[float], never: bool
) -> Iterator[tuple[float | None, float | None, Bool[np.ndarray, " items"]]]:
    if np.any(np.diff(edges) <= 0):
        raise ValueError(f"edges must ascend, not {list(edges)}")
    missing = np.isnan(distance)
    outside = ~missing & ~((distance >= edges[0]) & (distance < edges[-1]))
    if outside.any():
        worst = distance[outside][0]
        raise ValueError(f"{outside.sum()} distances, as {worst}, are outside of {list(edges)}")
    ends = [float(edge) if math.isfinite(edge) else None for edge in edges]
    for k in range(len(edges) - 1):
        yield ends[k], ends[k + 1], (distance >= edges[k]) & (distance < edges[k + 1])
    if never:
        yield None, None, missing


def _same_shape(*arms: np.ndarray) -> None:
    if len({arm.shape for arm in arms}) > 1:
        raise ValueError(f"arms are of shapes {[arm.shape for arm in arms]}: seeds must pair")


def _covariance(contrasts: Sequence[Parts]) -> tuple[Float64[np.ndarray, "k k"], int]:
    """V = cov(T_s) / n + cov(m u_c) / m of k contrasts, and the degrees of freedom."""
    headlines = np.stack([contrast.headlines for contrast in contrasts])
    influences = np.stack([contrast.influences for contrast in contrasts])
    n, m = headlines.shape[1], influences.shape[1]
    if m < 2:
        return np.full((len(contrasts), len(contrasts)), np.inf), max(n - 1, 1)
    over_clusters = np.atleast_2d(np.cov(m * influences)) / m
    if n < 2:
        return over_clusters, m - 1
    return np.atleast_2d(np.cov(headlines)) / n + over_clusters, n - 1


def _estimate(contrast: Parts) -> Estimate:
    covariance, df = _covariance([contrast])
    mean, error = float(contrast.headlines.mean()), math.sqrt(covariance[0, 0])
    half = _half_width(error, df)
    return Estimate(mean, error, mean - half, mean + half, len(contrast.headlines), df)


def _half_width(standard_error: float, df: int, level: float = LEVEL) -> float:
    """Half the width of a 1 - `level` interval."""
    return -float(special.stdtrit(df, level / 2)) * standard_error


def _two_sided(estimate: Estimate) -> float:
    if estimate.standard_error == 0:
        return 1.0 if estimate.mean == 0 else 0.0
    return float(2 * special.stdtr(estimate.df, -abs(estimate.mean) / estimate.standard_error))
