r"""Gaussians of any width at one cost: down to a coarse grid, over the grid, and up again.

With narrow bells of width t that depend on the grid's step m alone, and u^2 = width^2 - 2 t^2,

.. math::
  e^{-(j - i - \mu)^2 / 2 w^2} = c \sum_{a, b}
  e^{-(j - ma)^2 / 2 t^2} e^{-(ma - mb - \mu)^2 / 2 u^2} e^{-(i - mb)^2 / 2 t^2} (1 + \epsilon)

by Poisson's summation formula, twice. The relative error is the same for every pair, and a unit of
rounding for t and u about as large as m (`_BELL`, `_REST`). All terms are positive, so that nothing
cancels. The bells are constants; only the sum over the grid knows the width, and its reach in steps
is bounded (slices), or it is over a grid of so few points that all pairs are taken (dense).

Down and up go products of blocks of 8 steps.

Letters: B batch, P positions, N heads, W channels, m step, C grid points, F positions a block,
I blocks, J rows of 8 grid points, M = 8, G grid points that a block reaches, R distances on the
grid, Q grid points that a product gives of the L around them; b: B or 1; n: N, or 1 where all heads
share a width; k: K, or N where widths differ.
"""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attn_jax.ops.positions import Either
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.parameters import Parameters, by_parameters
from attn_jax.ops.toeplitz.products import product
from attn_jax.ops.toeplitz.rows import Sums, Trust, summed
from attn_jax.ops.toeplitz.shifted import padded

# Grid points a block. Fewer make the products small, more do work at distances without weight.
_STEPS = 8
# Grid points that the sum over the grid takes in one product.
_BAND = 32
# Width of the bells, and the least of the rest, in units of the step and of `_grain`: the error is
# a unit of rounding where 1 / bell^2 + 1 / (bell^2 + rest^2) <= 1.
_BELL, _REST = 1.25, 1.11
# Least share of a Gaussian's mass within reach for a row to be trusted: what is cut off beyond
# the reach counts fifty times as much there.
SHARE = 0.02


def deviations(dtype: jnp.dtype) -> float:
    """The reach in widths: weights beyond are below a unit of rounding."""
    return math.sqrt(-2 * math.log(jnp.finfo(dtype).eps / 2))


def _grain(dtype: jnp.dtype) -> float:
    """The width of a Gaussian, in steps, whose sum over a grid is its integral up to rounding."""
    return math.sqrt(math.log(4 / jnp.finfo(dtype).eps) / 2) / math.pi


def finest(step: int, dtype: jnp.dtype) -> float:
    """The least width for a grid step."""
    return step * _grain(dtype) * math.sqrt(2 * _BELL**2 + _REST**2)


def reach_on_grid(ratio: float, dtype: jnp.dtype) -> int:
    """How many steps the sum over the grid reaches for widths up to `ratio` steps.

    One more than these need leaves room for a peak beside the query.
    """
    rest = math.sqrt(ratio**2 - 2 * (_BELL * _grain(dtype)) ** 2)
    return math.ceil(deviations(dtype) * rest) + 1


def needed_on_grid(
    width: Float[Either, "*n"], offset: Float[Either, "*m"], step: int, dtype: jnp.dtype
) -> Any:
    """How many steps the sum over the grid must reach."""
    array = np if isinstance(width, np.ndarray) and isinstance(offset, np.ndarray) else jnp
    rest = array.sqrt(array.maximum(width**2 - 2 * (_BELL * _grain(dtype) * step) ** 2, 0))
    return (deviations(dtype) * rest + abs(offset)) / step


def trust(line: Line) -> Trust:
    """How far sums by way of a grid are to be trusted: bells end, so that far weights are missing.

    A label's keys are kept from rows whose weights for them are beyond the square of a unit of
    rounding: values of 1e6 there do not show.
    """
    width, offset = lax.stop_gradient((_width(line), line.smooth.parameters["offset"]))
    reach = math.sqrt(2) * deviations(line.dtype) * width + abs(offset)
    reach = jnp.ceil(jnp.minimum(reach, line.length)).astype(jnp.int32)
    whole = jnp.minimum(math.sqrt(2 * math.pi) * width, line.length)
    return Trust(jnp.zeros_like(width), SHARE * whole, reach=reach)


def sums(line: Line, step: int, reach: int | None) -> Sums:
    """By way of a grid of a step.

    Args:
      line: the call, with a Gaussian that nothing limits.
      step: of the grid.
      reach: of the sum over the grid in steps; None takes all pairs of points.

    """

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        return _by_blocks(line, x, step, reach)

    return summed(line, function, len(_width(line)))


def _width(line: Line) -> Float[Array, "n"]:
    return line.smooth.parameters["width"]


def _between(
    line: Line, coarse: Float[Array, "b C k W"], step: int, reach: int | None
) -> Float[Array, "b C k W"]:
    """The sum over the grid, with the factor that makes all three the kernel."""
    points = coarse.shape[1]
    most = points - 1 if reach is None else reach
    size = points if reach is None else _BAND
    beyond = 0 if reach is None else -(-reach // _BAND) * _BAND

    def weights(parameters: Parameters, _: Any) -> Float[Array, "n Q L"]:
        taps = _taps(step, most, parameters["width"], parameters["offset"])
        return _toeplitz(taps, size, size + 2 * beyond, most - beyond)

    def total(x: Float[Array, "b C k W"], matrix: Float[Array, "n Q L"]) -> Float[Array, "b C k W"]:
        blocks = x[:, None] if reach is None else _surroundings(x, beyond)
        return product(matrix, blocks).reshape(len(x), -1, *x.shape[2:])[:, :points]

    return by_parameters(total, weights, coarse, line.smooth.parameters)


def _taps(
    step: int, most: int, width: Float[Array, "n"], offset: Float[Array, "n"]
) -> Float[Array, "R n"]:
    """Weights of the sum over the grid, up to `most` steps away."""
    bell = _BELL * _grain(width.dtype) * step
    rest = jnp.sqrt(jnp.maximum(jnp.square(width) - 2 * bell**2, step**2 / 2))
    scale = step**2 * width / (2 * math.pi * bell**2 * rest)
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


def _surroundings(coarse: Float[Array, "b C k W"], beyond: int) -> Float[Array, "b I L k W"]:
    """For every block of _BAND points, the points from `beyond` before to `beyond` after it."""
    batch, points = coarse.shape[:2]
    count, rows = -(-points // _BAND), 2 * beyond // _BAND + 1
    coarse = padded(coarse, 1, beyond, beyond + count * _BAND - points)
    coarse = coarse.reshape(batch, -1, _BAND, *coarse.shape[2:])
    return jnp.concatenate([coarse[:, row : row + count] for row in range(rows)], axis=2)


def _bells(distance: Int[np.ndarray, "..."], step: int, dtype: jnp.dtype) -> Array:
    width = _BELL * _grain(dtype) * step
    return jnp.asarray(np.exp(-np.square(distance / width) / 2), dtype)


def _bell_reach(dtype: jnp.dtype) -> int:
    """In steps."""
    return math.ceil(deviations(dtype) * _BELL * _grain(dtype))


def _by_blocks(
    line: Line, x: Float[Array, "#b P k W"], step: int, reach: int | None
) -> Float[Array, "#b P k W"]:
    """Grid point c is at position m (c - bell reach)."""
    batch, length, together, channels = x.shape
    size, beyond = _STEPS * step, _bell_reach(x.dtype)
    count = -(-length // size)
    points = step * np.arange(-beyond, _STEPS + beyond)
    bells = _bells(points[:, None] - np.arange(size)[None], step, x.dtype)
    blocks = padded(x, 1, 0, count * size - length).reshape(batch, count, size, 1, -1)
    pieces = product(bells[None], blocks)[:, :, :, 0]
    grid = _overlapped(pieces).reshape(batch, -1, together, channels)
    grid = _between(line, grid, step, reach)
    grid = grid.reshape(batch, -1, _STEPS, together * channels)
    y = product(bells.T[None], _windows(grid, len(points))[:, :, :, None])
    return y.reshape(batch, -1, together, channels)[:, :length]


def _overlapped(pieces: Float[Array, "b I G W"]) -> Float[Array, "b J M W"]:
    """Grid points in rows of 8: the sum of what the blocks give them.

    A block's first point is that of the row with its index.
    """
    batch, count, points, channels = pieces.shape
    rows = -(-points // _STEPS)
    pieces = padded(pieces, 2, 0, rows * _STEPS - points)
    pieces = pieces.reshape(batch, count, rows, _STEPS, channels)
    shifted = [padded(pieces[:, :, row], 1, row, rows - 1 - row) for row in range(rows)]
    return functools.reduce(operator.add, shifted)


def _windows(grid: Float[Array, "b J M W"], points: int) -> Float[Array, "b I G W"]:
    """The grid points that each block reaches."""
    rows = -(-points // _STEPS)
    count = grid.shape[1] - rows + 1
    joined = jnp.concatenate([grid[:, row : row + count] for row in range(rows)], axis=2)
    return joined[:, :, :points]
