"""Headline scores: what they are called, and how they follow from the scores of items."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A headline f(M) of a seed's weighted mean M, a number or a vector of K.

    Attributes:
      value: f, of one seed or of many.
      derivative: f', which carries the influence of a cluster from M to f(M).
      several: whether an item has K scores.

    """

    value: Callable[[Float64[np.ndarray, "*seeds"]], Float64[np.ndarray, "*seeds"]]
    derivative: Callable[[Float64[np.ndarray, "*seeds"]], Float64[np.ndarray, "*seeds"]]
    several: bool = False

    def of(
        self, values: Float64[np.ndarray, "..."], weights: Float64[np.ndarray, " items"]
    ) -> Float64[np.ndarray, " *seeds"]:
        """The headline of items' scores, [*seeds, items] or, with `several`, [*seeds, items, K]."""
        return self.value(weighted_mean(values, weights, -2 if self.several else -1))


def weighted_mean(
    values: Float64[np.ndarray, "..."], weights: Float64[np.ndarray, " items"], axis: int
) -> Float64[np.ndarray, "..."]:
    """The mean over the axis of items."""
    return np.tensordot(values, weights, (axis, 0)) / weights.sum()


def _root_derivative(mean: Float64[np.ndarray, " seeds"]) -> Float64[np.ndarray, " seeds"]:
    """1 / (2 sqrt(M)), and 0 at M = 0, where all squared errors and influences are 0."""
    twice_root = 2 * np.sqrt(mean)
    return np.divide(1, twice_root, out=np.zeros_like(mean), where=twice_root > 0)


IDENTITY = Statistic(value=np.copy, derivative=np.ones_like)
"""The mean itself."""

ROOT = Statistic(value=np.sqrt, derivative=_root_derivative)
"""The root of the mean: RMSE where items are squared errors."""


def _bleu_parts(
    mean: Float64[np.ndarray, "*seeds 10"],
) -> tuple[Float64[np.ndarray, " *seeds"], ...]:
    """Length of output and reference, matches [.., 4] and n-grams [.., 4]."""
    return mean[..., 0], mean[..., 1], mean[..., 2:6], mean[..., 6:]


def _bleu(mean: Float64[np.ndarray, "*seeds 10"]) -> Float64[np.ndarray, " *seeds"]:
    """Of the sums of a corpus, which a common factor does not change; 0 without a match."""
    length, reference, matches, total = _bleu_parts(mean)
    some = np.asarray((matches > 0).all(-1))
    precision = np.divide(matches, total, out=np.ones_like(total), where=some[..., None])
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1e-300)))
    return np.where(some, 100 * brevity * np.exp(np.log(precision).mean(-1)), 0)


def _bleu_gradient(mean: Float64[np.ndarray, "*seeds 10"]) -> Float64[np.ndarray, "*seeds 10"]:
    """D BLEU = BLEU (sum of d log p_n / 4 + d log brevity)."""
    length, reference, matches, total = _bleu_parts(mean)
    value = _bleu(mean)[..., None]
    short = (length < reference)[..., None]
    log_brevity = np.stack([reference / np.maximum(length, 1e-300) ** 2, -1 / length], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(short, log_brevity, 0), 1 / (4 * matches), -1 / (4 * total)]
        return np.where(value > 0, value * np.concatenate(parts, -1), 0)


BLEU = Statistic(value=_bleu, derivative=_bleu_gradient, several=True)
"""sacreBLEU's score where it needs no smoothing.

Items are (length of the output, length of its closest reference, n-grams that match for n = 1..4,
n-grams for n = 1..4).
"""

STATISTICS = {"mean": IDENTITY, "root": ROOT, "bleu": BLEU}
"""By the name that a task's metric gives."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A task's headline score, a statistic of its items' scores.

    Attributes:
      name: as it stands in tables, for instance "accuracy".
      unit: "%", "bits per byte", ...; values in "%" are stored as fractions in 0..1.
      higher_is_better: the direction of better.
      margin: the equivalence margin of the protocol, in the stored unit.
      margin_is_relative: True where the margin is a share of the reference arm's score.
      chance: the score of guessing, or None where guessing means nothing.
      statistic: "mean" of the scores; "root" of their mean, as of squared errors; "bleu" of counts.

    """

    name: str
    unit: str
    higher_is_better: bool
    margin: float
    margin_is_relative: bool = False
    chance: float | None = None
    statistic: str = "mean"

    def mean(
        self, scores: Float64[np.ndarray, "..."], weights: Float64[np.ndarray, " items"]
    ) -> Float64[np.ndarray, " *lanes"]:
        """The headline score of every lane, from scores [items] or [lanes, items, ...]."""
        return STATISTICS[self.statistic].of(scores, weights)
