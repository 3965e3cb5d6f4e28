"""One matrix times every block of a line, as a primitive of JAX.

Letters: A sequences, I blocks, L inputs and Q outputs a block, k heads, W channels; a: A or 1, n: k
or 1.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.primitives import bilinear


def product(
    matrix: Float[Array, "n Q L"], x: Float[Array, "A I L k W"]
) -> Float[Array, "A I Q k W"]:
    """The matrix times every block; linear in both."""
    return _product(x, matrix[None])


def _multiplied(x: Float[Array, "A I L k W"], matrix: Float[Array, "a n Q L"], **__: Any) -> Array:
    """The matrix is repeated for every block: XLA then needs no transposed copy of the blocks."""
    sequences, count, _, together, channels = x.shape
    matrix = jnp.broadcast_to(matrix[:, None], (sequences, count, *matrix.shape[1:]))
    if matrix.shape[2] == 1:
        y = jnp.einsum("aiql,ailw->aiqw", matrix[:, :, 0], x.reshape(*x.shape[:3], -1))
        return y.reshape(sequences, count, -1, together, channels)
    y = jnp.einsum("aikql,aiklw->aikqw", matrix, jnp.swapaxes(x, 2, 3))
    return jnp.swapaxes(y, 2, 3)


def _shape(x: tuple[int, ...], matrix: tuple[int, ...]) -> tuple[int, ...]:
    return (*x[:2], matrix[2], *x[3:])


def _in_x(cotangent: Array, matrix: Array, _: tuple[int, ...]) -> Array:
    return _product(cotangent, jnp.swapaxes(matrix, 2, 3))


def _in_matrix(cotangent: Array, x: Array, shape: tuple[int, ...]) -> Array:
    sequences, heads = ("a" if shape[0] > 1 else ""), ("k" if shape[1] > 1 else "")
    y = jnp.einsum(f"aiqkw,ailkw->{sequences}{heads}ql", cotangent, x)
    return y.reshape(shape)


_product = bilinear("attn_jax_block_product", _multiplied, _shape, _in_x, _in_matrix)
