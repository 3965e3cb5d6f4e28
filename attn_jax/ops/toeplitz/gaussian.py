r"""Gaussians of any width at one cost: down to a coarse grid, over the grid, and up again.

With narrow bells of width t that depend on the grid's step m alone, and u^2 = w^2 - 2 t^2,

.. math::
  e^{-(j - i - \mu)^2 / 2 w^2} = c \sum_{a, b}
  e^{-(j - ma)^2 / 2 t^2} e^{-(ma - mb - \mu)^2 / 2 u^2} e^{-(i - mb)^2 / 2 t^2} (1 + \epsilon)

by Poisson's summation formula, twice. The error is relative to each pair's weight, and a few units
of rounding for t and u about as large as m (`_levels`); that of bells that end is relative to the
peak. All terms are positive, so that nothing cancels. The bells are constants; only the sum over
the grid knows the width, and its reach in steps is bounded (slices), or it is over a grid of so few
points that all pairs are taken (dense).

A coarse grid is reached by way of finer ones, each at most eight times as coarse as the one before:
the Gaussian of width u that is left to the sum over one is that of the next likewise. So what is
left in the end has lost 2 t^2 for every level, and c is the product of all; where there is a next
level, u is larger, and the bells of this one may be narrower.

Labels: runs of one label are laid so far apart on a longer line that the sums of one take in none
of another, if there is room; otherwise rows near another run are computed densely (`exact`).

Letters: B batch, P positions, N heads, W channels, m step, K taps, C grid points, D those and as
many zeros beside them as the sum over them reads, R distances on the grid; b: B or 1; n: N, or 1
where all heads share a width; k: K value heads, or N where widths differ.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops.positions import Either
from attn_jax.ops.toeplitz import resampled
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.parameters import Parameters, by_parameters
from attn_jax.ops.toeplitz.products import product
from attn_jax.ops.toeplitz.rows import Sums, Trust, summed
from attn_jax.ops.toeplitz.runs import Places, gap_between, places
from attn_jax.ops.toeplitz.shifted import padded, shifted_sum

# By how much a level is coarser than the one before, at most: with more, slices are many.
_FACTOR = 8
# The least square of the width that is left to the sum over the grid, in units of the step and of
# `_grain`: with it the least width of all is least (`_levels`).
_REST_SQUARED = 1.5
# Least share of a Gaussian's mass within reach for a row to be trusted: what is cut off beyond
# the reach counts fifty times as much there.
SHARE = 0.02


def deviations(dtype: jnp.dtype) -> float:
    """The reach in widths: weights beyond are below a unit of rounding."""
    return math.sqrt(-2 * math.log(jnp.finfo(dtype).eps / 2))


def _grain(dtype: jnp.dtype) -> float:
    """The width of a Gaussian, in steps, whose sum over a grid is its integral up to rounding.

    Up to two units: the first term of Poisson's formula, 2 exp(-2 (pi width)^2), is that.
    """
    return math.sqrt(math.log(2 / jnp.finfo(dtype).eps) / 2) / math.pi


def _factors(step: int) -> list[int]:
    """By how much each level is coarser than the one before; their product is the step."""
    most = [_FACTOR] * (round(math.log2(step)) // round(math.log2(_FACTOR)))
    left = step // math.prod(most)
    return most + [left] * (left > 1)


class _Level(NamedTuple):
    """A grid made of a line, or of the grid before.

    Attributes:
      factor: by how much it is coarser.
      bell: width of its bells, in its steps and units of `_grain`.

    """

    factor: int
    bell: float


def _levels(step: int) -> tuple[list[_Level], float]:
    """The levels on the way to a step, and the least width that they serve in units of `_grain`.

    With widths in a level's steps, of its bells and of the rest that it leaves of the least width,
    the terms of Poisson's formula are below the error that `_grain` allows where

      1 / bell^2 + 1 / (bell^2 + rest^2) <= 1 and 1 / (2 bell^2) + 1 / rest^2 <= 1:

    the first for sums over one index, the second for those over both. For the last level both are
    equal; for those before, of a larger rest, the first is the stricter one and gives the bell.
    """
    levels, rest_squared = [], _REST_SQUARED
    for factor in reversed(_factors(step)):
        bell_squared = (2 - rest_squared + math.sqrt(rest_squared**2 + 4)) / 2
        levels.append(_Level(factor, math.sqrt(bell_squared)))
        rest_squared = factor**2 * (2 * bell_squared + rest_squared)
    return levels[::-1], math.sqrt(rest_squared)


def finest(step: int, dtype: jnp.dtype) -> float:
    """The least width for a grid step."""
    return _levels(step)[1] * _grain(dtype)


def _bells_squared(step: int, dtype: jnp.dtype) -> float:
    """What the bells of all levels take of the squared width: of the least one all but its rest."""
    return finest(step, dtype) ** 2 - _REST_SQUARED * (step * _grain(dtype)) ** 2


def reach_on_grid(widest: float, step: int, dtype: jnp.dtype) -> int:
    """How many steps the sum over the grid reaches for widths up to the widest.

    One more than these need leaves room for a peak beside the query.
    """
    rest = math.sqrt(widest**2 - _bells_squared(step, dtype))
    return math.ceil(deviations(dtype) * rest / step) + 1


def needed_on_grid(
    width: Float[Either, "*n"], offset: Float[Either, "*m"], step: int, dtype: jnp.dtype
) -> Any:
    """How many steps the sum over the grid must reach."""
    array = np if isinstance(width, np.ndarray) and isinstance(offset, np.ndarray) else jnp
    rest = array.sqrt(array.maximum(width**2 - _bells_squared(step, dtype), 0))
    return (deviations(dtype) * rest + abs(offset)) / step


def trust(line: Line, longer: int) -> Trust:
    """How far sums by way of a grid are to be trusted: bells end, so that far weights are missing.

    Labels matter within what keeps one's keys from another's rows, unless runs are laid apart.

    Args:
      line: the call.
      longer: by how many places the line is lengthened, as of `sums`.

    """
    width = lax.stop_gradient(_width(line))
    whole = jnp.minimum(math.sqrt(2 * math.pi) * width, line.length)
    reach = None
    if line.labels is not None:
        reach = _apart(line)
        if _may_be_laid_out(line):
            reach = jnp.where(_gap(line, longer) > 0, 0, reach)
    return Trust(jnp.zeros_like(width), SHARE * whole, reach=reach)


def _apart(line: Line) -> Int[Array, "n"]:
    """How far a key must be: weights beyond are the square of a unit of rounding, or less.

    There values of 1e6 do not show.
    """
    width, offset = lax.stop_gradient((_width(line), line.smooth.parameters["offset"]))
    reach = math.sqrt(2) * deviations(line.dtype) * width + abs(offset)
    return jnp.ceil(jnp.minimum(reach, line.length)).astype(jnp.int32)


def _may_be_laid_out(line: Line) -> bool:
    """Whether there are labels, and queries and keys are at the same positions."""
    return line.labels is not None and line.length == line.queries == line.keys


def has_room(line: Line, longer: int) -> bool | Bool[Array, ""]:
    """Whether runs of one label can be laid apart on a line that is so much longer."""
    return _may_be_laid_out(line) and _gap(line, longer) > 0


def _gap(line: Line, longer: int) -> Int[Array, ""]:
    """Between runs of one label; 0 where there is no room, or a key's label is not its query's."""
    assert line.labels is not None
    assert line.runs is not None
    gap = gap_between(line.runs, longer, _FACTOR)
    fits = gap >= _apart(line).max()
    if not line.own_labels:
        of_queries, of_keys = line.labels
        fits &= (of_queries == of_keys).all()
    return jnp.where(fits, gap, 0)


def sums(line: Line, step: int, reach: int | None, longer: int) -> Sums:
    """By way of a grid of a step.

    Args:
      line: the call, with a Gaussian that nothing limits.
      step: of the grid.
      reach: of the sum over the grid in steps; None takes all pairs of points.
      longer: by how many places the line is lengthened, for runs of one label to be laid apart.

    """
    laid, length = None, line.length
    if _may_be_laid_out(line):
        assert line.runs is not None
        laid = places(line.runs, _gap(line, longer), longer)
        length += longer
    grid = _Grid.over(length, step, reach, line.dtype)
    parameters = line.smooth.parameters

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        if laid is not None:
            x = jnp.broadcast_to(x, (line.batch, *x.shape[1:]))
        return by_parameters(
            grid.total, grid.weights, x, parameters, laid, before=grid.down, after=grid.up
        )

    return summed(line, function, len(_width(line)))


class _Grid(NamedTuple):
    """A grid over a line, and the way there and back.

    Attributes:
      step: of the grid.
      reach: of the sum over it in steps; None takes all pairs of points.
      bells: of every level.
      lengths: of the line and every level's grid.

    """

    step: int
    reach: int | None
    bells: tuple[resampled.Bells, ...]
    lengths: tuple[int, ...]

    @classmethod
    def over(cls, length: int, step: int, reach: int | None, dtype: jnp.dtype) -> "_Grid":
        """The grid over a line of so many positions."""
        bells = tuple(_bells(level, dtype) for level in _levels(step)[0])
        lengths = itertools.accumulate(bells, resampled.points, initial=length)
        return cls(step, reach, bells, tuple(lengths))

    @property
    def _most(self) -> int:
        """Steps that the sum over the grid reaches."""
        return self.lengths[-1] - 1 if self.reach is None else self.reach

    def down(self, x: Float[Array, "#b P k W"], laid: Places | None) -> Float[Array, "#b D k W"]:
        """To the grid, of runs laid apart; with as many zeros as the sum over it reads."""
        flat = x.reshape(*x.shape[:2], -1)
        for level, bells in enumerate(self.bells):
            outermost, last = level == 0, level == len(self.bells) - 1
            margin = (self.reach or 0) if last else 0
            flat = resampled.down(flat, bells, outermost, laid if outermost else None, margin)
        return flat.reshape(*flat.shape[:2], *x.shape[2:])

    def up(self, x: Float[Array, "#b C k W"], laid: Places | None) -> Float[Array, "#b P k W"]:
        """From the grid."""
        flat = x.reshape(*x.shape[:2], -1)
        for level, bells in reversed([*enumerate(self.bells)]):
            length, outermost = self.lengths[level], level == 0
            flat = resampled.up(flat, bells, length, outermost, laid if outermost else None)
        return flat.reshape(*flat.shape[:2], *x.shape[2:])

    def weights(self, parameters: Parameters, _: Any) -> Float[Array, "..."]:
        """For `total`, of all distances on the grid or as a matrix of all pairs."""
        taps = _taps(self.step, self._most, parameters["width"], parameters["offset"])
        if self.reach is not None:
            return taps[None, :, None]
        return _toeplitz(taps, self.lengths[-1], self.lengths[-1], self._most)

    def total(
        self, x: Float[Array, "#b D k W"], weights: Float[Array, "..."]
    ) -> Float[Array, "#b C k W"]:
        """The sum over the grid."""
        if self.reach is None:
            return product(weights, x[:, None])[:, 0]
        return shifted_sum(x, weights, self.lengths[-1], 0, apart=True)


def _bells(level: _Level, dtype: jnp.dtype) -> resampled.Bells:
    """Of position j and grid point k, where that is not negligible next to the peak; else zero.

    Sums with keys far away are of bells' tails: a sixteenth of a unit of rounding shows in them.
    """
    factor = level.factor
    width = level.bell * _grain(dtype) * factor
    reach = math.sqrt(-2 * math.log(jnp.finfo(dtype).eps / 16)) * width
    grid = factor * np.arange(-(reach // factor), (factor - 1 + reach) // factor + 1)
    distance = np.arange(factor)[:, None] - grid[None]
    bells = np.where(abs(distance) <= reach, np.exp(-np.square(distance / width) / 2), 0)
    return tuple(map(tuple, bells.tolist()))


def _width(line: Line) -> Float[Array, "n"]:
    return line.smooth.parameters["width"]


def _taps(
    step: int, most: int, width: Float[Array, "n"], offset: Float[Array, "n"]
) -> Float[Array, "R n"]:
    """Weights of the sum over the grid, up to `most` steps away."""
    rest = jnp.sqrt(jnp.maximum(jnp.square(width) - _bells_squared(step, width.dtype), 0))
    rest = jnp.maximum(rest, step / math.sqrt(2))
    areas = [2 * math.pi * (x.bell * _grain(width.dtype)) ** 2 for x in _levels(step)[0]]
    scale = width / (math.prod(areas) * rest)
    distance = step * jnp.arange(-most, most + 1, dtype=width.dtype)[:, None]
    return jnp.exp(-jnp.square((distance - offset[None]) / rest[None]) / 2) * scale[None]


def _toeplitz(
    weights: Float[Array, "R n"], rows: int, columns: int, first: int
) -> Float[Array, "n rows columns"]:
    """Entry (i, j) is weight first + j - i, zero where there is none.

    From a ring of the weights, written out again and again in rows that are one shorter: then each
    row is one further on. Its transpose is a sum of rows, where a gather's would be a scatter.
    """
    beyond = rows + columns
    known = padded(weights.T, 1, beyond, beyond)[
        :, beyond + first - rows : beyond + first + columns
    ]
    ring = jnp.roll(known, -rows, 1)
    written = jnp.tile(ring, (1, rows))[:, : rows * (beyond - 1)]
    return written.reshape(-1, rows, beyond - 1)[:, :, :columns]
