"""Rows times numbers of their own, and sums of products over a row, as primitives of JAX.

Each is the other's transpose. XLA:CPU takes thirty times as long for a sum over the last axis as
for one over any other, and a product with ones, which is fast, needs what it sums in memory.

Letters: A sequences, P positions, W channels of all heads, n heads with numbers of their own; a: A
or 1.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from attn_jax.ops.primitives import bilinear
from attn_jax.ops.toeplitz.shifted import sum_of

# Numbers a vector of the machine holds, and the most parts of a row that are added up in a loop.
_LANES = 16
_PARTS = 8


def times(x: Float[Array, "A P W"], factors: Float[Array, "a P n 1"]) -> Float[Array, "A P W"]:
    """Every channel times the factor of its row and head."""
    return _times(x, factors)


def row_sums(
    x: Float[Array, "A P W"], y: Float[Array, "a P W"], heads: int
) -> Float[Array, "A P n 1"]:
    """Sums of x y over the channels of each head."""
    return _sums(x, y, heads=heads)


def by_row(
    function: Callable[[Array, Array], Array],
    x: Float[Array, "A P W"],
    rows: Shaped[Array, "#A P n 1"],
) -> Float[Array, "A P W"]:
    """The function of every channel and what its row and head have.

    No axis of a single head: XLA would choose among layouts of it that are the same, and copy.
    """
    heads = rows.shape[2]
    if heads == 1:
        return function(x, rows[..., 0])
    return function(x.reshape(*x.shape[:2], heads, -1), rows).reshape(x.shape)


def _scaled(x: Array, factors: Array, **_: Any) -> Array:
    return by_row(operator.mul, x, factors)


def _summed(x: Array, y: Array, *, heads: int, **_: Any) -> Array:
    width = x.shape[2] // heads
    parts = math.gcd(width // _LANES, _PARTS) if width % _LANES == 0 else 1
    x, y = (z.reshape(*z.shape[:2], heads, parts, -1) for z in (x, y))
    lanes = sum_of([x[:, :, :, part] * y[:, :, :, part] for part in range(parts)])
    ones = jnp.ones((lanes.shape[3], 1), lanes.dtype)
    return jnp.einsum("apnl,lo->apno", lanes, ones, precision=lax.Precision.HIGHEST)


def _of_all(cotangent: Array, shape: tuple[int, ...]) -> Array:
    """Added up where all sequences share what it is of."""
    return cotangent if shape[0] > 1 else cotangent.sum(0, keepdims=True)


_times = bilinear(
    "attn_jax_times_rows",
    _scaled,
    lambda x, _: x,
    lambda cotangent, factors, _: times(cotangent, factors),
    lambda cotangent, x, shape: _of_all(row_sums(x, cotangent, shape[2]), shape),
)
_sums = bilinear(
    "attn_jax_row_sums",
    _summed,
    lambda x, _, *, heads: (*x[:2], heads, 1),
    lambda cotangent, y, shape, **_: times(jnp.broadcast_to(y, shape), cotangent),
    lambda cotangent, x, shape, **_: _of_all(times(x, cotangent), shape),
)
