"""Toeplitz matrices and sums over diagonals, each the other's transpose, as primitives of JAX.

A matrix whose rows are each the row above shifted by one is cut from rows one longer, laid end to
end. What JAX would make of that by transposition, a pad and a sum, takes XLA:CPU four times as long
as sums over a few rows at a time.

Letters: A lanes, N heads, n: N, or 1 where all share one matrix; t rows, s columns, L diagonals,
t + s - 1.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_jax.ops.primitives import linear
from attn_jax.ops.varying import varying_as

# Rows whose diagonals are added up at a time.
_ROWS = 16


def toeplitz(by_distance: Float[Array, "n L"], rows: int, heads: int) -> Float[Array, "N t s"]:
    """The matrices whose entry (i, j) is by_distance[j - i + rows - 1]."""
    return _matrix(by_distance[None], rows=rows, heads=heads)[0]


def _laid_out(
    x: Float[Array, "A n L"], *, rows: int, heads: int, **_: Any
) -> Float[Array, "A N t s"]:
    lanes, count, length = x.shape
    longer = jnp.pad(x, ((0, 0), (0, 0), (0, 1)))
    flat = jnp.broadcast_to(longer[:, :, None], (lanes, count, rows, length + 1))
    flat = flat.reshape(lanes, count, -1)[..., rows - 1 : rows - 1 + rows * length]
    matrix = flat.reshape(lanes, count, rows, length)[..., : length - rows + 1]
    return jnp.broadcast_to(matrix, (lanes, heads, *matrix.shape[2:]))


def _summed(x: Float[Array, "A N t s"], *, count: int, **_: Any) -> Float[Array, "A n L"]:
    """First the rows that lie a multiple of a few apart, shifted; then those few."""
    lanes, heads, rows, columns = x.shape
    few = math.gcd(rows, _ROWS)
    length = columns + rows - few

    def step(total: Array, index: Array) -> tuple[Array, None]:
        part = lax.dynamic_slice_in_dim(x, index * few, few, 2)
        first = rows - few - index * few
        there = lax.dynamic_slice_in_dim(total, first, columns, 3)
        return lax.dynamic_update_slice_in_dim(total, there + part, first, 3), None

    total = varying_as(jnp.zeros((lanes, heads, few, length), x.dtype), x)
    total = lax.scan(step, total, jnp.arange(rows // few))[0]
    total = jnp.pad(total, ((0, 0), (0, 0), (0, 0), (0, few - 1))).reshape(lanes, heads, -1)
    total = jnp.pad(total, ((0, 0), (0, 0), (few - 1, 1)))
    sums = total.reshape(lanes, heads, few, length + few).sum(2)[..., : length + few - 1]
    return sums if count > 1 else sums.sum(1, keepdims=True)


_matrix = linear(
    "attn_jax_toeplitz_matrix",
    _laid_out,
    lambda x, *, rows, heads: (x[0], heads, rows, x[2] - rows + 1),
    lambda cotangent, *, shape, **_: _sums(cotangent, count=shape[1]),
)
_sums = linear(
    "attn_jax_diagonal_sums",
    _summed,
    lambda x, *, count: (x[0], count, x[2] + x[3] - 1),
    lambda cotangent, *, shape, **_: _matrix(cotangent, rows=shape[2], heads=shape[1]),
)
