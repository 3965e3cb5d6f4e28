r"""Gaussians of any width at one cost: down to a coarse grid and up again.

With t = width / sqrt(2) and a grid of step m,

.. math::
  e^{-(j - i - \mu)^2 / 2 w^2}
  = \frac{m}{\sqrt\pi\, t} \sum_c e^{-(j - mc)^2 / 2 t^2} e^{-(i + \mu - mc)^2 / 2 t^2} (1 + \epsilon),
  \quad |\epsilon| \le 2 e^{-2 \pi^2 (w / 2m)^2}

by Poisson's summation formula: the relative error is the same for every pair, and below a unit of
rounding for a step of about half the width (exactly: `finest`). All terms are positive, so that
nothing cancels. Both sums reach a fixed number of grid steps, whatever the width.

Steps of 2 and 3 are done as shifted slices, larger ones as products of blocks of 8 steps.

Letters: B batch, P positions, N heads, W channels, m step, C grid points, F positions a block,
I blocks, G grid points that a block reaches.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_jax.ops import proximity
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import Rows, Sums, reweighed
from attn_jax.ops.toeplitz.strided import padded, spread_sum, strided_sum

# Grid points a block. Fewer make the products small, more do work at distances without weight.
STEPS = 8
# Least share of a Gaussian's mass within reach for a row to be trusted: what is cut off beyond
# the reach counts fifty times as much there.
SHARE = 0.02


def deviations(dtype: jnp.dtype) -> float:
    """The reach in widths: weights beyond are below a unit of rounding."""
    return math.sqrt(-2 * math.log(jnp.finfo(dtype).eps / 2))


def finest(step: int, dtype: jnp.dtype) -> float:
    """The least width for a grid step: there the grid's error is a unit of rounding."""
    return 2 * step * math.sqrt(math.log(4 / jnp.finfo(dtype).eps) / 2) / math.pi


def reach_on_grid(step: int, widest: float, dtype: jnp.dtype) -> int:
    """How far each of the two sums reaches, a multiple of the step, for widths up to a largest."""
    return math.ceil(deviations(dtype) * widest / math.sqrt(2) / step) * step


def rows_by_slices(line: Line, step: int, reach: int) -> Rows:
    """Attention, both sums as shifted slices; the reach is a multiple of the step."""
    width, offset, scale = _parameters(line, step)
    distance = jnp.arange(-reach, reach + 1, dtype=width.dtype)[:, None]
    down = _bell(distance, width, scale)[None, :, None]
    up = _bell(distance + offset[None], width)[None, :, None]
    points = -(-(line.length - 1 + 2 * reach) // step) + 1

    def sums(x: Float[Array, "b P K W"]) -> Float[Array, "b P n W"]:
        """Grid point c is at position m c - reach."""
        around = 2 * reach, step * (points - 1) + 1 - line.length
        coarse = strided_sum(padded(x, 1, *around), down, step, points)
        return spread_sum(coarse, up, step, line.length, 2 * reach)

    return _reweighed(line, sums, width)


def rows_by_blocks(line: Line, step: int, reach: int) -> Rows:
    """Attention, both sums as products of blocks with one matrix; reach is a multiple of step."""
    width, offset, scale = _parameters(line, step)
    size, beyond = STEPS * step, reach // step
    position = jnp.arange(size, dtype=width.dtype)[None, :, None]
    point = step * jnp.arange(-beyond, STEPS + beyond, dtype=width.dtype)[:, None, None]
    down = jnp.moveaxis(_bell(position - point, width, scale), 2, 0)
    up = jnp.moveaxis(_bell(position - point + offset[None, None], width), 2, 0)
    count = -(-line.length // size)

    def sums(x: Float[Array, "b P K W"]) -> Float[Array, "b P n W"]:
        batch, _, heads, channels = x.shape
        x = padded(x, 1, 0, count * size - line.length)
        if len(width) == 1:
            blocks = x.reshape(batch, count, 1, size, heads * channels)
        else:
            blocks = jnp.swapaxes(x.reshape(batch, count, size, heads, channels), 2, 3)
        # The matrix is repeated for every block: XLA then needs no transposed copy of the blocks.
        matrices = (batch, count, *down.shape)
        pieces = jnp.einsum("bingf,binfw->bingw", jnp.broadcast_to(down, matrices), blocks)
        grid = _windows(_overlapped(pieces), pieces.shape[3])
        y = jnp.einsum("bingf,bingw->binfw", jnp.broadcast_to(up, matrices), grid)
        y = y if len(width) == 1 else jnp.swapaxes(y, 2, 3)
        return y.reshape(batch, -1, heads, channels)[:, : line.length]

    return _reweighed(line, sums, width)


def _overlapped(pieces: Float[Array, "b I n G W"]) -> Float[Array, "b J n M W"]:
    """Grid points in rows of STEPS: the sum of what the blocks give them.

    A block's first point is that of the row with its index.
    """
    batch, count, heads, points, channels = pieces.shape
    rows = -(-points // STEPS)
    pieces = padded(pieces, 3, 0, rows * STEPS - points)
    pieces = pieces.reshape(batch, count, heads, rows, STEPS, channels)
    return sum(padded(pieces[:, :, :, row], 1, row, rows - 1 - row) for row in range(rows))


def _windows(grid: Float[Array, "b J n M W"], points: int) -> Float[Array, "b I n G W"]:
    """The grid points that each block reaches."""
    rows = -(-points // STEPS)
    count = grid.shape[1] - rows + 1
    joined = jnp.concatenate([grid[:, row : row + count] for row in range(rows)], axis=3)
    return joined[:, :, :, :points]


def _parameters(line: Line, step: int) -> tuple[Array, Array, Array]:
    """Width and offset of each head, and the factor that makes the sums' weights the kernel's."""
    kernel, dtype = line.call.proximity, line.call.dtype
    assert isinstance(kernel, proximity.Gaussian)
    width, offset = (jnp.asarray(x, dtype).reshape(-1) for x in (kernel.width, kernel.offset))
    width, offset = jnp.broadcast_arrays(width, offset)
    return width, offset, step * math.sqrt(2 / math.pi) / width


def _bell(
    distance: Float[Array, "*axes #n"], width: Float[Array, "n"], scale: Array | float = 1.0
) -> Float[Array, "*axes n"]:
    """A Gaussian of the width over sqrt(2)."""
    ones = (1,) * (distance.ndim - 1)
    bell = jnp.exp(-jnp.square(distance / width.reshape(*ones, -1)))
    return bell * jnp.reshape(scale, (*ones, -1))


def _reweighed(line: Line, sums: Sums, width: Float[Array, "n"]) -> Rows:
    floor = SHARE * math.sqrt(2 * math.pi) * lax.stop_gradient(width)
    return reweighed(line, sums, jnp.zeros_like(width), floor)
