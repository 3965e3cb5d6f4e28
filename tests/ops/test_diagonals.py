"""Toeplitz matrices and sums over diagonals: their definitions, each the other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.ops.blockwise.diagonals import toeplitz

COLUMNS = 9


def expected(by_distance, rows, heads):
    i, j = np.arange(rows)[:, None], np.arange(COLUMNS)[None]
    matrices = np.asarray(by_distance)[:, j - i + rows - 1]
    return np.broadcast_to(matrices, (heads, rows, COLUMNS))


# Rows that are many, few and none times the rows whose diagonals are added up at a time.
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 24, 64])
@pytest.mark.parametrize("count", [1, 3])
def test_matrix_and_sums_are_their_definitions(rows, count):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(count, rows + COLUMNS - 1)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(3, rows, COLUMNS)), jnp.float32)
    matrices, pull = jax.vjp(lambda x: toeplitz(x, rows, 3), x)
    np.testing.assert_array_equal(matrices, expected(x, rows, 3))
    # by the definition: entry r is the sum of what lies r - (rows - 1) right of the diagonal
    sums = [
        [np.trace(matrix, k) for k in range(1 - rows, COLUMNS)] for matrix in np.asarray(cotangent)
    ]
    sums = np.asarray(sums if count > 1 else np.sum(sums, 0, keepdims=True))
    # at most 27 numbers of order one, in another order
    np.testing.assert_allclose(pull(cotangent)[0], sums, rtol=1e-5, atol=1e-5)


def test_nan_stays_on_its_diagonal():
    _, pull = jax.vjp(lambda x: toeplitz(x, 4, 2), jnp.ones((2, 12)))
    sums = np.asarray(pull(jnp.ones((2, 4, COLUMNS)).at[0, 0, 0].set(jnp.nan))[0])
    assert np.argwhere(np.isnan(sums)).tolist() == [[0, 3]]


def test_derivatives_of_any_order_and_lanes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 12)), jnp.float32)

    def loss(x):
        return (jnp.sin(toeplitz(x, 4, 2)) ** 2).sum()

    def plain(x):
        index = jnp.arange(COLUMNS)[None] - jnp.arange(4)[:, None] + 3
        return 2 * (jnp.sin(x[0][index]) ** 2).sum()

    for function in (jax.grad, jax.hessian):
        got, right = (jax.jit(jax.vmap(function(f)))(x) for f in (loss, plain))
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
