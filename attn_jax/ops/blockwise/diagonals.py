"""Toeplitz matrices and sums over diagonals, each the other's transpose, as primitives of JAX.

A matrix whose rows are each the row above shifted by one is cut from rows one longer, laid end to
end. What JAX would make of that by transposition, a pad and a sum, takes XLA:CPU four times as long
as sums over a few rows at a time.

Letters: A lanes, N heads, n: N, or 1 where all share one matrix; t rows, s columns, L diagonals,
t + s - 1.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from attn_jax.ops.varying import varying_as

# Rows whose diagonals are added up at a time.
_ROWS = 16

_matrix_p = Primitive("attn_jax_toeplitz_matrix")
_sums_p = Primitive("attn_jax_diagonal_sums")


def toeplitz(by_distance: Float[Array, "n L"], rows: int, heads: int) -> Float[Array, "N t s"]:
    """The matrices whose entry (i, j) is by_distance[j - i + rows - 1]."""
    return _matrix_p.bind(by_distance[None], rows=rows, heads=heads)[0]


def _matrix(x: Float[Array, "A n L"], *, rows: int, heads: int) -> Float[Array, "A N t s"]:
    lanes, count, length = x.shape
    longer = jnp.pad(x, ((0, 0), (0, 0), (0, 1)))
    flat = jnp.broadcast_to(longer[:, :, None], (lanes, count, rows, length + 1))
    flat = flat.reshape(lanes, count, -1)[..., rows - 1 : rows - 1 + rows * length]
    matrix = flat.reshape(lanes, count, rows, length)[..., : length - rows + 1]
    return jnp.broadcast_to(matrix, (lanes, heads, *matrix.shape[2:]))


def _sums(x: Float[Array, "A N t s"], *, count: int) -> Float[Array, "A n L"]:
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


def _matrix_transposed(cotangent, x, *, rows: int, heads: int):
    del rows, heads
    return [_sums_p.bind(ad.instantiate_zeros(cotangent), count=x.aval.shape[1])]


def _sums_transposed(cotangent, x, *, count: int):
    del count
    _, heads, rows, _ = x.aval.shape
    return [_matrix_p.bind(ad.instantiate_zeros(cotangent), rows=rows, heads=heads)]


def _batched(primitive: Primitive, arguments, axes, **how):
    """A mapped axis joins the lanes."""
    x = jnp.moveaxis(arguments[0], axes[0], 0)
    y = primitive.bind(x.reshape(-1, *x.shape[2:]), **how)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _matrix_shape(x, *, rows: int, heads: int):
    lanes, _, length = x.shape
    return x.update(shape=(lanes, heads, rows, length - rows + 1), weak_type=False)


def _sums_shape(x, *, count: int):
    lanes, _, rows, columns = x.shape
    return x.update(shape=(lanes, count, rows + columns - 1), weak_type=False)


def _define(primitive: Primitive, function, shape, transposed, names: tuple[str, ...]) -> None:
    primitive.def_impl(jax.jit(function, static_argnames=names))
    primitive.def_abstract_eval(shape)
    ad.deflinear2(primitive, transposed)
    batching.primitive_batchers[primitive] = lambda *rest, **how: _batched(primitive, *rest, **how)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))


_define(_matrix_p, _matrix, _matrix_shape, _matrix_transposed, ("rows", "heads"))
_define(_sums_p, _sums, _sums_shape, _sums_transposed, ("count",))
