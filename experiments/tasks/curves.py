"""The curves of `smoothing`: functions of time, observed with noise at irregular times.

Time counts in mean spacings of the observations, so that a width of 1 is one neighbour.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int

OBSERVED, ASKED = 64, 32
SPAN = float(OBSERVED)
FAMILIES = ("smooth", "periodic with gaps", "piecewise constant")
PERIOD, GAP = 16.0, 12.0
"""Of the periodic family: every curve has this period, and this much of it is never observed."""
NOISE = np.array([0.3, 0.1, 0.3])
"""Standard deviation of the noise in each family, about in units of the curve's own."""
_HARMONICS = 3
_LENGTHS = (1.5, 6.0)
_LEVELS = (4, 9)


@dataclasses.dataclass(frozen=True)
class Curves:
    """Observed points and points asked for.

    Values are in units in which the observations of a curve have mean 0 and standard deviation 1:
    scaling by anything that is hidden would tell something of it.

    Attributes:
      times: of the observations, ascending.
      values: observed, noise included.
      asked: times asked for.
      truth: the curve there, without noise.
      unit: of the values, in standard deviations of the curve itself; errors are scored in those.
      family: index into the names of families.
      floor: the best possible estimate where it is known, else NaN.

    """

    times: Float64[np.ndarray, "curves observed"]
    values: Float64[np.ndarray, "curves observed"]
    asked: Float64[np.ndarray, "curves asked"]
    truth: Float64[np.ndarray, "curves asked"]
    unit: Float64[np.ndarray, "curves 1"]
    family: Int[np.ndarray, " curves"]
    floor: Float64[np.ndarray, "curves asked"]

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The fields of a batch, in single precision."""
        names = ("times", "values", "asked", "truth", "unit")
        return {name: getattr(self, name).astype(np.float32) for name in names}


def synthetic(generator: np.random.Generator, count: int, *, with_floor: bool = False) -> Curves:
    """Curves of the three families in turn.

    Args:
      generator: of all random numbers.
      count: how many curves.
      with_floor: also compute the posterior mean of the Gaussian processes.

    """
    family = np.arange(count) % len(FAMILIES)
    times = np.sort(generator.uniform(0, SPAN, (count, OBSERVED)), axis=1)
    asked = generator.uniform(0, SPAN, (count, ASKED))
    periodic = np.flatnonzero(family == 1)
    times[periodic], asked[periodic] = _with_gap(generator, times[periodic])
    both = np.concatenate([times, asked], axis=1)
    truth = np.empty_like(both)
    shortest, longest = map(math.log, _LENGTHS)
    lengths = np.exp(generator.uniform(shortest, longest, (count, 1, 1)))
    for index, draw in enumerate((_smooth, _periodic, _piecewise)):
        rows = np.flatnonzero(family == index)
        truth[rows] = draw(generator, both[rows], lengths[rows])
    noise = NOISE[family, None] * generator.standard_normal(times.shape)
    observed = truth[:, :OBSERVED] + noise
    floor = np.full(asked.shape, np.nan)
    if with_floor:
        rows = np.flatnonzero(family == 0)
        floor[rows] = posterior_mean(times[rows], observed[rows], asked[rows], lengths[rows])
    mean, scale = observed.mean(1, keepdims=True), observed.std(1, keepdims=True)
    return Curves(
        times,
        (observed - mean) / scale,
        asked,
        (truth[:, OBSERVED:] - mean) / scale,
        scale / truth.std(1, keepdims=True),
        family,
        (floor - mean) / scale,
    )


def squared_errors(
    curves: Curves, estimate: Float64[np.ndarray, "curves asked"]
) -> Float64[np.ndarray, "curves asked"]:
    """((estimate - truth) unit)^2, in variances of the curve itself."""
    return ((estimate - curves.truth) * curves.unit) ** 2


def _with_gap(
    generator: np.random.Generator, times: Float64[np.ndarray, "curves observed"]
) -> tuple[Float64[np.ndarray, "curves observed"], Float64[np.ndarray, "curves asked"]]:
    """Observations on both sides of a gap, and times asked for of which half lie in it."""
    rows = len(times)
    start = generator.uniform(0, SPAN - GAP, (rows, 1))
    squeezed = times * (1 - GAP / SPAN)
    asked = generator.uniform(0, SPAN, (rows, ASKED))
    asked[:, ::2] = start + GAP * generator.random((rows, ASKED // 2))
    return np.where(squeezed < start, squeezed, squeezed + GAP), asked


def _smooth(
    generator: np.random.Generator,
    times: Float64[np.ndarray, "curves points"],
    lengths: Float64[np.ndarray, "curves 1 1"],
) -> Float64[np.ndarray, "curves points"]:
    """Gaussian processes of unit variance with a squared exponential covariance."""
    covariance = _covariance(times, times, lengths) + 1e-8 * np.eye(times.shape[1])
    normal = generator.standard_normal((*times.shape, 1))
    return (np.linalg.cholesky(covariance) @ normal)[..., 0]


def _periodic(
    generator: np.random.Generator,
    times: Float64[np.ndarray, "curves points"],
    lengths: Float64[np.ndarray, "curves 1 1"],
) -> Float64[np.ndarray, "curves points"]:
    """Sums of harmonics of one period with random amplitudes and phases."""
    del lengths
    order = np.arange(1, _HARMONICS + 1)
    shape = (len(times), 1, _HARMONICS)
    amplitude = generator.standard_normal(shape) / order
    phase = generator.uniform(0, 2 * np.pi, shape)
    angle = 2 * np.pi * times[..., None] * order / PERIOD + phase
    curve = (amplitude * np.sin(angle)).sum(-1)
    return curve / np.sqrt((amplitude**2).sum(-1) / 2)


def _piecewise(
    generator: np.random.Generator,
    times: Float64[np.ndarray, "curves points"],
    lengths: Float64[np.ndarray, "curves 1 1"],
) -> Float64[np.ndarray, "curves points"]:
    """Random levels between jumps at random times."""
    del lengths
    rows, most = len(times), _LEVELS[1] - 1
    count = generator.integers(*_LEVELS, rows)
    jumps = generator.uniform(0, SPAN, (rows, most - 1))
    jumps[np.arange(most - 1) >= count[:, None] - 1] = np.inf
    piece = (times[..., None] >= jumps[:, None]).sum(-1)
    level = generator.standard_normal((rows, most))
    return np.take_along_axis(level, piece, axis=1)


def _covariance(
    a: Float64[np.ndarray, "curves m"],
    b: Float64[np.ndarray, "curves n"],
    lengths: Float64[np.ndarray, "curves 1 1"],
) -> Float64[np.ndarray, "curves m n"]:
    return np.exp(-0.5 * ((a[:, :, None] - b[:, None]) / lengths) ** 2)


def posterior_mean(
    times: Float64[np.ndarray, "curves observed"],
    values: Float64[np.ndarray, "curves observed"],
    asked: Float64[np.ndarray, "curves asked"],
    lengths: Float64[np.ndarray, "curves 1 1"],
) -> Float64[np.ndarray, "curves asked"]:
    """E[f(asked) | values] = K* (K + noise^2 I)^-1 values: no estimate has a smaller mean square.

    References: Rasmussen and Williams 2006, equation 2.25.
    """
    covariance = _covariance(times, times, lengths) + NOISE[0] ** 2 * np.eye(times.shape[1])
    weights = np.linalg.solve(covariance, values[..., None])
    return (_covariance(asked, times, lengths) @ weights)[..., 0]


def nadaraya_watson(curves: Curves, width: float) -> Float64[np.ndarray, "curves asked"]:
    """sum_j k(t - t_j) y_j / sum_j k(t - t_j) with a Gaussian k of one standard deviation.

    References: Nadaraya 1964; Watson 1964.
    """
    exponent = -0.5 * ((curves.asked[:, :, None] - curves.times[:, None]) / width) ** 2
    weights = np.exp(exponent - exponent.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights * curves.values[:, None]).sum(-1)


def nearest_distance(curves: Curves) -> Float64[np.ndarray, "curves asked"]:
    """From each time asked for to the nearest observation."""
    return np.abs(curves.asked[:, :, None] - curves.times[:, None]).min(-1)
